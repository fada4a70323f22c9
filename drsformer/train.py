"""Train a DRSformer.

    python -m drsformer.train --data Rain200H/train --output runs/rain200h
    python -m drsformer.train --network drsformer-xs --data light/train heavy/train --validate light/val heavy/val \\
        --clean photographs/ --rendered 0.6 --dry 0.05 --lr 1e-3 --patch 64 --output runs/xs
    python -m drsformer.train --feed-forward gdfn --topk 1/2 --mefc late --experts 4 --data D --output runs/variant
    python -m drsformer.train --config network.json --data D --output runs/mine
    torchrun --nproc-per-node 4 -m drsformer.train --data DDN/train --precision bf16-mixed --output runs/ddn

The defaults are the recipe of the released code (paper, section 4.1): L1 loss, AdamW, batches of 8 patches of
128x128, flips, 92,000 iterations at a constant rate and 208,000 more on a cosine, gradients clipped at norm 0.01.
The same command continues a run that was stopped from its last checkpoint, on a CPU bit for bit as if it had not been;
a job of limited time stops itself with --minutes.

--network names a structure, from which --topk, --feed-forward, --mefc and --experts make every network of the paper's
ablations (`benchmarks.ablation` trains and scores its tables). --config describes any other: {"width": 32, "depths":
[2, 3, 3, 4]}, which are arguments of `DRSformerConfig.regular`, or a whole `DRSformerConfig.to_dict`.

OUTPUT gets `last.safetensors`, `best.safetensors` if there is validation, `log.jsonl`, TensorBoard's events, and
`state.pt` to continue from. With several machines it has to be a folder that all of them see.

The functions are in `drsformer.loop`, the patches in `drsformer.patches`. Devices, processes, precision and gradient
synchronisation are Lightning Fabric's, by --devices, torchrun or `fabric run`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from drsformer.data import files_of, find_pairs
from drsformer.recipe import DataOptions, Hardware, Recipe, Schedule, Variant, read_config
from runtime.cli import console, main, progress_shown
from runtime.errors import InputError
from runtime.files import expect_output
from runtime.progress import OnProgress, silent

if TYPE_CHECKING:
    from drsformer.loop import Form


@dataclass(frozen=True)
class TrainOptions:
    """What to train, on what and how.

    Args:
        output: Folder of the run.
        data: Folders of pairs, in any layout that drsformer.evaluate reads; each is drawn from equally often.
        network: Name of the network to start, see drsformer.config.PRESETS; drsformer if no other one is given.
        init: Checkpoint to start from, in place of a network with random weights.
        weights_key: Key of the weights to take from an --init that holds several, such as params_ema.
        config: JSON file that describes the network to start.
        variant: What is different from the named network.
        data_options: What else to learn from, and what to validate on.
        recipe: How to train.
        hardware: What to train on.
        schedule: How often to validate, log and save, and when to stop.

    Raises:
        InputError: The network is given in two ways.
    """

    output: Path
    data: list[Path] | None = None
    network: str | None = None
    init: Path | None = None
    weights_key: str | None = None
    config: Path | None = None
    variant: Variant = field(default_factory=Variant)
    data_options: DataOptions = field(default_factory=DataOptions)
    recipe: Recipe = field(default_factory=Recipe)
    hardware: Hardware = field(default_factory=Hardware)
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        if self.weights_key and not self.init:
            raise InputError("`weights_key`: expected `init` with it")
        for name in ("init", "config"):
            others = [other for other in ("network", "config") if other != name and getattr(self, other)]
            if getattr(self, name) and (others := [*others, *self.variant.changes()]):
                raise InputError(f"`{name}` brings its own network: leave `{others[0]}` out")


def train(options: TrainOptions, form: Form | None = None, on_progress: OnProgress = silent) -> dict[str, Any]:
    """Train a network, or continue its training.

    Args:
        options: What, on what and how.
        form: Form of the network through which the steps run, see `drsformer.loop`; the network itself if not given.
        on_progress: See `runtime.progress`.

    Returns:
        What `drsformer.loop.fit` returns.

    Raises:
        InputError: As `fit` does, and for files, devices or networks that cannot be used.
    """
    import torch

    from drsformer import checkpoint
    from drsformer.loop import Run, fit, network_files, unchanged, untrained
    from drsformer.model import DRSformer
    from drsformer.patches import Patches

    recipe, data_options, data = options.recipe, options.data_options, options.data or []
    expect_output(*network_files(options.output), init=options.init)
    folders = [find_pairs(folder) for folder in data]
    validation = data_options.validation()
    patches = Patches(folders, recipe, **data_options.sources_of_patches())
    torch.manual_seed(recipe.seed)
    parent = checkpoint.load(options.init, options.weights_key) if options.init else None
    changes = options.variant.changes()
    network = None
    if parent:
        model = parent.model.train()
    elif options.config:
        model = DRSformer(read_config(options.config))
    else:
        network = options.network or "drsformer"
        model = untrained(network, **changes)
    sources = data_options.sources(*data)
    dependencies = {
        "network": network,
        "variant": json.dumps(changes) if changes else None,
        "config": checkpoint.file_sha256(options.config) if options.config else None,
        "parent": parent.sha256 if parent else None,
        "weights_key": options.weights_key,
        "data": sources,
        "files_sha256": data_options.files_sha256(*files_of(*folders)),
        **data_options.options(),
        **dataclasses.asdict(recipe),
        "precision": options.hardware.precision,
    }
    provenance = checkpoint.provenance_after(parent, "drsformer.train", dependencies, trained_on=sources)
    return fit(
        options.hardware.fabric(options.output),
        model,
        patches,
        recipe,
        Run(options.output, dependencies, provenance),
        form=form or unchanged,
        validate=validation,
        protocol=data_options.protocol,
        hardware=options.hardware,
        schedule=options.schedule,
        on_progress=on_progress,
    )


class _Lines(logging.Handler):
    """What the training loop says, as lines on standard error above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(record.getMessage(), soft_wrap=True, markup=False, highlight=False)


@contextmanager
def training_shown(*others: logging.Logger) -> Iterator[OnProgress]:
    """Show on standard error, in one process for all, what the training loop and `others` say and how far they are;
    where there is no terminal to draw bars on, also the lines of the loop's log."""
    from drsformer.loop import is_first_process, logger

    if not is_first_process():
        yield silent
        return
    handler = _Lines()
    for each in (logger, *others):
        each.addHandler(handler)
        each.setLevel(logging.INFO)
    if not console.is_terminal:
        logger.setLevel(logging.DEBUG)
    try:
        with progress_shown() as on_progress:
            yield on_progress
    finally:
        for each in (logger, *others):
            each.removeHandler(handler)
            each.setLevel(logging.NOTSET)


def first_process_summary(result: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a training for the last line of its command, which one process prints for all."""
    from drsformer.loop import is_first_process

    return result if is_first_process() else None


def command(options: Annotated[TrainOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]) -> dict[str, Any]:
    """Train a network, and show how far it is."""
    from drsformer.loop import leave_processes

    with training_shown() as on_progress:
        result = train(options, on_progress=on_progress)
    leave_processes()
    return result


if __name__ == "__main__":
    main(command, __doc__, summary=first_process_summary)
