"""Pack rain data for training into one small file, and unpack it where it is needed.

    python -m benchmarks.pack pack.zip --data ../shared/data     # DRSFORMER_DATA, where it is set, is the default
    python -m benchmarks.pack pack.zip --unpack data/

What comes out has the folders that went in, so training and evaluation read it as they read the original: pairs under
NAME/train and NAME/val for every NAME, and the images of `clean` and `streaks`. Small enough to carry to a machine
without a network: a pair is stored as its background and the grey layer of rain that was added to it, or where its rain
is no such layer, as in Rain800, as its two images.

Validation pairs come back bit for bit. Of the rest something is given up: backgrounds of training pairs are WebP in
quality 92, their layers are rounded down to multiples of 4 (input and target still differ by exactly that layer); where
there are two images, both are in quality 85; and of the streak images every tenth is kept, in quality 80. Photographs
in `clean` keep their bytes, and a training background that is one of them is stored once. The same data gives the same
file, byte for byte, with the same version of Pillow.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image

from drsformer.data import Pair, find_pairs, images_in
from drsformer.rendering import add_rain, rain_of_pair
from runtime import images
from runtime.cli import main, progress
from runtime.errors import InputError
from runtime.files import writing

DATA = Path(os.environ.get("DRSFORMER_DATA", "../shared/data"))
"""What is packed if nothing is named."""

FORMAT = 2
"""Version of the manifest."""

MANIFEST = "manifest.json"

STREAKS_EVERY = 10
"""One of so many streak images is kept."""

LAYER_STEP = 4
"""Layers of training pairs are rounded down to multiples of this."""

LOSSLESS: dict[str, Any] = dict(lossless=True, quality=75, method=4)
BACKGROUND: dict[str, Any] = dict(quality=92, method=6)
IMAGES: dict[str, Any] = dict(quality=85, method=6)
STREAKS: dict[str, Any] = dict(quality=80, method=6)
"""Options of Pillow's WebP encoder."""


def pack(data: Path, output: Path) -> dict[str, Any]:
    """Write the folder `data` as one file; returns the size and the numbers of pairs and images."""
    folders = sorted(path for split in ("train", "val") for path in data.glob(f"*/{split}") if path.is_dir())
    singles = [data / name for name in ("clean", "streaks") if (data / name).is_dir()]
    if not folders:
        raise InputError(f"{data}: expected folders of pairs such as rain100l/train and rain100l/val, found none")
    photographs = {
        _sha256(image.tobytes()): path.name
        for path in (images_in(data / "clean") if data / "clean" in singles else [])
        for image in [images.read_rgb(path)]
    }
    files: dict[str, bytes] = {}
    pairs: dict[str, dict[str, Any]] = {}
    with progress() as bar:
        for folder in folders:
            name = folder.relative_to(data).as_posix()
            for pair in bar.track(find_pairs(folder), description=f"Packing {name}"):
                place = f"{name}/{pair.name}"
                pairs[place], parts = _pack_pair(place, pair, folder.name == "val", photographs)
                files |= parts
        for path in (path for folder in singles for path in _chosen(folder)):
            if path.parent.name == "clean":
                files[f"clean/{path.name}"] = path.read_bytes()
            else:
                files[f"streaks/{path.stem}.webp"] = _webp(images.read_rgb(path)[..., 0], STREAKS)
    manifest = {
        "format": FORMAT,
        "pairs": pairs,
        "files": {name: {"bytes": len(content), "sha256": _sha256(content)} for name, content in files.items()},
    }
    files = {MANIFEST: json.dumps(manifest, indent=1).encode()} | files
    with writing(output) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, content in files.items():
            method = zipfile.ZIP_DEFLATED if name == MANIFEST else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name), content, method)  # dated 1980
    return {"bytes": output.stat().st_size, **_counts(manifest)}


