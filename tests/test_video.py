"""Videos: what is kept, what is refused, and what is left when something goes wrong.

The networks here are functions, and the videos are some frames of 48x32 pixels.
"""

import contextlib
import itertools
import math
import re
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.error import InvalidDataError
from av.video.reformatter import VideoReformatter

from runtime import Derainer, InputError, InvalidImage, hlg, video
from runtime.errors import InvalidModel
from runtime.video import frames as read_frames
from runtime.video import restore
from tests.support.commands import command
from tests.support.onnx_files import write_network

ROOT = Path(__file__).parents[1]
HEIGHT, WIDTH = 32, 48
LIMITED, FULL = 1, 2
COEFFICIENTS = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}
"""K_R and K_B of the colour matrices, by their codes in ITU-T H.273."""


def same(image):
    return image


def half(image):
    return image // 2


def quadrants(height=HEIGHT, width=WIDTH):
    """Grey of another level in each quarter: 40, 80 above and 120, 160 below."""
    y, x = np.mgrid[:height, :width]
    grey = 40 + 40 * (x >= width // 2) + 80 * (y >= height // 2)
    return np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)


def write(
    path,
    images=(),
    times=None,
    base=Fraction(1, 25),
    rate=25,
    codec="libx264",
    pixels="yuv420p",
    colours=None,
    rotation=None,
    mirrored=False,
    aspect=None,
    sound=False,
    options=None,
    title=None,
):
    """Images, or frames ready to encode, into a file; sound is 100 ms of a sine for each frame."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=rate, options=options or {})
        images = images or [quadrants()] * 6
        first = images[0]
        height, width = (first.height, first.width) if isinstance(first, av.VideoFrame) else first.shape[:2]
        context = stream.codec_context
        context.width, context.height, context.pix_fmt, context.time_base = width, height, pixels, base
        if colours:
            context.colorspace, context.color_range, context.color_primaries, context.color_trc = colours
        if aspect:
            context.sample_aspect_ratio = aspect
        if rotation is not None:
            stream.set_display_rotation(rotation, hflip=mirrored)
        if title:
            output.metadata["title"] = title
        if sound:
            audio = output.add_stream("aac", rate=16000, layout="mono")
            audio.metadata["language"] = "fra"
        for time_, image in zip(times or range(len(images)), images, strict=True):
            frame = image if isinstance(image, av.VideoFrame) else av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts, frame.time_base = time_, base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        if sound:
            wave = np.sin(np.arange(1600 * len(images)) / 6).astype(np.float32)[None]
            for start in range(0, wave.shape[1], 1024):
                frame = av.AudioFrame.from_ndarray(wave[:, start : start + 1024].copy(), "fltp", "mono")
                frame.sample_rate, frame.pts = 16000, start + round(16000 * (times or [0])[0] * base)
                output.mux(audio.encode(frame))
            output.mux(audio.encode(None))
    return path


def frames(path):
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def packets(path, kind):
    """The packets of one kind of stream: time in seconds, and content."""
    with av.open(str(path)) as container:
        stream = getattr(container.streams, kind)[0]
        return [(packet.pts * packet.time_base, bytes(packet)) for packet in container.demux(stream) if packet.size]


def planes(frame):
    """The planes of a frame of 8 bits, without the padding of their rows."""
    return [
        np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
        for plane in frame.planes
    ]


def edit(source, target, parts):
    """`source`, an MP4, with lists of edits that show these parts of it, each from its start to its end in seconds."""
    with av.open(str(source)) as container:
        bases = [stream.time_base for stream in container.streams]  # in the order of the lists

    def edited(boxes):
        result = b""
        while boxes:
            (size,), kind = struct.unpack(">I", boxes[:4]), boxes[4:8]
            content, boxes = boxes[8:size], boxes[size:]
            if kind in (b"moov", b"trak", b"edts"):
                content = edited(content)
            elif kind == b"elst":  # of version 0, with one edit: its length, where it starts, its rate
                first, base = struct.unpack(">i", content[12:16])[0], bases.pop(0)
                edits = [(round(1000 * (end - start)), first + round(start / base), 1 << 16) for start, end in parts]
                content = struct.pack(">II", 0, len(parts)) + b"".join(struct.pack(">IiI", *each) for each in edits)
            result += struct.pack(">I", 8 + len(content)) + kind + content
        return result

    target.write_bytes(edited(source.read_bytes()))
    return target


def refusal(source, target, function=same, **options):
    before = set(target.parent.iterdir())
    with pytest.raises(InputError) as error:
        restore(function, source, target, **options)
    assert "\n" not in str(error.value)
    assert set(target.parent.iterdir()) == before  # nothing half-written
    return str(error.value)


@pytest.mark.parametrize("source", ["mp4", "mov", "mkv", "avi", "ts"])
@pytest.mark.parametrize("target", ["mp4", "m4v", "MOV", "mkv"])
def test_every_frame_is_restored(tmp_path, source, target):
    target = tmp_path / "new" / f"b.{target}"
    images = [np.full((HEIGHT, WIDTH, 3), 40 + 10 * i, np.uint8) for i in range(12)]
    result = restore(half, write(tmp_path / f"a.{source}", images), target)
    assert (result.frames, result.failures) == (12, [])
    for i, frame in enumerate(frames(target)):
        assert np.abs(frame.to_ndarray(format="rgb24").astype(int) - (20 + 5 * i)).max() <= 2
    assert [path.name for path in target.parent.iterdir()] == [target.name]


@pytest.mark.parametrize(("batch", "runs"), [(None, [8, 4]), (5, [5, 5, 2]), (1, [1] * 12)])
def test_frames_are_restored_together(tmp_path, monkeypatch, batch, runs):
    """As one by one, with sound between them."""
    network = write_network(tmp_path / "half.onnx", shape=("B", 3, "H", "W"))
    images = [np.full((HEIGHT, WIDTH, 3), 40 + 10 * i, np.uint8) for i in range(12)]
    source = write(tmp_path / "a.mp4", images, sound=True)
    derain, found = Derainer(network, "cpu", batch=batch), []
    run = derain.session.run
    monkeypatch.setattr(derain.session, "run", lambda batch: found.append(len(batch)) or run(batch))
    result = restore(derain, source, tmp_path / "together.mp4")
    assert (result.frames, found) == (12, runs)
    restore(Derainer(network, "cpu").__call__, source, tmp_path / "alone.mp4")
    together, alone = (frames(tmp_path / f"{name}.mp4") for name in ("together", "alone"))
    assert [frame.pts for frame in together] == [frame.pts for frame in alone]
    for a, b in zip(together, alone, strict=True):  # x264 does not always give the same bytes for the same frames
        assert np.abs(a.to_ndarray(format="rgb24").astype(int) - b.to_ndarray(format="rgb24")).max() <= 2
    assert packets(tmp_path / "together.mp4", "audio") == packets(tmp_path / "alone.mp4", "audio")


def test_a_batch_that_fails_names_the_video(tmp_path):
    network = write_network(tmp_path / "nan.onnx", math.nan, shape=("B", 3, "H", "W"))
    with pytest.raises(InvalidModel, match=r"a\.mp4: the network answered with NaN"):
        restore(Derainer(network, "cpu"), write(tmp_path / "a.mp4"), tmp_path / "b.mp4")
    assert not (tmp_path / "b.mp4").exists()


def test_frames_are_those_that_the_network_is_shown(tmp_path):
    source = write(tmp_path / "a.mp4", [np.full((HEIGHT, WIDTH, 3), 40 + 10 * i, np.uint8) for i in range(12)])
    shown: list[np.ndarray] = []

    def note(image):
        shown.append(image)
        return image

    restore(note, source, tmp_path / "b.mp4")
    found = list(read_frames(source))
    assert len(found) == 12
    for frame, expected in zip(found, shown, strict=True):
        np.testing.assert_array_equal(frame, expected)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("rate", [Fraction(25), Fraction(30000, 1001), Fraction(60)])
def test_the_frame_rate_is_kept(tmp_path, suffix, rate):
    source = write(tmp_path / f"a.{suffix}", rate=rate, base=1 / rate)
    restore(same, source, tmp_path / f"b.{suffix}")
    before, after = frames(source), frames(tmp_path / f"b.{suffix}")
    assert [frame.time for frame in before] == [frame.time for frame in after]
    with av.open(str(source)) as a, av.open(str(tmp_path / f"b.{suffix}")) as b:
        assert abs(a.streams.video[0].average_rate - b.streams.video[0].average_rate) < 0.01
        assert abs(a.duration - b.duration) <= 1000


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_variable_frame_rate_is_kept(tmp_path, suffix):
    times = [0, 40, 41, 500, 1200, 1233, 9000, 9040]
    source = write(tmp_path / f"a.{suffix}", [quadrants()] * 8, times, base=Fraction(1, 1000))
    restore(same, source, tmp_path / f"b.{suffix}")
    assert [round(frame.time * 1000) for frame in frames(tmp_path / f"b.{suffix}")] == times


@pytest.mark.parametrize(("source", "target"), itertools.product(["mp4", "mkv"], repeat=2))
def test_the_last_frame_is_shown_as_long(tmp_path, source, target):
    """Where the rate varies, also of what was written here, whose frames are not stored in the order of their times."""
    times, end, base = [0, 40, 80, 2000, 2040], 7040, Fraction(1, 1000)
    with av.open(str(tmp_path / f"a.{source}"), "w") as output:
        stream = output.add_stream("libx264", rate=25, width=WIDTH, height=HEIGHT, options={"bf": "0"})
        stream.codec_context.time_base = base
        stream.codec_context.flags |= av.codec.context.Flags.frame_duration
        for time_, next_ in itertools.pairwise([*times, end]):
            frame = av.VideoFrame.from_ndarray(quadrants(), "rgb24")
            frame.pts, frame.duration, frame.time_base = time_, next_ - time_, base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    restore(same, tmp_path / f"a.{source}", tmp_path / f"b.{target}")
    restore(same, tmp_path / f"b.{target}", tmp_path / f"c.{target}")
    for path in (tmp_path / f"b.{target}", tmp_path / f"c.{target}"):
        assert [round(frame.time * 1000) for frame in frames(path)] == times
        with av.open(str(path)) as container:
            assert container.duration == 1000 * end
            if target == "mp4":
                assert container.streams.video[0].duration * container.streams.video[0].time_base == end * base
        if target == "mkv":
            shown = [round(frame.duration * frame.time_base * 1000) for frame in frames(path)]
            assert shown == [40, 40, 1920, 40, 5000]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_constant_frame_rate_has_one_duration(tmp_path, suffix):
    """Although the milliseconds between the frames of the source vary."""
    rate = Fraction(60)
    source = write(tmp_path / "a.mkv", [quadrants()] * 30, rate=rate, base=1 / rate)
    restore(same, source, tmp_path / f"b.{suffix}")
    with av.open(str(tmp_path / f"b.{suffix}")) as container:
        assert abs(container.duration - 500_000) < 500
        stream = container.streams.video[0]
        shown = [packet.duration * stream.time_base for packet in container.demux(stream) if packet.size]
    assert max(abs(duration - 1 / rate) for duration in shown) < 0.001


def test_a_late_start_becomes_zero_and_sound_stays_in_step(tmp_path):
    source = write(tmp_path / "a.ts", [quadrants()] * 10, [100 + i for i in range(10)], sound=True)
    restore(same, source, tmp_path / "b.mp4")
    with av.open(str(source)) as container:
        assert container.start_time > 3_000_000
    apart = [frames(path)[0].time - float(packets(path, "audio")[0][0]) for path in (source, tmp_path / "b.mp4")]
    assert abs(apart[0] - apart[1]) < 0.001
    with av.open(str(tmp_path / "b.mp4")) as container:
        assert container.start_time == 0


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "ts", "flv", "wmv"])
def test_the_length_of_a_late_start(tmp_path, suffix):
    """Some formats give the end instead."""
    codec = "mpeg4" if suffix == "wmv" else "libx264"
    images = list(np.random.default_rng(0).integers(0, 256, (50, HEIGHT, WIDTH, 3), np.uint8))
    source = write(tmp_path / f"a.{suffix}", images, range(250, 300), codec=codec, options={"bf": "0"})
    with av.open(str(source)) as container:
        assert container.start_time >= 10_000_000
    totals = []
    result = restore(
        same, source, tmp_path / "b.mp4", on_progress=lambda what, done, total, rate="": totals.append(total)
    )
    assert (result.frames, result.failures) == (50, [])
    assert set(totals) == {50}
    if suffix == "mkv":
        source.write_bytes(source.read_bytes()[: source.stat().st_size * 6 // 10])
        result = restore(same, source, tmp_path / "b.mp4")
        assert re.fullmatch(r".*breaks off after 1\.\d of 2\.0 s", result.failures[0])


def test_chapters_of_a_late_start_move_with_the_frames(tmp_path):
    chapters = [(9_000, 10_500, "Drizzle"), (10_500, 12_000, "Rain")]
    with av.open(str(tmp_path / "a.mkv"), "w") as output:
        stream = output.add_stream("libx264", rate=25, width=WIDTH, height=HEIGHT, options={"bf": "0"})
        output.set_chapters(
            [
                dict(id=i, start=start, end=end, time_base=Fraction(1, 1000), metadata={"title": title})
                for i, (start, end, title) in enumerate(chapters, 1)
            ]
        )
        for i in range(50):
            frame = av.VideoFrame.from_ndarray(quadrants(), "rgb24")
            frame.pts, frame.time_base = 250 + i, Fraction(1, 25)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    for suffix in ("mkv", "mp4"):
        restore(same, tmp_path / "a.mkv", tmp_path / f"b.{suffix}")
        with av.open(str(tmp_path / f"b.{suffix}")) as container:
            found = container.chapters()
        moved = [[chapter[key] * chapter["time_base"] for key in ("start", "end")] for chapter in found]
        assert moved == [[0, Fraction(1, 2)], [Fraction(1, 2), 2]]
        assert [chapter["metadata"]["title"] for chapter in found] == ["Drizzle", "Rain"]


@pytest.mark.parametrize(("codec", "name"), [("libx264", "a.mp4"), ("ffv1", "a.mkv")])
@pytest.mark.parametrize("matrix", [1, 5, 6, 7, 9])
@pytest.mark.parametrize("full", [LIMITED, FULL])
def test_colours_are_converted_by_their_own_matrix_and_range(tmp_path, matrix, full, codec, name):
    """Against the definition of the matrix, and back to the same values."""
    kr, kb = COEFFICIENTS[matrix]
    colours = [(30, 30, 30), (200, 60, 90), (60, 180, 40), (50, 70, 220), (250, 240, 120)]
    sent = []
    for r, g, b in np.array(colours) / 255:
        y = kr * r + (1 - kr - kb) * g + kb * b
        cb, cr = (b - y) / (2 * (1 - kb)), (r - y) / (2 * (1 - kr))
        black, luma, chroma = (0, 255, 255) if full == FULL else (16, 219, 224)
        levels = black + luma * y, 128 + chroma * cb, 128 + chroma * cr
        frame = av.VideoFrame(WIDTH, HEIGHT, "yuv420p")
        for plane, level in zip(frame.planes, levels, strict=True):
            plane.update(bytes([round(level)]) * plane.buffer_size)
        sent.append((frame, np.round(levels)))
    images, options = [frame for frame, _ in sent], {"qp": "0"} if codec == "libx264" else {}
    source = write(tmp_path / name, images, codec=codec, colours=(matrix, full, 9, 6), options=options)
    seen = []
    restore(lambda image: seen.append(image) or image, source, tmp_path / "b.mp4", crf=0)
    for colour, image in zip(colours, seen, strict=True):
        worst = np.abs(image.astype(int) - colour).max()
        assert worst <= 2, f"{colour}: seen {worst} levels off"  # 3 bytes of limited range do not hold every colour
    for (_, levels), frame in zip(sent, frames(tmp_path / "b.mp4"), strict=True):
        assert (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc) == (matrix, full, 9, 6)
        for plane, level in zip(planes(frame), levels, strict=True):
            assert np.abs(plane.astype(int) - level).max() <= 1


@pytest.mark.parametrize(("width", "matrix"), [(WIDTH, 5), (1280, 1)])
def test_without_a_matrix_it_is_the_one_that_players_take(tmp_path, width, matrix):
    rgb = np.full((HEIGHT, width, 3), (200, 60, 90), np.uint8)
    frame = VideoReformatter().reformat(
        av.VideoFrame.from_ndarray(rgb, "rgb24"),
        format="yuv420p",
        dst_colorspace=matrix,
        src_color_range=FULL,
        dst_color_range=LIMITED,
    )
    seen = []
    source = write(tmp_path / "a.mp4", [frame], options={"qp": "0"})
    assert frames(source)[0].colorspace == 2  # unspecified
    restore(lambda image: seen.append(image) or image, source, tmp_path / "b.mp4")
    assert np.abs(seen[0].astype(int) - (200, 60, 90)).max() <= 3
    assert frames(tmp_path / "b.mp4")[0].colorspace == 2


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rotation_is_kept_and_the_network_sees_frames_upright(tmp_path, rotation, mirrored, suffix):
    source = write(tmp_path / f"a.{suffix}", [quadrants()], rotation=rotation, mirrored=mirrored)
    upright = np.rot90(quadrants(), frames(source)[0].rotation // 90)  # counter-clockwise
    seen = []

    def mark(image):
        seen.append(image)
        image = image.copy()
        image[:8, :8] = 250  # above on the left, as it is looked at
        return image

    restore(mark, source, tmp_path / f"b.{suffix}")
    matrices = [
        bytes(frames(path)[0].side_data["DISPLAYMATRIX"]) if rotation or mirrored else b""
        for path in (source, tmp_path / f"b.{suffix}")
    ]
    assert matrices[0] == matrices[1]
    if mirrored:  # FFmpeg's angle leaves the mirroring out
        upright = {0: quadrants()[:, ::-1], 180: quadrants()[::-1]}.get(rotation)
    if upright is not None:
        assert np.abs(seen[0].astype(int) - upright).max() <= 6
    restore(lambda image: seen.append(image) or image, tmp_path / f"b.{suffix}", tmp_path / "c.mkv")
    assert seen[1][:8, :8].min() > 240
    assert (seen[1] > 240).sum() == 8 * 8 * 3


@pytest.mark.parametrize(("source", "target"), itertools.product(["mp4", "mkv"], repeat=2))
def test_sound_is_copied(tmp_path, source, target):
    write(tmp_path / f"a.{source}", sound=True)
    restore(same, tmp_path / f"a.{source}", tmp_path / f"b.{target}")
    before, after = packets(tmp_path / f"a.{source}", "audio"), packets(tmp_path / f"b.{target}", "audio")
    assert [content for _, content in before] == [content for _, content in after]
    shifts = {round(float(a[0] - b[0]), 2) for a, b in zip(before, after, strict=True)}
    assert len(shifts) == 1
    assert max(map(abs, shifts)) < 0.07  # 1,024 samples of AAC's run-up, where Matroska has no times below 0
    with av.open(str(tmp_path / f"b.{target}")) as container:
        assert container.streams.audio[0].language == "fra"


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize(
    "parts", [[(1, 2)], [(0, 0.5), (1.5, 2)], [(0.5, 1), (1.5, 2)]], ids=["start", "middle", "both"]
)
def test_sound_that_is_edited_out_stays_out(tmp_path, parts, suffix):
    """Matroska has no edits: there one packet of 64 ms, by which the next is decoded, comes before the pictures."""
    images = [np.full((HEIGHT, WIDTH, 3), 10 * i, np.uint8) for i in range(20)]
    whole = write(
        tmp_path / "whole.mp4", images, rate=10, base=Fraction(1, 10), sound=True, options={"g": "5", "bf": "0"}
    )
    source, target = edit(whole, tmp_path / "a.mp4", parts), tmp_path / f"b.{suffix}"
    totals = set()
    result = restore(same, source, target, on_progress=lambda what, done, total, rate="": totals.add(total))
    assert (result.frames, result.failures, totals) == (10, [], {10})

    def heard(path):
        """The packets that are, and their times after the first frame."""
        with av.open(str(path)) as container:
            kept = [packet for packet in container.demux(audio=0) if packet.size and not packet.is_discard]
            times = [float(packet.pts * packet.time_base) - frames(path)[0].time for packet in kept]
            return [bytes(packet) for packet in kept], times

    (before, times_before), (after, times_after) = heard(source), heard(target)
    if suffix == "mkv":
        assert 0 < frames(target)[0].time < 0.128
        after, times_after = after[1:], times_after[1:]
    else:
        assert frames(target)[0].time == 0
        with av.open(str(source)) as a, av.open(str(target)) as b:
            assert a.start_time == b.start_time
            assert abs(a.duration - b.duration) < 64_000  # the last packet is whole
    assert after == before
    np.testing.assert_allclose(times_after, times_before, atol=0.002)


def test_pixel_shape_titles_and_chapters_are_kept(tmp_path):
    source = write(tmp_path / "a.mkv", aspect=Fraction(4, 3), title="Rain")
    with av.open(str(source)) as a, av.open(str(tmp_path / "b.mkv"), "w") as b:
        copies = {stream.index: b.add_stream_from_template(stream, opaque=True) for stream in a.streams}
        b.metadata["title"] = a.metadata["title"]
        b.set_chapters([dict(id=1, start=0, end=100, time_base=Fraction(1, 1000), metadata={"title": "Drizzle"})])
        for packet in a.demux():
            if packet.size:
                packet.stream = copies[packet.stream.index]
                b.mux(packet)
    restore(same, tmp_path / "b.mkv", tmp_path / "c.mp4")
    with av.open(str(tmp_path / "c.mp4")) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(4, 3)
        assert container.metadata["title"] == "Rain"
        assert [chapter["metadata"]["title"] for chapter in container.chapters()] == ["Drizzle"]


@pytest.mark.parametrize(
    ("pixels", "codec", "size", "expected"),
    [
        ("yuv420p", "libx264", (32, 48), "yuv420p"),
        ("yuvj420p", "mjpeg", (32, 48), "yuv420p"),
        ("yuv422p", "libx264", (32, 48), "yuv422p"),
        ("yuv444p", "libx264", (32, 48), "yuv444p"),
        ("yuv420p", "ffv1", (31, 47), "yuv444p"),
        ("yuv422p", "ffv1", (31, 48), "yuv422p"),
        ("gray", "ffv1", (32, 48), "yuv420p"),
        ("bgr0", "ffv1", (32, 48), "yuv444p"),
        ("yuv411p", "ffv1", (32, 48), "yuv444p"),
        ("yuv420p10le", "libx264", (32, 48), "yuv420p"),
        ("yuva420p", "ffv1", (32, 48), "yuv420p"),
    ],
)
def test_size_and_subsampling_are_kept(tmp_path, caplog, pixels, codec, size, expected):
    source = write(tmp_path / "a.mkv", [quadrants(*size)] * 2, pixels=pixels, codec=codec)
    seen = []
    restore(lambda image: seen.append(image) or image, source, tmp_path / "b.mp4")
    assert np.abs(seen[0].astype(int) - quadrants(*size)).mean() < 3
    for frame in frames(tmp_path / "b.mp4"):
        assert (frame.height, frame.width) == size
        assert frame.format.name.replace("yuvj", "yuv") == expected
        assert np.abs(frame.to_ndarray(format="rgb24").astype(int) - quadrants(*size)).mean() < 3
    remarks = caplog.messages
    word = {"yuv420p10le": "10 bits a channel become 8", "yuva420p": "transparency is dropped"}.get(pixels)
    word = "of an odd size" if size == (31, 47) else word
    assert len(remarks) == (word is not None), remarks
    assert not remarks or (remarks[0].startswith(f"{source}: ") and word in remarks[0])


@pytest.mark.parametrize("transfer", [16, 18])
def test_hdr_is_refused(tmp_path, transfer):
    source = write(tmp_path / "a.mp4", pixels="yuv420p10le", colours=(9, LIMITED, 9, transfer))
    assert "HDR" in refusal(source, tmp_path / "b.mp4")
    if transfer == 16:
        assert "HDR (PQ)" in refusal(source, tmp_path / "b.mp4", tone_map=True)
    else:
        assert "--tone-map does that" in refusal(source, tmp_path / "b.mp4")


@pytest.mark.parametrize(("bits", "codec"), [(8, "libx264"), (10, "libx265"), (10, "ffv1")])
def test_hlg_is_mapped_to_sdr_on_request(tmp_path, caplog, bits, codec):
    """Levels of grey and a colour, by the definition of YUV; what they become is for tests/test_hlg.py."""
    kr, kb = COEFFICIENTS[9]
    signals = [(0.0, 0.0, 0.0), (0.38, 0.38, 0.38), (0.75, 0.75, 0.75), (1.0, 1.0, 1.0), (0.6, 0.4, 0.3)]
    sent = []
    for r, g, b in signals:
        y = kr * r + (1 - kr - kb) * g + kb * b
        cb, cr = (b - y) / (2 * (1 - kb)), (r - y) / (2 * (1 - kr))
        scale = 2 ** (bits - 8)
        frame = av.VideoFrame(WIDTH, HEIGHT, "yuv420p" if bits == 8 else "yuv420p10le")
        for plane, level in zip(frame.planes, (16 + 219 * y, 128 + 224 * cb, 128 + 224 * cr), strict=True):
            value = round(scale * level).to_bytes(scale // 4 + 1, "little")
            plane.update(value * (plane.buffer_size // len(value)))
        sent.append(frame)
    options = {"x265-params": "lossless=1:log-level=none"} if codec == "libx265" else {}
    source = write(
        tmp_path / "a.mkv", sent, codec=codec, pixels=sent[0].format.name, colours=(9, LIMITED, 9, 18), options=options
    )
    seen = []
    result = restore(lambda image: seen.append(image) or image, source, tmp_path / "b.mp4", crf=0, tone_map=True)
    assert (result.frames, result.failures) == (len(signals), [])
    assert caplog.messages == [f"{source}: its tones are mapped from HLG to SDR, and its colours to BT.709"]
    for levels, image, frame in zip(signals, seen, frames(tmp_path / "b.mp4"), strict=True):
        expected = hlg.to_sdr(np.round(np.array([[levels]]) * 65535).astype(np.uint16))
        assert np.abs(image.astype(int) - expected).max() <= (2 if bits == 10 else 5)
        assert (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc) == (1, LIMITED, 1, 1)
        assert np.abs(frame.to_ndarray(format="rgb24").astype(int) - image).max() <= 3


def test_other_videos_are_not_tone_mapped(tmp_path):
    """By what the network is given: x264 does not always write the same for the same frames."""
    source = write(tmp_path / "a.mp4", colours=(1, LIMITED, 1, 1))
    seen: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for tone_map, images in seen.items():
        restore(
            lambda image, images=images: images.append(image) or image, source, tmp_path / "b.mp4", tone_map=tone_map
        )
        assert len(images) == len(frames(source))
    np.testing.assert_array_equal(seen[True], seen[False])


def test_transparency_that_the_decoder_leaves_out_is_said(tmp_path, caplog):
    """VP9 keeps it beside the pictures, where FFmpeg's decoder does not look."""
    source = write(tmp_path / "a.webm", codec="libvpx-vp9", pixels="yuva420p")
    assert not any(component.is_alpha for component in frames(source)[0].format.components)
    restore(same, source, tmp_path / "b.mp4")
    assert caplog.messages == [f"{source}: transparency is dropped"]


