"""Everything that Infuse uses of Inductor's private lowering interface (torch 2.11 to 2.13), imported nowhere else.

Three things are offered: inlining a formula into the graph being lowered, timing candidates on stand-in inputs without
touching that graph, and asking about that graph (infuse.lowering.graph_neighbours asks further).
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor import config, ir
from torch._inductor.codegen.subgraph import SubgraphChoiceCaller, SubgraphTemplate
from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass
from torch._inductor.decomposition import fast_random_decomps, register_decomposition, select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.lowering import needs_realized_inputs, register_lowering
from torch._inductor.select_algorithm import (
    ExternKernelChoice,
    create_inputs_key,
    get_algorithm_selector_cache,
)
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from infuse.lowering import inductor_timing
from infuse.report import SITE_KEY
from infuse.settings import Settings, resolve

log = logging.getLogger("infuse")

Node = Any  # an Inductor IR node; its classes are private and untyped
_stand_in_names = itertools.count()


def register(target: torch._ops.OpOverload, lower: Callable[..., Any]) -> None:
    """Makes `lower` the lowering of an operator; it gets IR nodes for tensors and plain values for the rest."""
    register_lowering(target, type_promotion_kind=None)(lower)


def decompose(target: torch._ops.OpOverload, formula: Callable[..., Any]) -> None:
    """Opens an operator to AOTAutograd: the partitioner sees its formula, and may compute parts of it again."""
    register_decomposition([target])(formula)
    fast_random_decomps.cache_clear()  # a table that an earlier compilation asked for would lack it


def settings_in_effect() -> Settings:
    """The settings of the compilation under way; they travel with the pass, which Inductor's configuration holds."""
    passes = config.pre_grad_custom_pass
    for candidate in passes if isinstance(passes, (list, tuple)) else [passes]:
        found = getattr(candidate, "settings", None)
        if isinstance(candidate, CustomGraphPass) and isinstance(found, Settings):
            return found
    return resolve()


def max_autotune() -> bool:
    """Whether the user asked for measurements."""
    return bool(config.max_autotune or config.max_autotune_pointwise)


def cuda_graphs() -> bool:
    """Whether the generated code is to be captured and replayed."""
    return bool(config.triton.cudagraphs)


def writes_cpp() -> bool:
    """Whether the generated code is C++ (cpp_wrapper, AOTInductor), which cannot call functions of this process."""
    return bool(config.cpp_wrapper)


def is_tensor(value: object) -> bool:
    return isinstance(value, ir.IRNode)


def bind(function: Callable[..., Any], args: Sequence[object]) -> tuple[Callable[..., Any], list[Node]]:
    """`function` with its plain values filled in, and the IR nodes that remain as its arguments, also out of lists."""
    leaves, spec = pytree.tree_flatten(list(args))

    def bound(*given: Any) -> Any:
        remaining = iter(given)
        values = [next(remaining) if is_tensor(leaf) else leaf for leaf in leaves]
        return function(*pytree.tree_unflatten(values, spec))

    return bound, tensors_of(args)


def tensors_of(args: Sequence[object]) -> list[Node]:
    """The IR nodes among an operator's arguments, in their order, also out of lists."""
    return [leaf for leaf in pytree.tree_leaves(list(args)) if is_tensor(leaf)]


def trace(function: Callable[..., Any], tensors: Sequence[Node]) -> torch.fx.GraphModule:
    """The ATen graph of `function` for inputs with the sizes and strides of the IR nodes."""
    with V.fake_mode:
        examples: list[Any] = [ir.ir_node_to_tensor(tensor) for tensor in tensors]
    return _formula_graph(function, *examples)


def _formula_graph(function: Callable[..., Any], *examples: torch.Tensor) -> torch.fx.GraphModule:
    """The ATen graph of `function`; tensors that it makes itself are fake as well."""
    with V.fake_mode:
        graph: torch.fx.GraphModule = make_fx(function, decomposition_table=select_decomp_table())(*examples)
    return graph


def inline(function: Callable[..., Any], *args: object) -> Any:
    """Lowers `function(*args)` as if its formula stood in the user's graph: both neighbours can fuse with it."""
    bound, tensors = bind(function, args)
    graph = trace(bound, tensors)
    # Without its output node: what an output reads is written to memory, in the strides that it had while traced.
    output = graph.graph.output_node()
    (results,) = output.args
    graph.graph.erase_node(output)
    environment, outer_module, outer_node = V.graph.env, V.graph.module, V.graph.current_node
    readers = _readers_outside(outer_node, results)
    from_memory = not any(is_generated(tensor) for tensor in tensors)
    remaining = iter(tensors)
    try:
        V.graph.module = graph
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                environment[node] = next(remaining)
            else:
                V.graph.current_node = node
                environment[node] = V.graph.run_node(node)
                if node in readers and node.users:
                    _decide_reuse(environment[node], len(node.users), readers[node], from_memory)
    finally:
        V.graph.module, V.graph.current_node = outer_module, outer_node
    return torch.fx.map_arg(results, environment.__getitem__)


