"""Pruning groups: what can be removed from a network, and removing it.

    smaller = remove(network, {"latent.0.ffn": [[3], [7]], "encoder_level2.width": [[1]]})

Each `PruningGroup` is one number of the config, or one of its lists, with the dimensions of tensors whose length it is.
By kind:

- `ffn`: hidden channels of a feed-forward network. In an MSFN they go by pairs of neighbours, see `_msfn`.
- `heads`: heads of an attention, and channels of all its heads alike, of Q with the output they make and of K with V.
- `experts`: experts of an MEFC, and hidden channels of its gate.
- `width`: channels of a level's residual path, with everything that reads or writes them, and of the upsamplings; in
  other coordinates, see `compress.rotation`.
- `depth`: blocks.

Exact, and tested: removing hidden channels, heads, experts, gate channels and blocks whose weights are zero changes
nothing. Two kinds cannot be exact, whatever the weights, and their slices are tested against masks in the full network:
a channel of the residual path that is always zero still counts in the mean of LayerNorm (its scale is corrected, see
`remove`), and a channel of K that is zero still has a score, 0, and K of top-k follows the number of channels.

What belongs to a `width` is found by the dependency graph of Torch-Pruning, see `compress.standin`. All other units are
inside one layer of ours, of which that graph has no notion, and are listed here.
"""

from __future__ import annotations

import functools
import json
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from compress.options import KINDS, Kind
from compress.standin import CoupledChannels, coupled_channels
from drsformer.config import LEVELS, NO_EXPERT, BlockConfig, DRSformerConfig
from drsformer.model import DRSformer

Role = Literal["writes", "reads", "neither"]


class ParameterSlice(NamedTuple):
    """The part of one tensor that belongs to the units of a dimension.

    Attributes:
        tensor: Name of the parameter.
        dim: Dimension of the tensor; None for the first two taken as one.
        units: (m, n) int64: the n indices along `dim` of each of m units.
        role: Whether these weights write into the units or read them. Setting all that read a unit to zero is the same
            as removing it.
        first: Which unit of the dimension the first row of `units` is.
    """

    tensor: str
    dim: int | None
    units: Tensor
    role: Role = "neither"
    first: int = 0


@dataclass(frozen=True)
class Dimension:
    """Units that can be removed one by one.

    Attributes:
        units: How many there are.
        slices: The weights that are removed with them.
        zeroed: Single weights that are set to zero with them, since their tensors keep their shape there.
        modules: For each unit, the name of a module that is removed as a whole, if it has one.
    """

    units: int
    slices: tuple[ParameterSlice, ...]
    zeroed: tuple[ParameterSlice, ...] = ()
    modules: tuple[str, ...] = ()


ANY = (0, 0)
"""For `PruningGroup.aligned`: no number of units is better than another."""


@dataclass(frozen=True)
class PruningGroup:
    """One number of the config, or one of its lists, that can become smaller.

    Attributes:
        kind: One of `KINDS`.
        name: Of the module or number, such as "latent.0.ffn"; unique in a network.
        path: Where in the config, as dicts and lists.
        dims: What has this length; of each the least important units are removed, as many of one as of the other.
        unit: What a unit counts in the number.
        aligned: (per unit, beyond): with n units left, n * per unit + beyond is the width that should fit vectors. In
            place of per unit, the name of another group stands for as many units as that has left.
        least: How many units have to stay.
    """

    kind: Kind
    name: str
    path: tuple[str | int, ...]
    dims: tuple[Dimension, ...]
    unit: int = 1
    aligned: tuple[int | str, int] = (1, 0)
    least: int = 1

    @property
    def units(self) -> int:
        """How many units there are in each dimension."""
        return self.dims[0].units

    def fewer(self, left: Mapping[str, int], round_to: int) -> int | None:
        """The next number of units below what is left of it that ends where vectors do.

        Args:
            left: Units that are left of every group, by its name.
            round_to: The aligned width is a multiple of this.

        Returns:
            The number of units, or None where there is none.
        """
        scale, beyond = self.aligned
        each = left[scale] if isinstance(scale, str) else scale
        numbers = range(left[self.name] - 1, self.least - 1, -1)
        return next((n for n in numbers if (n * each + beyond) % round_to == 0), None)


