"""`python -m runtime.bench`: what it says is what happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from rich.console import Console

from runtime import InputError, InvalidModel, OutOfMemory, bench, memory, timing
from runtime.bench import BenchOptions
from tests.support.bundles import write_bundle

ROOT = Path(__file__).parents[1]


def write_slow_network(path: Path, width: int = 64) -> Path:
    """Two convolutions over `width` channels: milliseconds, and memory for so many floats a pixel."""
    weights = [(f"w{i}", shape) for i, shape in enumerate([(width, 3, 3, 3), (3, width, 3, 3)])]
    nodes = [
        helper.make_node("Conv", ["input", "w0"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["a", "w1"], ["output"], pads=[1, 1, 1, 1]),
    ]
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 3, "H", "W"))] for name in ("input", "output")
    )
    tensors = [helper.make_tensor(name, TensorProto.FLOAT, shape, np.full(shape, 1e-3)) for name, shape in weights]
    graph = helper.make_graph(nodes, "slow", inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_the_table_fits_80_columns_with_large_numbers():
    ms = dict(median=123456.78, low=123456.78, high=123456.78, p99=123456.78)
    memory = dict(peak_mib=65432, idle_mib=100)
    entry = bench.Timing("m", "cpu", (2160, 3840), 1, rounds=11, images_per_second=0.01, **ms, **memory)
    console = Console(width=80)
    with console.capture() as capture:
        for part in bench.report(bench.Result({}, (entry, entry), (bench.Ratio(entry.size, 1.0, 1.0, 1.0),))):
            console.print(part)
    lines = capture.get().splitlines()
    assert all(len(line) <= 80 for line in lines)
    (row,) = (line.split() for line in lines if line.split()[:1] == ["vs"])
    assert row == ["vs", "2160x3840", *["123457"] * 4, "11", "0.01", "65432"]


def test_command_compares_two_networks(tmp_path):
    fast, slow = write_bundle(tmp_path / "bundle"), write_slow_network(tmp_path / "slow.onnx", 256)
    arguments = [
        "--model",
        fast,
        "--vs",
        slow,
        "--size",
        "64x96",
        "7x5",
        "--threads",
        "1",
        "--seconds",
        "0.2",
        "--provider",
        "cpu",
    ]
    run = subprocess.run([sys.executable, "-m", "runtime.bench", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert [measured["size"] for measured in found["timings"]] == [[64, 96], [64, 96], [7, 5], [7, 5]]
    for measured, path in zip(found["timings"], 2 * [fast / "model.onnx", slow], strict=True):
        assert (measured["model"], measured["provider"], measured["tiles"]) == (str(path), "cpu", 1)
        assert measured["rounds"] >= timing.MIN_ROUNDS
        assert 0 < measured["low"] <= measured["median"] <= measured["high"] <= measured["p99"]
        assert measured["images_per_second"] == pytest.approx(1000 / measured["median"], rel=0.9)
    assert found["timings"][0]["median"] < found["timings"][1]["median"]
    first = found["ratios"][0]
    assert first["low"] <= first["median"] <= first["high"]
    assert first["median"] > 1
    assert f"64x96: {first['median']:.2f} times as fast as vs" in run.stdout
    assert "median" in run.stdout
    assert str(slow) in run.stdout
    assert found["machine"]["onnxruntime"] in run.stdout
    assert found["machine"]["cores"] >= 1


def test_calls_take_turns_and_are_warm(monkeypatch):
    clock, order = [0.0], []

    def call(name: str, seconds: float):
        order.append(name)
        clock[0] += seconds if order.count(name) > 1 else 100  # the first one sets up

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    calls = [lambda: call("a", 1), lambda: call("b", 3)]
    taken = timing.alternate(calls, seconds=0, rounds=4)
    np.testing.assert_array_equal(taken, [[1] * 4, [3] * 4])
    assert "".join(order) == "ab" + "ab" + "ab" + "ba" + "ab" + "ba"
    assert timing.alternate(calls, seconds=30, rounds=4).shape == (2, 7)  # 30 seconds by rounds of 4


def test_peak_is_that_of_the_network_and_not_of_who_asks(tmp_path):
    ballast = np.ones(300 * 2**20, np.uint8)  # 300 MiB in this process
    small, large = (write_slow_network(tmp_path / f"{width}.onnx", width) for width in (1, 96))
    peaks = {}
    for path in (small, large):
        idle, peak = timing.alone(bench.peak_memory, path, "cpu", 1, 512, 512)
        assert idle < ballast.nbytes / 2**20
        assert idle < peak
        peaks[path] = peak - idle
    assert peaks[large] - peaks[small] > 90  # 96 channels of 512x512 float32 are 96 MiB


@pytest.mark.skipif(not Path("/proc").exists(), reason="peak memory is read in /proc")
def test_memory_that_cannot_be_measured_is_left_out(monkeypatch):
    assert (timing.peak_mib() or 0) > 0
    monkeypatch.setattr(memory, "STATUS", Path("/proc/none"))
    assert timing.peak_mib() is None


def test_process_that_dies_is_told_in_one_line():
    with pytest.raises(OutOfMemory, match="want of memory") as error:
        timing.alone(os._exit, 1)
    assert "\n" not in str(error.value)


def test_sizes_that_are_none():
    with pytest.raises(InputError, match="`size`: expected at least one"):
        bench.bench(BenchOptions(size=()))


def test_rounds_are_as_many_as_asked_for():
    result = bench.bench(BenchOptions(size=((16, 16),), rounds=3, provider="cpu", threads=1))
    assert [timing.rounds for timing in result.timings] == [3]
    with pytest.raises(InputError, match="`rounds`: expected at least 1, found 0"):
        BenchOptions(rounds=0)


def test_gpu_where_the_cpu_runs_is_refused():
    with pytest.raises(InputError, match="device"):
        bench.bench(BenchOptions(size=((16, 16),), provider="cpu", device=1))


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_seconds_that_are_none(seconds):
    with pytest.raises(InputError, match="0 to 3600"):
        bench.bench(BenchOptions(seconds=seconds))


def test_network_that_fails(tmp_path):
    with pytest.raises(InputError, match="expected a bundle or an ONNX file, found nothing at"):
        bench.bench(BenchOptions(tmp_path / "none.onnx"))
    broken = write_slow_network(tmp_path / "broken.onnx")
    model = onnx.load(broken)
    model.graph.node[1].attribute[0].ints[:] = [0, 0, 0, 0]  # its output is smaller than its input
    onnx.save(model, broken)
    with pytest.raises(InvalidModel, match=r"broken\.onnx: expected an output of shape \(1, 3, 16, 16\), found"):
        bench.bench(BenchOptions(broken, size=((16, 16),), provider="cpu"))


def test_shipped_network_is_the_default(monkeypatch, capsys):
    monkeypatch.setattr(bench, "alone", lambda function, *arguments: (None, None))
    result = bench.command(BenchOptions(size=((16, 16),), seconds=0, provider="cpu", threads=1))
    assert result.timings[0].model.endswith("drsformer-xs.onnx")
    assert result.ratios == ()
    assert "milliseconds an image" in capsys.readouterr().out
