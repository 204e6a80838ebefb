// The rotary kernels on the CPU, host code included: every form, configuration, layout and alignment, against double
// precision.
#include "cuda_on_cpu.h"

#include <random>
#include <string>

#include "rope/launch.cpp"
#include "rope/launch_backward.cpp"
#include "rope/launch_backward_planned.cuh"
#include "rope/launch_planned.cuh"
#include "rope/operands.cpp"

using namespace infuse;
using namespace infuse::rope;

namespace infuse::norm_backward {
// The kernel is tested with the backward of norms.
void launch_sum_parts(const SumPartsParams& params, int count, int, cudaStream_t) {
  for (int i = 0; i < count; ++i) {
    for (std::uint32_t column = 0; column < params.dim; ++column) {
      float sum = 0.0f;
      for (std::uint32_t part = 0; part < params.num_parts; ++part) sum += params.parts[i][part * params.dim + column];
      if (params.dtype[i] == DType::kFloat32) static_cast<float*>(params.out[i])[column] = sum;
      if (params.dtype[i] == DType::kFloat16) static_cast<__half*>(params.out[i])[column] = __half(sum);
      if (params.dtype[i] == DType::kBFloat16) static_cast<__nv_bfloat16*>(params.out[i])[column] = __nv_bfloat16(sum);
    }
  }
}
}  // namespace infuse::norm_backward

namespace infuse::rope {
template void launch_planned<DType::kBFloat16>(const char*, const Plan&, DType, bool, const Params&, unsigned, int,
                                               cudaStream_t);
template void launch_planned<DType::kFloat16>(const char*, const Plan&, DType, bool, const Params&, unsigned, int,
                                              cudaStream_t);
template void launch_planned<DType::kFloat32>(const char*, const Plan&, DType, bool, const Params&, unsigned, int,
                                              cudaStream_t);
template void launch_backward_planned<DType::kBFloat16>(const char*, const PreparedBackward&, cudaStream_t);
template void launch_backward_planned<DType::kFloat16>(const char*, const PreparedBackward&, cudaStream_t);
template void launch_backward_planned<DType::kFloat32>(const char*, const PreparedBackward&, cudaStream_t);
}  // namespace infuse::rope

namespace {

using Sizes = std::vector<std::int64_t>;

std::mt19937 generator(1);

// A tensor of any strides in a buffer of its own.
struct Tensor {
  DType dtype;
  Sizes sizes, strides;
  std::vector<char> storage;
  char* data;

  Tensor(DType dtype, Sizes sizes, Sizes strides, int offset, bool is_nan)
      : dtype(dtype), sizes(sizes), strides(strides) {
    std::int64_t last = 0;
    for (std::size_t i = 0; i < sizes.size(); ++i) last += (sizes[i] - 1) * strides[i];
    const std::int64_t bytes = (last + 1) * size_bytes(dtype);
    storage.resize(static_cast<std::size_t>(bytes) + 64);
    const auto first = (reinterpret_cast<std::uintptr_t>(storage.data()) + 15) & ~std::uintptr_t{15};
    data = reinterpret_cast<char*>(first) + offset * size_bytes(dtype);
    emulation::ranges.push_back({data, data + bytes});
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i <= last; ++i) set(i, is_nan ? NAN : normal(generator));
  }

  void set(std::int64_t i, float value) {
    if (dtype == DType::kFloat32) reinterpret_cast<float*>(data)[i] = value;
    if (dtype == DType::kFloat16) reinterpret_cast<__half*>(data)[i] = __half(value);
    if (dtype == DType::kBFloat16) reinterpret_cast<__nv_bfloat16*>(data)[i] = __nv_bfloat16(value);
  }

  double at(const Sizes& index) const {
    std::int64_t i = 0;
    const std::size_t missing = index.size() - sizes.size();
    for (std::size_t d = 0; d < sizes.size(); ++d) i += (sizes[d] == 1 ? 0 : index[d + missing]) * strides[d];
    if (dtype == DType::kFloat32) return reinterpret_cast<const float*>(data)[i];
    if (dtype == DType::kFloat16) return float(reinterpret_cast<const __half*>(data)[i]);
    return float(reinterpret_cast<const __nv_bfloat16*>(data)[i]);
  }

