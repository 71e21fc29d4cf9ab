// SiLU and LRPE of queries and keys as the projection gives them: f = SiLU(x) becomes f cos(theta t) and
// f sin(theta t) per head, t the position in the document. One thread per channel, a stripe of tokens per block.
//
// The features of a head come in groups of eight cosines and their eight sines: products of features do not depend
// on their order, and lightning.cu finds both parts of a channel in one thread (THETA there).

#include "common.cuh"

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// The angle less its whole turns, in two steps, so that the fast forms are good to 2^-21.
__device__ __forceinline__ void turn(float angle, float& sin, float& cos) {
    const float turns = rintf(angle * 0.15915494309189535f);
    const float rest = fmaf(turns, -1.9353071795864769e-3f, fmaf(turns, -6.28125f, angle));
    sin = __sinf(rest);
    cos = __cosf(rest);
}

// Where the cosine of channel c of all heads stands among their features; the sine is eight further.
__device__ __forceinline__ long long place(int c) { return 2LL * (c / 8 * 8) + c % 8; }

// What bf16 leaves of a value.
__device__ __forceinline__ bf16 rest_of(float value, bf16 rounded) { return to_bf16(value - to_float(rounded)); }

// q and k are columns [0, E) and [E, 2E) of rows `stride` apart; to [tokens, 2, H, 2K]. What the features lack of
// their values goes into `rests`, where it is asked for.
extern "C" __global__ void __launch_bounds__(256) lrpe_forward(
    const bf16* __restrict__ projected, long long stride, const float* __restrict__ theta, const u32* __restrict__ positions,
    bf16* __restrict__ features, bf16* __restrict__ rests, int tokens, int width, int stripe
) {
    const int c = blockIdx.x * 256 + threadIdx.x;                // of q, then of k
    if (c >= 2 * width) return;
    const float angle = theta[c % width];
    const long long to = place(c);
    const int end = min((int)(blockIdx.y + 1) * stripe, tokens);
    for (int t = blockIdx.y * stripe; t < end; t++) {
        const float x = to_float(projected[t * stride + c]), f = x * sigmoid(x);
        float sin, cos;
        turn(angle * (float)positions[t], sin, cos);
        const float first = f * cos, second = f * sin;
        const bf16 rounded_first = to_bf16(first), rounded_second = to_bf16(second);
        const long long at = (long long)t * 4 * width + to;
        features[at] = rounded_first;
        features[at + 8] = rounded_second;
        if (rests) {
            rests[at] = rest_of(first, rounded_first);
            rests[at + 8] = rest_of(second, rounded_second);
        }
    }
}

// The gradient of q and k from that of the features.
extern "C" __global__ void __launch_bounds__(256) lrpe_backward(
    const bf16* __restrict__ projected, long long stride, const float* __restrict__ theta, const u32* __restrict__ positions,
    const bf16* __restrict__ d_features, bf16* __restrict__ d_projected, long long d_stride, int tokens, int width, int stripe
) {
    const int c = blockIdx.x * 256 + threadIdx.x;
    if (c >= 2 * width) return;
    const float angle = theta[c % width];
    const long long from = place(c);
    const int end = min((int)(blockIdx.y + 1) * stripe, tokens);
    for (int t = blockIdx.y * stripe; t < end; t++) {
        const float x = to_float(projected[t * stride + c]), s = sigmoid(x);
        float sin, cos;
        turn(angle * (float)positions[t], sin, cos);
        const bf16* row = d_features + (long long)t * 4 * width + from;
        d_projected[t * d_stride + c] = to_bf16((to_float(row[0]) * cos + to_float(row[8]) * sin) * s * (1.0f + x * (1.0f - s)));
    }
}

// The sums that lightning.cu made for theta, [rows, E], in order, added to what is there or in its place. In float64:
// those of queries and of keys are large and cancel.
extern "C" __global__ void __launch_bounds__(256) lrpe_theta(
    const double* __restrict__ sums, float* __restrict__ d_theta, int rows, int width, u32 accumulate
) {
    const int e = blockIdx.x * 256 + threadIdx.x;
    if (e >= width) return;
    double sum = 0.0;
    for (int row = 0; row < rows; row++) sum += sums[(long long)row * width + e];
    d_theta[e] = (float)(accumulate ? d_theta[e] + sum : sum);
}
