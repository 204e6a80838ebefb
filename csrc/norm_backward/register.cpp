// Registers the CUDA implementation of the norms' backward with torch. The schema and its tags are defined in Python,
// in ops/norm_backward.py.
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "infuse/export.h"
#include "infuse/torch_tensor.h"
#include "norm_backward/launch.h"

namespace {

using infuse::norm_backward::kOp;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The gradient of a weight or a bias; empty where there is none.
Tensor gradient_of(const std::optional<Tensor>& tensor, const Tensor& x) {
  if (tensor.has_value()) return torch::stable::new_empty(*tensor, tensor->sizes());
  return torch::stable::new_empty(x, {0});
}

using OptionalTensor = std::optional<Tensor>;

struct Given {
  const Tensor &dy, &x, &rstd;
  const OptionalTensor &weight, &bias, &mean, &dsum, &gate;
  OptionalTensor more_dy[infuse::norm_backward::kMaxDyTerms - 1];
  double weight_offset = 0.0, minimum = 0.0;
  bool gate_first = false, gate_is_silu = false;
  int64_t config;
};

// dx, dgate, dweight, dbias. out: where dx goes, if that is given; it may be one of the gradients that are read.
std::tuple<Tensor, Tensor, Tensor, Tensor> run(const Given& given, const OptionalTensor& out = std::nullopt) {
  const auto dy = infuse::tensor_arg(given.dy, kOp, "dy");
  const auto dy_1 = infuse::tensor_arg(given.more_dy[0], kOp, "dy_1");
  const auto dy_2 = infuse::tensor_arg(given.more_dy[1], kOp, "dy_2");
  const auto dsum = infuse::tensor_arg(given.dsum, kOp, "dsum");
  const auto x = infuse::tensor_arg(given.x, kOp, "x");
  const auto gate = infuse::tensor_arg(given.gate, kOp, "gate");
  const auto weight = infuse::tensor_arg(given.weight, kOp, "weight");
  const auto bias = infuse::tensor_arg(given.bias, kOp, "bias");
  const auto mean = infuse::tensor_arg(given.mean, kOp, "mean");
  const auto rstd = infuse::tensor_arg(given.rstd, kOp, "rstd");
  using infuse::pointer_to;
  const auto prepared = infuse::norm_backward::prepare({{&dy, pointer_to(dy_1), pointer_to(dy_2)},
                                                        pointer_to(dsum),
                                                        &x,
                                                        pointer_to(gate),
                                                        pointer_to(weight),
                                                        pointer_to(bias),
                                                        pointer_to(mean),
                                                        &rstd,
                                                        given.weight_offset,
                                                        given.minimum,
                                                        given.gate_first,
                                                        given.gate_is_silu,
                                                        given.config});

  const torch::stable::accelerator::DeviceGuard guard(x.device);
  Tensor dx = out.has_value() ? *out : torch::stable::new_empty(given.x, given.x.sizes());
  if (out.has_value()) {
    const auto dx_arg = infuse::written_tensor_arg(dx, kOp, "out");
    infuse::check_dtype(kOp, dx_arg, x.dtype);
    infuse::check_same_device(kOp, dx_arg, x);
    infuse::check_same_shape(kOp, dx_arg, x);
    infuse::check_contiguous(kOp, dx_arg);
  }
  Tensor dgate = gradient_of(given.gate, given.x);
  Tensor dweight = gradient_of(given.weight, given.x), dbias = gradient_of(given.bias, given.x);
  const Tensor workspace = torch::stable::new_empty(given.x, {prepared.workspace_floats}, ScalarType::Float);
  infuse::norm_backward::launch(prepared, static_cast<float*>(workspace.mutable_data_ptr()), dx.mutable_data_ptr(),
                                dgate.mutable_data_ptr(), dweight.mutable_data_ptr(), dbias.mutable_data_ptr(),
                                infuse::current_stream(x.device, kOp));
  return {dx, dgate, dweight, dbias};
}

// The arguments of a norm without a gate.
Given ungated(const Tensor& dy, const OptionalTensor& dsum, const Tensor& x, const OptionalTensor& weight,
              const OptionalTensor& bias, const OptionalTensor& mean, const Tensor& rstd, double weight_offset,
              int64_t config, const OptionalTensor& dy_1, const OptionalTensor& dy_2, double minimum) {
  static const OptionalTensor none;
  Given given{dy, x, rstd, weight, bias, mean, dsum, none, {dy_1, dy_2}};
  given.weight_offset = weight_offset;
  given.minimum = minimum;
  given.config = config;
  return given;
}

// dx, dweight, dbias.
std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& dy, const OptionalTensor& dsum, const Tensor& x,
                                                 const OptionalTensor& weight, const OptionalTensor& bias,
                                                 const OptionalTensor& mean, const Tensor& rstd, double weight_offset,
                                                 int64_t config, const OptionalTensor& dy_1,
                                                 const OptionalTensor& dy_2, double minimum) {
  auto [dx, dgate, dweight, dbias] =
      run(ungated(dy, dsum, x, weight, bias, mean, rstd, weight_offset, config, dy_1, dy_2, minimum));
  return {dx, dweight, dbias};
}

// dweight, dbias; dx into `out`.
std::tuple<Tensor, Tensor> norm_backward_into(Tensor out, const Tensor& dy, const OptionalTensor& dsum, const Tensor& x,
                                              const OptionalTensor& weight, const OptionalTensor& bias,
                                              const OptionalTensor& mean, const Tensor& rstd, double weight_offset,
                                              int64_t config, const OptionalTensor& dy_1, const OptionalTensor& dy_2,
                                              double minimum) {
  auto [dx, dgate, dweight, dbias] =
      run(ungated(dy, dsum, x, weight, bias, mean, rstd, weight_offset, config, dy_1, dy_2, minimum), out);
  return {dweight, dbias};
}

// dx, dgate, dweight.
std::tuple<Tensor, Tensor, Tensor> gated_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& gate,
                                                       const OptionalTensor& weight, const Tensor& rstd,
                                                       bool gate_first, bool gate_is_silu, int64_t config,
                                                       const OptionalTensor& dy_1, const OptionalTensor& dy_2) {
  const OptionalTensor none, some_gate = gate;
  Given given{dy, x, rstd, weight, none, none, none, some_gate, {dy_1, dy_2}};
  given.gate_first = gate_first;
  given.gate_is_silu = gate_is_silu;
  given.config = config;
  auto [dx, dgate, dweight, dbias] = run(given);
  return {dx, dgate, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(infuse, CUDA, m) {
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
  m.impl("norm_backward_into", TORCH_BOX(&norm_backward_into));
  m.impl("gated_norm_backward", TORCH_BOX(&gated_norm_backward));
}

INFUSE_EXPORT_CONFIGS(norm_backward, infuse::norm_backward::kConfigs)
