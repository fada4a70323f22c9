"""The networks that a search tried as a page: what each costs and what it loses, and which one is taken.

It stands in the frame of `runtime.page`: one HTML file, whole in itself, that is read without a script but for
sorting. Points of the curve and rows of the table lead to each other.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from export.comparison import Budget
from runtime import page

MARKS = {
    "whole": "M0-6 6 0 0 6-6 0Z",
    "pruned": "M-4-4 4 4M-4 4 4-4",
    "distilled": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0Z",
    "int8": "M-4.5-4.5h9v9h-9Z",
}
"""The mark of each kind of network, as the path of an SVG around its point."""

PLOT = 720, 340
"""Width and height inside the axes, in units of the drawing."""


@dataclass(frozen=True)
class Candidate:
    """A network on the way.

    Attributes:
        kind: "whole", "pruned", "distilled" or "int8".
        file: Where it is, below the folder of the work; None for the whole network.
        params: Its parameters.
        macs: Its MACs, as a fraction of the whole network's.
        latency: Its milliseconds, as a fraction of the whole network's.
        ms: Its milliseconds, as measured.
        psnr: Its PSNR in dB, by validation folder.
        drop_db: The largest drop against the whole network, in dB.
    """

    kind: str
    file: str | None
    params: int
    macs: float
    latency: float
    ms: float
    psnr: dict[str, float]
    drop_db: float

    def __str__(self) -> str:
        return (
            f"{self.kind}, {self.macs:.3f} of the MACs, {self.latency:.3f} of the milliseconds, "
            f"{self.drop_db:z.3f} dB lost"
        )


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other one beats in time without losing more, from the slowest to the fastest."""
    found: list[Candidate] = []
    for each in sorted(candidates, key=lambda each: (each.drop_db, each.latency)):
        if not found or each.latency < found[-1].latency:
            found.append(each)
    return found


def render(candidates: Sequence[Candidate], taken: Candidate | None, max_drop_db: float, facts: dict[str, str]) -> str:
    """The page.

    Args:
        candidates: All that was tried, the whole network first.
        taken: The one that was taken, if one was.
        max_drop_db: The budget in dB.
        facts: How that was measured, for people: label and text.

    Returns:
        HTML, whole in itself.
    """
    headline = "Nothing is taken so far"
    if taken:
        headline = f"{taken.macs:.0%} of the MACs, {taken.latency:.0%} of the time, {taken.drop_db:z.3f} dB lost"
    folders = list(candidates[0].psnr)
    return page.render(
        "search.html",
        "compress",
        headline=headline,
        mood="good" if taken else "neutral",
        warnings=[],
        budgets=[Budget("largest drop in PSNR", taken.drop_db, max_drop_db)] if taken else [],
        remarks=[f"Of {len(candidates)} networks that were measured, the whole one included."],
        plot=_plot(candidates, taken, max_drop_db),
        marks={kind: mark for kind, mark in MARKS.items() if any(each.kind == kind for each in candidates)},
        columns=["network", "parameters", "MACs", "time", "ms", *(f"{folder} dB" for folder in folders), "drop dB"],
        rows=[
            {"name": f"{i} {each.kind}", "cells": _cells(each), "taken": each == taken}
            for i, each in enumerate(candidates)
        ],
        csv=page.data_uri("text/csv;charset=utf-8", _csv(candidates, folders).encode(errors="backslashreplace")),
        facts=facts,
    )


def _cells(each: Candidate) -> list[tuple[str, float]]:
    """Of each column but the first the text, and the number by which the script sorts."""
    numbers = ((each.macs, ".3f"), (each.latency, ".3f"), (each.ms, ".1f"))
    decibels = [(value, ".3f") for value in each.psnr.values()]
    forms = ((each.params, ","), *numbers, *decibels, (each.drop_db, "z.3f"))
    return [(f"{value:{form}}", value) for value, form in forms]


def _csv(candidates: Sequence[Candidate], folders: Sequence[str]) -> str:
    text = io.StringIO()
    lines = csv.writer(text)
    lines.writerow(["kind", "file", "params", "macs", "latency", "ms", *folders, "drop_db"])
    for each in candidates:
        values = (each.params, each.macs, each.latency, each.ms, *each.psnr.values(), each.drop_db)
        lines.writerow([each.kind, each.file or "", *values])
    return text.getvalue()


def _plot(candidates: Sequence[Candidate], taken: Candidate | None, max_drop_db: float) -> dict[str, Any]:
    """The drop in dB, better upwards, over the fraction of the time."""
    width, height = PLOT
    drops = [each.drop_db for each in candidates if math.isfinite(each.drop_db)]
    top, bottom = min([0.0, *drops]), max([max_drop_db, *drops])
    margin = 0.06 * (bottom - top or 1.0)
    top, bottom, right = top - margin, bottom + margin, 1.06 * max(each.latency for each in candidates)

    def at(each: Candidate) -> tuple[float, float]:
        return x(each.latency), y(min(max(each.drop_db, top), bottom))

    def x(latency: float) -> float:
        return round(width * latency / right, 1)

    def y(drop: float) -> float:
        return round(height * (drop - top) / (bottom - top), 1)

    return {
        "width": width,
        "height": height,
        "budget": y(max_drop_db),
        "budget_text": f"budget, {max_drop_db:g} dB",
        "front": " ".join(f"{x},{y}" for x, y in map(at, front(candidates))),
        "points": [
            {
                "x": at(each)[0],
                "y": at(each)[1],
                "kind": each.kind,
                "taken": each == taken,
                "title": f"{i} {each}" + (", taken" if each == taken else ""),
            }
            for i, each in enumerate(candidates)
        ],
        "x_ticks": [(x(value), f"{value:z.3g}") for value in _ticks(0.0, right)],
        "y_ticks": [(y(value), f"{value:z.3g}") for value in _ticks(top, bottom)],
    }


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, some five of them."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(power * times for times in (1, 2, 5, 10) if (high - low) / (power * times) <= 6)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
