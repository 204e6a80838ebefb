"""The one table of spellings: which torch functions, Tensor methods, operators and ATen overloads are the same
operation.

A row is a `Word`: the canonical name, the names of the parameters in order, and the targets that are read so. Only
forms that write nowhere are listed; what is not listed is opaque to the matchers. Parameters marked "!" hold dimensions
of the input and are read as a tuple of non-negative numbers; "*" collects the rest of the positional arguments; those
behind a "|" are given by keyword only.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Target = Callable[..., Any]

# Other names of a parameter; they count only where the word has the parameter on the right.
ALIASES = {
    "self": "input",
    "a": "input",
    "axis": "dim",
    "keepdims": "keepdim",
    "train": "training",
    "p": "ord",
    "data": "fill_value",
    "mat_a": "input",
    "mat_b": "weight",
    "mat2": "weight",
}


@dataclass(frozen=True, slots=True)
class Word:
    """One way to read a target.

    name: canonical name. params: parameters by position. dims: those that hold dimensions. variadic: the last one
    collects. keywords: parameters that have no position.
    """

    name: str
    params: tuple[str, ...]
    dims: frozenset[str]
    variadic: bool
    keywords: frozenset[str] = frozenset()


def _word(name: str, params: str) -> Word:
    positional, _, keywords = params.partition("|")
    tokens = positional.split()
    return Word(
        name,
        tuple(token.rstrip("!*") for token in tokens),
        frozenset(token.rstrip("!*") for token in tokens if "!" in token),
        tokens[-1].endswith("*"),
        frozenset(keywords.split()),
    )


class _Table:
    def __init__(self) -> None:
        self.functions: dict[Hashable, Word] = {}
        self.methods: dict[str, Word] = {}

    def row(
        self, name: str, params: str, *functions: Target, methods: str = "", aten: str = "", attributes: str = ""
    ) -> None:
        word = _word(name, params)
        for function in functions:
            self.functions[function] = word
        for method in methods.split():
            self.methods[method] = word
        for attribute in attributes.split():
            # Dynamo writes x.mT as getattr(x, "mT").
            self.functions[(getattr, attribute)] = word
        for overload in aten.split():
            target = _overload(overload)
            if target is not None:
                self.functions[target] = word


def _overload(name: str) -> Target | None:
    """The overload "add.Tensor" of ATen, or "prims::name" of another namespace; None where this torch has none."""
    namespace, _, rest = name.rpartition("::")
    packet, _, overload = rest.partition(".")
    found = getattr(getattr(torch.ops, namespace or "aten"), packet, None)
    return getattr(found, overload or "default", None)


def _pointwise(table: _Table) -> None:
    row = table.row
    binary = "input other"
    row("add", f"{binary} alpha", torch.add, methods="add", aten="add.Tensor add.Scalar")
    row("add", binary, operator.add, methods="__add__ __radd__")
    row("sub", f"{binary} alpha", torch.sub, torch.subtract, methods="sub subtract", aten="sub.Tensor sub.Scalar")
    row("sub", binary, operator.sub, methods="__sub__")
    row("mul", binary, operator.mul, torch.mul, torch.multiply, aten="mul.Tensor mul.Scalar")
    row("mul", binary, methods="mul multiply __mul__ __rmul__")
    row(
        "div",
        binary,
        operator.truediv,
        torch.true_divide,
        methods="true_divide __truediv__",
        aten="div.Tensor div.Scalar",
    )
    row("div", f"{binary} rounding_mode", torch.div, torch.divide, methods="div divide")
    row("pow", "input exponent", operator.pow, torch.pow, methods="pow __pow__", aten="pow.Tensor_Scalar")
    row("square", "input", torch.square, methods="square", aten="square")
    row("neg", "input", operator.neg, torch.neg, torch.negative, methods="neg negative __neg__", aten="neg")
    row("sqrt", "input", torch.sqrt, methods="sqrt", aten="sqrt")
    row("rsqrt", "input", torch.rsqrt, methods="rsqrt", aten="rsqrt")
    row("reciprocal", "input", torch.reciprocal, methods="reciprocal", aten="reciprocal")
    row("sigmoid", "input", torch.sigmoid, F.sigmoid, torch.special.expit, methods="sigmoid", aten="sigmoid")
    row("tanh", "input", torch.tanh, F.tanh, methods="tanh", aten="tanh")
    row("erf", "input", torch.erf, torch.special.erf, methods="erf", aten="erf")
    row("silu", "input inplace", F.silu, aten="silu")
    row("gelu", "input approximate", F.gelu, aten="gelu")
    row("relu", "input inplace", F.relu)
    row("relu", "input", torch.relu, methods="relu", aten="relu")
    row("glu", "input dim", F.glu, aten="glu")
    row("clamp", "input min max", torch.clamp, torch.clip, methods="clamp clip", aten="clamp")
    row("clamp", "input min", torch.clamp_min, methods="clamp_min", aten="clamp_min")
    row("maximum", binary, torch.maximum, methods="maximum", aten="maximum")
    row("max", binary, torch.max, methods="max", aten="max.other")
    row("masked_fill", "input mask value", torch.masked_fill, methods="masked_fill")
    row("masked_fill", "input mask value", aten="masked_fill.Scalar masked_fill.Tensor")
    row(
        "where", "condition input other", torch.where, aten="where.self where.ScalarOther where.ScalarSelf where.Scalar"
    )
    row("nan_to_num", "input nan posinf neginf", torch.nan_to_num, methods="nan_to_num", aten="nan_to_num")
    row("dropout", "input p training inplace", F.dropout)
    row("dropout", "input p training", torch.dropout, aten="dropout")


def _others(table: _Table) -> None:
    """Nothing is matched on these; they are known to be pure and to give the same values in any memory layout."""
    row = table.row
    row("cat", "tensors dim", torch.cat, torch.concat, aten="cat")
    row("stack", "tensors dim", torch.stack, aten="stack")
    row("tensor", "fill_value dtype device requires_grad pin_memory", torch.tensor)
    row("elu", "input alpha inplace", F.elu)
    row("hardswish", "input inplace", F.hardswish, aten="hardswish")
    row("leaky_relu", "input negative_slope inplace", F.leaky_relu)
    row("mish", "input inplace", F.mish, aten="mish")
    row("softplus", "input beta threshold", F.softplus)
    row("abs", "input", operator.abs, methods="__abs__")
    for name in ("exp", "log", "cos", "sin", "abs"):
        row(name, "input", getattr(torch, name), methods=name, aten=name)


_MULTI_HEAD_ATTENTION = (
    "query key value embed_dim num_heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn dropout_p"
    " out_proj_weight out_proj_bias training key_padding_mask need_weights attn_mask use_separate_proj_weight"
    " q_proj_weight k_proj_weight v_proj_weight static_k static_v average_attn_weights is_causal"
)


def _reductions(table: _Table) -> None:
    row = table.row
    row("mean", "input dim! keepdim dtype", torch.mean, methods="mean", aten="mean.dim mean")
    row("sum", "input dim! keepdim dtype", torch.sum, methods="sum", aten="sum.dim_IntList sum")
    for name in ("var", "std"):
        row(name, "input dim! unbiased keepdim correction", getattr(torch, name), methods=name)
        row(name, "input dim! unbiased keepdim correction", aten=f"{name} {name}.dim {name}.correction")
        pair = f"{name}_mean"
        row(pair, "input dim! unbiased keepdim correction", getattr(torch, pair))
        row(pair, "input dim! unbiased keepdim correction", aten=f"{pair} {pair}.dim {pair}.correction")
    row("vector_norm", "input ord dim! keepdim dtype", torch.norm, torch.linalg.norm, torch.linalg.vector_norm)
    row("vector_norm", "input ord dim! keepdim dtype", methods="norm", aten="linalg_vector_norm norm.ScalarOpt_dim")
    row("normalize", "input ord dim! eps", F.normalize)
    row("roll", "input shifts dims", torch.roll, methods="roll", aten="roll")
    row("softmax", "input dim! dtype", torch.softmax, torch.special.softmax, methods="softmax", aten="softmax.int")
    row("softmax", "input dim! _stacklevel dtype", F.softmax)
    row("log_softmax", "input dim! dtype", torch.log_softmax, methods="log_softmax", aten="log_softmax.int")
    row("log_softmax", "input dim! _stacklevel dtype", F.log_softmax)
    options = "target weight size_average ignore_index reduce reduction"
    row("cross_entropy", f"input {options} label_smoothing", F.cross_entropy)
    row("cross_entropy", "input target weight reduction ignore_index label_smoothing", aten="cross_entropy_loss")
    row("nll_loss", f"input {options}", F.nll_loss)
    row("nll_loss", "input target weight reduction ignore_index", aten="nll_loss nll_loss_nd")
    row("matmul", "input other", torch.matmul, operator.matmul, methods="matmul __matmul__", aten="matmul")
    row("bmm", "input other", torch.bmm, torch.mm, methods="bmm mm", aten="bmm mm")
    row("multi_head_attention", _MULTI_HEAD_ATTENTION, F.multi_head_attention_forward)
    layer = "_transformer_encoder_layer_fwd"
    row("encoder_layer", "input rest*", getattr(torch, layer), aten=layer)
    row("baddbmm", "input batch1 batch2 beta alpha", torch.baddbmm, methods="baddbmm", aten="baddbmm")
    row("einsum", "equation operands*", torch.einsum, torch.functional.einsum, aten="einsum")
    row("max", "input dim! keepdim", torch.max, methods="max", aten="max.dim")
    row("amax", "input dim! keepdim", torch.amax, methods="amax", aten="amax")
    row("linear", "input weight bias", F.linear, aten="linear")
    row("grouped_mm", "input weight offs bias out_dtype", torch._grouped_mm, F.grouped_mm, aten="_grouped_mm")
    row("rms_norm", "input normalized_shape weight eps", torch.rms_norm, F.rms_norm, aten="rms_norm")
    row("layer_norm", "input normalized_shape weight bias eps", F.layer_norm)
    row("layer_norm", "input normalized_shape weight bias eps cudnn_enabled", torch.layer_norm, aten="layer_norm")
    row(
        "sdpa",
        "query key value attn_mask dropout_p is_causal scale enable_gqa",
        F.scaled_dot_product_attention,
        aten="scaled_dot_product_attention",
    )


def _casts(table: _Table) -> None:
    """Read by their result: a cast changes the dtype at most, see `canonical`."""
    row = table.row
    row("to", "input first second third copy", methods="to")
    row("to", "input", methods="float double half bfloat16")
    row("to", "input other", methods="type_as type", aten="type_as")
    row("to", "input first second third fourth", aten="to.dtype to.dtype_layout to.device to.other")
    row("to", "input dtype", aten="prims::convert_element_type")
    row("to", "input dtype layout device", aten="_to_copy")
    row("alias", "input memory_format", torch.clone, methods="clone contiguous", aten="clone contiguous")
    row("alias", "input", aten="alias view_as")
    row("detach", "input", torch.detach, methods="detach", aten="detach")


def _complex(table: _Table) -> None:
    row = table.row
    row("complex", "real imag", torch.complex, aten="complex")
    row("view_as_complex", "input", torch.view_as_complex, aten="view_as_complex")
    row("view_as_real", "input", torch.view_as_real, aten="view_as_real")
    row("real", "input", torch.real, attributes="real", aten="real")
    row("imag", "input", torch.imag, attributes="imag", aten="imag")


def _views(table: _Table) -> None:
    row = table.row
    pair = "input dim0! dim1!"
    row("transpose", pair, torch.transpose, torch.swapaxes, torch.swapdims, aten="transpose.int swapaxes swapdims")
    row("transpose", pair, methods="transpose swapaxes swapdims")
    row("permute", "input dims!", torch.permute, aten="permute")
    row("permute", "input dims!*", methods="permute")
    row("movedim", "input source! destination!", torch.movedim, torch.moveaxis, methods="movedim moveaxis")
    row("movedim", "input source! destination!", aten="movedim.int movedim.intlist")
    row("mT", "input", methods="adjoint", attributes="mT mH", aten="mT mH adjoint")
    row("T", "input", torch.t, methods="t", attributes="T H", aten="numpy_T t")
    row("reshape", "input shape*", methods="view reshape")
    row("reshape", "input shape", torch.reshape, aten="reshape view _unsafe_view")
    row("reshape", "input first second", torch.flatten, torch.unflatten, aten="flatten.using_ints unflatten.int")
    row("reshape", "input first second", methods="flatten unflatten")
    row("reshape", "input dim", torch.unsqueeze, torch.squeeze, methods="unsqueeze squeeze")
    row("reshape", "input dim", aten="unsqueeze squeeze squeeze.dim squeeze.dims")
    row("reshape", "input other", methods="view_as reshape_as")
    row("expand", "input size*", methods="expand broadcast_to expand_as")
    row("expand", "input size implicit", torch.broadcast_to, aten="expand expand_as broadcast_to")
    row("repeat_interleave", "input repeats dim! output_size", torch.repeat_interleave, methods="repeat_interleave")
    row("repeat_interleave", "input repeats dim! output_size", aten="repeat_interleave.self_int")
    row("repeat", "input repeats*", methods="repeat tile")
    row("repeat", "input repeats", torch.tile, aten="repeat tile")
    row("getitem", "input index", operator.getitem, methods="__getitem__")
    row("slice", "input dim start end step", aten="slice.Tensor")
    row("slice", "input dim start length", torch.narrow, methods="narrow", aten="narrow")
    row("split", "input sizes dim!", torch.chunk, torch.split, torch.tensor_split, methods="chunk split tensor_split")
    row("split", "input sizes dim!", aten="chunk split.Tensor split_with_sizes split.sizes")
    row("select", "input dim! index", torch.select, methods="select", aten="select.int")
    row("split", "input dim!", torch.unbind, methods="unbind", aten="unbind.int")
    row("item", "input", methods="item", aten="item")


def _comparisons(table: _Table) -> None:
    """What masks are computed with; on bool tensors the bitwise operators are the logical ones."""
    row = table.row
    binary = "input other"
    for name, others in _COMPARISONS.items():
        functions = [getattr(torch, other) for other in others]
        methods = " ".join((f"__{name}__", *others))
        row(name, binary, getattr(operator, name), *functions, methods=methods, aten=f"{name}.Tensor {name}.Scalar")
    for name in ("and", "or", "xor"):
        method = f"__{name}__ __r{name}__ bitwise_{name}"
        function = getattr(operator, f"{name}_" if name != "xor" else name)
        aten = f"bitwise_{name}.Tensor bitwise_{name}.Scalar __{name}__.Tensor __{name}__.Scalar"
        row(f"bitwise_{name}", binary, function, getattr(torch, f"bitwise_{name}"), methods=method, aten=aten)
        word = f"logical_{name}"
        row(word, binary, getattr(torch, word), methods=word, aten=word)
    row("bitwise_not", "input", operator.invert, torch.bitwise_not, methods="__invert__ bitwise_not")
    row("bitwise_not", "input", aten="bitwise_not")
    row("logical_not", "input", torch.logical_not, methods="logical_not", aten="logical_not")
    row("floor_divide", binary, operator.floordiv, torch.floor_divide, methods="__floordiv__ floor_divide")
    row("floor_divide", binary, aten="floor_divide floor_divide.Scalar")
    row("remainder", binary, operator.mod, torch.remainder, methods="__mod__ remainder")
    row("remainder", binary, aten="remainder.Tensor remainder.Scalar")
    row("minimum", binary, torch.minimum, methods="minimum", aten="minimum")
    row("where", "input condition other", methods="where")


_COMPARISONS = {
    "lt": ("lt", "less"),
    "le": ("le", "less_equal"),
    "gt": ("gt", "greater"),
    "ge": ("ge", "greater_equal"),
    "eq": ("eq",),
    "ne": ("ne", "not_equal"),
}


def _index_makers(table: _Table) -> None:
    """Tensors made of nothing but their positions, and what cuts triangles and pieces out of them."""
    row = table.row
    options = "| dtype layout device pin_memory requires_grad memory_format"
    row("arange", f"first second third {options} start end step", torch.arange)
    row("arange", f"first second third {options}", aten="arange arange.start arange.start_step")
    row("full", f"size fill_value {options}", torch.full, aten="full")
    row("full", f"input fill_value {options}", torch.full_like, aten="full_like")
    row("full", f"input size fill_value {options}", methods="new_full", aten="new_full")
    for name in ("zeros", "ones"):
        row(name, f"size* {options}", getattr(torch, name), aten=name)
        row(name, f"input {options}", getattr(torch, f"{name}_like"), aten=f"{name}_like")
        row(name, f"input size* {options}", methods=f"new_{name}", aten=f"new_{name}")
    row("eye", f"n m {options}", torch.eye, aten="eye eye.m")
    for name in ("tril", "triu"):
        row(name, "input diagonal", getattr(torch, name), methods=name, aten=name)
    row("cumsum", "input dim! dtype", torch.cumsum, methods="cumsum", aten="cumsum")
    row("diff", "input n dim prepend append", torch.diff, methods="diff", aten="diff")
    row("pad", "input pad mode value", F.pad, torch._C._nn.pad, aten="pad")
    row("pad", "input pad value", aten="constant_pad_nd")
    row("index_select", "input dim index", torch.index_select, methods="index_select", aten="index_select")
    row("to", "input", methods="bool int long")


@functools.cache
def _table() -> _Table:
    table = _Table()
    for part in (_pointwise, _comparisons, _reductions, _casts, _complex, _views, _index_makers, _others):
        part(table)
    return table


def lookup(node: torch.fx.Node) -> Word | None:
    """The word that a node's target is a spelling of."""
    table = _table()
    if node.op == "call_method":
        return table.methods.get(str(node.target))
    if node.op != "call_function":
        return None
    if node.target is getattr:
        return table.functions.get((getattr, node.args[1])) if len(node.args) == 2 else None
    return table.functions.get(node.target)
