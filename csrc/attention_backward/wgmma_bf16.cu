#include "attention_backward/launch_wgmma.cuh"

namespace infuse::attention_backward {

template void launch_wgmma<DType::kBFloat16>(const Plan&, const Params&, int, cudaStream_t);

bool has_wgmma(int device) {
  static thread_local int last_device = -1;
  static thread_local bool answer = false;
  if (last_device != device) {
    const auto kernel = wgmma_backward_kernel<Element<DType::kBFloat16>, WgmmaSizes<128>>;
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), kOp,
               "attributes of a kernel");
    last_device = device;
    answer = attributes.maxThreadsPerBlock >= WgmmaSizes<128>::kThreads;
  }
  return answer;
}

}  // namespace infuse::attention_backward
