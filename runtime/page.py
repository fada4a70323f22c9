"""The frame of the pages that commands write.

Each is one HTML file with every picture inside, so that it can be mailed or archived and is still whole: nothing is
fetched. It follows the reader's light or dark setting, prints, and can be used by keyboard and screen reader.

The templates of the frame, for Jinja2, are in `templates/` here; those of a single page may be in another package of
ours and stand on them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from .files import writing
from .pictures import Window, png

FRAME = __name__.rpartition(".")[0]
"""The package with the templates of the frame: this one, which is `derainer` in a product."""


def render(template: str, package: str = FRAME, **values: Any) -> str:
    """A page that is whole in itself.

    Args:
        template: Name of its template.
        package: Ours whose `templates` have it.
        values: What it shows.

    Returns:
        HTML.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in dict.fromkeys((package, FRAME))]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {}  # in the order that is meant, which the default is to sort
    return environment.get_template(template).render(values)


def write(path: Path, html: str) -> None:
    """Write a page, whole or not at all. Names of files need not be text, and what is none of them is escaped."""
    with writing(path) as temporary:
        temporary.write_text(html, encoding="utf-8", errors="backslashreplace")


def data_uri(kind: str, content: bytes) -> str:
    """A file inside a page, by its media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def viewed(
    name: str,
    found: str,
    size: tuple[int, int],
    layers: Mapping[str, bytes],
    window: Window,
    parts: Mapping[str, NDArray[np.uint8]],
    note: str = "",
    equal: bool = False,
) -> dict[str, Any]:
    """What the viewer of `parts.html` needs of an image.

    Args:
        name: Name of the image.
        found: What was measured on it, in some words.
        size: Its height and width in pixels.
        layers: WebP files by what they show, of one size, which is smaller than that of the image where it is large.
        window: The part that is marked.
        parts: That part by what it shows, uint8 (h, w, 3).
        note: What the list of images says of it besides.
        equal: Whether nothing differs, so that there is nothing to mark.

    Returns:
        A value for JSON.
    """
    height, width = size
    with Image.open(io.BytesIO(next(iter(layers.values())))) as first:
        scaled = first.size != (width, height)
    mark = f". The mark is {window.width}×{window.height} pixels from ({window.left}, {window.top})"
    return {
        "name": name,
        "label": f"{name}, {found}" + (f" ({note})" if note else ""),
        "caption": f"{name}: {found}" + ("" if equal else mark),
        "equal": equal,
        "width": width,
        "height": height,
        "scaled": scaled,
        "layers": {kind: data_uri("image/webp", file) for kind, file in layers.items()},
        "mark": {  # in percent, whatever size the picture is shown at
            "top": 100 * window.top / height,
            "left": 100 * window.left / width,
            "height": 100 * window.height / height,
            "width": 100 * window.width / width,
        },
        "crops": [(kind, data_uri("image/png", png(part))) for kind, part in parts.items()],
    }
