// The plan of attention with few query rows, for every size on three devices: it fits, covers all rows and keys, and
// keeps to what the device has. The kernel itself is tested on a GPU.
#include "attention_decode/plan.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

using namespace infuse::attention_decode;

namespace {

// Streaming multiprocessors, shared memory that a CTA can have, clusters: H200, A100, A10.
constexpr Device kDevices[] = {{132, 232384, true}, {108, 166848, false}, {72, 101312, false}};
constexpr std::int64_t kMostKeys = 1 << 20;

void require(bool holds, const char* what, const Problem& p, const Plan& plan) {
  if (holds) return;
  std::printf("%s: batch %lld, heads %lld, rows %lld, keys %lld, dim %d, mask %d: configuration %d, splits %d, %d bytes\n",
              what, static_cast<long long>(p.batch), static_cast<long long>(p.kv_heads), static_cast<long long>(p.rows),
              static_cast<long long>(p.keys), p.dim, p.mask_size_bytes, plan.config, plan.splits, plan.shared_bytes);
  std::exit(1);
}

void check(const Problem& problem, int config, const Device& device) {
  const Plan plan = make_plan(problem, config, 0, device);
  const bool small = device.shared_bytes < 120 * 1024;
  if (config == kHeuristic && !(small && plan.dim > 128)) {
    require(plan.shared_bytes <= device.shared_bytes, "too much shared memory", problem, plan);
  }
  require(plan.dim >= problem.dim && plan.dim >= problem.dim_v, "head_dim", problem, plan);
  const bool is_decode = plan.kernel == Kernel::kDecode;
  require(!is_decode || plan.row_blocks * plan.row_warps * kWarpRows >= problem.rows, "rows", problem, plan);
  require(plan.tiles * plan.tile >= problem.keys && plan.tiles <= kMaxTiles, "tiles", problem, plan);
  require(plan.splits >= 1 && plan.splits <= kMaxSplits, "splits", problem, plan);
  require(plan.splits == 1 || plan.splits <= plan.tiles, "splits without a tile", problem, plan);
  const int largest = is_decode ? kPortableCluster : kMaxCluster;
  require(!plan.cluster || (device.has_clusters && plan.splits <= largest), "cluster", problem, plan);
  if (plan.kernel == Kernel::kDirect) {
    require(problem.rows <= kDirectRows && problem.mask_size_bytes <= 1, "what direct_kernel takes", problem, plan);
    require(plan.inbox_offset % 16 == 0 && plan.barrier_offset % kBarrierBytes == 0, "alignment", problem, plan);
  }
  if (!is_decode) {
    require(plan.shared_bytes <= device.shared_bytes, "too much shared memory", problem, plan);
    require(plan.splits * plan.share >= problem.rows, "share", problem, plan);
    require(plan.row_blocks == 1 && problem.rows <= kWarpgroupRows, "rows of a cluster", problem, plan);
    return;
  }
  const std::int64_t ctas = plan.splits * problem.batch * problem.kv_heads * plan.row_blocks;
  require(plan.splits == 1 || ctas <= 2 * device.num_sms, "more than the device holds", problem, plan);
}

// As fast as any on an H200, between linears; others took up to 1.5 times as long.
struct Choice {
  std::int64_t batch, kv_heads, rows, keys;
  int dim, config;
};

constexpr Choice kChoices[] = {
    {1, 8, 4, 4096, 128, kDirect},         {1, 8, 4, 32768, 128, kWarp4Split},   // half of the SMs in clusters of eight
    {4, 8, 4, 16384, 128, kDirect},        {4, 8, 4, 65536, 128, kWarp8Split},   // a third idle counts
    {5, 8, 4, 12288, 64, kWarp8Split},     {6, 8, 4, 16384, 128, kWarp4Cluster},
    {8, 8, 4, 8192, 128, kWarp8Cluster},   {16, 4, 4, 4096, 128, kWarp8Cluster},  // 64 clusters of four would not fit
    {8, 8, 16, 8192, 128, kWarp8Cluster},  {4, 8, 16, 12288, 128, kWarp8Split},
    {16, 8, 4, 4096, 128, kWarp4Cluster},  {64, 8, 4, 4096, 128, kWarp4Split},
    {16, 2, 7, 16384, 64, kDirect},        {10, 8, 4, 12288, 64, kDirect},
    {64, 2, 7, 4096, 64, kWarp8Cluster},   {32, 8, 4, 4096, 64, kDirect},  // 128 large CTAs; 256, two an SM
    {24, 8, 4, 4096, 64, kWarp4Cluster},   {48, 3, 8, 4096, 64, kWarp4Cluster},  // not 192 large ones: some SMs had two
};

void check_choice(const Choice& c) {
  const Problem problem{c.batch, c.kv_heads, c.rows, c.keys, c.dim, c.dim, 1, 1, true};
  const Plan plan = make_plan(problem, kHeuristic, 0, kDevices[0]);
  require(plan.config == c.config, "another configuration than measured", problem, plan);
  require(c.batch < 64 || plan.splits == 1, "CTAs that share a head", problem, plan);
}

}  // namespace

int main() {
  for (const Choice& choice : kChoices) check_choice(choice);
  for (const Device& device : kDevices) {
    for (const int dim : {8, 64, 72, 128, 192, 256}) {
      for (const std::int64_t rows : {1, 4, 16, 17, 32, 64, 200}) {
        for (const std::int64_t keys : {std::int64_t{1}, std::int64_t{100}, std::int64_t{4096}, kMostKeys}) {
          for (const std::int64_t batch : {1, 8, 16, 24, 64, 3000}) {
            for (const int mask : {0, 1, 2, 4}) {
              for (int config = kHeuristic; config < kNumConfigs; ++config) {
                check({batch, 8, rows, keys, dim, 64, mask, static_cast<int>(rows), true}, config, device);
              }
            }
          }
        }
      }
    }
  }
  std::printf("ok\n");
}
