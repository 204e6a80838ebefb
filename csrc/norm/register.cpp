// Registers the CUDA implementations of the norms' forward with torch. The schemas and their tags are defined in
// Python, in ops/.
//
// Only the LibTorch Stable ABI is used, so one binary serves torch 2.11 and later.
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "infuse/export.h"
#include "infuse/torch_tensor.h"
#include "norm/launch.h"

namespace {

using infuse::norm::Formula;
using infuse::norm::Operand;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

struct Inputs {
  const Tensor& x;
  const MaybeTensor& weight;
  const MaybeTensor& bias;
  const Tensor* operand;  // the residual or the gate
};

struct Outputs {
  Tensor& out;
  Tensor* sum;
  MaybeTensor& mean;
  MaybeTensor& rstd;
};

void run(const char* op, const Inputs& inputs, const Formula& formula, int64_t config, const Outputs& outputs) {
  using infuse::pointer_to;
  const auto written = [op](Tensor* tensor, const char* name) {
    return tensor ? std::optional(infuse::written_tensor_arg(*tensor, op, name)) : std::nullopt;
  };
  const auto address = [](MaybeTensor& tensor) { return tensor ? &*tensor : nullptr; };
  const auto x = infuse::tensor_arg(inputs.x, op, "x");
  const auto weight = infuse::tensor_arg(inputs.weight, op, "weight");
  const auto bias = infuse::tensor_arg(inputs.bias, op, "bias");
  std::optional<infuse::TensorArg> operand;
  if (inputs.operand) {
    operand = infuse::tensor_arg(*inputs.operand, op, formula.operand == Operand::kResidual ? "residual" : "gate");
  }
  const auto out = written(&outputs.out, "out");
  const auto sum = written(outputs.sum, "sum");
  const auto mean = written(address(outputs.mean), "mean");
  const auto rstd = written(address(outputs.rstd), "rstd");
  const torch::stable::accelerator::DeviceGuard guard(x.device);
  const infuse::norm::Tensors tensors{&x,           pointer_to(weight), pointer_to(bias), pointer_to(out),
                                      pointer_to(operand), pointer_to(sum), pointer_to(mean), pointer_to(rstd)};
  infuse::norm::launch({op, x.device, infuse::current_stream(x.device, op)}, tensors, formula, config);
}

void rms_norm_out(const Tensor& x, const MaybeTensor& weight, double eps, double weight_offset,
                  bool cast_before_weight, bool eps_as_minimum, int64_t config, Tensor out, MaybeTensor rstd) {
  Formula formula{.eps = eps, .weight_offset = weight_offset};
  formula.cast_before_weight = cast_before_weight;
  formula.eps_as_minimum = eps_as_minimum;
  MaybeTensor none;
  run("rms_norm_out", {x, weight, none, nullptr}, formula, config, {out, nullptr, none, rstd});
}

void layer_norm_out(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, double eps,
                    double weight_offset, bool cast_before_weight, int64_t config, Tensor out, MaybeTensor mean,
                    MaybeTensor rstd) {
  Formula formula{.eps = eps, .weight_offset = weight_offset, .center = true};
  formula.cast_before_weight = cast_before_weight;
  run("layer_norm_out", {x, weight, bias, nullptr}, formula, config, {out, nullptr, mean, rstd});
}

void add_rms_norm_out(const Tensor& x, const Tensor& residual, const MaybeTensor& weight, double eps,
                      double weight_offset, bool cast_before_weight, bool eps_as_minimum, int64_t config, Tensor out,
                      Tensor sum, MaybeTensor rstd) {
  Formula formula{.eps = eps, .weight_offset = weight_offset, .operand = Operand::kResidual};
  formula.cast_before_weight = cast_before_weight;
  formula.eps_as_minimum = eps_as_minimum;
  MaybeTensor none;
  run("add_rms_norm_out", {x, weight, none, &residual}, formula, config, {out, &sum, none, rstd});
}

void add_layer_norm_out(const Tensor& x, const Tensor& residual, const MaybeTensor& weight, const MaybeTensor& bias,
                        double eps, double weight_offset, bool cast_before_weight, int64_t config, Tensor out,
                        Tensor sum, MaybeTensor mean, MaybeTensor rstd) {
  Formula formula{.eps = eps, .weight_offset = weight_offset, .operand = Operand::kResidual, .center = true};
  formula.cast_before_weight = cast_before_weight;
  run("add_layer_norm_out", {x, weight, bias, &residual}, formula, config, {out, &sum, mean, rstd});
}

// Room for y.
Tensor new_out(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, bool cast_before_weight) {
  using torch::headeronly::ScalarType;
  const auto is_wide = [](const MaybeTensor& vector) { return vector && vector->scalar_type() == ScalarType::Float; };
  const bool wide = cast_before_weight && (is_wide(weight) || is_wide(bias));
  return torch::stable::new_empty(x, x.sizes(), wide ? ScalarType::Float : x.scalar_type());
}

std::tuple<Tensor, Tensor> add_rms_norm_kernel(const Tensor& x, const Tensor& residual, const MaybeTensor& weight,
                                               double eps, double weight_offset, bool cast_before_weight,
                                               bool eps_as_minimum, int64_t config) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = new_out(x, weight, std::nullopt, cast_before_weight);
  Tensor sum = torch::stable::new_empty(x, x.sizes());
  add_rms_norm_out(x, residual, weight, eps, weight_offset, cast_before_weight, eps_as_minimum, config, out, sum, {});
  return {out, sum};
}

std::tuple<Tensor, Tensor> add_layer_norm_kernel(const Tensor& x, const Tensor& residual, const MaybeTensor& weight,
                                                 const MaybeTensor& bias, double eps, double weight_offset,
                                                 bool cast_before_weight, int64_t config) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = new_out(x, weight, bias, cast_before_weight);
  Tensor sum = torch::stable::new_empty(x, x.sizes());
  add_layer_norm_out(x, residual, weight, bias, eps, weight_offset, cast_before_weight, config, out, sum, {}, {});
  return {out, sum};
}

void gated_rms_norm_out(const Tensor& x, const Tensor& gate, const MaybeTensor& weight, double eps,
                        bool norm_before_gate, bool gate_is_silu, int64_t groups, bool cast_before_weight,
                        bool cast_before_gate, int64_t config, Tensor out, MaybeTensor rstd) {
  Formula formula{.eps = eps};
  formula.operand = norm_before_gate ? Operand::kGateBehindNorm : Operand::kGateBeforeNorm;
  formula.cast_before_weight = cast_before_weight;
  formula.cast_before_gate = cast_before_gate;
  formula.gate_is_silu = gate_is_silu;
  formula.groups = groups;
  MaybeTensor none;
  run("gated_rms_norm_out", {x, weight, none, &gate}, formula, config, {out, nullptr, none, rstd});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(infuse, CUDA, m) {
  m.impl("rms_norm_out", TORCH_BOX(&rms_norm_out));
  m.impl("layer_norm_out", TORCH_BOX(&layer_norm_out));
  m.impl("add_rms_norm_out", TORCH_BOX(&add_rms_norm_out));
  m.impl("add_layer_norm_out", TORCH_BOX(&add_layer_norm_out));
  m.impl("add_rms_norm_kernel", TORCH_BOX(&add_rms_norm_kernel));
  m.impl("add_layer_norm_kernel", TORCH_BOX(&add_layer_norm_kernel));
  m.impl("gated_rms_norm_out", TORCH_BOX(&gated_rms_norm_out));
}

INFUSE_EXPORT_CONFIGS(norm, infuse::norm::kConfigs)
