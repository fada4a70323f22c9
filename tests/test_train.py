"""Training: the schedule, the patches, exact resumption, several processes, and mistakes told in one line."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from drsformer import checkpoint, loop
from drsformer.config import DRSformerConfig, preset
from drsformer.data import dataset_name, find_pairs
from drsformer.evaluation import evaluate_model
from drsformer.loop import Run, fit, l1_loss
from drsformer.model import DRSformer
from drsformer.patches import Patches
from drsformer.recipe import DataOptions, Hardware, Recipe, Schedule, Variant, read_config
from drsformer.train import TrainOptions, train
from runtime.errors import InputError

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
    short = Recipe(iterations=300)  # keeps the paper's proportion of constant to falling rates
    assert [short.learning_rate(i) for i in (0, 91, 92)] == [3e-4] * 3
    assert short.learning_rate(299) < 1.1e-6


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
    flipped = {tuple(one[number][1].diff(dim=1).sign().unique().tolist()) for number in range(20)}
    assert len(flipped) > 1  # the gradient runs down in some, up in others


def test_patches_are_pairs_rendered_or_dry_as_asked(data):
    folders = [find_pairs(data)]
    dry = Patches(folders, Recipe(patch=16), dry=1.0)
    assert all(torch.equal(*dry[i]) for i in range(20))
    for patches in (Patches(folders, Recipe(patch=16)), Patches([], Recipe(patch=16), data / "target", rendered=1.0)):
        rained = [(patches[i][0] - patches[i][1]) for i in range(30)]
        assert all((difference >= 0).all() for difference in rained)
        assert np.mean([difference.max().item() > 0.1 for difference in rained]) > 0.5


def test_compressed_patches_have_the_noise_of_a_codec_on_both_images(data):
    plain, compressed = (Patches([find_pairs(data)], Recipe(patch=16), dry=0.5, compressed=c) for c in (0.0, 1.0))
    for number in range(20):
        before, after = plain[number], compressed[number]
        assert torch.equal(*before) == torch.equal(*after)  # a dry patch stays dry, noise and all
        for image, noisy in zip(before, after, strict=True):
            assert (image - noisy).abs().mean() < 0.1
    assert sum(not torch.equal(plain[i][1], compressed[i][1]) for i in range(20)) > 10  # some are flat
    half = Patches([find_pairs(data)], Recipe(patch=16), compressed=0.5)
    plain = Patches([find_pairs(data)], Recipe(patch=16))
    assert 20 < sum(torch.equal(half[i][0], plain[i][0]) for i in range(80)) < 60
    again = Patches([find_pairs(data)], Recipe(patch=16), compressed=0.5)
    assert all(torch.equal(a, b) for i in range(20) for a, b in zip(half[i], again[i], strict=True))


def test_compressed_patches_need_pyav_before_the_training_starts(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    Patches([find_pairs(data)], Recipe(patch=16))
    with pytest.raises(InputError, match="PyAV, which is not installed; run: pip install av"):
        Patches([find_pairs(data)], Recipe(patch=16), compressed=0.1)


def test_fractions_that_add_up_to_one_leave_no_patch_to_pairs(data):
    for rendered, dry in ((0.9, 0.1), (0.7, 0.3), (1 / 3, 2 / 3), (0.6, 0.39999999999)):
        patches = Patches([], Recipe(patch=16), data / "target", rendered=rendered, dry=dry)
        assert patches.unpaired == 1


def test_images_smaller_than_a_patch_are_mirrored(data):
    rainy, clean = Patches([find_pairs(data)], Recipe(patch=64))[3]
    assert rainy.shape == clean.shape == (3, 64, 64)


def run(data: Path, output: Path, **changes) -> dict[str, float]:
    recipe = Recipe(**{"iterations": 4, **QUICK, **changes})
    every = recipe.iterations // 2
    return train(
        TrainOptions(
            output,
            [data],
            "drsformer-tiny",
            data_options=DataOptions([data]),
            recipe=recipe,
            hardware=CPU,
            schedule=Schedule(every, every // 2, 0),
        )
    )


def test_training_learns_and_leaves_a_checkpoint_that_says_what_it_is(data, tmp_path):
    scores = run(data, tmp_path / "run", iterations=40, lr=2e-3, clip=1.0)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["l1"] for line in log if "l1" in line]
    assert losses[-1] < 0.6 * losses[0]
    loaded = checkpoint.load(tmp_path / "run" / "last.safetensors")
    name = f"{data.parent.name}/data"
    assert loaded.provenance["trained_on"] == [name]
    assert {**loaded.provenance["scores"], "iteration": 40, "finished": True} == scores
    assert loaded.provenance["steps"][0]["options"]["lr"] == 2e-3
    assert scores[f"{name} psnr"] == log[-1][f"{name} psnr"]
    assert any(path.name.startswith("events.out.tfevents") for path in (tmp_path / "run").iterdir())
    best = max(line[f"{name} psnr"] for line in log if f"{name} psnr" in line)
    assert checkpoint.load(tmp_path / "run" / "best.safetensors").provenance["scores"][f"{name} psnr"] == best


def command(data: Path, output: Path, *more: str) -> list[str]:
    options = {"patch": 16, "batch": 2, "ema": 0.5, "constant": 0, "iterations": 40, "save-minutes": 0, "log-every": 1}
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [
        sys.executable,
        "-m",
        "drsformer.train",
        "--network",
        "drsformer-tiny",
        "--data",
        str(data),
        "--output",
        str(output),
        "--accelerator",
        "cpu",
        *flags,
        *more,
    ]


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
    with log.open("ab") as file:  # what a machine may leave that crashes
        file.write(b'\0\0\xff\0{"iteration": 3}\n{"a": 1}\n7\n')
    recipe = Recipe(iterations=40, **QUICK)
    for name in ("killed", "whole"):
        train(
            TrainOptions(
                tmp_path / name,
                [data],
                "drsformer-tiny",
                recipe=recipe,
                hardware=CPU,
                schedule=Schedule(log_every=1, save_minutes=1e9),
            )
        )
    killed, whole = (
        checkpoint.load(tmp_path / name / "last.safetensors").model.state_dict() for name in ("killed", "whole")
    )
    for name, tensor in whole.items():
        assert torch.equal(killed[name], tensor), name
    iterations = [json.loads(line)["iteration"] for line in log.read_text().splitlines()]
    assert iterations == list(range(1, 41))


def test_training_says_how_far_it_is_and_prints_nothing(data, tmp_path, capfd, caplog):
    told, recipe = [], Recipe(iterations=4, **QUICK)
    options = TrainOptions(
        tmp_path / "run", [data], "drsformer-tiny", recipe=recipe, hardware=CPU, schedule=Schedule(log_every=2)
    )
    with caplog.at_level(logging.DEBUG, "drsformer.loop"):
        train(options, on_progress=lambda stage, done, total, remark="": told.append((stage, done, total, remark)))
    assert [entry[:3] for entry in told] == [("Training", done, 4) for done in range(5)]
    assert [bool(re.fullmatch(r"loss \d\.\d{4}, \d+\.\d patches/s", entry[3])) for entry in told] == [0, 0, 1, 1, 1]
    begin, *lines, end = [record.message for record in caplog.records if record.name == "drsformer.loop"]
    assert begin == "0.25 M parameters, 4 backgrounds, on cpu"
    assert lines == (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert end == f"Finished after 4 iterations: {tmp_path / 'run' / 'last.safetensors'}"
    assert not capfd.readouterr().out


def test_command_shows_its_log_where_there_is_no_terminal(data, tmp_path):
    words = command(data, tmp_path / "run", "--iterations", "3")
    result = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert json.loads(result.stdout) == {"iteration": 3, "finished": True}
    shown = result.stderr.splitlines()
    assert shown[0] == "0.25 M parameters, 4 backgrounds, on cpu"
    assert [line for line in shown if line.startswith("{")] == (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert shown[-1].startswith("Finished after 3 iterations: ")


def test_full_disk_leaves_the_last_state(tmp_path):
    """The limit on the size of a file stands in for the disk."""
    run = Run(tmp_path, {}, {})
    run.save_state({"iteration": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            run.save_state({"iteration": 2, "model": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run.restore() == {"iteration": 1}


def test_run_killed_between_its_state_and_its_network_leaves_both_after_all(data, tmp_path):
    run(data, tmp_path)
    written = (tmp_path / "last.safetensors").read_bytes()
    (tmp_path / "last.safetensors").unlink()
    run(data, tmp_path)
    assert (tmp_path / "last.safetensors").read_bytes() == written


@pytest.mark.parametrize("launcher", ["devices", "torchrun"])
def test_two_processes_train_on_what_one_would(data, tmp_path, launcher):
    """Two gloo processes see the patches of one and take the same steps; one of them reports."""
    recipe = Recipe(iterations=3, **{**QUICK, "batch": 4})
    train(TrainOptions(tmp_path / "one", [data], "drsformer-tiny", recipe=recipe, hardware=CPU))
    words = command(data, tmp_path / "two", "--batch", "4", "--iterations", "3", "--validate", str(data))
    if launcher == "torchrun":
        words[1:2] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    else:
        words += ["--devices", "2"]
    result = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    scores = [f"{data.parent.name}/data {metric}" for metric in ("psnr", "ssim")]
    assert list(json.loads(result.stdout)) == [*scores, "iteration", "finished"]
    one, two = (checkpoint.load(tmp_path / name / "last.safetensors").model.state_dict() for name in ("one", "two"))
    torch.manual_seed(0)
    start = DRSformer(preset("drsformer-tiny")).state_dict()
    moved = max((one[name] - start[name]).abs().max().item() for name in one)
    apart = max((one[name] - two[name]).abs().max().item() for name in one)
    assert apart < 0.05 * moved


def test_batch_that_cannot_be_shared_out_is_refused(data, tmp_path):
    words = command(data, tmp_path / "run", "--batch", "3", "--devices", "2")
    result = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert "--batch: expected a multiple of the 2 devices, found 3" in result.stderr


def test_workers_cut_the_same_patches(data, tmp_path):
    for workers in (0, 2):
        hardware = Hardware(accelerator="cpu", devices="1", workers=workers)
        train(
            TrainOptions(
                tmp_path / str(workers),
                [data],
                "drsformer-tiny",
                data_options=DataOptions(rendered=0.5),
                recipe=Recipe(iterations=2, **QUICK),
                hardware=hardware,
            )
        )
    assert (tmp_path / "0/last.safetensors").read_bytes() == (tmp_path / "2/last.safetensors").read_bytes()
    pickle.dumps(Patches([find_pairs(data)], Recipe()))  # for systems that do not fork


def test_bfloat16_and_channels_last_train_the_same_network_but_for_rounding(data, tmp_path):
    variants = {"plain": {}, "bf16": {"precision": "bf16-mixed"}, "nhwc": {"channels_last": True}}
    states = {}
    for name, options in variants.items():
        hardware = Hardware(accelerator="cpu", devices="1", **options)
        train(
            TrainOptions(
                tmp_path / name, [data], "drsformer-tiny", recipe=Recipe(iterations=2, **QUICK), hardware=hardware
            )
        )
        model = checkpoint.load(tmp_path / name / "last.safetensors").model
        states[name] = torch.cat([tensor.flatten() for tensor in model.parameters()])
    assert states["plain"].dtype == states["bf16"].dtype == torch.float32
    assert (states["plain"] - states["nhwc"]).abs().mean() < 1e-4
    assert 0 < (states["plain"] - states["bf16"]).abs().mean() < 1e-3


def test_best_network_is_the_averaged_one_with_the_highest_score(data, tmp_path, monkeypatch):
    """Through a restart: the scores are 10, 30, then the run is stopped, then, resumed, 20 and 25 dB."""
    answers, seen = iter([10.0, 30.0, None, 20.0, 25.0]), []

    def evaluate(network, pairs, protocol):
        psnr = next(answers)
        if psnr is None:
            raise KeyboardInterrupt
        seen.append((network.patch_embed.weight.clone(), len(pairs)))
        return SimpleNamespace(psnr=psnr, ssim=0.5)

    def go():
        recipe = Recipe(iterations=4, **{**QUICK, "ema": 0.9})
        return train(
            TrainOptions(
                tmp_path / "run",
                [data],
                "drsformer-tiny",
                data_options=DataOptions([data], 3),
                recipe=recipe,
                hardware=CPU,
                schedule=Schedule(1, 1, 0),
            )
        )

    monkeypatch.setattr(loop, "evaluate_model", evaluate)
    with pytest.raises(KeyboardInterrupt):
        go()
    scores = go()
    assert go() == scores  # finished: nothing to do, the same answer
    name = f"{data.parent.name}/data psnr"
    assert scores[name] == 25.0
    best, last = (checkpoint.load(tmp_path / "run" / f"{which}.safetensors") for which in ("best", "last"))
    assert (best.provenance["scores"][name], last.provenance["scores"][name]) == (30.0, 25.0)
    assert torch.equal(best.model.patch_embed.weight, seen[1][0])
    assert torch.equal(last.model.patch_embed.weight, seen[3][0])
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert not torch.equal(state["model"]["patch_embed.weight"], seen[3][0])
    assert {count for _, count in seen} == {3}


def test_run_with_other_options_is_not_continued(data, tmp_path):
    run(data, tmp_path / "run")
    run(data, tmp_path / "run")  # finished: nothing to do
    with pytest.raises(InputError, match=r"lr=0.0003, not 0.01"):
        run(data, tmp_path / "run", lr=0.01)


def test_validation_follows_the_protocol_and_a_run_is_continued_with_the_same(data, tmp_path):
    recipe, pairs = Recipe(iterations=1, **QUICK), find_pairs(data)

    def go(**changes):
        return train(
            TrainOptions(
                tmp_path / "run",
                [data],
                "drsformer-tiny",
                data_options=DataOptions([data], **changes),
                recipe=recipe,
                hardware=CPU,
            )
        )

    scores = go(protocol="did")
    made = checkpoint.load(tmp_path / "run" / "last.safetensors")
    expected = [evaluate_model(made.model, pairs, protocol).psnr for protocol in ("did", "rain200")]
    assert scores[f"{dataset_name(data)} psnr"] == pytest.approx(expected[0], abs=1e-6)
    assert abs(expected[0] - expected[1]) > 1e-4
    assert made.provenance["steps"][0]["options"]["protocol"] == "did"
    with pytest.raises(InputError, match="protocol=did, not rain200"):
        go()


def test_validation_folders_that_cannot_be_told_apart_are_refused(data, tmp_path):
    twin = tmp_path / "more" / data.parent.name / "data"
    with pytest.raises(InputError, match="`validate`: expected folders whose last two names differ, found"):
        DataOptions([data, twin]).validation()


def test_folders_have_two_names_however_they_are_given(tmp_path, monkeypatch):
    (tmp_path / "rain" / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "rain" / "train")
    names = {dataset_name(Path(given)) for given in (".", "../train", "../../rain/train", "input/..", Path.cwd())}
    assert names == {"rain/train"}
    assert dataset_name(Path("..")) == f"{tmp_path.name}/rain"
    assert dataset_name(Path("light")) == "train/light"


def test_network_that_a_run_starts_from_is_not_overwritten(data, tmp_path):
    init = tmp_path / "mine" / "best.safetensors"
    checkpoint.save(init, DRSformer(preset("drsformer-tiny")), {})
    content = init.read_bytes()
    with pytest.raises(InputError, match=r"`output`: expected another file than `init`, found .*best\.safetensors"):
        train(
            TrainOptions(
                tmp_path / "mine",
                [data],
                init=init,
                data_options=DataOptions([data]),
                recipe=Recipe(iterations=1, **QUICK),
                hardware=CPU,
            )
        )
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [init.name]
    assert init.read_bytes() == content


def test_damaged_state_is_told(data, tmp_path):
    run(data, tmp_path / "run")
    state = tmp_path / "run" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(InputError, match="damaged"):
        run(data, tmp_path / "run")
    state.unlink()
    with pytest.raises(InputError, match="no state to continue from"):
        run(data, tmp_path / "run")


def test_log_is_cut_back_to_the_checkpoint(data, tmp_path):
    run(data, tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"iteration": 9}\n{"iteration": 10, "l')
    (tmp_path / "run" / ".state.abc.pt").touch()
    run(data, tmp_path / "run")
    assert log.read_text() == whole
    assert not (tmp_path / "run" / ".state.abc.pt").exists()


def test_weights_that_are_not_numbers_stop_the_run_and_are_not_saved(data, tmp_path):
    with pytest.raises(InputError, match="no longer numbers at iteration"):
        run(data, tmp_path / "run", lr=1e30, clip=1e30, iterations=20)
    for path in (tmp_path / "run").glob("*.safetensors"):
        checkpoint.load(path)  # which refuses what is not a number
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True) if (tmp_path / "run/state.pt").exists() else {}
    assert all(tensor.isfinite().all() for tensor in state.get("model", {}).values())


def test_training_continues_from_a_checkpoint(data, tmp_path):
    run(data, tmp_path / "first")
    parent = tmp_path / "first" / "last.safetensors"
    train(TrainOptions(tmp_path / "second", [data], init=parent, recipe=Recipe(iterations=2, **QUICK), hardware=CPU))
    child = checkpoint.load(tmp_path / "second" / "last.safetensors")
    assert child.provenance["parent"] == checkpoint.file_sha256(parent)
    assert len(child.provenance["steps"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "drsformer-xxl"}, "drsformer-tiny"),
        ({"network": "drsformer-tiny", "init": "absent.safetensors"}, "leave `network` out"),
        ({"rendered": 0.8, "dry": 0.8}, r"`rendered` and `dry`: expected at most 1 together, found 1\.6"),
        ({"dry": -0.1}, r"`dry`: expected 0 to 1, found -0\.1"),
        ({"compressed": 1.1}, r"`compressed`: expected 0 to 1, found 1\.1"),
        ({"clean": "data/target"}, "`clean`"),
        ({"streaks": "data/target"}, "`streaks`"),
        ({"validate_limit": 0}, "`validate_limit`"),
        ({"data": []}, "nothing to train on"),
        ({"data": ["nowhere"]}, "nowhere"),
        ({"init": "absent.safetensors"}, "no such checkpoint"),
    ],
)
def test_mistakes_are_told_in_one_line(data, tmp_path, options, message):
    folders = [tmp_path / folder for folder in options.pop("data", [data])]
    paths = {"init", "clean", "streaks"}
    options = {name: tmp_path / value if name in paths else value for name, value in options.items()}
    data_options = {
        name: options.pop(name) for name in (field.name for field in fields(DataOptions)) if name in options
    }
    with pytest.raises(InputError, match=message) as error:
        train(
            TrainOptions(
                tmp_path / "run",
                folders,
                data_options=DataOptions(**data_options),
                recipe=Recipe(iterations=1, **QUICK),
                hardware=CPU,
                **options,
            )
        )
    assert "\n" not in str(error.value)


WRITTEN = {"width": 12, "depths": [1, 1, 1, 1], "heads": [1, 1, 2, 2], "expansion": 2.0, "topk": ["2/3"]}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"variant": Variant(feed_forward="gdfn", topk=("1/2",), mefc="late", experts=4)},
            preset("drsformer-tiny", feed_forward="gdfn", topk=("1/2",), mefc="late", experts=4),
        ),
        ({"variant": Variant(topk=("none",))}, preset("drsformer-tiny", topk=())),
        (
            {"config": WRITTEN},
            DRSformerConfig.regular(12, (1, 1, 1, 1), (1, 1, 2, 2), expansion=2.0, topk=("2/3",)),
        ),
        ({"config": preset("drsformer-tiny", mefc="early").to_dict()}, preset("drsformer-tiny", mefc="early")),
    ],
)
def test_variants_and_configs_are_trained_and_go_on_only_as_they_are(data, tmp_path, given, expected):
    if "config" in given:
        (tmp_path / "c.json").write_text(json.dumps(given["config"]))
        given = {"config": tmp_path / "c.json"}
    else:
        given = {"network": "drsformer-tiny", **given}
    common = {"recipe": Recipe(iterations=1, **QUICK), "hardware": CPU}
    for _ in range(2):
        train(TrainOptions(tmp_path / "run", [data], **given, **common))
    assert checkpoint.load(tmp_path / "run" / "last.safetensors").model.config == expected
    with pytest.raises(InputError, match=r"(variant|network)=.*give the same options"):
        train(TrainOptions(tmp_path / "run", [data], "drsformer-tiny", **common))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": Path("a"), "variant": Variant(mefc="both")}, r"`init` .*: leave `mefc` out"),
        ({"config": Path("a"), "variant": Variant(topk=("1/2",))}, r"`config` .*: leave `topk` out"),
        ({"config": Path("a"), "network": "drsformer"}, r"`config` .*: leave `network` out"),
        ({"config": Path("a"), "init": Path("a")}, r"`init` .*: leave `config` out"),
    ],
)
def test_a_network_is_given_in_one_way(options, message):
    with pytest.raises(InputError, match=message):
        TrainOptions(Path("run"), **options)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"experts": 0}, "`experts`: expected 1 to 8, found 0"),
        ({"experts": 4}, r"`network`: expected a compensator \(mefc\)"),
        ({"topk": ("4/5", "1/2")}, "ascending"),
        ({"topk": ("none", "1/2")}, "fraction"),
    ],
)
def test_impossible_variants_are_refused(data, tmp_path, variant, message):
    with pytest.raises(InputError, match=message):
        train(TrainOptions(tmp_path / "run", [data], "drsformer-tiny", variant=Variant(**variant), hardware=CPU))


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "3", "null", '"encoder"', '{"encoder": 3}', '{"widht": 8}', '{"width": "8"}', '{"width": 8.5}',
        '{"depths": [1, 2]}', '{"heads": "1248"}', '{"expansion": Infinity}', '{"expansion": 1e-9}', '{"topk": [2]}',
        '{"mefc": "both", "experts": 2.5}', "[" * 100_000,
    ],
)  # fmt: skip
def test_a_file_that_describes_no_network_is_told_in_one_line(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(InputError, match=r"`config`: expected .* in .*c\.json") as error:
        read_config(tmp_path / "c.json")
    assert "\n" not in str(error.value)


def test_cuda_graph_needs_cuda(data, tmp_path):
    with pytest.raises(InputError, match=r"`cuda_graph`: expected one CUDA device, found 1 x cpu"):
        train(
            TrainOptions(
                tmp_path / "run",
                [data],
                "drsformer-tiny",
                recipe=Recipe(iterations=1, batch=1, patch=16),
                hardware=Hardware(accelerator="cpu", devices="1", cuda_graph=True),
            )
        )


def test_several_machines_need_a_launcher(monkeypatch, tmp_path):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match=r"`num_nodes`: .*torchrun --nnodes 2"):
        Hardware(accelerator="cpu", num_nodes=2).fabric(tmp_path)


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        (Recipe, {"patch": 20}, "multiple of 8, found 20"),
        (Recipe, {"seed": -1}, "`seed`: expected 0 to 18446744073709551615, found -1"),
        (Recipe, {"seed": 2**64}, "`seed`"),
        (Recipe, {"ema": 1.0}, "`ema`: expected at least 0 and less than 1, found 1"),
        (Recipe, {"clip": 0.0}, "`clip`: expected more than 0, found 0"),
        (Recipe, {"lr": float("nan")}, "`lr`"),
        (Recipe, {"iterations": 10, "constant": 10}, "`constant`: expected 0 to 9, found 10"),
        (Schedule, {"log_every": 0}, "`log_every`"),
        (Hardware, {"workers": -1}, "`workers`"),
        (Hardware, {"devices": "0"}, "`devices`"),
    ],
)
def test_numbers_out_of_range_are_refused(part, options, message):
    with pytest.raises(InputError, match=message):
        part(**options)


def test_rain_and_backgrounds_come_from_everywhere_they_are_said_to(data, tmp_path):
    """Clean photographs are red here, streaks 200 bright; the pairs have neither."""
    for name, colour in (("red", (90, 0, 0)), ("bright", (200, 200, 200))):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((40, 40, 3), colour, np.uint8)).save(tmp_path / name / "0.png")
    patches = Patches([find_pairs(data)], Recipe(patch=16), tmp_path / "red", tmp_path / "bright", rendered=1.0)
    shown = [patches[i] for i in range(60)]
    red = [clean[0].mean() > 2 * clean[1].mean() + 0.1 for _, clean in shown]
    flooded = [(rainy - clean).min() > 0.2 for rainy, clean in shown]
    assert 0 < sum(red) < 60
    assert 0 < sum(flooded) < 60


def test_l1_loss_is_the_mean_absolute_error():
    terms = l1_loss(lambda rainy: rainy * 0.5, torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    assert terms["l1"].item() == 0.5


def test_run_that_stops_by_the_clock_goes_on_as_if_it_had_not(data, tmp_path):
    recipe = Recipe(iterations=6, **QUICK)
    train(TrainOptions(tmp_path / "whole", [data], "drsformer-tiny", recipe=recipe, hardware=CPU))
    stopped = [
        train(
            TrainOptions(
                tmp_path / "parts",
                [data],
                "drsformer-tiny",
                recipe=recipe,
                hardware=CPU,
                schedule=Schedule(log_every=2, minutes=minutes),
            )
        )
        for minutes in (0, 0, 60)
    ]
    assert stopped == [
        {"iteration": 1, "finished": False},
        {"iteration": 2, "finished": False},
        {"iteration": 6, "finished": True},
    ]
    whole, parts = ((tmp_path / name / "last.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_a_loss_that_is_logged_counts_the_steps_before_a_stop_too(data, tmp_path):
    def losses(name: str, *minutes: float) -> list[float]:
        for each in minutes:
            schedule = Schedule(log_every=3, minutes=each)
            recipe = Recipe(iterations=6, **QUICK)
            train(
                TrainOptions(tmp_path / name, [data], "drsformer-tiny", recipe=recipe, hardware=CPU, schedule=schedule)
            )
        return [json.loads(line)["l1"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]

    assert losses("parts", 0, 0, 60) == losses("whole", 60)


def test_a_run_goes_on_with_the_same_files_only(data, tmp_path):
    """Data sets of one name: a path says where they lie, which may change, but not what they are. Through links too."""
    shutil.copytree(data, tmp_path / "a" / data.parent.name / data.name)
    other = shutil.copytree(data, tmp_path / "b" / data.parent.name / data.name)
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(next(other.glob("input/*.png")))
    common = {"network": "drsformer-tiny", "recipe": Recipe(iterations=2, **QUICK), "hardware": CPU}
    for place in (data, tmp_path / "a" / data.parent.name / data.name):
        train(TrainOptions(tmp_path / "run", [place], schedule=Schedule(minutes=0), **common))
    linked = tmp_path / "c" / data.parent.name / data.name
    linked.mkdir(parents=True)
    for name in ("input", "target"):
        (linked / name).symlink_to(other / name)
    for place in (other, linked):
        with pytest.raises(InputError, match=r"holds a run with files_sha256=.*give the same options"):
            train(TrainOptions(tmp_path / "run", [place], **common))


class Counting(nn.Module):
    """A loss with a parameter of its own, which counts the steps that it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.asked = nn.Parameter(torch.ones(())), []

    def forward(self, network, rainy, clean):
        self.asked.append(network)
        return {"l1": (self.scale * network(rainy) - clean).abs().mean()}


