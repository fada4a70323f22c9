"""Score a network, or images restored by any program, on a data set.

    python -m drsformer.evaluate --weights weights/drsformer-xs.safetensors --data Rain200L/test
    python -m drsformer.evaluate --weights bundle/ --data Rain200L/test Rain200H/test --csv scores.csv
    python -m drsformer.evaluate --weights W --data DID-MDN-test --protocol did --save restored/
    python -m drsformer.evaluate --restored restored/ --target Rain200L/test/target --protocol rain200
    python -m drsformer.evaluate --restored restored/ --no-reference

A network restores whole images into uint8, as its users get them; PSNR and SSIM are the paper's (`drsformer.metrics`),
beside those of the rainy input, and a network that scores below it is warned of. --data may have any layout of
`drsformer.data`. An image that equals its target has an infinite PSNR: it is counted as `identical` and left out of the
mean PSNR, which would be infinite too. With --save, images that the same network has saved before, of the same inputs
and in the same engine, are scored as they are, so that the same command goes on where it was stopped; --csv is written
anew after each data set.

NIQE and BRISQUE (the paper's Table 2; less is better) need no target. They come from pyiqa, which fetches their
parameters when it first runs. The functions are in `drsformer.evaluation`.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from drsformer.data import dataset_name, find_pairs
from drsformer.metrics import Protocol, Scores, shortfall
from runtime.cli import main, progress_shown, table_of
from runtime.errors import InputError, expect_between
from runtime.files import expect_output, writing
from runtime.progress import OnProgress, silent

if TYPE_CHECKING:  # they load engines, which takes their time
    from runtime.session import Derainer

logger = logging.getLogger("drsformer.evaluate")  # also where this file is the command

ScoresByData = dict[str, Scores]
"""Scores by the name of the data set."""

ROWS_SHOWN = 50
"""Images that the table lists one by one; it always ends with the mean of all."""


@dataclass(frozen=True)
class EvaluateOptions:
    """What to score: --weights on --data, or the images in --restored against those in --target or without any.

    Args:
        weights: Checkpoint, .safetensors or the authors' .pth; or an .onnx file or a bundle, as products run it.
        data: Folders of rainy and clean images.
        restored: Folder of restored images.
        target: Folder of their clean counterparts, with the same names up to the suffix.
        protocol: Protocol of PSNR and SSIM; rain200 for Rain200L, Rain200H and SPA-Data, did for DID-Data and DDN-Data.
        no_reference: Measure NIQE and BRISQUE, which need no clean images, in place of PSNR and SSIM.
        device: Device of the network or of NIQE and BRISQUE; auto is CUDA where there is one, else the CPU.
        limit: Number of images to use, the first ones; all if not given.
        save: Folder for the images that the network restores, as PNG; of several data sets, in a folder of each.
        csv: File for the scores of every image.
        weights_key: Key of the weights to take from a checkpoint that holds several, such as params_ema.

    Raises:
        InputError: The options do not go together.
    """

    weights: Path | None = None
    data: tuple[Path, ...] = ()
    restored: Path | None = None
    target: Path | None = None
    protocol: Protocol = "rain200"
    no_reference: tyro.conf.FlagCreatePairsOff[bool] = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    limit: int | None = None
    save: Path | None = None
    csv: Path | None = None
    weights_key: str | None = None

    def __post_init__(self) -> None:
        expect_between("limit", 1 if self.limit is None else self.limit, 1)
        if self.save and not self.weights:
            raise InputError("`save` keeps what a network restores: expected `weights` and `data` with it")
        if self.csv and self.csv.suffix.lower() != ".csv":
            raise InputError(f"`csv`: expected a name ending in .csv, found {self.csv}")
        names = ("weights", "data", "restored", "target", "no_reference")
        given = {name for name in names if getattr(self, name)}
        if given not in ({"weights", "data"}, {"restored", "target"}, {"restored", "no_reference"}):
            raise InputError(
                "expected `weights` and `data`, or `restored` and `target`, or `restored` and `no_reference`; "
                "see --help"
            )
        if len(set(map(dataset_name, self.data))) < len(self.data):
            raise InputError(
                "`data`: expected folders whose last two names differ, found "
                f"{' '.join(map(str, self.data))}; rename one"
            )


@dataclass(frozen=True)
class Network:
    """What is scored.

    Attributes:
        derain: The network.
        described: Where it comes from and where it runs, for people.
        sha256: Hash of the file that tells it from others.
        provider: What runs it, such as "cuda", or "PyTorch on cuda".
        origin: What a checkpoint was trained on, see `drsformer.checkpoint.Checkpoint.origin`.
    """

    derain: Derainer
    described: str
    sha256: str
    provider: str
    origin: str | None = None


def open_network(
    weights: Path, device: str = "auto", weights_key: str | None = None, on_progress: OnProgress = silent
) -> Network:
    """Open what is to be scored.

    Args:
        weights: Checkpoint, .onnx file or bundle.
        device: auto, cpu or cuda.
        weights_key: Key of the weights to take from a checkpoint that holds several.
        on_progress: See `runtime.progress`.

    Raises:
        InputError: It cannot be used, or only a checkpoint could hold several.
    """
    on_progress("Loading", 0, 1)  # PyTorch first, which takes its time
    from runtime.bundle import MANIFEST
    from runtime.session import Derainer

    if weights.is_dir() or weights.suffix == ".onnx":
        if weights_key:
            raise InputError(f"`weights_key`: expected a checkpoint as `weights`, found {weights}")
        derain = Derainer(weights, device)
        content = (weights / MANIFEST if weights.is_dir() else weights).read_bytes()
        provider = getattr(derain.session, "provider", device)
        network = Network(derain, f"on {provider}", hashlib.sha256(content).hexdigest(), provider)
    else:
        from drsformer import checkpoint
        from drsformer.session import TorchSession

        trained = checkpoint.load(weights, weights_key)
        session = TorchSession(trained.model, device)
        provider = f"PyTorch on {session.device}"
        network = Network(Derainer(session), trained.origin, trained.sha256, provider, trained.origin)
    on_progress("Loading", 1, 1)
    return network


def evaluate(
    options: EvaluateOptions, network: Network | None = None, on_progress: OnProgress = silent
) -> ScoresByData:
    """Score what the options name, and write the CSV that they ask for.

    Args:
        options: What to score.
        network: What `weights` are, if it is open already.
        on_progress: See `runtime.progress`.

    Returns:
        The scores of each data set, or of the restored images, by its name.

    Raises:
        InputError: Files cannot be used.
    """
    from drsformer.evaluation import evaluate_derainer, evaluate_restored, evaluate_without_reference

    if options.csv:
        expect_output(options.csv)
    protocol, limit, scores = options.protocol, options.limit, {}
    if options.weights:
        network = network or open_network(options.weights, options.device, options.weights_key, on_progress)
        for folder, pairs in [(folder, find_pairs(folder)[:limit]) for folder in options.data]:
            name = dataset_name(folder)
            save = options.save and (options.save / name if len(options.data) > 1 else options.save)
            which = " ".join(
                [options.weights.name, network.sha256[:12], *([options.weights_key] if options.weights_key else [])]
            )
            origin = {"network": which, "data": name, "provider": network.provider}
            scores[name] = evaluate_derainer(network.derain, pairs, protocol, save, origin, on_progress)
            if options.csv:  # with every data set, so that a kill costs no more than the one under way
                _write_csv(options.csv, scores)
    elif options.restored and options.target:
        scores[str(options.restored)] = evaluate_restored(
            options.restored, options.target, protocol, limit, on_progress
        )
    elif options.restored:
        scores[str(options.restored)] = evaluate_without_reference(options.restored, options.device, limit, on_progress)
    if options.csv and not options.weights:
        _write_csv(options.csv, scores)
    return scores


def _write_csv(path: Path, scores: Mapping[str, Scores]) -> None:
    """A line for every image: its data set, its name and its scores."""
    with (
        writing(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        lines = csv.writer(file)
        lines.writerow(["data", "image", *next(iter(scores.values())).columns])
        for data, found in scores.items():
            lines.writerows([data, name, *row.values()] for name, row in found.rows.items())


def command(options: Annotated[EvaluateOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]) -> ScoresByData:
    """Say what is scored, score it, and print a table."""
    network = None
    if options.weights:
        with progress_shown() as on_progress:
            network = open_network(options.weights, options.device, options.weights_key, on_progress)
    if network:
        data = " ".join(map(str, options.data))
        print(f"{options.weights} ({network.described}) on {data}, protocol {options.protocol}", flush=True)
    elif options.target:
        print(f"{options.restored} against {options.target}, protocol {options.protocol}", flush=True)
    else:
        print(options.restored, flush=True)
    with progress_shown() as on_progress:
        found = evaluate(options, network, on_progress)
    for name, scores in found.items():
        Console().print(table(scores, name if len(found) > 1 else None))
    for name, scores in found.items():
        if network and scores.gain_db is not None and scores.gain_db < 0:
            which = f"{options.weights} on {name}" if len(found) > 1 else str(options.weights)
            warning = shortfall(which, scores.gain_db, network.origin)
            Console().print(f"Warning: {warning}", style="bold red", markup=False, highlight=False, soft_wrap=True)
            logger.warning(warning)
    return found


def summary(found: ScoresByData) -> dict[str, Any]:
    """For JSON: the scores of the one data set, or those of each by its name."""
    summaries = {name: scores.summary() for name, scores in found.items()}
    return summaries if len(summaries) > 1 else next(iter(summaries.values()))


def table(scores: Scores, title: str | None = None) -> Table:
    """Scores for people: the first `ROWS_SHOWN` images and the mean."""
    shown = table_of(["image"], [metric.replace("_", " ") for metric in scores.columns], title)
    for name, row in list(scores.rows.items())[:ROWS_SHOWN]:
        shown.add_row(escape(name), *map(_cell, row.values()))
    if scores.images > ROWS_SHOWN:
        shown.add_row(f"... and {scores.images - ROWS_SHOWN} more")
    shown.add_section()
    shown.add_row(f"mean of {scores.images}", *(_cell(scores.mean(metric)) for metric in scores.columns))
    return shown


def _cell(value: float) -> str:
    return "equal" if value == math.inf else f"{value:.4f}"


if __name__ == "__main__":
    main(command, __doc__, summary=summary)
