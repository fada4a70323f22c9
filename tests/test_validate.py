"""The proof: a candidate that keeps its budget passes, one that does not is caught, and the page shows why."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
import runpy
import shutil
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from rich.console import Console

from drsformer import checkpoint
from drsformer.config import BlockConfig, DRSformerConfig, LevelConfig
from drsformer.metrics import psnr, psnr_rgb, ssim
from drsformer.model import DRSformer
from drsformer.session import TorchSession
from export.comparison import Comparison, Crop, Validation
from export.onnx import ExportOptions, export
from export.report import render
from export.runners import Observed, open_candidate, time_in_turn
from export.validate import ValidateOptions, _picture, table, validate
from runtime.bundle import load, save
from runtime.errors import InputError
from runtime.images import Photo, read_rgb
from runtime.pictures import Window
from runtime.session import Derainer, describe_onnx
from tests.support.bundles import make_keys
from tests.support.images import random_image
from tests.support.networks import fill


def structure(*latent: BlockConfig, **parts) -> DRSformerConfig:
    return DRSformerConfig(
        encoder=(LevelConfig(6, (BlockConfig(1, 6, 5),)), LevelConfig(4, ()), LevelConfig(8, ())),
        latent=LevelConfig(8, latent),
        decoder=(LevelConfig(8, ()), LevelConfig(6, ()), LevelConfig(10, ())),
        up=(4, 4, 4),
        feed_forward="fn",
        **parts,
    )


REFERENCE = structure(BlockConfig(2, 5, 7))
LAYERS = {"encoder_level1.0.attn": 6 * (3 + 4 + 4 + 4), "latent.0.attn": 2 * 5 * (2 + 3 + 3 + 4)}


def save_network(path: Path, config: DRSformerConfig = REFERENCE, damage: float = 0.0) -> Path:
    network = DRSformer(config)
    fill(network)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1 + damage * torch.randn(parameter.shape, generator=noise))
    checkpoint.save(path, network, {})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A reference, candidates, pairs whose targets the reference nearly reaches, others whose inputs are nearly their
    targets, and the inputs as plain images."""
    folder = tmp_path_factory.mktemp("validate")
    reference = save_network(folder / "reference.safetensors")
    save_network(folder / "damaged.safetensors", damage=0.05)
    checkpoint.save(folder / "half.safetensors", checkpoint.load(reference).model, {}, torch.bfloat16)
    export(reference, folder / "model.onnx", ExportOptions(height=32, width=40))
    restore = Derainer(TorchSession(checkpoint.load(reference).model, "cpu"))
    for i, (H, W) in enumerate([(29, 37), (32, 40), (25, 33)]):
        image = random_image(H, W, i)
        noise = np.random.default_rng(i).integers(-9, 10, image.shape)
        Photo(image).save(folder / "pairs" / "input" / f"{i}.png")
        Photo(image).save(folder / "drizzle" / "input" / f"{i}.png")
        Photo(np.clip(image + noise, 0, 255).astype(np.uint8)).save(folder / "drizzle" / "target" / f"{i}.png")
        Photo(image).save(folder / "plain" / f"{i}.png")
        Photo(np.clip(restore(image) + noise, 0, 255).astype(np.uint8)).save(folder / "pairs" / "target" / f"{i}.png")
    return folder


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["validate", *map(str, arguments)])
    monkeypatch.delitem(sys.modules, "export.validate", raising=False)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("export.validate", run_name="__main__", alter_sys=True)
    printed, error = capsys.readouterr()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, printed, error


def test_the_same_network_loses_nothing(folder):
    reference = folder / "reference.safetensors"
    found = validate(reference, reference, folder / "pairs", ValidateOptions(max_drop_db=0, min_psnr=200))
    assert found.passed
    assert found.totals["drop_db"] == found.totals["max_difference"] == found.totals["flipped"] == 0
    assert found.totals["psnr_between"] == math.inf
    assert found.selections == LAYERS
    assert not found.uncounted
    assert (found.pictures, found.timing) == ({}, None)  # which only a report needs
    summary = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert summary["psnr_between"] is None
    assert "equal on every image" in render(found)


def test_exported_network_stays_within_a_hair(folder):
    options = ValidateOptions(max_drop_db=0.001)
    found = validate(folder / "reference.safetensors", folder / "model.onnx", folder / "pairs", options)
    assert found.passed
    assert abs(found.totals["drop_db"]) < 0.001
    assert found.totals["max_difference"] <= 1
    assert found.selections == LAYERS
    assert not found.uncounted


