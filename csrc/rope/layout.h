// From strided tensors to the parts that the kernels walk over. Plain C++, tested where there is no GPU.
#pragma once

#include <cstdint>

namespace infuse::rope {

// One leading dimension of x, with the strides of all tensors along it, 0 where a table is broadcast.
struct Dim {
  std::int64_t size = 1;
  std::int64_t x = 0, out = 0, cos = 0, sin = 0, saved = 0;
};

// x [outer, inner, heads, dim]: the tables are broadcast along heads.
struct Layout {
  Dim outer, inner, heads;
};

constexpr int kMaxLayoutDims = 64;

constexpr bool lies_behind(const Dim& outer, const Dim& inner) {
  return outer.x == inner.x * inner.size && outer.out == inner.out * inner.size &&
         outer.cos == inner.cos * inner.size && outer.sin == inner.sin * inner.size && outer.saved == inner.saved * inner.size;
}

// Finds the layout of `count` leading dimensions, outermost first; false if more than two are left besides the heads.
// Heads are the dimension without tables whose rows lie closest together.
inline bool find_layout(const Dim* dims, int count, Layout* layout) {
  Dim merged[kMaxLayoutDims];
  int left = 0;
  for (int i = 0; i < count; ++i) {
    if (dims[i].size == 1) continue;
    if (left > 0 && lies_behind(merged[left - 1], dims[i])) {
      const std::int64_t size = merged[left - 1].size * dims[i].size;
      merged[left - 1] = dims[i];
      merged[left - 1].size = size;
    } else {
      merged[left++] = dims[i];
    }
  }
  int heads = -1;
  for (int i = 0; i < left; ++i) {
    if (merged[i].cos != 0 || merged[i].sin != 0) continue;
    if (heads < 0 || merged[i].x < merged[heads].x) heads = i;
  }
  *layout = {};
  int others = 0;
  for (int i = left - 1; i >= 0; --i) {
    if (i == heads) {
      layout->heads = merged[i];
    } else {
      if (others == 2) return false;
      (others == 0 ? layout->inner : layout->outer) = merged[i];
      ++others;
    }
  }
  return true;
}

}  // namespace infuse::rope
