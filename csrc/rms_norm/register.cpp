// Registers RMSNorm's CUDA implementation with torch. The schema and its tags are defined in Python, in ops/.
//
// Only the LibTorch Stable ABI is used, so one binary serves torch 2.11 and later.
#include "infuse/export.h"
#include "infuse/torch_tensor.h"
#include "rms_norm/launch.h"

namespace {

using infuse::rms_norm::kOp;
using torch::stable::Tensor;

void rms_norm_out(const Tensor& x, const std::optional<Tensor>& weight, double eps, double weight_offset,
                  bool cast_before_weight, int64_t config, Tensor out) {
  const auto x_arg = infuse::tensor_arg(x, kOp, "x");
  const auto weight_arg = infuse::tensor_arg(weight, kOp, "weight");
  const auto out_arg = infuse::written_tensor_arg(out, kOp, "out");
  const torch::stable::accelerator::DeviceGuard guard(x_arg.device);
  infuse::rms_norm::launch(x_arg, infuse::pointer_to(weight_arg), eps, weight_offset, cast_before_weight, config,
                           out_arg, infuse::current_stream(x_arg.device, kOp));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(infuse, CUDA, m) {
  m.impl("rms_norm_out", TORCH_BOX(&rms_norm_out));
}

INFUSE_EXPORT_CONFIGS(rms_norm, infuse::rms_norm::kConfigs)
