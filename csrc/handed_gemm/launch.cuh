// The host's side of GEMMs that hand their results over: maps, the launch.
#pragma once

#include "handed_gemm/kernel.cuh"
#include "infuse/access.h"
#include "infuse/launch.h"
#include "infuse/tensor_map.h"

namespace infuse::handed_gemm {

// A map of a matrix with adjacent columns, for boxes of 64 of them.
inline CUtensorMap map_matrix(const char* op, DType dtype, const void* data, std::int64_t rows, std::int64_t columns,
                              std::int64_t row_stride, int box_rows) {
  return make_tensor_map(op, {data, dtype, 1, 1, rows, columns, 0, 0, row_stride}, box_rows, kSwizzledColumns);
}

template <typename T, typename Finisher>
void launch(const char* op, const char* name, const Params<typename Finisher::Params>& params, int device,
            cudaStream_t stream) {
  const auto kernel = handed_gemm_kernel<T, Finisher>;
  const unsigned most = resident_ctas(op, kernel, kThreads, kSharedBytes, device);
  const dim3 grid(params.order.tiles < most ? params.order.tiles : most);
  launch_kernel(op, name, kernel, {grid, dim3(kThreads), kSharedBytes, true}, params, device, stream);
}

// Whether the library has code of this kernel that the device runs.
template <typename T, typename Finisher>
bool is_compiled(const char* op, int device) {
  static thread_local int last_device = -1;
  static thread_local bool answer = false;
  if (last_device != device) {
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes,
                                     reinterpret_cast<const void*>(handed_gemm_kernel<T, Finisher>)),
               op, "attributes of a kernel");
    last_device = device;
    answer = attributes.maxThreadsPerBlock >= kThreads;
  }
  return answer;
}

}  // namespace infuse::handed_gemm