def test_loss_learns_and_resumes_beside_the_network_which_runs_in_its_form(data, tmp_path):
    recipe, states = Recipe(iterations=4, **QUICK), []
    for name, pauses in (("whole", (None,)), ("parts", (0, None))):
        for minutes in pauses:
            torch.manual_seed(0)
            model, loss = DRSformer(preset("drsformer-tiny")), Counting()
            twins = []

            def form(model, twins=twins):
                twins.append(copy.deepcopy(model, {id(p): p for p in model.parameters()}))
                return twins[0]

            output = tmp_path / name
            fit(
                CPU.fabric(output),
                model,
                Patches([find_pairs(data)], recipe),
                recipe,
                Run(output, {}, {}),
                loss=loss,
                form=form,
                hardware=CPU,
                schedule=Schedule(minutes=minutes),
            )
            assert set(loss.asked) == set(twins)
        states.append(torch.load(output / "state.pt", weights_only=True))
    whole, parts = states
    assert whole["loss"]["scale"] != 1
    assert torch.equal(whole["loss"]["scale"], parts["loss"]["scale"])
    assert all(torch.equal(tensor, parts["model"][name]) for name, tensor in whole["model"].items())
    saved = checkpoint.load(tmp_path / "whole" / "last.safetensors").model.state_dict()
    assert saved.keys() == DRSformer(preset("drsformer-tiny")).state_dict().keys()


