// The plan of attention with many query rows, for every size on three devices: what the plan chooses fits, covers all
// rows, and splits only where the device would idle. The kernel itself is tested on a GPU.
#include "attention_forward/plan.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

using namespace infuse::attention_forward;

namespace {

// Streaming multiprocessors, shared memory that a CTA can have, major capability, code for 9.0a: H200 with and without
// that, A100, A10.
constexpr Device kDevices[] = {
    {132, 232448, 9, true}, {132, 232448, 9, false}, {108, 166912, 8, false}, {72, 101376, 8, false}};

void require(bool holds, const char* what, const Problem& p, const Plan& plan) {
  if (holds) return;
  std::printf("%s: batch %lld, heads %lld, queries %lld, keys %lld, dim %d %d: configuration %d, splits %d, %d bytes\n",
              what, static_cast<long long>(p.batch), static_cast<long long>(p.heads), static_cast<long long>(p.queries),
              static_cast<long long>(p.keys), p.dim, p.dim_v, plan.config, plan.splits, plan.shared_bytes);
  std::exit(1);
}

void check_wgmma(const Problem& problem, int config, const Plan& plan, const Device& device) {
  const Config& chosen = kConfigs[plan.config];
  require(config == kHeuristic || plan.config == config, "another configuration", problem, plan);
  if (wgmma_obstacle(problem, plan.dim, chosen, device) != nullptr) {
    require(config != kHeuristic, "chosen beside an obstacle", problem, plan);
    return;
  }
  require(device.has_wgmma && problem.keys > 0, "no obstacle", problem, plan);
  require(plan.shared_bytes <= device.shared_bytes, "too much shared memory", problem, plan);
  require(plan.dim >= problem.dim && plan.dim >= problem.dim_v && plan.dim <= 256, "head_dim", problem, plan);
  require(plan.rows % 64 == 0 && std::int64_t{plan.row_blocks} * plan.rows >= problem.queries, "rows", problem, plan);
  require(plan.splits == 1, "splits", problem, plan);
}

void check(const Problem& problem, int config, const Device& device) {
  const Plan plan = make_plan(problem, config, 0, device);
  const Config& chosen = kConfigs[plan.config];
  if (chosen.wgmma) {
    check_wgmma(problem, config, plan, device);
    return;
  }
  if (config == kHeuristic) {
    require(plan.shared_bytes <= device.shared_bytes, "too much shared memory", problem, plan);
  } else {
    require(plan.config == config, "another configuration", problem, plan);
  }
  require(plan.dim >= problem.dim && plan.dim >= problem.dim_v && plan.dim <= 256, "head_dim", problem, plan);
  require(plan.rows == chosen.warps * warp_rows(plan.dim), "rows", problem, plan);
  require(std::int64_t{plan.row_blocks} * plan.rows >= problem.queries, "blocks", problem, plan);
  require((std::int64_t{plan.row_blocks} - 1) * plan.rows < problem.queries, "a block without rows", problem, plan);
  require(plan.splits >= 1 && plan.splits <= kMaxSplits, "splits", problem, plan);
  const std::int64_t ctas = problem.batch * problem.heads * plan.row_blocks;
  require(plan.splits == 1 || ctas * plan.splits <= 8 * device.num_sms, "more than the device holds", problem, plan);
  require(plan.splits == 1 || plan.splits * kMinTilesOfSplit * kTile <= problem.keys + kTile, "splits without keys",
          problem, plan);
  require(row_bytes(plan.dim) / 16 % 2 == 1, "rows in the same banks", problem, plan);
}

}  // namespace

int main() {
  for (const Device& device : kDevices) {
    for (const int dim : {8, 64, 72, 96, 128, 160, 192, 256}) {
      for (const int dim_v : {64, 128, 256}) {
        for (const std::int64_t queries : {1, 17, 64, 100, 128, 1000, 16384}) {
          for (const std::int64_t keys : {0, 1, 100, 4096, 1 << 20}) {
            for (const std::int64_t batch : {1, 2, 300}) {
              for (int config = kHeuristic; config < kNumConfigs; ++config) {
                Problem problem{};
                problem.batch = batch;
                problem.heads = 32;
                problem.kv_heads = 8;
                problem.queries = queries;
                problem.keys = keys;
                problem.dim = dim;
                problem.dim_v = dim_v;
                problem.is_causal = queries == keys;
                problem.has_mask = batch == 2;
                check(problem, config, device);
              }
            }
          }
        }
      }
    }
  }
  std::printf("ok\n");
}
