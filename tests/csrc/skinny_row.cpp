// The kernel for linears of one row on the CPU, against double precision: norm, residual, gate, biases and addend, odd
// sizes, one to eight groups of columns; results in fp32 are the rounded ones.
#define __CUDA_ARCH_FEAT_SM90_ALL
#include "cuda_on_cpu.h"

#include <deque>
#include <random>

#include "skinny_linear/plan.h"
#include "skinny_linear/row_kernel.cuh"

using namespace infuse;
using namespace infuse::skinny_linear;

namespace {

constexpr Device kH200{132, 231424, true};
constexpr float kEps = 1e-5f;

struct Case {
  std::int64_t dim, features[3];
  int num_weights;
  Activation activation;
  bool norm, residual, bias, addend, cast_before_weight;
  float weight_offset;
};

constexpr Activation kPlain = Activation::kNone;
constexpr Case kCases[] = {
    {896, {896, 128, 128}, 3, kPlain, true, false, true, false, false, 0.0f},
    {896, {896, 128, 128}, 3, kPlain, true, true, true, false, true, 0.0f},
    {896, {896}, 1, kPlain, false, false, false, true, false, 0.0f},
    {896, {4864, 4864}, 2, Activation::kSilu, true, false, false, false, false, 0.0f},
    {4864, {896}, 1, kPlain, false, false, false, true, false, 0.0f},
    {2048, {500, 33}, 2, kPlain, true, true, true, false, false, 1.0f},
    {1000, {100, 3}, 2, kPlain, true, false, true, true, false, 0.0f},
    {4096, {77, 77}, 2, Activation::kGeluErf, true, true, true, true, false, 0.0f},
    {264, {65, 65}, 2, Activation::kGeluTanh, false, false, true, true, false, 0.0f},
    {8, {1}, 1, kPlain, false, false, false, false, false, 0.0f},
    {120, {4000, 5, 33}, 3, kPlain, true, true, false, false, false, 0.0f},
    {1536, {2000, 2000}, 2, Activation::kSilu, true, true, true, false, false, 0.0f},
};

std::mt19937 generator(0);
std::deque<std::vector<char>> storage;

template <typename T>
T* make(std::int64_t elements, float scale, float around = 0.0f) {
  std::vector<char>& bytes = storage.emplace_back(elements * sizeof(T) + 16);
  T* data = reinterpret_cast<T*>((reinterpret_cast<std::uintptr_t>(bytes.data()) + 15) & ~std::uintptr_t{15});
  emulation::ranges.push_back({reinterpret_cast<char*>(data), reinterpret_cast<char*>(data + elements)});
  std::normal_distribution<float> normal(around, scale);
  for (std::int64_t i = 0; i < elements; ++i) data[i] = T(normal(generator));
  return data;
}

template <typename T>
double at(const void* data, std::int64_t index) {
  return static_cast<double>(static_cast<float>(static_cast<const T*>(data)[index]));
}

template <typename T>
double rounded(double value) {
  return static_cast<double>(static_cast<float>(T(static_cast<float>(value))));
}

template <typename T>
RingParams params_of(const Case& c, const Plan& plan) {
  RingParams params{};
  Params& base = params.base;
  base.x = make<T>(c.dim, 1.0f);
  base.addend = c.addend ? make<T>(c.features[0], 1.0f) : nullptr;
  base.activation = c.activation;
  base.rows = 1;
  base.dim = static_cast<std::uint32_t>(c.dim);
  base.tile_rows = static_cast<std::uint32_t>(plan.tile_rows);
  base.splits = 1;
  base.column_groups = static_cast<std::uint32_t>(plan.column_groups);
  base.blocks = static_cast<std::uint32_t>(plan.blocks);
  base.stage_bytes = static_cast<std::uint32_t>(plan.stage_bytes);
  base.barrier_offset = static_cast<std::uint32_t>(plan.barrier_offset);
  if (c.norm) {
    base.norm = {c.residual ? make<T>(c.dim, 1.0f) : nullptr, c.residual ? make<T>(c.dim, NAN) : nullptr,
                 make<T>(c.dim, 0.2f, 1.0f - c.weight_offset), 0, kEps, c.weight_offset,
                 1.0f / static_cast<float>(c.dim), true, false, c.cast_before_weight, false};
  }
  params.keeps_x = true;
  params.copies_blocks = c.dim % kBlockColumns == 0;
  for (int i = 0; i < kMaxWeights; ++i) {
    Linear& linear = base.linears[i];
    linear.first_tile = static_cast<std::uint32_t>(plan.first_tile[i]);
    if (i >= c.num_weights) continue;
    linear.weight = make<T>(c.features[i] * c.dim, 1.0f / std::sqrt(static_cast<float>(c.dim)));
    linear.bias = c.bias ? make<T>(c.features[i], 1.0f) : nullptr;
    linear.out = make<T>(c.features[i], NAN);
    linear.features = static_cast<std::uint32_t>(c.features[i]);
    const char* data = static_cast<const char*>(linear.weight);
    params.weights[i] = as_tensor_map(
        params.copies_blocks
            ? EmulatedMap{data, c.dim / 64, c.features[i], 64, 64, c.dim, plan.blocks, plan.tile_rows}
            : EmulatedMap{data, 1, c.features[i], c.dim, 0, c.dim, 1, plan.tile_rows});
  }
  return params;
}

template <typename T, bool kGated, int kPieces>
void launch(const Plan& plan, const RingParams& params) {
  constexpr int kMany = kGated ? 4 : 8;
  const emulation::Index block{kRowWarps * 32};
  const auto tiles = static_cast<unsigned>(plan.tiles);
  emulation::set_shared_memory(plan.shared_bytes);
  if (plan.tile_rows * plan.column_groups / kRowWarps >= kMany) {
    emulation::launch(row_kernel<RowTraits<T, kGated, kPieces, kMany>>, tiles, block, params);
  } else {
    emulation::launch(row_kernel<RowTraits<T, kGated, kPieces, 1>>, tiles, block, params);
  }
}

template <typename T, bool kGated>
void launch(const Plan& plan, const RingParams& params) {
  switch (plan.row_pieces) {
    case 1: return launch<T, kGated, 1>(plan, params);
    case 2: return launch<T, kGated, 2>(plan, params);
    case 3: return launch<T, kGated, 3>(plan, params);
    default: return launch<T, kGated, 4>(plan, params);
  }
}

// x as it is multiplied; checks the sum with the residual, which the kernel writes.
template <typename T>
std::vector<double> expected_x(const Case& c, const Params& base) {
  std::vector<double> y(static_cast<std::size_t>(c.dim));
  double squares = 0.0;
  for (std::int64_t i = 0; i < c.dim; ++i) {
    y[i] = at<T>(base.x, i);
    if (c.residual) y[i] = rounded<T>(y[i] + at<T>(base.norm.residual, i));
    if (c.residual && at<T>(base.norm.sum, i) != y[i]) emulation::die("the sum with the residual");
    squares += y[i] * y[i];
  }
  const double rstd = 1.0 / std::sqrt(squares / static_cast<double>(c.dim) + kEps);
  for (std::int64_t i = 0; i < c.dim && c.norm; ++i) {
    const double normalised = c.cast_before_weight ? rounded<T>(y[i] * rstd) : y[i] * rstd;
    y[i] = rounded<T>(normalised * (at<T>(base.norm.weight, i) + c.weight_offset));
  }
  return y;
}

double activated(Activation activation, double gate) {
  switch (activation) {
    case Activation::kSilu: return gate / (1.0 + std::exp(-gate));
    case Activation::kGeluErf: return 0.5 * gate * (1.0 + std::erf(gate / std::sqrt(2.0)));
    default: return 0.5 * gate * (1.0 + std::tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)));
  }
}