def test_measures_are_those_of_the_metrics_module(folder):
    reference, candidate = folder / "reference.safetensors", folder / "damaged.safetensors"
    found = validate(reference, candidate, folder / "pairs", ValidateOptions(protocol="did"))
    image = random_image(29, 37, 0)
    ours, theirs = (
        Derainer(TorchSession(checkpoint.load(path).model, "cpu"))(image) for path in (reference, candidate)
    )
    target = read_rgb(folder / "pairs" / "target" / "0.png")
    first = found.images[0]
    assert first.name == "0"
    assert first.reference_psnr == psnr(ours, target, "did")
    assert first.candidate_psnr == psnr(theirs, target, "did")
    assert first.candidate_ssim == ssim(theirs, target, "did")
    assert first.psnr_between == psnr_rgb(ours, theirs)
    assert first.max_difference == np.abs(ours.astype(int) - theirs).max()
    totals = found.totals
    assert totals["drop_db"] == pytest.approx(totals["reference_psnr"] - totals["candidate_psnr"])
    assert found.verdict == "Measured, without a budget"
    assert found.passed


def test_command_passes_fails_and_refuses(folder, tmp_path, monkeypatch, capsys):
    reference, damaged = folder / "reference.safetensors", folder / "damaged.safetensors"
    common = ["--reference", reference, "--data", folder / "pairs", "--max-drop-db", "0.05"]

    status, printed, _ = run(monkeypatch, capsys, *common, "--candidate", folder / "model.onnx", "--limit", "2")
    assert status == 0
    assert "Within the budget" in printed
    assert json.loads(printed.splitlines()[-1])["images"] == 2

    status, printed, _ = run(monkeypatch, capsys, *common, "--candidate", damaged, "--report", tmp_path)
    found = json.loads(printed.splitlines()[-1])
    assert status == 1
    assert "Outside the budget" in printed
    assert found["drop_db"] > 0.05
    assert "flipped" not in found  # other weights choose differently
    assert not found["passed"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]

    status, printed, error = run(monkeypatch, capsys, *common, "--candidate", folder / "plain")
    assert status == 2
    assert printed == ""
    assert error.count("\n") == 1


def test_images_without_ground_truth(folder, tmp_path):
    reference, damaged = folder / "reference.safetensors", folder / "damaged.safetensors"
    found = validate(reference, folder / "model.onnx", folder / "plain", ValidateOptions(min_psnr=45))
    assert found.passed
    assert [image.name for image in found.images] == ["0.png", "1.png", "2.png"]
    assert "drop_db" not in found.summary()
    found = validate(reference, damaged, folder / "plain", ValidateOptions(min_psnr=45, report=tmp_path))
    assert not found.passed
    assert found.totals["psnr_between"] == min(image.psnr_between for image in found.images) < 45
    assert found.worst.psnr_between == found.totals["psnr_between"]
    assert next(iter(found.pictures)) == found.worst.name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flips_are_counted_in_a_half_precision_copy(folder, tmp_path, dtype):
    network = checkpoint.load(folder / "reference.safetensors").model
    checkpoint.save(tmp_path / "half.safetensors", network, {}, dtype)
    for pair in ("reference.safetensors", tmp_path / "half.safetensors"), (tmp_path / "half.safetensors",) * 2:
        found = validate(folder / pair[0], pair[1], folder / "plain", ValidateOptions(limit=1))
        assert found.selections == LAYERS
        assert found.images[0].flips.keys() == LAYERS.keys()
        assert found.uncounted is None
    assert found.totals["flipped"] == 0


def test_flips_of_a_bfloat16_copy(folder):
    found = validate(folder / "reference.safetensors", folder / "half.safetensors", folder / "plain")
    assert 0 < found.totals["flipped"] < sum(LAYERS.values()) / 10  # some nearly equal scores


@pytest.mark.parametrize(
    ("config", "damage"),
    [
        (REFERENCE, 1e-6),
        (structure(), 0),
        (structure(BlockConfig(2, 4, 7)), 0),
        (structure(BlockConfig(2, 5, 7), topk=("1/2",)), 0),
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "onnx"])
def test_flips_are_not_counted_between_different_weights(folder, tmp_path, config, damage, suffix):
    """Which would say nothing: each network chooses by its own weights, and is right."""
    weights = save_network(tmp_path / "other.safetensors", config, damage)
    if suffix == "onnx":
        export(weights, tmp_path / "other.onnx", ExportOptions(height=32, width=40))
    candidate = tmp_path / f"other.{suffix}"
    found = validate(folder / "reference.safetensors", candidate, folder / "plain", ValidateOptions(limit=1))
    assert "flipped" not in found.summary()
    assert not found.images[0].flips
    assert "Flips are not counted: only the same weights ought to choose alike" in Page(render(found)).text


