"""Image files with everything around the pixels: what goes in with them comes out with them.

    photo = load("rainy.jpg")
    replace(photo, rgb=derain(photo.rgb)).save("clean.jpg")

Kept: EXIF, the ICC profile, the resolution in print, the alpha channel, and grey as grey. The orientation in the EXIF
data is applied to the pixels and its tag dropped, so that the network sees the image upright, as it was trained, and
any viewer shows it so.
Not kept: XMP and text, and the thumbnail, which would still show the rain; a palette becomes RGB. Remarked on: colours
that a PNG file describes by its chunks gAMA and cICP, an ICC profile for other colours than the file's, and a JPEG file
that is complete but for its end marker.

Refused, rather than silently made worse: more than 8 bits a channel, CMYK and other colour spaces, animations and
files of several pages (a stereo or burst photograph in one JPEG file counts as its first image), and images of more
pixels than the limit against decompression bombs, see `refuse_bomb`.
"""

from __future__ import annotations

import io
import logging
import os
import random
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from .errors import InputError, InvalidImage, OutOfMemory
from .files import writing

logger = logging.getLogger(__name__)

FORMATS = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".webp": "WEBP", ".bmp": "BMP",
    ".tif": "TIFF", ".tiff": "TIFF",
}  # fmt: skip
"""Pillow's format by the suffix of the file to write. Files to read are recognised by their content."""

SUFFIXES = tuple(FORMATS)

LONGEST_SIDE = {"JPEG": 65535, "WEBP": 16383}
"""Pixels of the longest side that a format has numbers for; the others have more than memory."""

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
"""Pillow's modes that become RGB, or RGB and alpha, without loss."""

SRGB = bytes([1, 13, 0, 1])
"""What a chunk cICP says of sRGB: primaries, curve, matrix and range by their codes in ITU-T H.273."""

SRGB_GAMMA = 0.45455
"""What a chunk gAMA says of sRGB."""

LOSSY = ("JPEG", "MPO")
"""Formats that are lossy always; WebP may be."""

ENDINGS = [bytes([first, *random.Random(first).choices(range(255), k=63)]) for first in range(0, 256, 16)]
"""Data, without a marker, by which a JPEG file might go on that has no end: any four bits, then others."""

EXIF_TAGS = {ExifTags.Base[name] for name in (
    "ExifOffset", "GPSInfo", "ImageDescription", "Artist", "Copyright", "DateTime", "Make", "Model", "Software",
    "HostComputer", "XResolution", "YResolution", "ResolutionUnit", "XPTitle", "XPComment", "XPAuthor", "XPKeywords",
    "XPSubject", "Rating", "RatingPercent",
)}  # fmt: skip
"""What is kept of the first EXIF directory: all that describes the photograph, nothing that describes how the old file
stored it. In a TIFF file the two stand side by side."""