def unpack(file: Path, output: Path) -> dict[str, Any]:
    """Write the folders of a pack; returns the numbers of pairs and images. Raises InputError for a file that is no
    pack or is damaged; nothing is written then."""
    try:
        with zipfile.ZipFile(file) as archive:
            manifest = json.loads(archive.read(MANIFEST))
            if manifest["format"] != FORMAT:
                raise InputError(f"{file}: expected format {FORMAT}, found {manifest['format']!r}; pack the data again")
            files = {name: archive.read(name) for name in manifest["files"]}
        for name in (*files, *manifest["pairs"]):
            if "\\" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
                raise InputError(f"{file}: expected names of files below the output, found {name!r}")
        for name, content in files.items():
            if _sha256(content) != manifest["files"][name]["sha256"]:
                raise InputError(f"{file}: {name} is damaged; pack the data again")
        for parts in manifest["pairs"].values():
            if not files.keys() >= {parts["target"], parts["input"] if "input" in parts else parts["layer"]}:
                raise InputError(f"{file}: expected all parts of its pairs, found some missing; pack the data again")
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: expected a pack made by benchmarks.pack, found something else ({error})") from None
    with progress() as bar:
        for place, parts in bar.track(manifest["pairs"].items(), description="Unpacking"):
            folder, _, name = place.rpartition("/")
            target = _decode(files[parts["target"]])
            if "input" in parts:
                rainy = _decode(files[parts["input"]])
            else:
                layer = _decode(files[parts["layer"]])[..., 0].astype(np.float32)
                rainy = add_rain(target, layer * parts["step"])
            for kind, image in (("input", rainy), ("target", target)):
                with writing(output / folder / kind / f"{name}.png") as temporary:
                    Image.fromarray(image).save(temporary, compress_level=1)
        for name, content in files.items():
            if name.startswith(("clean/", "streaks/")):
                with writing(output / name) as temporary:
                    temporary.write_bytes(content)
    return _counts(manifest)


def _pack_pair(
    place: str, pair: Pair, exact: bool, photographs: dict[str, str]
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What the manifest says of a pair, and the files that this adds to the pack."""
    rainy, clean = pair.load()
    layer = rain_of_pair(rainy, clean)
    grey = np.array_equal(add_rain(clean, layer.astype(np.float32)), rainy)
    webp = LOSSLESS if exact else BACKGROUND if grey else IMAGES
    files: dict[str, bytes] = {}
    parts: dict[str, Any] = {}
    if grey:
        parts |= {"layer": f"{place}.layer.png", "step": 1 if exact else LAYER_STEP}
        files[parts["layer"]] = _png(layer // parts["step"])
    else:
        parts["input"] = f"{place}.input.webp"
        files[parts["input"]] = _webp(rainy, webp)
    if not exact and (known := photographs.get(_sha256(clean.tobytes()))):
        parts["target"] = f"clean/{known}"
    else:
        parts["target"] = f"{place}.target.webp"
        files[parts["target"]] = _webp(clean, webp)
    return parts, files


def _chosen(folder: Path) -> list[Path]:
    return images_in(folder)[:: STREAKS_EVERY if folder.name == "streaks" else 1]


def _webp(image: NDArray[np.uint8], options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", **options)
    return buffer.getvalue()


def _png(layer: NDArray[np.uint8]) -> bytes:
    """PNG beats WebP on grey layers, unless hours are given to it."""
    buffer = io.BytesIO()
    Image.fromarray(layer).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _decode(content: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _counts(manifest: dict[str, Any]) -> dict[str, int]:
    single = [name.split("/")[0] for name in manifest["files"]]
    return {"pairs": len(manifest["pairs"]), "clean": single.count("clean"), "streaks": single.count("streaks")}


def command(
    file: Annotated[Path, tyro.conf.Positional],
    data: Path = DATA,
    unpack_to: Annotated[Path | None, tyro.conf.arg(name="unpack")] = None,
) -> dict[str, Any]:
    """Write a pack, or unpack one.

    Args:
        file: The pack, a .zip file.
        data: Folder to pack.
        unpack_to: Folder that gets what is in the pack; the pack is then read, not written.
    """
    if unpack_to:
        return unpack(file, unpack_to)
    if not data.is_dir():
        raise InputError(f"`data`: expected a folder, found none at {data}")
    return pack(data, file)


if __name__ == "__main__":
    main(command, __doc__, summary=lambda counts: counts)
