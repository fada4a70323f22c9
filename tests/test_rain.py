"""Rendered rain is the additive rain of the benchmarks, the same from the same seed, stronger where asked to be."""

from __future__ import annotations

import runpy
import sys
from functools import partial

import numpy as np
import pytest
from PIL import Image

from drsformer.data import find_pairs
from drsformer.patches import TURNED_FRACTION
from drsformer.rendering import (
    BRIGHTEST_LEVEL,
    add_rain,
    cut_streaks,
    draw_dense_streaks,
    draw_streaks,
    make_layer,
    rain_of_pair,
    render_folder,
    turn,
)
from runtime.errors import InputError, InvalidImage
from runtime.images import Photo


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("size", [(1, 1), (7, 33), (64, 64)])
def test_drawn_streaks_are_a_layer(size):
    layer = draw_streaks(generator(), *size)
    assert layer.shape == size
    assert layer.dtype == np.float32
    assert layer.min() > -1e-3
    assert layer.max() <= 220.001


def test_drawn_streaks_differ_in_direction_and_amount():
    """The direction in which a layer changes least is that of its streaks."""
    angles, covered = [], []
    for seed in range(30):
        dy, dx = np.gradient(draw_streaks(generator(seed), 96, 96))
        angles.append(0.5 * np.arctan2(2 * (dx * dy).mean(), (dx**2 - dy**2).mean()))
        covered.append((np.hypot(dx, dy) > 1).mean())
    assert np.std(angles) > 0.1
    assert min(covered) > 0
    assert max(covered) > 3 * min(covered)


def slant_of(layer: np.ndarray) -> float:
    """Degrees from the vertical of the direction in which a layer changes least; smoothed first, since the gradient of
    streaks that are thinner than a pixel leans towards 45 degrees."""
    for _ in range(3):
        layer = (layer[2:] + layer[1:-1] + layer[:-2]) / 3
        layer = (layer[:, 2:] + layer[:, 1:-1] + layer[:, :-2]) / 3
    dy, dx = np.gradient(layer)
    return abs(float(np.degrees(0.5 * np.arctan2(2 * (dx * dy).mean(), (dx**2 - dy**2).mean()))))


@pytest.mark.parametrize("slant", [0, 30, 45, 60])
def test_drawn_streaks_have_the_slant_that_is_asked_for(slant):
    found = [slant_of(draw_streaks(generator(seed), 128, 128, slant)) for seed in range(5)]
    assert np.allclose(found, slant, atol=3)


def test_a_fair_share_of_the_rendered_layers_falls_steeply():
    """Of upright streaks, such as those of the pairs, as many as `patches` turns."""
    bars = partial(cut_streaks, [np.tile(np.uint8([200, 200, 0, 0, 0, 0, 0, 0]), (8, 1))])
    layers = [make_layer(generator(seed), 48, 48, [bars], 0.0, turned=TURNED_FRACTION) for seed in range(400)]
    slants = np.array([slant_of(layer) for layer in layers])
    assert 0.08 < (slants > 45).mean() < 0.2
    assert 0.4 < (slants < 5).mean() < 0.7


def test_turned_layers_are_scaled():
    """Waves with a period of 8 pixels get one between 0.7 and 1.5 of that."""
    waves = lambda rng, height, width: np.float32(np.sin(np.arange(width) * np.pi / 4)) * np.ones((height, 1), "f4")  # noqa: E731
    periods = []
    for seed in range(60):
        spectrum = np.abs(np.fft.fft2(turn(generator(seed), waves, 64, 64)))
        y, x = np.unravel_index(spectrum[:, :33].argmax(), (64, 33))
        periods.append(64 / np.hypot(min(y, 64 - y), x))
    assert 5 < min(periods) < 6.5
    assert 10 < max(periods) < 13.5


def test_dense_streaks_are_denser_and_fall_in_one_direction():
    dense, drawn = (
        np.mean([source(generator(seed), 96, 96).mean() for seed in range(20)])
        for source in (draw_dense_streaks, draw_streaks)
    )
    assert dense > 4 * drawn
    layer = draw_dense_streaks(generator(3), 96, 96)
    assert (layer.shape, layer.dtype) == ((96, 96), np.float32)


