"""What a network keeps at each fraction of its MACs: pruned only, recovered, distilled, and what training would give.

    python -m benchmarks.compression --weights weights/drsformer-xs.safetensors --data ../shared/data \\
        --run-dir runs/curve --output benchmarks/results --macs 0.5
    python -m benchmarks.compression --weights W --data DATA --run-dir runs/curve --output runs/curve --iterations 3000

DATA holds folders of pairs, such as rain100l/train and rain100l/val: networks are pruned and distilled by the train
folders and scored on whole images of the val folders. Rows, for each fraction:

    taylor       pruned by first-order importance for MACs, nothing repaired
    pruned       pruned as `compress.prune` does it, but not recovered
    recovered    as `compress.prune` does it
    distilled    the recovered one after --iterations steps of `compress.distill`
    random       its structure from random weights, after as many steps
    trained on   the whole network, after as many steps

The names of the last three say how many steps of how much they took.

Each is exported and run in ONNX Runtime: scored by the paper's PSNR and SSIM and by the PSNR between its images and
those of the whole network, and timed in turn with that. OUTPUT/compression-NAME.json, the same as a table in .md and
the curves in .png are written row by row; the same command goes on where it was stopped.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.harness import Row, Sheet
from benchmarks.training import pair_folders
from compress.distill import DistillOptions, distill
from compress.latency import export_session, time_sessions
from compress.options import LossWeights
from compress.prune import PruneOptions, prune
from drsformer import checkpoint, counts
from drsformer.data import Pair, dataset_name, find_pairs
from drsformer.metrics import psnr, psnr_rgb, ssim
from drsformer.model import DRSformer
from drsformer.recipe import Hardware, Recipe, Schedule
from drsformer.train import training_shown
from runtime.cli import main, progress_shown
from runtime.errors import InputError, expect_between
from runtime.files import writing
from runtime.ort import OrtSession
from runtime.progress import track
from runtime.session import Derainer

Kind = Literal["taylor", "pruned", "recovered", "distilled", "random", "trained on"]
"""The rows, see above."""

PRUNED: dict[Kind, PruneOptions] = {
    "taylor": PruneOptions(importance="taylor", recover=False),
    "pruned": PruneOptions(recover=False),
    "recovered": PruneOptions(),
}
"""How each of the first rows is pruned."""

SIZE = 256, 256
"""Height and width of the image that networks are timed on."""


@dataclass(frozen=True)
class Curve:
    """What to measure.

    Args:
        weights: Checkpoint of the whole network.
        data: Folder with folders of pairs, each with train and val.
        run_dir: Folder for the networks.
        output: Folder for the results.
        macs: Fractions of the MACs.
        kinds: Which of the rows.
        iterations: Steps of the trainings; without, there are none of the last three rows.
        patch: Height and width of the patches in these steps.
        batch: Patches in a step.
        lr: Learning rate of a distillation at the start; from random weights, five times as much.
        limit: Pairs of each val folder, the first ones.

    Raises:
        InputError: A value is out of range.
    """

    weights: Path
    data: Path
    run_dir: Path
    output: Path
    macs: tuple[float, ...] = (0.75, 0.5, 0.35, 0.25, 0.15, 0.1)
    kinds: tuple[Kind, ...] = get_args(Kind)
    iterations: int = 0
    patch: int = 128
    batch: int = 4
    lr: float = 2e-4
    limit: int = 20

    def __post_init__(self) -> None:
        if not self.macs or not all(0 < fraction < 1 for fraction in self.macs):
            raise InputError(f"`macs`: expected fractions between 0 and 1, found {self.macs or 'none'}")
        expect_between("iterations", self.iterations, 0)
        expect_between("limit", self.limit, 1)


Images = list[NDArray[np.uint8]]


class Judge:
    """Scores networks beside the whole one, which is exported and restores the images once."""

    def __init__(self, whole: DRSformer, places: Sequence[Path], limit: int) -> None:
        self.whole = whole
        self.folders = {dataset_name(place): find_pairs(place)[:limit] for place in places}

    @functools.cached_property
    def session(self) -> OrtSession:
        """The whole network in ONNX Runtime."""
        return _export(self.whole)

    @functools.cached_property
    def images(self) -> dict[str, Images]:
        """What the whole network makes of each folder."""
        return {name: _restore(self.session, pairs, name) for name, pairs in self.folders.items()}

    def score(self, network: DRSformer) -> Row:
        """Size, quality, likeness and time of a network."""
        row: Row = {"M parameters": counts.params(network.config) / 1e6, "GMAC": counts.macs(network.config) / 1e9}
        session = self.session if network is self.whole else _export(network)
        likeness = []
        for name, pairs in self.folders.items():
            whole = self.images[name]
            restored = whole if network is self.whole else _restore(session, pairs, name)
            clean = [pair.load()[1] for pair in pairs]
            mean = float(np.mean([psnr(*each) for each in zip(restored, clean, strict=True)]))
            before = float(np.mean([psnr(*each) for each in zip(whole, clean, strict=True)]))
            row |= {f"{name} PSNR": round(mean, 3), f"{name} drop": round(before - mean, 3)}
            row |= {
                f"{name} SSIM": round(float(np.mean([ssim(*each) for each in zip(restored, clean, strict=True)])), 4)
            }
            likeness += [psnr_rgb(*each) for each in zip(restored, whole, strict=True)]
        if network is not self.whole:
            row |= {"to whole, mean": round(float(np.mean(likeness)), 2), "worst": round(min(likeness), 2)}
            whole, own = time_sessions([self.session, session], SIZE)
            row |= {"ms": round(own.ms, 1), "whole ms": round(whole.ms, 1), "time": round(own.ms / whole.ms, 3)}
        return row


def _export(network: DRSformer) -> OrtSession:
    with progress_shown() as on_progress:
        return export_session(network, None, on_progress)


def _restore(session: OrtSession, pairs: Sequence[Pair], name: str) -> Images:
    derain = Derainer(session)
    with progress_shown() as on_progress:
        return [derain(pair.load()[0]) for pair in track(pairs, len(pairs), f"Restoring {name}", on_progress)]


def curve(options: Annotated[Curve, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]) -> Row:
    """Make and score the networks of a curve, or go on with that.

    Args:
        options: What to measure.

    Returns:
        The summary of the sheet.

    Raises:
        InputError: Files cannot be used.
    """
    name = options.weights.stem
    train, val = (pair_folders(options.data, split) for split in ("train", "val"))
    whole = checkpoint.load(options.weights)
    run_dir = options.run_dir / f"{name}-{whole.sha256[:8]}"
    run_dir.mkdir(parents=True, exist_ok=True)
    sheet = Sheet(options.output, f"compression-{name}", torch.device("cpu"), float("inf"))
    sheet.depends_on({"weights": whole.sha256[:8], "pairs": options.limit})
    judge = Judge(whole.model, val, options.limit)

    def measure(row: str, path: Path) -> None:
        sheet.measure(row, lambda: judge.score(checkpoint.load(path).model))
        with writing(sheet.path.with_suffix(".png")) as temporary:
            _plot(sheet.rows).savefig(temporary, format="png", dpi=150)

    def pruned(fraction: float, kind: Kind) -> Path:
        path = run_dir / f"{fraction:g}-{kind}.safetensors"
        if not path.exists():
            with progress_shown() as on_progress:
                prune(options.weights, train, path, replace(PRUNED[kind], macs=fraction, limit=1), on_progress)
        return path

    def trained(kind: str, student: Path, rate: float) -> tuple[str, Path]:
        steps = options.iterations
        row = f"{kind}, {steps} steps of {options.batch} patches of {options.patch}x{options.patch}"
        output = run_dir / row.replace(",", "").replace(" ", "-")
        task = DistillOptions(
            output,
            options.weights,
            str(student),
            train,
            recipe=Recipe(
                steps,
                constant=0,
                warmup=steps // 20,
                lr=rate,
                batch=options.batch,
                patch=options.patch,
                clip=0.1,
                ema=0.98,
            ),
            loss_weights=LossWeights(l1_teacher=0) if kind == "trained on" else LossWeights(),
            hardware=Hardware(devices="1", channels_last=True),
            schedule=Schedule(log_every=max(1, steps // 10)),
        )
        with training_shown() as on_progress:
            distill(task, on_progress)
        return row, output / "last.safetensors"

    def fresh(fraction: float) -> Path:
        path = run_dir / f"{fraction:g}-fresh.safetensors"
        if not path.exists():
            torch.manual_seed(0)
            checkpoint.save(path, DRSformer(checkpoint.load(pruned(fraction, "recovered")).model.config), {})
        return path

    sheet.measure("whole", lambda: judge.score(judge.whole))
    kinds = [kind for kind in options.kinds if kind in PRUNED or options.iterations]
    for fraction in options.macs:
        for kind in kinds:
            if kind in PRUNED:
                measure(f"{fraction:g} {kind}", pruned(fraction, kind))
            elif kind == "distilled":
                measure(*trained(f"{fraction:g} {kind}", pruned(fraction, "recovered"), options.lr))
            elif kind == "random":
                measure(*trained(f"{fraction:g} {kind}", fresh(fraction), 5 * options.lr))
    if "trained on" in kinds:
        measure(*trained("trained on", options.weights, options.lr))
    return sheet.summary()


def _kind(row: str) -> str:
    """What is left of the name of a row without the fraction, or all of it where it has none."""
    fraction, _, kind = row.partition(" ")
    return kind if fraction[0].isdigit() else row


def _plot(rows: dict[str, Row]) -> Figure:
    """The drop on each folder over the fraction of the MACs, one curve for each kind of row."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    columns = [column for column in rows.get("whole", {}) if column.endswith(" drop")]
    kinds = list(dict.fromkeys(_kind(key) for key in rows if key[0].isdigit()))
    panels = np.atleast_1d(np.array(figure.subplots(1, max(1, len(columns)), sharey=True)))
    for axes, column in zip(panels, columns, strict=False):
        for kind in kinds:
            found = [
                (float(key.split()[0]), row[column])
                for key, row in rows.items()
                if _kind(key) == kind and column in row
            ]
            if found:
                axes.plot(*zip(*sorted(found), strict=True), marker="o", label=kind)
        axes.set(title=column.removesuffix(" drop"), xlabel="fraction of the MACs", ylabel="dB lost")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


if __name__ == "__main__":
    main(curve, __doc__, summary=lambda summary: summary)
