"""What the dependency graph says of the stand-in, and that a deep network is no trouble."""

from __future__ import annotations

import torch

from compress.standin import CoupledChannels, coupled_channels
from drsformer.config import DRSformerConfig
from drsformer.model import DRSformer


def coupled(root: str, depth: int = 1) -> dict[tuple[str, str], CoupledChannels]:
    """Of a network of width 4, by layer and side; in no_grad, where there is nothing to trace otherwise."""
    config = DRSformerConfig.regular(4, (depth, 0, 0, 0), (1, 1, 1, 1), 1.0)
    with torch.device("meta"):
        network = DRSformer(config)
    with torch.no_grad():
        return {(part.layer, part.side): part for part in coupled_channels(network, [root])[root]}


def test_the_root_is_the_first():
    assert next(iter(coupled("down1_2.conv"))) == ("down1_2.conv", "outputs")


def test_channels_behind_a_concatenation_are_found():
    found = coupled("patch_embed")
    assert found["encoder_level1.0.norm1", "both"].channels.tolist() == [[0], [1], [2], [3]]
    assert found["decoder_level1.0.norm1", "both"].channels.tolist() == [[4], [5], [6], [7]]
    assert found["output", "inputs"].channels.tolist() == [[4], [5], [6], [7]]


def test_shuffles_keep_the_channels_of_the_level():
    assert coupled("down1_2.conv")["down2_3.conv", "inputs"].channels.flatten().tolist() == list(range(8))
    assert coupled("up2_1.conv")["decoder_level1.0.attn.qkv", "inputs"].channels.tolist() == [[0], [1], [2], [3]]


def test_networks_deeper_than_the_graph_counts(monkeypatch):
    monkeypatch.setattr("torch_pruning.dependency.constants.MAX_RECURSION_DEPTH", 20)
    assert coupled("patch_embed", depth=9)["output", "inputs"].channels.tolist() == [[4], [5], [6], [7]]
