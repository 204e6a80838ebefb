// Registers the CUDA implementations with torch. The schemas and their tags are defined in Python, in ops/.
//
// Only the LibTorch Stable ABI is used, so one binary serves torch 2.11 and later.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "infuse/check.h"
#include "infuse/dtype.h"
#include "infuse/stream.h"
#include "rms_norm/launch.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

infuse::DType dtype_of(const Tensor& tensor, const char* op, const char* what) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return infuse::DType::kBFloat16;
    case ScalarType::Half: return infuse::DType::kFloat16;
    case ScalarType::Float: return infuse::DType::kFloat32;
    default:
      infuse::fail(op, "dtype of ", what, ", got scalar type ", static_cast<int>(tensor.scalar_type()),
                   ", expected bfloat16, float16 or float32");
  }
}

// Borrows sizes and strides from the tensor, which must outlive the result.
infuse::rms_norm::TensorArg tensor_arg(const Tensor& tensor, const char* what, bool is_written) {
  const char* op = infuse::rms_norm::kOp;
  infuse::check(tensor.is_cuda(), op, "device of ", what, ", got one that is not CUDA, expected CUDA");
  return {is_written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr()),
          dtype_of(tensor, op, what),
          tensor.get_device_index(),
          static_cast<int>(tensor.dim()),
          tensor.sizes().data(),
          tensor.strides().data()};
}

void rms_norm_out(const Tensor& x, const std::optional<Tensor>& weight, double eps, double weight_offset,
                  bool cast_before_weight, int64_t config, Tensor out) {
  const auto x_arg = tensor_arg(x, "x", false);
  const auto out_arg = tensor_arg(out, "out", true);
  std::optional<infuse::rms_norm::TensorArg> weight_arg;
  if (weight.has_value()) weight_arg = tensor_arg(*weight, "weight", false);
  const torch::stable::accelerator::DeviceGuard guard(x_arg.device);
  infuse::rms_norm::launch(x_arg, weight_arg ? &*weight_arg : nullptr, eps, weight_offset, cast_before_weight, config,
                           out_arg, infuse::current_stream(x_arg.device, infuse::rms_norm::kOp));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(infuse, CUDA, m) {
  m.impl("rms_norm_out", TORCH_BOX(&rms_norm_out));
}
