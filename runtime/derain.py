"""Takes the rain out of an image, of all the images in a folder, or of a video.

    python -m runtime.derain rainy.jpg clean.jpg
    python -m runtime.derain photos/ restored/
    python -m runtime.derain photos/ restored/ --model bundle/ --public-key public.pem --provider cuda
    python -m runtime.derain photos/ restored/ --report restored/report.html
    python -m runtime.derain photos/ restored/ --shard $SLURM_ARRAY_TASK_ID/8
    python -m runtime.derain panorama.tif clean.tif --memory 8GB --max-pixels 1000000000
    python -m runtime.derain rainy.mp4 clean.mp4 --crf 16
    python -m runtime.derain phone.mov clean.mp4 --tone-map

Images are PNG, JPEG, WebP, BMP and TIFF; EXIF data, ICC profile and transparency are kept. Videos, which need PyAV
(extra: video), become H.264 in MP4, MOV or Matroska; sound, subtitles, time, colours and rotation are kept, see
runtime/video.py. A file at OUTPUT is replaced.

A folder is not searched below its first level, and its images keep their file names; videos and other files in it are
left out and named. An image whose result is in OUTPUT
already, and not older than the image, is left out unless --overwrite is given; as results are written whole or not at
all, a run that was stopped can simply be started again. Images that cannot be restored are named at the end, and the
exit status is then 1, as it is for a damaged video, of which all that is left is restored.

--report writes a page to look at, one HTML file with everything inside (extra: report): rainy and restored under a
slider, and every image with its size, milliseconds, notes and links to its files; images that had been restored before
are in it too.

--shard 3/8 takes the third eighth of a folder's images, so that eight jobs of 1/8 to 8/8 restore each image once. An
image's name alone decides where it belongs, also while images come and go; the shares are equal only roughly.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

# First of all, as it says what to install where tyro is missing.
from .cli import byte_count, hxw, main, progress_shown, share, typed

# isort: split
import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image

from .canary import When
from .errors import DerainError, InputError, OutOfMemory, expect_between, one_line
from .files import expect_output, expect_writable, report_file
from .images import SUFFIXES, Photo, list_images, load
from .pipeline import grouped, pipeline
from .pixels import Size
from .progress import OnProgress, silent, track
from .session import Derainer, Provider, open_session

if TYPE_CHECKING:
    from .gallery import Gallery

logger = logging.getLogger(f"{__package__}.derain")  # also where this file is the command

VIDEOS = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".mxf", ".wmv", ".flv"),
    *(".3gp", ".ogv", ".asf"),
)
"""A file is taken for a video where it or its result ends in one of these, also where no such file can be written."""

OF_THE_SYSTEM = ("thumbs.db", "desktop.ini")
"""Files that a folder holds without its owner's doing, as hidden ones."""

NAMED = 5
"""How many of the files that are left out are named."""


@dataclass(frozen=True)
class Report:
    """What was done.

    Attributes:
        restored: The files written.
        failures: One line for each image that could not be restored, and for each fault of a video.
        skipped: How many images of a folder had been restored before.
        tiled: How many images were cut into tiles.
        provider: Where the network ran.
        frames: How many of a video were restored.
    """

    restored: list[Path]
    failures: list[str]
    skipped: int = 0
    tiled: int = 0
    provider: str = ""
    frames: int | None = None


@dataclass(frozen=True)
class DerainOptions:
    """How to restore.

    Args:
        model: Bundle or .onnx file; the network that ships with the project if not given.
        provider: Where it runs; auto is a GPU where there is one, with an engine of the bundle if one fits, else the
            CPU. tensorrt is the bundle's engine, ort-tensorrt ONNX Runtime's TensorRT provider.
        threads: CPU threads; 0 is one for each core.
        device: CUDA's number of the GPU; the first one if not given.
        public_key: Refuse the bundle unless this key's owner signed it; see runtime/bundle.py.
        canary: When what runs has to answer the bundle's canaries as its model does: the first time on this machine,
            always or never.
        require_proof: Run only files that the manifest says were judged against the full model.
        overwrite: Restore also the images of a folder whose results are there already.
        shard: Share of a folder's images to restore, given as I/N from 1/N to N/N.
        memory: Cut larger images into tiles to stay below this, such as 4GB; if not given, below the free memory.
        tile: Cut larger images into tiles of this height and width, given as HxW such as 512x512.
        max_pixels: Refuse larger images, as a small file can claim to hold billions of pixels; 89 million if not given.
        crf: Quality of a video, from 0, the best, to 51.
        tone_map: Map the tones of a video in HLG, which is HDR as phones film it, to SDR.
        report: HTML file to write, or folder for a report.html, that shows the images before and after.
        batch: Frames, or images of a folder that are equally large, to restore at once, if the network takes so many
            (export.onnx --batch); as many as it takes and memory holds if not given, 8 where it takes any number.
    """

    model: Path | None = None
    provider: Provider = "auto"
    threads: int = 0
    device: int | None = None
    public_key: Path | None = None
    canary: When = "first"
    require_proof: bool = False
    overwrite: bool = False
    shard: Annotated[tuple[int, int], share("shard")] | None = None
    memory: Annotated[int, byte_count("memory")] | None = None
    tile: Annotated[Size, hxw("tile")] | None = None
    max_pixels: int | None = None
    crf: int = 18
    tone_map: bool = False
    report: Path | None = None
    batch: int | None = None

    @property
    def report_file(self) -> Path | None:
        """Where the report is written."""
        return self.report and report_file(self.report)


