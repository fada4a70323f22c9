"""What networks do to rain and images that no test set has: every condition by itself, in dB.

    python -m benchmarks.conditions --weights weights/drsformer-xs.safetensors --output runs/conditions
    python -m benchmarks.conditions --weights before.safetensors after.safetensors --output runs/conditions \\
        --data DATA/rain100l/val DATA/rain200h/val

On photographs, with rain that is drawn: streaks of one slant (from the vertical), streaks that are dense, one slant in
JPEG and in H.264, and no rain at all. On the first pairs of each folder of --data: as they are, in JPEG, in H.264, and
no rain. A codec comes after the rain, as in a camera, and what should come out is the clean image with its own noise.
Brightness is how much brighter the result is than that, on average, in levels of 255: below zero, too much was taken
for rain.

OUTPUT/conditions.json and the same as a table in .md have a row for each number and a column for each network, by the
beginning of its file's SHA-256, so that a network can be compared with what it was before. What has been measured is
not measured again.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Row, Sheet
from drsformer import checkpoint
from drsformer.codecs import through_jpeg, through_video
from drsformer.data import dataset_name, find_pairs, images_in
from drsformer.metrics import psnr, psnr_rgb
from drsformer.rendering import BRIGHTEST_LEVEL, add_rain, draw_streaks
from drsformer.session import TorchSession, torch_device
from export.folding import fold
from runtime import images
from runtime.cli import main, progress_shown
from runtime.errors import expect_between
from runtime.progress import OnProgress, track
from runtime.session import Derainer

Image = NDArray[np.uint8]

Restore = Callable[[Image], Image]

SLANTS = 0, 30, 45, 60
"""Degrees from the vertical."""

DENSE_LAYERS = 10
"""Layers of drawn streaks that are dense: about as bright together as the heaviest rain of Rain200H."""

QUALITY, CRF = 50, 26
"""Of JPEG and of H.264: they leave about as much noise in an image, and it can be seen."""


class Condition(NamedTuple):
    """Images to restore, each with what should come out, and what is measured of each; see `MEASURES`."""

    cases: Callable[[], Iterator[tuple[Image, Image]]]
    measures: tuple[str, ...]


def _brightness(restored: Image, clean: Image) -> float:
    return float(restored.mean() - clean.mean())


MEASURES: dict[str, tuple[Callable[[Image, Image], float], Callable[[list[float]], float]]] = {
    "PSNR on Y": (psnr, statistics.mean),
    "PSNR over RGB": (psnr_rgb, statistics.mean),
    "worst PSNR over RGB": (psnr_rgb, min),
    "brightness": (_brightness, statistics.mean),
}
"""Of a restored image and a clean one, and over all images."""


def conditions(photographs: Path, data: tuple[Path, ...], limit: int, seeds: int) -> dict[str, Condition]:
    """All conditions by name.

    Args:
        photographs: Folder of clean photographs.
        data: Folders of pairs.
        limit: Pairs of each folder, the first ones.
        seeds: Layers that are drawn for each photograph.
    """

    def drawn(layers: int = 1, slant: float | None = None) -> Iterator[tuple[Image, Image]]:
        for path in images_in(photographs):
            clean = images.read_rgb(path)
            for seed in range(seeds):
                rng = np.random.default_rng(seed)
                layer = np.sum([draw_streaks(rng, *clean.shape[:2], slant=slant) for _ in range(layers)], axis=0)
                yield add_rain(clean, layer * min(1, BRIGHTEST_LEVEL / layer.mean())), clean

    def pairs(folder: Path) -> Iterator[tuple[Image, Image]]:
        for pair in find_pairs(folder)[:limit]:
            rainy, clean = pair.load()
            yield rainy, clean

    def jpeg(cases: Callable[[], Iterator[tuple[Image, Image]]]) -> Iterator[tuple[Image, Image]]:
        for rainy, clean in cases():
            yield through_jpeg(rainy, QUALITY), through_jpeg(clean, QUALITY)

    def h264(cases: Callable[[], Iterator[tuple[Image, Image]]]) -> Iterator[tuple[Image, Image]]:
        for number, (rainy, clean) in enumerate(cases()):
            yield through_video(np.random.default_rng(number), rainy, clean, CRF)

    def dry(cleans: Callable[[], Iterator[Image]]) -> Iterator[tuple[Image, Image]]:
        for clean in cleans():
            yield clean, clean

    of, upright = functools.partial, functools.partial(drawn, slant=0)
    untouched = "PSNR over RGB", "worst PSNR over RGB"
    found = {f"streaks of {slant} degrees": Condition(of(drawn, slant=slant), ("PSNR over RGB",)) for slant in SLANTS}
    found |= {
        "dense streaks": Condition(of(drawn, layers=DENSE_LAYERS), ("PSNR over RGB", "brightness")),
        f"streaks in JPEG {QUALITY}": Condition(of(jpeg, upright), ("PSNR over RGB",)),
        f"streaks in H.264 {CRF}": Condition(of(h264, upright), ("PSNR over RGB",)),
        "dry photographs": Condition(of(dry, lambda: map(images.read_rgb, images_in(photographs))), untouched),
    }
    for folder in data:
        name, source = dataset_name(folder), of(pairs, folder)
        found |= {
            name: Condition(source, ("PSNR on Y", "brightness")),
            f"{name} in JPEG {QUALITY}": Condition(of(jpeg, source), ("PSNR on Y",)),
            f"{name} in H.264 {CRF}": Condition(of(h264, source), ("PSNR on Y",)),
            f"{name} dry": Condition(of(dry, lambda source=source: (clean for _, clean in source())), untouched),
        }
    return found


def measure(
    output: Path,
    weights: tuple[Path, ...],
    data: tuple[Path, ...] = (),
    photographs: Path = Path("docs/photographs"),
    limit: int = 9,
    seeds: int = 3,
    device: str = "auto",
) -> Row:
    """Measure networks under all conditions. Returns the summary of the sheet.

    Args:
        output: Folder that gets the results.
        weights: Checkpoints.
        data: Folders of pairs.
        photographs: Folder of clean photographs to draw rain on.
        limit: Pairs of each folder, the first ones.
        seeds: Layers of rain that are drawn for each photograph.
        device: auto is CUDA where there is one, else the CPU; or PyTorch's name of a device.

    Raises:
        InputError: A checkpoint, a folder or a device cannot be used, or a number is out of range.
    """
    expect_between("limit", limit, 1)
    expect_between("seeds", seeds, 1)
    place = torch_device(device)
    found = conditions(photographs, data, limit, seeds)
    for condition in found.values():
        next(condition.cases())  # a folder that cannot be used is told of now
    restorers: dict[str, Restore] = {"input": lambda rainy: rainy}
    for path in weights:
        loaded = checkpoint.load(path)
        restorers[f"{path.stem} {loaded.sha256[:8]}"] = Derainer(TorchSession(fold(loaded.model), str(place)))
    sheet = Sheet(output, "conditions", place, float("inf"))
    sheet.depends_on({"seeds": seeds, "pairs": limit})
    with progress_shown() as on_progress:
        for title, condition in found.items():
            for name, restore in restorers.items():
                keys = [f"{title}, {measure}" for measure in condition.measures]
                if any(name not in sheet.rows.get(key, {}) for key in keys):
                    values = _measured(f"{title}: {name}", condition, restore, on_progress)
                    for key, value in zip(keys, values, strict=True):
                        shown = "equal" if math.isinf(value) else round(value, 2)
                        sheet.put(key, {**sheet.rows.get(key, {}), name: shown})
    return sheet.summary()


def _measured(title: str, condition: Condition, restore: Restore, on_progress: OnProgress) -> list[float]:
    values: list[list[float]] = [[] for _ in condition.measures]
    cases = list(condition.cases())
    for rainy, clean in track(cases, len(cases), title, on_progress):
        restored = restore(rainy)
        for each, measure in zip(values, condition.measures, strict=True):
            each.append(MEASURES[measure][0](restored, clean))
    return [MEASURES[measure][1](each) for each, measure in zip(values, condition.measures, strict=True)]


if __name__ == "__main__":
    main(measure, __doc__, summary=lambda summary: summary)
