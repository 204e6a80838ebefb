// Registers the CUDA implementation of cross entropy with torch. The schema and its tags are defined in Python, in
// ops/cross_entropy_kernels.py.
#include "cross_entropy/launch.h"
#include "infuse/export.h"
#include "infuse/torch_tensor.h"

namespace {

using infuse::cross_entropy::kOp;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void cross_entropy_rows(Tensor logits, const Tensor& target, const std::optional<Tensor>& scale, int64_t ignore_index,
                        double label_smoothing, double softcap, bool gradient, int64_t config,
                        Tensor loss) {
  const auto logits_arg = infuse::written_tensor_arg(logits, kOp, "logits");
  const auto scale_arg = infuse::tensor_arg(scale, kOp, "scale");
  const auto loss_arg = infuse::written_tensor_arg(loss, kOp, "loss");
  const bool is_vector = target.scalar_type() == ScalarType::Long && target.is_cuda() && target.dim() == 1 &&
                         (target.size(0) <= 1 || target.stride(0) == 1);
  const infuse::cross_entropy::TargetArg target_arg{
      is_vector ? static_cast<const std::int64_t*>(target.const_data_ptr()) : nullptr,
      target.dim() == 1 ? target.size(0) : -1, static_cast<int>(target.get_device_index()), is_vector};
  const torch::stable::accelerator::DeviceGuard guard(logits_arg.device);
  infuse::cross_entropy::launch({&logits_arg, target_arg, infuse::pointer_to(scale_arg), &loss_arg, ignore_index,
                                 label_smoothing, softcap, gradient, config},
                                infuse::current_stream(logits_arg.device, kOp));
}

void scale_unless_one(Tensor tensor, const Tensor& scale) {
  using infuse::cross_entropy::kScaleOp;
  const auto tensor_arg = infuse::written_tensor_arg(tensor, kScaleOp, "tensor");
  const auto scale_arg = infuse::tensor_arg(scale, kScaleOp, "scale");
  const torch::stable::accelerator::DeviceGuard guard(tensor_arg.device);
  infuse::cross_entropy::launch_scale(tensor_arg, scale_arg, infuse::current_stream(tensor_arg.device, kScaleOp));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(infuse, CUDA, m) {
  m.impl("cross_entropy_rows", TORCH_BOX(&cross_entropy_rows));
  m.impl("scale_unless_one", TORCH_BOX(&scale_unless_one));
}

INFUSE_EXPORT_CONFIGS(cross_entropy, infuse::cross_entropy::kConfigs)
