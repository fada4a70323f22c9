"""The formula for parameters and MACs against PyTorch's counter, and the command."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from compress.cost import command
from drsformer import checkpoint
from drsformer.config import FEED_FORWARDS, BlockConfig, DRSformerConfig, MEFCConfig, preset
from drsformer.counts import items, macs, params
from drsformer.model import DRSformer
from tests.support.networks import SMALL, fill


def odd_config() -> DRSformerConfig:
    """No two widths alike, a level without blocks, experts that are not there."""
    config = DRSformerConfig.regular(**SMALL)
    encoder, latent, (d3, d2, d1) = config.encoder, config.latent, config.decoder
    block = BlockConfig(3, 5, 7)
    return dataclasses.replace(
        config,
        encoder=(
            encoder[0],
            dataclasses.replace(encoder[1], width=20, blocks=(block, BlockConfig(1, 2, 4))),
            dataclasses.replace(encoder[2], blocks=()),
        ),
        latent=dataclasses.replace(latent, width=52),
        decoder=(dataclasses.replace(d3, width=9, blocks=(block,)), d2, dataclasses.replace(d1, width=12 + 6)),
        up=(11, 13, 6),
        mefc_early=MEFCConfig(5, (("none", "sep_conv_5x5", "avg_pool_3x3"), ("none", "none", "none"))),
        mefc_late=MEFCConfig.regular(),
    )


CONFIGS = {
    "drsformer": preset("drsformer"),
    "drsformer-tiny": preset("drsformer-tiny"),  # no MEFC
    "odd": odd_config(),
    "dense": dataclasses.replace(odd_config(), topk=()),
    **{kind: dataclasses.replace(odd_config(), feed_forward=kind) for kind in FEED_FORWARDS[1:]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_formula_equals_pytorchs_counter(name):
    config = CONFIGS[name]
    with torch.device("meta"):
        model = DRSformer(config)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 40, 24))
    assert macs(config, 40, 24) == counter.get_total_flops() / 2
    assert params(config) == sum(p.numel() for p in model.parameters())
    for module in {item.module for item in items(config)}:
        expected = sum(p.numel() for p in model.get_submodule(module).parameters())
        assert sum(item.params for item in items(config) if item.module == module) == expected, module


def test_released_networks_cost_what_the_paper_says():
    assert macs(preset("drsformer")) / 1e9 == pytest.approx(242.98, abs=5e-3)
    assert macs(preset("drsformer-nomefc")) / 1e9 == pytest.approx(175.37, abs=5e-3)


def test_command_compares_two_networks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("compress.latency.TIMING_SECONDS", 0.0)
    paths = tmp_path / "small.safetensors", tmp_path / "large.safetensors"
    configs = [DRSformerConfig.regular(width, (depth, 0, 0, 0), (1, 1, 1, 1)) for width, depth in ((4, 0), (24, 1))]
    for path, config in zip(paths, configs, strict=True):
        checkpoint.save(path, fill(DRSformer(config)), {})
    costs = command(paths[0], latency=True, size=(32, 64), vs=paths[1])
    summary = json.loads(json.dumps(costs.summary()))
    assert summary["params"] == params(configs[0])
    assert summary["gmacs"] == pytest.approx(macs(configs[0]) / 1e9, abs=1e-4)
    assert summary["ms_quartiles"][0] <= summary["ms"] <= summary["ms_quartiles"][1]
    assert 0 < summary["ratio"]["gmacs"] < 1
    assert 0 < summary["ratio"]["ms"] < 1
    assert summary["ratio"]["ms"] == pytest.approx(summary["ms"] / summary["vs"]["ms"], rel=1e-2, abs=1e-4)  # rounded
    assert "encoder_level1" in capsys.readouterr().out


def test_without_latency_nothing_is_timed(tmp_path):
    checkpoint.save(tmp_path / "w.safetensors", fill(DRSformer(preset("drsformer-tiny"))), {})
    summary = command(tmp_path / "w.safetensors").summary()
    assert set(summary) == {"params", "gmacs", "modules"}
    modules = summary["modules"]
    assert list(modules)[:3] == ["patch_embed", "encoder_level1", "down1_2"]
    assert sum(module["params"] for module in modules.values()) == summary["params"]
    assert sum(module["gmacs"] for module in modules.values()) == pytest.approx(summary["gmacs"], abs=1e-4)
    assert modules["patch_embed"] == {"params": 216, "gmacs": 0.014156, "resampling": 0.014156}  # 3 x 8 x 9 at 256x256
    latent = modules["latent"]
    assert latent["attention"] + latent["ffn"] == pytest.approx(latent["gmacs"], abs=2e-6)
