"""The service in docs/serving.md, as it stands there."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from fastapi.testclient import TestClient

import runtime
from runtime import Derainer, DeviceError, OutOfMemory
from runtime.images import Photo, decode
from tests.support.images import random_image

DOCS = Path(__file__).parents[1] / "docs" / "serving.md"


@pytest.fixture
def service(monkeypatch) -> ModuleType:
    """The module that a reader would make of the page."""
    monkeypatch.setitem(sys.modules, "derainer", runtime)  # by the name that its distribution gives it
    monkeypatch.setitem(sys.modules, "derainer.images", importlib.import_module("runtime.images"))
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL) if "FastAPI" in block)
    module = ModuleType("service")
    exec(compile(code, str(DOCS), "exec"), module.__dict__)
    return module


def test_images_come_back_restored(service):
    image = random_image(40, 56)
    with TestClient(service.app) as client:
        assert client.get("/health").json() == {"version": runtime.__version__, "provider": "cpu"}
        answer = client.post("/derain", content=Photo(image).encode("png"))
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
        np.testing.assert_array_equal(decode(answer.content).rgb, Derainer(tile=(1024, 1024))(image))
        assert 'derainer_images_total{result="restored"} 1' in client.get("/metrics").text


@pytest.mark.parametrize("content", [b"", b"<html>", Photo(random_image(40, 56)).encode("png")[:2000]])
def test_a_bad_upload_is_the_callers(service, content):
    with TestClient(service.app) as client:
        answer = client.post("/derain", content=content)
        assert answer.status_code == 422
        assert answer.text.startswith("upload: ")
        assert 'result="refused"} 1' in client.get("/metrics").text


@pytest.mark.parametrize(("error", "status"), [(OutOfMemory("full"), 503), (DeviceError("lost"), 500)])
def test_a_fault_of_the_machine_is_not(service, error, status):
    def fail(image):
        raise error

    with TestClient(service.app) as client:
        service.app.state.derain = fail
        answer = client.post("/derain", content=Photo(np.zeros((9, 9, 3), np.uint8)).encode("png"))
        assert (answer.status_code, answer.text) == (status, str(error))


def test_long_uploads_are_cut_off(service):
    service.LONGEST = 100
    with TestClient(service.app) as client:
        assert client.post("/derain", content=bytes(101)).status_code == 413
