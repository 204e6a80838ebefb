// From a prepared backward to its kernel. Included by the files that instantiate launch_backward_planned.
#pragma once

#include "infuse/launch.h"
#include "rope/backward_kernel.cuh"
#include "rope/launch.h"

namespace infuse::rope {

template <DType kX>
void launch_backward_planned(const char* op, const PreparedBackward& prepared, cudaStream_t stream) {
  using X = Element<kX>;
  const unsigned lanes = static_cast<unsigned>(prepared.lanes);
  const Launch launch{dim3(prepared.ctas), dim3(lanes, kBackwardThreads / lanes), 0, true};
  const auto run = [&](auto kernel) {
    launch_kernel(op, "norm backward", kernel, launch, prepared.params, prepared.device, stream);
  };
  if (prepared.factors == DType::kFloat32) {
    run(norm_backward_kernel<X, float>);
  } else if constexpr (sizeof(X) == 2) {
    run(norm_backward_kernel<X, X>);
  }
}

}  // namespace infuse::rope
