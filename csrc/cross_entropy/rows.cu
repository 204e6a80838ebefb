// The kernels for each dtype, in one file: they are small, and what they include is not.
#include "cross_entropy/kernel.cuh"
#include "cross_entropy/launch.h"
#include "cross_entropy/scale.cuh"
#include "infuse/launch.h"

namespace infuse::cross_entropy {

namespace {

Device describe(int device, bool has_clusters) {
  Device found{};
  check_cuda(cudaDeviceGetAttribute(&found.shared_bytes_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
             kOp, "shared memory of an SM");
  check_cuda(cudaDeviceGetAttribute(&found.shared_bytes_per_cta, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), kOp,
             "shared memory of a CTA");
  found.has_clusters = has_clusters;
  return found;
}

}  // namespace

template <DType kDType>
void launch_rows(int config, Params params, int device, cudaStream_t stream) {
  const auto kernel = params.softcap == 0.0f ? rows_kernel<kDType, false> : rows_kernel<kDType, true>;
  const Problem problem{params.vocab, size_bytes(kDType), params.gradient};
  const Plan plan = make_plan(problem, config, describe(device, is_compiled_for_9_0(kOp, kernel, device)));
  params.parts = static_cast<std::uint32_t>(plan.parts);
  params.cached_vecs = static_cast<std::uint32_t>(plan.cached_vecs);
  if (plan.shared_bytes > kSharedBytesForAll) allow_shared_memory(kOp, kernel, device);
  const dim3 grid(params.rows * params.parts), block(static_cast<unsigned>(plan.threads));
  const Launch launch{grid, block, plan.shared_bytes, true, plan.parts};
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

template void launch_rows<DType::kBFloat16>(int, Params, int, cudaStream_t);
template void launch_rows<DType::kFloat16>(int, Params, int, cudaStream_t);
template void launch_rows<DType::kFloat32>(int, Params, int, cudaStream_t);
template void launch_scale_of<DType::kBFloat16>(void*, const float*, std::uint64_t, int, cudaStream_t);
template void launch_scale_of<DType::kFloat16>(void*, const float*, std::uint64_t, int, cudaStream_t);
template void launch_scale_of<DType::kFloat32>(void*, const float*, std::uint64_t, int, cudaStream_t);

}  // namespace infuse::cross_entropy
