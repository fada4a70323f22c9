"""The page of a folder run: in a browser it moves, sorts, leads to the files and fetches nothing."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlparse
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image

from runtime.cli import EXTRAS
from runtime.derain import DerainOptions, derain
from runtime.errors import InputError
from runtime.gallery import PICTURES_SHOWN, THUMBNAILS_SHOWN, Gallery
from tests.support.browser import at_any_width, expect_fit, needs_chromium, opened
from tests.support.commands import command
from tests.support.images import noise, random_image, save
from tests.support.onnx_files import write_network

ODD = "<b>&\"' 50% #1.png"
"""A name that has to be escaped in HTML and in links."""


@pytest.fixture
def network(tmp_path) -> Path:
    """Halves every value."""
    return write_network(tmp_path / "half.onnx")


@pytest.fixture
def photos(tmp_path) -> Path:
    """Four images, the second brightest with a remark and the smallest in tiles; a broken one, and other files."""
    folder = tmp_path / "photos"
    for name, value, size in (("10.png", 60, (64, 48)), ("9.png", 20, (40, 24)), (ODD, 100, (48, 40))):
        save(folder / name, np.full((size[1], size[0], 3), value, np.uint8))
    file = io.BytesIO()
    Image.new("RGB", (40, 32), (80, 80, 80)).save(file, "JPEG")
    (folder / "2.jpg").write_bytes(file.getvalue()[:-2])  # without its end marker
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def report(network, photos, tmp_path) -> Path:
    """The page of a run on `photos`, where `9.png` had been restored before."""
    options = DerainOptions(network, "cpu", tile=(32, 48), report=tmp_path / "pages")
    derain(photos / "9.png", tmp_path / "out" / "9.png", DerainOptions(network, "cpu"))
    done = derain(photos, tmp_path / "out", options, command="derain <photos>")
    assert (len(done.restored), done.skipped, len(done.failures)) == (3, 1, 1)
    return tmp_path / "pages" / "report.html"


@pytest.fixture
def page(browser, report) -> Iterator:
    with opened(browser, report) as page:
        yield page


def rows(page) -> list[list[str]]:
    """Name, size, change and notes of every row."""
    found = []
    for row in page.locator("#rows tbody tr").all():
        name = row.locator("th > div > div").first.inner_text()
        size, _, change, notes = (cell.inner_text() for cell in row.locator("td").all())
        found.append([name, size, change, notes])
    return found


@needs_chromium
def test_every_image_is_there_with_what_there_is_to_say_of_it(page, photos):
    assert page.locator("h1").inner_text() == "4 of 5 images restored, 1 not"
    assert (
        page.locator("header .soft").inner_text()
        == f"{photos}: left out as no PNG, JPEG, WebP, BMP or TIFF by their names: notes.txt"
    )
    broken, *others = rows(page)
    assert broken[:3] == ["broken.png", "", ""]
    assert broken[3] == "not a PNG, JPEG, WebP, BMP or TIFF image, or cut off at its start"
    assert others == [
        ["10.png", "64 × 48", "30.00", "4 tiles"],
        ["2.jpg", "40 × 32", "40.00", "is complete but for the end marker of a JPEG file, and restored"],
        ["9.png", "40 × 24", "10.00", "restored before this run"],
        [ODD, "48 × 40", "50.00", "2 tiles"],
    ]
    assert page.locator("#rows .thumbnail").count() == 4
    facts = page.locator(".facts").inner_text()
    for text in ("half.onnx", "derain <photos>", "ONNX Runtime", "cpu", "derainer"):
        assert text in facts


@needs_chromium
def test_links_lead_to_the_files_from_where_the_page_is(page, report, photos, tmp_path):
    for row in page.locator("#rows tbody tr").all():
        name = row.locator("th > div > div").first.inner_text()
        for link in row.locator(".links a").all():
            folder = photos if link.inner_text() == "rainy" else tmp_path / "out"
            assert not urlparse(link.get_attribute("href")).scheme
            address = urlparse(link.evaluate("link => link.href"))
            assert (Path(unquote(address.path)), address.fragment) == (folder / name, "")
            assert (folder / name).is_file()
    assert page.get_by_role("link", name="broken.png, the restored file").count() == 0


@needs_chromium
def test_the_slider_moves_and_a_name_shows_its_image(page):
    over, under, at = page.locator("#over"), page.locator("#under"), page.locator("#at")
    layers = page.evaluate("pictures.map(picture => picture.layers)")
    assert page.locator("#which option").all_inner_texts()[0] == f"{ODD}, change 50.00"  # which changed most
    assert (over.get_attribute("src"), under.get_attribute("src")) == (layers[0]["rainy"], layers[0]["restored"])
    at.focus()
    page.keyboard.press("ArrowRight")
    assert over.evaluate("image => getComputedStyle(image).clipPath") == "inset(0px 49% 0px 0px)"
    box = at.bounding_box()
    page.mouse.click(box["x"] + 0.1 * box["width"], box["y"] + 0.5 * box["height"])
    assert 5 < int(at.input_value()) < 15
    page.get_by_role("link", name="9.png", exact=True).click()
    assert page.locator("#caption").inner_text().startswith("9.png: change 10.00. The mark is 40×24 pixels from (0, 0)")
    assert page.locator("tr.shown [data-picture]").inner_text() == "9.png"
    assert over.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [40, 24]
    assert page.locator("#crops figcaption").all_inner_texts() == ["rainy", "restored"]


@needs_chromium
def test_the_table_sorts(page):
    for heading, order in (
        ("image", [ODD, "2.jpg", "9.png", "10.png", "broken.png"]),
        ("change", [ODD, "2.jpg", "10.png", "9.png", "broken.png"]),
        ("width × height", ["10.png", ODD, "2.jpg", "9.png", "broken.png"]),
    ):
        page.get_by_role("button", name=heading).click()
        assert [row[0] for row in rows(page)] == order
    page.get_by_role("button", name="notes").click()
    assert rows(page)[0][0] == "broken.png"
    milliseconds = page.locator("#rows tbody tr", has_text="10.png").locator("td").nth(1).get_attribute("data-key")
    assert float(milliseconds) > 0


@needs_chromium
def test_the_csv_has_every_image(page):
    with urlopen(page.get_by_role("link", name="Download as CSV").get_attribute("href")) as file:  # of the page itself
        lines = list(csv.DictReader(io.StringIO(file.read().decode())))
    found = {line["image"]: (line["width"], line["change"], line["restored"]) for line in lines}
    assert found == {
        "broken.png": ("", "", "False"),
        "10.png": ("64", "30.0", "True"),
        "2.jpg": ("40", "40.0", "True"),
        "9.png": ("40", "10.0", "True"),
        ODD: ("48", "50.0", "True"),
    }


@needs_chromium
@at_any_width
def test_the_page_fits_any_width_and_follows_the_readers_colours(page, width, scheme):
    expect_fit(page, width, scheme)


def test_one_image_by_the_command(network, photos, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.html"
    arguments = (photos / "10.png", tmp_path / "a.png", "--model", network, "--report", page)
    assert command(monkeypatch, *arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Report: {page}"
    assert "1 of 1 image restored" in page.read_text()
    assert f"{photos / '10.png'} {tmp_path / 'a.png'} --model" in page.read_text()


def test_the_command_tells_in_the_page_what_a_folder_has_besides(network, photos, tmp_path, monkeypatch):
    assert command(monkeypatch, photos, tmp_path / "out", "--model", network, "--report", tmp_path / "out") == 1
    assert (
        "left out as no PNG, JPEG, WebP, BMP or TIFF by their names: notes.txt"
        in (tmp_path / "out" / "report.html").read_text()
    )


def test_the_page_keeps_what_changed_most_and_few_thumbnails(tmp_path):
    gallery = Gallery(tmp_path / "page.html")
    rainy = random_image(8, 8)
    for i in range(PICTURES_SHOWN + 3):
        gallery.add(Path(f"{i}.png"), Path(f"out/{i}.png"), rainy // 2 + np.uint8(i), rainy // 2)
    gallery.entries += gallery.entries[:1] * (THUMBNAILS_SHOWN - len(gallery.entries))
    gallery.add(Path("last.png"), Path("out/last.png"), rainy, rainy)
    page = gallery.render({})
    assert 'label": "22.png, change 22.00"' in page
    assert '"3.png, change' in page
    assert '"2.png, change' not in page
    assert "1 have no thumbnail" in page


def test_names_that_are_no_text_are_escaped(network, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    save(tmp_path / "photos" / name, noise(0))
    derain(tmp_path / "photos", tmp_path / "out", DerainOptions(network, report=tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'href="photos/caf%E9.png"' in page
    assert "caf\\udce9.png" in page


def test_a_former_result_of_another_size_is_named(network, photos, tmp_path):
    save(tmp_path / "out" / "10.png", noise(0))
    derain(photos, tmp_path / "out", DerainOptions(network, report=tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert "3 of 5 images restored, 2 not" in page
    assert "has another size; use --overwrite" in page


def test_refusals_come_before_the_work(network, photos, tmp_path):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(InputError, match="`report` is for images"):
        derain(tmp_path / "a.mp4", tmp_path / "b.mp4", DerainOptions(network, report=tmp_path))
    with pytest.raises(OSError, match=r"notes\.txt"):
        derain(photos, tmp_path / "out", DerainOptions(network, report=photos / "notes.txt"))
    assert not (tmp_path / "out").exists()


def test_without_jinja2_one_line_says_what_to_install(network, photos, tmp_path):
    code = (
        "import runpy, sys; sys.modules['jinja2'] = None; "
        "runpy.run_module('runtime.derain', run_name='__main__', alter_sys=True)"
    )
    arguments = (photos, tmp_path / "out", "--model", network, "--report", tmp_path)
    refused = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    told = f"error: needs the package jinja2, which is not installed: pip install '{EXTRAS['jinja2']}'\n"
    assert (refused.returncode, refused.stderr) == (2, told)
    assert not (tmp_path / "out").exists()
