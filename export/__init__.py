"""From a DRSformer to ONNX, TensorRT and Triton, with the proof that it is still the same network.

    from export.onnx import ExportOptions, export
    from export.validate import ValidateOptions, validate

    export(Path("full.safetensors"), Path("half.onnx"), ExportOptions(precision="fp16"))
    assert validate(Path("full.safetensors"), Path("half.onnx"), data, ValidateOptions(max_drop_db=0.05)).passed

Each command is a function of its module too: these two, `export.tensorrt.build` and `export.triton.export`. What they
are made of has the names below. `import export` does not load PyTorch; the first use of a name that needs it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.lazy import lazy_names

if TYPE_CHECKING:
    from .comparison import Comparison, Validation
    from .folding import fold, trainable
    from .graph import to_onnx
    from .options import Pattern, Precision
    from .report import render
    from .topk import with_pattern
    from .verification import Agreement, verify

__all__ = [
    "Agreement",
    "Comparison",
    "Pattern",
    "Precision",
    "Validation",
    "fold",
    "render",
    "to_onnx",
    "trainable",
    "verify",
    "with_pattern",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Agreement": "verification",
        "Comparison": "comparison",
        "Pattern": "options",
        "Precision": "options",
        "Validation": "comparison",
        "fold": "folding",
        "render": "report",
        "to_onnx": "graph",
        "trainable": "folding",
        "verify": "verification",
        "with_pattern": "topk",
    },
)
