// Registers gated linears with torch. The schema and its tags are defined in Python, in ops/gated_linear_kernels.py.
#include <torch/csrc/stable/ops.h>

#include "gated_linear/launch.h"
#include "infuse/export.h"
#include "infuse/torch_tensor.h"

namespace {

using infuse::gated_linear::kOp;
using torch::stable::Tensor;

void gated_linear_out(const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
                      const std::optional<Tensor>& gate_bias, const std::optional<Tensor>& up_bias,
                      const std::optional<Tensor>& offsets, std::string activation, int64_t config, Tensor out,
                      std::optional<Tensor> gate_up) {
  const auto gate_bias_arg = infuse::tensor_arg(gate_bias, kOp, "gate_bias");
  const auto up_bias_arg = infuse::tensor_arg(up_bias, kOp, "up_bias");
  std::optional<infuse::TensorArg> gate_up_arg;
  if (gate_up.has_value()) gate_up_arg = infuse::written_tensor_arg(*gate_up, kOp, "gate_up");
  infuse::gated_linear::Arguments arguments{infuse::tensor_arg(x, kOp, "x"),
                                            infuse::tensor_arg(gate_weight, kOp, "gate_weight"),
                                            infuse::tensor_arg(up_weight, kOp, "up_weight"),
                                            infuse::pointer_to(gate_bias_arg),
                                            infuse::pointer_to(up_bias_arg),
                                            infuse::written_tensor_arg(out, kOp, "out"),
                                            infuse::pointer_to(gate_up_arg)};
  if (offsets.has_value()) {
    infuse::check(offsets->is_cuda() && offsets->get_device_index() == x.get_device_index(), kOp,
                  "device of offsets, got another than that of x, expected the same");
    infuse::check(offsets->scalar_type() == torch::headeronly::ScalarType::Int && offsets->dim() == 1 &&
                      (offsets->size(0) <= 1 || offsets->stride(0) == 1),
                  kOp, "offsets, got another tensor, expected int32 [groups], contiguous");
    arguments.has_groups = true;
    arguments.ends = static_cast<const std::int32_t*>(offsets->const_data_ptr());
    arguments.groups = offsets->size(0);
  }
  arguments.activation = activation;
  arguments.config = config;
  const auto prepared = infuse::gated_linear::prepare(arguments);
  const torch::stable::accelerator::DeviceGuard guard(prepared.device);
  infuse::gated_linear::launch(prepared, infuse::current_stream(prepared.device, kOp));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(infuse, CUDA, m) {
  m.impl("gated_linear_out", TORCH_BOX(&gated_linear_out));
}

INFUSE_EXPORT_CONFIGS(gated_linear, infuse::gated_linear::kConfigs)
