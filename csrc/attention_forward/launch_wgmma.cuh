// From a plan to a launch of the wgmma kernel. Included by the files that instantiate launch_wgmma.
#pragma once

#include "attention_forward/launch.h"
#include "attention_forward/wgmma_kernel.cuh"
#include "dispatch.h"
#include "infuse/dtype.h"
#include "infuse/launch.h"
#include "infuse/tensor_map.h"

namespace infuse::attention_forward {

constexpr std::int64_t kSectionBytes = 32 << 20;  // of K and V, that stay in L2 while every row looks at them

inline TileOrder order_tiles(const Params& base, int rows) {
  TileOrder order{};
  const std::uint32_t group = base.group.divisor;
  const std::int64_t bytes = std::int64_t{base.keys} * (base.dim + base.dim_v) * 2;
  const std::int64_t kv_heads = kSectionBytes / bytes > 1 ? kSectionBytes / bytes : 1;
  order.total_heads = base.batch * base.heads.divisor;
  order.section_heads = kv_heads * group < order.total_heads ? static_cast<std::uint32_t>(kv_heads * group)
                                                             : order.total_heads;
  order.row_blocks = (base.queries + rows - 1) / rows;
  order.tiles = order.row_blocks * order.total_heads;
  order.section_tiles = FastDivisor(order.section_heads * order.row_blocks);
  order.full_section = FastDivisor(order.section_heads);
  const std::uint32_t left = order.total_heads % order.section_heads;
  order.last_section = FastDivisor(left > 0 ? left : order.section_heads);
  return order;
}

template <typename Traits>
WgmmaParams make_params(DType dtype, const Params& base) {
  WgmmaParams params{};
  params.base = base;
  const std::int64_t heads = base.heads.divisor, kv_heads = heads / base.group.divisor;
  const auto map = [&](const void* data, const Strides& stride, std::int64_t num_heads, std::int64_t rows,
                       std::int64_t columns, int box_rows) {
    const MappedTensor tensor{data, dtype, base.batch, num_heads, rows, columns, stride.batch, stride.head, stride.row};
    return make_tensor_map(kOp, tensor, box_rows, kSwizzledColumns);
  };
  params.q = map(base.q, base.q_stride, heads, base.queries, base.dim, Traits::kRows);
  params.k = map(base.k, base.k_stride, kv_heads, base.keys, base.dim, Traits::kKeys);
  params.v = map(base.v, base.v_stride, kv_heads, base.keys, base.dim_v, Traits::kKeys);
  params.order = order_tiles(base, Traits::kRows);
  params.scores_need_scaling = base.softcap_log2 != 0.0f || !(base.scale_log2 > 0.0f);
  return params;
}

template <typename Traits>
void launch_tiles(const Plan& plan, DType dtype, const Params& base, std::uint32_t* counter, int device,
                  cudaStream_t stream) {
  WgmmaParams params = make_params<Traits>(dtype, base);
  const auto kernel = wgmma_kernel<Traits>;
  const unsigned most = resident_ctas(kOp, kernel, Traits::kThreads, Traits::kSharedBytes, device);
  const dim3 grid(params.order.tiles < most ? params.order.tiles : most);
  if (params.order.tiles > most) {
    params.counter = counter;
    check_cuda(cudaMemsetAsync(counter, 0, sizeof(*counter), stream), kOp, "the counter of tiles");
  }
  launch_kernel(kOp, kConfigs[plan.config].name, kernel, {grid, dim3(Traits::kThreads), Traits::kSharedBytes, true},
                params, device, stream);
}

template <DType kDType>
void launch_wgmma(const Plan& plan, const Params& params, std::uint32_t* counter, int device, cudaStream_t stream) {
  const Config& config = kConfigs[plan.config];
  dispatch_int<8, 12>(kOp, "warps of the kernel", config.warps, [&](auto warps) {
    dispatch_int<0, 1>(kOp, "width of the kernel's tiles", config.wide, [&](auto wide) {
      dispatch_int<64, 96, 128, 192, 256>(kOp, "head_dim of the kernel", plan.dim, [&](auto dim) {
        constexpr int kWarps = decltype(warps)::value, kDim = decltype(dim)::value;
        constexpr int kKeys = wgmma_keys(kDim, kWarps, decltype(wide)::value != 0);
        if constexpr (kKeys != 0) {
          using Traits = WgmmaTraits<Element<kDType>, kDim, kKeys, kWarps / 4>;
          launch_tiles<Traits>(plan, kDType, params, counter, device, stream);
        }
      });
    });
  });
}

}  // namespace infuse::attention_forward
