"""What happens to a product when its inputs are hostile, its disk is full and its threads are many."""

from __future__ import annotations

import io
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image, TiffImagePlugin

from runtime import Derainer, InputError, images
from runtime.bundle import load
from runtime.cli import main
from runtime.derain import DerainOptions, derain
from runtime.files import writing
from runtime.images import Photo
from runtime.ort import MAX_THREADS, OrtSession
from tests.support.bundles import rewrite, write_bundle
from tests.support.onnx_files import write_network
from tests.support.refusals import refusal

ROOT = Path(__file__).parents[1]


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def python(code: str, *arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)


# Files that ask for more than they are worth.


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">L", len(data)) + name + data + struct.pack(">L", zlib.crc32(name + data))


def png(side: int, rows: bytes, *others: bytes) -> bytes:
    """A square PNG of one bit a pixel."""
    header = struct.pack(">LLBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(others) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def resized(kind: str, old: bytes, new: bytes, **options) -> bytes:
    """A small image whose header gives another size: 23x29 is nowhere else in it."""
    stream = io.BytesIO()
    Image.fromarray(noise(29, 23)).save(stream, kind, **options)
    content = stream.getvalue()
    assert old in content
    return content.replace(old, new, 1)


HUGE = 60_000
BOMBS: dict[str, Callable[[], bytes]] = {
    "png": lambda: png(30_000, zlib.compress(bytes(30_000 * 3751), 1)),  # a sound one
    "png-header": lambda: png(HUGE, b""),
    "jpeg": lambda: resized("JPEG", struct.pack(">HH", 29, 23), struct.pack(">HH", HUGE, HUGE)),
    "bmp": lambda: resized("BMP", struct.pack("<LL", 23, 29), struct.pack("<LL", HUGE, HUGE)),
    "tiff": lambda: resized("TIFF", struct.pack("<HHLHHHHLHH", 256, 4, 1, 23, 0, 257, 4, 1, 29, 0),
                            struct.pack("<HHLLHHLL", 256, 4, 1, HUGE, 257, 4, 1, HUGE)),
    "webp": lambda: resized("WEBP", struct.pack("<L", 22)[:3] + struct.pack("<L", 28)[:3],
                            struct.pack("<L", HUGE)[:3] + struct.pack("<L", HUGE)[:3], icc_profile=b"icc"),
    "png-profile": lambda: png(1, b"", chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(400_000_000), 1))),
}  # fmt: skip

LOAD_ALL = """
import sys
from runtime import InputError, images, timing
images.load("docs/photographs/chelsea.jpg")
before = timing.peak_mib()
for path in sys.argv[1:]:
    try:
        print(path, images.load(path).rgb.shape)
    except InputError as error:
        print(error)
print(timing.peak_mib() - before)
"""


def test_decompression_bombs_are_refused_before_they_take_memory(tmp_path):
    paths = [tmp_path / name for name in BOMBS]
    for path in paths:
        path.write_bytes(BOMBS[path.name]())
        assert path.stat().st_size < 3_000_000
    *lines, grown = python(LOAD_ALL, *paths).stdout.splitlines()
    for path, line in zip(paths, lines, strict=True):
        reasons = {
            "png-profile": ["broken image: Decompressed data too large"],
            "webp": ["more than 89478485 pixels", "broken image: could not create decoder"],  # before Pillow 12.3
        }.get(path.name, ["more than 89478485 pixels"])
        assert any(line.startswith(f"{path}: {reason}") for reason in reasons)
    assert int(grown) < 40, f"{grown} MiB for files of a few bytes"


def test_pages_of_a_tiff_are_not_counted(tmp_path, monkeypatch):
    """Reading a chain of a million directories takes minutes."""
    pages = [Image.fromarray(noise(4, 4, seed)) for seed in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "n_frames", property(lambda self: pytest.fail("counts")))
    assert "several pages" in refusal(images.load, tmp_path / "a.tif")


def test_pipes_and_devices_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # which nobody writes into: opening it would wait for ever
    for path in (tmp_path / "pipe.png", Path("/dev/zero"), tmp_path):
        assert "found a folder, a pipe or a device" in refusal(images.load, path)


# Bundles that lead elsewhere, beyond what test_manifest.py has.


@pytest.mark.parametrize("name", ["Manifest.JSON", "MANIFEST.JSON.SIG", "9" * 256])
def test_names_that_no_file_may_have(tmp_path, name):
    bundle = write_bundle(tmp_path / "bundle")
    rewrite(bundle, lambda m: m["files"][3].update(name=name))
    assert "expected a plain file name" in refusal(load, bundle)


