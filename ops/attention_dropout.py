"""Which probabilities dropout keeps: Philox4x32-10 (Salmon et al., SC 2011), by torch operators, for any device.

Four neighbouring keys of a row share one block of four random words, so that the forward and the backward kernel find
the same bits in whatever order they visit the scores. The seed is drawn from torch's generator.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF
_SEEDS = 2**62


def draw_seed(device: torch.device) -> Tensor:
    """[2], int64: the generator's key, and the counter's upper half."""
    return torch.randint(_SEEDS, (2,), dtype=torch.int64, device=device)


def threshold(dropout_p: float) -> int:
    """Random words from this number on keep their probability."""
    return min(round(dropout_p * 2**32), _WORD)


def kept(seed: Tensor, dropout_p: float, shape: tuple[int, int, int, int]) -> Tensor:
    """bool [B, H, S, T]: the probabilities that dropout keeps. seed: int64 [2]."""
    batch, heads, queries, keys = shape
    blocks = -(-keys // 4)
    index = torch.arange(batch * heads * queries * blocks, device=seed.device, dtype=torch.int64)
    words = philox((index & _WORD, index >> 32, seed[1] & _WORD, (seed[1] >> 32) & _WORD), seed[0])
    return (words >= threshold(dropout_p)).view(batch, heads, queries, 4 * blocks)[..., :keys]


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Tensor) -> Tensor:
    """[..., 4], numbers below 2^32 in int64. counter: four words; key: 64 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _WORD, (key >> 32) & _WORD
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # modulo 2^64, with the bits of unsigned numbers
        c0, c2 = ((second >> 32) & _WORD) ^ c1 ^ k0, ((first >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = second & _WORD, first & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), -1)
