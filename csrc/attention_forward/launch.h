// Host interface of the kernels of attention with many query rows, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "attention/mask.h"
#include "attention/tile_map.h"
#include "attention_forward/params.h"
#include "attention_forward/plan.h"
#include "infuse/dtype.h"
#include "infuse/tensor_arg.h"

namespace infuse::attention_forward {

constexpr char kOp[] = "attention_forward_out";

struct Arguments {
  TensorArg q, k, v, out;  // out [batch, heads, queries, dim_v]
  const TensorArg* lse = nullptr;  // [batch, heads, queries]
  const attention::MaskArg* mask = nullptr;
  const attention::TileMapArg* tile_map = nullptr;
  const TensorArg* sinks = nullptr;
  double scale = 1.0, softcap = 0.0;
  bool is_causal = false, nan_for_masked_rows = false;
  double dropout_p = 0.0;
  const void* seed = nullptr;  // int64 [2] on the device
  std::int64_t config = kHeuristic, splits = 0;
};

struct Prepared {
  Params params{};
  Plan plan{};
  DType dtype = DType::kNone;
  int device = 0;
  bool empty = false;                 // nothing to compute
  std::int64_t workspace_floats = 0;  // for the sums of splits that a second kernel merges, or the counter of tiles
};

// Checks the arguments and plans. Throws std::runtime_error for what the kernels can't take.
Prepared prepare(const Arguments& arguments);

// One launch, or two with a workspace, on `stream` of the current device, which must be the tensors'.
void launch(Prepared prepared, float* workspace, cudaStream_t stream);

// One instantiation per dtype of q, k and v, each in a file of its own so that they compile in parallel.
template <DType kDType>
void launch_mma(const Plan& plan, const Params& params, int device, cudaStream_t stream);

// The same for the configurations of wgmma. counter: one word, of any value.
template <DType kDType>
void launch_wgmma(const Plan& plan, const Params& params, std::uint32_t* counter, int device, cudaStream_t stream);

// Whether this library has code of launch_wgmma that the device runs.
bool has_wgmma(int device);

}  // namespace infuse::attention_forward
