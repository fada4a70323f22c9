"""Times networks as a product runs them, image in and image out, and tells the memory that they take.

    python -m runtime.bench                                                   # the network that ships, on 256x256
    python -m runtime.bench --model bundle --size 480x640 720x1280
    python -m runtime.bench --model small.onnx --vs full.onnx --threads 2
    python -m runtime.bench --model bundle --vs bundle/model.onnx --provider cuda

What is timed is one call of `Derainer` on one image of noise, with padding, copies to a GPU and rounding: the time that
one user waits. Both networks are warm, and they take turns, the other one first in every other round, so that what
disturbs the machine disturbs both alike. "Times as fast" is the median over the rounds of the one's time by the
other's in the same round, with quartiles. p99 is the time that 99 of 100 calls stayed below; with less than 100 rounds
it is little else than the slowest.

Peak memory is that of a process of its own for each network and size, which loads the network and restores the image
twice, and beside it what that process took before it loaded the network. Memory on a GPU is not in it.

The last line is one JSON object with everything, and the machine's facts.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from . import memory
from .cli import main, parse_size, progress
from .errors import InputError
from .pixels import size_text
from .session import Derainer, Provider, open_session

ROUNDS = 11
"""The fewest, however long they take."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one network on images of one size.

    provider:   where it ran.
    size:       height and width.
    tiles:      into how many the image is cut where memory or the network demand it; 1 as a whole.
    low, high:  the quartiles.
    peak_mib:   peak memory of a process with this network; None where the system does not tell (it is read in /proc).
    idle_mib:   of that the peak before the network was loaded: Python and the libraries.
    """

    model: str
    provider: str
    size: tuple[int, int]
    tiles: int
    rounds: int
    median: float
    low: float
    high: float
    p99: float
    images_per_second: float
    peak_mib: int | None
    idle_mib: int | None


@dataclass(frozen=True)
class Ratio:
    """How many times as fast the model is as the other on images of one size: median and quartiles over the rounds."""

    size: tuple[int, int]
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """`timings`, of the model and then of the other for every size; `ratios`, one a size where there is another."""

    machine: dict[str, Any]
    timings: tuple[Timing, ...]
    ratios: tuple[Ratio, ...]

    @property
    def models(self) -> int:
        """How many are compared."""
        return 2 if self.ratios else 1


def bench(
    model: Path | None = None,
    vs: Path | None = None,
    size: tuple[str, ...] = ("256x256",),
    provider: Provider = "auto",
    threads: int = 0,
    seconds: float = 10.0,
) -> Result:
    """Time one network, or two in turn, and print a table.

    Starts processes, so a script that calls this needs Python's usual `if __name__ == "__main__":`. Raises InputError
    for sizes that are none, and for a network that cannot be loaded or fails.

    Args:
        model: a bundle or a .onnx file; the network that ships with the project if not given.
        vs: another one, to compare with.
        size: heights and widths of the images, each as HxW.
        provider: where both run, see runtime.derain.
        threads: CPU threads of each; 0 is one for each core.
        seconds: how long to time at one size; at least 11 rounds are run.
    """
    sizes = [parse_size("size", text) for text in size]
    if not sizes:
        raise InputError("`size`: expected at least one, found none")
    if not 0 <= seconds <= 3600:
        raise InputError(f"`seconds`: expected 0 to 3600, found {seconds}")
    facts = machine()
    models = [model] if vs is None else [model, vs]
    sessions = [open_session(path, provider, threads) for path in models]
    derainers = [Derainer(session) for session in sessions]
    timings, ratios = [], []
    for height, width in sizes:
        peaks = [alone(peak_memory, path, provider, threads, height, width) for path in models]
        image = noise(height, width)
        taken = alternate([functools.partial(derain, image) for derain in derainers], seconds)
        for session, derain, times, (idle, peak) in zip(sessions, derainers, taken, peaks, strict=True):
            low, median, high, p99 = np.quantile(1000 * times, (0.25, 0.5, 0.75, 0.99)).tolist()
            timings.append(
                Timing(
                    os.fspath(session.path),
                    session.provider,
                    (height, width),
                    derain.plan(height, width).count,
                    len(times),
                    median,
                    low,
                    high,
                    p99,
                    len(times) / float(times.sum()),
                    peak,
                    idle,
                )
            )
        if vs is not None:
            low, median, high = np.quantile(taken[1] / taken[0], (0.25, 0.5, 0.75)).tolist()
            ratios.append(Ratio((height, width), median, low, high))
    result = Result(facts, tuple(timings), tuple(ratios))
    for part in report(result):
        Console().print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
    return result


def alternate(calls: Sequence[Callable[[], object]], seconds: float, rounds: int = ROUNDS) -> NDArray[np.float64]:
    """Seconds of each of `calls` in each round -> float64 (calls, rounds), warm.

    In every round each is called once, in turn from the first and from the last. As many rounds as fit into `seconds`,
    by the warm-up's second calls, but at least `rounds`.
    """

    def timed(call: Callable[[], object]) -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    for call in calls:
        call()
    rounds = max(rounds, int(seconds / sum(timed(call) for call in calls)))
    taken = np.empty((len(calls), rounds))
    with progress() as bar:
        for i in bar.track(range(rounds), description="Timing"):
            for which in range(len(calls))[:: 1 if i % 2 == 0 else -1]:
                taken[which, i] = timed(calls[which])
    return taken


def peak_memory(
    model: Path | None, provider: Provider, threads: int, height: int, width: int
) -> tuple[int | None, int | None]:
    """Peak memory of this process in MiB, before it loads a network and after that has restored an image twice."""
    idle = peak_mib()
    derain = Derainer(open_session(model, provider, threads))
    for _ in range(2):
        derain(noise(height, width))
    return idle, peak_mib()


def peak_mib() -> int | None:
    """Of this process so far, see `runtime.memory.peak`."""
    found = memory.peak()
    return None if found is None else found // 2**20


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own. Raises InputError where that process dies."""
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool as error:
        raise InputError(
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
        "cpu": _cpu(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnxruntime": onnxruntime.__version__,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def report(result: Result) -> Iterator[Table | str]:
    """For people."""
    for name, timing in zip(("model", "vs"), result.timings[: result.models], strict=False):
        yield f"{name}: {timing.model} on {timing.provider}"
    shown = Table("", "size", title="milliseconds an image", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for column in ("median", "25 %", "75 %", "p99", "rounds", "img/s", "peak MiB"):
        shown.add_column(column, justify="right")
    for i, t in enumerate(result.timings):
        shown.add_row(
            ("model", "vs")[i % result.models],
            size_text(t.size),
            f"{t.median:.1f}",
            f"{t.low:.1f}",
            f"{t.high:.1f}",
            f"{t.p99:.1f}",
            str(t.rounds),
            f"{t.images_per_second:.2f}",
            str(t.peak_mib or ""),
        )
    yield shown
    yield from dict.fromkeys(f"{size_text(t.size)} in {t.tiles} tiles" for t in result.timings if t.tiles > 1)
    for r in result.ratios:
        yield f"{size_text(r.size)}: {r.median:.2f} times as fast as vs (quartiles {r.low:.2f} to {r.high:.2f})"
    if idle := result.timings[0].idle_mib:
        yield f"{idle} MiB of the peaks are Python and its libraries"
    yield ", ".join(f"{name} {value}" for name, value in result.machine.items())


if __name__ == "__main__":
    main(bench, __doc__, summary=asdict)
