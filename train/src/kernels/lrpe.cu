// SiLU and LRPE of queries and keys as the projection gives them: f = SiLU(x) becomes
// [f cos(theta t), f sin(theta t)] per head, t the position in the document. One thread per channel,
// a stripe of tokens per block.

#include "common.cuh"

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// The angle less its whole turns, in two steps, so that the fast forms are good to 2^-21.
__device__ __forceinline__ void turn(float angle, float& sin, float& cos) {
    const float turns = rintf(angle * 0.15915494309189535f);
    const float rest = fmaf(turns, -1.9353071795864769e-3f, fmaf(turns, -6.28125f, angle));
    sin = __sinf(rest);
    cos = __cosf(rest);
}

// q and k are columns [0, E) and [E, 2E) of rows `stride` apart; to [tokens, 2, H, 2K].
extern "C" __global__ void __launch_bounds__(256) lrpe_forward(
    const bf16* __restrict__ projected, long long stride, const float* __restrict__ theta, const u32* __restrict__ positions,
    bf16* __restrict__ features, int tokens, int width, int head, int stripe
) {
    const int c = blockIdx.x * 256 + threadIdx.x;                // of q, then of k
    if (c >= 2 * width) return;
    const int e = c % width;
    const float angle = theta[e];
    const long long to = (long long)(c / head) * 2 * head + c % head;
    const int end = min((int)(blockIdx.y + 1) * stripe, tokens);
    for (int t = blockIdx.y * stripe; t < end; t++) {
        const float x = to_float(projected[t * stride + c]), f = x * sigmoid(x);
        float sin, cos;
        turn(angle * (float)positions[t], sin, cos);
        bf16* row = features + (long long)t * 4 * width + to;
        row[0] = to_bf16(f * cos);
        row[head] = to_bf16(f * sin);
    }
}

// The gradient of q and k, and of theta summed over a stripe, from that of the features.
extern "C" __global__ void __launch_bounds__(256) lrpe_backward(
    const bf16* __restrict__ projected, long long stride, const float* __restrict__ theta, const u32* __restrict__ positions,
    const bf16* __restrict__ d_features, bf16* __restrict__ d_projected, long long d_stride, float* __restrict__ partial,
    int tokens, int width, int head, int stripe
) {
    const int c = blockIdx.x * 256 + threadIdx.x;
    if (c >= 2 * width) return;
    const int e = c % width;
    const float angle = theta[e];
    const long long from = (long long)(c / head) * 2 * head + c % head;
    const int end = min((int)(blockIdx.y + 1) * stripe, tokens);
    float sum = 0.0f;
    for (int t = blockIdx.y * stripe; t < end; t++) {
        const float x = to_float(projected[t * stride + c]), s = sigmoid(x), f = x * s;
        float sin, cos;
        turn(angle * (float)positions[t], sin, cos);
        const bf16* row = d_features + (long long)t * 4 * width + from;
        const float d_cos = to_float(row[0]), d_sin = to_float(row[head]);
        d_projected[t * d_stride + c] = to_bf16((d_cos * cos + d_sin * sin) * s * (1.0f + x * (1.0f - s)));
        sum += (float)positions[t] * f * (d_sin * cos - d_cos * sin);
    }
    partial[(long long)blockIdx.y * 2 * width + c] = sum;
}

// The stripes of q and of k in order, added to what is there or in its place.
extern "C" __global__ void __launch_bounds__(256) lrpe_theta(
    const float* __restrict__ partial, float* __restrict__ d_theta, int stripes, int width, u32 accumulate
) {
    const int e = blockIdx.x * 256 + threadIdx.x;
    if (e >= width) return;
    float sum = accumulate ? d_theta[e] : 0.0f;
    for (int s = 0; s < stripes; s++) sum += partial[(long long)s * 2 * width + e] + partial[((long long)s * 2 + 1) * width + e];
    d_theta[e] = sum;
}
