"""Thinning a residual path in its principal directions instead of its channels (SliceGPT, arXiv 2401.15024).

    directions = principal_directions(network, groups, grams, inputs, felt)
    removal = settled(network, groups, choose(...), directions)
    smaller = remove_rotated(network, removal, grams)

Everything that writes into a residual path or reads it is linear but for LayerNorm, so the path may have any
coordinates, and a network that keeps its first principal directions loses less than one that keeps as many channels.
LayerNorm subtracts the mean over channels and divides by their standard deviation, which no rotation changes as long
as it takes the vector of ones to a multiple of itself. So the mean is one of the directions, always stays, and of the
directions that stay a last rotation makes channels again whose mean it is. The scale and shift of a LayerNorm go into
the map that reads it first; the scale comes back as what makes up for the variance that went, on the average, the shift
as the nearest that there is.

Four channels that pixel-unshuffle makes of one turn alike. What an upsampling brings passes no LayerNorm, so there any
directions will do: those are best that the image feels least of. Level 1 and the upsampling into it stay as they are:
decoder level 1 normalises both together, and an MEFC works channel by channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compress.groups import PruningGroup, Removal, Rotations, lifted, pruning_groups, remove, spread
from compress.importance import Grams
from drsformer.model import DRSformer, LayerNorm

FLOOR = 1e-6
"""Smallest eigenvalue of a matrix that is to be inverted, of its largest one."""

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
    network: DRSformer,
    groups: Sequence[PruningGroup],
    grams: Grams,
    inputs: Mapping[str, Tensor],
    felt: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The directions of all residual paths that can be rotated.

    Args:
        network: That has them.
        groups: Of this network.
        grams: See `compress.importance`.
        inputs: Of each map that reads a residual path, h h^T, (n, n) float64, see `compress.obs`.
        felt: Likewise g g^T.

    Returns:
        By the name of the group, (units, units) float64: rows are directions, the mean first where there is a
        LayerNorm, then the strongest ones.
    """
    found = {}
    for group in groups:
        if group.kind != "width" or (norms := norms_of(network, group)) is None:
            continue
        found[group.name] = _by_variance(group, norms, grams) if norms else _by_image(group, inputs, felt)
    return found


def _by_variance(group: PruningGroup, norms: Mapping[str, str], grams: Grams) -> Tensor:
    m = group.units
    mean = torch.full((m, 1), m**-0.5, dtype=torch.float64)
    without = torch.eye(m, dtype=torch.float64) - mean @ mean.T
    total = torch.zeros(m, m, dtype=torch.float64)
    for norm in norms:
        gram = grams[norm].cpu().view(m, group.unit, m, group.unit).diagonal(dim1=1, dim2=3).sum(-1)
        gram = without @ gram @ without
        total += gram / gram.trace().clamp_min(1e-30)
    directions = torch.linalg.eigh(total + mean @ mean.T * (2 * len(norms)))[1].flip(1).T  # the mean comes first
    return torch.cat([mean.T, directions[1:]])


def _by_image(group: PruningGroup, inputs: Mapping[str, Tensor], felt: Mapping[str, Tensor]) -> Tensor:
    """Of what the image feels of each direction, little comes last."""
    h, g = (torch.zeros(group.units, group.units, dtype=torch.float64) for _ in range(2))
    for part in group.dims[0].slices:
        layer = part.tensor.removesuffix(".weight")
        if part.role == "reads":
            for places in part.units.T:  # of several maps, and several channels to a unit
                h, g = (total + each[layer][places][:, places] for total, each in ((h, inputs), (g, felt)))
    values, vectors = torch.linalg.eigh(g)
    root = vectors * values.clamp_min(FLOOR * values.amax().clamp_min(1e-30)).sqrt() @ vectors.T
    rows = torch.linalg.eigh(root @ h @ root)[1].flip(1).T @ root
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
            stay = rows[[i for i in range(len(rows)) if i not in dropped]]
            if norms_of(network, group):
                stay = _from_ones(len(stay)) @ stay
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
    state = {name: tensor.double() for name, tensor in network.state_dict().items()}
    left = dict(grams)
    for group in pruning_groups(network.config, ["width"]):
        if group.name not in removal.rotations:
            continue
        rotation = removal.rotations[group.name].to(next(network.parameters()).device)
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
            ridge = FLOOR * normal.diagonal().mean().clamp_min(1e-30) * torch.eye(stay).to(normal)
            bias = torch.zeros_like(state[f"{norm}.bias"])
            bias[:stay] = torch.linalg.solve(normal + ridge, weight.T @ shifts[norm])
            scale = spread(matrix @ gram @ matrix.T).div(spread(gram)).sqrt()
            state |= {f"{norm}.weight": torch.full_like(bias, float(scale)), f"{norm}.bias": bias}
    turned = DRSformer(network.config).eval().to(next(network.parameters()).device)
    turned.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return turned, left
