"""The pack of rain data: what comes out of it, and the parts in which files travel."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.pack import FORMAT, LAYER_STEP, MANIFEST, pack, unpack
from benchmarks.parts import join, parts, split
from drsformer.data import find_pairs
from drsformer.rendering import add_rain
from runtime.errors import InputError
from tests.support.images import noise, save


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two pairs a split; one validation pair whose rain is coloured, one training background that is in `clean`."""
    folder = tmp_path / "data"
    for i in range(3):
        save(folder / f"clean/{i}.jpg", noise(i + 20))
    shared = np.asarray(Image.open(folder / "clean/1.jpg"))
    for split_name, first in (("train", 0), ("val", 10)):
        for i in (first, first + 1):
            clean, layer = shared if i == 1 else noise(i), noise(i + 100, channels=1) // 2
            save(folder / f"light/{split_name}/target/{i}.png", clean)
            save(folder / f"light/{split_name}/input/{i}.png", add_rain(clean, layer.astype(np.float32)))
    save(folder / "light/val/input/11.png", noise(50))
    for i in range(12):
        save(folder / f"streaks/{i:02}.png", noise(i, channels=1))
    return folder


def test_the_same_folders_come_out(data: Path, tmp_path: Path) -> None:
    assert pack(data, tmp_path / "pack.zip") == {
        "bytes": (tmp_path / "pack.zip").stat().st_size,
        "pairs": 4,
        "clean": 3,
        "streaks": 2,
    }
    assert unpack(tmp_path / "pack.zip", tmp_path / "out") == {"pairs": 4, "clean": 3, "streaks": 2}
    for before, after in zip(find_pairs(data / "light/val"), find_pairs(tmp_path / "out/light/val"), strict=True):
        assert before.name == after.name
        for image, restored in zip(before.load(), after.load(), strict=True):
            np.testing.assert_array_equal(image, restored)
    for before, after in zip(find_pairs(data / "light/train"), find_pairs(tmp_path / "out/light/train"), strict=True):
        (rainy, clean), (rainy_out, clean_out) = before.load(), after.load()
        assert np.abs(clean.astype(int) - clean_out).mean() < 3
        assert np.abs((rainy_out.astype(int) - clean_out) - (rainy.astype(int) - clean)).mean() < LAYER_STEP
        if before.name == "1":  # it is in `clean`
            np.testing.assert_array_equal(clean_out, clean)
    assert (tmp_path / "out/clean/2.jpg").read_bytes() == (data / "clean/2.jpg").read_bytes()


def test_rain_that_is_no_grey_layer_comes_back_as_it_was(tmp_path: Path) -> None:
    """Contrast that moves with the rain, as in Rain800: no layer that is added to the target could tell it."""
    rows, columns = np.mgrid[:64, :96]
    clean = np.stack([columns * 2, rows * 3, columns + rows], axis=2).astype(np.uint8)
    rainy = (0.6 * clean + 60).astype(np.uint8)
    save(tmp_path / "data/slanted/train/target/0.png", clean)
    save(tmp_path / "data/slanted/train/input/0.png", rainy)
    pack(tmp_path / "data", tmp_path / "pack.zip")
    unpack(tmp_path / "pack.zip", tmp_path / "out")
    (pair,) = find_pairs(tmp_path / "out/slanted/train")
    for image, restored in zip((rainy, clean), pair.load(), strict=True):
        assert np.abs(image.astype(int) - restored).mean() < 3


