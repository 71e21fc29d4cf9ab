// One token of every row of Lightning Attention in its recurrent form:
//     S = exp(-rate) S + k v^T,  o = q S
// with SiLU, and LRPE where there are angles, on the way in. S is [B, H, K, V] in float32; K is HEAD, or 2 HEAD with angles.
// q, k, v are columns 0, E, 2E of rows `stride` apart, head after head of HEAD values, a multiple of 8. With angles the
// rows of the state are in the order of lrpe.cu: eight cosines, their eight sines, and so on.
//
// A block has 32 columns of the state of one head and 8 groups of its rows; every value is read and written once.
#include "common.cuh"

#ifndef HEAD
#define HEAD 64
#endif
#ifndef ROTATED
#define ROTATED 0
#endif

constexpr u32 FEATURES = ROTATED ? 2 * HEAD : HEAD;
constexpr u32 GROUPS = 8;

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

extern "C" __global__ void __launch_bounds__(32 * GROUPS) recurrent_step(
    const bf16* __restrict__ projected, long long stride, const float* __restrict__ theta, const u32* __restrict__ positions,
    const float* __restrict__ decay, float* __restrict__ state, bf16* __restrict__ o, int heads
) {
    __shared__ float q[FEATURES], k[FEATURES], sums[GROUPS][32];
    const int head = blockIdx.y, row = blockIdx.z, width = heads * HEAD;
    const bf16* from = projected + row * stride + head * HEAD;
    for (u32 c = threadIdx.x; c < HEAD; c += 32 * GROUPS) {
        // Rounded as the features that the chunked form takes.
        const float fq = silu(to_float(from[c])), fk = silu(to_float(from[width + c]));
#if ROTATED
        float sin, cos;
        sincosf(theta[head * HEAD + c] * (float)positions[row], &sin, &cos);
        const u32 at = 2 * (c / 8 * 8) + c % 8;
        q[at] = to_float(to_bf16(fq * cos));
        q[at + 8] = to_float(to_bf16(fq * sin));
        k[at] = to_float(to_bf16(fk * cos));
        k[at + 8] = to_float(to_bf16(fk * sin));
#else
        q[c] = to_float(to_bf16(fq));
        k[c] = to_float(to_bf16(fk));
#endif
    }
    __syncthreads();
    const u32 lane = threadIdx.x % 32, group = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
    const bool inside = column < HEAD;
    const float keep = expf(-decay[head]);
    const float v = inside ? to_float(from[2 * width + column]) : 0.0f;
    float* at = state + ((long long)row * heads + head) * FEATURES * HEAD + column;
    float sum = 0.0f;
    if (inside) {
#pragma unroll 8
        for (u32 c = group; c < FEATURES; c += GROUPS) {
            const float s = keep * at[c * HEAD] + k[c] * v;
            at[c * HEAD] = s;
            sum += q[c] * s;
        }
    }
    sums[group][lane] = sum;
    __syncthreads();
    if (group == 0 && inside) {
#pragma unroll
        for (u32 g = 1; g < GROUPS; g++) sum += sums[g][lane];
        o[(long long)row * width + head * HEAD + column] = to_bf16(sum);
    }
}
