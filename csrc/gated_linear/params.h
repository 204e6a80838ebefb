// What the kernels of gated linears are given.
#pragma once

#include <cstdint>

#include "infuse/gated_activation.h"

namespace infuse::gated_linear {

// out = act(x Wg^T + bg) * (x Wu^T + bu), rows in groups if there are `ends`. Strides in elements.
struct Params {
  const void* x;            // [rows, dim]
  const void* gate_weight;  // [groups, columns, dim], or one of them
  const void* up_weight;
  const void* gate_bias;    // [columns] or null
  const void* up_bias;
  const std::int32_t* ends;  // [groups] on the device, or null
  void* out;                 // [rows, columns]
  void* gate_up;             // [rows, 2 columns], contiguous, or null
  std::int64_t x_stride, out_stride;  // of rows
  // Of groups, and of what is not adjacent: rows [columns, dim], or where the weights lie by columns, along dim.
  std::int64_t gate_group_stride, gate_stride, up_group_stride, up_stride;
  std::uint32_t rows, columns, dim, groups;
  bool by_columns;  // weights lie as [dim, columns]
  Activation activation;
};

}  // namespace infuse::gated_linear
