// A norm in two halves on the CPU, against double precision: what the linear before it leaves, the scaled results and sums
// of their squares, and what those make of each row in the linear behind it, for every number of rows and of threads.
#include "cuda_on_cpu.h"

#include <deque>
#include <random>

#include "skinny_linear/plan.h"
#include "skinny_linear/split_norm.cuh"

using namespace infuse;
using namespace infuse::skinny_linear;

namespace {

constexpr float kEps = 1e-5f;
using T = __nv_bfloat16;

std::mt19937 generator(5);
std::normal_distribution<float> normal(0, 2);
std::deque<std::vector<char>> storage;

template <typename Element>
Element* make(std::size_t elements, bool poisoned = false) {
  std::vector<char>& bytes = storage.emplace_back(elements * sizeof(Element) + 16);
  auto* data = reinterpret_cast<Element*>((reinterpret_cast<std::uintptr_t>(bytes.data()) + 15) & ~std::uintptr_t{15});
  emulation::ranges.push_back({reinterpret_cast<char*>(data), reinterpret_cast<char*>(data + elements)});
  for (std::size_t i = 0; i < elements; ++i) data[i] = Element(poisoned ? NAN : normal(generator));
  return data;
}

struct Factors {
  Params base;
  std::uint32_t threads;
  float* out;
};

template <int kRows>
void factors_kernel(const Factors& params) {
  put_row_factors<kRows>(params.base, params.threads, params.out);
}

void require(bool holds, const char* what, std::uint32_t row, std::uint32_t dim, double got, double expected) {
  if (holds) return;
  std::printf("%s, row %u of %u: got %g, expected %g\n", what, row, dim, got, expected);
  std::exit(1);
}

// The first half, of results that are stored in fp32 or not.
Params first_half(std::uint32_t rows, std::uint32_t dim, bool has_weight, bool wide) {
  Params params{};
  Linear& linear = params.linears[0];
  linear.features = dim;
  linear.out_stride = dim + 8;
  linear.is_wide = true;
  linear.out_is_fp32 = wide;
  linear.out = wide ? static_cast<void*>(make<float>(rows * (dim + 8))) : make<T>(rows * (dim + 8));
  params.addend = make<T>(rows * dim);
  params.addend_stride = dim;
  params.norm.weight = has_weight ? make<T>(dim) : nullptr;
  params.norm.weight_offset = has_weight ? 0.5f : 1.0f;
  params.split_norm.scaled = make<T>(rows * dim, true);
  params.split_norm.squares_out = make<float>(rows * dim / kSquaresWidth, true);
  for (std::uint32_t row = 0; row < rows; ++row) {
    for (std::uint32_t feature = 0; feature < dim; feature += kSquaresWidth) {
      float sums[kSquaresWidth], up[kSquaresWidth] = {};
      for (float& sum : sums) sum = normal(generator);
      store_results<T>(params, 0, row, feature, sums, up);
      double squares = 0.0;
      for (std::uint32_t i = feature; i < feature + kSquaresWidth; ++i) {
        const std::size_t place = row * linear.out_stride + i;
        const float out = wide ? static_cast<float*>(linear.out)[place] : float(static_cast<T*>(linear.out)[place]);
        squares += double{out} * out;
        const float weight = has_weight ? float(static_cast<const T*>(params.norm.weight)[i]) + 0.5f : 1.0f;
        const float got = float(static_cast<T*>(params.split_norm.scaled)[row * dim + i]);
        require(got == float(T(out * weight)), "a scaled result", row, dim, got, out * weight);
      }
      const float got = params.split_norm.squares_out[(row * dim + feature) / kSquaresWidth];
      require(std::fabs(got - squares) <= 1e-6 * squares, "a sum of squares", row, dim, got, squares);
    }
  }
  return params;
}

template <int kRows>
void second_half(const Params& first, std::uint32_t rows, std::uint32_t dim, std::uint32_t threads, bool as_minimum) {
  Factors params{};
  params.base.rows = rows;
  params.base.dim = dim;
  params.base.norm.eps = as_minimum ? 4.0f : kEps;
  params.base.norm.eps_as_minimum = as_minimum;
  params.base.norm.inv_dim = 1.0f / static_cast<float>(dim);
  params.base.split_norm.squares = first.split_norm.squares_out;
  params.threads = threads;
  params.out = make<float>(kRows, true);
  emulation::set_shared_memory(16);
  emulation::launch(factors_kernel<kRows>, 1, emulation::Index{threads}, params);
  for (std::uint32_t row = 0; row < kRows; ++row) {
    if (row >= rows) {
      require(std::isnan(params.out[row]), "a row that does not exist", row, dim, params.out[row], NAN);
      continue;
    }
    double mean = 0.0;
    for (std::uint32_t i = 0; i < dim / kSquaresWidth; ++i) {
      mean += first.split_norm.squares_out[row * dim / kSquaresWidth + i] / static_cast<double>(dim);
    }
    const double eps = params.base.norm.eps, got = params.out[row];
    const double expected = 1.0 / std::sqrt(as_minimum ? std::fmax(mean, eps) : mean + eps);
    require(std::fabs(got - expected) <= 1e-5 * expected, "a factor", row, dim, got, expected);
  }
}

}  // namespace

int main() {
  for (const std::uint32_t dim : {16u, 48u, 896u, 1040u}) {
    for (const std::uint32_t rows : {9u, 16u, 21u, 32u, 64u}) {
      storage.clear();
      emulation::ranges.clear();
      const Params first = first_half(rows, dim, rows != 21, rows == 32);
      for (const std::uint32_t threads : {128u, 256u}) {
        for (const bool as_minimum : {false, true}) {
          if (rows <= 16) second_half<16>(first, rows, dim, threads, as_minimum);
          if (rows <= 32) second_half<32>(first, rows, dim, threads, as_minimum);
          second_half<64>(first, rows, dim, threads, as_minimum);
        }
      }
    }
  }
  std::printf("ok\n");
}
