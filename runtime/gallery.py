"""The page that shows what became of the images of a run, for somebody who looks whether they may go out.

There are no clean images to measure against, so the page is to be looked at: a slider over rainy and restored for the
images that changed most, and a table of all of them, with what there was to say of each. It is gathered image by image,
and keeps no pixels but those that it shows.
"""

from __future__ import annotations

import csv
import io
import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from . import page
from .bundle import describe_file
from .errors import DerainError, one_line
from .images import read_rgb
from .ort import SHIPPED, OrtSession
from .pictures import Window, largest_difference, webp
from .timing import machine
from .trt import TrtSession
from .version import __version__

PICTURES_SHOWN = 20
"""How many images the slider has, those that changed most; a thumbnail is there of all of `THUMBNAILS_SHOWN`."""

THUMBNAILS_SHOWN = 1000
"""How many images have a thumbnail, the first ones of the run: each takes some 2 KB of the page."""

THUMBNAIL_PIXELS = 80
"""Height and width of a thumbnail at most."""


@dataclass(frozen=True, eq=False)
class Entry:
    """An image of a run.

    Attributes:
        source: The rainy image's file.
        target: The restored image's.
        size: Height and width in pixels; None where it could not be read.
        milliseconds: What restoring it took, without reading and writing; None where it was not restored in this run.
        change: Mean absolute difference between rainy and restored, in levels of 255.
        thumbnail: A WebP file of the restored image.
        notes: What there is to say of it, in a line each.
        failed: Whether there is no restored image.
    """

    source: Path
    target: Path
    size: tuple[int, int] | None = None
    milliseconds: float | None = None
    change: float | None = None
    thumbnail: bytes | None = None
    notes: tuple[str, ...] = ()
    failed: bool = False


class _Picture(NamedTuple):
    """An image for the slider: its name, size and change as in `Entry`, its files, and the part that is marked."""

    name: str
    size: tuple[int, int]
    change: float
    layers: dict[str, bytes]
    window: Window
    parts: dict[str, NDArray[np.uint8]]


