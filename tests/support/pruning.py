"""What the tests of pruning and of recovery share: small networks of every build, and one with redundancy."""

from __future__ import annotations

import copy
import dataclasses

from torch import Tensor

from compress.groups import pruning_groups
from drsformer.config import DRSformerConfig, MEFCConfig
from drsformer.model import DRSformer
from tests.support.networks import image

EVEN = DRSformerConfig.regular(8, (1, 2, 1, 1), (1, 2, 2, 4), 2.0)
ODD = DRSformerConfig.regular(8, (1, 1, 1, 1), (1, 1, 1, 1), 1.7)
EXPERTS = dataclasses.replace(
    EVEN,
    mefc_early=MEFCConfig(6, (("none", "sep_conv_3x3", "avg_pool_3x3"), ("dil_conv_5x5", "none", "sep_conv_1x1"))),
    mefc_late=MEFCConfig(6, (("sep_conv_1x1", "avg_pool_3x3"), ("none", "none"))),
)


def patches(count: int = 6, side: int = 32) -> list[Tensor]:
    return [image(side, side, seed)[0] for seed in range(count)]


def doubled(network: DRSformer, name: str) -> DRSformer:
    """A copy in which every second unit of an MSFN does what the one before it does."""
    network = copy.deepcopy(network)
    state = network.state_dict()
    (group,) = (group for group in pruning_groups(network.config) if group.name == name)
    for dimension in group.dims:
        for part in dimension.slices:
            if part.role != "reads":
                weight = state[part.tensor].movedim(part.dim, 0)
                weight[part.units[1::2].flatten()] = weight[part.units[0::2].flatten()]
    return network
