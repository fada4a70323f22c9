"""Images for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def noise(seed: int, height: int = 40, width: int = 48, channels: int = 3) -> NDArray[np.uint8]:
    """Smooth noise, since JPEG and WebP keep nothing else."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, channels), dtype=np.uint8)
    image = Image.fromarray(small if channels == 3 else small[..., 0])
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def save(path: Path, image: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def random_image(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """An image of which every pixel is random: uint8 (H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
