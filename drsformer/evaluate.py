"""Score a network, or images restored by any program, on a data set.

    python -m drsformer.evaluate --weights weights/drsformer-xs.safetensors --data Rain200L/test
    python -m drsformer.evaluate --weights W --data DID-MDN-test --protocol did --save restored/
    python -m drsformer.evaluate --restored restored/ --target Rain200L/test/target --protocol rain200
    python -m drsformer.evaluate --restored restored/ --no-reference

A network restores whole images into uint8, as its users get them; PSNR and SSIM are the paper's (`drsformer.metrics`),
beside those of the rainy input, and a network that scores below it is warned of. --data may have any layout of
`drsformer.data`. An image that equals its target has an infinite PSNR: it is counted as `identical` and left out of the
mean PSNR, which would be infinite too.

NIQE and BRISQUE (the paper's Table 2; less is better) need no target. They come from pyiqa, which fetches their
parameters when it first runs. The functions are in `drsformer.evaluation`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, cast

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from drsformer.data import find_pairs
from drsformer.metrics import Protocol, Scores, shortfall
from runtime.cli import main, progress_shown
from runtime.errors import InputError, expect_between

logger = logging.getLogger("drsformer.evaluate")  # also where this file is the command

ROWS_SHOWN = 50
"""Images that the table lists one by one; it always ends with the mean of all."""


@dataclass(frozen=True)
class EvaluateOptions:
    """What to score: --weights on --data, or the images in --restored against those in --target or without any.

    Args:
        weights: Checkpoint, .safetensors or the authors' .pth.
        data: Folder of rainy and clean images.
        restored: Folder of restored images.
        target: Folder of their clean counterparts, with the same names up to the suffix.
        protocol: Protocol of PSNR and SSIM; rain200 for Rain200L, Rain200H and SPA-Data, did for DID-Data and DDN-Data.
        no_reference: Measure NIQE and BRISQUE, which need no clean images, in place of PSNR and SSIM.
        device: Device of the network or of NIQE and BRISQUE; auto is CUDA where there is one, else the CPU.
        limit: Number of images to use, the first ones; all if not given.
        save: Folder for the images that the network restores, as PNG.
        params: Weights to take from a checkpoint that holds several, such as params_ema.

    Raises:
        InputError: The options do not go together.
    """

    weights: Path | None = None
    data: Path | None = None
    restored: Path | None = None
    target: Path | None = None
    protocol: Protocol = "rain200"
    no_reference: tyro.conf.FlagCreatePairsOff[bool] = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    limit: int | None = None
    save: Path | None = None
    params: str | None = None

    def __post_init__(self) -> None:
        expect_between("limit", 1 if self.limit is None else self.limit, 1)
        if self.save and not self.weights:
            raise InputError("`save` keeps what a network restores: expected `weights` and `data` with it")
        names = ("weights", "data", "restored", "target", "no_reference")
        given = {name for name in names if getattr(self, name)}
        if given not in ({"weights", "data"}, {"restored", "target"}, {"restored", "no_reference"}):
            raise InputError(
                "expected `weights` and `data`, or `restored` and `target`, or `restored` and `no_reference`; "
                "see --help"
            )


def command(options: Annotated[EvaluateOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]) -> Scores:
    """Say what is scored, score it, and print a table."""
    from drsformer import checkpoint
    from drsformer.evaluation import evaluate_model, evaluate_restored, evaluate_without_reference
    from drsformer.session import torch_device

    weights, data, restored, target = options.weights, options.data, options.restored, options.target
    protocol, limit, origin = options.protocol, options.limit, ""
    if weights and data:
        pairs = find_pairs(data)[:limit]
        trained = checkpoint.load(weights, options.params)
        model, origin = trained.model.to(torch_device(options.device)), trained.origin
        print(f"{weights} ({origin}) on {data}, protocol {protocol}", flush=True)
        score = partial(evaluate_model, model, pairs, protocol, options.save)
    elif restored and target:
        print(f"{restored} against {target}, protocol {protocol}", flush=True)
        score = partial(evaluate_restored, restored, target, protocol, limit)
    else:
        print(restored, flush=True)
        score = partial(evaluate_without_reference, cast("Path", restored), options.device, limit)
    with progress_shown() as on_progress:
        scores = score(on_progress=on_progress)
    Console().print(table(scores))
    if scores.gain_db is not None and scores.gain_db < 0:
        warning = shortfall(str(weights), scores.gain_db, origin)
        Console().print(f"Warning: {warning}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        logger.warning(warning)
    return scores


def table(scores: Scores) -> Table:
    """Scores for people: the first `ROWS_SHOWN` images and the mean."""
    table = Table("image")
    for metric in scores.columns:
        table.add_column(metric.replace("_", " "), justify="right")
    for name, row in list(scores.rows.items())[:ROWS_SHOWN]:
        table.add_row(escape(name), *(f"{value:.4f}" for value in row.values()))
    if scores.images > ROWS_SHOWN:
        table.add_row(f"... and {scores.images - ROWS_SHOWN} more")
    table.add_section()
    table.add_row(f"mean of {scores.images}", *(f"{scores.mean(metric):.4f}" for metric in scores.columns))
    return table


if __name__ == "__main__":
    main(command, __doc__, summary=Scores.summary)