def test_weights_are_chosen_among_those_of_a_file(folder, tmp_path, monkeypatch, capsys):
    states = {
        key: checkpoint.load(folder / f"{name}.safetensors").model.state_dict()
        for key, name in (("params", "reference"), ("params_ema", "damaged"))
    }
    torch.save(states, tmp_path / "net.pth")
    common = ["--reference", tmp_path / "net.pth", "--data", folder / "plain", "--min-psnr", "90"]
    for params, candidate in (("params", "reference"), ("params_ema", "damaged")):
        arguments = [*common, "--candidate", folder / f"{candidate}.safetensors", "--weights-key", params]
        status, printed, _ = run(monkeypatch, capsys, *arguments)
        assert status == 0
        assert json.loads(printed.splitlines()[-1])["flipped"] == 0  # the same weights
    assert run(monkeypatch, capsys, *common, "--candidate", tmp_path / "net.pth", "--weights-key", "params_ema")[0] == 1
    status, _, error = run(monkeypatch, capsys, *common, "--candidate", tmp_path / "net.pth", "--weights-key", "ema")
    assert status == 2
    assert error.startswith("error: --weights-key: expected where ")


def test_network_without_selections_has_no_flips(folder, tmp_path):
    dense = save_network(tmp_path / "dense.safetensors", structure(BlockConfig(2, 5, 7), topk=()))
    found = validate(dense, dense, folder / "plain", ValidateOptions(limit=1))
    assert found.uncounted == "the reference makes no top-k selections"


def test_model_from_elsewhere_has_no_flips(folder, tmp_path):
    model = onnx.load(folder / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    found = validate(
        folder / "reference.safetensors", tmp_path / "foreign.onnx", folder / "plain", ValidateOptions(limit=1)
    )
    assert found.uncounted
    assert "flipped" not in found.summary()


def test_real_pair(folder, real_data, tmp_path):
    found = validate(
        folder / "reference.safetensors",
        folder / "damaged.safetensors",
        real_data / "rain100l/val",
        ValidateOptions(limit=1, report=tmp_path),
    )
    assert found.images[0].drop_db is not None
    (picture,) = found.pictures.values()
    crop = picture.crop
    assert crop.input.shape == crop.candidate.shape == (96, 96, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(limit=0), "`limit`: expected at least 1, found 0"),
        (dict(data="plain", max_drop_db=0.1), "`max_drop_db`: .*no ground truth.*`min_psnr`"),
        (dict(max_drop_db=math.nan), "`max_drop_db`: expected a finite number, found nan"),
        (dict(min_psnr=math.inf), "`min_psnr`: expected a finite number, found inf"),
        (dict(data="plain", max_worst_drop_db=0.1), "`max_worst_drop_db`: .*no ground truth.*`min_psnr`"),
        (dict(data="plain", min_gain_db=0.0), "`min_gain_db`: .*no ground truth.*`min_psnr`"),
        (dict(data="missing"), "missing"),
        (dict(data="empty"), "empty"),
        (dict(data="broken"), "1.*counterpart"),
        (dict(data="tiny"), "0: SSIM needs at least 11x11 pixels"),
        (dict(candidate="model.engine"), "`candidate`: expected a bundle or a .onnx, .safetensors or .pth file"),
        (dict(candidate="missing.onnx"), "missing.onnx"),
        (dict(reference="model.onnx"), "model.onnx"),
    ],
)
def test_refuses_what_it_cannot_use(folder, options, message):
    (folder / "empty").mkdir(exist_ok=True)
    Photo(random_image(16, 16, 0)).save(folder / "broken" / "input" / "1.png")
    Photo(random_image(16, 16, 0)).save(folder / "broken" / "target" / "2.png")
    for kind in ("input", "target"):
        Photo(random_image(10, 16, 0)).save(folder / "tiny" / kind / "0.png")
    options = {"reference": "reference.safetensors", "candidate": "reference.safetensors", "data": "pairs", **options}
    places = {key: folder / options.pop(key) for key in ("reference", "candidate", "data")}
    with pytest.raises(InputError, match=message) as error:
        validate(**places, options=ValidateOptions(**options))
    assert "\n" not in str(error.value)


def test_candidate_without_file(tmp_path):
    with pytest.raises(InputError, match=r"none\.pth"):
        open_candidate(tmp_path / "none.pth")


