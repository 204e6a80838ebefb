// Registers attention with many query rows with torch. The schema and its tags are defined in Python, in
// ops/attention_kernels.py.
#include <torch/csrc/stable/ops.h>

#include "attention/torch_mask.h"
#include "attention_forward/launch.h"
#include "infuse/export.h"
#include "infuse/torch_tensor.h"

namespace {

using infuse::attention_forward::kOp;
using torch::stable::Tensor;

void attention_forward_out(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                           const std::optional<Tensor>& tile_map, double scale, bool is_causal, double softcap,
                           const std::optional<Tensor>& sinks, bool nan_for_masked_rows, double dropout_p,
                           const std::optional<Tensor>& seed, int64_t config, int64_t splits, Tensor out,
                           std::optional<Tensor> lse) {
  const auto sinks_arg = infuse::tensor_arg(sinks, kOp, "sinks");
  const auto mask_value = infuse::attention::mask_arg(mask, q, kOp);
  const auto map_value = infuse::attention::tile_map_arg(tile_map, kOp);
  std::optional<infuse::TensorArg> lse_arg;
  if (lse.has_value()) lse_arg = infuse::written_tensor_arg(*lse, kOp, "lse");
  const auto prepared = infuse::attention_forward::prepare(
      {infuse::tensor_arg(q, kOp, "q"), infuse::tensor_arg(k, kOp, "k"), infuse::tensor_arg(v, kOp, "v"),
       infuse::written_tensor_arg(out, kOp, "out"), infuse::pointer_to(lse_arg), mask_value ? &*mask_value : nullptr,
       map_value ? &*map_value : nullptr, infuse::pointer_to(sinks_arg), scale, softcap, is_causal,
       nan_for_masked_rows, dropout_p, infuse::attention::seed_pointer(seed, q, kOp), config, splits});
  const torch::stable::accelerator::DeviceGuard guard(prepared.device);
  std::optional<Tensor> workspace;
  if (prepared.workspace_floats > 0) {
    workspace =
        torch::stable::new_empty(q, {prepared.workspace_floats}, torch::headeronly::ScalarType::Float);
  }
  infuse::attention_forward::launch(prepared, workspace ? static_cast<float*>(workspace->mutable_data_ptr()) : nullptr,
                                    infuse::current_stream(prepared.device, kOp));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(infuse, CUDA, m) {
  m.impl("attention_forward_out", TORCH_BOX(&attention_forward_out));
}

INFUSE_EXPORT_CONFIGS(attention_forward, infuse::attention_forward::kConfigs)
