// The strides of attention's four-dimensional tensors.
#pragma once

#include <cstdint>

#include "infuse/tensor_arg.h"

namespace infuse::attention {

// Elements between neighbours along each dimension, 0 where a dimension is broadcast. The last dimension is contiguous.
struct Strides {
  std::int64_t batch, head, row;
};

inline Strides strides_of(const TensorArg& tensor) { return {tensor.strides[0], tensor.strides[1], tensor.strides[2]}; }

}  // namespace infuse::attention