def test_the_same_data_gives_the_same_bytes(data: Path, tmp_path: Path) -> None:
    for name in ("a.zip", "b.zip"):
        pack(data, tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_a_pack_that_was_changed_is_refused(data: Path, tmp_path: Path) -> None:
    pack(data, tmp_path / "pack.zip")
    content = bytearray((tmp_path / "pack.zip").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "pack.zip").write_bytes(content)
    with pytest.raises(InputError, match=r"pack\.zip"):
        unpack(tmp_path / "pack.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "manifest",
    [
        {"files": {}},
        [1],
        {"format": FORMAT - 1, "files": {}, "pairs": {}},
        {"format": FORMAT, "files": [], "pairs": []},
        {"format": FORMAT, "files": {}, "pairs": {"a/train/0": {"target": "x", "layer": "y"}}},
        {"format": FORMAT, "files": {}, "pairs": {"a/train/0": {"target": "x", "input": "y"}}},
        {"format": FORMAT, "files": {"clean/../../x": {}}, "pairs": {}},
        {"format": FORMAT, "files": {}, "pairs": {"../train/0": {}}},
    ],
)
def test_what_is_no_pack_is_refused(tmp_path: Path, manifest: object) -> None:
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as archive:
        archive.writestr("clean/../../x", b"x")
        archive.writestr(MANIFEST, json.dumps(manifest))
    with pytest.raises(InputError, match=r"pack\.zip: expected") as error:
        unpack(tmp_path / "pack.zip", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["pack.zip"]


def test_a_folder_without_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected folders of pairs"):
        pack(tmp_path, tmp_path / "pack.zip")


def test_real_pairs_come_back_bit_for_bit(real_data: Path, tmp_path: Path) -> None:
    for name in ("rain100l", "rain200h"):
        pair = find_pairs(real_data / name / "val")[0]
        for path in (pair.input, pair.target):
            copy = tmp_path / "data" / path.relative_to(real_data)
            copy.parent.mkdir(parents=True)
            shutil.copy(path, copy)
    pack(tmp_path / "data", tmp_path / "pack.zip")
    unpack(tmp_path / "pack.zip", tmp_path / "out")
    for name in ("rain100l", "rain200h"):
        before, after = (find_pairs(folder / name / "val")[0] for folder in (tmp_path / "data", tmp_path / "out"))
        for image, restored in zip(before.load(), after.load(), strict=True):
            np.testing.assert_array_equal(image, restored)
    stored = sum(path.stat().st_size for path in (tmp_path / "data").rglob("*.png"))
    assert (tmp_path / "pack.zip").stat().st_size < 0.7 * stored


def test_parts_are_small_and_join_bit_for_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights, log = tmp_path / "w.safetensors", tmp_path / "log.jsonl"
    weights.write_bytes(rng.standard_normal(50_001).astype(np.float16).tobytes() + b"x")  # an odd number of bytes
    log.write_text("{}\n")
    manifest, *files = split("teacher", [weights, log], tmp_path / "parts", limit=20_000)
    assert len(files) > 2
    assert all(path.stat().st_size <= 20_000 for path in files)
    assert sum(path.stat().st_size for path in files) < 0.95 * weights.stat().st_size
    for path in join(manifest, tmp_path / "out"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    files[1].write_bytes(files[0].read_bytes())
    with pytest.raises(InputError, match=r"teacher\.json"):
        join(manifest, tmp_path / "out")


def test_a_wheel_travels_in_parts_of_any_size(tmp_path: Path) -> None:
    """As benchmarks/README.md has it, which is joined under its own name, since pip reads it."""
    wheel = tmp_path / "some_package-1.0-py3-none-any.whl"
    wheel.write_bytes(np.random.default_rng(1).bytes(250_000))
    _, *found = parts("split", "some-package", (wheel,), tmp_path / "parts", limit_mb=0.1)
    assert [path.stat().st_size for path in found[:2]] == [100_000, 100_000]
    assert len(found) == 3
    (joined,) = parts("join", str(tmp_path / "parts" / "some-package.json"), output=tmp_path / "wheels")
    assert joined.name == wheel.name
    assert joined.read_bytes() == wheel.read_bytes()
    found[1].unlink()
    with pytest.raises(InputError, match=r"expected all parts beside it, found no some-package\.01"):
        join(tmp_path / "parts" / "some-package.json", tmp_path / "again")
    with pytest.raises(InputError, match="found none at"):
        join(tmp_path / "parts" / "another.json", tmp_path / "again")
    assert not (tmp_path / "again").exists()
