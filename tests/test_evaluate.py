"""Scores of networks and of folders, as functions and as the command."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import runpy
import shutil
import sys
import types
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from drsformer import checkpoint, evaluation, metrics
from drsformer.config import preset
from drsformer.data import find_pairs
from drsformer.evaluate import ROWS_SHOWN, EvaluateOptions, command, evaluate, open_network, table
from drsformer.evaluation import (
    RESTORED,
    evaluate_derainer,
    evaluate_model,
    evaluate_restored,
    evaluate_without_reference,
)
from drsformer.metrics import Scores
from drsformer.model import DRSformer
from drsformer.session import TorchSession
from export.onnx import export
from runtime.bundle import save
from runtime.errors import InputError
from runtime.images import read_rgb
from runtime.session import Derainer, describe_onnx
from tests.support.networks import fill

SHIPPED = Path(__file__).parents[1] / "weights" / "drsformer-xs.safetensors"


class Offset(nn.Module):
    """Adds a constant to every pixel."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image + self.value


def write(path: Path, image: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return image


@pytest.fixture
def data(tmp_path) -> Path:
    """Three pairs of odd sizes; the second one is dry."""
    rng = np.random.default_rng(0)
    for name, (H, W) in {"1": (13, 17), "2": (16, 24), "10": (11, 12)}.items():
        clean = write(tmp_path / "data" / "target" / f"{name}.png", rng.integers(60, 180, (H, W, 3), dtype=np.uint8))
        rain = rng.integers(0, 60, (H, W, 1), dtype=np.uint8) * (name != "2")
        write(tmp_path / "data" / "input" / f"{name}.png", clean + rain)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def network() -> DRSformer:
    model = DRSformer(preset("drsformer-tiny"))
    fill(model)
    return model


@pytest.fixture
def weights(tmp_path, network) -> Path:
    checkpoint.save(tmp_path / "tiny.safetensors", network, {"trained_on": ["Rain200L/train"]})
    return tmp_path / "tiny.safetensors"


@torch.no_grad()
def test_torch_session(network):
    session = TorchSession(network, "cpu")
    batch = np.random.default_rng(0).random((1, 3, 16, 24), dtype=np.float32)
    output = session.run(batch)
    assert session.multiple == 8
    assert output.dtype == np.float32
    assert np.array_equal(output, network(torch.from_numpy(batch)).numpy())


def test_torch_session_leaves_the_network_fit_for_training(network):
    TorchSession(network, "cpu").run(np.zeros((1, 3, 8, 8), np.float32))
    network(torch.zeros(1, 3, 8, 8)).sum().backward()
    assert network.output.weight.grad is not None


def test_no_cuda_device(monkeypatch, network):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert TorchSession(network, "auto").device.type == "cpu"
    with pytest.raises(InputError, match="expected a CUDA device"):
        TorchSession(network, "cuda")


@pytest.mark.parametrize("protocol", ["rain200", "did"])
def test_scores_of_a_network(data, network, protocol):
    pairs = find_pairs(data)
    scores = evaluate_model(network, pairs, protocol)
    derain = Derainer(TorchSession(network, "cpu"))
    for pair in pairs:
        rainy, clean = pair.load()
        restored = derain(rainy)
        assert scores.rows[pair.name] == {
            "psnr": metrics.psnr(restored, clean, protocol),
            "ssim": metrics.ssim(restored, clean, protocol),
            "input_psnr": metrics.psnr(rainy, clean, protocol),
            "input_ssim": metrics.ssim(rainy, clean, protocol),
        }
    assert list(scores.rows) == ["1", "2", "10"]
    assert scores.images == 3
    assert scores.psnr == pytest.approx(np.mean([row["psnr"] for row in scores.rows.values()]))
    assert scores.ssim == pytest.approx(np.mean([row["ssim"] for row in scores.rows.values()]))


def test_image_equal_to_its_target(data):
    """Counted, and out of the mean PSNR; its SSIM of 1 is in the mean."""
    scores = evaluate_model(Offset(0.0), find_pairs(data))
    assert scores.rows["2"]["psnr"] == math.inf
    assert scores.psnr == pytest.approx(np.mean([scores.rows[name]["psnr"] for name in ("1", "10")]))
    assert scores.ssim == pytest.approx(np.mean([row["ssim"] for row in scores.rows.values()]))
    summary = json.loads(json.dumps(scores.summary(), allow_nan=False))
    assert summary["identical"] == 1
    assert summary["images"] == 3
    assert summary["psnr"] == summary["input_psnr"] == pytest.approx(scores.psnr, abs=1e-6)


def test_all_images_equal_to_their_targets(data):
    scores = evaluate_restored(data / "target", data / "target")
    assert scores.psnr == math.inf
    summary = json.loads(json.dumps(scores.summary(), allow_nan=False))
    assert summary["psnr"] is None
    assert summary["identical"] == summary["images"] == 3


def test_evaluation_says_how_far_it_is_and_prints_nothing(data, network, capfd):
    told = []
    for score in (
        partial(evaluate_model, network, find_pairs(data)),
        partial(evaluate_restored, data / "input", data / "target"),
    ):
        score(on_progress=lambda *progress: told.append(progress))
    assert told == [(stage, done, 3) for stage in ("Restoring", "Measuring") for done in range(4)]
    assert not any(capfd.readouterr())


def test_network_that_answers_nan(data):
    with pytest.raises(InputError, match=r"input/1\.png: .*NaN"):
        evaluate_model(Offset(math.nan), find_pairs(data))


def test_image_too_small_for_ssim(tmp_path, network):
    for kind in ("input", "target"):
        write(tmp_path / kind / "tiny.png", np.zeros((10, 40, 3), np.uint8))
    with pytest.raises(InputError, match=r"input/tiny\.png: SSIM needs at least 11x11 pixels, found 40x10"):
        evaluate_model(network, find_pairs(tmp_path))


def test_restored_images_score_as_the_network_that_made_them(data, weights, tmp_path):
    model = checkpoint.load(weights).model
    direct = evaluate_model(model, find_pairs(data), "did", save=tmp_path / "restored")
    again = evaluate_restored(tmp_path / "restored", data / "target", "did")
    for name, row in again.rows.items():
        assert row == {metric: direct.rows[name][metric] for metric in ("psnr", "ssim")}
    assert again.summary().keys() == {"psnr", "ssim", "images", "identical", "protocol"}


def test_missing_restored_images_are_told(data, network, tmp_path):
    evaluate_model(network, find_pairs(data), save=tmp_path / "restored")
    next((tmp_path / "restored").iterdir()).unlink()
    with pytest.raises(InputError, match="found none for 1 of them"):
        evaluate_restored(tmp_path / "restored", data / "target")


def test_save_keeps_names_below_folders(network, tmp_path):
    rng = np.random.default_rng(0)
    for density in ("Heavy", "Light"):
        folder = tmp_path / "training" / f"Rain_{density}" / "train2018new"
        write(folder / "0.png", rng.integers(0, 256, (16, 32, 3), dtype=np.uint8))
    scores = evaluate_model(network, find_pairs(tmp_path / "training"), save=tmp_path / "out")
    assert list(scores.rows) == ["Rain_Heavy/0", "Rain_Light/0"]
    assert all(read_rgb(tmp_path / "out" / f"{name}.png").shape == (16, 16, 3) for name in scores.rows)


def test_save_does_not_mix_with_links_to_the_data(data, network, tmp_path):
    for path in data.glob("*/*.png"):
        (tmp_path / "elsewhere" / path.parent.name).mkdir(parents=True, exist_ok=True)
        path.rename(tmp_path / "elsewhere" / path.parent.name / f"original-{path.name}")
        path.symlink_to(tmp_path / "elsewhere" / path.parent.name / f"original-{path.name}")
    for folder in (data / "target", tmp_path / "elsewhere" / "target"):
        with pytest.raises(InputError, match="would put images among those of the data set"):
            evaluate_model(network, find_pairs(data), save=folder)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("folder", ["input", "target"])
def test_save_does_not_mix_with_the_data(data, network, folder, suffix):
    """Beside 1.jpg, a 1.png would be a second image of that name, and perhaps be taken for the target."""
    for path in data.glob("*/*.png") if suffix == ".jpg" else ():
        Image.open(path).save(path.with_suffix(suffix))
        path.unlink()
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="would put images among those of the data set"):
        evaluate_model(network, find_pairs(data), save=data / folder)
    derain = Derainer(TorchSession(network, "cpu"))
    with pytest.raises(InputError, match="would put images among those of the data set"):
        evaluate_derainer(derain, find_pairs(data), save=data / folder, origin={"network": "a"})
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before


