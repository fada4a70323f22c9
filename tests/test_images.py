"""Image files: what is read, what is kept, what is refused."""

import io
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms
from PIL.JpegImagePlugin import JpegImageFile

from runtime import InputError, InvalidImage, OutOfMemory
from runtime.images import FORMATS, SUFFIXES, Photo, decode, list_images, load, read_rgb

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
        assert load(tmp_path / "a.jpg").rgb.shape == smooth().shape, i
        load(tmp_path / "a.jpg").save(tmp_path / "b.jpg")


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


@pytest.mark.parametrize(("mode", "suffix"), [("CMYK", ".jpg"), ("CMYK", ".tif"), ("F", ".tif"), ("LAB", ".tif")])
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
