// Host interface of the RMSNorm forward kernels, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "infuse/dtype.h"
#include "infuse/tensor_arg.h"
#include "rms_norm/params.h"
#include "rms_norm/plan.h"

namespace infuse::rms_norm {

constexpr char kOp[] = "rms_norm_out";

// Checks the arguments, plans and launches on `stream` of the current device, which must be x's. No synchronisation,
// no workspace. Throws std::runtime_error for what the kernels can't take and for a failed launch.
void launch(const TensorArg& x, const TensorArg* weight, double eps, double weight_offset, bool cast_before_weight,
            std::int64_t config, const TensorArg& out, cudaStream_t stream);

// One instantiation per combination of dtypes, each in a file of its own so that they compile in parallel.
template <DType kX, DType kWeight, DType kOut>
void launch_planned(const Plan& plan, const Params& params, int device, cudaStream_t stream);

}  // namespace infuse::rms_norm
