"""Every stage of benchmarks.gpu, and every step of benchmarks.plan, from end to end, on a CPU with a tiny network."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import answers, gpu, harness, training
from benchmarks import contestants as engines
from benchmarks.answers import Answers
from benchmarks.contestants import Torch, from_preset, picture
from benchmarks.gpu import Correct, Kernels, Speed, Train
from benchmarks.harness import Row, Sheet, Work, kind_of
from benchmarks.parts import join
from benchmarks.plan import Wanted, plan
from drsformer import checkpoint
from drsformer.config import PRESETS, preset
from drsformer.model import DRSformer
from export.graph import to_onnx
from runtime.errors import DeviceError, InputError
from tests.support.images import noise, save
from tests.support.networks import fill
from tests.support.onnx_files import write_network
from tests.support.tensorrt import has_driver

pytestmark = pytest.mark.slow

TINY = "micro"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of two blocks; nothing is compiled, which takes minutes, and the ceilings are guessed."""
    micro = dict(width=8, depths=(1, 0, 0, 0), heads=(1, 1, 1, 1), expansion=1.0, mefc="none")
    monkeypatch.setitem(PRESETS, TINY, micro)
    for name in ("tiny-teacher", "tiny-student"):
        monkeypatch.setitem(training.PLANS, name, dataclasses.replace(training.PLANS[name], network=TINY))
    monkeypatch.setattr(engines, "REGIONS", ())
    guessed = {"fp16 TFLOP/s": 1.0, "bf16 TFLOP/s": 1.0, "fp32 TFLOP/s": 1.0, "copy GB/s": 10.0}
    monkeypatch.setattr(harness, "ceilings", lambda device, side, copied: guessed)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pairs of two sets, smaller than a patch in one direction."""
    folder = tmp_path / "data"
    for name in ("light", "heavy"):
        for split in ("train", "val"):
            for i in range(2):
                save(folder / name / split / "target" / f"{i}.png", noise(i))
                save(folder / name / split / "input" / f"{i}.png", noise(i).clip(60))
    return folder


def rows(folder: Path, stage: str) -> dict[str, dict[str, Any]]:
    return json.loads((folder / f"{stage}.json").read_text())["runs"][-1]["rows"]


def test_correct(tmp_path: Path, data: Path) -> None:
    checkpoint.save(tmp_path / "mine.safetensors", fill(DRSformer(preset(TINY))), {})  # pyright: ignore[reportArgumentType]
    stage = Correct(
        tmp_path, TINY, (tmp_path / "mine.safetensors",), device="cpu", sizes=("32x32",), large="40x32", data=data
    )
    assert stage.measure()["errors"] == []
    found = rows(tmp_path, "correct")
    assert found[f"{TINY} folded fp32 32x32"]["max difference, same selections"] < 1e-4
    assert found[f"{TINY} folded fp64 64x64"]["max difference"] < 1e-10
    assert found["mine folded fp16 black 40x32"]["not finite"] == 0
    assert {f"mine folded bf16 {pattern} 32x32" for pattern in ("threshold", "scatter", "rank")} <= found.keys()
    assert found["mine folded fp32 light/val"]["drift dB"] == pytest.approx(0, abs=1e-3)
    assert f"memory {TINY} released fp32 32x32" in found
    assert "| mine folded fp16 heavy/val |" in (tmp_path / "correct.md").read_text()


def test_speed_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "onnx_of", lambda *a: pytest.fail("nothing to be exported"))
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["SomeProvider"])
    stage = Speed(
        tmp_path,
        TINY,
        device="cpu",
        sizes=("32x32",),
        batches=(1,),
        seconds=0.01,
        only=("released", "CUDA graph fp16", "tensorrt", "folded eager fp32"),
    )
    summary = stage.measure()
    found = rows(tmp_path, "speed")
    first = found[f"32x32 batch 1: {TINY} released eager fp32"]
    assert first["times as fast"] == 1
    assert first["ms"] > 0
    ours = found[f"32x32 batch 1: {TINY} folded eager fp32"]
    assert ours["relative error"] < 1e-5
    assert ours["GMAC"] == pytest.approx(first["GMAC"], rel=0.1)
    assert ours["times its floor"] == ours["ms"] / ours["floor ms"]
    errors = {key: found[key]["error"] for key in summary["errors"]}
    assert errors[f"32x32 batch 1: {TINY} released ONNX Runtime fp32"].endswith("offers only SomeProvider")
    assert errors[f"32x32 batch 1: {TINY} folded torch.compile CUDA graph fp16"].endswith("need a CUDA device")
    assert "TensorRT is not installed" in errors[f"32x32 batch 1: {TINY} folded tensorrt fp16"]
    del found[f"32x32 batch 1: {TINY} folded eager fp32"]
    again = json.loads((tmp_path / "speed.json").read_text())
    again["runs"][-1]["rows"] = found
    (tmp_path / "speed.json").write_text(json.dumps(again))
    stage.measure()
    renewed = rows(tmp_path, "speed")
    assert renewed.keys() == found.keys() | {f"32x32 batch 1: {TINY} folded eager fp32"}
    kept = f"32x32 batch 1: {TINY} released eager fp16"
    assert renewed[kept] == found[kept]
    assert "times as fast" in renewed[f"32x32 batch 1: {TINY} folded eager fp32"]


def test_onnx_runtime_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.graph.to_onnx", functools.partial(to_onnx, size=(32, 32)))  # quicker than any size
    subject = from_preset(TINY)
    image = picture((32, 32))
    contestant = engines.Ort(subject, "folded", "fp32")
    assert torch.allclose(contestant.start(image)(), subject.network(image), atol=1e-3)


def test_kernels(tmp_path: Path) -> None:
    summary = Kernels(tmp_path, TINY, device="cpu", sizes=("16x8",), runs=1, only=("released",)).measure()
    assert summary["errors"] == []
    found = rows(tmp_path, "kernels")
    key = f"16x8 {TINY} released eager fp16"
    assert found[f"{key}: all"]["ms"] > 0
    assert 0 < found[f"{key}: depthwise convolution"]["share"] < 1
    assert found[f"{key}: matrix product"]["GB moved"] > 0


def test_kernels_on_cuda_are_told_by_their_operator() -> None:
    """With events as the profiler gives them, since there is no CUDA here."""

    def event(name: str, kind: str, ms: float = 0, shapes: Any = None, kernels: Any = ()) -> SimpleNamespace:
        return SimpleNamespace(
            name=name,
            device_type=SimpleNamespace(name=kind),
            device_time_total=1000 * ms,
            input_shapes=shapes,
            kernels=kernels,
            is_user_annotation=name == "span",
        )

    launched = SimpleNamespace(name="winograd", duration=2000.0)
    events = [
        event("aten::cudnn_convolution", "CPU", shapes=[[1, 8, 32, 32], [8, 1, 3, 3]], kernels=[launched]),
        event("winograd", "CUDA", 2),
        event("triton_poi_fused_add_0", "CUDA", 1),
        event("span", "CUDA", 3),
    ]
    assert list(gpu.timed_operators(events, torch.device("cuda"))) == [
        ("depthwise convolution", "winograd", 2.0),
        ("fused elementwise", "triton_poi_fused_add_0", 1.0),
    ]


def tiny_training(tmp_path: Path, data: Path, **options: Any) -> Train:
    settings: dict[str, Any] = dict(
        recipe=("tiny-teacher",), run_dir=tmp_path / "runs", workers=0, compile=False, steps=1, device="cpu", data=data
    )
    return Train(tmp_path / "out", **settings | options)


def test_train_teacher_and_student(tmp_path: Path, data: Path) -> None:
    stage = tiny_training(tmp_path, data, recipe=("tiny-teacher", "tiny-student"), state_limit_mb=100)
    assert stage.measure()["errors"] == []
    found = rows(tmp_path / "out", "train")
    for name in ("tiny-teacher", "tiny-student"):
        row = found[f"train {name}"]
        assert row["finished"]
        assert row["iteration"] == 4
        assert row["heavy/val images"] == 2
        weights, log, state = join(tmp_path / "out" / f"{name}.json", tmp_path / "home")
        arrived = checkpoint.load(weights)
        assert arrived.provenance["scores"]["heavy/val PSNR"] == row["heavy/val PSNR"]
        assert log.read_text() == (tmp_path / "runs" / name / "log.jsonl").read_text()
        assert state.name == "state.pt"


def test_train_goes_on_where_it_stopped(tmp_path: Path, data: Path) -> None:
    tiny_training(tmp_path, data, minutes=0).measure()
    row = rows(tmp_path / "out", "train")["train tiny-teacher"]
    assert not row["finished"]
    assert row["iteration"] < 4
    tiny_training(tmp_path, data).measure()
    row = rows(tmp_path / "out", "train")["train tiny-teacher"]
    assert row["finished"]
    assert row["iteration"] == 4


def test_probe(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "compile_blocks", lambda network: None)
    stage = tiny_training(tmp_path, data, recipe=("tiny-teacher", "tiny-student"), probe=True)
    assert stage.measure()["errors"] == []
    found = rows(tmp_path / "out", "train")
    assert len(found) == 2 * (8 + 1)
    assert found["probe tiny-student trainable compiled NHWC batch 2 patch 32"]["patches/s"] > 0
    assert found["probe tiny-student: patches of 32 cut by 0 workers"]["patches/s"] > 0


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected one of xs-3"):
        Train(tmp_path, recipe=("none",), device="cpu").measure()
    with pytest.raises(InputError, match="expected one of drsformer"):
        Kernels(tmp_path, "none", device="cpu").measure()
    with pytest.raises(InputError, match="multiples of 8"):
        Kernels(tmp_path, TINY, device="cpu", sizes=("30x32",)).measure()
    with pytest.raises(InputError, match="finds none"):
        Kernels(tmp_path, TINY, device="cuda").measure()


def wanted(tmp_path: Path, **options: Any) -> Wanted:
    settings: dict[str, Any] = dict(sizes=("32x32",), batches=(1,), run_dir=tmp_path / "runs", device="cpu")
    return Wanted(tmp_path / "out", TINY, **settings | options)


def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.safetensors"
    checkpoint.save(path, fill(DRSformer(preset(TINY))), {})  # pyright: ignore[reportArgumentType]
    return path


@pytest.mark.skipif(has_driver(), reason="says what a machine without a GPU answers")
def test_plan_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_network(tmp_path / "small.onnx")
    monkeypatch.setattr("benchmarks.plan.Answers", functools.partial(Answers, onnx=model))
    summary = plan("answers", wanted(tmp_path))["answers"]
    found = rows(tmp_path / "out", "answers")
    assert summary["errors"] == [key for key in found if key.startswith("TensorRT: ")]  # which is not installed
    assert found["TensorRT for RTX: load"]["answer"].startswith("version 1.")
    assert "an engine of" in found["TensorRT for RTX: build ahead"]["answer"]
    assert found["TensorRT for RTX: deserialize"]["answer"].endswith("None")
    assert "cudaError" in found["TensorRT for RTX: deserialize"]["log"]
    assert re.search("cannot build the model: .*cudaError", found["TensorRT for RTX: build current"]["answer"])
    assert "cudaError" in found["TensorRT for RTX: build current"]["log"]
    for question in ("build here", "run ahead", "run here"):
        assert "CUDA finds no NVIDIA GPU" in found[f"TensorRT for RTX: {question}"]["answer"]
    assert "<br>" in (tmp_path / "out" / "answers.md").read_text()


@pytest.mark.parametrize(
    ("script", "answer"),
    [
        ("echo loading; kill -SEGV $$", "the process died of SIGSEGV"),
        ("echo loading; exec sleep 60", "none within 0.5 s"),
        ("echo loading; exit 3", "the process ended with 3"),
        ("true", "the process ended with 0"),
    ],
)
def test_a_crash_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, answer: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o700)
    monkeypatch.setattr(answers.sys, "executable", str(python))
    row = Answers(tmp_path, limit_s=0.5).ask("rtx", "load")
    assert row == {"answer": answer, "log": "loading" if "loading" in script else ""}


def test_plan_onnxruntime(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model that darkens in place of an exported one: in fp16 a little more."""
    scales = {"fp32": 0.9, "fp16": 0.8996}
    write = lambda weights, path, options: write_network(path, scales[options.precision])  # noqa: E731
    monkeypatch.setattr("benchmarks.provider.export", write)
    static = functools.wraps(to_onnx)(functools.partial(to_onnx, size=(32, 32)))  # quicker than any size
    monkeypatch.setattr("export.graph.to_onnx", static)
    summaries = plan("onnxruntime", wanted(tmp_path, weights=(mine(tmp_path),), data=data, batches=(8,)))
    assert summaries["provider"]["errors"] == []
    found = rows(tmp_path / "out", "provider")
    places = "canaries", "light/val", "heavy/val"
    assert set(found) == {f"mine {precision} {place}" for precision in scales for place in places}
    assert found["mine fp16 canaries"]["passed"]
    assert found["mine fp32 light/val"]["drift dB"] == 0
    assert 0 < abs(found["mine fp16 light/val"]["drift dB"]) < 0.1
    found = rows(tmp_path / "out", "speed")
    assert found["32x32 batch 8: micro folded ONNX Runtime CUDA graph fp16"]["error"].endswith("need a CUDA device")
    row = found["32x32 batch 8: mine folded ONNX Runtime fp32"]
    if "batch" in inspect.signature(to_onnx).parameters:
        assert row["ms"] > 0
    else:
        assert row["error"] == "InputError: expected a batch of 1, since export.graph offers no other, found 8"


