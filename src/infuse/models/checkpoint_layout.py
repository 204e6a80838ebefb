"""How a decoder's parameters lie in a Hugging Face checkpoint: their names there, and the order of rotary rows.

Hugging Face rotates the pairs (i, i + D/2) of a head of dimension D, torchtune's plain and Llama-3 embeddings the pairs
(2i, 2i + 1). Both are the same model when the rows of q and k are reordered, head by head; Qwen2's need no reordering.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from infuse.models.config import ModelConfig, has_tied_head, rotates_halves
from infuse.models.cut_parameters import gathered, held, is_cut, own_part
from infuse.models.shard import Shard

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_OUTSIDE_LAYERS = {"tok_embeddings.weight": EMBEDDING, "norm.scale": "model.norm.weight", "output.weight": HEAD}
_IN_LAYER = {
    "sa_norm.scale": "input_layernorm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_LAYER_NAME = re.compile(r"layers\.(\d+)\.(.+)")
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")  # older checkpoints hold what follows from the configuration


@dataclass(frozen=True, slots=True)
class Entry:
    """A parameter and the tensor it is in the checkpoint. reordered_heads: 0, or how many heads' rows change order.

    Of a parameter that is cut over ranks (a DTensor) `local` and `part` are what this rank holds.
    """

    name: str
    parameter: nn.Parameter
    reordered_heads: int

    @property
    def local(self) -> Tensor:
        """This process's part of the parameter: the memory to fill."""
        return held(self.parameter)

    @property
    def part(self) -> tuple[slice, ...]:
        """Which of the checkpoint's tensor this process holds; all of it unless the parameter is cut."""
        return own_part(self.parameter) if is_cut(self.parameter) else ()

    def from_checkpoint(self, tensor: Tensor) -> Tensor:
        """The value of `local` from that part, of the tensor's shape and dtype. A part has whole heads."""
        heads = self.reordered_heads * tensor.shape[0] // self.parameter.shape[0]
        return _reorder(tensor, heads, to_pairs=True) if heads else tensor

    def to_checkpoint(self) -> Tensor:
        """What to write: contiguous, on the CPU, sharing no memory with the parameter when reordered.

        Every rank that holds a part must call it, in the same order: the parts are gathered.
        """
        tensor = gathered(self.parameter).detach().cpu()
        return (_reorder(tensor, self.reordered_heads, to_pairs=False) if self.reordered_heads else tensor).contiguous()


def entries(decoder: nn.Module, config: ModelConfig, shard: Shard) -> list[Entry]:
    """Every parameter of a shard's decoder. A tied head with no embedding beside it is read from the embedding's."""
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    found = []
    for name, parameter in decoder.named_parameters():
        tensor = _checkpoint_name(name, shard.start_layer)
        if tensor == HEAD and has_tied_head(config, shard.model_id):
            tensor = EMBEDDING
        projection = name.split(".")[-2]
        reordered = 0 if rotates_halves(config, shard.model_id) else heads.get(projection, 0)
        found.append(Entry(tensor, parameter, reordered))
    return found


def unknown_names(names: set[str], shard_entries: list[Entry], config: ModelConfig, shard: Shard) -> list[str]:
    """Those of a checkpoint's tensors that no shard of this model takes, sorted."""
    prefix = f"model.layers.{shard.start_layer}."
    in_layer = [entry.name.removeprefix(prefix) for entry in shard_entries if entry.name.startswith(prefix)]
    known = {f"model.layers.{layer}.{name}" for layer in range(config.num_layers) for name in in_layer}
    known |= set(_OUTSIDE_LAYERS.values())
    return sorted(name for name in names - known if not _COMPUTED.search(name))


def _checkpoint_name(name: str, start_layer: int) -> str:
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        return _OUTSIDE_LAYERS[name]
    layer, inner = start_layer + int(match[1]), match[2]
    module, _, kind = inner.rpartition(".")
    theirs = _IN_LAYER[inner] if inner in _IN_LAYER else f"{_IN_LAYER[module]}.{kind}"
    return f"model.layers.{layer}.{theirs}"


def _reorder(tensor: Tensor, num_heads: int, *, to_pairs: bool) -> Tensor:
    """Rows of each head from halves (i, i + D/2) to pairs (2i, 2i + 1), or back; [heads * D, ...] in and out."""
    half = tensor.shape[0] // num_heads // 2
    split = (num_heads, 2, half) if to_pairs else (num_heads, half, 2)
    reordered: Tensor = tensor.unflatten(0, split).transpose(1, 2).flatten(0, 2)
    return reordered
