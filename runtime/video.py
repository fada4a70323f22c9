"""Video files with everything around the pictures: what goes in with them comes out with them.

    from derainer import Derainer  # in the checkout: runtime
    from derainer.video import restore

    restore(Derainer(), "rainy.mp4", "clean.mp4")

Each frame is restored by itself; where the network takes several at once, a few are restored together. Decoding,
restoring and encoding run at the same time, a few frames apart, so memory does not grow with the length of the video.
H.264 is written, into MP4, MOV or Matroska.

Kept: the time of each frame, also where the frame rate varies; size, pixel shape and chroma subsampling; the colour
matrix and range, by which the frames become RGB and YUV again, primaries and transfer curve; rotation and mirroring,
where the network sees the frames upright, as it was trained; sound and subtitles, copied bit for bit; chapters, titles
and languages.

Not kept, and remarked on: more than 8 bits a channel, transparency, interlacing, subtitles that the format cannot
hold, cover images, data, and all video streams but one. Refused: HDR, whose curve needs more than 8 bits, unless it is
HLG, as phones film it, and its tones are to be mapped to SDR; and sound that the format cannot hold.
"""

from __future__ import annotations

import logging
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from . import hlg
from .errors import DerainError, InputError, InvalidImage
from .files import writing
from .images import refuse_bomb
from .pipeline import grouped, pipeline
from .pixels import Size
from .progress import OnProgress, silent
from .session import Derainer

try:
    import av
except ImportError as error:
    raise InputError("videos are read and written by PyAV, which is not installed; run: pip install av") from error
if int(av.__version__.partition(".")[0]) < 18:
    raise InputError(f"expected PyAV 18 or later, found {av.__version__}; run: pip install --upgrade av")
from av.codec.context import Flags
from av.container import InputContainer, OutputContainer
from av.error import ArgumentError, FFmpegError, InvalidDataError
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

logger = logging.getLogger(__name__)

FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
"""FFmpeg's format by the suffix of the file to write. Files to read are recognised by their content."""

READABLE = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,mxf"
"""FFmpeg's formats that hold a video in one file. It knows others, playlists for one, that open any file they name."""

EDITED = ("mov", "mp4")
"""How the names of the demuxer and the muxers begin whose formats, MP4 and MOV, can leave out what is stored by a list
of edits."""

ABSOLUTE = ("matroska", "asf")
"""How the names of the demuxers begin that give the end, counted from 0, as the length. That is how FFmpeg writes these
formats; mkvmerge writes Matroska's length from the first time on, which cannot be told apart."""

MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9}
"""The number that FFmpeg's scaler has for a colour matrix, by its code in ITU-T H.273: BT.709, FCC, BT.601 for 625 and
525 lines, SMPTE 240M, BT.2020."""

BT709, BT601, UNSPECIFIED = 1, 5, 2
HLG = 18
HDR = {16: "PQ", HLG: "HLG"}
"""Transfer curves that need more than 8 bits, by their code in H.273."""

OF_THE_FILE = ("major_brand", "minor_version", "compatible_brands", "encoder")
"""Metadata that tells how the old file was written."""

EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
"""Flags without which the scaler takes faster and coarser ways between RGB and YUV."""


@dataclass(frozen=True)
class Result:
    """What became of a video.

    Attributes:
        frames: How many were restored and written.
        failures: One line for each fault of the source, although a target was written.
    """

    frames: int
    failures: list[str]


@dataclass(frozen=True, eq=False)
class Picture:
    """A frame.

    Attributes:
        rgb: uint8 (H, W, 3), upright.
        time: When it is shown, in units of the video stream's time base.
        duration: For how long, in the same units.
    """

    rgb: NDArray[np.uint8]
    time: int
    duration: int


