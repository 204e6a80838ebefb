"""Whole decoders: prefill, a decode step over a static KV cache, and a training step (forward and backward).

    python benchmarks/models.py [--quick] [--cases REGEX] [--impl REGEX] [--output DIR] [--list]

On a GPU Llama-3.1-8B's shapes with few layers in bf16, from torchtune and from Hugging Face. On a CPU a small decoder
in fp32, which shows that enabling Infuse costs nothing where it has no kernels: the notes hold its time over stock's
from the same rounds. Weights are random. The fp64 reference keeps the statistics and rotations that a model's code
forces to fp32.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from command import main
from harness import Case, Device, Function, Impl, Inputs, compiled_pairs, eager
from implementations import NO_CUDAGRAPHS, Later, optional
from torch import Tensor, nn
from torch.nn import functional as F

# Calls of a decode step in one sample; each moves the cache's write position on by one.
DECODE_CALLS = 4
Modes = Sequence[tuple[str, str | None]]


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder's sizes; vocab_size 0 is no model."""

    name: str
    dim: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    vocab_size: int
    dtype: torch.dtype

    @property
    def kv_dim(self) -> int:
        return self.dim // self.heads * self.kv_heads

    def matmul_weights(self) -> int:
        """Elements of all matrices that a token is multiplied with, the output head's among them."""
        layer = 2 * self.dim * self.dim + 2 * self.dim * self.kv_dim + 3 * self.dim * self.hidden
        return self.layers * layer + self.dim * self.vocab_size

    def attention_flops(self, pairs: int) -> int:
        """Both products, over all layers, for that many pairs of a query and a key that it attends to."""
        return 4 * self.layers * self.dim * pairs


def llama_8b(layers: int) -> Shape:
    return Shape(f"llama-8b {layers} layers", 4096, layers, 32, 8, 14336, 128256, torch.bfloat16)


SMALL = Shape("llama-small 4 layers", 256, 4, 8, 4, 768, 512, torch.float32)
TINY = Shape("llama-tiny 1 layer", 64, 1, 4, 2, 128, 128, torch.float32)


def torchtune_llama(shape: Shape, device: torch.device, max_seq_len: int) -> nn.Module:
    llama3 = optional("torchtune.models.llama3").llama3
    with device:
        model: nn.Module = llama3(
            vocab_size=shape.vocab_size,
            num_layers=shape.layers,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            embed_dim=shape.dim,
            intermediate_dim=shape.hidden,
            max_seq_len=max_seq_len,
        )
    return randomise(model, shape.dtype)


def hugging_face_llama(shape: Shape, device: torch.device, max_seq_len: int) -> nn.Module:
    transformers = optional("transformers")
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.dim,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=max_seq_len,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with device:
        model: nn.Module = transformers.LlamaForCausalLM(config)
    return randomise(model, shape.dtype)


def randomise(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Norm weights around one, as trained ones are; the rest as its authors initialise it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.2)
    return model.to(dtype).eval()


def logits_of(model: Any, is_hugging_face: bool) -> Function:
    def torchtune_logits(tokens: Tensor) -> Tensor:
        logits: Tensor = model(tokens)
        return logits

    def hugging_face_logits(tokens: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=tokens).logits
        return logits

    return hugging_face_logits if is_hugging_face else torchtune_logits


def loss_of(model: Any, is_hugging_face: bool) -> Function:
    def torchtune_loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten())

    def hugging_face_loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1).float(), targets.flatten())

    return hugging_face_loss if is_hugging_face else torchtune_loss


