// The RMSNorm kernels on the CPU: every configuration, odd sizes, strides and alignments, against double precision.
#include "cuda_on_cpu.h"

#include <random>

#include "rms_norm/kernel.cuh"
#include "rms_norm/plan.h"

using namespace infuse;
using namespace infuse::rms_norm;

namespace {

struct Case {
  std::int64_t batches, rows, dim;     // x [batches, rows, dim], out [batches * rows, dim]
  std::int64_t x_padding, out_padding;  // elements behind each row
  int offset;                           // elements in front, to misalign both
  bool cast_before_weight, has_weight;
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
};

int alignment_bytes(const void* data, const RowMap& rows, std::size_t size) {
  std::uint64_t bits = reinterpret_cast<std::uintptr_t>(data) | kVectorBytes;
  for (int i = 0; i < rows.num_dims; ++i) bits |= static_cast<std::uint64_t>(rows.stride[i]) * size;
  return static_cast<int>(bits & (~bits + 1));
}

template <typename Types>
void run(const Plan& plan, const Params& params, unsigned resident_ctas) {
  const Config& config = kConfigs[plan.config];
  const emulation::Index block{static_cast<unsigned>(config.threads_per_row),
                               static_cast<unsigned>(config.rows_per_cta)};
  unsigned grid = static_cast<unsigned>(ceil_div(params.rows, config.rows_per_cta));
  if (plan.persistent && grid > resident_ctas) grid = resident_ctas;
  const auto go = [&](auto kernel) { emulation::launch(kernel, grid, block, params); };
  constexpr int kFull = kVectorBytes / static_cast<int>(sizeof(typename Types::x_type));
  constexpr int kNarrow = 4 / static_cast<int>(sizeof(typename Types::x_type));
  if (plan.persistent) {
    switch (plan.vecs_per_thread) {
      case 1: return go(register_kernel<RegisterTraits<Types, 1, true>>);
      case 2: return go(register_kernel<RegisterTraits<Types, 2, true>>);
      case 4: return go(register_kernel<RegisterTraits<Types, 4, true>>);
    }
  }
  switch (plan.vecs_per_thread) {
    case 1: return go(register_kernel<RegisterTraits<Types, 1, false>>);
    case 2: return go(register_kernel<RegisterTraits<Types, 2, false>>);
    case 4: return go(register_kernel<RegisterTraits<Types, 4, false>>);
    case 8: return go(register_kernel<RegisterTraits<Types, 8, false>>);
    case 16: return go(register_kernel<RegisterTraits<Types, 16, false>>);
  }
  if (plan.vec_elems == kFull) return go(two_pass_kernel<TwoPassTraits<Types, kFull>>);
  if (plan.vec_elems == kNarrow) return go(two_pass_kernel<TwoPassTraits<Types, kNarrow>>);
  go(two_pass_kernel<TwoPassTraits<Types, 1>>);
}

template <DType kX, DType kWeight, DType kOut>
void test(const Case& c, int config) {
  using X = Element<kX>;
  using W = Element<kWeight>;
  using Out = Element<kOut>;
  const std::int64_t x_stride = c.dim + c.x_padding, batch_stride = c.rows * x_stride + 32;
  const std::int64_t out_stride = c.dim + c.out_padding, rows = c.batches * c.rows;

  emulation::ranges.clear();
  Buffer<X> x(c.batches * batch_stride, c.offset);
  Buffer<W> weight(c.dim, 0);
  Buffer<Out> out(rows * out_stride, c.offset);
  std::mt19937 generator(static_cast<unsigned>(c.dim));
  std::normal_distribution<float> normal;
  for (std::int64_t i = 0; i < c.batches * batch_stride; ++i) x.data[i] = X(normal(generator));
  for (std::int64_t i = 0; i < c.dim; ++i) weight.data[i] = W(normal(generator));
  for (std::int64_t i = 0; i < rows * out_stride; ++i) out.data[i] = Out(NAN);

  Params params{};
  params.x = x.data;
  params.weight = c.has_weight ? weight.data : nullptr;
  params.out = out.data;
  const std::int64_t sizes[] = {c.batches, c.rows}, x_strides[] = {batch_stride, x_stride};
  const std::int64_t out_strides[] = {c.rows * out_stride, out_stride};
  if (collapse_rows(sizes, x_strides, 2, &params.x_rows) > 2) emulation::die("x: too many dimensions left");
  if (collapse_rows(sizes, out_strides, 2, &params.out_rows) != 1) emulation::die("out: not merged");
  params.rows = static_cast<std::uint32_t>(rows);
  params.inv_dim = static_cast<float>(1.0 / static_cast<double>(c.dim));
  params.eps = 1e-5f;
  params.weight_offset = c.cast_before_weight ? 0.0f : 1.0f;
  params.cast_before_weight = c.cast_before_weight;

  const Problem problem{rows, c.dim, sizeof(X), alignment_bytes(x.data, params.x_rows, sizeof(X)),
                        alignment_bytes(out.data, params.out_rows, sizeof(Out)), 16, sizeof(Out),
                        c.has_weight ? static_cast<int>(sizeof(W)) : 0};
  const Plan plan = make_plan(problem, config, 132);
  params.row_vecs = static_cast<std::uint32_t>(c.dim / plan.vec_elems);
  run<Types<kX, kWeight, kOut>>(plan, params, 2);

  // Two roundings to x's precision when the cast comes first, else one.
  const double allowed = sizeof(X) == 4 ? 2e-6 : kX == DType::kFloat16 ? 1.2e-3 : 9e-3;
  for (std::int64_t row = 0; row < rows; ++row) {
    const X* h = x.data + row / c.rows * batch_stride + row % c.rows * x_stride;
    double sum = 0;
    for (std::int64_t i = 0; i < c.dim; ++i) sum += double(float(h[i])) * float(h[i]);
    const double rstd = 1 / std::sqrt(sum / static_cast<double>(c.dim) + 1e-5);
    for (std::int64_t i = 0; i < out_stride; ++i) {
      const double got = float(out.data[row * out_stride + i]);
      if (i >= c.dim) {
        if (!std::isnan(got)) emulation::die("wrote behind a row");
        continue;
      }
      const double scale = c.has_weight ? params.weight_offset + double(float(weight.data[i])) : 1;
      const double expected = float(h[i]) * rstd * scale;
      if (!(std::fabs(got - expected) <= allowed * (std::fabs(expected) + 1e-2))) {
        std::printf("dim %ld, config %d, row %ld, element %ld: got %g, expected %g\n", long(c.dim), config, long(row),
                    long(i), got, expected);
        emulation::die("wrong value");
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

}  // namespace

int main() {
  constexpr DType kBFloat16 = DType::kBFloat16, kFloat16 = DType::kFloat16, kFloat32 = DType::kFloat32;
  test_divisor();
  test_collapse();
  for (int config = kHeuristic; config < kNumConfigs; ++config) {
    for (const std::int64_t dim : {1, 7, 64, 100, 896, 1000, 4096, 8191, 20000}) {
      const std::int64_t rows = dim > 1000 ? 1 : 5;
      test<kBFloat16, kBFloat16, kBFloat16>({1, rows, dim, 0, 0, 0, false, true}, config);
      test<kBFloat16, kFloat32, kFloat32>({2, rows, dim, 24, 0, 0, true, true}, config);
      test<kFloat16, kFloat32, kFloat16>({3, rows, dim, 8, 16, 0, false, true}, config);
      test<kFloat16, kFloat16, kFloat16>({1, rows, dim, 0, 0, 1, true, true}, config);
      test<kFloat32, kFloat32, kFloat32>({2, rows, dim, 4, 0, 0, false, false}, config);
    }
    // More rows than the persistent kernels' CTAs take in one round, and one row beyond a full round.
    const std::int64_t rows = 4 * kConfigs[config < 0 ? 0 : config].rows_per_cta + 1;
    test<kBFloat16, kBFloat16, kBFloat16>({1, rows, 64, 0, 0, 0, true, true}, config);
  }
  std::printf("ok\n");
}