def test_rain_is_rounded_and_cut_off_at_white():
    clean = np.array([[[10, 100, 250]]], np.uint8)
    assert add_rain(clean, np.array([[5.6]], np.float32)).tolist() == [[[16, 106, 255]]]


def test_streaks_are_flipped_both_ways():
    source = np.arange(4, dtype=np.uint8).reshape(2, 2)
    corners = {cut_streaks([source], generator(seed), 2, 2)[0, 0] for seed in range(40)}
    assert corners == {0, 1, 2, 3}


def test_drawn_streaks_are_longer_than_they_are_wide():
    """Neighbours down a near-vertical streak are more alike than neighbours across it."""
    along, across = [], []
    for seed in range(20):
        layer = draw_streaks(generator(seed), 96, 96)
        along.append(np.abs(np.diff(layer, axis=0)).mean())
        across.append(np.abs(np.diff(layer, axis=1)).mean())
    assert np.mean(along) < 0.6 * np.mean(across)


def test_same_seed_same_rain_other_seed_other_rain():
    one, two, three = (make_layer(generator(seed), 32, 40, [draw_streaks]) for seed in (5, 5, 6))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, three)


def test_strength_goes_from_light_to_heavy_and_leaves_something_to_see():
    means = [
        np.mean([make_layer(generator(i), 64, 64, [draw_streaks], s).mean() for i in range(40)]) for s in (0, 0.5, 1)
    ]
    assert means[0] * 1.5 < means[1] < means[2] / 1.3
    flood = partial(cut_streaks, [np.full((9, 9), 255, np.uint8)])
    assert make_layer(generator(), 20, 20, [flood], 1.0).mean() == pytest.approx(BRIGHTEST_LEVEL, rel=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (7, 33), (64, 64)])
def test_turned_layers_reach_the_corners(size):
    flood = partial(cut_streaks, [np.full((9, 9), 200, np.uint8)])
    for seed in range(20):
        layer = turn(generator(seed), flood, *size)
        assert (layer.shape, layer.dtype) == (size, np.float32)
        assert np.allclose(layer, 200, atol=1e-3)


def test_some_layers_of_upright_streaks_are_slanted():
    """The streaks here are vertical bars; they keep their brightness and lean to both sides."""
    bars = partial(cut_streaks, [np.tile(np.uint8([200, 200, 0, 0, 0, 0, 0, 0]), (8, 1))])
    angles = []
    for seed in range(200):
        layer = make_layer(generator(seed), 48, 48, [bars], 0.0, turned=0.25)
        dy, dx = np.gradient(layer)
        angles.append(np.degrees(0.5 * np.arctan2(2 * (dx * dy).mean(), (dx**2 - dy**2).mean())))
    slanted = np.abs(angles) > 5
    assert 0.15 < slanted.mean() < 0.35
    assert min(angles) < -35
    assert max(angles) > 35


def test_rain_of_a_pair_is_what_was_added_where_white_did_not_cut_it_off():
    clean = generator(1).integers(0, 120, (30, 20, 3), dtype=np.uint8)
    layer = np.rint(draw_streaks(generator(2), 30, 20)).clip(0, 130)
    assert np.array_equal(rain_of_pair(add_rain(clean, layer), clean), layer)
    white = np.full((4, 4, 3), 255, np.uint8)
    assert rain_of_pair(add_rain(white, np.full((4, 4), 50.0, np.float32)), white).max() == 0


def test_small_layers_are_repeated():
    layer = cut_streaks([np.arange(6, dtype=np.uint8).reshape(2, 3)], generator(), 5, 11)
    assert layer.shape == (5, 11)
    assert set(np.unique(layer)) == set(range(6))


