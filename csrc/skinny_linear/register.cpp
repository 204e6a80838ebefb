// Registers linears of few rows with torch. The schema and its tags are defined in Python, in
// ops/skinny_linear_kernels.py.
#include <torch/csrc/stable/ops.h>

#include <string>

#include "infuse/export.h"
#include "infuse/torch_tensor.h"
#include "skinny_linear/launch.h"

namespace {

using infuse::skinny_linear::kOp;
using torch::stable::Tensor;

std::optional<infuse::TensorArg> written_arg(const std::optional<Tensor>& tensor, const char* name) {
  if (!tensor.has_value()) return std::nullopt;
  return infuse::written_tensor_arg(*tensor, kOp, name);
}

void skinny_linear_out(const Tensor& x, const std::optional<Tensor>& residual, bool norm,
                       const std::optional<Tensor>& norm_weight, double eps, double weight_offset,
                       bool cast_before_weight, bool eps_as_minimum, const Tensor& weight0,
                       const std::optional<Tensor>& weight1, const std::optional<Tensor>& weight2,
                       const std::optional<Tensor>& bias0, const std::optional<Tensor>& bias1,
                       const std::optional<Tensor>& bias2, std::string activation, const std::optional<Tensor>& addend,
                       const std::optional<Tensor>& squares, int64_t config, Tensor out0, std::optional<Tensor> out1,
                       std::optional<Tensor> out2, std::optional<Tensor> sum_out, std::optional<Tensor> scaled_out,
                       std::optional<Tensor> squares_out) {
  const auto x_arg = infuse::tensor_arg(x, kOp, "x"), weight0_arg = infuse::tensor_arg(weight0, kOp, "weight0");
  const auto read = [](const std::optional<Tensor>& tensor, const char* name) {
    return infuse::tensor_arg(tensor, kOp, name);
  };
  const auto residual_arg = read(residual, "residual"), norm_weight_arg = read(norm_weight, "norm_weight");
  const auto weight1_arg = read(weight1, "weight1"), weight2_arg = read(weight2, "weight2");
  const auto bias0_arg = read(bias0, "bias0"), bias1_arg = read(bias1, "bias1"), bias2_arg = read(bias2, "bias2");
  const auto addend_arg = read(addend, "addend");
  const auto out0_arg = infuse::written_tensor_arg(out0, kOp, "out0");
  const auto out1_arg = written_arg(out1, "out1"), out2_arg = written_arg(out2, "out2");
  const auto sum_arg = written_arg(sum_out, "sum_out"), scaled_arg = written_arg(scaled_out, "scaled_out");
  const auto squares_out_arg = written_arg(squares_out, "squares_out"), squares_arg = read(squares, "squares");
  using infuse::pointer_to;
  const infuse::skinny_linear::Arguments arguments{&x_arg,
                                                   pointer_to(residual_arg),
                                                   norm,
                                                   pointer_to(norm_weight_arg),
                                                   eps,
                                                   weight_offset,
                                                   cast_before_weight,
                                                   eps_as_minimum,
                                                   {&weight0_arg, pointer_to(weight1_arg), pointer_to(weight2_arg)},
                                                   {pointer_to(bias0_arg), pointer_to(bias1_arg), pointer_to(bias2_arg)},
                                                   activation,
                                                   pointer_to(addend_arg),
                                                   config,
                                                   {&out0_arg, pointer_to(out1_arg), pointer_to(out2_arg)},
                                                   pointer_to(sum_arg),
                                                   pointer_to(squares_arg),
                                                   pointer_to(scaled_arg),
                                                   pointer_to(squares_out_arg)};
  const auto prepared = infuse::skinny_linear::prepare(arguments);
  const torch::stable::accelerator::DeviceGuard guard(prepared.device);
  std::optional<Tensor> workspace;
  if (prepared.workspace_elements > 0) workspace = torch::stable::new_empty(x, {prepared.workspace_elements});
  infuse::skinny_linear::launch(arguments, prepared, workspace ? workspace->mutable_data_ptr() : nullptr,
                                infuse::current_stream(prepared.device, kOp));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(infuse, CUDA, m) {
  m.impl("skinny_linear_out", TORCH_BOX(&skinny_linear_out));
}

INFUSE_EXPORT_CONFIGS(skinny_linear, infuse::skinny_linear::kConfigs)
