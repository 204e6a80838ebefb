// Plan and launch of the rotary kernels. Host code only, compiled once.
#include "rope/launch.h"

#include "dispatch.h"
#include "infuse/check.h"
#include "infuse/launch.h"
#include "rope/operands.h"

namespace infuse::rope {
namespace {

// Gives each part its CTAs, one part behind the other; returns how many there are.
std::int64_t share_ctas(const Plan& plan, int parts, Params* params) {
  std::int64_t ctas = 0;
  params->batches = static_cast<std::uint32_t>(plan.batches);
  for (int i = 0; i < kMaxParts; ++i) {
    Part& part = params->parts[i];
    part.first_cta = i < parts ? static_cast<std::uint32_t>(ctas) : kNoCta;
    if (i >= parts) continue;
    part.head_blocks = FastDivisor(static_cast<std::uint32_t>(ceil_div(part.heads, plan.heads * plan.batches)));
    part.items *= part.head_blocks.divisor;
    ctas += ceil_div(part.items, plan.groups);
  }
  return ctas;
}

}  // namespace

void launch(const char* op, const Operand* operands, int count, const Options& options, cudaStream_t stream) {
  const Operand& first = operands[0];
  check(options.config >= kHeuristic && options.config < kNumConfigs, op, "config, got ", options.config,
        ", expected -1 to ", kNumConfigs - 1);
  Work work = gather(op, operands, count, options);
  if (work.parts == 0) return;
  const Plan plan = make_plan(work.problem, static_cast<int>(options.config), count_sms(op, first.x.device));
  const std::int64_t ctas = share_ctas(plan, work.parts, &work.params);
  check(ctas <= kMaxRows, op, "CTAs, got ", ctas, ", expected at most ", kMaxRows);
  dispatch_dtype(op, "x", first.x.dtype, [&](auto dtype) {
    launch_planned<decltype(dtype)::value>(op, plan, first.cos->dtype, work.problem.has_norm, work.params,
                                           static_cast<unsigned>(ctas), first.x.device, stream);
  });
}

}  // namespace infuse::rope
