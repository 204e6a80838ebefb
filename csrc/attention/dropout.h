// Dropout of attention's probabilities, as the host code prepares it.
#pragma once

#include <cmath>
#include <cstdint>

#include "infuse/check.h"

namespace infuse::attention {

// A probability is kept iff its random word is at least `threshold`, and then multiplied by `scale`.
struct Dropout {
  const std::int64_t* seed = nullptr;  // [2] on the device: seed and offset; null without dropout
  std::uint32_t threshold = 0;
  float scale = 1.0f;
  std::uint32_t zero = 0;  // which the kernels must not know to be zero
};

// probability: of being dropped.
inline Dropout make_dropout(const char* op, double probability, const void* seed) {
  check(probability >= 0.0 && probability < 1.0, op, "dropout_p, got ", probability, ", expected 0 <= dropout_p < 1");
  if (probability == 0.0) return {};
  check(seed != nullptr, op, "seed, got none beside dropout_p ", probability, ", expected int64 [2] on the device");
  const double words = std::round(probability * 4294967296.0);
  const auto threshold = words < 4294967295.0 ? static_cast<std::uint32_t>(words) : 4294967295u;
  return {static_cast<const std::int64_t*>(seed), threshold, static_cast<float>(1.0 / (1.0 - probability))};
}

}  // namespace infuse::attention
