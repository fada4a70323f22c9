"""The comparison with AutoCast, on tiny graphs in place of what AutoCast makes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from benchmarks.autocast import autocast, compared, counted, cropped, runs
from drsformer.data import find_pairs
from runtime.errors import InputError

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def model(path: Path, weight: float = 0.5, inner: int = FLOAT, io: int = FLOAT) -> Path:
    """A 1x1 convolution that multiplies by `weight` in the type `inner`, between casts where `io` is another."""
    kernel = (weight * np.eye(3)[:, :, None, None]).astype(helper.tensor_dtype_to_np_dtype(inner))
    casts = io != inner
    nodes = [
        *([helper.make_node("Cast", ["input"], ["in"], to=inner)] if casts else []),
        helper.make_node("Conv", ["in" if casts else "input", "kernel"], ["out" if casts else "output"]),
        *([helper.make_node("Cast", ["out"], ["output"], to=io)] if casts else []),
    ]
    values = [helper.make_tensor_value_info(name, io, [1, 3, "H", "W"]) for name in ("input", "output")]
    graph = helper.make_graph(nodes, "tiny", values[:1], values[1:], [numpy_helper.from_array(kernel, "kernel")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for folder in ("input", "target"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        noise = np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "data" / folder / "1.png")
    return tmp_path / "data"


def test_precisions_are_counted(tmp_path: Path) -> None:
    row = counted(model(tmp_path / "a.onnx", inner=HALF))
    assert (row["nodes"], row["Cast"], row["fp16 Conv"], row["fp32 Conv"]) == (3, 2, 1, 0)
    assert (row["fp16 initialisers"], row["fp16 values"], row["fp32 initialisers"]) == (1, 9, 0)
    row = counted(model(tmp_path / "b.onnx"))
    assert (row["nodes"], row["Cast"], row["fp16 Conv"], row["fp32 Conv"], row["fp32 values"]) == (1, 0, 0, 1, 9)


def test_outputs_are_compared(tmp_path: Path, data: Path) -> None:
    exact, pairs = model(tmp_path / "exact.onnx"), find_pairs(data)
    assert cropped(pairs[0])[0].shape == (16, 32, 3)
    row = compared(exact, exact, pairs)
    assert (row["drop dB"], row["to reference dB"], row["not finite"], row["difference, white"]) == (0, "equal", 0, 0)
    half = compared(model(tmp_path / "half.onnx", inner=HALF, io=HALF), exact, pairs)
    assert half["input and output"] == "fp16"
    assert half["to reference dB"] == "equal" or half["to reference dB"] > 50
    worse = compared(model(tmp_path / "worse.onnx", 0.25), exact, pairs)
    assert worse["drop dB"] > 1
    assert worse["to reference dB"] < 20
    assert worse["difference, white"] == 0.25
    model(tmp_path / "nan.onnx", float("nan"))
    broken = compared(tmp_path / "nan.onnx", exact, pairs)
    assert (broken["not finite"], broken["not finite, white"]) == (3 * 16 * 32, 3 * 256 * 256)
    assert broken["drop dB"] > 1


def test_what_is_told_wrongly_of_inner_tensors_is_noted_and_left_out(tmp_path: Path, data: Path) -> None:
    path, wrong = model(tmp_path / "right.onnx", inner=HALF), tmp_path / "wrong.onnx"
    graph = onnx.load(path)
    graph.graph.value_info.append(helper.make_tensor_value_info("out", FLOAT, ["unk"] * 4))
    onnx.save(graph, wrong)
    assert (runs(path), runs(wrong)) == (True, False)
    row = compared(wrong, path, find_pairs(data))
    assert (row["runs as it is"], row["to reference dB"]) == ("no", "equal")


def test_command_adds_rows(tmp_path: Path, data: Path) -> None:
    ours, theirs, exact = (model(tmp_path / f"{name}.onnx") for name in ("ours", "theirs", "exact"))
    for files in ((theirs,), (theirs, ours)):
        summary = autocast(ours, files, exact, (data,), tmp_path / "results", pairs=2)
        assert (summary["rows"], summary["errors"]) == (3, [])
    (run,) = json.loads((tmp_path / "results" / "autocast.json").read_text())["runs"]
    assert list(run["rows"]) == ["exact: exact", "exact: ours", "exact: theirs"]
    with pytest.raises(InputError, match="found no file at"):
        autocast(ours, (tmp_path / "none.onnx",), exact, (data,), tmp_path / "results")
    with pytest.raises(InputError, match="`pairs`: expected at least 1, found 0"):
        autocast(ours, (theirs,), exact, (data,), tmp_path / "results", pairs=0)
