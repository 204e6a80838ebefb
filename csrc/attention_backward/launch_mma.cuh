// From a plan to the launch of the kernel for dk, dv and the sums of dq. Included by the files that instantiate it.
#pragma once

#include "attention_backward/kernel.cuh"
#include "attention_backward/launch.h"
#include "dispatch.h"
#include "infuse/launch.h"

namespace infuse::attention_backward {

template <DType kDType>
void launch_mma(const Plan& plan, const Params& params, int device, cudaStream_t stream) {
  using T = Element<kDType>;
  const Config& config = kConfigs[plan.config];
  const unsigned ctas = params.batch * params.kv_heads * params.splits * params.key_blocks;
  if (ctas == 0) return;
  const auto run = [&](auto traits) {
    using Traits = decltype(traits);
    const auto kernel = mma_kernel<Traits>;
    resident_ctas(kOp, kernel, Traits::kThreads, plan.shared_bytes, device);  // allows the shared memory
    launch_kernel(kOp, config.name, kernel, {dim3(ctas), dim3(Traits::kThreads), plan.shared_bytes, true}, params,
                  device, stream);
  };
  if (config.keys == 128) {
    return dispatch_int<64, 96, 128>(kOp, "head_dim of the kernel", plan.dim, [&](auto dim) {
      constexpr int kDim = decltype(dim)::value;
      run(Traits<T, kDim, 128, 4, 2, kDim == 96 ? 4 : 2>{});
    });
  }
  dispatch_int<64, 128, 192, 256>(kOp, "head_dim of the kernel", plan.dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    run(Traits<T, kDim, 64, 2, kDim == 64 ? 2 : 4, 2>{});
  });
}

}  // namespace infuse::attention_backward
