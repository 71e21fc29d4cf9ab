// Cross-entropy of rows of bf16 logits, which become the gradient of the loss in place.
#include "common.cuh"

constexpr u32 THREADS = 512;
constexpr u32 WARPS = THREADS / 32;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
// A target that does not count.
constexpr u32 IGNORE = 0xffffffffu;

// The largest value m and the sum of 2^(x - m), of x in units of log 2.
struct Sum {
  float largest, sum;

  __device__ void add(const Sum& other) {
    float m = fmaxf(largest, other.largest);
    // Where nothing is larger than minus infinity there is nothing to scale.
    float a = largest == m ? 1.0f : exp2f(largest - m), b = other.largest == m ? 1.0f : exp2f(other.largest - m);
    sum = sum * a + other.sum * b;
    largest = m;
  }
};

__device__ __forceinline__ Sum shuffled(const Sum& from, int step) {
  return Sum{__shfl_xor_sync(0xffffffffu, from.largest, step), __shfl_xor_sync(0xffffffffu, from.sum, step)};
}

// One row a block: loss = lse - x[target]; each x becomes the gradient of `share` times (loss + z lse^2):
// share (p (1 + 2 z lse) - [target]). Rows are `stride` values apart, a multiple of 8.
extern "C" __global__ void __launch_bounds__(THREADS) cross_entropy_rows(bf16* logits, const u32* __restrict__ targets,
                                                              float* __restrict__ losses, u32 vocabulary, u32 stride, float share,
                                                              float z) {
  bf16* row = logits + blockIdx.x * (u64)stride;
  uint4* packs = reinterpret_cast<uint4*>(row);
  u32 whole = vocabulary / PACK;
  u32 target = targets[blockIdx.x];
  if (target == IGNORE) {
    for (u32 at = threadIdx.x; at < whole; at += THREADS) packs[at] = make_uint4(0, 0, 0, 0);
    for (u32 at = whole * PACK + threadIdx.x; at < vocabulary; at += THREADS) row[at] = 0;
    if (threadIdx.x == 0) losses[blockIdx.x] = 0.0f;
    return;
  }
  float chosen = to_float(row[target]);

  const float none = __int_as_float(0xff800000);
  Sum sum{none, 0.0f};
  for (u32 at = threadIdx.x; at < whole; at += THREADS) {
    float v[PACK];
    unpack(packs[at], v);
    float m = sum.largest;
#pragma unroll
    for (u32 j = 0; j < PACK; j++) {
      v[j] *= LOG2_E;
      m = fmaxf(m, v[j]);
    }
    if (m > sum.largest) {
      sum.sum *= exp2f(sum.largest - m);
      sum.largest = m;
    }
#pragma unroll
    for (u32 j = 0; j < PACK; j++) sum.sum += exp2f(v[j] - m);
  }
  for (u32 at = whole * PACK + threadIdx.x; at < vocabulary; at += THREADS) sum.add(Sum{to_float(row[at]) * LOG2_E, 1.0f});
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) sum.add(shuffled(sum, step));
  __shared__ Sum parts[WARPS];
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = parts[0];
  for (u32 i = 1; i < WARPS; i++) sum.add(parts[i]);

  float log2_sum = sum.largest + log2f(sum.sum), lse = log2_sum * LN_2;
  if (threadIdx.x == 0) losses[blockIdx.x] = lse - chosen;
  // Every thread has read row[target] before the barrier above.
  float factor = share * (1.0f + 2.0f * z * lse);
  for (u32 at = threadIdx.x; at < whole; at += THREADS) {
    float v[PACK];
    unpack(packs[at], v);
#pragma unroll
    for (u32 j = 0; j < PACK; j++) {
      v[j] = factor * exp2f(v[j] * LOG2_E - log2_sum);
      if (at * PACK + j == target) v[j] -= share;
    }
    packs[at] = pack(v);
  }
  for (u32 at = whole * PACK + threadIdx.x; at < vocabulary; at += THREADS) {
    float v = factor * exp2f(to_float(row[at]) * LOG2_E - log2_sum);
    row[at] = to_bf16(at == target ? v - share : v);
  }
}

// total = share times the sum of `losses`, in a fixed order; one block.
extern "C" __global__ void __launch_bounds__(1024) cross_entropy_total(const float* __restrict__ losses, float* __restrict__ total, u32 count,
                                                            float share) {
  double sum = 0.0;
  for (u32 at = threadIdx.x; at < count; at += 1024) sum += losses[at];
  sum = warp_sum(sum);
  __shared__ double parts[32];
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = warp_sum(parts[threadIdx.x]);
    if (threadIdx.x == 0) total[0] = (float)(sum * share);
  }
}

// What multiplies a gradient for the one that came from above; NaN where that had to be 1.
__device__ __forceinline__ float from_above(float factor, u32 must_be_one) {
  return must_be_one && factor != 1.0f ? __int_as_float(0x7fffffff) : factor;
}

// x *= factor[0]
extern "C" __global__ void __launch_bounds__(256) scale_bf16(bf16* x, const float* __restrict__ factor, u64 count, u32 must_be_one) {
  u64 at = (blockIdx.x * 256ull + threadIdx.x) * PACK;
  float f = from_above(factor[0], must_be_one);
  if (f == 1.0f) return;
  for (u64 i = at; i < at + PACK && i < count; i++) x[i] = to_bf16(to_float(x[i]) * f);
}

extern "C" __global__ void __launch_bounds__(256) scale_float(float* x, const float* __restrict__ factor, u64 count, u32 must_be_one) {
  u64 at = (blockIdx.x * 256ull + threadIdx.x) * 4;
  float f = from_above(factor[0], must_be_one);
  if (f == 1.0f) return;
  for (u64 i = at; i < at + 4 && i < count; i++) x[i] *= f;
}
