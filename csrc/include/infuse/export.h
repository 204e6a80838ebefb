// Functions that Python finds in the library by name, through ctypes.
#pragma once

#define INFUSE_EXPORT extern "C" __attribute__((visibility("default"), used))

// infuse_<op>_num_configs() and infuse_<op>_config_name(int), which is null outside 0 .. num_configs - 1.
// configs: an array of structs with a `name`.
#define INFUSE_EXPORT_CONFIGS(op, configs)                                                                  \
  INFUSE_EXPORT int infuse_##op##_num_configs(void) { return sizeof(configs) / sizeof((configs)[0]); }      \
  INFUSE_EXPORT const char* infuse_##op##_config_name(int config) {                                         \
    return config >= 0 && config < infuse_##op##_num_configs() ? (configs)[config].name : nullptr;          \
  }
