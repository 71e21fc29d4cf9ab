// AdamW over flat buffers, with the global norm, clipping and the check for numbers on the device.
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

// Four values in a row, and one.
__device__ __forceinline__ void load(const float* from, float (&to)[4]) {
  float4 v = *reinterpret_cast<const float4*>(from);
  to[0] = v.x; to[1] = v.y; to[2] = v.z; to[3] = v.w;
}
__device__ __forceinline__ void load(const bf16* from, float (&to)[4]) {
  uint2 v = *reinterpret_cast<const uint2*>(from);
  to[0] = low(v.x); to[1] = high(v.x);
  to[2] = low(v.y); to[3] = high(v.y);
}
__device__ __forceinline__ float load(const float* from) { return *from; }
__device__ __forceinline__ float load(const bf16* from) { return to_float(*from); }

// partials[block] = the sum of squares of this block's share, or that is added to what is there. Gradients are float or bf16.
template <typename Gradient>
__device__ __forceinline__ void squares(const Gradient* __restrict__ x, double* partials, u32 add, u64 count) {
  u64 packs = count / 4;
  float sums[4] = {};
  constexpr u64 STEP = PARTS * (u64)THREADS;
  u64 at = blockIdx.x * (u64)THREADS + threadIdx.x;
  for (; at + 3 * STEP < packs; at += 4 * STEP) {
    float v[4][4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) load(x + 4 * (at + i * STEP), v[i]);
#pragma unroll
    for (u32 i = 0; i < 4; i++) sums[i] += v[i][0] * v[i][0] + v[i][1] * v[i][1] + v[i][2] * v[i][2] + v[i][3] * v[i][3];
  }
  for (; at < packs; at += STEP) {
    float v[4];
    load(x + 4 * at, v);
    sums[0] += v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + v[3] * v[3];
  }
  double sum = (double)sums[0] + sums[1] + sums[2] + sums[3];
  if (blockIdx.x == 0 && threadIdx.x < count % 4) {
    float v = load(x + packs * 4 + threadIdx.x);
    sum += (double)v * v;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = add ? partials[blockIdx.x] + sum : sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) square_sums(const float* __restrict__ x, double* partials, u32 add, u64 count) {
  squares(x, partials, add, count);
}

extern "C" __global__ void __launch_bounds__(THREADS) square_sums_bf16(const bf16* __restrict__ x, double* partials, u32 add, u64 count) {
  squares(x, partials, add, count);
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

// Random bits for value `at` in step `step`: SplitMix64 (Steele, Lea and Flood 2014) of both. A run that is continued
// draws what it would have drawn.
__device__ __forceinline__ u32 noise(u64 at, u32 step) {
  u64 z = at + step * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return (u32)((z ^ (z >> 31)) >> 32);
}

// The bits of `value` in bf16: one of its two neighbours, the nearer one so much the likelier that the mean is `value`.
// A moment moves by less than bf16 resolves: rounded to nearest, it would stand still.
__device__ __forceinline__ u32 rounded(float value, u32 noise16) { return (__float_as_uint(value) + noise16) >> 16; }

__device__ __forceinline__ void store(float* to, const float (&v)[4], const u32 (&)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
}
__device__ __forceinline__ void store(bf16* to, const float (&v)[4], const u32 (&n)[4]) {
  u32 bits[4];
#pragma unroll
  for (u32 i = 0; i < 4; i++) bits[i] = rounded(v[i], n[i] & 0xffffu);
  *reinterpret_cast<uint2*>(to) = make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
}
__device__ __forceinline__ void store(float* to, float value, u32) { *to = value; }
__device__ __forceinline__ void store(bf16* to, float value, u32 n) { *to = (bf16)rounded(value, n & 0xffffu); }

// The first value is number `origin` of all. Numbers between bounds 2i and 2i + 1 do not decay. `decay` is the learning rate times the weight decay. Moments and gradients are float or bf16.
template <typename Moment, typename Gradient>
__device__ __forceinline__ void step_of_four(float* __restrict__ values, Moment* __restrict__ first, Moment* __restrict__ second,
                                             const Gradient* __restrict__ gradient, bf16* __restrict__ working,
                                             const u32* __restrict__ control, const u64* __restrict__ bounds, u32 bound_count,
                                             float beta1, float beta2, float epsilon, float decay, u64 origin, u64 count) {
  const Control& step = *reinterpret_cast<const Control*>(control);
  if (!step.finite) return;
  const Factors f{step.clip, step.rate, step.root, beta1, beta2, epsilon};
  u64 begin = (blockIdx.x * 256ull + threadIdx.x) * 4;
  if (begin >= count) return;
  if (begin + 4 <= count) {
    u32 below = bounds_below(bounds, bound_count, origin + begin);
    // The next bound decides whether the four differ.
    bool uniform = below == bound_count || bounds[below] >= origin + begin + 4;
    float w[4], m[4], v[4], g[4];
    load(values + begin, w);
    load(first + begin, m);
    load(second + begin, v);
    load(gradient + begin, g);
    u32 noises[4], shifted[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      u32 inside = uniform ? below : bounds_below(bounds, bound_count, origin + begin + i);
      update(w[i], m[i], v[i], g[i], inside % 2 ? 1.0f : 1.0f - decay, f);
      noises[i] = noise(origin + begin + i, step.taken);
      shifted[i] = noises[i] >> 16;
    }
    store(values + begin, w, noises);
    store(first + begin, m, noises);
    store(second + begin, v, shifted);
    *reinterpret_cast<uint2*>(working + begin) = make_uint2(pair(w[0], w[1]), pair(w[2], w[3]));
    return;
  }
  for (u64 at = begin; at < count; at++) {
    float keep = bounds_below(bounds, bound_count, origin + at) % 2 ? 1.0f : 1.0f - decay;
    float m = load(first + at), v = load(second + at);
    u32 n = noise(origin + at, step.taken);
    update(values[at], m, v, load(gradient + at), keep, f);
    store(first + at, m, n);
    store(second + at, v, n >> 16);
    working[at] = to_bf16(values[at]);
  }
}

extern "C" __global__ void __launch_bounds__(256) adamw(float* __restrict__ values, float* __restrict__ first, float* __restrict__ second,
                                             const float* __restrict__ gradient, bf16* __restrict__ working,
                                             const u32* __restrict__ control, const u64* __restrict__ bounds, u32 bound_count,
                                             float beta1, float beta2, float epsilon, float decay, u64 origin, u64 count) {
  step_of_four(values, first, second, gradient, working, control, bounds, bound_count, beta1, beta2, epsilon, decay, origin, count);
}

extern "C" __global__ void __launch_bounds__(256) adamw_bf16_moments(float* __restrict__ values, bf16* __restrict__ first,
                                             bf16* __restrict__ second, const float* __restrict__ gradient,
                                             bf16* __restrict__ working, const u32* __restrict__ control,
                                             const u64* __restrict__ bounds, u32 bound_count, float beta1, float beta2,
                                             float epsilon, float decay, u64 origin, u64 count) {
  step_of_four(values, first, second, gradient, working, control, bounds, bound_count, beta1, beta2, epsilon, decay, origin, count);
}

extern "C" __global__ void __launch_bounds__(256) adamw_bf16_gradient(float* __restrict__ values, float* __restrict__ first,
                                             float* __restrict__ second, const bf16* __restrict__ gradient,
                                             bf16* __restrict__ working, const u32* __restrict__ control,
                                             const u64* __restrict__ bounds, u32 bound_count, float beta1, float beta2,
                                             float epsilon, float decay, u64 origin, u64 count) {
  step_of_four(values, first, second, gradient, working, control, bounds, bound_count, beta1, beta2, epsilon, decay, origin, count);
}

extern "C" __global__ void __launch_bounds__(256) adamw_bf16_moments_and_gradient(float* __restrict__ values, bf16* __restrict__ first,
                                             bf16* __restrict__ second, const bf16* __restrict__ gradient,
                                             bf16* __restrict__ working, const u32* __restrict__ control,
                                             const u64* __restrict__ bounds, u32 bound_count, float beta1, float beta2,
                                             float epsilon, float decay, u64 origin, u64 count) {
  step_of_four(values, first, second, gradient, working, control, bounds, bound_count, beta1, beta2, epsilon, decay, origin, count);
}

// The bf16 copy of the weights.
extern "C" __global__ void __launch_bounds__(256) write_working(const float* __restrict__ values, bf16* __restrict__ working, u64 count) {
  u64 begin = (blockIdx.x * 256ull + threadIdx.x) * 4;
  for (u64 at = begin; at < begin + 4 && at < count; at++) working[at] = to_bf16(values[at]);
}

// And back: a gradient that was added up in bf16.
extern "C" __global__ void __launch_bounds__(256) widen(const bf16* __restrict__ from, float* __restrict__ to, u64 count) {
  u64 begin = (blockIdx.x * 256ull + threadIdx.x) * 4;
  for (u64 at = begin; at < begin + 4 && at < count; at++) to[at] = to_float(from[at]);
}
