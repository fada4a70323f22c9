"""Whatever bytes and words come in, what comes out is a result or one line that says what is wrong.

Hypothesis damages real files, so that the damage gets past the first check of a magic number. Examples are the same in
every run; `HYPOTHESIS_PROFILE=deep pytest tests/test_fuzz.py` tries a hundred times as many, other ones each time.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import itertools
import json
import math
import os
import re
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from safetensors.torch import save

from benchmarks.released import ReleasedDRSformer
from drsformer import checkpoint
from drsformer.config import preset
from drsformer.model import DRSformer
from export.onnx import command as export
from export.validate import command as validate
from runtime import DerainError, images, tiling
from runtime.bench import command as bench
from runtime.bundle import load
from runtime.cli import main
from runtime.derain import command as derain
from runtime.info import Report, summary, tables
from runtime.info import command as info
from tests.support.bundles import write_bundle
from tests.support.networks import SMALL, fill
from tests.support.onnx_files import write_network

pytestmark = pytest.mark.slow

settings.register_profile(
    "ci",
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("deep", settings.get_profile("ci"), max_examples=10_000, derandomize=False, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def one_line(function: Callable, *arguments: Any) -> Any:
    """The result, or None for a DerainError of one line of bearable length; anything else is a fault."""
    try:
        return function(*arguments)
    except DerainError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 2000, f"{len(message)} characters: {message[:300]}"
        return None


INTERESTING = (b"\0", b"\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x80")
"""Lengths and offsets at the edge of what a field holds."""


@st.composite
def damaged(draw: st.DrawFn, content: bytes, head: int = 400) -> bytes:
    """`content` after a few bytes, mostly of its head, were overwritten, cut out, repeated or inserted."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        limit = min(head, len(data)) if draw(st.integers(0, 3)) else len(data)
        start = draw(st.integers(0, max(0, limit - 1)))
        length = draw(st.integers(0, 40))
        new = draw(st.one_of(st.sampled_from(INTERESTING), st.binary(max_size=8)))
        match draw(st.sampled_from(["overwrite", "overwrite", "flip", "delete", "repeat", "insert", "cut"])):
            case "overwrite":
                data[start : start + len(new)] = new
            case "flip" if data:
                data[start] ^= 1 << draw(st.integers(0, 7))
            case "delete":
                del data[start : start + length]
            case "repeat":
                data[start:start] = data[start : start + length]
            case "insert":
                data[start:start] = new
            case "cut":
                del data[max(start, 8) :]
    return bytes(data)


# Images.


def seeds() -> dict[str, bytes]:
    """A small image in every format, with everything around the pixels that a decoder has to read."""
    rgb = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    image = Image.fromarray(rgb)
    exif = Image.Exif()
    exif[270], exif[274] = "rain", 6
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0wet"
    around = dict(exif=exif.tobytes(), icc_profile=bytes(range(256)) * 2)
    kinds: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "png": (image, "PNG", around),
        "png-palette": (image.quantize(16), "PNG", dict(transparency=2)),
        "png-animated": (image, "PNG", dict(save_all=True, append_images=[image.rotate(90)])),
        "jpeg": (image, "JPEG", around),
        "jpeg-progressive": (image.convert("L"), "JPEG", dict(progressive=True)),
        "jpeg-stereo": (image, "MPO", dict(save_all=True, append_images=[image])),
        "webp": (image, "WEBP", around),
        "webp-lossless": (image.convert("RGBA"), "WEBP", dict(lossless=True)),
        "bmp": (image, "BMP", {}),
        "bmp-palette": (image.quantize(16), "BMP", {}),
        "tiff": (image, "TIFF", around),
        "tiff-lzw": (image.convert("LA"), "TIFF", dict(compression="tiff_lzw")),
        "tiff-deflate": (image, "TIFF", dict(compression="tiff_adobe_deflate", big_tiff=True)),
        "tiff-jpeg": (image, "TIFF", dict(compression="jpeg")),
    }
    written = {}
    for name, (picture, kind, options) in kinds.items():
        stream = io.BytesIO()
        picture.save(stream, kind, **options)
        written[name] = stream.getvalue()
    return written


