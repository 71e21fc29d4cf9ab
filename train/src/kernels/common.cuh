// Types, conversions and reductions that the kernels share. Needs none of CUDA's own headers.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
// The bits of a bfloat16.
typedef unsigned short bf16;

// Eight bf16 in a row are one access of 16 bytes.
constexpr u32 PACK = 8;

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ void unpack(const uint4& from, float (&to)[PACK]) {
  to[0] = low(from.x); to[1] = high(from.x);
  to[2] = low(from.y); to[3] = high(from.y);
  to[4] = low(from.z); to[5] = high(from.z);
  to[6] = low(from.w); to[7] = high(from.w);
}

// Rounded to nearest, ties to even.
__device__ __forceinline__ u32 pair(float low, float high) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

__device__ __forceinline__ uint4 pack(const float (&from)[PACK]) {
  return make_uint4(pair(from[0], from[1]), pair(from[2], from[3]), pair(from[4], from[5]), pair(from[6], from[7]));
}

__device__ __forceinline__ float to_float(bf16 value) { return __uint_as_float((u32)value << 16); }
__device__ __forceinline__ bf16 to_bf16(float value) { return (bf16)(pair(value, 0.0f) & 0xffffu); }

// Sums of all lanes of a warp, the same bits in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}
