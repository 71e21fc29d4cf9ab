// Lightning Attention for Hopper: causal linear attention with one decay per head, in bf16 or float16.
//
// Every product of forward and backward is one primitive, a walk over the chunks of a sequence with
// a state (lambda^n stands for exp(-lambda n), i and j are tokens of one chunk of c tokens):
//
//     out_i = R_i * x_i S + sum_j D_ij (x_i . y_j) z_j          S = G S + sum_j U_j y_j^T z_j
//
//     pass   x   y   z   walks      R_i        U_j        D_ij
//     o      q   k   v   forwards   l^(i+1)    l^(c-1-j)  l^(i-j), j <= i
//     dq     do  v   k   forwards   the same
//     dv     k   q   do  backwards  l^(c-1-i)  l^(j+1)    l^(j-i), j >= i
//     dk     v   do  q   backwards  the same
//
// One warpgroup owns 64 columns of z and out and keeps its part of the state, transposed, in
// registers: S^T [64, X] is at once the accumulator of its own update and the A operand of S^T x^T.
// So the state never travels. It is split into two 16-bit numbers for that product: rounding it once
// would cost more than the error the output's own rounding makes (docs/kernels.md).
// One more warp brings tiles of 64 tokens with the bulk tensor copy engine.
//
// Compile-time: HOPPER = wgmma and bulk copies (sm_90a) or mma.sync and cp.async (sm_80 and later),
// HALF = float16 in place of bf16, XB = ceil(X / 64), NW = warpgroups (64 columns of z each) of a block,
// DOCS = whether documents end inside rows, SILU = some of x, y, z are taken through SiLU as they arrive
// (and dq, dk are multiplied with its slope as they leave), THETA = the gradient of LRPE's angles is taken
// from dq and dk before they are rounded, STATES = that between states, STATE_ONLY = only the state after a segment.
//
// THETA. With a = theta (t_i - t_j), a score's derivative by theta is (t_i - t_j) times what is
// antisymmetric in i and j: the queries' sum of position times g, g = d_sin q_cos - d_cos q_sin, and
// that of the keys cancel but for the differences of positions. What breaks the antisymmetry is
// multiplied with the position itself. So both sides round the same things in the same way: the
// weights D (x . y), whose products are the same bits in both walks. And features come as the sum of two
// bf16 numbers, z + z_rest, and so do the weights of the state, which differ between the walks. That is
// not enough where a head forgets fast and a row is long. But there only neighbouring chunks meet, and
// t_i - t_j is i - j within a chunk, c + i - j between two: so both sides count tokens from the chunk's
// beginning, and keys take c times what the state gave them off. Nothing is multiplied with more than c. That holds between
// states too, where what comes after is tokens behind whole chunks.

#include "common.cuh"

#ifndef HOPPER
#define HOPPER 1
#endif
#ifndef XB
#define XB 2
#endif
#ifndef NW
#define NW 2
#endif
#ifndef HALF
#define HALF 0
#endif
#ifndef DOCS
#define DOCS 0
#endif
#ifndef THETA
#define THETA 0
#endif
#ifndef STATES
#define STATES 0
#endif
#ifndef SILU
#define SILU 0
#endif
#ifndef STATE_ONLY
#define STATE_ONLY 0
#endif
// Ordinary loads and stores in place of cp.async: compute-sanitizer's racecheck knows no cp.async that a
// barrier in memory hands over.
#ifndef PLAIN_COPIES
#define PLAIN_COPIES 0
#endif
#ifndef STAGES
#define STAGES 3
#endif

#define C 64                 // tokens of a chunk
#define BOX 8192             // bytes of a tile of 64 tokens by 64 channels
#define COPIERS (SILU ? 32 : 128)   // threads of the copying warpgroup that copy; the others apply SiLU
#define FORGOTTEN 104.0f     // exp(-104) is zero in float32
#define NEIGHBOURS 10.0f     // what a head remembers through a whole chunk, exp(-10), is nothing to the gradient of theta

struct alignas(64) TensorMap { char bytes[128]; };

// One walk: see the table above. States outside are [X, Z] per head, or [Z, X] where `transposed`.
struct Walk {
    const TensorMap *x, *y, *z, *out;
    const TensorMap* beside; // what out is the gradient of, where its tiles are asked for, or null
    int silu;                // taken through SiLU: 1 for x, 2 for y, 4 for z
    int backwards, transposed;
    int x_width, z_width;
    const float* state_in;   // or null
    float* state_out;        // or null
#if THETA
    const TensorMap *z_rest, *beside_rest;   // what z and `beside` lack of the features
#endif
};

// What the walks of a launch share.
struct Launch {
    const float* decay;      // [H]
    const int* positions;    // [B, T], with DOCS or THETA
    float* segments;         // scratch: the states of segments, in register order
    int tokens, heads, z_groups, segment_chunks, segment_count;
    int walk, walks;         // this block's, and how many the launch has
    double* theta;           // with THETA: [walks, segments, B, H, Z / 2], sums over the tokens of a segment
};

#define STAGE_BYTES (((STATE_ONLY ? XB : 2 * XB) + NW * (1 + THETA)) * BOX)
// Stages; then P, output tile and, with THETA, the tile of what `beside` lacks, of each warpgroup; then tables.
#define TILES (2 + THETA)
#define TABLE_WORDS (HALF ? 192 : 128)
#define TABLES (STAGES * STAGE_BYTES + NW * TILES * BOX)
#define SUMS (THETA && !STATE_ONLY)
#define MARKED (DOCS || SUMS)       // whether a stage has something of its tokens' positions beside its tiles
// Whether every thread gives a stage back, or one for its group: what ordinary writes fill is given back by all that read it.
#define EACH (!HOPPER || MARKED)

// The two 16-bit numbers of a word, and back.
#if HALF
#define ELEMENT "f16"
__device__ __forceinline__ float left(u32 both) {
    float r;
    asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %1;\ncvt.f32.f16 %0, a;\n}" : "=f"(r) : "r"(both));
    return r;
}
__device__ __forceinline__ float right(u32 both) {
    float r;
    asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %1;\ncvt.f32.f16 %0, b;\n}" : "=f"(r) : "r"(both));
    return r;
}
__device__ __forceinline__ u32 join(float left, float right) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(right), "f"(left));
    return both;
}
// The power of two that brings `largest` to 2^13 .. 2^14: float16 ends at 65504 and is coarse below 2^-14, where sums
// of products need not end.
__device__ __forceinline__ float power(float largest) {
    const u32 exponent = min(max(__float_as_uint(largest) >> 23, 80u), 200u);
    return __uint_as_float((127 + 13 + 127 - exponent) << 23);
}
// 1 / p of a power of two.
__device__ __forceinline__ float inverse(float p) { return __uint_as_float((254u << 23) - __float_as_uint(p)); }
#else
#define ELEMENT "bf16"
__device__ __forceinline__ float left(u32 both) { return low(both); }
__device__ __forceinline__ float right(u32 both) { return high(both); }
__device__ __forceinline__ u32 join(float left, float right) { return pair(left, right); }
#endif

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 bar) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void group_sync(int group) {
    asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}