SEEDS = seeds()


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "damaged"


def with_checksums(png: bytes) -> bytes:
    """With right checksums, so that the damage is looked at."""
    content, at = png[:8], 8
    while at < len(png):
        (length,) = struct.unpack(">L", png[at : at + 4].rjust(4, b"\0"))
        body = png[at + 4 : at + 8 + length]
        content += png[at : at + 4] + body + struct.pack(">L", zlib.crc32(body))
        at += 12 + length
    return content


def load_photo(path: Path, content: bytes) -> images.Photo | None:
    """A damaged image is one, within the pixel limit, or it is refused. What was read can be written."""
    path.write_bytes(content)
    photo = one_line(images.load, path)
    if photo is not None:
        height, width, channels = photo.rgb.shape
        assert (photo.rgb.dtype, channels) == (np.uint8, 3)
        assert 1 <= height * width <= images.Image.MAX_IMAGE_PIXELS
        assert photo.alpha is None or (photo.alpha.dtype, photo.alpha.shape) == (np.uint8, (height, width))
        if height * width < 10_000:
            one_line(photo.save, path.with_suffix(".png"))
    return photo


@pytest.mark.parametrize("name", SEEDS)
@given(data=st.data())
def test_damaged_images_are_read_or_refused(path, name, data):
    content = data.draw(damaged(SEEDS[name]))
    load_photo(path, with_checksums(content) if name.startswith("png") else content)


def test_the_seeds_of_the_images_are_whole(path):
    refused = [name for name, content in SEEDS.items() if load_photo(path, content) is None]
    assert refused == ["png-animated"]


# Bundles.

DEEP = "lists in lists"
"""Stands for 900 of them in what `changed` makes."""

VALUES: dict[type, list[Any]] = {
    int: [-1, 0, 1, 2**63, 10**400, True],
    float: [-1.0, 0.0, 1e308, math.inf, math.nan, 10**400],
    str: ["", "../model.onnx", "report.html", "0" * 64, "a\0", "\ud800", "\x1b[2J", "[red]", "9" * 5000],
    list: [[], DEEP],
    dict: [{}, {"a": DEEP}],
    bool: [False, 0],
    type(None): [{"steps": [{"command": "\x1b"}, 1]}, {"steps": 1}, DEEP],
}
"""What the fields of a manifest might hold, by type."""


def entries(found: Any) -> list[tuple[Any, Any]]:
    """Every dictionary and list within, with every key."""
    keys = list(found) if isinstance(found, dict) else list(range(len(found))) if isinstance(found, list) else []
    return [pair for key in keys for pair in ((found, key), *entries(found[key]))]


@st.composite
def changed(draw: st.DrawFn, content: bytes) -> bytes:
    """A manifest in which some values are others, mostly of the same type, are gone, or stand elsewhere."""
    found = json.loads(content)
    for _ in range(draw(st.integers(1, 2))):
        place, key = draw(st.sampled_from(entries(found)))
        match draw(st.sampled_from(["replace", "replace", "replace", "retype", "copy", "delete", "add"])):
            case "replace":
                place[key] = copy.copy(draw(st.sampled_from(VALUES[type(place[key])])))
            case "retype":
                place[key] = copy.copy(draw(st.sampled_from([value for values in VALUES.values() for value in values])))
            case "copy":
                other, there = draw(st.sampled_from(entries(found)))
                place[key] = copy.deepcopy(other[there])
            case "delete":
                del place[key]
            case "add" if isinstance(place, list):
                place.append(place[key])
            case "add":
                place["more"] = place[key]
    return json.dumps(found).replace(f'"{DEEP}"', "[" * 900 + "]" * 900).encode()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("fuzz") / "bundle")


@pytest.fixture(scope="module")
def whole(bundle) -> bytes:
    """The manifest as it was made."""
    return (bundle / "manifest.json").read_bytes()


