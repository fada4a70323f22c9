"""The benchmark of the graph from end to end, with a tiny network."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import graph as benchmark
from benchmarks.contestants import from_preset
from benchmarks.graph import FORMS, LIMITS, Contestant, exported, formed, graph, missed, restored
from drsformer.config import PRESETS
from runtime.errors import InputError
from runtime.timing import alone

pytestmark = pytest.mark.slow

MICRO = "micro"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of two blocks with four different masks, and no processes of their own, which take seconds to start."""
    micro = dict(width=20, depths=(1, 0, 0, 0), heads=(1, 1, 1, 1), expansion=1.0, mefc="none")
    monkeypatch.setitem(PRESETS, MICRO, micro)
    monkeypatch.setattr(benchmark, "alone", lambda function, *arguments: function(*arguments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that nothing is exported twice."""
    return tmp_path_factory.mktemp("graph")


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / "graph.json").read_text())["runs"][-1]["rows"]


def test_all_forms_are_counted_timed_and_equal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = graph(folder, MICRO, "32x24", rounds=2, threads=1)
    assert (summary["errors"], summary["missed"]) == ([], [])
    found = rows(folder)
    counts = {form: found[f"{MICRO} {form} graph 32x24"] for form in FORMS}
    assert [(counts[form]["TopK"], counts[form]["ScatterElements"]) for form in FORMS] == [(8, 8), (2, 0), (2, 0)]
    assert counts["folded"]["nodes"] < counts["released"]["nodes"]
    assert counts["folded"]["GMAC"] < counts["released"]["GMAC"] == counts["readable"]["GMAC"]
    for engine in ("PyTorch eager", "ONNX Runtime"):
        timed = [found[f"{MICRO} {form} {engine} 32x24"] for form in FORMS]
        assert timed[0]["times as fast"] == 1
        assert all(row["quartile 1"] <= row["seconds"] <= row["quartile 3"] for row in timed)
        assert all(row["relative error"] < 1e-3 and row["peak MiB"] > 0 for row in timed)
    assert f"| {MICRO} folded graph 32x24 |" in (folder / "graph.md").read_text()

    monkeypatch.setattr(benchmark, "to_onnx", lambda *a, **k: pytest.fail("nothing to be exported"))
    monkeypatch.setattr(benchmark, "compete", lambda *a: pytest.fail("nothing to be timed"))
    graph(folder, MICRO, "32x24", rounds=2, threads=1)
    assert rows(folder) == found


def test_engine_is_built_and_weighed(folder: Path) -> None:
    pytest.importorskip("tensorrt_rtx_libs")
    row = benchmark.compiled(exported(folder, from_preset(MICRO), "folded"))
    assert row["compute capabilities"] == "8.6 8.9 12.0"
    assert min(row["layers"], row["build seconds"], row["engine MB"], row["peak MiB"]) > 0


def test_memory_is_that_of_a_process_of_its_own() -> None:
    ballast = torch.ones(1 << 28)  # 1 GiB
    contestant = Contestant("folded", "PyTorch eager", formed(from_preset(MICRO), "folded"), 1)
    assert 50 < alone(restored, pickle.dumps(contestant), (32, 24)) < 1024
    del ballast


def test_missed_targets_are_named() -> None:
    met = {"graph": dict(LIMITS), "ONNX Runtime": {"times as fast": 1.4}}
    assert missed(met) == []
    worse = {"graph": {**LIMITS, "nodes": 3001}, "ONNX Runtime": {"times as fast": 1.39}}
    assert missed(worse) == ["nodes 3001, more than 3000", "1.39 times as fast, less than 1.4"]


def test_one_round_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`rounds`: expected at least 2, found 1"):
        graph(tmp_path, MICRO, rounds=1)
