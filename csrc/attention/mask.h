// Masks of attention as the host code sees them, free of torch: what they are, and what every family checks.
#pragma once

#include <cstdint>

#include "attention/strides.h"
#include "infuse/access.h"
#include "infuse/tensor_arg.h"

namespace infuse::attention {

// How a mask's elements are read. kTwoBytes: q's dtype.
enum class Mask : int { kNone, kBool, kTwoBytes, kFloat32 };

INFUSE_HOST_DEVICE constexpr int mask_size_bytes(Mask kind) {
  return kind == Mask::kNone ? 0 : kind == Mask::kBool ? 1 : kind == Mask::kTwoBytes ? 2 : 4;
}

struct MaskArg {
  const void* data;
  Mask kind;
  int device;
  int num_dims;
  const std::int64_t* sizes;    // broadcast to [batch, heads, queries, keys]
  const std::int64_t* strides;  // elements
};

// A checked mask.
struct MaskView {
  const void* data = nullptr;
  Mask kind = Mask::kNone;
  Strides stride{0, 0, 0};
  bool is_aligned = false;  // its rows can be read 16 bytes at a time
};

// full: [batch, heads, queries, keys].
inline MaskView view_mask(const char* op, const MaskArg& mask, const std::int64_t (&full)[4], int device) {
  check(mask.device == device, op, "device of mask, got cuda:", mask.device, ", expected cuda:", device, " (as q)");
  check(mask.num_dims <= 4, op, "dimensions of mask, got ", mask.num_dims, ", expected at most 4");
  std::int64_t strides[4] = {0, 0, 0, 0};
  for (int i = 0; i < mask.num_dims; ++i) {
    const int dim = 4 - mask.num_dims + i;
    check(mask.sizes[i] == full[dim] || (mask.sizes[i] == 1 && dim < 3), op, "size of dimension ", i,
          " of mask, got ", mask.sizes[i], ", expected ", full[dim]);
    strides[dim] = mask.sizes[i] == 1 ? 0 : mask.strides[i];
  }
  check(full[3] <= 1 || strides[3] == 1, op, "stride of the last dimension of mask, got ", strides[3], ", expected 1");
  std::uint64_t bits = reinterpret_cast<std::uintptr_t>(mask.data);
  for (int i = 0; i < 3; ++i) bits |= static_cast<std::uint64_t>(strides[i]) * mask_size_bytes(mask.kind);
  return {mask.data, mask.kind, {strides[0], strides[1], strides[2]}, bits % kVectorBytes == 0};
}

}  // namespace infuse::attention