def restore(
    derain: Callable[[NDArray[np.uint8]], NDArray[np.uint8]],
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    crf: int = 18,
    on_progress: OnProgress = silent,
    tone_map: bool = False,
) -> Result:
    """Restore a video file into another, whole or not at all.

    What is not kept is logged as a warning. Damaged frames are left out and counted; of a file that breaks off, what
    comes before is restored. On ctrl-C the frames at hand are dropped, those before them become the target, which is
    playable, and KeyboardInterrupt goes on.

    Args:
        derain: A Derainer, which restores as many frames at once as it can, or any function of uint8 (H, W, 3) RGB ->
            the same.
        crf: x264's quality, from 0, the best, to 51.
        on_progress: Is told how far it is.
        tone_map: Map the tones of an HLG video to SDR, in BT.709; others stay as they are.

    Raises:
        InvalidImage: The source is no video, or one that is refused.
        InputError: The target's format cannot hold it.
        OSError: The target cannot be written.
        DerainError: Of a frame, whatever `derain` raises.
    """
    source, target = Path(source), Path(target)
    if target.suffix.lower() not in FORMATS:
        raise InputError(f"expected a video file ending in {', '.join(FORMATS)} to write, found {target}")
    if not 0 <= crf <= 51:
        raise InputError(f"`crf`: expected 0 to 51, found {crf}")
    interruption = None
    with _open(source) as container, writing(target) as temporary, _create(temporary, target) as output:
        reader = _Reader(source, container, tone_map)
        writer = _Writer(target, output, reader, crf)
        for remark in (*reader.remarks(), *writer.remarks):
            logger.warning("%s: %s", source, remark)
        try:
            _run(derain, reader, writer, on_progress)
        except KeyboardInterrupt as error:
            if not writer.frames:
                raise
            interruption = error
        writer.flush()
    if interruption:
        expected = reader.expected or "?"
        logger.warning("%s: %s of %s frames restored before the interruption", target, writer.frames, expected)
        raise interruption
    failures = [] if reader.breaks_off() is None else [f"{source}: {reader.breaks_off()}"]
    if damaged := reader.damaged + writer.damaged:
        failures.append(f"{source}: damaged packets, left out or patched up: {damaged}")
    return Result(writer.frames, failures)


def frames(path: str | os.PathLike[str], tone_map: bool = False) -> Iterator[NDArray[np.uint8]]:
    """The frames of a video one after another, as `restore` shows them to the network: uint8 (H, W, 3) RGB, upright.

    Args:
        path: The video.
        tone_map: Map the tones of an HLG video to SDR.

    Raises:
        InvalidImage: It is no video, or one that is refused; at the end, where it breaks off.
    """
    path = Path(path)
    with _open(path) as container:
        reader = _Reader(path, container, tone_map)
        for item in reader.items:
            if isinstance(item, Picture):
                yield item.rgb
        if fault := reader.breaks_off():
            raise InvalidImage(f"{path}: {fault}")


def _run(
    derain: Callable[[NDArray[np.uint8]], NDArray[np.uint8]],
    reader: _Reader,
    writer: _Writer,
    on_progress: OnProgress,
) -> None:
    started, total = time.monotonic(), reader.expected or 0

    def size_of(item: Picture | Packet) -> Size | None:
        return item.rgb.shape[:2] if isinstance(item, Picture) else None

    def most(size: Size) -> int:
        return derain.batch_size(*size) if isinstance(derain, Derainer) else 1

    def work(items: list[Picture | Packet]) -> list[Picture | Packet]:
        frames = [item.rgb for item in items if isinstance(item, Picture)]
        try:
            restored = iter(derain.run_batch(frames) if isinstance(derain, Derainer) else map(derain, frames))
            return [replace(item, rgb=next(restored)) if isinstance(item, Picture) else item for item in items]
        except DerainError as error:
            raise type(error)(f"{reader.path}: {error}") from error

    def consume(items: list[Picture | Packet]) -> None:
        for item in items:
            writer.write(item)
            if isinstance(item, Picture):
                rate = writer.frames / max(time.monotonic() - started, 1e-9)
                on_progress("Restoring frames", writer.frames, total, f"{rate:.2f} frames/s")

    on_progress("Restoring frames", 0, total)
    pipeline(grouped(reader.items, size_of, most), work, consume)


def _open(path: Path) -> InputContainer:
    if not path.is_file():
        raise InvalidImage(f"{path}: expected a video file, found none")
    try:
        return av.open(
            f"file:{path}",
            options=_limit(),  # FFmpeg decodes a frame here already, where the file does not say what is in it
            container_options={"format_whitelist": READABLE, "protocol_whitelist": "file"},
            metadata_errors="replace",
        )
    except FFmpegError as error:
        reason = error.strerror if isinstance(error, OSError) else "not a video, or cut off so that nothing can be read"
        raise InvalidImage(f"{path}: {reason}") from error


