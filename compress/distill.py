"""Train a small network to answer like a large one.

    python -m compress.distill --teacher deraining.pth --student drsformer-xs --data Rain200H/train \\
        --validate held-out --output runs/student
    python -m compress.distill --teacher deraining.pth --student pruned.safetensors --data Rain200H/train \\
        --rainy photographs-of-rain/ --features 0.1 --precision bf16-mixed --output runs/pruned

The loop, the recipe, the patches, the devices and the way a stopped run goes on are those of drsformer.train. Only the
loss differs: a sum of terms, each with a weight, most of which compare the student with the teacher. Rainy photographs
that nobody has a clean version of can be learned from too: there the teacher's answer is the target. With
--blockwise, each level begins by itself: the residual path at its end is to be the teacher's.

Teacher and student run in their folded form, in the same precision. The teacher's answers are not kept: every patch
is cut, flipped and rained on afresh, so none is seen twice.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from compress.options import LossWeights
from drsformer.config import PRESETS
from drsformer.data import dataset_name, files_of, find_pairs, images_in
from drsformer.recipe import DataOptions, Hardware, Recipe, Schedule
from drsformer.train import first_process_summary, training_shown
from runtime.cli import main
from runtime.errors import InputError, expect_between
from runtime.files import expect_output
from runtime.progress import OnProgress, silent

if TYPE_CHECKING:
    from drsformer.checkpoint import Checkpoint


@dataclass(frozen=True)
class DistillOptions:
    """Who learns from whom, on what and how.

    Args:
        output: Folder of the run.
        teacher: Checkpoint of the network to learn from, .safetensors or the authors' .pth.
        student: Checkpoint to start from, such as a pruned teacher, or the name of a network to start afresh, see
            drsformer.config.PRESETS.
        data: Folders of pairs, in any layout that drsformer.evaluate reads; each is drawn from equally often.
        rainy: Folder of rainy photographs without clean counterparts.
        unlabelled: Fraction of the patches that come from --rainy, if it is given.
        loss_weights: What the student is compared with.
        blockwise: Steps, the first ones of the recipe, in which each level of the student learns by itself to leave the
            residual path as the teacher's does (arXiv 2012.04915); for students that were pruned from the teacher, or
            are as wide.
        data_options: What else to learn from, and what to validate on.
        recipe: How to train.
        hardware: What to train on.
        schedule: How often to validate, log and save, and when to stop.
        weights_key: Key of the weights to take from a teacher that holds several, such as params_ema.

    Raises:
        InputError: A value is out of range.
    """

    output: Path
    teacher: Path
    student: str
    data: list[Path] | None = None
    rainy: Path | None = None
    unlabelled: float = 0.25
    loss_weights: LossWeights = field(default_factory=LossWeights)
    blockwise: int = 0
    data_options: DataOptions = field(default_factory=DataOptions)
    recipe: Recipe = field(default_factory=lambda: Recipe(iterations=10_000))
    hardware: Hardware = field(default_factory=Hardware)
    schedule: Schedule = field(default_factory=Schedule)
    weights_key: str | None = None

    def __post_init__(self) -> None:
        expect_between("unlabelled", self.unlabelled, 0, 1)
        expect_between("blockwise", self.blockwise, 0, self.recipe.iterations)
        if self.rainy and self.unlabelled == 1 and not (self.loss_weights.l1_teacher or self.loss_weights.frequency):
            raise InputError(
                "`unlabelled`: expected less than 1 without `l1_teacher` or `frequency`, since photographs of `rainy` "
                "have no clean version to learn from, found 1"
            )
        if self.blockwise and self.hardware.cuda_graph:
            raise InputError("`blockwise`: expected 0 with `cuda_graph`, which replays one and the same step")


def distill(options: DistillOptions, on_progress: OnProgress = silent) -> dict[str, Any]:
    """Train a student to answer like a teacher, or continue to.

    Args:
        options: Who learns from whom, on what and how.
        on_progress: See `runtime.progress`.

    Returns:
        What `drsformer.loop.fit` returns.

    Raises:
        InputError: As `fit` does, and for files, devices or networks that cannot be used.
    """
    import torch

    from compress.distillation import MAPPED, BlockwiseDistillation, Distillation, PatchesOfPhotographs, stream_maps
    from drsformer import checkpoint
    from drsformer.loop import Run, compile_blocks, fit, logger, network_files, untrained
    from export.folding import trainable

    recipe, data_options, hardware, data = options.recipe, options.data_options, options.hardware, options.data or []
    expect_output(*network_files(options.output), teacher=options.teacher, student=options.student)
    folders = [find_pairs(folder) for folder in data]
    validation = data_options.validation()
    patches = PatchesOfPhotographs(folders, recipe, **data_options.sources_of_patches())
    if options.rainy:
        patches.photographs, patches.unlabelled = images_in(options.rainy), options.unlabelled
    torch.manual_seed(recipe.seed)
    teacher = checkpoint.load(options.teacher, options.weights_key)
    start = None if options.student in PRESETS else _read_student(options.student)
    model = start.model.train() if start else untrained(options.student)
    sources, photographs = data_options.sources(*data), dataset_name(options.rainy) if options.rainy else None
    dependencies = {
        "teacher": teacher.sha256,
        "weights_key": options.weights_key,
        "student": None if start else options.student,
        "parent": start.sha256 if start else None,
        "data": sources,
        "rainy": photographs,
        "files_sha256": data_options.files_sha256(*files_of(*folders), *patches.photographs),
        "unlabelled": patches.unlabelled,
        **dataclasses.asdict(options.loss_weights),
        "blockwise": options.blockwise,
        **data_options.options(),
        **dataclasses.asdict(recipe),
        "precision": hardware.precision,
    }
    trained_on = [*sources, *([photographs] if photographs else [])]
    provenance = checkpoint.provenance_after(start, "compress.distill", dependencies, trained_on=trained_on)
    fabric = hardware.fabric(options.output)
    frozen = trainable(teacher.model.to(fabric.device)).to(fabric.device)
    if options.blockwise:
        images = [patches[number][0][None].to(fabric.device) for number in range(MAPPED)]
        maps = stream_maps(frozen, trainable(model.to(fabric.device)), images)
        loss = BlockwiseDistillation(frozen, model, options.loss_weights, options.blockwise, maps)
    else:
        loss = Distillation(frozen, model, options.loss_weights)
    if hardware.compile:
        compile_blocks(frozen)
    logger.info(f"Teacher of {sum(p.numel() for p in teacher.model.parameters()) / 1e6:.2f} M parameters")
    return fit(
        fabric,
        model,
        patches,
        recipe,
        Run(options.output, dependencies, provenance),
        loss=loss,
        form=trainable,
        validate=validation,
        protocol=data_options.protocol,
        hardware=hardware,
        schedule=options.schedule,
        on_progress=on_progress,
    )


def _read_student(student: str) -> Checkpoint:
    from drsformer import checkpoint

    if not Path(student).is_file():
        raise InputError(f"`student`: expected a checkpoint or one of {', '.join(PRESETS)}, found {student}")
    return checkpoint.load(student)


def command(options: Annotated[DistillOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]) -> dict[str, Any]:
    """Train a student to answer like a teacher, and show how far it is."""
    from drsformer.loop import leave_processes

    with training_shown() as on_progress:
        result = distill(options, on_progress)
    leave_processes()
    return result


def run() -> None:
    """The command line."""
    main(command, __doc__, summary=first_process_summary)


if __name__ == "__main__":
    run()
