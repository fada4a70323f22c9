"""PSNR and SSIM as the paper reports them: on luma (Y of YCbCr), by one of two protocols.

The paper's numbers come from two MATLAB scripts that differ, so a number means something only with its protocol beside
it:

- `rain200`, for Rain200L, Rain200H and SPA-Data: Y is rounded to whole numbers before anything is measured.
- `did`, for DID-Data and DDN-Data: Y stays as computed, and SSIM is taken of a smaller copy of large images, from 384
  pixels of the shorter side on (see `ssim`).

Both take Y in the studio range of BT.601 (16 to 235) and 255 as the peak, PSNR on the whole image and SSIM where its
window lies inside the image. Written in plain numpy, without SciPy or scikit-image: a Gaussian filter is all that is
missing, and those libraries have other windows, borders and peaks by default.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from runtime.pixels import psnr as psnr_of_levels

Protocol = Literal["rain200", "did"]
"""Protocol of the paper; see above."""

PERFECT_DB = 100.0
"""PSNR in dB that counts, where PSNRs are added up, for an image restored without any error."""

PEAK_LEVEL = 255
"""Largest value of a pixel, the peak of PSNR and SSIM."""

WINDOW = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
WINDOW /= WINDOW.sum()
"""The Gaussian window of SSIM along one axis: 11 samples, standard deviation 1.5. The 11x11 window is its square."""


def psnr(restored: NDArray[np.uint8], target: NDArray[np.uint8], protocol: Protocol = "rain200") -> float:
    """Peak signal-to-noise ratio on luma.

    Args:
        restored: uint8 (H, W, 3) RGB.
        target: The same.
        protocol: How luma is rounded.

    Returns:
        dB; inf where the luma is equal.

    Raises:
        ValueError: An image is of another type, or their shapes differ.
    """
    _check(restored, target)
    return psnr_of_levels(luma(restored, protocol), luma(target, protocol))


def psnr_rgb(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio over all three channels.

    How far two outputs are apart, such as those of a network and of its exported form; no protocol of the paper.

    Args:
        first: uint8 (H, W, 3) RGB.
        second: The same.

    Returns:
        dB; inf where the images are equal.

    Raises:
        ValueError: An image is of another type, or their shapes differ.
    """
    _check(first, second)
    return psnr_of_levels(first, second)