def test_names_that_differ_in_case_alone(tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    rewrite(bundle, lambda m: m["files"].append({**m["files"][3], "name": "REPORT.html"}))
    assert "expected every file once" in refusal(load, bundle)


@pytest.mark.parametrize("multiple", [-8, 0, 1025, 10**30])
def test_multiples_that_would_pad_without_bound(tmp_path, multiple):
    bundle = write_bundle(tmp_path / "bundle")
    rewrite(bundle, lambda m: m["model"].update(size_multiple=multiple))
    assert "expected a size multiple from 1 to 1024" in refusal(load, bundle)
    path = write_network(tmp_path / "m.onnx", metadata={"size_multiple": str(multiple)})
    assert "from 1 to 1024 as size_multiple" in refusal(OrtSession, path)


def test_pipe_in_place_of_a_file_of_the_bundle(tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    (bundle / "model.onnx").unlink()
    os.mkfifo(bundle / "model.onnx")
    assert "found no such file" in refusal(Derainer, bundle)


def test_weights_outside_of_the_models_folder(tmp_path):
    """An ONNX file may name other files with its weights; ONNX Runtime takes them from its folder only."""
    (tmp_path / "outside.bin").write_bytes(np.float32(0.25).tobytes())
    (tmp_path / "folder").mkdir()
    path = write_network(tmp_path / "folder" / "m.onnx")
    for location in ("../outside.bin", str(tmp_path / "outside.bin")):
        model = onnx.load(path, load_external_data=False)
        tensor = model.graph.initializer[0]
        tensor.ClearField("float_data")
        tensor.ClearField("external_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("length", "4")):
            tensor.external_data.add(key=key, value=value)
        path.write_bytes(model.SerializeToString())
        assert "External data path" in refusal(OrtSession, path) or "Absolute path" in refusal(OrtSession, path)


class Evil:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return (Path.touch, (self.witness,))


def test_pickles_are_no_models(tmp_path):
    (tmp_path / "m.onnx").write_bytes(pickle.dumps(Evil(tmp_path / "executed")))
    assert "not an ONNX model" in refusal(OrtSession, tmp_path / "m.onnx")
    assert not (tmp_path / "executed").exists()


# Networks that do not do what they say.


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(tmp_path, scale):
    path = write_network(tmp_path / "m.onnx", scale=scale)
    Photo(noise(8, 8)).save(tmp_path / "in.png")
    assert "NaN or infinity" in refusal(derain, tmp_path / "in.png", tmp_path / "out.png", DerainOptions(path))
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("operator", "attributes"), [("GlobalAveragePool", {}), ("MaxPool", dict(kernel_shape=[2, 2], strides=[2, 2]))]
)
def test_networks_that_answer_with_another_size(tmp_path, operator, attributes):
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 3, *size))]
        for name, size in (("input", "HW"), ("output", "hw"))
    )
    graph = helper.make_graph([helper.make_node(operator, ["input"], ["output"], **attributes)], "t", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "m.onnx")
    assert "expected an output of shape (1, 3, 8, 8), found" in refusal(Derainer(tmp_path / "m.onnx"), noise(8, 8))


def test_threads_without_bound(tmp_path):
    path = write_network(tmp_path / "m.onnx")
    for threads in (MAX_THREADS + 1, 10**20):
        assert f"expected 0 (all cores) to {MAX_THREADS} threads" in refusal(OrtSession, path, threads=threads)


# Disks and folders.


def command(monkeypatch, capsys, function: Callable, *arguments: object) -> tuple[int | str | None, str]:
    """Exit status and what was said."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main(function, "A command.")
    return stopped.value.code, capsys.readouterr().err


@pytest.fixture
def network(tmp_path) -> Path:
    return write_network(tmp_path / "half.onnx")


@pytest.fixture
def photo(tmp_path) -> Path:
    Photo(noise(64, 64)).save(tmp_path / "rainy.png")
    return tmp_path / "rainy.png"


def test_full_disk_is_one_line_and_the_old_file_stays(network, photo, tmp_path):
    """The limit on the size of a file stands in for the disk: the system cuts the write short in the same way."""
    output = tmp_path / "out" / "clean.png"
    output.parent.mkdir()
    output.write_bytes(b"old")
    run = subprocess.run(
        [sys.executable, "-m", "runtime.derain", photo, output, "--model", network, "--provider", "cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert (run.returncode, run.stderr) == (2, f"error: {output}: File too large\n")
    assert list(output.parent.iterdir()) == [output]
    assert output.read_bytes() == b"old"


@pytest.fixture
def read_only():
    """A folder that this user may read."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        if root:
            os.seteuid(65534)  # nobody, as root may write everywhere
        yield Path(folder)
        if root:
            os.seteuid(0)
        os.chmod(folder, 0o755)


