// Maps of tensors for the copy engine (infuse/tma.cuh), made on the host without a link to libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "infuse/check.h"
#include "infuse/dtype.h"

namespace infuse {

// A tensor [batch, heads, rows, columns] with adjacent columns. Strides in elements, multiples of 16 bytes.
struct MappedTensor {
  const void* data;
  DType dtype;
  std::int64_t batch, heads, rows, columns;
  std::int64_t batch_stride, head_stride, row_stride;
};

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

inline EncodeTiled encode_tiled(const char* op) {
  static void* function = nullptr;
  if (function == nullptr) {
    cudaDriverEntryPointQueryResult result;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result),
               op, "cuTensorMapEncodeTiled of the driver");
    check(function != nullptr, op, "cuTensorMapEncodeTiled, got a driver without it, expected one for CUDA 12 or later");
  }
  return reinterpret_cast<EncodeTiled>(function);
}

// A map for boxes of box_rows x box_columns of box_heads heads, which is one nearly always. A row of the box is at most 128 bytes; of exactly 128 bytes if
// swizzled, where piece i of 16 bytes of row r of the box lies at piece i ^ (r % 8).
inline CUtensorMap make_tensor_map(const char* op, const MappedTensor& t, int box_rows, int box_columns,
                                   bool swizzled = true, int box_heads = 1) {
  CUtensorMap map;
  const std::uint64_t element = static_cast<std::uint64_t>(size_bytes(t.dtype));
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(t.columns), static_cast<cuuint64_t>(t.rows),
                               static_cast<cuuint64_t>(t.heads), static_cast<cuuint64_t>(t.batch)};
  // The stride of a dimension of one place is never used but must be valid.
  const auto bytes = [&](std::int64_t size, std::int64_t stride) {
    return size > 1 ? static_cast<cuuint64_t>(stride) * element : cuuint64_t{16};
  };
  const cuuint64_t strides[3] = {bytes(t.rows, t.row_stride), bytes(t.heads, t.head_stride),
                                 bytes(t.batch, t.batch_stride)};
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows),
                             static_cast<cuuint32_t>(box_heads), 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUtensorMapDataType type = t.dtype == DType::kBFloat16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : t.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const CUresult status = encode_tiled(op)(
      &map, type, 4, const_cast<void*>(t.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(status == CUDA_SUCCESS, op, "map of a tensor [", t.batch, ", ", t.heads, ", ", t.rows, ", ", t.columns,
        "] with strides ", t.batch_stride, ", ", t.head_stride, ", ", t.row_stride, ", got CUresult ",
        static_cast<int>(status), ", expected CUDA_SUCCESS");
  return map;
}

}  // namespace infuse
