"""Adds an activation to Infuse: mish(gate) * up, with a kernel, and compiles a model that uses it.

    python examples/mish_gate.py

The kernel here is plain torch on a CPU, so that this runs anywhere; in its place may stand a Triton kernel or an
operator of a C++ library, with device="cuda".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import infuse


def mish_gate(gate: Tensor, up: Tensor) -> Tensor:
    """The operator's formula: what runs where no kernel does, and what is differentiated in training."""
    return F.mish(gate) * up


def mish_by_hand(gate: Tensor, up: Tensor) -> Tensor:
    """Another spelling that authors use."""
    return gate * torch.tanh(F.softplus(gate)) * up


def kernel(gate: Tensor, up: Tensor, *, out: Tensor) -> None:
    """Writes the result into `out`, which is contiguous."""
    torch.mul(F.mish(gate), up, out=out)


def can_run(gate: Tensor, up: Tensor) -> bool | str:
    """True, or the reason why not: what is not said to be allowed here never reaches the kernel."""
    return True if gate.is_contiguous() and up.is_contiguous() else "it takes contiguous tensors only"


infuse.register_pattern("mish_gate", formula=mish_gate)
infuse.register_pattern("mish_gate", example=mish_by_hand)
infuse.register_kernel("mish_gate", kernel, device="cpu", can_run=can_run)


class GatedMLP(nn.Module):
    def __init__(self, dim: int = 32, hidden: int = 64) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.activation = nn.Mish()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * self.activation(self.gate(x)))


def main() -> infuse.Report:
    """Compiles the model with the kernel and checks the result. Returns the report."""
    model, x = GatedMLP().eval(), torch.randn(4, 32)
    options = {"infuse.kernels": "always", "infuse.verify": "compile"}
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="infuse", options=options)(x), model(x))
    return infuse.last_report()


if __name__ == "__main__":
    main().print()