def decode_of(model: Any) -> Function:
    def decode_step(tokens: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        logits: Tensor = model(tokens, mask=mask, input_pos=input_pos)
        return logits

    return decode_step


def with_backward(loss: Function, model: nn.Module) -> Function:
    """The training step around a compiled or eager loss: all gradients are computed, those of some weights returned."""
    parameters = list(model.parameters())
    norms = [parameter for parameter in parameters if parameter.dim() == 1]
    matrices = [parameter for parameter in parameters if parameter.dim() == 2]
    chosen = [norms[0], norms[-1], matrices[1], matrices[-2]]

    def step(*args: Tensor) -> list[Tensor]:
        for parameter in parameters:
            parameter.grad = None
        value = loss(*args)
        assert isinstance(value, Tensor)
        value.backward()
        gradients = [parameter.grad for parameter in chosen if parameter.grad is not None]
        assert len(gradients) == len(chosen)
        return [value.detach(), *gradients]

    return step


class Model:
    """A model of one shape that is built when it is first needed, and its copy in fp64."""

    def __init__(self, shape: Shape, device: Device, max_seq_len: int, is_hugging_face: bool, cached: bool = False):
        self.shape = shape
        self.device = device
        self.max_seq_len = max_seq_len
        self.is_hugging_face = is_hugging_face
        self.cached = cached
        self._module: nn.Module | None = None

    def get(self) -> nn.Module:
        if self._module is None:
            build = hugging_face_llama if self.is_hugging_face else torchtune_llama
            module: Any = build(self.shape, self.device.torch_device, self.max_seq_len)
            if self.cached:
                with self.device.torch_device:
                    module.setup_caches(1, self.shape.dtype, decoder_max_seq_len=self.max_seq_len)
                for cache in self.caches(module):
                    cache.k_cache.normal_()
                    cache.v_cache.normal_()
            self._module = module
        return self._module

    def exact(self) -> nn.Module:
        return copy.deepcopy(self.get()).double()

    def caches(self, module: nn.Module) -> list[Any]:
        return [child for child in module.modules() if hasattr(child, "cache_pos")]

    def rewind(self, position: int, module: nn.Module | None = None) -> None:
        """The next token is written at `position`."""
        for cache in self.caches(module or self.get()):
            cache.cache_pos.copy_(torch.arange(self.max_seq_len, device=cache.cache_pos.device) + position)


def random_tokens(generator: torch.Generator, shape: Shape, length: int) -> Tensor:
    return torch.randint(shape.vocab_size, (1, length), generator=generator, device=generator.device)


def prefill(model: Model, length: int, modes: Modes) -> Case:
    shape = model.shape
    function = Later(lambda: logits_of(model.get(), model.is_hugging_face))
    return Case(
        name=f"{source(model)} {shape.name} prefill {length}",
        inputs=lambda g: (random_tokens(g, shape, length),),
        eager=function,
        reference=lambda tokens: logits_of(model.exact(), model.is_hugging_face)(tokens),
        impls=[eager(function, capture=False), *compiled_pairs(function, *modes, capture=False)],
        bytes=(shape.matmul_weights() + length * shape.vocab_size) * shape.dtype.itemsize,
        flops=2 * shape.matmul_weights() * length + shape.attention_flops(length * length // 2),
        dtype=shape.dtype,
        sets=2,
        tolerance_factor=3.0,
    )


def decode(model: Model, modes: Modes) -> Case:
    """One token into a cache that is full but for the positions that a sample writes. Every call gives the same answer:
    the mask ends at the first of them."""
    shape, length = model.shape, model.max_seq_len
    position = length - 2 * DECODE_CALLS
    function = Later(lambda: decode_of(model.get()))

    def inputs(generator: torch.Generator) -> Inputs:
        where = torch.full((1, 1), position, device=generator.device)
        mask = torch.arange(length, device=generator.device)[None, None] <= position
        return random_tokens(generator, shape, 1), mask, where

    def reference(*args: Tensor) -> Any:
        module = model.exact()
        model.rewind(position, module)
        return decode_of(module)(*args)

    return Case(
        name=f"{source(model)} {shape.name} decode, cache {length}",
        inputs=inputs,
        eager=function,
        reference=reference,
        impls=[eager(function, capture=False), *compiled_pairs(function, *modes, capture=False)],
        bytes=(shape.matmul_weights() + 2 * shape.layers * shape.kv_dim * (position + 1)) * shape.dtype.itemsize,
        flops=2 * shape.matmul_weights() + shape.attention_flops(position + 1),
        dtype=shape.dtype,
        sets=1,
        calls=DECODE_CALLS,
        tolerance_factor=3.0,
        reset=lambda: model.rewind(position),
    )


def train(model: Model, length: int, modes: Modes) -> Case:
    shape = model.shape
    loss = Later(lambda: loss_of(model.get(), model.is_hugging_face))
    step = Later(lambda: with_backward(loss, model.get()))

    def reference(*args: Tensor) -> Any:
        module = model.exact()
        return with_backward(loss_of(module, model.is_hugging_face), module)(*args)

    def training(impl: Impl) -> Impl:
        return dataclasses.replace(impl, prepare=lambda: with_backward(impl.prepare(), model.get()))

    return Case(
        name=f"{source(model)} {shape.name} train {length}",
        inputs=lambda g: (random_tokens(g, shape, length), random_tokens(g, shape, length)),
        eager=step,
        reference=reference,
        impls=[
            eager(step, capture=False),
            *(training(impl) for impl in compiled_pairs(loss, *modes, capture=False)),
        ],
        bytes=3 * shape.matmul_weights() * shape.dtype.itemsize,
        flops=3 * (2 * shape.matmul_weights() * length + shape.attention_flops(length * length // 2)),
        dtype=shape.dtype,
        sets=2,
        grad=True,
        tolerance_factor=3.0,
    )


def source(model: Model) -> str:
    return "huggingface" if model.is_hugging_face else "torchtune"


def cases(device: Device, quick: bool) -> Iterator[Case]:
    modes: Modes = (("", None),)
    decode_modes = modes
    if quick:
        shape, prompt, batch, caches = TINY, 32, 16, [32]
    elif device.type == "cpu":
        shape, prompt, batch, caches = SMALL, 256, 128, [512]
    else:
        shape, prompt, batch, caches = llama_8b(2), 4096, 4096, [1024, 4096]
        modes = (("", None), ("-max-autotune", NO_CUDAGRAPHS))
        decode_modes = (("", None), ("-reduce-overhead", "reduce-overhead"), ("-max-autotune", "max-autotune"))
    for length in caches:
        yield decode(Model(shape, device, length, is_hugging_face=False, cached=True), decode_modes)
    for is_hugging_face in (False, True):
        model = Model(shape, device, max(prompt, batch), is_hugging_face)
        yield prefill(model, prompt, modes)
        yield train(model, batch, modes)


if __name__ == "__main__":
    raise SystemExit(main("models", __doc__, cases))
