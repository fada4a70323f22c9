"""Stand-ins for CUDA and for TensorRT that record what is asked of them."""

from __future__ import annotations

import ctypes
import enum
import functools
import importlib
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np

from runtime import manifest
from runtime.bundle import Bundle, describe_file, load, save
from runtime.manifest import Engine, Manifest, Model, Profile, Tensor
from runtime.pixels import DTYPES, IO

GB = 2**30


class Code(enum.IntEnum):
    cudaSuccess = 0  # noqa: N815
    cudaErrorMemoryAllocation = 2  # noqa: N815
    cudaErrorInsufficientDriver = 35  # noqa: N815
    cudaErrorNoDevice = 100  # noqa: N815
    cudaErrorInvalidDevice = 101  # noqa: N815
    cudaErrorStreamCaptureInvalidated = 901  # noqa: N815


class Queue:
    """Work that is done in order, up to a position that somebody waits for."""

    def __init__(self) -> None:
        self.works: list = []
        self.done = 0

    def run_until(self, position: int) -> None:
        while self.done < position:
            self.done += 1
            self.works[self.done - 1]()


class Cuda(ModuleType):
    """`cuda.bindings.runtime` with GPUs whose memory is the host's. Functions record their names in `calls`, and in
    `used` the GPU that was current in the calling thread; where things are is in `places`.

    What is enqueued on a stream of `callers_stream` happens as late as it may: when somebody waits for it. On other
    streams it happens at once."""

    cudaStreamNonBlocking = 1  # noqa: N815
    cudaEventDisableTiming = 2  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down")  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="local")  # noqa: N815
    cudaDeviceAttr = SimpleNamespace(  # noqa: N815
        cudaDevAttrComputeCapabilityMajor=0, cudaDevAttrComputeCapabilityMinor=1
    )

    def __init__(self, *capabilities: tuple[int, int], devices: int | None = None, memory: int = GB) -> None:
        super().__init__("cuda.bindings.runtime")
        self.capabilities = capabilities or ((8, 6),)
        self.devices = len(self.capabilities) if devices is None else devices
        self.free = memory
        self.driver = 13000
        self.thread = threading.local()
        self.calls: list[str] = []
        self.used: set[int] = set()
        self.places: dict[int, int] = {}
        self.blocks: dict[int, np.ndarray] = {}
        self.captured: dict[int, list] = {}
        self.graphs: dict[int, list] = {}
        self.capturing: list | None = None
        self.spoilt = False
        self.queues: dict[int, Queue] = {}
        self.events: dict[int, tuple[Queue, int]] = {}

    @property
    def current(self) -> int:
        return getattr(self.thread, "device", 0)

    def _call(self, name: str, *values):
        self.calls.append(name)
        self.used.add(self.current)
        return (Code.cudaSuccess, *values)

    def cudaGetDeviceCount(self):  # noqa: N802
        return (Code.cudaSuccess, self.devices) if self.devices >= 0 else (Code.cudaErrorInsufficientDriver, None)

    def cudaDriverGetVersion(self):  # noqa: N802
        return Code.cudaSuccess, self.driver

    def cudaGetDeviceProperties(self, device):  # noqa: N802
        name = b"Stand-in %d.%d" % self.capabilities[device]
        return Code.cudaSuccess, SimpleNamespace(name=name, uuid=SimpleNamespace(bytes=bytes([device] * 16)))

    def cudaGetDevice(self):  # noqa: N802
        return Code.cudaSuccess, self.current

    def cudaSetDevice(self, device):  # noqa: N802
        if not 0 <= device < self.devices:
            return (Code.cudaErrorInvalidDevice,)
        self.thread.device = device
        return (Code.cudaSuccess,)

    def cudaDeviceGetAttribute(self, attribute, device):  # noqa: N802
        return Code.cudaSuccess, self.capabilities[device][attribute]

    def cudaStreamCreateWithFlags(self, flags):  # noqa: N802
        self.places[7] = self.current
        return self._call("stream", 7)

    def callers_stream(self) -> int:
        stream = 70 + len(self.queues)
        self.places[stream], self.queues[stream] = self.current, Queue()
        return stream

    def enqueue(self, stream, work) -> None:
        if stream in self.queues:
            self.queues[stream].works.append(work)
        else:
            work()

    def cudaEventCreateWithFlags(self, flags):  # noqa: N802
        event = 500 + len(self.events)
        self.events[event] = (Queue(), 0)
        return Code.cudaSuccess, event

    def cudaEventDestroy(self, event):  # noqa: N802
        del self.events[event]
        return (Code.cudaSuccess,)

    def cudaEventRecord(self, event, stream):  # noqa: N802
        queue = self.queues.get(stream, Queue())
        self.events[event] = (queue, len(queue.works))
        return (Code.cudaSuccess,)

    def cudaEventSynchronize(self, event):  # noqa: N802
        queue, position = self.events[event]
        queue.run_until(position)
        return (Code.cudaSuccess,)

    def cudaStreamWaitEvent(self, stream, event, flags):  # noqa: N802
        queue, position = self.events[event]
        self.enqueue(stream, lambda: queue.run_until(position))
        return (Code.cudaSuccess,)

    def cudaStreamDestroy(self, stream):  # noqa: N802
        return self._call("destroy stream")

    def cudaStreamSynchronize(self, stream):  # noqa: N802
        if stream in self.queues:
            self.queues[stream].run_until(len(self.queues[stream].works))
        return self._call("synchronize")

    def cudaMalloc(self, size):  # noqa: N802
        if size > self.free:
            return Code.cudaErrorMemoryAllocation, None
        self.free -= size
        block = np.full(max(size, 1), 255, np.uint8)  # as float32, NaN
        self.blocks[block.ctypes.data] = block
        self.places[block.ctypes.data] = self.current
        return self._call(f"malloc {size}", block.ctypes.data)

    cudaMallocHost = cudaMalloc  # noqa: N815

    def cudaFree(self, address):  # noqa: N802
        self.free += self.blocks.pop(address).size
        return self._call("free")

    cudaFreeHost = cudaFree  # noqa: N815

    def cudaMemcpyAsync(self, to, source, size, kind, stream):  # noqa: N802
        ctypes.memmove(to, source, size)
        return self._call(kind)

    def cudaStreamBeginCapture(self, stream, mode):  # noqa: N802
        assert self.capturing is None
        self.capturing = []
        return self._call("begin")

    def cudaStreamEndCapture(self, stream):  # noqa: N802
        assert self.capturing is not None
        key = 1000 + len(self.calls)
        self.captured[key], self.capturing = self.capturing, None
        if self.spoilt:
            self.spoilt = False
            del self.captured[key]
            return Code.cudaErrorStreamCaptureInvalidated, None
        return self._call("end", key)

    def cudaGraphInstantiate(self, graph, flags):  # noqa: N802
        key = 1000 + len(self.calls)
        self.graphs[key] = self.captured[graph]
        return self._call("instantiate", key)

    def cudaGraphDestroy(self, graph):  # noqa: N802
        del self.captured[graph]
        return self._call("destroy captured")

    def cudaGraphExecDestroy(self, key):  # noqa: N802
        del self.graphs[key]
        return self._call("destroy graph")

    def cudaGraphLaunch(self, key, stream):  # noqa: N802
        for work in self.graphs[key]:
            work()
        return self._call("launch")


