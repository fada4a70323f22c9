"""Rain and images that no test set has: each condition is what its name says, and is measured once."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import conditions
from benchmarks.conditions import measure
from drsformer import checkpoint
from drsformer.data import find_pairs
from drsformer.metrics import psnr
from drsformer.model import DRSformer
from runtime.errors import InputError
from tests.support.images import noise, random_image, save
from tests.support.networks import fill, small


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A photograph, a folder of two pairs, and a network that changes nothing."""
    monkeypatch.setattr(conditions, "SLANTS", (0, 60))
    save(tmp_path / "photographs" / "a.png", random_image(40, 48))
    for i in range(2):
        save(tmp_path / "heavy" / "val" / "target" / f"{i}.png", noise(i))
        save(tmp_path / "heavy" / "val" / "input" / f"{i}.png", noise(i).clip(60))
    network = fill(DRSformer(small()))
    network.output.weight.data.zero_()
    checkpoint.save(tmp_path / "same.safetensors", network, {})
    return tmp_path


def run(folders, *names, **options):
    options = (
        dict(
            output=folders / "out",
            weights=tuple(folders / f"{name}.safetensors" for name in names),
            data=(folders / "heavy" / "val",),
            photographs=folders / "photographs",
            seeds=1,
            device="cpu",
        )
        | options
    )
    measure(**options)
    return json.loads((options["output"] / "conditions.json").read_text())["runs"][-1]["rows"]


def test_a_network_that_changes_nothing_has_the_numbers_of_the_input(folders):
    rows = run(folders, "same")
    assert len(rows) == 2 + 2 + 2 + 2 + 2 + 1 + 1 + 2
    for row in rows.values():
        assert len(row) == 2
        first, second = row.values()
        assert first == second
    pairs = [pair.load() for pair in find_pairs(folders / "heavy" / "val")]
    value = rows["heavy/val, PSNR on Y"]["input"]
    assert value == round(float(np.mean([psnr(rainy, clean) for rainy, clean in pairs])), 2)
    assert rows["heavy/val, brightness"]["input"] > 0
    assert rows["dense streaks, brightness"]["input"] > 30
    assert rows["dense streaks, PSNR over RGB"]["input"] < rows["streaks of 60 degrees, PSNR over RGB"]["input"]
    assert rows["dry photographs, worst PSNR over RGB"]["input"] == "equal"
    assert (
        rows["heavy/val in JPEG 50, PSNR on Y"]["input"] != value != rows["heavy/val in H.264 26, PSNR on Y"]["input"]
    )


def test_another_network_is_a_column_and_nothing_is_measured_twice(folders, monkeypatch):
    before = run(folders, "same")
    checkpoint.save(folders / "other.safetensors", fill(DRSformer(small())), {})
    measured = []
    once = conditions._measured
    monkeypatch.setattr(conditions, "_measured", lambda title, *a: measured.append(title) or once(title, *a))
    after = run(folders, "same", "other")
    assert {title.rsplit(": ")[1].split()[0] for title in measured} == {"other"}
    assert len(measured) == len({key.rsplit(", ", 1)[0] for key in after})
    for key, row in after.items():
        assert {name: row[name] for name in before[key]} == before[key]
        assert len(row) == 3
    run(folders, "same", "other")
    assert len(measured) == len(set(measured))


def test_what_cannot_be_used_is_told_before_anything_is_measured(folders):
    for options in (dict(limit=0), dict(photographs=folders / "heavy"), dict(data=(folders,)), dict(device="cuda")):
        with pytest.raises(InputError):
            run(folders, "same", **options)
    assert not (folders / "out").exists()
    run(folders)
    with pytest.raises(
        InputError, match=r"conditions\.json: expected seeds 1 as in its rows, found 2; give another `output`"
    ):
        run(folders, "same", seeds=2)