def test_plan_missing(tmp_path: Path, data: Path) -> None:
    summaries = plan("missing", wanted(tmp_path, weights=(mine(tmp_path),), data=data))
    assert summaries["correct"]["errors"] == []
    assert rows(tmp_path / "out", "correct")["mine folded fp16 heavy/val"]["drift dB"] == pytest.approx(0, abs=0.1)
    found = rows(tmp_path / "out", "speed")
    assert {f"32x32 batch 1: micro released torch.compile {p}" for p in ("fp32", "fp16")} < found.keys()
    assert not any("ONNX Runtime" in key for key in found)


def test_plan_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.ROUNDS", 1)
    summaries = plan("kernels", wanted(tmp_path, sizes=("8x8",)))
    found = rows(tmp_path / "out", "speed")
    assert found["8x8 batch 1: micro fused eager channels_last fp32"]["relative error"] < 1e-5
    assert set(summaries["speed"]["errors"]) == {key for key in found if "CUDA graph" in key}
    assert len(summaries["speed"]["errors"]) == 3
    assert summaries["kernels"]["errors"] == []
    assert "8x8 micro fused eager channels_last fp16: all" in rows(tmp_path / "out", "kernels")


def test_plan_training(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher starts from given weights, the student from none; where nothing is left of them but what was sent
    home, as on another machine, the one goes on and the other is not trained again."""
    mixed = dict(compressed=0.5, mix=("light", "heavy", "heavy"))
    for name, start in (("tiny-teacher", "mine"), ("tiny-student", None)):
        changed = dataclasses.replace(training.PLANS[name], start=start, **mixed)
        monkeypatch.setitem(training.PLANS, name, changed)
    assert [path.parent.name for path in training.training_folders(changed, data)] == ["light", "heavy", "heavy"]
    monkeypatch.setattr("benchmarks.plan.Train", functools.partial(training.Train, workers=0))
    options: dict[str, Any] = dict(weights=(mine(tmp_path),), data=data)
    stopped = plan("training", wanted(tmp_path, recipe=("tiny-teacher", "tiny-student"), minutes_each=0, **options))
    assert stopped["train"]["unfinished"] == [
        "train tiny-teacher",
        "train tiny-student, whose teacher tiny-teacher is not finished",
    ]
    assert [row["finished"] for row in rows(tmp_path / "out", "train").values()] == [False]
    shutil.rmtree(tmp_path / "runs")
    both = wanted(tmp_path, recipe=("tiny-teacher", "tiny-student"), **options)
    assert plan("training", both)["train"]["errors"] == []
    found = rows(tmp_path / "out", "train")
    assert [row["iteration"] for row in found.values()] == [4, 4]
    weights, log, _ = join(tmp_path / "out" / "tiny-teacher.json", tmp_path / "home")
    parent = checkpoint.load(weights).provenance
    assert json.dumps(parent).count(checkpoint.load(options["weights"][0]).sha256) >= 1
    assert [json.loads(line)["iteration"] for line in log.read_text().splitlines()][-1] == 4
    shutil.rmtree(tmp_path / "runs")
    monkeypatch.setattr(training, "train", lambda *a, **k: pytest.fail("trained again"))
    assert plan("training", both)["train"]["errors"] == []
    assert rows(tmp_path / "out", "train") == found


def test_what_a_plan_names_has_to_be_there(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="expected rain100l/train, found heavy, light"):
        plan("training", wanted(tmp_path, recipe=("half",), data=data))
    monkeypatch.setitem(training.PLANS, "half", dataclasses.replace(training.PLANS["half"], mix=()))
    assert plan("training", wanted(tmp_path, recipe=("half",), data=data))["train"]["errors"] == ["train half"]
    assert "expected xs-half in `weights`" in rows(tmp_path / "out", "train")["train half"]["error"]
    with pytest.raises(InputError, match="expected rain100l/train, found heavy, light"):
        plan("training", wanted(tmp_path, recipe=("xs-3",), data=data))
    with pytest.raises(InputError, match="expected networks, found none"):
        plan("onnxruntime", wanted(tmp_path))


def fail(error: Exception) -> Any:
    raise error


def test_what_fails_is_a_row_and_the_next_one_is_measured(tmp_path: Path) -> None:
    sheet = Sheet(tmp_path, "correct", CPU, 1)
    sheet.measure("large", lambda: fail(torch.OutOfMemoryError("Tried to allocate 80 GiB")))
    sheet.measure("also", lambda: fail(RuntimeError("BFCArena: Failed to allocate memory for requested buffer")))
    sheet.measure("broken", lambda: fail(ValueError("two\nlines")))
    sheet.measure("good", lambda: {"ms": 1.0})
    assert sheet.rows["large"]["error"] == "out of memory: Tried to allocate 80 GiB"
    assert sheet.rows["broken"]["error"] == "ValueError: two lines"
    again = Sheet(tmp_path, "correct", CPU, 1)
    assert not again.wants("large")
    assert not again.wants("also")
    assert again.wants("broken")  # it may be mended by now
    assert not again.wants("good")
    assert sheet.summary()["errors"] == ["large", "also", "broken"]


def test_a_device_that_is_lost_ends_the_command_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an illegal access not even memory can be given back."""

    def lost(device: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    def fails() -> Row:
        raise ValueError("first")

    def sheet() -> Sheet:
        return Sheet(tmp_path, "trial", torch.device("cpu"), 9)

    with monkeypatch.context() as patch:
        patch.setattr(harness, "free", lost)
        with pytest.raises(DeviceError, match=r"row 1: the device is lost: an illegal .*; the same command goes on"):
            sheet().measure("row 1", lambda: {"ms": 1})
        with pytest.raises(DeviceError, match="row 2: the device is lost: ValueError: first"):
            sheet().measure("row 2", fails)
    after = sheet()
    assert after.measure("row 1", fails) is None  # not again: it would end this one too
    after.measure("row 3", lambda: {"ms": 1})
    assert after.rows["row 3"]["ms"] == 1
    assert rows(tmp_path, "trial").keys() == {"row 1", "row 2", "row 3"}


def test_nothing_is_started_that_would_not_end_in_time(tmp_path: Path) -> None:
    sheet = Sheet(tmp_path, "correct", CPU, 1)
    assert sheet.measure("long", lambda: {"ms": 1.0}, expected=61) is None
    assert sheet.measure("short", lambda: {"ms": 1.0}, expected=1) == {"ms": 1.0}
    assert sheet.summary()["unfinished"] == ["long"]


def test_each_machine_has_rows_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Sheet(tmp_path, "correct", CPU, 1).put("row", {"ms": 1})
    monkeypatch.setattr(harness, "describe", lambda device: {"device": "another"})
    other = Sheet(tmp_path, "correct", CPU, 1)
    assert other.wants("row")
    other.put("row", {"ms": 2})
    assert "| row | 1 |" in other.markdown()
    assert "| row | 2 |" in other.markdown()
    (tmp_path / "correct.json").write_text("[]")
    with pytest.raises(InputError, match="something else"):
        Sheet(tmp_path, "correct", CPU, 1)


def test_work_counts_what_pytorch_counts() -> None:
    network = from_preset(TINY).network
    contestant = Torch(from_preset(TINY), "readable", "fp32")
    with FlopCounterMode(display=False) as counter:
        network(picture((32, 40)))
    assert 2 * sum(contestant.work((32, 40), 1).macs.values()) == counter.get_total_flops()


def test_work_counts_bytes_once() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False, device="meta", dtype=torch.float16)
    with torch.no_grad(), Work() as work:
        layer(torch.empty(1, 4, 8, 8, device="meta", dtype=torch.float16)).relu()
    assert work.bytes["depthwise convolution"] == 2 * (4 * 64 + 36 + 4 * 64)
    floor = work.floor({"fp16 TFLOP/s": 1.0, "copy GB/s": 1.0}, "fp16")
    assert floor["floor by"] == "bytes"
    assert floor["floor ms"] == pytest.approx(work.bytes["depthwise convolution"] / 1e6)


def test_kinds() -> None:
    assert kind_of("_convolution", [(1, 8, 4, 4), (16, 8, 1, 1)]) == "1x1 convolution"
    assert kind_of("convolution", [(1, 8, 4, 4), (8, 2, 3, 3)]) == "other convolution"
    assert kind_of("copy_", []) == "copy or cast"
    assert np.isclose(picture((16, 24), 2).shape, (2, 3, 16, 24)).all()
