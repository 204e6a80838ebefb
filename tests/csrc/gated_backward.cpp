// The one-pass backward of a gated activation on the CPU, host code included: every configuration, activation, dtype
// and alignment, against double precision; and the order in which handed over tiles are computed.
#include "cuda_on_cpu.h"

#include <random>
#include <set>

#include "gated_backward/launch.cpp"
#include "gated_backward/launch_planned.cuh"
#include "handed_gemm/order.h"

using namespace infuse;
using namespace infuse::gated_backward;

namespace infuse::gated_backward {
template void launch_planned<DType::kBFloat16>(const Plan&, const Params&, int, cudaStream_t);
template void launch_planned<DType::kFloat16>(const Plan&, const Params&, int, cudaStream_t);
}  // namespace infuse::gated_backward

namespace {

std::mt19937 generator(3);

// A matrix behind `offset` elements; NaN where nothing is to be read.
template <typename T>
struct Matrix {
  std::int64_t sizes[2], strides[2];
  std::vector<T> storage;
  T* data;

  Matrix(std::int64_t rows, std::int64_t columns, std::int64_t padding, int offset, bool random)
      : sizes{rows, columns}, strides{columns + padding, 1}, storage((columns + padding) * rows + 16, T(NAN)) {
    const auto address = reinterpret_cast<std::uintptr_t>(storage.data());
    data = reinterpret_cast<T*>((address + 15) / 16 * 16) + offset;
    std::normal_distribution<float> normal(0, 2);
    for (std::int64_t i = 0; random && i < rows * columns; ++i) at(i / columns, i % columns) = T(normal(generator));
    emulation::ranges.push_back({reinterpret_cast<char*>(data), reinterpret_cast<char*>(data + rows * strides[0])});
  }
  T& at(std::int64_t row, std::int64_t column) { return data[row * strides[0] + column]; }
  TensorArg arg(const char* name, DType dtype) { return {name, data, dtype, 0, 2, sizes, strides}; }
};

void expect(double got, double wanted, double bound, const char* what) {
  if (std::abs(got - wanted) <= bound) return;
  std::printf("%s: got %g, expected %g\n", what, got, wanted);
  emulation::die(what);
}

struct Exact {
  double act, slope;
};

Exact activation(Activation kind, double g) {
  if (kind == Activation::kSilu) {
    const double s = 1 / (1 + std::exp(-g));
    return {g * s, s * (1 + g * (1 - s))};
  }
  if (kind == Activation::kGeluTanh) {
    const double beta = std::sqrt(2 / M_PI), t = std::tanh(beta * (g + 0.044715 * g * g * g));
    return {g / 2 * (1 + t), (1 + t) / 2 + g / 2 * (1 - t * t) * beta * (1 + 3 * 0.044715 * g * g)};
  }
  const double cdf = (1 + std::erf(g / std::sqrt(2.0))) / 2;
  return {g * cdf, cdf + g * std::exp(-g * g / 2) / std::sqrt(2 * M_PI)};
}

template <DType kDType>
void test(std::int64_t rows, std::int64_t dim, Activation kind, int config, int offset, bool keeps) {
  using T = Element<kDType>;
  emulation::ranges.clear();
  Matrix<T> dout(rows, dim, 8, offset, true), gate_up(rows, 2 * dim, 16, 0, true);
  Matrix<T> dgate_up(rows, 2 * dim, 0, 0, false), out(rows, dim, 0, 0, false);
  const TensorArg out_arg = out.arg("out", kDType);
  launch({dout.arg("dout", kDType), gate_up.arg("gate_up", kDType), dgate_up.arg("dgate_up", kDType),
          keeps ? &out_arg : nullptr, kind, config},
         nullptr);
  const double eps = kDType == DType::kBFloat16 ? 1.0 / 256 : 1.0 / 2048;
  for (std::int64_t i = 0; i < rows * dim; ++i) {
    const std::int64_t row = i / dim, column = i % dim;
    const double d = float(dout.at(row, column)), u = float(gate_up.at(row, dim + column));
    const Exact exact = activation(kind, float(gate_up.at(row, column)));
    const double dgate = d * u * exact.slope, dup = d * exact.act, product = exact.act * u;
    expect(float(dgate_up.at(row, column)), dgate, eps * std::abs(dgate) + 1e-5, "dgate");
    expect(float(dgate_up.at(row, dim + column)), dup, eps * std::abs(dup) + 1e-5, "dup");
    if (keeps) expect(float(out.at(row, column)), product, 2 * eps * std::abs(product) + 1e-5, "out");
    if (!keeps && !std::isnan(float(out.at(row, column)))) emulation::die("out was written");
  }
}

// Each tile once.
void test_order(std::int64_t rows, std::int64_t columns, int band) {
  const handed_gemm::TileOrder order = handed_gemm::order_tiles(rows, columns, band);
  std::set<std::pair<std::uint32_t, std::uint32_t>> seen;
  for (std::uint32_t number = 0; number < order.tiles; ++number) {
    const handed_gemm::TilePlace place = handed_gemm::place_of_tile(order, number);
    if (place.row >= rows || place.column >= columns) emulation::die("a tile behind the end");
    if (!seen.insert({place.row, place.column}).second) emulation::die("a tile twice");
  }
  const auto wanted = ceil_div(rows, handed_gemm::kTileRows) * ceil_div(columns, handed_gemm::kTileColumns);
  if (static_cast<std::int64_t>(seen.size()) != wanted) emulation::die("tiles left out");
}

}  // namespace

int main() {
  for (const Activation kind : {Activation::kSilu, Activation::kGeluTanh, Activation::kGeluErf}) {
    for (int config = kHeuristic; config < kNumConfigs; ++config) {
      for (const std::int64_t dim : {1, 7, 8, 1000}) {
        test<DType::kBFloat16>(3, dim, kind, config, 0, true);
        test<DType::kFloat16>(5, dim, kind, config, dim % 3, false);
      }
    }
  }
  test<DType::kBFloat16>(0, 8, Activation::kSilu, kHeuristic, 0, true);
  for (const std::int64_t rows : {1, 128, 129, 2500, 8192}) {
    for (const int band : {1, 4, 16}) test_order(rows, 14336, band);
    test_order(rows, 8, 8);
  }
  std::puts("ok");
}
