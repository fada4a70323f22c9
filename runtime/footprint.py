"""How much memory a network takes in ONNX Runtime on the CPU.

    footprint = measure(Path("model.onnx"), threads=2)   # Footprint(fixed=75608064, per_pixel=2769.7), or None

Nothing in an ONNX file tells what a runtime needs for it, and ONNX Runtime does not tell either, so it is measured: a
process of its own, this file run as a program, loads the network and restores one small image, and the system says how
far its memory has grown.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .bundle import Bundle
from .manifest import dump, parse
from .memory import STATUS, proc_bytes
from .ort import OrtSession

IMAGE_SIDE = 256
"""Height and width of the image that is measured on."""

TIMEOUT_SECONDS = 300

MARGIN = 1.5
"""What is reckoned with for each pixel, of what was measured. ONNX Runtime takes memory in ever larger blocks, so that
the figure differs from size to size: the full network took 16.6 kB for each pixel of 256x256 and 21.0 of 384x384, the
shipped one 1.8 to 2.1 kB from 256x256 to 640x640."""


@dataclass(frozen=True)
class Footprint:
    """What a process takes at most, in bytes: `fixed` with the network loaded, `per_pixel` of its input besides, of all
    images of a batch."""

    fixed: int
    per_pixel: float


def measure(model: Path | Bundle, threads: int = 0) -> Footprint | None:
    """The footprint of an ONNX file, or of a bundle's, on the CPU, with so many threads. Takes as long as to load it
    and to restore an image of 256x256 pixels. None where it cannot be measured, as in a program that is no Python
    interpreter."""
    if getattr(sys, "frozen", False) or not Path(sys.executable or "").name.startswith("python"):
        return None
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    # The manifest that this process has, so that the other one verifies the file by it too.
    path, manifest = (model.folder, dump(model.manifest)) if isinstance(model, Bundle) else (model, b"")
    try:
        found = subprocess.run(
            [sys.executable, "-P", "-m", __name__, str(path), str(threads)],  # -P: not from here
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            input=manifest,
            capture_output=True,
            check=True,
            timeout=TIMEOUT_SECONDS,
        )
        return Footprint(**json.loads(found.stdout))
    except (OSError, ValueError, TypeError, subprocess.SubprocessError):
        return None


def _measure_here(path: Path, threads: int, manifest: bytes) -> Footprint:
    """That of this process, which has to be new."""
    session = OrtSession(Bundle(path, parse(manifest)) if manifest else path, "cpu", threads)
    (_, most), side = session.limits[0], math.ceil(IMAGE_SIDE / session.multiple) * session.multiple
    h, w = (side if limit == sys.maxsize else limit for limit in most)
    fixed = proc_bytes(STATUS, "VmRSS")
    session.run(np.zeros((1, 3, h, w), np.float32))
    return Footprint(fixed, MARGIN * (proc_bytes(STATUS, "VmHWM") - fixed) / (h * w))


if __name__ == "__main__":
    print(json.dumps(asdict(_measure_here(Path(sys.argv[1]), int(sys.argv[2]), sys.stdin.buffer.read()))))
