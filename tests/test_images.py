"""Image files: what is read, what is kept, what is refused."""

import io
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from runtime import InputError, InvalidImage, OutOfMemory
from runtime.images import EXIF_TAGS, FORMATS, SUFFIXES, Photo, decode, list_images, load, read_rgb

LOSSLESS = [".png", ".webp", ".bmp", ".tif", ".tiff"]
WITH_METADATA = [".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"]
WITH_ALPHA = [".png", ".webp", ".tif"]
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height=24, width=36):
    """What JPEG keeps to a few levels."""
    y, x = np.mgrid[:height, :width]
    return np.stack([40 + 4 * x, 200 - 3 * y, 90 + x + y], axis=-1).astype(np.uint8)


def make_exif(orientation=1):
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "rain on a window"
    exif[ExifTags.Base.Orientation] = orientation
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"ASCII\0\0\0wet"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    return exif.tobytes()


def read_exif(path):
    with Image.open(path) as image:
        image.load()
        exif = image.getexif()
        return (
            exif.get(ExifTags.Base.ImageDescription),
            exif.get(ExifTags.Base.Orientation, 1),
            exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment),
            exif.get_ifd(ExifTags.IFD.GPSInfo).get(ExifTags.GPS.GPSLatitudeRef),
        )


def refusal(path, kind=InvalidImage):
    """The one line with which `path` is refused, after its name."""
    with pytest.raises(kind) as error:
        load(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("suffix", LOSSLESS)
@pytest.mark.parametrize("size", [(1, 1), (7, 9)])
def test_lossless_round_trip(tmp_path, suffix, size):
    rgb = noise(*size, 3)
    Photo(rgb).save(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(read_rgb(tmp_path / f"a{suffix}"), rgb)


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp"])
def test_lossy_files_are_written_in_high_quality(tmp_path, suffix):
    rgb = smooth()
    Photo(rgb, lossy=True).save(tmp_path / f"a{suffix}")
    difference = np.abs(load(tmp_path / f"a{suffix}").rgb.astype(int) - rgb)
    assert difference.mean() < 2, difference.mean()


def test_jpeg_keeps_full_chroma(tmp_path):
    Photo(smooth()).save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        assert isinstance(image, JpegImageFile)
        assert {component[1:3] for component in image.layer} == {(1, 1)}


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("extended", [True, False])  # an ICC profile moves the pixels behind another chunk
def test_webp_stays_what_it_was(tmp_path, lossless, extended):
    odd = ICC if len(ICC) % 2 else ICC + b"\0"  # chunks of odd length are padded
    Image.fromarray(noise(20, 30, 3)).save(tmp_path / "a.webp", lossless=lossless, icc_profile=odd if extended else b"")
    photo = load(tmp_path / "a.webp")
    assert photo.lossy is not lossless
    photo.save(tmp_path / "b.webp")
    assert load(tmp_path / "b.webp").lossy is not lossless
    assert np.array_equal(read_rgb(tmp_path / "b.webp"), photo.rgb) is lossless


@pytest.mark.parametrize("source", WITH_METADATA)
@pytest.mark.parametrize("target", WITH_METADATA)
def test_exif_and_profile_are_kept(tmp_path, source, target):
    Image.fromarray(smooth()).save(tmp_path / f"a{source}", exif=make_exif(), icc_profile=ICC)
    load(tmp_path / f"a{source}").save(tmp_path / f"b{target}")
    assert read_exif(tmp_path / f"b{target}") == ("rain on a window", 1, b"ASCII\0\0\0wet", "N")
    with Image.open(tmp_path / f"b{target}") as image:
        assert image.info["icc_profile"] == ICC


@pytest.mark.parametrize("source", [".png", ".jpg", ".bmp", ".tif"])
@pytest.mark.parametrize("target", [".png", ".jpg", ".bmp", ".tif"])
def test_resolution_in_print_is_kept(tmp_path, source, target):
    Image.fromarray(smooth()).save(tmp_path / f"a{source}", dpi=(300, 150))
    load(tmp_path / f"a{source}").save(tmp_path / f"b{target}")
    with Image.open(tmp_path / f"b{target}") as image:
        assert tuple(round(float(number)) for number in image.info["dpi"]) == (300, 150)


@pytest.mark.parametrize("orientation", [1, 6])
def test_resolution_turns_with_the_image(tmp_path, orientation):
    Image.fromarray(smooth()).save(tmp_path / "a.jpg", dpi=(300, 150), exif=make_exif(orientation))
    load(tmp_path / "a.jpg").save(tmp_path / "b.jpg")
    with Image.open(tmp_path / "b.jpg") as image:
        assert image.info["dpi"] == ((300, 150) if orientation == 1 else (150, 300))


@pytest.mark.parametrize("dpi", [(0, 0), (1e-3, 72), (70_000, 70_000)])
def test_resolution_that_makes_no_sense_is_dropped(tmp_path, dpi):
    Image.fromarray(smooth()).save(tmp_path / "a.tif", dpi=dpi)
    photo = load(tmp_path / "a.tif")
    assert photo.dpi is None
    photo.save(tmp_path / "b.jpg")


def test_want_of_memory_is_no_broken_image(tmp_path, monkeypatch):
    Photo(smooth()).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", lambda *_: np.empty(2**50))
    assert refusal(tmp_path / "a.png", OutOfMemory) == "not enough memory"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_dropped(tmp_path, suffix, orientation):
    upright = smooth()
    # How the pixels lie in the file so that the tag turns them upright (EXIF 2.32, 4.6.4).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    path, result = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    Image.fromarray(stored).save(
        path, None, exif=make_exif(orientation), **({} if suffix == ".tif" else dict(quality=100))
    )
    photo = load(path)
    assert photo.rgb.shape == upright.shape
    assert np.abs(photo.rgb.astype(int) - upright).mean() < 2
    photo.save(result)
    assert read_exif(result) == ("rain on a window", 1, b"ASCII\0\0\0wet", "N")
    assert np.abs(read_rgb(result).astype(int) - upright).mean() < 2


def test_the_thumbnail_is_left_out(tmp_path):
    thumbnail = io.BytesIO()
    Image.fromarray(smooth(8, 8)).save(thumbnail, "JPEG")
    data = thumbnail.getvalue()
    # A first directory without entries, then one with the offset and the length of a JPEG thumbnail.
    exif = struct.pack("<2sHLHL", b"II", 42, 8, 0, 14)
    exif += struct.pack("<HHHLLHHLLL", 2, 513, 4, 1, 44, 514, 4, 1, len(data), 0) + data
    Image.fromarray(smooth()).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.getexif().get_ifd(ExifTags.IFD.IFD1)[514] == len(data)
    load(tmp_path / "a.jpg").save(tmp_path / "b.jpg")
    with Image.open(tmp_path / "b.jpg") as image:
        assert not image.getexif().get_ifd(ExifTags.IFD.IFD1)


def test_unreadable_exif_is_left_out(tmp_path):
    for i, exif in enumerate((b"Exif\0\0garbage!", make_exif()[:40], b"Exif\0\0II*\0\xff\xff\xff\xff")):
        Image.fromarray(smooth()).save(tmp_path / "a.jpg", exif=exif)
        photo = load(tmp_path / "a.jpg")
        assert photo.rgb.shape == smooth().shape, i
        assert photo.lost == (("EXIF",) if i == 0 else ()), i  # of the others Pillow finds something
        load(tmp_path / "a.jpg").save(tmp_path / "b.jpg")


def odd_exif(*entries, orientation=6):
    """EXIF data with an orientation, if one is given, and tags of any type: (tag, type, count, bytes)."""
    entries = [*entries, *([(274, 3, 1, bytes([orientation, 0]))] if orientation else [])]
    table, data, start = b"", b"", 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in sorted(entries):
        place = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<L", start + len(data))
        table += struct.pack("<HHL", tag, kind, count) + place
        data += value if len(value) > 4 else b""
    return b"Exif\0\0" + struct.pack("<2sHLH", b"II", 42, 8, len(entries)) + table + bytes(4) + data


WIDTHS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
"""Bytes of one value by the number of its type in EXIF data."""

SOUND = [(306, 2, 20, b"2024:01:01 10:00:00\0"), (315, 2, 6, b"Artist"), (296, 3, 1, b"\2\0")]
"""The moment, the photographer and the unit of resolution."""


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize(
    ("odd", "told"),
    [
        ([(282, 2, 3, b"72\0")], ["XResolution"]),
        ([(271, 5, 1, bytes(8))], ["Make"]),
        ([(271, 10, 1, b"\1\0\0\0\2\0\0\0")], ["Make"]),
        ([(283, 2, 3, b"72\0"), (271, 5, 1, bytes(8)), (272, 12, 1, bytes(8))], ["Make", "Model", "YResolution"]),
        ([(34665, 9, 1, b"\xff" * 4)], ["ExifOffset"]),  # a directory before the beginning of the data
    ],
)
def test_a_tag_that_cannot_be_written_costs_no_other(tmp_path, caplog, suffix, odd, told):
    upright = smooth()
    stored = upright.transpose(1, 0, 2)[::-1]
    Image.fromarray(stored).save(tmp_path / f"a{suffix}", None, exif=odd_exif(*SOUND, *odd), quality=100)
    photo = load(tmp_path / f"a{suffix}")
    assert photo.rgb.shape == upright.shape
    assert np.abs(photo.rgb.astype(int) - upright).mean() < 2
    assert not caplog.messages
    photo.save(tmp_path / f"b{suffix}")
    names = ", ".join(f"EXIF {name}" for name in told)
    assert caplog.messages == [f"{tmp_path / f'b{suffix}'}: not kept: {names}"]
    with Image.open(tmp_path / f"b{suffix}") as image:
        exif = image.getexif()
    assert (exif[306], exif[315], exif[296]) == ("2024:01:01 10:00:00", "Artist", 2)
    assert 274 not in exif


def test_an_odd_tag_in_a_directory_costs_no_other(tmp_path):
    def pointer(tag, place=0):
        return tag, 4, 1, struct.pack("<L", place)

    def directory(*entries):
        """One of entries that fit into their places."""
        parts = b"".join(struct.pack("<HHL", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries)
        return struct.pack("<H", len(entries)) + parts + bytes(4)

    note, size = (37500, 7, 4, b"note"), (40962, 3, 1, b"\7\0")
    interop = directory((1, 2, 4, b"R98\0"))
    gps = directory((1, 2, 2, b"N\0"), (6, 2, 2, b"9\0"))  # a text in place of the altitude
    start = len(odd_exif(pointer(34665), pointer(34853))) - len(b"Exif\0\0")
    inner = directory((36864, 11, 1, bytes(4)), note, size, pointer(40965, start))  # a float in place of the version
    places = start + len(interop), start + len(interop + inner)
    exif = odd_exif(pointer(34665, places[0]), pointer(34853, places[1])) + interop + inner + gps
    Image.fromarray(smooth()).save(tmp_path / "a.jpg", exif=exif)
    photo = load(tmp_path / "a.jpg")
    assert photo.rgb.shape[:2] == smooth().shape[1::-1]
    assert photo.lost == ("EXIF ExifVersion", "EXIF GPSAltitude")
    assert photo.exif.startswith(b"Exif\0\0II")  # the order of bytes, which a maker's note is in as well
    kept = Image.Exif()
    kept.load(photo.exif)
    found = kept.get_ifd(34665)
    assert (found.keys(), found[37500], found[40962]) == ({37500, 40962, 40965}, b"note", 7)
    assert kept.get_ifd(40965) == {1: "R98"}
    assert kept.get_ifd(34853) == {1: "N"}


def test_any_odd_tags_leave_the_image_upright_and_the_rest_there(tmp_path):
    rng = np.random.default_rng(0)
    tags = sorted(set(map(int, EXIF_TAGS)) - {tag for tag, *_ in SOUND})
    lost = 0
    for _ in range(150):
        odd = []
        for tag in rng.choice(tags, 3, replace=False):
            kind, count = int(rng.choice([*WIDTHS])), int(rng.integers(4))
            value = bytes([0, 5, 255][rng.integers(3)] for _ in range(WIDTHS[kind] * count))
            odd.append((int(tag), kind, count, value))
        Image.fromarray(smooth(8, 12)).save(tmp_path / "a.jpg", exif=odd_exif(*SOUND, *odd))
        photo = load(tmp_path / "a.jpg")
        assert photo.rgb.shape == (12, 8, 3), odd
        kept = Image.Exif()
        kept.load(photo.exif)
        assert (kept[306], kept[315], kept[296]) == ("2024:01:01 10:00:00", "Artist", 2), odd
        assert 274 not in kept
        lost += len(photo.lost)
        for suffix in WITH_METADATA:
            assert decode(photo.encode(suffix)).rgb.shape == (12, 8, 3), odd
    assert lost


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'


@pytest.mark.parametrize("orientation", [None, 1, 8])
def test_orientation_in_xmp_counts_where_exif_has_none(tmp_path, caplog, orientation):
    exif = odd_exif(*SOUND, orientation=orientation)
    Image.fromarray(smooth()).save(tmp_path / "a.jpg", exif=exif, xmp=XMP % 6, quality=100)
    turned = np.rot90(smooth(), {None: -1, 1: 0, 8: 1}[orientation])
    photo = load(tmp_path / "a.jpg")
    assert photo.rgb.shape == turned.shape
    assert np.abs(photo.rgb.astype(int) - turned).mean() < 2
    photo.save(tmp_path / "b.jpg")
    assert np.abs(read_rgb(tmp_path / "b.jpg").astype(int) - turned).mean() < 2
    assert caplog.messages == [f"{tmp_path / 'b.jpg'}: not kept: XMP"]


def text(name="Title"):
    """A PNG file's text, of which XMP is one."""
    info = PngInfo()
    info.add_itxt(name, "rain" if name == "Title" else (XMP % 1).decode())
    return info


@pytest.mark.parametrize(
    ("source", "options", "target", "told"),
    [
        (".png", dict(exif=make_exif(), icc_profile=ICC, dpi=(300, 300)), ".bmp", "EXIF, ICC profile"),
        (".png", dict(icc_profile=ICC), ".bmp", "ICC profile"),
        (".jpg", dict(exif=make_exif()), ".bmp", "EXIF"),
        (".png", dict(dpi=(300, 300)), ".webp", "resolution in print"),
        (".jpg", dict(exif=make_exif(), icc_profile=ICC, dpi=(300, 300)), ".png", None),
        (".bmp", dict(dpi=(300, 300)), ".tif", None),
        (".jpg", dict(xmp=XMP % 1), ".jpg", "XMP"),
        (".webp", dict(xmp=XMP % 1), ".png", "XMP"),
        (".tif", dict(tiffinfo={700: XMP % 1}), ".tif", "XMP"),
        (".png", dict(pnginfo=text("XML:com.adobe.xmp")), ".png", "XMP"),
        (".png", dict(pnginfo=text()), ".png", "text"),
        (".jpg", dict(comment="rain"), ".jpg", "comment"),
        (".tif", dict(tiffinfo={33723: b"\x1c\2"}), ".jpg", "IPTC or Photoshop data"),
        (".jpg", dict(xmp=XMP % 1, exif=make_exif(), comment="rain"), ".bmp", "XMP, comment, EXIF"),
    ],
)
def test_what_is_not_kept_is_said(tmp_path, caplog, source, options, target, told):
    Image.fromarray(smooth()).save(tmp_path / f"a{source}", None, **options)
    photo = load(tmp_path / f"a{source}")
    assert not caplog.messages  # who takes only the pixels loses nothing
    replace(photo, rgb=photo.rgb).save(tmp_path / f"b{target}")
    assert caplog.messages == ([f"{tmp_path / f'b{target}'}: not kept: {told}"] if told else [])
    caplog.clear()
    load(tmp_path / f"b{target}").save(tmp_path / f"c{target}")  # where there is nothing left to lose
    assert not caplog.messages


def test_iptc_and_further_images_of_a_jpeg_are_said_too(tmp_path):
    Image.fromarray(smooth()).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    block = b"Photoshop 3.0\0" + b"8BIM\4\4\0\0" + struct.pack(">L", 2) + b"\x1c\2"
    iptc = decode(content[:2] + b"\xff\xed" + struct.pack(">H", 2 + len(block)) + block + content[2:])
    assert iptc.lost == ("IPTC or Photoshop data",)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "b.jpg", "MPO", save_all=True, append_images=frames[1:])
    assert load(tmp_path / "b.jpg").lost == ("further images",)


def test_tags_about_the_old_file_do_not_reach_the_new_one(tmp_path):
    """They would call RGB pixels indices of a palette, and give another size."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "camera"
    Image.fromarray(noise(5, 6)).convert("P").save(tmp_path / "a.tif", exif=exif, big_tiff=True)
    exif[ExifTags.Base.ImageWidth] = 999
    exif[ExifTags.Base.PhotometricInterpretation] = 3
    Image.fromarray(noise(5, 6, 3)).save(tmp_path / "b.png", exif=exif)
    for name in ("a.tif", "b.png"):
        photo = load(tmp_path / name)
        for suffix in WITH_METADATA:
            photo.save(tmp_path / f"c{suffix}")
            assert read_rgb(tmp_path / f"c{suffix}").shape == (5, 6, 3)
            with Image.open(tmp_path / f"c{suffix}") as image:
                assert image.getexif()[ExifTags.Base.Make] == "camera"
                assert image.getexif().get(ExifTags.Base.ImageWidth, 6) == 6


@pytest.mark.parametrize("suffix", WITH_ALPHA)
@pytest.mark.parametrize("grey", [True, False])
def test_alpha_is_kept(tmp_path, suffix, grey):
    alpha, rgb = noise(9, 7, seed=1), noise(9, 7, 3)
    alpha[:3] = 0  # colours stay where nobody sees them
    if grey:
        rgb[:] = rgb[..., :1]
    Photo(rgb, alpha, grey).save(tmp_path / f"a{suffix}")
    photo = load(tmp_path / f"a{suffix}")
    assert photo.alpha is not None
    np.testing.assert_array_equal(photo.alpha, alpha)
    np.testing.assert_array_equal(photo.rgb, rgb)
    assert photo.grey is (grey and suffix != ".webp")


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".BMP"])
def test_transparency_is_not_lost_silently(tmp_path, suffix):
    alpha = np.full((4, 4), 255, np.uint8)
    photo = Photo(noise(4, 4, 3), alpha)
    photo.save(tmp_path / f"opaque{suffix}")
    alpha[2, 3] = 254
    with pytest.raises(InputError, match="cannot hold the transparency"):
        photo.save(tmp_path / f"a{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == [f"opaque{suffix}"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_grey_stays_grey(tmp_path, suffix):
    grey = np.tile(np.arange(0, 256, 5, dtype=np.uint8), (4, 1))
    Image.fromarray(grey).save(tmp_path / f"a{suffix}", None, **(dict(lossless=True) if suffix == ".webp" else {}))
    photo = load(tmp_path / f"a{suffix}")
    assert (photo.rgb == photo.rgb[..., :1]).all()
    photo.save(tmp_path / f"b{suffix}")
    with Image.open(tmp_path / f"b{suffix}") as image:
        assert image.mode == ("RGB" if suffix == ".webp" else "L")
        assert np.abs(np.asarray(image.convert("L")).astype(int) - grey).max() <= 3 * (FORMATS[suffix] == "JPEG")


def icc(colours):
    """The head of a profile for a device of these colours, which is all that is looked at here."""
    return ICC[:16] + colours + ICC[20:]


@pytest.mark.parametrize(("colours", "grey"), [(b"RGB ", False), (b"GRAY", True)])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_profile_of_the_colours_that_are_written_is_kept(tmp_path, caplog, colours, grey, suffix):
    Photo(smooth(), grey=grey, icc_profile=icc(colours)).save(tmp_path / f"a{suffix}")
    assert load(tmp_path / f"a{suffix}").icc_profile == icc(colours)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("colours", "grey", "suffix", "said"),
    [
        (b"GRAY", True, ".webp", "for GRAY and is left out, as RGB is written"),  # which has no grey
        (b"GRAY", False, ".png", "for GRAY and is left out, as RGB is written"),
        (b"RGB ", True, ".jpg", "for RGB and is left out, as GRAY is written"),
        (b"CMYK", False, ".jpg", "for CMYK and is left out, as RGB is written"),
        (b"", False, ".png", "for nothing and is left out, as RGB is written"),
    ],
)
def test_profile_of_other_colours_is_left_out_and_said(tmp_path, caplog, colours, grey, suffix, said):
    profile = icc(colours) if colours else b"cut off"
    Photo(smooth(), grey=grey, icc_profile=profile).save(tmp_path / f"a{suffix}")
    assert load(tmp_path / f"a{suffix}").icc_profile == b""
    assert caplog.messages == [f"{tmp_path / f'a{suffix}'}: its ICC profile is {said}"]


def test_palette_becomes_rgb(tmp_path):
    rgb = noise(6, 6, 3)
    palette = Image.fromarray(rgb).quantize(5)
    palette.save(tmp_path / "a.png")
    palette.save(tmp_path / "b.png", transparency=2)
    photo = load(tmp_path / "a.png")
    np.testing.assert_array_equal(photo.rgb, np.asarray(palette.convert("RGB")))
    assert (photo.alpha, photo.grey) == (None, False)
    photo = load(tmp_path / "b.png")
    assert photo.alpha is not None
    np.testing.assert_array_equal(photo.alpha == 0, np.asarray(palette) == 2)


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_transparent_colour_becomes_alpha(tmp_path, mode):
    image = Image.new(mode, (2, 1), 0 if mode != "RGB" else (1, 2, 3))
    image.putpixel((1, 0), 255 if mode != "RGB" else (9, 9, 9))
    image.save(tmp_path / "a.png", transparency=0 if mode != "RGB" else (1, 2, 3))
    photo = load(tmp_path / "a.png")
    assert photo.alpha is not None
    np.testing.assert_array_equal(photo.alpha, [[0, 255]])
    assert photo.grey is (mode != "RGB")


def chunk(name, data):
    """A chunk of a PNG file."""
    return struct.pack(">L", len(data)) + name + data + struct.pack(">L", zlib.crc32(name + data))


@pytest.mark.parametrize(
    ("chunks", "said"),
    [
        ([(b"gAMA", struct.pack(">L", 100_000))], "gAMA (1)"),
        ([(b"gAMA", struct.pack(">L", 55_556))], "gAMA (0.55556)"),
        ([(b"cICP", bytes([12, 13, 0, 1]))], "cICP (primaries 12, curve 13 of ITU-T H.273)"),
        ([(b"cICP", bytes([9, 16, 0, 1])), (b"sRGB", b"\0")], "cICP (primaries 9, curve 16 of ITU-T H.273)"),
        ([(b"cICP", b"\1")], "cICP (primaries 1, curve "),  # damaged
        ([(b"gAMA", struct.pack(">L", 45_455))], None),
        ([(b"cICP", bytes([1, 13, 0, 1]))], None),
        ([(b"gAMA", struct.pack(">L", 100_000)), (b"sRGB", b"\0")], None),  # the latter counts
        ([], None),
    ],
)
def test_colours_that_a_png_tells_otherwise_are_said(tmp_path, caplog, chunks, said):
    Image.fromarray(smooth()).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    place = whole.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(whole[:place] + b"".join(chunk(*parts) for parts in chunks) + whole[place:])
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"), smooth())
    remarks = [f"{tmp_path / 'a.png'}: how its colours are to be shown, {said}"] if said else []
    assert len(caplog.messages) == len(remarks)
    for message, remark in zip(caplog.messages, remarks, strict=True):
        assert message.startswith(remark)
        assert message.endswith("is not kept; they will be taken for sRGB")


def png_16(channels):
    """A 5x4 PNG of 16 bits a channel, which Pillow cannot write in colour."""
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">LLBBBBB", 5, 4, 16, colour_type, 0, 0, 0)
    rows = (b"\0" + b"\x12\x34" * 5 * channels) * 4
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_refuses_16_bit_png(tmp_path, channels):
    (tmp_path / "a.png").write_bytes(png_16(channels))
    with Image.open(tmp_path / "a.png") as image:
        image.load()  # the file is sound
    assert "16 bits" in refusal(tmp_path / "a.png")


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_refuses_16_bit_tiff(tmp_path, compression):
    pixels = np.arange(20, dtype=np.uint16).reshape(4, 5)
    Image.fromarray(pixels).save(tmp_path / "a.tif", compression=compression)
    assert "16" in refusal(tmp_path / "a.tif")


def tiff(array, separate=False, order="<", bits=None, **tags):
    """An uncompressed TIFF file of kinds that Pillow does not write.

    Args:
        array: (H, W, channels) of any type.
        separate: Whether each channel is stored in a plane of its own.
        order: Of bytes.
        bits: A channel, where the array holds pixels packed.
        tags: By name, in place of those that describe the array.
    """
    height, width, channels = array.shape
    stored = 8 * array.itemsize
    planes = [array[..., i] for i in range(channels)] if separate else [array]
    strips = [plane.astype(array.dtype.newbyteorder(order)).tobytes() for plane in planes]
    tags = dict(
        ImageWidth=width * stored // (bits or stored), ImageLength=height, BitsPerSample=[bits or stored] * channels,
        Compression=1, PhotometricInterpretation=2 if channels > 1 else 1, SamplesPerPixel=channels,
        StripOffsets=[i * len(strips[0]) for i in range(len(strips))], StripByteCounts=[len(strips[0])] * len(strips),
        RowsPerStrip=height, PlanarConfiguration=2 if separate else 1,
        SampleFormat=[{"u": 1, "i": 2, "f": 3}[array.dtype.kind]] * channels,
    ) | tags  # fmt: skip
    head = {"<": b"II*\0\b\0\0\0", ">": b"MM\0*\0\0\0\b"}[order]
    directory = ImageFileDirectory_v2(head)
    for name, value in tags.items():
        directory[ExifTags.Base[name]] = value
    return head + directory.tobytes(len(head)) + b"".join(strips)  # offsets of strips are taken from its end


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("order", "<>")
def test_reads_planes_of_8_bits(separate, order):
    rgb = noise(6, 8, 3)
    np.testing.assert_array_equal(decode(tiff(rgb, separate, order)).rgb, rgb)


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("channels", "kind", "bits"),
    [
        (1, "u2", 16), (3, "u2", 16), (4, "u2", 16), (1, "i2", 16), (1, "u2", 12), (3, "u2", 12), (1, "u4", 32),
        (3, "u4", 32), (1, "f2", 16), (1, "f4", 32), (3, "f4", 32), (1, "f8", 64), (3, "i1", 8),
    ],
)  # fmt: skip
def test_refuses_tiff_of_other_numbers(separate, order, channels, kind, bits):
    content = tiff(np.ones((6, 24, channels), kind), separate, order, bits)
    with pytest.raises(InvalidImage, match=f": {bits} bits a channel|not a PNG"):  # or Pillow does not know it either
        decode(content)


@pytest.mark.parametrize("separate", [True, False])
def test_refuses_signed_numbers(separate):
    """-1 is no white."""
    with pytest.raises(InvalidImage, match="signed numbers"):
        decode(tiff(np.full((2, 3, 1), -1, np.int8), separate))


def reverse_bits(array):
    return np.packbits(np.unpackbits(array, bitorder="little").reshape(-1, 8)).reshape(array.shape)


@pytest.mark.parametrize(
    ("array", "expected", "tags"),
    [
        (255 - noise(6, 8, 1), noise(6, 8, 1), dict(PhotometricInterpretation=0)),
        (reverse_bits(noise(6, 8, 3)), noise(6, 8, 3), dict(FillOrder=2)),
        (noise(6, 4, 1), np.stack([noise(6, 4, 1) >> 4, noise(6, 4, 1) & 15], 2).reshape(6, 8, 1) * 17, dict(bits=4)),
    ],
)
def test_pixels_that_are_stored_otherwise(array, expected, tags):
    """What is right in one plane but would not be in several is refused there."""
    np.testing.assert_array_equal(decode(tiff(array, **tags)).rgb, np.broadcast_to(expected, (6, 8, 3)))
    followed = tiff(array, separate=True, **tags) + bytes(1000)  # so that nothing seems to be missing
    with pytest.raises(InvalidImage, match="separate planes"):
        decode(followed)


def test_reads_one_plane_of_one_bit():
    rows = np.array([[0b10110000], [0b01000001]], np.uint8)[..., None]
    expected = np.unpackbits(rows[..., 0], axis=1)[..., None].repeat(3, 2) * 255
    np.testing.assert_array_equal(decode(tiff(rows, separate=True, bits=1)).rgb, expected)


@pytest.mark.parametrize(("mode", "suffix"), [("CMYK", ".jpg"), ("CMYK", ".tif"), ("LAB", ".tif")])
def test_refuses_other_colours(tmp_path, mode, suffix):
    Image.new(mode, (5, 4)).save(tmp_path / f"a{suffix}")
    assert f"found {mode}; convert" in refusal(tmp_path / f"a{suffix}")


def test_reads_5_bit_bmp(tmp_path):
    """16 bits a pixel are not 16 bits a channel."""
    pixels = struct.pack("<2H", 0xF800, 0x001F)
    header = struct.pack("<2sLHHL", b"BM", 14 + 40 + 12 + len(pixels), 0, 0, 14 + 40 + 12)
    info = struct.pack("<LllHHLLllLL", 40, 2, 1, 1, 16, 3, len(pixels), 0, 0, 0, 0)
    (tmp_path / "a.bmp").write_bytes(header + info + struct.pack("<3L", 0xF800, 0x07E0, 0x001F) + pixels)
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.bmp"), [[[255, 0, 0], [0, 0, 255]]])


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_refuses_several_frames(tmp_path, suffix):
    frames = [Image.fromarray(noise(4, 4, 3, seed=seed)) for seed in range(2)]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
    assert "animation" in refusal(tmp_path / f"a{suffix}")


def test_first_image_of_a_stereo_jpeg(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[1:])
    photo = load(tmp_path / "a.jpg")
    assert photo.lossy
    assert photo.rgb[4, 4, 0] > 200 > photo.rgb[4, 4, 2]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_files_are_refused(tmp_path, suffix):
    photo = Photo(noise(40, 50, 3), exif=make_exif(), icc_profile=ICC)
    photo.save(tmp_path / f"whole{suffix}")
    content = (tmp_path / f"whole{suffix}").read_bytes()
    path = tmp_path / f"cut{suffix}"
    for length in (0, 1, 10, 30, len(content) // 3, len(content) // 2, len(content) * 3 // 4):
        path.write_bytes(content[:length])
        refusal(path)


@pytest.mark.parametrize(
    "options", [{}, dict(progressive=True), dict(restart_marker_blocks=2), dict(quality=100, subsampling=0)]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_that_lacks_only_its_end_marker(tmp_path, caplog, options, mode):
    whole, cut = tmp_path / "whole.jpg", tmp_path / "cut.jpg"
    for seed in range(3):
        Image.fromarray(noise(40, 48, 3, seed=seed)).convert(mode).save(whole, exif=make_exif(6), **options)
        expected = load(whole)
        for missing in (1, 2):
            caplog.clear()
            cut.write_bytes(whole.read_bytes()[:-missing])
            photo = load(cut)
            np.testing.assert_array_equal(photo.rgb, expected.rgb)
            assert (photo.lossy, photo.grey, photo.exif) == (True, mode == "L", expected.exif)
            assert caplog.messages == [f"{cut}: is complete but for the end marker of a JPEG file, and restored"]
        for missing in range(6, 12):  # the last byte of a scan can be padding, and be written as two
            cut.write_bytes(whole.read_bytes()[:-missing])
            assert "truncated" in refusal(cut)


DECODE_CUT = """
import sys
from runtime import timing
from runtime.images import decode
content = open(sys.argv[1], "rb").read()
decode(content)
whole = timing.peak_mib()
assert decode(content[:-2]).rgb.shape == (3000, 3000, 3)
print(timing.peak_mib() - whole)
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="peak memory is read in /proc")
def test_a_jpeg_without_its_end_takes_hardly_more_memory(tmp_path):
    Image.new("RGB", (3000, 3000), "teal").save(tmp_path / "a.jpg")  # 34 MiB in Pillow
    command = [sys.executable, "-c", DECODE_CUT, tmp_path / "a.jpg"]
    grown = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 3 * 34, f"{grown} MiB more"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_files_are_refused_or_read(tmp_path, suffix):
    """Whatever happens to a file, there is an image or an InputError."""
    photo = Photo(noise(10, 12, 3), exif=make_exif(), icc_profile=ICC)
    photo.save(tmp_path / f"whole{suffix}")
    content = np.frombuffer((tmp_path / f"whole{suffix}").read_bytes(), np.uint8)
    path = tmp_path / f"damaged{suffix}"
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        damaged = content.copy()
        damaged[rng.integers(0, min(300, len(content)), 6)] = rng.integers(0, 256, 6)
        path.write_bytes(damaged.tobytes())
        try:
            assert load(path).rgb.dtype == np.uint8
        except InputError:
            refused += 1
    assert refused


