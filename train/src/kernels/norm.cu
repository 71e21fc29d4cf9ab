// SRMSNorm and the gate, forward and backward, over rows of WIDTH bf16 values with float32 sums.
//
// GROUP warps hold one row in registers: every value is read once. WIDTH is a multiple of 8.
#include "common.cuh"

constexpr u32 THREADS = 256;
constexpr u32 ROWS = THREADS / 32 / GROUP;
constexpr u32 LANES = 32 * GROUP;
constexpr u32 PACKS = WIDTH / PACK;
constexpr u32 HELD = (PACKS + LANES - 1) / LANES;
constexpr float EPSILON = 1e-8f;

// This thread's part of a row.
struct Part {
  uint4 packs[HELD];
};

struct Place {
  u32 row, lane;
  bool inside;

  __device__ explicit Place(u32 rows) {
    row = blockIdx.x * ROWS + threadIdx.x / LANES;
    lane = threadIdx.x % LANES;
    inside = row < rows;
  }

  __device__ Part load(const bf16* from, u64 stride = WIDTH) const {
    Part part;
    const uint4* packs = reinterpret_cast<const uint4*>(from + row * stride);
#pragma unroll
    for (u32 i = 0; i < HELD; i++) {
      u32 at = i * LANES + lane;
      part.packs[i] = inside && at < PACKS ? packs[at] : make_uint4(0, 0, 0, 0);
    }
    return part;
  }

  // What a row has one of; outside of them what does no harm.
  __device__ float of_row(const float* from) const { return inside ? from[row] : 1.0f; }

  __device__ void store_of_row(float* to, float value) const {
    if (inside && lane == 0) to[row] = value;
  }

  __device__ void store(bf16* to, u32 i, const float (&values)[PACK], u64 stride = WIDTH) const {
    u32 at = i * LANES + lane;
    if (inside && at < PACKS) reinterpret_cast<uint4*>(to + row * stride)[at] = pack(values);
  }
};

// Sums over a row, the same in all of its threads.
__device__ __forceinline__ float2 row_sums(float2 x) {
  x.x = warp_sum(x.x);
  x.y = warp_sum(x.y);
#if GROUP > 1
  __shared__ float2 parts[THREADS / 32];
  u32 warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) parts[warp] = x;
  __syncthreads();
  x = make_float2(0.0f, 0.0f);
#pragma unroll
  for (u32 i = 0; i < GROUP; i++) {
    x.x += parts[warp / GROUP * GROUP + i].x;
    x.y += parts[warp / GROUP * GROUP + i].y;
  }
#endif
  return x;
}

__device__ __forceinline__ float squares(const Part& x) {
  float sum = 0.0f;
#pragma unroll
  for (u32 i = 0; i < HELD; i++) {
    float v[PACK];
    unpack(x.packs[i], v);
#pragma unroll
    for (u32 j = 0; j < PACK; j++) sum += v[j] * v[j];
  }
  return sum;
}

// 1/(r + e) for the root mean square r of `width` values, and the factor c of x in dx = dy s - x c.
struct Scale {
  float scale, root;
  u32 width;

  __device__ explicit Scale(float sum_of_squares, u32 width = WIDTH) : width(width) {
    root = sqrtf(sum_of_squares / width);
    scale = 1.0f / (root + EPSILON);
  }

  // At x = 0 the norm has no derivative; its part is left out there.
  __device__ float backward(float dot) const { return root > 0.0f ? dot * scale * scale / (root * width) : 0.0f; }
};

// y = x / (r + e)
extern "C" __global__ void __launch_bounds__(THREADS) norm_forward(const bf16* __restrict__ x, bf16* __restrict__ y, u32 rows) {
  Place place(rows);
  Part part = place.load(x);
  Scale scale(row_sums(make_float2(squares(part), 0.0f)).x);
#pragma unroll
  for (u32 i = 0; i < HELD; i++) {
    float v[PACK];
    unpack(part.packs[i], v);
#pragma unroll
    for (u32 j = 0; j < PACK; j++) v[j] *= scale.scale;
    place.store(y, i, v);
  }
}

// sum = x + branch s and its norm. With `y` null the sum alone.
__device__ __forceinline__ void add_norm(const Place& place, Part part, const Part& other, float s, bf16* sum, bf16* y) {
#pragma unroll
  for (u32 i = 0; i < HELD; i++) {
    float v[PACK], w[PACK];
    unpack(part.packs[i], v);
    unpack(other.packs[i], w);
#pragma unroll
    for (u32 j = 0; j < PACK; j++) v[j] += w[j] * s;
    place.store(sum, i, v);
    // What the backward will read: the rounded sum.
    part.packs[i] = pack(v);
  }
  if (!y) return;
  Scale scale(row_sums(make_float2(squares(part), 0.0f)).x);
#pragma unroll
  for (u32 i = 0; i < HELD; i++) {
    float v[PACK];
    unpack(part.packs[i], v);
#pragma unroll
    for (u32 j = 0; j < PACK; j++) v[j] *= scale.scale;
    place.store(y, i, v);
  }
}