def test_drop_where_psnr_is_infinite():
    def drop(reference: float, candidate: float) -> float | None:
        return Comparison("", 0.0, 0, {}, reference, candidate).drop_db

    assert drop(math.inf, math.inf) == 0
    assert drop(math.inf, 40.0) == math.inf
    assert drop(40.0, math.inf) == 0  # an infinite gain would hide what other images lose
    assert drop(30.0, 30.5) == -0.5


def test_budgets():
    def passed(drop: float, between: float, **budgets: float) -> bool:
        image = Comparison("", between, 1, {}, 30.0, 30.0 - drop, 0.9, 0.9)
        return Validation({}, [image], {}, None, {}, **budgets).passed

    assert passed(0.25, 40)
    assert passed(0.25, 40, max_drop_db=0.25, min_psnr=40)
    assert not passed(0.25, 40, max_drop_db=0.125)
    assert not passed(0.25, 40, max_drop_db=0.5, min_psnr=41)
    assert passed(-1, 20, max_drop_db=0)
    assert not passed(math.inf, 20, max_drop_db=1000)
    perfect, lossy = (Comparison("", 40, 1, {}, 30.0, psnr, 0.9, 0.9) for psnr in (math.inf, 29.0))
    assert not Validation({}, [perfect, lossy], {}, None, {}, max_drop_db=0.1).passed


def judged(*psnrs: tuple[float, float, float], **options) -> Validation:
    """A validation of images with these PSNRs of input, reference and candidate."""
    images = [
        Comparison(str(i), 60.0, 1, {}, reference, candidate, 0.9, 0.9, rainy, 0.8)
        for i, (rainy, reference, candidate) in enumerate(psnrs)
    ]
    return Validation({}, images, {}, None, {}, **options)


def test_network_that_is_worse_than_none_is_no_success():
    found = judged((27.7, 26.9, 26.9), origin="trained on Rain200H/train", max_drop_db=0.05, min_psnr=50)
    assert found.passed  # what was asked for
    assert found.verdict == (
        "Worse than no network: mean drop in PSNR 0.0000 dB, at most 0.05 dB (0.05 dB to spare); "
        "PSNR between the outputs 60.0000 dB, at least 50 dB (10 dB to spare)"
    )
    ours, theirs = found.warnings
    assert ours == (
        "The reference makes the images worse: its PSNR is 0.8 dB below that of the rainy input; wrong weights for the "
        "data are a common cause, and these are trained on Rain200H/train."
    )
    assert theirs == "The candidate makes the images worse: its PSNR is 0.8 dB below that of the rainy input."
    assert found.gains == {"reference": pytest.approx(-0.8), "candidate": pytest.approx(-0.8)}
    assert not judged((27.7, 26.9, 26.9), min_gain_db=0).passed
    page = render(found)
    assert '<h1 class="bad">Worse than no network</h1>' in page
    assert ours in Page(page).text
    summary = found.summary()
    assert (summary["input_psnr"], summary["input_ssim"], summary["gain_db"]) == (27.7, 0.8, -0.8)
    assert summary["warnings"] == found.warnings


def test_candidate_alone_may_be_worse_than_none():
    found = judged((27.7, 27.8, 27.6), max_drop_db=1)
    assert found.headline == "Worse than no network"
    assert [warning.split()[1] for warning in found.warnings] == ["candidate"]
    assert judged((27.7, 27.7, 27.7), max_drop_db=1).headline == "Within the budget"


def test_gain_is_the_mean_over_the_images_with_rain():
    found = judged((20, 25, 24), (30, 33, 33), (math.inf, 45, 45))
    assert found.gains == {"reference": 4, "candidate": 3.5}
    assert found.summary()["input_psnr"] is None
    assert judged((math.inf, 45, 45)).gains == {"reference": 0, "candidate": 0}


def test_an_image_that_is_restored_perfectly_does_not_hide_another_that_is_made_worse():
    found = judged((30, 31, math.inf), (30, 31, -50), min_gain_db=1)
    assert found.gains == {"reference": 1, "candidate": pytest.approx((70 - 80) / 2)}
    assert not found.passed
    assert judged((30, 40, math.inf), min_gain_db=5).passed


