// What the kernel of the backward of a gated activation is given.
#pragma once

#include <cstdint>

#include "infuse/gated_activation.h"
#include "infuse/rows.h"

namespace infuse::gated_backward {

struct Params {
  const void* dout;     // [rows, dim]
  const void* gate_up;  // [rows, 2 dim]: gate, then up
  void* dgate_up;       // [rows, 2 dim] contiguous
  void* out;            // [rows, dim] contiguous, or null
  std::int64_t dout_stride, gate_up_stride;  // elements between rows
  std::uint32_t dim;
  std::uint32_t vecs;    // of all rows
  FastDivisor row_vecs;  // of one row
  Activation activation;
};

}  // namespace infuse::gated_backward
