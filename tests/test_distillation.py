"""The ablation of the distillation's terms, on hardly any data."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from benchmarks import distillation
from benchmarks.distillation import VARIANTS
from compress.options import LossWeights
from drsformer import checkpoint
from drsformer.config import preset
from drsformer.model import DRSformer
from runtime.pixels import to_image
from tests.support.networks import fill, image


@pytest.fixture
def data(tmp_path):
    for place in ("light/train", "light/val"):
        for i, folder in enumerate(("input", "target")):
            (tmp_path / place / folder).mkdir(parents=True)
            Image.fromarray(to_image(image(40, 48, seed=i).numpy())).save(tmp_path / place / folder / "a.png")
    return tmp_path


def test_every_variant_is_distilled_and_scored_once(data, tmp_path):
    for name in ("teacher", "student"):
        checkpoint.save(tmp_path / f"{name}.safetensors", fill(DRSformer(preset("drsformer-tiny"))), {})
    options = dict(
        teacher=tmp_path / "teacher.safetensors",
        student=tmp_path / "student.safetensors",
        data=data,
        run_dir=tmp_path / "runs",
        output=tmp_path,
        iterations=2,
        batch=1,
        patch=16,
    )
    assert distillation.distillation(**options)["errors"] == []
    (run,) = json.loads((tmp_path / "distillation.json").read_text())["runs"]
    assert list(run["rows"]) == ["teacher", "student before", *VARIANTS]
    assert run["rows"]["teacher"]["light/val PSNR"] == run["rows"]["student before"]["light/val PSNR"]
    scores = {row["light/val PSNR"] for row in run["rows"].values()}
    assert len(scores) > 4  # the variants are not all the same


def test_the_default_is_one_of_them():
    assert LossWeights() in VARIANTS.values()