def _readers_outside(outer: torch.fx.Node, results: Any) -> dict[torch.fx.Node, list[torch.fx.Node]]:
    """What reads the results of a formula, nodes of its graph, in the graph being lowered."""
    if isinstance(results, torch.fx.Node):
        return {results: list(outer.users)}
    readers: dict[torch.fx.Node, list[torch.fx.Node]] = {result: [] for result in results}
    for user in outer.users:
        if user.target is operator.getitem:
            readers[results[user.args[1]]].extend(user.users)
    return readers


def _decide_reuse(value: Node, inside: int, outside: Sequence[torch.fx.Node], from_memory: bool) -> None:
    """Keeps a value that is read inside and outside of a formula, or leaves it to be computed again by each reader.

    Where both stood in one graph Inductor would decide so before it lowers the first reader, and a reader lowered
    before that computes it again. But what a graph returns, the next loop over the row reads back where it was written,
    which on an H200 is 5% slower than to add up again two tensors that lie in memory, and in the caches (residual add
    and RMSNorm, 16384x4096 and 8192x16384).
    """
    if any(reader.target in needs_realized_inputs for reader in outside):
        value.realize_hint()
    if not from_memory and any(reader.op == "output" for reader in outside):
        value.realize()
    value.mark_reuse(inside + len(outside))


# --- measuring -------------------------------------------------------------------------------------------------------


def stand_in(node: Node, contiguous: bool = False) -> Node:
    """An input with the size, strides, dtype and device of an IR node that need not exist in memory (yet)."""
    size = list(node.get_size())
    if ir.is_storage_and_layout(node) and not contiguous:
        layout = node.get_layout()
        stride, offset = list(layout.stride), layout.offset
    else:
        stride, offset = list(ir.FlexibleLayout.contiguous_strides(size)), 0
    fixed = ir.FixedLayout(node.get_device(), node.get_dtype(), size, stride, offset)
    name = f"infuse_stand_in_{next(_stand_in_names)}"
    return ir.TensorBox(ir.StorageBox(ir.InputBuffer(name=name, layout=fixed)))


@dataclass(frozen=True, slots=True)
class Kernel:
    """A compiled kernel as a candidate: `choice` bound to keyword arguments."""

    choice: ExternKernelChoice
    keywords: Mapping[str, object]

    def bind(self, tensors: Sequence[Node], layout: Node) -> Any:
        return self.choice.bind(list(tensors), layout, **self.keywords)


def kernel_choice(name: str, function: Callable[..., Any]) -> ExternKernelChoice:
    """One ExternKernelChoice an operator and process; `function(*tensors, *, out, **keywords)` runs the kernel."""
    return ExternKernelChoice(function, name=name)


def output_layout(function: Callable[..., Any], args: Sequence[object]) -> Node:
    """The layout of an operator's result, of the first one if it has several, from its fake implementation."""
    bound, tensors = bind(function, args)
    with V.fake_mode:
        out = bound(*(ir.ir_node_to_tensor(tensor) for tensor in tensors))
    out = out if isinstance(out, torch.Tensor) else out[0]
    size = [dim.node.expr if isinstance(dim, torch.SymInt) else dim for dim in out.shape]
    stride = [dim.node.expr if isinstance(dim, torch.SymInt) else dim for dim in out.stride()]
    return ir.FixedLayout(out.device, out.dtype, size, stride)


