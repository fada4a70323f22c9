"""A network in TensorRT or TensorRT for RTX, from a bundle made by `export.tensorrt`.

    session = TrtSession(bundle, bundle.manifest.engines[0])      # or runtime.session.open_engine(bundle)

The fastest engine on an NVIDIA GPU. What it costs: an engine fits one version of one library, some kinds of GPU and
some image sizes, and every run is exclusive. TensorRT comes from NVIDIA's own package index or SDK, TensorRT for RTX
from PyPI; both have the same Python API, and where they differ is said once, in `LIBRARIES`.

What the libraries demand shapes this module. They may crash where there is no driver, so CUDA is asked first. An engine
is native code, so only bytes that `Bundle.read` has verified are deserialised. A CUDA graph is spoilt when the context
that it was captured from changes, so every image size, and every number of images at once, has a context of its own;
they share one block of memory for what lies between the layers, as large as the largest of them needs. Written against
the vendor's API and tested against stand-ins; it has not run on a GPU yet.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import arrays_of
from .bundle import Bundle
from .errors import DeviceError, InvalidImage, InvalidModel, device_error, one_line
from .files import read_own, writing
from .manifest import FLAVOR_TITLES, Engine, Flavor
from .pixels import FINITE, Size, filled


@dataclass(frozen=True)
class Library:
    """One of NVIDIA's libraries, and in what it differs from the other.

    Attributes:
        modules: Names of the modules to import, in this order; the last one is the API.
        install: How to get it.
        capabilities: GPUs that an engine is built for if none are named; None where only those that are in the machine.
        options: Options of `export.tensorrt` that it has.
        jit: It compiles kernels at run time: it can keep them in a cache, and captures CUDA graphs by itself, since
            only it knows when a kernel is the final one.
    """

    title: str
    modules: tuple[str, ...]
    install: str
    capabilities: tuple[str, ...] | None
    options: frozenset[str]
    jit: bool

    def load(self) -> Any:
        """Import it. Raises DeviceError where it is not installed."""
        try:
            return [importlib.import_module(name) for name in self.modules][-1]
        except (ImportError, OSError) as error:
            raise DeviceError(f"{self.title} is not installed ({one_line(error)}): {self.install}") from error


LIBRARIES: dict[Flavor, Library] = {
    "rtx": Library(
        title=FLAVOR_TITLES["rtx"],
        modules=("tensorrt_rtx_libs", "tensorrt_rtx_bindings"),
        install="pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings",
        capabilities=("8.6", "8.9", "12.0"),
        options=frozenset({"compute_capability", "strip_weights"}),
        jit=True,
    ),
    "tensorrt": Library(
        title=FLAVOR_TITLES["tensorrt"],
        modules=("tensorrt",),
        install="pip install tensorrt, which fetches it from NVIDIA's package index, or use the SDK",
        capabilities=None,
        options=frozenset({"version_compatible", "hardware_compatible", "strip_weights", "timing_cache"}),
        jit=False,
    ),
}


def library_version(flavor: Flavor) -> str:
    """Version of an installed library. Raises DeviceError where it is not installed."""
    return LIBRARIES[flavor].load().__version__


def new_log(trt: Any) -> Any:
    """A logger for either library that is silent and keeps the `errors`. It has to outlive all that it is given to."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)

        def reason(self) -> str:
            return " ".join(self.errors[-1].split()) if self.errors else "it gives no reason"

    return Log()


