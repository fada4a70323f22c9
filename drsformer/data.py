"""Rainy images with their clean counterparts, in the folders in which the benchmarks come.

    pairs = find_pairs("Rain200H/test")
    rainy, clean = pairs[0].load()

`LAYOUTS` is the list of what is known, `NAMES` how the name of a rainy image becomes that of its clean one, so that a
download needs no renaming. Both follow what the data sets' own pages and the loaders published for them say; they were
tried on trees made after that, not on the downloads. A layout is recognised by the names of folders and files alone:
nothing looks into an image to guess what it is.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime import images
from runtime.errors import InputError

NAMES = (
    (r"$", ""),  # 1 and 1: the packages of DRSformer's authors, and most others
    (r"x2$", ""),  # norain-1x2 and norain-1: Rain200L, Rain200H
    (r"^rain", "norain"),  # rain-1 and norain-1: Rain200L and Rain200H where the x2 has been taken away
    (r"_\d+$", ""),  # 901_1 ... 901_14 and 901: DDN-Data, 14 rains on every background
    (r"_s\d+_a\d+$", ""),  # im_0001_s80_a04 and im_0001: Outdoor-Rain, 15 rains on every background
    (r"$", "gt"),  # 000 and 000gt: SPA-Data, test
)
"""Pattern and replacement that make the stem of a clean image from that of a rainy one. All images of a folder follow
the same one, that which finds the most partners. Suffixes may differ."""


@dataclass(frozen=True)
class Pair:
    """A rainy image and the same without rain.

    Attributes:
        input: File of the rainy image.
        target: File of the clean image.
        name: Unique in its data set: the path of the input below its folder, without the suffix.
        side_by_side: Whether `input` and `target` are the same file, which holds both, the rainy one on the left.
    """

    input: Path
    target: Path
    name: str
    side_by_side: bool = False

    def load(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Read both images.

        Returns:
            Rainy and clean image, uint8 (H, W, 3) RGB of one size.

        Raises:
            InputError: They are of different sizes, or cannot be read.
        """
        rainy = images.read_rgb(self.input)
        if self.side_by_side:
            W = rainy.shape[1]
            if W % 2:
                raise InputError(f"{self.input}: expected two images side by side, found an odd width of {W} pixels")
            return rainy[:, : W // 2], rainy[:, W // 2 :]
        clean = images.read_rgb(self.target)
        if clean.shape != rainy.shape:
            (H, W, _), (h, w, _) = rainy.shape, clean.shape
            raise InputError(f"{self.target}: expected {W}x{H} pixels as {self.input} has, found {w}x{h}")
        return rainy, clean


def pair_folders(inputs: Path, targets: Path) -> list[Pair]:
    """Every image of `inputs` with its partner in `targets`, in natural order.

    Several inputs may share a target, and targets may be left over.

    Raises:
        InputError: A folder has no images, or an input has no target.
    """
    return _paired(_images(inputs), _images(targets))


def _paired(rainy: dict[str, Path], clean: dict[str, Path]) -> list[Pair]:
    """Pairs of images, which are given by their stems. Raises InputError where one has no partner, for the odd name."""
    renamings = [
        {stem: re.sub(pattern, replacement, stem, count=1) for stem in rainy if re.search(pattern, stem)}
        for pattern, replacement in NAMES
    ]
    partners = max(renamings, key=lambda renaming: sum(partner in clean for partner in renaming.values()))
    found = [stem for stem in rainy if partners.get(stem) in clean]
    for stem, path in rainy.items():
        if stem not in partners:  # whose others have partners by this rule
            example = f"{rainy[found[0]].name} and {clean[partners[found[0]]].name}"
            raise InputError(f"{path}: expected a name by which it has a counterpart, as {example} have; found none")
        if partners[stem] not in clean:
            raise InputError(_without_partner(path, partners[stem], rainy, clean))
    return [Pair(path, clean[partners[stem]], stem) for stem, path in rainy.items()]


def _without_partner(path: Path, partner: str, rainy: dict[str, Path], clean: dict[str, Path]) -> str:
    """What is wrong with a rainy image whose clean one, of this stem, is missing; or with that one's name."""
    folder = next(iter(clean.values())).parent
    near = next((stem for stem in clean if stem != partner and _natural(stem) == _natural(partner)), None)
    if near is None:
        return f"{path}: expected its counterpart {folder / partner}.*, found none"
    if _is_padded_oddly(near, clean) and not _is_padded_oddly(path.stem, rainy):
        return f"{clean[near]}: expected {partner}.* for {path}, found other zeros before its number"
    return f"{path}: expected its counterpart {folder / partner}.*, found {clean[near].name} with other zeros"


def _is_padded_oddly(stem: str, stems: Iterable[str]) -> bool:
    """Whether its number begins with a zero and that of no other does, or the other way round."""
    zeros = [bool(re.search(r"(?<!\d)0\d", other)) for other in stems if other != stem]
    return any(zeros) is not bool(re.search(r"(?<!\d)0\d", stem))


def _two_folders(inputs: str, targets: str, folder: Path) -> list[Pair]:
    places = folder / inputs, folder / targets
    return pair_folders(*places) if all(place.is_dir() for place in places) else []


def _beside_clean(inputs: str, folder: Path) -> list[Pair]:
    """Pairs of rain-* in a folder, or in another in it, with norain-* in it."""
    place = folder / inputs
    rainy = _by_stem(place, "rain-") if place.is_dir() else {}
    clean = _by_stem(folder, "norain-")
    return _paired(rainy, clean) if rainy and clean else []


def _list_file(name: str, folder: Path) -> list[Pair]:
    """Pairs in the order of a text file with two paths, rainy and clean, on each line. Its paths start with a slash but
    are relative to it."""
    path = folder / name
    lines = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
    pairs: dict[str, Pair] = {}
    for number, line in enumerate(lines, 1):
        words = [word.lstrip("/") for word in line.split()]
        if not words:
            continue
        if len(words) != 2 or any(".." in Path(word).parts for word in words):
            raise InputError(f"{path}, line {number}: expected two paths below {folder}, found {line!r}")
        rainy, clean = (folder / word for word in words)
        if rainy.is_dir():  # in scene 274 of SPA-Data, a folder of the image's name with the image in it
            rainy = next(iter(_images(rainy).values()))
        for image in (rainy, clean):
            if not image.is_file():
                raise InputError(f"{path}, line {number}: expected {image}, found no such file")
        stem = words[0].rpartition(".")[0]
        if stem in pairs:
            raise InputError(f"{path}, line {number}: expected each rainy image once, found {words[0]} again")
        pairs[stem] = Pair(rainy, clean, stem)
    return list(pairs.values())


def _side_by_side(folder: Path) -> list[Pair]:
    if re.match(r"train2018new$|DID-MDN-test", folder.resolve().name):
        places = {"": folder}
    else:
        places = {f"{place.parent.name}/": place for place in sorted(folder.glob("Rain_*/train2018new"))}
    return [
        Pair(path, path, prefix + stem, True)
        for prefix, place in places.items()
        for stem, path in _images(place).items()
    ]


class Layout(NamedTuple):
    """A way in which pairs lie in a folder.

    Attributes:
        looks: What it looks like, for messages.
        find: Finds the pairs of a folder; none where it is not laid out so.
    """

    looks: str
    find: Callable[[Path], list[Pair]]


LAYOUTS = (
    # All five data sets as the authors of DRSformer pack them, and one's own.
    Layout("input/ and target/", partial(_two_folders, "input", "target")),
    # Rain200L and Rain200H by Yang et al.: rain_data_train_Light and the like, some with a folder more.
    Layout("rain/X2/ and norain/", partial(_two_folders, "rain/X2", "norain")),
    Layout("rain/ and norain/", partial(_two_folders, "rain", "norain")),
    # Rain100L and Rain100H by Yang et al., of 2017: RainTrainL and RainTrainH, and the test sets as most repack them.
    Layout("rainy/rain-* and norain-*", partial(_beside_clean, "rainy")),
    Layout("rain-* and norain-*", partial(_beside_clean, "")),
    Layout("rainy/ and gt/", partial(_two_folders, "rainy", "gt")),
    # Rain12 by Li et al. (2016), as most repack it.
    Layout("rainy/ and groundtruth/", partial(_two_folders, "rainy", "groundtruth")),
    # Outdoor-Rain by Li et al. (2019), and as later works on all weathers repack it.
    Layout("in/ and gt/", partial(_two_folders, "in", "gt")),
    Layout("input/ and gt/", partial(_two_folders, "input", "gt")),
    Layout("data/ and gt/", partial(_two_folders, "data", "gt")),
    # DID-Data by Zhang and Patel: DID-MDN-training, with a folder for each density of rain, and DID-MDN-test.
    Layout("Rain_*/train2018new/ or DID-MDN-test/ of images side by side", _side_by_side),
    # DDN-Data by Fu et al.: rainy_image_dataset/training and rainy_image_dataset/testing.
    Layout("rainy_image/ and ground_truth/", partial(_two_folders, "rainy_image", "ground_truth")),
    # SPA-Data by Wang et al.: Training with its list, Testing/real_test_1000 with folders, and a list above it.
    Layout("real_world.txt", partial(_list_file, "real_world.txt")),
    Layout("rain/ and gt/", partial(_two_folders, "rain", "gt")),
    Layout("real_test_1000.txt", partial(_list_file, "real_test_1000.txt")),
)


class LayoutError(InputError):
    """A folder is in none of `LAYOUTS`."""


def find_pairs(folder: str | os.PathLike[str]) -> list[Pair]:
    """All pairs of a folder in one of `LAYOUTS`, in natural order or that of its list file.

    Raises:
        InputError: The folder is missing or has no images, or an image has no counterpart.
        LayoutError: The folder is in no known layout; an InputError too.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: expected a folder of pairs, found {found}")
    for layout in LAYOUTS:
        if pairs := layout.find(folder):
            return pairs
    names = sorted((path.name + "/" * path.is_dir() for path in folder.iterdir()), key=_natural)
    found = ", ".join(names[:5] + ["..."] * (len(names) > 5)) or "nothing"
    raise LayoutError(f"{folder}: expected {'; or '.join(layout.looks for layout in LAYOUTS)}; found {found}")


def images_in(folder: Path) -> list[Path]:
    """The image files in a folder itself, sorted by name.

    Raises:
        InputError: There is no such folder, or it has no images.
    """
    paths = images.list_images(folder)
    if not paths:
        raise InputError(f"{folder}: expected images, found none")
    return paths


def dataset_name(folder: Path) -> str:
    """The last two parts of a path, links as they are: they name a data set without saying where it lies."""
    return "/".join(Path(os.path.abspath(folder)).parts[1:][-2:])


def files_sha256(paths: Iterable[Path]) -> str:
    """SHA-256 over the names and sizes of files, with those of their folders, which tells data sets of one name
    apart."""
    digest = hashlib.sha256()
    for name, size in sorted((f"{path.parent.name}/{path.name}", path.stat().st_size) for path in paths):
        digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def files_of(*folders: Iterable[Pair]) -> list[Path]:
    """The files of pairs."""
    return [path for folder in folders for pair in folder for path in (pair.input, pair.target)]


def _images(folder: Path) -> dict[str, Path]:
    """The images of a folder by their stems, in natural order. Raises InputError where there are none, or two of a
    name."""
    found = _by_stem(folder)
    if not found:
        raise InputError(f"{folder}: expected images ending in {', '.join(images.SUFFIXES)}, found none")
    return found


def _by_stem(folder: Path, beginning: str = "") -> dict[str, Path]:
    """Those whose names begin so, of which there may be none."""
    found: dict[str, Path] = {}
    for path in sorted(images.list_images(folder), key=lambda path: _natural(path.name)):
        if path.stem in found:
            raise InputError(f"{folder}: expected one image of a name, found {found[path.stem].name} and {path.name}")
        if path.name.startswith(beginning):
            found[path.stem] = path
    return found


def _natural(name: str) -> list[str | int]:
    """A sort key in which 2 comes before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