def test_limit_takes_the_first_in_natural_order(data, weights):
    assert list(one(command(EvaluateOptions(weights, (data,), limit=2))).rows) == ["1", "2"]
    assert list(evaluate_restored(data / "input", data / "target", limit=2).rows) == ["1", "2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected `weights` and `data`, or"),
        ({"weights": Path("w")}, "expected `weights` and `data`, or"),
        ({"restored": Path("r")}, "expected `weights` and `data`, or"),
        ({"weights": Path("w"), "data": (Path("d"),), "target": Path("t")}, "expected `weights` and `data`, or"),
        ({"restored": Path("r"), "target": Path("t"), "no_reference": True}, "expected `weights` and `data`, or"),
        ({"restored": Path("r"), "target": Path("t"), "save": Path("s")}, "`save`"),
        ({"restored": Path("r"), "target": Path("t"), "limit": 0}, "`limit`: expected at least 1, found 0"),
        ({"weights": SHIPPED, "data": (Path("nowhere"),)}, "nowhere: expected a folder"),
        (
            {"weights": SHIPPED, "data": (Path("a/val"), Path("b/a/val"))},
            "`data`: expected folders whose last two names",
        ),
        (
            {"weights": SHIPPED.with_suffix(".onnx"), "data": (Path("d"),), "weights_key": "params"},
            "`weights_key`: expected a checkpoint",
        ),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(InputError, match=message):
        command(EvaluateOptions(**options))


