"""How much memory there is, and how much a network takes.

    from pathlib import Path
    from runtime import memory

    memory.available()                              # bytes, or None
    memory.peak()                                   # bytes, or None
    memory.measure(Path("model.onnx"), threads=2)   # Footprint(fixed=75608064, per_pixel=2769.7), or None

Nothing in an ONNX file tells what a runtime needs for it, and ONNX Runtime does not tell either, so it is measured: a
process of its own loads the network and restores one small image, and the system says how far its memory has grown.
Only Linux tells, in /proc; elsewhere all of them answer None.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

PROC = Path("/proc")
STATUS = PROC / "self" / "status"
CGROUP = Path("/sys/fs/cgroup")

SIDE = 256
"""Height and width of the image that is measured on."""

LONGEST = 300
"""Seconds after which a measurement is given up."""

MARGIN = 1.5
"""What is reckoned with for each pixel, of what was measured. ONNX Runtime takes memory in ever larger blocks, so that
the figure differs from size to size: the full network took 16.6 kB for each pixel of 256x256 and 21.0 of 384x384, the
shipped one 1.8 to 2.1 kB from 256x256 to 640x640."""


@dataclass(frozen=True)
class Footprint:
    """What a process takes at most, in bytes: `fixed` with the network loaded, `per_pixel` of its input besides."""

    fixed: int
    per_pixel: float


def available() -> int | None:
    """What this process could take besides what it has, in bytes: that which the machine has free, or what its
    container, service or job (a control group) may take, if that is less."""
    try:
        free = _kilobytes(PROC / "meminfo", "MemAvailable")
    except (OSError, LookupError):
        return None
    return min([free, *_left_to_groups()])


def _left_to_groups() -> Iterator[int]:
    """What is left to each of the control groups that this process is in, and to those around them."""
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":  # version 2
            root, files, cached = CGROUP, ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            files, cached = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"
            root = CGROUP / "memory"
        else:
            continue
        group = Path(name)
        for folder in (root / each.relative_to("/") for each in (group, *group.parents)):
            try:
                most, taken = (int((folder / file).read_text()) for file in files)
                unused = re.findall(rf"^{cached} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
                yield max(0, most - taken + int(unused[0]))
            except (OSError, ValueError, LookupError):  # not shown here, or no bound
                continue


def peak() -> int | None:
    """The most that this process has taken so far, in bytes. What `resource` knows includes the parent's, from before
    the program was loaded."""
    try:
        return _kilobytes(STATUS, "VmHWM")
    except (OSError, LookupError):
        return None


def measure(model: Path, threads: int = 0) -> Footprint | None:
    """The footprint of an ONNX file on the CPU, with so many threads. Takes as long as to load it and to restore an
    image of 256x256 pixels. None where it cannot be measured, as in a program that is no Python interpreter."""
    if getattr(sys, "frozen", False) or not Path(sys.executable or "").name.startswith("python"):
        return None
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    try:
        found = subprocess.run(
            [sys.executable, "-P", "-m", "runtime.memory", str(model), str(threads)],  # -P: not from here
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=LONGEST,
        )
        return Footprint(**json.loads(found.stdout))
    except (OSError, ValueError, TypeError, subprocess.SubprocessError):
        return None


def _grow(model: Path, threads: int) -> Footprint:
    """That of this process, which has to be new."""
    from runtime.ort import OrtSession

    session = OrtSession(model, "cpu", threads)
    (_, most), side = session.limits[0], math.ceil(SIDE / session.multiple) * session.multiple
    h, w = (side if limit == sys.maxsize else limit for limit in most)
    fixed = _kilobytes(STATUS, "VmRSS")
    session.run(np.zeros((1, 3, h, w), np.float32))
    return Footprint(fixed, MARGIN * (_kilobytes(STATUS, "VmHWM") - fixed) / (h * w))


def _kilobytes(path: Path, name: str) -> int:
    """An entry of a file in /proc, in bytes."""
    return int(re.findall(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE)[0]) * 1024


if __name__ == "__main__":
    print(json.dumps(asdict(_grow(Path(sys.argv[1]), int(sys.argv[2])))))
