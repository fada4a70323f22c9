"""What is taken out of a network changes nothing if nothing reads it; and the ring of an odd MSFN has no better way."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import random
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.groups import ParameterSlice, PruningGroup, pruning_groups, remove
from compress.importance import importances
from compress.options import KINDS
from drsformer.config import PRESETS, BlockConfig, DRSformerConfig, LevelConfig, MEFCConfig, preset
from drsformer.model import DRSformer, LayerNorm, TopKSparseAttention
from tests.support.networks import fill, image


@functools.cache
def network(width: int = 8, **structure) -> DRSformer:
    """Small, with heads of several widths, even and odd hidden channels, and experts that are gone already. One for all
    tests: who changes it, copies it."""
    config = DRSformerConfig.regular(width, (1, 2, 1, 2), (1, 2, 2, 4), 2.7, **structure)
    e1, e2, e3 = config.encoder
    odd, even = (dataclasses.replace(e2.blocks[0], hidden=hidden) for hidden in (9, 10))
    config = dataclasses.replace(
        config,
        encoder=(e1, dataclasses.replace(e2, blocks=(odd, even)), e3),
        mefc_early=MEFCConfig(6, (("none", "sep_conv_3x3", "avg_pool_3x3"), ("dil_conv_5x5", "none", "sep_conv_1x1"))),
        mefc_late=MEFCConfig.regular(3, steps=1),
    )
    return fill(DRSformer(config))


def some(group: PruningGroup, seed: int) -> list[list[int]]:
    """As many random units of each dimension, and not all of them."""
    rng = random.Random(seed)
    count = rng.randint(1, group.units - group.least) if group.units > group.least else 0
    return [sorted(rng.sample(range(dimension.units), count)) for dimension in group.dims]


@torch.no_grad()
def zeroed(model: DRSformer, pruned: dict[str, list[list[int]]], role: str = "reads") -> DRSformer:
    """A copy in which all weights that read these units, or write into them, are zero."""
    model = copy.deepcopy(model)
    state = model.state_dict()

    def clear(part: ParameterSlice, units: list[int]) -> None:
        rows = [unit - part.first for unit in units if 0 <= unit - part.first < len(part.units)]
        weight = state[part.tensor]
        weight = weight.flatten(0, 1) if part.dim is None else weight.movedim(part.dim, 0)
        weight[part.units[rows].flatten()] = 0

    for group in pruning_groups(model.config):
        for dimension, units in zip(group.dims, pruned.get(group.name, ()), strict=False):
            for part in (*dimension.slices, *dimension.zeroed):
                if part.role == role:
                    clear(part, units)
    return model


def difference(a: nn.Module, b: nn.Module) -> float:
    x = image(16, 24)
    with torch.no_grad():
        assert (a(x) - x).abs().mean() > 1e-3
        return float((a(x) - b(x)).abs().max())


EXACT = [g.name for g in pruning_groups(network().config) if g.kind != "width" and not g.name.endswith("head_dim")]


@pytest.mark.parametrize("name", EXACT)
def test_what_nothing_reads_can_go(name):
    model = network()
    group = next(g for g in pruning_groups(model.config) if g.name == name)
    pruned = {name: some(group, 0)}
    smaller = remove(model, pruned)
    assert difference(zeroed(model, pruned), smaller) < 1e-5
    if any(pruned[name]):
        assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", ["gdfn", "dfn", "fn"])
def test_other_feed_forwards_too(kind):
    model = network(feed_forward=kind)
    pruned = {g.name: some(g, 1) for g in pruning_groups(model.config, ["ffn"])}
    for role in ("reads", "writes"):
        assert difference(zeroed(model, pruned, role), remove(model, pruned)) < 1e-5


def test_all_at_once():
    model = network()
    pruned = {g.name: some(g, 2) for g in pruning_groups(model.config) if g.name in EXACT}
    assert difference(zeroed(model, pruned), remove(model, pruned)) < 1e-5


def test_every_block_and_expert_can_go():
    model = network()
    pruned = {
        g.name: [list(range(g.units))]
        for g in pruning_groups(model.config, ["depth", "experts"])
        if not g.name.endswith("gate")
    }
    assert difference(zeroed(model, pruned), remove(model, pruned)) < 1e-5


def test_nothing_taken_out_is_the_same_network_bit_for_bit():
    model = network()
    same = remove(model, {g.name: [[] for _ in g.dims] for g in pruning_groups(model.config)}, grams_of(model))
    assert same.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), model.state_dict().values(), strict=True))
    assert same.patch_embed.weight is not model.patch_embed.weight


def test_groups_that_are_not_there_are_named():
    with pytest.raises(KeyError, match=r"latent\.9\.ffn"):
        remove(network(), {"latent.9.ffn": [[0], [0]]})


@pytest.mark.parametrize("hidden", [2, 3, 4, 5, 7])
@torch.no_grad()
def test_any_pairs_of_msfn_channels_can_go(hidden):
    """All choices in both halves, odd and even: channels that nothing writes into, and an output that nothing reads
    where an odd ring has one too many."""
    units = hidden // 2
    name = "encoder_level1.0.ffn"
    for count in range(units + (hidden % 2)):
        for first, second in itertools.product(itertools.combinations(range(units), count), repeat=2):
            model = fill(DRSformer(DRSformerConfig.regular(4, (1, 0, 0, 0), (1, 1, 1, 1), hidden / 4)))
            full = model.get_submodule(name)
            rows = [
                half * hidden + 2 * unit + i
                for half, some in enumerate((first, second))
                for unit in some
                for i in (0, 1)
            ]
            full.project_in.weight[rows] = 0
            if hidden % 2:  # the output to the right: of s[2 unit + 1] and s[2 unit + 2]
                right = [
                    half * hidden + (hidden + 1) // 2 + unit
                    for half, some in enumerate((first, second))
                    for unit in some
                ]
                full.project_out.weight[:, right] = 0
            small = remove(model, {name: [first, second]}).get_submodule(name)
            x = torch.randn(1, 4, 6, 5)
            assert small.dwconv3x3_1.out_channels == hidden - 2 * count
            assert (full(x) - small(x)).abs().max() < 1e-6, (hidden, first, second)


def preserved(h: int, smaller: int) -> int:
    """The most weights of the second convolution that any way of taking channels out of an MSFN half with `h` channels
    can keep in one with `smaller`: over all channels that stay and all their orders; of each output of the smaller one
    all weights that come from one and the same output."""

    def outputs(h: int) -> dict[tuple[str, int], int]:
        z = [("p", i) for i in range(h)] + [("s", i) for i in range(h)]
        return {channel: place // 2 for place, channel in enumerate(z)}

    old, new = outputs(h), outputs(smaller)
    most = 0
    for kept in itertools.permutations(range(h), smaller):
        counts: dict[int, dict[int, int]] = {}
        for place, channel in enumerate(kept):
            for branch in "ps":
                sources = counts.setdefault(new[branch, place], {})
                source = old[branch, channel]
                sources[source] = sources.get(source, 0) + 1
        most = max(most, sum(max(sources.values()) for sources in counts.values()))
    return most


@pytest.mark.parametrize("h", [3, 4, 5, 6, 7])
def test_no_way_to_take_out_msfn_channels_keeps_more(h):
    """Even: everything. Odd: all but one weight. To a width of the other parity: fewer."""
    for smaller in range(h - 2, 1, -2):
        assert preserved(h, smaller) == 2 * smaller - h % 2
    assert preserved(h, h) == 2 * h
    for other in range(h - 1, 2, -2):
        assert preserved(h, other) < 2 * other - 1


class KeptNorm(nn.Module):
    """A LayerNorm over some of its channels; the others come out as zero."""

    def __init__(self, norm: LayerNorm, kept: list[int]) -> None:
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, self.kept].movedim(1, -1)
        chosen = F.layer_norm(chosen, chosen.shape[-1:], self.norm.weight[self.kept], self.norm.bias[self.kept])
        out = torch.zeros_like(x)
        out[:, self.kept] = chosen.movedim(-1, 1)
        return out


@functools.cache
def uneven() -> DRSformer:
    """No two widths alike, a level of one channel, levels without blocks, and a step of an MEFC without experts."""
    level, block = LevelConfig, BlockConfig(1, 2, 3)
    config = DRSformerConfig(
        encoder=(level(5, ()), level(8, (block,)), level(12, (block, block))),
        latent=level(4, ()),
        decoder=(level(1, (block,)), level(7, (block,)), level(8, (block,))),
        up=(2, 6, 3),
        feed_forward="gdfn",
        mefc_early=MEFCConfig(3, (("none", "none"), ("avg_pool_3x3", "sep_conv_5x5"))),
        mefc_late=MEFCConfig(2, (("dil_conv_3x3", "sep_conv_1x1"), ("none", "avg_pool_3x3"))),
    )
    return fill(DRSformer(config))


WIDTHS = {g.name: g for g in pruning_groups(network().config, ["width"])}


@pytest.mark.parametrize("build", [network, uneven])
@pytest.mark.parametrize("name", WIDTHS)
def test_channels_of_a_residual_path_go_with_all_that_reads_and_writes_them(build, name):
    """Against the full network whose norms see only the channels that stay."""
    model = build()
    (group,) = (g for g in pruning_groups(model.config, ["width"]) if g.name == name)
    pruned = {name: some(group, 3)}
    masked = zeroed(model, pruned)
    for part in group.dims[0].slices:
        module, _, parameter = part.tensor.rpartition(".")
        if ".norm" in module and parameter == "weight":
            norm = masked.get_submodule(module)
            dead = set(part.units[pruned[name][0]].flatten().tolist())
            kept = [i for i in range(len(norm.weight)) if i not in dead]
            masked.set_submodule(module, KeptNorm(norm, kept))
    assert difference(masked, remove(model, pruned)) < 1e-5


CONFIGS = {name: preset(name) for name in PRESETS} | {"mixed": network().config, "uneven": uneven().config}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_channel_of_a_residual_path_belongs_to_one_unit(name):
    config = CONFIGS[name]
    indices = defaultdict(list)
    for group in pruning_groups(config, ["width"]):
        for part in group.dims[0].slices:
            assert len(part.units) == group.units
            indices[part.tensor, part.dim] += part.units.flatten().tolist()
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in DRSformer(config).state_dict().items()}
    assert {tensor.split(".")[0] for tensor, _ in indices} == {tensor.split(".")[0] for tensor in shapes}
    for (tensor, dim), found in indices.items():
        assert sorted(found) == list(range(shapes[tensor][dim])), (tensor, dim)


class KeptAttention(nn.Module):
    """Attention over some channels of each head, with the K of top-k that belong to so many."""

    def __init__(
        self, attention: TopKSparseAttention, ks: tuple[int, ...], rows: list[list[int]], columns: list[list[int]]
    ):
        super().__init__()
        self.attention, self.ks, self.rows, self.columns = attention, ks, rows, columns

    def forward(self, x: Tensor) -> Tensor:
        a = self.attention
        B, _, H, W = x.shape
        q, k, v = a.qkv_dwconv(a.qkv(x)).view(B, 3, a.heads, -1, H * W).unbind(1)
        out = torch.zeros_like(v)
        for h, (rows, columns) in enumerate(zip(self.rows, self.columns, strict=True)):
            scores = F.normalize(q[:, h, rows], dim=-1) @ F.normalize(k[:, h, columns], dim=-1).mT * a.temperature[h]
            for weight, count in zip(a.mix, self.ks, strict=True):
                least = scores.topk(count).values[..., -1:]
                kept = scores.masked_fill(scores < least, float("-inf"))
                out[:, h, rows] += weight * kept.softmax(-1) @ v[:, h, columns]
        return a.project_out(out.view(B, -1, H, W))


def test_channels_of_heads_go_from_q_k_and_v():
    """Against the full network whose attention looks only at those that stay. Not at once: where a selection of one
    layer is close, the others would differ."""
    model = network(16)
    for group in pruning_groups(model.config, ["heads"]):
        if not group.name.endswith("head_dim"):
            continue
        pruned = some(group, 4)
        masked = copy.deepcopy(model)
        layer = group.name.removesuffix(".head_dim")
        left = [[i for i in range(group.units) if i not in units] for units in pruned]
        ks = model.config.kept(len(left[0]))
        masked.set_submodule(layer, KeptAttention(masked.get_submodule(layer), ks, left[::2], left[1::2]))
        assert difference(masked, remove(model, {group.name: pruned})) < 1e-5, group.name


def grams_of(model: DRSformer) -> dict[str, Tensor]:
    """As they are measured, on one image."""
    picture = image(16, 24)[0]
    return importances(model, [], [(picture, picture)], "magnitude")[1]


@pytest.mark.parametrize("name", ["decoder_level3.width", "decoder_level2.width"])
@torch.no_grad()
def test_scale_of_norms_makes_up_for_dead_channels(name):
    """Channels of a residual path whose weights are all zero, where the mean of the others is zero as well: then their
    number is all that LayerNorm would miss."""
    model = copy.deepcopy(network())
    group, state = WIDTHS[name], model.state_dict()
    dead = [0, 3, 5]
    kept = [i for i in range(group.units) if i not in dead]
    for part in group.dims[0].slices:
        if part.role == "writes":
            state[part.tensor][dead] = 0
            state[part.tensor][kept] -= state[part.tensor][kept].mean(0)
        elif part.tensor.endswith("bias"):
            state[part.tensor][dead] = 0
    pruned = {name: [dead]}
    assert difference(model, remove(model, pruned, grams_of(model))) < 1e-5
    assert difference(model, remove(model, pruned)) > 1e-3


@torch.no_grad()
def test_scale_of_norms_follows_the_variance_of_the_channels_that_stay():
    model = network()
    pruned = {"decoder_level2.width": [[1, 2, 7]]}
    seen = []
    norm = model.get_submodule("decoder_level2.1.norm1")
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    grams = grams_of(model)
    handle.remove()
    kept = [i for i in range(len(norm.weight)) if i not in pruned["decoder_level2.width"][0]]
    scale = (seen[0][:, kept].var(1, correction=0).mean() / seen[0].var(1, correction=0).mean()).sqrt()
    found = remove(model, pruned, grams).get_submodule("decoder_level2.1.norm1").weight
    assert (found - scale * norm.weight[kept]).abs().max() < 1e-5
    assert abs(scale - 1) > 1e-3


def test_every_tensor_of_a_network_has_its_dimensions():
    """Taking one unit out of everything makes every tensor smaller but those that have nothing to lose."""
    model = network()
    pruned = {
        g.name: [[0]] * len(g.dims)
        for g in pruning_groups(model.config)
        if g.kind in ("ffn", "width", "heads") and not g.name.endswith("attn")
    }
    before, after = model.state_dict(), remove(model, pruned).state_dict()
    same = {name for name in before if before[name].shape == after[name].shape}
    assert all(".mix." in name or "temperature" in name or "gate.2" in name or "gate.0.bias" in name for name in same)
    assert set(KINDS) == {g.kind for g in pruning_groups(model.config)}