__device__ __forceinline__ void load_matrix(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

#if HOPPER
// wgmma, the bulk tensor copy engine, stmatrix (sm_90a).

__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nwait:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra.uni finished;\nbra.uni wait;\nfinished:\n}" ::"r"(bar), "r"(parity) : "memory");
}
__device__ __forceinline__ void tile_load(u32 to, const TensorMap* map, int ch, int t, int h, int b, u32 bar) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];"
        ::"r"(to), "l"(map), "r"(ch), "r"(t), "r"(h), "r"(b), "r"(bar) : "memory");
}
__device__ __forceinline__ void tile_store(const TensorMap* map, int ch, int t, int h, int b, u32 from) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];"
        ::"l"(map), "r"(ch), "r"(t), "r"(h), "r"(b), "r"(from) : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void mma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Matrix descriptor of a 128-byte-swizzled operand; groups of 8 rows are 1024 bytes apart.
__device__ __forceinline__ u64 descriptor(u32 address) {
    return (u64)((address & 0x3ffff) >> 4) | ((u64)(1024 >> 4) << 16) | ((u64)(1024 >> 4) << 32) | (1ull << 62);
}

#define ACC(d) \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
    "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
    "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
    "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define ACC_LIST \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"

// d [64, 64] (+)= A [64, 16] B [16, 64] with the 16 from `at` on; both K-major in shared memory.
__device__ __forceinline__ void mma_shared(float (&d)[32], u32 a_tile, u32 b_tile, int at, int, int add) {
    const u64 a = descriptor(a_tile + at * 2), b = descriptor(b_tile + at * 2);
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." ELEMENT "." ELEMENT " " ACC_LIST ", %32, %33, p, 1, 1, 0, 0;\n}"
        : ACC(d) : "l"(a), "l"(b), "r"(add));
}
// The same with A in registers; B K-major (MN = 0) or MN-major (MN = 1).
template <int MN> __device__ __forceinline__ void mma_registers(float (&d)[32], const u32 (&a)[4], u32 b_tile, int at, int add) {
    const u64 b = descriptor(b_tile + at * (MN ? 128 : 2));
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." ELEMENT "." ELEMENT " " ACC_LIST ", {%32,%33,%34,%35}, %36, p, 1, 1, %38;\n}"
        : ACC(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(MN));
}

__device__ __forceinline__ void store_matrix(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
        ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ void store_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
        ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

#else
// mma.sync, cp.async (sm_80 and later): the same operations, one warp's 16 rows of A at a time.

// What the host puts into a tensor map for these GPUs; strides in bytes, dimensions from the innermost.
struct View { char* values; long long strides[4]; u32 dims[5]; };

__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nwait:\n"
        "mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
        "@done bra finished;\nbra wait;\nfinished:\n}" ::"r"(bar), "r"(parity) : "memory");
}
__device__ __forceinline__ void proxy_fence() {}
__device__ __forceinline__ void mma_fence() {}
__device__ __forceinline__ void mma_commit() {}
template <int N> __device__ __forceinline__ void mma_wait() {}

// By the 128 threads of a group; channels and tokens outside are zero.
__device__ __forceinline__ void tile_load(u32 to, const TensorMap* map, int ch, int t, int h, int b, int tid, int threads) {
    const View& v = *(const View*)map;
    const char* from = v.values + b * v.strides[2] + h * v.strides[1] + t * v.strides[0] + ch * 2;
    for (int n = tid; n < 512; n += threads) {
        const int token = n / 8, unit = n % 8;
        const int bytes = t + token < (int)v.dims[1] ? max(0, min(16, 2 * ((int)v.dims[0] - ch - unit * 8))) : 0;
        const void* address = bytes ? from + token * v.strides[0] + unit * 16 : v.values;
        const u32 place = to + token * 128 + ((unit ^ (token & 7)) << 4);
#if PLAIN_COPIES
        uint4 piece = make_uint4(0, 0, 0, 0);
        if (bytes == 16) piece = *(const uint4*)address;
        else for (int b = 0; b < bytes / 2; b++) ((unsigned short*)&piece)[b] = ((const unsigned short*)address)[b];
        asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};"
            ::"r"(place), "r"(piece.x), "r"(piece.y), "r"(piece.z), "r"(piece.w) : "memory");
#else
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
            ::"r"(place), "l"(address), "r"(bytes) : "memory");
