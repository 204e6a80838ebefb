// Host interface of the rotary kernels, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "infuse/dtype.h"
#include "infuse/tensor_arg.h"
#include "rope/params.h"
#include "rope/plan.h"

namespace infuse::rope {

// Where rows go along the sequence dimension of a cache: [seq_len], int64 or int32.
struct PositionsArg {
  const void* data;
  bool wide;
  int device;
  std::int64_t size, stride;
};

// One tensor: x [..., dim], out and saved (see Part) alike. cos, sin null: copied. positions: x [batch, heads, seq_len, dim] goes to out
// [batch, heads, cache_len, dim].
struct Operand {
  TensorArg x, out;
  const TensorArg* cos = nullptr;
  const TensorArg* sin = nullptr;
  const TensorArg* weight = nullptr;
  const PositionsArg* positions = nullptr;
  bool has_norm = false;
  const TensorArg* saved = nullptr;
};

struct Options {
  double eps = 0.0, weight_offset = 0.0;
  bool cast_before_weight = false;
  bool interleaved = false, per_pair = false, inverse = false, upcast = false;
  bool is_backward = false;  // the transpose of the rotation, without intermediate rounding
  std::int64_t config = kHeuristic;
};

// Checks the arguments, plans and launches on `stream` of the current device, which must be the tensors'. One launch,
// no synchronisation, no workspace. Throws std::runtime_error for what the kernels can't take and a failed launch.
void launch(const char* op, const Operand* operands, int count, const Options& options, cudaStream_t stream);

// One instantiation per dtype of x, each in a file of its own so that they compile in parallel. factors: dtype of the
// tables, x's or float32 unless the plan is a narrow one.
template <DType kX>
void launch_planned(const char* op, const Plan& plan, DType factors, bool has_norm, const Params& params, unsigned ctas,
                    int device, cudaStream_t stream);

// The backward of norms and rotations: what to launch, but for the tensors that the caller allocates.
struct PreparedBackward {
  Params params;
  DType weight_dtype[kMaxParts];  // kNone for what is not there
  DType factors, dtype;
  int device;
  int lanes = 0;
  unsigned ctas = 0;
  std::int64_t workspace_floats = 0;
};

// operands: x is dy, out is dx, saved what was normalised; none may be empty. Throws std::runtime_error for what the
// kernel can't take.
PreparedBackward prepare_backward(const char* op, const Operand* operands, int count, const Options& options);

// workspace: workspace_floats of fp32; dweights: [dim] contiguous for each operand with a weight. Two launches, no
// synchronisation.
void launch_backward(const char* op, PreparedBackward prepared, float* workspace, void* const* dweights,
                     cudaStream_t stream);

template <DType kX>
void launch_backward_planned(const char* op, const PreparedBackward& prepared, cudaStream_t stream);

}  // namespace infuse::rope
