"""What every command shares: how a function becomes a command line, and how its mistakes and its progress are told.

A command is a typed, documented function that a notebook can call too. `main` parses its arguments, prints the result's
summary as the last line, and turns a user's mistake into one line instead of a traceback. Exit status: 0 done, 1 a
gate failed, 2 bad usage or bad input, 3 a fault of the program, with its traceback.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .errors import DerainError, GateError, InputError, one_line
from .pixels import Size, expect_multiples, size_text
from .progress import OnProgress

try:
    import tyro
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
    from rich.table import Table
except ModuleNotFoundError as error:  # only commands import this file
    print(
        f"error: needs the package {error.name}, which is not installed: pip install 'derainer[cli]'", file=sys.stderr
    )
    sys.exit(2)

console = Console(stderr=True)
"""Where progress and remarks go; results go to standard output."""

EXTRAS = {
    **dict.fromkeys(("torch", "safetensors", "lightning_fabric", "tensorboard", "click"), "drsformer-deploy[torch]"),
    **dict.fromkeys(("onnx", "onnxscript", "polygraphy"), "drsformer-deploy[export]"),
    **dict.fromkeys(("matplotlib", "torch_pruning"), "drsformer-deploy[compress]"),
    "tritonclient": "drsformer-deploy[serve]",
    "jinja2": "derainer[report]" if __package__ == "derainer" else "drsformer-deploy[report]",
}
"""What to install for a module that is missing."""

UNIT_BYTES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

FIRST_LINE_SECONDS, LINE_SECONDS = 2.0, 30.0
"""After which the first line tells the progress of a stage, and the next ones, where there is no terminal."""


class Remarks(logging.Handler):
    """What libraries log, as lines on standard error above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        line = f"remark: {one_line(record.getMessage())}"
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def main(
    function: Callable[..., Any],
    description: str | None,
    summary: Callable[[Any], dict[str, Any] | None] | None = None,
    status: Callable[[Any], int] = lambda result: 0,
) -> NoReturn:
    """Run `function` as a command and exit.

    Args:
        description: What --help opens with; by convention the module's docstring, which begins with examples.
        summary: Makes a JSON object of the result, printed as the last line of standard output; None prints nothing.
        status: Makes the exit status of the result.
    """
    logging.basicConfig(handlers=[Remarks(logging.WARNING)], force=True)
    if threading.current_thread() is threading.main_thread():
        _stop_cleanly()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        prog, spec = program(), sys.modules["__main__"].__spec__
        if description is not None:  # a script of the distribution has a name of its own, and so has its package
            verb = (spec.name if spec else function.__module__).rpartition(".")[2]
            description = description.replace(f"python -m runtime.{verb}", prog)
        result = tyro.cli(function, prog=prog, description=description, config=(tyro.conf.DisallowNone,))
        line = summary(result) if summary else None
        if line is not None:
            print(json.dumps(line), flush=True)
        sys.exit(status(result))
    except GateError as error:
        print("failed: " + one_line(as_options(str(error))), file=sys.stderr, flush=True)
        sys.exit(1)
    except DerainError as error:
        fail(as_options(str(error)))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            traceback.print_exc()
            sys.exit(3)
        fail(f"needs the package {package}, which is not installed: pip install '{EXTRAS[package]}'")
    except BrokenPipeError:  # whoever read what is printed has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as a shell has it for SIGPIPE
    except OSError as error:
        if error.strerror is None:
            traceback.print_exc()
            sys.exit(3)
        fail(": ".join([*([str(error.filename)] if error.filename else []), error.strerror]))
    except Exception as error:
        if _is_want_of_memory(error):
            fail(f"out of memory: {error}" if str(error) else "out of memory")
        if full := _want_of_space(error):
            fail(full)
        traceback.print_exc()  # a fault of ours, which is not a gate that failed
        sys.exit(3)
    except KeyboardInterrupt as interrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + (interrupt.signal if isinstance(interrupt, _Stopped) else signal.SIGINT))


class _Stopped(KeyboardInterrupt):
    """What a signal from outside becomes, so that nothing half-written is left behind, as with ctrl-C."""

    def __init__(self, signal: int) -> None:
        super().__init__()
        self.signal = signal


def _stop_cleanly() -> None:
    """Let SIGTERM and SIGHUP be exceptions, where nobody else wants them: not under nohup."""

    def stop(number: int, frame: object) -> NoReturn:
        raise _Stopped(number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, stop)


def program() -> str:
    """What was typed to start this command, without its arguments."""
    spec = sys.modules["__main__"].__spec__  # None for a script
    return f"python -m {spec.name}" if spec else Path(sys.argv[0]).name


def typed() -> str:
    """The command line as it was typed, for reports."""
    return f"{program()} {shlex.join(sys.argv[1:])}"


def _is_want_of_memory(error: Exception) -> bool:
    """PyTorch has a RuntimeError of its own for it on a GPU, and a plain one on a CPU."""
    of_pytorch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and of_pytorch)


def _want_of_space(error: BaseException | None) -> str | None:
    """What a full disk is told as, where it is why the error came, or why that came which it came from; else None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return f"{error.filename or 'a file to write'}: {error.strerror}"
        error = error.__cause__ or error.__context__
    return None


def fail(message: str) -> NoReturn:
    """Exit with status 2 after one line on standard error."""
    print("error: " + one_line(message), file=sys.stderr, flush=True)
    sys.exit(2)


def as_options(message: str) -> str:
    """A message of a function with its parameters as the command's options: `round_to` becomes --round-to."""
    return re.sub(r"`([a-z][a-z0-9_]*)`", lambda match: "--" + match[1].replace("_", "-"), message)


