"""What is left of a pruned network does what the whole one did, as far as it can; and never less than before."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from compress.groups import PrunedIndices, Removal, origins, pruning_groups, remove
from compress.linear_maps import LinearMap, Passing
from compress.recover import PIXELS, _NormalEquations, _ridge_regression, patch_weights, recover
from drsformer.model import DRSformer
from runtime.errors import InputError
from tests.support.networks import fill, image
from tests.support.pruning import EVEN, EXPERTS, ODD, doubled, patches

NETWORKS = {"even": EVEN, "odd": ODD, "experts": EXPERTS}


@torch.no_grad()
def distance(a: DRSformer, b: DRSformer, images: list[Tensor]) -> float:
    """Mean squared difference of what they make of the images."""
    return sum(float((a(x[None]) - b(x[None])).square().mean()) for x in images) / len(images)


def psnr(a: DRSformer, b: DRSformer, images: list[Tensor]) -> float:
    return -10 * math.log10(distance(a, b, images) + 1e-20)


def pruned_and_recovered(whole: DRSformer, units: PrunedIndices, images: list[Tensor]) -> tuple[DRSformer, DRSformer]:
    pruned = remove(whole, units)
    return pruned, recover(whole, pruned, origins(whole.config, [Removal(units)]), images)


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
@torch.no_grad()
def test_images_that_pass_map_by_map_come_out_as_from_the_network(config):
    network, images = fill(DRSformer(config)), [image(16, 24, seed) for seed in range(2)]
    passing, names = Passing(network, images), []
    while passing.map:
        names.append(passing.map.name)
        passing.advance()
    layers = {name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d) and layer.groups == 1}
    assert len(names) == len(set(names))
    assert set(names) == {name for name in layers if ".experts." not in name}
    for image_, output in zip(images, passing.outputs, strict=True):
        assert (output - network(image_)).abs().max() < 1e-5


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
@torch.no_grad()
def test_what_a_map_wrote_is_read_off_the_stream_that_follows(config):
    network = fill(DRSformer(config))
    passing = Passing(network, [image(16, 16)])
    seen = 0
    while passing.map:
        before: LinearMap = passing.map
        (output,) = passing.advance() or [None]
        if before.written and passing.map:
            expected = output + before.stream[0] if before.adds else output
            assert torch.equal(before.written(passing.map.stream[0]), expected), before.name
            seen += 1
    assert seen >= 2 * sum(len(level.blocks) for level in config.levels().values()) + 5


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_a_network_of_which_nothing_is_removed_stays_as_it_is(config):
    network = fill(DRSformer(config))
    pruned = copy.deepcopy(network)
    assert recover(network, pruned, origins(config, []), patches(4)) is pruned


@pytest.mark.parametrize("pixels", [PIXELS, 2048])
@pytest.mark.parametrize("name", ["encoder_level1.0.ffn", "latent.0.ffn", "decoder_level1.0.ffn"])
def test_what_was_there_twice_comes_back(name, pixels, monkeypatch):
    monkeypatch.setattr("compress.recover.PIXELS", pixels)
    whole = doubled(fill(DRSformer(EVEN)), name)
    (group,) = (group for group in pruning_groups(EVEN) if group.name == name)
    units = {name: [list(range(1, group.units, 2))] * 2}
    pruned, recovered = pruned_and_recovered(whole, units, patches(8, 64))
    unseen = [image(64, 64, 50)[0]]
    assert psnr(pruned, whole, unseen) < 60
    assert psnr(recovered, whole, unseen) > psnr(pruned, whole, unseen) + 30
    assert psnr(recovered, whole, unseen) > 80  # at 40 dB, that is less than 1e-4 dB


CASES = {
    "hidden channels": (EVEN, {"encoder_level2.0.ffn": [[0, 2, 5], [1, 3, 4]]}),
    "hidden channels of an odd MSFN": (ODD, {"encoder_level2.0.ffn": [[0, 2, 5], [1, 3, 4]]}),
    "head": (EVEN, {"latent.0.attn": [[1, 2]]}),
    "channels of heads": (EVEN, {"decoder_level1.0.attn.head_dim": [[1, 7], [2, 5]]}),
    "experts": (EXPERTS, {"mefc_early.steps.0": [[1]]}),
    "residual path": (EVEN, {"encoder_level2.width": [[1]], "decoder_level3.width": [[0, 9]], "up2_1.width": [[2]]}),
    "first level": (EXPERTS, {"encoder_level1.width": [[3]]}),
    "block": (EVEN, {"encoder_level2": [[1]]}),
    "first block": (EVEN, {"encoder_level2": [[0]]}),
    "all blocks": (EVEN, {"encoder_level2": [[0, 1]], "decoder_level1": [[0]], "encoder_level1": [[0]]}),
}


@pytest.mark.parametrize(("config", "units"), CASES.values(), ids=CASES)
def test_recovered_is_closer_to_the_whole(config, units):
    whole, images = fill(DRSformer(config)), patches(8)
    pruned, recovered = pruned_and_recovered(whole, units, images)
    assert recovered is not pruned
    assert recovered.config == pruned.config
    unseen = [image(32, 32, 50 + seed)[0] for seed in range(3)]
    assert distance(recovered, whole, unseen) < 0.9 * distance(pruned, whole, unseen)


@pytest.mark.parametrize("seed", range(3))
def test_what_would_be_worse_is_not_taken(seed):
    """By two small patches there is too little to go by, and the one that is held out says so."""
    whole, images = fill(DRSformer(EVEN)), patches(2, 8)
    units: PrunedIndices = {"latent.0.ffn": [[seed], [seed + 1]]}
    pruned, recovered = pruned_and_recovered(whole, units, images)
    held_out = images[-1:]
    assert recovered is pruned or distance(recovered, whole, held_out) < distance(pruned, whole, held_out)


def test_rounds_of_pruning_are_recovered_against_the_whole():
    whole, images = fill(DRSformer(EVEN)), patches(8, 64)
    rounds = [
        {"encoder_level2": [[0]], "encoder_level1.0.ffn": [[1], [2]], "latent.0.attn": [[3]]},
        {"encoder_level2.0.ffn": [[0, 4], [1, 3]], "latent.width": [[0]], "latent.0.attn.head_dim": [[0]] * 6},
    ]
    network = whole
    for done in (1, 2):
        pruned = remove(network, rounds[done - 1])
        network = recover(whole, pruned, origins(EVEN, map(Removal, rounds[:done])), images)
        assert distance(network, whole, images[-2:]) < distance(pruned, whole, images[-2:])


def test_recovery_wants_patches_to_fit_to_and_to_judge_by():
    whole = fill(DRSformer(EVEN))
    with pytest.raises(InputError, match="at least 2, found 1"):
        recover(whole, copy.deepcopy(whole), origins(EVEN, []), patches(1))


def test_images_with_less_rain_count_more():
    images = [torch.zeros(1, 3, 8, 8)] * 3
    weights = patch_weights(images, [image + change for image, change in zip(images, (0.1, 0.2, 0.0), strict=True)])
    assert weights[2] > weights[0] > weights[1]
    assert weights.mean() == pytest.approx(1)
    assert weights[2] < 30 * weights[1]


def test_a_weaker_ridge_is_tried_where_a_stronger_one_is_worse():
    """The first makes the held-out error larger than the one before it did, and one further on leaves least."""
    inputs = torch.diag(torch.tensor([10.0, 0.01], dtype=torch.float64))
    fit = _NormalEquations(inputs, torch.tensor([[1.0, 0.1]], dtype=torch.float64), 2.0)
    check = _NormalEquations(inputs, torch.tensor([[-1.0, 0.1]], dtype=torch.float64), 2.0)
    change = _ridge_regression(fit, check)
    assert change is not None
    assert check.left(change) < 1.4