@pytest.mark.parametrize("name", ["clean.webm", "clean.avi", "clean.MTS"])
def test_the_output_is_blamed_for_its_suffix_and_not_a_sound_video(tmp_path, monkeypatch, capsys, name):
    network = write_network(tmp_path / "half.onnx")
    for source in (write(tmp_path / "a.webm", codec="libvpx-vp9"), write(tmp_path / "b.mp4")):
        assert command(monkeypatch, source, tmp_path / name, "--model", network) == 2
        wanted = f"error: expected a video file ending in .mp4, .m4v, .mov, .mkv to write, found {tmp_path / name}\n"
        assert capsys.readouterr().err == wanted


def test_frames_of_another_size_are_scaled_to_the_first(tmp_path):
    first, second = (write(tmp_path / f"{i}.ts", [quadrants(32 * i, 48 * i)] * 5) for i in (1, 2))
    (tmp_path / "a.ts").write_bytes(first.read_bytes() + second.read_bytes())
    result = restore(same, tmp_path / "a.ts", tmp_path / "b.mp4")
    assert result.frames == len(frames(tmp_path / "b.mp4")) > 5
    assert {(frame.height, frame.width) for frame in frames(tmp_path / "b.mp4")} == {(32, 48)}


def add_subtitles(source, target, codec):
    with av.open(str(source)) as a, av.open(str(target), "w") as b:
        video = b.add_stream_from_template(a.streams.video[0], opaque=True)
        text = b.add_mux_stream(codec)
        text.time_base = Fraction(1, 1000)
        for packet in a.demux(video=0):
            if packet.size:
                packet.stream = video
                b.mux(packet)
        packet = av.Packet(b"It rains." if codec == "subrip" else b"\0\x09It rains.")
        packet.pts = packet.dts = 0
        packet.duration, packet.time_base, packet.stream = 100, Fraction(1, 1000), text
        b.mux(packet)
    return target


