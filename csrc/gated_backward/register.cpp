// Registers the backward of a gated MLP with torch. The schema and its tags are defined in Python, in
// ops/gated_backward_kernels.py.
#include "gated_backward/gemms.h"
#include "gated_backward/launch.h"
#include "infuse/export.h"
#include "infuse/torch_tensor.h"

namespace {

using infuse::gated_backward::kOp;
using torch::stable::Tensor;

void gated_backward_out(const Tensor& dout, const Tensor& gate_up, const std::string& activation, int64_t config,
                        Tensor dgate_up, std::optional<Tensor> out) {
  std::optional<infuse::TensorArg> out_arg;
  if (out.has_value()) out_arg = infuse::written_tensor_arg(*out, kOp, "out");
  const infuse::TensorArg dout_arg = infuse::tensor_arg(dout, kOp, "dout");
  const torch::stable::accelerator::DeviceGuard guard(dout_arg.device);
  infuse::gated_backward::launch({dout_arg, infuse::tensor_arg(gate_up, kOp, "gate_up"),
                                  infuse::written_tensor_arg(dgate_up, kOp, "dgate_up"), infuse::pointer_to(out_arg),
                                  infuse::activation_named(kOp, activation), config},
                                 infuse::current_stream(dout_arg.device, kOp));
}

void linear_pair_out(const Tensor& dgate_up, const Tensor& gate_weight, const Tensor& up_weight, int64_t config,
                     Tensor dx) {
  constexpr char kPair[] = "linear_pair_out";
  const infuse::TensorArg a = infuse::tensor_arg(dgate_up, kPair, "dgate_up");
  const torch::stable::accelerator::DeviceGuard guard(a.device);
  infuse::gated_backward::launch_pair({{a,
                                        {infuse::tensor_arg(gate_weight, kPair, "gate_weight"),
                                         infuse::tensor_arg(up_weight, kPair, "up_weight")},
                                        2},
                                       infuse::written_tensor_arg(dx, kPair, "dx"),
                                       config},
                                      infuse::current_stream(a.device, kPair));
}

void linear_gated_backward_out(const Tensor& dy, const Tensor& down_weight, const Tensor& gate_up,
                               const std::string& activation, int64_t config, Tensor dgate_up,
                               std::optional<Tensor> out) {
  constexpr char kLinear[] = "linear_gated_backward_out";
  std::optional<infuse::TensorArg> out_arg;
  if (out.has_value()) out_arg = infuse::written_tensor_arg(*out, kLinear, "out");
  const infuse::TensorArg a = infuse::tensor_arg(dy, kLinear, "dy");
  const torch::stable::accelerator::DeviceGuard guard(a.device);
  infuse::gated_backward::launch_linear_gated(
      {{a, {infuse::tensor_arg(down_weight, kLinear, "down_weight"), {}}, 1},
       infuse::tensor_arg(gate_up, kLinear, "gate_up"),
       infuse::written_tensor_arg(dgate_up, kLinear, "dgate_up"),
       infuse::pointer_to(out_arg),
       infuse::activation_named(kLinear, activation),
       config},
      infuse::current_stream(a.device, kLinear));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(infuse, CUDA, m) {
  m.impl("gated_backward_out", TORCH_BOX(&gated_backward_out));
  m.impl("linear_pair_out", TORCH_BOX(&linear_pair_out));
  m.impl("linear_gated_backward_out", TORCH_BOX(&linear_gated_backward_out));
}

INFUSE_EXPORT_CONFIGS(gated_backward, infuse::gated_backward::kConfigs)
INFUSE_EXPORT_CONFIGS(gated_backward_gemms, infuse::gated_backward::kGemmConfigs)
