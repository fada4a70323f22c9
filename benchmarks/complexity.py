"""What every network costs: parameters, multiply-accumulates, and the time and the memory of the graph that ships.

    python -m benchmarks.complexity --output runs/complexity --weights weights/*.safetensors
    python -m benchmarks.complexity --output runs/complexity --size 128x128 --threads 1 --rounds 11

Rows are the networks of `drsformer.config.PRESETS`, with fixed random weights, and those in --weights; one that has the
name of a preset takes its row. MACs are the paper's "FLOPs" (`drsformer.counts`). Time is that of one image in ONNX
Runtime on the CPU, float32, of the network as `export.onnx` exports it: all networks take turns, back and forth, so
that what disturbs the machine disturbs all of them alike, and "of the first" is the median over the rounds of a
network's time by that of the first row in the same round. Peak memory is that of a process of its own that restores one
image, twice.

OUTPUT/complexity.json and the same as a table in .md have one sheet for each machine; the ONNX files stay beside them.
The timings, which only compare within one run, are taken as a whole.
"""

from __future__ import annotations

import functools
import os
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from benchmarks.contestants import from_preset, from_weights, picture
from benchmarks.graph import exported
from benchmarks.harness import Row, Sheet, parse_sizes
from drsformer import counts
from drsformer.config import PRESETS
from runtime.bench import peak_memory
from runtime.cli import main, progress_shown
from runtime.errors import expect_between
from runtime.ort import OrtSession
from runtime.progress import track
from runtime.timing import alone, alternate, machine


def complexity(
    output: Path, weights: tuple[Path, ...] = (), size: str = "256x256", rounds: int = 5, threads: int = 2
) -> Row:
    """Count and time all networks. Returns the summary of the sheet.

    Args:
        output: Folder that gets the results and the ONNX files.
        weights: Checkpoints of further networks.
        size: Height x width of the image that is timed, two multiples of 8.
        rounds: How often the networks take turns.
        threads: CPU threads of each.

    Raises:
        InputError: A checkpoint cannot be used, or a number is out of range.
    """
    expect_between("rounds", rounds, 1)
    expect_between("threads", threads, 1)
    ((height, width),) = parse_sizes([size], "size")
    sheet = Sheet(output, "complexity", torch.device("cpu"), float("inf"))
    sheet.run["ceilings"] |= {"cpu": machine()["cpu"], "onnxruntime": version("onnxruntime")}
    subjects = {subject.name: subject for subject in (*map(from_preset, PRESETS), *map(from_weights, weights))}
    keys = {name: f"{name} {size}" for name in subjects}
    if not any(sheet.wants(key) for key in keys.values()):
        return sheet.summary()
    with progress_shown() as on_progress:
        files = [
            exported(output, each, "folded") for each in track(subjects.values(), len(keys), "Exporting", on_progress)
        ]
        peaks = [
            alone(peak_memory, path, "cpu", threads, height, width)
            for path in track(files, len(files), "Measuring memory", on_progress)
        ]
        load, batch = os.getloadavg()[0], picture((height, width)).numpy()
        calls = [functools.partial(OrtSession(path, "cpu", threads).run, batch) for path in files]
        seconds = alternate(calls, 0, rounds, on_progress)
    for (name, subject), path, (idle, peak), times in zip(subjects.items(), files, peaks, seconds, strict=True):
        low, median, high = np.quantile(1000 * times, (0.25, 0.5, 0.75)).tolist()
        row: Row = {
            "weights": "trained" if subject.trained else "random",
            "M parameters": round(counts.params(subject.network.config) / 1e6, 3),
            "GMAC": round(counts.macs(subject.network.config, height, width) / 1e9, 3),
            "file MB": round(path.stat().st_size / 1e6, 2),
            "ms": round(median, 1),
            "quartile 1": round(low, 1),
            "quartile 3": round(high, 1),
            "of the first": round(float(np.median(times / seconds[0])), 4),
            "peak MiB": peak,
            "idle MiB": idle,
            "runs": rounds,
            "threads": threads,
            "load before": round(load, 2),
        }
        sheet.put(keys[name], row)
    return sheet.summary()


if __name__ == "__main__":
    main(complexity, __doc__, summary=lambda summary: summary)
