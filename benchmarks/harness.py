"""What the benchmarks share: a sheet of results that survives interruptions, and honest measurement.

A `Sheet` is the file DIR/STAGE.json with the same as a table in DIR/STAGE.md. It holds one run for every machine that
worked on it; a row that a machine has measured is not measured again there, so the same command goes on where the last
one stopped. A row that fails says so and the next one is tried; out of memory is a result, other failures are tried
again by the next command. Rows are started only while they can be expected to end within the time given.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.cli import console, parse_size
from runtime.errors import DeviceError, InputError, OutOfMemory
from runtime.files import writing

Size = tuple[int, int]
"""Height and width."""

Row = dict[str, Any]
"""What was measured: flat, names with strings and numbers."""

OUT_OF_MEMORY, LOST = "out of memory", "the device is lost"


class Sheet:
    """The results of one stage, see above.

    Raises InputError where its file is something else.
    """

    def __init__(self, folder: Path, stage: str, device: torch.device, minutes: float) -> None:
        self.path, self.device = folder / f"{stage}.json", device
        self.deadline = time.monotonic() + 60 * minutes
        try:
            self.content = json.loads(self.path.read_text()) if self.path.exists() else {"stage": stage, "runs": []}
            machines = [run["machine"] for run in self.content["runs"]]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path}: expected results of an earlier run, found something else ({error}); "
                "give another --output"
            ) from None
        machine = describe(device)
        if machine not in machines:
            run = {"machine": machine, "commands": [], "ceilings": {}, "rows": {}}
            self.content["runs"].append(run)
            machines.append(machine)
        self.run = self.content["runs"][machines.index(machine)]
        spec = sys.modules["__main__"].__spec__
        program = ["-m", spec.name] if spec else [Path(sys.argv[0]).name]
        command = {"command": shlex.join(["python", *program, *sys.argv[1:]]), "commit": commit()}
        if command not in self.run["commands"]:
            self.run["commands"].append(command)
        self.unfinished: list[str] = []
        self.longest = 0.0

    @property
    def rows(self) -> dict[str, Row]:
        return self.run["rows"]

    def depends_on(self, settings: Row) -> None:
        """Note what the rows depend on. Raises InputError where those that are there depend on something else."""
        before = self.run["ceilings"]
        for name in settings:
            if before and before.get(name) != settings[name]:
                raise InputError(
                    f"{self.path}: expected {name} {before.get(name)} as in its rows, found {settings[name]}; give "
                    "another `output`"
                )
        self.run["ceilings"] = settings

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def wants(self, key: str, expected: float = 0.0) -> bool:
        """Whether a row has to be measured, and can be within the time left, by the seconds that it is expected to
        take. One for which there is no time is noted as unfinished."""
        row = self.rows.get(key)
        if row is not None and row.get("error", OUT_OF_MEMORY).startswith((OUT_OF_MEMORY, LOST)):
            return False
        if self.seconds_left() < expected:
            if key not in self.unfinished:
                self.unfinished.append(key)
            return False
        return True

    def measure(self, key: str, function: Callable[[], Row], expected: float | None = None) -> Row | None:
        """Measure a row, if it is wanted, and save it. `expected` is as in `wants`; None stands for as long as the
        longest row of this command so far."""
        if not self.wants(key, self.longest if expected is None else expected):
            return None
        console.print(f"{key} ...", highlight=False)
        started = time.monotonic()
        row = protected(self.device, function)
        seconds = time.monotonic() - started
        self.longest = max(self.longest, seconds)
        self.put(key, {**row, "seconds": round(seconds, 1)})
        return row

    def put(self, key: str, row: Row) -> None:
        """Keep a row, and write both files. Raises DeviceError where the device was lost over it."""
        self.rows[key] = row
        console.print(f"{key}: {_as_text(row)}", highlight=False, markup=False)
        self.save()
        if row.get("error", "").startswith(LOST):
            raise DeviceError(f"{key}: {row['error']}; the same command goes on with the next row")

    def save(self) -> None:
        with writing(self.path) as temporary:
            temporary.write_text(json.dumps(self.content, indent=1))
        with writing(self.path.with_suffix(".md")) as temporary:
            temporary.write_text(self.markdown())

    def markdown(self) -> str:
        """All runs as tables."""
        text = [f"# {self.content['stage']}"]
        for run in self.content["runs"]:
            text.append("")
            text += [f"- {name}: {value}" for name, value in {**run["machine"], **run["ceilings"]}.items()]
            text += [f"- `{command['command']}` at commit {command['commit']}" for command in run["commands"]]
            columns = list(dict.fromkeys(name for row in run["rows"].values() for name in row))
            text += ["", "| row | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
            for key, row in run["rows"].items():
                cells = (_cell(row.get(name, "")) for name in columns)
                text.append(f"| {key} | " + " | ".join(cells) + " |")
        return "\n".join(text) + "\n"

    def summary(self) -> Row:
        """For the last line of the command."""
        errors = [key for key, row in self.rows.items() if "error" in row]
        return {"output": str(self.path), "rows": len(self.rows), "errors": errors, "unfinished": self.unfinished}


def _cell(value: Any) -> str:
    text = str(value)
    if isinstance(value, float):
        text = f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:z.4g}"  # without an exponent
    return text.replace("|", "/").replace("\n", "<br>")


def _as_text(row: Row) -> str:
    return ", ".join(f"{name} {_cell(value)}" for name, value in row.items())


def protected(device: torch.device, function: Callable[[], Row]) -> Row:
    """What `function` returns, or a row with what stopped it; its memory is free afterwards."""
    try:
        row = function()
    except Exception as error:  # whatever a library answers is the result
        memory = isinstance(error, torch.OutOfMemoryError | OutOfMemory | MemoryError)
        memory = memory or re.search("out of memory|failed to alloc|alloc_failed", str(error).lower())  # ONNX Runtime's
        row = {"error": f"{OUT_OF_MEMORY if memory else type(error).__name__}: {_line(error)}"}
    try:
        free(device)
    except RuntimeError as error:  # nothing more can be measured by this process
        row = {"error": f"{LOST}: {row.get('error', _line(error))}"}
    return row


def _line(error: BaseException) -> str:
    line = " ".join(str(error).split())
    return line if len(line) <= 300 else line[:300] + "..."


def describe(device: torch.device) -> Row:
    """The facts that a time depends on."""
    import numpy as np

    facts: Row = {
        "device": platform.processor() or platform.machine(),
        "cpu cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "memory GiB": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "TF32": f"products {torch.backends.cuda.matmul.allow_tf32}, "
            f"convolutions {torch.backends.cudnn.allow_tf32}, unless a row says otherwise",
        }
    return facts


def commit() -> str:
    """Of the checkout, or "unknown"; with a + where files differ from it."""
    here = ("git", "-C", str(Path(__file__).parent))
    head = _output(*here, "rev-parse", "--short", "HEAD")
    changed = _output(*here, "status", "--porcelain", "--untracked-files=no")
    return head if changed in ("", "unknown") else head + "+"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# CUDA, and the same on a CPU.


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def peak_memory(device: torch.device, row: Row) -> Iterator[None]:
    """Notes in `row` how many MiB of tensors there were at once inside the block; on CUDA only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield
    if device.type == "cuda":
        row["peak MiB"] = round(torch.cuda.max_memory_allocated(device) / 2**20)


