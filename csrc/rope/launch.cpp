// Checks, layout, plan and choice of dtypes for the rotary kernels. Host code only, compiled once.
#include "rope/launch.h"

#include <initializer_list>

#include "dispatch.h"
#include "infuse/check.h"
#include "infuse/launch.h"
#include "rope/layout.h"

namespace infuse::rope {
namespace {

std::int64_t last_size(const TensorArg& tensor) { return tensor.sizes[tensor.num_dims - 1]; }

bool is_empty(const TensorArg& tensor) {
  for (int i = 0; i < tensor.num_dims; ++i) {
    if (tensor.sizes[i] == 0) return true;
  }
  return false;
}

void check_table(const char* op, const TensorArg& table, const TensorArg& x, std::int64_t factors) {
  check_num_dims(op, table);
  check_same_device(op, table, x);
  check(last_size(table) == factors, op, "factors of ", table.name, ", got ", last_size(table), ", expected ", factors);
  check(table.num_dims <= x.num_dims, op, "dimensions of ", table.name, ", got ", table.num_dims,
        ", expected at most ", x.num_dims, " (as ", x.name, ")");
  const int missing = x.num_dims - table.num_dims;
  for (int i = 0; i + 1 < table.num_dims; ++i) {
    check(table.sizes[i] == 1 || table.sizes[i] == x.sizes[i + missing], op, "size of dimension ", i, " of ",
          table.name, ", got ", table.sizes[i], ", expected 1 or ", x.sizes[i + missing], " (as ", x.name, ")");
  }
}

void check_cache(const char* op, const Operand& operand) {
  const TensorArg &x = operand.x, &out = operand.out;
  const PositionsArg& positions = *operand.positions;
  check(x.num_dims == 4 && out.num_dims == 4, op, "shapes of ", x.name, " and ", out.name, ", got ", shape_text(x),
        " and ", shape_text(out), ", expected [batch, heads, seq_len, dim] and [batch, heads, cache_len, dim]");
  for (const int i : {0, 1, 3}) {
    check(out.sizes[i] == x.sizes[i], op, "size of dimension ", i, " of ", out.name, ", got ", out.sizes[i],
          ", expected ", x.sizes[i], " (as ", x.name, ")");
  }
  check(positions.size == x.sizes[2], op, "size of positions, got ", positions.size, ", expected ", x.sizes[2]);
  check(positions.device == x.device, op, "device of positions, got cuda:", positions.device, ", expected cuda:",
        x.device, " (as ", x.name, ")");
}

void check_operand(const char* op, const Operand& operand, const Operand& first, const Options& options) {
  const TensorArg &x = operand.x, &out = operand.out;
  check_num_dims(op, x);
  check_dtype(op, x, first.x.dtype);
  check_dtype(op, out, x.dtype);
  check_same_device(op, x, first.x);
  check_same_device(op, out, x);
  check(last_size(x) == last_size(first.x), op, "last dimension of ", x.name, ", got ", last_size(x), ", expected ",
        last_size(first.x), " (as ", first.x.name, ")");
  check_last_stride(op, x);
  check_last_stride(op, out);
  check_rows_apart(op, out);
  if (operand.positions != nullptr) {
    check_cache(op, operand);
  } else {
    check_same_shape(op, out, x);
  }
  if (operand.weight != nullptr) {
    check_weight(op, *operand.weight, x);
    check(!options.cast_before_weight || operand.weight->dtype == x.dtype, op, "dtype of ", operand.weight->name,
          " with cast_before_weight, got ", name(operand.weight->dtype), ", expected ", name(x.dtype));
  }
  if (operand.weight != nullptr && first.weight != nullptr) check_dtype(op, *operand.weight, first.weight->dtype);
  if (operand.cos != nullptr) {
    check_table(op, *operand.cos, x, last_size(*first.cos));
    check_table(op, *operand.sin, x, last_size(*first.cos));
    check_dtype(op, *operand.cos, first.cos->dtype);
    check_dtype(op, *operand.sin, first.sin->dtype);
  }
}

std::int64_t table_stride(const TensorArg* table, const TensorArg& x, int dim) {
  if (table == nullptr) return 0;
  const int own = dim - (x.num_dims - table->num_dims);
  return own < 0 || table->sizes[own] == 1 ? 0 : table->strides[own];
}

Layout layout_of(const char* op, const Operand& operand) {
  const TensorArg &x = operand.x, &out = operand.out;
  Dim dims[kMaxLayoutDims];
  for (int i = 0; i + 1 < x.num_dims; ++i) {
    dims[i] = {x.sizes[i], x.strides[i], out.strides[i], table_stride(operand.cos, x, i),
               table_stride(operand.sin, x, i)};
  }
  if (operand.positions != nullptr) {
    check(dims[1].cos == 0 && dims[1].sin == 0, op, "tables of ", x.name,
          ", got factors for each head, expected size 1 there");
    return {dims[0], dims[2], dims[1]};
  }
  Layout layout;
  check(find_layout(dims, x.num_dims - 1, &layout), op, "leading dimensions of ", x.name, " (shape ", shape_text(x),
        ", strides ", shape_text(x.strides, x.num_dims),
        "), got more than two that can't be merged besides the heads, expected at most two");
  return layout;
}

Table table_of(const TensorArg* table, std::int64_t outer, std::int64_t inner) {
  if (table == nullptr) return {};
  return {table->data, outer, inner, table->strides[table->num_dims - 1]};
}

Part part_of(const char* op, const Operand& operand) {
  const Layout layout = layout_of(op, operand);
  const auto& [outer, inner, heads] = layout;
  Part part{};
  part.x = operand.x.data;
  part.out = operand.out.data;
  part.cos = table_of(operand.cos, outer.cos, inner.cos);
  part.sin = table_of(operand.sin, outer.sin, inner.sin);
  part.weight = operand.weight != nullptr ? operand.weight->data : nullptr;
  const Dim order[] = {outer, inner, heads};
  for (int i = 0; i < 3; ++i) {
    part.x_stride[i] = order[i].size > 1 ? order[i].x : 0;
    part.out_stride[i] = order[i].size > 1 || operand.positions != nullptr ? order[i].out : 0;
  }
  part.heads = static_cast<std::uint32_t>(heads.size);
  part.inner = FastDivisor(static_cast<std::uint32_t>(inner.size));
  part.items = static_cast<std::uint32_t>(outer.size * inner.size);  // until the plan is made
  part.rotates = operand.cos != nullptr;
  part.has_norm = operand.has_norm;
  if (operand.positions != nullptr) {
    const PositionsArg& positions = *operand.positions;
    part.positions = positions.data;
    part.wide_positions = positions.wide;
    part.position_stride = positions.stride;
    part.num_positions = operand.out.sizes[2];
  }
  return part;
}

// The largest power of two up to 16 that divides the address and all strides, in bytes.
int alignment_of(const void* data, std::initializer_list<std::int64_t> strides, DType dtype) {
  std::uint64_t bits = reinterpret_cast<std::uintptr_t>(data) | kVectorBytes;
  for (const std::int64_t stride : strides) bits |= static_cast<std::uint64_t>(stride) * size_bytes(dtype);
  return static_cast<int>(bits & (~bits + 1));
}

int alignment_of_rows(const Part& part, DType dtype) {
  const std::int64_t *x = part.x_stride, *out = part.out_stride;
  return smaller(alignment_of(part.x, {x[0], x[1], x[2]}, dtype), alignment_of(part.out, {out[0], out[1], out[2]}, dtype));
}

bool has_vectors(const Table& table, DType dtype) {
  return table.data == nullptr ||
         (table.step == 1 &&
          alignment_of(table.data, {table.outer_stride, table.inner_stride}, dtype) == kVectorBytes);
}

void set_options(const Operand& first, const Options& options, Params* params) {
  const DType x = first.x.dtype, cos = first.cos->dtype, sin = first.sin->dtype;
  const std::int64_t dim = last_size(first.x), factors = last_size(*first.cos);
  params->dim = static_cast<std::uint32_t>(dim);
  params->rotary_dim = static_cast<std::uint32_t>(options.per_pair ? 2 * factors : factors);
  params->inv_dim = static_cast<float>(1.0 / static_cast<double>(dim));
  params->eps = static_cast<float>(options.eps);
  params->weight_offset = static_cast<float>(options.weight_offset);
  // The backward turns the other way.
  params->inverse = options.inverse != options.is_backward;
  params->cast_before_weight = options.cast_before_weight;
  params->interleaved = options.interleaved;
  params->per_pair = options.per_pair;
  params->sin_of_partner = options.is_backward;
  params->rounds_products = !options.upcast && !options.is_backward && cos == x && sin == x && x != DType::kFloat32;
  params->cos_dtype = cos;
  params->sin_dtype = sin;
}

}  // namespace

void launch(const char* op, const Operand* operands, int count, const Options& options, cudaStream_t stream) {
  const Operand& first = operands[0];
  check(options.config >= kHeuristic && options.config < kNumConfigs, op, "config, got ", options.config,
        ", expected -1 to ", kNumConfigs - 1);
  check(!options.cast_before_weight || options.weight_offset == 0.0, op,
        "weight_offset with cast_before_weight, got ", options.weight_offset, ", expected 0");
  for (int i = 0; i < count; ++i) check_operand(op, operands[i], first, options);
  Params params{};
  set_options(first, options, &params);
  const std::int64_t dim = last_size(first.x);
  check(params.rotary_dim % 2 == 0 && params.rotary_dim <= dim, op, "elements to rotate, got ", params.rotary_dim,
        ", expected an even number of at most ", dim);

  const DType x = first.x.dtype, cos = first.cos->dtype, sin = first.sin->dtype;
  Problem problem{dim, params.rotary_dim, 0, 0, size_bytes(x), kVectorBytes, 0, kVectorBytes};
  std::int64_t most_rows = 0;
  bool has_norm = false;
  int parts = 0;
  params.table_vectors = true;
  for (int i = 0; i < count; ++i) {
    if (is_empty(operands[i].x)) continue;
    Part& part = params.parts[parts++];
    part = part_of(op, operands[i]);
    const std::int64_t rows = count_rows(operands[i].x);
    check(rows <= kMaxRows, op, "rows of ", operands[i].x.name, ", got ", rows, ", expected at most ", kMaxRows);
    problem.rows += rows;
    if (rows > most_rows) problem.heads = part.heads;
    most_rows = rows > most_rows ? rows : most_rows;
    problem.alignment_bytes = smaller(problem.alignment_bytes, alignment_of_rows(part, x));
    if (const TensorArg* weight = operands[i].weight) {
      params.wide_weight = weight->dtype == DType::kFloat32;
      problem.weight_size_bytes = size_bytes(weight->dtype);
      problem.weight_alignment_bytes =
          smaller(problem.weight_alignment_bytes, alignment_of(weight->data, {}, weight->dtype));
    }
    has_norm = has_norm || part.has_norm;
    params.table_vectors = params.table_vectors && has_vectors(part.cos, cos) && has_vectors(part.sin, sin);
  }
  if (parts == 0) return;

  const bool known_tables = cos == sin && (cos == x || cos == DType::kFloat32);
  if (!known_tables) problem.alignment_bytes = 1;  // only the narrow kernel takes any dtype
  const Plan plan = make_plan(problem, static_cast<int>(options.config), count_sms(op, first.x.device));
  std::int64_t ctas = 0;
  for (int i = 0; i < kMaxParts; ++i) {
    Part& part = params.parts[i];
    part.first_cta = i < parts ? static_cast<std::uint32_t>(ctas) : kNoCta;
    if (i >= parts) continue;
    part.head_blocks = FastDivisor(static_cast<std::uint32_t>(ceil_div(part.heads, plan.heads)));
    part.items *= part.head_blocks.divisor;
    ctas += ceil_div(part.items, plan.groups);
  }
  check(ctas <= kMaxRows, op, "CTAs, got ", ctas, ", expected at most ", kMaxRows);
  dispatch_dtype(op, "x", x, [&](auto dtype) {
    launch_planned<decltype(dtype)::value>(op, plan, cos, has_norm, params, static_cast<unsigned>(ctas),
                                           first.x.device, stream);
  });
}

}  // namespace infuse::rope