def test_verdict_names_every_budget_with_its_margin_failed_ones_first():
    images = (20, 25, 24.75), (20, 25, 23.75)
    found = judged(*images, max_drop_db=0.8, max_worst_drop_db=1, min_gain_db=5, min_psnr=50)
    assert not found.passed
    assert found.verdict == (
        "Outside the budget: drop in PSNR on the worst image (1) 1.2500 dB, at most 1 dB (0.25 dB too much); "
        "gain over the rainy input 4.2500 dB, at least 5 dB (0.75 dB too little); "
        "mean drop in PSNR 0.7500 dB, at most 0.8 dB (0.05 dB to spare); "
        "PSNR between the outputs 60.0000 dB, at least 50 dB (10 dB to spare)"
    )
    page = render(found)
    assert page.count("✗") == page.count("✓") == 2
    assert '<h1 class="bad">Outside the budget</h1>' in page
    assert judged(*images, max_worst_drop_db=1.25, min_gain_db=4.25).passed


@pytest.mark.parametrize(
    ("options", "mood"), [(dict(max_drop_db=1), "good"), (dict(max_drop_db=0.1), "bad"), ({}, "neutral")]
)
def test_green_is_what_keeps_a_budget(options, mood):
    assert f'<h1 class="{mood}">' in render(judged((20, 25, 24.75), **options))


@pytest.mark.parametrize(("count", "few"), [(1, "1 image;"), (9, "9 images;"), (10, None)])
def test_few_images_are_remarked(count, few):
    found = judged(*[(20, 25, 25)] * count)
    assert found.remarks == ([f"Judged on {few} fewer than 10 say little about others."] if few else [])
    assert all(remark in Page(render(found)).text for remark in found.remarks)


def test_table_fits_a_terminal_and_has_no_negative_zero():
    named = judged((27.7, 26.9, 26.90000001))
    found = dataclasses.replace(
        named, images=[dataclasses.replace(named.images[0], name="a_very_long_name_x2")], selections={"layer": 60}
    )
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table(found))
    text = capture.get()
    assert "…" not in text
    assert "27.70  26.90  26.90" in re.sub(" +", "  ", text)
    assert "-0.0000" not in text


def test_command_warns_and_gates_where_the_reference_is_of_no_use(folder, monkeypatch, capsys):
    reference = folder / "reference.safetensors"
    common = ["--reference", reference, "--candidate", reference, "--data", folder / "drizzle", "--max-drop-db", "0.05"]
    status, printed, error = run(monkeypatch, capsys, *common)
    found = json.loads(printed.splitlines()[-1])
    assert status == 0
    assert found["passed"]
    assert found["input_psnr"] > found["reference_psnr"] == found["candidate_psnr"]
    assert found["gain_db"] == pytest.approx(found["candidate_psnr"] - found["input_psnr"], abs=1e-5)
    assert "Within the budget" not in printed
    assert printed.splitlines()[-2].startswith("Worse than no network: mean drop in PSNR 0.0000 dB")
    assert f"Warning: {found['warnings'][0]}" in printed
    assert found["warnings"][0].endswith("these are of unknown training data.")
    assert error.startswith("remark: The reference makes the images worse")
    assert "Judged on 3 images" in printed

    status, printed, _ = run(monkeypatch, capsys, *common, "--min-gain-db", "0.1")
    assert status == 1
    assert printed.splitlines()[-2].startswith("Outside the budget: gain over the rainy input -")


def test_command_gates_the_worst_image(folder, monkeypatch, capsys):
    common = ["--reference", folder / "reference.safetensors", "--candidate", folder / "damaged.safetensors"]
    common += ["--data", folder / "pairs", "--max-drop-db", "99"]
    for limit, expected in (("99", 0), ("0.01", 1)):
        status, printed, _ = run(monkeypatch, capsys, *common, "--max-worst-drop-db", limit)
        assert status == expected
        assert ("Within the budget: " in printed) == (status == 0)


def test_report_beside_a_model_names_it_without_its_folder(folder, tmp_path):
    shutil.copy(folder / "model.onnx", tmp_path)
    for report, name in ((tmp_path / "report.html", "model.onnx"), (tmp_path / "a", str(tmp_path / "model.onnx"))):
        options = ValidateOptions(limit=1, report=report)
        found = validate(folder / "reference.safetensors", tmp_path / "model.onnx", folder / "pairs", options)
        assert found.facts["candidate"].startswith(f"{name}, ONNX Runtime on ")


@pytest.mark.parametrize(("height", "width"), [(300, 200), (96, 96), (5, 130)])
def test_crop_is_where_the_outputs_differ(height, width):
    image = random_image(height, width, 0)
    candidate = image.copy()
    candidate[-3:, -4:] ^= 16
    crop = _picture(image, image, candidate, None).crop
    h, w = min(96, height), min(96, width)
    assert crop.input.shape == (h, w, 3)
    top, left, *size = crop.window
    assert size == [h, w]
    assert top + h >= height - 2
    assert left + w >= width - 3
    np.testing.assert_array_equal(crop.candidate, candidate[top : top + h, left : left + w])


