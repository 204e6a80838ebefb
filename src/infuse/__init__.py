"""Infuse: fused attention, RMSNorm and SwiGLU for any model that torch.compile can capture.

    model = torch.compile(model, backend="infuse", mode="max-autotune")

Importing this registers the operators and does nothing else: no CUDA context, no device query.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from infuse import caches, ops
from infuse.ops.add_layer_norm import add_layer_norm
from infuse.ops.add_rms_norm import add_rms_norm
from infuse.ops.attention import attention
from infuse.ops.gated_rms_norm import gated_rms_norm
from infuse.ops.layer_norm import layer_norm
from infuse.ops.linear_cross_entropy import linear_cross_entropy
from infuse.ops.rms_norm import rms_norm
from infuse.ops.rope import rope
from infuse.ops.swiglu import swiglu
from infuse.report import Report, SiteRecord, StrictError
from infuse.settings import Settings, override
from infuse.version import __version__

if TYPE_CHECKING:
    from infuse import testing
    from infuse.backend import options
    from infuse.decorator import fuse
    from infuse.extension import register_kernel, register_pattern
    from infuse.history import last_report, reset_report
    from infuse.inspection import explain

caches.tag_caches()

__all__ = [
    "Report",
    "Settings",
    "SiteRecord",
    "StrictError",
    "__version__",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "explain",
    "fuse",
    "gated_rms_norm",
    "last_report",
    "layer_norm",
    "linear_cross_entropy",
    "ops",
    "options",
    "override",
    "register_kernel",
    "register_pattern",
    "reset_report",
    "rms_norm",
    "rope",
    "swiglu",
    "testing",
]

# Loaded at first use: these import Inductor, which takes seconds.
_LAZY = {
    "options": "infuse.backend",
    "fuse": "infuse.decorator",
    "explain": "infuse.inspection",
    "last_report": "infuse.history",
    "register_kernel": "infuse.extension",
    "register_pattern": "infuse.extension",
    "reset_report": "infuse.history",
    "testing": "infuse.testing",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'infuse' has no attribute {name!r}")
    import importlib

    module = importlib.import_module(_LAZY[name])
    value = module if module.__name__ == f"infuse.{name}" else getattr(module, name)
    globals()[name] = value
    return value
