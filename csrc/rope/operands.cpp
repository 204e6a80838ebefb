// From tensors to the parts that the kernels walk over: checks, layouts, alignments, and how tables lie.
#include "rope/operands.h"

#include <initializer_list>

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
  if (operand.saved != nullptr) {
    check_dtype(op, *operand.saved, x.dtype);
    check_same_device(op, *operand.saved, x);
    check_same_shape(op, *operand.saved, x);
    check_last_stride(op, *operand.saved);
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
               table_stride(operand.sin, x, i), operand.saved != nullptr ? operand.saved->strides[i] : 0};
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
  part.saved = operand.saved != nullptr ? operand.saved->data : nullptr;
  part.cos = table_of(operand.cos, outer.cos, inner.cos);
  part.sin = table_of(operand.sin, outer.sin, inner.sin);
  part.weight = operand.weight != nullptr ? operand.weight->data : nullptr;
  const Dim order[] = {outer, inner, heads};
  for (int i = 0; i < 3; ++i) {
    part.x_stride[i] = order[i].size > 1 ? order[i].x : 0;
    part.out_stride[i] = order[i].size > 1 || operand.positions != nullptr ? order[i].out : 0;
    part.saved_stride[i] = order[i].size > 1 ? order[i].saved : 0;
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
  const std::int64_t *x = part.x_stride, *out = part.out_stride, *saved = part.saved_stride;
  const int own = smaller(alignment_of(part.x, {x[0], x[1], x[2]}, dtype),
                          alignment_of(part.out, {out[0], out[1], out[2]}, dtype));
  return smaller(own, alignment_of(part.saved, {saved[0], saved[1], saved[2]}, dtype));
}

// Whether rows of a table start where vectors may.
bool has_vectors(const Table& table, DType dtype) {
  return alignment_of(table.data, {table.outer_stride, table.inner_stride}, dtype) == kVectorBytes;
}

// How the factors of a part lie in memory.
Tables tables_of(const Part& part, const Options& options, DType dtype) {
  const Table &cos = part.cos, &sin = part.sin;
  if (cos.step == 1 && sin.step == 1) return has_vectors(cos, dtype) && has_vectors(sin, dtype) ? Tables::kApart : Tables::kOther;
  const bool side_by_side = static_cast<const char*>(sin.data) == static_cast<const char*>(cos.data) + size_bytes(dtype) &&
                            cos.step == 2 && sin.step == 2 && cos.outer_stride == sin.outer_stride &&
                            cos.inner_stride == sin.inner_stride;
  // The gradient takes cos and sin of different places, unless both elements of a pair have the same.
  const bool same_place = options.per_pair || !options.is_backward;
  return side_by_side && same_place && has_vectors(cos, dtype) ? Tables::kZipped : Tables::kOther;
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

void add_part(const char* op, const Operand& operand, const Options& options, Work* work) {
  const std::int64_t rows = count_rows(operand.x);
  check(rows <= kMaxRows, op, "rows of ", operand.x.name, ", got ", rows, ", expected at most ", kMaxRows);
  Problem& problem = work->problem;
  const Part part = work->params.parts[work->parts++] = part_of(op, operand);
  problem.rows += rows;
  if (rows > work->most_rows) problem.heads = part.heads;
  work->most_rows = rows > work->most_rows ? rows : work->most_rows;
  problem.alignment_bytes = smaller(problem.alignment_bytes, alignment_of_rows(part, operand.x.dtype));
  if (const TensorArg* weight = operand.weight) {
    work->params.wide_weight = weight->dtype == DType::kFloat32;
    problem.weight_size_bytes = size_bytes(weight->dtype);
    const int alignment = alignment_of(weight->data, {}, weight->dtype);
    problem.weight_alignment_bytes = smaller(problem.weight_alignment_bytes, alignment);
  }
  problem.has_norm = problem.has_norm || part.has_norm;
  if (part.rotates) {
    const Tables tables = tables_of(part, options, operand.cos->dtype);
    work->has_tables[static_cast<int>(tables)] = true;
  }
}

// Whether the kernels that read vectors take the tables: of x's dtype or float32, and lying alike for all parts.
bool takes_tables(const Operand& first, const Work& work) {
  const DType cos = first.cos->dtype;
  if (cos != first.sin->dtype || (cos != first.x.dtype && cos != DType::kFloat32)) return false;
  const bool apart = work.has_tables[static_cast<int>(Tables::kApart)];
  const bool zipped = work.has_tables[static_cast<int>(Tables::kZipped)];
  return !work.has_tables[static_cast<int>(Tables::kOther)] && !(apart && zipped);
}

}  // namespace

Work gather(const char* op, const Operand* operands, int count, const Options& options) {
  const Operand& first = operands[0];
  check(!options.cast_before_weight || options.weight_offset == 0.0, op,
        "weight_offset with cast_before_weight, got ", options.weight_offset, ", expected 0");
  for (int i = 0; i < count; ++i) check_operand(op, operands[i], first, options);
  const std::int64_t dim = last_size(first.x), factors = last_size(*first.cos);
  const std::int64_t rotary_dim = options.per_pair ? 2 * factors : factors;
  check(rotary_dim % 2 == 0 && rotary_dim <= dim, op, "elements to rotate, got ", rotary_dim,
        ", expected an even number of at most ", dim);

  Work work;
  work.problem = {dim, rotary_dim, 0, 0, size_bytes(first.x.dtype), kVectorBytes, 0, kVectorBytes, false, false};
  work.problem.wide_factors = first.cos->dtype == DType::kFloat32 && first.x.dtype != DType::kFloat32;
  set_options(first, options, &work.params);
  for (int i = 0; i < count; ++i) {
    if (!is_empty(operands[i].x)) add_part(op, operands[i], options, &work);
  }
  work.params.num_parts = static_cast<std::uint32_t>(work.parts);
  if (!takes_tables(first, work)) work.problem.alignment_bytes = 1;  // the narrow kernel takes any
  work.params.zipped_tables = work.has_tables[static_cast<int>(Tables::kZipped)];
  return work;
}

}  // namespace infuse::rope