  TensorArg arg(const char* name) const {
    return {name, const_cast<char*>(data), dtype, 0, static_cast<int>(sizes.size()), sizes.data(), strides.data()};
  }
};

Sizes dense(const Sizes& sizes, std::int64_t step = 1) {
  Sizes strides(sizes.size());
  for (std::size_t i = sizes.size(); i-- > 0; step *= sizes[i]) strides[i] = step;
  return strides;
}

struct Norm {
  bool on, has_weight, wide_weight, cast_before_weight;
};

struct Case {
  DType x, cos, sin;
  std::int64_t dim, rotary_dim;
  bool heads_first;  // x [batch, heads, seq_len, dim], else [batch, seq_len, heads, dim]
  std::int64_t padding;
  int offset;
  std::int64_t step;  // between factors; kZipped: cos and sin side by side
};

constexpr std::int64_t kZipped = -1;

double value_of(const Tensor& x, const Tensor* weight, const Norm& norm, const Options& options, Sizes index,
                std::int64_t element) {
  index.back() = element;
  if (!norm.on) return x.at(index);
  double sum = 0;
  for (index.back() = 0; index.back() < x.sizes.back(); ++index.back()) sum += x.at(index) * x.at(index);
  index.back() = element;
  const double rstd = 1 / std::sqrt(sum / static_cast<double>(x.sizes.back()) + options.eps);
  return x.at(index) * rstd * (weight != nullptr ? options.weight_offset + weight->at({element}) : 1.0);
}

// The rotated value at an index, and the sum of its terms' magnitudes, which rounding errors are measured with.
void expect(const Tensor& x, const Tensor* weight, const Tensor* cos, const Tensor* sin, const Norm& norm,
            const Options& options, const Sizes& index, double* value, double* scale) {
  const std::int64_t i = index.back();
  const double own = value_of(x, weight, norm, options, index, i);
  const std::int64_t rotated = cos == nullptr ? 0 : cos->sizes.back() * (options.per_pair ? 2 : 1);
  *value = own;
  *scale = std::fabs(own);
  if (i >= rotated) return;
  const std::int64_t half = rotated / 2;
  const bool is_second = options.interleaved ? i % 2 == 1 : i >= half;
  const std::int64_t partner = options.interleaved ? i ^ 1 : is_second ? i - half : i + half;
  const double other = value_of(x, weight, norm, options, index, partner);
  Sizes at = index;
  const auto factor_index = [&](std::int64_t element) {
    return !options.per_pair ? element : options.interleaved ? element / 2 : element % half;
  };
  at.back() = factor_index(i);
  const double c = cos->at(at);
  if (options.is_backward) at.back() = factor_index(partner);
  const double s = sin->at(at) * (is_second ? 1 : -1) * (options.inverse != options.is_backward ? -1 : 1);
  *value = own * c + other * s;
  *scale = std::fabs(own * c) + std::fabs(other * s);
}

double allowed(DType dtype) { return dtype == DType::kFloat32 ? 1e-6 : dtype == DType::kFloat16 ? 1.5e-3 : 1.2e-2; }

void check_rows(const char* what, const Tensor& x, const Tensor& out, const Tensor* weight, const Tensor* cos,
                const Tensor* sin, const Norm& norm, const Options& options, const std::vector<std::int64_t>& positions) {
  for (Sizes index(x.sizes.size()); index[0] < x.sizes[0];) {
    double value, scale;
    expect(x, weight, cos, sin, norm, options, index, &value, &scale);
    Sizes at = index;
    if (!positions.empty()) at[2] = positions[static_cast<std::size_t>(index[2])];
    const double got = out.at(at);
    if (!(std::fabs(got - value) <= allowed(x.dtype) * (scale + 1e-2))) {
      std::printf("%s [%ld, %ld, %ld, %ld], config %ld: got %g, expected %g\n", what, long(index[0]), long(index[1]),
                  long(index[2]), long(index[3]), long(options.config), got, value);
      emulation::die("wrong value");
    }
    for (std::size_t d = index.size(); d-- > 0;) {
      if (++index[d] < x.sizes[d] || d == 0) break;
      index[d] = 0;
    }
  }
}