def measure(
    name: str,
    kernels: Mapping[str, Kernel],
    formulas: Mapping[str, Callable[..., Any]],
    args: Sequence[object],
    layout: Node,
    *,
    tune_products: bool = False,
    values: Mapping[int, Callable[[Node], torch.Tensor]] | None = None,
    cold: Collection[int] = (),
) -> dict[str, float]:
    """Milliseconds of every candidate on stand-in inputs, through Inductor's autotuning (its log and its cache).

    The graph under construction is not touched: nothing is realised and no buffer is added. A candidate that fails is
    left out. tune_products: the products in the formulas are tuned too, Inductor's templates among them, as they would
    be in the graph. values: what makes a tensor whose contents matter, by its place among the tensors of `args`. cold:
    the places of those that a model reads once a step, so that they come from memory.
    """
    tensors = [stand_in(tensor) for tensor in tensors_of(args)]
    choices: dict[str, Any] = {label: kernel.bind(tensors, layout) for label, kernel in kernels.items()}
    for label, choice in choices.items():
        choice.description = label
    template = SubgraphTemplate(name)
    for label, formula in formulas.items():
        choices[label] = template.generate(
            name=f"{name}_{label}",
            input_nodes=tensors,
            layout=layout,
            make_fx_graph=functools.partial(_formula_graph, bind(formula, args)[0]),
            description=label,
        )
    inputs = inductor_timing.ColdInputs(cold)
    for choice in choices.values():
        if tune_products and isinstance(choice, SubgraphChoiceCaller):
            # The instance's own, which torch calls too where it times a choice itself.
            vars(choice)["_compile_for_benchmarking"] = functools.partial(_compile_as_in_graph, choice)
        timed = inductor_timing.graph_benchmark(choice, inputs) if layout.device.type == "cuda" else choice.benchmark
        choice.benchmark = _never_where_refused(timed)
    masks = {index: _all_true for index, tensor in enumerate(tensors) if tensor.get_dtype() == torch.bool}
    timings = get_algorithm_selector_cache().do_autotuning(
        name, tensors, layout, {**masks, **(values or {})}, create_inputs_key(tensors), list(choices.values()), dict
    )
    by_choice = {id(choice): label for label, choice in choices.items()}
    return {by_choice[id(choice)]: time for choice, time in timings.items() if time < float("inf")}


def _all_true(node: Node) -> torch.Tensor:
    """A mask that hides nothing: Inductor's own stand-in is False throughout, which a kernel need not look behind."""
    return example_value(node).fill_(True)


