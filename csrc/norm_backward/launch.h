// Host interface of the norms' backward kernels, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "infuse/dtype.h"
#include "infuse/tensor_arg.h"
#include "norm_backward/params.h"
#include "norm_backward/plan.h"

namespace infuse::norm_backward {

constexpr char kOp[] = "norm_backward";

// Pointers are null for what is not there: all but dy[0], x and rstd. mean: of LayerNorm.
struct Arguments {
  const TensorArg* dy[kMaxDyTerms];
  const TensorArg *dsum, *x, *gate, *weight, *bias, *mean, *rstd;
  double weight_offset;
  double minimum;  // of the mean of squares, 0 without one
  bool gate_first, gate_is_silu;
  std::int64_t config;  // kHeuristic or an index into kConfigs
};

// What to launch, but for the tensors that the caller allocates.
struct Prepared {
  Plan plan;
  Params params;
  Form form;
  DType dtype, weight_dtype, bias_dtype;  // kNone for what is not there
  int device;
  int num_sms;
  int max_parts;
  std::int64_t workspace_floats;
};

// Checks the arguments and plans. Throws std::runtime_error for what the kernels can't take.
Prepared prepare(const Arguments& arguments);

// Launches on `stream` of the current device, which must be the arguments'. workspace: workspace_floats of fp32,
// aligned to 16 bytes; dx: contiguous, as x, and so is dgate if there is a gate; dweight, dbias: [dim] contiguous. No synchronisation. Throws
// std::runtime_error for a failed launch.
void launch(Prepared prepared, float* workspace, void* dx, void* dgate, void* dweight, void* dbias, cudaStream_t stream);

// One instantiation per combination of dtypes, each in a file of its own so that they compile in parallel. Return the
// number of parts that were written.
template <DType kX, DType kWeight>
int launch_ring(const Prepared& prepared, cudaStream_t stream);
template <DType kX>
int launch_two_pass(const Prepared& prepared, cudaStream_t stream);

void launch_sum_parts(const SumPartsParams& params, int count, int device, cudaStream_t stream);

}  // namespace infuse::norm_backward
