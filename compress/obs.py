"""How much a unit costs after the best repair: the image's squared error that is left when all that read it are solved
anew without it (optimal brain surgeon; Kwon et al., arXiv 2204.09656, ZipLM, arXiv 2302.04089).

One measure for all kinds of units. Of each convolution or linear layer that reads units, h are its inputs at a pixel
and g is the gradient of the image there, by these inputs:

    H = E[h h^T]   what can make up for what: without the inputs S, the best linear guess of them from the others is off
                   by a covariance of ((H^-1)_SS)^-1
    M = E[g g^T]   what the image feels: g is J^T v for random signs v (Hutchinson), so E[(g^T d)^2] is the squared
                   error of the image that an error d of the inputs makes

and the cost of S is <M_SS, ((H^-1)_SS)^-1>, added up over the layers that read S. That takes errors of pixels to be
independent of each other and of J (as in K-FAC, arXiv 1602.01407), so costs tell which unit is worth more than which
other, not how many dB are lost.

Units are removed greedily, the cheapest first, and H^-1 and M follow: those that stay take on what they make up for.
So the costs add up: the sum over the first ones is what all of them cost together.

Two kinds have no linear reader. A channel of K and V takes a column out of the attention matrix, whose softmax and
masks change: its cost is what that does to the output of the attention, without repair. A block costs what it adds to
the stream.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compress.groups import ParameterSlice, PruningGroup, lifted
from compress.importance import Measured, layer_norm_grams
from compress.linear_maps import fast_twin
from compress.recover import patch_weights
from compress.rotation import norms_of, principal_directions, scale_of
from drsformer.model import DRSformer, ExpertLayer, SparseTransformerBlock, TopKSparseAttention
from runtime.errors import InputError
from runtime.progress import OnProgress, silent, track

RIDGE = 1e-3
"""Added to H, of its mean diagonal: guesses from as few pixels as are measured are no better than this."""

BLOCK = 0.1
"""Fraction of the units left that are removed between two updates of the whole of H^-1 and M."""

REMOVED = 1e30
"""In H^-1 of an input that has been removed, so that nothing of it is left to cost anything."""


@dataclass(frozen=True)
class Attended:
    """One attention on one patch, float64.

    Attributes:
        weight: Of the patch, all of which add up to 1.
        scores: Before masks and softmax, (heads, d, d).
        values: The mean of v v^T over pixels, (heads, d, d).
    """

    weight: float
    scores: Tensor
    values: Tensor


@dataclass(frozen=True)
class Statistics:
    """What patches leave behind on their way through a network and back, float64.

    Attributes:
        inputs: H of each layer by its name, (n, n), the mean over pixels.
        felt: M of each layer, (n, n), the sum over the pixels of a patch, so that costs are those of a patch, whatever
            the resolution of a level.
        attention: By the name of the attention, for each patch.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    felt: dict[str, Tensor] = field(default_factory=dict)
    attention: dict[str, list[Attended]] = field(default_factory=lambda: defaultdict(list))


def costs_after_repair(
    network: DRSformer,
    groups: Sequence[PruningGroup],
    patches: Sequence[Tensor],
    rotate: bool = True,
    on_progress: OnProgress = silent,
) -> Measured:
    """Measure what each unit costs after the best repair.

    Args:
        network: Stays as it is.
        groups: Of this network.
        patches: Rainy, (3, P, P) float32 in [0, 1] each, at least one; on the device of the network.
        rotate: Measure the principal directions of residual paths in place of their channels, see `compress.rotation`.
        on_progress: See `runtime.progress`.

    Raises:
        InputError: The network answers with NaN or infinity.
    """
    twin, images = fast_twin(network), [patch[None] for patch in patches]
    with layer_norm_grams(twin) as grams, torch.no_grad():
        outputs = [twin(image) for image in track(images, len(images), "Restoring patches", on_progress)]
    if not all(output.isfinite().all() for output in outputs):
        raise InputError("the network answers with NaN or infinity on a patch of the data; nothing is pruned")
    layers = list(dict.fromkeys(name for group in groups for name in _readers(group)))
    weights = patch_weights(images, outputs) / len(images)
    statistics = _collect(twin, layers, images, weights.tolist(), on_progress)
    directions = {}
    if rotate:
        directions = principal_directions(network, groups, statistics.inputs, statistics.felt)
    scores = {}
    for group in track(groups, len(groups), "Weighing units", on_progress):
        if group.name in directions:
            scores[group.name] = [_costs_of_directions(network, group, statistics, directions[group.name])]
        else:
            scores[group.name] = _costs(twin, group, statistics)
    return Measured(scores, grams, directions)


