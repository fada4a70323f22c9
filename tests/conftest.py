"""What all tests share: one thread, which is faster for small networks, Triton without a GPU, and the real data where
it is."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.browser import chromium

try:
    import torch
except ModuleNotFoundError:  # `make floors-test` has none, for the runtime's tests
    pass
else:
    torch.set_num_threads(1)
os.environ["TRITON_INTERPRET"] = "1"  # what export.fused defines runs without a GPU
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background of a shell start out without it

DATA = Path(os.environ.get("DRSFORMER_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with chromium() as browser:
        yield browser


@pytest.fixture
def real_data() -> Path:
    """The folder of real rain pairs; skips where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no rain data at {DATA}; set DRSFORMER_DATA to run this on real images")
    return DATA
