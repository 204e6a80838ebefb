// Host interface of the kernels of gated linears, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "gated_linear/params.h"
#include "gated_linear/plan.h"
#include "infuse/dtype.h"
#include "infuse/tensor_arg.h"

namespace infuse::gated_linear {

constexpr char kOp[] = "gated_linear_out";

struct Arguments {
  TensorArg x;                         // [rows, dim]
  TensorArg gate_weight, up_weight;    // [columns, dim], with offsets [groups, columns, dim]
  const TensorArg* gate_bias = nullptr;
  const TensorArg* up_bias = nullptr;
  TensorArg out;                       // [rows, columns]
  const TensorArg* gate_up = nullptr;  // [rows, 2 columns]
  bool has_groups = false;
  const std::int32_t* ends = nullptr;  // [groups] on the device
  std::int64_t groups = 0;
  std::string activation = "silu";
  std::int64_t config = kHeuristic;
};

struct Prepared {
  Params params{};
  int config = 0;
  DType dtype = DType::kNone;
  int device = 0;
  bool empty = false;  // nothing to compute
};

// Checks the arguments and plans. Throws std::runtime_error for what the kernels can't take.
Prepared prepare(const Arguments& arguments);

// One launch on `stream` of the current device, which must be the tensors'.
void launch(const Prepared& prepared, cudaStream_t stream);

// One instantiation per dtype, each in a file of its own so that they compile in parallel.
template <DType kDType>
void launch_wgmma(const Config& config, const Params& params, int device, cudaStream_t stream);

template <DType kDType>
void launch_mma(const Config& config, const Params& params, int device, cudaStream_t stream);

// Whether this library has code of launch_wgmma that the device runs.
bool has_wgmma(int device);

}  // namespace infuse::gated_linear