def derain(
    input: Path,
    output: Path,
    options: DerainOptions = DerainOptions(),
    on_progress: OnProgress = silent,
    command: str | None = None,
) -> Report:
    """Restore an image, the images of a folder, or a video.

    Args:
        input: Image, folder of images, or video.
        output: File to write, or folder to write into.
        options: How.
        on_progress: Is told how far it is.
        command: The command line that asks for it, which the report shows.

    Returns:
        What was done.

    Raises:
        InputError: The options or an input file cannot be used, or `output` would overwrite `input`.
        OSError: `output` cannot be written.
        ModuleNotFoundError: A report needs Jinja2.
    """
    files = _plan(input, output)
    is_video = not input.is_dir() and _is_video(*files[0])
    gallery = None
    if options.report_file:
        if is_video:
            raise InputError(f"`report` is for images, and {input} is a video")
        from .gallery import Gallery  # needs Jinja2

        expect_output(options.report_file)
        gallery = Gallery(options.report_file)
    if options.shard is not None:
        if not input.is_dir():
            raise InputError(f"`shard` is for folders, and {input} is a file")
        files = [file for file in files if _belongs(file[0].name, *options.shard)]
    todo = [file for file in files if options.overwrite or not input.is_dir() or not _is_done(*file)]
    if options.max_pixels is not None:
        expect_between("max_pixels", options.max_pixels, 1)
        Image.MAX_IMAGE_PIXELS = options.max_pixels
    session = open_session(
        options.model,
        options.provider,
        options.threads,
        options.public_key,
        options.canary,
        options.require_proof,
        options.device,
    )
    derainer = Derainer(session, memory=options.memory, tile=options.tile, batch=options.batch)
    expect_writable(output if input.is_dir() else files[0][1].parent)
    if is_video:
        from . import video  # needs PyAV

        result = video.restore(derainer, *files[0], options.crf, on_progress, options.tone_map)
        return Report([files[0][1]], result.failures, provider=session.provider, frames=result.frames)
    with ExitStack() as stack:
        if gallery:
            stack.enter_context(gallery.listening())
        if input.is_dir():
            _tell_what_is_left_out(input)
        report = _restore(derainer, todo, on_progress, gallery)
        if gallery:
            if former := [file for file in files if file not in todo]:
                for file in track(former, len(former), "Comparing earlier results", on_progress):
                    gallery.add_former(*file)
            gallery.write(session, input, output, command)
    if report.failures and not input.is_dir():
        raise InputError(report.failures[0])
    return replace(report, skipped=len(files) - len(todo), provider=session.provider)


def command(
    input: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="INPUT")],
    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUTPUT")],
    options: Annotated[DerainOptions, tyro.conf.arg(name="")] = DerainOptions(),
) -> Report:
    """Restore INPUT into OUTPUT and print how many images or frames that were.

    Args:
        input: Image, folder of images, or video.
        output: File to write, or folder to write into.
        options: How.
    """
    with progress_shown() as on_progress:
        report = derain(input, output, options, on_progress, typed())
    for failure in report.failures:
        print(f"error: {one_line(failure)}", file=sys.stderr)
    restored, folder = len(report.restored), input.is_dir()
    total = restored + len(report.failures) + report.skipped
    count = f"{restored} of {total} images" if folder else "1 image"
    if report.frames is not None:
        count = f"{report.frames} frames"
    before = f", {report.skipped} had been before (--overwrite restores them again)" if report.skipped else ""
    tiled = f", {report.tiled} in tiles" if report.tiled else ""
    print(f"{count} restored on {report.provider}{tiled}{before}: {output if folder else report.restored[0]}")
    if options.report_file:
        print(f"Report: {options.report_file}")
    return report


@dataclass(frozen=True, eq=False)
class _Job:
    """An image on its way.

    Attributes:
        photo: As it was read, or why it cannot be restored.
        restored: What became of it.
        milliseconds: What that took.
        tiles: How many it was cut into.
    """

    source: Path
    target: Path
    photo: Photo | DerainError
    restored: Photo | None = None
    milliseconds: float = 0.0
    tiles: int = 1