class Context:
    """Computes 1 - input, in the memory that it was given, and refuses to run half set up."""

    def __init__(self, library: Library) -> None:
        self.library, self.cuda = library, library.cuda
        self.device = library.cuda.current
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = ()
        self.profile: int | None = None
        self.memory = (0, 0)
        library.contexts.append(self)

    def set_optimization_profile_async(self, index, stream):
        self.profile = index
        return True

    def set_input_shape(self, name, shape):
        assert self.profile is not None
        self.shape = tuple(shape)
        return name == "input"

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def update_device_memory_size_for_shapes(self):
        if self.library.unmeasured:
            self.library.log.log(self.library.ILogger.Severity.ERROR, "shapes that\nno one knows")
            return 0
        return self.library.activations * int(np.prod(self.shape))

    def set_device_memory(self, address, size):
        self.memory = (address, size)

    def execute_async_v3(self, stream):
        if self.library.failing:
            self.library.log.log(self.library.ILogger.Severity.ERROR, "out of\n luck")
            return False
        if self.cuda.capturing is not None and self.library.synchronizes:  # which is not allowed while capturing
            self.cuda.spoilt = True
            return True
        places = {self.cuda.places[key] for key in (stream, self.memory[0], *self.addresses.values())}
        assert places == {self.device, self.cuda.current}
        assert self.memory[0] in self.cuda.blocks
        assert self.memory[1] >= self.update_device_memory_size_for_shapes()
        self.cuda.calls.append("enqueue")
        work = functools.partial(self.compute, dict(self.addresses), self.memory)
        if self.cuda.capturing is not None:
            self.cuda.capturing.append(work)
        else:
            self.cuda.enqueue(stream, work)
        return True

    def compute(self, addresses, memory):
        dtype = self.library.dtype
        source, target = (self.cuda.blocks[addresses[name]] for name in ("input", "output"))
        self.cuda.blocks[memory[0]][:] = 0  # it works there
        size = int(np.prod(self.shape)) * np.dtype(dtype).itemsize
        target[:size].view(dtype)[:] = (255 if dtype == "uint8" else 1) - source[:size].view(dtype)
        if self.library.finite is not None:
            self.cuda.blocks[addresses["finite"]].view(np.float32)[:] = self.library.finite


