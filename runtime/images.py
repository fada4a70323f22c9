"""Image files with everything around the pixels: what goes in with them comes out with them.

    photo = load("rainy.jpg")
    replace(photo, rgb=derain(photo.rgb)).save("clean.jpg")

Kept: EXIF, the ICC profile, the resolution in print, the alpha channel, and grey as grey. The orientation in the EXIF
data is applied to the pixels and its tag dropped, so that the network sees the image upright, as it was trained, and
any viewer shows it so.
Not kept: the thumbnail, which would still show the rain; a palette becomes RGB. Not kept either, and remarked on when
the image is written: XMP, which may hold thumbnails and speak of parts of the file that are gone, text and comments,
IPTC, further images of a JPEG file, EXIF tags that nobody can write, and what the format to write has no place for.
Remarked on when it is read: colours that a PNG file describes by its chunks gAMA and cICP, and a JPEG file that is
complete but for its end marker.

Refused, rather than silently made worse: other numbers than 0 to 255 or fewer a channel, CMYK and other colour spaces,
animations and files of several pages (a stereo or burst photograph in one JPEG file counts as its first image), and
images of more pixels than the limit against decompression bombs, see `refuse_bomb`.
"""

from __future__ import annotations

import io
import logging
import os
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageChops, ImageFile, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

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

EXIF_DIRECTORIES = {
    (): ExifTags.TAGS,
    (ExifTags.IFD.Exif,): ExifTags.TAGS,
    (ExifTags.IFD.Exif, ExifTags.IFD.Interop): ExifTags.TAGS,
    (ExifTags.IFD.GPSInfo,): ExifTags.GPSTAGS,
}
"""The directories of EXIF data, by the tags that lead to them from the first one, with the names of their tags."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What turns an image upright, by its orientation in the EXIF data."""

PNG_TEXT = {"XML:com.adobe.xmp", "Raw profile type exif", "Software", "date:create", "date:modify", "date:timestamp"}
"""Keys of a PNG file's text that are not remarked on: told by other names, or what programs write by themselves."""

UNKEPT = {"xmp": "XMP", "comment": "comment", "photoshop": "IPTC or Photoshop data"}
"""What no `Photo` keeps, by its name in Pillow, with that in the remark."""


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
        lost: What else the file holds, by name, for the remark that it is not kept.
    """

    rgb: NDArray[np.uint8]
    alpha: NDArray[np.uint8] | None = None
    grey: bool = False
    lossy: bool = False
    exif: bytes = b""
    icc_profile: bytes = b""
    dpi: tuple[float, float] | None = None
    lost: tuple[str, ...] = ()

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
        without loss; TIFF uncompressed, as Pillow's compressor cannot take EXIF data. WebP has no grey. A remark is
        logged of what is not kept: what `lost` names, EXIF and ICC profile in BMP, the resolution in WebP if there is
        no EXIF to tell it, and an ICC profile for other colours than those that are written.

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
        unheld = {
            "BMP": {"EXIF": self.exif, "ICC profile": profile},
            "WEBP": {"resolution in print": self.dpi and not self.exif},  # EXIF has to tell it
        }
        if lost := [*self.lost, *(name for name, value in unheld.get(file_format, {}).items() if value)]:
            logger.warning("%s: not kept: %s", path, ", ".join(lost))
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
    # Much of what Pillow calls grey or RGB of 8 bits is not: it cuts 16 bits in colour to 8, or takes their bytes for
    # pixels, takes -1 for 255, and in separate planes all for 8 bits from the highest to the lowest, 0 for black.
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    bits = 16 if ";16B" in str(image.tile) else max(tags.get(ExifTags.Base.BitsPerSample, (1,)))
    if bits > 8:
        raise InvalidImage(f"{name}: {bits} bits a channel, where the network works on 8; convert it to 8 first")
    if 2 in tags.get(ExifTags.Base.SampleFormat, ()):
        raise InvalidImage(f"{name}: signed numbers, where the network works on 0 to 255; convert it first")
    if tags.get(ExifTags.Base.PlanarConfiguration) == 2 and image.info["compression"] == "raw":
        reversed_bits = tags.get(ExifTags.Base.FillOrder) == 2
        reversed_grey = tags.get(ExifTags.Base.PhotometricInterpretation, 0) == 0
        if 1 < bits < 8 or reversed_bits or reversed_grey:
            raise InvalidImage(f"{name}: separate planes of a rare kind; write them as one first")
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
        image.close()  # lets go of its pixels; no more than two images of them are held from here on
        whole, *others = (Image.open(io.BytesIO(content + end + b"\xff\xd9"), formats=["JPEG"]) for end in ENDINGS)
        for other in others:
            if ImageChops.difference(whole, other).getbbox():
                raise
            other.close()
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
    orientation, exif, lost = _exif(image)
    lost = dict.fromkeys(_unkept(image) + lost)  # each once, however many tags have no name
    if orientation in (5, 6, 7, 8):  # rows become columns
        dpi = dpi and (dpi[1], dpi[0])
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"))
    return Photo(np.asarray(image.convert("RGB")), alpha, grey, lossy, exif, icc_profile, dpi, tuple(lost))


def _unkept(image: Image.Image) -> list[str]:
    """The names of what an image holds that no `Photo` keeps, but for EXIF tags."""
    found = {*image.info}
    if isinstance(image, TiffImageFile) and {ExifTags.Base.IPTCNAA, ExifTags.Base.ImageResources} & {*image.tag_v2}:
        found.add("photoshop")
    unkept = [name for key, name in UNKEPT.items() if key in found]
    if isinstance(image, PngImageFile) and {*image.text} - PNG_TEXT:
        unkept.append("text")
    if image.format == "MPO" and getattr(image, "n_frames", 1) > 1:
        unkept.append("further images")
    return unkept


def _exif(image: Image.Image) -> tuple[Any, bytes, list[str]]:
    """The orientation, what is kept of the EXIF data, and the names of tags that would be if they could be written.

    Pillow reads tags of types that it cannot write, and for one such tag would write none. So each is tried alone.
    """
    lost = []

    def writable(directory: Mapping[int, Any], *path: int) -> dict[int, Any]:
        kept = {}
        for tag in sorted(directory):
            try:
                inside = (*path, tag) in EXIF_DIRECTORIES
                value = writable(exif.get_ifd(tag), *path, tag) if inside else directory[tag]
                entry = {tag: value}
                for outer in reversed(path):
                    entry = {outer: entry}
                alone = Image.Exif()
                alone.update(entry)
                alone.tobytes()
            except Exception:  # Pillow raises nearly anything
                lost.append(f"EXIF {EXIF_DIRECTORIES[path].get(tag, 'tags without a name')}")
            else:
                kept[tag] = value
        return kept

    try:
        exif = image.getexif()
        Image.Exif().load(image.info.get("exif", b""))  # raises what only the first call has raised, at the opening
        orientation = exif.get(ExifTags.Base.Orientation, 1)
        for tag in {*exif} - EXIF_TAGS:
            del exif[tag]
        kept = Image.Exif()
        kept.endian = exif.endian
        kept.update(writable(exif))
        return orientation, kept.tobytes() if kept else b"", lost
    except Exception:  # EXIF data that nobody can read is left out; the pixels are sound
        return 1, b"", ["EXIF"]


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
