"""Rain rendered on clean photographs.

Rain is added as the Rain200L and Rain200H sets have it: one grey layer of streaks on all three channels, cut off at
white. That model knows no fog, no lens drops and no occlusion, which heavy real rain has; it is what the benchmarks
contain, and it lets the rain of one pair be put on another photograph, since input minus target is the layer itself.
Layers come from photographed or simulated streaks on black, or, for those who have none, from `draw_streaks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from drsformer.data import images_in
from runtime import images
from runtime.errors import InputError, expect_between
from runtime.files import writing
from runtime.progress import OnProgress, silent, track

Layer = NDArray[np.float32]
"""(H, W) brightness that rain adds, 0 to 255."""

LayerSource = Callable[[np.random.Generator, int, int], Layer]
"""Makes a layer of the given height and width."""

BRIGHTEST_LEVEL = 90.0
"""Largest mean of a rendered layer, of 255; the heaviest layer found in Rain200H pairs has a mean of 87."""

TURN_DEGREES = 60
"""Largest angle by which a layer is turned."""

SCALES = 0.7, 1.5
"""Smallest and largest factor by which a layer that is turned is scaled as well."""

DENSE_LAYERS = 4, 12
"""Fewest and most layers of drawn streaks that are dense."""


def draw_streaks(rng: np.random.Generator, height: int, width: int, slant: float | None = None) -> Layer:
    """A layer of streaks of one random direction, length, thickness, density and brightness; a `LayerSource`.

    Random points are smeared along a line: a convolution with one soft-edged segment, done by FFT, so that the layer
    wraps around at its borders.

    Args:
        rng: Generator that decides.
        height: Height in pixels.
        width: Width in pixels.
        slant: Degrees from the vertical; if not given, random, more often near the vertical.
    """
    angle = rng.normal(0, np.pi / 9)
    angle = angle if slant is None else math.radians(slant)
    length, thickness = rng.uniform(10, 45), rng.uniform(0.35, 0.9)
    coverage = rng.uniform(0.02, 0.2)
    points = rng.random((height, width), np.float32)
    starts = points < coverage / (3 * length * thickness)
    points[:] = 0
    points[starts] = rng.uniform(0.2, 1, np.count_nonzero(starts))
    y, x = (np.fft.fftfreq(n, 1 / n).astype(np.float32) for n in (height, width))  # distances, wrapped around
    along = y[:, None] * math.cos(angle) + x * math.sin(angle)
    across = x * math.cos(angle) - y[:, None] * math.sin(angle)
    segment = np.exp(-0.5 * np.square(across / thickness) - np.square(np.square(2 * along / length)))
    layer = np.fft.irfft2(np.fft.rfft2(points) * np.fft.rfft2(segment), s=(height, width))
    return np.float32(rng.uniform(80, 220)) * layer.clip(0, 1)


def draw_dense_streaks(rng: np.random.Generator, height: int, width: int) -> Layer:
    """Several layers of drawn streaks that fall in nearly one direction, as dense as in Rain200H; a `LayerSource`."""
    slant = rng.normal(0, 20)
    count = int(rng.integers(*DENSE_LAYERS, endpoint=True))
    layers = [draw_streaks(rng, height, width, slant + rng.normal(0, 5)) for _ in range(count)]
    return np.sum(layers, axis=0)


def cut_streaks(layers: list[NDArray[np.uint8]], rng: np.random.Generator, height: int, width: int) -> Layer:
    """A layer cut at a random place out of one of several, flipped at random; one that is too small is repeated.

    Args:
        layers: uint8 (H, W) each, of any sizes.
        rng: Generator that decides.
        height: Height of the result in pixels.
        width: Width of the result in pixels.
    """
    layer = layers[int(rng.integers(len(layers)))]
    repeats = -(-height // layer.shape[0]), -(-width // layer.shape[1])
    layer = crop(rng, np.tile(layer, repeats) if max(repeats) > 1 else layer, height, width)
    return flip(rng, layer).astype(np.float32)


def read_streaks(folder: Path) -> LayerSource:
    """The grey images of a folder as layers.

    Raises:
        InputError: It has none, or one cannot be read.
    """
    return partial(cut_streaks, [images.read_rgb(path)[..., 0] for path in images_in(folder)])


def rain_of_pair(rainy: NDArray[np.uint8], clean: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The layer that was added to an image.

    Args:
        rainy: uint8 (H, W, 3).
        clean: The same without rain.

    Returns:
        uint8 (H, W), exact wherever a channel of the rainy image is not cut off at white; elsewhere as bright as can be
        known.
    """
    return (rainy.astype(np.int16) - clean).max(-1).clip(0, 255).astype(np.uint8)


def add_rain(clean: NDArray[np.uint8], layer: Layer) -> NDArray[np.uint8]:
    """An image, uint8 (H, W, 3), with a layer, (H, W), on all of its channels: uint8 (H, W, 3)."""
    return np.rint(clean + layer[..., None]).clip(0, 255).astype(np.uint8)