def test_folder_is_rendered_into_a_data_set(tmp_path):
    (tmp_path / "clean").mkdir()
    for i in range(3):
        Image.fromarray(np.full((20, 30 + i, 3), 60, np.uint8)).save(tmp_path / "clean" / f"{i}.png")
    for name in ("a", "b"):
        assert render_folder(tmp_path / "clean", tmp_path / name, strength=0.7, seed=4) == 3
    pairs = find_pairs(tmp_path / "a")
    assert [pair.name for pair in pairs] == ["0", "1", "2"]
    rainy, clean = pairs[1].load()
    assert clean.shape == (20, 31, 3)
    assert (clean == 60).all()
    assert (rainy >= clean).all()
    assert rainy.mean() > clean.mean() + 1
    again = find_pairs(tmp_path / "b")[1].load()[0]
    assert np.array_equal(rainy, again)
    with pytest.raises(InputError, match="0 to 1"):
        render_folder(tmp_path / "clean", tmp_path / "c", strength=1.5)
    with pytest.raises(InputError, match="`seed`: expected at least 0, found -1"):
        render_folder(tmp_path / "clean", tmp_path / "c", seed=-1)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "clean" / "0.jpg")
    with pytest.raises(InputError, match="suffix"):
        render_folder(tmp_path / "clean", tmp_path / "c")
    (tmp_path / "empty").mkdir()
    for folders in ({"clean": tmp_path / "empty"}, {"clean": tmp_path / "clean", "streaks": tmp_path / "empty"}):
        with pytest.raises(InputError, match="found none"):
            render_folder(output=tmp_path / "c", **folders)


def test_command_renders_as_the_function_does(tmp_path, monkeypatch, capsys):
    (tmp_path / "clean").mkdir()
    Image.fromarray(np.full((20, 30, 3), 60, np.uint8)).save(tmp_path / "clean" / "0.png")
    told = []
    render_folder(tmp_path / "clean", tmp_path / "a", 0.7, seed=4, on_progress=lambda *progress: told.append(progress))
    assert told == [("Rendering rain", 0, 1), ("Rendering rain", 1, 1)]
    assert not any(capsys.readouterr())
    options = [str(tmp_path / "clean"), str(tmp_path / "b"), "--strength", "0.7", "--seed", "4"]
    monkeypatch.setattr(sys, "argv", ["rain", *options])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("drsformer.rain", run_name="__main__", alter_sys=True)
    assert stop.value.code == 0
    assert capsys.readouterr().out == '{"images": 1}\n'
    one, two = ((tmp_path / name / "input" / "0.png").read_bytes() for name in ("a", "b"))
    assert one == two


@pytest.mark.parametrize("kind", ["input", "target"])
def test_pairs_that_the_photographs_belong_to_are_left_alone(tmp_path, kind):
    for i, folder in enumerate(("input", "target")):
        (tmp_path / "train" / folder).mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), 60 + i, np.uint8)).save(tmp_path / "train" / folder / "0.png")
    (tmp_path / "link").symlink_to(tmp_path / "train" / kind)
    for clean in (tmp_path / "train" / kind, tmp_path / "link"):
        with pytest.raises(InputError, match=f"train: expected another folder .* found them in .*{kind}"):
            render_folder(clean, tmp_path / "train")
    for i, folder in enumerate(("input", "target")):
        assert (np.asarray(Image.open(tmp_path / "train" / folder / "0.png")) == 60 + i).all()


def test_half_a_data_set_or_two_in_one_are_not_left(tmp_path):
    for name in ("a", "c"):
        Photo(np.full((8, 8, 3), 60, np.uint8)).save(tmp_path / name / f"{name}.png")
    (tmp_path / "a" / "b.png").write_text("none")
    with pytest.raises(InvalidImage, match=r"b\.png"):
        render_folder(tmp_path / "a", tmp_path / "rainy")
    assert not [path for path in (tmp_path / "rainy").rglob("*") if path.is_file()]
    (tmp_path / "a" / "b.png").unlink()
    render_folder(tmp_path / "a", tmp_path / "rainy")
    render_folder(tmp_path / "a", tmp_path / "rainy", seed=1)  # the same photographs once more
    with pytest.raises(
        InputError, match=r"rainy: expected a folder without other pairs, found a\.png; name a new folder"
    ):
        render_folder(tmp_path / "c", tmp_path / "rainy")


def test_rain_of_the_real_pairs_is_grey_and_additive(real_data):
    """What the rendering model rests on: the rain of the pairs is the same on all channels that are not cut off."""
    for folder in ("rain100l/train", "rain200h/train"):
        for pair in find_pairs(real_data / folder)[:5]:
            rainy, clean = pair.load()
            assert np.array_equal(add_rain(clean, rain_of_pair(rainy, clean).astype(np.float32)), rainy)
