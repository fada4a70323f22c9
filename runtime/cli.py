"""What every command shares: how a function becomes a command line, and how its mistakes are told.

A verb is a typed, documented function that a notebook can call too. `main` parses its arguments, prints the result's
summary as the last line, and turns a user's mistake into one line instead of a traceback. Exit status: 0 done, 1 a
gate failed, 2 bad usage or bad input, 3 a fault of the program, with its traceback.
"""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True)
"""Where progress and remarks go; results go to standard output."""


class InputError(Exception):
    """Something the user gave cannot be used. The message is one line: expected, found, how to mend it.

    Not a ValueError, since tyro would catch one that an option's dataclass raises and draw a box around it.
    """


class GateError(RuntimeError):
    """What was made does not pass its test, through no fault of the user. One line; exit status 1."""


def main(
    function: Callable[..., Any],
    description: str | None,
    summary: Callable[[Any], dict[str, Any] | None] | None = None,
    status: Callable[[Any], int] = lambda result: 0,
) -> NoReturn:
    """Run `function` as a command and exit.

    description: what --help opens with; by convention the module's docstring, which begins with examples.
    summary:     makes a JSON object of the result, printed as the last line of standard output; None prints nothing.
    status:      makes the exit status of the result.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        spec = sys.modules["__main__"].__spec__  # None for a script; tyro would show the module's path
        prog = f"python -m {spec.name}" if spec else None
        result = tyro.cli(function, prog=prog, description=description, config=(tyro.conf.DisallowNone,))
        line = summary(result) if summary else None
        if line is not None:
            print(json.dumps(line), flush=True)
        sys.exit(status(result))
    except InputError as error:
        fail(str(error))
    except OSError as error:
        if error.strerror is None:
            traceback.print_exc()
            sys.exit(3)
        fail(": ".join([*([str(error.filename)] if error.filename else []), error.strerror]))
    except GateError as error:
        print("failed: " + one_line(str(error)), file=sys.stderr, flush=True)
        sys.exit(1)
    except Exception as error:
        if _is_want_of_memory(error):
            fail(f"out of memory: {error}" if str(error) else "out of memory")
        traceback.print_exc()  # a fault of ours, which is not a gate that failed
        sys.exit(3)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _is_want_of_memory(error: Exception) -> bool:
    """PyTorch has a RuntimeError of its own for it on a GPU, and a plain one on a CPU."""
    of_pytorch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and of_pytorch)


def fail(message: str) -> NoReturn:
    """Exit with status 2 after one line on standard error."""
    print("error: " + one_line(message), file=sys.stderr, flush=True)
    sys.exit(2)


def one_line(message: str) -> str:
    """As one line, in which nothing steers the terminal, whatever the names in it are."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))


def parse_size(option: str, text: str, multiple: int = 1) -> tuple[int, int]:
    """Height and width from "HxW", as given by an option. Raises InputError for anything else, and where one is no
    multiple of `multiple`, to which images are padded."""
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text, re.ASCII)
    if not match:
        raise InputError(f"--{option}: expected height and width as HxW such as 720x1280, found {text!r}")
    size = int(match[1]), int(match[2])
    if size[0] % multiple or size[1] % multiple:
        raise InputError(f"--{option}: expected multiples of {multiple}, to which images are padded, found {text}")
    return size


def size_text(size: tuple[int, int]) -> str:
    """Height and width as `parse_size` reads them."""
    return f"{size[0]}x{size[1]}"


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


def expect_other_files(*outputs: Path, **sources: str | os.PathLike[str] | None) -> None:
    """Raise InputError where one of the files to write is one that is read, of `sources` by the names of their
    options."""
    for output in outputs:
        for name, source in sources.items():
            if source is not None and os.path.exists(source) and output.exists() and output.samefile(source):
                raise InputError(f"--output: expected another file than --{name}, found {output} for both")


@contextmanager
def writing(path: str | os.PathLike[str], mode: int = 0o666) -> Iterator[Path]:
    """A temporary path beside `path` to write to, which takes its name when the block ends and vanishes when it fails.

    Missing parent folders are made. The temporary name keeps the suffix, from which libraries guess the format. `mode`:
    permissions of the file, less those in the process's umask. Raises InputError where `path` is something else than a
    file, which would be replaced too; an OSError, such as that of a full disk, names `path`.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise InputError(f"expected a file to write, found a folder, a pipe or a device at {path}")
    prefix = f".{path.stem[:40]}."  # a name has up to 255 bytes, and a character up to 4
    temporary = path.with_name(f"{prefix}{secrets.token_hex(8)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        unnamed = error.filename is None or Path(str(error.filename)).name.startswith(prefix)
        if unnamed and error.strerror is not None:
            error.filename = str(path)
        raise
