"""The page that shows what a validation found.

One HTML file with every picture inside, so that it can be mailed or archived and is still whole. It needs no JavaScript
and follows the reader's light or dark setting.
"""

from __future__ import annotations

import base64
import io
import math
from html import escape

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from export.comparison import Crop, Validation

TEXT_COLOR = "#7f868d"
"""Color of the plots' text and axes, which lie on the page's background: legible on white and on black."""

BAR_COLOR = "#3e8ed0"

MIN_BARS = 12
"""Bars of a plot get no wider than if it had so many."""


def render(validation: Validation) -> str:
    """The page, as one self-contained HTML file."""
    totals = validation.totals
    tiles = []
    if "drop_db" in totals:
        budget = "" if validation.max_drop_db is None else f"budget {validation.max_drop_db:g} dB"
        tiles += [
            _tile(f"{totals['drop_db']:+z.4f} dB", "mean drop in PSNR", budget),
            _tile(f"{validation.worst.drop_db:+z.4f} dB", "worst drop", validation.worst.name),
        ]
    for who, gain in validation.gains.items():
        tiles.append(_tile(f"{gain:+z.4f} dB", f"gain of the {who} over the rainy input", ""))
    budget = "" if validation.min_psnr is None else f"at least {validation.min_psnr:g} dB wanted"
    tiles += [
        _tile(f"{totals['psnr_between']:.2f} dB", "least PSNR between the outputs", budget),
        _tile(f"{totals['max_difference']:.0f} / 255", "largest pixel difference", ""),
    ]
    if validation.selections:
        selections = sum(validation.selections.values())
        tiles.append(_tile(f"{totals['flipped']:.4g}", "top-k selections flipped an image", f"of {selections}"))
    facts = "".join(f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in validation.facts.items())
    head = "".join(f"<th>{escape(title)}</th>" for title in ("image", *(c.title for c in validation.columns)))
    body = "".join(_row(image.name, *validation.cells(image)) for image in validation.images)
    foot = _row(*validation.last_row())
    mood = "bad" if validation.warnings or not validation.passed else "good" if validation.budgets else "neutral"
    budgets = "".join(
        f'<li class="{"good" if budget.kept else "bad"}">{"✓" if budget.kept else "✗"} {escape(str(budget))}</li>'
        for budget in validation.budgets
    )
    warnings = "".join(f'<p class="warning">{escape(warning)}</p>' for warning in validation.warnings)
    remarks = "".join(f"<p>{escape(remark)}</p>" for remark in validation.remarks)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(validation.headline)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1 class="{mood}">{escape(validation.headline)}</h1>
{warnings}
<ul>{budgets}</ul>
{remarks}
<dl>{facts}</dl>
</header>
<section class="tiles">{"".join(tiles)}</section>
{_crops(validation)}
<section>
<h2>Image by image</h2>
{_plot(_by_image(validation), "One bar an image, worst first; no bar where it is infinite.")}
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody><tfoot>{foot}</tfoot></table></div>
</section>
{_flips(validation)}
</body>
</html>
"""


STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #687076; --page: #ffffff; --card: #f4f6f8; --line: #dfe3e6;
  --good: #18794e; --bad: #cd2b31; }
@media (prefers-color-scheme: dark) { :root { --ink: #eceef0; --soft: #9ba1a6; --page: #151718; --card: #1f2325;
  --line: #313538; --good: #4cc38a; --bad: #ff8589; } }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.8rem; margin: 0 0 .5rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
p, dt, figcaption, .tile span { color: var(--soft); }
.warning { color: var(--bad); font-weight: 600; } ul { list-style: none; margin: 0; padding: 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; margin: 0; font-size: .9rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem; margin-top: 1.5rem; }
.tile { background: var(--card); border-radius: .6rem; padding: .8rem 1rem; overflow-wrap: anywhere; }
.tile b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; } .tile span { display: block;
  font-size: .85rem; }
.crop { background: var(--card); border-radius: .6rem; padding: .8rem 1rem; margin: .75rem 0; }
.crop p { margin: 0 0 .5rem; }
.crop div { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; }
figure { margin: 0; } figcaption { font-size: .85rem; } img { width: 100%; border-radius: .3rem; display: block; }
.crop img { image-rendering: pixelated; }
.wide { overflow-x: auto; } .wide img { min-width: 36rem; }
table { border-collapse: collapse; font-size: .85rem; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tfoot td { font-weight: 600; }
"""


