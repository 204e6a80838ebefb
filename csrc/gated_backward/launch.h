// Host interface of the backward of a gated activation, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gated_backward/params.h"
#include "gated_backward/plan.h"
#include "infuse/dtype.h"
#include "infuse/tensor_arg.h"

namespace infuse::gated_backward {

constexpr char kOp[] = "gated_backward_out";

struct Arguments {
  TensorArg dout, gate_up, dgate_up;  // [rows, dim], [rows, 2 dim] and the same
  const TensorArg* out;               // [rows, dim], or null
  Activation activation;
  std::int64_t config;
};

// Checks the arguments, plans and launches on `stream` of the current device, which must be the tensors'. One launch,
// no synchronisation, no workspace. Throws std::runtime_error for what the kernel can't take and a failed launch.
void launch(const Arguments& arguments, cudaStream_t stream);

// One instantiation per dtype, each in a file of its own so that they compile in parallel.
template <DType kDType>
void launch_planned(const Plan& plan, const Params& params, int device, cudaStream_t stream);

}  // namespace infuse::gated_backward
