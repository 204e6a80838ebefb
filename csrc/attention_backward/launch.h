// Host interface of the kernels of attention's gradients, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "attention/mask.h"
#include "attention/tile_map.h"
#include "attention_backward/params.h"
#include "attention_backward/plan.h"
#include "infuse/dtype.h"
#include "infuse/tensor_arg.h"

namespace infuse::attention_backward {

constexpr char kOp[] = "attention_backward_out";

struct Arguments {
  TensorArg dout, q, k, v, out;
  TensorArg lse;  // [batch, heads, queries]
  const attention::MaskArg* mask = nullptr;
  const attention::TileMapArg* tile_map = nullptr;
  const TensorArg* sinks = nullptr;
  double scale = 1.0, softcap = 0.0;
  bool is_causal = false;
  double dropout_p = 0.0;
  const void* seed = nullptr;  // int64 [2] on the device
  bool deterministic = false;
  std::int64_t config = kHeuristic;
  TensorArg dq, dk, dv;
};

struct Prepared {
  Params params{};
  Plan plan{};
  DType dtype = DType::kNone;
  int device = 0;
  bool empty = false;  // nothing to compute
  bool deterministic = false;
  std::int64_t workspace_floats = 0;
};

// Checks the arguments and plans. Throws std::runtime_error for what the kernels can't take.
Prepared prepare(const Arguments& arguments);

// Three or four launches on `stream` of the current device, which must be the tensors'. workspace: aligned to 16 bytes.
void launch(Prepared prepared, float* workspace, cudaStream_t stream);

// One instantiation per dtype of q, k and v, each in a file of its own so that they compile in parallel: delta and the
// zeros that sums start from; dk, dv and the sums of dq; dq, dk and dv from sums.
template <DType kDType>
void launch_first(const Params& params, int device, cudaStream_t stream);
template <DType kDType>
void launch_mma(const Plan& plan, const Params& params, int device, cudaStream_t stream);
template <DType kDType>
void launch_wgmma(const Plan& plan, const Params& params, int device, cudaStream_t stream);
// Whether this library has code of launch_wgmma that the device runs.
bool has_wgmma(int device);
template <DType kDType>
void launch_last(const Params& params, int device, cudaStream_t stream);

}  // namespace infuse::attention_backward
