#include "norm/launch_planned.cuh"

namespace infuse::norm {

template bool has_clusters<DType::kFloat16, DType::kFloat16>(const Target&);
template void launch_planned<DType::kFloat16, DType::kFloat16>(const Target&, Operand, bool, const Plan&, const Params&);

}  // namespace infuse::norm