def load_bundle(bundle: Path, content: bytes) -> None:
    """A changed manifest is refused, or it holds of the files that are there, or not one of those is handed out."""
    (bundle / "manifest.json").write_bytes(content)
    opened = one_line(load, bundle)
    if opened is None:
        return
    assert opened.manifest.model.size_multiple >= 1  # what images are padded to
    screen = io.StringIO()
    for table in tables(opened.manifest):
        Console(file=screen, width=200).print(table)
    screen.getvalue().encode()
    json.dumps(summary(Report(opened))).encode()
    for file in opened.manifest.files:
        read = one_line(opened.read, file.name)
        if read is not None:
            assert hashlib.sha256(read).hexdigest() == file.sha256
            assert one_line(opened.path, file.name) == bundle / file.name
    one_line(opened.verify)


@settings(max_examples=5 * settings().max_examples)
@given(data=st.data())
def test_changed_manifests_are_verified_or_refused(bundle, whole, data):
    load_bundle(bundle, data.draw(changed(whole)))


@given(data=st.data())
def test_damaged_manifests_are_verified_or_refused(bundle, whole, data):
    load_bundle(bundle, data.draw(damaged(whole, head=5000)))


# Tiles.

EPSILON = float(np.finfo(np.float32).eps)
LENGTH = st.one_of(st.integers(1, 40), st.integers(1, 400))


@given(length=LENGTH, tile=LENGTH, share=st.floats(0, 0.5))
def test_tiles_of_an_axis_cover_it_and_their_weights_sum_to_1(length, tile, share):
    size = min(length, tile)
    tiles = tiling.split(length, tile, int(share * size))
    total = np.zeros(length)
    starts = [start for start, _ in tiles]
    assert starts[0] == 0
    for start, following in itertools.pairwise([*starts, length]):
        assert start < following <= start + size  # neither twice the same nor a gap
    for start, weights in tiles:
        assert start <= length - size
        assert (weights.dtype, weights.shape) == (np.float32, (size,))
        assert (weights > 0).all()
        total[start : start + size] += weights
    np.testing.assert_allclose(total, 1, atol=2 * EPSILON)