class Gallery(logging.Handler):
    """What a run makes of its images. While `listening`, what the package logs of a file is noted with its image.

    Args:
        file: Where the page will be written; its links are relative to it.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(logging.WARNING)
        self.file = file
        self.entries: list[Entry] = []
        self._pictures: list[_Picture] = []
        self._logged: dict[str, list[str]] = defaultdict(list)

    def emit(self, record: logging.LogRecord) -> None:
        """Note a message that begins with the name of a file, as those of `runtime.images` do."""
        name = str(record.args[0]) if isinstance(record.args, tuple) and record.args else ""
        self._logged[name].append(one_line(record.getMessage().removeprefix(f"{name}: ")))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note what is logged during the block."""
        logger = logging.getLogger(__package__)
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)

    def add(
        self,
        source: Path,
        target: Path,
        rainy: NDArray[np.uint8],
        restored: NDArray[np.uint8],
        milliseconds: float | None = None,
        *notes: str,
    ) -> None:
        """An image that was restored: uint8 (H, W, 3) before and after. For the rest see `Entry`."""
        height, width, _ = rainy.shape
        change = float(np.abs(rainy.astype(np.int16) - restored).mean())
        thumbnail = webp(restored, THUMBNAIL_PIXELS) if len(self.entries) < THUMBNAILS_SHOWN else None
        self.entries.append(Entry(source, target, (height, width), milliseconds, change, thumbnail, notes))
        if len(self._pictures) < PICTURES_SHOWN or change > self._pictures[-1].change:
            window = largest_difference(rainy, restored)
            kinds = {"rainy": rainy, "restored": restored}
            layers = {kind: webp(image) for kind, image in kinds.items()}
            parts = {kind: window.of(image) for kind, image in kinds.items()}
            self._pictures.append(_Picture(source.name, (height, width), change, layers, window, parts))
            self._pictures.sort(key=lambda picture: picture.change, reverse=True)
            del self._pictures[PICTURES_SHOWN:]

    def add_former(self, source: Path, target: Path) -> None:
        """An image whose result was there before this run."""
        try:
            rainy, restored = read_rgb(source), read_rgb(target)
        except DerainError as error:
            self.add_failure(source, target, str(error))
            return
        if rainy.shape != restored.shape:
            self.add_failure(source, target, "the result that was there before has another size; use --overwrite")
        else:
            self.add(source, target, rainy, restored, None, "restored before this run")

    def add_failure(self, source: Path, target: Path, error: str) -> None:
        """An image without a result, and why."""
        reason = one_line(error.removeprefix(f"{source}: ").removeprefix(f"{target}: "))
        self.entries.append(Entry(source, target, notes=(reason,), failed=True))

    def write(self, session: OrtSession | TrtSession, input: Path, output: Path, command: str | None = None) -> None:
        """Write the page.

        Args:
            session: What ran.
            input: The file or folder that was read.
            output: That which was written.
            command: The command line that asked for it.

        Raises:
            OSError: The file cannot be written.
        """
        onnx = isinstance(session, OrtSession)
        weights = session.metadata.get("weights_sha256") if onnx else session.bundle.manifest.model.weights_sha256
        facts = {
            "network": f"{session.path}" + (", which ships" if session.path == SHIPPED else ""),
            "ran on": ", ".join([session.provider, *session.identity.values()]),
            "images": f"{input} → {output}",
            "SHA-256 of the network": describe_file(session.path, "onnx" if onnx else "engine").sha256,
            "SHA-256 of the weights": weights,
            "measured": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            "machine": ", ".join(f"{name} {value}" for name, value in machine().items()),
            "program": f"derainer {__version__}",
            "command": command,
        }
        page.write(self.file, self.render({label: text for label, text in facts.items() if text}))

    def render(self, facts: dict[str, str]) -> str:
        """The page, HTML that is whole in itself.

        Args:
            facts: What restored the images, for people: label and text.
        """
        entries = sorted(self.entries, key=lambda entry: (not entry.failed, entry.source.name))
        failed = sum(entry.failed for entry in entries)
        done = len(entries) - failed
        shown = {picture.name: i for i, picture in enumerate(self._pictures)}
        known = {str(path) for entry in entries for path in (entry.source, entry.target)}
        told = {entry.source: (*entry.notes, *self._of(entry.source), *self._of(entry.target)) for entry in entries}
        times = [entry.milliseconds for entry in entries if entry.milliseconds is not None]
        images = "1 image" if len(entries) == 1 else f"{len(entries)} images"
        return page.render(
            "gallery.html",
            headline=f"{done} of {images} restored" + (f", {failed} not" if failed else ""),
            mood="bad" if failed else "good",
            warnings=[],
            budgets=[],
            remarks=[
                line if not name else f"{name}: {line}"
                for name, lines in self._logged.items()
                if name not in known
                for line in lines
            ],
            pictures=[_viewed(picture) for picture in self._pictures],
            left_out=done - len(self._pictures),
            without_thumbnail=sum(entry.thumbnail is None and not entry.failed for entry in entries),
            columns=["image", "width × height", "milliseconds", "change", "notes"],
            rows=[self._row(entry, shown.get(entry.source.name), told[entry.source]) for entry in entries],
            median=f"{np.median(times):.0f}" if times else "",
            csv=page.data_uri("text/csv;charset=utf-8", _csv(entries, told).encode(errors="backslashreplace")),
            facts=facts,
        )

    def _of(self, path: Path) -> list[str]:
        return self._logged.get(str(path), [])

    def _row(self, entry: Entry, picture: int | None, notes: tuple[str, ...]) -> dict[str, Any]:
        height, width = entry.size or (0, 0)
        links = {"rainy": entry.source} if entry.failed else {"rainy": entry.source, "restored": entry.target}
        return {
            "name": entry.source.name,
            "picture": picture,
            "thumbnail": entry.thumbnail and page.data_uri("image/webp", entry.thumbnail),
            "links": {kind: self._link(path) for kind, path in links.items()},
            "failed": entry.failed,
            "cells": [
                (f"{width} × {height}" if entry.size else "", height * width),
                _number(entry.milliseconds, ".0f"),
                _number(entry.change, ".2f"),
            ],
            "notes": notes,
        }

    def _link(self, path: Path) -> str:
        """A file as the page finds it, also after both were moved together."""
        try:
            relative = os.path.relpath(path.absolute(), self.file.absolute().parent)
        except ValueError:  # on another drive
            return path.absolute().as_uri()
        return quote(os.fsencode(Path(relative).as_posix()))


def _number(value: float | None, form: str) -> tuple[str, float]:
    """A number for people, and the one by which the script sorts."""
    return ("", -1.0) if value is None else (f"{value:{form}}", value)


def _viewed(picture: _Picture) -> dict[str, Any]:
    found = f"change {picture.change:.2f}" if picture.change else "not changed"
    return page.viewed(
        picture.name, found, picture.size, picture.layers, picture.window, picture.parts, equal=not picture.change
    )


def _csv(entries: list[Entry], told: dict[Path, tuple[str, ...]]) -> str:
    text = io.StringIO()
    lines = csv.writer(text)
    lines.writerow(["image", "width", "height", "milliseconds", "change", "restored", "notes"])
    for entry in entries:
        height, width = entry.size or ("", "")
        numbers = ("" if value is None else round(value, 4) for value in (entry.milliseconds, entry.change))
        lines.writerow([entry.source.name, width, height, *numbers, not entry.failed, "; ".join(told[entry.source])])
    return text.getvalue()
