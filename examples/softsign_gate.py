"""Adds an activation to Infuse: softsign(gate) * up, with a kernel, and compiles a model that uses it.

    python examples/softsign_gate.py

The kernel here is plain torch on a CPU, so that this runs anywhere; in its place may stand a Triton kernel or an
operator of a C++ library, with device="cuda".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import infuse


def softsign_gate(gate: Tensor, up: Tensor) -> Tensor:
    """The operator's formula: what runs where no kernel does, and what is differentiated in training."""
    return F.softsign(gate) * up


def softsign_by_hand(gate: Tensor, up: Tensor) -> Tensor:
    """Another spelling that authors use."""
    return gate / (1 + gate.abs()) * up


def kernel(gate: Tensor, up: Tensor, *, out: Tensor) -> None:
    """Writes the result into `out`, which is contiguous."""
    torch.mul(F.softsign(gate), up, out=out)


def can_run(gate: Tensor, up: Tensor) -> bool | str:
    """True, or the reason why not: what is not said to be allowed here never reaches the kernel."""
    return True if gate.is_contiguous() and up.is_contiguous() else "it takes contiguous tensors only"


infuse.register_pattern("softsign_gate", formula=softsign_gate)
infuse.register_pattern("softsign_gate", example=softsign_by_hand)
infuse.register_kernel("softsign_gate", kernel, device="cpu", can_run=can_run)


class GatedMLP(nn.Module):
    def __init__(self, dim: int = 32, hidden: int = 64) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.activation = nn.Softsign()

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
