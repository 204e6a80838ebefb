// From a plan to its one or two launches. Included by the files that instantiate launch_mma.
#pragma once

#include "attention_forward/launch.h"
#include "attention_forward/mma_kernel.cuh"
#include "dispatch.h"
#include "infuse/launch.h"

namespace infuse::attention_forward {

template <DType kDType>
void launch_mma(const Plan& plan, const Params& params, int device, cudaStream_t stream) {
  using T = Element<kDType>;
  const Config& config = kConfigs[plan.config];
  const dim3 grid(params.batch * params.heads.divisor, params.row_blocks, params.splits);
  const dim3 block(static_cast<unsigned>(config.warps * kWarpSize));
  const bool is_full = params.mask_kind != Mask::kNone || params.scales_first || params.dropout.seed != nullptr ||
                       config.warps > max_warps(plan.dim, false);
  const auto run = [&](auto kernel) {
    resident_ctas(kOp, kernel, config.warps * kWarpSize, plan.shared_bytes, device);  // allows the shared memory
    launch_kernel(kOp, config.name, kernel, {grid, block, plan.shared_bytes, true}, params, device, stream);
  };
  dispatch_int<64, 96, 128, 192, 256>(kOp, "head_dim of the kernel", plan.dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    if (is_full) {
      run(mma_kernel<Traits<T, kDim, true>>);
    } else {
      run(mma_kernel<Traits<T, kDim, false>>);
    }
  });
  if (params.part_out == nullptr) return;
  const std::int64_t rows = std::int64_t{params.batch} * params.heads.divisor * params.queries;
  launch_kernel(kOp, "merge", merge_kernel<T>,
                {dim3(static_cast<unsigned>(ceil_div(rows, kMergeWarps))), dim3(kMergeWarps * kWarpSize), 0, true},
                params, device, stream);
}

}  // namespace infuse::attention_forward