def milliseconds(device: torch.device, call: Callable[[], Any], runs: int) -> list[float]:
    """Of each of `runs` calls: between CUDA events, or on a CPU by the clock."""
    if device.type != "cuda":
        times = []
        for _ in range(runs):
            started = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - started))
        return times
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


def ceilings(device: torch.device, side: int, copied: int) -> Row:
    """What this machine can do at most: the rate of square matrix products of `side`, in TFLOP/s, and the bandwidth of
    copying `copied` bytes, read and written, in GB/s. Medians of 10, warm, on random data; fp32 with TF32."""

    def seconds(call: Callable[[], Any]) -> float:
        for _ in range(3):
            call()
        return statistics.median(milliseconds(device, call, 10)) / 1000

    def product(dtype: torch.dtype) -> float:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * side**3 / seconds(lambda: torch.mm(a, b, out=out)) / 1e12

    def copy() -> float:
        source = torch.randint(0, 256, (copied,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return 2 * copied / seconds(lambda: target.copy_(source)) / 1e9

    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    found: Row = {f"{name} TFLOP/s": product(dtype) for name, dtype in dtypes.items()}
    torch.backends.cuda.matmul.allow_tf32 = tf32
    found["copy GB/s"] = copy()
    free(device)
    return found


# What all stages are told.


@dataclass(frozen=True)
class Stage:
    """What all stages need.

    Args:
        output: Folder that gets the results; with results in it, what is missing is added.
        network: Name of the network with fixed random weights, see drsformer.config.PRESETS.
        weights: Checkpoints of further networks.
        minutes: Start nothing that would not end within so many minutes.
        device: auto is CUDA where there is one, else the CPU.
    """

    output: Path
    network: str = "drsformer"
    weights: tuple[Path, ...] = ()
    minutes: float = 9.0
    device: Literal["auto", "cuda", "cpu"] = "auto"

    def place(self) -> torch.device:
        """Raises InputError where there is no such device."""
        cuda = torch.cuda.is_available()
        if self.device == "cuda" and not cuda:
            raise InputError("`device`: expected a CUDA device, PyTorch finds none; give --device cpu")
        if self.device == "cpu" or not cuda:
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def sheet(self) -> Sheet:
        """The results, with the ceilings of this machine measured."""
        device = self.place()
        sheet = Sheet(self.output, type(self).__name__.lower(), device, self.minutes)
        if not sheet.run["ceilings"]:
            large = device.type == "cuda"
            sheet.run["ceilings"] = ceilings(device, 8192 if large else 256, 4 << 30 if large else 4 << 20)
        return sheet

    def measure(self) -> Row:
        """Work through the stage; returns the summary."""
        raise NotImplementedError


def parse_sizes(texts: Sequence[str], option: str = "sizes") -> list[Size]:
    """Heights and widths from "HxW", as given by an option. Raises InputError for anything else."""
    return [parse_size(option, text, 8) for text in texts]


# What a network has to do at least.

KINDS = ("depthwise convolution", "1x1 convolution", "other convolution", "matrix product", "normalisation",
         "top-k", "softmax", "concatenation", "copy or cast", "other")  # fmt: skip

FLOOR_KINDS = ("convolution", "matrix product", "normalisation")
"""How the names of those kinds end whose bytes count for a floor."""

_PREFIXES = {
    "matrix product": ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear"),
    "normalisation": ("native_layer_norm", "layer_norm", "var", "std", "linalg_vector_norm", "norm"),
    "top-k": ("topk", "sort", "scatter", "gather"),
    "softmax": ("softmax", "_softmax"),
    "concatenation": ("cat",),
    "copy or cast": ("copy", "_to_copy", "clone", "contiguous", "to"),
}

CONVOLUTIONS = ("convolution", "conv2d", "_convolution", "cudnn_convolution", "mkldnn_convolution", "_conv_depthwise2d",
                "conv_depthwise2d", "thnn_conv2d", "_slow_conv2d_forward", "_convolution_mode")  # fmt: skip


def kind_of(operator: str, shapes: list[tuple[int, ...]]) -> str:
    """The kind, of `KINDS`, of an operator of PyTorch by its name without namespace, such as "bmm", and the shapes of
    its inputs, of a convolution that of the image first and that of the weight second."""
    operator = operator.rstrip("_")
    if operator in CONVOLUTIONS or f"_{operator}" in CONVOLUTIONS:
        image, weight = shapes[0], shapes[1]
        if weight[1] == 1 and image[1] > 1:
            return "depthwise convolution"
        return "1x1 convolution" if weight[2:] == (1, 1) else "other convolution"
    return next((kind for kind, names in _PREFIXES.items() if operator in names), "other")


class Work(TorchDispatchMode):
    """Counts, inside the block, the multiply-accumulates and the bytes of operators: of each that is a convolution, a
    matrix product or another kind of `KINDS`, inputs are read once and outputs written once. Views are free, and so is
    what `floor` does not name.

    macs:  by kind.
    bytes: by kind.
    calls: by kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs, self.bytes, self.calls = Counter[str](), Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [x for x in _pytree.tree_leaves(result) if isinstance(x, Tensor)]
        inputs = [x for x in _pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if getattr(func, "is_view", False) or not outputs:
            return result
        shapes = [tuple(x.shape) for x in inputs]
        operator = func._schema.name.split("::")[-1]
        kind = kind_of(operator, shapes)
        self.calls[kind] += 1
        self.bytes[kind] += sum(x.numel() * x.element_size() for x in (*inputs, *outputs))
        if kind.endswith("convolution"):
            self.macs[kind] += math.prod(shapes[1][1:]) * outputs[0].numel()
        elif kind == "matrix product":
            left = shapes[1] if operator in ("addmm", "baddbmm") else shapes[0]
            self.macs[kind] += left[-1] * outputs[0].numel()
        return result

    def floor(self, ceiling: Row, precision: str) -> Row:
        """The least time that these operators can take, run one by one: the longer one of their MACs at the rate of
        large matrix products and the bytes of convolutions, matrix products and normalisations at the copy bandwidth.
        Everything between them is taken to cost nothing."""
        moved = sum(count for kind, count in self.bytes.items() if kind.endswith(FLOOR_KINDS))
        macs = sum(self.macs.values())
        compute = 2 * macs / ceiling[f"{precision} TFLOP/s"] / 1e9
        memory = moved / ceiling["copy GB/s"] / 1e6
        return {
            "GMAC": macs / 1e9,
            "GB moved": moved / 1e9,
            "floor ms": max(compute, memory),
            "floor by": "MACs" if compute > memory else "bytes",
        }
