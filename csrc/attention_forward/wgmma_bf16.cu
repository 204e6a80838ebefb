#include "attention_forward/launch_wgmma.cuh"

namespace infuse::attention_forward {

template void launch_wgmma<DType::kBFloat16>(const Plan&, const Params&, std::uint32_t*, int, cudaStream_t);

bool has_wgmma(int device) {
  static thread_local int last_device = -1;
  static thread_local bool answer = false;
  if (last_device != device) {
    using Traits = WgmmaTraits<Element<DType::kBFloat16>, 128, wgmma_keys(128, 8, false), 2>;
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(wgmma_kernel<Traits>)), kOp,
               "attributes of a kernel");
    last_device = device;
    answer = attributes.maxThreadsPerBlock >= Traits::kThreads;
  }
  return answer;
}

}  // namespace infuse::attention_forward
