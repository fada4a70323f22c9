"""Errors that a program can tell apart by their class."""

from __future__ import annotations

import numpy as np
import pytest

from runtime import (
    CanaryError,
    Derainer,
    DerainError,
    DeviceError,
    GateError,
    InputError,
    InvalidImage,
    InvalidModel,
    MismatchError,
    OutOfMemory,
    UnprovenError,
    open_session,
)
from runtime.errors import device_error


class Answers:
    """A session that answers with what it is given, or raises it."""

    multiple = 1

    def __init__(self, answer):
        self._answer = answer

    def run(self, batch):
        if isinstance(self._answer, Exception):
            raise self._answer
        return np.full_like(batch, self._answer)


def test_kinds():
    assert [kind.__mro__[1] for kind in (InputError, DeviceError, GateError)] == [DerainError] * 3
    assert [kind.__mro__[1] for kind in (InvalidImage, InvalidModel)] == [InputError] * 2
    assert [kind.__mro__[1] for kind in (MismatchError, UnprovenError)] == [InvalidModel] * 2
    assert [kind.__mro__[1] for kind in (OutOfMemory, CanaryError)] == [DeviceError] * 2


@pytest.mark.parametrize(
    "image", [None, np.zeros((2, 2), np.uint8), np.zeros((2, 2, 3)), np.zeros((0, 2, 3), np.uint8)]
)
def test_a_bad_image_is_the_callers(image):
    with pytest.raises(InvalidImage, match="expected an"):
        Derainer(Answers(0))(image)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_answer_that_is_no_image_is_the_models(value):
    with pytest.raises(InvalidModel, match="NaN or infinity"):
        Derainer(Answers(value))(np.zeros((2, 2, 3), np.uint8))


def test_options_are_neither(tmp_path):
    for options in (dict(memory=1, tile=(8, 8)), dict(overlap=3), dict(tile=(0, 8))):
        with pytest.raises(InputError) as error:
            Derainer(Answers(0), **options)
        assert error.type is InputError
    with pytest.raises(InvalidModel, match="found nothing at"):
        open_session(tmp_path / "none.onnx")


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("Failed to allocate memory for requested buffer of size 4", OutOfMemory),
        ("std::bad_alloc", OutOfMemory),
        ("cudaErrorMemoryAllocation", OutOfMemory),
        ("CUDA_ERROR_OUT_OF_MEMORY", OutOfMemory),
        ("CUDNN_STATUS_EXECUTION_FAILED", DeviceError),
        ("cudaErrorIllegalAddress", DeviceError),
    ],
)
def test_want_of_memory_is_told_from_what_libraries_say(reason, kind):
    error = device_error("a.onnx failed", reason)
    assert type(error) is kind
    assert str(error).startswith(f"a.onnx failed: {reason}")