def _readers(group: PruningGroup) -> list[str]:
    """The names of the layers that read units of the group among all channels of their input."""
    found = (part for dimension in group.dims for part in dimension.slices if _is_read(part))
    return list(dict.fromkeys(part.tensor.removesuffix(".weight") for part in found))


def _is_read(part: ParameterSlice) -> bool:
    return part.role == "reads" and part.dim == 1


def _collect(
    twin: DRSformer, layers: Sequence[str], images: Sequence[Tensor], weights: Sequence[float], on_progress: OnProgress
) -> Statistics:
    """One pass forward and one back for each image, through one block or step of an MEFC at a time: what lies inside of
    it is computed again on the way back, since that of a whole full-size network would take gigabytes."""
    statistics, generator = Statistics(), torch.Generator().manual_seed(0)
    returning = False

    def reads(name: str, weight: float) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
        def note(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            x = args[0].view_as(args[0])  # so that the gradient is that by this layer alone
            if returning:
                return (x,)
            pixels = _pixels(x.detach())
            _add(statistics.inputs, name, weight / pixels.shape[1] * (pixels @ pixels.T))
            n = len(pixels)
            statistics.felt.setdefault(name, torch.zeros(n, n, dtype=torch.float64))  # where nothing is felt of it
            x.register_hook(lambda slope: _add(statistics.felt, name, _gram(slope) / len(images)))
            return (x,)

        return note

    def attends(name: str, attention: TopKSparseAttention, weight: float) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            if returning:
                return
            q, k, v = output.detach().unflatten(1, (3, attention.heads, -1)).flatten(4)[0]  # each heads, d, H*W
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            scores, values = q @ k.mT * attention.temperature.detach(), v @ v.mT / v.shape[-1]
            statistics.attention[name].append(Attended(weight, scores.double().cpu(), values.double().cpu()))

        return note

    for part in [part for part in twin.modules() if isinstance(part, SparseTransformerBlock | ExpertLayer)]:
        part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False)
    for image, weight in zip(track(images, len(images), "Measuring units", on_progress), weights, strict=True):
        handles = [twin.get_submodule(name).register_forward_pre_hook(reads(name, weight)) for name in layers]
        for name, module in twin.named_modules():
            if isinstance(module, TopKSparseAttention):
                handles.append(module.qkv_dwconv.register_forward_hook(attends(name, module, weight)))
        try:
            with torch.enable_grad():
                source = image.clone().requires_grad_()
                output = twin(source)
            signs = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
            returning = True
            torch.autograd.grad(output, source, signs.to(output))
        finally:
            returning = False
            for handle in handles:
                handle.remove()
    return statistics


def _pixels(x: Tensor) -> Tensor:
    return x.movedim(1, 0).flatten(1)  # C, B * H * W


def _gram(x: Tensor) -> Tensor:
    pixels = _pixels(x)
    return pixels @ pixels.T


def _add(sums: dict[str, Tensor], name: str, part: Tensor) -> None:
    sums[name] = sums.get(name, 0) + part.double().cpu()


def _costs(network: DRSformer, group: PruningGroup, statistics: Statistics) -> list[Tensor]:
    if group.kind == "depth":
        costs = torch.zeros(group.units, dtype=torch.float64)
        for part in group.dims[0].slices:
            layer = part.tensor.removesuffix(".weight")
            costs[part.first] += (statistics.inputs[layer] * statistics.felt[layer]).sum()
        return [costs]
    layers = _readers(group)
    read = {i: _inputs(group, i, layers) for i, dim in enumerate(group.dims) if any(map(_is_read, dim.slices))}
    readers = [_Reader.of(statistics.inputs[layer], statistics.felt[layer]) for layer in layers]
    costs = dict(zip(read, _greedy(readers, list(read.values())), strict=True))
    if len(costs) < len(group.dims):  # of each head, the channels of K with V
        name = group.name.removesuffix(".head_dim")
        heads = _attended_costs(network, name, statistics.attention[name], statistics.felt[layers[0]])
        costs |= dict(zip((i for i in range(len(group.dims)) if i not in costs), heads, strict=True))
    return [costs[i] for i in range(len(group.dims))]


