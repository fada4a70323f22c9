"""The report in a browser: the comparison moves, the table sorts, and nothing is fetched."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from urllib.request import urlopen

import numpy as np
import pytest

from export.comparison import Comparison, Extent, Validation
from export.report import render
from export.validate import _picture
from tests.support.browser import at_any_width, expect_fit, needs_chromium, opened
from tests.support.images import random_image

pytestmark = needs_chromium

DROPS = {"10": 0.25, "9": -0.125, "<b>&\"'": 1.625, "2": 0.0}


def validation() -> Validation:
    """Four images, of which the page shows three, two of them in wide format; of one the outputs are equal."""
    images, pictures = [], {}
    for i, (name, drop) in enumerate(DROPS.items()):
        rainy = random_image(60, 120, i)
        outputs = [rainy // 2, rainy // 2 + (16 if drop else 0) * (np.arange(120) >= 100)[:, None].astype(np.uint8)]
        between = 40.0 - drop if drop else math.inf
        images.append(Comparison(name, between, 16, {"latent.0": i, "latent.1": 0}, 30, 30 - drop, 0.9, 0.9, 20, 0.5))
        if name != "10":
            pictures[name] = _picture(rainy, *outputs, rainy // 3)
    facts = {"reference": "a", "candidate": "b"}
    extents = {"reference": Extent(4_000_000, 2_000_000, 12_630_000_000), "candidate": Extent(1_000_000)}
    return Validation(
        facts, images, {"latent.0": 100, "latent.1": 100}, None, pictures, max_drop_db=0.1, extents=extents
    )


@pytest.fixture
def page(browser, tmp_path) -> Iterator:
    path = tmp_path / "report.html"
    path.write_text(render(validation()), encoding="utf-8")
    with opened(browser, path) as page:
        yield page


def names(page) -> list[str]:
    return [name.strip() for name in page.locator("#rows tbody th").all_inner_texts()]


def split(page) -> str:
    return page.locator("#stage").evaluate("stage => getComputedStyle(stage).getPropertyValue('--at')").strip()


def test_the_verdict_comes_first_and_change_is_told(page):
    assert page.locator("h1").inner_text() == "Outside the budget"
    assert "mean drop in PSNR 0.4375 dB, at most 0.1 dB" in page.locator(".budgets li").inner_text()
    rows = {row.split("\t")[0]: row.split("\t")[1:] for row in page.locator(".change tbody tr").all_inner_texts()}
    assert rows["PSNR, mean, dB"] == ["20.00", "30.00", "29.56", "-0.4375"]
    assert rows["parameters, millions"] == ["", "2.00", "", ""]
    assert rows["file, MB"] == ["", "4.00", "1.00", "× 0.25"]
    assert page.locator(".bars tr").all_inner_texts()[1:] == ["latent.0\t 1.5 % (6)"]


def test_the_slider_moves_by_keyboard_and_pointer_and_cuts_the_left_picture(page):
    slider, over = page.locator("#at"), page.locator("#over")
    assert split(page) == "50%"
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert split(page) == "49%"
    box = slider.bounding_box()
    page.mouse.click(box["x"] + 0.9 * box["width"], box["y"] + 0.5 * box["height"])
    moved = int(split(page).rstrip("%"))
    assert 85 < moved < 95
    assert over.evaluate("image => getComputedStyle(image).clipPath") == f"inset(0px {100 - moved}% 0px 0px)"


def test_any_two_pictures_of_an_image_can_be_compared(page):
    layers = page.evaluate("pictures[0].layers")
    over, under = page.locator("#over"), page.locator("#under")
    assert (over.get_attribute("src"), under.get_attribute("src")) == (layers["rainy"], layers["candidate"])
    page.locator("#left").select_option("clean")
    assert over.get_attribute("src") == layers["clean"]
    assert over.get_attribute("alt") == "9, clean"
    assert page.evaluate("document.getElementById('over').naturalWidth") == 120
    mark, stage = (page.locator(f"#{name}").bounding_box() for name in ("mark", "stage"))
    assert (mark["x"] - stage["x"]) / stage["width"] == pytest.approx(24 / 120, abs=0.01)  # 96 pixels, at the right end
    assert stage["width"] / stage["height"] == pytest.approx(2, abs=0.01)
    assert page.locator("#crops figcaption").all_inner_texts()[:3] == ["rainy", "reference", "candidate"]


def test_a_name_in_the_table_shows_its_image(page):
    page.get_by_role("link", name="<b>&\"'").click()
    assert page.locator("#which").input_value() == "1"
    assert (
        page.locator("#caption")
        .inner_text()
        .startswith("<b>&\"': drop +1.6250 dB. The mark is 96×60 pixels from (24, 0)")
    )
    assert page.locator("tr.shown th").inner_text() == "<b>&\"'"
    assert page.get_by_role("link", name="10").count() == 0  # the page has no picture of it
    page.get_by_role("link", name="2").click()
    assert page.locator("#caption").inner_text().startswith("2: outputs equal. Left: rainy.")
    assert not page.locator("#mark").is_visible()


def test_the_table_sorts_both_ways_by_names_and_by_numbers(page):
    assert names(page) == ["<b>&\"'", "10", "2", "9"]  # worst first
    drop, name, between = (page.get_by_role("button", name=text) for text in ("drop dB", "image", "between dB"))
    drop.click()
    assert names(page) == ["<b>&\"'", "10", "2", "9"]
    drop.click()
    assert names(page) == ["9", "2", "10", "<b>&\"'"]
    heading = page.locator("#rows thead th", has_text="drop")
    assert heading.get_attribute("aria-sort") == "ascending"
    name.click()
    assert names(page) == ["<b>&\"'", "2", "9", "10"]
    assert heading.get_attribute("aria-sort") == "none"
    name.focus()
    page.keyboard.press("Enter")
    assert names(page) == ["10", "9", "2", "<b>&\"'"]
    between.click()
    assert names(page)[0] == "2"  # infinite
    assert page.locator("#rows tfoot td").first.inner_text() == "all"


def test_the_csv_has_every_image(page):
    link = page.get_by_role("link", name="Download as CSV").get_attribute("href")
    with urlopen(link) as file:  # of the page itself
        header, *lines = csv.reader(io.StringIO(file.read().decode()))
    assert header[:2] == ["image", "input_psnr"]
    assert [line[0] for line in lines] == ["<b>&\"'", "10", "2", "9"]
    assert [float(line[header.index("drop_db")]) for line in lines] == [1.625, 0.25, 0, -0.125]


@at_any_width
def test_the_page_fits_any_width_and_follows_the_readers_colours(page, width, scheme):
    expect_fit(page, width, scheme)


def test_distribution_has_every_image_and_the_percentiles(page):
    counts = [
        int(title.split()[0])
        for title in page.locator("svg rect title").evaluate_all("all => all.map(t => t.textContent)")
    ]
    assert sum(counts) == 4
    found = dict(text.split("\n") for text in page.locator(".percentiles div").all_inner_texts())
    assert found == {
        "median": "0.1250 dB",
        "worst 10 %": f"{np.percentile(list(DROPS.values()), 90):.4f} dB",
        "worst 1 %": f"{np.percentile(list(DROPS.values()), 99):.4f} dB",
        "worst": "1.6250 dB",
    }


def test_infinite_values_keep_their_sign_and_are_not_passed_over():
    drops = ((math.inf, 30.0), (30.0, math.inf), (30.0, 29.0), (30.0, 28.0))
    images = [Comparison(str(i), 40.0, 1, {}, *each, 0.9, 0.9) for i, each in enumerate(drops)]
    page = render(Validation({}, images[1:], {}, None, {}))
    assert "that is infinite" not in page  # an infinite gain counts as nothing lost
    page = render(Validation({}, images[:1] + images[2:], {}, None, {}))
    assert 'data-key="Infinity"' in page
    assert "Images by drop in PSNR, dB; without 1 that is infinite" in page
    assert "-∞" in page  # the reference has an infinite PSNR, and the candidate has not
    assert "<td>∞</td>" in page


def test_values_that_hardly_differ_have_a_distribution():
    images = [Comparison(name, value, 1, {}) for name, value in (("a", 40.0), ("b", math.nextafter(40.0, 41)))]
    assert "<svg" in render(Validation({}, images, {}, None, {}))


def test_large_images_are_reduced_and_small_ones_whole():
    for side, scaled in ((1281, True), (1280, False), (1, False)):
        image = np.zeros((side, 8, 3), np.uint8)
        found = Validation({}, [Comparison("a", math.inf, 0, {})], {}, None, {"a": _picture(image, image, image, None)})
        assert ("where large, reduced" in render(found)) is scaled
        assert found.pictures["a"].crop.target is None


def test_page_without_pictures_and_ground_truth_is_whole(browser, tmp_path):
    images = [Comparison(name, between, 1, {}) for name, between in (("a", 60.0), ("b", 50.0))]
    (tmp_path / "plain.html").write_text(render(Validation({}, images, {}, "no", {})), encoding="utf-8")
    with opened(browser, tmp_path / "plain.html") as page:
        page.get_by_role("button", name="between dB").click()
        assert names(page) == ["a", "b"]
        assert page.locator("#look").count() == 0
