"""Residual paths in other coordinates: the same network as long as nothing is removed, or nothing that is used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.groups import Removal, lifted, origins, pruning_groups
from compress.importance import layer_norm_grams
from compress.obs import costs_after_repair
from compress.recover import remove_and_recover
from compress.rotation import _from_ones, norms_of, remove_rotated, settled
from compress.selection import Target, prune_network, remove_only
from drsformer import counts
from drsformer.model import DRSformer, LayerNorm
from tests.support.networks import fill, image
from tests.support.pruning import EVEN, EXPERTS, ODD, patches

TURNED = {
    "encoder_level2.width",
    "encoder_level3.width",
    "latent.width",
    "decoder_level3.width",
    "decoder_level2.width",
}
FREE = {"up4_3.width", "up3_2.width"}


def widths(network: DRSformer):
    return {group.name: group for group in pruning_groups(network.config, ["width"])}


@torch.no_grad()
def difference(a: DRSformer, b: DRSformer) -> float:
    x = image(32, 24, 7)
    return float((a(x) - b(x)).abs().max())


@torch.no_grad()
def grams_of(network: DRSformer) -> dict[str, Tensor]:
    with layer_norm_grams(network) as grams:
        for patch in patches(3):
            network(patch[None])
    return grams


def random_directions(units: int, normed: bool) -> Tensor:
    generator = torch.Generator().manual_seed(units)
    rows = torch.randn(units, units, dtype=torch.float64, generator=generator)
    if normed:
        rows[0] = 1
    rows = torch.linalg.qr(rows.T)[0].T
    return rows * rows[0].sum().sign() if normed else rows


def confined(network: DRSformer, name: str, directions: Tensor, dropped: list[int]) -> DRSformer:
    """The network with nothing written into these directions of a path, and no shifts, which would need them."""
    group = widths(network)[name]
    rows = directions[[i for i in range(len(directions)) if i not in dropped]]
    with torch.no_grad():
        for part in group.dims[0].slices:
            if part.role == "writes":
                weight = network.get_parameter(part.tensor)
                matrix = lifted(rows.T @ rows, len(weight), part.units)
                weight.copy_(torch.tensordot(matrix, weight.double(), 1))
        for norm in norms_of(network, group) or {}:
            network.get_parameter(f"{norm}.bias").zero_()
    return network


@pytest.mark.parametrize("config", [EVEN, ODD, EXPERTS], ids=["even", "odd", "experts"])
def test_paths_that_can_be_rotated(config) -> None:
    network = fill(DRSformer(config))
    found = {name: norms_of(network, group) for name, group in widths(network).items()}
    assert {name for name, norms in found.items() if norms is not None} == TURNED | FREE
    assert {name for name, norms in found.items() if norms == {}} == FREE
    for name in TURNED:
        norms = found[name]
        level = name.removesuffix(".width")
        assert norms is not None
        expected = {name for name, norm in network.named_modules() if isinstance(norm, LayerNorm)}
        assert norms.keys() == {norm for norm in expected if norm.startswith(f"{level}.")}
        assert all(network.get_parameter(f"{reader}.weight").shape[1] for reader in norms.values())


@pytest.mark.parametrize("name", sorted(TURNED | FREE))
def test_directions_of_which_nothing_is_removed_change_nothing(name: str) -> None:
    network = fill(DRSformer(EVEN))
    group = widths(network)[name]
    rows = _from_ones(group.units) @ random_directions(group.units, name in TURNED)
    same = remove_rotated(network, Removal({name: [[]]}, {name: rows}), grams_of(network))
    assert difference(network, same) < 1e-5


@pytest.mark.parametrize("name", sorted(TURNED | FREE))
@pytest.mark.parametrize("dropped", [[2], [1, 2]])
def test_directions_that_nothing_writes_into_can_go(name: str, dropped: list[int]) -> None:
    network = fill(DRSformer(EVEN))
    group = widths(network)[name]
    rows = random_directions(group.units, name in TURNED)
    network = confined(network, name, rows, dropped)
    removal = settled(network, [group], {name: [dropped]}, {name: rows})
    smaller = remove_rotated(network, removal, grams_of(network))
    assert counts.macs(smaller.config) < counts.macs(network.config)
    assert difference(network, smaller) < 3e-4  # what LayerNorm adds to a variance counts more where it is smaller


@pytest.mark.parametrize("name", sorted(TURNED | FREE))
def test_what_nothing_writes_into_costs_nothing(name: str) -> None:
    network = fill(DRSformer(EVEN))
    group = widths(network)[name]
    network = confined(network, name, random_directions(group.units, name in TURNED), [2])
    scores, grams, directions = costs_after_repair(network, [group], patches(3))
    (costs,) = scores[name]
    rows = directions[name]
    least = int(costs.argmin())
    assert costs[least] < 5e-3 * costs.median()  # not nothing at all, since what is measured has a ridge
    removal = settled(network, [group], {name: [[least]]}, directions)
    if name in TURNED:
        assert torch.allclose(rows[0].abs(), torch.full_like(rows[0], len(rows) ** -0.5))
        assert costs.argmax() == 0  # the mean
        back = torch.linalg.inv(removal.rotations[name])[:, :-1]
        assert torch.allclose(back.T @ back, torch.eye(len(rows) - 1, dtype=rows.dtype), atol=1e-9)
    assert difference(network, remove_rotated(network, removal, grams)) < 3e-4


def test_channels_measure_as_before_without_rotation() -> None:
    network = fill(DRSformer(EVEN))
    groups = pruning_groups(EVEN)
    scores, _, directions = costs_after_repair(network, groups, patches(2), rotate=False)
    turned = costs_after_repair(network, groups, patches(2))
    assert directions == {}
    assert turned.directions.keys() == TURNED | FREE
    for group in groups:
        same = all(map(torch.equal, scores[group.name], turned.scores[group.name]))
        assert same == (group.name not in turned.directions)


def test_units_that_stay_come_first() -> None:
    network = fill(DRSformer(EVEN))
    groups = pruning_groups(EVEN)
    directions = costs_after_repair(network, groups, patches(2)).directions
    name = "decoder_level2.width"
    units = {name: [[3, 1]], "latent.0.ffn": [[0], [1]], "latent.width": [[]]}
    removal = settled(network, groups, units, directions)
    n = len(directions[name])
    assert removal.units == {**units, name: [[n - 2, n - 1]]}
    assert removal.rotations.keys() == {name}
    rotation = removal.rotations[name]
    assert torch.equal(rotation[n - 2 :], directions[name][[3, 1]])
    ones = (rotation[: n - 2] @ torch.ones(n, dtype=torch.float64)).abs()
    assert torch.allclose(ones, torch.full_like(ones, (n / (n - 2)) ** 0.5))  # so the mean is the mean of what stays


def test_where_a_rotated_output_comes_from_after_two_rounds() -> None:
    network = fill(DRSformer(EVEN))
    name, tensor = "decoder_level2.width", "decoder_level2.0.ffn.project_out.weight"
    n = widths(network)[name].units
    rotations = [random_directions(n, True), random_directions(n - 1, True)]
    first = Removal({name: [[n - 1]]}, {name: rotations[0]})
    second = Removal({name: [[n - 2]], "decoder_level2.0.ffn": [[0], [1]]}, {name: rotations[1]})
    third = Removal({name: [[0]]})
    found = origins(EVEN, [first, second, third])[tensor]
    assert found.tensor == tensor
    assert torch.allclose(found.kept[0], (rotations[1][: n - 2] @ rotations[0][: n - 1])[1:])
    x = torch.randn(1, n, 2, 3)
    assert torch.allclose(found.of_output(x)[0, :, 1, 2].double(), found.kept[0] @ x[0, :, 1, 2].double(), atol=1e-5)


def test_recovered_in_rotated_coordinates_is_closer_to_the_whole() -> None:
    """In two rounds, by all that `compress.prune` does; and closer than without rotation."""
    whole, images = fill(DRSformer(EVEN)), patches(8, 64)
    for name, group in widths(whole).items():  # paths that use few of their directions, but all of their channels
        if name in TURNED:
            rows = random_directions(group.units, True)
            confined(whole, name, rows, list(range(group.units * 2 // 3, group.units)))
    target = Target("macs", counts.macs, 0.8 * counts.macs(EVEN))

    def pruned(rotate: bool, recovered: bool) -> DRSformer:
        def repair(network, rounds, grams):
            return remove_and_recover(network, rounds, grams, whole, images)

        return prune_network(
            whole,
            [target],
            lambda network, groups: costs_after_repair(network, groups, images[:4], rotate),
            repair=repair if recovered else remove_only,
            scope=["width"],
            round_to=1,
            rounds=2,
        )

    unseen = [image(64, 64, 50 + seed) for seed in range(2)]

    @torch.no_grad()
    def error(network: DRSformer) -> float:
        return sum(float((network(x) - whole(x)).square().mean()) for x in unseen)

    assert error(pruned(True, True)) < error(pruned(True, False))
    assert error(pruned(True, False)) < error(pruned(False, False))
    assert error(pruned(True, True)) < error(pruned(False, True))
