// The kernels for each dtype, in one file: they are small, and what they include is not.
#include "cross_entropy/kernel.cuh"
#include "cross_entropy/launch.h"
#include "cross_entropy/scale.cuh"
#include "infuse/launch.h"

namespace infuse::cross_entropy {

template <DType kDType>
void launch_rows(const Plan& plan, const Params& params, int device, cudaStream_t stream) {
  const auto kernel = rows_kernel<kDType>;
  if (plan.shared_bytes > kSharedBytesForAll) allow_shared_memory(kOp, kernel, device);
  const Launch launch{dim3(params.rows), dim3(static_cast<unsigned>(plan.threads)), plan.shared_bytes, true};
  launch_kernel(kOp, kConfigs[plan.config].name, kernel, launch, params, device, stream);
}

template <DType kDType>
void launch_scale_of(void* data, const float* scale, std::uint64_t size, int device, cudaStream_t stream) {
  const ScaleParams params{data, scale, size};
  const std::uint64_t most = std::uint64_t{kScaleCtasPerSm} * static_cast<unsigned>(count_sms(kScaleOp, device));
  const std::uint64_t needed = static_cast<std::uint64_t>(
      ceil_div(static_cast<std::int64_t>(size), kScaleThreads * kVectorBytes / size_bytes(kDType)));
  const auto ctas = static_cast<unsigned>(needed < most ? needed : most);
  launch_kernel(kScaleOp, "scale_kernel", scale_kernel<kDType>, {dim3(ctas), dim3(kScaleThreads), 0, true}, params,
                device, stream);
}

template void launch_rows<DType::kBFloat16>(const Plan&, const Params&, int, cudaStream_t);
template void launch_rows<DType::kFloat16>(const Plan&, const Params&, int, cudaStream_t);
template void launch_rows<DType::kFloat32>(const Plan&, const Params&, int, cudaStream_t);
template void launch_scale_of<DType::kBFloat16>(void*, const float*, std::uint64_t, int, cudaStream_t);
template void launch_scale_of<DType::kFloat16>(void*, const float*, std::uint64_t, int, cudaStream_t);
template void launch_scale_of<DType::kFloat32>(void*, const float*, std::uint64_t, int, cudaStream_t);

}  // namespace infuse::cross_entropy
