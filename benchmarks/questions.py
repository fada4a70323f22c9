"""One question to TensorRT for RTX or TensorRT, asked by a process of its own: the other half of `benchmarks.answers`.

    python -m benchmarks.questions rtx load runtime/drsformer-xs.onnx runs/answers 256x256

Prints what the library logs and, unless that ended the process, the answer as JSON in the last line.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export import tensorrt
from export.tensorrt import BuildOptions, Compiler, build
from runtime import canary, trt
from runtime.bundle import MANIFEST, Bundle, load
from runtime.cli import parse_size
from runtime.errors import DerainError
from runtime.manifest import Flavor
from runtime.pixels import Size
from runtime.timing import noise
from runtime.trt import LIBRARIES, TrtSession

Row = dict[str, Any]
"""An answer, as `benchmarks.harness` has it."""

RUNS = 20
"""Of an engine, after the first."""

ANSWER = "answer: "
"""How the last line of a process begins that has not been stopped."""


@dataclass(frozen=True)
class Question:
    """What a process asks its library about a model.

    Attributes:
        flavor: The library.
        onnx: The model.
        folder: Where the engines are, and stay.
        size: Height and width that they are built for.
    """

    flavor: Flavor
    onnx: Path
    folder: Path
    size: Size

    def load(self) -> Row:
        """Its version, and the cards that it names."""
        library = LIBRARIES[self.flavor].load()
        known = getattr(library, "ComputeCapability", None)
        cards = ", ".join(known.__members__) if known else "those in the machine"
        return {"answer": f"version {library.__version__}; builds for {cards}"}

    def build_ahead(self) -> Row:
        """An engine for the cards that are named by default, none of which has to be here."""
        return _size(self._build("ahead", ()))

    def deserialize(self) -> Row:
        """Whether it takes that engine, asked directly."""
        bundle = self._engine("ahead")
        content = bundle.read(bundle.manifest.engines[0].file)
        return {"answer": _deserialized(LIBRARIES[self.flavor].load(), content)}

    def build_here(self) -> Row:
        """An engine for the card of this machine."""
        return _size(self._build("here", (trt.gpu(),) if self.flavor == "rtx" else ()))

    def build_current(self) -> Row:
        """An engine for the card of this machine, whatever the library calls it: it may take one that it does not
        name. And whether it takes that engine."""
        library = LIBRARIES[self.flavor]
        module = library.load()
        compiler = Compiler(module, library, self.onnx.read_bytes())
        compiler.target([module.ComputeCapability.CURRENT])
        compiler.add_profile(*[(1, 3, *self.size)] * 3)
        plan = compiler.run(timing_cache=None)
        return {"answer": f"an engine of {plan.nbytes / 1e6:.1f} MB; {_deserialized(module, plan)}"}

    def run_ahead(self) -> Row:
        """The engine that was built ahead of time: compiles what it has to, runs, and is compared with the model."""
        return self._run(self._engine("ahead"))

    def run_here(self) -> Row:
        """The same with the engine for the card of this machine."""
        return self._run(self._engine("here"))

    def _build(self, place: str, capabilities: tuple[str, ...]) -> Bundle:
        folder, size = self.folder / f"{self.flavor}-{place}", (self.size,)
        shutil.rmtree(folder, ignore_errors=True)  # what a process left that was stopped
        return build(self.onnx, folder, BuildOptions(self.flavor, capabilities, size, size, size)).bundle

    def _engine(self, place: str) -> Bundle:
        """The one that was built, or one built now."""
        folder = self.folder / f"{self.flavor}-{place}"
        if (folder / MANIFEST).exists():
            return load(folder)
        return self._build(place, (trt.gpu(),) if place == "here" and self.flavor == "rtx" else ())

    def _run(self, bundle: Bundle) -> Row:
        session = TrtSession(bundle, bundle.manifest.engines[0])
        batch = (noise(*self.size).transpose(2, 0, 1)[None] / 255).astype("float32")
        started = time.perf_counter()
        session.run(batch)
        first = time.perf_counter() - started
        times = []
        for _ in range(RUNS):
            started = time.perf_counter()
            session.run(batch)
            times.append(1000 * (time.perf_counter() - started))
        answers = canary.ask(session, bundle)
        psnr = min(answer.psnr for answer in answers)
        failed = [answer.canary.file for answer in answers if not answer.passed]
        return {
            "answer": f"runs; canaries answered wrongly: {', '.join(failed) or 'none'}",
            "first run s": round(first, 2),
            "ms": statistics.median(times),
            "PSNR dB": psnr if math.isfinite(psnr) else str(psnr),
        }


def _deserialized(library: Any, content: Any) -> str:
    """What the library says of an engine, and whether it takes it."""
    log = trt.new_log(library)
    runtime = library.Runtime(log)
    validity = runtime.get_engine_validity(content) if hasattr(runtime, "get_engine_validity") else "not offered"
    engine = runtime.deserialize_cuda_engine(content)
    return f"validity {validity}; " + ("None" if engine is None else f"{engine.num_layers} layers")


def _size(bundle: Bundle) -> Row:
    engine = bundle.manifest.engines[0]
    size = next(file.size for file in bundle.manifest.files if file.name == engine.file)
    cards = ", ".join(engine.compute_capabilities)
    return {"answer": f"an engine of {size / 1e6:.1f} MB for {cards}, built in {engine.build_seconds} s"}


QUESTIONS: dict[Flavor, tuple[Callable[[Question], Row], ...]] = {
    "rtx": (
        Question.load,
        Question.build_ahead,
        Question.deserialize,
        Question.build_here,
        Question.build_current,
        Question.run_ahead,
        Question.run_here,
    ),
    "tensorrt": (Question.load, Question.build_here, Question.run_here),
}
"""What each library is asked, in this order. TensorRT builds for the card of the machine only."""


def outspoken(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A `runtime.trt.new_log` whose loggers also print what they are told, down to information."""

    def new_log(library: Any) -> Any:
        class Log(type(make(library))):
            def log(self, severity: Any, message: str) -> None:
                super().log(severity, message)
                if severity <= library.ILogger.Severity.INFO:
                    print(f"{severity.name}: {message}", flush=True)

        return Log()

    return new_log


def main(flavor: Flavor, name: str, onnx: str, folder: str, size: str) -> None:
    """Ask one question."""
    trt.new_log = tensorrt.new_log = outspoken(trt.new_log)
    question = Question(flavor, Path(onnx), Path(folder), parse_size("size", size, 8))
    try:
        LIBRARIES[flavor].load()
    except DerainError as error:
        row: Row = {"error": str(error)}  # asked again when it may be there
    else:
        try:
            row = getattr(question, name)()
        except Exception as error:  # whatever a library answers is the result
            row = {"answer": f"{type(error).__name__}: {error}"}
    print(ANSWER + json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])  # pyright: ignore[reportArgumentType]