def test_equal_blocks_are_compiled_once_and_validation_never(data, tmp_path, monkeypatch):
    graphs, compile_block = [], nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compile_block(self, backend=backend, **options))
    torch.manual_seed(0)
    config = DRSformerConfig.regular(width=8, depths=(0, 0, 0, 3), heads=(1, 1, 1, 2), expansion=1.0, mefc="none")
    recipe, output = Recipe(iterations=2, **{**QUICK, "ema": 0.0}), tmp_path / "run"
    hardware = Hardware(accelerator="cpu", devices="1", compile=True)
    fit(
        CPU.fabric(output),
        DRSformer(config),
        Patches([find_pairs(data)], recipe),
        recipe,
        Run(output, {}, {}),
        validate=[("data", find_pairs(data)[:1])],
        hardware=hardware,
    )
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_images_are_read_before_there_are_workers_until_the_cache_is_full(data):
    pairs = find_pairs(data)
    patches = Patches([pairs], Recipe(patch=16))
    told = []
    patches.warm_up(lambda *progress: told.append(progress))
    assert told == [("Reading images", done, 4) for done in range(5)]
    assert set(patches.cache) == set(pairs)
    room = 2 * 40 * 30 * 6
    small = Patches([pairs], Recipe(patch=16), cache_bytes=room)
    small.warm_up()
    assert len(small.cache) == 2
    assert torch.equal(small[5][0], patches[5][0])
