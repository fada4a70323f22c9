"""Train a small network to answer like a large one.

    python -m compress.distill --teacher deraining.pth --student drsformer-xs --data Rain200H/train \\
        --validate Rain200H/test --output runs/student
    python -m compress.distill --teacher deraining.pth --student pruned.safetensors --data Rain200H/train \\
        --rainy photographs-of-rain/ --features 0.1 --precision bf16-mixed --output runs/pruned

The loop, the recipe, the patches, the devices and the way a stopped run goes on are those of drsformer.train. Only the
loss differs: a sum of terms, each with a weight, most of which compare the student with the teacher. Rainy photographs
that nobody has a clean version of can be learned from too: there the teacher's answer is the target.

Teacher and student run in their folded form, in the same precision. The teacher's answers are not kept: every patch
is cut, flipped and rained on afresh, so none is seen twice.
"""

# ruff: noqa: B008 - the defaults are frozen
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from drsformer import checkpoint
from drsformer.config import PRESETS, DRSformerConfig
from drsformer.data import Pair, dataset_name, find_pairs, images_in
from drsformer.loop import Run, compile_blocks, fit, network_files, untrained
from drsformer.model import DRSformer, conv1x1
from drsformer.patches import Patches, to_tensor
from drsformer.recipe import DataOptions, Hardware, Recipe, Schedule
from drsformer.train import first_process_summary, training_shown
from export.folding import trainable
from runtime.cli import console, main
from runtime.errors import InputError, expect_between
from runtime.files import expect_other_files

Level = Literal[
    "encoder_level1", "encoder_level2", "encoder_level3", "latent", "decoder_level3", "decoder_level2", "decoder_level1"
]


@dataclass(frozen=True)
class Terms:
    """Weights of the terms of the loss; a term of weight 0 is not computed. Raises InputError for values out of range.

    Args:
        l1: L1 distance to the clean patch, the loss that the teacher was trained with (DRSformer, Eq. 1).
        l1_teacher: L1 distance to the teacher's output: its answers as targets (Hinton et al., arXiv 1503.02531).
        features: Squared distance to the teacher's features at the bottleneck, the output of the latent level, over
            their mean square; where the widths differ, after a 1x1 convolution that is learned beside the student and
            thrown away with the run (FitNets, arXiv 1412.6550, Eq. 3).
        attention: Squared distance to the teacher's attention matrices, before masks and softmax, of the last block of
            each of the levels named below (TinyBERT, arXiv 1909.10351, Eq. 7). Both networks need the same heads there.
        frequency: L1 distance to the teacher's output in the frequency domain, over real and imaginary parts of an
            orthonormal FFT (MIMO-UNet, arXiv 2108.05054, Eq. 7).
        attention_levels: Levels whose attention is compared.
    """

    l1: float = 1.0
    l1_teacher: float = 1.0
    features: float = 0.0
    attention: float = 0.0
    frequency: float = 0.0
    attention_levels: list[Level] = field(default_factory=lambda: ["latent"])

    def __post_init__(self) -> None:
        weights = [self.l1, self.l1_teacher, self.features, self.attention, self.frequency]
        for name, weight in zip(("l1", "l1-teacher", "features", "attention", "frequency"), weights, strict=True):
            expect_between(f"--{name}", weight, 0)
        if not self.l1 + self.l1_teacher + self.frequency:
            raise InputError(
                "nothing tells the student what to put out: expected --l1, --l1-teacher or --frequency "
                "above 0, found none"
            )