template <typename T>
void check(const Case& c) {
  storage.clear();
  emulation::ranges.clear();
  const bool gated = c.activation != Activation::kNone;
  const Problem problem{1, c.dim, c.num_weights, {c.features[0], c.features[1], c.features[2]}, gated, c.norm, false};
  const Plan plan = make_plan(problem, kRow, kH200);
  if (!plan.by_row) emulation::die("a problem that the kernel for one row does not take");
  const RingParams params = params_of<T>(c, plan);
  gated ? launch<T, true>(plan, params) : launch<T, false>(plan, params);
  RingParams wide = params;
  for (int i = 0; i < c.num_weights; ++i) {
    wide.base.linears[i].out = make<float>(c.features[i], NAN);
    wide.base.linears[i].out_is_fp32 = true;
  }
  gated ? launch<T, true>(plan, wide) : launch<T, false>(plan, wide);

  const Params& base = params.base;
  const std::vector<double> y = expected_x<T>(c, base);
  const auto product = [&](int i, std::int64_t feature) {
    double sum = c.bias ? at<T>(base.linears[i].bias, feature) : 0.0;
    for (std::int64_t j = 0; j < c.dim; ++j) sum += y[j] * at<T>(base.linears[i].weight, feature * c.dim + j);
    return sum;
  };
  // One rounding of the result, and of x's elements one that may differ in its last bit.
  const double tolerance = std::is_same_v<T, __half> ? 1e-3 : 6e-3;
  for (int i = 0; i < (gated ? 1 : c.num_weights); ++i) {
    for (std::int64_t feature = 0; feature < c.features[i]; ++feature) {
      double expected = product(i, feature);
      if (gated) expected = activated(c.activation, expected) * product(1, feature);
      if (c.addend && i == 0) expected += at<T>(base.addend, feature);
      const double error = std::fabs(at<T>(base.linears[i].out, feature) - expected);
      const bool is_same = at<float>(wide.base.linears[i].out, feature) == at<T>(base.linears[i].out, feature);
      if (is_same && error <= tolerance * (1.0 + std::fabs(expected))) continue;
      std::printf("dim %lld, linear %d, feature %lld: got %g, expected %g\n", static_cast<long long>(c.dim), i,
                  static_cast<long long>(feature), at<T>(base.linears[i].out, feature), expected);
      std::exit(1);
    }
  }
}

}  // namespace

int main() {
  for (const Case& c : kCases) {
    check<__nv_bfloat16>(c);
    check<__half>(c);
  }
  std::printf("ok\n");
}
