"""The loss of a student against its teacher, and patches of which some have no clean version."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.options import LossWeights
from drsformer.config import DRSformerConfig
from drsformer.data import Pair
from drsformer.model import DRSformer, conv1x1
from drsformer.patches import Patches, to_tensor
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
            terms["features"] = weights.features * distance / features.square().mean()
        if weights.attention:
            distances = [F.mse_loss(self.in_student[level], self.in_teacher[level]) for level in self.levels]
            terms["attention"] = weights.attention * torch.stack(distances).mean()
        if weights.frequency:
            spectrum = torch.fft.rfft2(output - target, norm="ortho")
            terms["frequency"] = weights.frequency * torch.view_as_real(spectrum).abs().mean()
        return terms


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
