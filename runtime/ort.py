"""A network in ONNX Runtime, from a .onnx file made by `export.onnx`.

ONNX Runtime runs the same file on a CPU and on an NVIDIA GPU and installs from one wheel, so it is the engine that
everyone has. It is not the fastest on a GPU, and it compiles nothing ahead of time.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from runtime.cli import InputError
from runtime.session import to_batch, to_image

Provider = Literal["auto", "cpu", "cuda"]

EXECUTION_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

DEFAULT_MULTIPLE = 8
"""Size multiple of a graph whose metadata does not name one: that of the released network."""

SHIPPED = "drsformer-xs.onnx"


class OrtSession:
    """A `runtime.session.Session` on ONNX Runtime.

    model:    path of the .onnx file; None is the network that ships with the project.
    provider: "auto" takes CUDA where it works, else the CPU; "cpu"; "cuda".
    threads:  how many CPU threads one run uses; 0 is one for each core.

    The graph has one input `input` and one output `output`, either both float32 (1, 3, H, W) or, exported with
    `--io image`, both uint8 (1, H, W, 3) of any size. `run` is the same for both: to a graph of images it hands an
    image, which loses nothing where the batch came from one, and its answer is then in steps of 1/255.

    Attributes besides `multiple`: `metadata`, the strings that export wrote into the file, and `provider`, the one
    that runs. Raises InputError for a file that is missing, broken or another network, and for a provider that is not
    there.
    """

    multiple: int
    metadata: dict[str, str]
    provider: str

    def __init__(self, model: str | os.PathLike[str] | None = None, provider: str = "auto", threads: int = 0) -> None:
        self.path = Path(model) if model is not None else shipped_model()
        if not self.path.is_file():
            raise InputError(f"expected an ONNX file, found no file at {self.path}")
        if threads < 0:
            raise InputError(f"expected 0 (all cores) or more threads, found {threads}")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors; the warnings are about the graph's inner names
        wanted = _choose(provider)
        try:
            self._engine = ort.InferenceSession(self.path, options, providers=[EXECUTION_PROVIDERS[p] for p in wanted])
        except Exception as error:  # ONNX Runtime's exceptions have no base of their own
            raise InputError(f"{self.path} is not an ONNX model that ONNX Runtime can load: {_line(error)}") from error
        running = self._engine.get_providers()
        self.provider = next(name for name in wanted if EXECUTION_PROVIDERS[name] in running)
        if provider == "cuda" and self.provider != "cuda":
            raise InputError("CUDA does not start: see the lines above for what it misses, or use the provider cpu")
        self.metadata = self._engine.get_modelmeta().custom_metadata_map
        self._takes_images, self._size = self._check_signature()
        self.multiple = 1 if self._takes_images else self._read_multiple()

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 (1, 3, H, W) RGB in [0, 1], H and W multiples of `multiple` -> the same shape, not clamped.

        Raises InputError where the graph was exported for another size or ONNX Runtime fails, most often for want of
        memory. Safe to call from several threads.
        """
        H, W = batch.shape[2:]
        height, width = self._size
        if (isinstance(height, int) and height != H) or (isinstance(width, int) and width != W):
            raise InputError(f"{self.path} takes only images of {width}x{height} pixels, found {W}x{H} after padding "
                             f"to a multiple of {self.multiple}; export it without --height and --width")  # fmt: skip
        try:
            if self._takes_images:
                return to_batch(self._call(to_image(batch)[None])[0])
            return self._call(batch)
        except Exception as error:
            raise InputError(f"{self.path} failed on {W}x{H} pixels: {_line(error)}") from error

    def _call(self, array: np.ndarray) -> np.ndarray:
        return np.asarray(self._engine.run(["output"], {"input": array})[0])

    def _check_signature(self) -> tuple[bool, tuple[int | str | None, int | str | None]]:
        """Whether the graph takes uint8 images, and its height and width: numbers where they are fixed."""
        values = [(v.name, v.type, v.shape) for v in (*self._engine.get_inputs(), *self._engine.get_outputs())]
        match values:
            case [("input", "tensor(float)", [_, 3, height, width]), ("output", "tensor(float)", _)]:
                return False, (height, width)
            case [("input", "tensor(uint8)", [_, height, width, 3]), ("output", "tensor(uint8)", _)]:
                return True, (height, width)
        found = "; ".join(f"{name} {kind} {shape}" for name, kind, shape in values)
        raise InputError(f"{self.path} is another kind of network: expected one input named input and one output named "
                         f"output, both float32 (1, 3, H, W) or both uint8 (1, H, W, 3), found {found}")  # fmt: skip

    def _read_multiple(self) -> int:
        text = self.metadata.get("size_multiple", str(DEFAULT_MULTIPLE))
        if not text.isdecimal() or int(text) < 1:
            raise InputError(f"{self.path}: expected a whole number as size_multiple in its metadata, found {text!r}")
        return int(text)


def shipped_model() -> Path:
    """The network that ships with the project: inside the installed package, or in the source tree. Raises
    InputError where neither has it."""
    package = Path(__file__).parent
    for folder in (package / "weights", package.parent / "weights"):
        if (folder / SHIPPED).is_file():
            return folder / SHIPPED
    raise InputError(f"the default model {SHIPPED} is not here; name a model, or make this one: python -m export.onnx "
                     f"--weights weights/drsformer-xs.safetensors --output weights/{SHIPPED}")  # fmt: skip


def _choose(provider: str) -> list[str]:
    """The providers to try, in this order. Raises InputError for one that is unknown or not installed."""
    if provider not in get_args(Provider):
        raise InputError(f"unknown provider {provider!r}; known: {', '.join(get_args(Provider))}")
    installed = [name for name, full in EXECUTION_PROVIDERS.items() if full in ort.get_available_providers()]
    if provider == "cuda" and "cuda" not in installed:
        raise InputError(f"the provider cuda is not in this ONNX Runtime, only {', '.join(installed)}; "
                         "for CUDA install onnxruntime-gpu in place of onnxruntime")  # fmt: skip
    if provider == "cpu" or "cuda" not in installed:
        return ["cpu"]
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
        ort.preload_dlls()  # CUDA and cuDNN from their Python packages, where those are installed
    return ["cuda", "cpu"]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
