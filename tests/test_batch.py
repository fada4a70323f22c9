"""The benchmark of batches, on networks that do nothing of worth."""

from __future__ import annotations

import json
import runpy
import sys

import pytest

from benchmarks.batch import measure
from runtime.errors import InputError
from tests.support.onnx_files import write_network


def test_every_model_restores_every_number_of_images(tmp_path):
    one, some = (
        write_network(tmp_path / f"{name}.onnx", shape=(batch, 3, "H", "W"))
        for name, batch in (("one", 1), ("any", "B"))
    )
    rates = measure((one, some), (1, 3), (16, 24), seconds=0)
    assert [(r.model, r.batch, r.at_once) for r in rates] == [
        ("one.onnx", 1, 1),
        ("one.onnx", 3, 1),
        ("any.onnx", 1, 1),
        ("any.onnx", 3, 3),
    ]
    assert rates[0].faster == 1
    assert all(0 < r.low <= r.median <= r.high and r.difference == 0 for r in rates)


def test_what_cannot_be_measured(tmp_path):
    with pytest.raises(InputError, match="`batch`: expected at least 1, found 0"):
        measure((tmp_path / "none.onnx",), (0,))
    with pytest.raises(InputError, match="at least one `model`"):
        measure(())


def test_command(tmp_path, monkeypatch, capsys):
    network = write_network(tmp_path / "any.onnx", shape=("B", 3, "H", "W"))
    arguments = ["--model", network, "--batch", "1", "2", "--size", "8x16", "--seconds", "0", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["batch", *map(str, arguments)])
    monkeypatch.delitem(sys.modules, "benchmarks.batch", raising=False)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("benchmarks.batch", run_name="__main__", alter_sys=True)
    assert not stopped.value.code
    *table, summary = capsys.readouterr().out.splitlines()
    assert table[-1].startswith("| any.onnx on cpu | 2 | 2 | ")
    assert [rate["batch"] for rate in json.loads(summary)["rates"]] == [1, 2]
