// The cross entropy kernels on the CPU: the configurations without clusters, odd sizes, targets that are ignored or
// out of range, label smoothing and a soft cap, against double precision; and what is planned.
#include "cuda_on_cpu.h"

#include <algorithm>
#include <random>

inline float __log2f(float x) { return std::log2(x); }
inline std::size_t __cvta_generic_to_shared(const void*) { return 0; }
using std::min;

#include "cross_entropy/kernel.cuh"
#include "cross_entropy/scale.cuh"

using namespace infuse;
using namespace infuse::cross_entropy;

namespace {

constexpr Device kHopper{228 * 1024, 227 * 1024, true}, kAmpere{100 * 1024, 99 * 1024, false};
static_assert(make_plan({128256, 2, true}, kHeuristic, kHopper).parts == 2);
static_assert(make_plan({128256, 4, true}, kHeuristic, kHopper).parts == 4);
static_assert(make_plan({32000, 2, true}, kHeuristic, kHopper).threads == 512);
static_assert(make_plan({128256, 2, true}, kHeuristic, kAmpere).config == 0);
static_assert(make_plan({128256, 2, true}, 2, kAmpere).parts == 1);
static_assert(make_plan({128256, 2, false}, kHeuristic, kHopper).shared_bytes == 0);
static_assert(make_plan({1 << 20, 4, true}, 1, kHopper).shared_bytes <= 113 * 1024);

constexpr std::int64_t kIgnored = -100;

struct Case {
  std::int64_t vocab;
  float smoothing = 0, softcap = 0, scale = 1;
  int config = 0;
  int room = 1 << 30;  // at most, of vectors in shared memory
};

void expect(double got, double wanted, double tolerance, const char* what) {
  if (std::isnan(wanted) ? std::isnan(got) : std::abs(got - wanted) <= tolerance * (1 + std::abs(wanted))) return;
  std::printf("%s: got %g, expected %g\n", what, got, wanted);
  emulation::die(what);
}

template <DType kDType>
void test(const Case& c) {
  using T = Element<kDType>;
  constexpr std::int64_t kRows = 4;
  const std::int64_t stride = (c.vocab + 15) / 8 * 8;
  std::vector<char> storage(kRows * stride * sizeof(T) + 16);
  T* logits = reinterpret_cast<T*>((reinterpret_cast<std::uintptr_t>(storage.data()) + 15) & ~std::uintptr_t{15});
  std::mt19937 generator(7);
  std::normal_distribution<float> normal(0, 3);
  for (std::int64_t i = 0; i < kRows * stride; ++i) logits[i] = T(i % stride < c.vocab ? normal(generator) : NAN);
  const std::vector<T> before(logits, logits + kRows * stride);
  const std::vector<std::int64_t> target{c.vocab - 1, kIgnored, c.vocab / 2, c.vocab};
  std::vector<float> loss(kRows, 0.5f);
  emulation::ranges = {{reinterpret_cast<char*>(logits), reinterpret_cast<char*>(logits + kRows * stride)}};

  const Plan plan = make_plan({c.vocab, sizeof(T), true}, c.config, kHopper);
  Params params{};
  params.logits = logits;
  params.target = target.data();
  params.scale = &c.scale;
  params.loss = loss.data();
  params.row_stride = stride;
  params.ignore_index = kIgnored;
  params.rows = kRows;
  params.vocab = static_cast<std::uint32_t>(c.vocab);
  params.parts = 1;
  params.cached_vecs = static_cast<std::uint32_t>(std::min(plan.cached_vecs, c.room));
  params.label_smoothing = c.smoothing;
  params.softcap = c.softcap;
  emulation::set_shared_memory(plan.shared_bytes);
  for (const bool gradient : {false, true}) {
    params.gradient = gradient;
    const emulation::Index block{static_cast<unsigned>(plan.threads)};
    if (c.softcap == 0) {
      emulation::launch(rows_kernel<kDType, false>, kRows, block, params);
    } else {
      emulation::launch(rows_kernel<kDType, true>, kRows, block, params);
    }
    const bool same = std::memcmp(logits, before.data(), before.size() * sizeof(T)) == 0;
    if (!gradient && !same) emulation::die("logits changed");
    for (std::int64_t row = 0; row < kRows; ++row) {
      std::vector<double> z(c.vocab), slope(c.vocab, 1.0);
      double sum = 0, total = 0;
      for (std::int64_t i = 0; i < c.vocab; ++i) {
        z[i] = float(before[row * stride + i]);
        if (c.softcap != 0) {
          const double tanh = std::tanh(z[i] / c.softcap);
          z[i] = c.softcap * tanh;
          slope[i] = 1 - tanh * tanh;
        }
        sum += std::exp(z[i]);
        total += z[i];
      }
      const std::int64_t t = target[row];
      const double lse = std::log(sum), s = c.smoothing;
      const bool inside = t >= 0 && t < c.vocab;
      const double right = inside ? (1 - s) * (lse - z[t]) + s * (lse - total / c.vocab) : t == kIgnored ? 0 : NAN;
      expect(loss[row], right, 1e-5, "loss");
      for (std::int64_t i = 0; gradient && i < c.vocab; ++i) {
        const double p = std::exp(z[i] - lse) - (1 - s) * (i == t) - s / double(c.vocab);
        const double wanted = inside ? c.scale * p * slope[i] : right;
        expect(float(logits[row * stride + i]), wanted, sizeof(T) == 4 ? 1e-5 : 5e-3, "gradient");
      }
    }
  }
}

template <DType kDType>
void test_scale(std::size_t size, float factor) {
  using T = Element<kDType>;
  alignas(16) static T data[5000];
  for (std::size_t i = 0; i < size; ++i) data[i] = T(float(i % 97));
  emulation::ranges = {{reinterpret_cast<char*>(data), reinterpret_cast<char*>(data + size)}};
  emulation::launch(scale_kernel<kDType>, 2, {kScaleThreads}, ScaleParams{data, &factor, size});
  for (std::size_t i = 0; i < size; ++i) expect(float(data[i]), double(i % 97) * factor, 5e-3, "scaled");
}

}  // namespace

int main() {
  for (const std::int64_t vocab : {1, 7, 8, 1003, 9001}) {
    for (const int config : {0, 1}) {
      test<DType::kBFloat16>({vocab, 0.1f, 0, 2.0f, config});
      test<DType::kFloat32>({vocab, 0, 0, 0.5f, config, 100});
    }
  }
  test<DType::kFloat16>({4099, 0, 5.0f, 1.0f, 1, 17});
  test<DType::kBFloat16>({40'001, 0.1f, 5.0f, 1.0f, 0, 2000});
  for (const float factor : {1.0f, 0.5f}) {
    test_scale<DType::kBFloat16>(5000, factor);
    test_scale<DType::kFloat32>(9, factor);
  }
  std::puts("ok");
}
