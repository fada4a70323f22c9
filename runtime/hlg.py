"""HDR by hybrid log-gamma, as phones film it, shown on SDR.

    rgb = to_sdr(signal)

In three steps, each by its Recommendation: the light of a display of 1000 cd/m2 (ITU-R BT.2100), its range compressed
to that of SDR (BT.2390, section 5.4), and BT.709's colours by BT.1886's curve. SDR's white is taken for 203 cd/m2,
HDR's reference white by BT.2408, so the middle tones keep their brightness and the highlights are compressed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PEAK, WHITE = 1000.0, 203.0
"""Luminance of the display for which HLG is decoded, and of SDR's white, in cd/m2."""

SYSTEM_GAMMA = 1.2
"""HLG's for a display of `PEAK` (BT.2100, Table 5)."""

DISPLAY_GAMMA = 2.4
"""SDR's (BT.1886)."""

LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)
"""Weights of BT.2020's red, green and blue."""

TO_BT709 = np.array(
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]], np.float32
)
"""Linear RGB by BT.2020's primaries into that by BT.709's (BT.2087)."""

STEPS = 65_536
"""Of the tables that stand for the curves."""


def scene_light(signal: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of HLG's curve: signal, 0 to 1, to light in the scene, 0 to 1 (BT.2100, Table 5)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def perceived(luminance: NDArray[np.float64]) -> NDArray[np.float64]:
    """PQ: cd/m2 to a scale, 0 to 1, that is even to the eye (BT.2100, Table 4)."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = (luminance / 10_000) ** m1
    return ((c1 + c2 * power) / (1 + c3 * power)) ** m2


def luminance(perceived: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of `perceived`."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = perceived ** (1 / m2)
    return 10_000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


def compressed(light: NDArray[np.float64]) -> NDArray[np.float64]:
    """Luminance of 0 to `PEAK` cd/m2 to 0 to `WHITE`: unchanged up to a knee, then by a spline (BT.2390, 5.4.1)."""
    whole = perceived(np.array(PEAK))
    x, top = perceived(light) / whole, perceived(np.array(WHITE)) / whole
    knee = 1.5 * top - 0.5
    t = (x - knee) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * top
    return luminance(np.where(x < knee, x, spline) * whole)


SCENE = scene_light(np.linspace(0, 1, STEPS)).astype(np.float32)
"""Light in the scene by the signal."""

SHOWN = np.linspace(0, PEAK, STEPS)
GAIN = np.append(1.0, compressed(SHOWN[1:]) / SHOWN[1:]).astype(np.float32)
"""What the compression multiplies a colour by, by the largest of its red, green and blue as `PEAK` shows them."""


def to_sdr(signal: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """HLG to SDR.

    Args:
        signal: (H, W, 3) red, green and blue of BT.2020 by HLG's curve, in full range.

    Returns:
        (H, W, 3) red, green and blue of BT.709.
    """
    scene = SCENE[signal]
    shown = PEAK * scene * (scene @ LUMINANCE)[..., None] ** (SYSTEM_GAMMA - 1)
    shown = np.clip(shown @ TO_BT709.T, 0, PEAK)
    largest = np.rint(shown.max(-1, keepdims=True) * ((STEPS - 1) / PEAK)).astype(np.uint16)
    light = np.minimum(shown * GAIN[largest] / WHITE, 1)
    return np.rint(255 * light ** (1 / DISPLAY_GAMMA)).astype(np.uint8)
