"""What is timed against what: the released network, as users have it, and ours, in every engine that is here.

`contestants` is the list; each is a function of a `Subject`, a network with its weights.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import released
from benchmarks.harness import Size, Work
from drsformer import checkpoint
from drsformer.config import PRESETS
from drsformer.model import DRSformer, MixtureOfExpertsCompensator, SparseTransformerBlock
from export.folding import DTYPES, fold
from export.options import Precision
from export.topk import with_pattern
from runtime.bundle import load
from runtime.errors import InputError
from runtime.session import open_engine


@dataclass(frozen=True, eq=False)
class Subject:
    """A network to measure. `released` has the same weights, and is there for networks that the released code can
    express; `trained` tells whether dB mean anything."""

    name: str
    network: DRSformer
    released: nn.Module | None
    trained: bool


def from_preset(name: str) -> Subject:
    """A network of `PRESETS` with fixed random weights, in our form and in the released one."""
    if name not in PRESETS:
        raise InputError(f"`network`: expected one of {', '.join(PRESETS)}, found {name}")
    settings = dict(PRESETS[name])
    settings["mefc"] = settings["mefc"] == "both"
    original = fill(released.ReleasedDRSformer(**settings)).requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "released.pth"
        torch.save({"params": original.state_dict()}, path)
        network = checkpoint.load(path).model.requires_grad_(False)
    return Subject(name, network, original, False)


def from_weights(path: Path) -> Subject:
    return Subject(path.stem, checkpoint.load(path).model.requires_grad_(False), None, True)


def fill(network: nn.Module) -> nn.Module:
    """Give every parameter values that depend on its name and shape alone, such that activations stay near 1."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(parameter.shape)
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 and "temperature" not in name else 0.1
            values = torch.from_numpy(noise.astype(np.float32)) * scale
            parameter.copy_(values if parameter.dim() > 1 and "temperature" not in name else parameter + values)
    return network.eval()