@pytest.mark.parametrize(("difference", "factor"), [(0, 128), (1, 128), (2, 64), (3, 64), (100, 2), (127, 2), (255, 1)])
def test_amplification_does_not_saturate(difference, factor):
    black = np.zeros((2, 2, 3), np.uint8)
    amplified, found = Crop(Window(0, 0, 2, 2), black, black, black + np.uint8(difference)).amplified()
    assert found == factor
    assert (amplified == difference * factor).all()


class Page(HTMLParser):
    """Checks that every element is closed where it should be, and collects sources and text."""

    VOID = ("meta", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.sources += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("data", ["pairs", "plain"])
def test_report_is_one_whole_page(folder, tmp_path, data):
    path = tmp_path / "deep" / "page.html"
    options = ValidateOptions(min_psnr=90, report=path)
    found = validate(
        folder / "reference.safetensors", folder / "half.safetensors", folder / data, options, command="me"
    )
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert all(source == "#look" or source.startswith("data:text/csv") for source in page.sources)
    assert not re.search(r"https?:|url\(|@import|<link|src=", text)
    assert "Outside the budget" in page.text
    assert ("SSIM, mean" in page.text) == (data == "pairs")
    for fact in (
        found.facts["SHA-256 of the candidate"],
        "torch 2.",
        "UTC",
        "GMAC for 256x256",
        "parameters, millions",
    ):
        assert fact in page.text
    assert found.facts["command"] == "me"
    assert found.timing
    assert f"milliseconds for 256x256{found.timing.reference_ms:.1f}{found.timing.candidate_ms:.1f}" in page.text
    assert f"medians of {found.timing.rounds} runs in turn on one image of 256x256: PyTorch on cpu against" in page.text
    assert json.loads(json.dumps(found.summary()))["timing"]["ratio"] == found.timing.ratio
    pictures = json.loads(re.findall(r'id="pictures">(.*?)</script>', text, re.DOTALL)[0])
    assert [picture["name"] for picture in pictures] == list(found.pictures)
    for picture, name in zip(pictures, found.pictures, strict=True):
        kinds = ["rainy", "reference", "candidate", *(["clean"] if data == "pairs" else [])]
        assert list(picture["layers"]) == kinds
        assert [kind for kind, _ in picture["crops"]][:-1] == kinds
        _, source = picture["crops"][2]
        crop = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))
        np.testing.assert_array_equal(crop, found.pictures[name].crop.candidate)


def test_the_two_are_timed_in_turn_on_a_size_that_the_candidate_takes(monkeypatch):
    order = []

    class Slow:
        multiple, limits = 8, (((8, 16), (24, 32)),)

        def __init__(self, name: str) -> None:
            self.name, self.session, self.description = name, self, f"{name} on cpu, trained"

        def run(self, batch):
            order.append((self.name, batch.shape[2:]))
            time.sleep(0.002 if self.name == "a" else 0.008)
            return batch

    monkeypatch.setattr("export.runners.TIMED_SECONDS", 0.0)
    found = time_in_turn(cast("Observed", Slow("a")), cast("Observed", Slow("b")))
    assert order[-4:] == [("b", (24, 32)), ("a", (24, 32)), ("a", (24, 32)), ("b", (24, 32))]
    assert (found.size, found.rounds) == ((24, 32), 3)
    assert str(found) == "medians of 3 runs in turn on one image of 24x32: a on cpu against b on cpu"
    assert found.candidate_ms > found.reference_ms > 2
    assert found.ratio > 1


def test_equal_outputs_and_tiny_gains_are_told_in_words_and_without_a_minus():
    equal = Validation({}, [Comparison("a", math.inf, 0, {}, 30.0, 30.0, 0.9, 0.9)], {}, None, {})
    row = dict(zip(("name", *(column.field for column in equal.columns)), equal.last_row(), strict=True))
    assert (row["psnr_between"], row["max_difference"], row["drop_db"]) == ("equal", "0", "+0.0000")
    assert equal.cells(equal.images[0])[-2:] == ["equal", "0"]
    near = Validation({}, [Comparison("a", 90.0, 1, {}, 30.0, 30.00000001, 0.9, 0.9)], {}, None, {}, max_drop_db=0.1)
    assert near.last_row()[-2:] == ["≥ 90.00", "≤ 1"]
    assert "-0.0000" not in " ".join((*near.last_row(), near.verdict, json.dumps(near.summary())))
    assert '"drop_db": 0.0,' in json.dumps(near.summary())