Tensor make_x(const Case& c, const Sizes& sizes, bool is_nan) {
  Sizes strides = dense({sizes[0], sizes[1], sizes[2], sizes[3] + c.padding});
  strides[0] += 2 * kVectorBytes;
  return Tensor(c.x, sizes, strides, c.offset, is_nan);
}

void test(const Case& c, const Norm& norm, Options options) {
  emulation::ranges.clear();
  const std::int64_t batch = 2, seq_len = 3, heads = 5, other_heads = 2;
  options.eps = 1e-3;
  options.cast_before_weight = norm.cast_before_weight;
  options.weight_offset = norm.has_weight && !norm.cast_before_weight ? 1.0 : 0.0;
  const auto shape = [&](std::int64_t count) {
    return c.heads_first ? Sizes{batch, count, seq_len, c.dim} : Sizes{batch, seq_len, count, c.dim};
  };
  const Tensor x = make_x(c, shape(heads), false), other = make_x(c, shape(other_heads), false);
  const Tensor out = make_x(c, shape(heads), true), other_out = make_x(c, shape(other_heads), true);
  const std::int64_t factors = options.per_pair ? c.rotary_dim / 2 : c.rotary_dim;
  const Sizes table = c.heads_first ? Sizes{seq_len, factors} : Sizes{seq_len, 1, factors};
  const std::int64_t step = c.step == kZipped ? 2 : c.step;
  Tensor both(c.cos, {table[0], factors, 2}, dense({table[0], factors, 2}), 0, false);
  Tensor cos(c.cos, table, dense(table, step), 0, false), sin(c.sin, table, dense(table, step), 0, false);
  if (c.step == kZipped) {
    cos.data = both.data;
    sin.data = both.data + size_bytes(c.cos);
  }
  const DType weight_dtype = norm.wide_weight ? DType::kFloat32 : c.x;
  const Tensor weight(weight_dtype, {c.dim}, {1}, 0, false), other_weight(weight_dtype, {c.dim}, {1}, 0, false);

  const TensorArg cos_arg = cos.arg("cos"), sin_arg = sin.arg("sin"), weight_arg = weight.arg("weight"),
                  other_arg = other_weight.arg("other_weight");
  const Operand operands[] = {
      {x.arg("x"), out.arg("out"), &cos_arg, &sin_arg, norm.has_weight ? &weight_arg : nullptr, nullptr, norm.on},
      {other.arg("other"), other_out.arg("other_out"), &cos_arg, &sin_arg, norm.has_weight ? &other_arg : nullptr,
       nullptr, norm.on}};
  launch("rope_out", operands, 2, options, nullptr);
  check_rows("x", x, out, norm.has_weight ? &weight : nullptr, &cos, &sin, norm, options, {});
  check_rows("other", other, other_out, norm.has_weight ? &other_weight : nullptr, &cos, &sin, norm, options, {});
}

