"""Scores of networks and of restored images on data sets.

A network restores whole images into uint8, as its users get them; PSNR and SSIM are the paper's (`drsformer.metrics`),
beside those of the rainy input. NIQE and BRISQUE (the paper's Table 2; less is better) come from pyiqa, as in the
authors' script, and need no target. That part follows pyiqa's source, and has been tested only against a stand-in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from drsformer.data import Pair, files_of, images_in, pair_folders
from drsformer.metrics import Protocol, Scores, psnr, ssim
from drsformer.session import TorchSession, torch_device
from runtime.errors import DerainError, InputError
from runtime.files import writing
from runtime.images import SUFFIXES, Photo, list_images, read_rgb
from runtime.pixels import to_batch
from runtime.progress import OnProgress, silent, track
from runtime.session import Derainer

NIQE_BLOCK_PIXELS = 96
"""Height and width of the blocks over which NIQE takes its statistics; it needs two of them for a covariance."""

RESTORED = "restored.json"
"""Beside saved images: what restored them, where, and of which data set; under `INPUTS` the SHA-256 of each input, by
the name of its image."""

INPUTS = "inputs"


def evaluate_model(
    model: nn.Module,
    pairs: Sequence[Pair],
    protocol: Protocol = "rain200",
    save: Path | None = None,
    on_progress: OnProgress = silent,
) -> Scores:
    """Score a network, on the device where it is.

    Args:
        model: Takes and returns float32 (1, 3, H, W), H and W multiples of 8.
        pairs: What to restore, and the targets.
        protocol: Protocol of PSNR and SSIM.
        save: Folder for the restored images, as PNG.
        on_progress: See `runtime.progress`.

    Returns:
        PSNR and SSIM of what the network restores, and of the rainy input.

    Raises:
        InputError: An image cannot be used, the network answers with NaN, or `save` holds the pairs themselves.
    """
    derain = Derainer(TorchSession(model, str(next(model.parameters()).device)))
    return evaluate_derainer(derain, pairs, protocol, save, on_progress=on_progress)


def evaluate_derainer(
    derain: Derainer,
    pairs: Sequence[Pair],
    protocol: Protocol = "rain200",
    save: Path | None = None,
    origin: dict[str, str] | None = None,
    on_progress: OnProgress = silent,
) -> Scores:
    """Score a network in any engine.

    Args:
        derain: The network.
        pairs: What to restore, and the targets.
        protocol: Protocol of PSNR and SSIM.
        save: Folder for the restored images, as PNG.
        origin: What restores and what the pairs are, such as names, hashes and where it runs. Where it is given, images
            that an earlier call of the same origin made of the same inputs and left in `save` are scored as they are.
        on_progress: See `runtime.progress`.

    Returns:
        PSNR and SSIM of what the network restores, and of the rainy input.

    Raises:
        InputError: An image cannot be used, the network answers with NaN, or `save` holds the pairs themselves or,
            where an origin is given, images of another one or of other inputs.
    """
    if save:
        _expect_no_data(save, pairs)
        if origin is not None:
            _expect_origin(save, origin, pairs, on_progress)
    rows = _score_pairs(pairs, protocol, derain, save, resume=origin is not None)
    return Scores(dict(track(rows, len(pairs), "Restoring", on_progress)), protocol)


def _expect_no_data(folder: Path, pairs: Sequence[Pair]) -> None:
    """Raise InputError where images that are saved there would lie among those of the pairs, and be taken for them."""
    places = {
        parent: path.parent
        for path in files_of(pairs)
        for parent in (path.resolve().parent, path.parent.resolve())  # of the file and of a link to it
    }
    for pair in pairs:
        if place := places.get((folder / f"{pair.name}.png").parent.resolve()):
            raise InputError(f"`save`: {folder} would put images among those of the data set in {place}; name another")


def _expect_origin(folder: Path, origin: dict[str, str], pairs: Sequence[Pair], on_progress: OnProgress) -> None:
    """Note in the folder what its images come from: the origin, and the hash of each input. Raises InputError where it
    has images from something else."""
    record = folder / RESTORED
    try:
        found = json.loads(record.read_text()) if record.is_file() else None
    except ValueError:
        found = None
    found = found if isinstance(found, dict) else None
    inputs = found.pop(INPUTS, {}) if found else {}
    inputs = inputs if isinstance(inputs, dict) else {}
    if found != origin and (found is not None or any(path.suffix.lower() in SUFFIXES for path in folder.rglob("*"))):
        before = ", ".join(map(str, found.values())) if found else "something unknown"
        raise InputError(
            f"`save`: expected images of {', '.join(origin.values())} in {folder}, found those of {before}; name "
            "another folder"
        )
    hashes = {
        pair.name: hashlib.sha256(pair.input.read_bytes()).hexdigest()
        for pair in track(pairs, len(pairs), "Hashing inputs", on_progress)
    }
    saved = [name for name in hashes if (folder / f"{name}.png").is_file()]
    if changed := [name for name in saved if inputs.get(name) != hashes[name]]:
        raise InputError(
            f"`save`: expected images of these inputs in {folder}, found that of another one under the name "
            f"{changed[0]}; name another folder"
        )
    with writing(record) as temporary:
        temporary.write_text(json.dumps({**origin, INPUTS: {**inputs, **hashes}}, indent=1))


def evaluate_restored(
    restored: Path,
    target: Path,
    protocol: Protocol = "rain200",
    limit: int | None = None,
    on_progress: OnProgress = silent,
) -> Scores:
    """Score images that some program has restored.

    Args:
        restored: Folder of restored images.
        target: Folder of their clean counterparts, with the same names up to the suffix.
        protocol: Protocol of PSNR and SSIM.
        limit: Number of images to use, the first ones; all if not given.
        on_progress: See `runtime.progress`.

    Raises:
        InputError: An image cannot be used, or a target has no restored image.
    """
    pairs = pair_folders(restored, target)
    left = len(list_images(target)) - len({pair.target for pair in pairs})
    if left:
        raise InputError(f"{restored}: expected an image for each of {target}, found none for {left} of them")
    pairs = pairs[:limit]
    return Scores(dict(track(_score_pairs(pairs, protocol), len(pairs), "Measuring", on_progress)), protocol)


def evaluate_without_reference(
    restored: Path, device: str = "auto", limit: int | None = None, on_progress: OnProgress = silent
) -> Scores:
    """NIQE and BRISQUE of images, which need no clean counterparts.

    Args:
        restored: Folder of images.
        device: Where to measure, see `drsformer.session.torch_device`.
        limit: Number of images to use, the first ones; all if not given.
        on_progress: See `runtime.progress`.

    Raises:
        InputError: An image cannot be used, or pyiqa is not installed.
    """
    paths = images_in(restored)[:limit]
    return Scores(dict(track(_score_without_reference(paths, device), len(paths), "Measuring", on_progress)))


def _score_pairs(
    pairs: Sequence[Pair],
    protocol: Protocol,
    derain: Derainer | None = None,
    save: Path | None = None,
    resume: bool = False,
) -> Iterator[tuple[str, dict[str, float]]]:
    """The name of each pair with the scores of its input against its target, or, with a `derain`, those of what it
    makes of the input, followed by those of the input. To resume is to score images that are saved already."""
    for pair in pairs:
        image, clean = pair.load()
        output = save / f"{pair.name}.png" if save else None
        saved = output if resume and output and output.is_file() else None
        try:
            row = _score(image, clean, protocol)
            if derain:
                image = read_rgb(saved) if saved else derain(image)
                row = _score(image, clean, protocol) | {f"input_{metric}": value for metric, value in row.items()}
        except DerainError as error:
            raise type(error)(f"{saved or pair.input}: {error}") from error
        except ValueError as error:
            raise InputError(f"{saved or pair.input}: {error}") from error
        if output and not saved:
            Photo(image).save(output)
        yield pair.name, row


def _score(image: NDArray[np.uint8], clean: NDArray[np.uint8], protocol: Protocol) -> dict[str, float]:
    return {"psnr": psnr(image, clean, protocol), "ssim": ssim(image, clean, protocol)}


def _score_without_reference(paths: Sequence[Path], device: str) -> Iterator[tuple[str, dict[str, float]]]:
    """The name of each image with its NIQE and BRISQUE."""
    try:
        import pyiqa  # pyright: ignore[reportMissingImports] - an extra that brings far more than it is used for here
    except ImportError as error:
        raise InputError(
            f"NIQE and BRISQUE need pyiqa ({error}); in the folder of this project, run: "
            "pip install -c constraints.txt -e '.[export,iqa]'"
        ) from None
    measures = {name: pyiqa.create_metric(name, device=torch_device(device)) for name in ("niqe", "brisque")}
    for path in paths:
        image, block = read_rgb(path), NIQE_BLOCK_PIXELS
        H, W, _ = image.shape
        if (H // block) * (W // block) < 2:
            raise InputError(f"{path}: NIQE needs at least {2 * block}x{block} pixels, found {W}x{H}")
        batch = torch.from_numpy(to_batch(image))
        yield path.name, {name: measure(batch).item() for name, measure in measures.items()}