#endif
    }
}
__device__ __forceinline__ void tile_store(const TensorMap* map, int ch, int t, int h, int b, const char* from, int tid) {
    const View& v = *(const View*)map;
    char* to = v.values + b * v.strides[2] + h * v.strides[1] + t * v.strides[0] + ch * 2;
    for (int n = tid; n < 512; n += 128) {
        const int token = n / 8, unit = n % 8;
        if (t + token < (int)v.dims[1] && ch + unit * 8 < (int)v.dims[0])
            *(uint4*)(to + token * v.strides[0] + unit * 16) = *(const uint4*)(from + token * 128 + ((unit ^ (token & 7)) << 4));
    }
}
__device__ __forceinline__ void mma_16(float* d, const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." ELEMENT "." ELEMENT ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// `at` is the first of the 16 columns (K-major) or rows (MN-major) of the tile at `b_tile`.
template <int MN> __device__ __forceinline__ void mma_registers(float (&d)[32], const u32 (&a)[4], u32 b_tile, int at, int add) {
    const int lane = threadIdx.x % 32, m = lane / 8, r = lane % 8;
    if (!add) for (int n = 0; n < 32; n++) d[n] = 0.0f;
#pragma unroll
    for (int p = 0; p < 4; p++) {                                // 16 columns of d
        u32 b[4];
        if (MN) load_transposed(b, b_tile + (at + 8 * (m & 1) + r) * 128 + (((2 * p + (m >> 1)) ^ r) << 4));
        else load_matrix(b, b_tile + (16 * p + 8 * (m >> 1) + r) * 128 + (((at / 8 + (m & 1)) ^ r) << 4));
        mma_16(d + 8 * p, a, b[0], b[1]);
        mma_16(d + 8 * p + 4, a, b[2], b[3]);
    }
}
__device__ __forceinline__ void mma_shared(float (&d)[32], u32 a_tile, u32 b_tile, int at, int warp, int add) {
    const int lane = threadIdx.x % 32, m = lane / 8, r = lane % 8;
    u32 a[4];
    load_matrix(a, a_tile + (16 * warp + 8 * (m & 1) + r) * 128 + (((at / 8 + (m >> 1)) ^ r) << 4));
    mma_registers<0>(d, a, b_tile, at, add);
}
__device__ __forceinline__ void store_matrix(u32 address, u32 a, u32 b, u32 c, u32 d) {
    const int lane = threadIdx.x % 32;
    const u32 v[4] = {a, b, c, d};
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const u32 to = __shfl_sync(0xffffffffu, address, 8 * e + lane / 4) + 4 * (lane % 4);
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(v[e]) : "memory");
    }
}
__device__ __forceinline__ void store_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
    const int lane = threadIdx.x % 32;
    const u32 v[4] = {a, b, c, d};
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const u32 even = __shfl_sync(0xffffffffu, address, 8 * e + 2 * (lane % 4)) + 2 * (lane / 4);
        const u32 odd = __shfl_sync(0xffffffffu, address, 8 * e + 2 * (lane % 4) + 1) + 2 * (lane / 4);
        asm volatile("st.shared.b16 [%0], %1;" ::"r"(even), "h"((unsigned short)(v[e] & 0xffff)) : "memory");
        asm volatile("st.shared.b16 [%0], %1;" ::"r"(odd), "h"((unsigned short)(v[e] >> 16)) : "memory");
    }
}
#endif

#if SILU
// tanh.approx is off by 2^-11 at most: a fourth of what rounding to bf16 costs, but not of float16.
__device__ __forceinline__ float half_tanh(float x) {
#if HALF
    return 1.0f / (1.0f + __expf(-x)) - 0.5f;
#else
    float r;
    asm("tanh.approx.f32 %0, %1;" : "=f"(r) : "f"(0.5f * x));
    return 0.5f * r;
#endif
}
__device__ __forceinline__ float silu(float x) { return x * half_tanh(x) + 0.5f * x; }
__device__ __forceinline__ float silu_slope(float x) {
    const float t = half_tanh(x);                                // sigmoid - 1/2
    return (0.5f + t) * (1.0f + x * (0.5f - t));
}
__device__ __forceinline__ void silu_tiles(u32 address, int tiles, int tid) {
    const int units = tiles * (BOX / 16);
    for (int first = tid; first < units; first += 4 * 96) {      // four at a time, to hide latency
        u32 v[4][4];
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (first + k * 96 < units)
                asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v[k][0]), "=r"(v[k][1]), "=r"(v[k][2]), "=r"(v[k][3]) : "r"(address + (first + k * 96) * 16) : "memory");
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int e = 0; e < 4; e++) v[k][e] = join(silu(left(v[k][e])), silu(right(v[k][e])));
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (first + k * 96 < units)
                asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address + (first + k * 96) * 16), "r"(v[k][0]), "r"(v[k][1]), "r"(v[k][2]), "r"(v[k][3]) : "memory");
    }
}
#endif

// Positions of tokens t + lane and t + 32 + lane of a row; behind the row's last token none is 0.
__device__ __forceinline__ int2 chunk_positions(const Launch& a, int row, int t) {
    const int* const from = a.positions + (size_t)row * a.tokens;
    const int token = t + (int)threadIdx.x % 32;
    return make_int2(token < a.tokens ? from[token] : 1, token + 32 < a.tokens ? from[token + 32] : 1);
}
// Which of the 64 begin a document.
__device__ __forceinline__ u64 document_starts(int2 positions) {
    return __ballot_sync(0xffffffffu, positions.x == 0) | (u64)__ballot_sync(0xffffffffu, positions.y == 0) << 32;
}

// Where documents begin in a chunk: bit i for its token i.
struct Cuts {
    u64 starts;
    bool backwards;

    // The first token that the state from before the chunk in time does not reach, and the first that reaches the state
    // behind it; there is a start.
    __device__ int first() const { return __ffsll(starts) - 1; }
    __device__ int last() const { return 63 - __clzll(starts); }
    // The state that the walk brings reaches out_i where (i >= entry) == backwards, z_j reaches the state that it takes
    // on where (j >= exit) != backwards.
    __device__ int entry() const { return backwards ? last() : first(); }
    __device__ int exit() const { return backwards ? first() : last(); }
    // z_j counts for out_i where (j >= border(i)) != backwards: the start of i's document, or its end.
    __device__ int border(int i) const {
        const u64 before = starts & ((2ull << i) - 1), after = starts & ~((2ull << i) - 1);
        if (backwards) return after ? __ffsll(after) - 1 : C;
        return before ? 63 - __clzll(before) : 0;
    }
};

// Zeroes the scores across documents; i0 and j0 are this lane's first row and column.
__device__ __forceinline__ void mask_scores(float (&score)[32], const Cuts& cuts, int i0, int j0) {
    const int border[2] = {cuts.border(i0) - j0, cuts.border(i0 + 8) - j0};
#pragma unroll
    for (int n = 0; n < 32; n++)
        if ((8 * (n / 4) + (n & 1) >= border[(n >> 1) & 1]) == cuts.backwards) score[n] = 0.0f;
}

// Decays the scores and lays them down as [i][j]; i0 and j0 are this lane's first row and column. With float16 every row
// is multiplied with a power of two, which goes to `scales`.
__device__ __forceinline__ void decay_scores(float (&score)[32], const float* d0, u32 to, int i0, int j0, float* scales) {
    const int m = threadIdx.x % 32 / 8, r = threadIdx.x % 8;
#pragma unroll
    for (int p = 0; p < 4; p++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int up = 8 * (e & 1), across = 16 * p + 8 * (e >> 1);
            const int at = 8 * p + 4 * (e >> 1) + 2 * (e & 1);
            score[at] *= d0[up - across];
            score[at + 1] *= d0[up - across - 1];
        }
    }
#if HALF
    float scale[2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
        float largest = 0.0f;
#pragma unroll
        for (int n = 0; n < 32; n += 4) largest = fmaxf(largest, fmaxf(fabsf(score[n + 2 * e]), fabsf(score[n + 2 * e + 1])));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
        scale[e] = power(fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2)));
        if (j0 == 0) scales[i0 + 8 * e] = scale[e];
    }
