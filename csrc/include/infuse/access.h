// Widths of memory accesses and the arithmetic of plans: plain C++, tested where there is no GPU.
#pragma once

#include <cstdint>

namespace infuse {

constexpr int kVectorBytes = 16;  // the widest access

constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// An access of `elems` elements is made in pieces of at most 16 bytes, each aligned to its own size. A size of 0 stands
// for a tensor that is not there.
constexpr bool is_aligned(int elems, int size_bytes, int alignment_bytes) {
  return size_bytes == 0 || alignment_bytes % smaller(elems * size_bytes, kVectorBytes) == 0;
}

}  // namespace infuse