def _restore(
    derainer: Derainer, files: list[tuple[Path, Path]], on_progress: OnProgress, gallery: Gallery | None = None
) -> Report:
    """Restore images, the next one being read and the last one written meanwhile. One that fails is reported."""
    report, tiled = Report([], []), 0

    def read() -> Iterator[_Job]:
        for source, target in files:
            try:
                photo = load(source)
                photo.check(target)  # before the network runs, which takes much longer
            except DerainError as error:
                yield _Job(source, target, error)
            else:
                yield _Job(source, target, photo)

    def size_of(job: _Job) -> Size | None:
        return None if isinstance(job.photo, DerainError) else job.photo.rgb.shape[:2]

    def work(jobs: list[_Job]) -> list[_Job]:
        images = [job.photo.rgb for job in jobs if not isinstance(job.photo, DerainError)]
        if len(images) > 1:
            started = time.perf_counter()
            with contextlib.suppress(DerainError, MemoryError):  # one by one then, to tell of which
                restored = iter(derainer.run_batch(images))
                milliseconds = 1000 * (time.perf_counter() - started) / len(images)
                return [
                    job if isinstance(job.photo, DerainError) else done(job, next(restored), milliseconds)
                    for job in jobs
                ]
        return [restore(job) for job in jobs]

    def restore(job: _Job) -> _Job:
        if isinstance(job.photo, DerainError):
            return job
        tiles = 1

        def on_tile(done: int, total: int) -> None:
            nonlocal tiles
            tiles = total
            if total > 1:
                on_progress("Tiles", done, total)

        started = time.perf_counter()
        try:
            restored = derainer(job.photo.rgb, on_tile)
        except DerainError as error:
            return replace(job, photo=type(error)(f"{job.source}: {error}"))
        except MemoryError:
            told = f"{job.source}: not enough memory; cut it into tiles by --memory or --tile"
            return replace(job, photo=OutOfMemory(told))
        return done(job, restored, 1000 * (time.perf_counter() - started), tiles)

    def done(job: _Job, rgb: NDArray[np.uint8], milliseconds: float, tiles: int = 1) -> _Job:
        assert isinstance(job.photo, Photo)
        restored = replace(job.photo, rgb=rgb)
        rainy = job.photo if gallery else restored  # the pixels of a photo that nobody asks for are let go
        return replace(job, photo=rainy, restored=restored, milliseconds=milliseconds, tiles=tiles)

    def write(jobs: list[_Job]) -> None:
        nonlocal tiled
        for job in jobs:
            try:
                if isinstance(job.photo, DerainError):
                    raise job.photo
                assert job.restored
                job.restored.save(job.target)
                report.restored.append(job.target)
                tiled += job.tiles > 1
                if gallery:
                    notes = [f"{job.tiles} tiles"] if job.tiles > 1 else []
                    gallery.add(job.source, job.target, job.photo.rgb, job.restored.rgb, job.milliseconds, *notes)
            except DerainError as error:
                fail(job, str(error))
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:  # others, such as a full disk, are no fault of this image
                    raise
                fail(job, f"{job.target}: {error.strerror}")
            on_progress("Restoring images", len(report.restored) + len(report.failures), len(files))

    def fail(job: _Job, reason: str) -> None:
        report.failures.append(reason)
        if gallery:
            gallery.add_failure(job.source, job.target, reason)

    on_progress("Restoring images", 0, len(files))
    pipeline(grouped(read(), size_of, lambda size: derainer.batch_size(*size)), work, write)
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


def _tell_what_is_left_out(folder: Path) -> None:
    taken = set(list_images(folder))
    others = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path not in taken and path.name[0] != "." and path.name.lower() not in OF_THE_SYSTEM
    ]
    videos = [path for path in others if path.suffix.lower() in VIDEOS]
    for reason, paths in (
        ("videos, to be restored one by one", videos),
        ("no PNG, JPEG, WebP, BMP or TIFF by their names", [path for path in others if path not in videos]),
    ):
        if paths:
            names = ", ".join(path.name for path in paths[:NAMED])
            more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
            logger.warning("%s: left out as %s: %s%s", folder, reason, names, more)


def _is_video(source: Path, target: Path) -> bool:
    return source.suffix.lower() in VIDEOS or target.suffix.lower() in VIDEOS


def _is_done(source: Path, target: Path) -> bool:
    return target.is_file() and target.stat().st_mtime_ns >= source.stat().st_mtime_ns


def _belongs(name: str, part: int, parts: int) -> bool:
    """Whether a file is in this part. Its hash decides: Python's own is another one in every process."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()) % parts == part - 1


def run() -> None:
    """The command line."""
    main(command, __doc__, status=lambda report: 1 if report.failures else 0)


if __name__ == "__main__":
    run()