def _tile(number: str, label: str, remark: str) -> str:
    return f'<div class="tile"><b>{escape(number)}</b><span>{escape(label)}</span><span>{escape(remark)}</span></div>'


def _row(*cells: str) -> str:
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def _crops(validation: Validation) -> str:
    if not validation.crops:
        return "<p>The outputs are equal on every image.</p>"
    crops = "".join(_crop(name, crop) for name, crop in validation.crops.items())
    return f"""<section>
<h2>Where the outputs differ most</h2>
<p>Parts of the worst images. The difference is the absolute one, multiplied as stated so that it can be seen.</p>
{crops}
</section>"""


def _crop(name: str, crop: Crop) -> str:
    h, w, _ = crop.input.shape
    amplified, factor = crop.amplified()
    pictures = {
        "input": crop.input,
        "reference": crop.reference,
        "candidate": crop.candidate,
        f"difference × {factor}": amplified,
    }
    figures = "".join(_figure(_png(picture), caption) for caption, picture in pictures.items())
    place = f"{escape(name)}, {w}×{h} pixels from ({crop.left}, {crop.top})"
    return f'<div class="crop"><p>{place}</p><div>{figures}</div></div>'


def _flips(validation: Validation) -> str:
    if not validation.selections:
        return ""
    caption = (
        "Share of the selections that came out differently, over all images. "
        "They are nearly equal scores; a flip upstream changes the scores downstream."
    )
    return f"""<section>
<h2>Top-k selections, layer by layer</h2>
{_plot(_by_layer(validation), caption)}
</section>"""


def _by_image(validation: Validation) -> Figure:
    field = "drop_db" if "drop_db" in validation.totals else "psnr_between"
    images = sorted(validation.images, key=lambda image: image.badness, reverse=True)
    figure, axes = _axes(2.6)
    values = [getattr(image, field) for image in images]
    axes.bar(range(len(images)), [v if math.isfinite(v) else math.nan for v in values], width=0.9, color=BAR_COLOR)
    axes.set_ylabel("drop in PSNR, dB" if field == "drop_db" else "PSNR between the outputs, dB")
    axes.axhline(0, color=TEXT_COLOR, linewidth=0.8)
    axes.set_xlim(-0.6, max(len(images), MIN_BARS) - 0.4)
    axes.set_xticks([])
    return figure


def _by_layer(validation: Validation) -> Figure:
    layers = list(validation.selections)
    totals = [sum(image.flips[layer] for image in validation.images) for layer in layers]
    counts = [validation.selections[layer] * len(validation.images) for layer in layers]
    figure, axes = _axes(0.8 + 0.22 * len(layers))
    axes.barh(layers, [100 * flips / count for flips, count in zip(totals, counts, strict=True)], color=BAR_COLOR)
    axes.invert_yaxis()
    axes.set_xlabel("flipped, %")
    return figure


def _axes(height: float):
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    axes.tick_params(colors=TEXT_COLOR, labelsize=8)
    axes.xaxis.label.set_color(TEXT_COLOR)
    axes.yaxis.label.set_color(TEXT_COLOR)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(TEXT_COLOR)
    return figure, axes


def _plot(figure: Figure, caption: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", transparent=True)
    return f'<div class="wide">{_figure(_data_uri("image/svg+xml", file.getvalue()), caption)}</div>'


def _figure(source: str, caption: str) -> str:
    return f'<figure><img src="{source}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'


def _png(image: NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return _data_uri("image/png", file.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