@dataclass(frozen=True, eq=False)
class Photo:
    """An image and what has to be written with it.

    Attributes:
        rgb: uint8 (H, W, 3), upright.
        alpha: uint8 (H, W), or None.
        grey: Whether it is written as one channel. Its `rgb` then has three equal channels when loaded.
        lossy: Whether it came from a lossy file.
        exif, icc_profile: As bytes; empty where there is none.
        dpi: Pixels an inch in print, across and down; None where nothing is said.
    """

    rgb: NDArray[np.uint8]
    alpha: NDArray[np.uint8] | None = None
    grey: bool = False
    lossy: bool = False
    exif: bytes = b""
    icc_profile: bytes = b""
    dpi: tuple[float, float] | None = None

    def check(self, path: str | os.PathLike[str]) -> None:
        """Raise InputError where the format that the suffix of `path` stands for is unknown, cannot hold so large an
        image or would lose transparency. An alpha channel that is opaque throughout is nothing to lose."""
        suffix = Path(path).suffix
        if suffix.lower() not in FORMATS:
            raise InputError(f"expected an image file ending in {', '.join(SUFFIXES)} to write, found {path}")
        longest = LONGEST_SIDE.get(FORMATS[suffix.lower()])
        if longest is not None and max(self.rgb.shape) > longest:
            raise InputError(
                f"{path} cannot be written: a {suffix} file holds at most {longest} pixels a side; "
                "write it as .png or .tif"
            )
        if FORMATS[suffix.lower()] in ("JPEG", "BMP") and self.alpha is not None and self.alpha.min() < 255:
            raise InputError(
                f"{path}: a {suffix} file cannot hold the transparency of this image; write it as .png, .webp or .tif"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the image in the format of the suffix, whole or not at all; missing parent folders are made.

        JPEG in quality 95 without chroma subsampling; WebP in quality 95 if the image came from a lossy file, else
        without loss; TIFF uncompressed, as Pillow's compressor cannot take EXIF data. BMP holds neither EXIF nor an ICC
        profile, WebP has no grey. An ICC profile for other colours than those that are written is left out, and a
        remark logged.

        Raises:
            InputError: As `check` does and where the format cannot hold so much EXIF data.
        """
        content = self._encode(path)
        with writing(path) as temporary:
            temporary.write_bytes(content)

    def encode(self, format: str = "png") -> bytes:
        """The bytes of the file that `save` would write, for those who have no file.

        Args:
            format: A suffix of `SUFFIXES`, with or without its point.

        Raises:
            InputError: As `save` does.
        """
        return bytes(self._encode(f"image.{format.removeprefix('.')}"))

    def _encode(self, path: str | os.PathLike[str]) -> memoryview:
        """What is to be written at `path`."""
        self.check(path)
        image = Image.fromarray(self.rgb)
        if self.grey:
            image = image.convert("L")
        file_format = FORMATS[Path(path).suffix.lower()]
        if self.alpha is not None and file_format not in ("JPEG", "BMP"):
            image.putalpha(Image.fromarray(self.alpha))
        options: dict[str, dict[str, Any]] = {
            "JPEG": dict(quality=95, subsampling="4:4:4"),
            "WEBP": dict(quality=95, lossless=not self.lossy, exact=True),  # exact: colours also where transparent
        }
        profile, colours = self.icc_profile, b"GRAY" if self.grey and file_format != "WEBP" else b"RGB "
        if profile and profile[16:20] != colours and file_format != "BMP":
            described, written = (text.decode("latin-1").strip() for text in (profile[16:20], colours))
            logger.warning(
                "%s: its ICC profile is for %s and is left out, as %s is written", path, described or "nothing", written
            )
            profile = b""
        around = {k: v for k, v in dict(exif=self.exif, icc_profile=profile, dpi=self.dpi).items() if v}
        encoded = io.BytesIO()  # on a full disk some of Pillow's encoders would raise what they raise for bad images
        try:
            image.save(encoded, file_format, **options.get(file_format, {}), **around)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be written: {error}") from error
        return encoded.getbuffer()


def load(path: str | os.PathLike[str]) -> Photo:
    """Read a PNG, JPEG, WebP, BMP or TIFF file, recognised by its content.

    Raises:
        InvalidImage: The file is missing, broken, or refused (the head of this file says which).
    """
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for a writer
        raise InvalidImage(f"{path}: expected an image file, found a folder, a pipe or a device")
    try:
        with open(path, "rb") as file:
            return _read(file, os.fspath(path))
    except OSError as error:  # those of decoders do not get here
        raise InvalidImage(f"{path}: {error.strerror}") from error


def decode(content: bytes, name: str = "image") -> Photo:
    """The image in the bytes of a file, with the guards of `load`: for services, which have no file.

    Args:
        content: PNG, JPEG, WebP, BMP or TIFF.
        name: What errors and remarks call it.

    Raises:
        InvalidImage: It is broken, or refused (the head of this file says what is).
        OutOfMemory: It does not fit into the memory.
    """
    return _read(io.BytesIO(content), name)


def _read(file: BinaryIO, name: str) -> Photo:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd metadata
            with Image.open(file, formats=sorted({*FORMATS.values()})) as image:
                refuse_bomb(name, *image.size)
                _refuse_unfit(name, image)
                if image.format == "PNG":
                    _remark_on_colours(file, name, image)
                webp = image.format == "WEBP"
                return _photo(
                    _loaded(file, name, image), _is_lossy_webp(file) if webp else image.format in ("JPEG", "MPO")
                )
    except Image.DecompressionBombError:  # by Pillow itself, at twice the limit
        reason = _bomb()
    except UnidentifiedImageError:
        reason = "not a PNG, JPEG, WebP, BMP or TIFF image, or cut off at its start"
    except InvalidImage:
        raise
    except MemoryError:
        raise OutOfMemory(f"{name}: not enough memory") from None
    except Exception as error:  # on broken files Pillow's decoders raise nearly anything
        reason = getattr(error, "strerror", None) or f"broken image: {error}"
    raise InvalidImage(f"{name}: {reason}")


def read_rgb(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Only the pixels of `load`: uint8 (H, W, 3), upright, without alpha."""
    return load(path).rgb


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """The image files in `folder` itself, by suffix, sorted by name, without hidden ones; may be empty. A link to
    nothing is among them, so that it is missed. Raises InputError where there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"expected a folder of images, found none at {folder}")
    files = (path for path in folder.iterdir() if path.suffix.lower() in FORMATS and not path.name.startswith("."))
    return sorted(path for path in files if path.is_file() or not path.exists())


def refuse_bomb(path: str | os.PathLike[str], width: int, height: int) -> None:
    """Raise InvalidImage for an image of more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, before they are decoded: a
    small file can claim to hold billions, and take all the memory there is. The limit, 89 million unless it is set, is
    Pillow's for the whole process; None is no limit."""
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise InvalidImage(f"{path}: {_bomb()}")


def _bomb() -> str:
    return (
        f"more than {Image.MAX_IMAGE_PIXELS} pixels, the limit against files made to exhaust the memory; raise it if "
        "you trust the file (runtime.derain: --max-pixels; Python: PIL.Image.MAX_IMAGE_PIXELS)"
    )


def _refuse_unfit(name: str, image: ImageFile.ImageFile) -> None:
    if re.search(r";16[BLN]", str(image.tile)):  # colours of 16 bits, which Pillow would cut to 8 and call RGB
        raise InvalidImage(f"{name}: 16 bits a channel, where the network works on 8; convert it to 8 first")
    if image.mode not in MODES:
        raise InvalidImage(
            f"{name}: expected grey, RGB or palette colours of 8 bits, found {image.mode}; convert it first"
        )
    if getattr(image, "is_animated", False) and image.format != "MPO":  # n_frames reads all pages of a TIFF file
        raise InvalidImage(f"{name}: an animation or a file of several pages; split it into single images first")


def _loaded(file: BinaryIO, name: str, image: ImageFile.ImageFile) -> Image.Image:
    """The image with its pixels decoded, where at most the end marker of a JPEG file is missing.

    Whether more is missing the decoder does not tell, as it makes up the rest. But then the rest depends on what
    follows in the file, so `ENDINGS` are tried. (A progressive image that ends with a scan passes as complete.)
    """
    try:
        image.load()
    except OSError:
        if image.format != "JPEG":
            raise
        file.seek(0)
        content = file.read().rstrip(b"\xff")  # of a marker that was cut in two
        whole, *others = (Image.open(io.BytesIO(content + end + b"\xff\xd9"), formats=["JPEG"]) for end in ENDINGS)
        if any(other.tobytes() != whole.tobytes() for other in others):
            raise
        logger.warning("%s: is complete but for the end marker of a JPEG file, and restored", name)
        return whole
    return image


def _remark_on_colours(file: BinaryIO, name: str, image: ImageFile.ImageFile) -> None:
    """Log what a PNG file says of its colours, other than that they are sRGB, in chunks that Pillow does not write."""
    chunks = _png_chunks(file)
    primaries, curve, *others = chunks.get(b"cICP", SRGB)
    if (primaries, curve, *others) != (*SRGB,):
        told = f"cICP (primaries {primaries}, curve {curve} of ITU-T H.273)"
    elif b"iCCP" in chunks or b"sRGB" in chunks or abs(image.info.get("gamma", SRGB_GAMMA) - SRGB_GAMMA) < 0.005:
        return
    else:
        told = f"gAMA ({image.info['gamma']:g})"
    logger.warning("%s: how its colours are to be shown, %s, is not kept; they will be taken for sRGB", name, told)


def _png_chunks(file: BinaryIO) -> dict[bytes, bytes]:
    """The chunks of a PNG file before its pixels; 4 bytes of each, which of a shorter one include its checksum."""
    chunks, position = {}, file.tell()
    file.seek(8)
    while len(header := file.read(8)) == 8 and header[4:] != b"IDAT":
        chunks[header[4:]] = file.read(4)
        file.seek(int.from_bytes(header[:4]) + 4 - len(chunks[header[4:]]), os.SEEK_CUR)
    file.seek(position)  # where Pillow goes on
    return chunks


def _photo(image: Image.Image, lossy: bool) -> Photo:
    icc_profile, dpi = image.info.get("icc_profile") or b"", _dpi(image)
    grey = image.mode in ("1", "L", "LA")
    try:
        exif = image.getexif()
        exif.bigtiff = False  # as it is in a BigTIFF file, and nowhere else
        if exif.get(ExifTags.Base.Orientation, 1) in range(5, 9):  # rows become columns
            dpi = dpi and (dpi[1], dpi[0])
        image = ImageOps.exif_transpose(image)
        for tag in set(exif) - EXIF_TAGS:
            del exif[tag]
        exif_bytes = exif.tobytes() if exif else b""
    except Exception:  # EXIF data that nobody can read is left out; the pixels are sound
        exif_bytes = b""
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"))
    return Photo(np.asarray(image.convert("RGB")), alpha, grey, lossy, exif_bytes, icc_profile, dpi)


def _dpi(image: Image.Image) -> tuple[float, float] | None:
    """None also for numbers that make no sense or that not all formats hold."""
    try:
        across, down = map(float, image.info["dpi"])
    except (LookupError, TypeError, ValueError, ArithmeticError):
        return None
    return (across, down) if all(1 <= number < 65535.5 for number in (across, down)) else None


def _is_lossy_webp(file: BinaryIO) -> bool:
    """Pillow does not tell, but the name of the chunk that holds the pixels does."""
    file.seek(12)
    while header := file.read(8):
        if header[:4] in (b"VP8 ", b"VP8L"):
            return header[:4] == b"VP8 "
        size = int.from_bytes(header[4:], "little")
        file.seek(size + size % 2, os.SEEK_CUR)
    return False
