"""Thinning a residual path in its principal directions instead of its channels (SliceGPT, arXiv 2401.15024).

    directions = principal_directions(network, groups, inputs, felt)
    removal = settled(network, groups, choose(...), directions)
    smaller = remove_rotated(network, removal, grams)

Everything that writes into a residual path or reads it is linear but for LayerNorm, so the path may have any
coordinates, and a network that keeps its first principal directions loses less than one that keeps as many channels.
LayerNorm subtracts the mean over channels and divides by their standard deviation, which no rotation changes as long
as it takes the vector of ones to a multiple of itself. So the mean is one of the directions and always stays, and of
what the others make up an upright basis is turned into channels again, whose mean it is. The scale and shift of a
LayerNorm go into the map that reads it first; the scale comes back as what makes up for the variance that went, on the
average, the shift as the nearest that there is.

Four channels that pixel-unshuffle makes of one turn alike. What an upsampling brings passes no LayerNorm, so there
directions need not be at right angles. Level 1 and the upsampling into it keep their channels: decoder level 1
normalises both together, and an MEFC works channel by channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compress.groups import PruningGroup, Removal, Rotations, lifted, pruning_groups, remove, spread
from compress.importance import Grams
from drsformer.model import DRSformer, LayerNorm

EVEN = 0.1
"""How evenly directions count that the image feels more and less of, in parts of their mean: LayerNorm divides by all
of them, and what is measured on some patches is not everything."""

RIDGE = 1e-6
"""Of the least squares that put the shift of a LayerNorm into fewer channels."""

READERS = {"norm1": "attn.qkv", "norm2": "ffn.project_in"}
"""The map behind each LayerNorm of a block."""


def norms_of(network: DRSformer, group: PruningGroup) -> dict[str, str] | None:
    """The LayerNorms of a residual path with the maps that read them, by name; None where it cannot be rotated."""
    found = {}
    for part in group.dims[0].slices:
        name = part.tensor.rpartition(".")[0]
        if part.role == "neither":
            norm = network.get_submodule(name)
            if not isinstance(norm, LayerNorm) or norm.weight.numel() != part.units.numel():
                return None
            block, _, kind = name.rpartition(".")
            found[name] = f"{block}.{READERS[kind]}"
    return found


def principal_directions(
    network: DRSformer, groups: Sequence[PruningGroup], inputs: Mapping[str, Tensor], felt: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The directions of all residual paths that can be rotated.

    Of H, the mean of h h^T of what the maps read, and M, the sum of g g^T of what the image feels there, those are the
    eigenvectors of M^1/2 H M^1/2: to keep the first k of them loses least of the image, to second order.

    Args:
        network: That has them.
        groups: Of this network.
        inputs: H of each map that reads a residual path, (n, n) float64, see `compress.obs`.
        felt: M of each, likewise.

    Returns:
        By the name of the group, (units, units) float64: rows are directions, the strongest ones first, and the mean
        before them where there is a LayerNorm. How much the path has of one is uncorrelated with the others.
    """
    found = {}
    for group in groups:
        if group.kind == "width" and (norms := norms_of(network, group)) is not None:
            scales = {reader: scale_of(network, norm) for norm, reader in norms.items()}
            found[group.name] = _directions(group, scales, inputs, felt)
    return found


def scale_of(network: DRSformer, norm: str) -> Tensor:
    """The scale of a LayerNorm, without zeros to be divided by: (C,) float64."""
    scale = network.get_parameter(f"{norm}.weight").detach().double().cpu()
    least = 1e-3 * scale.abs().amax().clamp_min(1e-30)
    return torch.where(scale.abs() < least, least, scale)


def _directions(
    group: PruningGroup, scales: Mapping[str, Tensor], inputs: Mapping[str, Tensor], felt: Mapping[str, Tensor]
) -> Tensor:
    m = group.units
    eye, mean = torch.eye(m, dtype=torch.float64), torch.full((m, 1), m**-0.5, dtype=torch.float64)
    h, g = torch.zeros_like(eye), torch.zeros_like(eye)
    for part in group.dims[0].slices:
        if part.role == "reads":
            layer = part.tensor.removesuffix(".weight")
            scale = scales.get(layer, torch.ones(len(inputs[layer]), dtype=torch.float64))
            read, feels = inputs[layer] / scale / scale[:, None], felt[layer] * scale * scale[:, None]
            for places in part.units.T:
                energy = read[places, places].mean().clamp_min(1e-30)  # readers see the path at scales of their own
                h += read[places][:, places] / energy
                g += feels[places][:, places] * energy
    if scales:
        without = eye - mean @ mean.T
        h, g = without @ h @ without, without @ g @ without
    values, vectors = torch.linalg.eigh(g / g.diagonal().mean().clamp_min(1e-30) + EVEN * eye)
    root = vectors * values.sqrt() @ vectors.T
    both = root @ h @ root
    if scales:  # nothing is left of the mean, which is to come first
        both += (1 + both.trace()) * mean @ mean.T
    rows = torch.linalg.eigh(both)[1].flip(1).T @ root
    return rows / rows.norm(dim=1, keepdim=True)


