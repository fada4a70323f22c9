"""What options of the commands may be, in a file that loads hardly anything, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from drsformer.config import LEVELS, SIZE_MULTIPLE
from runtime.errors import InputError, expect_between, expect_finite
from runtime.pixels import Size, size_text

Kind = Literal["ffn", "heads", "experts", "width", "depth"]
"""Kinds of pruning groups, see `compress.groups`."""

KINDS: tuple[Kind, ...] = get_args(Kind)

Importance = Literal["obs", "taylor", "fisher", "magnitude"]
"""Measures of how much a unit is needed, see `compress.obs` and `compress.importance`."""


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms of a distillation's loss; a term of weight 0 is not computed.

    Args:
        l1: Weight of the L1 distance to the clean patch, the loss that the teacher was trained with (DRSformer, Eq. 1).
        l1_teacher: Weight of the L1 distance to the teacher's output: its answers as targets (Hinton et al., arXiv
            1503.02531).
        features: Weight of the squared distance to the teacher's features at the bottleneck, the output of the latent
            level, over their mean square; where the widths differ, after a 1x1 convolution that is learned beside the
            student and thrown away with the run (FitNets, arXiv 1412.6550, Eq. 3).
        attention: Weight of the squared distance to the teacher's attention matrices, before masks and softmax, of the
            last block of each of the levels named below (TinyBERT, arXiv 1909.10351, Eq. 7). Both networks need the
            same heads there.
        frequency: Weight of the L1 distance to the teacher's output in the frequency domain, over real and imaginary
            parts of an orthonormal FFT (MIMO-UNet, arXiv 2108.05054, Eq. 7).
        attention_levels: Levels whose attention is compared: encoder_level1 to 3, latent, decoder_level3 to 1.

    Raises:
        InputError: A value is out of range, or nothing tells the student what to put out.
    """

    l1: float = 1.0
    l1_teacher: float = 1.0
    features: float = 0.0
    attention: float = 0.0
    frequency: float = 0.0
    attention_levels: list[str] = field(default_factory=lambda: ["latent"])

    def __post_init__(self) -> None:
        for name in ("l1", "l1_teacher", "features", "attention", "frequency"):
            expect_finite(name, getattr(self, name))
            expect_between(name, getattr(self, name), 0)
        if not self.l1 + self.l1_teacher + self.frequency:
            raise InputError(
                "nothing tells the student what to put out: expected `l1`, `l1_teacher` or `frequency` above 0, found "
                "none"
            )
        if self.attention and not self.attention_levels:
            raise InputError("`attention_levels`: expected at least one with `attention`, found none")
        if unknown := [level for level in self.attention_levels if level not in LEVELS]:
            raise InputError(f"`attention_levels`: expected some of {', '.join(LEVELS)}, found {unknown[0]}")


def expect_multiples(parameter: str, size: Size) -> None:
    """Raise InputError unless height and width are multiples of 8, which the network takes."""
    if size[0] % SIZE_MULTIPLE or size[1] % SIZE_MULTIPLE:
        raise InputError(f"`{parameter}`: expected multiples of {SIZE_MULTIPLE}, found {size_text(size)}")
