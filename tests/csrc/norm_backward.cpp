// The norms' backward kernels on the CPU: every configuration, dtype and flag, odd sizes, strides and alignments,
// against double precision.
#include "cuda_on_cpu.h"

#include <memory>
#include <random>

#include "norm_backward/plan.h"
#include "norm_backward/ring_kernel.cuh"
#include "norm_backward/sum_parts_kernel.cuh"
#include "norm_backward/two_pass_kernels.cuh"

using namespace infuse;
using namespace infuse::norm_backward;

namespace {

constexpr Device kDevice{2, 227 * 1024};

enum class Gate { kNone, kBeforeNorm, kBehindNorm };

struct Case {
  std::int64_t batches, rows, dim;  // x [batches, rows, dim]; dy and dsum have the rows behind one another
  std::int64_t padding;             // elements behind each row of x and dy
  int offset;                       // elements in front, to misalign x
  bool centered, has_weight, has_dsum;
  int dy_terms = 1;
  Gate gate = Gate::kNone;
  bool has_minimum = false;  // one that is in force in about half of the rows
};

template <typename T>
struct Buffer {
  std::vector<char> storage;
  T* data;

  explicit Buffer(std::int64_t elements, int offset = 0) : storage((elements + offset) * sizeof(T) + 16) {
    const auto first = (reinterpret_cast<std::uintptr_t>(storage.data()) + 15) & ~std::uintptr_t{15};
    data = reinterpret_cast<T*>(first) + offset;
    emulation::ranges.push_back({reinterpret_cast<char*>(data), reinterpret_cast<char*>(data + elements)});
    for (std::int64_t i = 0; i < elements; ++i) data[i] = T(NAN);
  }