@pytest.mark.parametrize("content", [b"", b"not an image at all\n" * 20, b"P6 1 1 255 rgb"])  # the last one is a PPM
def test_refuses_other_files(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    assert "not a PNG" in refusal(tmp_path / "a.png")


def test_refuses_a_missing_file(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.png")
    refusal(tmp_path)


def test_content_counts_and_not_the_name(tmp_path):
    rgb = noise(4, 4, 3)
    Image.fromarray(rgb).save(tmp_path / "a.jpg", "PNG")
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.jpg"), rgb)


@pytest.mark.parametrize("limit", [100, 150])  # Pillow warns above the limit and raises above its double
def test_refuses_decompression_bombs(tmp_path, monkeypatch, limit):
    Photo(noise(15, 17, 3)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert f"more than {limit} pixels" in refusal(tmp_path / "a.png")


def test_refuses_an_unknown_suffix(tmp_path):
    for name in ("a.gif", "a", "png"):
        with pytest.raises(InputError, match=r"ending in \.png"):
            Photo(noise(2, 2, 3)).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_says_what_a_format_cannot_hold(tmp_path):
    wide = Photo(np.zeros((1, 16384, 3), np.uint8))  # one pixel more than WebP has
    with pytest.raises(InputError, match=r"a\.webp cannot be written.* at most 16383 pixels"):
        wide.check(tmp_path / "a.webp")
    with pytest.raises(InputError, match=r"a\.jpg cannot be written"):
        replace(wide, exif=b"Exif\0\0" + b"\0" * 70000).save(tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())


def test_disk_errors_keep_their_kind(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        Photo(noise(2, 2, 3)).save(tmp_path / "file" / "a.png")


def test_list_images(tmp_path):
    for name in ("b.png", "a.JPG", "c.tiff", "d.jfif", "e.JPE", ".hidden.png", "notes.txt", "noext"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.JPG", "b.png", "c.tiff", "d.jfif", "e.JPE"]
    (tmp_path / "f.png").symlink_to(tmp_path / "unmounted" / "f.png")
    assert list_images(tmp_path)[-1].name == "f.png"  # not passed over: reading it says what is wrong
    with pytest.raises(InvalidImage, match=r"f\.png: No such file"):
        load(tmp_path / "f.png")
    with pytest.raises(InputError, match="none at"):
        list_images(tmp_path / "none")


# Without files.


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif"])
def test_bytes_are_read_and_written_as_files_are(tmp_path, suffix):
    photo = Photo(smooth(), dpi=(300.0, 300.0))
    photo.save(tmp_path / f"a{suffix}")
    content = (tmp_path / f"a{suffix}").read_bytes()
    assert photo.encode(suffix) == photo.encode(suffix[1:]) == content
    read, decoded = load(tmp_path / f"a{suffix}"), decode(content)
    np.testing.assert_array_equal(read.rgb, decoded.rgb)
    assert (read.lossy, read.exif, read.icc_profile, read.dpi) == (
        decoded.lossy,
        decoded.exif,
        decoded.icc_profile,
        decoded.dpi,
    )


def test_bytes_have_the_guards_of_files(tmp_path, monkeypatch):
    content = Photo(smooth()).encode("png")
    for broken in (b"", b"<html>", content[:20], content[:-30]):
        with pytest.raises(InvalidImage, match="upload 7: "):
            decode(broken, "upload 7")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(InvalidImage, match="image: more than 10 pixels"):
        decode(content)
    with pytest.raises(InputError, match=r"ending in \.png"):
        Photo(smooth()).encode("gif")
    with pytest.raises(InputError, match="cannot hold the transparency"):
        Photo(smooth(), alpha=np.zeros(smooth().shape[:2], np.uint8)).encode("jpg")


def test_a_jpeg_without_its_end_is_complete_in_bytes_too(caplog):
    content = Photo(smooth()).encode("jpg")
    np.testing.assert_array_equal(decode(content[:-2], "cut").rgb, decode(content).rgb)
    assert "cut: is complete but for the end marker" in caplog.text
