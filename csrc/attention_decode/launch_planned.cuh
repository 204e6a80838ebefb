// From a plan to its one or two launches. Included by the files that instantiate launch_planned.
#pragma once

#include "attention_decode/dealt_kernel.cuh"
#include "attention_decode/direct_kernel.cuh"
#include "attention_decode/kernel.cuh"
#include "attention_decode/launch.h"
#include "dispatch.h"
#include "infuse/launch.h"

namespace infuse::attention_decode {

template <typename T>
void launch_merge(const Params& params, int device, cudaStream_t stream) {
  const std::int64_t rows = static_cast<std::int64_t>(params.batch) * params.kv_heads * params.rows;
  const dim3 grid(static_cast<unsigned>(rows));
  launch_kernel(kOp, "merge", merge_kernel<T>, {grid, dim3(kThreads), 0, true}, params, device, stream);
}

template <typename T>
void launch_dealt(const Plan& plan, const Params& params, int device, cudaStream_t stream) {
  const auto run = [&](auto kernel) {
    const int threads = plan.warps * kWarpSize, cluster = plan.cluster ? plan.splits : 1;
    resident_ctas(kOp, kernel, threads, plan.shared_bytes, device);  // allows the shared memory
    if (cluster > kPortableCluster) allow_large_clusters(kOp, kernel);
    const dim3 grid(params.splits, params.kv_heads, params.batch);
    launch_kernel(kOp, kConfigs[plan.config].name, kernel, {grid, dim3(threads), plan.shared_bytes, true, cluster},
                  params, device, stream);
  };
  dispatch_int<64, 128, 256>(kOp, "head_dim of the kernel", plan.dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    if constexpr (kDim <= kMaxWarpgroupDim) {
      if (plan.is_warpgroup) return run(dealt_kernel<DealtTraits<T, kDim, kWarpgroupTile, 3, 4>>);
    }
    run(dealt_kernel<DealtTraits<T, kDim, 16, 3, 1>>);
  });
}

template <typename T>
void launch_direct(const Plan& plan, const Params& params, int device, cudaStream_t stream) {
  const auto run = [&](auto kernel) {
    const int threads = plan.warps * kWarpSize;
    resident_ctas(kOp, kernel, threads, plan.shared_bytes, device);  // allows the shared memory
    if (plan.splits > kPortableCluster) allow_large_clusters(kOp, kernel);
    const dim3 grid(params.splits, params.kv_heads, params.batch);
    launch_kernel(kOp, kConfigs[kDirect].name, kernel, {grid, dim3(threads), plan.shared_bytes, true, plan.splits}, params,
                  device, stream);
  };
  if (plan.dim > 64) return run(direct_kernel<DirectTraits<T, 128, kDirectWarps>>);
  if (plan.warps == kDirectWarps) return run(direct_kernel<DirectTraits<T, 64, kDirectWarps>>);
  run(direct_kernel<DirectTraits<T, 64, kManyDirectWarps>>);
}

template <typename T>
void launch_decode(const Plan& plan, const Params& params, int device, cudaStream_t stream) {
  const Config& config = kConfigs[plan.config];
  const auto run = [&](auto kernel) {
    resident_ctas(kOp, kernel, kThreads, plan.shared_bytes, device);  // allows the shared memory
    const dim3 grid(params.splits, params.kv_heads * params.row_blocks.divisor, params.batch);
    const int cluster = plan.cluster ? plan.splits : 1;
    launch_kernel(kOp, config.name, kernel, {grid, dim3(kThreads), plan.shared_bytes, true, cluster}, params, device,
                  stream);
  };
  dispatch_int<64, 128, 256>(kOp, "head_dim of the kernel", plan.dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    if (config.stages == 2) return run(decode_kernel<Traits<T, kDim, 16, 2>>);
    if constexpr (kDim <= 128) {
      if (plan.tile == 32) return run(decode_kernel<Traits<T, kDim, 32, 4>>);
    }
    run(decode_kernel<Traits<T, kDim, 16, 3>>);
  });
}

template <DType kDType>
void launch_planned(const Plan& plan, const Params& params, int device, cudaStream_t stream) {
  using T = Element<kDType>;
  switch (plan.kernel) {
    case Kernel::kDecode: launch_decode<T>(plan, params, device, stream); break;
    case Kernel::kDealt: launch_dealt<T>(plan, params, device, stream); break;
    case Kernel::kDirect: launch_direct<T>(plan, params, device, stream); break;
  }
  if (params.part_out != nullptr) launch_merge<T>(params, device, stream);
}

}  // namespace infuse::attention_decode