// sum = x + branch, y = sum / (r + e), where asked for
extern "C" __global__ void __launch_bounds__(THREADS) add_norm_forward(const bf16* __restrict__ x, const bf16* __restrict__ branch,
                                                            bf16* __restrict__ sum, bf16* __restrict__ y, u32 rows) {
  Place place(rows);
  add_norm(place, place.load(x), place.load(branch), 1.0f, sum, y);
}

// sum = x + branch s with s = 1/(r + e) of `width` values whose squares have the sum `squares`, y as there
extern "C" __global__ void __launch_bounds__(THREADS) add_scaled_norm_forward(const bf16* __restrict__ x, const bf16* __restrict__ branch,
                                                                   const float* __restrict__ squares, u32 width,
                                                                   bf16* __restrict__ sum, bf16* __restrict__ y, u32 rows) {
  Place place(rows);
  Scale scale(place.of_row(squares), width);
  add_norm(place, place.load(x), place.load(branch), scale.scale, sum, y);
}

// With `y` the norm itself is written once more: what was read for the gradient gives it for nothing.
__device__ __forceinline__ void backward(const Place& place, const Part& part, const Part& gradient, const Part* other, bf16* dx, bf16* y) {
  float2 sums = make_float2(squares(part), 0.0f);
#pragma unroll
  for (u32 i = 0; i < HELD; i++) {
    float v[PACK], g[PACK];
    unpack(part.packs[i], v);
    unpack(gradient.packs[i], g);
#pragma unroll
    for (u32 j = 0; j < PACK; j++) sums.y += g[j] * v[j];
  }
  sums = row_sums(sums);
  Scale scale(sums.x);
  float factor = scale.backward(sums.y);
#pragma unroll
  for (u32 i = 0; i < HELD; i++) {
    float v[PACK], g[PACK], r[PACK] = {};
    unpack(part.packs[i], v);
    unpack(gradient.packs[i], g);
    if (other) unpack(other->packs[i], r);
#pragma unroll
    for (u32 j = 0; j < PACK; j++) {
      r[j] += g[j] * scale.scale - v[j] * factor;
      v[j] *= scale.scale;
    }
    place.store(dx, i, r);
    if (y) place.store(y, i, v);
  }
}

// dx = dy s - x c; y, where asked for, is the norm
extern "C" __global__ void __launch_bounds__(THREADS) norm_backward(const bf16* __restrict__ x, const bf16* __restrict__ dy,
                                                         bf16* __restrict__ dx, bf16* __restrict__ y, u32 rows) {
  Place place(rows);
  Part part = place.load(x), gradient = place.load(dy);
  backward(place, part, gradient, nullptr, dx, y);
}

// dx = dy s - x c + residual; y as there
extern "C" __global__ void __launch_bounds__(THREADS) norm_backward_add(const bf16* __restrict__ x, const bf16* __restrict__ dy,
                                                             const bf16* __restrict__ residual, bf16* __restrict__ dx,
                                                             bf16* __restrict__ y, u32 rows) {
  Place place(rows);
  Part part = place.load(x), gradient = place.load(dy), other = place.load(residual);
  backward(place, part, gradient, &other, dx, y);
}

// y = u * o / (r + e), the rows of u `stride` values apart
extern "C" __global__ void __launch_bounds__(THREADS) gate_forward(const bf16* __restrict__ u, u32 stride, const bf16* __restrict__ o,
                                                        bf16* __restrict__ y, u32 rows) {
  Place place(rows);
  Part part = place.load(o), gate = place.load(u, stride);
  Scale scale(row_sums(make_float2(squares(part), 0.0f)).x);
#pragma unroll
  for (u32 i = 0; i < HELD; i++) {
    float v[PACK], w[PACK];
    unpack(part.packs[i], v);
    unpack(gate.packs[i], w);
#pragma unroll
    for (u32 j = 0; j < PACK; j++) v[j] *= scale.scale * w[j];
    place.store(y, i, v);
  }
}

