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

// dx, dweight, dbias.
std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& dy, const std::optional<Tensor>& dsum, const Tensor& x,
                                                 const std::optional<Tensor>& weight,
                                                 const std::optional<Tensor>& bias, const std::optional<Tensor>& mean,
                                                 const Tensor& rstd, double weight_offset, int64_t config) {
  const auto dy_arg = infuse::tensor_arg(dy, kOp, "dy");
  const auto dsum_arg = infuse::tensor_arg(dsum, kOp, "dsum");
  const auto x_arg = infuse::tensor_arg(x, kOp, "x");
  const auto weight_arg = infuse::tensor_arg(weight, kOp, "weight");
  const auto bias_arg = infuse::tensor_arg(bias, kOp, "bias");
  const auto mean_arg = infuse::tensor_arg(mean, kOp, "mean");
  const auto rstd_arg = infuse::tensor_arg(rstd, kOp, "rstd");
  const auto prepared = infuse::norm_backward::prepare(
      {&dy_arg, infuse::pointer_to(dsum_arg), &x_arg, infuse::pointer_to(weight_arg), infuse::pointer_to(bias_arg),
       infuse::pointer_to(mean_arg), &rstd_arg, weight_offset, config});

  const torch::stable::accelerator::DeviceGuard guard(x_arg.device);
  Tensor dx = torch::stable::new_empty(x, x.sizes());
  Tensor dweight = gradient_of(weight, x), dbias = gradient_of(bias, x);
  const Tensor workspace = torch::stable::new_empty(x, {prepared.workspace_floats}, ScalarType::Float);
  infuse::norm_backward::launch(prepared, static_cast<float*>(workspace.mutable_data_ptr()), dx.mutable_data_ptr(),
                                dweight.mutable_data_ptr(), dbias.mutable_data_ptr(),
                                infuse::current_stream(x_arg.device, kOp));
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(infuse, CUDA, m) {
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
}

INFUSE_EXPORT_CONFIGS(norm_backward, infuse::norm_backward::kConfigs)
