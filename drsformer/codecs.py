"""The noise that codecs of photographs and videos leave in an image.

It is no rain, but it lies where rain does, in the fine detail, and it is all over the images that people have. So a
network is shown it on rainy and clean images alike (`compress`), to find rain in it and to leave it alone.

A video's noise is not a photograph's: most of its frames are predicted from others, and what rain and a moving camera
change between them is what the codec has to spend its bits on. So a patch becomes a short clip first, with a camera
that pans and rain that falls. What that gives up: the pan is by whole pixels, and nothing else in the scene moves.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.errors import InputError

JPEG_QUALITY = 40, 95
"""Lowest and highest quality of patches that go through JPEG: from visible blocks to what cameras write."""

CRF = 18, 30
"""Lowest and highest rate factor of patches that go through H.264: from what nobody sees to small videos, as messengers
send them."""

FRAMES = 4
"""Frames of a clip: one that stands by itself, one predicted from that, and two predicted from both."""

PAN = 3
"""Pixels by which the camera of a clip pans from frame to frame at the most, in either direction."""


def through_jpeg(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """An image, uint8 (H, W, 3), as it comes back from a JPEG file of a quality of 1 to 100 with halved colours, as
    cameras and videos have them."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return np.asarray(Image.open(file))


def expect_video_codec() -> None:
    """Raises InputError where PyAV with x264 is not installed."""
    try:
        import av
    except ImportError as error:
        raise InputError("H.264 is written by PyAV, which is not installed; run: pip install av") from error
    if "libx264" not in av.codecs_available:
        raise InputError("this PyAV was built without x264; run: pip install av")


def through_h264(frames: Sequence[NDArray[np.uint8]], crf: int) -> list[NDArray[np.uint8]]:
    """The frames of a clip, uint8 (H, W, 3) each, as they come back from an H.264 video of a constant rate factor of 0,
    the best, to 51, with halved colours. The same frames give the same bytes: on one thread, and without x264's
    macroblock tree, which on small frames reads memory that nobody wrote.

    Raises:
        InputError: PyAV is not installed.
    """
    expect_video_codec()
    from av import VideoCodecContext, VideoFrame

    height, width, _ = frames[0].shape
    even = [(0, height % 2), (0, width % 2), (0, 0)]
    encoder, decoder = VideoCodecContext.create("libx264", "w"), VideoCodecContext.create("h264", "r")
    encoder.width, encoder.height, encoder.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
    encoder.time_base = Fraction(1, 25)
    encoder.options = {"crf": str(crf), "preset": "veryfast", "x264-params": "mbtree=0"}
    encoder.thread_count = decoder.thread_count = 1
    packets = []
    for number, frame in enumerate(frames):
        picture = VideoFrame.from_ndarray(np.pad(frame, even, "edge"), "rgb24").reformat(format="yuv420p")
        picture.pts = number
        packets += encoder.encode(picture)
    packets += encoder.encode(None)
    decoded = [picture for packet in (*packets, None) for picture in decoder.decode(packet)]
    return [np.asarray(picture.to_ndarray(format="rgb24"), np.uint8)[:height, :width] for picture in decoded]


def through_video(
    rng: np.random.Generator, rainy: NDArray[np.uint8], clean: NDArray[np.uint8], crf: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A rainy image and the same without rain, uint8 (H, W, 3) each, as a frame of an H.264 video each.

    The frame may be any of the clip. In the others the camera has panned on, and the rain, the difference of the two
    images, is somewhere else; what leaves the image on one side comes in again on the other.

    Args:
        rng: Generator that decides which frame it is, how the camera pans and where the rain is.
        rainy: The rainy image.
        clean: The clean image.
        crf: See `through_h264`.

    Raises:
        InputError: PyAV is not installed.
    """
    height, width, _ = clean.shape
    rain = rainy.astype(np.int16) - clean
    kept, pan = int(rng.integers(FRAMES)), rng.integers(-PAN, PAN + 1, 2)
    rainy_clip, clean_clip = [], []
    for number in range(FRAMES):
        moved = number - kept
        falls = rng.integers((height, width)) if moved else np.zeros(2, int)
        background = np.roll(clean, moved * pan, (0, 1))
        clean_clip.append(background)
        rainy_clip.append((background + np.roll(rain, falls, (0, 1))).clip(0, 255).astype(np.uint8))
    return through_h264(rainy_clip, crf)[kept], through_h264(clean_clip, crf)[kept]


def compress(
    rng: np.random.Generator, rainy: NDArray[np.uint8], clean: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A rainy image and the same without rain, uint8 (H, W, 3) each, with the noise of one codec at one random quality:
    equally likely JPEG and H.264.

    Args:
        rng: Generator that decides.
        rainy: The rainy image.
        clean: The clean image.

    Raises:
        InputError: PyAV is not installed.
    """
    if rng.random() < 0.5:
        quality = int(rng.integers(*JPEG_QUALITY, endpoint=True))
        return through_jpeg(rainy, quality), through_jpeg(clean, quality)
    return through_video(rng, rainy, clean, int(rng.integers(*CRF, endpoint=True)))
