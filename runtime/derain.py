"""Takes the rain out of an image, of all the images in a folder, or of a video.

    python -m runtime.derain rainy.jpg clean.jpg
    python -m runtime.derain photos/ restored/
    python -m runtime.derain photos/ restored/ --model bundle/ --public-key public.pem --provider cuda
    python -m runtime.derain photos/ restored/ --shard $SLURM_ARRAY_TASK_ID/8
    python -m runtime.derain panorama.tif clean.tif --memory 8GB --max-pixels 1000000000
    python -m runtime.derain rainy.mp4 clean.mp4 --crf 16

Images are PNG, JPEG, WebP, BMP and TIFF; EXIF data, ICC profile and transparency are kept. Videos, which need PyAV (pip
install av), become H.264 in MP4, MOV or Matroska; sound, subtitles, time, colours and rotation are kept, see
runtime/video.py. A file at OUTPUT is replaced.

A folder is not searched below its first level, and its images keep their file names. An image whose result is in OUTPUT
already, and not older than the image, is left out unless --overwrite is given; as results are written whole or not at
all, a run that was stopped can simply be started again. Images that cannot be restored are named at the end, and the
exit status is then 1, as it is for a damaged video, of which all that is left is restored.

--shard 3/8 takes the third eighth of a folder's images, so that eight jobs of 1/8 to 8/8 restore each image once. An
image's name alone decides where it belongs, also while images come and go; the shares are equal only roughly.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

from .cli import main, parse_size, progress_shown
from .errors import InputError, one_line
from .images import SUFFIXES, Photo, list_images, load
from .pipeline import pipeline
from .session import Derainer, Provider, open_session

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv")
"""A file is taken for a video where it or its result ends in one of these."""

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Report:
    """What was done.

    restored: the files written.
    failures: one line for each image that could not be restored, and for each fault of a video.
    skipped:  how many images of a folder had been restored before.
    tiled:    how many images were cut into tiles.
    """

    restored: list[Path]
    failures: list[str]
    skipped: int = 0
    tiled: int = 0


def derain(
    input: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="INPUT")],
    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUTPUT")],
    model: Path | None = None,
    provider: Provider = "auto",
    threads: int = 0,
    public_key: Path | None = None,
    overwrite: bool = False,
    shard: str | None = None,
    memory: str | None = None,
    tile: str | None = None,
    max_pixels: int | None = None,
    crf: int = 18,
) -> Report:
    """Restore INPUT into OUTPUT and print how many images or frames that were.

    Raises InputError for bad arguments, for an INPUT file that cannot be restored, and where OUTPUT would overwrite
    INPUT; OSError where OUTPUT cannot be written.

    Args:
        input: an image, a folder of images, or a video.
        output: the file to write, or the folder to write into.
        model: a bundle or a .onnx file; the network that ships with the project if not given.
        provider: where it runs; auto is a GPU where there is one, with an engine of the bundle if one fits, else the
            CPU.
        threads: CPU threads; 0 is one for each core.
        public_key: refuse the bundle unless this key's owner signed it; see runtime/manifest.py.
        overwrite: restore also the images of a folder whose results are there already.
        shard: of a folder, only the images of part I of N, given as I/N from 1/N to N/N.
        memory: cut larger images into tiles to stay below this, such as 4GB; if not given, below the free memory.
        tile: cut larger images into tiles of this height and width, given as HxW such as 512x512.
        max_pixels: refuse larger images, as a small file can claim to hold billions of pixels; 89 million if not given.
        crf: quality of a video, from 0, the best, to 51.
    """
    files = _plan(input, output)
    if shard is not None:
        if not input.is_dir():
            raise InputError(f"`shard` is for folders, and {input} is a file")
        part, parts = _shard(shard)
        files = [file for file in files if _belongs(file[0].name, part, parts)]
    todo = [file for file in files if overwrite or not input.is_dir() or not _is_done(*file)]
    if max_pixels is not None:
        if max_pixels < 1:
            raise InputError(f"`max_pixels`: expected 1 or more, found {max_pixels}")
        Image.MAX_IMAGE_PIXELS = max_pixels
    session = open_session(model, provider, threads, public_key)
    derainer = Derainer(session, memory=_bytes(memory), tile=parse_size("tile", tile) if tile else None)
    _refuse_unwritable(output if input.is_dir() else files[0][1].parent)
    if not input.is_dir() and _is_video(*files[0]):
        from . import video  # needs PyAV

        with progress_shown() as on_progress:
            result = video.restore(derainer, *files[0], crf, on_progress)
        report, count = Report([files[0][1]], result.failures), f"{result.frames} frames"
    else:
        report = _restore(derainer, todo)
        if report.failures and not input.is_dir():
            raise InputError(report.failures[0])
        report = replace(report, skipped=len(files) - len(todo))
        count = f"{len(report.restored)} of {len(files)} images" if input.is_dir() else "1 image"
    for failure in report.failures:
        print(f"error: {one_line(failure)}", file=sys.stderr)
    before = f", {report.skipped} had been before (--overwrite restores them again)" if report.skipped else ""
    tiled = f", {report.tiled} in tiles" if report.tiled else ""
    print(f"{count} restored on {session.provider}{tiled}{before}: {output if input.is_dir() else files[0][1]}")
    return report


def _restore(derainer: Derainer, files: list[tuple[Path, Path]]) -> Report:
    """Restore images, the next one being read and the last one written meanwhile. One that fails is reported."""
    report, tiled = Report([], []), 0
    with progress_shown() as on_progress:

        def read() -> Iterator[tuple[Path, Path, Photo | InputError]]:
            for source, target in files:
                try:
                    photo = load(source)
                    photo.check(target)  # before the network runs, which takes much longer
                except InputError as error:
                    yield source, target, error
                else:
                    yield source, target, photo

        def work(item: tuple[Path, Path, Photo | InputError]) -> tuple[Path, Photo | InputError]:
            source, target, photo = item
            if isinstance(photo, InputError):
                return target, photo
            try:
                return target, replace(photo, rgb=derainer(photo.rgb, show_tiles))
            except InputError as error:
                return target, InputError(f"{source}: {error}")
            except MemoryError:
                return target, InputError(f"{source}: not enough memory; cut it into tiles by --memory or --tile")

        def show_tiles(done: int, total: int) -> None:
            nonlocal tiled
            tiled += 1 < done == total
            if total > 1:
                on_progress("Tiles", done, total)

        def write(item: tuple[Path, Photo | InputError]) -> None:
            target, photo = item
            try:
                if isinstance(photo, InputError):
                    raise photo
                photo.save(target)
                report.restored.append(target)
            except InputError as error:
                report.failures.append(str(error))
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:  # others, such as a full disk, are no fault of this image
                    raise
                report.failures.append(f"{target}: {error.strerror}")
            on_progress("Restoring images", len(report.restored) + len(report.failures), len(files))

        on_progress("Restoring images", 0, len(files))
        pipeline(read(), work, write)
    return replace(report, tiled=tiled)


def _plan(input: Path, output: Path) -> list[tuple[Path, Path]]:
    """Which file is restored into which."""
    if input.is_dir():
        if output.exists() and not output.is_dir():
            raise InputError(f"expected a folder as OUTPUT, as {input} is one, found the file {output}")
        files = [(source, output / source.name) for source in list_images(input)]
        if not files:
            raise InputError(f"expected images ending in {', '.join(SUFFIXES)} in {input}, found none")
    elif input.exists():
        files = [(input, output / input.name if output.is_dir() else output)]
    else:
        raise InputError(f"expected an image, a video or a folder of images as INPUT, found nothing at {input}")
    for source, target in files:
        if target.exists() and target.samefile(source):
            raise InputError(f"OUTPUT would overwrite {source} itself; name another file or folder")
    return files


def _is_video(source: Path, target: Path) -> bool:
    return source.suffix.lower() in VIDEOS or target.suffix.lower() in VIDEOS


def _is_done(source: Path, target: Path) -> bool:
    return target.is_file() and target.stat().st_mtime_ns >= source.stat().st_mtime_ns


def _refuse_unwritable(folder: Path) -> None:
    """Raise OSError for a folder that cannot be made or written into, before the network runs."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def _shard(text: str) -> tuple[int, int]:
    """The part, from 1, and the number of parts."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    part, parts = map(int, match.groups()) if match else (0, 0)
    if not 1 <= part <= parts:
        raise InputError(f"`shard`: expected I/N from 1/N to N/N, such as 3/8, found {text!r}")
    return part, parts


def _belongs(name: str, part: int, parts: int) -> bool:
    """Whether a file is in this part. Its hash decides: Python's own is another one in every process."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()) % parts == part - 1


def _bytes(text: str | None) -> int | None:
    """A number of bytes, from one with a unit."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?) ?([KMG]I?B|)", text.upper(), re.ASCII)
    if match is None:
        raise InputError(f"`memory`: expected a number of bytes such as 4GB or 500MB, found {text!r}")
    return int(float(match[1]) * UNITS[match[2]])


if __name__ == "__main__":
    main(derain, description=__doc__, status=lambda report: 1 if report.failures else 0)
