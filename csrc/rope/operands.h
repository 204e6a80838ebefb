// What a launch of the rotary kernels is made of, out of the tensors that it is given.
#pragma once

#include "rope/launch.h"
#include "rope/params.h"
#include "rope/plan.h"

namespace infuse::rope {

// How cos and sin lie in memory: each in vectors, side by side in vectors, or neither.
enum class Tables { kApart, kZipped, kOther };

// params: but for what the plan says; a part's `items` are its positions.
struct Work {
  Params params{};
  Problem problem{};
  std::int64_t most_rows = 0;  // of a part
  bool has_tables[3] = {};    // by Tables
  int parts = 0;
};

// Checks the operands, at most kMaxParts of them, and leaves out empty ones. Throws std::runtime_error.
Work gather(const char* op, const Operand* operands, int count, const Options& options);

}  // namespace infuse::rope
