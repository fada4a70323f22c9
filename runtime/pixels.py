"""Pixels as people store them and as networks take them: uint8 images, float32 batches, and what a graph eats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .errors import InputError, InvalidModel

Size = tuple[int, int]
"""Height and width."""

IO = Literal["tensor", "tensor16", "image"]
"""What a graph takes and gives: float32 or float16 (B, 3, H, W) RGB in [0, 1], or uint8 (B, H, W, 3) RGB."""

DTYPES: dict[IO, np.dtype] = {
    "tensor": np.dtype(np.float32),
    "tensor16": np.dtype(np.float16),
    "image": np.dtype(np.uint8),
}
"""Of input and output alike."""

FINITE = "finite"
"""Second output of a graph of images, whose clamp hides NaN: float32 (B,), finite exactly where every number of the
answer to an image was before it was clamped. Graphs that were exported before there was such have only `output`."""

ANY = -1
"""Stands in shapes for a length that is not fixed."""

ROWS = 64
"""So many rows of an image at a time stay in the processor's caches while they are converted."""


def size_text(size: Size) -> str:
    """Height and width as HxW."""
    return f"{size[0]}x{size[1]}"


def expect_multiples(parameter: str, size: Size, multiple: int) -> None:
    """Raise InputError unless height and width are multiples of `multiple`, to which images are padded."""
    if size[0] % multiple or size[1] % multiple:
        raise InputError(
            f"`{parameter}`: expected multiples of {multiple}, to which images are padded, found {size_text(size)}"
        )


def to_batch(*images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 (H, W, 3) each, of one size -> float32 (B, 3, H, W) in [0, 1]."""
    H, W, _ = images[0].shape
    batch = np.empty((len(images), 3, H, W), np.float32)
    for planes, image in zip(batch, images, strict=True):
        planes[:] = image.transpose(2, 0, 1)
    batch /= 255
    return batch


def to_image(batch: NDArray[np.float32]) -> NDArray[np.uint8]:
    """float32 (1, 3, H, W), clamped to [0, 1] and rounded half to even -> uint8 (H, W, 3)."""
    _, _, H, W = batch.shape
    image = np.empty((H, W, 3), np.uint8)
    block = np.empty((3, min(ROWS, H), W), np.float32)
    for top in range(0, H, ROWS):
        rows = batch[0, :, top : top + ROWS]
        levels = np.clip(rows, 0, 1, out=block[:, : rows.shape[1]])
        levels *= 255
        np.rint(levels, out=levels)
        for channel in range(3):
            np.copyto(image[top : top + ROWS, :, channel], levels[channel], casting="unsafe")
    return image


def expect_finite(numbers: NDArray[np.float32]) -> None:
    """Raise InvalidModel for NaN or infinity in what a network answers."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = numbers.sum()
    # One pass tells of nearly all answers: a sum of finite numbers is finite, unless they are huge.
    if not np.isfinite(total) and not np.isfinite(numbers).all():
        raise InvalidModel("the network answered with NaN or infinity; if it runs in float16, export it in float32")


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two arrays of levels, 0 to 255, of one shape; in dB, inf where they are equal."""
    error = float(np.mean((first.astype(np.float64) - second) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


@dataclass(frozen=True)
class GraphIO:
    """What a graph eats.

    Attributes:
        io: Tensors, of which precision, or images.
        multiple: Height and width have to be multiples of this; 1 where any size will do.
        batch: Number of images that it takes at once, neither more nor less, or `ANY`.
    """

    io: IO
    multiple: int
    batch: int = 1

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.io]

    def shape(self, size: Size, images: int | None = None) -> tuple[int, int, int, int]:
        """The shape of input and output for this height and width, and for so many images, or as many as the graph
        takes; `ANY` stands for any."""
        images = self.batch if images is None else images
        return (images, *size, 3) if self.io == "image" else (images, 3, *size)

    def size(self, shape: tuple[int, ...]) -> Size:
        """Height and width of such a shape."""
        return (shape[1], shape[2]) if self.io == "image" else (shape[2], shape[3])

    def feed(self, batch: NDArray[np.float32]) -> np.ndarray:
        """float32 (B, 3, H, W) -> the graph's input, `filled`. What came from uint8 images loses nothing, or in
        float16 less than a tenth of a level."""
        if self.io == "image":
            feed = np.stack([to_image(image[None]) for image in batch])
        else:
            feed = np.ascontiguousarray(batch, dtype=self.dtype)
        return filled(feed, self.batch)

    def answer(self, output: np.ndarray, finite: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """The graph's outputs -> float32 (B, 3, H, W); of images in steps of 1/255, or NaN throughout where `finite`
        (see `FINITE`) is not."""
        if self.io != "image":
            return output.astype(np.float32, copy=False)
        batch = to_batch(*output)
        if finite is not None:
            batch[~np.isfinite(finite)] = np.nan
        return batch

    def images(self, output: NDArray[np.uint8], finite: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
        """The outputs of a graph of images -> uint8 (B, H, W, 3). Raises InvalidModel where `finite` is not."""
        if finite is not None:
            expect_finite(finite)
        return output


def filled(feed: np.ndarray, least: int) -> np.ndarray:
    """A batch of images with at least so many: the last one is repeated where there are fewer."""
    missing = least - len(feed)
    return feed if missing <= 0 else np.concatenate([feed, np.repeat(feed[-1:], missing, axis=0)])
