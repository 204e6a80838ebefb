"""How infuse::attention may be cut for DTensor: along batch, and along heads where every rank gets whole groups."""

from __future__ import annotations

from typing import Any

from infuse.ops.registration import Placements


def inference(
    q: Any, k: Any, v: Any, mask: Any, scale: Any, is_causal: Any, softcap: Any, sinks: Any, *flags: Any
) -> Placements:
    """Rules of infuse::attention. flags: masked_rows, dropout_p, round_scores."""
    return _forward_rules(1, k, mask, sinks, flags[1], [None] * 3)


def forward(
    q: Any, k: Any, v: Any, mask: Any, scale: Any, is_causal: Any, softcap: Any, sinks: Any, *flags: Any
) -> Placements:
    """Rules of infuse::attention_fwd. flags: masked_rows, dropout_p, seed."""
    return _forward_rules(2, k, mask, sinks, flags[1], [None, None, _whole(flags[2])])


def backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    mask: Any,
    scale: Any,
    is_causal: Any,
    needs_dmask: Any,
    softcap: Any,
    sinks: Any,
    masked_rows: Any,
    dropout_p: Any,
    seed: Any,
) -> Placements:
    """As the forward; the gradients of a mask that is whole, and of sinks, are summed over the ranks."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    flags = [None] * 4
    last = [None, None, _whole(seed)]
    whole = [*[Replicate()] * 6, _whole(mask), *flags, _whole(sinks), *last]
    rules: list[tuple[list[Any], list[Any]]] = [([Replicate()] * 5, whole)]
    for dim in _dims(k, dropout_p):
        place, mask_place = Shard(dim), _mask_placement(mask, dim)
        dmask = Replicate() if not needs_dmask else Partial() if mask_place == Replicate() else mask_place
        dsinks = Replicate() if sinks is None else Shard(0) if dim == 1 else Partial()
        taken = [*[place] * 6, mask_place, *flags, _sinks_placement(sinks, dim), *last]
        rules.append(([place, place, place, dmask, dsinks], taken))
    return rules


def _forward_rules(num_outputs: int, k: Any, mask: Any, sinks: Any, dropout_p: Any, last: list[Any]) -> Placements:
    """last: the placements of what follows the sinks."""
    from torch.distributed.tensor import Replicate, Shard

    whole = [Replicate(), Replicate(), Replicate(), _whole(mask), None, None, None, _whole(sinks), *last]
    rules: list[tuple[list[Any], list[Any]]] = [([Replicate()] * num_outputs, whole)]
    for dim in _dims(k, dropout_p):
        place = Shard(dim)
        taken = [place, place, place, _mask_placement(mask, dim), None, None, None, _sinks_placement(sinks, dim), *last]
        rules.append(([place] * num_outputs, taken))
    return rules


def _dims(k: Any, dropout_p: float) -> list[int]:
    """Batch, and heads where every rank gets whole groups; neither with dropout, which would drop the same on each."""
    if dropout_p != 0.0:
        return []
    return [0, 1] if k.shape[1] % k.mesh.size() == 0 else [0]


def _whole(tensor: Any) -> Any:
    from torch.distributed.tensor import Replicate

    return None if tensor is None else Replicate()


def _mask_placement(mask: Any, dim: int) -> Any:
    """A mask is cut along a batch or head dimension that it has, and whole where it broadcasts."""
    from torch.distributed.tensor import Replicate, Shard

    if mask is None:
        return None
    own = dim - (4 - len(mask.shape))
    return Shard(own) if own >= 0 and mask.shape[own] != 1 else Replicate()


def _sinks_placement(sinks: Any, dim: int) -> Any:
    """Sinks go with the heads."""
    from torch.distributed.tensor import Replicate, Shard

    return None if sinks is None else Shard(0) if dim == 1 else Replicate()
