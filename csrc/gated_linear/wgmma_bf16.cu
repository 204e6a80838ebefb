#include "gated_linear/launch_wgmma.cuh"

namespace infuse::gated_linear {

template void launch_wgmma<DType::kBFloat16>(const Config&, const Params&, int, cudaStream_t);

bool has_wgmma(int device) {
  static thread_local int last_device = -1;
  static thread_local bool answer = false;
  if (last_device != device) {
    using T = Element<DType::kBFloat16>;
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(
                                                      gemm::gemm_kernel<Traits<T, 128, false>, Epilogue<T, 128>>)),
               kOp, "attributes of a kernel");
    last_device = device;
    answer = attributes.maxThreadsPerBlock >= gemm::kThreads;
  }
  return answer;
}

}  // namespace infuse::gated_linear
