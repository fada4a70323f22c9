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


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("size", [(11, 11), (11, 30), (17, 12), (23, 31)])
def test_ssim_is_the_mean_over_windows(size, protocol):
    """The formula of the paper (Wang et al., Eq. 13), window by window."""
    first, second = noise(*size), (noise(*size) // 2 + noise(*size, seed=1) // 2).astype(np.uint8)
    a, b = luma(first, protocol), luma(second, protocol)
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for y in range(size[0] - 10):
        for x in range(size[1] - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            covariance = (window * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + c1) * (2 * covariance + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert ssim(first, second, protocol) == pytest.approx(np.mean(values), abs=1e-10)


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