#pragma unroll
    for (int n = 0; n < 32; n++) score[n] *= scale[(n >> 1) & 1];
#endif
#pragma unroll
    for (int p = 0; p < 4; p++)
        store_matrix(to + (((2 * p + (m >> 1)) ^ r) << 4), join(score[8 * p], score[8 * p + 1]), join(score[8 * p + 2], score[8 * p + 3]),
            join(score[8 * p + 4], score[8 * p + 5]), join(score[8 * p + 6], score[8 * p + 7]));
}

#define HELD (XB <= 2 ? XB : 1)
#if HALF
// What brings rows g and g + 8 of the state into the range of float16.
__device__ __forceinline__ void state_scales(const float (&state)[XB][32], float (&scale)[2]) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
        float largest = 0.0f;
#pragma unroll
        for (int b = 0; b < XB; b++)
#pragma unroll
            for (int n = 0; n < 32; n += 4) largest = fmaxf(largest, fmaxf(fabsf(state[b][n + 2 * e]), fabsf(state[b][n + 2 * e + 1])));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
        scale[e] = power(fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2)));
    }
}
#endif
// Columns [64 first, 64 (first + HELD)) of the state, times `scale`, as sums of two 16-bit numbers.
__device__ __forceinline__ void split_state(const float (&state)[XB][32], int first, const float (&scale)[2], u32 (&rounded)[4 * HELD][4], u32 (&rest)[4 * HELD][4]) {
#pragma unroll
    for (int k = 0; k < 4 * HELD; k++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float v0 = state[first + k / 4][8 * (k % 4) + 2 * e], v1 = state[first + k / 4][8 * (k % 4) + 2 * e + 1];
#if HALF
            v0 *= scale[e & 1];
            v1 *= scale[e & 1];
#endif
            rounded[k][e] = join(v0, v1);
            rest[k][e] = join(v0 - left(rounded[k][e]), v1 - right(rounded[k][e]));
        }
}

// z^T (plain) and U z^T (weighted) as A operands, with THETA each in two parts.
struct Columns {
    u32 plain[1 + THETA][4][4], weighted[1 + THETA][4][4];

    __device__ __forceinline__ void load(u32 z, const float* U) {
        const int q = threadIdx.x % 4;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            load_transposed(plain[0][k], z + k * 2048);
#if THETA
            load_transposed(plain[1][k], z + NW * BOX + k * 2048);
#endif
            const float2 f[2] = {*(const float2*)(U + 16 * k + 2 * q), *(const float2*)(U + 16 * k + 8 + 2 * q)};
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const u32 z0 = plain[0][k][e];
#if THETA
                const u32 z1 = plain[1][k][e];
                const float v0 = (left(z0) + left(z1)) * f[e / 2].x, v1 = (right(z0) + right(z1)) * f[e / 2].y;
                const u32 rounded = join(v0, v1);
                weighted[1][k][e] = join(v0 - left(rounded), v1 - right(rounded));
#else
                const u32 rounded = join(left(z0) * f[e / 2].x, right(z0) * f[e / 2].y);
#endif
                weighted[0][k][e] = rounded;
            }
        }
    }
    // What a document's end keeps from the state becomes zero.
    __device__ __forceinline__ void mask(const Cuts& cuts) {
        const int exit = cuts.exit() - 2 * ((int)threadIdx.x % 4);
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int j = 16 * k + 8 * h;
                const u32 reaches = ((j >= exit) != cuts.backwards ? 0xffffu : 0) | ((j + 1 >= exit) != cuts.backwards ? 0xffff0000u : 0);
#pragma unroll
                for (int part = 0; part <= THETA; part++) {
                    weighted[part][k][2 * h] &= reaches;
                    weighted[part][k][2 * h + 1] &= reaches;
                }
            }
    }
};
#if SUMS
// What `out`, the gradients of features, gives the gradient of theta: for this lane's tokens, times what they weigh or, without
// `weights`, times 1. `features` is this lane's address of the tile of the features, behind it lies that of what they lack.
__device__ __forceinline__ float turned(const float (&out)[32], u32 features, const float* weights) {
    float sum = 0.0f;
#pragma unroll
    for (int p = 0; p < 4; p++) {
        // Row g of a warp's 16 is a channel's cosine, row g + 8 its sine.
        u32 w[4], more[4];
        load_transposed(w, features + p * 2048);
        load_transposed(more, features + p * 2048 + BOX);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float* const d_cos = out + 8 * p + 4 * h;
            const float* const d_sin = d_cos + 2;
            const float cos0 = left(w[2 * h]) + left(more[2 * h]), cos1 = right(w[2 * h]) + right(more[2 * h]);
            const float sin0 = left(w[2 * h + 1]) + left(more[2 * h + 1]), sin1 = right(w[2 * h + 1]) + right(more[2 * h + 1]);
            const float2 f = weights ? *(const float2*)(weights + 16 * p + 8 * h) : make_float2(1.0f, 1.0f);
            sum += f.x * (d_sin[0] * cos0 - d_cos[0] * sin0) + f.y * (d_sin[1] * cos1 - d_cos[1] * sin1);
        }
    }
    return sum;
}
#endif
// The state decayed: before products are in flight.
__device__ __forceinline__ void decay_state(float (&state)[XB][32], float G) {
#pragma unroll
    for (int b = 0; b < XB; b++)
#pragma unroll
        // Volatile, so that the compiler does not move it between products in flight.
        for (int e = 0; e < 32; e++) asm volatile("mul.f32 %0, %0, %1;" : "+f"(state[b][e]) : "f"(G));
}
// S^T += (U z)^T y; issued and committed, not waited for.
__device__ __forceinline__ void update_state(float (&state)[XB][32], const Columns& columns, u32 y) {
#pragma unroll
    for (int part = 0; part <= THETA; part++)
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int b = 0; b < XB; b++) mma_registers<1>(state[b], columns.weighted[part][k], y + b * BOX, k * 16, 1);
    mma_commit();
}

// The tiles that a group asked for are there.
__device__ __forceinline__ void tile_wait(u32 bar, u32 parity, int group) {
#if HOPPER
    barrier_wait(bar, parity);
#else
    asm volatile("cp.async.wait_all;" ::: "memory");
    group_sync(group);
#endif
}