def settled(
    network: DRSformer, groups: Sequence[PruningGroup], units: Mapping[str, list[list[int]]], directions: Rotations
) -> Removal:
    """What is to be removed, with each rotation such that units that stay come first and are channels again.

    Args:
        network: That units were chosen from.
        groups: Of this network.
        units: Chosen ones, of the paths in `directions` among these.
        directions: See `principal_directions`.
    """
    chosen, rotations = dict(units), {}
    for group in groups:
        if group.name in directions and (dropped := chosen.get(group.name, [[]])[0]):
            rows = directions[group.name]
            kept = [i for i in range(len(rows)) if i not in dropped]
            stay = rows[kept]
            if norms_of(network, group):
                parts = torch.linalg.inv(rows)[:, kept]  # the path is the sum of these, each as much as it has of it
                _, triangle = torch.linalg.qr(parts)
                triangle = triangle.diagonal().sign()[:, None] * triangle
                stay = _from_ones(len(stay)) @ triangle @ stay
            rotations[group.name] = torch.cat([stay, rows[dropped]])
            chosen[group.name] = [list(range(len(stay), len(rows)))]
    return Removal(chosen, rotations)


def _from_ones(n: int) -> Tensor:
    """An orthogonal matrix (n, n) that takes (1, 0, ..., 0) to n equal parts."""
    mirror = torch.full((n,), n**-0.5, dtype=torch.float64)
    mirror[0] -= 1
    length = mirror @ mirror
    eye = torch.eye(n, dtype=torch.float64)
    return eye - 2 * torch.outer(mirror, mirror) / length if length > 0 else eye


def remove_rotated(network: DRSformer, removal: Removal, grams: Grams) -> DRSformer:
    """Remove units from a network in the coordinates that they are units of.

    Args:
        network: Stays as it is.
        removal: See `settled`.
        grams: See `compress.importance`; of the paths that are rotated, all LayerNorms have to be there.
    """
    turned, left = _rotate(network, removal, grams)
    return remove(turned, removal.units, left)


def _rotate(network: DRSformer, removal: Removal, grams: Grams) -> tuple[DRSformer, Grams]:
    """The network in these coordinates, whose LayerNorms are right only without what is to be removed, and the grams of
    those that were left alone."""
    device = next(network.parameters()).device
    state = {name: tensor.double() for name, tensor in network.state_dict().items()}
    left = dict(grams)
    for group in pruning_groups(network.config, ["width"]):
        if group.name not in removal.rotations:
            continue
        rotation = removal.rotations[group.name].to(device)
        back, norms = torch.linalg.inv(rotation), norms_of(network, group)
        assert norms is not None
        shifts = {}
        for norm, reader in norms.items():
            weight = state[f"{reader}.weight"]
            shifts[norm] = weight.flatten(1) @ state[f"{norm}.bias"]
            state[f"{reader}.weight"] = weight * state[f"{norm}.weight"].view(1, -1, 1, 1)
        for part in group.dims[0].slices:
            tensor = state[part.tensor]
            if part.role == "writes":
                state[part.tensor] = torch.tensordot(lifted(rotation, len(tensor), part.units), tensor, 1)
            elif part.role == "reads":
                matrix = lifted(back, tensor.shape[1], part.units)
                state[part.tensor] = torch.tensordot(tensor.movedim(1, -1), matrix, 1).movedim(-1, 1)
        stay = (group.units - len(removal.units[group.name][0])) * group.unit
        for norm, reader in norms.items():
            gram = left.pop(norm).to(rotation)
            places = next(part.units for part in group.dims[0].slices if part.tensor == f"{norm}.weight")
            matrix = lifted(rotation, len(gram), places)[:stay]
            weight = state[f"{reader}.weight"].flatten(1)[:, :stay]
            normal = weight.T @ weight
            ridge = RIDGE * normal.diagonal().mean().clamp_min(1e-30) * torch.eye(stay).to(normal)
            bias = torch.zeros_like(state[f"{norm}.bias"])
            bias[:stay] = torch.linalg.solve(normal + ridge, weight.T @ shifts[norm])
            scale = spread(matrix @ gram @ matrix.T).div(spread(gram)).sqrt()
            state |= {f"{norm}.weight": torch.full_like(bias, float(scale)), f"{norm}.bias": bias}
    turned = DRSformer(network.config).eval().to(device)
    turned.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return turned, left
