"""Training: the schedule, the patches, exact resumption, several processes, and mistakes told in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from drsformer import checkpoint
from drsformer.config import preset
from drsformer.data import find_pairs
from drsformer.model import DRSformer
from drsformer.train import Hardware, Patches, Recipe, l1_loss, train
from runtime.cli import InputError

CPU = Hardware(accelerator="cpu", devices="1")
QUICK = {"patch": 16, "batch": 2, "ema": 0.5, "constant": 0}


@pytest.fixture
def data(tmp_path) -> Path:
    """Four pairs of a grey gradient with white bars on it."""
    rng = np.random.default_rng(0)
    for i in range(4):
        clean = np.broadcast_to(np.linspace(0, 150, 40)[:, None, None], (40, 30, 3)).astype(np.uint8)
        rainy = clean + (rng.random((1, 30, 1)) < 0.2) * np.uint8(80)
        for kind, image in (("input", rainy), ("target", clean)):
            (tmp_path / "data" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / "data" / kind / f"{i}.png")
    return tmp_path / "data"


def test_default_recipe_is_the_released_schedule():
    recipe = Recipe()
    assert [recipe.learning_rate(i) for i in (0, 50_000, 92_000)] == [3e-4] * 3
    assert recipe.learning_rate(196_000) == pytest.approx((3e-4 + 1e-6) / 2)
    assert recipe.learning_rate(299_999) == pytest.approx(1e-6, rel=1e-3)
    assert (recipe.batch, recipe.patch, recipe.clip, recipe.weight_decay, recipe.ema) == (8, 128, 0.01, 1e-4, 0.0)


def test_warmup_and_short_schedules():
    recipe = Recipe(iterations=10, constant=0, warmup=4, lr=1.0, lr_min=0.0)
    rates = [recipe.learning_rate(i) for i in range(10)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert Recipe(iterations=1).learning_rate(0) == 3e-4  # the constant part may be longer than all


def test_patches_depend_on_seed_and_number_alone(data):
    folders = [find_pairs(data)]
    one = Patches(folders, Recipe(patch=16), rendered=0.5, dry=0.1)
    two = Patches(folders, Recipe(patch=16), rendered=0.5, dry=0.1, cache_bytes=0)
    for number in (0, 7, 10**9):
        assert all(torch.equal(a, b) for a, b in zip(one[number], two[number], strict=True))
        assert one[number][0].shape == (3, 16, 16)
    assert not torch.equal(one[0][1], one[1][1])
    assert not torch.equal(one[0][1], Patches(folders, Recipe(patch=16, seed=1), rendered=0.5, dry=0.1)[0][1])
    assert two.cache == {}


def test_patches_are_pairs_rendered_or_dry_as_asked(data):
    folders = [find_pairs(data)]
    dry = Patches(folders, Recipe(patch=16), dry=1.0)
    assert all(torch.equal(*dry[i]) for i in range(20))
    for patches in (Patches(folders, Recipe(patch=16)), Patches([], Recipe(patch=16), data / "target", rendered=1.0)):
        rained = [(patches[i][0] - patches[i][1]) for i in range(30)]
        assert all((difference >= 0).all() for difference in rained)
        assert np.mean([difference.max().item() > 0.1 for difference in rained]) > 0.5


def test_images_smaller_than_a_patch_are_mirrored(data):
    rainy, clean = Patches([find_pairs(data)], Recipe(patch=64))[3]
    assert rainy.shape == clean.shape == (3, 64, 64)


def run(data: Path, output: Path, **changes) -> dict[str, float]:
    recipe = Recipe(**{"iterations": 4, **QUICK, **changes})
    every = recipe.iterations // 2
    return train(output, [data], "drsformer-tiny", validate=[data], recipe=recipe, hardware=CPU,
                 validate_every=every, log_every=every // 2, save_minutes=0)  # fmt: skip


def test_training_learns_and_leaves_a_checkpoint_that_says_what_it_is(data, tmp_path):
    scores = run(data, tmp_path / "run", iterations=40, lr=2e-3, clip=1.0)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["l1"] for line in log if "l1" in line]
    assert losses[-1] < 0.6 * losses[0]
    loaded = checkpoint.load(tmp_path / "run" / "last.safetensors")
    name = f"{data.parent.name}/data"
    assert loaded.provenance["trained_on"] == [name]
    assert loaded.provenance["scores"] == scores
    assert loaded.provenance["steps"][0]["options"]["lr"] == 2e-3
    assert scores[f"{name} psnr"] == log[-1][f"{name} psnr"]
    assert any(path.name.startswith("events.out.tfevents") for path in (tmp_path / "run").iterdir())
    best = max(line[f"{name} psnr"] for line in log if f"{name} psnr" in line)
    assert checkpoint.load(tmp_path / "run" / "best.safetensors").provenance["scores"][f"{name} psnr"] == best


def command(data: Path, output: Path, *more: str) -> list[str]:
    options = {"patch": 16, "batch": 2, "ema": 0.5, "constant": 0, "iterations": 40, "save-minutes": 0, "log-every": 1}
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "drsformer.train", "--network", "drsformer-tiny", "--data", str(data),
            "--output", str(output), "--accelerator", "cpu", *flags, *more]  # fmt: skip


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


def test_killed_run_continues_exactly(data, tmp_path):
    """kill -9 in the middle, the same command again: bit for bit the network of an undisturbed run."""
    process = subprocess.Popen(command(data, tmp_path / "killed"), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    log = tmp_path / "killed" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 8):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    interrupted = torch.load(tmp_path / "killed" / "state.pt", weights_only=True)["iteration"]
    assert 0 < interrupted < 40
    recipe = Recipe(iterations=40, **QUICK)
    for name in ("killed", "whole"):
        train(tmp_path / name, [data], "drsformer-tiny", recipe=recipe, hardware=CPU, log_every=1, save_minutes=1e9)
    killed, whole = (
        checkpoint.load(tmp_path / name / "last.safetensors").model.state_dict() for name in ("killed", "whole")
    )
    for name, tensor in whole.items():
        assert torch.equal(killed[name], tensor), name
    iterations = [json.loads(line)["iteration"] for line in log.read_text().splitlines()]
    assert iterations == list(range(1, 41))


def test_two_processes_train_on_what_one_would(data, tmp_path):
    """Two gloo processes with batches of two see the patches of one with batches of four, and take the same steps."""
    recipe = Recipe(iterations=3, **{**QUICK, "batch": 4})
    train(tmp_path / "one", [data], "drsformer-tiny", recipe=recipe, hardware=CPU)
    result = subprocess.run(command(data, tmp_path / "two", "--devices", "2", "--iterations", "3"), env=ENVIRONMENT,
                            capture_output=True, text=True, timeout=300)  # fmt: skip
    assert result.returncode == 0, result.stderr
    one, two = (checkpoint.load(tmp_path / name / "last.safetensors").model.state_dict() for name in ("one", "two"))
    torch.manual_seed(0)
    start = DRSformer(preset("drsformer-tiny")).state_dict()
    moved = max((one[name] - start[name]).abs().max().item() for name in one)
    apart = max((one[name] - two[name]).abs().max().item() for name in one)
    assert apart < 0.05 * moved


def test_run_with_other_options_is_not_continued(data, tmp_path):
    run(data, tmp_path / "run")
    run(data, tmp_path / "run")  # finished: nothing to do
    with pytest.raises(InputError, match=r"lr=0.0003, not 0.01"):
        run(data, tmp_path / "run", lr=0.01)


def test_damaged_state_is_told(data, tmp_path):
    run(data, tmp_path / "run")
    state = tmp_path / "run" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(InputError, match="damaged"):
        run(data, tmp_path / "run")


def test_loss_that_is_not_a_number_stops_the_run(data, tmp_path):
    with pytest.raises(InputError, match="not a number at iteration"):
        run(data, tmp_path / "run", lr=1e30, clip=1e30, iterations=20)


def test_training_continues_from_a_checkpoint(data, tmp_path):
    run(data, tmp_path / "first")
    parent = tmp_path / "first" / "last.safetensors"
    train(tmp_path / "second", [data], init=parent, recipe=Recipe(iterations=2, **QUICK), hardware=CPU)
    child = checkpoint.load(tmp_path / "second" / "last.safetensors")
    assert child.provenance["parent"] == checkpoint.file_sha256(parent)
    assert len(child.provenance["steps"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "drsformer-xxl"}, "drsformer-tiny"),
        ({"data": []}, "nothing to train on"),
        ({"data": ["nowhere"]}, "nowhere"),
        ({"init": "absent.safetensors"}, "no such checkpoint"),
    ],
)
def test_mistakes_are_told_in_one_line(data, tmp_path, options, message):
    folders = [tmp_path / folder for folder in options.pop("data", [data])]
    options = {name: Path(value) if name == "init" else value for name, value in options.items()}
    with pytest.raises(InputError, match=message) as error:
        train(tmp_path / "run", folders, recipe=Recipe(iterations=1, **QUICK), hardware=CPU, **options)
    assert "\n" not in str(error.value)


def test_patch_that_does_not_fit_the_network_is_refused():
    with pytest.raises(InputError, match="multiple of 8, found 20"):
        Recipe(patch=20)


def test_l1_loss_is_the_mean_absolute_error():
    terms = l1_loss(lambda rainy: rainy * 0.5, torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    assert terms["l1"].item() == 0.5
