"""The figure of results: the right pixels in the right places."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.figure import COLOURS, GAP, LINE, Box, FigureOptions, command, figure, most_different
from runtime.errors import InputError
from tests.support.images import random_image, save


@pytest.fixture
def options(tmp_path) -> FigureOptions:
    for i, folder in enumerate(("rainy", "ours", "clean")):
        for name in ("a", "b"):
            save(tmp_path / folder / f"{name}.png", random_image(60, 100, i))
    columns = tuple(f"{name}={tmp_path / name}" for name in ("rainy", "ours", "clean"))
    return FigureOptions(columns, tmp_path / "f.png", ("b",), ("10x20+30+40",), width=100)


def test_the_boxes_are_marked_and_magnified_pixel_by_pixel(options):
    sheet = np.asarray(figure(options))
    for i, folder in enumerate(("rainy", "ours", "clean")):
        image = np.asarray(Image.open(Path(options.columns[i].partition("=")[2]) / "b.png"))
        cell = sheet[:, i * (100 + GAP) :][:, :100]
        assert np.array_equal(cell[:30], image[:30]), folder  # a column as wide as the image shows it as it is
        assert np.array_equal(cell[30, 40:61], np.broadcast_to(COLOURS[0], (21, 3)))
        detail = cell[60 + GAP // 2 :][:50]  # 10 x 20 pixels, five times as large
        inner = detail[LINE:-LINE, LINE:-LINE]
        expected = image[30:40, 40:60].repeat(5, 0).repeat(5, 1)[LINE:-LINE, LINE:-LINE]
        assert np.array_equal(inner, expected)
        assert (cell[-30:] < 128).any()  # its name


def test_the_largest_differences_are_found_and_do_not_overlap():
    one = np.zeros((40, 60, 3), np.uint8)
    other = one.copy()
    other[10:18, 5:13], other[25:33, 40:48] = 200, 100
    assert most_different(one, other, 2, 8) == [Box(8, 8, 10, 5), Box(8, 8, 25, 40)]
    assert len(most_different(one, one, 4, 40)) == 1  # there is no room for more
    assert most_different(other, one, 1, 40)[0].height == 40


def test_command_writes_every_image_and_scores_it(options, tmp_path):
    wanted = replace(options, images=(), boxes=(), side=16, target=tmp_path / "clean", width=150)
    summary = command(wanted)
    with Image.open(tmp_path / "f.png") as sheet:
        assert sheet.size == (summary["width"], summary["height"])
        assert sheet.width == 3 * 150 + 2 * GAP
        assert sheet.height > 2 * (90 + 73)  # two images of 90 lines, each with details of 73


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": ("a=b",)}, "two columns or more"),
        ({"columns": ("a=b", "c")}, "NAME=FOLDER"),
        ({"boxes": ("10x20",)}, "expected HEIGHTxWIDTH"),
        ({"boxes": ("10x20+55+0",)}, "expected a part of 60x100 pixels"),
        ({"boxes": ("0x20+5+0",)}, "expected a part of 60x100 pixels"),
        ({"boxes": ("1x1+0+0",) * 5}, "`boxes`: expected at most 4, found 5"),
        ({"count": 0}, "`count`"),
        ({"output": Path("f.gif")}, "`output`"),
        ({"images": ("c",)}, "expected one image called c, found none"),
    ],
)
def test_mistakes_are_told_in_one_line(options, change, message):
    with pytest.raises(InputError, match=message) as error:
        figure(replace(options, **change))
    assert "\n" not in str(error.value)


def test_images_of_other_sizes_are_refused(options, tmp_path):
    save(tmp_path / "ours" / "b.png", random_image(60, 101))
    with pytest.raises(InputError, match=r"b in .*ours: expected 60x100 pixels as in the first, found 60x101 pixels"):
        figure(options)
