"""PSNR and SSIM against the authors' scripts, against slow references written here, and at the edges."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from drsformer.metrics import luma, psnr, psnr_rgb, ssim
from runtime.images import read_rgb

# `input` against `target`, by the authors' own scripts under Octave: pair, then PSNR and SSIM of each protocol.
KNOWN = [
    ("rain100l/val/106047", 27.0230, 0.816865, 27.0251, 0.817086),
    ("rain100l/val/107014", 21.6732, 0.746967, 21.6744, 0.747130),
    ("rain100l/val/107045", 21.0474, 0.759498, 21.0493, 0.759598),
    ("rain200h/val/100080", 26.9599, 0.744455, 26.9606, 0.744793),
    ("rain200h/val/100098", 10.9497, 0.396116, 10.9499, 0.396156),
    ("rain200h/val/102061", 13.7756, 0.296385, 13.7755, 0.296453),
]

# The same of larger images, by protocol `did` alone: their SSIM is that of copies of half the size.
KNOWN_HALVED = [
    ("test-1", 17.4929, 0.541232),
    ("test-85", 15.5496, 0.616204),
    ("train-230", 19.4709, 0.815021),
    ("train-330", 17.6847, 0.623592),
    ("train-37", 18.1331, 0.555903),
    ("train-53", 16.8977, 0.714875),
]

PROTOCOLS = ("rain200", "did")


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def flat(*colour: int) -> np.ndarray:
    return np.full((16, 16, 3), colour, dtype=np.uint8)


@pytest.mark.parametrize(("name", "psnr_a", "ssim_a", "psnr_b", "ssim_b"), KNOWN)
def test_authors_scripts(real_data, name, psnr_a, ssim_a, psnr_b, ssim_b):
    folder, stem = (real_data / name).parent, Path(name).name
    rainy, clean = (read_rgb(folder / kind / f"{stem}.png") for kind in ("input", "target"))
    found = [metric(rainy, clean, protocol) for protocol in PROTOCOLS for metric in (psnr, ssim)]
    assert [f"{value:.{digits}f}" for value, digits in zip(found, (4, 6, 4, 6), strict=True)] == [
        f"{psnr_a:.4f}",
        f"{ssim_a:.6f}",
        f"{psnr_b:.4f}",
        f"{ssim_b:.6f}",
    ]


@pytest.mark.parametrize(("name", "psnr_b", "ssim_b"), KNOWN_HALVED)
def test_authors_scripts_on_large_images(real_data, name, psnr_b, ssim_b):
    files = [next((real_data / "rain800/val" / kind).glob(f"{name}.*")) for kind in ("input", "target")]
    rainy, clean = map(read_rgb, files)
    assert f"{psnr(rainy, clean, 'did'):.4f}" == f"{psnr_b:.4f}"
    assert f"{ssim(rainy, clean, 'did'):.6f}" == f"{ssim_b:.6f}"


@pytest.mark.parametrize(
    ("colour", "exact", "rounded"),
    [
        ((0, 0, 0), 16, 16),
        ((255, 255, 255), 235, 235),
        ((255, 0, 0), 81.481, 81),
        ((0, 255, 0), 144.553, 145),
        ((0, 0, 255), 40.966, 41),
        ((0, 204, 68), 125.5, 126),  # halves away from zero, as in MATLAB
        ((2, 44, 141), 52.5, 53),  # and not to even
    ],
)
def test_luma(colour, exact, rounded):
    assert luma(flat(*colour), "did")[0, 0] == pytest.approx(exact, abs=1e-12)
    assert luma(flat(*colour), "rain200")[0, 0] == rounded


def rough(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Two images that have something in common at every scale."""
    common = np.repeat(np.repeat(noise(height // 8 + 1, width // 8 + 1), 8, 0), 8, 1)[:height, :width]
    first, second = (common // 2 + noise(height, width, seed) // 4 for seed in (1, 2))
    return first.astype(np.uint8), second.astype(np.uint8)


def mean_over_windows(a: np.ndarray, b: np.ndarray) -> float:
    """The formula of the paper (Wang et al., Eq. 13), window by window, all windows of a row of them at once."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for y in range(a.shape[0] - 10):
        p, q = (np.stack([image[y : y + 11, x : x + 11] for x in range(a.shape[1] - 10)]) for image in (a, b))
        mp, mq = ((window * image).sum((1, 2), keepdims=True) for image in (p, q))
        vp, vq = ((window * (image - mean) ** 2).sum((1, 2)) for image, mean in ((p, mp), (q, mq)))
        covariance = (window * (p - mp) * (q - mq)).sum((1, 2))
        mp, mq = mp[:, 0, 0], mq[:, 0, 0]
        values.append((2 * mp * mq + c1) * (2 * covariance + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("size", [(11, 11), (11, 30), (17, 12), (23, 31)])
def test_ssim_is_the_mean_over_windows(size, protocol):
    first, second = rough(*size)
    expected = mean_over_windows(luma(first, protocol), luma(second, protocol))
    assert ssim(first, second, protocol) == pytest.approx(expected, abs=1e-10)


def decimated(image: np.ndarray, factor: int) -> np.ndarray:
    """MATLAB's imfilter with ones(f) / f^2, "symmetric" and "same", then (1:f:end, 1:f:end), as its manual has it: the
    centre of a window is at floor((size + 1) / 2), counted from 1."""
    H, W = image.shape
    centre = (factor + 1) // 2 - 1

    def sources(length: int, offset: int) -> list[int]:
        places = [place + offset - centre for place in range(0, length, factor)]
        return [-1 - p if p < 0 else 2 * length - 1 - p if p >= length else p for p in places]

    shifted = [image[sources(H, i)][:, sources(W, j)] for i in range(factor) for j in range(factor)]
    return np.sum(shifted, 0) / factor**2


@pytest.mark.parametrize(("size", "factor"), [((383, 387), 1), ((384, 387), 2), ((641, 640), 3), ((896, 897), 4)])
def test_ssim_of_large_images(size, factor):
    first, second = rough(*size)
    a, b = (decimated(luma(image, "did"), factor) for image in (first, second))
    assert ssim(first, second, "did") == pytest.approx(mean_over_windows(a, b), abs=1e-10)


def test_protocol_rain200_never_measures_a_smaller_copy():
    """SSIM of the whole is the mean of that of its parts, which share the rows that windows of both reach."""
    first, second = rough(394, 410)
    parts = [ssim(first[rows], second[rows]) for rows in (slice(0, 202), slice(192, 394))]
    assert ssim(first, second) == pytest.approx(np.mean(parts), abs=1e-12)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_psnr_of_a_constant_difference(protocol):
    darker, brighter = flat(100, 100, 100), flat(120, 120, 120)
    difference = luma(brighter, protocol)[0, 0] - luma(darker, protocol)[0, 0]
    assert psnr(darker, brighter, protocol) == pytest.approx(20 * math.log10(255 / difference))
    assert psnr_rgb(darker, brighter) == pytest.approx(20 * math.log10(255 / 20))


def test_psnr_rgb_sees_what_luma_does_not():
    first, second = flat(7, 0, 0), flat(2, 2, 3)
    assert psnr(first, second, "rain200") == math.inf
    assert psnr(first, second, "did") < math.inf
    assert psnr_rgb(first, second) == pytest.approx(20 * math.log10(255 / math.sqrt((25 + 4 + 9) / 3)))


def test_psnr_does_not_wrap_around():
    """Differences of uint8 are not taken in uint8."""
    assert psnr_rgb(flat(0, 0, 0), flat(255, 255, 255)) == 0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_equal_images(protocol):
    image = noise(13, 19)
    assert psnr(image, image.copy(), protocol) == psnr_rgb(image, image.copy()) == math.inf
    assert ssim(image, image.copy(), protocol) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_metrics_are_symmetric(metric, protocol):
    a, b = noise(16, 21), noise(16, 21, seed=1)
    assert metric(a, b, protocol) == pytest.approx(metric(b, a, protocol), abs=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (10, 64), (64, 10)])
def test_image_smaller_than_the_window(size):
    a, b = noise(*size), noise(*size, seed=1)
    assert math.isfinite(psnr(a, b))
    with pytest.raises(ValueError, match=f"at least 11x11 pixels, found {size[1]}x{size[0]}"):
        ssim(a, b)


@pytest.mark.parametrize("metric", [psnr, ssim, psnr_rgb])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (noise(16, 20), "equal size, found 16x16 and 20x16"),
        (noise(16, 16) / 255, r"expected uint8 .* found float64 \(16, 16, 3\)"),
        (noise(16, 16)[..., 0], r"found uint8 \(16, 16\)"),
        (noise(16, 16)[..., :1], r"found uint8 \(16, 16, 1\)"),
    ],
)
def test_other_arrays_are_refused(metric, other, message):
    with pytest.raises(ValueError, match=message):
        metric(noise(16, 16), other)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_unknown_protocol(metric):
    with pytest.raises(ValueError, match="'rain100'; known: rain200, did"):
        metric(noise(16, 16), noise(16, 16), "rain100")
