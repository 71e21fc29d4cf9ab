// AdamW over one flat buffer, with the global norm, clipping and the check for numbers on the device.
#include "common.cuh"

// Blocks of the sum of squares: fixed, so that the order of addition is.
constexpr u32 PARTS = 1024;
constexpr u32 THREADS = 512;

__device__ __forceinline__ double block_sum(double sum) {
  __shared__ double parts[32];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) sum = warp_sum(threadIdx.x < blockDim.x / 32 ? parts[threadIdx.x] : 0.0);
  return sum;
}

// partials[block] = the sum of squares of this block's share
extern "C" __global__ void __launch_bounds__(THREADS) square_sums(const float* __restrict__ x, double* __restrict__ partials, u64 count) {
  u64 packs = count / 4;
  float sums[4] = {};
  const float4* from = reinterpret_cast<const float4*>(x);
  constexpr u64 STEP = PARTS * (u64)THREADS;
  u64 at = blockIdx.x * (u64)THREADS + threadIdx.x;
  for (; at + 3 * STEP < packs; at += 4 * STEP) {
    float4 v[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) v[i] = from[at + i * STEP];
#pragma unroll
    for (u32 i = 0; i < 4; i++) sums[i] += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
  }
  for (; at < packs; at += STEP) {
    float4 v = from[at];
    sums[0] += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
  }
  double sum = (double)sums[0] + sums[1] + sums[2] + sums[3];
  if (blockIdx.x == 0 && threadIdx.x < count % 4) {
    float v = x[packs * 4 + threadIdx.x];
    sum += (double)v * v;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// What the host may read of a step, and what `adamw` reads.
struct Control {
  float norm;        // of the gradient before clipping
  float clip;        // factor of the gradient
  float rate;        // learning rate over the bias correction of the first moment
  float root;        // 1 over the root of the bias correction of the second moment
  u32 finite;        // whether the step is taken
  u32 taken;         // steps taken so far
  u32 skipped;       // steps not taken so far
  u32 skipped_last;  // steps not taken since the last one taken
};

// One block of PARTS threads.
extern "C" __global__ void __launch_bounds__(PARTS) adamw_control(const double* __restrict__ partials, u32* control, float limit, float rate,
                                                       float beta1, float beta2) {
  double sum = block_sum(partials[threadIdx.x]);
  if (threadIdx.x != 0) return;
  Control& to = *reinterpret_cast<Control*>(control);
  double norm = sqrt(sum);
  bool finite = norm < __longlong_as_double(0x7ff0000000000000ll);
  to.norm = (float)norm;
  to.finite = finite;
  if (!finite) {
    to.skipped++;
    to.skipped_last++;
    return;
  }
  to.taken++;
  to.skipped_last = 0;
  to.clip = limit > 0.0f && norm > limit ? (float)(limit / norm) : 1.0f;
  to.rate = (float)(rate / (1.0 - pow((double)beta1, (double)to.taken)));
  to.root = (float)(1.0 / sqrt(1.0 - pow((double)beta2, (double)to.taken)));
}

// How many of the ascending `bounds` are not above `at`.
__device__ __forceinline__ u32 bounds_below(const u64* bounds, u32 count, u64 at) {
  u32 low = 0, high = count;
  while (low < high) {
    u32 middle = (low + high) / 2;
    if (bounds[middle] <= at) low = middle + 1; else high = middle;
  }
  return low;
}

struct Factors {
  float clip, rate, root, beta1, beta2, epsilon;
};

__device__ __forceinline__ void update(float& value, float& first, float& second, float gradient, float keep, const Factors& f) {
  gradient *= f.clip;
  first = f.beta1 * first + (1.0f - f.beta1) * gradient;
  second = f.beta2 * second + (1.0f - f.beta2) * gradient * gradient;
  value = value * keep - f.rate * first / (sqrtf(second) * f.root + f.epsilon);
}

// Values between bounds 2i and 2i + 1 do not decay. `decay` is the learning rate times the weight decay.
extern "C" __global__ void __launch_bounds__(256) adamw(float* __restrict__ values, float* __restrict__ first, float* __restrict__ second,
                                             const float* __restrict__ gradient, bf16* __restrict__ working,
                                             const u32* __restrict__ control, const u64* __restrict__ bounds, u32 bound_count,
                                             float beta1, float beta2, float epsilon, float decay, u64 count) {
  const Control& step = *reinterpret_cast<const Control*>(control);
  if (!step.finite) return;
  const Factors f{step.clip, step.rate, step.root, beta1, beta2, epsilon};
  u64 begin = (blockIdx.x * 256ull + threadIdx.x) * 4;
  if (begin >= count) return;
  if (begin + 4 <= count) {
    u32 below = bounds_below(bounds, bound_count, begin);
    // The next bound decides whether the four differ.
    bool uniform = below == bound_count || bounds[below] >= begin + 4;
    float4 w = *reinterpret_cast<float4*>(values + begin), m = *reinterpret_cast<float4*>(first + begin);
    float4 v = *reinterpret_cast<float4*>(second + begin), g = *reinterpret_cast<const float4*>(gradient + begin);
    float keep[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      u32 inside = uniform ? below : bounds_below(bounds, bound_count, begin + i);
      keep[i] = inside % 2 ? 1.0f : 1.0f - decay;
    }
    update(w.x, m.x, v.x, g.x, keep[0], f);
    update(w.y, m.y, v.y, g.y, keep[1], f);
    update(w.z, m.z, v.z, g.z, keep[2], f);
    update(w.w, m.w, v.w, g.w, keep[3], f);
    *reinterpret_cast<float4*>(values + begin) = w;
    *reinterpret_cast<float4*>(first + begin) = m;
    *reinterpret_cast<float4*>(second + begin) = v;
    *reinterpret_cast<uint2*>(working + begin) = make_uint2(pair(w.x, w.y), pair(w.z, w.w));
    return;
  }
  for (u64 at = begin; at < count; at++) {
    float keep = bounds_below(bounds, bound_count, at) % 2 ? 1.0f : 1.0f - decay;
    update(values[at], first[at], second[at], gradient[at], keep, f);
    working[at] = to_bf16(values[at]);
  }
}

// The bf16 copy of the weights.
extern "C" __global__ void __launch_bounds__(256) write_working(const float* __restrict__ values, bf16* __restrict__ working, u64 count) {
  u64 begin = (blockIdx.x * 256ull + threadIdx.x) * 4;
  for (u64 at = begin; at < begin + 4 && at < count; at++) working[at] = to_bf16(values[at]);
}
