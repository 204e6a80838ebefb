// From a plan to a kernel launch. Included by the files that instantiate launch_planned.
#pragma once

#include "dispatch.h"
#include "infuse/launch.h"
#include "norm/kernel.cuh"
#include "norm/launch.h"
#include "norm/long_rows.cuh"
#include "norm/ring_kernel.cuh"

namespace infuse::norm {

template <typename Types>
void launch_types(const Target& target, const Plan& plan, const Params& params) {
  const Config& config = kConfigs[plan.config];
  const auto run = [&](auto kernel) {
    Launch launch;
    launch.block = dim3(plan.threads_per_row, config.rows_per_cta);
    launch.grid = dim3(static_cast<unsigned>(ceil_div(params.rows, config.rows_per_cta)));
    launch.starts_early = true;
    launch_kernel(target.op, config.name, kernel, launch, params, target.device, target.stream);
  };
  if (plan.shared_bytes > 0) {
    const auto kernel = ring_kernel<RingTraits<Types>>;
    const unsigned ctas = resident_ctas(target.op, kernel, plan.threads_per_row, plan.shared_bytes, target.device);
    const dim3 grid(ctas < params.rows ? ctas : params.rows), block(plan.threads_per_row);
    const Launch launch{grid, block, plan.shared_bytes, true};
    launch_kernel(target.op, config.name, kernel, launch, params, target.device, target.stream);
  } else if (plan.vecs_per_thread == 0) {
    constexpr int kFull = kVectorBytes / static_cast<int>(sizeof(typename Types::x_type));
    dispatch_int<kFull, 1>(target.op, "elements of a vector", plan.vec_elems, [&](auto elems) {
      run(two_pass_kernel<TwoPassTraits<Types, decltype(elems)::value>>);
    });
  } else {
    dispatch_int<1, 2, 4>(target.op, "vectors a thread", plan.vecs_per_thread, [&](auto vecs) {
      run(register_kernel<RegisterTraits<Types, decltype(vecs)::value>>);
    });
  }
}

template <DType kX, DType kWeight>
void launch_planned(const Target& target, Operand operand, bool center, const Plan& plan, const Params& params) {
  const auto launch = [&](auto form) { launch_types<decltype(form)>(target, plan, params); };
  switch (operand) {
    case Operand::kNone:
      return center ? launch(Types<kX, kWeight, Operand::kNone, true>{})
                    : launch(Types<kX, kWeight, Operand::kNone, false>{});
    case Operand::kResidual:
      return center ? launch(Types<kX, kWeight, Operand::kResidual, true>{})
                    : launch(Types<kX, kWeight, Operand::kResidual, false>{});
    case Operand::kGateBeforeNorm: return launch(Types<kX, kWeight, Operand::kGateBeforeNorm, false>{});
    case Operand::kGateBehindNorm: return launch(Types<kX, kWeight, Operand::kGateBehindNorm, false>{});
  }
}

}  // namespace infuse::norm
