"""Honest measurement: contestants in turn, peak memory of a process of its own, and the facts of the machine."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from . import memory
from .errors import OutOfMemory
from .machine import nvidia, processor
from .progress import OnProgress, silent, track

MIN_ROUNDS = 11
"""The fewest, however long they take."""


def alternate(
    calls: Sequence[Callable[[], object]], seconds: float, rounds: int = MIN_ROUNDS, on_progress: OnProgress = silent
) -> NDArray[np.float64]:
    """Seconds of each of `calls` in each round -> float64 (calls, rounds), warm.

    In every round each is called once, in turn from the first and from the last. As many rounds as fit into `seconds`,
    by the warm-up's second calls, but at least `rounds`.
    """

    def timed(call: Callable[[], object]) -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    warm = [timed(call) for call in track([*calls, *calls], 2 * len(calls), "Warming up", on_progress)]
    rounds = max(rounds, int(seconds / sum(warm[len(calls) :])))
    taken = np.empty((len(calls), rounds))
    for i in track(range(rounds), rounds, "Timing", on_progress):
        for which in range(len(calls))[:: 1 if i % 2 == 0 else -1]:
            taken[which, i] = timed(calls[which])
    return taken


def peak_mib() -> int | None:
    """Of this process so far, see `runtime.memory.peak`."""
    found = memory.peak()
    return None if found is None else found // 2**20


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own. Raises OutOfMemory where that process dies."""
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool as error:
        raise OutOfMemory(
            "the process that measures memory was ended by the system, most often for want of memory; "
            "take smaller images or a smaller network"
        ) from error


def noise(height: int, width: int) -> NDArray[np.uint8]:
    """An image of which every pixel is random, the same each time: uint8 (H, W, 3)."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def machine() -> dict[str, Any]:
    """The facts that a time depends on. `load` is that of the last minute, before anything is timed."""
    affinity = getattr(os, "sched_getaffinity", None)
    facts = {
        "cpu": processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnxruntime": onnxruntime.__version__,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": nvidia("name,driver_version"),
    }
    return {name: value for name, value in facts.items() if value is not None}
