"""A network in ONNX Runtime, from a .onnx file made by `export.onnx` or a bundle with one.

ONNX Runtime runs the same file on a CPU and on an NVIDIA GPU and installs from one wheel, so it is the engine that
everyone has. It is not the fastest on a GPU, and it compiles nothing ahead of time; its TensorRT provider compiles at
the first image.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from .arrays import arrays_of
from .bundle import Bundle
from .errors import DeviceError, InputError, InvalidImage, InvalidModel, device_error, expect_between, one_line
from .machine import cuda_device, nvidia, processor, wait_for_stream
from .manifest import Tensor, read_graph_io
from .pixels import ANY, FINITE, GraphIO, Size, filled

EXECUTION_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "ort-tensorrt": "TensorrtExecutionProvider",
}

FALLBACKS = {
    "auto": ["cuda", "cpu"],
    "cpu": ["cpu"],
    "cuda": ["cuda", "cpu"],
    "ort-tensorrt": ["ort-tensorrt", "cuda", "cpu"],
}
"""What runs the nodes that a provider cannot, in this order."""

DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}
"""As NumPy names what ONNX Runtime does."""

SHIPPED = Path(__file__).with_name("drsformer-xs.onnx")
"""The network that ships with the project."""

MAX_THREADS = 256
"""ONNX Runtime starts as many as it is told, until the process dies of it."""


class OrtSession:
    """A `runtime.session.Session` on ONNX Runtime.

    The graph has one input `input` and one output `output`, either both float32 (B, 3, H, W), or the same in float16
    (exported with `--io tensor16`), or uint8 (B, H, W, 3) of any size (`--io image`), then with an output `finite`
    besides (see `runtime.pixels.FINITE`); B is 1, another number or any (`--batch`). `run` is the same for all: to a
    graph of images it hands images, which loses nothing where the batch came from them, and its answer is then in steps
    of 1/255; to a graph of so many images it hands as many, the last one repeated where there are fewer.

    Attributes besides those of `Session`: `model`, the bundle or the path of the file; `path`, of the file; `metadata`,
    the strings that export wrote into it; `input`, `output` and `graph_io`, what it takes and gives; `provider`, the
    one that runs; `threads`; and `identity`, its library and device for `runtime.canary`. ONNX Runtime keeps the memory
    of the largest image so far.

    Args:
        model: Path of the .onnx file, or a bundle that has one; None is the network that ships with the project.
        provider: "auto" takes CUDA where it works, else the CPU; "cpu"; "cuda"; "ort-tensorrt".
        threads: How many CPU threads one run uses; 0 is one for each core.
        device: CUDA's number of the GPU; None is the first one.

    Raises:
        InvalidModel: For a file that is missing, broken, another network or other than its bundle says.
        DeviceError: For a provider that is not there.
        InputError: For an unknown provider, a number of threads that cannot be, and a GPU where the CPU runs.
    """

    multiple: int
    limits: tuple[tuple[Size, Size], ...]
    model: Path | Bundle
    path: Path
    metadata: dict[str, str]
    input: Tensor
    output: Tensor
    graph_io: GraphIO
    provider: str
    threads: int
    identity: dict[str, str]

    def __init__(
        self,
        model: str | os.PathLike[str] | Bundle | None = None,
        provider: str = "auto",
        threads: int = 0,
        device: int | None = None,
    ) -> None:
        options = ort.SessionOptions()
        if isinstance(model, Bundle):
            name = model.manifest.model.file
            self.model, self.path, content = model, model.folder / name, model.read(name)
            # Nothing verifies weights outside, which ONNX Runtime would look for in the current directory.
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
        else:
            self.model = self.path = content = Path(model) if model is not None else SHIPPED
            if not self.path.is_file():
                raise InvalidModel(f"expected a bundle or an ONNX file, found nothing at {self.path}")
            if self.path.suffix in (".safetensors", ".pth", ".pt"):
                raise InvalidModel(
                    f"expected a bundle or an ONNX file, found the checkpoint {self.path}; export "
                    f"it first: python -m export.onnx --weights {self.path}"
                )
        if not 0 <= threads <= MAX_THREADS:
            raise InputError(f"expected 0 (all cores) to {MAX_THREADS} threads, found {threads}")
        options.intra_op_num_threads = threads
        options.enable_mem_pattern = False  # is no faster here, and takes twice the memory from the second image on
        options.log_severity_level = 3  # errors; the warnings are about the graph's inner names
        wanted = _choose(provider)
        gpu = device or 0
        expect_between("device", gpu, 0)
        providers = [(EXECUTION_PROVIDERS[name], {} if name == "cpu" else {"device_id": str(gpu)}) for name in wanted]
        try:
            engine = ort.InferenceSession(content, options, providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions have no base of their own
            raise InvalidModel(
                f"{self.path} is not an ONNX model that ONNX Runtime can load: {one_line(error)}"
            ) from error
        engine.disable_fallback()  # in a run, to another provider or GPU
        self._engine: ort.InferenceSession | None = engine
        running = engine.get_providers()
        self.provider = next(name for name in wanted if EXECUTION_PROVIDERS[name] in running)
        if provider not in ("auto", self.provider):
            raise DeviceError(
                f"the provider {provider} does not start: see the lines above for what it misses, or use "
                f"the provider {self.provider}"
            )
        if gpu and self.provider == "cpu":
            raise InputError(f"`device`: expected none with the provider cpu, which alone runs here, found {device}")
        self._gpu = None if self.provider == "cpu" else gpu
        self.identity = {"library": f"ONNX Runtime {ort.__version__}", **_device(self.provider, gpu)}
        self.metadata = engine.get_modelmeta().custom_metadata_map
        tensors = [_describe(node) for node in (*engine.get_inputs(), *engine.get_outputs())]
        try:
            self.graph_io = read_graph_io(tensors, self.metadata)
        except InvalidModel as error:
            raise InvalidModel(f"{self.path}: {error}") from error
        self.input, self.output, *_ = tensors
        self._outputs = [tensor.name for tensor in tensors[1:]]
        self.multiple, self.threads = self.graph_io.multiple, threads
        sides = [(1, sys.maxsize) if side == -1 else (side, side) for side in self.graph_io.size(self.input.shape)]
        least, most = zip(*sides, strict=True)
        self.limits = ((least, most),)

    def close(self) -> None:
        """Free the network and its memory; not during a run, and none may follow."""
        self._engine = None

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 (B, 3, H, W) RGB in [0, 1], H and W multiples of `multiple`, B at most `max_batch` -> the same shape,
        not clamped.

        Safe to call from several threads. Raises InvalidImage where the graph was exported for another size or for
        fewer images, InvalidModel for an answer of another shape, OutOfMemory, and DeviceError where ONNX Runtime
        fails.
        """
        outputs = self._call(self.graph_io.feed(batch))
        return self.graph_io.answer(*(output[: len(batch)] for output in outputs))

    def run_image(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 (H, W, 3) -> the same, of a graph of images; raises InvalidModel where that says that its answer was
        not finite, for the rest see `run`."""
        return self.run_images(image[None])[0]

    def run_images(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 (B, H, W, 3) -> the same, as `run_image` does each."""
        outputs = self._call(filled(np.ascontiguousarray(images), self.graph_io.batch))
        return self.graph_io.images(*(output[: len(images)] for output in outputs))

    def max_batch(self, size: Size) -> int:
        """How many images `run` takes at once at most, whatever the size."""
        return sys.maxsize if self.graph_io.batch == ANY else self.graph_io.batch

    def enqueue(self, input: object, output: object, stream: int = 0, finite: object | None = None) -> None:
        """See `runtime.contract.Session`. ONNX Runtime has streams of its own: this waits for the caller's first, and
        then for the answer."""
        tells = FINITE in self._outputs
        arrays = arrays_of(self.graph_io, tells, self._gpu, stream, input, output, finite)
        shape = arrays["input"].shape
        engine, place = self._engine_for(shape), ("cpu", 0) if self._gpu is None else ("cuda", self._gpu)
        if self._gpu is not None:
            for each in {stream, *(array.stream for array in arrays.values() if array.stream is not None)}:
                wait_for_stream(self._gpu, each)
        try:
            binding = engine.io_binding()
            for name, array in arrays.items():
                bind = binding.bind_input if name == "input" else binding.bind_output
                bind(name, *place, np.dtype(array.dtype), array.shape, array.pointer)
            engine.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions have no base of their own
            raise self._failed(shape, error) from error

    def _call(self, array: np.ndarray) -> list[np.ndarray]:
        """The graph's outputs."""
        engine = self._engine_for(array.shape)
        try:
            answers = [np.asarray(answer) for answer in engine.run(self._outputs, {"input": array})]
        except Exception as error:  # ONNX Runtime's exceptions have no base of their own
            raise self._failed(array.shape, error) from error
        if answers[0].shape != array.shape:
            raise InvalidModel(f"{self.path}: expected an output of shape {array.shape}, found {answers[0].shape}")
        return answers

    def _engine_for(self, shape: tuple[int, ...]) -> ort.InferenceSession:
        """What runs inputs of this shape. Raises InvalidImage where nothing does."""
        (H, W), (height, width) = self.graph_io.size(shape), self.graph_io.size(self.input.shape)
        if height not in (-1, H) or width not in (-1, W):
            raise InvalidImage(
                f"{self.path} takes only images of {width}x{height} pixels, found {W}x{H} after padding "
                f"to a multiple of {self.multiple}; export it without --height and --width"
            )
        if self.graph_io.batch not in (ANY, shape[0]):
            raise InvalidImage(
                f"{self.path} takes {self.graph_io.batch} images at once, found {shape[0]}; export it with --batch"
            )
        if self._engine is None:
            raise RuntimeError("the session is closed")
        return self._engine

    def _failed(self, shape: tuple[int, ...], error: Exception) -> DeviceError:
        H, W = self.graph_io.size(shape)
        return device_error(f"{self.path} failed on {W}x{H} pixels", error)


def installed() -> list[str]:
    """The providers that this ONNX Runtime has, whether or not they start."""
    return [name for name, full in EXECUTION_PROVIDERS.items() if full in ort.get_available_providers()]


def _choose(provider: str) -> list[str]:
    """The providers to try, in this order. Raises InputError for one that is unknown, and DeviceError where it is not
    installed."""
    if provider not in FALLBACKS:
        raise InputError(f"unknown provider {provider!r}; known: {', '.join(FALLBACKS)}")
    if provider not in ("auto", *installed()):
        raise DeviceError(
            f"the provider {provider} is not in this ONNX Runtime, only {', '.join(installed())}; "
            "on NVIDIA GPUs install onnxruntime-gpu in place of onnxruntime"
        )
    wanted = [name for name in FALLBACKS[provider] if name in installed()]
    if wanted == ["cpu"]:
        return wanted
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
        ort.preload_dlls()  # CUDA and cuDNN from their Python packages, where those are installed
    return wanted


def _device(provider: str, gpu: int) -> dict[str, str]:
    """Where a provider runs: the processor, or the GPU of this number and its driver."""
    if provider == "cpu":
        return {"device": processor()}
    return {"device": cuda_device(gpu) or "", "driver": nvidia("driver_version") or ""}


def _describe(node: ort.NodeArg) -> Tensor:
    kind = str(node.type)
    return Tensor(node.name, DTYPES.get(kind, kind), tuple(n if isinstance(n, int) else -1 for n in node.shape))
