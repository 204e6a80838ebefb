// The norm kernels on the CPU: every form and configuration, odd sizes, strides and alignments, against double
// precision.
#include "cuda_on_cpu.h"

#include <random>

#include "norm/kernel.cuh"
#include "norm/long_rows.cuh"
#include "norm/plan.h"
#include "norm/ring_kernel.cuh"

using namespace infuse;
using namespace infuse::norm;

namespace {

constexpr float kEps = 1e-5f;
constexpr Device kDevice{132, 226 * 1024};
constexpr unsigned kCtas = 2;  // of the ring kernel, which then has several rows to walk over

struct Case {
  std::int64_t batches, rows, dim;              // x [batches, rows, dim], out [batches * rows, dim]
  std::int64_t x_padding = 0, out_padding = 0;  // elements behind each row
  int offset = 0;                               // elements in front, to misalign both
  bool has_weight = true, has_bias = false;
  bool cast_before_weight = false, eps_as_minimum = false;
  bool cast_before_gate = false, gate_is_silu = true;
  double scale = 1, shift = 0;  // of x
  double first = NAN;           // element of x, where it is another
  std::int64_t groups = 1;      // neighbouring rows share a row of x's storage, as in a gated norm
};

template <typename T>
struct Buffer {
  std::vector<char> storage;
  T* data;

  Buffer(std::int64_t elements, int offset) : storage((elements + offset) * sizeof(T) + 16) {
    const auto first = (reinterpret_cast<std::uintptr_t>(storage.data()) + 15) & ~std::uintptr_t{15};
    data = reinterpret_cast<T*>(first) + offset;
    emulation::ranges.push_back({reinterpret_cast<char*>(data), reinterpret_cast<char*>(data + elements)});
  }

