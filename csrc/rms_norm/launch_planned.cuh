// From a plan to a kernel launch. Included by the files that instantiate launch_planned.
#pragma once

#include <string>

#include "dispatch.h"
#include "infuse/check.h"
#include "rms_norm/kernel.cuh"
#include "rms_norm/launch.h"

namespace infuse::rms_norm {

// CTAs that a persistent kernel starts: as many as run at once. The last answer is remembered per kernel, since the
// question costs about as much as the launch.
template <typename Kernel>
unsigned resident_ctas(Kernel kernel, int threads, int device) {
  struct Answer {
    Kernel kernel = nullptr;
    int threads = 0, device = -1;
    unsigned ctas = 0;
  };
  static thread_local Answer last;
  if (last.kernel != kernel || last.threads != threads || last.device != device) {
    int per_sm = 0, num_sms = 0;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads, 0), kOp, "occupancy");
    check_cuda(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device), kOp, "number of SMs");
    check(per_sm > 0, kOp, "CTAs of ", threads, " threads on an SM, got 0, expected at least 1");
    last = {kernel, threads, device, static_cast<unsigned>(per_sm) * static_cast<unsigned>(num_sms)};
  }
  return last.ctas;
}

template <typename Kernel>
void launch_kernel(Kernel kernel, const Plan& plan, const Params& params, int device, cudaStream_t stream) {
  const Config& config = kConfigs[plan.config];
  const dim3 block(config.threads_per_row, config.rows_per_cta);
  unsigned grid = static_cast<unsigned>(ceil_div(params.rows, config.rows_per_cta));
  if (plan.persistent) {
    const unsigned resident = resident_ctas(kernel, static_cast<int>(block.x * block.y), device);
    grid = grid < resident ? grid : resident;
  }
  kernel<<<grid, block, 0, stream>>>(params);
  check_cuda(cudaGetLastError(), kOp, concat("launch of configuration ", config.name));
}

template <DType kX, DType kWeight, DType kOut>
void launch_planned(const Plan& plan, const Params& params, int device, cudaStream_t stream) {
  using Types = rms_norm::Types<kX, kWeight, kOut>;
  const auto run = [&](auto kernel) { launch_kernel(kernel, plan, params, device, stream); };
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