def test_read_only_folder_is_one_line(read_only, monkeypatch, capsys):
    def save(output: Path) -> None:
        Photo(noise(4, 4)).save(output)

    for output in (read_only / "a.png", read_only / "new" / "a.png"):
        status, told = command(monkeypatch, capsys, save, "--output", output)
        assert (status, told) == (
            2,
            f"error: {output if output.parent == read_only else output.parent}: Permission denied\n",
        )
    assert not list(read_only.iterdir())


def test_pipes_folders_and_devices_are_not_written_over(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "pipe.png", tmp_path / "folder.png", Path("/dev/null")):
        before = path.stat()
        with pytest.raises(InputError, match="expected a file to write"), writing(path):
            pass
        assert path.stat() == before


KILLED = """
import os, signal, sys
from runtime.files import writing
with writing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_process_that_is_killed_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")
    assert python(KILLED, path).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert images.list_images(tmp_path) == [path]  # what it left is hidden


def test_names_that_are_no_text_or_steer_a_terminal(network, photo, tmp_path):
    strange = os.fsencode(tmp_path) + b"/\xff.png"
    arguments = [sys.executable, "-m", "runtime.derain", photo, strange, "--model", network]
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(arguments, capture_output=True, text=True, env=strict)
    assert run.returncode == 0, run.stderr
    assert os.path.exists(strange)
    run = subprocess.run([*arguments[:3], "\x1b[2J\nno.png", "out.png"], capture_output=True, text=True, env=strict)
    assert run.returncode == 2
    assert run.stderr.startswith("error: ")
    assert run.stderr[:-1].isprintable()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "\x1b[2J\nbroken.png").touch()
    folders = [*arguments[:3], tmp_path / "in", tmp_path / "out", "--model", network]
    run = subprocess.run(folders, capture_output=True, text=True, env=strict)
    assert run.returncode == 1
    assert run.stderr.startswith("error: ")
    assert run.stderr[:-1].isprintable()


def test_want_of_memory_is_one_line(monkeypatch, capsys):
    def grab() -> None:
        np.ones((10**6, 10**6, 3), np.uint8)

    status, told = command(monkeypatch, capsys, grab)
    assert status == 2
    assert told.startswith("error: out of memory: Unable to allocate")
    assert len(told.splitlines()) == 1


# Threads and processes.


def test_sixteen_threads_share_one():
    """The shipped network; images of several sizes, each several times."""
    derain = Derainer(provider="cpu")
    photos = [noise(24 + 9 * (seed % 4), 40 - 7 * (seed % 3), seed) for seed in range(48)]
    expected = [derain(photo) for photo in photos]
    with ThreadPoolExecutor(16) as pool:
        for _ in range(2):
            for restored, alone in zip(pool.map(derain, photos), expected, strict=True):
                np.testing.assert_array_equal(restored, alone)


FORKED = """
import os, sys
import numpy as np
from runtime import Derainer
from runtime.session import open_session
image = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
derain = Derainer(open_session(None, "cpu", threads=int(sys.argv[1])))
before = derain.submit(image).result()
child = os.fork()
if child == 0:
    answers = derain(image), derain.submit(image).result(60)
    os._exit(0 if all(np.array_equal(answer, before) for answer in answers) else 1)
status = os.waitpid(child, 0)[1]
assert np.array_equal(derain.submit(image).result(), before)
sys.exit(status)
"""


@pytest.mark.parametrize("threads", [1, 4])
def test_child_of_a_fork_may_use_it(threads):
    run = python(FORKED, threads)
    assert run.returncode == 0, run.stderr


SPAWNED = """
import multiprocessing, sys
import numpy as np
from runtime.bundle import load
from runtime.session import Derainer, open_session

image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)

def restore(bundle):
    bundle.verify()
    return Derainer(bundle.folder, provider="cpu")(image)

if __name__ == "__main__":
    bundle = load(sys.argv[1])
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for restored in pool.map(restore, [bundle] * 4):
            assert np.array_equal(restored, restore(bundle))
"""


def test_spawned_processes_open_their_own(tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    opened = load(bundle)
    assert pickle.loads(pickle.dumps(opened)) == opened
    (tmp_path / "program.py").write_text(SPAWNED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, tmp_path / "program.py", bundle], capture_output=True, text=True, env=environment, timeout=120
    )
    assert run.returncode == 0, run.stderr


def test_network_itself_does_not_travel(network):
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(Derainer(network, provider="cpu"))
