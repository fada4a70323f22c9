"""The page that shows what a validation found, for somebody who decides and is no researcher.

It stands in the frame of `runtime.page`: one HTML file, whole in itself. Its own template is in `templates/`; here is
what it shows.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from export.comparison import Column, Comparison, Picture, Validation
from runtime import page
from runtime.pixels import size_text

EXACT_DB = 1e-4
"""Where no drop is larger than this, a sentence says so in place of a plot."""

BINS = 24
"""Bars of the distribution."""

PLOT = 720, 140
"""Width and height of the distribution's bars, in units of the drawing."""


class Change(NamedTuple):
    """A row of the table of before and after: its name, and the cells for input, reference, candidate and change."""

    name: str
    cells: tuple[str, ...]


def write(file: Path, validation: Validation) -> None:
    """Write the page, whole or not at all; `validation` as for `render`."""
    page.write(file, render(validation))


def render(validation: Validation) -> str:
    """The page.

    Args:
        validation: What it shows.

    Returns:
        HTML, whole in itself.
    """
    ranked = sorted(validation.images, key=lambda image: image.badness, reverse=True)
    shown = {name: i for i, name in enumerate(validation.pictures)}
    pictures = [_picture(validation, name, picture) for name, picture in validation.pictures.items()]
    return page.render(
        "report.html",
        "export",
        headline=validation.headline,
        mood="bad" if validation.warnings or not validation.passed else "good" if validation.budgets else "neutral",
        warnings=validation.warnings,
        budgets=validation.budgets,
        remarks=validation.remarks,
        change=_changes(validation),
        pictures=pictures,
        kinds=list(pictures[0]["layers"]) if pictures else [],
        left_out=len(validation.images) - len(pictures),
        spread=_spread(validation),
        columns=["image", *(column.title.replace("\n", " ") for column in validation.columns)],
        rows=[
            {"name": image.name, "picture": shown.get(image.name), "cells": _cells(validation.columns, image)}
            for image in ranked
        ],
        total=validation.last_row(),
        csv=page.data_uri("text/csv;charset=utf-8", _csv(validation.columns, ranked).encode(errors="backslashreplace")),
        csv_name="images.csv",
        layers=_layers(validation),
        facts=validation.facts,
    )


def _changes(validation: Validation) -> list[Change]:
    totals, rows = validation.totals, []
    for name, measure, unit in (("PSNR, mean, dB", "psnr", ".2f"), ("SSIM, mean", "ssim", ".4f")):
        if f"candidate_{measure}" in totals:
            values = [totals.get(f"{who}_{measure}") for who in ("input", "reference", "candidate")]
            change = totals[f"candidate_{measure}"] - totals[f"reference_{measure}"]
            cells = [_number(value, unit) for value in values]
            rows.append(Change(name, (*cells, _number(change, f"+z{unit}" if measure == "ssim" else "+z.4f"))))
    if {"reference", "candidate"} <= validation.extents.keys():
        reference, candidate = validation.extents["reference"], validation.extents["candidate"]
        for name, before, after, scale in (
            ("parameters, millions", reference.params, candidate.params, 1e6),
            ("GMAC for 256x256", reference.macs, candidate.macs, 1e9),
            ("file, MB", reference.bytes, candidate.bytes, 1e6),
        ):
            values = [None if value is None else value / scale for value in (before, after)]
            change = f"× {after / before:.2f}" if before and after else ""
            rows.append(Change(name, ("", *(_number(value, ".2f") for value in values), change)))
    if timing := validation.timing:
        name = f"milliseconds for {size_text(timing.size)}"
        numbers = (_number(value, ".1f") for value in (timing.reference_ms, timing.candidate_ms))
        rows.append(Change(name, ("", *numbers, f"× {timing.ratio:.2f}")))
    between = totals["psnr_between"]
    worst = "equal" if between == math.inf else f"{between:.2f} dB"
    rows.append(Change("PSNR between the outputs, least", ("", "", "", worst)))
    rows.append(Change("largest pixel difference", ("", "", "", f"{totals['max_difference']:.0f} of 255")))
    return rows


def _number(value: float | None, form: str) -> str:
    if value is None or math.isnan(value):
        return ""
    return f"{value:{form}}".replace("inf", "∞")


