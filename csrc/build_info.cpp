// What this library was built from and for. The marker lets a reader find it in the file without loading it.
#include "infuse/export.h"

// Written by infuse.build: INFUSE_BUILD_ID, INFUSE_SOURCE_ID, INFUSE_ARCHS, INFUSE_CUDA_VERSION, all string literals.
#include "infuse_build_info.h"

INFUSE_EXPORT const char infuse_marker[];
const char infuse_marker[] = "INFUSE_BUILD_ID=" INFUSE_BUILD_ID ";INFUSE_SOURCE_ID=" INFUSE_SOURCE_ID
                             ";INFUSE_ARCHS=" INFUSE_ARCHS ";INFUSE_CUDA_VERSION=" INFUSE_CUDA_VERSION ";";

INFUSE_EXPORT const char* infuse_build_id(void) { return INFUSE_BUILD_ID; }

// Comma-separated, for example "sm_80,sm_90a,compute_80".
INFUSE_EXPORT const char* infuse_archs(void) { return INFUSE_ARCHS; }

// Of the compiler, for example "13.0.88".
INFUSE_EXPORT const char* infuse_cuda_version(void) { return INFUSE_CUDA_VERSION; }
