// Random words for dropout: Philox4x32-10 (Salmon et al. 2011). Four neighbouring keys of a row share a counter, so the
// forward and the backward pass find the same words in whatever order they come to them. The same in torch is in
// ops/attention_dropout.py.
#pragma once

#include <cstdint>

#include "attention/dropout.h"

namespace infuse::attention {

struct RandomSource {
  std::uint32_t key[2];
  std::uint64_t offset;  // the upper half of every counter
  std::uint32_t zero;
};

__device__ __forceinline__ RandomSource random_source(const Dropout& dropout) {
  const auto seed = static_cast<std::uint64_t>(__ldg(reinterpret_cast<const long long*>(dropout.seed)));
  const auto offset = static_cast<std::uint64_t>(__ldg(reinterpret_cast<const long long*>(dropout.seed) + 1));
  return {{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)}, offset, dropout.zero};
}

// The number of a row's first four keys. row: (batch * heads + head) * queries + query.
__device__ __forceinline__ std::uint64_t first_quad_of_row(std::uint64_t row, std::uint32_t keys) {
  return row * ((static_cast<std::uint64_t>(keys) + 3) / 4);
}

// In assembly: of the plain product the compiler makes one of 64 bits with an addition more.
__device__ __forceinline__ std::uint64_t multiply_wide(std::uint32_t a, std::uint32_t b) {
  std::uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
}

// Four words: those of the keys 4 j .. 4 j + 3 of a row, quad being j plus the row's first.
__device__ __forceinline__ uint4 random_words(const RandomSource& source, std::uint64_t quad) {
  constexpr std::uint32_t kMultipliers[2] = {0xd2511f53u, 0xcd9e8d57u}, kSteps[2] = {0x9e3779b9u, 0xbb67ae85u};
  // What the rounds add to the key is not to be computed once for all counters and kept in twenty registers.
  const std::uint32_t nothing = static_cast<std::uint32_t>(quad) & source.zero;
  const std::uint32_t key[2] = {source.key[0] ^ nothing, source.key[1] ^ nothing};
  uint4 words = make_uint4(static_cast<std::uint32_t>(quad), static_cast<std::uint32_t>(quad >> 32),
                           static_cast<std::uint32_t>(source.offset), static_cast<std::uint32_t>(source.offset >> 32));
#pragma unroll
  for (std::uint32_t round = 0; round < 10; ++round) {
    const std::uint64_t first = multiply_wide(words.x, kMultipliers[0]);
    const std::uint64_t second = multiply_wide(words.z, kMultipliers[1]);
    words = make_uint4(static_cast<std::uint32_t>(second >> 32) ^ words.y ^ (key[0] + round * kSteps[0]),
                       static_cast<std::uint32_t>(second),
                       static_cast<std::uint32_t>(first >> 32) ^ words.w ^ (key[1] + round * kSteps[1]),
                       static_cast<std::uint32_t>(first));
  }
  return words;
}

}  // namespace infuse::attention
