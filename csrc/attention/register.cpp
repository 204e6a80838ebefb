// Registers attention's tile map with torch. The schema and its tags are defined in Python, in
// ops/attention_tile_map.py.
#include <torch/csrc/stable/ops.h>

#include "attention/tile_map_launch.h"
#include "infuse/torch_tensor.h"

namespace {

using infuse::attention::kMapOp;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor attention_tile_map(const Tensor& mask, int64_t queries, int64_t keys) {
  infuse::check(mask.is_cuda(), kMapOp, "device of mask, got one that is not CUDA, expected CUDA");
  const bool is_bool = mask.scalar_type() == ScalarType::Bool;
  const infuse::DType dtype = is_bool ? infuse::DType::kNone : infuse::dtype_of(mask, kMapOp, "mask");
  const infuse::attention::MapArguments arguments{
      mask.const_data_ptr(), dtype,  mask.get_device_index(), static_cast<int>(mask.dim()), mask.sizes().data(),
      mask.strides().data(), queries, keys};
  const infuse::attention::MapShape shape = infuse::attention::prepare_map(arguments);
  const torch::stable::accelerator::DeviceGuard guard(arguments.device);
  const int64_t tiles = shape.batch * shape.heads * shape.row_blocks * shape.key_blocks;
  Tensor map = torch::stable::new_empty(mask, {shape.batch, shape.heads, shape.row_blocks, shape.key_blocks},
                                        ScalarType::Byte);
  std::optional<Tensor> workspace;
  if (!is_bool) workspace = torch::stable::new_empty(mask, {tiles}, ScalarType::Long);
  infuse::attention::launch_map(arguments, shape, map.mutable_data_ptr(),
                                workspace ? workspace->mutable_data_ptr() : nullptr,
                                infuse::current_stream(arguments.device, kMapOp));
  return map;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(infuse, CUDA, m) { m.impl("attention_tile_map", TORCH_BOX(&attention_tile_map)); }
