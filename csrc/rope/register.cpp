// Registers the rotary kernels with torch. The schemas and their tags are defined in Python, in ops/.
//
// Only the LibTorch Stable ABI is used, so one binary serves torch 2.11 and later.
#include <torch/csrc/stable/ops.h>

#include "infuse/export.h"
#include "infuse/torch_tensor.h"
#include "rope/launch.h"

namespace {

using infuse::rope::Operand;
using infuse::rope::Options;
using torch::stable::Tensor;

infuse::rope::PositionsArg positions_arg(const Tensor& positions, const char* op, const char* name) {
  using torch::headeronly::ScalarType;
  const ScalarType type = positions.scalar_type();
  infuse::check(positions.is_cuda(), op, "device of ", name, ", got one that is not CUDA, expected CUDA");
  infuse::check(type == ScalarType::Long || type == ScalarType::Int, op, "dtype of ", name, ", got scalar type ",
                static_cast<int>(type), ", expected int64 or int32");
  infuse::check(positions.dim() == 1, op, "dimensions of ", name, ", got ", positions.dim(), ", expected 1");
  return {positions.const_data_ptr(), type == ScalarType::Long, positions.get_device_index(), positions.size(0),
          positions.stride(0)};
}

Options norm_options(std::optional<double> eps, double weight_offset, bool cast_before_weight) {
  Options options;
  options.eps = eps.value_or(0.0);
  options.weight_offset = weight_offset;
  options.cast_before_weight = cast_before_weight;
  return options;
}

void set_flags(Options* options, bool interleaved, bool per_pair, bool inverse, bool upcast, int64_t config) {
  options->interleaved = interleaved;
  options->per_pair = per_pair;
  options->inverse = inverse;
  options->upcast = upcast;
  options->config = config;
}

void launch(const char* op, const Operand* operands, int count, const Options& options) {
  const int device = operands[0].x.device;
  const torch::stable::accelerator::DeviceGuard guard(device);
  infuse::rope::launch(op, operands, count, options, infuse::current_stream(device, op));
}

void rope_out(const Tensor& x, const std::optional<Tensor>& other, const Tensor& cos, const Tensor& sin,
              const std::optional<Tensor>& weight, const std::optional<Tensor>& other_weight, std::optional<double> eps,
              double weight_offset, bool cast_before_weight, bool interleaved, bool per_pair, bool inverse, bool upcast,
              bool is_backward, int64_t config, Tensor out, std::optional<Tensor> other_out) {
  constexpr char kOp[] = "rope_out";
  infuse::check(other.has_value() == other_out.has_value(), kOp, "other_out, got one without the other, expected both",
                " other and other_out or neither");
  const auto cos_arg = infuse::tensor_arg(cos, kOp, "cos"), sin_arg = infuse::tensor_arg(sin, kOp, "sin");
  const auto weight_arg = infuse::tensor_arg(weight, kOp, "weight");
  const auto other_weight_arg = infuse::tensor_arg(other_weight, kOp, "other_weight");
  Options options = norm_options(eps, weight_offset, cast_before_weight);
  set_flags(&options, interleaved, per_pair, inverse, upcast, config);
  options.is_backward = is_backward;
  Operand operands[2] = {{infuse::tensor_arg(x, kOp, "x"), infuse::written_tensor_arg(out, kOp, "out"), &cos_arg,
                          &sin_arg, infuse::pointer_to(weight_arg), nullptr, eps.has_value()}};
  if (other.has_value()) {
    operands[1] = {infuse::tensor_arg(*other, kOp, "other"),
                   infuse::written_tensor_arg(*other_out, kOp, "other_out"),
                   &cos_arg,
                   &sin_arg,
                   infuse::pointer_to(other_weight_arg),
                   nullptr,
                   eps.has_value()};
  }
  launch(kOp, operands, other.has_value() ? 2 : 1, options);
}

void rope_cache_write_out(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_cos, const Tensor& q_sin,
                          const Tensor& k_cos, const Tensor& k_sin, const Tensor& k_positions,
                          const Tensor& v_positions, const std::optional<Tensor>& q_weight,
                          const std::optional<Tensor>& k_weight, std::optional<double> eps, double weight_offset,
                          bool cast_before_weight, bool interleaved, bool per_pair, bool inverse, bool upcast,
                          int64_t config, Tensor k_cache, Tensor v_cache, Tensor out) {
  constexpr char kOp[] = "rope_cache_write_out";
  const auto q_cos_arg = infuse::tensor_arg(q_cos, kOp, "q_cos"), q_sin_arg = infuse::tensor_arg(q_sin, kOp, "q_sin");
  const auto k_cos_arg = infuse::tensor_arg(k_cos, kOp, "k_cos"), k_sin_arg = infuse::tensor_arg(k_sin, kOp, "k_sin");
  const auto q_weight_arg = infuse::tensor_arg(q_weight, kOp, "q_weight");
  const auto k_weight_arg = infuse::tensor_arg(k_weight, kOp, "k_weight");
  const auto k_positions_arg = positions_arg(k_positions, kOp, "k_positions");
  const auto v_positions_arg = positions_arg(v_positions, kOp, "v_positions");
  Options options = norm_options(eps, weight_offset, cast_before_weight);
  set_flags(&options, interleaved, per_pair, inverse, upcast, config);
  const Operand operands[3] = {
      {infuse::tensor_arg(q, kOp, "q"), infuse::written_tensor_arg(out, kOp, "out"), &q_cos_arg, &q_sin_arg,
       infuse::pointer_to(q_weight_arg), nullptr, eps.has_value()},
      {infuse::tensor_arg(k, kOp, "k"), infuse::written_tensor_arg(k_cache, kOp, "k_cache"), &k_cos_arg, &k_sin_arg,
       infuse::pointer_to(k_weight_arg), &k_positions_arg, eps.has_value()},
      {infuse::tensor_arg(v, kOp, "v"), infuse::written_tensor_arg(v_cache, kOp, "v_cache"), nullptr, nullptr, nullptr,
       &v_positions_arg, false}};
  launch(kOp, operands, 3, options);
}

void qk_norm_rope_bwd_out(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& other_dy,
                          const std::optional<Tensor>& other, const Tensor& cos, const Tensor& sin,
                          const std::optional<Tensor>& weight, const std::optional<Tensor>& other_weight, double eps,
                          double weight_offset, bool interleaved, bool per_pair, bool inverse, bool upcast, Tensor dx,
                          std::optional<Tensor> other_dx, std::optional<Tensor> dweight,
                          std::optional<Tensor> other_dweight) {
  constexpr char kOp[] = "qk_norm_rope_bwd_out";
  const bool pair = other.has_value();
  infuse::check(other_dy.has_value() == pair && other_dx.has_value() == pair, kOp,
                "other, got one of other, other_dy and other_dx without the others, expected all or none");
  infuse::check(dweight.has_value() == weight.has_value() && other_dweight.has_value() == other_weight.has_value(), kOp,
                "dweight, got one without its weight or the other way round, expected both or neither");
  const auto cos_arg = infuse::tensor_arg(cos, kOp, "cos"), sin_arg = infuse::tensor_arg(sin, kOp, "sin");
  const auto weight_arg = infuse::tensor_arg(weight, kOp, "weight");
  const auto other_weight_arg = infuse::tensor_arg(other_weight, kOp, "other_weight");
  const auto x_arg = infuse::tensor_arg(x, kOp, "x");
  const auto other_arg = infuse::tensor_arg(other, kOp, "other");
  Options options = norm_options(eps, weight_offset, false);
  set_flags(&options, interleaved, per_pair, inverse, upcast, infuse::rope::kHeuristic);
  options.is_backward = true;
  Operand operands[2] = {{infuse::tensor_arg(dy, kOp, "dy"), infuse::written_tensor_arg(dx, kOp, "dx"), &cos_arg,
                          &sin_arg, infuse::pointer_to(weight_arg), nullptr, true, &x_arg}};
  if (pair) {
    operands[1] = {infuse::tensor_arg(*other_dy, kOp, "other_dy"),
                   infuse::written_tensor_arg(*other_dx, kOp, "other_dx"),
                   &cos_arg,
                   &sin_arg,
                   infuse::pointer_to(other_weight_arg),
                   nullptr,
                   true,
                   infuse::pointer_to(other_arg)};
  }
  const auto prepared = infuse::rope::prepare_backward(kOp, operands, pair ? 2 : 1, options);
  const torch::stable::accelerator::DeviceGuard guard(x_arg.device);
  const Tensor workspace =
      torch::stable::new_empty(x, {prepared.workspace_floats}, torch::headeronly::ScalarType::Float);
  void* const dweights[2] = {dweight.has_value() ? dweight->mutable_data_ptr() : nullptr,
                             other_dweight.has_value() ? other_dweight->mutable_data_ptr() : nullptr};
  infuse::rope::launch_backward(kOp, prepared, static_cast<float*>(workspace.mutable_data_ptr()), dweights,
                                infuse::current_stream(x_arg.device, kOp));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(infuse, CUDA, m) {
  m.impl("rope_out", TORCH_BOX(&rope_out));
  m.impl("rope_cache_write_out", TORCH_BOX(&rope_cache_write_out));
  m.impl("qk_norm_rope_bwd_out", TORCH_BOX(&qk_norm_rope_bwd_out));
}

INFUSE_EXPORT_CONFIGS(rope, infuse::rope::kConfigs)
