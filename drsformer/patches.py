"""Patches to train on, cut out of pairs of images or rendered on clean ones.

Everything random in a patch depends on the seed and the patch's running number alone, so there is no generator state to
save, and a run sees the same patches on any number of devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from drsformer.codecs import compress, expect_video_codec
from drsformer.data import Pair, images_in
from drsformer.recipe import Recipe
from drsformer.rendering import (
    Layer,
    LayerSource,
    add_rain,
    crop,
    draw_dense_streaks,
    draw_streaks,
    flip,
    make_layer,
    rain_of_pair,
    read_streaks,
)
from runtime import images
from runtime.errors import InputError, expect_between
from runtime.progress import OnProgress, silent, track

TURNED_FRACTION = 0.5
"""Fraction of the rendered layers of rain that are turned and scaled. In the pairs of the benchmarks rain falls near
the vertical, and a network that saw nothing else leaves slanted streaks where they are. With half of the layers turned,
the rain of one rendered patch in ten falls at 45 degrees and more; with a quarter, that of one in twenty."""


class Patches(Dataset[tuple[Tensor, Tensor]]):
    """Rainy and clean patches, (3, P, P) float32 RGB in [0, 1] each, as a function of a running number.

    A patch is cut out of a pair of one of the folders, each folder equally likely; or, with probability `rendered`, is
    a clean background (a target, or one of the further `clean` photographs) with rain put on it, equally likely drawn,
    drawn densely, that of a pair of one of the folders, or from `streaks`; or, with probability `dry`, shows the same
    clean background twice. With probability `compressed`, whatever it is, both images have been through JPEG or H.264
    at the same quality: noise of a codec is no rain, and is left as it is.

    Args:
        folders: Pairs of each folder.
        recipe: Size of the patches and the seed.
        clean: Folder of further clean photographs.
        streaks: Folder of streak images on black.
        rendered: Fraction of rendered patches, 0 to 1.
        dry: Fraction of dry patches, 0 to 1.
        compressed: Fraction of patches with the noise of a codec, 0 to 1.
        cache_bytes: Bytes that decoded images may take in memory, in each process that cuts patches; those of `warm_up`
            are shared by all processes that are forked after it.

    Attributes:
        backgrounds: The pairs and photographs whose clean images rain is put on.

    Raises:
        InputError: A fraction is out of range, a folder is not used, there is nothing to train on, or `compressed`
            needs PyAV and it is not installed.
    """

    def __init__(
        self,
        folders: Sequence[Sequence[Pair]],
        recipe: Recipe,
        clean: Path | None = None,
        streaks: Path | None = None,
        rendered: float = 0.0,
        dry: float = 0.0,
        compressed: float = 0.0,
        cache_bytes: int = 4 << 30,
    ) -> None:
        expect_between("rendered", rendered, 0, 1)
        expect_between("dry", dry, 0, 1)
        expect_between("compressed", compressed, 0, 1)
        if compressed:
            expect_video_codec()
        unpaired = round(rendered + dry, 9)  # floats that are meant to add up to 1 may miss it
        if unpaired > 1:
            raise InputError(f"`rendered` and `dry`: expected at most 1 together, found {unpaired:g}")
        if clean and unpaired == 0:
            raise InputError("`clean` photographs are for rendered and dry patches only: expected `rendered` or `dry`")
        if streaks and rendered == 0:
            raise InputError("`streaks` are for rendered patches only: expected `rendered`")
        if not folders and not (clean and unpaired == 1):
            raise InputError(
                "nothing to train on: expected `data`, or `clean` with `rendered` and `dry` that add up to 1"
            )
        self.folders, self.recipe, self.rendered, self.unpaired = folders, recipe, rendered, unpaired
        self.compressed = compressed
        self.backgrounds: list[Pair | Path] = [pair for folder in folders for pair in folder]
        self.backgrounds += images_in(clean) if clean else []
        self.layers: list[LayerSource] = [draw_streaks, draw_dense_streaks]
        self.layers += [partial(self._rain_of, folder) for folder in folders]
        if streaks:
            self.layers.append(read_streaks(streaks))
        self.cache: dict[Pair | Path, NDArray[np.uint8]] = {}
        self.cache_left = cache_bytes

    def __len__(self) -> int:
        return 1 << 62

    @property
    def items(self) -> Sequence[Pair | Path]:
        """All that patches are cut out of."""
        return self.backgrounds

    def warm_up(self, on_progress: OnProgress = silent) -> None:
        """Decode images until all are in the cache or one finds no room there.

        Args:
            on_progress: See `runtime.progress`.

        Raises:
            InputError: An image cannot be read.
        """
        pool = ThreadPoolExecutor()
        images_read = zip(self.items, pool.map(self._read, self.items), strict=True)
        for item, _ in track(images_read, len(self.items), "Reading images", on_progress):
            if item not in self.cache:
                break
        pool.shutdown(cancel_futures=True)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.recipe.seed, number))
        kind, size = rng.random(), self.recipe.patch
        if kind < self.rendered:
            clean = self._cut(rng, self.backgrounds, size, size)[..., -3:]
            rainy = add_rain(clean, make_layer(rng, size, size, self.layers, turned=TURNED_FRACTION))
        elif kind < self.unpaired:
            rainy = clean = self._cut(rng, self.backgrounds, size, size)[..., -3:]
        else:
            folder = self.folders[int(rng.integers(len(self.folders)))]
            rainy, clean = np.split(self._cut(rng, folder, size, size), 2, axis=-1)
        if self.compressed and rng.random() < self.compressed:
            rainy, clean = compress(rng, rainy, clean)
        return to_tensor(rainy), to_tensor(clean)

    def _cut(
        self, rng: np.random.Generator, items: Sequence[Pair | Path], height: int, width: int
    ) -> NDArray[np.uint8]:
        """A random place of a random item, flipped at random: (height, width, 3) of a photograph, or (height, width, 6)
        of a pair, rainy before clean. An image that is too small is mirrored at its border."""
        image = self._read(items[int(rng.integers(len(items)))])
        short = [(0, max(0, wanted - extent)) for wanted, extent in zip((height, width), image.shape, strict=False)]
        if any(missing for _, missing in short):
            image = np.pad(image, (*short, (0, 0)), mode="symmetric")
        return flip(rng, crop(rng, image, height, width))

    def _read(self, item: Pair | Path) -> NDArray[np.uint8]:
        if item in self.cache:
            return self.cache[item]
        image = images.read_rgb(item) if isinstance(item, Path) else np.concatenate(item.load(), axis=-1)
        if image.nbytes <= self.cache_left:
            self.cache_left -= image.nbytes
            self.cache[item] = image
        return image

    def _rain_of(self, folder: Sequence[Pair], rng: np.random.Generator, height: int, width: int) -> Layer:
        rainy, clean = np.split(self._cut(rng, folder, height, width), 2, axis=-1)
        return rain_of_pair(rainy, clean).astype(np.float32)


def to_tensor(patch: NDArray[np.uint8]) -> Tensor:
    """A patch as the network takes it.

    Args:
        patch: uint8 (H, W, 3).

    Returns:
        float32 (3, H, W) in [0, 1].
    """
    return torch.from_numpy(patch.transpose(2, 0, 1) / np.float32(255))
