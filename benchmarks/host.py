"""What `Derainer` costs around a network: processor time of the way from bytes to the network and back.

    python -m benchmarks.host                                    # this checkout
    python -m benchmarks.host --other ../before --rounds 11      # and another one, in turn

The network returns what it is given, so all that is left is padding, conversion and checks. Times are processor time,
all threads together, in milliseconds: medians of the rounds, in each of which every checkout is measured once, in a
process of its own. The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from runtime.cli import hxw, main
from runtime.pixels import Size
from runtime.session import Derainer
from runtime.timing import machine, noise

REPEATS = 5
"""Calls that are timed in a process, after one that is not."""


class Identity:
    """A session that answers with what it is given."""

    multiple = 8

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        return batch


def write_identity(path: Path) -> Path:
    """An ONNX file of images that returns what it is given."""
    import onnx
    from onnx import TensorProto, helper

    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.UINT8, (1, "H", "W", 3))] for name in ("input", "output")
    )
    graph = helper.make_graph([helper.make_node("Identity", ["input"], ["output"])], "identity", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def measure(height: int, width: int) -> dict[str, float]:
    """Milliseconds of processor time an image, here: around a graph of tensors, around one of images in ONNX Runtime,
    and of that graph alone, to which the bytes are handed."""
    import onnxruntime

    image = noise(height, width)

    def milliseconds(call: Callable[[], object]) -> float:
        call()
        times = []
        for _ in range(REPEATS):
            started = time.process_time()
            call()
            times.append((time.process_time() - started) * 1000)
        return statistics.median(times)

    with TemporaryDirectory() as folder:
        path = write_identity(Path(folder, "identity.onnx"))
        tensors, images = Derainer(Identity()), Derainer(path, "cpu")
        engine = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return {
            "tensor": milliseconds(lambda: tensors(image)),
            "image": milliseconds(lambda: images(image)),
            "bytes alone": milliseconds(lambda: engine.run(None, {"input": image[None]})),
        }


def compare(checkouts: list[Path], size: Size, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of `measure` in each checkout, by their paths and then by what was measured."""
    found: dict[str, list[dict[str, float]]] = {str(checkout): [] for checkout in checkouts}
    code = f"import json; from benchmarks.host import measure; print(json.dumps(measure{size}))"
    for _ in range(rounds):
        for checkout in checkouts:
            paths = os.pathsep.join([str(checkout), str(Path(__file__).parents[1])])  # this file, should it lack there
            done = subprocess.run(
                [sys.executable, "-P", "-c", code],
                env={**os.environ, "PYTHONPATH": paths},
                capture_output=True,
                text=True,
                check=True,
            )
            found[str(checkout)].append(json.loads(done.stdout))
    return {
        checkout: {name: round(statistics.median(row[name] for row in rows), 1) for name in rows[0]}
        for checkout, rows in found.items()
    }


def command(
    size: Annotated[Size, hxw("size")] = (1080, 1920), other: Path | None = None, rounds: int = 5
) -> dict[str, Any]:
    """Measure and print the table.

    Args:
        size: Height and width of the image, as HxW.
        other: Another checkout to measure in turn with this one.
        rounds: Rounds.
    """
    here = Path(__file__).resolve().parents[1]
    checkouts = [here, *([other.resolve()] if other else [])]
    facts = machine()
    found = compare(checkouts, size, rounds)
    labels = dict(zip(found, ("this", "the other"), strict=False))
    print(f"| checkout | {' | '.join(found[str(here)])} |\n|{'---|' * 4}")
    for checkout, row in found.items():
        print(f"| {labels[checkout]} | {' | '.join(f'{value} ms' for value in row.values())} |")
    return {"size": size, "rounds": rounds, "milliseconds": {labels[c]: row for c, row in found.items()}} | facts


if __name__ == "__main__":
    main(command, __doc__, summary=lambda result: result)
