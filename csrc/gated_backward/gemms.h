// Host interface of the GEMMs of a gated MLP's backward, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "infuse/dtype.h"
#include "infuse/gated_activation.h"
#include "infuse/tensor_arg.h"

namespace infuse::gated_backward {

// band: tiles along the rows that go through all columns together, so that both operands come from the L2.
struct GemmConfig {
  const char* name;
  int band;
};

constexpr GemmConfig kGemmConfigs[] = {
    {"wgmma_band4", 4},    // 0
    {"wgmma_band8", 8},    // 1
    {"wgmma_band16", 16},  // 2
};
constexpr int kNumGemmConfigs = sizeof(kGemmConfigs) / sizeof(kGemmConfigs[0]);
constexpr int kGemmHeuristic = -1;

// out = sum of a_i b_i, all a_i [rows, depth] side by side in one tensor, b_i [depth, columns].
struct Operands {
  TensorArg a;
  TensorArg b[2];
  int count;
};

// dx [rows, columns] contiguous.
struct PairArguments {
  Operands operands;
  TensorArg dx;
  std::int64_t config;
};

// gate_up [rows, 2 columns]; dgate_up the same, contiguous; out [rows, columns] contiguous, or null.
struct LinearGatedArguments {
  Operands operands;
  TensorArg gate_up, dgate_up;
  const TensorArg* out;
  Activation activation;
  std::int64_t config;
};

// What a launch works on. Strides in elements, of rows.
struct GemmProblem {
  DType dtype;
  int device;
  std::int64_t rows, columns, depth;  // depth: of each pair
  int pairs;
  const void *a, *b[2];
  std::int64_t a_stride, b_stride[2];
  void* dx;  // null: gradients of a gated activation are what is written
  const void* gate_up;
  void *dgate_up, *out;
  std::int64_t gate_up_stride;
  Activation activation;
  GemmConfig config;
};

// Check the arguments and launch on `stream` of the current device, which must be the tensors'. One launch, no
// synchronisation, no workspace. Throw std::runtime_error for what the kernels can't take and a failed launch.
void launch_pair(const PairArguments& arguments, cudaStream_t stream);
void launch_linear_gated(const LinearGatedArguments& arguments, cudaStream_t stream);

// One instantiation per dtype, each in a file of its own so that they compile in parallel.
template <DType kDType>
void launch_wgmma(const GemmProblem& problem, cudaStream_t stream);

// Whether this library has code of launch_wgmma that the device runs.
bool has_wgmma(int device);

}  // namespace infuse::gated_backward
