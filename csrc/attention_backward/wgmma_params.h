// What the sm_90a kernel is given: the parameters of all kernels and maps of the tensors that TMA reads.
#pragma once

#include <cuda.h>

#include "attention_backward/params.h"

namespace infuse::attention_backward {

struct WgmmaParams {
  CUtensorMap q, dout;  // boxes of a block of queries x 64 columns
  CUtensorMap k, v;     // boxes of a block of keys x 64 columns
  Params common;
};

}  // namespace infuse::attention_backward