  void fill(std::int64_t elements, std::mt19937& generator, float around) {
    std::normal_distribution<float> normal(around);
    for (std::int64_t i = 0; i < elements; ++i) data[i] = T(normal(generator));
  }
};

template <typename T>
int alignment_of(const T* data, std::int64_t stride) {
  const std::uint64_t bits = reinterpret_cast<std::uintptr_t>(data) | stride * sizeof(T) | kVectorBytes;
  return static_cast<int>(bits & (~bits + 1));
}

template <DType kX, DType kWeight, int kVecs, Form kForm>
int run_ring(const Plan& plan, const Params& params, unsigned ctas) {
  emulation::set_shared_memory(plan.shared_bytes);
  emulation::launch(ring_kernel<RingTraits<kX, kWeight, kVecs, kForm>>, ctas,
                    {static_cast<unsigned>(plan.threads_per_row), static_cast<unsigned>(plan.rows_per_cta)}, params);
  return static_cast<int>(ctas);
}

template <DType kX, DType kWeight, int kVecs>
int run_ring(const Plan& plan, const Params& params, unsigned ctas) {
  if constexpr (max_cta_threads(kVecs, Form::kLayerNorm) > 0) {
    if (params.mean != nullptr) return run_ring<kX, kWeight, kVecs, Form::kLayerNorm>(plan, params, ctas);
  }
  if constexpr (max_cta_threads(kVecs, Form::kGatedRmsNorm) > 0) {
    if (params.dgate != nullptr) return run_ring<kX, kWeight, kVecs, Form::kGatedRmsNorm>(plan, params, ctas);
  }
  return run_ring<kX, kWeight, kVecs, Form::kRmsNorm>(plan, params, ctas);
}

template <DType kX, int kElems>
int run_two_pass(const Params& params, unsigned parts) {
  using Traits = TwoPassTraits<kX, kElems>;
  const unsigned columns = static_cast<unsigned>(ceil_div(params.row_vecs, kColumnThreads));
  emulation::launch(row_means_kernel<Traits>, params.rows, {kRowThreads}, params);
  emulation::launch(columns_kernel<Traits>, {columns, parts}, {kColumnThreads}, params);
  return static_cast<int>(parts);
}

// The number of parts.
template <DType kX, DType kWeight>
int run(const Plan& plan, const Params& params, int most) {
  const unsigned parts = static_cast<unsigned>(most);
  switch (plan.vecs_per_thread) {
    case 2: return run_ring<kX, kWeight, 2>(plan, params, parts);
    case 4: return run_ring<kX, kWeight, 4>(plan, params, parts);
  }
  constexpr int kWide = kVectorBytes / static_cast<int>(sizeof(Element<kX>));
  return plan.vec_elems == 1 ? run_two_pass<kX, 1>(params, parts) : run_two_pass<kX, kWide>(params, parts);
}

void check_near(const char* what, const Case& c, int config, std::int64_t index, double got, double expected,
                double allowed) {
  if (std::fabs(got - expected) <= allowed) return;
  std::printf("%s, dim %ld, config %d, element %ld: got %g, expected %g within %g\n", what, long(c.dim), config,
              long(index), got, expected, allowed);
  emulation::die("wrong value");
}

template <DType kX, DType kWeight>
void test(const Case& c, int config) {
  using X = Element<kX>;
  using W = Element<kWeight>;
  const std::int64_t rows = c.batches * c.rows, stride = c.dim + c.padding, batch_stride = c.rows * stride + 32;
  const double ulp = sizeof(X) == 4 ? 1e-6 : kX == DType::kFloat16 ? 1e-3 : 8e-3;

  emulation::ranges.clear();
  std::mt19937 generator(static_cast<unsigned>(c.dim + config));
  Buffer<X> x(c.batches * batch_stride, c.offset), dy(rows * stride), dy_1(rows * c.dim), dy_2(rows * c.dim);
  Buffer<X> gate(rows * c.dim), dsum(rows * c.dim), dx(rows * c.dim), dgate(rows * c.dim);
  Buffer<W> weight(c.dim), dweight(c.dim), dbias(c.dim);
  Buffer<float> mean(rows), rstd(rows), row_means(2 * rows);
  x.fill(c.batches * batch_stride, generator, 0.5f);
  dy.fill(rows * stride, generator, 0.25f);
  for (auto* buffer : {&dy_1, &dy_2, &gate, &dsum}) buffer->fill(rows * c.dim, generator, 0.0f);
  weight.fill(c.dim, generator, 1.0f);

  Params params{};
  const std::int64_t sizes[] = {c.batches, c.rows};
  const auto add_rows = [&](const X* data, std::int64_t outer, std::int64_t inner) {
    const std::int64_t strides[] = {outer, inner};
    params.tensors[params.num_tensors].data = data;
    collapse_rows(sizes, strides, 2, &params.tensors[params.num_tensors++].map);
  };
  const auto add_contiguous = [&](const X* data) { add_rows(data, c.rows * c.dim, c.dim); };
  const bool gated = c.gate != Gate::kNone, gate_first = c.gate == Gate::kBeforeNorm;
  add_rows(x.data, batch_stride, stride);
  add_rows(dy.data, c.rows * stride, stride);
  if (gated) add_contiguous(gate.data);
  params.more_dy = params.num_tensors;
  if (c.dy_terms > 1) add_contiguous(dy_1.data);
  if (c.dy_terms > 2) add_contiguous(dy_2.data);
  params.dsum = params.num_tensors;
  if (c.has_dsum) add_contiguous(dsum.data);
  params.weight = c.has_weight ? weight.data : nullptr;
  params.weight_dtype = kWeight;
  params.dx = dx.data;
  params.dgate = gated ? dgate.data : nullptr;
  params.gate_first = gate_first;
  params.gate_is_silu = c.dim % 3 != 0;
  params.rstd = rstd.data;
  params.mean = c.centered ? mean.data : nullptr;
  params.row_means = row_means.data;
  const double minimum = c.has_minimum ? 1.25 : 0;
  params.constant_rstd = c.has_minimum ? static_cast<float>((1 - 1e-6) / std::sqrt(minimum)) : INFINITY;
  params.rows = static_cast<std::uint32_t>(rows);
  params.dim = static_cast<std::uint32_t>(c.dim);
  params.inv_dim = static_cast<float>(1.0 / static_cast<double>(c.dim));
  params.weight_offset = c.has_weight ? 0.5f : 1.0f;

  const int alignment = smaller(alignment_of(x.data, stride), alignment_of(dy.data, c.dim));
  const Problem problem{rows, c.dim, sizeof(X), alignment, sizeof(W), 16, static_cast<int>(params.num_tensors),
                        gated        ? Form::kGatedRmsNorm
                        : c.centered ? Form::kLayerNorm
                                     : Form::kRmsNorm};
  const Plan plan = make_plan(problem, config, kDevice);
  params.row_vecs = static_cast<std::uint32_t>(c.dim / plan.vec_elems);
  params.stages = static_cast<std::uint32_t>(kConfigs[plan.config].stages);
  params.late = kConfigs[plan.config].late;
  const int most = max_parts(plan, problem, kDevice);
  Buffer<float> weight_parts(most * c.dim), bias_parts(most * c.dim);
  params.weight_parts = c.has_weight ? weight_parts.data : nullptr;
  params.bias_parts = c.centered ? bias_parts.data : nullptr;

  std::vector<double> expected_dx(rows * c.dim), expected_dgate(rows * c.dim), expected_dweight(c.dim), expected_dbias(c.dim), scale(c.dim);
  for (std::int64_t row = 0; row < rows; ++row) {
    const X* h = x.data + row / c.rows * batch_stride + row % c.rows * stride;
    const auto upstream = [&](std::int64_t i) {
      const std::int64_t place = row * c.dim + i;
      return double(float(dy.data[row * stride + i])) + (c.dy_terms > 1 ? float(dy_1.data[place]) : 0) +
             (c.dy_terms > 2 ? float(dy_2.data[place]) : 0);
    };
    const auto z = [&](std::int64_t i) { return double(float(gate.data[row * c.dim + i])); };
    const auto sigmoid = [&](std::int64_t i) { return 1 / (1 + std::exp(-z(i))); };
    const auto act = [&](std::int64_t i) { return params.gate_is_silu ? z(i) * sigmoid(i) : sigmoid(i); };
    const auto slope = [&](std::int64_t i) {
      return params.gate_is_silu ? sigmoid(i) * (1 + z(i) * (1 - sigmoid(i))) : sigmoid(i) * (1 - sigmoid(i));
    };
    const auto input = [&](std::int64_t i) { return float(h[i]) * (gate_first ? act(i) : 1.0); };
    const auto after_norm = [&](std::int64_t i) { return upstream(i) * (gated && !gate_first ? act(i) : 1.0); };
    double sum = 0, squares = 0, mean_g = 0, mean_gn = 0;
    for (std::int64_t i = 0; i < c.dim; ++i) sum += input(i);
    const double center = c.centered ? sum / double(c.dim) : 0;
    for (std::int64_t i = 0; i < c.dim; ++i) squares += (input(i) - center) * (input(i) - center);
    squares = squares / double(c.dim) + (c.has_minimum ? 0 : 1e-3);
    mean.data[row] = static_cast<float>(center);
    rstd.data[row] = static_cast<float>(1 / std::sqrt(squares < minimum ? minimum : squares));
    const auto n = [&](std::int64_t i) { return (input(i) - double(mean.data[row])) * rstd.data[row]; };
    const auto factor = [&](std::int64_t i) {
      return c.has_weight ? params.weight_offset + double(float(weight.data[i])) : 1.0;
    };
    for (std::int64_t i = 0; i < c.dim; ++i) {
      const double g = after_norm(i) * factor(i);
      mean_g += c.centered ? g / double(c.dim) : 0;
      mean_gn += squares < minimum ? 0 : g * n(i) / double(c.dim);
    }
    for (std::int64_t i = 0; i < c.dim; ++i) {
      const std::int64_t place = row * c.dim + i;
      const double d = rstd.data[row] * (after_norm(i) * factor(i) - mean_g - n(i) * mean_gn);
      expected_dx[place] = d * (gate_first ? act(i) : 1.0) + (c.has_dsum ? float(dsum.data[place]) : 0.0f);
      expected_dgate[place] = slope(i) * (gate_first ? d * float(h[i]) : upstream(i) * factor(i) * n(i));
      expected_dweight[i] += after_norm(i) * n(i);
      expected_dbias[i] += upstream(i);
      scale[i] += std::fabs(upstream(i)) * (std::fabs(n(i)) + 1);
    }
  }

  SumPartsParams sums{};
  sums.num_parts = static_cast<std::uint32_t>(run<kX, kWeight>(plan, params, most));
  sums.dim = params.dim;
  int count = 0;
  const auto add = [&](const float* parts, W* out) {
    if (parts == nullptr) return;
    sums.parts[count] = parts;
    sums.out[count] = out;
    sums.dtype[count++] = kWeight;
  };
  add(params.weight_parts, dweight.data);
  add(params.bias_parts, dbias.data);
  const unsigned blocks = static_cast<unsigned>(ceil_div(c.dim, kSumColumns));
  if (count > 0) {
    emulation::launch(sum_parts_kernel<kSumColumns>, {blocks, static_cast<unsigned>(count)},
                      {kSumColumns, kSumSlices}, sums);
  }

  const double out_ulp = sizeof(W) == 4 ? 1e-6 : kWeight == DType::kFloat16 ? 1e-3 : 8e-3;
  for (std::int64_t i = 0; i < rows * c.dim; ++i) {
    const double wanted = expected_dx[i];
    // The terms of dx may be larger than what is left of them.
    const double allowed = ulp * (std::fabs(wanted) + 1) + 8e-6 * rstd.data[i / c.dim];
    check_near("dx", c, config, i, float(dx.data[i]), wanted, allowed);
    if (gated) {
      const double gate_allowed = ulp * (std::fabs(expected_dgate[i]) + 1) + 8e-6 * rstd.data[i / c.dim];
      check_near("dgate", c, config, i, float(dgate.data[i]), expected_dgate[i], gate_allowed);
    }
  }
  for (std::int64_t i = 0; i < c.dim; ++i) {
    const double allowed = 1e-6 * (scale[i] + 1);
    if (c.has_weight) {
      check_near("dweight", c, config, i, float(dweight.data[i]), expected_dweight[i],
                 allowed + out_ulp * std::fabs(expected_dweight[i]));
    }
    if (c.centered) {
      check_near("dbias", c, config, i, float(dbias.data[i]), expected_dbias[i],
                 allowed + out_ulp * std::fabs(expected_dbias[i]));
    }
  }
}

}  // namespace

