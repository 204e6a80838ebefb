#include "gated_backward/launch_wgmma.cuh"

namespace infuse::gated_backward {

template void launch_wgmma<DType::kBFloat16>(const GemmProblem&, cudaStream_t);

bool has_wgmma(int device) {
  static thread_local int last_device = -1;
  static thread_local bool answer = false;
  if (last_device != device) {
    const auto kernel = wgmma_kernel<Element<DType::kBFloat16>, true>;
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), kGemmOp,
               "attributes of a kernel");
    last_device = device;
    answer = attributes.maxThreadsPerBlock >= kWgmmaThreads;
  }
  return answer;
}

}  // namespace infuse::gated_backward
