// From a plan to the launch of the kernel for dk, dv and the sums of dq. Included by the files that instantiate it.
#pragma once

#include "attention_backward/launch.h"

namespace infuse::attention_backward {

template <DType kDType>
void launch_mma(const Plan& plan, const Params&, int, cudaStream_t) {
  fail(kOp, "head_dim of the kernel, got ", plan.dim, ", expected one that has a kernel");
}

}  // namespace infuse::attention_backward
