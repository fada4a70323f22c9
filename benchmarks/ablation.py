"""The paper's ablations by command: every row of a table is trained by one recipe and scored, beside the paper's score.

    python -m benchmarks.ablation --table 3 --data Rain200H/train --test Rain200H/test --run-dir runs/ablation \\
        --output runs/ablation
    python -m benchmarks.ablation --table k --network drsformer-xs --iterations 3000 --batch 4 --patch 64 \\
        --data Rain200H/train --test Rain200H/test --run-dir runs/small --output runs/small --minutes 60 --seeds 0 1 2

    --table 3    the feed-forward networks (Table 3)
    --table 4    the compensators and their experts (Table 4); which its one and four are, the paper does not say:
                 here the first of `drsformer.config.EXPERTS`
    --table k    the masks of the attention (Figure 7); its text names 1/2 alone and 1/2 to 4/5, the other rows are ours

The defaults are the paper's network and recipe: 300,000 steps for each row, days on a large GPU. --network takes the
widths and depths of a smaller one, and everything in `drsformer.recipe` can be set. With --seeds each row is trained
once for every seed, and its score is the mean, beside the least and the most: differences within that span are noise.
Rows of several tables that are the same network are trained once. OUTPUT/ablation-TABLE.json and the same as a table in
.md are written row by row; the same command goes on where it was stopped, in the middle of a training too.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from benchmarks.harness import Row, Sheet
from drsformer import checkpoint, counts
from drsformer.config import PRESETS, RELEASED_TOPK, preset
from drsformer.data import dataset_name, find_pairs
from drsformer.evaluation import evaluate_derainer
from drsformer.metrics import Protocol
from drsformer.recipe import LARGEST_SEED, DataOptions, Hardware, Recipe, Schedule, Variant
from drsformer.session import TorchSession, torch_device
from drsformer.train import TrainOptions, train, training_shown
from export.folding import fold, trainable
from runtime.cli import console, main, progress_shown
from runtime.errors import InputError, expect_between
from runtime.session import Derainer

WHOLE = Variant(RELEASED_TOPK, "msfn", "both", 8)
"""What the paper proposes, and what every row differs from."""


class Entry(NamedTuple):
    """A row of the paper: the network, and its PSNR in dB and SSIM on Rain200H, where the text has them."""

    variant: Variant
    psnr: float | None = None
    ssim: float | None = None


def _masks(*fractions: str) -> Variant:
    return dataclasses.replace(WHOLE, topk=fractions)


def _compensators(mefc: Any, experts: int | None) -> Variant:
    return dataclasses.replace(WHOLE, mefc=mefc, experts=experts)


TABLES = {
    "3": {
        "FN": Entry(dataclasses.replace(WHOLE, feed_forward="fn"), 31.84, 0.9275),
        "DFN": Entry(dataclasses.replace(WHOLE, feed_forward="dfn"), 31.88, 0.9279),
        "GDFN": Entry(dataclasses.replace(WHOLE, feed_forward="gdfn"), 31.97, 0.9286),
        "MSFN": Entry(WHOLE, 32.18, 0.9330),
    },
    "4": {
        "(a) none": Entry(_compensators("none", None), 32.03, 0.9308),
        "(b) early, 8 experts": Entry(_compensators("early", 8), 32.01, 0.9311),
        "(c) late, 8 experts": Entry(_compensators("late", 8), 32.07, 0.9328),
        "(d) both, 1 expert": Entry(_compensators("both", 1), 32.06, 0.9316),
        "(e) both, 4 experts": Entry(_compensators("both", 4), 32.14, 0.9325),
        "(f) both, 8 experts": Entry(WHOLE, 32.18, 0.9330),
    },
    "k": {
        "k = 1/2": Entry(_masks("1/2")),
        "k = 2/3": Entry(_masks("2/3")),
        "k = 3/4": Entry(_masks("3/4")),
        "k = 4/5": Entry(_masks("4/5")),
        "k from 1/2 to 4/5": Entry(WHOLE, 32.18, 0.9330),
        "dense": Entry(_masks("none")),
    },
}
"""The paper's tables, row by row in its order."""


