"""The table of what networks cost, of tiny ones."""

from __future__ import annotations

import json

import pytest

from benchmarks import complexity
from drsformer import checkpoint, counts
from drsformer.config import DRSformerConfig
from drsformer.model import DRSformer
from runtime.errors import InputError
from tests.support.networks import fill

SETTINGS = dict(width=4, depths=(1, 0, 0, 0), heads=(1, 1, 1, 1), expansion=2.0, mefc="none")


def test_every_network_has_its_row_and_is_compared_with_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(complexity, "PRESETS", presets := {"wide": {**SETTINGS, "width": 24}, "narrow": SETTINGS})
    monkeypatch.setattr("benchmarks.contestants.PRESETS", presets)
    mine = DRSformerConfig.regular(**{**SETTINGS, "width": 8})
    checkpoint.save(tmp_path / "mine.safetensors", fill(DRSformer(mine)), {})
    options = dict(weights=(tmp_path / "mine.safetensors",), size="64x72", rounds=3, threads=1)
    summary = complexity.complexity(tmp_path / "out", **options)
    assert (summary["rows"], summary["errors"]) == (3, [])
    (run,) = json.loads((tmp_path / "out" / "complexity.json").read_text())["runs"]
    wide, narrow, own = run["rows"].values()
    assert list(run["rows"]) == ["wide 64x72", "narrow 64x72", "mine 64x72"]
    assert [row["weights"] for row in (wide, narrow, own)] == ["random", "random", "trained"]
    assert own["GMAC"] == round(counts.macs(mine, 64, 72) / 1e9, 3)
    assert own["M parameters"] == round(counts.params(mine) / 1e6, 3)
    assert wide["of the first"] == 1
    assert narrow["of the first"] < 1
    assert all(row["quartile 1"] <= row["ms"] <= row["quartile 3"] for row in (wide, narrow, own))
    assert all(row["peak MiB"] > row["idle MiB"] for row in (wide, narrow, own))
    before = (tmp_path / "out" / "complexity.json").read_text()
    complexity.complexity(tmp_path / "out", **options)  # nothing is left to measure
    assert (tmp_path / "out" / "complexity.json").read_text() == before


def test_numbers_out_of_range_are_refused(tmp_path):
    with pytest.raises(InputError, match="`rounds`: expected at least 1"):
        complexity.complexity(tmp_path, rounds=0)
