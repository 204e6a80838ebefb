// Cross entropy of rows of logits z with one target t each, and its gradient in the logits' place:
//
//     loss = (1 - s) (lse - z_t) + s (lse - mean(z))             s: label smoothing, lse = log(sum(exp(z)))
//     z   <- scale (exp(z - lse) - (1 - s) [v = t] - s / vocab)
//
// With a soft cap c, z stands for c tanh(z / c), whose slope the gradient is multiplied by, 1 - tanh(z / c)^2.
// A row whose target is ignored has the loss 0 and the gradient 0; one whose target is not in the vocabulary NaN. All
// in fp32, rounded once. A CTA, or a cluster of some, takes one row. What of it fits in shared memory is copied there,
// all at once and in the background, for both passes; the rest is read twice, the second time from L2, where it was a
// moment ago.
#pragma once

#include <cstdint>

#include "cross_entropy/log_sum_exp.cuh"
#include "cross_entropy/params.h"
#include "cross_entropy/plan.h"
#include "cross_entropy/single.cuh"
#include "infuse/async_copy.cuh"
#include "infuse/cluster.cuh"
#include "infuse/memory.cuh"
#include "infuse/overlap.cuh"

namespace infuse::cross_entropy {

constexpr int kUnroll = 4;      // vectors that a thread loads at once
constexpr int kCopyGroups = 4;  // of the copies to shared memory, each awaited by itself
static_assert(kMaxCachedVecs % kCopyGroups == 0);

// The part of a row that a CTA has: whole vectors, and in the last part the elements behind those.
template <DType kDType>
struct PartOfRow {
  using T = Element<kDType>;
  static constexpr int kElems = kVectorBytes / static_cast<int>(sizeof(T));
  using Vector = Vec<T, kElems>;
  static constexpr std::uint32_t kMinusInfinity =
      kDType == DType::kBFloat16 ? 0xff80ff80u : kDType == DType::kFloat16 ? 0xfc00fc00u : 0xff800000u;

  std::uint32_t first;  // element of the row
  std::uint32_t num_elems, num_vecs;
  std::uint32_t cached_vecs;  // in shared memory, each for the thread that reads it
  T* row;                     // from `first` on
  SharedAddress cache;

  __device__ __forceinline__ PartOfRow(const Params& params, std::uint32_t index, std::uint32_t part) {
    const std::uint32_t vecs = params.vocab / kElems, share = (vecs + params.parts - 1) / params.parts;
    const std::uint32_t begin = min(part * share, vecs), end = min(begin + share, vecs);
    first = begin * kElems;
    num_elems = (part + 1 == params.parts ? params.vocab : end * kElems) - first;
    num_vecs = num_elems / kElems;
    cached_vecs = min(params.cached_vecs, num_vecs);
    row = static_cast<T*>(params.logits) + index * params.row_stride + first;
    cache = dynamic_shared_memory();
  }

  // The vector, or -inf beyond the row.
  __device__ __forceinline__ Vector load(std::uint32_t vec) const {
    Vector loaded;
#pragma unroll
    for (int i = 0; i < Vector::kWords; ++i) loaded.words[i] = kMinusInfinity;
    load_16_bytes<Reuse::kOnce>(loaded.words, row + std::uint64_t{vec} * kElems, vec < num_vecs);
    return loaded;
  }

  // Starts the copies of this thread's vectors to shared memory.
  __device__ __forceinline__ void start_copies() const {
#pragma unroll
    for (int i = 0; i < kMaxCachedVecs; ++i) {
      const std::uint32_t vec = threadIdx.x + i * blockDim.x;
      copy_async<kVectorBytes>(cache + vec * kVectorBytes, row + std::uint64_t{vec} * kElems, vec < cached_vecs);
      if ((i + 1) % (kMaxCachedVecs / kCopyGroups) == 0) end_copy_group();
    }
  }

  __device__ __forceinline__ Vector load_copy(std::uint32_t vec) const {
    return load_shared<T, kElems>(cache + vec * kVectorBytes);
  }

  __device__ __forceinline__ void write(std::uint32_t vec, const Vector& written) const {
    if (vec < num_vecs) store(row + std::uint64_t{vec} * kElems, written);
  }