@pytest.mark.parametrize(
    ("name", "codec", "target", "kept"),
    [
        ("a.mp4", "mov_text", "b.mp4", True),
        ("a.mkv", "subrip", "b.mkv", True),
        ("a.mkv", "subrip", "b.mp4", False),
    ],
)
def test_subtitles_are_copied_where_the_format_holds_them(tmp_path, caplog, name, codec, target, kept):
    source = add_subtitles(write(tmp_path / f"video-{name}"), tmp_path / name, codec)
    restore(same, source, tmp_path / target)
    if kept:
        assert packets(tmp_path / target, "subtitles")[0] == packets(source, "subtitles")[0]
        assert not caplog.messages
    else:
        assert f"{source}: .mp4 cannot hold subtitle 1 (srt)" in caplog.text
        assert len(frames(tmp_path / target)) == 6


def test_sound_that_the_format_cannot_hold_is_refused(tmp_path):
    source = tmp_path / "a.mkv"
    with av.open(str(write(tmp_path / "video.mkv"))) as a, av.open(str(source), "w") as b:
        video = b.add_stream_from_template(a.streams.video[0], opaque=True)
        audio = b.add_stream("wavpack", rate=16000, layout="mono")
        for packet in a.demux(video=0):
            if packet.size:
                packet.stream = video
                b.mux(packet)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        b.mux(audio.encode(frame))
        b.mux(audio.encode(None))
    assert ".mp4 cannot hold audio 1 (wavpack); write .mkv instead" in refusal(source, tmp_path / "b.mp4")
    restore(same, source, tmp_path / "b.mkv")
    assert len(packets(tmp_path / "b.mkv", "audio")) == 1


