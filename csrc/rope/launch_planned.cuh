// From a plan to a kernel launch. Included by the files that instantiate launch_planned.
#pragma once

#include "dispatch.h"
#include "infuse/launch.h"
#include "rope/kernel.cuh"
#include "rope/launch.h"
#include "rope/narrow.cuh"

namespace infuse::rope {

template <DType kX>
void launch_planned(const char* op, const Plan& plan, DType factors, bool has_norm, const Params& params, unsigned ctas,
                    int device, cudaStream_t stream) {
  using X = Element<kX>;
  const dim3 block(static_cast<unsigned>(plan.lanes), static_cast<unsigned>(plan.groups));
  const auto run = [&](auto kernel) {
    launch_kernel(op, plan.narrow ? "narrow" : kConfigs[plan.config].name, kernel, {dim3(ctas), block, 0, true}, params, device,
                  stream);
  };
  const auto compute = [&](auto factor, auto arithmetic) {
    dispatch_int<1, 2, 4>(op, "heads a lane", plan.heads, [&](auto heads) {
      constexpr int kHeads = decltype(heads)::value;
      constexpr Arithmetic kArithmetic = decltype(arithmetic)::value;
      has_norm ? run(rope_kernel<Traits<X, decltype(factor), kArithmetic, kHeads, true>>)
               : run(rope_kernel<Traits<X, decltype(factor), kArithmetic, kHeads, false>>);
    });
  };
  constexpr std::integral_constant<Arithmetic, Arithmetic::kWide> kWide;
  if (plan.narrow) {
    run(narrow_kernel<X>);
  } else if (factors == DType::kFloat32) {
    compute(float{}, kWide);
  } else if constexpr (sizeof(X) == 2) {
    if (params.rounds_products) {
      compute(X{}, std::integral_constant<Arithmetic, Arithmetic::kRounded>{});
    } else {
      compute(X{}, kWide);
    }
  }
}

}  // namespace infuse::rope