def picture(size: Size, batch: int = 1) -> Tensor:
    """A smooth random image with noise, (B, 3, H, W) float32 in [0, 1], on the CPU."""
    H, W = size
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, max(2, H // 32), max(2, W // 32), generator=generator)
    smooth = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
    return (smooth + 0.05 * torch.randn(batch, 3, H, W, generator=generator)).clamp(0, 1)


Form = Literal["released", "readable", "folded", "fused"]
"""`fused`: folded, with the kernels of `export.fused`."""

FOLDED: frozenset[Form] = frozenset({"folded", "fused"})
"""Forms that take float32 whatever they compute in."""


@functools.cache
def formed(subject: Subject, form: Form, precision: Precision) -> nn.Module:
    """A subject on the CPU in a form and a precision; the released one in half precision is what .half() makes."""
    if form == "folded":
        return fold(with_pattern(subject.network, "threshold"), precision)  # as export.onnx does
    if form == "fused":
        from export.fused import fuse

        return fuse(cast("DRSformer", formed(subject, "folded", precision)))
    network = subject.network if form == "readable" else subject.released
    if network is None:
        raise InputError(f"{subject.name}: the released code has no such network")
    return copy.deepcopy(network).to(DTYPES[precision])


# Contestants.


class Contestant(Protocol):
    """Something that derains, under a name.

    subject:   whose weights it has.
    precision: that it computes in.
    """

    @property
    def name(self) -> str: ...
    @property
    def subject(self) -> Subject: ...
    @property
    def precision(self) -> Precision: ...

    @property
    def compiles(self) -> Any:
        """Something that is equal for contestants that share compiled code; None where nothing takes long to make."""
        ...

    def start(self, image: Tensor) -> Callable[[], Tensor]:
        """Get ready for an image on the device, (B, 3, H, W) float32; what is returned restores it."""
        ...

    def work(self, size: Size, batch: int) -> Work:
        """What it has to do."""
        ...


@dataclass(frozen=True)
class Torch:
    """A network in PyTorch. `compiled`: its blocks and compensators one by one by torch.compile, the rest
    eagerly; `graph`: recorded once as a CUDA graph and replayed."""

    subject: Subject
    form: Form
    precision: Precision
    compiled: bool = False
    graph: bool = False
    channels_last: bool = False

    @property
    def name(self) -> str:
        parts = [self.subject.name, self.form, "torch.compile" if self.compiled else "eager"]
        parts += ["CUDA graph"] * self.graph + ["channels_last"] * self.channels_last
        return " ".join([*parts, self.precision])

    @property
    def compiles(self) -> Any:
        return dataclasses.replace(self, graph=False) if self.compiled else None

    def start(self, image: Tensor) -> Callable[[], Tensor]:
        if self.graph and image.device.type != "cuda":
            raise RuntimeError("CUDA graphs need a CUDA device")
        network = placed(self.subject, self.form, self.precision, self.compiled, self.channels_last, image.device)
        if self.form not in FOLDED:
            image = image.to(DTYPES[self.precision])
        if self.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        call = lambda: network(image)  # noqa: E731
        for _ in range(3):
            call()
        return captured(call, image.device) if self.graph else call

    def work(self, size: Size, batch: int) -> Work:
        form = "folded" if self.form == "fused" else self.form  # whose operators can be counted
        return work_of(self.subject, form, self.precision, size, batch)


@functools.cache
def work_of(subject: Subject, form: Form, precision: Precision, size: Size, batch: int) -> Work:
    """What PyTorch is asked to do, counted without doing it."""
    network = copy.deepcopy(formed(subject, form, precision)).to("meta")
    image = torch.empty(batch, 3, *size, device="meta")
    with torch.no_grad(), Work() as work:
        network(image if form == "folded" else image.to(DTYPES[precision]))
    return work


REGIONS = (SparseTransformerBlock, MixtureOfExpertsCompensator, released.Block, released.MEFC)
"""What is compiled as a piece. The whole network in one piece takes many times as long to compile."""


@functools.cache
def placed(
    subject: Subject, form: Form, precision: Precision, compiled: bool, channels_last: bool, device: torch.device
) -> nn.Module:
    network = copy.deepcopy(formed(subject, form, precision)).to(device)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    for part in network.modules():
        if compiled and isinstance(part, REGIONS):
            part.compile(dynamic=False)
    return network


def captured(call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """`call` as a CUDA graph, whose output is in the same place every time."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


@functools.cache
def onnx_of(subject: Subject, form: Form, precision: Precision, batch: int = 1, size: Size | None = None) -> bytes:
    """The model that PyTorch's exporter makes of a form, of any size if none is given. Raises InputError for a batch
    that `export.graph` does not offer."""
    from export.graph import to_onnx

    options: dict[str, Any] = {"size": size} if size else {}
    if batch > 1:
        if "batch" not in inspect.signature(to_onnx).parameters:
            raise InputError(f"expected a batch of 1, since export.graph offers no other, found {batch}")
        options["batch"] = batch
    return to_onnx(formed(subject, form, precision), **options).SerializeToString()


@dataclass(frozen=True)
class Ort:
    """A network in ONNX Runtime with the provider for the device; input and output stay on the device. `graph`: the
    provider records a CUDA graph and replays it, of a model for the one size."""

    subject: Subject
    form: Form
    precision: Precision
    graph: bool = False

    @property
    def name(self) -> str:
        parts = [self.subject.name, self.form, "ONNX Runtime", *["CUDA graph"] * self.graph]
        return " ".join([*parts, self.precision])

    @property
    def compiles(self) -> Any:
        return self

    def start(self, image: Tensor) -> Callable[[], Tensor]:
        import onnxruntime as ort

        kind = image.device.type
        if self.graph and kind != "cuda":
            raise RuntimeError("CUDA graphs need a CUDA device")
        provider = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}[kind]
        if provider not in ort.get_available_providers():
            raise RuntimeError(f"onnxruntime {ort.__version__} offers only {', '.join(ort.get_available_providers())}")
        ort.preload_dlls()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        size = (image.shape[2], image.shape[3]) if self.graph else None
        model = onnx_of(self.subject, self.form, self.precision, image.shape[0], size)
        session = ort.InferenceSession(model, options, providers=[(provider, self._provider_options(kind))])
        if provider not in session.get_providers():
            raise RuntimeError(f"onnxruntime {ort.__version__} could not start {provider}")
        output = torch.empty_like(image)
        binding = session.io_binding()
        binding.bind_input("input", kind, 0, np.float32, tuple(image.shape), image.data_ptr())
        binding.bind_output("output", kind, 0, np.float32, tuple(output.shape), output.data_ptr())

        def call() -> Tensor:
            session.run_with_iobinding(binding)  # returns when the device has finished
            return output

        for _ in range(2):
            call()
        return call

    def _provider_options(self, kind: str) -> dict[str, str]:
        return {"enable_cuda_graph": str(int(self.graph))} if kind == "cuda" else {}

    def work(self, size: Size, batch: int) -> Work:
        return work_of(self.subject, self.form, self.precision, size, batch)


@dataclass(frozen=True)
class Trt:
    """The folded network in an engine for one size, by `runtime.trt`; its time has the transfers to and from the
    device in it."""

    subject: Subject
    flavor: Literal["tensorrt", "rtx"]
    precision: Precision = "fp16"

    @property
    def name(self) -> str:
        return f"{self.subject.name} folded {self.flavor} {self.precision}"

    @property
    def compiles(self) -> Any:
        return self

    def start(self, image: Tensor) -> Callable[[], Tensor]:
        from export.onnx import ExportOptions, export
        from export.tensorrt import BuildOptions, build
        from runtime import trt

        trt.LIBRARIES[self.flavor].load()
        capability = (trt.gpu(),) if self.flavor == "rtx" else ()
        size = ((image.shape[2], image.shape[3]),)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            checkpoint.save(folder / "w.safetensors", self.subject.network, {})
            export(folder / "w.safetensors", folder / "model.onnx", ExportOptions(precision=self.precision))
            build(folder / "model.onnx", folder / "bundle", BuildOptions(self.flavor, capability, size, size, size))
            session = open_engine(load(folder / "bundle"))
            batch = image.cpu().numpy()
            session.run(batch)
        return lambda: torch.from_numpy(session.run(batch))

    def work(self, size: Size, batch: int) -> Work:
        return work_of(self.subject, "folded", self.precision, size, batch)


def contestants(subject: Subject, small: Sequence[Subject], batch: int) -> list[Contestant]:
    """In the order of importance; the first is what all are compared with."""
    of = functools.partial(Torch, subject)
    found: list[Contestant] = [
        of("released", "fp32"),
        of("released", "fp16"),
        of("folded", "fp16"),
        of("folded", "fp16", graph=True),
        of("folded", "fp16", graph=True, channels_last=True),
        of("folded", "fp16", compiled=True),
        of("folded", "fp16", compiled=True, graph=True),
        of("fused", "fp16", graph=True, channels_last=True),
        of("fused", "fp16", compiled=True, graph=True, channels_last=True),
        of("released", "fp16", compiled=True),
        of("folded", "fp16", compiled=True, graph=True, channels_last=True),
        of("folded", "fp16", compiled=True, channels_last=True),
        of("released", "fp32", compiled=True),
        of("released", "fp16", compiled=True, graph=True),
        of("folded", "fp16", channels_last=True),
        of("folded", "fp32"),
        of("folded", "bf16"),
        of("fused", "fp32", channels_last=True),
        *(Torch(other, "folded", "fp16", compiled=True, graph=True) for other in small),
        of("folded", "bf16", compiled=True, graph=True),
        *(Torch(other, "folded", "fp16") for other in small),
    ]
    for other in (subject, *small):
        found += [Ort(other, "folded", "fp32"), Ort(other, "folded", "fp16"), Ort(other, "folded", "fp16", graph=True)]
    found += [Ort(other, "released", "fp32") for other in (subject, *small) if other.released]  # minutes to export
    return found + ([Trt(subject, "tensorrt"), Trt(subject, "rtx")] if batch == 1 else [])