def test_a_title_in_another_encoding(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w", metadata_encoding="latin-1") as output:
        stream = output.add_stream("libx264", rate=25, width=WIDTH, height=HEIGHT)
        output.metadata["title"] = "Größe"
        output.mux(stream.encode(av.VideoFrame.from_ndarray(quadrants(), "rgb24")))
        output.mux(stream.encode(None))
    assert restore(same, tmp_path / "a.mkv", tmp_path / "b.mkv").frames == 1


def test_other_files_are_refused(tmp_path):
    out = tmp_path / "out.mp4"
    write(tmp_path / "image.png", [quadrants()], codec="png", pixels="rgb24", options={"update": "1"})
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\n{write(tmp_path / 'a.ts')}\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.mp4").write_text((tmp_path / "list.m3u8").read_text())
    (tmp_path / "notes.txt").write_text("It rains.\n" * 100)
    (tmp_path / "empty.mp4").touch()
    for name in ("image.png", "list.m3u8", "list.mp4", "notes.txt", "empty.mp4"):
        assert (
            refusal(tmp_path / name, out) == f"{tmp_path / name}: not a video, or cut off so that nothing can be read"
        )
    for name in ("none.mp4", "."):
        assert "expected a video file, found none" in refusal(tmp_path / name, out)
    for name in ("out.avi", "out", "out.png"):
        assert "ending in .mp4" in refusal(tmp_path / "a.ts", tmp_path / name)
    for crf in (-1, 52):
        assert "`crf`: expected 0 to 51" in refusal(tmp_path / "a.ts", out, crf=crf)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        audio = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    assert "found no video stream" in refusal(tmp_path / "sound.mp4", out)


def test_too_many_pixels_are_refused(tmp_path, monkeypatch):
    small, large = (write(tmp_path / f"{i}.ts", [quadrants(32 * i, 48 * i)] * 5) for i in (1, 2))
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 3000)
    assert "more than 3000 pixels" in refusal(large, tmp_path / "b.mp4")
    (tmp_path / "a.ts").write_bytes(small.read_bytes() + large.read_bytes())  # which claims to be small
    result = restore(same, tmp_path / "a.ts", tmp_path / "b.mp4")
    assert result.frames == 5
    assert "damaged packets" in result.failures[0]