void test_cache_write(DType dtype, bool wide_positions, const Options& options) {
  emulation::ranges.clear();
  const std::int64_t batch = 2, seq_len = 3, heads = 6, kv_heads = 2, dim = 64, cache_len = 9;
  const Norm norm{true, true, false, false};
  const Sizes kv{batch, kv_heads, seq_len, dim}, cached{batch, kv_heads, cache_len, dim}, table{seq_len, dim};
  // q, k and v are views of one packed projection [batch, seq_len, all heads, dim].
  const std::int64_t row = (heads + 2 * kv_heads) * dim;
  const Sizes strides{seq_len * row, dim, row, 1};
  const Tensor q(dtype, {batch, heads, seq_len, dim}, strides, 0, false), k(dtype, kv, strides, 0, false);
  const Tensor v(dtype, kv, strides, 0, false), out(dtype, q.sizes, strides, 0, true);
  Tensor k_cache(dtype, cached, dense(cached), 0, true), v_cache(dtype, cached, dense(cached), 0, true);
  const Tensor cos(dtype, table, dense(table), 0, false), sin(dtype, table, dense(table), 0, false);
  const Tensor weight(dtype, {dim}, {1}, 0, false);
  const std::vector<std::int64_t> expected{7, 0, 3};
  const std::vector<std::int64_t> wide{7, 0, 3 - cache_len};
  const std::vector<std::int32_t> narrow(wide.begin(), wide.end());
  const char* data = wide_positions ? reinterpret_cast<const char*>(wide.data())
                                    : reinterpret_cast<const char*>(narrow.data());
  emulation::ranges.push_back({data, data + (wide_positions ? 24 : 12)});
  const PositionsArg positions{data, wide_positions, 0, 3, 1};
  const TensorArg cos_arg = cos.arg("cos"), sin_arg = sin.arg("sin"), weight_arg = weight.arg("weight");
  const Operand operands[] = {
      {q.arg("q"), out.arg("out"), &cos_arg, &sin_arg, &weight_arg, nullptr, true},
      {k.arg("k"), k_cache.arg("k_cache"), &cos_arg, &sin_arg, nullptr, &positions, true},
      {v.arg("v"), v_cache.arg("v_cache"), nullptr, nullptr, nullptr, &positions, false}};
  launch("rope_cache_write_out", operands, 3, options, nullptr);
  check_rows("q", q, out, &weight, &cos, &sin, norm, options, {});
  check_rows("k", k, k_cache, nullptr, &cos, &sin, norm, options, expected);
  check_rows("v", v, v_cache, nullptr, nullptr, nullptr, {}, options, expected);
  for (const Tensor* cache : {&k_cache, &v_cache}) {
    for (std::int64_t at = 0; at < cache_len; ++at) {
      const bool is_written = at == 7 || at == 0 || at == 3;
      if (std::isnan(cache->at({1, 1, at, dim - 1})) == is_written) emulation::die("a cache row that is not its own");
    }
  }
}

// The gradients of one tensor's rows against the formula, and the sums for its weight's.
void check_gradients(const Tensor& dy, const Tensor& x, const Tensor& dx, const Tensor* weight, const Tensor* dweight,
                     const Tensor& cos, const Tensor& sin, const Options& options) {
  const std::int64_t dim = x.sizes.back();
  std::vector<double> sums(static_cast<std::size_t>(dim)), scales(static_cast<std::size_t>(dim));
  std::vector<double> g(sums.size()), w(sums.size());
  for (Sizes index(4); index[0] < x.sizes[0];) {
    double squares = 0, along = 0, largest = 0, ignored;
    for (index[3] = 0; index[3] < dim; ++index[3]) {
      const auto i = static_cast<std::size_t>(index[3]);
      expect(dy, nullptr, &cos, &sin, {}, options, index, &g[i], &ignored);
      w[i] = weight != nullptr ? options.weight_offset + weight->at({index[3]}) : 1.0;
      squares += x.at(index) * x.at(index);
      along += g[i] * w[i] * x.at(index);
      largest = std::fmax(largest, std::fabs(g[i] * w[i]));
    }
    const double rstd = 1 / std::sqrt(squares / static_cast<double>(dim) + options.eps);
    for (index[3] = 0; index[3] < dim; ++index[3]) {
      const auto i = static_cast<std::size_t>(index[3]);
      const double n = x.at(index) * rstd;
      const double expected = rstd * (g[i] * w[i] - n * along * rstd / static_cast<double>(dim));
      if (!(std::fabs(dx.at(index) - expected) <= allowed(x.dtype) * (std::fabs(expected) + 1e-1 * rstd * largest))) {
        std::printf("dx: got %g, expected %g\n", dx.at(index), expected);
        emulation::die("wrong gradient");
      }
      sums[i] += g[i] * n;
      scales[i] += std::fabs(g[i] * n);
    }
    index[3] = 0;
    for (std::size_t d = 3; d-- > 0;) {
      if (++index[d] < x.sizes[d] || d == 0) break;
      index[d] = 0;
    }
  }
  for (std::int64_t i = 0; dweight != nullptr && i < dim; ++i) {
    const double expected = sums[static_cast<std::size_t>(i)];
    if (!(std::fabs(dweight->at({i}) - expected) <= allowed(dweight->dtype) * scales[static_cast<std::size_t>(i)])) {
      std::printf("dweight[%ld]: got %g, expected %g\n", long(i), dweight->at({i}), expected);
      emulation::die("wrong gradient of a weight");
    }
  }
}

