// From torch's tensors to TensorArg, by the LibTorch Stable ABI. Included by the register.cpp files alone.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "infuse/check.h"
#include "infuse/dtype.h"
#include "infuse/stream.h"
#include "infuse/tensor_arg.h"

namespace infuse {

inline DType dtype_of(const torch::stable::Tensor& tensor, const char* op, const char* name) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Float: return DType::kFloat32;
    default:
      fail(op, "dtype of ", name, ", got scalar type ", static_cast<int>(tensor.scalar_type()),
           ", expected bfloat16, float16 or float32");
  }
}

inline TensorArg tensor_arg_at(const torch::stable::Tensor& tensor, const char* op, const char* name, void* data) {
  return {name,
          data,
          dtype_of(tensor, op, name),
          tensor.get_device_index(),
          static_cast<int>(tensor.dim()),
          tensor.sizes().data(),
          tensor.strides().data()};
}

// A tensor that is read. Borrows sizes and strides from it, so it must outlive the result.
inline TensorArg tensor_arg(const torch::stable::Tensor& tensor, const char* op, const char* name) {
  check(tensor.is_cuda(), op, "device of ", name, ", got one that is not CUDA, expected CUDA");
  return tensor_arg_at(tensor, op, name, const_cast<void*>(tensor.const_data_ptr()));
}

// A tensor that is written.
inline TensorArg written_tensor_arg(const torch::stable::Tensor& tensor, const char* op, const char* name) {
  check(tensor.is_cuda(), op, "device of ", name, ", got one that is not CUDA, expected CUDA");
  return tensor_arg_at(tensor, op, name, tensor.mutable_data_ptr());
}

// A tensor that is read, if it is there.
inline std::optional<TensorArg> tensor_arg(const std::optional<torch::stable::Tensor>& tensor, const char* op,
                                           const char* name) {
  if (!tensor.has_value()) return std::nullopt;
  return tensor_arg(*tensor, op, name);
}

inline const TensorArg* pointer_to(const std::optional<TensorArg>& tensor) { return tensor ? &*tensor : nullptr; }

}  // namespace infuse