// du = dy * o s; with g = dy * u: d_o = g s - o c; y, where asked for, is the gate's output
extern "C" __global__ void __launch_bounds__(THREADS) gate_backward(const bf16* __restrict__ u, u32 stride, const bf16* __restrict__ o,
                                                         const bf16* __restrict__ dy, bf16* __restrict__ du, u32 du_stride,
                                                         bf16* __restrict__ d_o, bf16* __restrict__ y, u32 rows) {
  Place place(rows);
  Part part = place.load(o), gate = place.load(u, stride), gradient = place.load(dy);
  float2 sums = make_float2(squares(part), 0.0f);
#pragma unroll
  for (u32 i = 0; i < HELD; i++) {
    float v[PACK], w[PACK], g[PACK];
    unpack(part.packs[i], v);
    unpack(gate.packs[i], w);
    unpack(gradient.packs[i], g);
#pragma unroll
    for (u32 j = 0; j < PACK; j++) sums.y += g[j] * w[j] * v[j];
  }
  sums = row_sums(sums);
  Scale scale(sums.x);
  float factor = scale.backward(sums.y);
#pragma unroll
  for (u32 i = 0; i < HELD; i++) {
    float v[PACK], w[PACK], g[PACK], to_u[PACK];
    unpack(part.packs[i], v);
    unpack(gate.packs[i], w);
    unpack(gradient.packs[i], g);
#pragma unroll
    for (u32 j = 0; j < PACK; j++) {
      float normed = v[j] * scale.scale;
      to_u[j] = g[j] * normed;
      v[j] = g[j] * w[j] * scale.scale - v[j] * factor;
      w[j] *= normed;
    }
    place.store(du, i, to_u, du_stride);
    place.store(d_o, i, v);
    if (y) place.store(y, i, w);
  }
}

// The gate of some of the channels that the norm is over, of which others have the rest. The norm is one factor for each row,
// which can come after the product that the gate goes into: y = u * o, and the sum of squares of o
extern "C" __global__ void __launch_bounds__(THREADS) gate_part_forward(const bf16* __restrict__ u, u32 stride, const bf16* __restrict__ o,
                                                             bf16* __restrict__ y, float* __restrict__ square_sums, u32 rows) {
  Place place(rows);
  Part part = place.load(o), gate = place.load(u, stride);
#pragma unroll
  for (u32 i = 0; i < HELD; i++) {
    float v[PACK], w[PACK];
    unpack(part.packs[i], v);
    unpack(gate.packs[i], w);
#pragma unroll
    for (u32 j = 0; j < PACK; j++) v[j] *= w[j];
    place.store(y, i, v);
  }
  place.store_of_row(square_sums, row_sums(make_float2(squares(part), 0.0f)).x);
}

// y = u * o / (r + e) with r from the sum of squares of all `width` channels, and dots, the sum of dy * u * o over these ones
extern "C" __global__ void __launch_bounds__(THREADS) gate_part_again(const bf16* __restrict__ u, u32 stride, const bf16* __restrict__ o,
                                                           const bf16* __restrict__ dy, const float* __restrict__ square_sums,
                                                           u32 width, bf16* __restrict__ y, float* __restrict__ dots, u32 rows) {
  Place place(rows);
  Part part = place.load(o), gate = place.load(u, stride), gradient = place.load(dy);
  Scale scale(place.of_row(square_sums), width);
  float dot = 0.0f;
#pragma unroll
  for (u32 i = 0; i < HELD; i++) {
    float v[PACK], w[PACK], g[PACK];
    unpack(part.packs[i], v);
    unpack(gate.packs[i], w);
    unpack(gradient.packs[i], g);
#pragma unroll
    for (u32 j = 0; j < PACK; j++) {
      dot += g[j] * w[j] * v[j];
      v[j] *= scale.scale * w[j];
    }
    place.store(y, i, v);
  }
  place.store_of_row(dots, row_sums(make_float2(dot, 0.0f)).x);
}

// The gradients of `gate_backward` for these channels, from the sums over all of them.
extern "C" __global__ void __launch_bounds__(THREADS) gate_part_backward(const bf16* __restrict__ u, u32 stride, const bf16* __restrict__ o,
                                                              const bf16* __restrict__ dy, const float* __restrict__ square_sums,
                                                              const float* __restrict__ dots, u32 width, bf16* __restrict__ du,
                                                              u32 du_stride, bf16* __restrict__ d_o, u32 rows) {
  Place place(rows);
  Part part = place.load(o), gate = place.load(u, stride), gradient = place.load(dy);
  Scale scale(place.of_row(square_sums), width);
  float factor = scale.backward(place.of_row(dots));
#pragma unroll
  for (u32 i = 0; i < HELD; i++) {
    float v[PACK], w[PACK], g[PACK], to_u[PACK];
    unpack(part.packs[i], v);
    unpack(gate.packs[i], w);
    unpack(gradient.packs[i], g);
#pragma unroll
    for (u32 j = 0; j < PACK; j++) {
      to_u[j] = g[j] * (v[j] * scale.scale);
      v[j] = g[j] * w[j] * scale.scale - v[j] * factor;
    }
    place.store(du, i, to_u, du_stride);
    place.store(d_o, i, v);
  }
}
