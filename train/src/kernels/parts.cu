// Of matrices that several GPUs have parts of.
#include "common.cuh"

// Puts a part to its place in the whole matrix: runs of `run` values, `stride` values apart there. Of all three numbers eighths
// are given.
extern "C" __global__ void __launch_bounds__(256) put_part(const bf16* __restrict__ part, bf16* __restrict__ whole, u64 run,
                                                u64 stride, u64 count) {
  u64 at = blockIdx.x * 256ull + threadIdx.x;
  if (at >= count) return;
  reinterpret_cast<uint4*>(whole)[at / run * stride + at % run] = reinterpret_cast<const uint4*>(part)[at];
}
