"""Takes the rain out of an image file, or of all the images in a folder.

    python -m runtime.derain rainy.jpg clean.jpg
    python -m runtime.derain photos/ restored/
    python -m runtime.derain photos/ restored/ --model model.onnx --provider cuda
    python -m runtime.derain photos/ restored/ --model bundle/ --public-key public.pem

A folder is not searched below its first level, and its images keep their file names. PNG, JPEG, WebP, BMP and TIFF;
EXIF data, ICC profile and transparency are kept. Files that are already at OUTPUT are replaced. Images of a folder that
cannot be restored are named at the end, and the exit status is then 1.

Images are restored one after another, each as a whole: one already keeps every core busy, and the network looks at all
of it. Memory therefore bounds the size of an image.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from runtime.cli import InputError, main, progress
from runtime.images import SUFFIXES, list_images, load
from runtime.session import Derainer, Provider, open_session


@dataclass(frozen=True)
class Report:
    """The files written, and one line for each image that could not be restored."""

    restored: list[Path]
    failures: list[str]


def derain(
    input: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="INPUT")],
    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUTPUT")],
    model: Path | None = None,
    provider: Provider = "auto",
    threads: int = 0,
    public_key: Path | None = None,
) -> Report:
    """Restore INPUT into OUTPUT and print how many images that were.

    Raises InputError for bad arguments, for an INPUT file that cannot be restored, and where OUTPUT would overwrite
    INPUT.

    Args:
        input: an image file, or a folder of them.
        output: the file to write, or the folder to write into.
        model: a bundle or a .onnx file; the network that ships with the project if not given.
        provider: where it runs; auto is a GPU where there is one, with an engine of the bundle if one fits, else the
            CPU.
        threads: CPU threads; 0 is one for each core.
        public_key: refuse the bundle unless this key's owner signed it; see runtime/manifest.py.
    """
    files = _plan(input, output)
    session = open_session(model, provider, threads, public_key)
    derainer = Derainer(session)
    report = Report([], [])
    with progress() as bar:
        for source, target in bar.track(files, description="deraining"):
            try:
                _restore(derainer, source, target)
                report.restored.append(target)
            except InputError as error:
                if not input.is_dir():
                    raise
                report.failures.append(str(error))
    for failure in report.failures:
        print(f"error: {failure}", file=sys.stderr)
    count = f"{len(report.restored)} of {len(files)} images" if input.is_dir() else "1 image"
    print(f"{count} restored on {session.provider}: {output}")
    return report


def _restore(derainer: Derainer, source: Path, target: Path) -> None:
    photo = load(source)
    photo.check(target)  # before the network runs, which takes much longer
    try:
        restored = derainer(photo.rgb)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    replace(photo, rgb=restored).save(target)


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
        raise InputError(f"expected an image file or a folder of them as INPUT, found nothing at {input}")
    for source, target in files:
        if target.exists() and target.samefile(source):
            raise InputError(f"OUTPUT would overwrite the image {source} itself; name another file or folder")
    return files


if __name__ == "__main__":
    main(derain, description=__doc__, status=lambda report: 1 if report.failures else 0)
