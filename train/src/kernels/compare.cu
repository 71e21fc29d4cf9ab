// Whether two results are the same, bit for bit.
#include "common.cuh"

// counts[0] += words that differ, counts[1] += words of `a` that are not zero.
extern "C" __global__ void __launch_bounds__(256) compare(const u32* __restrict__ a, const u32* __restrict__ b, u64 words, u32* counts) {
  u32 differ = 0, filled = 0;
  for (u64 at = blockIdx.x * 256ull + threadIdx.x; at < words; at += gridDim.x * 256ull) {
    differ += a[at] != b[at];
    filled += a[at] != 0;
  }
  differ = __reduce_add_sync(0xffffffffu, differ);
  filled = __reduce_add_sync(0xffffffffu, filled);
  // Only whether they are zero matters, so the order of additions does not.
  if (threadIdx.x % 32 == 0) {
    atomicAdd(counts, differ);
    atomicAdd(counts + 1, filled > 0);
  }
}
