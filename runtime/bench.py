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
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

# First of all, as it says what to install where tyro is missing.
from .cli import hxw, main, progress_shown, table_of

# isort: split
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from .errors import InputError, expect_between
from .pixels import Size, size_text
from .progress import OnProgress, silent
from .session import Derainer, Provider, open_session
from .timing import MIN_ROUNDS, alone, alternate, machine, noise, peak_mib


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one network on images of one size.

    Attributes:
        provider: Where it ran.
        size: Height and width.
        tiles: Number of tiles of the image where memory or the network demand them; 1 as a whole.
        low, high: The quartiles.
        peak_mib: Peak memory of a process with this network; None where the system does not tell (it is read in /proc).
        idle_mib: Peak memory before the network was loaded: Python and the libraries.
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


@dataclass(frozen=True)
class BenchOptions:
    """What to time, and how.

    Args:
        model: Bundle or .onnx file; the network that ships with the project if not given.
        vs: Another one, to compare with.
        size: Heights and widths of the images, each as HxW.
        provider: Where both run, see runtime.derain.
        threads: CPU threads of each; 0 is one for each core.
        device: CUDA's number of the GPU; the first one if not given.
        seconds: How long to time at one size; at least 11 rounds are run.
        rounds: How many rounds to run at one size, in place of seconds.

    Raises:
        InputError: There is no size, or a number is out of range.
    """

    model: Path | None = None
    vs: Path | None = None
    size: tuple[Annotated[Size, hxw("size")], ...] = ((256, 256),)
    provider: Provider = "auto"
    threads: int = 0
    device: int | None = None
    seconds: float = 10.0
    rounds: int | None = None

    def __post_init__(self) -> None:
        if not self.size:
            raise InputError("`size`: expected at least one, found none")
        expect_between("seconds", self.seconds, 0, 3600)
        if self.rounds is not None:
            expect_between("rounds", self.rounds, 1)


def bench(options: BenchOptions = BenchOptions(), on_progress: OnProgress = silent) -> Result:
    """Time one network, or two in turn.

    Starts processes, so a script that calls this needs Python's usual `if __name__ == "__main__":`.

    Raises:
        InputError: A network cannot be loaded or fails.
    """
    model, vs, provider, threads = options.model, options.vs, options.provider, options.threads
    device = options.device
    facts = machine()
    models = [model] if vs is None else [model, vs]
    sessions = [open_session(path, provider, threads, device=device) for path in models]
    derainers = [Derainer(session) for session in sessions]
    timings, ratios = [], []
    for done, (height, width) in enumerate(options.size):
        on_progress("Sizes", done, len(options.size))
        peaks = [alone(peak_memory, path, provider, threads, height, width, device) for path in models]
        calls = [functools.partial(derain, noise(height, width)) for derain in derainers]
        seconds = 0 if options.rounds else options.seconds
        taken = alternate(calls, seconds, options.rounds or MIN_ROUNDS, on_progress)
        for session, derain, times, (idle, peak) in zip(sessions, derainers, taken, peaks, strict=True):
            low, median, high, p99 = np.quantile(1000 * times, (0.25, 0.5, 0.75, 0.99)).tolist()
            timing = Timing(
                model=os.fspath(session.path),
                provider=session.provider,
                size=(height, width),
                tiles=derain.plan(height, width).count,
                rounds=len(times),
                median=median,
                low=low,
                high=high,
                p99=p99,
                images_per_second=len(times) / float(times.sum()),
                peak_mib=peak,
                idle_mib=idle,
            )
            timings.append(timing)
        if vs is not None:
            low, median, high = np.quantile(taken[1] / taken[0], (0.25, 0.5, 0.75)).tolist()
            ratios.append(Ratio((height, width), median, low, high))
    on_progress("Sizes", len(options.size), len(options.size))
    return Result(facts, tuple(timings), tuple(ratios))


def peak_memory(
    model: Path | None, provider: Provider, threads: int, height: int, width: int, device: int | None = None
) -> tuple[int | None, int | None]:
    """Peak memory of this process in MiB, before it loads a network and after that has restored an image twice."""
    idle = peak_mib()
    derain = Derainer(open_session(model, provider, threads, device=device))
    for _ in range(2):
        derain(noise(height, width))
    return idle, peak_mib()


def report(result: Result) -> Iterator[Table | str]:
    """For people."""
    for name, timing in zip(("model", "vs"), result.timings[: result.models], strict=False):
        yield f"{name}: {timing.model} on {timing.provider}"
    shown = table_of(
        ["", "size"], ["median", "25 %", "75 %", "p99", "rounds", "img/s", "peak\nMiB"], "milliseconds an image"
    )
    for i, t in enumerate(result.timings):
        shown.add_row(
            ("model", "vs")[i % result.models],
            size_text(t.size),
            *(f"{ms:.1f}" if ms < 1000 else f"{ms:.0f}" for ms in (t.median, t.low, t.high, t.p99)),
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


def command(options: Annotated[BenchOptions, tyro.conf.arg(name="")] = BenchOptions()) -> Result:
    """Time one network, or two in turn, and print a table."""
    with progress_shown() as on_progress:
        result = bench(options, on_progress)
    for part in report(result):
        Console().print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
    return result


def run() -> None:
    """The command line."""
    main(command, __doc__, summary=asdict)


if __name__ == "__main__":
    run()