__device__ __forceinline__ void walk(const Walk& pass, const Launch& a) {
    extern __shared__ __align__(1024) char shared[];
    const u32 base = shared_address(shared);
    float* const distance = (float*)(shared + TABLES);           // [128]: D of i - j + 63
    float* const tables = distance + 128;                        // per warpgroup R, U and, with HALF, the scales of P
    // full, empty, ready (SiLU is applied) of every stage; then the tile of each warpgroup is full
    const u32 barriers = base + TABLES + 4 * (128 + NW * TABLE_WORDS);
#if MARKED
    // Beside the tiles of every stage: where documents begin in it, and what its tokens weigh in the gradient of theta.
    u64* const stage_starts = (u64*)(shared + (barriers - base)) + 3 * STAGES + NW;
    float* const stage_weights = (float*)(stage_starts + STAGES);
#endif

    const int block = blockIdx.x / a.walks;
    const int z_group = block % a.z_groups, bh = block / a.z_groups;
    const int head = bh % a.heads, row = bh / a.heads;
    const int segment = blockIdx.y;
    const float rate = a.decay[head];
    const bool backwards = pass.backwards;
#if SUMS
    const bool neighbours = rate * C >= NEIGHBOURS;
#endif

    const int chunks = (a.tokens + C - 1) / C;
    int first = segment * a.segment_chunks;                      // chunks [first, last) in order of time
    int last = min(first + a.segment_chunks, chunks);
#if STATE_ONLY
    // The state after the segment that is walked last is not asked for.
    if (segment == (backwards ? 0 : a.segment_count - 1)) return;
    // What has decayed to zero by the segment's end is not read.
    const float alive = FORGOTTEN / (rate * C) + 1.0f;
    if (alive < (float)(last - first)) {
        if (backwards) last = first + (int)alive + 1; else first = last - (int)alive - 1;
    }
#if DOCS
    // Nor is what lies on the other side of a document's start.
    const int* const of_row = a.positions + (size_t)row * a.tokens;
    if (backwards) {
        for (int n = first; n < last; n += 32) {
            const int chunk = n + (int)threadIdx.x % 32;
            const u32 found = __ballot_sync(0xffffffffu, chunk < last && of_row[min((chunk + 1) * C, a.tokens) - 1] < min(C, a.tokens - chunk * C));
            if (found) {
                last = n + __ffs(found);
                break;
            }
        }
    } else {
        const int end = min(last * C, a.tokens);
        first = max(first, (end - 1 - of_row[end - 1]) / C);
    }
#endif
#endif
    const int count = last - first;
    const int group = __shfl_sync(0xffffffffu, (int)(threadIdx.x / 128), 0), tid = threadIdx.x % 128;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(barriers + 8 * s, HOPPER ? 1 + MARKED : COPIERS);
            barrier_init(barriers + 8 * (STAGES + s), EACH ? 128 * NW : NW);
            barrier_init(barriers + 8 * (2 * STAGES + s), 96);
        }
        for (int w = 0; w < NW; w++) barrier_init(barriers + 8 * (3 * STAGES + w), 1);