def tap(network: DRSformer, levels: Sequence[Level]) -> dict[str, Tensor]:
    """What every pass of the network from now on leaves here: under "features" the output of the latent level, and
    under the name of each of the levels the attention matrices of its last block, (B, n, d, d), before the masks."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0]

        return hook

    network.up4_3.register_forward_pre_hook(note("features"))
    for level in levels:
        getattr(network, level)[-1].attn.topk.register_forward_pre_hook(note(level))
    return seen


def heads(config: DRSformerConfig, level: Level) -> tuple[int, int] | None:
    """Heads and head width of the last block of a level; None where there is no block, or attention without masks."""
    levels = dict(zip(get_args(Level), (*config.encoder, config.latent, *config.decoder), strict=True))
    blocks = levels[level].blocks
    return (blocks[-1].heads, blocks[-1].head_dim) if blocks and config.topk else None


class Distillation(nn.Module):
    """The loss of a student against its teacher. As a module it holds only what it learns itself.

    teacher: in the form in which it runs, on the device where it runs.
    student: only its structure is looked at; the network itself comes with every call.

    Raises InputError where attention cannot be compared.
    """

    def __init__(self, teacher: DRSformer, student: DRSformer, terms: Terms) -> None:
        super().__init__()
        self.terms = terms
        self.levels = terms.attention_levels if terms.attention else []
        for level in self.levels:
            ours, theirs = heads(student.config, level), heads(teacher.config, level)
            if ours is None or ours != theirs:
                raise InputError(
                    f"`attention`: expected attention with masks and the same heads in {level}, found "
                    f"{_told(ours)} in the student and {_told(theirs)} in the teacher; leave the term "
                    "out or choose other --attention-levels"
                )
        self.run_teacher = teacher.eval().requires_grad_(False).forward  # not a part of this module: it is not trained
        self.in_teacher = tap(teacher, self.levels)
        self.in_student: dict[str, Tensor] | None = None  # from when it is first seen
        widths = student.config.latent.width, teacher.config.latent.width
        self.adapter = conv1x1(*widths) if terms.features and widths[0] != widths[1] else nn.Identity()

    def forward(self, student: DRSformer, rainy: Tensor, clean: Tensor) -> dict[str, Tensor]:
        """The terms that have a weight, each times its weight. clean: NaN in patches that have no clean version, which
        then do not count in `l1`."""
        if self.in_student is None:
            self.in_student = tap(student, self.levels)
        with torch.no_grad():
            target = self.run_teacher(rainy)
        output = student(rainy)
        weights, terms = self.terms, {}
        if weights.l1:
            terms["l1"] = weights.l1 * F.l1_loss(output, torch.where(clean.isnan(), output.detach(), clean))
        if weights.l1_teacher:
            terms["l1_teacher"] = weights.l1_teacher * F.l1_loss(output, target)
        if weights.features:
            features = self.in_teacher["features"].float()
            distance = F.mse_loss(self.adapter(self.in_student["features"]).float(), features)
            terms["features"] = weights.features * distance / features.square().mean()
        if weights.attention:
            distances = [F.mse_loss(self.in_student[level], self.in_teacher[level]) for level in self.levels]
            terms["attention"] = weights.attention * torch.stack(distances).mean()
        if weights.frequency:
            spectrum = torch.fft.rfft2(output - target, norm="ortho")
            terms["frequency"] = weights.frequency * torch.view_as_real(spectrum).abs().mean()
        return terms


def _told(shape: tuple[int, int] | None) -> str:
    return "{} of {} channels".format(*shape) if shape else "none"


class PatchesOfPhotographs(Patches):
    """Patches of which a fraction comes from rainy photographs, with NaN in place of the clean patch."""

    photographs: Sequence[Path] = ()
    unlabelled: float = 0.0

    @property
    def items(self) -> Sequence[Pair | Path]:
        return [*self.backgrounds, *self.photographs]

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.recipe.seed, number, 1))  # another one than that of the other patches
        if rng.random() >= self.unlabelled:
            return super().__getitem__(number)
        rainy = to_tensor(self._cut(rng, self.photographs, self.recipe.patch, self.recipe.patch))
        return rainy, torch.full_like(rainy, torch.nan)


def distill(
    output: Path,
    teacher: Path,
    student: str,
    data: list[Path] | None = None,
    rainy: Path | None = None,
    unlabelled: float = 0.25,
    terms: Annotated[Terms, tyro.conf.OmitArgPrefixes] = Terms(),
    data_options: Annotated[DataOptions, tyro.conf.OmitArgPrefixes] = DataOptions(),
    recipe: Annotated[Recipe, tyro.conf.OmitArgPrefixes] = Recipe(iterations=10_000),
    hardware: Annotated[Hardware, tyro.conf.OmitArgPrefixes] = Hardware(),
    schedule: Annotated[Schedule, tyro.conf.OmitArgPrefixes] = Schedule(),
) -> dict[str, Any]:
    """Train a student to answer like a teacher, or continue to; returns what `drsformer.loop.fit` does.

    Args:
        output: Folder of the run.
        teacher: Checkpoint of the network to learn from, .safetensors or the authors' .pth.
        student: Checkpoint to start from, such as a pruned teacher, or the name of a network to start afresh, see
            drsformer.config.PRESETS.
        data: Folders of pairs, in any layout that drsformer.evaluate reads; each is drawn from equally often.
        rainy: Folder of rainy photographs without clean counterparts.
        unlabelled: Fraction of the patches that come from --rainy, if it is given.
        terms: What the student is compared with.
        data_options: What else to learn from, and what to validate on.
        recipe: How to train.
        hardware: What to train on.
        schedule: How often to validate, log and save, and when to stop.
    """
    expect_between("unlabelled", unlabelled, 0, 1)
    expect_other_files(*network_files(output), teacher=teacher, student=student)
    folders = [find_pairs(folder) for folder in data or []]
    validation = data_options.validation()
    patches = PatchesOfPhotographs(
        folders, recipe, data_options.clean, data_options.streaks, data_options.rendered, data_options.dry
    )
    if rainy:
        patches.photographs, patches.unlabelled = images_in(rainy), unlabelled
    torch.manual_seed(recipe.seed)
    trained_teacher = checkpoint.load(teacher)
    start = None if student in PRESETS else _start(student)
    model = start.model.train() if start else untrained(student)
    options = {
        "teacher": trained_teacher.sha256,
        "student": None if start else student,
        "parent": start.sha256 if start else None,
        "data": data_options.sources(*(data or [])),
        "rainy": dataset_name(rainy) if rainy else None,
        "unlabelled": patches.unlabelled,
        **dataclasses.asdict(terms),
        **data_options.options(),
        **dataclasses.asdict(recipe),
        "precision": hardware.precision,
    }
    trained_on = [*options["data"], *([options["rainy"]] if rainy else [])]
    provenance = checkpoint.provenance_after(start, "compress.distill", options, trained_on)
    fabric = hardware.fabric(output)
    frozen = trainable(trained_teacher.model.to(fabric.device)).to(fabric.device)
    loss = Distillation(frozen, model, terms)
    if hardware.compile:
        compile_blocks(frozen)
    if fabric.is_global_zero:
        parameters = sum(p.numel() for p in trained_teacher.model.parameters()) / 1e6
        console.print(f"Teacher of {parameters:.2f} M parameters")
    with training_shown() as on_progress:
        return fit(
            fabric,
            model,
            patches,
            recipe,
            Run(output, options, provenance),
            loss=loss,
            form=trainable,
            validate=validation,
            protocol=data_options.protocol,
            hardware=hardware,
            schedule=schedule,
            on_progress=on_progress,
        )


def _start(student: str) -> checkpoint.Checkpoint:
    if not Path(student).is_file():
        raise InputError(f"`student`: expected a checkpoint or one of {', '.join(PRESETS)}, found {student}")
    return checkpoint.load(student)


if __name__ == "__main__":
    main(distill, __doc__, summary=first_process_summary)
