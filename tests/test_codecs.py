"""The noise of codecs: as much as the quality says, on rainy and clean images alike, the same from the same seed."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from drsformer import codecs
from drsformer.codecs import CRF, FRAMES, JPEG_QUALITY, compress, through_h264, through_jpeg, through_video
from drsformer.metrics import psnr_rgb
from drsformer.rendering import add_rain, draw_streaks
from runtime.errors import InputError
from tests.support.images import noise, random_image


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def scene():
    """A smooth image with rain on it, and without."""
    y, x = np.mgrid[:64, :80]
    clean = np.stack([2 * y + x / 4, 60 + 30 * np.sin(x / 9), 90 + y], axis=-1).astype(np.uint8)
    return add_rain(clean, draw_streaks(generator(), 64, 80)), clean


@pytest.mark.parametrize("size", [(64, 80), (33, 17), (1, 1)])
def test_images_of_any_size_come_back_a_little_changed(size):
    image = random_image(*size)
    for coded in (through_jpeg(image, 90), *through_h264([image] * FRAMES, 10)):
        assert (coded.shape, coded.dtype) == (image.shape, np.uint8)
        assert np.abs(coded.astype(int) - image).mean() < 60
        assert min(size) == 1 or not np.array_equal(coded, image)


@pytest.mark.parametrize("code", [through_jpeg, lambda image, crf: through_h264([image], crf)[0]])
def test_less_quality_is_more_noise(scene, code):
    good, bad = sorted((90, 30), reverse=code is through_jpeg)
    assert psnr_rgb(code(scene[1], good), scene[1]) > psnr_rgb(code(scene[1], bad), scene[1]) + 3


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (57, 91)])
def test_the_same_frames_give_the_same_bytes_whatever_the_memory_held_before(size):
    frames = [np.roll(noise(0, 96, 96)[: size[0], : size[1]], 3 * i, (0, 1)) for i in range(FRAMES)]
    found, held = set(), []
    for seed in range(60):
        found.add(np.stack(through_h264(frames, 26)).tobytes())
        held = [*held[-20:], generator(seed).integers(0, 256, 5000 * (seed % 7 + 1), np.uint8)]
    assert len(found) == 1


def test_frames_come_back_in_their_order():
    frames = [np.full((16, 16, 3), 30 * i, np.uint8) for i in range(8)]
    assert [round(float(frame.mean()) / 30) for frame in through_h264(frames, 10)] == list(range(8))


def test_the_frame_of_a_video_is_the_image_with_noise(scene):
    """Whichever frame it is, neither the pan nor the rain of the others has moved it."""
    for seed in range(8):
        for coded, image in zip(through_video(generator(seed), *scene, 12), scene, strict=True):
            assert psnr_rgb(coded, image) > 30
            assert not np.array_equal(coded, image)


def test_the_same_seed_gives_the_same_noise_and_another_seed_another(scene):
    one, two, three = (through_video(generator(seed), *scene, 26) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one[0], three[0])


def test_one_patch_in_two_goes_through_each_codec_at_every_quality(scene, monkeypatch):
    used = []
    monkeypatch.setattr(codecs, "through_jpeg", lambda image, quality: used.append(("jpeg", quality)) or image)
    monkeypatch.setattr(codecs, "through_video", lambda rng, *images: used.append(("h264", images[-1])) or images[:2])
    for seed in range(400):
        compress(generator(seed), *scene)
    jpeg, h264 = ([quality for codec, quality in used if codec == name] for name in ("jpeg", "h264"))
    assert jpeg[::2] == jpeg[1::2]  # rainy and clean alike
    assert (min(jpeg), max(jpeg)) == JPEG_QUALITY
    assert (min(h264), max(h264)) == CRF
    assert 150 < len(h264) < 250


def test_without_pyav_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match="PyAV, which is not installed; run: pip install av"):
        through_h264([noise(0)], 20)
