"""The whole way on a tiny network: render rain, train, export, prove, derain."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from drsformer import checkpoint
from drsformer.data import find_pairs
from drsformer.evaluation import evaluate_model, evaluate_restored
from drsformer.recipe import Hardware, Recipe
from drsformer.rendering import render_folder
from drsformer.train import TrainOptions, train
from export.onnx import export
from export.validate import ValidateOptions, validate
from runtime.derain import DerainOptions, derain


def test_from_photographs_to_a_proven_model(tmp_path):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for i in range(3):
        ramp = np.linspace(20 * i, 150, 43 * 29 * 3).reshape(43, 29, 3).astype(np.uint8)
        Image.fromarray(ramp).save(photographs / f"{i}.png")
    render_folder(photographs, tmp_path / "data", strength=0.5)
    recipe = Recipe(iterations=3, batch=2, patch=16, constant=0)
    hardware = Hardware(accelerator="cpu", devices="1")
    train(TrainOptions(tmp_path / "run", [tmp_path / "data"], "drsformer-tiny", recipe=recipe, hardware=hardware))
    weights, model = tmp_path / "run" / "last.safetensors", tmp_path / "model.onnx"

    assert max(a.difference for a in export(weights, model).agreements) < 1e-4
    options = ValidateOptions(max_drop_db=0.01, report=tmp_path / "report.html")
    proof = validate(weights, model, tmp_path / "data", options)
    assert proof.passed
    assert "<html" in (tmp_path / "report.html").read_text()

    derain(tmp_path / "data" / "input", tmp_path / "derained", DerainOptions(model))
    by_weights = evaluate_model(checkpoint.load(weights).model, find_pairs(tmp_path / "data"))
    by_files = evaluate_restored(tmp_path / "derained", tmp_path / "data" / "target")
    assert abs(by_weights.psnr - by_files.psnr) < 0.01
    assert json.dumps(by_files.summary())