def _limit() -> dict[str, str]:
    """The limit against decompression bombs, as options of a decoder."""
    return {} if Image.MAX_IMAGE_PIXELS is None else {"max_pixels": str(Image.MAX_IMAGE_PIXELS)}


@contextmanager
def _create(temporary: Path, target: Path) -> Iterator[OutputContainer]:
    """The file to write, whose errors tell of `target`. Those of the source do not get here."""
    try:
        with av.open(f"file:{temporary}", "w", FORMATS[target.suffix.lower()]) as output:
            yield output
    except FFmpegError as error:
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise InputError(f"{target} cannot be written: {error.strerror}") from error


class _Converter:
    """Turns the frames of a video into upright RGB and back, by their own colour matrix and range; FFmpeg would guess.

    Args:
        first: The first frame; all others are taken to be like it, and scaled to its size where they are not.
        tone_map: Whether HLG becomes SDR before it is RGB.
    """

    def __init__(self, path: Path, first: VideoFrame, tone_map: bool = False) -> None:
        self.tone_maps = tone_map and first.color_trc == HLG
        if first.color_trc in HDR and not self.tone_maps:
            how = "--tone-map does that" if first.color_trc == HLG else "here there is --tone-map for HLG only"
            raise InvalidImage(
                f"{path}: HDR ({HDR[first.color_trc]}), where the network works on 8 bits a channel; map its tones to "
                f"SDR first ({how})"
            )
        self.width, self.height = first.width, first.height
        unknown = BT709 if first.width >= 1280 or first.height > 576 else BT601  # as players have it
        code = {0: BT709, UNSPECIFIED: unknown}.get(first.colorspace, first.colorspace)
        if code not in MATRICES:
            raise InvalidImage(f"{path}: colour matrix {code} of H.273 is unknown here; convert it to BT.709 first")
        self._read_matrix = self._written_matrix = MATRICES[code]
        full = first.color_range == ColorRange.JPEG or first.format.name.startswith("yuvj")
        self.range = ColorRange.JPEG if full and not first.format.is_rgb else ColorRange.MPEG
        self.colorspace = BT709 if first.format.is_rgb else first.colorspace
        self.primaries, self.transfer = first.color_primaries, first.color_trc
        if self.tone_maps:
            self.colorspace = self.primaries = self.transfer = BT709
            self._written_matrix = MATRICES[BT709]
        self.pixel_format = _pixel_format(first)
        matrix = first.side_data.get("DISPLAYMATRIX")
        self.display_matrix = struct.unpack("=9i", bytes(matrix)) if matrix else None
        self._orientation = _orientation(self.display_matrix)
        self._to_rgb, self._from_rgb = VideoReformatter(), VideoReformatter()

    def rgb(self, frame: VideoFrame) -> NDArray[np.uint8]:
        """uint8 (H, W, 3), upright."""
        swap, rows, columns = self._orientation
        converted = self._to_rgb.reformat(
            frame,
            self.width,
            self.height,
            "rgb48le" if self.tone_maps else "rgb24",
            src_colorspace=self._read_matrix,
            src_color_range=self.range,
            dst_color_range=ColorRange.JPEG,
            interpolation=EXACT,
        )
        image = converted.to_ndarray()
        image = hlg.to_sdr(np.asarray(image, np.uint16)) if self.tone_maps else np.asarray(image, np.uint8)
        return (image.swapaxes(0, 1) if swap else image)[::rows, ::columns]

    def frame(self, rgb: NDArray[np.uint8]) -> VideoFrame:
        """What `rgb` gives, in the format to encode."""
        swap, rows, columns = self._orientation
        image = rgb[::rows, ::columns]
        image = np.ascontiguousarray(image.swapaxes(0, 1) if swap else image)
        return self._from_rgb.reformat(
            VideoFrame.from_ndarray(image, "rgb24"),
            format=self.pixel_format,
            dst_colorspace=self._written_matrix,
            src_color_range=ColorRange.JPEG,
            dst_color_range=self.range,
            interpolation=EXACT,
        )


