"""Cuts an image into overlapping tiles and puts the restored tiles together again.

    from runtime import Derainer

    derain = Derainer(memory=4_000_000_000)      # bytes, of the whole process; or Derainer(tile=(512, 512))
    print(derain.plan(4000, 6000))               # 35 tiles of 864x912, 64 pixels of overlap, for 4000x6000
    clean = derain(rainy, on_tile=lambda done, total: print(f"{done} of {total}"))

For images that do not fit into memory or into an engine. The network's attention looks at the whole of what it is
given, so a tile is restored with other statistics than the whole image, and the answers differ; `export.validate
--tile` measures by how much. To hide it, neighbours share `overlap` pixels in which one fades into the other by a cubic
ramp, t^2 (3 - 2t), whose slope is 0 at both ends. Weights are made for each axis and add up to 1 there, so that
their products do too, and nothing has to be divided. The last tile is shifted inside the image rather than padded.

`runtime/cpp` does the same to the byte; both are tested against `tests/golden/tiling.json`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import InputError, OutOfMemory
from .pixels import Size, size_text

OnTile = Callable[[int, int], None]
"""Called after every tile with how many are done, and of how many."""

OVERLAP = 64
"""Pixels that neighbours share if nothing else is asked for, or a quarter of the largest tile's shorter side if that is
less."""

LEAST = 64
"""Height and width below which tiles are not made smaller for want of memory: attention over less is not worth much."""

ALIGNMENT = 16
"""Sides of tiles that memory bounds are multiples of this, for the networks that pad inside."""


@dataclass(frozen=True)
class Plan:
    """How an image is cut. The image as a whole is one tile of its own size.

    Attributes:
        size: Size of the image, already padded to what the network takes.
        tile: Size of every tile; no side is longer than the image's.
        overlap: Pixels that neighbours share at least, no more than half of a side on which there are several tiles.

    Raises:
        InputError: For a tile or an overlap that is none.
    """

    size: Size
    tile: Size
    overlap: int

    def __post_init__(self) -> None:
        for length, tile in zip(self.size, self.tile, strict=True):
            if not 1 <= tile <= length:
                raise InputError(
                    f"expected tiles of at least 1x1 and at most {size_text(self.size)} pixels, found "
                    f"{size_text(self.tile)}"
                )
            if self.overlap < 0 or (tile < length and 2 * self.overlap > tile):
                raise InputError(
                    f"expected an overlap of 0 to {tile // 2} pixels, half of the tile, found {self.overlap}"
                )

    @property
    def count(self) -> int:
        """Of tiles."""
        return math.prod(_count(*axis, self.overlap) for axis in zip(self.size, self.tile, strict=True))

    def __str__(self) -> str:
        if self.tile == self.size:
            return f"{size_text(self.size)} as a whole"
        tile, size = size_text(self.tile), size_text(self.size)
        return f"{self.count} tiles of {tile}, {self.overlap} pixels of overlap, for {size}"


def plan(
    size: Size,
    multiple: int,
    limits: Iterable[tuple[Size, Size]] = (),
    pixels: float = math.inf,
    tile: Size | None = None,
    overlap: int | None = None,
) -> Plan:
    """The whole image if it fits, else large tiles. An image that is smaller than the network takes is padded further,
    and no more than it has to be.

    A tile that is asked for and is within no limits is left to the network to refuse.

    Args:
        size: Size of the image, already padded to `multiple`.
        limits: The smallest and the largest size that the network takes, one pair of which is enough; none for any
            size.
        pixels: How many a tile may have.
        tile: The size of tiles where it is asked for, whatever `pixels`; a side that is longer than the image is cut.
        overlap: Pixels that such tiles share; None for as many as others do.

    Raises:
        InputError: For a tile that is not in multiples.
        OutOfMemory: Tiles would have to be smaller than `LEAST`.
    """
    if tile and any(side < 1 or side % multiple for side in tile):
        raise InputError(f"expected tiles in multiples of {multiple} pixels, found {size_text(tile)}")
    plans = []
    for least, most in limits:
        grown = max(size[0], least[0]), max(size[1], least[1])
        sides = map(min, grown, tile or most)
        if all(low <= side <= high for low, side, high in zip(least, sides, most, strict=True)):
            plans.append(_cut(grown, tile or most, overlap))
    best = min(plans, key=lambda plan: (math.prod(plan.size), plan.count), default=_cut(size, tile or size, overlap))
    if tile or math.prod(best.tile) <= pixels:
        return best
    return _shrink(best, max(0, int(pixels)), math.lcm(multiple, ALIGNMENT))


def split(length: int, tile: int, overlap: int) -> list[tuple[int, NDArray[np.float32]]]:
    """The tiles of one axis: where each starts, and the weight of each of its pixels, float32. 2 overlap <= tile."""
    size = min(length, tile)
    starts = [min(i * (size - overlap), length - size) for i in range(_count(length, size, overlap))]
    ramp = np.minimum(1, (np.arange(size) + 0.5) / overlap) if overlap else np.ones(size)
    ramp = ramp * ramp * (3 - 2 * ramp)  # float64, from a border inwards
    weights = [
        np.where(start > 0, ramp, 1) * np.where(start + size < length, ramp[::-1], 1)  # none at the image's own edges
        for start in starts
    ]
    total = np.zeros(length)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + size] += weight
    parts = (weight / total[start : start + size] for start, weight in zip(starts, weights, strict=True))
    return list(zip(starts, (part.astype(np.float32) for part in parts), strict=True))


def blend(
    plan: Plan, restore: Callable[[slice, slice], NDArray[np.float32]], on_tile: OnTile | None = None
) -> NDArray[np.float32]:
    """The image of all tiles, float32 (1, 3, H, W).

    Args:
        restore: Answers to the rows and columns of a tile with its float32 (1, 3, h, w). It is called from the top down
            and from left to right.
    """
    (H, W), (h, w) = plan.size, plan.tile
    if plan.tile == plan.size:
        whole = restore(slice(0, H), slice(0, W))
        if on_tile:
            on_tile(1, 1)
        return whole
    tiles = list(itertools.product(split(H, h, plan.overlap), split(W, w, plan.overlap)))
    image = np.zeros((1, 3, H, W), np.float32)
    for done, ((top, down), (left, across)) in enumerate(tiles, 1):
        rows, columns = slice(top, top + h), slice(left, left + w)
        image[:, :, rows, columns] += down[:, None] * across * restore(rows, columns)
        if on_tile:
            on_tile(done, len(tiles))
    return image


def _cut(size: Size, limit: Size, overlap: int | None = None) -> Plan:
    h, w = map(min, size, limit)
    return Plan(size, (h, w), min(OVERLAP, min(limit) // 4) if overlap is None else overlap)


def _shrink(plan: Plan, pixels: int, step: int) -> Plan:
    """Tiles of at most so many pixels in place of larger ones: as square as the image allows, and no larger than their
    number needs."""
    h, w = plan.tile
    width = min(w, max(math.isqrt(pixels), pixels // h))
    height = min(h, pixels // max(width, 1))
    tile = [side if side == most else side // step * step for side, most in ((height, h), (width, w))]
    if any(side < min(most, LEAST) for side, most in zip(tile, plan.tile, strict=True)):
        raise OutOfMemory(
            f"expected memory for tiles of at least {LEAST}x{LEAST} pixels of an image of "
            f"{size_text(plan.size)}, found enough for {pixels} pixels; give or free more"
        )
    overlap = min(OVERLAP, *(side // 4 for side, length in zip(tile, plan.size, strict=True) if side < length))
    for axis, (length, side) in enumerate(zip(plan.size, tile, strict=True)):
        count = _count(length, side, overlap)
        needed = math.ceil((length + (count - 1) * overlap) / count)
        tile[axis] = min(side, math.ceil(needed / step) * step)
    return Plan(plan.size, (tile[0], tile[1]), overlap)


def _count(length: int, tile: int, overlap: int) -> int:
    return 1 if length <= tile else math.ceil((length - overlap) / (tile - overlap))