@pytest.mark.parametrize("suffix", ["mov", "avi"])
def test_a_large_frame_is_refused_before_it_is_decoded(tmp_path, suffix):
    """Also one of a file that claims to be small, in which FFmpeg looks for the size by decoding."""
    side, rows = 16_000, zlib.compressobj(9)
    content = b"".join(rows.compress(bytes(1 + 3 * side)) for _ in range(side)) + rows.flush()
    png = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", content), (b"IEND", b"")):
        png += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    source = tmp_path / f"a.{suffix}"
    with av.open(str(source), "w") as output:
        stream = output.add_stream("png", rate=1, width=WIDTH, height=HEIGHT, pix_fmt="rgb24")
        output.start_encoding()
        packet = av.Packet(png)
        packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1)
        output.mux(packet)
    run = subprocess.run(
        [sys.executable, "-c", PEAK, source], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    growth, words = run.stdout.split(maxsplit=1)
    assert int(growth) < 40 << 20
    assert "more" in words
    assert "89478485 pixels" in words


PEAK = """
import sys
from runtime import InvalidImage, video
from runtime.memory import peak

before = peak()
try:
    next(video.frames(sys.argv[1]))
except InvalidImage as error:
    print(peak() - before, error)
"""


def test_a_name_that_looks_like_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.mp4").rename("12:30.mp4")
    restore(same, "12:30.mp4", "http:b.mp4")
    assert len(frames(tmp_path / "http:b.mp4")) == 6


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
def test_of_a_cut_file_what_is_left_is_restored(tmp_path, suffix):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8) for _ in range(60)]
    with av.open(str(tmp_path / f"a.{suffix}"), "w", options={"movflags": "faststart"}) as output:  # the index first
        stream = output.add_stream("libx264", rate=25, options={"g": "10"})
        stream.codec_context.width, stream.codec_context.height = WIDTH, HEIGHT
        for image in images:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        output.mux(stream.encode(None))
    whole = (tmp_path / f"a.{suffix}").read_bytes()
    source = tmp_path / f"cut.{suffix}"
    source.write_bytes(whole[: len(whole) * 6 // 10])
    result = restore(same, source, tmp_path / "b.mp4")
    assert 20 < result.frames < 45
    assert len(frames(tmp_path / "b.mp4")) == result.frames
    if suffix in ("mp4", "mkv"):
        with pytest.raises(InvalidImage, match=r"breaks off after 1\..* of 2\.4 s"):
            list(read_frames(source))
        assert any("breaks off after 1." in failure and "of 2.4 s" in failure for failure in result.failures)
    source.write_bytes(whole[:1000])
    refusal(source, tmp_path / "c.mp4")


def test_where_reading_fails_the_frames_so_far_are_restored(tmp_path, monkeypatch):
    class Failing:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def demux(self):
            yield from itertools.islice(self.container.demux(), 12)
            raise InvalidDataError(1, "broken")

    opened = video._open
    monkeypatch.setattr(video, "_open", lambda path: contextlib.closing(Failing(opened(path))))
    source = write(tmp_path / "a.mp4", [quadrants()] * 40, options={"bf": "2", "b-adapt": "0"})
    result = restore(same, source, tmp_path / "b.mp4")
    assert result.frames == 12 == len(frames(tmp_path / "b.mp4"))
    assert result.failures == [f"{source}: breaks off after 0.5 of 1.6 s"]


@pytest.mark.parametrize(("codec", "suffix", "left"), [("mpeg4", "avi", 29), ("libx264", "mp4", 30)])
def test_damaged_packets_are_counted_and_the_rest_is_restored(tmp_path, codec, suffix, left):
    """One decoder gives up on the frame, the other patches it up from its neighbours."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8) for _ in range(30)]
    source = write(tmp_path / f"a.{suffix}", images, codec=codec, options={"g": "1"})
    with av.open(str(source)) as container:
        position, size = [(packet.pos, packet.size) for packet in container.demux(video=0)][15]
    content = bytearray(source.read_bytes())
    content[position + 40 : position + size - 10] = rng.bytes(size - 50)
    source.write_bytes(content)
    result = restore(same, source, tmp_path / "b.mp4")
    assert result.frames == left == len(frames(tmp_path / "b.mp4"))
    assert result.failures == [f"{source}: damaged packets, left out or patched up: 1"]


def test_a_network_that_refuses_leaves_nothing(tmp_path):
    def refuse(image):
        raise InputError("too wide")

    source = write(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_text("old")
    threads = threading.active_count()
    assert refusal(source, tmp_path / "b.mp4", refuse) == f"{source}: too wide"
    assert (tmp_path / "b.mp4").read_text() == "old"
    assert threading.active_count() == threads


def test_a_full_disk_is_named(tmp_path):
    """The largest size that a file may have stands in for what the disk has left."""
    rng = np.random.default_rng(0)
    source = write(tmp_path / "a.mkv", [rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8) for _ in range(60)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        for suffix in (".mp4", ".mkv"):
            with pytest.raises(OSError, match="File too large") as error:
                restore(same, source, tmp_path / f"b{suffix}")
            assert error.value.filename == str(tmp_path / f"b{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [source]


def test_an_interruption_keeps_what_is_restored(tmp_path, caplog):
    source = write(tmp_path / "a.mp4", [quadrants()] * 30, sound=True)
    (tmp_path / "b.mp4").write_text("old")
    calls = itertools.count()

    def interrupt(image, after=10):
        if next(calls) == after:
            raise KeyboardInterrupt
        return image

    with pytest.raises(KeyboardInterrupt):
        restore(interrupt, source, tmp_path / "b.mp4")
    assert len(frames(tmp_path / "b.mp4")) == 10
    assert packets(tmp_path / "b.mp4", "audio")
    assert caplog.messages == [f"{tmp_path / 'b.mp4'}: 10 of 30 frames restored before the interruption"]
    calls = itertools.count(10)
    with pytest.raises(KeyboardInterrupt):
        restore(interrupt, source, tmp_path / "c.mp4")
    assert not (tmp_path / "c.mp4").exists()  # not one frame


SLOW = """
import time
from runtime import cli, video

def work(image):
    print("frame", flush=True)
    time.sleep(0.1)
    return image

def run(source: str, target: str) -> None:
    video.restore(work, source, target)

cli.main(run, "")
"""


def test_ctrl_c_leaves_a_playable_file(tmp_path):
    source = write(tmp_path / "a.mp4", [quadrants()] * 100)
    run = subprocess.Popen(
        [sys.executable, "-c", SLOW, "--source", source, "--target", tmp_path / "b.mp4"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    for _ in range(5):
        assert run.stdout.readline() == "frame\n"
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    count = len(frames(tmp_path / "b.mp4"))
    assert 3 <= count < 100
    assert err.splitlines() == [
        f"remark: {tmp_path / 'b.mp4'}: {count} of 100 frames restored before the interruption",
        "interrupted",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "b.mp4"}


def test_memory_does_not_grow_with_the_length(tmp_path):
    """No more than a few frames are decoded ahead of the one that is being restored."""
    source = write(tmp_path / "a.mp4", [quadrants()] * 100)
    decoded, restored = itertools.count(), itertools.count()
    ahead = []
    original = av.VideoFrame.to_ndarray

    def count(frame, *arguments, **options):
        next(decoded)
        return original(frame, *arguments, **options)

    def work(image):
        time.sleep(0.002)
        ahead.append(int(repr(decoded)[6:-1]) - next(restored))
        return image

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.video._Converter.rgb", lambda self, frame: count(frame, format="rgb24"))
        restore(work, source, tmp_path / "b.mp4")
    assert len(ahead) == 100
    assert max(ahead) <= 4


def test_command(tmp_path, monkeypatch, capsys):
    network = write_network(tmp_path / "half.onnx")
    source = write(tmp_path / "a.mp4", sound=True)
    options = ("--model", network, "--provider", "cpu")
    assert command(monkeypatch, source, tmp_path / "b.mkv", *options, "--crf", "10") == 0
    assert capsys.readouterr().out == f"6 frames restored on cpu: {tmp_path / 'b.mkv'}\n"
    assert np.abs(frames(tmp_path / "b.mkv")[0].to_ndarray(format="rgb24").astype(int) - quadrants() // 2).mean() < 2
    (tmp_path / "out").mkdir()
    assert command(monkeypatch, source, tmp_path / "out", *options) == 0
    assert len(frames(tmp_path / "out" / "a.mp4")) == 6
    (tmp_path / "cut.mp4").write_bytes(source.read_bytes()[:1000])
    capsys.readouterr()
    for arguments, words in [
        ((tmp_path / "cut.mp4", tmp_path / "c.mp4"), "cut off"),
        ((source, tmp_path / "c.gif"), "ending in .mp4"),
        ((source, source), "would overwrite"),
        ((source, tmp_path / "c.mp4", "--shard", "1/2"), "--shard is for folders"),
    ]:
        assert command(monkeypatch, *arguments, *options) == 2
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", 1), err
        assert words in err


def test_command_with_a_damaged_video(tmp_path, monkeypatch, capsys):
    source = write(tmp_path / "a.mkv", [quadrants()] * 60)
    source.write_bytes(source.read_bytes()[:-400])
    assert command(monkeypatch, source, tmp_path / "b.mp4", "--model", write_network(tmp_path / "half.onnx")) == 1
    out, err = capsys.readouterr()
    assert "frames restored" in out
    assert err.startswith(f"error: {source}: breaks off after ")


def test_without_the_library(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.delitem(sys.modules, "runtime.video", raising=False)
    monkeypatch.delattr("runtime.video", raising=False)
    source = tmp_path / "a.mp4"
    source.touch()
    assert command(monkeypatch, source, tmp_path / "b.mp4", "--model", write_network(tmp_path / "half.onnx")) == 2
    assert "which is not installed; run: pip install av" in capsys.readouterr().err


def test_with_a_library_that_is_too_old(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(av, "__version__", "16.1.0")
    monkeypatch.delitem(sys.modules, "runtime.video", raising=False)
    monkeypatch.delattr("runtime.video", raising=False)
    source = tmp_path / "a.mp4"
    source.touch()
    assert command(monkeypatch, source, tmp_path / "b.mp4", "--model", write_network(tmp_path / "half.onnx")) == 2
    told = "error: expected PyAV 18 or later, found 16.1.0; run: pip install --upgrade av\n"
    assert capsys.readouterr().err == told
