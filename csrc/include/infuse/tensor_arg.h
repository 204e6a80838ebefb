// A tensor as the host code of the kernels sees it, free of torch, and the checks that all operators share.
#pragma once

#include <cstdint>
#include <string>

#include "infuse/access.h"
#include "infuse/check.h"
#include "infuse/dtype.h"
#include "infuse/rows.h"

namespace infuse {

constexpr int kMaxDims = 64;  // torch's own limit

struct TensorArg {
  const char* name;  // for messages
  void* data;
  DType dtype;
  int device;
  int num_dims;
  const std::int64_t* sizes;    // [num_dims]
  const std::int64_t* strides;  // [num_dims], elements
};

// "[2, 3]"
inline std::string shape_text(const std::int64_t* values, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

inline std::string shape_text(const TensorArg& tensor) { return shape_text(tensor.sizes, tensor.num_dims); }

// Product of all dimensions but the last.
inline std::int64_t count_rows(const TensorArg& tensor) {
  std::int64_t rows = 1;
  for (int i = 0; i + 1 < tensor.num_dims; ++i) rows *= tensor.sizes[i];
  return rows;
}

// The largest power of two up to 16 that divides all row starts of a tensor, in bytes.
inline int alignment_bytes(const TensorArg& tensor, const RowMap& rows, std::int64_t num_rows) {
  std::uint64_t bits = reinterpret_cast<std::uintptr_t>(tensor.data) | kVectorBytes;
  const int used = num_rows > 1 ? rows.num_dims : 0;
  for (int i = 0; i < used; ++i) bits |= static_cast<std::uint64_t>(rows.stride[i]) * size_bytes(tensor.dtype);
  return static_cast<int>(bits & (~bits + 1));
}

inline RowMap map_rows(const char* op, const TensorArg& tensor) {
  RowMap map;
  const int left = collapse_rows(tensor.sizes, tensor.strides, tensor.num_dims - 1, &map);
  check(left <= kMaxRowDims, op, "leading dimensions of ", tensor.name, " that can't be merged, got ", left,
        " (shape ", shape_text(tensor), ", strides ", shape_text(tensor.strides, tensor.num_dims),
        "), expected at most ", kMaxRowDims);
  return map;
}

inline void check_num_dims(const char* op, const TensorArg& tensor) {
  check(tensor.num_dims >= 1 && tensor.num_dims <= kMaxDims, op, "dimensions of ", tensor.name, ", got ",
        tensor.num_dims, ", expected 1 to ", kMaxDims);
}

inline void check_dtype(const char* op, const TensorArg& tensor, DType expected) {
  check(tensor.dtype == expected, op, "dtype of ", tensor.name, ", got ", name(tensor.dtype), ", expected ",
        name(expected));
}

inline void check_last_stride(const char* op, const TensorArg& tensor) {
  const int last = tensor.num_dims - 1;
  check(tensor.sizes[last] <= 1 || tensor.strides[last] == 1, op, "stride of the last dimension of ", tensor.name,
        ", got ", tensor.strides[last], ", expected 1");
}

inline void check_same_device(const char* op, const TensorArg& tensor, const TensorArg& other) {
  check(tensor.device == other.device, op, "device of ", tensor.name, ", got cuda:", tensor.device,
        ", expected cuda:", other.device, " (as ", other.name, ")");
}

inline void check_same_shape(const char* op, const TensorArg& tensor, const TensorArg& other) {
  bool same = tensor.num_dims == other.num_dims;
  for (int i = 0; same && i < other.num_dims; ++i) same = tensor.sizes[i] == other.sizes[i];
  check(same, op, "shape of ", tensor.name, ", got ", shape_text(tensor), ", expected ", shape_text(other));
}

// A tensor that is written must not be expanded.
inline void check_rows_apart(const char* op, const TensorArg& tensor) {
  for (int i = 0; i + 1 < tensor.num_dims; ++i) {
    check(tensor.sizes[i] <= 1 || tensor.strides[i] != 0, op, "stride of dimension ", i, " of ", tensor.name,
          ", got 0, expected rows that do not overlap");
  }
}

inline void check_contiguous(const char* op, const TensorArg& tensor) {
  std::int64_t expected = 1;
  for (int i = tensor.num_dims - 1; i >= 0; --i) {
    check(tensor.sizes[i] <= 1 || tensor.strides[i] == expected, op, "strides of ", tensor.name, ", got ",
          shape_text(tensor.strides, tensor.num_dims), ", expected those of a contiguous tensor");
    expected *= tensor.sizes[i] > 1 ? tensor.sizes[i] : 1;
  }
}

// A weight or a bias: [dim], adjacent elements, in x's dtype or in float32.
inline void check_weight(const char* op, const TensorArg& weight, const TensorArg& x) {
  const std::int64_t dim = x.sizes[x.num_dims - 1];
  check(weight.dtype == x.dtype || weight.dtype == DType::kFloat32, op, "dtype of ", weight.name, ", got ",
        name(weight.dtype), ", expected ", name(x.dtype), " (as ", x.name, ") or float32");
  check(weight.num_dims == 1 && weight.sizes[0] == dim, op, "shape of ", weight.name, ", got ", shape_text(weight),
        ", expected [", dim, "]");
  check_last_stride(op, weight);
  check_same_device(op, weight, x);
}

}  // namespace infuse