def _picture(validation: Validation, name: str, picture: Picture) -> dict[str, Any]:
    """What the script needs of an image."""
    image = next(image for image in validation.images if image.name == name)
    if image.psnr_between == math.inf:
        found = "outputs equal"
    elif image.drop_db is not None:
        found = f"drop {_number(image.drop_db, '+z.4f')} dB"
    else:
        found = f"{image.psnr_between:.2f} dB between the outputs"
    roles = [role for role, of in (("worst", validation.worst), ("typical", validation.typical)) if of.name == name]
    crop = picture.crop
    amplified, factor = crop.amplified()
    parts = {"rainy": crop.input, "reference": crop.reference, "candidate": crop.candidate}
    if crop.target is not None:
        parts["clean"] = crop.target
    parts[f"difference × {factor}"] = amplified
    size, equal = (picture.height, picture.width), image.psnr_between == math.inf
    return page.viewed(name, found, size, picture.layers, crop.window, parts, " and ".join(roles), equal)


def _spread(validation: Validation) -> dict[str, Any]:
    """How the drop is distributed over the images, or without ground truth the PSNR between the outputs."""
    is_drop = "drop_db" in validation.totals
    field, what = ("drop_db", "drop in PSNR") if is_drop else ("psnr_between", "PSNR between the outputs")
    values = np.array([getattr(image, field) for image in validation.images], np.float64)
    finite = values[np.isfinite(values)]
    sentence = None
    if all(image.psnr_between == math.inf for image in validation.images):
        sentence = "The outputs are equal on every image."
    elif is_drop and len(finite) == len(values) and np.abs(values).max() <= EXACT_DB:
        sentence = f"On every image the drop in PSNR is at most {EXACT_DB:g} dB either way."
    elif len(finite) < 2:
        sentence = f"With {len(finite) or 'no'} finite value of the {what} there is nothing to spread."
    if sentence:
        return {"sentence": sentence}
    low, high = finite.min(), finite.max()
    counts, edges = np.histogram(finite, BINS, (low, high) if high - low > EXACT_DB else (low - 0.5, high + 0.5))
    width, height = PLOT
    step = width / BINS
    bars = [
        {
            "x": round(i * step + 1, 2),
            "y": round(height * (1 - count / counts.max()), 2),
            "width": round(step - 2, 2),
            "height": round(height * count / counts.max(), 2),
            "title": f"{count} from {edges[i]:z.4g} to {edges[i + 1]:z.4g} dB",
        }
        for i, count in enumerate(counts.tolist())
        if count
    ]
    dashed = "; the dashed line is no drop" if edges[0] < 0 < edges[-1] else ""
    infinite = len(values) - len(finite)
    left_out = f"; without {infinite} that is infinite" if infinite else ""
    percents = (50, 90, 99, 100) if is_drop else (50, 10, 1, 0)
    names = ("median", "worst 10 %", "worst 1 %", "worst")
    return {
        "sentence": None,
        "title": f"Images by {what}, dB" + dashed + left_out,
        "bars": bars,
        "zero": round(width * -edges[0] / (edges[-1] - edges[0]), 2) if dashed else None,
        "width": width,
        "height": height,
        "ticks": [
            {"x": x, "anchor": anchor, "text": f"{value:z.3g}"}
            for x, anchor, value in (
                (0, "start", edges[0]),
                (width / 2, "middle", (edges[0] + edges[-1]) / 2),
                (width, "end", edges[-1]),
            )
        ],
        "percentiles": [
            (name, f"{value:z.4f} dB")
            for name, value in zip(names, np.percentile(finite, percents).tolist(), strict=True)
        ],
    }


def _layers(validation: Validation) -> list[dict[str, Any]]:
    """The layers in which selections have flipped."""
    found = []
    for layer, selections in validation.selections.items():
        if flips := sum(image.flips[layer] for image in validation.images):
            found.append((layer, flips, flips / selections / len(validation.images)))
    most = max((share for _, _, share in found), default=0)
    return [
        {"name": layer, "width": round(60 * share / most, 1), "text": f"{100 * share:.3g} % ({flips})"}
        for layer, flips, share in found
    ]


def _cells(columns: Sequence[Column], image: Comparison) -> list[tuple[str, str]]:
    """Of each column the text, and the number by which the script sorts."""
    values = [(column, getattr(image, column.field)) for column in columns]
    return [(column.text(value), repr(float(value)).replace("inf", "Infinity")) for column, value in values]


def _csv(columns: Sequence[Column], images: Sequence[Comparison]) -> str:
    text = io.StringIO()
    lines = csv.writer(text)
    lines.writerow(["image", *(column.field for column in columns)])
    lines.writerows([image.name, *(getattr(image, column.field) for column in columns)] for image in images)
    return text.getvalue()
