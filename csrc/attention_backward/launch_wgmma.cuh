// From a plan to the launch of the sm_90a kernel. Included by the files that instantiate it.
#pragma once

#include "attention_backward/launch.h"
#include "attention_backward/wgmma_kernel.cuh"
#include "dispatch.h"
#include "infuse/launch.h"
#include "infuse/tensor_map.h"

namespace infuse::attention_backward {

template <typename Sizes, DType kDType>
void launch_wgmma_kernel(const Plan& plan, const Params& params, int device, cudaStream_t stream) {
  const auto map = [&](const void* data, std::uint32_t heads, std::uint32_t rows, std::uint32_t columns,
                       const Strides& stride, int box_rows) {
    const MappedTensor tensor{data,    kDType,       params.batch, heads,     rows,
                              columns, stride.batch, stride.head,  stride.row};
    return make_tensor_map(kOp, tensor, box_rows, 64);
  };
  const WgmmaParams all{
      map(params.q, params.heads, params.queries, params.dim, params.q_stride, Sizes::kQueries),
      map(params.dout, params.heads, params.queries, params.dim_v, params.dout_stride, Sizes::kQueries),
      map(params.k, params.kv_heads, params.keys, params.dim, params.k_stride, Sizes::kKeys),
      map(params.v, params.kv_heads, params.keys, params.dim_v, params.v_stride, Sizes::kKeys),
      params,
  };
  const auto kernel = wgmma_backward_kernel<Element<kDType>, Sizes>;
  resident_ctas(kOp, kernel, Sizes::kThreads, Sizes::kSharedBytes, device);  // allows the shared memory
  const dim3 grid(params.batch * params.kv_heads, params.key_blocks);
  launch_kernel(kOp, kConfigs[plan.config].name, kernel, {grid, dim3(Sizes::kThreads), Sizes::kSharedBytes, true},
                all, device, stream);
}

template <DType kDType>
void launch_wgmma(const Plan& plan, const Params& params, int device, cudaStream_t stream) {
  if (params.keys == 0) return;
  dispatch_int<64, 128>(kOp, "head_dim of the kernel", plan.dim, [&](auto dim) {
    launch_wgmma_kernel<WgmmaSizes<decltype(dim)::value>, kDType>(plan, params, device, stream);
  });
}

}  // namespace infuse::attention_backward
