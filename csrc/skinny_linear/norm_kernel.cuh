// The norm as a kernel of its own, for rows that the kernel with the products takes from memory. That one can start before
// this one has, so that nothing keeps it from filling its ring: unlike the kernels of csrc/norm this one tells at once.
#pragma once

#include <cstdint>

#include "infuse/overlap.cuh"
#include "skinny_linear/kept_x.cuh"

namespace infuse::skinny_linear {

struct NormParams {
  Params base;
  void* y;  // written: [rows, dim] contiguous
};

// blockIdx.x: the row. Shared memory: the row, then the norm's weight.
template <typename T>
__global__ void __launch_bounds__(kNormThreads) norm_kernel(const __grid_constant__ NormParams params) {
  __shared__ KeptSums storage;
  const Params& base = params.base;
  const SharedAddress kept = dynamic_shared_memory(), weight = kept + base.dim * 2;
  const KeptPart part{blockIdx.x, 1, 0, threadIdx.x, kNormThreads, 1, true, true};
  let_next_kernel_start();
  fetch_norm_weight(base, weight, threadIdx.x, kNormThreads);
  end_copy_group();
  wait_for_previous_kernel();
  const float squares = keep_sums<T>(base, part, kept);
  wait_for_copies<0>();
  const float rstd = rstd_of(base, part, squares, storage, threadIdx.x, [] { __syncthreads(); });
  T* row = static_cast<T*>(params.y) + std::size_t{blockIdx.x} * base.dim;
  normalise_kept<T>(base, part, rstd, kept, weight,
                    [&](std::uint32_t piece, const Vec<T, 8>& y) { store(row + piece * 8, y); });
}

}  // namespace infuse::skinny_linear
