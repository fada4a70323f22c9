"""Known answers for a bundle: what its model makes of two rainy images, computed in float32.

How far another answer may be from a known one is measured too. Every runtime rounds in its own way, and of two nearly
equal scores it may keep the other. So the weights are disturbed at random by as much as the precision rounds, and the
worst answer of `TRIALS` such networks, less `MARGIN_DB`, is the floor, flips of selections included. Which runtime
computes does not matter for a float32 answer: it is the one of ONNX Runtime.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image

from drsformer.metrics import psnr_rgb
from drsformer.rendering import add_rain, draw_streaks
from export.verification import upcast
from runtime.bundle import describe_file
from runtime.files import writing
from runtime.manifest import Canary, Manifest
from runtime.ort import OrtSession
from runtime.pixels import Size, size_text, to_batch, to_image
from runtime.progress import OnProgress, silent, track

SIZES: tuple[Size, ...] = ((64, 64), (128, 192))
"""Heights and widths of the canaries of a model of any size, before they are rounded up to its multiple."""

ROUNDING = {"fp32": 2.0**-11, "fp16": 2.0**-11}
"""Relative error of one rounding. In float32 GPUs multiply in TF32, whose mantissa is that of float16."""

COARSE = 2.0**-8
"""The same in bfloat16, int8 and what else there may be."""

TRIALS = 4
MARGIN_DB = 6.0
HIGHEST_DB = 50.0
"""No floor is higher: what differs by less nobody sees, and a sound engine is not to be refused."""


def scene(height: int, width: int) -> NDArray[np.uint8]:
    """A drawn picture with edges, slopes and texture in rain, the same each time: uint8 (H, W, 3)."""
    rng = np.random.default_rng(height * 16384 + width)
    coarse = Image.fromarray(rng.integers(40, 216, (5, 7, 3), dtype=np.uint8))
    picture = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
    for _ in range(6):
        top, left = rng.integers(0, (height, width))
        picture[top : top + height // 3, left : left + width // 4] += rng.uniform(-60, 60, 3)
    picture += rng.normal(0, 3, picture.shape)
    clean = np.rint(picture.clip(0, 255)).astype(np.uint8)
    return add_rain(clean, draw_streaks(rng, height, width))


def add_canaries(manifest: Manifest, folder: Path, on_progress: OnProgress = silent) -> Manifest:
    """Write the canaries that a bundle lacks into its folder: two, and one for each engine that takes neither size.

    Args:
        manifest: Of a bundle whose model is in `folder`.
        on_progress: Called with how far the work is.

    Returns:
        The manifest with them.
    """
    sizes = [size for size in canary_sizes(manifest) if size not in [canary.size for canary in manifest.canaries]]
    if not sizes:
        return manifest
    images = {size: scene(*size) for size in sizes}
    answers: dict[Size, list[NDArray[np.uint8]]] = {size: [] for size in sizes}
    networks = _networks(upcast(onnx.load(folder / manifest.model.file)), manifest.model.precision)
    for session in track(networks, 1 + TRIALS, "Known answers", on_progress):
        for size, image in images.items():
            answers[size].append(to_image(session.run(to_batch(image))))
    for size, (answer, *others) in answers.items():
        floor = min(HIGHEST_DB, *(psnr_rgb(other, answer) - MARGIN_DB for other in others))
        path = folder / f"canary.{size_text(size)}.rgb"
        with writing(path) as temporary:
            temporary.write_bytes(np.stack([images[size], answer]).tobytes())
        canary = Canary(path.name, *size, floor_db=max(0.0, round(floor, 1)))
        manifest = manifest.with_canary(describe_file(path, "canary"), canary)
    return manifest


def _networks(model: onnx.ModelProto, precision: str | None) -> Iterator[OrtSession]:
    """The model, then `TRIALS` of it with every weight disturbed by what `precision` rounds; float32 all of them."""
    rounding = ROUNDING.get(precision or "", COARSE)
    rng = np.random.default_rng(0)
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        for trial in range(1 + TRIALS):
            disturbed = copy.deepcopy(model)
            for tensor in disturbed.graph.initializer if trial else ():
                values = numpy_helper.to_array(tensor)
                if values.dtype == np.float32 and values.size > 1:  # a single number is a constant of the graph
                    noise = rng.uniform(1 - rounding, 1 + rounding, values.shape).astype(np.float32)
                    tensor.CopyFrom(numpy_helper.from_array(values * noise, tensor.name))
            onnx.save(disturbed, path)
            yield OrtSession(path, "cpu")


def canary_sizes(manifest: Manifest) -> list[Size]:
    """Heights and widths of the canaries that a bundle should have, the smallest first."""
    model, multiple = manifest.model, manifest.model.size_multiple
    fixed = model.graph_io.size(model.input.shape)
    if -1 not in fixed:
        return [fixed]
    sizes = [(H + -H % multiple, W + -W % multiple) for H, W in SIZES]
    for engine in manifest.engines:
        if not any(engine.profile_for(*size) is not None for size in sizes):
            sizes.append(engine.profiles[0].min)
    return sizes
