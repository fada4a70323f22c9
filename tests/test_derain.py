"""`python -m runtime.derain` on files and folders, and the promise that the runtime runs without PyTorch."""

import errno
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime import InputError
from runtime.cli import bytes_from_text, share_from_text
from runtime.derain import DerainOptions, derain
from tests.support.commands import Session, command
from tests.support.onnx_files import write_network

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
    report = derain(photos / "a.png", tmp_path / "out", DerainOptions(model=network))
    assert report.restored == [tmp_path / "out" / "a.png"]
    assert value(tmp_path / "out" / "a.png") == 50


def test_folder_into_folder(network, photos, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    assert command(monkeypatch, photos, output, "--model", network, "--provider", "cpu", "--threads", "1") == 0
    assert {path.name: value(path) for path in output.iterdir()} == {"a.png": 50, "b.JPG": 51, "c.webp": 52}
    assert capsys.readouterr().out.splitlines()[-1] == f"3 of 3 images restored on cpu: {output}"
    assert value(photos / "a.png") == 100


def test_a_file_is_replaced(network, photos, tmp_path):
    target = tmp_path / "a.png"
    target.write_text("old")
    for _ in range(2):
        report = derain(photos / "a.png", target, DerainOptions(model=network))
        assert (report.restored, report.skipped) == ([target], 0)
        assert value(target) == 50


def test_what_is_done_is_left_out_of_a_folder(network, photos, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    for names in ({"a.png", "b.JPG", "c.webp"}, set(), {"b.JPG"}):
        if names == {"b.JPG"}:  # was changed since
            os.utime(photos / "b.JPG", (time.time() + 10,) * 2)
        report = derain(photos, output, DerainOptions(model=network))
        assert {path.name for path in report.restored} == names
        assert report.skipped == 3 - len(names)
    os.utime(photos / "b.JPG", (0, 0))
    capsys.readouterr()
    assert command(monkeypatch, photos, output, "--model", network, "--provider", "cpu") == 0
    before = "3 had been before (--overwrite restores them again)"
    assert capsys.readouterr().out == f"0 of 3 images restored on cpu, {before}: {output}\n"
    (output / "a.png").write_text("anything")
    assert len(derain(photos, output, DerainOptions(model=network, overwrite=True)).restored) == 3
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
    remark, *lines = printed.err.splitlines()
    assert remark == f"remark: {photos}: left out as no PNG, JPEG, WebP, BMP or TIFF by their names: notes.txt"
    assert len(lines) == 3, printed.err
    for line, name in zip(lines, ("aa.png", "d.jpg", "e.jpg"), strict=True):
        assert line.startswith("error: ")
        assert name in line
    assert printed.out.splitlines()[-1].startswith("3 of 6 images restored")


@pytest.fixture
def session(monkeypatch):
    monkeypatch.setattr("runtime.derain.open_session", lambda *options: Session())


def test_names_the_image_that_the_network_refuses(session, photos, tmp_path):
    Image.new("RGB", (40, 7)).save(photos / "wide.png")
    Image.new("RGB", (32, 7)).save(photos / "heavy.png")
    report = derain(photos, tmp_path / "out")
    assert len(report.restored) == 3
    heavy, wide = report.failures
    assert heavy.startswith(f"{photos / 'heavy.png'}: not enough memory")
    assert wide == f"{photos / 'wide.png'}: too wide"


def test_images_of_one_size_are_restored_together(photos, tmp_path, monkeypatch):
    """Broken ones among them, and such as the network refuses, are named as ever."""
    for i in range(5):
        Image.new("RGB", (20, 20), (100 + 2 * i,) * 3).save(photos / f"d{i}.png")
    (photos / "d2b.png").write_bytes(b"no image")
    runs = []

    class Together(Session):
        def max_batch(self, size):
            return 4

        def run(self, batch):
            runs.append(len(batch))
            return np.concatenate([super(Together, self).run(batch[i : i + 1]) for i in range(len(batch))])

    monkeypatch.setattr("runtime.derain.open_session", lambda *options: Together())
    report = derain(photos, tmp_path / "out")
    assert runs == [1, 1, 1, 4, 1]
    assert len(report.restored) == 8
    assert [value(tmp_path / "out" / f"d{i}.png") for i in range(5)] == [50 + i for i in range(5)]
    (failure,) = report.failures
    assert "d2b.png" in failure
    Image.new("RGB", (40, 7)).save(photos / "e.png")
    Image.new("RGB", (40, 7)).save(photos / "f.png")
    report = derain(photos, tmp_path / "again")
    assert len(report.restored) == 8
    assert [line.split(": ")[1] for line in report.failures[1:]] == ["too wide"] * 2


def test_what_is_left_out_of_a_folder_is_named(session, photos, tmp_path, caplog):
    (photos / "e.jfif").write_bytes((photos / "b.JPG").read_bytes())
    (photos / "below").mkdir()
    for name in ("clip.MP4", "old.avi", ".hidden", "Thumbs.db", "desktop.ini", *(f"{i}.gif" for i in range(6))):
        (photos / name).write_bytes(b"x")
    report = derain(photos, tmp_path / "out")
    assert [path.name for path in report.restored] == ["a.png", "b.JPG", "c.webp", "e.jfif"]
    assert caplog.messages == [
        f"{photos}: left out as videos, to be restored one by one: clip.MP4, old.avi",
        f"{photos}: left out as no PNG, JPEG, WebP, BMP or TIFF by their names: "
        "0.gif, 1.gif, 2.gif, 3.gif, 4.gif and 2 more",
    ]


def test_a_thousand_images_with_ten_broken(session, tmp_path):
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    Image.new("RGB", (4, 4), (100,) * 3).save(photos / "000.png")
    whole = (photos / "000.png").read_bytes()
    for i in range(1000):
        (photos / f"{i:03}.png").write_bytes(whole if i % 100 != 57 else whole[: 4 * (i // 100)])
    report = derain(photos, output)
    assert [path.name for path in report.restored] == [f"{i:03}.png" for i in range(1000) if i % 100 != 57]
    assert len(report.failures) == 10
    for i, failure in enumerate(report.failures):
        assert failure.startswith(f"{photos / f'{i}57.png'}: ")
    assert {path.name for path in output.iterdir()} == {path.name for path in report.restored}
    assert {value(path) for path in output.iterdir()} == {50}
    again = derain(photos, output)
    assert (again.restored, again.skipped, again.failures) == ([], 990, report.failures)


SLOW = """
import sys
from pathlib import Path
import runtime.derain
from tests.support.commands import Session
runtime.derain.open_session = lambda *options: Session(0.02)
runtime.derain.derain(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_run_that_was_killed_can_be_started_again(session, tmp_path):
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for i in range(200):
        Image.new("RGB", (20, 20), (i,) * 3).save(photos / f"{i:03}.png")
    run = subprocess.Popen([sys.executable, "-c", SLOW, photos, output], cwd=ROOT)
    while len(list(output.glob("*.png"))) < 10:
        assert run.poll() is None
        time.sleep(0.01)
    run.kill()
    run.wait()
    done = {path: path.stat().st_mtime_ns for path in output.glob("[0-9]*.png")}
    assert 10 <= len(done) < 200
    report = derain(photos, output)
    assert report.skipped == len(done)
    assert len(report.restored) == 200 - len(done)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    for i in range(200):
        assert value(output / f"{i:03}.png") == round(i / 2)
    others = [path.name for path in output.iterdir() if not path.name[0].isdigit()]
    assert len(others) <= 1, others  # the one that was being written, hidden
    assert all(name.startswith(".") for name in others)


def test_every_image_is_in_one_shard(session, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (4, 4)).save(photos / "000.png")
    for i in range(1, 200):
        (photos / f"{i:03}.png").write_bytes((photos / "000.png").read_bytes())
    shards = [
        [path.name for path in derain(photos, tmp_path / "out", DerainOptions(shard=(i, 3))).restored]
        for i in (1, 2, 3)
    ]
    assert sorted(name for names in shards for name in names) == [f"{i:03}.png" for i in range(200)]
    assert all(40 < len(names) < 95 for names in shards), [len(names) for names in shards]
    for i in range(100):  # the others stay where they are when images go
        (photos / f"{i:03}.png").unlink()
    again = [path.name for path in derain(photos, tmp_path / "other", DerainOptions(shard=(2, 3))).restored]
    assert again == [name for name in shards[1] if name >= "100"]
    assert derain(photos, tmp_path / "empty", DerainOptions(shard=(1, 100_000))).restored == []
    for text in ("0/3", "4/3", "1", "1/0", "1/3/5", "-1/3", "a/b", "", "1 /3", "¹/3"):
        with pytest.raises(InputError, match="expected I/N"):
            share_from_text(text)
    with pytest.raises(InputError, match="`shard` is for folders"):
        derain(photos / "199.png", tmp_path / "out.png", DerainOptions(shard=(1, 2)))


@pytest.mark.parametrize("suffix", [".jpg", ".tif", ".png", ".bmp", ".webp"])
def test_a_full_disk_ends_it_and_is_named(session, tmp_path, suffix):
    """The largest size that a file may have stands in for what the disk has left."""
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    Image.new("RGB", (4, 4)).save(photos / "a.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)).save(photos / f"b{suffix}")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as error:
            derain(photos, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == str(output / f"b{suffix}")
    assert [path.name for path in output.iterdir()] == ["a.png"]


def test_a_folder_that_cannot_be_written_is_told_before_the_network_runs(photos, tmp_path, monkeypatch, capsys):
    def refuse(*, dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), dir / "tmpname")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    network = write_network(tmp_path / "nan.onnx", scale=float("nan"))  # would be refused on the first image
    for source in (photos, photos / "a.png"):
        assert command(monkeypatch, source, tmp_path / "out" / "a.png", "--model", network) == 2
        out, err = capsys.readouterr()
        folder = tmp_path / "out" / "a.png" if source == photos else tmp_path / "out"
        assert (out, err) == ("", f"error: {folder}: {os.strerror(errno.EROFS)}\n")
        if folder.is_dir():
            folder.rmdir()


def test_tiled_images_are_counted(network, photos, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (9, 40), (100,) * 3).save(photos / "high.png")
    assert command(monkeypatch, photos, tmp_path, "--model", network, "--provider", "cpu", "--tile", "16x16") == 0
    assert capsys.readouterr().out == f"4 of 4 images restored on cpu, 1 in tiles: {tmp_path}\n"


def test_large_images_are_tiled(network, photos, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (500, 300), (100,) * 3).save(photos / "large.png")
    for option, text in (("--tile", "64x128"), ("--memory", "4GB")):
        target = tmp_path / f"{option}.png"
        options = ("--model", network, "--provider", "cpu", option, text)
        assert command(monkeypatch, photos / "large.png", target, *options) == 0
        assert value(target) == 50
    capsys.readouterr()
    for option, text in (
        ("--tile", "64"),
        ("--tile", "0x64"),
        ("--tile", "64x64x3"),
        ("--memory", "4XB"),
        ("--memory", "much"),
        ("--memory", "-4GB"),
        ("--memory", "1e9"),
    ):
        assert command(monkeypatch, photos, tmp_path / "out", "--model", network, option, text) == 2
        assert capsys.readouterr().err.startswith(f"error: {option}: expected ")


@pytest.mark.parametrize(
    ("text", "number"),
    [("7", 7), ("4GB", 4 * 10**9), ("4 gb", 4 * 10**9), ("1.5MB", 1500000), ("2KiB", 2048), ("3GiB", 3 * 2**30)],
)
def test_memory_has_units(text, number):
    assert bytes_from_text(text) == number


def test_the_limit_of_pixels_can_be_moved(network, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 69)  # 9x7 and 10x7, the second above it
    report = derain(photos, tmp_path / "out", DerainOptions(model=network))
    assert [path.name for path in report.restored] == ["a.png"]
    assert "more than 69 pixels" in report.failures[0]
    assert "--max-pixels" in report.failures[0]
    assert not derain(photos, tmp_path / "out", DerainOptions(model=network, max_pixels=1000)).failures
    with pytest.raises(InputError, match="`max_pixels`: expected at least 1"):
        derain(photos, tmp_path / "out", DerainOptions(model=network, max_pixels=0))


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
    assert "expected a bundle or an ONNX file" in capsys.readouterr().err
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
        derain(photos / "a.png", tmp_path / "a.jpg", DerainOptions(model=network))


WITHOUT_TORCH = """
import importlib, pkgutil, runpy, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise AssertionError("the runtime imports torch")

sys.meta_path.insert(0, NoTorch())
import runtime
for module in pkgutil.walk_packages(runtime.__path__, "runtime."):
    if module.name == "runtime.triton":
        continue  # can be imported in the server only
    importlib.import_module(module.name)
    print(module.name)
sys.argv[0] = "derain"
del sys.modules["runtime.derain"]
runpy.run_module("runtime.derain", run_name="__main__", alter_sys=True)
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
