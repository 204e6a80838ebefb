// Registers attention with few query rows with torch. The schema and its tags are defined in Python, in
// ops/attention_kernels.py.
#include <torch/csrc/stable/ops.h>

#include "attention/torch_mask.h"
#include "attention_decode/launch.h"
#include "infuse/export.h"
#include "infuse/torch_tensor.h"

namespace {

using infuse::attention_decode::kOp;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void attention_decode_out(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                          double scale, bool is_causal, double softcap, const std::optional<Tensor>& sinks,
                          bool nan_for_masked_rows, int64_t config, int64_t splits, Tensor out) {
  const auto sinks_arg = infuse::tensor_arg(sinks, kOp, "sinks");
  const auto mask_value = infuse::attention::mask_arg(mask, q, kOp);
  const auto prepared = infuse::attention_decode::prepare(
      {infuse::tensor_arg(q, kOp, "q"), infuse::tensor_arg(k, kOp, "k"), infuse::tensor_arg(v, kOp, "v"),
       infuse::written_tensor_arg(out, kOp, "out"), mask_value ? &*mask_value : nullptr, infuse::pointer_to(sinks_arg),
       scale, softcap, is_causal, nan_for_masked_rows, config, splits});
  const torch::stable::accelerator::DeviceGuard guard(prepared.device);
  std::optional<Tensor> workspace;
  if (prepared.workspace_floats > 0) {
    workspace = torch::stable::new_empty(q, {prepared.workspace_floats}, ScalarType::Float);
  }
  infuse::attention_decode::launch(prepared, workspace ? static_cast<float*>(workspace->mutable_data_ptr()) : nullptr,
                                   infuse::current_stream(prepared.device, kOp));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(infuse, CUDA, m) {
  m.impl("attention_decode_out", TORCH_BOX(&attention_decode_out));
}

INFUSE_EXPORT_CONFIGS(attention_decode, infuse::attention_decode::kConfigs)
