"""Writing files so that nothing half-written is left behind and no input is overwritten."""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError


def expect_output(*outputs: Path, **sources: str | os.PathLike[str] | None) -> None:
    """Before the work whose result is to go there, and without making anything.

    Args:
        outputs: Files to write.
        sources: Files that are read, by the names of their parameters.

    Raises:
        InputError: An output is one of the sources, or something else than a file.
        OSError: It cannot be made where it is to be.
    """
    for output in outputs:
        _expect_file(output)
        place = next(place for place in output.absolute().parents if place.exists())
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
        for name, source in sources.items():
            if source is not None and os.path.exists(source) and output.exists() and output.samefile(source):
                raise InputError(f"`output`: expected another file than `{name}`, found {output} for both")


@contextmanager
def writing(path: str | os.PathLike[str], mode: int = 0o666) -> Iterator[Path]:
    """A temporary path beside `path` to write to, which takes its name when the block ends and vanishes when it fails.

    Missing parent folders are made. The temporary name keeps the suffix, from which libraries guess the format. `mode`:
    permissions of the file, less those in the process's umask.

    Raises:
        InputError: Where `path` is something else than a file, which would be replaced too; an OSError, such as that of
            a full disk, names `path`.
    """
    path = Path(path)
    _expect_file(path)
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


def _expect_file(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise InputError(f"expected a file to write, found a folder, a pipe or a device at {path}")


def expect_writable(folder: Path) -> None:
    """Make a folder, and raise OSError where that fails or nothing can be written into it: before the work whose result
    is to go there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def report_file(path: Path) -> Path:
    """The page that an option means: a .html file, or a report.html in a folder."""
    return path if path.suffix.lower() in (".html", ".htm") else path / "report.html"


def read_own(path: Path) -> bytes:
    """The content of a file that nobody but this user could write; nothing, where it is not there or not so."""
    try:
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            foreign = hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022)
            return b"" if foreign else stream.read()
    except OSError:
        return b""