def half_open(node: Node) -> torch.Tensor:
    """A mask, bool or of numbers, that opens the first half of the keys, its last dimension."""
    mask = example_value(node)
    if mask.dtype != torch.bool:
        mask.fill_(-math.inf)
    mask[..., : -(-mask.shape[-1] // 2)] = mask.dtype == torch.bool
    return mask


def example_value(node: Node) -> torch.Tensor:
    """Inductor's stand-in for a tensor."""
    value: torch.Tensor = get_algorithm_selector_cache().benchmark_example_value(node)
    return value


def _never_where_refused(benchmark: Callable[..., float]) -> Callable[..., float]:
    """A choice's `benchmark`, infinite where the kernel says that its configuration does not take such arguments."""

    def timed(*args: torch.Tensor, out: torch.Tensor) -> float:
        try:
            return benchmark(*args, out=out)
        except RuntimeError as error:
            if "configuration" not in str(error):
                raise
            return math.inf

    return timed


def _compile_as_in_graph(choice: SubgraphChoiceCaller) -> Any:
    """The module of a formula under the configuration in effect: torch's own method switches the tuning off."""
    graph: Any = V.graph
    inputs = getattr(choice, "benchmark_inputs", choice.example_inputs)
    inputs = choice.example_inputs if choice.sym_inputs else inputs
    assert choice.gm is not None
    module = GraphLowering(
        choice.gm,
        example_inputs=inputs,
        shape_env=graph._shape_env,
        is_inference=graph.is_inference,
        is_backward=graph.is_backward,
        name=f"benchmark_{choice.name}",
    )
    for symbol in choice.sym_inputs:
        module.graph_inputs[symbol.name] = symbol
        module.graph_input_names.append(symbol.name)
    with V.set_graph_handler(module):
        module.run(*inputs)
        return module.compile_to_module()


def boxed(node: Node) -> Node:
    """A realised node as lowerings exchange it."""
    return node if isinstance(node, ir.TensorBox) else ir.TensorBox(node)


def _for_kernel(tensor: Node) -> Node:
    """In memory, the elements of a row adjacent."""
    node = ir.ExternKernel.realize_input(tensor)
    layout = node.get_layout()
    fixed = not isinstance(layout, ir.FlexibleLayout)
    if not fixed or (layout.stride and not V.graph.sizevars.statically_known_equals(layout.stride[-1], 1)):
        node = ir.ExternKernel.require_contiguous(node)
    return boxed(node)


def in_memory(tensor: Node) -> Node:
    """The tensor as it lies in memory, realised if it was not."""
    node = ir.ExternKernel.realize_input(tensor)
    return boxed(node)


def contiguous(tensor: Node) -> Node:
    """The tensor in memory, contiguous: itself where it is."""
    node = ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(tensor))
    return boxed(node)


def call_kernel(kernel: Kernel, tensors: Sequence[Node], layout: Node, as_they_lie: Sequence[Node] = ()) -> Node:
    """The kernel as a node of the graph under construction; its inputs are realised.

    as_they_lie: those of the tensors whose elements need not be adjacent.
    """
    kept = {id(tensor) for tensor in as_they_lie}
    given = [in_memory(tensor) if id(tensor) in kept else _for_kernel(tensor) for tensor in tensors]
    return kernel.bind(given, layout).output_node()


def lie_side_by_side(first: Node, second: Node) -> bool:
    """Whether two nodes are the even and the odd elements of the rows of one buffer. Both are realised."""
    found = [ir.ExternKernel.realize_input(node) for node in (first, second)]
    if not all(isinstance(node, ir.ReinterpretView) for node in found) or found[0].get_name() != found[1].get_name():
        return False
    layouts = [node.get_layout() for node in found]
    strides = zip(*(layout.stride for layout in layouts))
    equal = V.graph.sizevars.statically_known_equals
    behind = layouts[1].offset - layouts[0].offset
    return bool(equal(layouts[0].stride[-1], 2) and equal(behind, 1) and all(equal(a, b) for a, b in strides))


def call_operator(
    target: torch._ops.OpOverload, *args: object, as_they_lie: Sequence[Node] = (), **kwargs: object
) -> tuple[Node, ...]:
    """An operator that allocates its results itself, one or several, as a node of the graph under construction.

    as_they_lie: those of the tensors whose elements need not be adjacent.
    """
    kept = {id(tensor) for tensor in as_they_lie}

    def placed(arg: Any) -> Any:
        if isinstance(arg, (list, tuple)):
            return [placed(item) for item in arg]
        return (in_memory if id(arg) in kept else _for_kernel)(arg) if is_tensor(arg) else arg

    results: Any = ir.FallbackKernel.create(target, *(placed(arg) for arg in args), **kwargs)
    results = results if isinstance(results, (list, tuple)) else (results,)
    return tuple(ir.TensorBox.create(result) for result in results)


# --- the graph under construction ------------------------------------------------------------------------------------


def is_generated(tensor: Node) -> bool:
    """Whether Inductor generates the code of a value, so that a formula reading it could share its kernel."""
    data = tensor
    while isinstance(data, (ir.TensorBox, ir.StorageBox, ir.BaseView)):
        data = data.data
    if isinstance(data, ir.ComputedBuffer):
        data = data.data
    return isinstance(data, ir.Loops)


def kept_for_graph(name: str) -> dict[Any, Any]:
    """A dictionary that belongs to the graph under construction, empty at first."""
    kept: dict[Any, Any] = V.graph.__dict__.setdefault(f"infuse_{name}", {})
    return kept


def current_node() -> torch.fx.Node:
    """The FX node being lowered."""
    return V.graph.current_node


def current_site() -> str:
    """The id of the site that the node being lowered comes from; "" when the author wrote the operator himself."""
    return str(current_node().meta.get("custom", {}).get(SITE_KEY, ""))


_SITES_KEY = "infuse_sites"


def set_sites(node: torch.fx.Node, sites: Sequence[str]) -> None:
    """Makes a node that is lowered stand for several sites."""
    node.meta[_SITES_KEY] = tuple(sites)


def current_sites() -> tuple[str, ...]:
    """The ids of the sites that the node being lowered stands for; one that is "" where there are none."""
    return current_node().meta.get(_SITES_KEY) or (current_site(),)


def realise_where_it_stands(node: torch.fx.Node) -> None:
    """Has a value of the graph that is to be lowered made in memory at its place, not where it is read first."""
    node.meta["inductor_realize_to_strides"] = True  # GraphLowering.run_node's, of torch 2.11 to 2.13


# --- examples --------------------------------------------------------------------------------------------------------


def fake_mode() -> Any:
    """The fake mode of the compilation under way."""
    return V.fake_mode


def example(node: Node) -> torch.Tensor:
    """A fake tensor with the size and strides of an IR node."""
    tensor: Any = ir.ir_node_to_tensor(node)
    return tensor  # type: ignore[no-any-return]


def examples(args: Sequence[Any]) -> list[Any]:
    """An operator's arguments with fake tensors for IR nodes, also in lists."""
    return [
        examples(arg) if isinstance(arg, (list, tuple)) else example(arg) if is_tensor(arg) else arg for arg in args
    ]


def hints(node: Node) -> tuple[int, ...]:
    """The sizes of an IR node, symbolic ones by their example values."""
    return tuple(int(hint) for hint in V.graph.sizevars.optimization_hints(node.get_size()))


def rows_and_row_size(node: Node) -> tuple[int, int]:
    """([...], D) -> (number of rows, D)."""
    *leading, row_size = hints(node)
    return math.prod(leading), row_size


def code_of(function: Callable[..., Any], args: Sequence[object]) -> str:
    """The text of the ATen graph of a formula, to tell two formulas apart."""
    bound, tensors = bind(function, args)
    return trace(bound, tensors).code


def register_inline(target: torch._ops.OpOverload, function: Callable[..., Any]) -> None:
    """Makes the formula the lowering of an operator on every device."""
    register(target, functools.partial(inline, function))