PrunedIndices = Mapping[str, Sequence[Sequence[int]]]
"""Units to remove: by the name of their group, for each of its dimensions."""

Rotations = Mapping[str, Tensor]
"""By the name of a group, what its units become before some of them are removed, as sums of what they were: (units,
units) float64, see `compress.rotation`."""


@dataclass(frozen=True)
class Removal:
    """What is removed at a time.

    Attributes:
        units: Of the network in new coordinates, where there are any.
        rotations: The new coordinates.
    """

    units: PrunedIndices
    rotations: Rotations = field(default_factory=dict)


def pruning_groups(config: DRSformerConfig, scope: Iterable[Kind] = KINDS) -> list[PruningGroup]:
    """Everything that can be removed from such a network, of the kinds in `scope`."""
    wanted = set(scope)
    groups = [*_widths(config)] if "width" in wanted else []
    for module, path in LEVELS.items():
        blocks = config.levels()[module].blocks
        for i, block in enumerate(blocks):
            name, block_path = f"{module}.{i}", (*path, "blocks", i)
            groups += _attention(f"{name}.attn", block_path, block)
            groups.append(_feed_forward(config.feed_forward, f"{name}.ffn", (*block_path, "hidden"), block.hidden))
        if blocks:
            groups.append(_depth(module, (*path, "blocks"), blocks, config.feed_forward))
    for module, width in (("mefc_early", config.encoder[0].width), ("mefc_late", config.decoder[2].width)):
        if mefc := getattr(config, module):
            gate = Dimension(
                mefc.gate_hidden,
                (
                    ParameterSlice(f"{module}.gate.0.weight", 0, _each(mefc.gate_hidden), "writes"),
                    ParameterSlice(f"{module}.gate.0.bias", 0, _each(mefc.gate_hidden)),
                    ParameterSlice(f"{module}.gate.2.weight", 1, _each(mefc.gate_hidden), "reads"),
                ),
            )
            groups.append(PruningGroup("experts", f"{module}.gate", (module, "gate_hidden"), (gate,)))
            for i, names in enumerate(mefc.steps):
                if present := [name for name in names if name != NO_EXPERT]:
                    dimension = _experts(f"{module}.steps.{i}", present, width)
                    groups.append(
                        PruningGroup("experts", f"{module}.steps.{i}", (module, "steps", i), (dimension,), 1, ANY, 0)
                    )
    return [group for group in groups if group.kind in wanted]


def _each(count: int, offset: int = 0, group: int = 1) -> Tensor:
    """Indices (count, group) of units of `group` neighbours."""
    return offset + torch.arange(count * group).view(count, group)


def _attention(name: str, path: tuple[str | int, ...], block: BlockConfig) -> Iterator[PruningGroup]:
    """Q's rows come first, then K's, then V's, in each of them head after head (`TopKSparseAttention`)."""
    heads, d = block.heads, block.head_dim
    inner = heads * d

    def rows(index: Tensor, writes: bool, reads: bool = False) -> Iterator[ParameterSlice]:
        yield ParameterSlice(f"{name}.qkv.weight", 0, index, "writes" if writes else "neither")
        yield ParameterSlice(f"{name}.qkv_dwconv.weight", 0, index, "reads" if reads else "neither")

    q, k, v = (_each(heads, part * inner, d) for part in range(3))
    whole = Dimension(
        heads,
        (
            *rows(q, False),
            *rows(k, False),
            *rows(v, True),
            ParameterSlice(f"{name}.temperature", 0, _each(heads)),
            ParameterSlice(f"{name}.project_out.weight", 1, q, "reads"),
        ),
    )
    yield PruningGroup("heads", name, (*path, "heads"), (whole,), 1, (f"{name}.head_dim", 0))
    dims = []
    for h in range(heads):
        q, k, v = (_each(d, part * inner + h * d) for part in range(3))
        dims.append(Dimension(d, (*rows(q, False), ParameterSlice(f"{name}.project_out.weight", 1, q, "reads"))))
        dims.append(
            Dimension(d, (*rows(k, False), *rows(v, True, True)))
        )  # a channel of K counts by the V that it lets in
    yield PruningGroup("heads", f"{name}.head_dim", (*path, "head_dim"), tuple(dims), 1, (name, 0))


