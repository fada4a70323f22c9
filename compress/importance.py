"""How much each unit of a network's pruning groups is needed: from gradients, or from the weights alone.

The importance classes of Torch-Pruning do not serve: they score layers of its dependency graph, which here are those of
a stand-in for the residual path alone. And they count what writes into a unit beside what reads it, add up a batch's
gradients before they take absolute values, and (1.6.1, Hessian) keep the last of the gradients given one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from compress.groups import Dimension, PruningGroup
from compress.options import Importance
from drsformer.model import DRSformer, LayerNorm
from runtime.errors import InputError
from runtime.progress import OnProgress, silent, track

TIE_BREAK = 1e-6
"""Fraction of the largest importance that the whole energy of a tensor counts where importance is measured by
gradients."""

Scores = dict[str, list[Tensor]]
"""What the loss of each unit would cost: by the name of its group, for each dimension, (units,) float64, at least 0."""

Grams = dict[str, Tensor]
"""By the name of a LayerNorm, the sum over the pixels of its inputs of x x^T, (C, C) float64."""


class Measured(NamedTuple):
    """What is known of a network's units.

    Attributes:
        scores: What they are worth.
        grams: Of its LayerNorms.
        directions: Of the groups that are scored by the principal directions of their units and not by the units
            themselves, see `compress.rotation`.
    """

    scores: Scores
    grams: Grams
    directions: dict[str, Tensor]


def importances(
    network: DRSformer,
    groups: Sequence[PruningGroup],
    patches: Sequence[tuple[Tensor, Tensor]],
    importance: Importance = "taylor",
    on_progress: OnProgress = silent,
) -> Measured:
    """Measure what the loss of each unit would cost.

    By `importance`:

    - taylor: how much the L1 loss of a patch would change to first order, in absolute value, summed over patches
      (Molchanov et al., arXiv 1906.10771, with weights taken together unit by unit).
    - fisher: the same squared, the second-order term where the Hessian is taken to be Fisher's matrix.
    - magnitude: the fraction of its tensors' energy that the unit has: the geometric mean of that of the weights that
      write into it and of those that read it. Of a block, the energy of what writes its results, in blocks of its
      level.

    With the first two, magnitude decides among units that no patch made use of.

    Args:
        network: Stays as it is.
        groups: Of this network.
        patches: Rainy and clean, (3, P, P) float32 in [0, 1] each.
        importance: The measure.
        on_progress: See `runtime.progress`.

    Returns:
        Scores of the units, and the grams that `compress.groups.remove` takes.

    Raises:
        InputError: The network answers with NaN or infinity.
    """
    weights = {name: parameter.detach().requires_grad_() for name, parameter in network.named_parameters()}
    magnitudes = _magnitudes(weights, groups)
    scores = {name: [torch.zeros_like(each) for each in dims] for name, dims in magnitudes.items()}
    with layer_norm_grams(network) as grams:
        for rainy, clean in track(patches, len(patches), "Measuring importance", on_progress):
            with torch.set_grad_enabled(importance != "magnitude"):
                loss = F.l1_loss(functional_call(network, weights, rainy[None]), clean[None])
            if not loss.isfinite():
                raise InputError("the network answers with NaN or infinity on a patch of the data; nothing is pruned")
            if importance == "magnitude":
                continue
            gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
            slopes = _Sums({name: weights[name] * gradient for name, gradient in zip(weights, gradients, strict=True)})
            for group in groups:
                for dimension, score in zip(group.dims, scores[group.name], strict=True):
                    slope = slopes.of(dimension, "reads")
                    score += slope**2 if importance == "fisher" else slope.abs()
    if importance == "magnitude":
        return Measured(magnitudes, grams, {})
    largest = [float(score.max()) for dims in scores.values() for score in dims if len(score)]
    little = TIE_BREAK * max(largest, default=0.0)
    for name, dims in scores.items():
        for score, magnitude in zip(dims, magnitudes[name], strict=True):
            score += little * magnitude
    return Measured(scores, grams, {})


def _magnitudes(weights: Mapping[str, Tensor], groups: Sequence[PruningGroup]) -> Scores:
    energies = {name: weight.detach() ** 2 for name, weight in weights.items()}
    shares = _Sums({name: energy / energy.sum().clamp_min(1e-30) for name, energy in energies.items()})
    wholes = _Sums(energies)

    def magnitude(group: PruningGroup, dimension: Dimension) -> Tensor:
        if group.kind == "depth":  # a block has all of its tensors, so it is held against the other blocks
            energy = wholes.of(dimension, "reads")
            return energy / energy.mean().clamp_min(1e-30)
        read = shares.of(dimension, "reads")
        if not any(part.role == "writes" for part in dimension.slices):
            return read
        return (read * shares.of(dimension, "writes")).sqrt()

    return {group.name: [magnitude(group, dimension) for dimension in group.dims] for group in groups}


class _Sums:
    """Sums of values that belong to weights, `values` by their name."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.values = values
        self.along: dict[tuple[str, int | None], Tensor] = {}

    def of(self, dimension: Dimension, role: str) -> Tensor:
        """Over the weights in this role, for each unit of the dimension: (units,), float64."""
        total = torch.zeros(dimension.units, dtype=torch.float64)
        for part in (*dimension.slices, *dimension.zeroed):
            if part.role == role:
                sums = self._along(part.tensor, part.dim)[part.units].sum(1)
                total[part.first : part.first + len(sums)] += sums
        return total

    def _along(self, name: str, dim: int | None) -> Tensor:
        if (name, dim) not in self.along:
            value = self.values[name].detach()
            value = value.flatten(0, 1) if dim is None else value.movedim(dim, 0)
            self.along[name, dim] = value.reshape(len(value), -1).sum(1).double().cpu()
        return self.along[name, dim]


@contextmanager
def layer_norm_grams(network: nn.Module) -> Iterator[Grams]:
    """Inside the block, forward passes of the network leave here the grams of the inputs of all LayerNorms."""
    grams: Grams = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def note(_: nn.Module, args: tuple[Tensor]) -> None:
            pixels = args[0].detach().movedim(1, 0).flatten(1)  # C, B * H * W
            grams[name] = grams.get(name, 0) + (pixels @ pixels.T).double()

        return note

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in network.named_modules()
        if isinstance(module, LayerNorm)
    ]
    try:
        yield grams
    finally:
        for handle in handles:
            handle.remove()
