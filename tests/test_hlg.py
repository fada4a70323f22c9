"""HLG to SDR: figures of the Recommendations, and colours whose way there and back is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from runtime.hlg import PEAK, WHITE, compressed, luminance, perceived, scene_light, to_sdr

BT709_TO_BT2020 = np.array(
    [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
)  # BT.2087, Table 1
BT2020_LUMINANCE = np.array([0.2627, 0.6780, 0.0593])


def hlg(light: np.ndarray) -> np.ndarray:
    """The signal, 16 bits, for which a display of 1000 cd/m2 shows this light of BT.709 in cd/m2 (BT.2100, Table 5)."""
    shown = BT709_TO_BT2020 @ light / 1000
    scene = shown * (BT2020_LUMINANCE @ shown) ** ((1 - 1.2) / 1.2) if shown.any() else shown

    def curve(e: float) -> float:
        return math.sqrt(3 * e) if e <= 1 / 12 else 0.17883277 * math.log(12 * e - 0.28466892) + 0.55991073

    return np.array([[[round(65535 * curve(max(e, 0))) for e in scene]]], np.uint16)


@pytest.mark.parametrize(("signal", "nits"), [(0, 0), (0.38, 26), (0.75, 203), (1, 1000)])
def test_levels_of_grey(signal, nits):
    """BT.2408, Table 1: black, the grey card, reference white and the peak, in cd/m2 on a display of 1000 cd/m2."""
    assert PEAK * scene_light(np.array(signal)) ** 1.2 == pytest.approx(nits, rel=0.03, abs=1e-6)


@pytest.mark.parametrize(
    ("nits", "scale"), [(0, 0), (26, 0.38), (100, 0.508), (203, 0.58), (1000, 0.7518), (10_000, 1)]
)
def test_perceived_luminance(nits, scale):
    """PQ, likewise and as tabulated with SMPTE ST 2084."""
    assert perceived(np.array(float(nits))) == pytest.approx(scale, abs=3e-3)
    assert luminance(perceived(np.array(float(nits)))) == pytest.approx(nits, abs=1e-6)


def test_compression():
    light = np.linspace(0, PEAK, 2001)
    result = compressed(light)
    assert (np.diff(result) > 0).all()
    assert (np.diff(result) <= np.diff(light) + 1e-9).all()
    np.testing.assert_allclose(result[light <= 85], light[light <= 85], atol=1e-9)
    assert result[-1] == pytest.approx(WHITE)
    assert 0.75 * WHITE < compressed(np.array(WHITE)) < 0.8 * WHITE


def test_grey_stays_grey_and_in_order():
    ramp = np.linspace(0, 65535, 4096).astype(np.uint16)
    result = to_sdr(np.repeat(ramp[:, None], 3, 1)[None])
    assert result.dtype == np.uint8
    assert np.abs(result.astype(int) - result[..., :1]).max() <= 1
    assert (np.diff(result[0, :, 1].astype(int)) >= 0).all()
    assert (result[0, 0] == 0).all()
    assert (result[0, -1] == 255).all()


@pytest.mark.parametrize(
    "light",
    [(0, 0, 0), (90, 90, 90), (20, 20, 20), (1, 1, 1), (90, 0, 0), (0, 90, 0), (0, 0, 90), (60, 30, 5), (5, 40, 80)],
)
def test_what_sdr_shows_alike_stays_alike(light):
    """Colours of BT.709 below the knee: SDR's code is that of the same light."""
    expected = [255 * (channel / WHITE) ** (1 / 2.4) for channel in light]
    found = to_sdr(hlg(np.array(light, float)))[0, 0].astype(float)
    for channel, wanted in zip(found, expected, strict=True):
        if wanted > 20:
            assert channel == pytest.approx(wanted, abs=1.5)
        else:  # a curve as steep as that makes much of the rounding of the matrix
            assert channel <= 20


def test_highlights_keep_their_hue():
    found = to_sdr(hlg(np.array([800.0, 400, 80])))[0, 0] / 255.0
    light = WHITE * found**2.4
    assert found[0] > 0.97
    np.testing.assert_allclose(light[1:] / light[0], [0.5, 0.1], rtol=0.03)
    assert (to_sdr(np.full((2, 3, 3), 65535, np.uint16)) == 255).all()
