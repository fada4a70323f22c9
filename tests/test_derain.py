"""`python -m runtime.derain` on files and folders, and the promise that the runtime runs without PyTorch."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime import InputError
from runtime.derain import derain
from tests.test_ort import write_network

ROOT = Path(__file__).parents[1]


@pytest.fixture
def network(tmp_path):
    """Halves every value."""
    return write_network(tmp_path / "half.onnx")


@pytest.fixture
def photos(tmp_path):
    """A folder with three images, of values 100, 102, 104."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, name in enumerate(("a.png", "b.JPG", "c.webp")):
        Image.new("RGB", (9 + i, 7), (100 + 2 * i,) * 3).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def command(monkeypatch, *arguments):
    """Run the command in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["derain", *map(str, arguments)])
    monkeypatch.delitem(sys.modules, "runtime.derain", raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("runtime.derain", run_name="__main__")
    return stop.value.code


def value(path):
    with Image.open(path) as image:
        return round(np.asarray(image).mean())


def test_file_to_file(network, photos, tmp_path, monkeypatch, capsys):
    output = tmp_path / "new" / "a.jpg"
    assert command(monkeypatch, photos / "a.png", output, "--model", network, "--provider", "cpu") == 0
    assert value(output) == 50
    assert capsys.readouterr().out.splitlines()[-1] == f"1 image restored on cpu: {output}"


def test_file_into_folder(network, photos, tmp_path):
    (tmp_path / "out").mkdir()
    report = derain(photos / "a.png", tmp_path / "out", model=network)
    assert report.restored == [tmp_path / "out" / "a.png"]
    assert value(tmp_path / "out" / "a.png") == 50


def test_folder_into_folder(network, photos, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    assert command(monkeypatch, photos, output, "--model", network, "--provider", "cpu", "--threads", "1") == 0
    assert {path.name: value(path) for path in output.iterdir()} == {"a.png": 50, "b.JPG": 51, "c.webp": 52}
    assert capsys.readouterr().out.splitlines()[-1] == f"3 of 3 images restored on cpu: {output}"
    assert value(photos / "a.png") == 100


def test_replaces_what_is_there(network, photos, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "a.png").write_text("old")
    derain(photos, output, model=network)
    assert value(output / "a.png") == 50


def test_broken_images_are_named_and_the_others_done(network, photos, tmp_path, monkeypatch, capsys):
    whole = (photos / "a.png").read_bytes()
    (photos / "aa.png").write_bytes(whole[: len(whole) // 2])
    Image.new("CMYK", (8, 8)).save(photos / "d.jpg")
    Image.new("RGBA", (8, 8)).save(photos / "e.jpg", "PNG")  # transparent, and to be written as JPEG
    output = tmp_path / "out"
    assert command(monkeypatch, photos, output, "--model", network) == 1
    assert sorted(path.name for path in output.iterdir()) == ["a.png", "b.JPG", "c.webp"]
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 3, printed.err
    for line, name in zip(lines, ("aa.png", "d.jpg", "e.jpg"), strict=True):
        assert line.startswith("error: ")
        assert name in line
    assert printed.out.splitlines()[-1].startswith("3 of 6 images restored")


def test_names_the_image_that_the_network_refuses(photos, tmp_path):
    network = write_network(tmp_path / "static.onnx", shape=(1, 3, 8, 16))
    Image.new("RGB", (40, 7)).save(photos / "wide.png")
    report = derain(photos, tmp_path / "out", model=network)
    assert len(report.restored) == 3
    assert len(report.failures) == 1
    assert str(photos / "wide.png") in report.failures[0]


def test_bad_arguments_end_with_one_line_and_status_2(network, photos, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    (tmp_path / "file.png").write_text("here")
    link = tmp_path / "link"
    link.symlink_to(photos)
    for arguments, words in [
        ((tmp_path / "none", tmp_path / "out"), "found nothing at"),
        ((tmp_path / "empty", tmp_path / "out"), "expected images ending in .png"),
        ((photos, tmp_path / "file.png"), "expected a folder as OUTPUT"),
        ((photos, photos), "would overwrite"),
        ((photos, link), "would overwrite"),
        ((photos / "a.png", photos), "would overwrite"),
        ((photos / "a.png", photos / "a.png"), "would overwrite"),
        ((photos / "a.png", tmp_path / "a.gif"), "ending in .png"),
        ((photos / "notes.txt", tmp_path / "out.png"), "not a PNG"),
    ]:
        assert command(monkeypatch, *arguments, "--model", network) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert len(printed.err.splitlines()) == 1, printed.err
        assert words in printed.err
    assert command(monkeypatch, photos, tmp_path / "out", "--model", tmp_path / "none.onnx") == 2
    assert "expected an ONNX file" in capsys.readouterr().err
    assert (tmp_path / "file.png").read_text() == "here"
    assert value(photos / "a.png") == 100
    assert not (tmp_path / "out").exists()


def test_usage(monkeypatch, capsys):
    assert command(monkeypatch) == 2
    assert "INPUT" in capsys.readouterr().err
    assert command(monkeypatch, "a", "b", "--provider", "tpu") == 2
    capsys.readouterr()
    assert command(monkeypatch, "--help") == 0
    assert "python -m runtime.derain photos/ restored/" in capsys.readouterr().out


def test_transparency_is_checked_before_the_network_runs(photos, tmp_path):
    network = write_network(tmp_path / "static.onnx", shape=(1, 3, 64, 64))  # would refuse the size
    Image.new("RGBA", (8, 8)).save(photos / "a.png")
    with pytest.raises(InputError, match="cannot hold the transparency"):
        derain(photos / "a.png", tmp_path / "a.jpg", model=network)


WITHOUT_TORCH = """
import importlib, pkgutil, runpy, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise AssertionError("the runtime imports torch")

sys.meta_path.insert(0, NoTorch())
import runtime
for module in pkgutil.walk_packages(runtime.__path__, "runtime."):
    importlib.import_module(module.name)
    print(module.name)
sys.argv[0] = "derain"
del sys.modules["runtime.derain"]
runpy.run_module("runtime.derain", run_name="__main__")
"""


def test_runs_without_torch(network, photos, tmp_path):
    output = tmp_path / "out"
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, photos, output, "--model", network],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert {"runtime.derain", "runtime.images", "runtime.ort", "runtime.session"} <= set(result.stdout.splitlines())
    assert value(output / "a.png") == 50