void test_norm_backward(const Case& c, const Norm& norm, Options options, std::int64_t seq_len) {
  emulation::ranges.clear();
  options.eps = 1e-3;
  options.is_backward = true;
  options.weight_offset = norm.has_weight ? 1.0 : 0.0;
  const std::int64_t batch = 2, heads[] = {11, 2};
  const std::int64_t factors = options.per_pair ? c.rotary_dim / 2 : c.rotary_dim;
  const Sizes table = c.heads_first ? Sizes{seq_len, factors} : Sizes{seq_len, 1, factors};
  const Tensor cos(c.cos, table, dense(table), 0, false), sin(c.sin, table, dense(table), 0, false);
  const TensorArg cos_arg = cos.arg("cos"), sin_arg = sin.arg("sin");
  const DType weight_dtype = norm.wide_weight ? DType::kFloat32 : c.x;
  std::vector<Tensor> dy, x, dx, weight, dweight;
  for (const std::int64_t count : heads) {
    const Sizes own{batch, count, seq_len, c.dim}, other{batch, seq_len, count, c.dim};
    const Sizes& sizes = c.heads_first ? own : other;
    dy.push_back(Tensor(c.x, sizes, dense(sizes), 0, false));
    x.push_back(make_x(c, sizes, false));
    dx.push_back(make_x(c, sizes, true));
    weight.push_back(Tensor(weight_dtype, {c.dim}, {1}, 0, false));
    dweight.push_back(Tensor(weight_dtype, {c.dim}, {1}, 0, true));
  }
  const TensorArg x_args[] = {x[0].arg("x"), x[1].arg("other")};
  const TensorArg weight_args[] = {weight[0].arg("weight"), weight[1].arg("other_weight")};
  Operand operands[2];
  for (std::size_t i = 0; i < 2; ++i) {
    operands[i] = {dy[i].arg("dy"), dx[i].arg("dx"), &cos_arg, &sin_arg, norm.has_weight ? &weight_args[i] : nullptr,
                   nullptr, true, &x_args[i]};
  }
  const PreparedBackward prepared = prepare_backward("qk_norm_rope_bwd_out", operands, 2, options);
  const Tensor workspace(DType::kFloat32, {prepared.workspace_floats}, {1}, 0, true);
  void* const dweights[] = {dweight[0].data, dweight[1].data};
  launch_backward("qk_norm_rope_bwd_out", prepared, reinterpret_cast<float*>(workspace.data), dweights, nullptr);
  for (std::size_t i = 0; i < 2; ++i) {
    check_gradients(dy[i], x[i], dx[i], norm.has_weight ? &weight[i] : nullptr, norm.has_weight ? &dweight[i] : nullptr,
                    cos, sin, options);
  }
}

void test_layout() {
  Layout layout;
  // [batch, seq_len, heads] of a contiguous tensor, one table for all batches.
  const Dim plain[] = {{2, 60, 60, 0, 0}, {3, 20, 20, 4, 4}, {5, 4, 4, 0, 0}};
  if (!find_layout(plain, 3, &layout) || layout.heads.size != 5 || layout.inner.size != 3 || layout.outer.size != 2) {
    emulation::die("find_layout: plain");
  }
  // Grouped heads are one dimension again; a table for each position of each batch makes one of the first two.
  const Dim grouped[] = {{2, 120, 120, 12, 12}, {3, 40, 40, 4, 4}, {5, 8, 8, 0, 0}, {2, 4, 4, 0, 0}};
  if (!find_layout(grouped, 4, &layout) || layout.heads.size != 10 || layout.inner.size != 6 || layout.outer.size != 1) {
    emulation::die("find_layout: grouped");
  }
  const Dim scattered[] = {{2, 999, 60, 1, 1}, {3, 20, 20, 50, 50}, {5, 7, 4, 3, 3}};
  if (find_layout(scattered, 3, &layout)) emulation::die("find_layout: three dimensions and no heads");
}

}  // namespace

