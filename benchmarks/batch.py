"""Images a second, one at a time and several at once, as a product runs them: image in and image out.

    python -m export.onnx --weights weights/drsformer-xs.safetensors --output any.onnx --batch any
    python -m benchmarks.batch --model runtime/drsformer-xs.onnx any.onnx --threads 1
    python -m benchmarks.batch --model any.onnx --provider cuda --batch 1 8 32 --seconds 60
    python -m benchmarks.batch --model bundle --provider tensorrt              # an engine, export.tensorrt --batch 8

Every model is given each number of images at once; one that takes fewer runs them one after another. All of these take
turns, and rates are of the medians of the rounds. "Difference" is the largest, in levels of 255, between the answers of
a batch and those to its images alone. The last line is one JSON object.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from runtime.cli import hxw, main, progress_shown
from runtime.errors import InputError, expect_between
from runtime.pixels import Size, size_text
from runtime.progress import OnProgress, silent
from runtime.session import Derainer, Provider, open_session
from runtime.timing import MIN_ROUNDS, alternate, machine


@dataclass(frozen=True)
class Rate:
    """How fast a model restores so many images at once.

    Attributes:
        at_once: How many of them it really takes at once.
        median, low, high: Images a second, with the quartiles.
        faster: Of the first row's images a second: the median of the ratios in each round.
        difference: In levels of 255.
    """

    model: str
    provider: str
    batch: int
    at_once: int
    median: float
    low: float
    high: float
    faster: float
    difference: int


def measure(
    model: tuple[Path, ...],
    batch: tuple[int, ...] = (1, 8),
    size: Size = (256, 256),
    provider: Provider = "cpu",
    threads: int = 0,
    seconds: float = 60.0,
    on_progress: OnProgress = silent,
) -> list[Rate]:
    """A row for each model and number of images; for the rest see `command`.

    Raises:
        InputError: A number is out of range, there is nothing to measure, or a model cannot be loaded.
    """
    for images in batch:
        expect_between("batch", images, 1)
    if not model or not batch:
        raise InputError("expected at least one `model` and one `batch`, found none")
    noise = np.random.default_rng(0).integers(0, 256, (max(batch), *size, 3), dtype=np.uint8)
    rows: list[tuple[Path, Derainer, int]] = []
    for path in model:
        session = open_session(path, provider, threads)
        rows += [(path, Derainer(session, batch=images), images) for images in batch]
    calls = [functools.partial(derainer.run_batch, list(noise[:images])) for _, derainer, images in rows]
    taken = alternate(calls, seconds, MIN_ROUNDS, on_progress)
    each = taken / np.array(batch * len(model))[:, None]
    rates = []
    for (path, derainer, images), times in zip(rows, each, strict=True):
        together = derainer.run_batch(list(noise[:images]))
        low, median, high = np.quantile(1 / times, (0.25, 0.5, 0.75)).round(2).tolist()
        rate = Rate(
            model=path.name,
            provider=getattr(derainer.session, "provider", provider),
            batch=images,
            at_once=min(images, derainer.batch_size(*size)),
            median=median,
            low=low,
            high=high,
            faster=round(float(np.median(each[0] / times)), 2),
            difference=max(
                int(np.abs(a.astype(int) - derainer(b)).max()) for a, b in zip(together, noise[:images], strict=True)
            ),
        )
        rates.append(rate)
    return rates


def command(
    model: tuple[Path, ...],
    batch: tuple[int, ...] = (1, 8),
    size: Annotated[Size, hxw("size")] = (256, 256),
    provider: Provider = "cpu",
    threads: int = 0,
    seconds: float = 60.0,
) -> dict[str, Any]:
    """Measure and print the table.

    Args:
        model: Bundles and .onnx files.
        batch: Images to restore at once.
        size: Height and width of the images, as HxW.
        provider: Where they run, see runtime.derain.
        threads: CPU threads; 0 is one for each core.
        seconds: How long to time; at least 11 rounds are run.
    """
    facts = machine()
    with progress_shown() as on_progress:
        rates = measure(model, batch, size, provider, threads, seconds, on_progress)
    print(f"| {size_text(size)} | images | at once | images/s (quartiles) | of the first | difference |\n{'|---' * 6}|")
    for r in rates:
        numbers = f"{r.median} ({r.low} to {r.high}) | {r.faster} | {r.difference}"
        print(f"| {r.model} on {r.provider} | {r.batch} | {r.at_once} | {numbers} |")
    return {"size": size, "threads": threads, "rates": [asdict(rate) for rate in rates]} | facts


if __name__ == "__main__":
    main(command, __doc__, summary=lambda result: result)
