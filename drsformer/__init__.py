"""DRSformer (Chen et al., CVPR 2023): the network, how it is trained, and how it is scored.

    from drsformer import load

    model = load("drsformer-xs.safetensors").model    # float32 (1, 3, H, W) in [0, 1] -> the same

The names below are what other programs may rely on. `import drsformer` does not load PyTorch; the first use of a name
that needs it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.lazy import lazy_names

from .config import PRESETS, DRSformerConfig, preset

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, load, save
    from .evaluation import evaluate_model
    from .model import DRSformer

__all__ = ["PRESETS", "Checkpoint", "DRSformer", "DRSformerConfig", "evaluate_model", "load", "preset", "save"]

__getattr__ = lazy_names(
    __name__,
    {
        "Checkpoint": "checkpoint",
        "DRSformer": "model",
        "evaluate_model": "evaluation",
        "load": "checkpoint",
        "save": "checkpoint",
    },
)