  template <typename Generator>
  void fill(std::int64_t elements, Generator generate) {
    for (std::int64_t i = 0; i < elements; ++i) data[i] = T(static_cast<float>(generate()));
  }
};

int alignment_bytes(const void* data, const RowMap& rows, std::size_t size) {
  std::uint64_t bits = reinterpret_cast<std::uintptr_t>(data) | kVectorBytes;
  for (int i = 0; i < rows.num_dims; ++i) bits |= static_cast<std::uint64_t>(rows.stride[i]) * size;
  return static_cast<int>(bits & (~bits + 1));
}

template <typename Types>
void run(const Plan& plan, const Params& params) {
  const Config& config = kConfigs[plan.config];
  const emulation::Index block{static_cast<unsigned>(plan.threads_per_row),
                               static_cast<unsigned>(config.rows_per_cta)};
  const unsigned grid = static_cast<unsigned>(ceil_div(params.rows, config.rows_per_cta));
  if (plan.shared_bytes > 0) {
    emulation::set_shared_memory(plan.shared_bytes);
    return emulation::launch(ring_kernel<RingTraits<Types>>, grid < kCtas ? grid : kCtas, block, params);
  }
  const auto go = [&](auto kernel) { emulation::launch(kernel, grid, block, params); };
  switch (plan.vecs_per_thread) {
    case 1: return go(register_kernel<RegisterTraits<Types, 1>>);
    case 2: return go(register_kernel<RegisterTraits<Types, 2>>);
    case 4: return go(register_kernel<RegisterTraits<Types, 4>>);
  }
  constexpr int kFull = kVectorBytes / static_cast<int>(sizeof(typename Types::x_type));
  if (plan.vec_elems == kFull) return go(two_pass_kernel<TwoPassTraits<Types, kFull>>);
  go(two_pass_kernel<TwoPassTraits<Types, 1>>);
}

double act(const Case& c, double gate) { return (c.gate_is_silu ? gate : 1) / (1 + std::exp(-gate)); }

template <typename T>
double rounded(double value) {
  return double(float(T(float(value))));
}

// One row of the formula in double precision, with the roundings that are part of it. `x` is replaced by the sum.
template <typename X, typename W>
std::vector<double> expected_row(const Case& c, Operand operand, bool center, std::vector<double>& x, const X* other,
                                 const W* weight, const W* bias, double weight_offset, double* mean, double* rstd) {
  const std::int64_t dim = c.dim;
  std::vector<double> h(dim), y(dim);
  for (std::int64_t i = 0; i < dim; ++i) {
    if (operand == Operand::kResidual) x[i] = rounded<X>(x[i] + float(other[i]));
    h[i] = x[i] * (operand == Operand::kGateBeforeNorm ? act(c, float(other[i])) : 1);
  }
  *mean = 0;
  for (std::int64_t i = 0; center && i < dim; ++i) *mean += h[i] / double(dim);
  double squares = 0;
  for (std::int64_t i = 0; i < dim; ++i) squares += (h[i] - *mean) * (h[i] - *mean) / double(dim);
  *rstd = 1 / std::sqrt(c.eps_as_minimum ? std::max(squares, double(kEps)) : squares + double(kEps));
  for (std::int64_t i = 0; i < dim; ++i) {
    y[i] = (h[i] - *mean) * *rstd;
    if (c.cast_before_weight) y[i] = rounded<X>(y[i]);
    if (c.has_weight) y[i] *= weight_offset + double(float(weight[i]));
    if (c.cast_before_weight && sizeof(W) == sizeof(X)) y[i] = rounded<X>(y[i]);
    if (c.has_bias) y[i] += double(float(bias[i]));
    if (operand == Operand::kGateBehindNorm) {
      y[i] = (c.cast_before_gate ? rounded<X>(y[i]) : y[i]) * act(c, float(other[i]));
    }
  }
  return y;
}

template <DType kX, DType kWeight, Operand kOperand, bool kCenter = false>
void test(const Case& c, int config) {
  using X = Element<kX>;
  using W = Element<kWeight>;
  const bool out_is_fp32 = kWeight == DType::kFloat32 && c.cast_before_weight && kOperand != Operand::kGateBehindNorm;
  const std::int64_t x_stride = c.dim + c.x_padding, batch_stride = c.rows * x_stride + 32;
  const std::int64_t out_stride = c.dim + c.out_padding, rows = c.batches * c.rows;
  const int out_size = out_is_fp32 ? 4 : sizeof(X);

  emulation::ranges.clear();
  Buffer<X> x(c.batches * batch_stride, c.offset), other(c.batches * batch_stride, c.offset);
  Buffer<W> weight(c.groups * c.dim, 0), bias(c.groups * c.dim, 0);
  Buffer<X> sum(rows * c.dim, 0), narrow(rows * out_stride, c.offset);
  Buffer<float> wide(rows * out_stride, c.offset), mean(rows, 0), rstd(rows, 0);
  std::mt19937 generator(static_cast<unsigned>(c.dim));
  std::normal_distribution<double> normal;
  x.fill(c.batches * batch_stride, [&] { return c.shift + c.scale * normal(generator); });
  if (!std::isnan(c.first)) x.data[0] = X(static_cast<float>(c.first));
  other.fill(c.batches * batch_stride, [&] { return normal(generator); });
  weight.fill(c.groups * c.dim, [&] { return normal(generator); });
  bias.fill(c.groups * c.dim, [&] { return normal(generator); });
  narrow.fill(rows * out_stride, [] { return NAN; });
  wide.fill(rows * out_stride, [] { return NAN; });
  sum.fill(rows * c.dim, [] { return NAN; });

  Params params{};
  params.x.data = x.data;
  params.operand.data = kOperand == Operand::kNone ? nullptr : other.data;
  params.out.data = out_is_fp32 ? static_cast<void*>(wide.data) : narrow.data;
  params.sum = kOperand == Operand::kResidual ? sum.data : nullptr;
  params.weight = c.has_weight ? weight.data : nullptr;
  params.bias = c.has_bias ? bias.data : nullptr;
  params.mean = kCenter ? mean.data : nullptr;
  params.rstd = rstd.data;
  const std::int64_t sizes[] = {c.batches, c.rows}, x_strides[] = {batch_stride, x_stride};
  const std::int64_t out_strides[] = {c.rows * out_stride, out_stride};
  if (collapse_rows(sizes, x_strides, 2, &params.x.map) > 2) emulation::die("x: too many dimensions left");
  if (collapse_rows(sizes, out_strides, 2, &params.out.map) != 1) emulation::die("out: not merged");
  params.operand.map = params.x.map;
  params.rows = static_cast<std::uint32_t>(rows);
  params.dim = static_cast<std::uint32_t>(c.dim);
  params.groups = FastDivisor(static_cast<std::uint32_t>(c.groups));
  params.inv_dim = static_cast<float>(1.0 / static_cast<double>(c.dim));
  params.sum_scale = std::exp2(-std::ceil(std::log2(static_cast<float>(c.dim))));
  params.scaled_dim = params.sum_scale * static_cast<float>(c.dim);
  params.eps = kEps;
  params.weight_offset = c.cast_before_weight && c.has_weight ? 0.0f : 1.0f;
  params.eps_as_minimum = c.eps_as_minimum;
  params.cast_before_weight =
      c.cast_before_weight && (c.has_weight || c.has_bias || kOperand == Operand::kGateBehindNorm);
  params.out_is_fp32 = out_is_fp32;
  params.cast_before_gate = c.cast_before_gate;
  params.gate_is_silu = c.gate_is_silu;

  Problem problem{};
  problem.rows = rows;
  problem.dim = c.dim;
  problem.operand = kOperand;
  problem.center = kCenter;
  problem.x = {sizeof(X), alignment_bytes(x.data, params.x.map, sizeof(X))};
  problem.others[0] = {out_size, alignment_bytes(params.out.data, params.out.map, out_size)};
  const int contiguous = alignment_bytes(nullptr, RowMap{}, 1) | static_cast<int>(c.dim * sizeof(X));
  if (kOperand == Operand::kResidual) problem.others[1] = {sizeof(X), contiguous & -contiguous};
  const Plan plan = make_plan(problem, config, kDevice);
  params.thread_vecs = static_cast<std::uint32_t>(plan.vecs_per_thread);
  params.row_vecs = static_cast<std::uint32_t>(c.dim / plan.vec_elems);
  run<Types<kX, kWeight, kOperand, kCenter>>(plan, params);

  // What is rounded to x's precision in the reference may be rounded to its neighbour here, each time.
  const double unit = sizeof(X) == 4 ? 1e-5 : kX == DType::kFloat16 ? 1.2e-3 : 9e-3;
  const double allowed = unit * (c.cast_before_weight ? 2 : 1);
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t start = row / c.rows * batch_stride + row % c.rows * x_stride;
    std::vector<double> h(c.dim);
    for (std::int64_t i = 0; i < c.dim; ++i) h[i] = float(x.data[start + i]);
    const std::int64_t group = row % c.groups * c.dim;
    double row_mean, row_rstd;
    const std::vector<double> expected =
        expected_row(c, kOperand, kCenter, h, other.data + start, weight.data + group, bias.data + group, params.weight_offset,
                     &row_mean, &row_rstd);
    const auto fail = [&](const char* what, std::int64_t i, double got, double wanted) {
      std::printf("%s: dim %ld, config %d, row %ld, element %ld: got %g, expected %g\n", what, long(c.dim), config,
                  long(row), long(i), got, wanted);
      emulation::die("wrong value");
    };
    if (std::fabs(rstd.data[row] / row_rstd - 1) > 1e-5) fail("rstd", 0, rstd.data[row], row_rstd);
    const double mean_error = std::fabs(mean.data[row] - row_mean);
    const double mean_allowed = std::isnan(c.first) ? 3e-7 : 3e-6;  // times the size of what is added
    if (kCenter && mean_error > mean_allowed * (std::fabs(row_mean) + c.scale)) fail("mean", 0, mean.data[row], row_mean);
    for (std::int64_t i = 0; i < out_stride; ++i) {
      const std::int64_t at = row * out_stride + i;
      const double got = out_is_fp32 ? wide.data[at] : float(narrow.data[at]);
      if (i >= c.dim) {
        if (!std::isnan(got)) emulation::die("wrote behind a row");
        continue;
      }
      const double terms = std::fabs(expected[i]) + (c.has_bias ? std::fabs(double(float(bias.data[group + i]))) : 0);
      const double of_mean = 1e-7 * std::fabs(row_mean) * row_rstd * 5;  // the mean is rounded to fp32; weights reach 5
      if (!(std::fabs(got - expected[i]) <= allowed * (terms + 1e-1) + of_mean)) fail("out", i, got, expected[i]);
      if (kOperand == Operand::kResidual && double(float(sum.data[row * c.dim + i])) != h[i]) {
        fail("sum", i, float(sum.data[row * c.dim + i]), h[i]);
      }
    }
  }
}

