"""The loss of a student against its teacher, and patches of which some have no clean version."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.options import LossWeights
from drsformer.config import LEVELS, DRSformerConfig
from drsformer.data import Pair
from drsformer.model import DRSformer, conv1x1
from drsformer.patches import Patches, to_tensor
from export.topk import shared_copy
from runtime.errors import InputError


def tap(network: DRSformer, levels: Sequence[str]) -> dict[str, Tensor]:
    """Look into every pass of a network from now on.

    Args:
        network: In any form that keeps the names of its modules.
        levels: Names of levels whose last block has attention with masks.

    Returns:
        A dict that each pass fills: under "features" the output of the latent level, and under the name of each of the
        levels the attention matrices of its last block, (B, heads, head_dim, head_dim), before the masks.
    """
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0]

        return hook

    network.up4_3.register_forward_pre_hook(note("features"))
    for level in levels:
        getattr(network, level)[-1].attn.topk.register_forward_pre_hook(note(level))
    return seen


def last_heads(config: DRSformerConfig, level: str) -> tuple[int, int] | None:
    """Heads and head_dim of the last block of a level; None where there is no block, or attention without masks."""
    blocks = config.levels()[level].blocks
    return (blocks[-1].heads, blocks[-1].head_dim) if blocks and config.topk else None


class Distillation(nn.Module):
    """The loss of a student against its teacher. As a module it holds only what it learns itself.

    Args:
        teacher: In the form in which it runs, on the device where it runs.
        student: Only its config is looked at; the network itself comes with every call.
        weights: Of the terms.

    Raises:
        InputError: Attention cannot be compared.
    """

    def __init__(self, teacher: DRSformer, student: DRSformer, weights: LossWeights) -> None:
        super().__init__()
        self.weights = weights
        self.levels = weights.attention_levels if weights.attention else []
        for level in self.levels:
            ours, theirs = last_heads(student.config, level), last_heads(teacher.config, level)
            if ours is None or ours != theirs:
                raise InputError(
                    f"`attention`: expected attention with masks and the same heads in {level}, found "
                    f"{_heads_text(ours)} in the student and {_heads_text(theirs)} in the teacher; leave the term out "
                    "or choose other `attention_levels`"
                )
        self.run_teacher = teacher.eval().requires_grad_(False).forward  # not a submodule: it is not trained
        self.in_teacher = tap(teacher, self.levels)
        self.in_student: dict[str, Tensor] | None = None  # from when it is first seen
        widths = student.config.latent.width, teacher.config.latent.width
        self.adapter = conv1x1(*widths) if weights.features and widths[0] != widths[1] else nn.Identity()

    def forward(self, student: DRSformer, rainy: Tensor, clean: Tensor) -> dict[str, Tensor]:
        """The terms that have a weight, each times its weight.

        Args:
            student: The network that is trained.
            rainy: (B, 3, P, P) float32 in [0, 1].
            clean: The same, or NaN in patches that have no clean version, which then do not count in `l1`.
        """
        if self.in_student is None:
            self.in_student = tap(student, self.levels)
        with torch.no_grad():
            target = self.run_teacher(rainy)
        output = student(rainy)
        weights, terms = self.weights, {}
        if weights.l1:
            terms["l1"] = weights.l1 * F.l1_loss(output, torch.where(clean.isnan(), output.detach(), clean))
        if weights.l1_teacher:
            terms["l1_teacher"] = weights.l1_teacher * F.l1_loss(output, target)
        if weights.features:
            features = self.in_teacher["features"].float()
            distance = F.mse_loss(self.adapter(self.in_student["features"]).float(), features)
            terms["features"] = weights.features * distance / _mean_square(features)
        if weights.attention:
            distances = [F.mse_loss(self.in_student[level], self.in_teacher[level]) for level in self.levels]
            terms["attention"] = weights.attention * torch.stack(distances).mean()
        if weights.frequency:
            spectrum = torch.fft.rfft2(output - target, norm="ortho")
            terms["frequency"] = weights.frequency * torch.view_as_real(spectrum).abs().mean()
        return terms


STREAMS = tuple(LEVELS)[:-1]
"""Levels whose end of the residual path is compared, block-wise: all but the last, which the image judges."""

MAPPED = 16
"""Patches that maps between streams are fitted to."""

MAP_RIDGE = 1e-4
"""Of the mean square of a student's channels: as much of each is taken for noise where a map is fitted to them."""


