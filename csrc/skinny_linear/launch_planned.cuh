// From a plan to a kernel launch. Included by the files that instantiate launch_planned.
#pragma once

#include "dispatch.h"
#include "infuse/launch.h"
#include "infuse/tensor_map.h"
#include "skinny_linear/launch.h"
#include "skinny_linear/mma_kernel.cuh"
#include "skinny_linear/norm_kernel.cuh"
#include "skinny_linear/ring_kernel.cuh"
#include "skinny_linear/row_kernel.cuh"

namespace infuse::skinny_linear {

// All shared memory of an SM, so that a CTA of the next kernel finds room beside one of this; asked for once for each
// kernel, as long as the device stays the same.
template <auto kKernel>
void allow_shared(int device) {
  static thread_local int last = -1;
  if (last == device) return;
  allow_shared_memory(kOp, kKernel, device);
  check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel), cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared),
             kOp, "shared memory instead of L1");
  last = device;
}

// These kernels load weights before they wait for their predecessor. In a CUDA graph that is a kernel of the graph,
// where nobody writes weights; otherwise it may be an optimiser's step or a copy of new weights.
inline bool starts_early(cudaStream_t stream) {
  cudaStreamCaptureStatus status{};
  check_cuda(cudaStreamIsCapturing(stream, &status), kOp, "whether the stream is captured");
  return status == cudaStreamCaptureStatusActive;
}

// Of a matrix whose columns are taken apart into blocks of 64, so that one copy brings several of them, block by block.
// A last block that is not full would be lost; copies of such a matrix bring one block each.
inline CUtensorMap map_of(DType dtype, const void* data, std::int64_t rows, std::int64_t columns, std::int64_t stride,
                          int box_rows, int box_blocks) {
  if (columns % kBlockColumns != 0) {
    return make_tensor_map(kOp, {data, dtype, 1, 1, rows, columns, 0, 0, stride}, box_rows, kBlockColumns);
  }
  const MappedTensor blocks{data, dtype, 1, columns / kBlockColumns, rows, kBlockColumns, 0, kBlockColumns, stride};
  return make_tensor_map(kOp, blocks, box_rows, kBlockColumns, true, box_blocks);
}

inline RingParams ring_params(DType dtype, const Plan& plan, const Params& base) {
  RingParams params{};
  params.base = base;
  params.keeps_x = plan.keeps_x;
  params.makes_way = plan.makes_way;
  params.copies_blocks = base.dim % kBlockColumns == 0;
  for (int i = 0; i < kMaxWeights; ++i) {
    const Linear& linear = base.linears[i];
    if (linear.weight == nullptr || linear.features == 0) continue;
    params.weights[i] =
        map_of(dtype, linear.weight, linear.features, base.dim, linear.weight_stride, plan.tile_rows, plan.blocks);
  }
  if (!plan.keeps_x) params.x = map_of(dtype, base.x, base.rows, base.dim, base.x_stride, plan.columns, plan.blocks);
  return params;
}

template <typename Traits>
void launch_ring(DType dtype, const Plan& plan, const Params& base, int device, cudaStream_t stream) {
  constexpr auto kernel = ring_kernel<Traits>;
  allow_shared<kernel>(device);
  const dim3 grid(static_cast<unsigned>(plan.tiles * plan.splits)), block(plan.warps * kWarpSize + kWarpSize);
  const Launch launch{grid, block, plan.shared_bytes, starts_early(stream), plan.splits};
  launch_kernel(kOp, kConfigs[plan.config].name, kernel, launch, ring_params(dtype, plan, base), device, stream);
}

// kBatch: features that a warp adds up together, if it has as many.
template <typename T, bool kGated, int kPieces>
void launch_row(DType dtype, const Plan& plan, const Params& base, int device, cudaStream_t stream) {
  const auto launch = [&](auto batch) {
    constexpr auto kernel = row_kernel<RowTraits<T, kGated, kPieces, decltype(batch)::value>>;
    allow_shared<kernel>(device);
    const dim3 grid(static_cast<unsigned>(plan.tiles)), block(plan.warps * kWarpSize);
    launch_kernel(kOp, kConfigs[plan.config].name, kernel, {grid, block, plan.shared_bytes, starts_early(stream)},
                  ring_params(dtype, plan, base), device, stream);
  };
  constexpr int kMany = kGated ? 4 : 8;
  if (plan.tile_rows * plan.column_groups / kRowWarps >= kMany) {
    launch(std::integral_constant<int, kMany>{});
  } else {
    launch(std::integral_constant<int, 1>{});
  }
}

template <DType kDType>
void launch_norm(const Plan& plan, const Params& params, void* y, int device, cudaStream_t stream) {
  constexpr auto kernel = norm_kernel<Element<kDType>>;
  allow_shared<kernel>(device);  // of which it needs little, but no SM has to be divided anew between its neighbours
  const Launch launch{dim3(params.rows), dim3(kNormThreads), plan.norm_bytes, starts_early(stream)};
  launch_kernel(kOp, "norm", kernel, launch, NormParams{params, y}, device, stream);
}

template <DType kDType>
void launch_planned(const Plan& plan, const Params& params, int device, cudaStream_t stream) {
  using T = Element<kDType>;
  if (plan.by_row) {
    dispatch_int<1, 2, 3, 4>(kOp, "pieces of x of a lane", plan.row_pieces, [&](auto pieces) {
      constexpr int kPieces = decltype(pieces)::value;
      if (params.activation != Activation::kNone) {
        launch_row<T, true, kPieces>(kDType, plan, params, device, stream);
      } else {
        launch_row<T, false, kPieces>(kDType, plan, params, device, stream);
      }
    });
    return;
  }
  dispatch_int<8, 16, 32, 64>(kOp, "columns of the kernel's products", plan.columns, [&](auto columns) {
    constexpr int kColumns = decltype(columns)::value;
    if (!plan.is_wgmma) {
      constexpr auto kernel = mma_kernel<MmaTraits<T, kColumns>>;
      allow_shared<kernel>(device);
      const dim3 grid(static_cast<unsigned>(plan.tiles));
      launch_kernel(kOp, kConfigs[plan.config].name, kernel,
                    {grid, dim3(kMmaThreads), plan.shared_bytes, starts_early(stream)}, params, device, stream);
    } else {
      const auto launch = [&](auto tiles) {
        constexpr int kTiles = decltype(tiles)::value;
        if (params.activation != Activation::kNone) {
          launch_ring<RingTraits<T, kColumns, true, kTiles>>(kDType, plan, params, device, stream);
        } else {
          launch_ring<RingTraits<T, kColumns, false, kTiles>>(kDType, plan, params, device, stream);
        }
      };
      if constexpr (kColumns > kMaxKeptRows) {
        launch(std::integral_constant<int, 0>{});
      } else if (plan.tile_rows <= kSmallTileRows) {
        launch(std::integral_constant<int, kSmallTileRows / 16>{});
      } else {
        launch(std::integral_constant<int, kMaxGroups * kGroupRows / 16>{});
      }
    }
  });
}

}  // namespace infuse::skinny_linear