int main() {
  constexpr DType kBFloat16 = DType::kBFloat16, kFloat16 = DType::kFloat16, kFloat32 = DType::kFloat32;
  test_layout();
  const Norm plain{}, norm{true, true, false, false}, cast{true, true, false, true}, wide{true, true, true, false};
  const Norm bare{true, false, false, false};
  for (int form = 0; form < 32; ++form) {
    Options options;
    options.interleaved = form & 1;
    options.per_pair = form & 2;
    options.inverse = form & 4;
    options.is_backward = form & 8;
    options.upcast = form & 16;
    for (const bool heads_first : {false, true}) {
      test({kBFloat16, kBFloat16, kBFloat16, 64, 64, heads_first, 0, 0, 1}, plain, options);
      test({kBFloat16, kFloat32, kFloat32, 80, 32, heads_first, 8, 0, 1}, norm, options);
      test({kFloat16, kFloat16, kFloat16, 96, 64, heads_first, 0, 0, 2}, cast, options);
      test({kFloat16, kFloat32, kFloat32, 32, 32, heads_first, 0, 1, 2}, wide, options);
      test({kBFloat16, kFloat32, kFloat32, 64, 32, heads_first, 0, 0, kZipped}, plain, options);
      test({kBFloat16, kBFloat16, kBFloat16, 64, 64, heads_first, 0, 0, kZipped}, norm, options);
      test({kFloat32, kFloat32, kFloat32, 64, 48, heads_first, 0, 0, kZipped}, bare, options);
      test({kFloat32, kFloat32, kFloat32, 40, 24, heads_first, 4, 0, 1}, bare, options);
      test({kFloat32, kBFloat16, kFloat16, 40, 24, heads_first, 4, 0, 1}, norm, options);
      test({kBFloat16, kBFloat16, kBFloat16, 21, 6, heads_first, 0, 0, 1}, wide, options);
    }
  }
  for (int form = 0; form < 8; ++form) {
    Options options;
    options.interleaved = form & 1;
    options.per_pair = form & 2;
    options.inverse = form & 4;
    for (const bool heads_first : {false, true}) {
      test_norm_backward({kBFloat16, kBFloat16, kBFloat16, 64, 64, heads_first, 0, 0, 1}, norm, options, 3);
      test_norm_backward({kFloat16, kFloat32, kFloat32, 80, 32, heads_first, 8, 0, 1}, wide, options, 3);
      test_norm_backward({kFloat32, kFloat32, kFloat32, 64, 48, heads_first, 4, 0, 1}, bare, options, 3);
    }
  }
  test_norm_backward({kBFloat16, kFloat32, kFloat32, 512, 512, false, 0, 0, 1}, norm, {}, 2);
  test_norm_backward({kBFloat16, kBFloat16, kBFloat16, 16, 16, true, 0, 0, 1}, norm, {}, 300);
  num_sms = 1;  // so that a CTA goes round more than once
  test_norm_backward({kFloat32, kFloat32, kFloat32, 256, 256, false, 0, 0, 1}, norm, {}, 40);
  num_sms = 132;
  for (int config = kHeuristic; config < kNumConfigs; ++config) {
    Options options;
    options.config = config;
    for (const std::int64_t dim : {8, 16, 24, 48, 128, 192, 256, 512, 1000}) {
      const std::int64_t rotary_dim = dim / 16 * 16;
      test({kBFloat16, kBFloat16, kBFloat16, dim, rotary_dim, false, 0, 0, 1}, norm, options);
      test({kBFloat16, kFloat32, kFloat32, dim, rotary_dim, true, 0, 0, 1}, plain, options);
      test({kFloat32, kFloat32, kFloat32, dim, rotary_dim, false, 0, 0, 1}, wide, options);
    }
    for (const bool wide_positions : {false, true}) {
      test_cache_write(kBFloat16, wide_positions, options);
      test_cache_write(kFloat32, wide_positions, options);
    }
  }
  std::printf("ok\n");
}
