// Lightning Attention in float32 arithmetic for any element type, layout, alignment and GPU: the
// primitive of lightning.cu (the passes are listed there) without tensor cores. One block owns 32
// columns of z and out and keeps their part of the state in shared memory.
//
// Compile-time: TYPE = 0 float32, 1 float16, 2 bfloat16; X = width of x and y.

typedef unsigned int u32;

#ifndef TYPE
#define TYPE 0
#endif
#ifndef X
#define X 128
#endif
#define C (X > 128 ? 16 : 32)   // tokens of a chunk
#define ZS 32                   // columns of z of a block
#define XS (X + 4)              // row stride of x and y in shared memory: no bank conflicts in float4

#if TYPE == 0
typedef float element;
__device__ __forceinline__ float widen(element v) { return v; }
__device__ __forceinline__ element narrow(float v) { return v; }
#elif TYPE == 1
typedef unsigned short element;
__device__ __forceinline__ float widen(element v) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v)); return r; }
__device__ __forceinline__ element narrow(float v) { element r; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v)); return r; }
#else
typedef unsigned short element;
__device__ __forceinline__ float widen(element v) { return __uint_as_float((unsigned)v << 16); }
__device__ __forceinline__ element narrow(float v) {
    unsigned u = __float_as_uint(v);
    if (v != v) return (element)((u >> 16) | 0x40);
    return (element)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
#endif

// A tensor [B, H, T, width] as the host describes it; strides in bytes, dimensions from the innermost.
struct View { char* values; long long strides[4]; unsigned dims[5]; };

__device__ __forceinline__ element& at(const View& v, int row, int head, int token, int c) {
    return *(element*)(v.values + row * v.strides[2] + head * v.strides[1] + token * v.strides[0] + c * sizeof(element));
}

struct Walk {
    const View *x, *y, *z, *out;
    int backwards, transposed, x_width, z_width;
    const float* state_in;   // or null
    float* state_out;        // or null
};

__device__ __forceinline__ void walk(
    const Walk& pass, const float* decay, const int* all_positions, int all_tokens, int heads, int z_groups, int walks
) {
    extern __shared__ __align__(16) float shared[];
    float* const S = shared;                     // [X, ZS]
    float* const x = S + X * ZS;                 // [C, XS]
    float* const y = x + C * XS;                 // [C, XS]
    float* const z = y + C * XS;                 // [C, ZS]
    float* const scores = z + C * ZS;            // [C, C + 1]
    float* const R = scores + C * (C + 1);       // [C]
    float* const U = R + C;                      // [C]
    int* const positions = (int*)(U + C);        // [C]

    const int rest = blockIdx.x / walks, z_first = rest % z_groups * ZS, bh = rest / z_groups;
    const int head = bh % heads, row = bh / heads, tid = threadIdx.x;
    const float rate = decay[head];
    const bool backwards = pass.backwards;

    for (int n = tid; n < X * ZS; n += 256) {
        const int c = n / ZS, zc = z_first + n % ZS;
        float v = 0.0f;
        if (pass.state_in && c < pass.x_width && zc < pass.z_width)
            v = pass.state_in[(size_t)bh * pass.x_width * pass.z_width + (pass.transposed ? zc * pass.x_width + c : c * pass.z_width + zc)];
        S[n] = v;
    }
    const int chunks = (all_tokens + C - 1) / C;
    for (int n = 0; n < chunks; n++) {
        const int t = (backwards ? chunks - 1 - n : n) * C, tokens = min(C, all_tokens - t);
        __syncthreads();
        for (int e = tid; e < C * X; e += 256) {
            const int i = e / X, c = e % X;
            const bool inside = i < tokens && c < pass.x_width;
            x[i * XS + c] = inside ? widen(at(*pass.x, row, head, t + i, c)) : 0.0f;
            y[i * XS + c] = inside ? widen(at(*pass.y, row, head, t + i, c)) : 0.0f;
        }
        for (int e = tid; e < C * ZS; e += 256) {
            const int i = e / ZS, c = z_first + e % ZS;
            z[e] = i < tokens && c < pass.z_width ? widen(at(*pass.z, row, head, t + i, c)) : 0.0f;
        }
        const int never = 0x7fffffff;
        const int last_position = all_positions ? all_positions[(size_t)row * all_tokens + t + tokens - 1] : never;
        if (tid < C) {
            const int i = tid, position = all_positions && i < tokens ? all_positions[(size_t)row * all_tokens + t + i] : never;
            const float since_start = position > i ? expf(-rate * (i + 1)) : 0.0f;
            const float until_end = i < tokens && tokens - 1 - i <= last_position ? expf(-rate * (tokens - 1 - i)) : 0.0f;
            R[i] = backwards ? until_end : since_start;
            U[i] = backwards ? since_start : until_end;
            positions[i] = position;
        }
        const float G = last_position < tokens ? 0.0f : expf(-rate * tokens);
        __syncthreads();
        for (int e = tid; e < C * C; e += 256) {
            const int i = e / C, j = e % C, ahead = backwards ? j - i : i - j;
            float sum = 0.0f;
            if (ahead >= 0 && ahead <= positions[backwards ? j : i]) {
                for (int c = 0; c < X; c += 4) {
                    const float4 p = *(const float4*)(x + i * XS + c), r = *(const float4*)(y + j * XS + c);
                    sum += p.x * r.x + p.y * r.y + p.z * r.z + p.w * r.w;
                }
                sum *= expf(-rate * ahead);
            }
            scores[i * (C + 1) + j] = sum;
        }
        __syncthreads();
        for (int e = tid; e < C * ZS / 4; e += 256) {
            const int i = e / (ZS / 4), zc = e % (ZS / 4) * 4;
            float o[4] = {};
            for (int c = 0; c < X; c++) {
                const float4 s = *(const float4*)(S + c * ZS + zc);
                const float v = x[i * XS + c];
                o[0] += v * s.x; o[1] += v * s.y; o[2] += v * s.z; o[3] += v * s.w;
            }
            for (int k = 0; k < 4; k++) o[k] *= R[i];
            for (int j = 0; j < C; j++) {
                const float4 s = *(const float4*)(z + j * ZS + zc);
                const float v = scores[i * (C + 1) + j];
                o[0] += v * s.x; o[1] += v * s.y; o[2] += v * s.z; o[3] += v * s.w;
            }
            if (i < tokens)
                for (int k = 0; k < 4; k++)
                    if (z_first + zc + k < pass.z_width)
                        at(*pass.out, row, head, t + i, z_first + zc + k) = narrow(o[k]);
        }
        __syncthreads();
        for (int e = tid; e < X * ZS / 4; e += 256) {
            const int c = e / (ZS / 4), zc = e % (ZS / 4) * 4;
            float4 s = *(const float4*)(S + c * ZS + zc);
            s.x *= G; s.y *= G; s.z *= G; s.w *= G;
            for (int j = 0; j < C; j++) {
                const float4 v = *(const float4*)(z + j * ZS + zc);
                const float w = U[j] * y[j * XS + c];
                s.x += w * v.x; s.y += w * v.y; s.z += w * v.z; s.w += w * v.w;
            }
            *(float4*)(S + c * ZS + zc) = s;
        }
    }
    __syncthreads();
    if (pass.state_out)
        for (int n = tid; n < X * ZS; n += 256) {
            const int c = n / ZS, zc = z_first + n % ZS;
            if (c < pass.x_width && zc < pass.z_width)
                pass.state_out[(size_t)bh * pass.x_width * pass.z_width + (pass.transposed ? zc * pass.x_width + c : c * pass.z_width + zc)] = S[n];
        }
}

extern "C" __global__ void __launch_bounds__(256) lightning_any_forward(
    const __grid_constant__ View q, const __grid_constant__ View k, const __grid_constant__ View v,
    const __grid_constant__ View o, const float* decay, const u32* positions, const float* state_in, float* state_out,
    int key_width, int value_width, int tokens, int heads, int z_groups
) {
    walk({&q, &k, &v, &o, 0, 0, key_width, value_width, state_in, state_out}, decay, (const int*)positions, tokens, heads, z_groups, 1);
}

// Walks 0 dv, 1 dk, 2 dq, as in lightning.cu.
extern "C" __global__ void __launch_bounds__(256) lightning_any_backward(
    const __grid_constant__ View q, const __grid_constant__ View k, const __grid_constant__ View v,
    const __grid_constant__ View d_o, const __grid_constant__ View d_q, const __grid_constant__ View d_k,
    const __grid_constant__ View d_v, const float* decay, const u32* positions, const float* state_in,
    const float* d_state_out, float* d_state_in, int key_width, int value_width,
    int tokens, int heads, int z_groups, int first_walk, int walks
) {
    const int which = first_walk + blockIdx.x % walks;
    Walk w;
    if (which == 0) w = {&k, &q, &d_o, &d_v, 1, 0, key_width, value_width, d_state_out, d_state_in};
    else if (which == 1) w = {&v, &d_o, &q, &d_k, 1, 1, value_width, key_width, d_state_out, 0};
    else w = {&d_o, &v, &k, &d_q, 0, 1, value_width, key_width, state_in, 0};
    walk(w, decay, (const int*)positions, tokens, heads, z_groups, walks);
}
