// Launches of the kernels that every row fits: the two passes, and the sums of the parts.
#include "dispatch.h"
#include "infuse/launch.h"
#include "norm_backward/launch.h"
#include "norm_backward/sum_parts_kernel.cuh"
#include "norm_backward/two_pass_kernels.cuh"

namespace infuse::norm_backward {

template <DType kX>
int launch_two_pass(const Prepared& prepared, cudaStream_t stream) {
  const Params& params = prepared.params;
  const unsigned num_parts = static_cast<unsigned>(prepared.max_parts);
  const auto columns = static_cast<unsigned>(ceil_div(params.row_vecs, kColumnThreads));
  dispatch_int<kVectorBytes / size_bytes(kX), 1>(kOp, "elements of a vector", prepared.plan.vec_elems, [&](auto elems) {
    using Traits = TwoPassTraits<kX, decltype(elems)::value>;
    launch_kernel(kOp, "the rows' means", row_means_kernel<Traits>, {dim3(params.rows), dim3(kRowThreads), 0, true},
                  params, prepared.device, stream);
    launch_kernel(kOp, "the columns' pass", columns_kernel<Traits>,
                  {dim3(columns, num_parts), dim3(kColumnThreads), 0, true}, params, prepared.device, stream);
  });
  return prepared.max_parts;
}

template int launch_two_pass<DType::kBFloat16>(const Prepared&, cudaStream_t);
template int launch_two_pass<DType::kFloat16>(const Prepared&, cudaStream_t);
template int launch_two_pass<DType::kFloat32>(const Prepared&, cudaStream_t);

void launch_sum_parts(const SumPartsParams& params, int count, int device, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(params.dim, kSumColumns)), static_cast<unsigned>(count));
  launch_kernel(kOp, "the parts' sums", sum_parts_kernel<kSumColumns>, {grid, dim3(kSumColumns, kSumSlices), 0, true},
                params, device, stream);
}

}  // namespace infuse::norm_backward
