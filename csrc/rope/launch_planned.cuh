// From a plan to a kernel launch. Included by the files that instantiate launch_planned.
#pragma once

#include "dispatch.h"
#include "infuse/launch.h"
#include "rope/kernel.cuh"
#include "rope/launch.h"
#include "rope/narrow.cuh"

namespace infuse::rope {

template <DType kX>
void launch_planned(const char* op, const Plan& plan, bool wide_factors, bool has_norm, const Params& params,
                    unsigned ctas, int device, cudaStream_t stream) {
  using X = Element<kX>;
  const dim3 block(static_cast<unsigned>(plan.lanes), static_cast<unsigned>(plan.groups));
  const auto run = [&](auto kernel) {
    launch_kernel(op, plan.narrow ? "narrow" : kConfigs[plan.config].name, kernel, {dim3(ctas), block}, params, device,
                  stream);
  };
  const auto with_factor = [&](auto factor) {
    using Factor = decltype(factor);
    dispatch_int<1, 2, 4>(op, "heads a lane", plan.heads, [&](auto heads) {
      constexpr int kHeads = decltype(heads)::value;
      has_norm ? run(rope_kernel<Traits<X, Factor, kHeads, true>>) : run(rope_kernel<Traits<X, Factor, kHeads, false>>);
    });
  };
  if (plan.narrow) {
    run(narrow_kernel<X>);
  } else if (wide_factors) {
    with_factor(float{});
  } else {
    with_factor(X{});
  }
}

}  // namespace infuse::rope
