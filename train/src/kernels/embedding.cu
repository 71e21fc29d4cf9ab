// Rows of a table by token, and the sum of gradients by token, for rows of WIDTH values, a multiple of 8.
//
// The backward adds in float32 in a fixed order and without atomics. The host sorts the tokens of the
// batch by id and cuts each run of one id into pieces of at most PIECE tokens. A piece is one block. An
// id of one piece is written at once; the others leave partial sums, which `embedding_join` adds in order.
#include "common.cuh"

constexpr u32 PACKS = WIDTH / PACK;

// y = table[id] * scale
extern "C" __global__ void __launch_bounds__(256) embedding_forward(const bf16* __restrict__ table, const u32* __restrict__ ids,
                                                         bf16* __restrict__ y, u64 packs, float scale) {
  u64 at = blockIdx.x * 256ull + threadIdx.x;
  if (at >= packs) return;
  u64 token = at / PACKS;
  float v[PACK];
  unpack(reinterpret_cast<const uint4*>(table)[ids[token] * (u64)PACKS + (at - token * PACKS)], v);
#pragma unroll
  for (u32 j = 0; j < PACK; j++) v[j] *= scale;
  reinterpret_cast<uint4*>(y)[at] = pack(v);
}

__device__ __forceinline__ void put(float* to, const float (&sum)[PACK], bool add) {
  float4* at = reinterpret_cast<float4*>(to);
  float4 a = make_float4(sum[0], sum[1], sum[2], sum[3]), b = make_float4(sum[4], sum[5], sum[6], sum[7]);
  if (add) {
    float4 c = at[0], d = at[1];
    a = make_float4(a.x + c.x, a.y + c.y, a.z + c.z, a.w + c.w);
    b = make_float4(b.x + d.x, b.y + d.y, b.z + d.z, b.w + d.w);
  }
  at[0] = a;
  at[1] = b;
}

// A piece of tokens order[begin .. end] of one id; the sum goes to row `id` of dw where the piece is the
// only one (partial == ~0), else to row `partial` of `partials`.
struct alignas(16) Piece {
  u32 begin, end, id, partial;
};

extern "C" __global__ void embedding_sum(const bf16* __restrict__ dy, const u32* __restrict__ order, const u32* __restrict__ pieces,
                                         float* __restrict__ dw, float* __restrict__ partials, float scale, u32 accumulate) {
  const Piece piece = reinterpret_cast<const Piece*>(pieces)[blockIdx.x];
  const uint4* from = reinterpret_cast<const uint4*>(dy);
  bool alone = piece.partial == 0xffffffffu;
  float* row = alone ? dw + piece.id * (u64)WIDTH : partials + piece.partial * (u64)WIDTH;
  for (u32 at = threadIdx.x; at < PACKS; at += blockDim.x) {
    float sum[PACK] = {};
    u32 t = piece.begin;
    for (; t + 4 <= piece.end; t += 4) {
      uint4 packs[4];
#pragma unroll
      for (u32 i = 0; i < 4; i++) packs[i] = from[order[t + i] * (u64)PACKS + at];
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        float v[PACK];
        unpack(packs[i], v);
#pragma unroll
        for (u32 j = 0; j < PACK; j++) sum[j] += v[j];
      }
    }
    for (; t < piece.end; t++) {
      float v[PACK];
      unpack(from[order[t] * (u64)PACKS + at], v);
#pragma unroll
      for (u32 j = 0; j < PACK; j++) sum[j] += v[j];
    }
#pragma unroll
    for (u32 j = 0; j < PACK; j++) sum[j] *= scale;
    put(row + at * PACK, sum, alone && accumulate);
  }
}

// Rows begin .. end of `partials` added to row `id` of dw.
extern "C" __global__ void embedding_join(const float* __restrict__ partials, const u32* __restrict__ joins, float* __restrict__ dw,
                                          u32 accumulate) {
  const Piece join = reinterpret_cast<const Piece*>(joins)[blockIdx.x];
  for (u32 at = threadIdx.x; at < PACKS; at += blockDim.x) {
    float sum[PACK] = {};
    for (u32 t = join.begin; t < join.end; t++) {
      const float4* from = reinterpret_cast<const float4*>(partials + t * (u64)WIDTH + at * PACK);
      float4 a = from[0], b = from[1];
      sum[0] += a.x; sum[1] += a.y; sum[2] += a.z; sum[3] += a.w;
      sum[4] += b.x; sum[5] += b.y; sum[6] += b.z; sum[7] += b.w;
    }
    put(dw + join.id * (u64)WIDTH + at * PACK, sum, accumulate);
  }
}
