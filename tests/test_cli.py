"""What every command shares."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import tyro
from rich.console import Console

from runtime.cli import main, parse_size, table_of
from runtime.errors import InputError
from runtime.files import expect_output, writing

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Rounding:
    digits: int = 0

    def __post_init__(self) -> None:
        if self.digits:
            raise InputError(f"--digits: expected 0, found {self.digits}")


def divide(
    number: int,
    by: int = 2,
    remark: str | None = None,
    rounding: Annotated[Rounding, tyro.conf.OmitArgPrefixes] = Rounding(),
) -> int:
    """Divide NUMBER."""
    if by == 0:
        raise InputError("expected a divisor,\nfound 0")
    if by < 0:
        raise FileNotFoundError(2, "No such file or directory", "numbers.txt")
    return number // by


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["divide", *arguments])
    with pytest.raises(SystemExit) as stop:
        main(divide, "Divides.", summary=lambda n: {"n": n}, status=lambda n: int(n > 5))
    return stop.value.code


def test_summary_is_the_last_line_and_the_status_is_the_gate(monkeypatch, capsys):
    assert command(monkeypatch, "--number", "8") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"n": 4}
    assert command(monkeypatch, "--number", "80") == 1


def test_want_of_memory_in_pytorch_is_one_line(monkeypatch, capsys):
    torch = pytest.importorskip("torch")

    def divide(number: int) -> None:
        if number == 1:
            torch.empty(2**46)
        raise (torch.OutOfMemoryError if number == 2 else RuntimeError)("CUDA out of memory.\nTried")

    for number, status in (("1", 2), ("2", 2), ("3", 3)):
        monkeypatch.setattr(sys, "argv", ["divide", "--number", number])
        with pytest.raises(SystemExit) as stop:
            main(divide, "Divides.")
        assert stop.value.code == status
        error = capsys.readouterr().err
        assert (error.startswith("error: out of memory: ") and error.count("\n") == 1) is (status == 2)


def test_mistakes_are_one_line_and_status_2(monkeypatch, capsys):
    assert command(monkeypatch, "--number", "8", "--by", "0") == 2
    assert capsys.readouterr().err == "error: expected a divisor, found 0\n"
    assert command(monkeypatch, "--number", "8", "--by", "-1") == 2
    assert capsys.readouterr().err == "error: numbers.txt: No such file or directory\n"
    assert command(monkeypatch, "--number", "8", "--digits", "1") == 2  # told while the arguments are still read
    assert capsys.readouterr().err == "error: --digits: expected 0, found 1\n"
    for arguments in ((), ("--number", "eight"), ("--number", "8", "--bye", "1")):
        assert command(monkeypatch, *arguments) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_half_written(tmp_path, number):
    program = (
        "import os, pathlib, signal\n"
        "from runtime.cli import main\n"
        "from runtime.files import writing\n"
        f"signal.signal({number:d}, signal.SIG_DFL)\n"  # whatever the tests are run by, such as nohup
        "def halt():\n"
        f"    with writing(pathlib.Path({str(tmp_path)!r}) / 'a.txt'):\n"
        f"        os.kill(os.getpid(), {number:d})\n"
        "main(halt, None)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (128 + number, "interrupted\n")
    assert not any(tmp_path.iterdir())


def test_a_reader_that_has_seen_enough_is_no_error():
    program = "from runtime.cli import main\nmain(lambda: print('line\\n' * 100_000, flush=True), None)"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.read(5)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_a_full_disk_is_told_whatever_a_library_makes_of_it(monkeypatch, capsys):
    def log() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "events")
        except OSError as error:
            raise ValueError("you tried to log what is not supported") from error

    monkeypatch.setattr(sys, "argv", ["log"])
    with pytest.raises(SystemExit) as stop:
        main(log, None)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: events: No space left on device\n"


def test_an_output_that_cannot_be_is_told_before_the_work(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    with pytest.raises(InputError, match="expected a file to write, found a folder"):
        expect_output(tmp_path / "folder")
    with pytest.raises(NotADirectoryError, match="file"):
        expect_output(tmp_path / "file" / "new" / "a.txt")
    with pytest.raises(InputError, match="`output`: expected another file than `weights`"):
        expect_output(tmp_path / "file", weights=tmp_path / "file")
    expect_output(tmp_path / "new" / "folder" / "a.txt")
    assert not (tmp_path / "new").exists()
    if os.geteuid():
        (tmp_path / "folder").chmod(0o500)
        with pytest.raises(PermissionError, match="folder"):
            expect_output(tmp_path / "folder" / "a.txt")


def test_help_offers_no_none(monkeypatch, capsys):
    assert command(monkeypatch, "--help") == 0
    assert "--remark STR" in capsys.readouterr().out


def test_usage_shows_the_command_as_it_is_typed(monkeypatch, capsys):
    class Module:
        class __spec__:  # noqa: N801
            name = "runtime.divide"

    monkeypatch.setitem(sys.modules, "__main__", Module)
    assert command(monkeypatch, "--help") == 0
    assert capsys.readouterr().out.startswith("usage: python -m runtime.divide ")


def test_writing_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with writing(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
        assert temporary.suffix == ".txt"
    with pytest.raises(ZeroDivisionError), writing(path) as temporary:
        _ = temporary.write_text("second") / 0
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a" * 251 + ".txt", "ä" * 125 + ".txt"])
def test_writing_takes_the_longest_names(tmp_path, name):
    with writing(tmp_path / name) as temporary:
        temporary.write_text("first")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_writing_keeps_to_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        for mode in (0o666, 0o600):
            with writing(tmp_path / "a.txt", mode):
                pass
            assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode & ~umask
        assert os.umask(umask) == umask
    finally:
        os.umask(before)


@pytest.mark.parametrize("text", ["", "8", "8x", "0x8", "8x-8", "8x8x8", "8.0x8", "٣x٣", "8x9999999", "axb"])
def test_sizes_that_are_none(text):
    with pytest.raises(InputError, match="`size`: expected height and width as HxW such as 720x1280, found"):
        parse_size("size", text)


def test_sizes():
    assert parse_size("size", "720x1281") == (720, 1281)
    with pytest.raises(InputError, match="`tile`: expected multiples of 8, to which images are padded, found 720x1281"):
        parse_size("tile", "720x1281", 8)


def test_tables_that_are_no_table_of_have_a_test_of_their_own():
    """In test_info.py and test_validate.py."""
    packages = ("runtime", "drsformer", "export", "compress", "benchmarks")
    files = [path for package in packages for path in ROOT.glob(f"{package}/*.py")]
    found = {f"{path.parent.name}/{path.name}" for path in files if re.search(r"\bTable\(", path.read_text())}
    assert found == {"runtime/cli.py", "runtime/info.py", "export/validate.py"}


@pytest.mark.parametrize("width", [80, 60])
def test_tables_keep_their_keys_and_numbers_where_there_is_no_room(width):
    key, numbers = "".join(f"<{i:02}>" for i in range(30)), ["1234567", "30.1234", "0.9876", "1", "22.75"]
    shown = table_of(["image"], ["parameters", "psnr", "ssim", "n", "input psnr"], title="[/b] title")
    shown.add_row(key, *numbers)
    console = Console(width=width)
    with console.capture() as capture:
        console.print(shown)
    lines = capture.get().splitlines()
    assert lines[0].strip() == "[/b] title"
    assert all(len(line) <= width for line in lines)
    body = [line.split() for line in lines[1 + max(i for i, line in enumerate(lines) if "─" in line) :] if line.strip()]
    assert "".join(cells[0] for cells in body) == key
    assert body[0][1:] == numbers
