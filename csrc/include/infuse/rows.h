// Rows of a strided tensor: row number -> element offset, with at most three leading dimensions left.
//
// A tensor [d0, .., dk, dim] is a list of d0 * .. * dk rows. Neighbouring leading dimensions that lie behind one
// another in memory are merged on the host, so that nearly every tensor has one or two left, and the device divides
// by a multiplication.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define INFUSE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define INFUSE_HOST_DEVICE inline
#endif

namespace infuse {

constexpr int kMaxRowDims = 3;
constexpr std::int64_t kMaxRows = (std::int64_t{1} << 31) - 1;

// Division by a constant of the launch. Exact for n < 2^31: multiplier = ceil(2^(31 + l) / d) with d <= 2^l, so the
// error term n * (multiplier * d - 2^(31 + l)) stays below 2^(31 + l).
struct FastDivisor {
  std::uint32_t divisor = 1;
  std::uint32_t multiplier = 1u << 31;
  std::uint32_t shift = 31;

  FastDivisor() = default;
  explicit FastDivisor(std::uint32_t d) : divisor(d) {
    std::uint32_t log2_ceil = 0;
    while ((std::uint64_t{1} << log2_ceil) < d) ++log2_ceil;
    shift = 31 + log2_ceil;
    multiplier = static_cast<std::uint32_t>(((std::uint64_t{1} << shift) + d - 1) / d);
  }

  INFUSE_HOST_DEVICE std::uint32_t divide(std::uint32_t n) const {
    return static_cast<std::uint32_t>((static_cast<std::uint64_t>(n) * multiplier) >> shift);
  }
};

struct RowMap {
  int num_dims = 1;                           // 1 to kMaxRowDims
  FastDivisor inner, middle;                  // sizes of the last and the last but one leading dimension
  std::int64_t stride[kMaxRowDims] = {0, 0, 0};  // elements; innermost first

  INFUSE_HOST_DEVICE std::int64_t offset(std::uint32_t row) const {
    if (num_dims == 1) return row * stride[0];
    const std::uint32_t q = inner.divide(row);
    const std::int64_t first = (row - q * inner.divisor) * stride[0];
    if (num_dims == 2) return first + q * stride[1];
    const std::uint32_t q2 = middle.divide(q);
    return first + (q - q2 * middle.divisor) * stride[1] + q2 * stride[2];
  }
};

// Merges the leading dimensions [0, num_leading) of a tensor. Returns the number that is left; the map is usable if
// that is at most kMaxRowDims. Sizes must be positive, their product at most kMaxRows.
inline int collapse_rows(const std::int64_t* sizes, const std::int64_t* strides, int num_leading, RowMap* map) {
  std::int64_t size[kMaxRowDims] = {1, 1, 1};
  int count = 0;
  std::int64_t last_size = 1, last_stride = 0;  // the dimension merged so far, also beyond kMaxRowDims
  for (int i = num_leading - 1; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (count > 0 && strides[i] == last_stride * last_size) {
      last_size *= sizes[i];
      if (count <= kMaxRowDims) size[count - 1] = last_size;
      continue;
    }
    last_size = sizes[i];
    last_stride = strides[i];
    if (count < kMaxRowDims) {
      size[count] = last_size;
      map->stride[count] = last_stride;
    }
    ++count;
  }
  map->num_dims = count > 1 ? count : 1;
  map->inner = FastDivisor(static_cast<std::uint32_t>(size[0]));
  map->middle = FastDivisor(static_cast<std::uint32_t>(size[1]));
  return map->num_dims;
}

}  // namespace infuse
