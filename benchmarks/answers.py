"""The stage `answers` of `benchmarks.gpu`: what TensorRT for RTX and TensorRT say on this machine, word for word.

Nobody can say beforehand which cards a library supports, and where it does not it may refuse, hang or take its process
down. So every question is asked by a process of its own with a time limit (`benchmarks.questions`), everything that the
library logs is kept, and a crash is an answer as well.
"""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Row, Stage
from benchmarks.questions import ANSWER, QUESTIONS
from runtime import ort
from runtime.cli import parse_size
from runtime.manifest import Flavor
from runtime.trt import LIBRARIES

KEPT_LINES = 12
"""Of what a library says before its answer, the last ones."""


@dataclass(frozen=True)
class Answers(Stage):
    """What do TensorRT for RTX and TensorRT say on this machine: load, build, deserialize, compile, run?

    Args:
        onnx: Model to ask about; by default the one that ships.
        size: Height and width that engines are built for.
        run_dir: Folder for the engines.
        limit_s: Seconds that an answer may take.
    """

    onnx: Path = ort.SHIPPED
    size: str = "256x256"
    run_dir: Path = Path("runs/answers")
    limit_s: float = 120.0

    def measure(self) -> Row:
        parse_size("size", self.size, 8)
        sheet = self.sheet()
        for flavor, questions in QUESTIONS.items():
            for question in questions:
                name = question.__name__
                key = f"{LIBRARIES[flavor].title}: {name.replace('_', ' ')}"
                sheet.measure(key, functools.partial(self.ask, flavor, name), min(self.limit_s, 30.0))
        return sheet.summary()

    def ask(self, flavor: Flavor, name: str) -> Row:
        """The answer of a process of its own, with what the library said before it."""
        words = (flavor, name, str(self.onnx), str(self.run_dir), self.size)
        command = [sys.executable, "-m", "benchmarks.questions", *words]
        try:
            process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=self.limit_s)
            said, status = process.stdout, process.returncode
        except subprocess.TimeoutExpired as error:
            said, status = error.stdout or b"", None
        lines = said.decode(errors="replace").splitlines()
        if status == 0 and lines and lines[-1].startswith(ANSWER):
            row: Row = json.loads(lines.pop().removeprefix(ANSWER))
        else:
            row = {"answer": _ending(status, self.limit_s)}
        return row | {"log": "\n".join(lines[-KEPT_LINES:])}


def _ending(status: int | None, limit_s: float) -> str:
    if status is None:
        return f"none within {limit_s:g} s"
    return f"the process died of {signal.Signals(-status).name}" if status < 0 else f"the process ended with {status}"