int main() {
  constexpr DType kBFloat16 = DType::kBFloat16, kFloat16 = DType::kFloat16, kFloat32 = DType::kFloat32;
  // batches, rows, dim, padding, offset, centered, weight, dsum
  for (int config = kHeuristic; config < kNumConfigs; ++config) {
    for (const std::int64_t dim : {8, 64, 136, 896, 2048}) {
      const std::int64_t rows = dim > 1000 ? 1 : 2;
      test<kBFloat16, kBFloat16>({1, rows, dim, 0, 0, false, true, true}, config);
      test<kBFloat16, kFloat32>({2, rows, dim, 24, 0, true, true, false}, config);
      test<kFloat16, kFloat32>({3, 1, dim, 8, 0, false, true, false}, config);
      test<kFloat16, kFloat16>({1, rows, dim, 0, 0, true, true, true}, config);
      test<kFloat32, kFloat32>({2, 1, dim, 4, 0, true, false, true}, config);
      test<kBFloat16, kBFloat16>({1, rows, dim, 8, 0, false, true, true, 3}, config);
      test<kFloat32, kFloat32>({1, rows, dim, 0, 0, true, true, false, 2}, config);
      test<kBFloat16, kFloat32>({1, rows, dim, 8, 0, false, true, false, 1, Gate::kBeforeNorm}, config);
      test<kFloat32, kFloat32>({2, rows, dim, 0, 0, false, true, false, 1, Gate::kBehindNorm}, config);
      test<kFloat16, kFloat16>({2, 3, dim, 0, 0, false, true, false, 1, Gate::kNone, true}, config);
    }
    // More rows than the CTAs take while the ring goes round, and one row beyond a full turn.
    const Plan plan = make_plan({1, 64, 2, 16, 2, 16, 2, Form::kRmsNorm}, config, kDevice);
    const std::int64_t turn = kDevice.num_sms * kConfigs[plan.config].ctas_per_sm * plan.rows_per_cta;
    const std::int64_t rows = turn * (kConfigs[plan.config].stages + 1) + 1;
    test<kBFloat16, kBFloat16>({1, rows, 64, 0, 0, false, true, false}, config);
    test<kBFloat16, kBFloat16>({1, rows, 64, 0, 0, false, true, true, 2}, config);
  }
  // Rows that are not aligned or too long: two passes.
  for (const std::int64_t dim : {1, 7, 100, 1001, 20000}) {
    test<kBFloat16, kFloat32>({2, 2, dim, 0, 0, true, true, true}, kHeuristic);
    test<kFloat16, kFloat16>({1, 2, dim, 0, 0, false, true, false}, kHeuristic);
    test<kFloat32, kFloat32>({1, 3, dim, 1, 0, false, false, true}, kHeuristic);
    test<kFloat32, kFloat32>({1, 3, dim, 1, 0, false, true, true, 3, Gate::kNone, true}, kHeuristic);
    test<kBFloat16, kBFloat16>({1, 3, dim, 0, 0, false, true, false, 2, Gate::kBeforeNorm}, kHeuristic);
    test<kFloat32, kFloat32>({1, 3, dim, 0, 0, false, true, false, 2, Gate::kBehindNorm}, kHeuristic);
  }
  test<kBFloat16, kBFloat16>({1, 20, 64, 0, 1, true, true, true}, kHeuristic);
  // The longest rows of the ring.
  test<kBFloat16, kBFloat16>({1, 3, 16384, 0, 0, false, true, true}, kHeuristic);
  test<kBFloat16, kBFloat16>({1, 3, 8192, 0, 0, true, true, false}, kHeuristic);
  std::printf("ok\n");
}