def make_layer(
    rng: np.random.Generator,
    height: int,
    width: int,
    sources: list[LayerSource],
    strength: float | None = None,
    turned: float = 0.0,
) -> Layer:
    """The sum of layers from one source.

    However much rain there is, it brightens the image by `BRIGHTEST_LEVEL` on average at the most, so that something
    remains to be seen.

    Args:
        rng: Generator that decides.
        height: Height in pixels.
        width: Width in pixels.
        sources: Sources, one of which is chosen.
        strength: From 0, light rain of one layer, to 1, heavy rain of four brighter ones, mostly crossing; random, more
            often light, if not given.
        turned: Fraction of the layers that is turned, see `turn`.
    """
    strength = rng.random() ** 2 if strength is None else strength
    source = sources[int(rng.integers(len(sources)))]
    layers = [
        turn(rng, source, height, width) if turned and rng.random() < turned else source(rng, height, width)
        for _ in range(1 + round(3 * strength))
    ]
    layer = sum(layers, np.zeros((height, width), np.float32)) * rng.uniform(0.7, 1.1 + 0.4 * strength)
    return (layer * min(1, BRIGHTEST_LEVEL / max(layer.mean(), 1))).astype(np.float32)


def turn(rng: np.random.Generator, source: LayerSource, height: int, width: int) -> Layer:
    """A layer turned by a random angle of up to `TURN_DEGREES` and scaled by a random factor of `SCALES`, cut out of
    one that is large enough for that."""
    scale = rng.uniform(*SCALES)
    extent = math.ceil(math.hypot(height, width) / scale) + 2
    angle = math.radians(rng.uniform(-TURN_DEGREES, TURN_DEGREES))
    cosine, sine = math.cos(angle) / scale, math.sin(angle) / scale
    x, y = (extent - cosine * width + sine * height) / 2, (extent - sine * width - cosine * height) / 2
    affine = cosine, -sine, x, sine, cosine, y  # from a place in the result to one in the source
    layer = Image.fromarray(source(rng, extent, extent))
    return np.asarray(
        layer.transform((width, height), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR), np.float32
    )


def crop(rng: np.random.Generator, image: np.ndarray, height: int, width: int) -> np.ndarray:
    """A random place of an image, (H, W, ...) -> (height, width, ...)."""
    y, x = rng.integers(image.shape[0] - height + 1), rng.integers(image.shape[1] - width + 1)
    return image[y : y + height, x : x + width]


def flip(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """An image, (H, W, ...), mirrored at random in either direction, or both, or none."""
    vertical, horizontal = rng.integers(2, size=2) * 2 - 1
    return image[::vertical, ::horizontal]


def render_folder(
    clean: Path,
    output: Path,
    strength: float | None = None,
    streaks: Path | None = None,
    seed: int = 0,
    on_progress: OnProgress = silent,
) -> int:
    """Render rain on every photograph of a folder. The same seed gives the same rain.

    Args:
        clean: Folder of clean photographs.
        output: Folder that gets input/ (rainy) and target/ (clean), as PNG.
        strength: See `make_layer`.
        streaks: Folder of streak images on black to use instead of drawn streaks.
        seed: Number that the rain depends on, at least 0.
        on_progress: See `runtime.progress`.

    Returns:
        The number of photographs.

    Raises:
        InputError: A value is out of range, a file cannot be used, or the output folder has other pairs, among which
            these would be lost, or the photographs themselves. No pairs are left then.
    """
    if strength is not None:
        expect_between("strength", strength, 0, 1)
    expect_between("seed", seed, 0)
    sources = [read_streaks(streaks) if streaks else draw_streaks]
    paths = images_in(clean)
    if len({path.stem for path in paths}) < len(paths):
        raise InputError(f"{clean}: expected names that differ in more than their suffix")
    for place in (output / "input", output / "target"):
        if place.exists() and place.samefile(clean):
            raise InputError(
                f"{output}: expected another folder than that of the photographs, found them in "
                f"{place}; name a new folder"
            )
        others = images.list_images(place) if place.is_dir() else []
        if found := {path.name for path in others} - {f"{path.stem}.png" for path in paths}:
            raise InputError(f"{output}: expected a folder without other pairs, found {min(found)}; name a new folder")
    written: list[Path] = []
    try:
        for i, path in enumerate(track(paths, len(paths), "Rendering rain", on_progress)):
            photograph = images.read_rgb(path)
            height, width, _ = photograph.shape
            layer = make_layer(np.random.default_rng((seed, i)), height, width, sources, strength)
            for kind, image in (("input", add_rain(photograph, layer)), ("target", photograph)):
                written.append(output / kind / f"{path.stem}.png")
                with writing(written[-1]) as temporary:
                    Image.fromarray(image).save(temporary)
    except BaseException:  # half a data set looks like a whole one
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return len(paths)
