// What every family of attention's kernels demands of q, k, v, the result and the sinks.
#pragma once

#include <cstdint>

#include "infuse/access.h"
#include "infuse/tensor_arg.h"

namespace infuse::attention {

constexpr std::int64_t kMaxHeadDim = 256;

inline void check_operand(const char* op, const TensorArg& tensor, const TensorArg& q) {
  check(tensor.num_dims == 4, op, "dimensions of ", tensor.name, ", got ", tensor.num_dims, ", expected 4");
  check_dtype(op, tensor, q.dtype);
  check_same_device(op, tensor, q);
  check_last_stride(op, tensor);
  check(tensor.sizes[0] == q.sizes[0], op, "batch of ", tensor.name, ", got ", tensor.sizes[0], ", expected ",
        q.sizes[0], " (as q)");
}

// q [batch, heads, queries, dim], k [batch, kv_heads, keys, dim], v [batch, kv_heads, keys, dim_v],
// out [batch, heads, queries, dim_v].
inline void check_operands(const char* op, const TensorArg& q, const TensorArg& k, const TensorArg& v,
                           const TensorArg& out) {
  check(q.dtype == DType::kBFloat16 || q.dtype == DType::kFloat16, op, "dtype of q, got ", name(q.dtype),
        ", expected bfloat16 or float16");
  for (const TensorArg* tensor : {&q, &k, &v, &out}) check_operand(op, *tensor, q);
  check(k.sizes[1] > 0 && q.sizes[1] % k.sizes[1] == 0, op, "heads of k, got ", k.sizes[1], ", expected a divisor of ",
        q.sizes[1], " (heads of q)");
  check(k.sizes[3] == q.sizes[3], op, "head_dim of k, got ", k.sizes[3], ", expected ", q.sizes[3], " (as q)");
  check(v.sizes[1] == k.sizes[1] && v.sizes[2] == k.sizes[2], op, "shape of v, got ", shape_text(v),
        ", expected the heads and length of k ", shape_text(k));
  check(out.sizes[1] == q.sizes[1] && out.sizes[2] == q.sizes[2] && out.sizes[3] == v.sizes[3], op, "shape of ",
        out.name, ", got ", shape_text(out), ", expected [", q.sizes[0], ", ", q.sizes[1], ", ", q.sizes[2], ", ",
        v.sizes[3], "]");
  for (const TensorArg* tensor : {&q, &v}) {
    const std::int64_t dim = tensor->sizes[3];
    check(dim > 0 && dim % 8 == 0 && dim <= kMaxHeadDim, op, "head_dim of ", tensor->name, ", got ", dim,
          ", expected a multiple of 8 up to ", kMaxHeadDim);
  }
}

// Every row must begin at a multiple of 16 bytes.
inline void check_row_alignment(const char* op, const TensorArg& tensor) {
  std::uint64_t bits = reinterpret_cast<std::uintptr_t>(tensor.data);
  for (int i = 0; i < 3; ++i) {
    if (tensor.sizes[i] > 1) bits |= static_cast<std::uint64_t>(tensor.strides[i]) * size_bytes(tensor.dtype);
  }
  check(bits % kVectorBytes == 0, op, "alignment of ", tensor.name, ", got rows that begin at odd places (strides ",
        shape_text(tensor.strides, 4), "), expected multiples of ", kVectorBytes, " bytes");
}

// A logit of each head, in q's dtype or in float32.
inline void check_sinks(const char* op, const TensorArg& sinks, const TensorArg& q) {
  check(sinks.num_dims == 1 && sinks.sizes[0] == q.sizes[1], op, "shape of sinks, got ", shape_text(sinks),
        ", expected [", q.sizes[1], "]");
  check(sinks.dtype == q.dtype || sinks.dtype == DType::kFloat32, op, "dtype of sinks, got ", name(sinks.dtype),
        ", expected ", name(q.dtype), " (as q) or float32");
  check_last_stride(op, sinks);
  check_same_device(op, sinks, q);
}

}  // namespace infuse::attention