void test_divisor() {
  for (std::uint64_t divisor = 1; divisor <= 0x7fffffff; divisor = divisor * 9 / 8 + 1) {
    const FastDivisor fast(static_cast<std::uint32_t>(divisor));
    const std::uint64_t last = 0x7fffffff, multiple = last / divisor * divisor;
    for (const std::uint64_t n : {std::uint64_t{0}, divisor - 1, divisor, multiple - 1, multiple, last}) {
      if (fast.divide(static_cast<std::uint32_t>(n)) != n / divisor) emulation::die("FastDivisor is not exact");
    }
  }
}

void test_collapse() {
  RowMap map;
  const std::int64_t sizes[] = {2, 1, 3, 4, 5}, strides[] = {999, 7, 1000, 200, 40};
  if (collapse_rows(sizes, strides, 5, &map) != 3) emulation::die("collapse_rows: expected 3 dimensions");
  // Row ((1 * 3 + 2) * 4 + 3) * 5 + 4, of which the last two dimensions are one.
  if (map.offset(((1 * 3 + 2) * 4 + 3) * 5 + 4) != 999 + 2 * 1000 + 3 * 200 + 4 * 40) emulation::die("RowMap::offset");
  const std::int64_t many[] = {2, 2, 2, 2}, scattered[] = {800, 400, 160, 64};
  if (collapse_rows(many, scattered, 4, &map) != 3) emulation::die("collapse_rows: 800 lies behind 400");
  const std::int64_t more[] = {900, 400, 160, 64};
  if (collapse_rows(many, more, 4, &map) != 4) emulation::die("collapse_rows: expected 4 dimensions");
}