def _msfn(name: str, path: tuple[str | int, ...], h: int) -> PruningGroup:
    """Hidden channels of an MSFN, which go by pairs, in each half of the hidden layer as many.

    Each half of project_in's output is a dimension of its own. Its channel c gives p[c] and s[c], by the 3x3 and the
    5x5 kernel; of the concatenation [p, s] each output of the next convolution joins two neighbours, the one at an even
    index with the next. With even h these are (p[0], p[1]), (p[2], p[3]) ... and (s[0], s[1]), (s[2], s[3]) ...: a
    unit of two channels and two outputs is on its own, and leaves a network of the same build.

    With odd h they are (p[0], p[1]) ... (p[h-1], s[0]), (s[1], s[2]) ... (s[h-2], s[h-1]). Taken as edges between
    channels they make one ring, p and s in turn but for the one that joins both. A smaller network of odd width is a
    smaller ring, so to remove the neighbours c = 2j and c + 1, three edges have to become one. Of those, the unit
    owns the one between its channels and the one to the right of it; that to the left stays for the channel that it
    still has, and its weight for the one that is pruned is zeroed. It then joins the next channel that is left, by a
    weight of zero. The last channel belongs to no unit. No other way keeps more of the weights of the channels that
    stay, and to an even width above two all keep fewer: the tests try them all on small rings.
    """
    units, odd = divmod(h, 2)
    outputs = torch.stack([torch.arange(units), torch.arange(units) + (h + 1) // 2], dim=1)
    dims = []
    for half, convolution in enumerate(("dwconv3x3_1", "dwconv5x5_1")):
        pairs = _each(units, half * h, 2)
        slices = (
            ParameterSlice(f"{name}.project_in.weight", 0, pairs, "writes"),
            ParameterSlice(f"{name}.dwconv3x3.weight", 0, pairs),
            ParameterSlice(f"{name}.dwconv5x5.weight", 0, pairs),
            ParameterSlice(f"{name}.{convolution}.weight", 0, outputs),
            ParameterSlice(f"{name}.project_out.weight", 1, half * h + outputs, "reads"),
        )
        left = 2 * (h // 2 + _each(units)) + 1  # the second weight of the output to the left
        dims.append(
            Dimension(
                units, slices, (ParameterSlice(f"{name}.{convolution}.weight", None, left, "reads"),) if odd else ()
            )
        )
    return PruningGroup("ffn", name, path, tuple(dims), 2, (1, odd))


def _feed_forward(kind: str, name: str, path: tuple[str | int, ...], h: int) -> PruningGroup:
    if kind == "msfn":
        return _msfn(name, path, h)
    rows = torch.cat([_each(h), _each(h, h)], dim=1) if kind == "gdfn" else _each(h)
    dimension = Dimension(
        h,
        (
            ParameterSlice(f"{name}.project_in.weight", 0, rows, "writes"),
            *(ParameterSlice(f"{name}.{layer}.weight", 0, rows) for layer in ("dwconv",) if kind != "fn"),
            ParameterSlice(f"{name}.project_out.weight", 1, _each(h), "reads"),
        ),
    )
    return PruningGroup("ffn", name, path, (dimension,))


def _depth(module: str, path: tuple[str | int, ...], blocks: Sequence[BlockConfig], feed_forward: str) -> PruningGroup:
    slices = []
    for i, block in enumerate(blocks):
        attention = block.heads * block.head_dim
        hidden = block.hidden * (2 if feed_forward == "msfn" else 1)
        for layer, inputs in (("attn", attention), ("ffn", hidden)):
            slices.append(
                ParameterSlice(f"{module}.{i}.{layer}.project_out.weight", 1, _each(1, 0, inputs), "reads", i)
            )
    modules = tuple(f"{module}.{i}" for i in range(len(blocks)))
    return PruningGroup("depth", module, path, (Dimension(len(blocks), tuple(slices), modules=modules),), 1, ANY, 0)


def _experts(step: str, names: Sequence[str], width: int) -> Dimension:
    """One step of an MEFC, in which only experts that are present count."""
    modules = tuple(f"{step}.experts.{i}" for i in range(len(names)))
    return Dimension(
        len(names), (ParameterSlice(f"{step}.out.weight", 1, _each(len(names), 0, width), "reads"),), modules=modules
    )


WIDTHS: dict[str, tuple[tuple[str | int, ...], str]] = {
    "encoder_level1.width": (("encoder", 0, "width"), "patch_embed"),
    "encoder_level2.width": (("encoder", 1, "width"), "down1_2.conv"),
    "encoder_level3.width": (("encoder", 2, "width"), "down2_3.conv"),
    "latent.width": (("latent", "width"), "down3_4.conv"),
    "decoder_level3.width": (("decoder", 0, "width"), "reduce_chan_level3"),
    "decoder_level2.width": (("decoder", 1, "width"), "reduce_chan_level2"),
    "up4_3.width": (("up", 0), "up4_3.conv"),
    "up3_2.width": (("up", 1), "up3_2.conv"),
    "up2_1.width": (("up", 2), "up2_1.conv"),
}
"""Numbers of channels that can become smaller by themselves, with their place in the config and a convolution that
writes into these channels. Decoder level 1 works on [up2_1, encoder level 1], so its channels go with theirs."""


@functools.lru_cache(maxsize=16)
def _widths(config: DRSformerConfig) -> tuple[PruningGroup, ...]:
    """The residual path of every level, and what the upsamplings bring."""
    with torch.device("meta"):
        network = DRSformer(config)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    coupled = coupled_channels(network, [root for _, root in WIDTHS.values()])
    groups = []
    for name, (path, root) in WIDTHS.items():
        width = len(coupled[root][0].channels)
        units = min(width, shapes[f"{root}.weight"][0])
        slices = [each for part in coupled[root] for each in _coupled_slices(part, units, shapes)]
        unit = width // units
        groups.append(PruningGroup("width", name, path, (Dimension(units, tuple(slices)),), unit, (unit, 0)))
    return tuple(groups)


def _coupled_slices(part: CoupledChannels, units: int, shapes: Mapping[str, Sequence[int]]) -> Iterator[ParameterSlice]:
    """What a layer of the stand-in says of the tensors of the layer that it stands for. Pixel-unshuffle makes four
    neighbouring channels of one, pixel-shuffle one of four."""
    weight, bias = f"{part.layer}.weight", f"{part.layer}.bias"
    dims: dict[str, list[tuple[str, int, Role]]] = {
        "inputs": [(weight, 1, "reads")],
        "outputs": [(weight, 0, "writes")],
        "both": [(weight, 0, "neither"), (bias, 0, "neither"), (weight, 1, "reads")],
    }
    for tensor, dim, role in dims[part.side]:
        shape = shapes.get(tensor, ())
        if dim >= len(shape) or (part.side == "both" and dim == 1 and shape[1] == 1):  # not there, or depthwise
            continue
        index = part.channels.view(units, -1)
        if shape[dim] < part.width:
            index = index[:, ::4] // 4
        elif shape[dim] > part.width:
            index = (4 * index.unsqueeze(2) + torch.arange(4)).flatten(1)
        yield ParameterSlice(tensor, dim, index, role)


def config_after(config: DRSformerConfig, groups: Iterable[PruningGroup], pruned: PrunedIndices) -> DRSformerConfig:
    """The config that is left; `groups` are in the order of `pruning_groups`."""
    tree = json.loads(json.dumps(config.to_dict()))  # lists, which can be changed
    for group in groups:
        if units := pruned.get(group.name, [()])[0]:
            *above, last = group.path
            holder = functools.reduce(operator.getitem, above, tree)
            whole = holder[last]
            if isinstance(whole, int):
                holder[last] = whole - group.unit * len(units)
            elif group.kind == "depth":
                holder[last] = [block for i, block in enumerate(whole) if i not in units]
            else:
                present = [i for i, name in enumerate(whole) if name != NO_EXPERT]
                removed = {present[unit] for unit in units}
                holder[last] = [NO_EXPERT if i in removed else name for i, name in enumerate(whole)]
    tree["decoder"][2]["width"] = tree["encoder"][0]["width"] + tree["up"][2]
    return DRSformerConfig.from_dict(tree)


def remove(network: DRSformer, pruned: PrunedIndices, grams: Mapping[str, Tensor] | None = None) -> DRSformer:
    """Remove units from a network.

    Args:
        network: Stays as it is.
        pruned: The units.
        grams: Of the LayerNorms' inputs, by name, the sum over pixels of x x^T, (C, C). LayerNorm divides by the
            standard deviation over channels, which is another one over fewer of them; where channels of a residual path
            are removed, its scale is multiplied by what makes up for that on the average.

    Returns:
        The smaller network, in evaluation mode.

    Raises:
        KeyError: For a group that the network does not have.
    """
    groups = _pruned_groups(network.config, pruned)
    state: dict[str, Tensor] = dict(network.state_dict())
    for group in groups:
        for dimension, units in zip(group.dims, pruned[group.name], strict=True):
            for part in dimension.zeroed:
                weight = state[part.tensor].clone()
                weight.flatten(0, 1)[_indices(part, units)] = 0
                state[part.tensor] = weight
    drops, renames = _removals(groups, pruned)
    for (name, dim), indices in drops.items():
        keep = torch.tensor([i for i in range(state[name].shape[dim]) if i not in indices], dtype=torch.long)
        norm = name.removesuffix(".weight")
        if grams and norm in grams and indices:
            state[name] = state[name] * spread(grams[norm][keep][:, keep]).div(spread(grams[norm])).sqrt().float()
        state[name] = state[name].index_select(dim, keep.to(state[name].device))
    left = {_renamed(name, renames): tensor for name, tensor in state.items() if tensor.numel()}
    smaller = DRSformer(config_after(network.config, groups, pruned))
    smaller.load_state_dict({name: tensor for name, tensor in left.items() if name is not None})
    return smaller.eval().to(next(network.parameters()).device)


class Origin(NamedTuple):
    """Where a tensor of a pruned network comes from.

    Attributes:
        tensor: Name of the tensor in the whole network.
        kept: By the dimension that was pruned, the indices of it that are left, ascending; of a dimension that writes
            into rotated units, what its channels are of those of the whole network, (channels, channels) float64.
    """

    tensor: str
    kept: dict[int, Tensor]

    def of_output(self, x: Tensor) -> Tensor:
        """What is left of an output of the whole network's map: (1, C, H, W) -> (1, C', H, W)."""
        kept = self.kept.get(0)
        if kept is None:
            return x
        if kept.is_floating_point():
            return torch.einsum("oc,bchw->bohw", kept.to(x), x)
        return x[:, kept.to(x.device)]


def origins(config: DRSformerConfig, rounds: Iterable[Removal]) -> dict[str, Origin]:
    """What `remove` leaves of each tensor of a network, when it is called round after round.

    Args:
        config: Of the whole network.
        rounds: What each call removed, of the network that the one before left.

    Returns:
        By the names of the tensors of the smallest network.

    Raises:
        KeyError: For a group that the network does not have.
    """
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in DRSformer(config).state_dict().items()}
    found = {name: Origin(name, {}) for name in shapes}
    for removal in rounds:
        pruned = removal.units
        groups = _pruned_groups(config, pruned)
        for group in groups:
            if group.name in removal.rotations:
                for part in group.dims[0].slices:
                    if part.role == "writes":
                        whole, kept = found[part.tensor]
                        matrix = _as_matrix(kept.get(0), shapes[whole][0])
                        matrix = lifted(removal.rotations[group.name], len(matrix), part.units) @ matrix
                        found[part.tensor] = Origin(whole, kept | {0: matrix})
        drops, renames = _removals(groups, pruned)
        for (name, dim), indices in drops.items():
            whole, kept = found[name]
            before = kept.get(dim, torch.arange(shapes[whole][dim]))
            left = [i for i in range(len(before)) if i not in indices]
            found[name] = Origin(whole, kept | {dim: before[left]})
        moved = {_renamed(name, renames): origin for name, origin in found.items()}
        found = {name: origin for name, origin in moved.items() if name is not None}
        config = config_after(config, groups, pruned)
    return found


def _pruned_groups(config: DRSformerConfig, pruned: PrunedIndices) -> list[PruningGroup]:
    groups = [group for group in pruning_groups(config) if group.name in pruned]
    if unknown := pruned.keys() - {group.name for group in groups}:
        raise KeyError(f"no pruning groups of this network: {', '.join(sorted(unknown))}")
    return groups


def _removals(
    groups: Iterable[PruningGroup], pruned: PrunedIndices
) -> tuple[dict[tuple[str, int], set[int]], dict[str, str | None]]:
    """The indices that are removed, by tensor and dimension, and the new names of modules, None for those removed."""
    drops: dict[tuple[str, int], set[int]] = defaultdict(set)
    renames: dict[str, str | None] = {}
    for group in groups:
        for dimension, units in zip(group.dims, pruned[group.name], strict=True):
            for part in dimension.slices:
                assert part.dim is not None
                drops[part.tensor, part.dim].update(_indices(part, units))
            left = [module for unit, module in enumerate(dimension.modules) if unit not in units]
            renames |= dict.fromkeys(dimension.modules) | dict(zip(left, dimension.modules, strict=False))
    return drops, renames


def _indices(part: ParameterSlice, units: Iterable[int]) -> list[int]:
    rows = [unit - part.first for unit in units if 0 <= unit - part.first < len(part.units)]
    return part.units[rows].flatten().tolist()


def _renamed(name: str, renames: Mapping[str, str | None]) -> str | None:
    """The new name of a tensor, None if it goes with its module."""
    for old, new in renames.items():
        if name.startswith(f"{old}."):
            return None if new is None else new + name.removeprefix(old)
    return name


def _as_matrix(kept: Tensor | None, size: int) -> Tensor:
    """Indices of a dimension of this size, all of them if none are given, as rows of zeros and a one."""
    if kept is not None and kept.is_floating_point():
        return kept
    eye = torch.eye(size, dtype=torch.float64)
    return eye if kept is None else eye[kept]


def lifted(rotation: Tensor, size: int, places: Tensor) -> Tensor:
    """A rotation of units as one of all indices of a dimension of this size, in which unit i is places[i]."""
    matrix = torch.eye(size).to(rotation)
    for each in places.T:
        matrix[each[:, None], each] = rotation
    return matrix


def spread(gram: Tensor) -> Tensor:
    """The variance over channels, added up over pixels."""
    return (gram.trace() / len(gram) - gram.mean()).clamp_min(1e-12)