def parse_size(option: str, text: str, multiple: int = 1) -> Size:
    """Height and width from "HxW", as given by an option. Raises InputError for anything else, and where one is no
    multiple of `multiple`, to which images are padded."""
    try:
        size = size_from_text(text)
    except InputError as error:
        raise InputError(f"`{option}`: {error}") from None
    expect_multiples(option, size, multiple)
    return size


def size_from_text(text: str) -> Size:
    """Height and width from "HxW". Raises InputError for anything else."""
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text, re.ASCII)
    if not match:
        raise InputError(f"expected height and width as HxW such as 720x1280, found {text!r}")
    return int(match[1]), int(match[2])


def bytes_from_text(text: str) -> int:
    """A number of bytes from one with a unit, such as 4GB. Raises InputError for anything else."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?) ?([KMG]I?B|)", text.upper(), re.ASCII)
    if match is None:
        raise InputError(f"expected a number of bytes such as 4GB or 500MB, found {text!r}")
    return int(float(match[1]) * UNIT_BYTES[match[2]])


def share_from_text(text: str) -> tuple[int, int]:
    """The share, from 1, and the number of shares from "I/N". Raises InputError for anything else."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    part, parts = map(int, match.groups()) if match else (0, 0)
    if not 1 <= part <= parts:
        raise InputError(f"expected I/N from 1/N to N/N, such as 3/8, found {text!r}")
    return part, parts


def hxw(option: str) -> Any:
    """For `Annotated[Size, hxw("tile")]`, the type of an option that is a height and width."""
    return _one_word(option, "HxW", size_from_text, size_text)


def byte_count(option: str) -> Any:
    """For `Annotated[int, byte_count("memory")]`, the type of an option that is a number of bytes with a unit."""
    return _one_word(option, "BYTES", bytes_from_text, str)


def share(option: str) -> Any:
    """For `Annotated[tuple[int, int], share("shard")]`, the type of an option that is a share of the work."""
    return _one_word(option, "I/N", share_from_text, lambda value: f"{value[0]}/{value[1]}")


def _one_word(option: str, metavar: str, parse: Callable[[str], Any], show: Callable[[Any], str]) -> Any:
    def parse_named(words: list[str]) -> Any:
        try:
            return parse(words[0])
        except InputError as error:
            raise InputError(f"`{option}`: {error}") from None

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=parse_named,
        is_instance=lambda value: isinstance(value, (tuple, int)),
        str_from_instance=lambda value: [show(value)],
    )


def table_of(
    keys: Sequence[str], numbers: Sequence[str] = (), title: str | None = None, caption: str | None = None
) -> Table:
    """A table for people, with columns of text and then of numbers. Where there is no room, as in a pipe, which counts
    as 80 characters wide, cells go on in the next line, the widest first, and nothing is cut off."""
    shown = Table(title=title and escape(title), caption=caption, box=box.SIMPLE, pad_edge=False, title_justify="left")
    for name in keys:
        shown.add_column(escape(name), overflow="fold")
    for name in numbers:
        shown.add_column(escape(name), justify="right", overflow="fold")
    return shown


def progress(shown: bool = True, **columns: Any) -> Progress:
    """A progress bar on standard error: what, how many of how many, time left, then `columns` by name as
    templates over the task's fields. Silent where it is not to be shown and where standard error is no terminal."""
    extra = [TextColumn(template) for template in columns.values()]
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        *extra,
        console=console,
        disable=not (shown and console.is_terminal),
    )


@contextmanager
def progress_shown() -> Iterator[OnProgress]:
    """An `OnProgress` for the block that shows on standard error what it is told: on a terminal one bar for each stage;
    elsewhere a line for a stage that has lasted `FIRST_LINE_SECONDS`, then one every `LINE_SECONDS`, and one when such
    a stage ends."""
    if not console.is_terminal:
        lines = ProgressLines()
        try:
            yield lines
        finally:
            lines.close()
        return
    with progress(remark="{task.fields[remark]}") as bars:
        tasks: dict[str, TaskID] = {}

        def draw(stage: str, done: int, total: int, remark: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total or None, remark=remark)
            bars.update(tasks[stage], completed=done, total=total or None, remark=remark)

        yield draw


@dataclass
class _Stage:
    """A stage under way: what was last told of it, when it began, and when its next line is due."""

    began: float
    due: float
    text: str = ""
    shown: bool = False


class ProgressLines:
    """An `OnProgress` for where there is no terminal; a thread of its own prints, so that one long step is told too."""

    def __init__(self) -> None:
        self._stages: dict[str, _Stage] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def __call__(self, stage: str, done: int, total: int, remark: str = "") -> None:
        now = time.monotonic()
        with self._lock:
            entry = self._stages.setdefault(stage, _Stage(now, now + FIRST_LINE_SECONDS))
            seconds = (now - entry.began) / done * (total - done) if 0 < done < total else 0
            left = f"about {_duration(seconds)} left" if seconds >= 1 else ""
            parts = (f"{stage} {done} of {total}" if total else stage, left, remark)
            entry.text = one_line(", ".join(part for part in parts if part))
            if total and done >= total:
                if entry.shown:
                    self._print(entry.text)
                del self._stages[stage]

    def close(self) -> None:
        """Print no more."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(0.25):
            now = time.monotonic()
            with self._lock:
                for entry in self._stages.values():
                    if now >= entry.due and not self._closed.is_set():
                        self._print(entry.text)
                        entry.due, entry.shown = now + LINE_SECONDS, True

    @staticmethod
    def _print(text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
