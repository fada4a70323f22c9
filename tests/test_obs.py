"""Costs after repair are what is left when the readers are solved anew, and they are where the redundancy is not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from compress.groups import pruning_groups
from compress.obs import RIDGE, Attended, _attended_costs, _collect, _greedy, _inputs, _Reader, costs_after_repair
from compress.options import KINDS
from drsformer.config import NO_EXPERT, MEFCConfig
from drsformer.model import DRSformer
from runtime.errors import InputError
from tests.support.networks import fill, image
from tests.support.pruning import EVEN, EXPERTS, ODD, doubled, patches


def reader(n: int, seed: int = 0) -> tuple[_Reader, Tensor, Tensor]:
    """With H and M of random data: inputs that depend on each other, and an image that feels few directions."""
    generator = torch.Generator().manual_seed(seed)
    inputs, felt = (torch.randn(n, 3 * n, generator=generator, dtype=torch.float64) for _ in range(2))
    inputs = torch.randn(n, n, generator=generator, dtype=torch.float64) @ inputs
    H, M = inputs @ inputs.T / (3 * n), felt @ felt.T
    return _Reader.of(H, M), H, M


def left_over(H: Tensor, M: Tensor, removed: list[int]) -> float:
    """<M_SS, covariance of the removed inputs that the others do not tell>, by regression."""
    H = H + RIDGE * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    kept = [i for i in range(len(H)) if i not in removed]
    guess = torch.linalg.solve(H[kept][:, kept], H[kept][:, removed]).T
    covariance = H[removed][:, removed] - guess @ H[kept][:, removed]
    return float((M[removed][:, removed] * covariance).sum())


def test_costs_add_up_to_what_all_removed_units_cost_together():
    layer, H, M = reader(12)
    (costs,) = _greedy([layer], [[torch.arange(12).view(6, 2)]])
    total = 0.0
    for count, unit in enumerate(costs.argsort().tolist(), 1):
        removed = costs.argsort()[:count].tolist()
        together = left_over(H, M, [i for u in removed for i in (2 * u, 2 * u + 1)])
        single = together - total
        total = together
        assert costs[unit] == pytest.approx(single, rel=1e-6) or costs[unit] >= single  # never less than one before it
    assert costs.argsort()[0] == min(range(6), key=lambda u: left_over(H, M, [2 * u, 2 * u + 1]))


def test_units_that_are_removed_together_are_not_each_others_repair():
    """Twins: either of them costs nothing, as long as the other one is there."""
    _, H, M = reader(40)
    twins = torch.tensor([*range(40), *range(40)])
    H, M = H[twins][:, twins], M[twins][:, twins]
    (costs,) = _greedy([_Reader.of(H, M)], [[torch.arange(80).view(80, 1)]])
    free = costs.argsort()[:40]
    assert costs[free].sum() < 0.02 * costs.sum()
    assert sorted((free % 40).tolist()) == list(range(40))


def test_all_layers_that_read_a_unit_count():
    (a, *_), (b, *_) = reader(6, 0), reader(6, 1)
    units = torch.arange(6).view(6, 1)
    alone = [_greedy([each.among(torch.arange(6))], [[units]])[0] for each in (a, b)]
    first = a.costs(units) + b.costs(units)
    (both,) = _greedy([a, b], [[units, units]])
    assert both.min() == pytest.approx(float(first.min()), rel=1e-6)
    assert both.sum() >= sum(float(each.sum()) for each in alone) - 1e-6


def test_as_many_units_of_each_dimension_in_turn():
    layer, _, _ = reader(12)
    halves = _greedy([layer], [[torch.arange(6).view(6, 1)], [torch.arange(6, 12).view(6, 1)]])
    assert [len(half) for half in halves] == [6, 6]
    assert all((half > 0).all() and len(half.unique()) == 6 for half in halves)


@pytest.mark.parametrize("config", [EVEN, ODD, EXPERTS], ids=["even", "odd", "experts"])
def test_every_unit_has_a_cost(config):
    network = fill(DRSformer(config))
    groups = pruning_groups(config)
    scores, grams, _ = costs_after_repair(network, groups, patches(2))
    assert set(scores) == {group.name for group in groups}
    assert {group.kind for group in groups} == {kind for kind in KINDS if kind != "experts" or config is EXPERTS}
    for group in groups:
        assert [len(each) for each in scores[group.name]] == [dimension.units for dimension in group.dims]
        assert all((each >= 0).all() and each.isfinite().all() for each in scores[group.name])
        if not group.name.endswith("head_dim"):
            assert sum(float(each.sum()) for each in scores[group.name]) > 0
    assert set(grams) == {
        name.removesuffix(".weight") for name in network.state_dict() if "norm" in name and "weight" in name
    }
    assert all(parameter.grad is None for parameter in network.parameters())


def test_an_output_that_loses_a_weight_is_counted_with_the_unit():
    (group,) = (group for group in pruning_groups(ODD) if group.name == "decoder_level1.0.ffn")
    h = ODD.levels()["decoder_level1"].blocks[0].hidden
    for half, dimension in enumerate(group.dims):
        (zeroed,) = dimension.zeroed
        own = dimension.slices[-1].units
        (found,) = _inputs(group, half, ["decoder_level1.0.ffn.project_out"])
        assert torch.equal(found, torch.cat([own, half * h + zeroed.units // 2], dim=1))  # outputs have two weights
        assert ((half * h <= found) & (found < (half + 1) * h)).all()


def test_what_nothing_reads_costs_nothing():
    """A compensator whose only step has lost all of its experts: its gate is computed for nothing."""
    config = dataclasses.replace(EVEN, mefc_early=MEFCConfig(4, ((NO_EXPERT, NO_EXPERT),)))
    groups = pruning_groups(config)
    scores, *_ = costs_after_repair(fill(DRSformer(config)), groups, patches(1))
    (gate,) = (name for name in scores if name.startswith("mefc_early.gate"))
    assert float(sum(each.sum() for each in scores[gate])) == 0


def test_what_is_there_twice_costs_least():
    name = "decoder_level1.0.ffn"
    network = doubled(fill(DRSformer(EVEN)), name)
    groups = [group for group in pruning_groups(EVEN) if group.name == name]
    scores, *_ = costs_after_repair(network, groups, patches(3))
    for costs in scores[name]:
        free = costs.argsort()[: len(costs) // 2]
        assert sorted((free // 2).tolist()) == list(range(len(costs) // 2))  # one of each couple
        assert costs[free].sum() < 0.02 * costs.sum()


def test_gradients_are_those_by_the_layer_alone():
    """The skip connection reads the stream too, which costs the units of the downsampling nothing."""
    network = fill(DRSformer(EVEN))
    with torch.no_grad():
        network.down1_2.conv.weight.zero_()
    statistics = _collect(network, ["down1_2.conv", "output"], [image(16, 16)], [1.0], lambda *_: None)
    assert statistics.felt["down1_2.conv"].abs().max() == 0
    assert statistics.felt["output"].abs().max() > 0
    assert statistics.inputs["output"].shape == (16, 16)


def test_the_image_feels_as_much_as_it_changes():
    """M predicts the squared error that white noise at the input of a layer makes."""
    network = fill(DRSformer(EVEN))
    images = [image(16, 16, seed) for seed in range(24)]
    statistics = _collect(network, ["output"], images, [1 / 24] * 24, lambda *_: None)
    exact = sum(  # the convolution sees every input from nine places, but for the border
        float(network.output.weight.detach()[:, :, dy, dx].square().sum()) * (16 - abs(dy - 1)) * (16 - abs(dx - 1))
        for dy in range(3)
        for dx in range(3)
    )
    assert float(statistics.felt["output"].trace()) == pytest.approx(exact, rel=0.1)


@torch.no_grad()
def test_a_channel_of_k_and_v_costs_what_its_loss_does_to_the_attention():
    network = fill(DRSformer(EVEN))
    d, pixels = 4, 50
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, d, d, generator=generator, dtype=torch.float64)
    v = torch.randn(1, d, pixels, generator=generator, dtype=torch.float64)
    attention = network.latent[0].attn  # four heads of 16; only its mixing weights count here
    attention.heads = 1
    felt = torch.eye(d, dtype=torch.float64)
    (costs,) = _attended_costs(network, "latent.0.attn", [Attended(1.0, scores, v @ v.mT / pixels)], felt)

    def output(columns: list[int]) -> Tensor:
        kept = network.config.kept(len(columns))
        out = torch.zeros(d, pixels, dtype=torch.float64)
        for weight, k in zip(attention.mix, kept, strict=True):
            part = scores[0][:, columns]
            smallest = part.topk(k, dim=-1).values[:, -1:]
            out += float(weight) * (part.masked_fill(part < smallest, -torch.inf).softmax(-1) @ v[0][columns])
        return out

    whole = output(list(range(d)))
    for j in range(d):
        change = output([i for i in range(d) if i != j]) - whole
        assert costs[j] == pytest.approx(float(change.square().sum()) / pixels)


def test_a_network_that_answers_with_nan_is_refused():
    network = fill(DRSformer(EVEN))
    with torch.no_grad():
        network.output.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="NaN"):
        costs_after_repair(network, pruning_groups(EVEN), patches(1))


def test_what_is_computed_again_on_the_way_back_counts_once(monkeypatch):
    network = fill(DRSformer(EXPERTS))
    groups, images = pruning_groups(network.config, KINDS), patches(2)
    scores, *_ = costs_after_repair(network, groups, images)
    monkeypatch.setattr("compress.obs.checkpoint", lambda forward, *args, use_reentrant: forward(*args))
    whole, *_ = costs_after_repair(network, groups, images)
    for name in whole:
        for cost, expected in zip(scores[name], whole[name], strict=True):
            torch.testing.assert_close(cost, expected, rtol=1e-4, atol=0)
