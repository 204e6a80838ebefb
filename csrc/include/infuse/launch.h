// Launches: how many CTAs a device holds, and kernels that start before their predecessor in the stream has ended.
#pragma once

#include <cuda_runtime_api.h>

#include "infuse/check.h"

namespace infuse {

// A CTA gets more only after the kernel was told so; the limit is 48 KiB with what the kernel itself declares.
constexpr int kSharedBytesForAll = 32 * 1024;

// Allows a kernel all the dynamic shared memory that a CTA of the device can have.
template <typename Kernel>
void allow_shared_memory(const char* op, Kernel kernel, int device) {
  int most = 0;
  cudaFuncAttributes attributes;
  check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), op, "shared memory");
  check_cuda(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), op, "attributes of a kernel");
  check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  most - static_cast<int>(attributes.sharedSizeBytes)),
             op, "more shared memory for a kernel");
}

// Allows clusters of more than 8 CTAs.
template <typename Kernel>
void allow_large_clusters(const char* op, Kernel kernel) {
  check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
             op, "large clusters");
}

inline int count_sms(const char* op, int device) {
  int num_sms = 0;
  check_cuda(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device), op, "number of SMs");
  return num_sms;
}

// CTAs that run at once on the whole device, which is what a persistent kernel starts. Also allows the kernel its
// shared memory. The last answer is remembered, since the question costs about as much as a launch.
template <typename Kernel>
unsigned resident_ctas(const char* op, Kernel kernel, int threads, int shared_bytes, int device) {
  struct Answer {
    Kernel kernel = nullptr;
    int threads = 0, shared_bytes = 0, device = -1;
    unsigned ctas = 0;
  };
  static thread_local Answer last;
  if (last.kernel != kernel || last.threads != threads || last.shared_bytes != shared_bytes || last.device != device) {
    int per_sm = 0, num_sms = 0;
    if (shared_bytes > kSharedBytesForAll) allow_shared_memory(op, kernel, device);
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads, shared_bytes), op, "occupancy");
    check_cuda(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device), op, "number of SMs");
    check(per_sm > 0, op, "CTAs of ", threads, " threads and ", shared_bytes,
          " bytes of shared memory on an SM, got 0, expected at least 1");
    last = {kernel, threads, shared_bytes, device, static_cast<unsigned>(per_sm) * static_cast<unsigned>(num_sms)};
  }
  return last.ctas;
}

// Whether the kernel's code for this device contains the instructions of infuse/overlap.cuh. Code that was compiled
// for 8.0 does not wait, also where a newer device runs it, so it must never start early.
template <typename Kernel>
bool is_compiled_for_9_0(const char* op, Kernel kernel, int device) {
  struct Answer {
    Kernel kernel = nullptr;
    int device = -1;
    bool answer = false;
  };
  static thread_local Answer last;
  if (last.kernel != kernel || last.device != device) {
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), op, "attributes of a kernel");
    last = {kernel, device, attributes.ptxVersion >= 90};
  }
  return last.answer;
}

struct Launch {
  dim3 grid, block;
  int shared_bytes = 0;
  // Programmatic dependent launch: the kernel may start while its predecessor in the stream still runs, and must call
  // wait_for_previous_kernel before it touches memory.
  bool starts_early = false;
  int cluster = 1;  // neighbouring CTAs along x that read each other's shared memory
};

// `params` is the kernel's only parameter. `what` names the launch in a message.
template <typename Params>
void launch_kernel(const char* op, const char* what, void (*kernel)(Params), const Launch& launch, const Params& params,
                   int device, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (launch.starts_early && is_compiled_for_9_0(op, kernel, device)) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (launch.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
  }
  config.gridDim = launch.grid;
  config.blockDim = launch.block;
  config.dynamicSmemBytes = static_cast<std::size_t>(launch.shared_bytes);
  config.stream = stream;
  void* arguments[] = {const_cast<Params*>(&params)};
  check_cuda(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments), op,
             concat("launch of ", what));
}

// Clusters of the launch that run at once on the whole device, as resident_ctas. Not all SMs of a device are in reach of
// clusters of more than two CTAs.
template <typename Kernel>
unsigned resident_clusters(const char* op, Kernel kernel, const Launch& launch, int device) {
  struct Answer {
    Kernel kernel = nullptr;
    int cluster = 0, device = -1;
    unsigned clusters = 0;
  };
  static thread_local Answer last;
  if (last.kernel != kernel || last.cluster != launch.cluster || last.device != device) {
    const int threads = static_cast<int>(launch.block.x);
    int count = static_cast<int>(resident_ctas(op, kernel, threads, launch.shared_bytes, device));
    if (launch.cluster > 1) {
      cudaLaunchAttribute attribute{};
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(static_cast<unsigned>(launch.cluster));
      config.blockDim = launch.block;
      config.dynamicSmemBytes = static_cast<std::size_t>(launch.shared_bytes);
      config.attrs = &attribute;
      config.numAttrs = 1;
      check_cuda(cudaOccupancyMaxActiveClusters(&count, reinterpret_cast<const void*>(kernel), &config), op,
                 "resident clusters");
      check(count > 0, op, "clusters of ", launch.cluster, " CTAs on the device, got 0, expected at least 1");
    }
    last = {kernel, launch.cluster, device, static_cast<unsigned>(count)};
  }
  return last.clusters;
}

}  // namespace infuse
