// Launches of the first and the last kernels. Included by the files that instantiate them.
#pragma once

#include "attention_backward/first.cuh"
#include "attention_backward/last.cuh"
#include "attention_backward/launch.h"
#include "infuse/launch.h"

namespace infuse::attention_backward {

template <DType kDType>
void launch_first(const Params& params, int device, cudaStream_t stream) {
  const std::uint32_t rows = params.batch * params.heads * params.padded_queries;
  if (rows == 0) return;
  const dim3 grid(rows / (kFirstThreads / lanes_of_row(params.dim_v)));
  launch_kernel(kOp, "first", first_kernel<Element<kDType>>, {grid, dim3(kFirstThreads), 0, true}, params, device,
                stream);
}

template <DType kDType>
void launch_last(const Params& params, int device, cudaStream_t stream) {
  using T = Element<kDType>;
  const std::uint32_t tiles = params.batch * params.heads * params.padded_queries / kTileRows;
  if (tiles > 0) {
    launch_kernel(kOp, "dq", dq_kernel<T>, {dim3(tiles), dim3(kLastThreads), 0, true}, params, device, stream);
  }
  if (params.dk_parts == nullptr) return;
  const std::int64_t rows = std::int64_t{params.batch} * params.kv_heads * params.keys;
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, kLastThreads / 32)));
  launch_kernel(kOp, "add_parts", add_parts_kernel<T>, {grid, dim3(kLastThreads), 0, true}, params, device, stream);
}

}  // namespace infuse::attention_backward