def _costs_of_directions(network: DRSformer, group: PruningGroup, statistics: Statistics, directions: Tensor) -> Tensor:
    """What each direction of a residual path costs, (units,); the mean over channels, which has to stay, more than all
    others."""
    norms, layers = norms_of(network, group) or {}, _readers(group)
    scales = {reader: scale_of(network, norm) for norm, reader in norms.items()}
    units, readers = [], []
    for layer, inputs in zip(layers, _inputs(group, 0, layers), strict=True):
        assert inputs is not None
        matrix = lifted(directions, len(statistics.inputs[layer]), inputs)
        scale = scales.get(layer, torch.ones(len(matrix), dtype=torch.float64))
        there, back = matrix / scale, scale[:, None] * torch.linalg.inv(matrix)
        readers.append(_Reader.of(there @ statistics.inputs[layer] @ there.T, back.T @ statistics.felt[layer] @ back))
        units.append(inputs[1:] if norms else inputs)
    (costs,) = _greedy(readers, [units])
    return torch.cat([1 + 2 * costs.sum(0, keepdim=True), costs]) if norms else costs


def _inputs(group: PruningGroup, i: int, layers: Sequence[str]) -> list[Tensor | None]:
    """For each layer, the inputs that units of dimension i are, (units, n); None where it reads none of them."""
    dimension = group.dims[i]
    found: list[Tensor | None] = []
    for layer in layers:
        units = [part.units for part in dimension.slices if _is_read(part) and part.tensor == f"{layer}.weight"]
        # An output that loses a weight counts as lost: it is the one to the left of the unit's second, see `_msfn`.
        units += [units[0].amax(1, keepdim=True) - 1 for _ in dimension.zeroed]
        found.append(torch.cat(units, dim=1) if units else None)
    return found


class _Reader:
    """H^-1 and M of a layer, for the inputs that are left."""

    def __init__(self, inverse: Tensor, felt: Tensor) -> None:
        self.inverse, self.felt = inverse, felt

    @classmethod
    def of(cls, inputs: Tensor, felt: Tensor) -> _Reader:
        ridge = (RIDGE * inputs.diagonal().mean()).clamp_min(torch.finfo(inputs.dtype).tiny ** 0.5)
        return cls(torch.linalg.inv(inputs + ridge * torch.eye(len(inputs), dtype=inputs.dtype)), felt.clone())

    def costs(self, units: Tensor) -> Tensor:
        """Of each unit, (m, n) inputs, alone: (m,)."""
        rows, columns = units.unsqueeze(2), units.unsqueeze(1)
        covariance = torch.linalg.inv(self.inverse[rows, columns])
        return (covariance * self.felt[rows, columns]).sum((1, 2)).clamp_min(0)

    def remove(self, inputs: Tensor) -> None:
        """Let the others take on what they can of these inputs."""
        columns = self.inverse[:, inputs]
        covariance = torch.linalg.inv(columns[inputs])
        guess = -columns @ covariance  # of the inputs from the others, (n, removed)
        guess[inputs] = 0
        moved = guess @ (self.felt[inputs] + self.felt[inputs][:, inputs] @ guess.T / 2)
        self.felt += moved + moved.T
        self.inverse += guess @ columns.T
        for matrix in (self.felt, self.inverse):
            matrix[inputs] = 0
            matrix[:, inputs] = 0
        self.inverse[inputs, inputs] = REMOVED

    def among(self, inputs: Tensor) -> _Reader:
        """For these inputs only, which is exact as long as no others are removed."""
        return _Reader(self.inverse[inputs][:, inputs], self.felt[inputs][:, inputs])


