// What the cross entropy kernel is given: pointers with their shapes, and the scalars of the formula.
#pragma once

#include <cstdint>

namespace infuse::cross_entropy {

struct Params {
  void* logits;                // [rows, vocab], rows aligned to 16 bytes; overwritten with their gradient if asked for
  const std::int64_t* target;  // [rows] contiguous
  const float* scale;          // one number that the gradient is multiplied by, or null for 1
  float* loss;                 // [rows] contiguous
  std::int64_t row_stride;     // elements
  std::int64_t ignore_index;
  std::uint32_t rows;
  std::uint32_t vocab;
  std::uint32_t parts;        // CTAs of a cluster, which share a row
  std::uint32_t cached_vecs;  // of each part, from its start, in shared memory between the two passes
  float label_smoothing;
  float softcap;  // 0: none
  bool gradient;
};

}  // namespace infuse::cross_entropy
