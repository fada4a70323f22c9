"""Images as pages show them: files small enough to be inside, and the part that is worth a look pixel by pixel."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PICTURE_PIXELS = 1280
"""Height and width that whole images have at most."""

PICTURE_QUALITY = 90
"""Of whole images, as WebP has it."""

WINDOW_PIXELS = 96
"""Height and width of the part that is shown pixel by pixel."""


class Window(NamedTuple):
    """A part of an image."""

    top: int
    left: int
    height: int
    width: int

    def of(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A copy of this part of an image, uint8 (H, W, 3) -> (height, width, 3)."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width].copy()


def largest_difference(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> Window:
    """Where two uint8 (H, W, 3) images differ most: the window with the largest sum of squared differences."""
    squared = ((first.astype(int) - second) ** 2).sum(2)
    h, w = (min(WINDOW_PIXELS, length) for length in squared.shape)
    sums = np.pad(squared.cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # of everything above and to the left
    windows = sums[h:, w:] - sums[:-h, w:] - sums[h:, :-w] + sums[:-h, :-w]
    top, left = (int(i) for i in np.unravel_index(windows.argmax(), windows.shape))
    return Window(top, left, h, w)


def webp(image: NDArray[np.uint8], pixels: int = PICTURE_PIXELS) -> bytes:
    """A uint8 (H, W, 3) image as a WebP file of at most `pixels` a side."""
    picture, file = Image.fromarray(image), io.BytesIO()
    picture.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    picture.save(file, "WEBP", quality=PICTURE_QUALITY)
    return file.getvalue()


def png(image: NDArray[np.uint8]) -> bytes:
    """A uint8 (H, W, 3) image as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
