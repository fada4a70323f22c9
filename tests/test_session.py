"""The image contract, against a second, slow reading of it."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from runtime import Derainer, InputError, InvalidImage
from runtime.errors import InvalidModel, OutOfMemory
from runtime.footprint import Footprint
from runtime.pixels import ROWS, to_batch, to_image
from runtime.session import BATCH, IMAGE_BYTES
from tests.support.images import random_image
from tests.support.onnx_files import UINT8, write_network


class Network:
    """A session in NumPy. Its answer leaves [0, 1] and depends on the mean, so that padding matters."""

    def __init__(self, multiple=8, least=(1, 1)):
        self.multiple = multiple
        self.limits = [(least, (sys.maxsize, sys.maxsize))]
        self.shapes = []

    def run(self, batch):
        assert batch.dtype == np.float32
        self.shapes.append(batch.shape)
        return batch * np.float32(1.5) - batch.mean(dtype=np.float32) * np.float32(0.4)


class Constant:
    multiple = 1

    def __init__(self, value):
        self.value = value

    def run(self, batch):
        return np.full_like(batch, self.value)


def mirrored(index, length, padding):
    """The pixel that stands at `index` once an axis is padded."""
    if index < length:
        return index
    return 2 * (length - 1) - index if length > padding else length - 1


def reference(network, image):
    """The contract, pixel by pixel."""
    H, W, _ = image.shape
    bottom, right = (
        max(-length % network.multiple, least - length)
        for length, least in zip((H, W), network.limits[0][0], strict=True)
    )
    batch = np.empty((1, 3, H + bottom, W + right), np.float32)
    for _, c, y, x in np.ndindex(batch.shape):
        batch[0, c, y, x] = np.float32(image[mirrored(y, H, bottom), mirrored(x, W, right), c]) / np.float32(255)
    restored = network.run(batch)
    result = np.empty_like(image)
    for y, x, c in np.ndindex(image.shape):
        value = min(max(restored[0, c, y, x], np.float32(0)), np.float32(1))
        result[y, x, c] = round(float(value * np.float32(255)))  # Python rounds half to even
    return result


@pytest.mark.parametrize("multiple", [1, 4, 8])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 5), (4, 5), (7, 9), (8, 8), (17, 33)])
def test_follows_the_contract(size, multiple):
    image = random_image(*size)
    before = image.copy()
    restored = Derainer(Network(multiple))(image)
    expected = reference(Network(multiple), image)
    assert restored.dtype == np.uint8
    np.testing.assert_array_equal(restored, expected)
    np.testing.assert_array_equal(image, before)
    assert expected.min() == 0 or expected.max() == 255 or image.size < 10  # clamping was exercised


def test_pads_right_and_bottom_by_reflection():
    rows = np.arange(5, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 3), np.uint8)
    seen = []

    class Spy(Network):
        def run(self, batch):
            seen.append(np.rint(batch[0, 0, :, 0] * 255))
            return batch

    Derainer(Spy())(rows)
    np.testing.assert_array_equal(seen[0], [0, 1, 2, 3, 4, 3, 2, 1])
    Derainer(Spy())(rows[:3])  # too short to reflect
    np.testing.assert_array_equal(seen[1], [0, 1, 2, 2, 2, 2, 2, 2])


def test_session_gets_a_multiple_and_no_more():
    network = Network(8)
    Derainer(network)(random_image(16, 17))
    assert network.shapes == [(1, 3, 16, 24)]


@pytest.mark.parametrize("size", [(1, 1), (20, 20), (40, 41), (23, 70), (70, 90)])
def test_what_is_smaller_than_the_limits_is_padded_up_to_them(size):
    network = Network(8, least=(48, 64))
    image = random_image(*size)
    np.testing.assert_array_equal(Derainer(network)(image), reference(Network(8, least=(48, 64)), image))
    height, width = network.shapes[0][2:]
    assert (height, width) == (max(48, size[0] + -size[0] % 8), max(64, size[1] + -size[1] % 8))


def test_every_level_survives():
    levels = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)

    class Identity(Network):
        def run(self, batch):
            return batch

    np.testing.assert_array_equal(Derainer(Identity())(levels), levels)


def test_rounds_half_to_even():
    halves = [k for k in range(255) if np.float32((k + 0.5) / 255) * np.float32(255) == k + 0.5]
    assert {k % 2 for k in halves} == {0, 1}
    for k in halves:
        restored = Derainer(Constant(np.float32((k + 0.5) / 255)))(random_image(1, 1))
        assert set(restored.ravel()) == {k + k % 2}


def test_takes_views():
    image = random_image(20, 30)
    view = image[::-1, ::2]
    view.setflags(write=False)
    np.testing.assert_array_equal(Derainer(Network())(view), Derainer(Network())(view.copy()))


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (np.zeros((4, 4, 3), np.float32), "float32 (4, 4, 3)"),
        (np.zeros((4, 4), np.uint8), "uint8 (4, 4)"),
        (np.zeros((4, 4, 4), np.uint8), "uint8 (4, 4, 4)"),
        (np.zeros((1, 3, 8, 8), np.uint8), "uint8 (1, 3, 8, 8)"),
        (np.zeros((0, 4, 3), np.uint8), "(0, 4, 3)"),
        ([[0, 0, 0]], "list"),
        (None, "NoneType"),
    ],
)
def test_refuses_other_arrays(image, found):
    with pytest.raises(InputError) as error:
        Derainer(Network())(image)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_refuses_a_network_that_fails(value):
    with pytest.raises(InputError, match="NaN or infinity"):
        Derainer(Constant(value))(random_image(2, 2))


@pytest.mark.parametrize("tile", [None, (8, 8)])
def test_threads_may_share_one(tile):
    images = [random_image(9, 5 + seed, seed) for seed in range(12)]
    derain = Derainer(Network(), tile=tile)
    with ThreadPoolExecutor(4) as pool:
        restored = list(pool.map(derain, images))
    for image, result in zip(images, restored, strict=True):
        np.testing.assert_array_equal(result, Derainer(Network(), tile=tile)(image))


def test_warm_up_runs_every_size():
    network = Network()
    Derainer(network).warm_up([(9, 16), (32, 8)])
    assert network.shapes == [(1, 3, 16, 16), (1, 3, 32, 8)]


def test_a_closed_one_holds_nothing_and_runs_nothing(tmp_path):
    image = np.full((8, 8, 3), 100, np.uint8)
    with Derainer(write_network(tmp_path / "model.onnx"), "cpu") as derain:
        assert (derain(image) == 50).all()
    with pytest.raises(RuntimeError, match="closed"):
        derain(image)
    Derainer(Network()).close()  # a session without anything to free


def test_bytes_go_straight_into_a_graph_of_images(tmp_path, monkeypatch):
    """They are the same as by way of float32, for whole images and in tiles."""
    derain = Derainer(write_network(tmp_path / "model.onnx", 0.7, UINT8, metadata={}), "cpu")
    image = np.random.default_rng(0).integers(0, 256, (71, 93, 3), dtype=np.uint8)
    slow = derain.session.run(to_batch(image))
    told = []
    monkeypatch.setattr(derain.session, "run", lambda batch: pytest.fail("went through float32"))
    straight = derain(image, lambda *step: told.append(step))
    np.testing.assert_array_equal(straight, to_image(slow))
    assert straight.flags.c_contiguous
    assert told == [(1, 1)]


def test_rows_are_converted_in_blocks_of_any_height():
    for H in (1, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + 7):
        levels = np.random.default_rng(H).uniform(-0.2, 1.2, (1, 3, H, 5)).astype(np.float32)
        expected = np.rint(levels[0].clip(0, 1) * np.float32(255)).astype(np.uint8).transpose(1, 2, 0)
        np.testing.assert_array_equal(to_image(levels), expected)
    halves = np.array([0.5, 1.5, 2.5, 3.5], np.float32) / 255  # to the even level
    assert to_image(np.tile(halves, (1, 3, 1, 1)))[0, :, 0].tolist() == np.rint(halves * np.float32(255)).tolist()


def test_huge_finite_numbers_are_not_taken_for_infinity():
    assert (Derainer(Constant(3e38))(np.zeros((8, 8, 3), np.uint8)) == 255).all()


class Several(Network):
    """The same for many images at once; its answer to each depends on the mean of that alone."""

    def __init__(self, most, multiple=8):
        super().__init__(multiple)
        self.most = most

    def max_batch(self, size):
        return self.most

    def run(self, batch):
        self.shapes.append(batch.shape)
        answers = [Network(self.multiple).run(batch[i : i + 1]) for i in range(len(batch))]
        return np.concatenate(answers)


MIXED = ((9, 16), (33, 8), (16, 10), (11, 11), (9, 16), (16, 16), (33, 8))


@pytest.mark.parametrize(
    ("most", "batch", "runs"),
    [
        (1, None, [1] * 7),
        (3, None, [3, 2, 2]),
        (3, 2, [2, 2, 1, 2]),
        (sys.maxsize, None, [5, 2]),
        (sys.maxsize, 4, [4, 1, 2]),
    ],
)
def test_images_of_one_padded_size_go_together(most, batch, runs):
    session = Several(most)
    images = [random_image(*size, seed) for seed, size in enumerate(MIXED)]
    restored = Derainer(session, batch=batch).run_batch(images)
    assert [shape[0] for shape in session.shapes] == runs
    for found, image in zip(restored, images, strict=True):
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, reference(Network(8), image))


def test_any_number_is_no_more_than_eight():
    assert Derainer(Several(sys.maxsize)).batch_size(9, 9) == BATCH
    assert Derainer(Several(BATCH + 3)).batch_size(9, 9) == BATCH + 3
    assert Derainer(Network()).batch_size(9, 9) == 1
    with pytest.raises(InputError, match="`batch`: expected at least 1, found 0"):
        Derainer(Network(), batch=0)


def test_memory_bounds_how_many_go_together():
    """On a small machine: tiles where one does not fit, else as many as fit."""
    session = Several(sys.maxsize)
    session.footprint = Footprint(fixed=10**6, per_pixel=1000)
    for fitting in (1, 3):
        derain = Derainer(session, memory=10**6 + int(fitting * 64 * 64 * (1000 + IMAGE_BYTES) * 1.1))
        assert derain.batch_size(64, 64) == fitting
    assert derain.plan(128, 128).count > 1
    assert derain.batch_size(128, 128) == 1
    images = [random_image(64, 64, seed) for seed in range(4)]
    session.shapes.clear()
    derain.run_batch(images)
    assert [shape[0] for shape in session.shapes] == [3, 1]


def test_where_a_batch_exhausts_the_memory_its_images_go_alone():
    session = Several(3)
    run = session.run

    def small(batch):
        if len(batch) > 1:
            raise OutOfMemory("full")
        return run(batch)

    session.run = small
    images = [random_image(8, 8, seed) for seed in range(4)]
    for found, image in zip(Derainer(session).run_batch(images), images, strict=True):
        np.testing.assert_array_equal(found, reference(Network(8), image))

    def full(batch):
        raise OutOfMemory("full")

    session.run = full
    with pytest.raises(OutOfMemory):
        Derainer(session).run_batch(images)


def test_what_needs_tiles_goes_alone():
    session = Several(4)
    derain = Derainer(session, tile=(16, 16), overlap=8)
    images = [random_image(*size) for size in ((16, 9), (24, 16), (12, 16))]
    for found, image in zip(derain.run_batch(images), images, strict=True):
        np.testing.assert_array_equal(found, Derainer(Network(), tile=(16, 16), overlap=8)(image))
    assert [shape[0] for shape in session.shapes] == [2, 1, 1]


def test_a_batch_is_refused_as_its_images_are():
    session = Several(4)
    with pytest.raises(InvalidImage, match=r"found uint8 \(4, 4\)"):
        Derainer(session).run_batch([random_image(8, 8), np.zeros((4, 4), np.uint8)])
    assert session.shapes == []
    assert Derainer(session).run_batch([]) == []

    def fail_for_one(batch):
        batch[1, 0, 3, 3] = np.nan
        return batch

    session.run = fail_for_one
    with pytest.raises(InvalidModel, match="NaN or infinity"):
        Derainer(session).run_batch([random_image(8, 8)] * 2)


@pytest.mark.parametrize("images", [3, "B"])
def test_bytes_go_straight_into_a_graph_of_several_images(tmp_path, monkeypatch, images):
    """Of a fixed number too, which is filled up."""
    path = write_network(tmp_path / "model.onnx", 0.7, UINT8, shape=(images, "H", "W", 3), metadata={}, finite=True)
    derain = Derainer(path, "cpu")
    photos = [random_image(13, 21, seed) for seed in range(4)]
    expected = [to_image(derain.session.run(to_batch(photo))) for photo in photos]
    monkeypatch.setattr(derain.session, "run", lambda batch: pytest.fail("went through float32"))
    for found, image in zip((*derain.run_batch(photos), derain(photos[0])), (*expected, expected[0]), strict=True):
        np.testing.assert_array_equal(found, image)


def test_submitted_images_are_restored_in_turn():
    network = Network()
    images = [random_image(9 + i, 16) for i in range(4)]
    with Derainer(network) as derain:
        futures = [derain.submit(image) for image in images]
        refused = derain.submit(np.zeros((2, 2), np.uint8))
        for future, image in zip(futures, images, strict=True):
            np.testing.assert_array_equal(future.result(), derain(image))
        with pytest.raises(InvalidImage):
            refused.result()
    assert [shape[2] for shape in network.shapes[:4]] == [16, 16, 16, 16]
    with pytest.raises(RuntimeError, match="shutdown"):
        derain.submit(images[0])