  // The elements behind the last whole vector: thread i has the i-th of them.
  __device__ __forceinline__ bool has_single() const { return num_vecs * kElems + threadIdx.x < num_elems; }
  __device__ __forceinline__ T& single() const { return row[num_vecs * kElems + threadIdx.x]; }
};

// Every thread gets the log-sum-exp of all threads' values and the sum of `total`.
__device__ __forceinline__ void merge_threads(LogSumExp& lse, float& total) {
  __shared__ float most[kMaxWarps], sums[kMaxWarps], totals[kMaxWarps];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  lse.merge_lanes();
  total = group_sum(total, kWarpSize);
  if (lane == 0) {
    most[warp] = lse.most;
    sums[warp] = lse.sum;
    totals[warp] = total;
  }
  __syncthreads();
  const bool is_warp = lane < static_cast<int>(blockDim.x) / kWarpSize;
  lse = LogSumExp{};
  lse.merge(is_warp ? most[lane] : -INFINITY, is_warp ? sums[lane] : 0.0f);
  lse.merge_lanes();
  total = group_sum(is_warp ? totals[lane] : 0.0f, kWarpSize);
}

// The same over the CTAs of a cluster, in the order of their ranks.
__device__ __forceinline__ void merge_parts(LogSumExp& lse, float& total, std::uint32_t parts) {
  __shared__ __align__(16) float4 own;
  if (threadIdx.x == 0) own = make_float4(lse.most, lse.sum, total, 0.0f);
  sync_cluster();
  const auto address = static_cast<SharedAddress>(__cvta_generic_to_shared(&own));
  lse = LogSumExp{};
  total = 0.0f;
  for (std::uint32_t rank = 0; rank < parts; ++rank) {
    const float4 part = load_from_cluster(shared_of_cta(address, rank));
    lse.merge(part.x, part.y);
    total += part.z;
  }
  sync_cluster();  // no CTA ends while another reads from it
}

// What is put in place of a row whose gradient is the same everywhere.
template <typename Row>
__device__ __forceinline__ void fill(const Row& row, float value) {
  using T = typename Row::T;
  float values[Row::kElems];
#pragma unroll
  for (int i = 0; i < Row::kElems; ++i) values[i] = value;
  const auto written = pack<T>(values);
  for (std::uint32_t vec = threadIdx.x; vec < row.num_vecs; vec += blockDim.x) row.write(vec, written);
  if (row.has_single()) row.single() = narrow<T>(value);
}

// The vectors that are not in shared memory: what comes first of them, loaded ahead of time.
template <typename Row>
struct Rest {
  static constexpr int kAhead = 2;
  const Row& row;
  std::uint32_t next;
  typename Row::Vector ahead[kAhead];

  __device__ __forceinline__ explicit Rest(const Row& row_) : row(row_), next(row_.cached_vecs + threadIdx.x) {
    load();
  }

  __device__ __forceinline__ void load() {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ahead[i] = row.load(next + i * blockDim.x);
  }

  // Calls function(vec, vector) for each.
  template <typename Function>
  __device__ __forceinline__ void visit(Function&& function) {
    while (next < row.num_vecs) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) function(next + i * blockDim.x, ahead[i]);
      next += kAhead * blockDim.x;
      if (next < row.num_vecs) load();
    }
  }
};

// c tanh(z / c), or z itself.
template <bool kCaps>
struct Cap {
  float cap = 0.0f, inverse = 0.0f;

  __device__ __forceinline__ explicit Cap(const Params& params) {
    if constexpr (kCaps) {
      cap = params.softcap;
      inverse = 1.0f / cap;
    }
  }

  __device__ __forceinline__ float operator()(float z) const {
    if constexpr (!kCaps) return z;
    return cap - cap * __fdividef(2.0f, 1.0f + exp2_approx(z * inverse * (2.0f * kLog2e)));
  }

  // Of its result.
  __device__ __forceinline__ float slope(float capped) const {
    if constexpr (!kCaps) return 1.0f;
    const float tanh = capped * inverse;
    return 1.0f - tanh * tanh;
  }
};

// What one pass over the logits finds out.
template <typename Row, bool kCaps>
struct Sums {
  LogSumExp lse;
  float total = 0.0f;
  Cap<kCaps> cap;
  bool needs_total;

  __device__ __forceinline__ Sums(const Cap<kCaps>& cap_, bool needs_total_) : cap(cap_), needs_total(needs_total_) {}

  __device__ __forceinline__ void operator()(std::uint32_t vec, const typename Row::Vector& loaded, const Row& row) {
    float values[Row::kElems];
    unpack(loaded, values);
#pragma unroll
    for (int j = 0; j < Row::kElems; ++j) {
      // Beyond the row stays -inf.
      if (kCaps && vec < row.num_vecs) values[j] = cap(values[j]);
    }
    float largest = values[0];
#pragma unroll
    for (int j = 1; j < Row::kElems; ++j) largest = fmaxf(largest, values[j]);
    lse.expect(largest);
#pragma unroll
    for (int j = 0; j < Row::kElems; ++j) lse.add(values[j]);
    if (needs_total && vec < row.num_vecs) {
#pragma unroll
      for (int j = 0; j < Row::kElems; ++j) total += values[j];
    }
  }

  __device__ __forceinline__ void add_single(float single) {
    const float value = cap(single);
    lse.expect(value);
    lse.add(value);
    total += value;
  }
};

// The sums over a part of which nothing is kept.
template <typename Row, bool kCaps>
__device__ __forceinline__ void read_once(const Row& row, Sums<Row, kCaps>& sums) {
  for (std::uint32_t first = threadIdx.x; first < row.num_vecs; first += kUnroll * blockDim.x) {
    typename Row::Vector loaded[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) loaded[i] = row.load(first + i * blockDim.x);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) sums(first + i * blockDim.x, loaded[i], row);
  }
}

