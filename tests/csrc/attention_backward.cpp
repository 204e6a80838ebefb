// The plan of attention's gradients, for many sizes on three devices: it covers all rows, keys and heads, and what the
// plan chooses by itself fits wherever the head does. The kernels themselves are tested on a GPU.
#include "attention_backward/plan.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

using namespace infuse::attention_backward;

namespace {

// Streaming multiprocessors, shared memory that a CTA can have, wgmma: H200, A100, A10.
constexpr Device kDevices[] = {{132, 232384, true}, {108, 166848, false}, {72, 101312, false}};

void require(bool holds, const char* what, const Problem& p, const Plan& plan) {
  if (holds) return;
  std::printf("%s: batch %lld, heads %lld / %lld, queries %lld, keys %lld, dim %d: configuration %d, dim %d, "
              "splits %d, stages %d, %d bytes\n",
              what, static_cast<long long>(p.batch), static_cast<long long>(p.heads),
              static_cast<long long>(p.kv_heads), static_cast<long long>(p.queries), static_cast<long long>(p.keys),
              p.dim, plan.config, plan.dim, plan.splits, plan.stages, plan.shared_bytes);
  std::exit(1);
}

void check(const Problem& problem, int config, const Device& device) {
  const Plan plan = make_plan(problem, config, device);
  if (config == kHeuristic) {
    const bool small = device.shared_bytes < 120 * 1024;
    require(plan.dim != 0, "no kernel", problem, plan);
    require((small && plan.dim > 128) || plan.shared_bytes <= device.shared_bytes, "too much shared memory", problem,
            plan);
  }
  if (plan.dim == 0) return;
  require(plan.dim >= problem.dim && plan.dim >= problem.dim_v && plan.dim % 32 == 0, "head_dim", problem, plan);
  require(plan.stages == 1 || plan.stages == 2, "stages", problem, plan);
  const bool two_fit = plan.shared_bytes <= device.shared_bytes;
  require(kConfigs[plan.config].wgmma || plan.stages == 1 || two_fit, "stages that do not fit", problem, plan);
  require(std::int64_t{plan.key_blocks} * kConfigs[plan.config].keys >= problem.keys, "keys", problem, plan);
  require(std::int64_t{plan.query_blocks} * kQueryBlock >= problem.queries, "queries", problem, plan);
  require(plan.padded_queries >= plan.query_blocks * kQueryBlock, "rows of the workspace", problem, plan);
  const std::int64_t group = problem.heads / problem.kv_heads;
  require(plan.splits >= 1 && plan.splits <= kMaxSplits && plan.splits <= group, "splits", problem, plan);
  require(plan.heads_at_once >= 1, "heads at once", problem, plan);
  const std::int64_t ctas = problem.batch * problem.kv_heads * plan.key_blocks;
  const std::int64_t slots = device.num_sms * ctas_of_sm(plan);
  const std::int64_t enough = problem.deterministic && problem.is_causal ? 4 * slots : slots;
  require(plan.splits == 1 || ctas < enough, "splits where there are CTAs enough", problem, plan);
}

}  // namespace

int main() {
  for (const Device& device : kDevices) {
    for (const int dim : {8, 64, 72, 96, 128, 192, 256}) {
      for (const std::int64_t queries : {0, 1, 64, 65, 4096, 1 << 20}) {
        for (const std::int64_t keys : {0, 1, 100, 4096, 1 << 20}) {
          for (const std::int64_t kv_heads : {1, 8, 32}) {
            for (int config = kHeuristic; config < kNumConfigs; ++config) {
              for (const std::int64_t batch : {1, 16}) {
                for (const bool fixed : {false, true}) {
                  const Problem problem{batch, 32,    kv_heads, queries, keys,  dim,  64,
                                        true,  false, false,    false,   false, fixed, true, false};
                  check(problem, config, device);
                }
              }
            }
          }
        }
      }
    }
  }
  std::printf("ok\n");
}
