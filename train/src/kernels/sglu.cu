// y = a * b for the two halves of rows of 2 WIDTH bf16 values, and its backward. WIDTH is a multiple of 8.
#include "common.cuh"

constexpr u32 PACKS = WIDTH / PACK;

extern "C" __global__ void __launch_bounds__(256) sglu_forward(const bf16* __restrict__ ab, bf16* __restrict__ y, u64 packs) {
  u64 at = blockIdx.x * 256ull + threadIdx.x;
  if (at >= packs) return;
  u64 row = at / PACKS;
  const uint4* from = reinterpret_cast<const uint4*>(ab) + at + row * PACKS;
  float a[PACK], b[PACK];
  unpack(from[0], a);
  unpack(from[PACKS], b);
#pragma unroll
  for (u32 j = 0; j < PACK; j++) a[j] *= b[j];
  reinterpret_cast<uint4*>(y)[at] = pack(a);
}

// da = dy * b, db = dy * a, side by side; y = a * b, where asked for
extern "C" __global__ void __launch_bounds__(256) sglu_backward(const bf16* __restrict__ ab, const bf16* __restrict__ dy,
                                                     bf16* __restrict__ d_ab, bf16* __restrict__ y, u64 packs) {
  u64 at = blockIdx.x * 256ull + threadIdx.x;
  if (at >= packs) return;
  u64 place = at + at / PACKS * PACKS;
  const uint4* from = reinterpret_cast<const uint4*>(ab) + place;
  uint4* to = reinterpret_cast<uint4*>(d_ab) + place;
  float a[PACK], b[PACK], g[PACK];
  unpack(from[0], a);
  unpack(from[PACKS], b);
  unpack(reinterpret_cast<const uint4*>(dy)[at], g);
  if (y) {
    float product[PACK];
#pragma unroll
    for (u32 j = 0; j < PACK; j++) product[j] = a[j] * b[j];
    reinterpret_cast<uint4*>(y)[at] = pack(product);
  }
#pragma unroll
  for (u32 j = 0; j < PACK; j++) {
    b[j] *= g[j];
    a[j] *= g[j];
  }
  to[0] = pack(b);
  to[PACKS] = pack(a);
}
