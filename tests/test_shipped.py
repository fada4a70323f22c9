"""What ships does what the README says of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from drsformer import checkpoint
from drsformer.data import find_pairs
from drsformer.metrics import psnr, psnr_rgb
from drsformer.rendering import add_rain, draw_streaks
from runtime import Derainer
from runtime.images import list_images, read_rgb
from runtime.ort import SHIPPED, OrtSession

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "weights" / "drsformer-xs.safetensors"


@pytest.fixture(scope="module")
def derain() -> Derainer:
    return Derainer(provider="cpu")


def test_default_model_was_made_from_the_shipped_weights():
    metadata = OrtSession().metadata
    assert metadata["weights_sha256"] == checkpoint.file_sha256(WEIGHTS)
    assert metadata["size_multiple"] == "8"
    assert onnx.load(SHIPPED).ir_version == 9  # ONNX Runtime 1.17 knows no later one


def test_weights_stay_small():
    assert sum(path.stat().st_size for path in (ROOT / "weights").glob("*.safetensors")) <= 10_000_000
    assert sum(path.stat().st_size for path in (ROOT / "weights" / "teacher").iterdir()) <= 60_000_000


@pytest.mark.parametrize("name", ["chelsea", "coffee", "rocket"])
def test_removes_rain_and_leaves_dry_photographs_alone(derain, name):
    dry = read_rgb(ROOT / "docs" / "photographs" / f"{name}.jpg")[:240, :320]
    rainy = add_rain(dry, draw_streaks(np.random.default_rng(1), *dry.shape[:2]))
    assert psnr(derain(rainy), dry) > psnr(rainy, dry) + 2
    assert psnr_rgb(derain(dry), dry) > 33


@pytest.mark.parametrize(("folder", "gain"), [("rain100l/val", 7), ("rain200h/val", 10)])
def test_gain_on_real_pairs(real_data, derain, folder, gain):
    scores = [
        (psnr(derain(rainy), clean), psnr(rainy, clean))
        for rainy, clean in (pair.load() for pair in find_pairs(real_data / folder)[:3])
    ]
    after, before = np.mean(scores, axis=0)
    assert after > before + gain


def test_photographs_of_real_rain_stay_photographs(real_data, derain):
    """There is no ground truth: the output is neither the input nor far from it."""
    for path in list_images(real_data / "real")[:2]:
        rainy = read_rgb(path)
        assert 18 < psnr_rgb(derain(rainy), rainy) < 60
