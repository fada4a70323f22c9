"""Results side by side with parts of them magnified, as papers show them, from folders of images.

    python -m benchmarks.figure rainy=Rain200H/test/input ours=restored/ clean=Rain200H/test/target \\
        --target Rain200H/test/target --images 7 23 --output figure.png
    python -m benchmarks.figure rainy=rain/input restored=out/ --images coffee --boxes 60x90+200+120 --output figure.jpg

A column is a folder, named before the "="; a row is an image, which every folder has under the same name up to the
suffix. Below each image the marked boxes are magnified pixel by pixel, with nothing smoothed. Without --boxes they are
the places where the first folder and the last differ most. With --target, PSNR and SSIM of the whole images stand
below.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from drsformer.data import images_in
from drsformer.metrics import Protocol, psnr, ssim
from runtime.cli import main
from runtime.errors import InputError, expect_between
from runtime.files import writing
from runtime.images import read_rgb

COLOURS = ((230, 60, 50), (40, 130, 230), (250, 190, 20), (60, 180, 90))
"""Of the boxes, in their order."""

GAP, LINE, TEXT = 8, 3, 15
"""Pixels between columns, of a box's line, and of the letters."""

Pixels = NDArray[np.uint8]


class Box(NamedTuple):
    """A part of an image, in pixels."""

    height: int
    width: int
    top: int
    left: int


@dataclass(frozen=True)
class FigureOptions:
    """What the figure shows.

    Args:
        columns: NAME=FOLDER for each column.
        output: The picture to write, .png or .jpg.
        images: Names of the images, without their suffixes; all that the first folder has if not given.
        boxes: Parts to magnify, each as HEIGHTxWIDTH+TOP+LEFT.
        count: Number of boxes to find where none are given.
        side: Height and width of those.
        width: Width of a column.
        target: Folder of clean images.
        protocol: Protocol of PSNR and SSIM.

    Raises:
        InputError: A value is out of range.
    """

    columns: Annotated[tuple[str, ...], tyro.conf.Positional]
    output: Path
    images: tuple[str, ...] = ()
    boxes: tuple[str, ...] = ()
    count: int = 2
    side: int = 64
    width: int = 400
    target: Path | None = None
    protocol: Protocol = "rain200"

    def __post_init__(self) -> None:
        expect_between("count", self.count, 1, len(COLOURS))
        expect_between("side", self.side, 8)
        expect_between("width", self.width, 100)
        if len(self.boxes) > len(COLOURS):
            raise InputError(f"`boxes`: expected at most {len(COLOURS)}, found {len(self.boxes)}")
        if len(self.columns) < 2 or not all(re.fullmatch(r"[^=]+=.+", column) for column in self.columns):
            raise InputError(f"expected two columns or more, each as NAME=FOLDER, found {' '.join(self.columns)}")
        if self.output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            raise InputError(f"`output`: expected a .png or .jpg file, found {self.output}")


def figure(options: FigureOptions) -> Image.Image:
    """Draw a figure.

    Args:
        options: What it shows.

    Returns:
        The picture, RGB.

    Raises:
        InputError: An image is missing or cannot be read, or a box is outside of it.
    """
    folders = {name: Path(folder) for name, _, folder in (column.partition("=") for column in options.columns)}
    names = options.images or tuple(path.stem for path in images_in(next(iter(folders.values()))))
    rows = []
    for name in names:
        found = {column: _find(folder, name) for column, folder in folders.items()}
        clean = _find(options.target, name) if options.target else None
        first, *others = found.values()
        for column, other in found.items():
            if other.shape != first.shape:
                raise InputError(
                    f"{name} in {folders[column]}: expected {_size(first)} as in the first, found {_size(other)}"
                )
        boxes = [_box(text, first) for text in options.boxes]
        boxes = boxes or most_different(first, others[-1], options.count, min(options.side, *first.shape[:2]))
        rows.append(
            [
                _cell(image, boxes, _words(column, image, clean, options.protocol), options.width)
                for column, image in found.items()
            ]
        )
    return _grid(rows)