class BlockwiseDistillation(Distillation):
    """Distillation that begins level by level (Cheng et al., arXiv 2012.04915): in the first steps each level has a
    term of its own, how far its residual path ends from where the teacher's does, over the latter's mean square, and
    gradients stop where a level ends. So it learns to make up for what the levels before leave it, not to please those
    behind it; the terms of the image reach the last level only. After these steps it is `Distillation`.

    Args:
        teacher: See `Distillation`.
        student: See `Distillation`.
        weights: See `Distillation`.
        steps: How many the first ones are.
        maps: See `stream_maps`.
    """

    def __init__(
        self, teacher: DRSformer, student: DRSformer, weights: LossWeights, steps: int, maps: Mapping[str, Tensor]
    ) -> None:
        super().__init__(teacher, student, weights)
        self.steps, self.done, self.maps = steps, 0, maps
        self.streams_of_teacher = tap_streams(teacher)
        self.streams_of_student: dict[str, Tensor] | None = None

    def forward(self, student: DRSformer, rainy: Tensor, clean: Tensor) -> dict[str, Tensor]:
        if self.streams_of_student is None:
            self.streams_of_student = tap_streams(student, lambda: self.done < self.steps)
        terms = super().forward(student, rainy, clean)
        if self.done < self.steps:
            terms |= stream_errors(self.streams_of_teacher, self.streams_of_student, self.maps)
        self.done += 1
        return terms

    def get_extra_state(self) -> int:
        return self.done

    def set_extra_state(self, state: int) -> None:
        self.done = state


def tap_streams(network: DRSformer, cut: Callable[[], bool] = lambda: False) -> dict[str, Tensor]:
    """Look at the residual path of a network from now on, and let no gradients pass from level to level while `cut`.

    Returns:
        A dict that each pass fills: where the path ends in each of `STREAMS`, (B, C, h, w).
    """
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen[name] = output
            return output.detach() if cut() else output

        return hook

    for name in STREAMS:
        getattr(network, name).register_forward_hook(note(name))
    return seen


def stream_errors(
    teacher: Mapping[str, Tensor], student: Mapping[str, Tensor], maps: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """By level, the squared error of the student's residual path against the teacher's, over the latter's mean square.

    Args:
        teacher: See `tap_streams`.
        student: Likewise.
        maps: See `stream_maps`.
    """
    errors = {}
    for name, target in teacher.items():
        stream, target = student[name].float(), target.float()
        if name in maps:
            stream = F.conv2d(stream, maps[name].to(stream)[:, :, None, None])
        errors[name] = F.mse_loss(stream, target) / _mean_square(target)
    return errors


@torch.no_grad()
def stream_maps(teacher: DRSformer, student: DRSformer, images: Sequence[Tensor]) -> dict[str, Tensor]:
    """How to compare residual paths of different widths: by level, the least-squares fit of the teacher's channels by
    the student's, (C_teacher, C_student); nothing for levels of one width, which are compared as they are.

    Args:
        teacher: In any form, on the device of the images; stays as it is.
        student: Likewise.
        images: (1, 3, H, W) each.
    """
    teacher, student = shared_copy(teacher), shared_copy(student)
    theirs, ours = tap_streams(teacher), tap_streams(student)
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for image in images:
        teacher(image)
        student(image)
        for name, target in theirs.items():
            if target.shape != ours[name].shape:
                s, t = (x[0].flatten(1).double() for x in (ours[name], target))  # channels, h * w
                before = sums.get(name, (0, 0))
                sums[name] = before[0] + t @ s.T, before[1] + s @ s.T
    maps = {}
    for name, (mixed, gram) in sums.items():
        size = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny ** 0.5)  # a level may be all zero
        ridge = MAP_RIDGE * size * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        maps[name] = torch.linalg.solve(gram + ridge, mixed.T).T.float()
    return maps


def _mean_square(target: Tensor) -> Tensor:
    """By which an error is divided: 1 where all is zero, as a level of a teacher may be."""
    size = target.square().mean()
    return torch.where(size > 0, size, torch.ones_like(size))


def _heads_text(shape: tuple[int, int] | None) -> str:
    return "{} of {} channels".format(*shape) if shape else "none"


class PatchesOfPhotographs(Patches):
    """Patches of which a fraction comes from rainy photographs, with NaN in place of the clean patch.

    Attributes:
        photographs: Their paths.
        unlabelled: The fraction, 0 to 1.
    """

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
