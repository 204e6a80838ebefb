// How a problem is cut up. Plain C++ without CUDA, so that it is tested where there is no GPU.
#pragma once

#include <cstdint>

#include "infuse/access.h"

namespace infuse::attention_decode {

constexpr int kWarpRows = 16;  // of a warp: rows of a tensor-core tile
constexpr int kWarps = 4, kThreads = 32 * kWarps;  // of a CTA
constexpr std::int64_t kMaxTiles = 1 << 16;   // two bits each in shared memory
constexpr int kPortableCluster = 8;  // CTAs that every device with clusters takes
constexpr int kMaxCluster = 16;
constexpr int kMaxDealtWarps = 8;  // of a CTA of dealt_kernel
constexpr int kBarrierBytes = 8;
constexpr int kBlockColumns = 64;  // of a box that TMA copies
constexpr int kSharedAlignment = 1024;  // of dealt_kernel: after which the layout of a warpgroup's tiles repeats
constexpr int kMaxTilesOfClusterWarp = 2;
constexpr int kSmallDim = 64;
constexpr int kDirectWarps = 8, kManyDirectWarps = 12;  // of a CTA of direct_kernel
constexpr int kDirectRows = 8, kDirectTile = 16;        // of a K/V head; keys
constexpr int kMaxSplits = 1024;
constexpr int kReservedBytes = 1024;  // of shared memory, for each CTA

enum class Kernel { kDecode, kDealt, kDirect };  // decode_kernel, dealt_kernel, direct_kernel

// tile: keys; stages: tiles that a group of warps has under way or in use. Of dealt_kernel, dealt_warps: of a CTA;
// cluster: the splits are a cluster, which merges them; else a second kernel does.
struct Config {
  const char* name;
  Kernel kernel;
  int tile, stages, dealt_warps;
  bool cluster;
};

constexpr Config kConfigs[] = {
    {"tile16_s3", Kernel::kDecode, 16, 3, 0, false},  // 0
    {"tile32_s4", Kernel::kDecode, 32, 4, 0, false},  // 1: for many rows, whose warps share a ring
    {"tile16_s2", Kernel::kDecode, 16, 2, 0, false},  // 2: for devices with less shared memory
    // These where dealt_kernel can run, else as if none were asked for.
    {"warp4_cluster", Kernel::kDealt, 16, 3, 4, true},        // 3
    {"warp8_cluster", Kernel::kDealt, 16, 3, 8, true},        // 4
    {"warp4_split", Kernel::kDealt, 16, 3, 4, false},         // 5
    {"warp8_split", Kernel::kDealt, 16, 3, 8, false},         // 6
    {"warpgroup_cluster", Kernel::kDealt, 64, 3, 4, true},    // 7
    {"warpgroups_cluster", Kernel::kDealt, 64, 3, 8, true},   // 8
    {"warpgroup_split", Kernel::kDealt, 64, 3, 4, false},     // 9
    {"warpgroups_split", Kernel::kDealt, 64, 3, 8, false},    // 10
    // This where direct_kernel can run, else as if none were asked for.
    {"direct_cluster", Kernel::kDirect, kDirectTile, 1, 0, true},  // 11
};
constexpr int kNumConfigs = sizeof(kConfigs) / sizeof(kConfigs[0]);
constexpr int kHeuristic = -1;
constexpr int kWarp4Cluster = 3, kWarp8Cluster = 4, kWarp4Split = 5, kWarp8Split = 6;
constexpr int kWarpgroupsCluster = 8, kWarpgroupsSplit = 10, kDirect = 11;
constexpr int kWarpgroupRows = 64, kWarpgroupTile = 64;
constexpr int kMaxWarpgroupDim = 128;

struct Problem {
  std::int64_t batch, kv_heads, rows;  // rows: queries * heads of a group
  std::int64_t keys;
  int dim, dim_v;
  int mask_size_bytes;  // of an element, 0 without a mask
  int mask_rows;        // different ones of a K/V head
  bool has_maps;        // for TMA, of K and V
};

struct Device {
  int num_sms;
  int shared_bytes;  // that a CTA can have
  bool has_clusters;
};

struct Plan {
  int config;
  Kernel kernel;
  int dim;        // the kernel's: 64, 128 or 256
  int tile;       // keys
  int row_warps;  // 1, 2 or 4
  int row_blocks;
  int splits;
  bool cluster;  // the splits are one cluster
  int shared_bytes, bits_offset;
  std::int64_t tiles;
  // Of dealt_kernel and direct_kernel: warps of a CTA, rows that a CTA of a cluster merges, and places in shared memory.
  int warps, share, inbox_offset, barrier_offset;
  // Of dealt_kernel: more places, and bytes of a tile's mask.
  int ring_offset, mask_offset, mask_bytes;
  bool is_warpgroup;
};

constexpr int padded_dim(int dim) { return dim <= 64 ? 64 : dim <= 128 ? 128 : 256; }

constexpr int row_bytes(int dim) { return 2 * dim; }

constexpr int stage_bytes(int dim, int tile, int row_warps, int mask_size_bytes) {
  return 2 * tile * row_bytes(dim) + row_warps * kWarpRows * tile * mask_size_bytes;
}

constexpr int larger(int a, int b) { return a > b ? a : b; }

// Queries, then either the ring of every group of warps or, once that is no longer needed, the sums that are merged;
// then two bits for each tile.
constexpr int ring_offset(int dim, int row_warps) { return row_warps * kWarpRows * row_bytes(dim); }

constexpr int bits_offset(int dim, const Config& config, int tile, int row_warps, int mask_size_bytes) {
  const int ring = kWarps / row_warps * config.stages * stage_bytes(dim, tile, row_warps, mask_size_bytes);
  const int sums = kWarps * kWarpRows * (dim + 4) * 4;
  return ring_offset(dim, row_warps) + larger(ring, sums);
}

constexpr bool has_dealt_kernel(const Problem& problem, int dim, int config, const Device& device) {
  if (!device.has_clusters || !problem.has_maps) return false;
  if (kConfigs[config].tile == kWarpgroupTile) return problem.rows <= kWarpgroupRows && dim <= kMaxWarpgroupDim;
  return problem.rows <= kWarpRows;
}

constexpr bool has_direct_kernel(const Problem& problem, int dim, const Device& device) {
  return device.has_clusters && problem.rows <= kDirectRows && dim <= kMaxWarpgroupDim && problem.mask_size_bytes <= 1;
}

// CTAs on an SM at once, by shared memory; registers suffice for two.
constexpr int ctas_of_sm(const Plan& plan, const Device& device) {
  return 2 * (plan.shared_bytes + kReservedBytes) <= device.shared_bytes + kReservedBytes ? 2 : 1;
}

// Queries, unless a warpgroup has them in registers from the start, and what the CTAs of the cluster send; the rings of
// the groups of warps, which later have the groups' sums and, of warpgroups, what the cluster sends; masks; barriers.
constexpr void place_dealt(const Problem& problem, Plan* plan) {
  const int rows = plan->is_warpgroup ? kWarpgroupRows : kWarpRows, groups = plan->warps * kWarpRows / rows;
  const int queries = plan->is_warpgroup ? 0 : rows * row_bytes(plan->dim), sums = groups * rows * (plan->dim + 4) * 4;
  plan->share = static_cast<int>(ceil_div(problem.rows, plan->splits));
  const int inbox = kConfigs[plan->config].cluster ? plan->splits * plan->share * (problem.dim_v * 4 + 8) : 0;
  plan->inbox_offset = plan->is_warpgroup ? sums : queries;
  plan->ring_offset = plan->is_warpgroup ? 0 : queries + inbox;
  plan->ring_offset = static_cast<int>(ceil_div(plan->ring_offset, kSharedAlignment)) * kSharedAlignment;
  const int stages = groups * kConfigs[plan->config].stages;
  const int rings = stages * plan->tile * 2 * row_bytes(plan->dim);
  plan->mask_offset = plan->ring_offset + larger(rings, plan->is_warpgroup ? sums + inbox : sums);
  plan->mask_bytes = plan->tile * problem.mask_size_bytes * (plan->is_warpgroup ? kWarpgroupRows : problem.mask_rows);
  plan->barrier_offset = plan->mask_offset + stages * plan->mask_bytes;
  plan->shared_bytes = plan->barrier_offset + (1 + stages) * kBarrierBytes + kSharedAlignment;
}

constexpr std::int64_t heads_of(const Problem& problem) { return problem.batch * problem.kv_heads; }

constexpr bool is_small(const Problem& problem) { return larger(problem.dim, problem.dim_v) <= kSmallDim; }

constexpr bool needs_nearly_all(std::int64_t ctas, std::int64_t places) { return ctas * 8 > places * 7; }

// A CTA for each K/V head, two an SM, in waves of which the last is nearly full, too.
constexpr bool fills_whole_waves(std::int64_t heads, const Device& device) {
  const std::int64_t places = 2 * device.num_sms, last = heads % places;
  return heads > device.num_sms && (last == 0 || needs_nearly_all(last, places));
}

// CTAs of a K/V head when every SM has one. Those of fewer than 7 in 8 SMs are twice as many instead, two an SM.
constexpr int splits_that_fill(const Problem& problem, const Device& device) {
  const std::int64_t heads = heads_of(problem), splits = device.num_sms / heads;
  if (splits <= 1) return needs_nearly_all(heads, device.num_sms) ? 1 : 2;
  return static_cast<int>(splits);
}

// The same for small CTAs in clusters, two an SM. A cluster lies within one of the device's parts of up to 18 SMs, so
// those of other sizes than powers of two, and large ones that need two places of every SM, would have to wait for one
// another.
constexpr int splits_of_small_ctas(const Problem& problem, const Device& device) {
  constexpr int kSmallCluster = 4;
  const std::int64_t heads = heads_of(problem);
  int splits = 2;
  while (splits < kSmallCluster && 2 * splits * heads <= 2 * device.num_sms) splits *= 2;
  while (splits >= kSmallCluster && splits < kMaxCluster && 2 * splits * heads <= device.num_sms) splits *= 2;
  return splits;
}

// Measured on an H200 between linears of decoder layers, 1 to 512 K/V heads of 64 and of 128: small CTAs in clusters,
// which need no second kernel, until a cache is so long that it counts that clusters leave some SMs with less to do. Of
// 64 heads these would be 64 clusters of four, for which there is not always room at once, where two large CTAs a head
// take an SM each; as does one a head for small heads that fill the device. Of long caches small CTAs are slower, but for
// few heads faster where only a few of the keys are valid.
constexpr int choose_dealt_config(const Problem& problem, const Device& device) {
  constexpr std::int64_t kClusterKeys = 2048, kManyKeys = 8192;
  const std::int64_t heads = heads_of(problem), sms = device.num_sms;
  const bool fill = splits_that_fill(problem, device) <= 2, in_waves = fills_whole_waves(heads, device);
  if (problem.rows <= kWarpRows) {
    if (2 * heads <= sms && needs_nearly_all(2 * heads, sms)) return kWarp8Cluster;
    if (is_small(problem) && (in_waves || (heads <= sms && needs_nearly_all(heads, sms)))) return kWarp8Cluster;
    if (in_waves) return kWarp4Split;
    if (fill || problem.keys <= kManyKeys) return kWarp4Cluster;
    return heads * kMaxCluster <= sms ? kWarp4Split : kWarp8Split;
  }
  const bool alone = heads * kPortableCluster * 2 <= sms;
  return fill || (alone && problem.keys <= kClusterKeys) ? kWarpgroupsCluster : kWarpgroupsSplit;
}

// As many as fill the device, while each group of warps has a tile.
constexpr int choose_dealt_splits(const Problem& problem, const Plan& plan, const Device& device) {
  const int groups = plan.is_warpgroup ? plan.warps / kWarps : plan.warps;
  const int most = larger(1, static_cast<int>(ceil_div(plan.tiles, groups)));
  if (plan.config == kWarp4Cluster) return smaller(splits_of_small_ctas(problem, device), most);
  const int limit = kConfigs[plan.config].cluster ? kPortableCluster : kMaxSplits;
  return smaller(smaller(splits_that_fill(problem, device), most), limit);
}

constexpr Plan plan_dealt(const Problem& problem, Plan plan, int splits, const Device& device) {
  plan.kernel = Kernel::kDealt;
  plan.warps = kConfigs[plan.config].dealt_warps;
  plan.is_warpgroup = kConfigs[plan.config].tile == kWarpgroupTile;
  plan.tile = kConfigs[plan.config].tile;
  plan.tiles = ceil_div(problem.keys, plan.tile);
  plan.row_blocks = 1;
  plan.splits = splits <= 0 ? 1 : kConfigs[plan.config].cluster ? smaller(splits, kMaxCluster) : splits;
  place_dealt(problem, &plan);
  while (plan.warps > (plan.is_warpgroup ? kWarps : 1) && plan.shared_bytes > device.shared_bytes) {
    plan.warps /= 2;
    place_dealt(problem, &plan);
  }
  if (splits <= 0) plan.splits = choose_dealt_splits(problem, plan, device);
  place_dealt(problem, &plan);
  plan.cluster = kConfigs[plan.config].cluster && plan.splits > 1;
  return plan;
}

// A power of two, as splits_of_small_ctas, so that each SM has a CTA at most. Clusters of 16 of these find room in few
// places, unless two of their CTAs fit an SM. Of four or eight that need nearly every SM some would put two CTAs on one,
// for which all wait: three or six then end sooner.
constexpr int splits_of_direct(const Problem& problem, const Device& device) {
  constexpr std::int64_t kFewHeads = 4;
  const std::int64_t heads = heads_of(problem);
  const int most = is_small(problem) || heads <= kFewHeads ? kMaxCluster : kPortableCluster;
  int splits = 1;
  while (splits < most && 2 * splits * heads <= device.num_sms) splits *= 2;
  const bool is_divisible = splits == 4 || splits == 8;
  return is_divisible && needs_nearly_all(splits * heads, device.num_sms) ? splits / 4 * 3 : splits;
}

// More where each would have many tiles, one after another, and no SM needs to hold two CTAs.
constexpr int warps_of_direct(const Problem& problem, const Plan& plan, const Device& device) {
  constexpr std::int64_t kManyTiles = 7;
  const bool many = plan.tiles > kManyTiles * plan.splits * kDirectWarps;
  const bool alone = !needs_nearly_all(plan.splits * heads_of(problem), device.num_sms);
  return is_small(problem) && many && alone ? kManyDirectWarps : kDirectWarps;
}

// Measured as choose_dealt_config: where little is read; for few heads if the cache is short or clusters leave less than
// a third of the SMs idle; for small heads where one or two CTAs a head leave some SMs idle or fill whole waves. Long
// caches of heads with three CTAs or more are left to CTAs on all SMs and a second kernel.
constexpr bool suits_direct_kernel(const Problem& problem, const Device& device) {
  constexpr std::int64_t kFewTiles = 11, kManyTiles = 44, kMostBytes = 16 << 20, kMostBytesOfSmall = 32 << 20;
  const std::int64_t heads = heads_of(problem), sms = device.num_sms, splits = splits_of_direct(problem, device);
  const std::int64_t bytes = heads * problem.keys * row_bytes(problem.dim + problem.dim_v);
  const bool is_little = bytes <= (is_small(problem) ? kMostBytesOfSmall : kMostBytes), is_few = 4 * heads <= sms;
  const std::int64_t tiles = ceil_div(problem.keys, kDirectTile), warps = splits * kDirectWarps;
  if (tiles <= kFewTiles * warps && (is_little || is_few)) return true;
  if (tiles > kManyTiles * warps && splits_that_fill(problem, device) > 2) return false;
  if (is_few) return 3 * splits * heads >= 2 * sms;
  if (!is_small(problem)) return false;
  return heads <= sms ? !needs_nearly_all(splits * heads, sms) : fills_whole_waves(heads, device);
}

// While each warp has a tile.
constexpr Plan plan_direct(const Problem& problem, Plan plan, int splits, const Device& device) {
  plan.kernel = Kernel::kDirect;
  plan.tile = kDirectTile;
  plan.tiles = ceil_div(problem.keys, kDirectTile);
  plan.row_blocks = 1;
  if (splits <= 0) {
    const int most = larger(1, static_cast<int>(ceil_div(plan.tiles, kDirectWarps)));
    splits = smaller(splits_of_direct(problem, device), most);
  }
  plan.splits = smaller(splits, kMaxCluster);
  plan.cluster = plan.splits > 1;
  plan.share = static_cast<int>(ceil_div(problem.rows, plan.splits));
  plan.warps = warps_of_direct(problem, plan, device);
  plan.inbox_offset = plan.warps * kDirectRows * (plan.dim + 4) * 4;
  plan.barrier_offset = plan.inbox_offset + plan.splits * plan.share * (problem.dim_v * 4 + 8);
  plan.shared_bytes = plan.barrier_offset + kBarrierBytes;
  return plan;
}

constexpr int choose_config(const Device& device, int row_warps) {
  if (device.shared_bytes < 120 * 1024) return 2;
  return row_warps == 4 ? 1 : 0;
}

// As many splits as fill the device once, while each warp still has a tile.
constexpr int choose_splits(const Problem& problem, const Plan& plan, const Device& device) {
  const std::int64_t heads = problem.batch * problem.kv_heads * plan.row_blocks;
  const std::int64_t slots = static_cast<std::int64_t>(device.num_sms) * ctas_of_sm(plan, device);
  const std::int64_t most = ceil_div(plan.tiles, kWarps / plan.row_warps), wanted = slots / heads;
  const std::int64_t splits = wanted < most ? wanted : most;
  return splits < 1 ? 1 : static_cast<int>(splits);
}

constexpr int shared_bytes_before_bits(const Problem& problem, const Config& config, const Plan& plan) {
  return bits_offset(plan.dim, config, plan.tile, plan.row_warps, problem.mask_size_bytes);
}

// config, splits: kHeuristic and 0 let the plan choose.
constexpr Plan make_plan(const Problem& problem, int config, int splits, const Device& device) {
  Plan plan{};
  plan.dim = padded_dim(larger(problem.dim, problem.dim_v));
  plan.row_warps = problem.rows <= kWarpRows ? 1 : problem.rows <= 2 * kWarpRows ? 2 : 4;
  plan.config = config;
  if (config == kHeuristic) {
    plan.config = suits_direct_kernel(problem, device) ? kDirect : choose_dealt_config(problem, device);
  }
  if (plan.config == kDirect) {
    if (has_direct_kernel(problem, plan.dim, device)) return plan_direct(problem, plan, splits, device);
    plan.config = choose_dealt_config(problem, device);
  }
  if (kConfigs[plan.config].kernel == Kernel::kDealt) {
    if (has_dealt_kernel(problem, plan.dim, plan.config, device)) return plan_dealt(problem, plan, splits, device);
    plan.config = choose_config(device, plan.row_warps);
  }
  const Config& chosen = kConfigs[plan.config];
  plan.kernel = Kernel::kDecode;
  plan.tile = plan.dim > 128 ? 16 : chosen.tile;
  plan.tiles = ceil_div(problem.keys, plan.tile);
  const int bits_bytes = 2 * 4 * static_cast<int>(ceil_div(plan.tiles, 32));
  // Fewer rings than warps could have where a ring for each is too much; some warps then have no rows.
  while (plan.row_warps < kWarps &&
         shared_bytes_before_bits(problem, chosen, plan) + bits_bytes > device.shared_bytes) {
    plan.row_warps *= 2;
  }
  plan.bits_offset = shared_bytes_before_bits(problem, chosen, plan);
  plan.shared_bytes = plan.bits_offset + bits_bytes;
  plan.row_blocks = static_cast<int>(ceil_div(problem.rows, plan.row_warps * kWarpRows));
  plan.splits = splits > 0 ? splits : choose_splits(problem, plan, device);
  const std::int64_t heads = problem.batch * problem.kv_heads * plan.row_blocks;
  // Few tiles: a cluster of CTAs, one an SM, ends sooner than a second kernel. A larger grid of clusters leaves SMs idle.
  const int size = plan.splits < kPortableCluster ? plan.splits : kPortableCluster;
  plan.cluster = device.has_clusters && size > 1 && size * heads <= device.num_sms &&
                 plan.tiles <= kMaxTilesOfClusterWarp * size * (kWarps / plan.row_warps);
  if (plan.cluster) plan.splits = size;
  return plan;
}

}  // namespace infuse::attention_decode
