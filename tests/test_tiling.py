"""Tiles: the golden vectors that C++ reads too, no seams, and a memory that is kept."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import Derainer, DerainError, InputError, OutOfMemory, footprint, memory, tiling
from runtime.bundle import load, save
from runtime.footprint import Footprint
from runtime.images import read_rgb
from runtime.ort import SHIPPED, OrtSession
from runtime.pixels import to_batch
from runtime.session import AMPLE_BYTES, IMAGE_BYTES, describe_onnx
from tests.golden.tiling import golden
from tests.support.images import random_image
from tests.support.onnx_files import UINT8, write_network

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tiling.json").read_text())
PHOTOGRAPHS = Path(__file__).parents[1] / "docs" / "photographs"


class Network:
    """A session in NumPy whose answer tells where in the tile a pixel was, as the golden images have it."""

    def __init__(self, multiple=8):
        self.multiple = multiple
        self.shapes = []

    def run(self, batch):
        self.shapes.append(batch.shape[2:])
        y, x = np.mgrid[: batch.shape[2], : batch.shape[3]]
        place = ((7 * y + 13 * x) % 32).astype(np.float32) / np.float32(31)
        return np.float32(0.75) * batch + np.float32(0.25) * place


class Global(Network):
    """Like attention it looks at all of the tile: each tile is off by a part of its mean."""

    def run(self, batch):
        self.shapes.append(batch.shape[2:])
        return batch - np.float32(0.4) * batch.mean(axis=(2, 3), keepdims=True, dtype=np.float32)


class Measured(Global):
    footprint = Footprint(fixed=50_000_000, per_pixel=2000.0)


def text(case):
    return "-".join(str(value) for key, value in case.items() if key not in ("weights", "starts", "sha256", "index"))


def test_golden_file_is_what_its_script_writes():
    assert json.loads(json.dumps(golden())) == GOLDEN


@pytest.mark.parametrize("case", GOLDEN["axes"], ids=text)
def test_weights_of_an_axis_are_golden(case):
    tiles = tiling.split(case["length"], case["tile"], case["overlap"])
    assert [start for start, _ in tiles] == case["starts"]
    for (_, weights), expected in zip(tiles, case["weights"], strict=True):
        assert weights.dtype == np.float32
        assert [float(weight).hex() for weight in weights] == expected


@pytest.mark.parametrize("case", GOLDEN["padding"], ids=text)
def test_padding_is_golden(case):
    seen = []

    class Spy(Network):
        def run(self, batch):
            seen.append(np.rint(batch[0, 0] * 255))
            return batch

    numbered = np.arange(case["length"], dtype=np.uint8)[:, None, None] * np.ones((1, case["multiple"], 3), np.uint8)
    for image in (numbered, numbered.transpose(1, 0, 2)):
        Derainer(Spy(case["multiple"]))(image)
    np.testing.assert_array_equal(seen[0][:, 0], case["index"])
    np.testing.assert_array_equal(seen[1][0], case["index"])


@pytest.mark.parametrize("case", GOLDEN["images"], ids=text)
def test_images_are_golden(case):
    y, x, c = np.mgrid[: case["height"], : case["width"], :3]
    image = ((31 * y + 17 * x + 101 * c + (y * x) % 251) % 256).astype(np.uint8)
    tiles = {"tile": tuple(case["tile"]), "overlap": case["overlap"]} if case["tile"] else {}
    restored = Derainer(Network(case["multiple"]), **tiles)(image)
    assert hashlib.sha256(restored.tobytes()).hexdigest() == case["sha256"]


@st.composite
def axes(draw):
    tile = draw(st.integers(1, 60))
    return draw(st.integers(1, 300)), tile, draw(st.integers(0, tile // 2))


@given(axes())
def test_an_axis_is_covered_and_its_weights_add_up(axis):
    length, tile, overlap = axis
    tiles = tiling.split(length, tile, overlap)
    total = np.zeros(length)
    for start, weights in tiles:
        assert weights.shape == (min(tile, length),)
        assert (weights > 0).all()
        total[start : start + len(weights)] += weights
    np.testing.assert_allclose(total, 1, atol=1e-6)
    starts = [start for start, _ in tiles]
    assert starts[0] == 0
    assert starts[-1] + min(tile, length) == length
    assert all(0 < b - a <= tile - overlap for a, b in itertools.pairwise(starts))
    assert len(tiles) == 1 or (len(tiles) - 1) * (tile - overlap) + overlap < length  # none too many


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 900), st.integers(1, 900)),
    st.sampled_from([1, 8, 24]),
    st.integers(64 * 64, 10**6),
)
def test_tiles_keep_to_their_pixels(size, multiple, pixels):
    H, W = (math.ceil(side / multiple) * multiple for side in size)
    try:
        plan = tiling.plan((H, W), multiple, pixels=pixels)
    except OutOfMemory:
        assert pixels < (64 + 47) ** 2  # rounded down to a multiple of 48 for the last case
        return
    assert math.prod(plan.tile) <= pixels
    assert plan.count == len(tiling.split(H, plan.tile[0], plan.overlap)) * len(
        tiling.split(W, plan.tile[1], plan.overlap)
    )
    assert (plan.tile == (H, W)) == (math.prod((H, W)) <= pixels)
    for side, length in zip(plan.tile, (H, W), strict=True):
        assert side == length or (side % multiple == 0 and min(side // 4, 12) <= plan.overlap <= side // 2)


@pytest.mark.parametrize(
    ("size", "pixels", "tile"),
    [
        ((4000, 6000), 1_600_000, (1056, 1264)),  # nearly square, and evened out
        ((96, 6000), 100_000, (96, 912)),  # a strip is cut across only
        ((6000, 96), 100_000, (912, 96)),
        ((512, 512), 512 * 512, (512, 512)),
        ((512, 512), 512 * 512 - 1, (512, 288)),
    ],
)
def test_tiles_are_as_square_as_the_image_allows(size, pixels, tile):
    assert tiling.plan(size, 8, pixels=pixels).tile == tile


def test_of_several_limits_the_one_that_takes_fewest_tiles():
    limits = [((64, 64), (512, 512)), ((520, 520), (1080, 1920))]
    assert tiling.plan((1080, 1920), 8, limits).count == 1
    assert tiling.plan((512, 512), 8, limits).count == 1
    assert tiling.plan((2000, 3000), 8, limits).tile == (1080, 1920)
    assert tiling.plan((300, 3000), 8, limits).tile == (300, 512)  # too low for the larger one
    assert tiling.plan((3000, 8), 8, limits).size == (3000, 64)


@pytest.mark.parametrize(
    ("size", "tile", "padded"),
    [
        ((8, 8), None, (64, 64)),
        ((48, 200), None, (64, 200)),
        ((48, 3000), None, (64, 3000)),
        ((48, 200), (64, 64), (64, 200)),
        ((8, 8), (600, 600), (64, 64)),
        ((48, 200), (32, 32), (48, 200)),
    ],
)
def test_what_is_too_small_is_padded_as_far_as_it_has_to_be(size, tile, padded):
    limits = [((520, 520), (1080, 1920)), ((64, 64), (512, 512))]
    plan = tiling.plan(size, 8, limits, tile=tile)
    assert plan.size == padded
    assert plan.tile == tuple(map(min, padded, tile or (512, 512)))
    assert tiling.plan(size, 8).size == size


def test_overlap_too_large_for_other_limits():
    limits = [((128, 128), (256, 256)), ((64, 64), (256, 256))]
    assert tiling.plan((64, 64), 8, limits, tile=(64, 64), overlap=40).tile == (64, 64)


def steps(values, axis, tile, overlap):
    """Mean step between neighbours along an axis of (3, H, W): where tiles begin and end, and everywhere else."""
    length = values.shape[axis]
    starts = [start for start, _ in tiling.split(length, tile, overlap)]
    borders = [start - 1 for start in starts if start > 0] + [s + tile - 1 for s in starts if s + tile < length]
    step = np.abs(np.diff(values, axis=axis)).mean(axis=(0, 3 - axis))
    return step[borders], np.delete(step, borders)


def run_in_tiles(session, image, tile, overlap):
    plan = tiling.Plan(image.shape[:2], tile, overlap)
    return tiling.blend(plan, lambda rows, columns: session.run(to_batch(image[rows, columns])))[0]


@pytest.mark.parametrize(("overlap", "seam"), [(16, False), (24, False), (32, False), (0, True)])
def test_a_gradient_has_no_seams(overlap, seam):
    y, x = np.mgrid[:200, :240]
    image = np.repeat((y / 2 + x / 2)[:, :, None], 3, axis=2).astype(np.uint8)
    restored = run_in_tiles(Global(), image, (64, 64), overlap)
    for axis in (1, 2):
        borders, inside = steps(restored, axis, 64, overlap)
        assert (borders.max() > 2 * inside.max()) == seam, (borders, inside)
        assert (borders.max() <= inside.max()) != seam, (borders, inside)


def test_photographs_have_no_seams():
    """What tiles change about the shipped network's answer steps across their borders about as much as inside of them,
    and several times as much where they do not overlap."""
    session = OrtSession(None, "cpu", threads=1)
    ratios = {}
    images = [read_rgb(PHOTOGRAPHS / f"{name}.jpg")[:160, :160] for name in ("chelsea", "coffee")]
    wholes = [session.run(to_batch(image))[0] for image in images]
    for overlap in (24, 0):
        borders, inside = [], []
        for image, whole in zip(images, wholes, strict=True):
            change = run_in_tiles(session, image, (80, 80), overlap) - whole
            for axis in (1, 2):
                for found, part in zip((borders, inside), steps(change, axis, 80, overlap), strict=True):
                    found.extend(part)
        ratios[overlap] = np.mean(borders) / np.mean(inside)
    assert ratios[24] <= 1.1, ratios
    assert ratios[0] > 2, ratios


def test_tiles_are_told_one_by_one():
    told = []
    network = Global()
    derain = Derainer(network, tile=(32, 40), overlap=8)
    derain(random_image(60, 70), lambda done, total: told.append((done, total)))
    assert told == [(i, 6) for i in range(1, 7)]
    assert network.shapes == [(32, 40)] * 6
    assert str(derain.plan(60, 70)) == "6 tiles of 32x40, 8 pixels of overlap, for 64x72"
    told.clear()
    derain(random_image(30, 40), lambda done, total: told.append((done, total)))
    assert told == [(1, 1)]
    assert str(derain.plan(30, 40)) == "32x40 as a whole"


def test_what_looks_at_single_pixels_is_the_same_in_tiles(tmp_path):
    """Also behind a graph that takes and gives uint8 images."""
    image = random_image(61, 75)
    for kind in ({}, {"kind": UINT8}):
        session = OrtSession(write_network(tmp_path / "m.onnx", scale=1 / 7, **kind), "cpu")
        whole = Derainer(session)(image)
        np.testing.assert_array_equal(Derainer(session, tile=(32, 24))(image), whole)


@pytest.mark.parametrize("size", [(500, 700), (40, 9000)])
def test_memory_is_divided_between_network_and_image(size):
    pixels = math.prod(math.ceil(side / 8) * 8 for side in size)
    need = Measured.footprint.fixed + pixels * (Measured.footprint.per_pixel + IMAGE_BYTES)
    network = Measured()
    image = random_image(*size)
    Derainer(network, memory=math.ceil(need))(image)
    assert network.shapes.pop() == tuple(math.ceil(side / 8) * 8 for side in size)
    Derainer(network, memory=math.floor(need / 3))(image)
    most = max(math.prod(shape) for shape in network.shapes)
    assert most * Measured.footprint.per_pixel + pixels * IMAGE_BYTES + Measured.footprint.fixed <= need / 3


def test_free_memory_decides_if_nothing_else_does(monkeypatch):
    monkeypatch.setattr("runtime.session.available", lambda: 400_000_000)
    assert Derainer(Measured()).plan(400, 400).count > 1
    assert Derainer(Measured()).plan(300, 300).count == 1
    assert Derainer(Global()).plan(4000, 6000).count == 1  # nobody knows what it takes
    monkeypatch.setattr("runtime.session.available", lambda: None)
    assert Derainer(Measured()).plan(4000, 6000).count == 1


def test_small_images_are_not_worth_a_measurement(monkeypatch):
    asked = []

    class Slow(Global):
        @property
        def footprint(self):
            asked.append(1)
            return Measured.footprint

    monkeypatch.setattr("runtime.session.available", lambda: 80 * 80 * AMPLE_BYTES * 4 // 3 + 9)
    derain = Derainer(Slow())
    derain(random_image(80, 80))
    assert not asked
    derain(random_image(80, 81))
    assert asked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(memory=10**9, tile=(64, 64)), "found both"),
        (dict(overlap=8), "only with a tile"),
        (dict(tile=(60, 64)), "multiples of 8 pixels, found 60x64"),
        (dict(tile=(0, 64)), "multiples of 8 pixels, found 0x64"),
        (dict(tile=(-8, 64)), "multiples of 8 pixels, found -8x64"),
        (dict(tile=(64, 32), overlap=17), "overlap of 0 to 16 pixels, half of the tile, found 17"),
        (dict(tile=(64, 64), overlap=-1), "found -1"),
        (dict(tile=(512, 512), overlap=300), "overlap of 0 to 256 pixels"),
        (dict(memory=59_000_000), "tiles of at least 64x64 pixels .* found enough for"),
        (dict(memory=0), "found enough for 0 pixels"),
    ],
)
def test_refuses_in_one_line(options, message):
    with pytest.raises(DerainError, match=message) as error:
        Derainer(Measured(), **options)(random_image(200, 200))
    assert "\n" not in str(error.value)


def test_memory_without_a_measure_is_refused():
    with pytest.raises(InputError, match="only with the provider cpu"):
        Derainer(Global(), memory=10**9)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how much memory a process takes")
def test_a_real_network_keeps_within_its_memory():
    """A process of its own, which would take more than 250 MB for the whole image."""
    script = (
        "import numpy as np; from pathlib import Path; from runtime import Derainer;"
        "from runtime.ort import OrtSession;"
        "derain = Derainer(OrtSession(None, 'cpu', 1), memory=180_000_000);"
        "derain(np.random.default_rng(0).integers(0, 256, (256, 400, 3), dtype=np.uint8));"
        "print(derain.plan(256, 400).count, Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path.cwd())
    tiles, peak = map(int, found.stdout.split())
    assert tiles > 1
    assert 100_000 < peak <= 180_000_000 / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how much memory a process takes")
def test_the_footprint_of_a_network_is_measured(tmp_path):
    session = OrtSession(write_network(tmp_path / "m.onnx", shape=(1, 3, 1024, 1024)), "cpu", 1)
    measured = Derainer(session)._footprint
    assert 30e6 < measured.fixed < 300e6
    assert 24 <= measured.per_pixel / footprint.MARGIN < 60  # input and output, and what is between them


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how much memory a process takes")
def test_the_footprint_of_a_bundle_is_that_of_the_file_that_was_verified(tmp_path, caplog):
    write_network(tmp_path / "m.onnx", shape=(1, 3, 1024, 1024))
    save(describe_onnx(tmp_path / "m.onnx"), tmp_path)
    derain = Derainer(tmp_path, "cpu", threads=1)
    measured = footprint.measure(load(tmp_path), 1)
    assert 24 <= measured.per_pixel / footprint.MARGIN < 60
    (tmp_path / "m.onnx").write_bytes(SHIPPED.read_bytes())
    assert derain._footprint is None
    assert "cannot be measured" in caplog.text


def test_what_cannot_be_measured_is_not_known(tmp_path, monkeypatch):
    assert footprint.measure(tmp_path / "none.onnx") is None
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert footprint.measure(SHIPPED) is None


def test_no_program_but_python_is_started(tmp_path, monkeypatch):
    """In an application that embeds Python or is frozen, sys.executable is the application."""
    application = tmp_path / "application"
    application.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    application.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(application))
    assert footprint.measure(SHIPPED) is None
    monkeypatch.setattr(sys, "executable", str(application.rename(tmp_path / "python3")))
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert footprint.measure(SHIPPED) is None
    assert not (tmp_path / "started").exists()


def test_measurement_that_takes_too_long_is_given_up(tmp_path, monkeypatch):
    slow = tmp_path / "python3"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    monkeypatch.setattr(footprint, "TIMEOUT_SECONDS", 0.2)
    assert footprint.measure(SHIPPED) is None


def test_available_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PROC", tmp_path)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.available() is None
    (tmp_path / "meminfo").write_text("MemTotal:  900 kB\nMemAvailable:     600 kB\n")
    assert memory.available() == 600 * 1024
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("4:cpu,memory:/old/job\n1:name=systemd:/\n0::/job/step\n")
    assert memory.available() == 600 * 1024
    bounds = (("max", 600 * 1024), ("400000", 150_000), ("90000000", 600 * 1024), ("200000", 0))
    for group in ("", "job", "job/step"):
        folder = tmp_path / group
        folder.mkdir(exist_ok=True)
        (folder / "memory.current").write_text("300000\n")
        (folder / "memory.stat").write_text("anon 5\ninactive_file 50000\nactive_file 7\n")
        for bound, free in (*bounds, bounds[0]):
            (folder / "memory.max").write_text(f"{bound}\n")
            assert memory.available() == free
    for group in ("memory", "memory/old/job"):  # version 1
        folder = tmp_path / group
        folder.mkdir(parents=True)
        (folder / "memory.usage_in_bytes").write_text("300000\n")
        (folder / "memory.stat").write_text("inactive_file 9\ntotal_inactive_file 50000\n")
        for bound, free in (*bounds[1:], ("9223372036854771712", 600 * 1024)):
            (folder / "memory.limit_in_bytes").write_text(f"{bound}\n")
            assert memory.available() == free
