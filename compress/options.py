"""What options of the commands may be, in a file that loads hardly anything, so that --help is quick."""

from __future__ import annotations

from typing import Literal, get_args

from drsformer.config import SIZE_MULTIPLE
from runtime.errors import InputError
from runtime.pixels import Size, size_text

Kind = Literal["ffn", "heads", "experts", "width", "depth"]
"""Kinds of pruning groups, see `compress.groups`."""

KINDS: tuple[Kind, ...] = get_args(Kind)

Importance = Literal["taylor", "fisher", "magnitude"]
"""Measures of how much a unit is needed, see `compress.importance`."""


def expect_multiples(parameter: str, size: Size) -> None:
    """Raise InputError unless height and width are multiples of 8, which the network takes."""
    if size[0] % SIZE_MULTIPLE or size[1] % SIZE_MULTIPLE:
        raise InputError(f"`{parameter}`: expected multiples of {SIZE_MULTIPLE}, found {size_text(size)}")
