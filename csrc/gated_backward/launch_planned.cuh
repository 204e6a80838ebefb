// From a plan to its launch. Included by the files that instantiate launch_planned.
#pragma once

#include "dispatch.h"
#include "gated_backward/kernel.cuh"
#include "gated_backward/launch.h"
#include "infuse/launch.h"

namespace infuse::gated_backward {

template <DType kDType>
void launch_planned(const Plan& plan, const Params& params, int device, cudaStream_t stream) {
  using T = Element<kDType>;
  const Config& config = kConfigs[plan.config];
  const Launch launch{dim3(static_cast<unsigned>(plan.ctas)), dim3(static_cast<unsigned>(config.threads)), 0, true};
  dispatch_int<1, 2>(kOp, "vectors of a thread", config.vecs, [&](auto vecs) {
    constexpr int kVecs = decltype(vecs)::value;
    const auto kernel = plan.elems == 8 ? gated_backward_kernel<T, 8, kVecs> : gated_backward_kernel<T, 1, kVecs>;
    launch_kernel(kOp, config.name, kernel, launch, params, device, stream);
  });
}

}  // namespace infuse::gated_backward