def _greedy(readers: Sequence[_Reader], dims: Sequence[Sequence[Tensor | None]]) -> list[Tensor]:
    """Remove all units one after the other, of each dimension as many, the cheapest first.

    Args:
        readers: Are used up.
        dims: For each dimension, for each reader, see `_inputs`.

    Returns:
        For each dimension, what each unit cost when it was removed, and at least what those before it did: (units,).
    """
    costs = [next(torch.zeros(len(units), dtype=torch.float64) for units in dim if units is not None) for dim in dims]
    alive = [torch.arange(len(each)) for each in costs]
    least = [0.0] * len(dims)
    while len(alive[0]):
        count = max(1, int(BLOCK * len(alive[0])))
        for d, dim in enumerate(dims):
            total = _sum_of_costs(readers, dim, alive[d])
            candidates = alive[d][total.argsort(stable=True)[: 2 * count]]
            inputs = [None if units is None else units[candidates].unique() for units in dim]
            block = [r if i is None else r.among(i) for r, i in zip(readers, inputs, strict=True)]
            places = [
                None if units is None or i is None else torch.searchsorted(i, units[candidates])
                for units, i in zip(dim, inputs, strict=True)
            ]
            left, chosen = torch.arange(len(candidates)), []
            for _ in range(count):
                total = _sum_of_costs(block, places, left)
                best = int(total.argmin())
                unit = int(left[best])
                least[d] = max(float(total[best]), least[d])
                costs[d][candidates[unit]] = least[d]
                least[d] *= 1 + 1e-9  # so that sorting gives the order back
                chosen.append(unit)
                left = torch.cat([left[:best], left[best + 1 :]])
                for reader, place in zip(block, places, strict=True):
                    if place is not None:
                        reader.remove(place[unit].unique())
            for reader, units in zip(readers, dim, strict=True):
                if units is not None:
                    reader.remove(units[candidates[chosen]].unique())
            alive[d] = alive[d][~torch.isin(alive[d], candidates[chosen])]
    return costs


def _sum_of_costs(readers: Sequence[_Reader], inputs: Sequence[Tensor | None], units: Tensor) -> Tensor:
    found = zip(readers, inputs, strict=True)
    return torch.stack([reader.costs(each[units]) for reader, each in found if each is not None]).sum(0)


def _attended_costs(network: DRSformer, name: str, attended: Sequence[Attended], felt: Tensor) -> list[Tensor]:
    """For each head, what each channel of K with V costs, without repair: (d,).

    Args:
        network: That has the attention.
        name: Of the attention.
        attended: It, on each patch.
        felt: M of the convolution behind it.
    """
    attention = network.get_submodule(name)
    assert isinstance(attention, TopKSparseAttention)
    heads, d, _ = attended[0].scores.shape
    costs = [torch.zeros(d, dtype=torch.float64) for _ in range(heads)]
    if d == 1:
        return costs
    mix = [float(weight.detach()) for weight in attention.mix] or [1.0]
    kept, fewer = (network.config.kept(n) or (n,) for n in (d, d - 1))
    without = torch.eye(d, dtype=torch.bool).unsqueeze(1)  # d, 1, d
    for each in attended:
        for h, scores in enumerate(each.scores):
            change = _mixed(scores.masked_fill(without, -torch.inf), mix, fewer) - _mixed(scores, mix, kept)
            felt_here = felt[h * d : (h + 1) * d, h * d : (h + 1) * d]
            energy = change @ each.values[h] @ change.mT  # d, d, d: of what the loss of each channel adds to the output
            costs[h] += each.weight * (energy * felt_here).sum((1, 2))
    return costs


def _mixed(scores: Tensor, mix: Sequence[float], kept: Sequence[int]) -> Tensor:
    """The attention matrix: the softmaxes over the largest of each row, added up."""
    largest = scores.sort(dim=-1, descending=True).values
    parts = (
        weight * scores.masked_fill(scores < largest[..., k - 1 : k], -torch.inf).softmax(-1)
        for weight, k in zip(mix, kept, strict=True)
    )
    return torch.stack(list(parts)).sum(0)
