// Host interface of the cross entropy kernel, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cross_entropy/params.h"
#include "cross_entropy/plan.h"
#include "infuse/dtype.h"
#include "infuse/tensor_arg.h"

namespace infuse::cross_entropy {

constexpr char kOp[] = "cross_entropy_rows";

// Shape and place of a tensor that is not one of the kernels' element types.
struct TargetArg {
  const std::int64_t* data;
  std::int64_t size;
  int device;
  bool is_contiguous_int64_vector;
};

struct Arguments {
  const TensorArg* logits;
  TargetArg target;
  const TensorArg* scale;  // null for 1
  const TensorArg* loss;
  std::int64_t ignore_index;
  double label_smoothing;
  double softcap;  // 0: none
  bool gradient;
  std::int64_t config;  // kHeuristic or an index into kConfigs
};

// Checks the arguments and launches on `stream` of the current device, which must be the arguments'. No
// synchronisation. Throws std::runtime_error for what the kernel can't take and for a failed launch.
void launch(const Arguments& arguments, cudaStream_t stream);

constexpr char kScaleOp[] = "scale_unless_one";

// The tensor times the number, in place. Contiguous, aligned to 16 bytes; scale float32, one number.
void launch_scale(const TensorArg& tensor, const TensorArg& scale, cudaStream_t stream);

// The kernels for a dtype.
template <DType kDType>
void launch_rows(int config, Params params, int device, cudaStream_t stream);
template <DType kDType>
void launch_scale_of(void* data, const float* scale, std::uint64_t size, int device, cudaStream_t stream);

}  // namespace infuse::cross_entropy