def test_report_survives_odd_names_and_infinite_numbers():
    images = [
        Comparison("<b>&\"'.png", math.inf, 0, {}, math.inf, math.inf, 1.0, 1.0),
        Comparison("[red]", 50.0, 1, {}, math.inf, 40.0, 1.0, 0.9),
    ]
    found = Validation({"a<b": "c&d"}, images, {}, None, {}, max_drop_db=0.1)
    page = Page(render(found))
    assert "<b>&\"'.png" in page.text
    assert "a<b" in page.text
    assert not found.passed
    assert json.loads(json.dumps(found.summary(), allow_nan=False))["drop_db"] is None
    assert table(found).row_count == 3


def test_table_of_many_images_is_cut():
    images = [Comparison(f"{i}", 50.0, 1, {}) for i in range(60)]
    assert table(Validation({}, images, {}, None, {})).row_count == 50 + 2


def test_bundle_records_what_was_measured(folder, tmp_path):
    save(describe_onnx(Path(shutil.copy(folder / "model.onnx", tmp_path))), tmp_path)
    paths = dict(reference=folder / "reference.safetensors", candidate=tmp_path, data=folder / "pairs")
    recorded = ValidateOptions(provider="cpu", record=True)
    found = validate(**paths, options=dataclasses.replace(recorded, max_drop_db=1.0)).summary()
    (drift,) = load(tmp_path).manifest.drift
    assert (drift.file, drift.provider, drift.protocol, drift.images) == ("model.onnx", "cpu", "rain200", 3)
    assert (drift.drop_db, drift.psnr_between) == (found["drop_db"], found["psnr_between"])
    assert drift.reference_sha256 == checkpoint.load(folder / "reference.safetensors").sha256
    validate(**paths | {"data": folder / "plain"}, options=recorded)
    validate(**paths, options=recorded)  # again, in place of the first
    validate(**paths | {"reference": folder / "damaged.safetensors"}, options=recorded)
    found = load(tmp_path).manifest.drift
    assert [d.protocol for d in found] == [None, "rain200", "rain200"]
    assert [d.reference_sha256 == drift.reference_sha256 for d in found] == [True, True, False]


def test_signed_bundles_stay_signed(folder, tmp_path):
    bundle, keys = tmp_path / "bundle", make_keys(tmp_path)
    bundle.mkdir()
    save(describe_onnx(Path(shutil.copy(folder / "model.onnx", bundle))), bundle)
    paths = folder / "reference.safetensors", bundle, folder / "pairs"
    recorded = ValidateOptions(provider="cpu", record=True)
    validate(*paths, dataclasses.replace(recorded, sign=keys / "private.pem"))  # which it was not before
    assert load(bundle, keys / "public.pem").manifest.drift
    with pytest.raises(InputError, match="is a signed bundle, and a change needs a new signature"):
        validate(*paths, recorded)
    with pytest.raises(InputError, match="expected a signature of"):
        validate(*paths, dataclasses.replace(recorded, sign=keys / "others-private.pem"))
    load(bundle, keys / "public.pem").verify()
    validate(*paths, ValidateOptions(provider="cpu"))  # which changes nothing


@pytest.mark.parametrize(
    ("sign", "message"), [("missing.pem", "found no file at"), ("plain.png", "expected an Ed25519 private key")]
)
def test_key_is_looked_at_before_the_work(folder, tmp_path, monkeypatch, sign, message):
    monkeypatch.setattr("export.runners.open_reference", None)
    save(describe_onnx(Path(shutil.copy(folder / "model.onnx", tmp_path))), tmp_path)
    shutil.copy(folder / "plain" / "0.png", tmp_path / "plain.png")
    paths = folder / "reference.safetensors", tmp_path, folder / "pairs"
    with pytest.raises(InputError, match=message):
        validate(*paths, ValidateOptions(record=True, sign=tmp_path / sign))
    with pytest.raises(InputError, match="`sign`: expected `record` with it"):
        validate(*paths, ValidateOptions(sign=tmp_path / sign))


def test_stray_image_beside_damaged_pairs(folder, tmp_path):
    shutil.copytree(folder / "pairs", tmp_path / "pairs")
    shutil.copy(folder / "plain" / "0.png", tmp_path / "pairs" / "preview.png")
    (tmp_path / "pairs" / "target" / "1.png").unlink()
    with pytest.raises(InputError, match="1"):
        validate(folder / "reference.safetensors", folder / "model.onnx", tmp_path / "pairs")


