"""Score a network, or images restored by any program, on a data set.

    python -m drsformer.evaluate --weights weights/drsformer-xs.safetensors --data Rain200L/test
    python -m drsformer.evaluate --weights W --data DID-MDN-test --protocol did --save restored/
    python -m drsformer.evaluate --restored restored/ --target Rain200L/test/target --protocol rain200
    python -m drsformer.evaluate --restored restored/ --no-reference

A network restores whole images into uint8, as its users get them; PSNR and SSIM are the paper's (`drsformer.metrics`),
beside those of the rainy input, and --data may have any layout of `drsformer.data`. An image that equals its target has
an infinite PSNR: it is counted as `identical` and left out of the mean PSNR, which would be infinite too.

NIQE and BRISQUE (the paper's Table 2; less is better) come from pyiqa, as in the authors' script, and need no target.
pyiqa fetches their parameters when it first runs. That part follows pyiqa's source, and has been tested only against a
stand-in for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from drsformer import checkpoint
from drsformer.config import SIZE_MULTIPLE
from drsformer.data import Pair, find_pairs, pair_folders
from drsformer.metrics import Protocol, psnr, ssim
from runtime.cli import main, progress
from runtime.errors import InputError
from runtime.images import Photo, list_images, read_rgb
from runtime.pixels import to_batch
from runtime.session import Derainer, Session

ROWS_SHOWN = 50
"""Images that the table lists one by one; it always ends with the mean of all."""

NIQE_BLOCK = 96
"""Height and width of the blocks over which NIQE takes its statistics; it needs two of them for a covariance."""


class TorchSession(Session):
    """A network in PyTorch, in float32; on CUDA, PyTorch by default lets convolutions round to TF32, and so does this.

    model:  takes and returns float32 (1, 3, H, W), H and W multiples of 8; it is moved to the device.
    device: "auto" (CUDA where there is one, else CPU) or a device by PyTorch's name.

    Raises InputError for a device that is not there.
    """

    multiple = SIZE_MULTIPLE

    def __init__(self, model: nn.Module, device: str = "auto") -> None:
        self.device = _device(device)
        self.model = model.to(self.device)

    @torch.inference_mode()
    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.model(torch.from_numpy(batch).to(self.device)).cpu().numpy()


@dataclass(frozen=True)
class Scores:
    """What was measured on some images.

    rows:     for each image, by its name, its metrics by their names.
    protocol: of its PSNR and SSIM, if it has them.
    """

    rows: dict[str, dict[str, float]]
    protocol: Protocol | None = None

    @property
    def psnr(self) -> float:
        return self.mean("psnr")

    @property
    def ssim(self) -> float:
        return self.mean("ssim")

    @property
    def images(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        """The names of the metrics."""
        return list(next(iter(self.rows.values())))

    def mean(self, metric: str) -> float:
        """Over the images for which it is not infinite; inf where there is none."""
        finite = [row[metric] for row in self.rows.values() if row[metric] != math.inf]
        return float(np.mean(finite)) if finite else math.inf

    def summary(self) -> dict[str, Any]:
        """The means and the number of images, for JSON: a mean that is not finite is None."""
        means = {metric: self.mean(metric) for metric in self.columns}
        summary: dict[str, Any] = {k: round(mean, 6) if math.isfinite(mean) else None for k, mean in means.items()}
        summary["images"] = self.images
        if self.protocol:
            summary["identical"] = sum(row["psnr"] == math.inf for row in self.rows.values())
            summary["protocol"] = self.protocol
        return summary

    def table(self) -> Table:
        """For people: the first `ROWS_SHOWN` images and the mean."""
        table = Table("image")
        for metric in self.columns:
            table.add_column(metric.replace("_", " "), justify="right")
        for name, row in list(self.rows.items())[:ROWS_SHOWN]:
            table.add_row(escape(name), *(f"{value:.4f}" for value in row.values()))
        if self.images > ROWS_SHOWN:
            table.add_row(f"... and {self.images - ROWS_SHOWN} more")
        table.add_section()
        table.add_row(f"mean of {self.images}", *(f"{self.mean(metric):.4f}" for metric in self.columns))
        return table


def evaluate_model(model: nn.Module, pairs: Iterable[Pair], protocol: Protocol = "rain200") -> Scores:
    """Scores of a network, on the device where it is: PSNR and SSIM of what it restores, and of the rainy input.

    Raises InputError for images that cannot be used and for a network that answers with NaN.
    """
    device = next(model.parameters()).device
    return Scores(dict(_score_pairs(pairs, protocol, Derainer(TorchSession(model, str(device))))), protocol)


def evaluate(
    weights: Path | None = None,
    data: Path | None = None,
    restored: Path | None = None,
    target: Path | None = None,
    protocol: Protocol = "rain200",
    no_reference: tyro.conf.FlagCreatePairsOff[bool] = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    limit: int | None = None,
    save: Path | None = None,
) -> Scores:
    """Score --weights on --data, or the images in --restored against those in --target or without any.

    Args:
        weights: Checkpoint, .safetensors or the authors' .pth.
        data: Folder of rainy and clean images.
        restored: Folder of restored images.
        target: Folder of their clean counterparts, with the same names up to the suffix.
        protocol: How to measure; rain200 for Rain200L, Rain200H and SPA-Data, did for DID-Data and DDN-Data.
        no_reference: Measure NIQE and BRISQUE, which need no clean images, in place of PSNR and SSIM.
        device: Where the network or NIQE and BRISQUE run; auto is CUDA where there is one, else the CPU.
        limit: Use only so many images, the first ones.
        save: Folder for the images that the network restores, as PNG.
    """
    if limit is not None and limit < 1:
        raise InputError(f"`limit`: expected at least 1, found {limit}")
    if save and not weights:
        raise InputError("`save` keeps what a network restores: expected --weights and --data with it")
    with progress() as bar:
        if weights and data and not (restored or target or no_reference):
            pairs = find_pairs(data)[:limit]
            trained = checkpoint.load(weights)
            derain = Derainer(TorchSession(trained.model, device))
            rows = bar.track(_score_pairs(pairs, protocol, derain, save), len(pairs), description="Restoring")
            scores = Scores(dict(rows), protocol)
            title = f"{weights} ({_origin(trained)}) on {data}"
        elif restored and target and not (weights or data or no_reference):
            pairs = pair_folders(restored, target)
            left = len(list_images(target)) - len({pair.target for pair in pairs})
            if left:
                raise InputError(f"{restored}: expected an image for each of {target}, found none for {left} of them")
            pairs = pairs[:limit]
            rows = bar.track(_score_pairs(pairs, protocol), len(pairs), description="Measuring")
            scores = Scores(dict(rows), protocol)
            title = f"{restored} against {target}"
        elif restored and no_reference and not (weights or data or target):
            paths = list_images(restored)[:limit]
            if not paths:
                raise InputError(f"{restored}: expected images, found none")
            rows = bar.track(_score_unpaired(paths, device), len(paths), description="Measuring")
            scores = Scores(dict(rows))
            title = str(restored)
        else:
            raise InputError(
                "expected --weights and --data, or --restored and --target, or --restored and "
                "--no-reference; see --help"
            )
    print(f"{title}, protocol {protocol}" if scores.protocol else title)
    Console().print(scores.table())
    return scores


def _score_pairs(
    pairs: Iterable[Pair], protocol: Protocol, derain: Derainer | None = None, save: Path | None = None
) -> Iterator[tuple[str, dict[str, float]]]:
    """The name of each pair with the scores of its input against its target, or, with a `derain`, those of what it
    makes of the input, followed by those of the input."""
    for pair in pairs:
        image, clean = pair.load()
        try:
            row = _score(image, clean, protocol)
            if derain:
                image = derain(image)
                row = _score(image, clean, protocol) | {f"input_{metric}": value for metric, value in row.items()}
        except (InputError, ValueError) as error:
            raise InputError(f"{pair.input}: {error}") from error
        if save:
            output = save / f"{pair.name}.png"
            if output.resolve() in (pair.input.resolve(), pair.target.resolve()):
                raise InputError(f"`save` {save} would overwrite {output} of the data set; name another folder")
            Photo(image).save(output)
        yield pair.name, row


def _score(image: NDArray[np.uint8], clean: NDArray[np.uint8], protocol: Protocol) -> dict[str, float]:
    return {"psnr": psnr(image, clean, protocol), "ssim": ssim(image, clean, protocol)}


def _score_unpaired(paths: Iterable[Path], device: str) -> Iterator[tuple[str, dict[str, float]]]:
    """The name of each image with its NIQE and BRISQUE."""
    try:
        import pyiqa  # pyright: ignore[reportMissingImports] - an extra that brings far more than it is used for here
    except ImportError as error:
        raise InputError(
            f"NIQE and BRISQUE need pyiqa ({error}); in the folder of this project, run: "
            "pip install -c constraints.txt -e '.[export,iqa]'"
        ) from None
    measures = {name: pyiqa.create_metric(name, device=_device(device)) for name in ("niqe", "brisque")}
    for path in paths:
        image = read_rgb(path)
        H, W, _ = image.shape
        if (H // NIQE_BLOCK) * (W // NIQE_BLOCK) < 2:
            raise InputError(f"{path}: NIQE needs at least {2 * NIQE_BLOCK}x{NIQE_BLOCK} pixels, found {W}x{H}")
        batch = torch.from_numpy(to_batch(image))
        yield path.name, {name: measure(batch).item() for name, measure in measures.items()}


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("expected a CUDA device, PyTorch finds none; run on the CPU with --device cpu")
    return torch.device(name)


def _origin(trained: checkpoint.Checkpoint) -> str:
    """What a checkpoint was trained on: weights for another data set score far lower, and nothing else tells."""
    data = trained.provenance.get("trained_on")
    return f"trained on {', '.join(map(str, data))}" if data else "of unknown training data"


if __name__ == "__main__":
    main(evaluate, __doc__, summary=Scores.summary)
