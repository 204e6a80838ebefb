// From torch's tensors to MaskArg, TileMapArg and the dropout's seed. Included by the register.cpp files alone.
#pragma once

#include <optional>

#include "attention/mask.h"
#include "attention/tile_map.h"
#include "infuse/torch_tensor.h"

namespace infuse::attention {

// A mask is bool, float32 or of the dtype of q. Borrows sizes and strides from it, so it must outlive the result.
inline MaskArg mask_arg(const torch::stable::Tensor& mask, const torch::stable::Tensor& q, const char* op) {
  using torch::headeronly::ScalarType;
  check(mask.is_cuda(), op, "device of mask, got one that is not CUDA, expected CUDA");
  const ScalarType type = mask.scalar_type();
  check(type == ScalarType::Bool || type == ScalarType::Float || type == q.scalar_type(), op,
        "dtype of mask, got scalar type ", static_cast<int>(type), ", expected bool, float32 or q's");
  const Mask of_float = type == ScalarType::Float ? Mask::kFloat32 : Mask::kTwoBytes;
  const Mask kind = type == ScalarType::Bool ? Mask::kBool : of_float;
  return {mask.const_data_ptr(),          kind,
          mask.get_device_index(),        static_cast<int>(mask.dim()),
          mask.sizes().data(),            mask.strides().data()};
}

inline std::optional<MaskArg> mask_arg(const std::optional<torch::stable::Tensor>& mask, const torch::stable::Tensor& q,
                                       const char* op) {
  if (!mask.has_value()) return std::nullopt;
  return mask_arg(*mask, q, op);
}

// uint8. Borrows sizes and strides from it, so it must outlive the result.
inline std::optional<TileMapArg> tile_map_arg(const std::optional<torch::stable::Tensor>& map, const char* op) {
  if (!map.has_value()) return std::nullopt;
  check(map->is_cuda(), op, "device of tile_map, got one that is not CUDA, expected CUDA");
  check(map->scalar_type() == torch::headeronly::ScalarType::Byte, op, "dtype of tile_map, got scalar type ",
        static_cast<int>(map->scalar_type()), ", expected uint8");
  return TileMapArg{map->const_data_ptr(), map->get_device_index(), static_cast<int>(map->dim()),
                    map->sizes().data(), map->strides().data()};
}

// int64 [2] on the device: seed and offset.
inline const void* seed_pointer(const std::optional<torch::stable::Tensor>& seed, const torch::stable::Tensor& q,
                                const char* op) {
  if (!seed.has_value()) return nullptr;
  check(seed->is_cuda() && seed->get_device_index() == q.get_device_index(), op,
        "device of seed, got another one than that of q, expected the same");
  check(seed->scalar_type() == torch::headeronly::ScalarType::Long && seed->numel() == 2 && seed->is_contiguous(), op,
        "seed, got scalar type ", static_cast<int>(seed->scalar_type()), " and ", seed->numel(),
        " elements, expected int64 [2]");
  return seed->const_data_ptr();
}

}  // namespace infuse::attention
