"""The config refuses what cannot be a network, and keeps the released arithmetic."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

import drsformer
from drsformer import checkpoint
from drsformer.config import BlockConfig, DRSformerConfig, LevelConfig, MEFCConfig, preset


def test_kept_counts_are_the_released_ones_for_every_head_dim():
    config = preset("drsformer")
    for width in range(2, 400):
        assert config.kept(width) == (int(width / 2), int(width * 2 / 3), int(width * 3 / 4), int(width * 4 / 5))
    assert config.kept(1) == (1, 1, 1, 1)


def test_dictionary_round_trip_is_exact_for_irregular_networks():
    config = preset("drsformer")
    level = dataclasses.replace(config.latent, width=100, blocks=(BlockConfig(3, 7, 11), BlockConfig(1, 1, 1)))
    odd = dataclasses.replace(
        config, latent=level, topk=("2/7",), mefc_late=MEFCConfig(5, (("none", "avg_pool_3x3"), ("none", "none")))
    )
    assert DRSformerConfig.from_dict(odd.to_dict()) == odd


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk": ("3/4", "1/2")}, "ascending"),
        ({"topk": ("1/2", "0.5")}, "ascending"),
        ({"topk": ("3/2",)}, "ascending"),
        ({"topk": ("half",)}, "fraction"),
        ({"topk": ("1/0",)}, "fraction"),
        ({"topk": ("1e-10000000",)}, "fraction"),
        ({"topk": ("1/2",) * 65}, "at most 64 top-k fractions, found 65"),
        ({"up": (192, 96, 10**30)}, "whole numbers from 1 to 65536"),
        ({"latent": LevelConfig(384, (BlockConfig(2**10, 2**10, 8),))}, "at most 65536 channels in all heads"),
        ({"latent": LevelConfig(384, (BlockConfig(8, 48, 8),) * 257)}, "at most 256 blocks in a level, found 257"),
        ({"feed_forward": "mlp"}, "msfn, gdfn, dfn, fn"),
        ({"up": (192, 96, 40)}, "decoder level 1"),
        ({"up": (192, 96)}, "three"),
        ({"up": (192, 96, 48.0)}, "whole numbers"),
    ],
)
def test_impossible_networks_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(preset("drsformer"), **change)


def test_widths_that_cannot_be_downsampled_or_split_are_refused():
    with pytest.raises(ValueError, match="multiple of 4"):
        DRSformerConfig.regular(width=5, heads=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="heads"):
        DRSformerConfig.regular(width=8, heads=(3, 1, 1, 1))
    with pytest.raises(ValueError, match="early, late, both, none"):
        DRSformerConfig.regular(mefc="everywhere")
    with pytest.raises(ValueError, match="experts"):
        MEFCConfig.regular(9)
    with pytest.raises(ValueError, match="at most 64 steps"):
        MEFCConfig(5, (("sep_conv_1x1",),) * 65)


@pytest.mark.parametrize(
    ("gate_hidden", "steps", "message"),
    [
        (64, (("sep_conv_9x9",),), "sep_conv_9x9"),
        (64, (("avg_pool_3x3",), ()), "as many experts"),
        (64, (), "at least one step"),
        (0, (("avg_pool_3x3",),), "gate"),
        (2.5, (("avg_pool_3x3",),), "gate"),
    ],
)
def test_impossible_compensators_are_refused(gate_hidden, steps, message):
    with pytest.raises(ValueError, match=message):
        MEFCConfig(gate_hidden, steps)


@pytest.mark.parametrize(
    "damage", [{"topk": [0.5]}, {"encoder": 3}, {"extra": 1}, {"latent": {"width": 8}}, {"topk": None}]
)
def test_damaged_dictionaries_are_refused(damage):
    with pytest.raises(ValueError, match=r"config|level|top-?k"):
        DRSformerConfig.from_dict({**preset("drsformer-tiny").to_dict(), **damage})
    with pytest.raises(ValueError, match="config"):
        DRSformerConfig.from_dict({})


@pytest.mark.parametrize("module", ["drsformer", "drsformer.train", "drsformer.evaluate", "drsformer.rain"])
def test_pytorch_waits_until_it_is_needed(module):
    """So that --help answers at once, and a missing package is one line."""
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "drsformer.config" in loaded
    assert not {"torch", "safetensors", "lightning_fabric"} & set(loaded)


def test_public_names():
    public = {name: getattr(drsformer, name) for name in drsformer.__all__}
    assert (public["load"], public["preset"]) == (checkpoint.load, preset)
    with pytest.raises(AttributeError, match="no attribute 'unload'"):
        drsformer.unload  # noqa: B018