// A row with an offset of 1000 times its deviation cancels in the difference of two sums; an all-equal row has no
// deviation but what rounding makes of it; an outlier must not cost the others their precision.
void test_offsets(int config) {
  constexpr DType kFloat32 = DType::kFloat32;
  for (const std::int64_t dim : {7, 1000, 4096, 40000}) {
    Case c{.batches = 1, .rows = 1, .dim = dim};
    for (const double offset : {100.0, -1e4}) {
      c.shift = offset;
      test<kFloat32, kFloat32, Operand::kNone, true>(c, config);
      test<DType::kBFloat16, DType::kBFloat16, Operand::kNone, true>(c, config);
    }
    c.shift = 0;
    c.first = 1e4;
    if (dim > 7) test<kFloat32, kFloat32, Operand::kNone, true>(c, config);
    c.first = NAN;
    c.has_weight = false;
    c.scale = 0;
    for (const double value : {0.1, 1e4}) {
      c.shift = value;
      test<kFloat32, kFloat32, Operand::kNone, true>(c, config);
      test<DType::kBFloat16, DType::kBFloat16, Operand::kNone, true>(c, config);
    }
  }
}

}  // namespace

int main() {
  constexpr DType kBFloat16 = DType::kBFloat16, kFloat16 = DType::kFloat16, kFloat32 = DType::kFloat32;
  constexpr Operand kNone = Operand::kNone, kResidual = Operand::kResidual;
  constexpr Operand kGateFirst = Operand::kGateBeforeNorm, kGateLast = Operand::kGateBehindNorm;
  test_divisor();
  test_collapse();
  for (int config = kHeuristic; config < kNumConfigs; ++config) {
    for (const std::int64_t dim : {1, 7, 64, 100, 896, 1000, 4096, 5120, 8191, 40000}) {
      const std::int64_t rows = dim > 1000 ? 1 : 5;
      const Case plain{.batches = 1, .rows = rows, .dim = dim};
      const Case strided{.batches = 2, .rows = rows, .dim = dim, .x_padding = 24, .out_padding = 16};
      Case c = plain;
      test<kBFloat16, kBFloat16, kNone>(c, config);
      c.has_bias = true;
      test<kBFloat16, kBFloat16, kNone, true>(c, config);
      c.cast_before_weight = true;
      test<kFloat16, kFloat16, kResidual, true>(c, config);
      c = strided;
      c.cast_before_weight = c.has_bias = true;
      test<kBFloat16, kFloat32, kNone, true>(c, config);
      c.has_weight = c.has_bias = false;
      test<kFloat16, kFloat16, kResidual>(c, config);
      c = strided;
      c.eps_as_minimum = true;
      c.scale = 1e-3;
      test<kFloat32, kFloat32, kNone>(c, config);
      c.has_weight = false;
      c.offset = 1;
      test<kBFloat16, kBFloat16, kResidual>(c, config);
      c = strided;
      test<kBFloat16, kBFloat16, kGateFirst>(c, config);
      c.gate_is_silu = false;
      test<kFloat32, kFloat32, kGateFirst>(c, config);
      c.cast_before_weight = c.cast_before_gate = true;
      c.groups = rows;
      test<kFloat16, kFloat32, kGateLast>(c, config);
      c.cast_before_gate = false;
      c.offset = 1;
      test<kBFloat16, kBFloat16, kGateLast>(c, config);
    }
    test_offsets(config);
  }
  std::printf("ok\n");
}
