"""Recovery in closed form: what is left of a pruned network is re-solved so that it does what the whole one did.

    pruned = remove(whole, units)
    recovered = recover(whole, pruned, origins(whole.config, [Removal(units)]), patches)

Images pass both networks side by side, from one linear map to the next (`compress.linear_maps`). Each map of the pruned
network is replaced by the ridge regression from what it reads now, behind the maps that were re-solved before it, to
what would bring the residual path to where the whole network has it: so later maps make up for earlier ones
(sequential least squares, Kwon et al., arXiv 2204.09656). What removed blocks did becomes part of what the map before
them is to write (ReplaceMe, arXiv 2505.02819). Maps that write no residual path, such as those to Q, K and V, are to
put out what they put out in the whole network.

Rainy images alone are needed, no clean ones and no gradients. A part of the patches is held out: by these the strength
of each ridge is chosen, no change at all included, and by these the result is judged as a whole.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.groups import Origin, Removal, origins
from compress.importance import Grams
from compress.linear_maps import LinearMap, Passing
from compress.rotation import remove_rotated
from drsformer.model import DRSformer
from export.folding import fold
from runtime.errors import InputError
from runtime.progress import OnProgress, silent, track

HELD_OUT = 0.25
"""Fraction of the patches that no map is fitted to."""

RIDGES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8)
"""Strengths of the ridge that are tried in this order, of the mean square of what a map reads."""

PIXELS = 65_536
"""As many pixels as a map is fitted to and judged by, or all, where its level has no more of them. What a map reads is
spread over few of its directions, so that more pixels cost most of the time and tell nothing."""

EVEN = 0.1
"""How evenly patches count: see `patch_weights`."""


@torch.no_grad()
def recover(
    whole: DRSformer,
    pruned: DRSformer,
    kept: Mapping[str, Origin],
    patches: Sequence[Tensor],
    on_progress: OnProgress = silent,
) -> DRSformer:
    """Re-solve the linear maps of a pruned network.

    Args:
        whole: The network that it was pruned from.
        pruned: Stays as it is.
        kept: Where each of its tensors comes from, see `compress.groups.origins`.
        patches: Rainy, (3, H, W) float32 RGB in [0, 1] each, at least 2; on the device of the networks.
        on_progress: See `runtime.progress`.

    Returns:
        A network of the same structure that is closer to the whole one on the patches that are held out, or `pruned`
        itself where none was found.

    Raises:
        InputError: There are fewer than 2 patches.
    """
    if len(patches) < 2:
        raise InputError(f"recovery holds out a part of its patches: expected at least 2, found {len(patches)}")
    images = [patch[None] for patch in patches]
    fitted = range(len(images) - max(1, int(len(images) * HELD_OUT)))
    held_out = range(len(fitted), len(images))
    folded = fold(whole)
    wanted = [folded(image) for image in track(images, len(images), "Restoring patches", on_progress)]
    weights = patch_weights(images, wanted)
    recovered = copy.deepcopy(pruned)
    passing, targets = Passing(recovered, images), _Targets(whole, images, kept)
    count = sum(isinstance(module, nn.Conv2d) and module.groups == 1 for module in recovered.modules())
    done = 0
    while passing.map:
        on_progress("Recovering", done, count)
        passing.map = current = replace(passing.map, inputs=functools.cache(passing.map.inputs))  # read twice
        target = targets.of(current.name)
        fit, check = (_normal_equations(current, target, numbers, weights) for numbers in (fitted, held_out))
        if (change := _ridge_regression(fit, check)) is not None:
            current.layer.weight += change.view_as(current.layer.weight).to(current.layer.weight.dtype)
        passing.advance()
        done += 1
    on_progress("Recovering", count, count)

    def error(network: DRSformer) -> float:
        folded = fold(network)
        return sum(float(weights[i] * (folded(images[i]) - wanted[i]).square().mean()) for i in held_out)

    return recovered if error(recovered) < error(pruned) else pruned


def remove_and_recover(
    network: DRSformer,
    rounds: Sequence[Removal],
    grams: Grams,
    whole: DRSformer,
    patches: Sequence[Tensor],
    on_progress: OnProgress = silent,
) -> DRSformer:
    """Remove the units of a round and recover: a `compress.selection.Repair`, once it has a whole network and patches.

    Args:
        network: What the rounds before have left; stays as it is.
        rounds: What all rounds remove, of which the last one is still to be done.
        grams: See `compress.importance`.
        whole: The network before the first round.
        patches: See `recover`.
        on_progress: See `runtime.progress`.
    """
    pruned = remove_rotated(network, rounds[-1], grams)
    return recover(whole, pruned, origins(whole.config, rounds), patches, on_progress)


def patch_weights(images: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
    """How much the squared error on each image counts, 1 on the average: the less, the more the network changes it.

    A network errs more where there is more rain, and PSNR is the logarithm of the error: in plain squares, images with
    little rain would not count. Images that hardly change count as if they changed by `EVEN` of the average.
    """
    change = torch.stack([(y - x).square().mean() for x, y in zip(images, outputs, strict=True)])
    weights = 1 / (change + EVEN * change.mean()).clamp_min(1e-12)
    return weights / weights.mean()


class _Targets:
    """What the maps of a pruned network are to put out, in their order, by the whole network."""

    def __init__(self, whole: DRSformer, images: Sequence[Tensor], kept: Mapping[str, Origin]) -> None:
        self.passing, self.kept = Passing(whole, images), kept
        self.names = {origin.tensor.removesuffix(".weight") for origin in kept.values()}

    def of(self, name: str) -> Callable[[int], Tensor]:
        """For the map of this name, from the number of an image: what the map is to put out, or, where it adds, what
        the stream is to be behind it. (1, outputs, H, W)"""
        origin = self.kept[f"{name}.weight"]
        while self.next.name != origin.tensor.removesuffix(".weight"):
            self.passing.advance()
        current = self.next
        outputs = self.passing.advance()
        while self.passing.map and self.passing.map.name not in self.names:  # of a block that was removed
            self.passing.advance()
        if written := current.written:
            stream = self.next.stream
            return lambda i: origin.of_output(written(stream[i]))
        return lambda i: origin.of_output(outputs[i] if outputs else current.output(i))

    @property
    def next(self) -> LinearMap:
        assert self.passing.map
        return self.passing.map


class _NormalEquations(NamedTuple):
    """Of a change in the weights of a map that is to make up for the error of its output: sums over pixels, in float64
    over images.

    Attributes:
        inputs: Of h h^T, h what the map reads at a pixel, (n, n).
        error: Of e h^T, e what its output is to become less what it is, (outputs, n).
        energy: Of e^T e.
    """

    inputs: Tensor
    error: Tensor
    energy: float

    def left(self, change: Tensor) -> float:
        """The energy that is left of the error after a change of the weights."""
        return self.energy - float((change * (2 * self.error - change @ self.inputs)).sum())


def _normal_equations(
    current: LinearMap, target: Callable[[int], Tensor], numbers: Iterable[int], weights: Tensor
) -> _NormalEquations:
    layer = current.layer
    outputs, n = layer.weight.flatten(1).shape
    inputs = torch.zeros(n, n, dtype=torch.float64, device=layer.weight.device)
    error, energy = inputs.new_zeros(outputs, n), 0.0
    generator = torch.Generator().manual_seed(0)
    for i in numbers:
        x = current.inputs(i)
        off = target(i) - layer(x)
        if current.adds:
            off = off - current.stream[i]
        pixels = torch.randperm(off[0, 0].numel(), generator=generator)[: math.ceil(PIXELS / len(current.stream))]
        pixels = pixels.to(x.device)
        off = off.flatten(2)[0, :, pixels]
        read = F.unfold(x, layer.kernel_size, padding=cast("tuple[int, int]", layer.padding))[0, :, pixels]
        inputs += weights[i] * (read @ read.T)
        error += weights[i] * (off @ read.T)
        energy += float(weights[i] * off.square().sum())
    return _NormalEquations(inputs, error, energy)


def _ridge_regression(fit: _NormalEquations, check: _NormalEquations) -> Tensor | None:
    """The change of the weights, (outputs, n), with the ridge that leaves least of the error on `check`; None where all
    leave more than no change."""
    best, least = None, check.energy
    size = fit.inputs.diagonal().mean()
    eye = torch.eye(len(fit.inputs), dtype=size.dtype, device=size.device)
    for ridge in RIDGES:
        factor, failed = torch.linalg.cholesky_ex(fit.inputs + ridge * size * eye)
        if failed:
            break
        change = torch.cholesky_solve(fit.error.T, factor).T
        left = check.left(change)
        if left < least:
            best, least = change, left
    return best
