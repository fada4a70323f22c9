"""Every stage of benchmarks.gpu from end to end, on a CPU with a tiny network."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import contestants as engines
from benchmarks import gpu, harness, training
from benchmarks.contestants import Torch, from_preset, picture
from benchmarks.gpu import Correct, Kernels, Speed, Train
from benchmarks.harness import Sheet, Work, kind_of
from benchmarks.parts import join
from drsformer import checkpoint
from drsformer.config import PRESETS, preset
from drsformer.model import DRSformer
from export.graph import to_onnx
from runtime.errors import InputError
from tests.support.images import noise, save
from tests.support.networks import fill

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
    with pytest.raises(InputError, match="expected one of tea"):
        Train(tmp_path, recipe=("none",), device="cpu").measure()
    with pytest.raises(InputError, match="expected one of drsformer"):
        Kernels(tmp_path, "none", device="cpu").measure()
    with pytest.raises(InputError, match="multiples of 8"):
        Kernels(tmp_path, TINY, device="cpu", sizes=("30x32",)).measure()
    with pytest.raises(InputError, match="finds none"):
        Kernels(tmp_path, TINY, device="cuda").measure()


def fail(error: Exception) -> Any:
    raise error


def test_what_fails_is_a_row_and_the_next_one_is_measured(tmp_path: Path) -> None:
    sheet = Sheet(tmp_path, "correct", CPU, 1)
    sheet.measure("large", lambda: fail(torch.OutOfMemoryError("Tried to allocate 80 GiB")))
    sheet.measure("broken", lambda: fail(ValueError("two\nlines")))
    sheet.measure("good", lambda: {"ms": 1.0})
    assert sheet.rows["large"]["error"] == "out of memory: Tried to allocate 80 GiB"
    assert sheet.rows["broken"]["error"] == "ValueError: two lines"
    again = Sheet(tmp_path, "correct", CPU, 1)
    assert not again.wants("large")
    assert again.wants("broken")  # it may be mended by now
    assert not again.wants("good")
    assert sheet.summary()["errors"] == ["large", "broken"]


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