@given(data=st.data())
def test_plans_keep_their_promises_or_are_refused(data):
    multiple = data.draw(st.sampled_from([1, 4, 8]))
    size, tile = (tuple(multiple * -(-data.draw(LENGTH) // multiple) for _ in range(2)) for _ in range(2))
    pixels = data.draw(st.one_of(st.just(math.inf), st.floats(-10, 2 * math.prod(size))))
    if data.draw(st.booleans()):
        overlap = data.draw(st.one_of(st.none(), st.integers(-1, 250)))
        plan = one_line(lambda: tiling.plan(size, multiple, tile=tile, overlap=overlap))
    else:
        plan = one_line(lambda: tiling.plan(size, multiple, pixels=pixels))
        assert plan is None or math.prod(plan.tile) <= pixels
    if plan is None:
        return
    assert plan.size == size
    for length, side in zip(size, plan.tile, strict=True):
        assert side == length or (side < length and side % multiple == 0)
    seen = np.random.default_rng(0).random((1, 3, *size), dtype=np.float32)
    calls = []
    image = tiling.blend(plan, lambda rows, columns: seen[:, :, rows, columns], lambda *done: calls.append(done))
    np.testing.assert_allclose(image, seen, atol=4 * EPSILON)
    assert calls == [(i + 1, plan.count) for i in range(plan.count)]


# Command lines.

COMMANDS: dict[str, tuple[Callable, str, str]] = {
    "derain": (derain, "- -", "--model --provider --threads --public-key"),
    "info": (info, "-", "--public-key"),
    "bench": (bench, "", "--model --vs --size --provider --threads --seconds"),
    "export": (export, "--weights", "--output --topk --io --precision --height --width --opset"),
    "validate": (validate, "--reference --candidate --data", "--max-drop-db --min-psnr --report --limit --provider"),
}
"""Functions with what they demand, - for an argument without a name, and with their options."""

WORDS = [
    "missing.png", "photo.png", "photos", "empty", "broken.onnx", "half.onnx", "bundle", "out.png", "new/out.png",
    ".", "", "..", "/dev/null", "pipe.png", "x" * 300, "a\nb.png", "\udcff.png", "é.png", "\x1b[2J", "[red]", "-", "--",
    "--help", "-1", "0", "1", "99999999999999999999", "1e400", "nan", "-inf", "8x8", "0x8", "8x", "cpu", "cuda", "auto",
    "tpu", "fp16", "image", "None", "True",
]  # fmt: skip


@st.composite
def arguments(draw: st.DrawFn, demanded: str, options: str) -> list[str]:
    """Mostly what is demanded, and any options, mostly with a value; in any order."""
    names = [name for name in demanded.split() if draw(st.integers(0, 9))]
    names += draw(st.lists(st.sampled_from(["-", *options.split()]), max_size=3))
    pairs = [(name, draw(st.sampled_from(WORDS))) for name in draw(st.permutations(names))]
    words = [word for name, value in pairs for word in ([value] if name == "-" else [name, value])]
    return words if draw(st.integers(0, 4)) else words[:-1]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with what `WORDS` names."""
    folder = tmp_path_factory.mktemp("words")
    for name in ("photos", "empty"):
        (folder / name).mkdir()
    for name in ("photo.png", "photos/a.png"):
        Image.new("RGB", (8, 8), (9, 9, 9)).save(folder / name)
    write_network(folder / "half.onnx")
    (folder / "broken.onnx").write_bytes(b"\x08\x07broken")
    write_bundle(folder / "bundle")
    os.mkfifo(folder / "pipe.png")
    return folder


@pytest.fixture
def quick_bench(monkeypatch):
    """`bench` without what takes its time."""
    monkeypatch.setattr("runtime.bench.alone", lambda function, *arguments: (None, None))
    monkeypatch.setattr("runtime.bench.alternate", lambda calls, *_: np.ones((len(calls), 2)))


@pytest.mark.parametrize("name", COMMANDS)
@given(data=st.data())
def test_command_lines_are_done_or_refused(place, capsys, quick_bench, name, data):
    """Exit status 0, or 2 with one line or the usage; 1 where a folder holds broken images; never a traceback."""
    function, *words = COMMANDS[name]
    words = data.draw(arguments(*words))
    with contextlib.chdir(place), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *words])
        with pytest.raises(SystemExit) as stopped:
            main(function, "A command.")
    told = capsys.readouterr().err
    assert stopped.value.code in (0, 2), told
    assert "Traceback" not in told
    if stopped.value.code == 2 and "full helptext" not in told:
        assert re.fullmatch(r"error: [^\n]+\n", told), told
        assert told[:-1].isprintable()


# Checkpoints.


@pytest.fixture(scope="module")
def checkpoints() -> dict[str, bytes]:
    """One of each kind, by suffix."""
    model = DRSformer(preset("drsformer-tiny"))
    fill(model)
    described = {"format": checkpoint.FORMAT, "config": model.config.to_dict(), "provenance": {}}
    pth = io.BytesIO()
    torch.save({"params": ReleasedDRSformer(**SMALL, mefc=False).state_dict()}, pth)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return {".safetensors": save(state, {checkpoint.METADATA_KEY: json.dumps(described)}), ".pth": pth.getvalue()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@settings(max_examples=30)
@given(data=st.data())
def test_damaged_checkpoints_are_read_or_refused(tmp_path_factory, checkpoints, suffix, data):
    path = tmp_path_factory.getbasetemp() / f"damaged{suffix}"
    path.write_bytes(data.draw(damaged(checkpoints[suffix], head=4000)))
    loaded = one_line(checkpoint.load, path)
    if loaded is not None:
        assert all(torch.isfinite(tensor).all() for tensor in loaded.model.state_dict().values())
