// Checks, plan and choice of the dtype for cross entropy. Host code only, compiled once and not per architecture.
#include "cross_entropy/launch.h"

#include "dispatch.h"
#include "infuse/check.h"

namespace infuse::cross_entropy {
namespace {

void check_vector(const char* op, const TensorArg& tensor, const TensorArg& like, std::int64_t size) {
  check_dtype(op, tensor, DType::kFloat32);
  check_same_device(op, tensor, like);
  check(tensor.num_dims <= 1 && (tensor.num_dims == 0 ? 1 : tensor.sizes[0]) == size, op, "shape of ", tensor.name,
        ", got ", shape_text(tensor), ", expected [", size, "]");
  check_contiguous(op, tensor);
}

void check_arguments(const Arguments& arguments) {
  const TensorArg& logits = *arguments.logits;
  check(arguments.config >= kHeuristic && arguments.config < kNumConfigs, kOp, "config, got ", arguments.config,
        ", expected -1 to ", kNumConfigs - 1);
  check(logits.num_dims == 2, kOp, "dimensions of logits, got ", logits.num_dims, ", expected 2");
  check_last_stride(kOp, logits);
  check_rows_apart(kOp, logits);
  const std::int64_t rows = logits.sizes[0], vocab = logits.sizes[1];
  check(rows <= kMaxRows && vocab <= kMaxRows, kOp, "shape of logits, got ", shape_text(logits),
        ", expected sizes of at most ", kMaxRows);
  const std::uint64_t step = rows > 1 ? static_cast<std::uint64_t>(logits.strides[0]) * size_bytes(logits.dtype) : 0;
  check((reinterpret_cast<std::uintptr_t>(logits.data) | step) % kVectorBytes == 0, kOp,
        "rows of logits, got a start or a stride of another alignment, expected multiples of ", kVectorBytes, " bytes");
  check(arguments.target.is_contiguous_int64_vector && arguments.target.size == rows, kOp,
        "target, got another shape, dtype or stride, expected contiguous int64 [", rows, "]");
  check(arguments.target.device == logits.device, kOp, "device of target, got ", arguments.target.device,
        ", expected ", logits.device, " (as logits)");
  if (arguments.scale != nullptr) check_vector(kOp, *arguments.scale, logits, 1);
  check_vector(kOp, *arguments.loss, logits, rows);
  check(arguments.label_smoothing >= 0.0 && arguments.label_smoothing <= 1.0, kOp, "label_smoothing, got ",
        arguments.label_smoothing, ", expected 0 to 1");
  check(arguments.softcap >= 0.0, kOp, "softcap, got ", arguments.softcap, ", expected 0 or more");
}

}  // namespace

void launch(const Arguments& arguments, cudaStream_t stream) {
  check_arguments(arguments);
  const TensorArg& logits = *arguments.logits;
  if (logits.sizes[0] == 0) return;
  Params params{};
  params.logits = logits.data;
  params.target = arguments.target.data;
  params.scale = arguments.scale == nullptr ? nullptr : static_cast<const float*>(arguments.scale->data);
  params.loss = static_cast<float*>(arguments.loss->data);
  params.row_stride = logits.strides[0];
  params.ignore_index = arguments.ignore_index;
  params.rows = static_cast<std::uint32_t>(logits.sizes[0]);
  params.vocab = static_cast<std::uint32_t>(logits.sizes[1]);
  params.softcap = static_cast<float>(arguments.softcap);
  params.label_smoothing = static_cast<float>(arguments.label_smoothing);
  params.gradient = arguments.gradient;
  const auto config = static_cast<int>(arguments.config);
  dispatch_dtype(kOp, "logits", logits.dtype, [&](auto dtype) {
    launch_rows<decltype(dtype)::value>(config, params, logits.device, stream);
  });
}

void launch_scale(const TensorArg& tensor, const TensorArg& scale, cudaStream_t stream) {
  check_contiguous(kScaleOp, tensor);
  check_vector(kScaleOp, scale, tensor, 1);
  check(reinterpret_cast<std::uintptr_t>(tensor.data) % kVectorBytes == 0, kScaleOp,
        "tensor, got another alignment, expected ", kVectorBytes, " bytes");
  std::uint64_t size = 1;
  for (int i = 0; i < tensor.num_dims; ++i) size *= static_cast<std::uint64_t>(tensor.sizes[i]);
  if (size == 0) return;
  dispatch_dtype(kScaleOp, "tensor", tensor.dtype, [&](auto dtype) {
    launch_scale_of<decltype(dtype)::value>(tensor.data, static_cast<const float*>(scale.data), size, tensor.device,
                                            stream);
  });
}

}  // namespace infuse::cross_entropy
