"""What options of the commands may be, by name, in a module that loads no PyTorch."""

from __future__ import annotations

from typing import Literal

Pattern = Literal["threshold", "scatter", "rank"]
"""A form of the top-k masks; see `export.topk`."""

Precision = Literal["fp32", "fp16", "bf16"]
"""What a network computes in; see `export.folding`."""