def _pixel_format(frame: VideoFrame) -> str:
    """The format of 8 bits with the chroma subsampling of a frame; without subsampling where the size is odd."""
    across, down = 4 // frame.format.chroma_width(4), 4 // frame.format.chroma_height(4)
    if len(frame.format.components) < 3 and not frame.format.has_palette:  # grey
        across, down = 2, 2
    if frame.width % across or frame.height % down:
        return "yuv444p"
    return {(2, 1): "yuv422p", (2, 2): "yuv420p"}.get((across, down), "yuv444p")


def _orientation(matrix: tuple[int, ...] | None) -> tuple[bool, int, int]:
    """Whether a display matrix swaps rows and columns, and the steps, 1 or -1, in which to go through the rows and
    the columns after that. A matrix that does not turn by right angles is left to the player.

    A pixel in column p and row q is shown at column a p + c q and row b p + d q; the matrix is a b u c d v x y w.
    """
    if matrix is None:
        return False, 1, 1
    a, b, _, c, d = matrix[:5]
    if a == d == 0:
        return True, 1 if b > 0 else -1, 1 if c > 0 else -1
    if b == c == 0:
        return False, 1 if d > 0 else -1, 1 if a > 0 else -1
    return False, 1, 1


class _Reader:
    """The streams of an open video file, and what comes out of them.

    Args:
        stream: The video stream.
        copied: The streams whose packets are copied.
        items: Pictures, and packets to copy, in the order of the file, with times from its start.
        converter: Between frames and pictures.
        first: The first frame.
        edited: Whether packets are discarded by a list of edits.
        start: When the file starts, in seconds, by its own times.
        expected: How many frames there probably are; None where nothing tells.
        damaged: How many packets were so far.
    """

    def __init__(self, path: Path, container: InputContainer, tone_map: bool = False) -> None:
        self.path, self.container = path, container
        covers = Disposition.attached_pic | Disposition.timed_thumbnails
        videos = [
            stream
            for stream in container.streams.video
            if stream.codec_context is not None and not stream.disposition & covers
        ]
        if not videos:
            raise InvalidImage(f"{path}: expected a video, found no video stream in it, or none that FFmpeg can decode")
        self.stream = max(videos, key=lambda stream: stream.width * stream.height)
        refuse_bomb(path, self.stream.width, self.stream.height)
        self.stream.codec_context.options = _limit()  # frames can be larger than the file says
        self.copied: list[Stream] = [*container.streams.audio, *container.streams.subtitles]
        self.rate = self.stream.guessed_rate or Fraction(25)
        self.time_base = self.stream.time_base or 1 / self.rate
        self.edited = container.format.name.startswith(EDITED)
        self.start = max(Fraction(container.start_time or 0, av.time_base), Fraction(0))
        self._length = Fraction(container.duration or 0, av.time_base)
        if container.format.name.startswith(ABSOLUTE) and self._length > self.start:
            self._length -= self.start
        self._end = Fraction(0)
        self.damaged = 0
        counts = self.stream.frames, round(self._length * self.rate)  # the first with those that are edited out
        self.expected = min((count for count in counts if count), default=None)
        self.first, decoded = self._peek(self._decode())
        self.converter = _Converter(path, self.first, tone_map)
        self.items = self._pictures(decoded)

    def remarks(self) -> list[str]:
        """One line for each thing that is not kept."""
        remarks = []
        kept = [self.stream, *self.copied]
        if dropped := [f"{stream.type} {stream.index}" for stream in self.container.streams if stream not in kept]:
            remarks.append(f"streams that are dropped: {', '.join(dropped)}")
        components = self.first.format.components
        bits = max(component.bits for component in components)
        if self.converter.tone_maps:
            remarks.append("its tones are mapped from HLG to SDR, and its colours to BT.709")
        elif bits > 8:
            remarks.append(f"{bits} bits a channel become 8")
        told = self.stream.metadata.get("alpha_mode") == "1"  # of VP8 and VP9, whose decoders leave it out
        if told or any(component.is_alpha for component in components):
            remarks.append("transparency is dropped")
        if self.first.interlaced_frame:
            remarks.append("interlaced frames are taken for whole ones; deinterlace first for a better result")
        return remarks

    def breaks_off(self) -> str | None:
        """Where the file ends before its time, once all of it is read."""
        stores_length = self.container.format.name.startswith(("mov", "matroska"))  # of others FFmpeg guesses, badly
        if stores_length and self._length - self._end > 0.5:
            return f"breaks off after {float(self._end):.1f} of {float(self._length):.1f} s"
        return None

    def _decode(self) -> Iterator[VideoFrame | Packet]:
        """All frames, and the packets to copy."""
        packets = self.container.demux()
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except FFmpegError:  # told at the end, as a file that breaks off; the decoder still holds frames
                yield from self.stream.decode(None)
                return
            if packet.pts is not None and packet.duration is not None:
                self._end = max(self._end, (packet.pts + packet.duration) * packet.time_base - self.start)
            if packet.stream is self.stream:
                frames, damaged = [], packet.is_corrupt
                try:
                    frames = self.stream.decode(packet)
                except FFmpegError:
                    damaged = True
                self.damaged += damaged or any(frame.is_corrupt for frame in frames)
                yield from frames
            elif packet.stream in self.copied and packet.size:
                if packet.is_corrupt:
                    self.damaged += 1
                else:
                    yield packet

    def _peek(self, decoded: Iterator[VideoFrame | Packet]) -> tuple[VideoFrame, Iterator[VideoFrame | Packet]]:
        """The first frame, and everything again from the start."""
        read = []
        for item in decoded:
            read.append(item)
            if isinstance(item, VideoFrame):
                return item, chain(read, decoded)
        reason = "not one frame of its video stream can be decoded"
        if Image.MAX_IMAGE_PIXELS is not None:  # a decoder does not tell a large frame from a damaged one
            reason += (
                f", or none of at most {Image.MAX_IMAGE_PIXELS} pixels; if they have more, and you trust the file, "
                "raise the limit (runtime.derain: --max-pixels; Python: PIL.Image.MAX_IMAGE_PIXELS)"
            )
        raise InvalidImage(f"{self.path}: {reason}")

    def _pictures(self, decoded: Iterator[VideoFrame | Packet]) -> Iterator[Picture | Packet]:
        """Frames become pictures, and all times count from the start of the file."""
        step = max(1, round(1 / self.rate / self.time_base))
        time, last = -step, None  # a frame is shown until the next, so each waits for that
        for item in decoded:
            start = round(self.start / (item.time_base or self.time_base))
            if isinstance(item, Packet):
                item.pts, item.dts = (None if t is None else t - start for t in (item.pts, item.dts))
                yield item
            else:
                before = time
                time = time + step if item.pts is None else max(time + 1, item.pts - start)  # the encoder needs order
                if last:
                    yield Picture(self.converter.rgb(last), before, time - before)
                last = item
        if last:
            yield Picture(self.converter.rgb(last), time, self._last_duration(last, time) or step)

    def _last_duration(self, frame: VideoFrame, time: int) -> int:
        """How long the last frame is shown, once all of the file is read; 0 where nothing tells.

        MP4 and MOV store the steps from one decoded frame to the next, which is not the next that is shown. There the
        length of the stream tells.
        """
        if not self.edited:
            return frame.duration
        if self.breaks_off() or self.stream.duration is None:
            return 0
        end = (self.stream.start_time or 0) + self.stream.duration - round(self.start / self.time_base)
        return max(0, end - time)


