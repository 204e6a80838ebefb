// Host interface of the kernels for linears of few rows, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string_view>

#include "infuse/dtype.h"
#include "infuse/tensor_arg.h"
#include "skinny_linear/params.h"
#include "skinny_linear/plan.h"

namespace infuse::skinny_linear {

constexpr char kOp[] = "skinny_linear_out";

// Tensors are null where the operator is not given one. x, residual and sum [rows, dim]; weights [features, dim]; biases
// [features]; addend and outs [rows, features], outs also in float32. With an activation the first two weights are gate
// and up of outs[0]. A norm may be split between two launches: the first has no norm but its weight, and writes `scaled` as
// outs[0] and squares_out [rows, features / kSquaresWidth] in float32; the second has `scaled` as x and the squares.
struct Arguments {
  const TensorArg* x;
  const TensorArg* residual;
  bool has_norm;
  const TensorArg* norm_weight;
  double eps, weight_offset;
  bool cast_before_weight, eps_as_minimum;
  const TensorArg* weights[kMaxWeights];
  const TensorArg* biases[kMaxWeights];
  std::string_view activation;
  const TensorArg* addend;
  std::int64_t config;
  const TensorArg* outs[kMaxWeights];
  const TensorArg* sum;
  const TensorArg* squares;
  const TensorArg* scaled;
  const TensorArg* squares_out;
};

struct Prepared {
  Params params{};
  Plan plan{};
  DType dtype = DType::kNone;
  int device = 0;
  bool empty = false;                   // nothing to compute
  std::int64_t workspace_elements = 0;  // of x's dtype, for a normalised x
};

// Checks the arguments and plans. Throws std::runtime_error for what the kernels can't take.
Prepared prepare(const Arguments& arguments);

// One launch, or two with a workspace aligned to 16 bytes, on `stream` of the current device, which must be the tensors'.
void launch(const Arguments& arguments, Prepared prepared, void* workspace, cudaStream_t stream);

// The norm as a kernel of its own: y [rows, dim] contiguous. One instantiation per dtype.
template <DType kDType>
void launch_norm(const Plan& plan, const Params& params, void* y, int device, cudaStream_t stream);

// One instantiation per dtype, each in a file of its own so that they compile in parallel.
template <DType kDType>
void launch_planned(const Plan& plan, const Params& params, int device, cudaStream_t stream);

}  // namespace infuse::skinny_linear
