// Plan and launch of the backward of a norm and the rotation behind it. Host code only, compiled once.
#include "dispatch.h"
#include "infuse/check.h"
#include "infuse/launch.h"
#include "norm_backward/launch.h"
#include "rope/launch.h"
#include "rope/operands.h"

namespace infuse::rope {

PreparedBackward prepare_backward(const char* op, const Operand* operands, int count, const Options& options) {
  const Operand& first = operands[0];
  const Work work = gather(op, operands, count, options);
  check(work.parts == count, op, "tensors with rows, got ", work.parts, ", expected ", count);
  PreparedBackward prepared{work.params, {}, first.cos->dtype, first.x.dtype, first.x.device};
  Params& params = prepared.params;
  prepared.lanes = lanes_of_row(work.problem);
  check(prepared.lanes > 0, op, "rows of ", params.dim, " elements, ", params.rotary_dim, " of them rotated, aligned to ",
        work.problem.alignment_bytes, " bytes, expected vectors of ", kVectorBytes, " bytes that lanes of one warp hold");
  const int groups = kBackwardThreads / prepared.lanes;
  std::int64_t most_ctas = 1;
  params.batches = kBackwardHeads;
  for (int i = 0; i < count; ++i) {
    Part& part = params.parts[i];
    part.head_blocks = FastDivisor(static_cast<std::uint32_t>(ceil_div(part.heads, kBackwardHeads)));
    part.items *= part.head_blocks.divisor;
    const std::int64_t ctas = ceil_div(part.items, groups);
    most_ctas = ctas > most_ctas ? ctas : most_ctas;
    prepared.weight_dtype[i] = operands[i].weight != nullptr ? operands[i].weight->dtype : DType::kNone;
  }
  const int resident = kBackwardCtasPerSm * count_sms(op, prepared.device);
  prepared.ctas = static_cast<unsigned>(most_ctas < resident ? most_ctas : resident);
  prepared.workspace_floats = std::int64_t{count} * prepared.ctas * params.dim;
  return prepared;
}

void launch_backward(const char* op, PreparedBackward prepared, float* workspace, void* const* dweights,
                     cudaStream_t stream) {
  Params& params = prepared.params;
  norm_backward::SumPartsParams sums{};
  sums.num_parts = prepared.ctas;
  sums.dim = params.dim;
  int count = 0;
  for (std::uint32_t i = 0; i < params.num_parts; ++i) {
    if (prepared.weight_dtype[i] == DType::kNone) continue;
    params.parts[i].weight_parts = workspace + std::size_t{i} * prepared.ctas * params.dim;
    sums.parts[count] = params.parts[i].weight_parts;
    sums.out[count] = dweights[i];
    sums.dtype[count++] = prepared.weight_dtype[i];
  }
  dispatch_dtype(op, "x", prepared.dtype,
                 [&](auto dtype) { launch_backward_planned<decltype(dtype)::value>(op, prepared, stream); });
  if (count > 0) norm_backward::launch_sum_parts(sums, count, prepared.device, stream);
}

}  // namespace infuse::rope
