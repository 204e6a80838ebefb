// From a plan to a launch of the ring kernel. Included by the files that instantiate launch_ring.
#pragma once

#include "dispatch.h"
#include "infuse/launch.h"
#include "norm_backward/launch.h"
#include "norm_backward/ring_kernel.cuh"

namespace infuse::norm_backward {

template <typename Kernel>
int launch_config(Kernel kernel, const Prepared& prepared, cudaStream_t stream) {
  const Plan& plan = prepared.plan;
  const dim3 block(plan.threads_per_row, plan.rows_per_cta);
  const unsigned resident =
      resident_ctas(kOp, kernel, static_cast<int>(block.x * block.y), plan.shared_bytes, prepared.device);
  const unsigned most = static_cast<unsigned>(prepared.max_parts);
  const dim3 grid(resident < most ? resident : most);
  launch_kernel(kOp, kConfigs[plan.config].name, kernel, {grid, block, plan.shared_bytes, true}, prepared.params,
                prepared.device, stream);
  return static_cast<int>(grid.x);
}

template <DType kX, DType kWeight>
int launch_ring(const Prepared& prepared, cudaStream_t stream) {
  int num_parts = 0;
  dispatch_int<2, 4>(kOp, "vectors a thread", prepared.plan.vecs_per_thread, [&](auto vecs) {
    constexpr int kVecs = decltype(vecs)::value;
    const auto launch = [&](auto form) {
      constexpr Form kForm = decltype(form)::value;
      if constexpr (max_cta_threads(kVecs, kForm) > 0) {
        num_parts = launch_config(ring_kernel<RingTraits<kX, kWeight, kVecs, kForm>>, prepared, stream);
      }
    };
    switch (prepared.form) {
      case Form::kRmsNorm: return launch(std::integral_constant<Form, Form::kRmsNorm>{});
      case Form::kLayerNorm: return launch(std::integral_constant<Form, Form::kLayerNorm>{});
      case Form::kGatedRmsNorm: return launch(std::integral_constant<Form, Form::kGatedRmsNorm>{});
    }
  });
  return num_parts;
}

}  // namespace infuse::norm_backward