#if HOPPER
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        proxy_fence();
#endif
    }
    for (int n = threadIdx.x; n < 127; n += blockDim.x) {
        const int ahead = backwards ? 63 - n : n - 63;           // tokens that z_j is before out_i
        distance[n] = ahead < 0 ? 0.0f : expf(-rate * (float)ahead);
    }
    __syncthreads();

    if (group == NW) {                                           // the copying warpgroup
#if HOPPER && NW > 1
#if SILU
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
#else
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
#endif
#endif
#if SILU
        if (tid >= 32) {
            for (int n = 0; n < count; n++) {
                const int s = n % STAGES;
                barrier_wait(barriers + 8 * s, (n / STAGES) & 1);
                const u32 stage = base + s * STAGE_BYTES;
                if (pass.silu & 2) silu_tiles(stage, XB, tid - 32);
                if (pass.silu & 4) silu_tiles(stage + XB * BOX, NW, tid - 32);
#if !STATE_ONLY
                if (pass.silu & 1) silu_tiles(stage + (XB + NW) * BOX, XB, tid - 32);
#endif
                proxy_fence();
                barrier_arrive(barriers + 8 * (2 * STAGES + s));
            }
            return;
        }
#endif
        if (HOPPER && tid >= (MARKED ? 32 : 1)) return;
#if MARKED
        // Asked for a chunk ahead of the tiles: they come from far, all heads of a row ask at about the same time.
        int2 positions = count > 0 ? chunk_positions(a, row, (backwards ? last - 1 : first) * C) : make_int2(1, 1);
#endif
        for (int n = 0; n < count; n++) {
            const int chunk = backwards ? last - 1 - n : first + n, t = chunk * C;
            const int s = n % STAGES;
            const u32 full = barriers + 8 * s, empty = barriers + 8 * (STAGES + s);
            if (n >= STAGES) barrier_wait(empty, (n / STAGES + 1) & 1);
            if (!HOPPER || tid == 0) {
#if HOPPER
                barrier_expect(full, STAGE_BYTES);
#define ARRIVAL full
#else
#define ARRIVAL tid, COPIERS
#endif
                u32 to = base + s * STAGE_BYTES;
                for (int part = 0; part < XB; part++, to += BOX)
                    tile_load(to, pass.y, part * 64, t, head, row, ARRIVAL);
                for (int part = 0; part < NW; part++, to += BOX)
                    tile_load(to, pass.z, (z_group * NW + part) * 64, t, head, row, ARRIVAL);
#if THETA
                for (int part = 0; part < NW; part++, to += BOX)
                    tile_load(to, pass.z_rest, (z_group * NW + part) * 64, t, head, row, ARRIVAL);
#endif
#if !STATE_ONLY
                for (int part = 0; part < XB; part++, to += BOX)
                    tile_load(to, pass.x, part * 64, t, head, row, ARRIVAL);
#endif
            }
#if MARKED
            if (tid < 32) {
#if SUMS
                stage_weights[64 * s + tid] = (float)(neighbours ? tid : positions.x);
                stage_weights[64 * s + tid + 32] = (float)(neighbours ? tid + 32 : positions.y);
#endif
                const u64 starts = document_starts(positions);
                if (tid == 0) stage_starts[s] = starts;
                __syncwarp();
                if (HOPPER && tid == 0) barrier_arrive(full);    // else with the copies
                if (n + 1 < count) positions = chunk_positions(a, row, t + (backwards ? -C : C));
            }
#endif
#if !HOPPER
            // A stage is full when the copies of the next one are under way.
            asm volatile("cp.async.commit_group;" ::: "memory");
            if (STAGES > 1 && n == 0) continue;
            if (STAGES > 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
            else asm volatile("cp.async.wait_group 0;" ::: "memory");
            barrier_arrive(STAGES > 1 ? barriers + 8 * ((n - 1) % STAGES) : full);
#endif
        }
#if !HOPPER
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        if (STAGES > 1 && count > 0) barrier_arrive(barriers + 8 * ((count - 1) % STAGES));
#endif
        return;
    }
#if HOPPER && NW > 1
#if SILU
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
#else
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
#endif
#endif

    const int warp = tid / 32, lane = tid % 32, g = lane / 4, q = lane % 4;
    const int slice = z_group * NW + group;                      // 64 columns of z and out
    const u32 scores = base + STAGES * STAGE_BYTES + group * TILES * BOX, tile = scores + BOX;
    float* const R = tables + group * TABLE_WORDS;
    // Rows of the 8 x 8 matrices that this lane addresses.
    const int m = lane / 8, r = lane % 8;
    const u32 z_address = (8 * (m >> 1) + r) * 128 + (((2 * warp + (m & 1)) ^ r) << 4);   // + 16 tokens * 128
    const u32 p_row = (16 * warp + 8 * (m & 1) + r) * 128;

    float state[XB][32];                                         // S^T [64 of z, X]
#pragma unroll
    for (int b = 0; b < XB; b++)
#pragma unroll
        for (int n = 0; n < 32; n++) state[b][n] = 0.0f;

#if !STATE_ONLY
    if (pass.state_in) {
        const float* from = pass.state_in + (size_t)bh * pass.x_width * pass.z_width;
#pragma unroll
        for (int b = 0; b < XB; b++)
#pragma unroll
            for (int n = 0; n < 32; n++) {
                const int x = b * 64 + 8 * (n / 4) + 2 * q + (n & 1), z = slice * 64 + 16 * warp + g + 8 * ((n >> 1) & 1);
                if (x < pass.x_width && z < pass.z_width) state[b][n] = from[pass.transposed ? z * pass.x_width + x : x * pass.z_width + z];
            }
    }
    if (a.segment_count > 1) {
        // Horner's rule over the segments walked before; those that have decayed to zero are skipped.
        const float length = (float)(a.segment_chunks * C);
        const int before = backwards ? a.segment_count - 1 - segment : segment;
        int n = before - (int)fminf(FORGOTTEN / (rate * length) + 2.0f, (float)before);
#if DOCS
        // Nor does one count before another in which a document begins.
        int reset = n;
        for (int m = n + lane; m < before; m += 32) {
            const int s = backwards ? a.segment_count - 1 - m : m;
            const int from_token = s * a.segment_chunks * C, to_token = min(from_token + a.segment_chunks * C, a.tokens);
            if (a.positions[(size_t)row * a.tokens + to_token - 1] < to_token - from_token) reset = m;
        }
        n = __reduce_max_sync(0xffffffffu, reset);
#endif
        for (; n < before; n++) {
            const int s = backwards ? a.segment_count - 1 - n : n;
            const int from_token = s * a.segment_chunks * C, to_token = min(from_token + a.segment_chunks * C, a.tokens);
            float keep = expf(-rate * (float)(to_token - from_token));
#if DOCS
            if (a.positions[(size_t)row * a.tokens + to_token - 1] < to_token - from_token) keep = 0.0f;
#endif
            const float4* from = (const float4*)a.segments
                + (((((size_t)bh * a.walks + a.walk) * a.segment_count + s) * a.z_groups * NW + slice) * XB * 8) * 128 + tid;
#pragma unroll
            for (int b = 0; b < XB; b++)
#pragma unroll
                for (int n = 0; n < 8; n++) {
                    const float4 part = from[(b * 8 + n) * 128];
                    state[b][4 * n] = state[b][4 * n] * keep + part.x;
                    state[b][4 * n + 1] = state[b][4 * n + 1] * keep + part.y;
                    state[b][4 * n + 2] = state[b][4 * n + 2] * keep + part.z;
                    state[b][4 * n + 3] = state[b][4 * n + 3] * keep + part.w;
                }
        }
    }
#endif

    int tables_for = 0;                                          // tokens of the chunk that R and U hold for
    float full_G = 0.0f;
#if THETA && !STATE_ONLY
    double theta = 0.0;                                          // of channel g of this warp, over the tokens of this lane
#endif
    for (int n = 0; n < count; n++) {
        const int chunk = backwards ? last - 1 - n : first + n, t = chunk * C;
        const int c = min(C, a.tokens - t);
        const int s = n % STAGES;
        const u32 y = base + s * STAGE_BYTES, z = y + XB * BOX + group * BOX;
#if !STATE_ONLY
        const u32 x = y + XB * BOX + NW * (1 + THETA) * BOX;
#endif
        if (c != tables_for) {                                   // the first chunk, and one that is not full
#if STATE_ONLY
            group_sync(group);                                   // with output, the last chunk's barriers come after the tables' reads
#endif
            const int i = tid & 63;
            const float since_start = expf(-rate * (float)(i + 1));
            const float until_end = i < c ? expf(-rate * (float)(c - 1 - i)) : 0.0f;
            full_G = expf(-rate * (float)c);
            R[tid] = (tid < 64) == (backwards == 0) ? since_start : until_end;
            tables_for = c;
            group_sync(group);
        }
#if (SILU || THETA) && !STATE_ONLY
        if (pass.beside) {                                       // into the output tile, and the one behind it
#if HOPPER
            if (tid == 0) {
                const u32 bar = barriers + 8 * (3 * STAGES + group);
                asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
                barrier_expect(bar, (1 + THETA) * BOX);
                tile_load(tile, pass.beside, slice * 64, t, head, row, bar);
#if THETA
                tile_load(tile + BOX, pass.beside_rest, slice * 64, t, head, row, bar);
#endif
            }
#else
            group_sync(group);                                   // the last tile has left
            tile_load(tile, pass.beside, slice * 64, t, head, row, tid, 128);
#if THETA
            tile_load(tile + BOX, pass.beside_rest, slice * 64, t, head, row, tid, 128);
#endif
#endif
        }
#endif
        barrier_wait(barriers + 8 * (SILU ? 2 * STAGES + s : s), (n / STAGES) & 1);
#if DOCS
        const Cuts cuts = {stage_starts[s], backwards};
        const bool mixed = cuts.starts != 0;                     // else a chunk takes no masks
        const float G = mixed ? 0.0f : full_G;
#else
        const float G = full_G;
#endif
        Columns columns;

#if !STATE_ONLY
        float score[32], out[32];
        // The state as the sum of two 16-bit numbers, as A operands. With up to 128 of X all of it is converted
        // before any product is in flight; with more, registers allow 64 at a time.
        u32 rounded[4 * HELD][4], rest[4 * HELD][4];
        float scale[2] = {1.0f, 1.0f};
#if HALF
        state_scales(state, scale);
#endif
#if XB <= 2
        split_state(state, 0, scale, rounded, rest);
#endif
        // Scores x y^T.
        mma_fence();
#pragma unroll
        for (int k = 0; k < 4 * XB; k++)
            mma_shared(score, x + (k / 4) * BOX, y + (k / 4) * BOX, (k % 4) * 16, warp, k > 0);
        mma_commit();
#if XB <= 2
        // What the state gives: S^T x^T.
#pragma unroll
        for (int k = 0; k < 4 * XB; k++) {
            mma_registers<0>(out, rounded[k], x + (k / 4) * BOX, (k % 4) * 16, k > 0);
            mma_registers<0>(out, rest[k], x + (k / 4) * BOX, (k % 4) * 16, 1);
        }
        mma_commit();
        mma_wait<1>();
#else
        mma_wait<0>();
#endif
        const float* d0 = distance + 63 + 16 * warp + g - 2 * q;
        float* const scales = R + 128;                           // with HALF
#if DOCS
        if (mixed) mask_scores(score, cuts, 16 * warp + g, 2 * q);
#endif
        decay_scores(score, d0, scores + p_row, 16 * warp + g, 2 * q, scales);
#if HOPPER
        if (tid == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");   // the last tile has left
#endif
        proxy_fence();
        group_sync(group);
#if XB > 2
#pragma unroll
        for (int b = 0; b < XB; b++) {
            split_state(state, b, scale, rounded, rest);
            mma_fence();
#pragma unroll
            for (int k = 0; k < 4; k++) {
                mma_registers<0>(out, rounded[k], x + b * BOX, k * 16, b + k > 0);
                mma_registers<0>(out, rest[k], x + b * BOX, k * 16, 1);
            }
            mma_commit();
            mma_wait<0>();
        }
#endif
        mma_wait<0>();
        columns.load(z + z_address, R + 64);
#if DOCS
        if (mixed) {
            const int entry = cuts.entry() - 2 * q;
#pragma unroll
            for (int p = 0; p < 8; p++) {
                if ((8 * p >= entry) != backwards) out[4 * p] = out[4 * p + 2] = 0.0f;
                if ((8 * p + 1 >= entry) != backwards) out[4 * p + 1] = out[4 * p + 3] = 0.0f;
            }
            columns.mask(cuts);
        }
#endif
#pragma unroll
        for (int p = 0; p < 8; p++) {
            float2 f = *(const float2*)(R + 8 * p + 2 * q);
#if HALF
            const float2 of_p = *(const float2*)(scales + 8 * p + 2 * q);
            f.x *= of_p.x;
            f.y *= of_p.y;
            out[4 * p] *= inverse(scale[0]); out[4 * p + 1] *= inverse(scale[0]); out[4 * p + 2] *= inverse(scale[1]); out[4 * p + 3] *= inverse(scale[1]);
#endif
            out[4 * p] *= f.x; out[4 * p + 1] *= f.y; out[4 * p + 2] *= f.x; out[4 * p + 3] *= f.y;
        }
#if SUMS
        const u32 features = tile + (8 * (m >> 1) + r) * 128 + (((2 * warp + (m & 1)) ^ r) << 4);
        if (neighbours && backwards) {
            tile_wait(barriers + 8 * (3 * STAGES + group), n & 1, group);
            theta -= (float)C * turned(out, features, 0);
        }
#endif
        decay_state(state, G);
        mma_fence();
#pragma unroll
        for (int part = 0; part <= THETA; part++)
#pragma unroll
            for (int k = 0; k < 4; k++) mma_registers<0>(out, columns.plain[part][k], scores, k * 16, 1);
        mma_commit();
        update_state(state, columns, y);
        mma_wait<1>();
#if HALF
#pragma unroll
        for (int p = 0; p < 8; p++) {
            const float2 of_p = *(const float2*)(scales + 8 * p + 2 * q);
            out[4 * p] *= inverse(of_p.x); out[4 * p + 1] *= inverse(of_p.y); out[4 * p + 2] *= inverse(of_p.x); out[4 * p + 3] *= inverse(of_p.y);
        }
#endif
#if SILU || THETA
        if (pass.beside) {
            tile_wait(barriers + 8 * (3 * STAGES + group), n & 1, group);
#if THETA
            theta += turned(out, features, stage_weights + 64 * s + 2 * q);
#else
#pragma unroll
            for (int p = 0; p < 4; p++) {
                u32 w[4];
                load_transposed(w, tile + (16 * p + 8 * (m >> 1) + r) * 128 + (((2 * warp + (m & 1)) ^ r) << 4));
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    out[8 * p + 2 * e] *= silu_slope(left(w[e]));
                    out[8 * p + 2 * e + 1] *= silu_slope(right(w[e]));
                }
            }
#endif
            __syncwarp();                                        // a warp's part of the tile is its own
        }
#endif
#pragma unroll
        for (int p = 0; p < 4; p++) {
            store_transposed(tile + (16 * p + 8 * (m >> 1) + r) * 128 + (((2 * warp + (m & 1)) ^ r) << 4),
                join(out[8 * p], out[8 * p + 1]), join(out[8 * p + 2], out[8 * p + 3]),
                join(out[8 * p + 4], out[8 * p + 5]), join(out[8 * p + 6], out[8 * p + 7]));
        }
        proxy_fence();
        group_sync(group);
#if HOPPER
        if (tid == 0) tile_store(pass.out, slice * 64, t, head, row, tile);
#else
        tile_store(pass.out, slice * 64, t, head, row, shared + (tile - base), tid);
#endif
        mma_wait<0>();
        if (EACH || tid == 0) barrier_arrive(barriers + 8 * (STAGES + s));   // past a barrier after every read of the stage
#else
        columns.load(z + z_address, R + 64);
#if DOCS
        if (mixed) columns.mask(cuts);
#endif
        decay_state(state, G);
        mma_fence();
        update_state(state, columns, y);
        mma_wait<0>();
        if (EACH || tid == 0) barrier_arrive(barriers + 8 * (STAGES + s));
#endif
    }

#if STATE_ONLY
    float4* to = (float4*)a.segments
        + (((((size_t)bh * a.walks + a.walk) * a.segment_count + segment) * a.z_groups * NW + slice) * XB * 8) * 128 + tid;
#pragma unroll
    for (int b = 0; b < XB; b++)
#pragma unroll
        for (int n = 0; n < 8; n++)
            to[(b * 8 + n) * 128] = make_float4(state[b][4 * n], state[b][4 * n + 1], state[b][4 * n + 2], state[b][4 * n + 3]);
#else
    if (pass.state_out && segment == (backwards ? 0 : a.segment_count - 1)) {
        float* to = pass.state_out + (size_t)bh * pass.x_width * pass.z_width;
#pragma unroll
        for (int b = 0; b < XB; b++)
#pragma unroll
            for (int n = 0; n < 32; n++) {
                const int x = b * 64 + 8 * (n / 4) + 2 * q + (n & 1), z = slice * 64 + 16 * warp + g + 8 * ((n >> 1) & 1);
                if (x < pass.x_width && z < pass.z_width) to[pass.transposed ? z * pass.x_width + x : x * pass.z_width + z] = state[b][n];
            }
    }
#if THETA
    theta += __shfl_xor_sync(0xffffffffu, theta, 1);
    theta += __shfl_xor_sync(0xffffffffu, theta, 2);
    const int channel = slice * 32 + warp * 8 + g, channels = pass.z_width / 2;
    if (q == 0 && channel < channels)
        a.theta[(((size_t)a.walk * a.segment_count + segment) * (gridDim.x / (a.walks * a.z_groups)) + bh) * channels + channel] = theta;
#endif
#if HOPPER
    if (tid == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
#endif
}

#define BLOCK __launch_bounds__(NW * 128 + 128, 1)

#if THETA && STATES
// lightning_backward_theta between states (walks 0 and 1; `walks` of them from `first_walk` on): that of dk begins with the
// gradient of the state after the last token and leaves that of the state before the first, that of dq begins with the state
// before the first and leaves the one after the last. Both leave what features in two parts give.
extern "C" __global__ void BLOCK lightning_backward_theta_states(
    const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
    const __grid_constant__ TensorMap q_rest, const __grid_constant__ TensorMap k_rest,
    const __grid_constant__ TensorMap d_o, const __grid_constant__ TensorMap d_q, const __grid_constant__ TensorMap d_k,
    const float* decay, const u32* positions, float* segments, double* theta,
    const float* state_in, float* state_out, const float* d_state_out, float* d_state_in, int key_width, int value_width,
    int tokens, int heads, int z_groups, int segment_chunks, int segment_count, int first_walk, int walks
) {
    const int index = blockIdx.x % walks, which = first_walk + index;
    Walk w;
    if (which == 0) w = {&v, &d_o, &q, &d_k, &k, 0, 1, 1, value_width, key_width, d_state_out, d_state_in, &q_rest, &k_rest};
    else w = {&d_o, &v, &k, &d_q, &q, 0, 0, 1, value_width, key_width, state_in, state_out, &k_rest, &q_rest};
    walk(w, {decay, (const int*)positions, segments, tokens, heads, z_groups, segment_chunks, segment_count, index, walks, theta});
}
#elif THETA
// The gradients dk and dq (walks 0 and 1) of an attention between features of LRPE, in groups of eight cosines and
// their eight sines, and the sums that the gradient of theta is of, from the gradient of o. q_rest and k_rest are what
// q and k lack of the features. The states before and after are zero.
extern "C" __global__ void BLOCK lightning_backward_theta(
    const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
    const __grid_constant__ TensorMap q_rest, const __grid_constant__ TensorMap k_rest,
    const __grid_constant__ TensorMap d_o, const __grid_constant__ TensorMap d_q, const __grid_constant__ TensorMap d_k,
    const float* decay, const u32* positions, float* segments, double* theta, int key_width, int value_width,
    int tokens, int heads, int z_groups, int segment_chunks, int segment_count
) {
    const int index = blockIdx.x % 2;
    Walk w;
    if (index == 0) w = {&v, &d_o, &q, &d_k, &k, 0, 1, 1, value_width, key_width, 0, 0, &q_rest, &k_rest};
    else w = {&d_o, &v, &k, &d_q, &q, 0, 0, 1, value_width, key_width, 0, 0, &k_rest, &q_rest};
    walk(w, {decay, (const int*)positions, segments, tokens, heads, z_groups, segment_chunks, segment_count, index, 2, theta});
}
#else
// o and the state after the last token, from q, k, v and the state before the first.
extern "C" __global__ void BLOCK lightning_forward(
    const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
    const __grid_constant__ TensorMap o, const float* decay, const u32* positions, float* segments,
    const float* state_in, float* state_out, int key_width, int value_width,
    int tokens, int heads, int z_groups, int segment_chunks, int segment_count
) {
    const Walk forward = {&q, &k, &v, &o, 0, SILU ? 3 : 0, 0, 0, key_width, value_width, state_in, state_out};
    walk(forward, {decay, (const int*)positions, segments, tokens, heads, z_groups, segment_chunks, segment_count, 0, 1});
}

// The gradients dv, dk, dq (walks 0, 1, 2; `walks` of them from `first_walk` on), and that of the state before
// the first token, from that of o and of the state after the last.
extern "C" __global__ void BLOCK lightning_backward(
    const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
    const __grid_constant__ TensorMap d_o, const __grid_constant__ TensorMap d_q, const __grid_constant__ TensorMap d_k,
    const __grid_constant__ TensorMap d_v, const float* decay, const u32* positions, float* segments,
    const float* state_in, const float* d_state_out, float* d_state_in, int key_width, int value_width,
    int tokens, int heads, int z_groups, int segment_chunks, int segment_count, int first_walk, int walks
) {
    const int index = blockIdx.x % walks, which = first_walk + index;
    Walk w;
    if (which == 0) w = {&k, &q, &d_o, &d_v, 0, SILU ? 3 : 0, 1, 0, key_width, value_width, d_state_out, d_state_in};
    else if (which == 1) w = {&v, &d_o, &q, &d_k, SILU ? &k : 0, SILU ? 4 : 0, 1, 1, value_width, key_width, d_state_out, 0};
    else w = {&d_o, &v, &k, &d_q, SILU ? &q : 0, SILU ? 4 : 0, 0, 1, value_width, key_width, state_in, 0};
    walk(w, {decay, (const int*)positions, segments, tokens, heads, z_groups, segment_chunks, segment_count, index, walks});
}
#endif