def one(found: dict[str, Scores]) -> Scores:
    """The scores of the only data set."""
    (scores,) = found.values()
    return scores


def test_several_data_sets_are_scored_one_by_one_and_every_image_is_in_the_csv(
    monkeypatch, capsys, data, weights, tmp_path
):
    more = tmp_path / "more"
    for kind in ("input", "target"):
        write(more / kind / "a, b.png", read_rgb(data / kind / "10.png"))
    arguments = ("--weights", weights, "--data", data, more, "--csv", tmp_path / "s.csv", "--save", tmp_path / "saved")
    assert run(monkeypatch, *arguments) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = [f"{tmp_path.name}/data", f"{tmp_path.name}/more"]
    assert list(summary) == names
    assert [each["images"] for each in summary.values()] == [3, 1]
    with (tmp_path / "s.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["data", "image", "psnr", "ssim", "input_psnr", "input_ssim"]
    assert [line[:2] for line in lines] == [[names[0], name] for name in ("1", "2", "10")] + [[names[1], "a, b"]]
    assert float(lines[3][2]) == pytest.approx(summary[names[1]]["psnr"], abs=1e-6)
    assert lines[2][2:] == lines[3][2:]  # the same pair
    assert sorted(path.name for path in (tmp_path / "saved" / names[0]).glob("*.png")) == ["1.png", "10.png", "2.png"]


def test_the_function_opens_the_network_itself(data, weights):
    options = EvaluateOptions(weights, (data,))
    assert one(evaluate(options)).rows == one(command(options)).rows


def test_saved_images_of_the_same_network_are_not_restored_again(data, weights, tmp_path, monkeypatch):
    options = EvaluateOptions(weights, (data,), save=tmp_path / "saved")
    first = one(command(options))
    (tmp_path / "saved" / "2.png").unlink()
    restored = []
    monkeypatch.setattr(Derainer, "__call__", lambda self, image: restored.append(image.shape) or image)
    resumed = one(command(options))
    assert restored == [(16, 24, 3)]
    assert {name: resumed.rows[name] for name in ("1", "10")} == {name: first.rows[name] for name in ("1", "10")}


def test_a_saved_image_that_is_broken_is_named_and_not_that_of_the_data_set(data, weights, tmp_path):
    options = EvaluateOptions(weights, (data,), save=tmp_path / "saved")
    command(options)
    saved = tmp_path / "saved" / "10.png"
    saved.write_bytes(saved.read_bytes()[:60])
    with pytest.raises(InputError, match=rf"^{re.escape(str(saved))}: ") as error:
        command(options)
    assert str(data) not in str(error.value)


def test_saved_images_of_another_network_or_data_set_are_refused(data, weights, network, tmp_path):
    command(EvaluateOptions(weights, (data,), save=tmp_path / "saved"))
    checkpoint.save(tmp_path / "other.safetensors", network, {"trained_on": ["other"]})
    for others in (
        EvaluateOptions(tmp_path / "other.safetensors", (data,)),
        EvaluateOptions(weights, (tmp_path / "m",)),
    ):
        shutil.copytree(data, tmp_path / "m", dirs_exist_ok=True)
        with pytest.raises(InputError, match=r"`save`: expected images of .*, found those of tiny\.safetensors"):
            command(replace(others, save=tmp_path / "saved"))
    elsewhere = replace(open_network(weights), provider="PyTorch on cuda")
    with pytest.raises(InputError, match=r"PyTorch on cuda in .*, found those of .*PyTorch on cpu; name another"):
        evaluate(EvaluateOptions(weights, (data,), save=tmp_path / "saved"), elsewhere)
    write(tmp_path / "unknown" / "1.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(InputError, match="found those of something unknown"):
        command(EvaluateOptions(weights, (data,), save=tmp_path / "unknown"))


def test_saved_images_of_an_input_that_has_changed_are_refused_and_others_go_on(data, weights, tmp_path):
    options = EvaluateOptions(weights, (data,), save=tmp_path / "saved")
    command(replace(options, limit=2))
    before = json.loads((tmp_path / "saved" / RESTORED).read_text())["inputs"]
    assert before == {name: checkpoint.file_sha256(data / "input" / f"{name}.png") for name in ("1", "2")}
    write(data / "input" / "10.png", read_rgb(data / "input" / "10.png") // 2)  # has not been restored yet
    command(options)
    assert set(json.loads((tmp_path / "saved" / RESTORED).read_text())["inputs"]) == {"1", "2", "10"}
    write(data / "input" / "2.png", read_rgb(data / "input" / "2.png") // 2)
    with pytest.raises(InputError, match="found that of another one under the name 2; name another folder"):
        command(options)
    command(replace(options, limit=1))  # does not ask for it
    (tmp_path / "saved" / "2.png").unlink()
    command(options)  # is restored anew
    (tmp_path / "saved" / RESTORED).write_text(
        json.dumps({**json.loads((tmp_path / "saved" / RESTORED).read_text()), "inputs": 3})
    )
    with pytest.raises(InputError, match="under the name 1; name another folder"):
        command(options)


def test_a_kill_leaves_the_csv_of_the_data_sets_before(data, weights, tmp_path, monkeypatch):
    shutil.copytree(data, tmp_path / "more" / "data")
    options = EvaluateOptions(weights, (data, tmp_path / "more" / "data"), csv=tmp_path / "s.csv")
    score, calls = evaluation.evaluate_derainer, []

    def killed_at_the_second(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*given)

    monkeypatch.setattr(evaluation, "evaluate_derainer", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        evaluate(options)
    with (tmp_path / "s.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert [row["image"] for row in rows] == ["1", "2", "10"]


def test_a_table_takes_the_place_of_no_other_file_and_of_no_folder(data, weights, tmp_path):
    for path in (weights, data / "input" / "1.png"):
        with pytest.raises(InputError, match=r"`csv`: expected a name ending in \.csv"):
            EvaluateOptions(weights, (data,), csv=path)
    (tmp_path / "s.csv").mkdir()
    with pytest.raises(InputError, match="expected a file to write, found a folder"):
        evaluate(EvaluateOptions(weights, (data,), csv=tmp_path / "s.csv"))


def test_names_that_are_no_text_are_in_the_table(data, weights, tmp_path):
    pairs = tmp_path / "pairs"
    shutil.copytree(data, pairs)
    for folder in ("input", "target"):
        (pairs / folder / "1.png").rename(pairs / folder / os.fsdecode(b"\xff.png"))
    evaluate(EvaluateOptions(weights, (pairs,), csv=tmp_path / "s.csv", device="cpu"))
    assert "\\udcff," in (tmp_path / "s.csv").read_text()


def test_an_equal_image_is_said_to_be_equal():
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table(Scores({"a": {"psnr": math.inf, "ssim": 1.0}}, "rain200")))
    assert "inf" not in capture.get()
    assert capture.get().count("equal") == 2  # the image and the mean


def test_models_and_bundles_score_as_the_checkpoint_that_they_were_made_from(data, weights, tmp_path):
    export(weights, tmp_path / "bundle" / "model.onnx")
    save(describe_onnx(tmp_path / "bundle" / "model.onnx"), tmp_path / "bundle")
    paths = (weights, tmp_path / "bundle" / "model.onnx", tmp_path / "bundle")
    expected, *found = (one(command(EvaluateOptions(path, (data,), device="cpu"))) for path in paths)
    for scores in found:
        for name, row in scores.rows.items():
            assert row == pytest.approx(expected.rows[name], abs=0.01)


def test_long_table_is_cut_and_names_are_not_markup():
    scores = Scores({f"[b]{i}[/b]": {"psnr": float(i), "ssim": 0.5} for i in range(ROWS_SHOWN + 7)}, "rain200")
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table(scores))
    text = capture.get()
    assert f"[b]{ROWS_SHOWN - 1}[/b]" in text
    assert f"[b]{ROWS_SHOWN}[/b]" not in text
    assert "... and 7 more" in text
    assert f"mean of {ROWS_SHOWN + 7}" in text
    assert f"{(ROWS_SHOWN + 6) / 2:.4f}" in text


def run(monkeypatch, *arguments: object) -> object:
    """The command in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    monkeypatch.delitem(sys.modules, "drsformer.evaluate", raising=False)
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("drsformer.evaluate", run_name="__main__", alter_sys=True)
    return exit.value.code


def test_command(monkeypatch, capsys, data, weights):
    assert run(monkeypatch, "--weights", weights, "--data", data, "--device", "cpu") == 0
    output = capsys.readouterr().out
    assert output.splitlines()[0] == f"{weights} (trained on Rain200L/train) on {data}, protocol rain200"
    summary = json.loads(output.splitlines()[-1])
    assert summary["images"] == 3
    assert summary["protocol"] == "rain200"
    assert {"psnr", "ssim", "input_psnr", "input_ssim"} < summary.keys()


def test_network_that_is_worse_than_none_is_warned_of(monkeypatch, capsys, data, weights, tmp_path):
    gain = evaluate_model(checkpoint.load(weights).model, find_pairs(data)).gain_db
    assert gain is not None
    assert gain < -1
    assert run(monkeypatch, "--weights", weights, "--data", data, "--device", "cpu") == 0
    printed, error = capsys.readouterr()
    warning = f"{weights} makes the images worse: its PSNR is {-gain:.3g} dB below that of the rainy input; wrong"
    assert f"\nWarning: {warning}" in printed
    assert printed.splitlines()[-2].endswith("and these are trained on Rain200L/train.")
    assert error.startswith(f"remark: {warning}")

    network = DRSformer(preset("drsformer-tiny"))
    network.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in network.state_dict().items()})
    checkpoint.save(tmp_path / "zero.safetensors", network, {})  # adds nothing
    assert run(monkeypatch, "--weights", tmp_path / "zero.safetensors", "--data", data, "--device", "cpu") == 0
    assert not any("makes the images worse" in text for text in capsys.readouterr())


def test_gain_leaves_out_images_without_rain(data):
    assert evaluate_model(Offset(0.0), find_pairs(data)).gain_db == 0  # one of them equals its target
    rows = {"dry": {"psnr": 40.0, "input_psnr": math.inf}, "wet": {"psnr": 30.0, "input_psnr": 31.5}}
    assert Scores(rows).gain_db == -1.5
    assert evaluate_restored(data / "input", data / "target").gain_db is None


def test_command_chooses_among_the_weights_of_a_checkpoint(monkeypatch, capsys, data, network, tmp_path):
    black = {name: torch.zeros_like(tensor) for name, tensor in network.state_dict().items()}
    torch.save({"params": network.state_dict(), "params_ema": black}, tmp_path / "net.pth")
    scores = {}
    for params in ("params", "params_ema"):
        save = ("--save", tmp_path / "saved" / params)
        assert run(monkeypatch, "--weights", tmp_path / "net.pth", "--data", data, "--weights-key", params, *save) == 0
        scores[params] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["params"]["psnr"] != scores["params"]["input_psnr"]
    assert scores["params_ema"]["psnr"] == scores["params_ema"]["input_psnr"]  # what the network adds is nothing
    mixed = ("--weights", tmp_path / "net.pth", "--data", data, "--weights-key", "params", *save)
    assert run(monkeypatch, *mixed) == 2
    assert "found those of net.pth" in capsys.readouterr().err
    assert run(monkeypatch, "--weights", tmp_path / "net.pth", "--data", data, "--weights-key", "ema") == 2
    assert capsys.readouterr().err.startswith("error: --weights-key: expected where ")


def test_command_with_a_mistake(monkeypatch, capsys, data):
    assert run(monkeypatch, "--restored", data / "input", "--target", data / "nowhere") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert run(monkeypatch, "--restored", data / "input", "--target", data / "target", "--protocol", "did2") == 2


@pytest.fixture
def pyiqa(monkeypatch) -> list[tuple]:
    """A stand-in for pyiqa: NIQE is the mean of the tensor, BRISQUE its height; records what it is asked."""
    asked = []

    def create_metric(name, device=None):
        def measure(batch):
            asked.append((name, device, batch))
            return {"niqe": batch.mean(), "brisque": torch.tensor([float(batch.shape[2])])}[name]

        return measure

    module = types.ModuleType("pyiqa")
    monkeypatch.setattr(module, "create_metric", create_metric, raising=False)
    monkeypatch.setitem(sys.modules, "pyiqa", module)
    return asked


def test_no_reference(tmp_path, pyiqa):
    write(tmp_path / "a.png", np.full((96, 192, 3), 51, np.uint8))
    write(tmp_path / "b.jpg", np.full((200, 100, 3), 255, np.uint8))
    scores = evaluate_without_reference(tmp_path, "cpu")
    assert scores.rows["a.png"] == {"niqe": pytest.approx(0.2), "brisque": 96}
    assert scores.rows["b.jpg"] == {"niqe": pytest.approx(1.0), "brisque": 200}
    assert scores.summary() == {"niqe": pytest.approx(0.6), "brisque": 148, "images": 2}
    name, device, batch = pyiqa[0]
    assert (name, device) == ("niqe", torch.device("cpu"))
    assert batch.shape == (1, 3, 96, 192)
    assert batch.dtype == torch.float32


@pytest.mark.parametrize("size", [(95, 400), (96, 191), (191, 191)])
def test_image_too_small_for_niqe(tmp_path, pyiqa, size):
    write(tmp_path / "a.png", np.zeros((*size, 3), np.uint8))
    with pytest.raises(InputError, match=rf"a\.png: NIQE needs at least 192x96 pixels, found {size[1]}x{size[0]}"):
        evaluate_without_reference(tmp_path)


def test_no_reference_without_images(tmp_path, pyiqa):
    with pytest.raises(InputError, match="expected images, found none"):
        evaluate_without_reference(tmp_path)


def test_no_reference_without_pyiqa(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    write(tmp_path / "a.png", np.zeros((96, 192, 3), np.uint8))
    with pytest.raises(InputError, match=r"pip install -c constraints\.txt -e '\.\[export,iqa\]'"):
        evaluate_without_reference(tmp_path)
