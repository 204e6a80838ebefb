// Host interface of the norm forward kernels, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "infuse/dtype.h"
#include "infuse/tensor_arg.h"
#include "norm/params.h"
#include "norm/plan.h"

namespace infuse::norm {

// Tensors are null where the operator has none. x, operand and out [..., dim]; weight and bias [dim]; sum [..., dim],
// contiguous; mean and rstd [...], with groups [..., groups], float32 and contiguous.
struct Tensors {
  const TensorArg *x, *weight, *bias, *out;
  const TensorArg* operand = nullptr;
  const TensorArg* sum = nullptr;
  const TensorArg* mean = nullptr;
  const TensorArg* rstd = nullptr;
};

// As in ops/; what an operator has no argument for stays at its default.
struct Formula {
  double eps;
  double weight_offset = 0.0;
  Operand operand = Operand::kNone;
  bool center = false;
  bool eps_as_minimum = false;
  bool cast_before_weight = false;
  bool cast_before_gate = false;
  bool gate_is_silu = false;
  std::int64_t groups = 1;
};

// Where a launch goes. op: for messages.
struct Target {
  const char* op;
  int device;
  cudaStream_t stream;
};

// Checks the arguments, plans and launches on the stream, whose device must be the current one and x's. config:
// kHeuristic or an index into kConfigs. No synchronisation, no workspace. Throws std::runtime_error for what the
// kernels can't take and for a failed launch.
void launch(const Target& target, const Tensors& tensors, const Formula& formula, std::int64_t config);

// One instantiation per combination of dtypes, each in a file of its own so that they compile in parallel.
template <DType kX, DType kWeight>
void launch_planned(const Target& target, Operand operand, bool center, const Plan& plan, const Params& params);

}  // namespace infuse::norm