@dataclass(frozen=True)
class Ablation:
    """What to train and to score.

    Args:
        table: Table of the paper, or k for the masks of its Figure 7.
        data: Folders of pairs to train on.
        test: Folders of pairs to score on.
        run_dir: Folder of the runs.
        output: Folder for the results.
        network: Name of the network whose widths and depths all rows have, see drsformer.config.PRESETS.
        limit: Pairs of each test folder, the first ones; all if not given.
        protocol: Protocol of PSNR and SSIM; rain200 for Rain200L, Rain200H and SPA-Data, did for DID-Data and DDN-Data.
        seeds: Seeds to train each row with, once for each; that of the recipe if not given.
        minutes: Minutes after which to save and stop, finished or not; the same command goes on from there.
        recipe: How to train each row.
        hardware: What to train on: one device.

    Raises:
        InputError: A value is out of range.
    """

    table: Literal["3", "4", "k"]
    data: list[Path]
    test: list[Path]
    run_dir: Path
    output: Path
    network: str = "drsformer"
    limit: int | None = None
    protocol: Protocol = "rain200"
    seeds: tuple[int, ...] = ()
    minutes: float = float("inf")
    recipe: Recipe = field(default_factory=Recipe)
    hardware: Hardware = field(default_factory=lambda: Hardware(devices="1"))

    def __post_init__(self) -> None:
        if self.network not in PRESETS:
            raise InputError(f"`network`: expected one of {', '.join(PRESETS)}, found {self.network}")
        expect_between("limit", 1 if self.limit is None else self.limit, 1)
        expect_between("minutes", self.minutes, 0)
        for seed in self.seeds:
            expect_between("seeds", seed, 0, LARGEST_SEED)
        if self.hardware.devices != "1":
            raise InputError(f"`devices`: expected 1, found {self.hardware.devices}")

    def recipes(self) -> list[Recipe]:
        """That of each training of a row."""
        return [dataclasses.replace(self.recipe, seed=seed) for seed in self.seeds or (self.recipe.seed,)]

    def conditions(self) -> Row:
        """What all rows have in common and a score depends on."""
        return {
            "network": self.network,
            "data": " ".join(map(dataset_name, self.data)),
            "test": " ".join(map(dataset_name, self.test)) + (f", the first {self.limit} pairs" if self.limit else ""),
            "protocol": self.protocol,
            "recipe": json.dumps(dataclasses.asdict(self.recipe)),
            "seeds": " ".join(str(recipe.seed) for recipe in self.recipes()),
            "precision": self.hardware.precision,
        }


def ablation(options: Annotated[Ablation, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]) -> Row:
    """Train and score the rows of a table, or go on with that.

    Args:
        options: What to train and to score.

    Returns:
        The summary of the sheet.

    Raises:
        InputError: Files cannot be used, or `output` holds the table of another network or recipe.
    """
    device = torch_device(options.hardware.accelerator)
    DataOptions(validate=options.test, validate_limit=1).validation()  # now and not after the first training
    sheet = Sheet(options.output, f"ablation-{options.table}", device, options.minutes)
    conditions = options.conditions()
    sheet.depends_on(conditions)
    for name, entry in TABLES[options.table].items():
        if not sheet.wants(name):
            continue
        config = preset(options.network, **entry.variant.changes())
        runs = []
        for recipe in options.recipes():
            result_of = [config.to_dict(), conditions["data"], json.dumps(dataclasses.asdict(recipe))]
            result_of.append(conditions["precision"])
            run = options.run_dir / hashlib.sha256(json.dumps(result_of).encode()).hexdigest()[:12]
            task = TrainOptions(
                run,
                options.data,
                options.network,
                variant=entry.variant,
                recipe=recipe,
                hardware=options.hardware,
                schedule=Schedule(minutes=max(0.0, sheet.seconds_left() / 60)),
            )
            console.print(f"{name}, seed {recipe.seed}: in {run}", highlight=False, markup=False)
            with training_shown() as on_progress:
                if not train(task, trainable, on_progress)["finished"]:
                    sheet.unfinished.append(name)
                    break
            runs.append(run / "last.safetensors")
        else:
            sheet.measure(name, functools.partial(_score, runs, options, entry), 0.0)
    return sheet.summary()


def _score(weights: list[Path], options: Ablation, entry: Entry) -> Row:
    """Size and quality of a network trained once or several times, beside what the paper has."""
    networks = [checkpoint.load(path).model for path in weights]
    config = networks[0].config
    row: Row = {"M parameters": counts.params(config) / 1e6, "GMAC": counts.macs(config) / 1e9}
    derainers = [Derainer(TorchSession(fold(network), options.hardware.accelerator)) for network in networks]
    for folder in options.test:
        pairs, place = find_pairs(folder)[: options.limit], dataset_name(folder)
        with progress_shown() as on_progress:
            scores = [evaluate_derainer(each, pairs, options.protocol, on_progress=on_progress) for each in derainers]
        psnrs = [score.psnr for score in scores]
        row[f"{place} PSNR"] = round(statistics.fmean(psnrs), 3)
        if len(psnrs) > 1:
            row |= {f"{place} least": round(min(psnrs), 3), f"{place} most": round(max(psnrs), 3)}
        row[f"{place} SSIM"] = round(statistics.fmean(score.ssim for score in scores), 4)
    paper = {"paper PSNR": entry.psnr, "paper SSIM": entry.ssim}
    return row | {name: value for name, value in paper.items() if value is not None}


if __name__ == "__main__":
    main(ablation, __doc__, summary=lambda summary: summary)