def test_bundle_that_misses_the_budget_records_nothing(folder, tmp_path):
    save(describe_onnx(Path(shutil.copy(folder / "model.onnx", tmp_path))), tmp_path)
    options = ValidateOptions(min_psnr=99, record=True)
    assert not validate(folder / "damaged.safetensors", tmp_path, folder / "pairs", options).passed
    assert not load(tmp_path).manifest.drift


def test_only_bundles_record(folder):
    paths = folder / "reference.safetensors", folder / "model.onnx", folder / "pairs"
    with pytest.raises(InputError, match="`record`: expected a bundle as `candidate`"):
        validate(*paths, ValidateOptions(record=True))


def test_the_layer_that_departs_is_told(folder, tmp_path):
    save(describe_onnx(Path(shutil.copy(folder / "model.onnx", tmp_path))), tmp_path)
    for candidate in (folder / "model.onnx", tmp_path):
        found = validate(
            folder / "damaged.safetensors", candidate, folder / "pairs", ValidateOptions(min_psnr=99, locate=True)
        )
        assert not found.passed
        assert "No layer departs from float32" in found.summary()["located"]  # the fault is in the weights
    with pytest.raises(InputError, match=r"`locate`: expected a \.onnx file or a bundle as `candidate`, found"):
        validate(*[folder / "reference.safetensors"] * 2, folder / "pairs", ValidateOptions(locate=True))


def test_tiles_against_the_whole(folder, tmp_path):
    reference = folder / "reference.safetensors"
    options = ValidateOptions(tile=(16, 24), overlap=4, report=tmp_path)
    found = validate(reference, reference, folder / "pairs", options)
    assert found.uncounted == "each tile makes selections of its own"
    assert found.facts["tiles"] == "16x24, 4 pixels of overlap"
    assert "16x24, 4 pixels of overlap" in (tmp_path / "report.html").read_text()
    assert found.totals["psnr_between"] < 60  # attention looks at tiles only
    assert "flipped" not in found.summary()
    session = TorchSession(checkpoint.load(reference).model, "cpu")
    tiled = Derainer(session, tile=(16, 24), overlap=4)(random_image(29, 37, 0))
    assert found.images[0].candidate_psnr == psnr(tiled, read_rgb(folder / "pairs" / "target" / "0.png"))
    found = validate(reference, reference, folder / "pairs", ValidateOptions(tile=(64, 64)))
    assert found.totals["max_difference"] == 0  # each image is one tile


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tile=(64, 60)), "`tile`: expected multiples of 8, to which images are padded, found 64x60"),
        (dict(overlap=8), "overlap only with a tile"),
        (dict(tile=(64, 64), overlap=40), "overlap of 0 to 32 pixels"),
    ],
)
def test_refuses_tiles_that_are_none(folder, options, message):
    reference = folder / "reference.safetensors"
    with pytest.raises(InputError, match=message):
        validate(reference, reference, folder / "plain", ValidateOptions(**options))


def test_tiles_on_the_command_line(folder, monkeypatch, capsys):
    reference = folder / "reference.safetensors"
    arguments = ["--reference", reference, "--candidate", reference, "--data", folder / "plain", "--tile"]
    status, printed, _ = run(monkeypatch, capsys, *arguments, "16x24")
    assert status == 0
    assert "Flips are not counted: each tile makes selections of its own." in printed
    for tile, message in (
        ("64", "--tile: expected height and width as HxW such as 720x1280, found '64'"),
        ("64x60", "--tile: expected multiples of 8, to which images are padded, found 64x60"),
    ):
        status, _, error = run(monkeypatch, capsys, *arguments, tile)
        assert status == 2
        assert error == f"error: {message}\n"


def test_image_that_does_not_fit_is_not_cut_unasked(folder, tmp_path):
    export(folder / "reference.safetensors", tmp_path / "fixed.onnx", ExportOptions(height=16, width=24))
    candidates = folder / "reference.safetensors", tmp_path / "fixed.onnx", folder / "pairs"
    with pytest.raises(InputError, match=r"0: expected an image that the candidate takes as a whole, .*; give `tile`"):
        validate(*candidates)
    assert validate(*candidates, ValidateOptions(tile=(16, 24))).facts["tiles"].startswith("16x24")


def test_what_tiles_cost_is_not_recorded(folder, tmp_path):
    save(describe_onnx(Path(shutil.copy(folder / "model.onnx", tmp_path))), tmp_path)
    with pytest.raises(InputError, match="`record`: expected whole images"):
        validate(
            folder / "reference.safetensors", tmp_path, folder / "pairs", ValidateOptions(tile=(16, 16), record=True)
        )
