// What this library was built from and for. The marker lets a reader find it in the file without loading it.
#include "rms_norm/plan.h"

// Written by infuse.build: INFUSE_BUILD_ID, INFUSE_SOURCE_ID, INFUSE_ARCHS, INFUSE_CUDA_VERSION, all string literals.
#include "infuse_build_info.h"

#define INFUSE_EXPORT extern "C" __attribute__((visibility("default"), used))

INFUSE_EXPORT const char infuse_marker[];
const char infuse_marker[] = "INFUSE_BUILD_ID=" INFUSE_BUILD_ID ";INFUSE_SOURCE_ID=" INFUSE_SOURCE_ID
                             ";INFUSE_ARCHS=" INFUSE_ARCHS ";INFUSE_CUDA_VERSION=" INFUSE_CUDA_VERSION ";";

INFUSE_EXPORT const char* infuse_build_id(void) { return INFUSE_BUILD_ID; }

// Comma-separated, for example "sm_80,sm_90a,compute_80".
INFUSE_EXPORT const char* infuse_archs(void) { return INFUSE_ARCHS; }

// Of the compiler, for example "13.0.88".
INFUSE_EXPORT const char* infuse_cuda_version(void) { return INFUSE_CUDA_VERSION; }

INFUSE_EXPORT int infuse_rms_norm_num_configs(void) { return infuse::rms_norm::kNumConfigs; }

// Null outside 0 .. infuse_rms_norm_num_configs() - 1.
INFUSE_EXPORT const char* infuse_rms_norm_config_name(int config) {
  using namespace infuse::rms_norm;
  return config >= 0 && config < kNumConfigs ? kConfigs[config].name : nullptr;
}
