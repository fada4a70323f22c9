"""The benchmark of the compression's curve, on hardly any data."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from PIL import Image

from benchmarks import compression
from benchmarks.compression import Curve, curve
from compress.prune import PruneOptions
from drsformer import checkpoint
from drsformer.config import DRSformerConfig
from drsformer.model import DRSformer
from runtime.errors import InputError
from runtime.pixels import to_image
from tests.support.networks import fill, image

pytestmark = pytest.mark.slow


def test_a_curve_has_every_kind_of_network_once(tmp_path, monkeypatch):
    for place in ("light/train", "light/val"):
        for i, folder in enumerate(("input", "target")):
            (tmp_path / place / folder).mkdir(parents=True)
            Image.fromarray(to_image(image(40, 48, seed=i).numpy())).save(tmp_path / place / folder / "a.png")
    config = DRSformerConfig.regular(width=8, depths=(1, 0, 0, 0), heads=(1, 1, 1, 1), expansion=4.0)
    checkpoint.save(tmp_path / "whole.safetensors", fill(DRSformer(config)), {})
    small = PruneOptions(rounds=1, samples=1, calibration=2, patch=16, scope=("ffn",))
    kinds = {name: replace(small, importance=o.importance, recover=o.recover) for name, o in compression.PRUNED.items()}
    monkeypatch.setattr(compression, "PRUNED", kinds)
    monkeypatch.setattr(compression, "SIZE", (16, 16))
    monkeypatch.setattr("compress.latency.TIMING_SECONDS", 0)
    options = Curve(
        tmp_path / "whole.safetensors",
        tmp_path,
        tmp_path / "runs",
        tmp_path,
        macs=(0.9,),
        iterations=1,
        patch=16,
        batch=1,
    )
    assert curve(options)["errors"] == []
    results = tmp_path / "compression-whole.json"
    rows = json.loads(results.read_text())["runs"][0]["rows"]
    steps = "1 steps of 1 patches of 16x16"
    of_fraction = [*(f"0.9 {kind}" for kind in kinds), f"0.9 distilled, {steps}", f"0.9 random, {steps}"]
    assert list(rows) == ["whole", *of_fraction, f"trained on, {steps}"]
    assert rows["whole"]["light/val drop"] == 0
    for key in of_fraction:
        assert rows[key]["GMAC"] / rows["whole"]["GMAC"] == pytest.approx(0.9, abs=0.04)
        drop = rows["whole"]["light/val PSNR"] - rows[key]["light/val PSNR"]
        assert rows[key]["light/val drop"] == pytest.approx(drop, abs=0.0011)
    assert rows[f"trained on, {steps}"]["GMAC"] == rows["whole"]["GMAC"]
    assert rows[f"0.9 random, {steps}"]["to whole, mean"] < rows["0.9 recovered"]["to whole, mean"]
    assert (tmp_path / "compression-whole.png").stat().st_size > 1000
    before = results.read_text()
    monkeypatch.setattr(compression, "prune", None)  # everything is there already
    monkeypatch.setattr(compression, "distill", lambda *_: None)
    curve(options)
    assert results.read_text() == before
    with pytest.raises(InputError, match=r"compression-whole\.json: expected pairs 20 as in its rows, found 2; give"):
        curve(replace(options, limit=2))


@pytest.mark.parametrize("macs", [(), (0.0,), (0.5, 1.0)])
def test_fractions_are_between_zero_and_one(tmp_path, macs):
    with pytest.raises(InputError, match="`macs`"):
        Curve(tmp_path, tmp_path, tmp_path, tmp_path, macs=macs)
