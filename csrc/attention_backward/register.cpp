// Registers attention's gradients with torch. The schema and its tags are defined in Python, in
// ops/attention_backward_kernels.py.
#include <torch/csrc/stable/ops.h>

#include "attention/torch_mask.h"
#include "attention_backward/launch.h"
#include "infuse/export.h"
#include "infuse/torch_tensor.h"

namespace {

using infuse::tensor_arg;
using infuse::written_tensor_arg;
using infuse::attention_backward::kOp;
using torch::stable::Tensor;

void attention_backward_out(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                            const Tensor& lse, const std::optional<Tensor>& mask,
                            const std::optional<Tensor>& tile_map, double scale, bool is_causal, double softcap,
                            const std::optional<Tensor>& sinks, double dropout_p, const std::optional<Tensor>& seed,
                            bool deterministic, int64_t config, Tensor dq, Tensor dk, Tensor dv) {
  const auto sinks_arg = tensor_arg(sinks, kOp, "sinks");
  const auto mask_value = infuse::attention::mask_arg(mask, q, kOp);
  const auto map_value = infuse::attention::tile_map_arg(tile_map, kOp);
  const auto prepared = infuse::attention_backward::prepare(
      {tensor_arg(dout, kOp, "dout"), tensor_arg(q, kOp, "q"), tensor_arg(k, kOp, "k"), tensor_arg(v, kOp, "v"),
       tensor_arg(out, kOp, "out"), tensor_arg(lse, kOp, "lse"), mask_value ? &*mask_value : nullptr,
       map_value ? &*map_value : nullptr, infuse::pointer_to(sinks_arg), scale, softcap, is_causal, dropout_p,
       infuse::attention::seed_pointer(seed, q, kOp), deterministic, config, written_tensor_arg(dq, kOp, "dq"),
       written_tensor_arg(dk, kOp, "dk"), written_tensor_arg(dv, kOp, "dv")});
  if (prepared.empty) return;
  const torch::stable::accelerator::DeviceGuard guard(prepared.device);
  Tensor workspace =
      torch::stable::new_empty(q, {prepared.workspace_floats}, torch::headeronly::ScalarType::Float);
  infuse::attention_backward::launch(prepared, static_cast<float*>(workspace.mutable_data_ptr()),
                                     infuse::current_stream(prepared.device, kOp));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(infuse, CUDA, m) {
  m.impl("attention_backward_out", TORCH_BOX(&attention_backward_out));
}

INFUSE_EXPORT_CONFIGS(attention_backward, infuse::attention_backward::kConfigs)