def ssim(restored: NDArray[np.uint8], target: NDArray[np.uint8], protocol: Protocol = "rain200") -> float:
    """Structural similarity on luma (Wang et al., IEEE TIP 2004).

    By `did`, as in Wang's script of 2009, images are first brought near 256 pixels of their shorter side: both are
    averaged over f x f pixels, and of these means every f-th is taken, with f that side / 256, rounded, halves up.

    Args:
        restored: uint8 (H, W, 3) RGB of at least 11x11 pixels: SSIM is the mean over all places of an 11x11 window
            inside the image, so for less it is not defined.
        target: The same.
        protocol: How luma is rounded, and whether large images are made smaller.

    Returns:
        At most 1, which equal images have.

    Raises:
        ValueError: An image is of another type or too small, or their shapes differ.
    """
    _check(restored, target)
    if min(target.shape[:2]) < len(WINDOW):
        raise ValueError(
            f"SSIM needs at least {len(WINDOW)}x{len(WINDOW)} pixels, found {target.shape[1]}x{target.shape[0]}"
        )
    c1, c2 = (0.01 * PEAK_LEVEL) ** 2, (0.03 * PEAK_LEVEL) ** 2
    a, b = luma(restored, protocol), luma(target, protocol)
    if protocol == "did":
        factor = max(1, (min(a.shape) + 128) // 256)
        a, b = _decimated(a, factor), _decimated(b, factor)
    mean_a, mean_b, mean_aa, mean_bb, mean_ab = _filter(np.stack([a, b, a * a, b * b, a * b]))
    variances = mean_aa - mean_a**2 + mean_bb - mean_b**2
    covariance = mean_ab - mean_a * mean_b
    structure = (2 * covariance + c2) / (variances + c2)
    brightness = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return float(np.mean(brightness * structure))


def luma(image: NDArray[np.uint8], protocol: Protocol = "rain200") -> NDArray[np.float64]:
    """Y of BT.601 in its studio range, as MATLAB's rgb2ycbcr computes it.

    The weights have three decimals, so the sum is exact in whole numbers, and so are the halves that get rounded up.

    Args:
        image: uint8 (H, W, 3) RGB.
        protocol: Whether to round to whole numbers: rain200 does, did does not.

    Returns:
        float64 (H, W), 16 to 235.

    Raises:
        ValueError: There is no such protocol.
    """
    if protocol not in get_args(Protocol):
        raise ValueError(f"unknown protocol {protocol!r}; known: {', '.join(get_args(Protocol))}")
    weighted = image @ np.array([65_481, 128_553, 24_966])  # 255 * 1000 times what is added to 16
    return 16 + ((weighted + 127_500) // 255_000 if protocol == "rain200" else weighted / 255_000).astype(np.float64)


def lost_db(before: float, after: float) -> float:
    """PSNR in dB that an image loses, negative where it gains, from its PSNR before and after. One that is without any
    error afterwards loses nothing: an infinite gain would hide what all others lose."""
    return 0.0 if after in (before, math.inf) else before - after


def mean_gain(psnrs: Iterable[tuple[float, float]]) -> float:
    """By how much a network makes images better.

    Args:
        psnrs: For each image the PSNR of what the network restores and that of the rainy input, in dB.

    Returns:
        dB, the mean over the images whose input differs from its target, since nothing is to be gained in the others; 0
        where there is none. What is restored without any error counts as `PERFECT_DB`.
    """
    gains = [min(restored, PERFECT_DB) - rainy for restored, rainy in psnrs if rainy != math.inf]
    return float(np.mean(gains)) if gains else 0.0


def shortfall(who: str, gain_db: float, origin: str | None = None) -> str:
    """The warning, in one line, that a network does harm.

    Args:
        who: What it is called.
        gain_db: Its `mean_gain`, below 0.
        origin: What it was trained on, as `drsformer.checkpoint.Checkpoint.origin` says it, where the weights may be
            the cause.
    """
    cause = f"; wrong weights for the data are a common cause, and these are {origin}" if origin else ""
    return f"{who} makes the images worse: its PSNR is {-gain_db:.3g} dB below that of the rainy input{cause}."


@dataclass(frozen=True)
class Scores:
    """What was measured on some images.

    Attributes:
        rows: For each image, by its name, its metrics by their names: PSNR in dB, SSIM at most 1.
        protocol: Protocol of its PSNR and SSIM, if it has them.
    """

    rows: dict[str, dict[str, float]]
    protocol: Protocol | None = None

    @property
    def psnr(self) -> float:
        """Mean PSNR in dB."""
        return self.mean("psnr")

    @property
    def ssim(self) -> float:
        """Mean SSIM."""
        return self.mean("ssim")

    @property
    def gain_db(self) -> float | None:
        """By how much the images got better, see `mean_gain`; None where the input was not measured."""
        if "input_psnr" not in self.columns:
            return None
        return mean_gain((row["psnr"], row["input_psnr"]) for row in self.rows.values())

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        """The names of the metrics."""
        return list(next(iter(self.rows.values())))

    def mean(self, metric: str) -> float:
        """Mean over the images for which a metric is not infinite; inf where there is none."""
        finite = [row[metric] for row in self.rows.values() if row[metric] != math.inf]
        return float(np.mean(finite)) if finite else math.inf

    def summary(self) -> dict[str, Any]:
        """The means and the number of images, for JSON: a mean that is not finite is None."""
        means = {metric: self.mean(metric) for metric in self.columns}
        summary: dict[str, Any] = {k: round(mean, 6) if math.isfinite(mean) else None for k, mean in means.items()}
        summary["images"] = self.images
        if self.protocol:
            summary["identical"] = sum(row["psnr"] == math.inf for row in self.rows.values())
            summary["protocol"] = self.protocol
        return summary


def _decimated(image: NDArray[np.float64], factor: int) -> NDArray[np.float64]:
    """Means over factor x factor pixels, at every factor-th pixel: MATLAB's imfilter(image, means, "symmetric"), then
    (1:f:end, 1:f:end). An even window has its centre at the first of its two middle pixels."""
    before, after = (factor - 1) // 2, factor // 2
    windows = sliding_window_view(np.pad(image, (before, after), "symmetric"), (factor, factor))
    return windows[::factor, ::factor].mean((2, 3))


def _filter(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian-weighted means where the window lies inside the image. (N, H, W) -> (N, H - 10, W - 10)."""
    columns = sliding_window_view(images, len(WINDOW), axis=1) @ WINDOW
    return sliding_window_view(columns, len(WINDOW), axis=2) @ WINDOW


def _check(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> None:
    for image in (a, b):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected uint8 (H, W, 3) RGB images, found {image.dtype} {image.shape}")
    if a.shape != b.shape:
        raise ValueError(
            f"expected images of equal size, found {a.shape[1]}x{a.shape[0]} and {b.shape[1]}x{b.shape[0]}"
        )
