// From a plan to its one or two launches. Included by the files that instantiate launch_mma.
#pragma once

#include "attention_forward/launch.h"

namespace infuse::attention_forward {

template <DType kDType>
void launch_mma(const Plan& plan, const Params&, int, cudaStream_t) {
  fail(kOp, "head_dim of the kernel, got ", plan.dim, ", expected one that has a kernel");
}

}  // namespace infuse::attention_forward
