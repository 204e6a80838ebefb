// torch's current CUDA stream, found without linking to libtorch_cuda.
//
// A strong reference to the function would keep this library from loading in a CPU build of torch, and a weak one
// stays null even in a CUDA build, because the library is linked to libtorch_cpu only. So it is looked up, once, in
// the libtorch_cuda that the process has already loaded.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdint>

#include "infuse/check.h"

namespace infuse {

inline cudaStream_t current_stream(int device, const char* op) {
  using Getter = std::int32_t (*)(std::int32_t device_index, void** stream);
  static const Getter getter = []() -> Getter {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  check(getter != nullptr, op, "current CUDA stream, got a torch without aoti_torch_get_current_cuda_stream, ",
        "expected a CUDA build of torch 2.11 or later");
  void* stream = nullptr;
  const std::int32_t status = getter(device, &stream);
  check(status == 0, op, "current CUDA stream of device ", device, ", got error ", status, ", expected 0");
  return static_cast<cudaStream_t>(stream);
}

}  // namespace infuse