class _Writer:
    """Encodes pictures into an open container, and copies packets into it.

    Args:
        frames: How many were written.
        damaged: How many packets could not be copied.
        remarks: One line for each thing that the format cannot hold.
    """

    def __init__(self, path: Path, output: OutputContainer, reader: _Reader, crf: int) -> None:
        self._output, self._converter = output, reader.converter
        self.frames = self.damaged = 0
        self.remarks: list[str] = []
        self._edits = output.format.name.startswith(EDITED)
        self._cuts = reader.edited
        self._heard: set[int] = set()
        self._step = 1 / reader.rate / reader.time_base
        self._rounding = max(1, Fraction(1, 1000) / reader.time_base)  # Matroska and lists of edits count in ms
        self._lead: int | None = None
        self._end = 0
        try:
            self._stream = output.add_stream("libx264", rate=reader.rate, options={"crf": str(crf)})
        except ValueError as error:
            raise InputError("this PyAV was built without x264; run: pip install av") from error
        context, converter, first = self._stream.codec_context, reader.converter, reader.first
        context.width, context.height, context.pix_fmt = first.width, first.height, converter.pixel_format
        context.time_base = reader.time_base
        context.flags |= Flags.frame_duration
        context.sample_aspect_ratio = reader.stream.sample_aspect_ratio or Fraction(0)
        context.colorspace, context.color_range = converter.colorspace, converter.range
        context.color_primaries, context.color_trc = converter.primaries, converter.transfer
        self._stream.set_display_matrix(converter.display_matrix)
        _label(self._stream, reader.stream)
        if converter.pixel_format == "yuv444p" and (first.width | first.height) % 2:
            self.remarks.append("of an odd size, so its chroma is not subsampled; some players cannot show that")
        self._copies: dict[int, Stream] = {}
        for stream in reader.copied:
            try:
                copy = output.add_stream_from_template(stream)
            except ValueError as error:
                what = f"{stream.type} {stream.index} ({stream.name})"
                if stream.type == "audio":
                    raise InputError(f"{path}: {path.suffix} cannot hold {what}; write .mkv instead") from error
                self.remarks.append(f"{path.suffix} cannot hold {what}, which is dropped; .mkv might")
                continue
            _label(copy, stream)
            self._copies[stream.index] = copy
        output.metadata.update({k: v for k, v in reader.container.metadata.items() if k not in OF_THE_FILE})
        chapters = reader.container.chapters()
        for chapter in chapters:
            start = round(reader.start / (chapter["time_base"] or 1))
            chapter["start"], chapter["end"] = max(0, chapter["start"] - start), max(0, chapter["end"] - start)
        output.set_chapters(chapters)
        output.start_encoding()

    def write(self, item: Picture | Packet) -> None:
        if isinstance(item, Packet):
            if item.stream.index in self._copies and not self._is_cut(item):
                item.stream = self._copies[item.stream.index]
                try:
                    self._output.mux(item)
                except (InvalidDataError, ArgumentError):  # the latter for times that make no sense
                    self.damaged += 1
            return
        frame = self._converter.frame(item.rgb)
        frame.pts, frame.time_base = item.time, self._stream.codec_context.time_base
        frame.duration = item.duration if self._varies(item.duration) else 0  # which stands for that of the rate
        self._end = item.time + item.duration
        self._output.mux(self._encode(frame))
        self.frames += 1

    def flush(self) -> None:
        """Write the frames that the encoder has kept back."""
        packets = self._encode(None)
        if self._edits:
            self._stretch(packets[-1])
        self._output.mux(packets)

    def _encode(self, frame: VideoFrame | None) -> list[Packet]:
        packets = self._stream.encode(frame)
        if packets and self._lead is None:
            self._lead = (packets[0].pts or 0) - (packets[0].dts or 0)
        return packets

    def _varies(self, duration: int) -> bool:
        return abs(duration - self._step) > self._rounding

    def _stretch(self, packet: Packet) -> None:
        """Make the steps between decoded frames, all that MP4 and MOV store, add up to what is shown, by the last one.
        At a constant rate they do."""
        dts, end = packet.dts or 0, self._end - (self._lead or 0)
        if self._varies(end - dts):
            packet.dts = max(dts, (packet.pts or 0) - (self._lead or 0))
            packet.duration = max(packet.duration or 0, end - packet.dts)

    def _is_cut(self, packet: Packet) -> bool:
        """Whether a packet is edited out of the source and has to be left out here. MP4 and MOV leave out themselves
        what comes before the start; in Matroska the last one of that stays, by which the next is decoded."""
        if not (self._cuts and packet.is_discard):
            self._heard.add(packet.stream.index)
            return False
        is_far = (packet.pts or 0) + 2 * (packet.duration or 0) <= 0
        return packet.stream.index in self._heard or (is_far and not self._edits)


def _label(target: Stream, source: Stream) -> None:
    target.metadata.update({key: value for key, value in source.metadata.items() if key in ("language", "title")})
    target.disposition = source.disposition