def load_cuda() -> Any:
    """`cuda.bindings.runtime`. Raises DeviceError where it is not installed."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise DeviceError(f"CUDA bindings are not installed ({one_line(error)}): pip install cuda-bindings") from error


def gpu(device: int | None = None) -> str:
    """Compute capability of a GPU by CUDA's number, such as "8.9". None is the calling thread's current one: the first
    of those in CUDA_VISIBLE_DEVICES, unless cudaSetDevice or torch.cuda.set_device chose another. Raises DeviceError
    where there is no such."""
    cuda = load_cuda()
    code, count = cuda.cudaGetDeviceCount()
    if code or not count:
        raise DeviceError(
            f"CUDA finds no NVIDIA GPU with a driver ({code.name}); expected one: see that nvidia-smi "
            "shows it, or run the ONNX model with the provider cpu"
        )
    if device is None:
        device = _check(cuda.cudaGetDevice())
    elif not 0 <= device < count:
        raise DeviceError(f"`device`: expected a GPU from 0 to {count - 1}, found {device}")
    attributes = cuda.cudaDeviceAttr
    major = _check(cuda.cudaDeviceGetAttribute(attributes.cudaDevAttrComputeCapabilityMajor, device))
    minor = _check(cuda.cudaDeviceGetAttribute(attributes.cudaDevAttrComputeCapabilityMinor, device))
    return f"{major}.{minor}"


class TrtSession:
    """A `runtime.session.Session` on an engine of a bundle.

    The session stays on its GPU, whichever threads run it. The first run at a new size sets up, and with TensorRT for
    RTX compiles kernels, which are kept in a file beside the bundle (see `cache_path`). Memory on the GPU: input and
    output for the largest size of the engine's profiles, and for the rest what the largest image so far needs. `close`,
    not during a run, frees it; so does the end of the session's life.

    Args:
        bundle: From `runtime.bundle.load`.
        engine: One of its engines, for the GPU and the library that are here, see `runtime.choice`.
        device: CUDA's number of the GPU; None is the calling thread's current one (see `gpu`).
        sizes: For how many image sizes (and numbers of images) the context, and with it the CUDA graph, is kept; the
            longest unused goes first.
        cuda_graphs: Replay the launches of a size from its second run on.

    Raises:
        DeviceError: Where there is no driver or not the library, or it refuses the engine.
        MismatchError: For files that are not what the manifest says.
        OutOfMemory: Where memory on the GPU does not suffice.
    """

    provider = "tensorrt"

    def __init__(
        self, bundle: Bundle, engine: Engine, device: int | None = None, sizes: int = 8, cuda_graphs: bool = True
    ) -> None:
        gpu(device)  # before TensorRT is touched, which may crash where there is no driver
        self.bundle, self.engine = bundle, engine
        self.path = bundle.folder / self.engine.file
        self.multiple = bundle.manifest.model.size_multiple
        self.limits = tuple((profile.min, profile.max) for profile in self.engine.profiles)
        self._library = LIBRARIES[self.engine.flavor]
        self.graph_io = bundle.manifest.model.graph_io
        trt = self._library.load()
        self._cuda_graphs = cuda_graphs
        self._lock = threading.Lock()
        self._cuda = load_cuda()
        self._device = _check(self._cuda.cudaGetDevice()) if device is None else device
        self._on_device = functools.partial(_on_device, self._cuda, self._device)
        self._log = new_log(trt)
        pixels = max(profile.batch[2] * profile.max[0] * profile.max[1] for profile in self.engine.profiles)
        size = pixels * 3 * self.graph_io.dtype.itemsize
        resources = contextlib.ExitStack()
        self.close = weakref.finalize(self, _close, resources, self._on_device)
        with self._on_device():
            self._cuda_engine = self._deserialize(trt, bundle)
            self._config = self._configure(trt, bundle, resources)
            self._stream = _check(self._cuda.cudaStreamCreateWithFlags(self._cuda.cudaStreamNonBlocking))
            resources.callback(self._cuda.cudaStreamDestroy, self._stream)
            self._done, self._ready = (_event(self._cuda, resources) for _ in range(2))
            self._input, self._output = (_Buffer(self._cuda, size, resources) for _ in range(2))
            names = [self._cuda_engine.get_tensor_name(i) for i in range(self._cuda_engine.num_io_tensors)]
            most = max(profile.batch[2] for profile in self.engine.profiles)
            self._finite = _Buffer(self._cuda, 4 * most, resources) if FINITE in names else None
        self.identity = {"library": f"{self._library.title} {trt.__version__}", **_device(self._cuda, self._device)}
        self._contexts = _Contexts(self._cuda, sizes, self._done)
        resources.callback(self._contexts.close)

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 (B, 3, H, W) RGB in [0, 1], H and W multiples of `multiple`, B at most `max_batch` -> the same shape,
        not clamped. Where the engine takes no fewer, the last image is repeated.

        Safe to call from several threads, which take turns. Raises InvalidImage for a size, or so many images of it,
        that is in no profile of the engine, OutOfMemory where memory on the GPU does not suffice, and DeviceError where
        it fails.
        """
        outputs = self._call(self.graph_io.feed(batch))
        return self.graph_io.answer(*(output[: len(batch)] for output in outputs))

    def run_image(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 (H, W, 3) -> the same, of a graph of images; raises InvalidModel where that says that its answer was
        not finite, for the rest see `run`."""
        return self.run_images(image[None])[0]

    def run_images(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 (B, H, W, 3) -> the same, as `run_image` does each."""
        return self.graph_io.images(*(output[: len(images)] for output in self._call(images)))

    def max_batch(self, size: Size) -> int:
        """How many images of a (height, width) `run` takes at once at most."""
        return self.engine.max_batch(*size)

    def enqueue(self, input: object, output: object, stream: int = 0, finite: object | None = None) -> None:
        """See `runtime.contract.Session`. Comes back at once. A size that is new waits for the GPU, so `stream` must
        not be in capture. No CUDA graph is captured, since one has the addresses of then; whether TensorRT for RTX
        captures one is its own affair. On the default stream, 0, TensorRT waits more than it has to."""
        with self._locked():
            arrays = arrays_of(self.graph_io, self._finite is not None, self._device, stream, input, output, finite)
            shape = arrays["input"].shape
            profile = self._profile(shape[0], *self.graph_io.size(shape))
            if (least := self.engine.profiles[profile].batch[0]) > shape[0]:
                raise InvalidImage(f"{self.path} takes at least {least} images at once, found {shape[0]}")
            context = self._context(profile, shape, callers=True)
            places = {name: array.pointer for name, array in arrays.items()}
            if self._finite and finite is None:
                places[FINITE] = self._finite.device  # where nobody reads it
            for name, place in places.items():
                if not context.execution.set_tensor_address(name, place):
                    raise self._failed(shape)
            for array in arrays.values():
                if array.stream is not None:
                    _check(self._cuda.cudaEventRecord(self._ready, array.stream))
                    _check(self._cuda.cudaStreamWaitEvent(stream, self._ready, 0))
            self._launch(context, stream)

    def _call(self, feed: np.ndarray) -> list[np.ndarray]:
        """The graph's outputs."""
        with self._locked():
            profile = self._profile(len(feed), *self.graph_io.size(feed.shape))
            feed = filled(feed, self.engine.profiles[profile].batch[0])
            context = self._context(profile, feed.shape)
            self._input.upload(feed, self._stream)
            self._launch(context, self._stream)
            answers = [self._output.download(feed.shape, feed.dtype, self._stream)]
            if self._finite:
                answers.append(self._finite.download(feed.shape[:1], np.dtype(np.float32), self._stream))
            return answers

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if not self.close.alive:
            raise RuntimeError("the session is closed")
        with self._lock, self._on_device():
            yield

    def _deserialize(self, trt: Any, bundle: Bundle) -> Any:
        self._runtime = trt.Runtime(self._log)
        # An engine for later versions, too, brings the code that runs it.
        self._runtime.engine_host_code_allowed = self.engine.flags.get("version_compatible") is True
        engine = self._runtime.deserialize_cuda_engine(bundle.read(self.engine.file))
        if engine is None:
            raise DeviceError(
                f"{self._library.title} refuses {self.path}: {self._log.reason()}; build it again on or "
                "for this machine"
            )
        if self.engine.flags.get("strip_weights") is True:
            refitter = trt.Refitter(engine, self._log)
            weights = trt.OnnxParserRefitter(refitter, self._log)
            if (
                not weights.refit_from_bytes(bundle.read(bundle.manifest.model.file))
                or not refitter.refit_cuda_engine()
            ):
                raise InvalidModel(
                    f"{self.path} does not take the weights of {bundle.manifest.model.file}: {self._log.reason()}"
                )
        return engine

    def _configure(self, trt: Any, bundle: Bundle, resources: contextlib.ExitStack) -> Any:
        """What contexts are made with. TensorRT has no runtime config before 10.11, and needs none."""
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._library.jit:
            return strategy
        config = self._cuda_engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        graphs = trt.CudaGraphStrategy
        config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if self._cuda_graphs else graphs.DISABLED
        cache, path = config.create_runtime_cache(), cache_path(bundle, self.engine)
        known = read_own(path)
        if known:
            cache.deserialize(known)  # False for one of another GPU or driver, which changes nothing
        config.set_runtime_cache(cache)
        resources.callback(_save_cache, cache, path, known)
        return config

    def _context(self, profile: int, shape: tuple[int, ...], callers: bool = False) -> _Context:
        """What runs inputs of this shape, in the session's own memory or in that of its callers."""
        return self._contexts.get(shape, callers) or self._prepare(profile, shape, callers)

    def _profile(self, images: int, H: int, W: int) -> int:
        """Index of the profile for so many images of this size."""
        profile = self.engine.profile_for(H, W, images)
        if profile is None:
            ranges = " or ".join(map(str, self.engine.profiles))
            several = f"{images} of " if images > 1 else ""
            raise InvalidImage(
                f"{self.path} takes images of height x width {ranges}, found {several}{H}x{W} after padding to a "
                f"multiple of {self.multiple}; build it with another --min and --max, or --batch"
            )
        return profile

    def _prepare(self, profile: int, shape: tuple[int, ...], callers: bool) -> _Context:
        context = self._cuda_engine.create_execution_context(self._config)
        if (
            context is None
            or not context.set_optimization_profile_async(profile, self._stream)
            or not context.set_input_shape("input", shape)
            or not context.set_tensor_address("input", self._input.device)
            or not context.set_tensor_address("output", self._output.device)
            or (self._finite and not context.set_tensor_address(FINITE, self._finite.device))
            or not (needed := context.update_device_memory_size_for_shapes())  # 0 for an error
        ):
            raise self._failed(shape)
        return self._contexts.add(shape, callers, context, needed)

    def _launch(self, context: _Context, stream: Any) -> None:
        """Run a context on a stream, after the one before, since they share their memory. Graphs are captured in the
        second run: the first one completes the set-up, which must not be captured, and is the only one for many an
        image in a folder."""
        _check(self._cuda.cudaStreamWaitEvent(stream, self._done, 0))
        capturing = self._cuda_graphs and not self._library.jit and not context.callers
        if capturing and context.warm and context.graph is None:
            context.graph = self._capture(context)
        try:
            if context.graph is not None:
                _check(self._cuda.cudaGraphLaunch(context.graph, stream))
            elif context.execution.execute_async_v3(stream):
                context.warm = True
            else:
                raise self._failed(context.shape)
        finally:  # behind what failed halfway, too
            _check(self._cuda.cudaEventRecord(self._done, stream))

    def _capture(self, context: _Context) -> Any:
        cuda = self._cuda
        _check(cuda.cudaStreamBeginCapture(self._stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
        try:
            enqueued = context.execution.execute_async_v3(self._stream)
        finally:
            code, captured = cuda.cudaStreamEndCapture(self._stream)
        try:
            if code or not enqueued:
                raise DeviceError(
                    f"{self.path} cannot be captured in a CUDA graph: "
                    f"{code.name if enqueued else self._log.reason()}; give TrtSession cuda_graphs=False"
                )
            return _check(cuda.cudaGraphInstantiate(captured, 0))
        finally:
            if captured is not None:  # as it is where CUDA refused a launch
                cuda.cudaGraphDestroy(captured)

    def _failed(self, shape: tuple[int, ...]) -> DeviceError:
        H, W = self.graph_io.size(shape)
        return device_error(f"{self.path} failed on {W}x{H} pixels", self._log.reason())


class _Buffer:
    """As much memory on the GPU as in pinned memory of the host, which copies fastest."""

    def __init__(self, cuda: Any, size: int, resources: contextlib.ExitStack) -> None:
        self._cuda = cuda
        self.device = _check(cuda.cudaMalloc(size))
        resources.callback(cuda.cudaFree, self.device)
        self._host = _check(cuda.cudaMallocHost(size))
        resources.callback(cuda.cudaFreeHost, self._host)
        self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(self._host)))

    def upload(self, array: np.ndarray, stream: Any) -> None:
        self._bytes[: array.nbytes] = array.reshape(-1).view(np.uint8)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        _check(self._cuda.cudaMemcpyAsync(self.device, self._host, array.nbytes, kind, stream))

    def download(self, shape: tuple[int, ...], dtype: np.dtype, stream: Any) -> np.ndarray:
        size = int(np.prod(shape)) * dtype.itemsize
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        _check(self._cuda.cudaMemcpyAsync(self._host, self.device, size, kind, stream))
        _check(self._cuda.cudaStreamSynchronize(stream))
        return self._bytes[:size].view(dtype).reshape(shape).copy()


@dataclass
class _Context:
    """What is set up for one shape of the input, in the session's own memory or in that of its `callers`. `warm` once
    it has run, `graph` once it is captured."""

    shape: tuple[int, ...]
    callers: bool
    execution: Any
    warm: bool = False
    graph: Any = None


class _Contexts:
    """The contexts by the shape of the input, and the memory in which they all work, one at a time. Where one needs
    more than there is, the others go, because its address is in their graphs. None goes before `done`, the event behind
    the last work."""

    def __init__(self, cuda: Any, limit: int, done: Any) -> None:
        self._cuda = cuda
        self._limit = limit
        self._done = done
        self._contexts: OrderedDict[tuple[tuple[int, ...], bool], _Context] = OrderedDict()
        self._memory, self._bytes = 0, 0

    def get(self, shape: tuple[int, ...], callers: bool) -> _Context | None:
        if (shape, callers) in self._contexts:
            self._contexts.move_to_end((shape, callers))
        return self._contexts.get((shape, callers))

    def add(self, shape: tuple[int, ...], callers: bool, execution: Any, needed: int) -> _Context:
        """`needed`: bytes of memory that it works in."""
        if needed > self._bytes:
            self.close()
            self._memory, self._bytes = _check(self._cuda.cudaMalloc(needed)), needed
        execution.set_device_memory(int(self._memory), self._bytes)
        if len(self._contexts) == self._limit:
            self._drop(next(iter(self._contexts)))
        context = self._contexts[shape, callers] = _Context(shape, callers, execution)
        return context

    def close(self) -> None:
        """Free everything; it can be filled again."""
        for key in list(self._contexts):
            self._drop(key)
        if self._bytes:
            _check(self._cuda.cudaFree(self._memory))
        self._memory, self._bytes = 0, 0

    def _drop(self, key: tuple[tuple[int, ...], bool]) -> None:
        _check(self._cuda.cudaEventSynchronize(self._done))
        context = self._contexts.pop(key)
        if context.graph is not None:
            _check(self._cuda.cudaGraphExecDestroy(context.graph))


def _event(cuda: Any, resources: contextlib.ExitStack) -> Any:
    event = _check(cuda.cudaEventCreateWithFlags(cuda.cudaEventDisableTiming))
    resources.callback(cuda.cudaEventDestroy, event)
    return event


def cache_path(bundle: Bundle, engine: Engine) -> Path:
    """Where TensorRT for RTX keeps the kernels that it has compiled for an engine. Not in the bundle's folder: kernels
    are code, and nothing verifies them."""
    return bundle.beside(engine.file, "cache")


def _device(cuda: Any, device: int) -> dict[str, str]:
    """A GPU, by its name and UUID, and its driver."""
    properties = _check(cuda.cudaGetDeviceProperties(device))
    name = properties.name.decode(errors="replace").rstrip("\0")
    return {
        "device": f"{name} {bytes(properties.uuid.bytes).hex()}",
        "driver": str(_check(cuda.cudaDriverGetVersion())),
    }


@contextlib.contextmanager
def _on_device(cuda: Any, device: int) -> Iterator[None]:
    """Make a GPU the current one of the calling thread, and then the former again."""
    former = _check(cuda.cudaGetDevice())
    _check(cuda.cudaSetDevice(device))
    try:
        yield
    finally:
        cuda.cudaSetDevice(former)  # if that GPU is full, this fails, but not what was done here


def _close(resources: contextlib.ExitStack, on_device: Callable[[], Any]) -> None:
    with on_device():
        resources.close()


def _check(result: tuple[Any, ...]) -> Any:
    """What a function of CUDA returns besides its code. Raises DeviceError for a code that is no success."""
    code, *values = result
    if code:
        raise device_error("CUDA failed", code.name)
    return values[0] if values else None


def _save_cache(cache: Any, path: Path, known: bytes) -> None:
    content = bytes(cache.serialize())
    if content != known:
        with contextlib.suppress(OSError), writing(path, mode=0o600) as temporary:  # or the next start is slower
            temporary.write_bytes(content)