class Config:
    """Of TensorRT for RTX; as it is made, its contexts would take their memory themselves."""

    strategy = "static"
    cuda_graph_strategy = "disabled"
    cache = None
    deserialized: bytes | None = None

    def __init__(self, library: Library) -> None:
        self.library = library

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        return SimpleNamespace(deserialize=self._deserialize, serialize=lambda: b"kernels")

    def _deserialize(self, content):
        assert hasattr(self.library.cuda.thread, "device")  # which makes the CUDA context that this needs
        self.deserialized = content
        return self.library.accepts_cache

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True


class Library(ModuleType):
    """A TensorRT whose engines are the bytes `plan`. From 10.11 on they have a runtime config. They answer with
    `finite` too, unless it is None."""

    class ILogger:
        Severity = enum.IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO"], start=0)

    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="ours")
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole", DISABLED="disabled")

    def __init__(
        self, cuda: Cuda, version: str = "11.4.0", dtype: str = "float32", finite: float | None = None
    ) -> None:
        super().__init__("tensorrt")
        self.__version__, self.cuda, self.dtype, self.finite = version, cuda, dtype, finite
        self.activations, self.failing, self.unmeasured, self.synchronizes = 4, False, False, False
        self.contexts: list[Context] = []
        self.runtimes: list = []
        self.configs: list[Config] = []
        self.refits: list = []
        self.plans: list[bytes] = []
        self.accepts_cache = True
        if tuple(map(int, version.split("."))) >= (10, 11):
            self.create_runtime_config = self._create_runtime_config

    def Runtime(self, log):  # noqa: N802
        self.log = log
        self.runtimes.append(SimpleNamespace(deserialize_cuda_engine=self._deserialize, log=log))
        return self.runtimes[-1]

    def _deserialize(self, plan):
        self.plans.append(plan)
        self.log.log(self.ILogger.Severity.ERROR, "a plan of\nanother kind")
        return self if plan == b"plan" else None

    def _create_runtime_config(self):
        self.configs.append(Config(self))
        return self.configs[-1]

    @property
    def num_io_tensors(self):
        return 2 if self.finite is None else 3

    def get_tensor_name(self, index):
        return ("input", "output", "finite")[: self.num_io_tensors][index]

    def create_execution_context(self, strategy):
        """Or from a config."""
        assert (strategy.strategy if isinstance(strategy, Config) else strategy) == "ours"
        return Context(self)

    def Refitter(self, engine, log):  # noqa: N802
        return SimpleNamespace(refit_cuda_engine=lambda: self.refits.append("refitted") is None)

    def OnnxParserRefitter(self, refitter, log):  # noqa: N802
        return SimpleNamespace(refit_from_bytes=lambda content: self.refits.append(content) is None)


PROFILES = (Profile((8, 8), (16, 16), (32, 32)), Profile((8, 40), (8, 64), (16, 128)))


def make_bundle(folder: Path, *engines: dict, io: IO = "tensor", plan: bytes = b"plan", batch: int = 1) -> Bundle:
    """With an engine for each of `engines`, which say how it differs from the usual one, of a model of `batch` images
    at once."""
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(b"weights")
    model = describe_file(folder / "model.onnx", "onnx")
    shape, dtype = (batch, -1, -1, 3) if io == "image" else (batch, 3, -1, -1), DTYPES[io].name
    described = Model(
        "model.onnx",
        io,
        Tensor("input", dtype, shape),
        Tensor("output", dtype, shape),
        8 if io == "tensor" else 1,
        None,
        None,
        None,
        None,
        None,
    )
    made = Manifest(manifest.SCHEMA, "test", described, (model,))
    for i, options in enumerate(engines):
        path = folder / f"{i}.engine"
        path.write_bytes(plan)
        usual = dict(flavor="tensorrt", version="11.4.0", compute_capabilities=("8.6",), profiles=PROFILES, flags={})
        made = made.with_file(
            describe_file(path, "engine"), Engine(path.name, **(usual | options), onnx_sha256=model.sha256)
        )
    save(made, folder)
    return load(folder)


def has_driver() -> bool:
    code, count = importlib.import_module("cuda.bindings.runtime").cudaGetDeviceCount()
    return not code and count > 0
