"""The page of a search in a browser: its points, its table, and how they lead to each other."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from urllib.request import urlopen

import pytest

from compress.pareto import Candidate, front, render
from tests.support.browser import at_any_width, expect_fit, needs_chromium, opened

FACTS = {"pairs": "light/val: 2, <b>heavy</b>: 3"}


def candidate(kind: str, latency: float, drop: float, file: str | None = "step1/a.safetensors") -> Candidate:
    psnr = {"light/val": 30 - drop, "<b>heavy</b>": 20.0}
    return Candidate(kind, file, 1234567, latency**2, latency, 40 * latency, psnr, drop)


WHOLE = candidate("whole", 1.0, 0.0, None)
TAKEN = candidate("distilled", 0.5, 0.1)
TRIED = [
    WHOLE,
    candidate("pruned", 0.8, 2.0),
    candidate("distilled", 0.8, -0.05),
    candidate("pruned", 0.5, 3.5),
    TAKEN,
    candidate("distilled", 0.4, 0.4),
    candidate("int8", 0.6, 0.12),
]


def test_front_is_what_nothing_beats_in_both():
    assert front(TRIED) == [TRIED[2], TAKEN, TRIED[5]]
    assert front([WHOLE, WHOLE]) == [WHOLE]
    assert front([candidate("distilled", 1.1, 0.2), WHOLE]) == [WHOLE]


def test_before_anything_is_taken_the_page_says_so_and_any_number_of_networks_can_be_drawn():
    for candidates in (
        [WHOLE],
        [WHOLE, candidate("pruned", 0.9, 0.0)],
        [WHOLE, candidate("pruned", 0.9, float("inf"))],
    ):
        page = render(candidates, None, 0.0, FACTS)
        assert "Nothing is taken so far" in page
        assert page.count('id="point') == len(candidates)
        assert "nan" not in page.lower()


@pytest.fixture
def page(browser, tmp_path) -> Iterator:
    path = tmp_path / "search.html"
    path.write_text(render(TRIED, TAKEN, 0.2, FACTS), encoding="utf-8")
    with opened(browser, path) as page:
        yield page


@needs_chromium
def test_the_one_taken_comes_first_and_is_marked_once(page):
    assert page.locator("h1").inner_text() == "25% of the MACs, 50% of the time, 0.100 dB lost"
    assert "at most 0.2 dB (0.1 dB to spare)" in page.locator(".budgets li").inner_text()
    assert page.locator("#curve ~ figure a:has(circle.taken)").get_attribute("id") == "point4"
    assert page.locator("tr.shown th").inner_text() == "4 distilled, taken"
    assert page.locator(".facts dd").inner_text() == "light/val: 2, <b>heavy</b>: 3"


@needs_chromium
def test_points_are_where_their_numbers_are(page):
    places = page.locator("#curve ~ figure a g").evaluate_all(
        "all => all.map(g => g.transform.baseVal[0].matrix).map(m => [m.e, m.f])"
    )
    assert len(places) == len(TRIED)
    xs, ys = zip(*places, strict=True)
    right = xs[0]  # the whole network's time is 1
    assert [x / right for x in xs] == pytest.approx([each.latency for each in TRIED], abs=0.002)
    scale = (ys[3] - ys[0]) / 3.5
    assert [(y - ys[0]) / scale for y in ys] == pytest.approx([each.drop_db for each in TRIED], abs=0.01)
    (line,) = page.locator("line.zero").evaluate_all("all => all.map(line => line.y1.baseVal.value)")
    assert (line - ys[0]) / scale == pytest.approx(0.2, abs=0.01)
    ticks = page.locator("#curve ~ figure text[text-anchor=middle]").all_text_contents()
    assert [float(text) for text in ticks] == [0, 0.2, 0.4, 0.6, 0.8, 1]


@needs_chromium
def test_points_and_rows_lead_to_each_other_by_pointer_and_keyboard(page):
    page.locator("#point5").click()
    assert page.locator("tr:target th").inner_text() == "5 distilled"
    page.get_by_role("link", name="2 distilled", exact=True).click()
    assert page.locator("a:target").get_attribute("id") == "point2"
    page.locator("#point3").focus()
    page.keyboard.press("Enter")
    assert page.locator("tr:target th").inner_text() == "3 pruned"


@needs_chromium
def test_the_table_sorts_and_its_csv_has_every_network(page):
    page.locator("#rows thead button", has_text="time").click()
    names = [name.split()[0] for name in page.locator("#rows tbody th").all_inner_texts()]
    assert names == ["0", "1", "2", "6", "3", "4", "5"]  # the slowest first; equal ones stay in their order
    with urlopen(page.get_by_role("link", name="Download as CSV").get_attribute("href")) as file:  # of the page itself
        header, *lines = csv.reader(io.StringIO(file.read().decode()))
    assert header == ["kind", "file", "params", "macs", "latency", "ms", "light/val", "<b>heavy</b>", "drop_db"]
    assert [line[0] for line in lines] == [each.kind for each in TRIED]
    assert [float(line[-1]) for line in lines] == [each.drop_db for each in TRIED]


@needs_chromium
@at_any_width
def test_the_page_fits_any_width_and_follows_the_readers_colours(page, width, scheme):
    expect_fit(page, width, scheme)