def _find(folder: Path, name: str) -> Pixels:
    """The image of this name, of whatever suffix."""
    matches = [path for path in images_in(folder) if path.stem == name]
    if len(matches) != 1:
        raise InputError(f"{folder}: expected one image called {name}, found {len(matches) or 'none'}")
    return read_rgb(matches[0])


def _size(image: Pixels) -> str:
    return f"{image.shape[0]}x{image.shape[1]} pixels"


def _box(text: str, image: Pixels) -> Box:
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})\+(\d{1,6})\+(\d{1,6})", text, re.ASCII)
    if not match:
        raise InputError(f"`boxes`: expected HEIGHTxWIDTH+TOP+LEFT such as 64x96+120+40, found {text}")
    box = Box(*map(int, match.groups()))
    H, W, _ = image.shape
    if not box.height or not box.width or box.top + box.height > H or box.left + box.width > W:
        raise InputError(f"`boxes`: expected a part of {_size(image)}, found {text}")
    return box


def most_different(one: Pixels, other: Pixels, count: int, side: int) -> list[Box]:
    """The squares of this side in which two images differ most, without overlap, as many as there are room for."""
    difference = np.abs(one.astype(np.int64) - other).sum(2)
    sums = np.pad(difference.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    windows = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    boxes: list[Box] = []
    while len(boxes) < count and windows.max() >= 0:
        top, left = (int(i) for i in np.unravel_index(windows.argmax(), windows.shape))
        boxes.append(Box(side, side, top, left))
        windows[max(0, top - side + 1) : top + side, max(0, left - side + 1) : left + side] = -1
    return boxes


def _words(column: str, image: Pixels, clean: Pixels | None, protocol: Protocol) -> str:
    if clean is None:
        return column
    if np.array_equal(image, clean):
        return f"{column}: the target"
    try:
        return f"{column}: {psnr(image, clean, protocol):.2f} dB, SSIM {ssim(image, clean, protocol):.4f}"
    except ValueError as error:
        raise InputError(f"`target`: {error}") from None


def _cell(image: Pixels, boxes: Sequence[Box], words: str, width: int) -> Image.Image:
    """An image with its boxes, the boxes magnified, and words."""
    H, W, _ = image.shape
    height = round(H * width / W)
    shown = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
    scale, draw = width / W, ImageDraw.Draw(shown)
    part = (width - GAP // 2 * (len(boxes) - 1)) // len(boxes)
    details = []
    for box, colour in zip(boxes, COLOURS, strict=False):
        edges = (box.left, box.top, box.left + box.width, box.top + box.height)
        draw.rectangle([round(scale * edge) for edge in edges], outline=colour, width=LINE)
        detail = Image.fromarray(image).crop(edges)
        detail = detail.resize((part, round(part * box.height / box.width)), Image.Resampling.NEAREST)
        ImageDraw.Draw(detail).rectangle((0, 0, detail.width - 1, detail.height - 1), outline=colour, width=LINE)
        details.append(detail)
    deepest = max(detail.height for detail in details)
    cell = Image.new("RGB", (width, height + GAP // 2 + deepest + 2 * TEXT), "white")
    cell.paste(shown)
    for i, detail in enumerate(details):
        cell.paste(detail, (i * (part + GAP // 2), height + GAP // 2))
    font = ImageFont.load_default(TEXT)
    at = (width / 2, cell.height - TEXT)
    ImageDraw.Draw(cell).text(at, words, fill="black", font=font, anchor="mm")
    return cell


def _grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Cells of one width, row by row."""
    width, heights = rows[0][0].width, [max(cell.height for cell in row) for row in rows]
    sheet = Image.new("RGB", (len(rows[0]) * (width + GAP) - GAP, sum(heights)), "white")
    for y, row in zip(np.cumsum([0, *heights]).tolist(), rows, strict=False):
        for i, cell in enumerate(row):
            sheet.paste(cell, (i * (width + GAP), y))
    return sheet


def command(options: Annotated[FigureOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]) -> dict[str, Any]:
    """Draw a figure, and write it."""
    sheet = figure(options)
    with writing(options.output) as temporary:
        sheet.save(temporary, quality=92)
    return {"output": str(options.output), "width": sheet.width, "height": sheet.height}


if __name__ == "__main__":
    main(command, __doc__, summary=lambda summary: summary)
