// From a plan to a kernel launch. Included by the files that instantiate launch_planned.
#pragma once

#include "dispatch.h"
#include "infuse/launch.h"
#include "norm/kernel.cuh"
#include "norm/launch.h"
#include "norm/long_rows.cuh"

namespace infuse::norm {

template <typename Types>
void launch_types(const Target& target, const Plan& plan, const Params& params) {
  const Config& config = kConfigs[plan.config];
  const auto run = [&](auto kernel) {
    Launch launch;
    launch.block = dim3(config.threads_per_row, config.rows_per_cta);
    launch.grid = dim3(static_cast<unsigned>(ceil_div(params.rows, config.rows_per_cta)));
    launch.starts_early = params.starts_early;
    launch_kernel(target.op, config.name, kernel, launch, params, target.device, target.stream);
  };
  if (plan.vecs_per_thread == 0) {
    constexpr int kFull = kVectorBytes / static_cast<int>(sizeof(typename Types::x_type));
    dispatch_int<kFull, 1>(target.op, "elements of a vector", plan.vec_elems, [&](auto elems) {
      run(two_pass_kernel<TwoPassTraits<Types, decltype(elems)::value>>);
    });
  } else {
    dispatch_int<1, 2, 4, 8>(target.op, "vectors a thread", plan.vecs_per_thread, [&](auto vecs) {
      run(register_kernel<RegisterTraits<Types, decltype(vecs)::value>>);
    });
  }
}

template <DType kX, DType kWeight>
void launch_planned(const Target& target, Operand operand, const Plan& plan, const Params& params) {
  switch (operand) {
    case Operand::kNone: return launch_types<Types<kX, kWeight, Operand::kNone>>(target, plan, params);
    case Operand::kResidual: return launch_types<Types<kX, kWeight, Operand::kResidual>>(target, plan, params);
    case Operand::kGate: return launch_types<Types<kX, kWeight, Operand::kGate>>(target, plan, params);
  }
}

}  // namespace infuse::norm
