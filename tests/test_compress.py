"""What every command of the package has in common: it answers at once, and its public names are there."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import compress
from compress import groups
from compress.cost import count
from compress.distill import DistillOptions, distill
from compress.grow import GrowOptions, grow
from compress.prune import PruneOptions, read_inputs
from drsformer import checkpoint, counts
from drsformer.config import DRSformerConfig
from drsformer.model import DRSformer
from drsformer.recipe import Hardware, Recipe
from drsformer.train import TrainOptions, train
from runtime.errors import InputError
from tests.support.images import noise, save

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["", ".cost", ".distill", ".grow", ".prune", ".quantize", ".search"])
def test_pytorch_waits_until_it_is_needed(name):
    """So that --help answers at once, and a missing package is one line."""
    code = f"import sys, compress{name}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "drsformer.config" in done.stdout.split()
    assert not {"torch", "onnx", "onnxruntime", "matplotlib", "lightning_fabric"} & set(done.stdout.split())


def test_public_names():
    public = {name: getattr(compress, name) for name in compress.__all__}
    assert public["remove"] is groups.remove
    with pytest.raises(AttributeError, match="no attribute 'shrink'"):
        compress.shrink  # noqa: B018


def test_every_command_takes_the_weights_that_are_named(tmp_path, monkeypatch):
    """Of a file that holds two networks, which differ in width so that they can be told apart."""
    narrow, wide = (DRSformerConfig.regular(width, (0, 0, 0, 1), (1, 1, 1, 1)) for width in (4, 8))
    torch.save(
        {"params": DRSformer(narrow).state_dict(), "params_ema": DRSformer(wide).state_dict()}, tmp_path / "n.pth"
    )
    checkpoint.save(tmp_path / "student.safetensors", DRSformer(narrow), {})
    for kind in ("input", "target"):
        save(tmp_path / "data" / kind / "a.png", noise(0))
    weights, data, key = tmp_path / "n.pth", tmp_path / "data", {"weights_key": "params_ema"}

    assert count(weights, **key).network.params == counts.params(wide)
    assert count(weights, weights).ratios()["params"] == 1

    grow(weights, tmp_path / "grown.safetensors", GrowOptions((0, 0, 0, 2), **key))
    assert checkpoint.load(tmp_path / "grown.safetensors").model.config.encoder[0].width == 8

    options = PruneOptions(macs=0.5, samples=1, calibration=2, patch=16)
    assert read_inputs(weights, [data], options).trained.model.config == narrow
    inputs = read_inputs(weights, [data], replace(options, **key))
    assert inputs.trained.model.config == wide
    assert inputs.key["weights_key"] == "params_ema"  # steps of one are not those of the other

    monkeypatch.setattr("drsformer.loop.fit", lambda fabric, model, *args, loss=None, **options: (model, loss))
    recipe, cpu = Recipe(iterations=1, patch=16), Hardware(accelerator="cpu", devices="1")
    student = str(tmp_path / "student.safetensors")
    taught, loss = distill(DistillOptions(tmp_path / "d", weights, student, [data], recipe=recipe, hardware=cpu, **key))
    assert (taught.config, loss.run_teacher.__self__.config) == (narrow, wide)
    trained, _ = train(TrainOptions(tmp_path / "t", [data], init=weights, recipe=recipe, hardware=cpu, **key))
    assert trained.config == wide
    with pytest.raises(InputError, match="`weights_key`: expected `init` with it"):
        TrainOptions(tmp_path / "t", [data], **key)