// The sums over a part that is copied to shared memory as far as it fits there.
template <typename Row, bool kCaps>
__device__ __forceinline__ void read_and_keep(const Row& row, Sums<Row, kCaps>& sums) {
  row.start_copies();
  Rest<Row> rest(row);
  const auto read_group = [&](auto group) {
    wait_for_copies<kCopyGroups - 1 - decltype(group)::value>();
    constexpr int kVecs = kMaxCachedVecs / kCopyGroups;
#pragma unroll
    for (int i = decltype(group)::value * kVecs; i < (decltype(group)::value + 1) * kVecs; ++i) {
      const std::uint32_t vec = threadIdx.x + i * blockDim.x;
      if (vec < row.cached_vecs) sums(vec, row.load_copy(vec), row);
    }
  };
  static_assert(kCopyGroups == 4);
  read_group(std::integral_constant<int, 0>{});
  read_group(std::integral_constant<int, 1>{});
  read_group(std::integral_constant<int, 2>{});
  read_group(std::integral_constant<int, 3>{});
  rest.visit([&](std::uint32_t vec, const typename Row::Vector& loaded) { sums(vec, loaded, row); });
}

// factor exp(z - base) - offset in place of each z.
template <typename Row, bool kCaps>
__device__ __forceinline__ void write_gradient(const Row& row, const Cap<kCaps>& cap, const LogSumExp& lse,
                                               float factor, float offset) {
  using T = typename Row::T;
  const auto slope = [&](float z) {
    const float capped = cap(z), gradient = fmaf(lse.exp(capped), factor, -offset);
    return kCaps ? gradient * cap.slope(capped) : gradient;
  };
  const auto write = [&](std::uint32_t vec, const typename Row::Vector& loaded) {
    float values[Row::kElems];
    unpack(loaded, values);
#pragma unroll
    for (int j = 0; j < Row::kElems; ++j) values[j] = slope(values[j]);
    row.write(vec, pack<T>(values));
  };
  Rest<Row> rest(row);
#pragma unroll 4
  for (std::uint32_t vec = threadIdx.x; vec < row.cached_vecs; vec += blockDim.x) write(vec, row.load_copy(vec));
  rest.visit(write);
  if (row.has_single()) row.single() = narrow<T>(slope(widen(row.single())));
}

template <DType kDType, bool kCaps>
__global__ __launch_bounds__(kMaxThreads, 1) void rows_kernel(const __grid_constant__ Params params) {
  using Row = PartOfRow<kDType>;
  const std::uint32_t index = blockIdx.x / params.parts, part = blockIdx.x % params.parts;
  const bool writes_loss = part == 0 && threadIdx.x == 0;
  const Row row(params, index, part);
  wait_for_previous_kernel();
  const std::int64_t target = params.target[index];
  const bool ignored = target == params.ignore_index;
  if (ignored || target < 0 || target >= params.vocab) {
    const float value = ignored ? 0.0f : NAN;
    if (writes_loss) params.loss[index] = value;
    if (params.gradient) fill(row, value);
    return;
  }
  const auto place = static_cast<std::uint32_t>(target) - row.first;  // in this part if below num_elems
  const Cap<kCaps> cap(params);
  const float z = cap(widen(row.row[static_cast<std::int32_t>(place)]));
  const float smoothing = params.label_smoothing;
  const float scale = params.scale == nullptr ? 1.0f : *params.scale;

  Sums<Row, kCaps> sums(cap, smoothing != 0.0f);
  if (params.gradient) {
    read_and_keep(row, sums);
  } else {
    read_once(row, sums);
  }
  if (row.has_single()) sums.add_single(widen(row.single()));
  LogSumExp& lse = sums.lse;
  float& total = sums.total;
  merge_threads(lse, total);
  if (params.parts > 1) merge_parts(lse, total, params.parts);

  if (writes_loss) {
    const float log_sum = kLn2 * __log2f(lse.sum);
    float loss = log_sum + (lse.base - z);
    if (smoothing != 0.0f) {
      const float mean = total / static_cast<float>(params.vocab);
      loss = (1.0f - smoothing) * loss + smoothing * (log_sum + (lse.base - mean));
    }
    params.loss[index] = loss;
  }
  if (params.gradient) {
    const float factor = __fdividef(scale, lse.sum);
    const float offset = scale * smoothing / static_cast<float>(params.vocab);
    write_gradient(row, cap, lse, factor, offset);
    __syncthreads();
    if (threadIdx.x == 0 && place < row.num_elems) {
      const float p = lse.exp(z) / lse.sum;
      row.row[place] = narrow<typename Row::T>(fmaf(scale, p - (1.0f - smoothing), -offset) * cap.slope(z));
    }
  }
}

}  // namespace infuse::cross_entropy
