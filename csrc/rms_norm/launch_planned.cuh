// From a plan to a kernel launch. Included by the files that instantiate launch_planned.
#pragma once

#include "dispatch.h"
#include "infuse/check.h"
#include "infuse/launch.h"
#include "rms_norm/kernel.cuh"
#include "rms_norm/launch.h"

namespace infuse::rms_norm {

template <typename Kernel>
void launch_config(Kernel kernel, const Plan& plan, const Params& params, int device, cudaStream_t stream) {
  const Config& config = kConfigs[plan.config];
  const dim3 block(config.threads_per_row, config.rows_per_cta);
  unsigned grid = static_cast<unsigned>(ceil_div(params.rows, config.rows_per_cta));
  if (plan.persistent) {
    const unsigned resident = resident_ctas(kOp, kernel, static_cast<int>(block.x * block.y), 0, device);
    grid = grid < resident ? grid : resident;
  }
  launch_kernel(kOp, config.name, kernel, {grid, block}, params, device, stream);
}

template <DType kX, DType kWeight, DType kOut>
void launch_planned(const Plan& plan, const Params& params, int device, cudaStream_t stream) {
  using Types = rms_norm::Types<kX, kWeight, kOut>;
  const auto run = [&](auto kernel) { launch_config(kernel, plan, params, device, stream); };
  if (plan.vecs_per_thread == 0) {
    const auto two_pass = [&](auto elems) { run(two_pass_kernel<TwoPassTraits<Types, decltype(elems)::value>>); };
    constexpr const char* kWhat = "elements of a vector";
    if constexpr (size_bytes(kX) == 2) {
      dispatch_int<8, 2, 1>(kOp, kWhat, plan.vec_elems, two_pass);
    } else {
      dispatch_int<4, 1>(kOp, kWhat, plan.vec_elems, two_pass);
    }
  } else if (plan.persistent) {
    dispatch_int<1, 2, 4>(kOp, "vectors a thread", plan.vecs_per_thread, [&](auto vecs) {
      run(register_kernel<RegisterTraits<Types, decltype(vecs)::value, true>>);
    });
  } else {
    dispatch_int<1, 2, 4, 8, 16>(kOp, "vectors a thread", plan.vecs_per_thread, [&](auto vecs) {
      run(register_kernel<RegisterTraits<Types, decltype(vecs)::value, false>>);
    });
  }
}

}  // namespace infuse::rms_norm
