// From a configuration to a launch of the mma.sync kernel. Included by the files that instantiate launch_mma.
#pragma once

#include "gated_linear/launch.h"
#include "gated_linear/mma_kernel.cuh"
#include "infuse/access.h"
#include "infuse/launch.h"
#include "infuse/rows.h"

namespace infuse::gated_linear {

template <typename Traits>
void launch_mma_tiles(const Config& config, const Params& base, int device, cudaStream_t stream) {
  const auto kernel = mma_kernel<Traits>;
  int shared_of_sm = 0;
  check_cuda(cudaDeviceGetAttribute(&shared_of_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device), kOp,
             "shared memory of an SM");
  MmaParams params{base};
  params.stages = static_cast<std::uint32_t>(mma_stages(shared_of_sm));
  const std::int64_t row_tiles = ceil_div(base.rows, Traits::kRows) + (base.ends == nullptr ? 0 : base.groups);
  const std::int64_t column_tiles = ceil_div(base.columns, Traits::kColumns);
  check(row_tiles * column_tiles <= kMaxRows, kOp, "tiles, got ", row_tiles * column_tiles, ", expected at most ",
        kMaxRows);
  params.row_tiles = static_cast<std::uint32_t>(row_tiles);
  params.column_tiles = static_cast<std::uint32_t>(column_tiles);
  const int shared_bytes = static_cast<int>(params.stages) * Traits::kStageBytes;
  resident_ctas(kOp, kernel, Traits::kThreads, shared_bytes, device);  // allows the shared memory
  launch_kernel(kOp, config.name, kernel,
                {dim3(static_cast<unsigned>(row_tiles * column_tiles)), dim3(Traits::kThreads), shared_bytes, true},
                params, device, stream);
}

template <DType kDType>
void launch_mma(const Config& config, const Params& params, int device, cudaStream_t stream) {
  using T = Element<kDType>;
  if (params.by_columns) {
    launch_mma_tiles<MmaTraits<T, true>>(config, params, device, stream);
  } else {
    launch_mma_tiles<MmaTraits<T, false>>(config, params, device, stream);
  }
}

}  // namespace infuse::gated_linear
