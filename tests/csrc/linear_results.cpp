// Results of linears of few rows that are stored in fp32, on the CPU: the same as those of half precision once widened, bit
// for bit, for every width of store, wide or narrow, up to the last feature and no further.
#include "cuda_on_cpu.h"

#include <random>

#include "skinny_linear/result.cuh"

using namespace infuse;
using namespace infuse::skinny_linear;

namespace {

constexpr std::uint32_t kRows = 3, kFeatures = 21, kStride = 24;
constexpr float kSpecial[] = {NAN, INFINITY, -INFINITY, 3.4e38f, 1e-40f, -0.0f, 70000.0f};
constexpr float kUntouched = -8192.0f;

std::mt19937 generator(3);
std::normal_distribution<float> normal(0, 2);

template <typename Out>
struct Results {
  alignas(16) Out values[kRows * kStride];

  Results() {
    for (Out& value : values) value = Out(kUntouched);
    emulation::ranges.push_back({reinterpret_cast<char*>(values), reinterpret_cast<char*>(values + kRows * kStride)});
  }
};

template <typename T, int kWidth>
void test(bool is_wide, Activation activation) {
  emulation::ranges.clear();
  alignas(16) T bias[kStride], addend[kRows * kStride];
  for (T& value : bias) value = T(normal(generator));
  for (T& value : addend) value = T(normal(generator));
  emulation::ranges.push_back({reinterpret_cast<char*>(bias), reinterpret_cast<char*>(bias + kStride)});
  emulation::ranges.push_back({reinterpret_cast<char*>(addend), reinterpret_cast<char*>(addend + kRows * kStride)});
  Results<T> narrow;
  Results<float> wide;
  Params params{};
  params.activation = activation;
  params.addend = addend;
  params.addend_stride = kStride;
  for (Linear& linear : params.linears) {
    linear.bias = bias;
    linear.out_stride = kStride;
    linear.features = kFeatures;
    linear.is_wide = is_wide;
  }
  for (std::uint32_t row = 0; row < kRows; ++row) {
    for (std::uint32_t feature = 0; feature < kFeatures; feature += kWidth) {
      float sums[2][kWidth], again[2][kWidth];
      for (auto& operand : sums) {
        for (float& sum : operand) sum = generator() % 8 == 0 ? kSpecial[generator() % 7] : normal(generator);
      }
      std::memcpy(again, sums, sizeof(sums));
      params.linears[0].out = narrow.values;
      params.linears[0].out_is_fp32 = false;
      store_results<T>(params, 0, row, feature, sums[0], sums[1]);
      params.linears[0].out = wide.values;
      params.linears[0].out_is_fp32 = true;
      store_results<T>(params, 0, row, feature, again[0], again[1]);
    }
  }
  for (std::uint32_t i = 0; i < kRows * kStride; ++i) {
    const float expected = static_cast<float>(narrow.values[i]), got = wide.values[i];
    const bool exists = i % kStride < kFeatures;
    if (std::memcmp(&got, &expected, sizeof(got)) == 0 && exists == (got != kUntouched)) continue;
    std::printf("width %d, wide %d, feature %u: got %g, expected %g\n", kWidth, is_wide, i % kStride, got, expected);
    emulation::die("a result in fp32");
  }
}

template <typename T>
void test_all() {
  for (int repetition = 0; repetition < 20; ++repetition) {
    for (const bool is_wide : {false, true}) {
      for (const Activation activation : {Activation::kNone, Activation::kSilu}) {
        test<T, 2>(is_wide, activation);
        test<T, 4>(is_wide, activation);
        test<T, 8>(is_wide, activation);
      }
    }
  }
}

}  // namespace

int main() {
  test_all<__nv_bfloat16>();
  test_all<__half>();
  std::printf("ok\n");
}
