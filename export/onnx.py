"""Turn a trained checkpoint into an ONNX model, proved to compute what PyTorch computes.

    python -m export.onnx --weights weights/drsformer-xs.safetensors --output model.onnx
    python -m export.onnx --weights deraining_rain200H.pth --output rain200h.onnx --topk rank
    python -m export.onnx --weights W --output camera.onnx --io image --height 480 --width 640
    python -m export.onnx --weights W --output half.onnx --precision fp16

The file takes and returns `input` and `output`: float32 (1, 3, H, W) RGB in [0, 1], H and W any multiples of 8, or with
--io image uint8 (1, H, W, 3) of any size. Only standard operators, no control flow. It is written once it has passed
ONNX's checker and given PyTorch's output in ONNX Runtime to 1e-4 at several sizes.

PyTorch's own exporter and optimiser do all the work, so there are no graph rewrites of ours to maintain; the price is
that the exporter reasons about symbolic sizes for two seconds a block and more. What makes the network faster belongs
in the module that is exported, a function of the readable one as `with_pattern` is, where PyTorch can test it.

How the proof deals with top-k: which of two nearly equal scores is the larger one depends on how a runtime rounds,
and one selection that flips can move the output by 1e-3 although nothing is wrong. A looser tolerance would hide real
faults as well. Instead PyTorch makes the selections that ONNX Runtime's scores demand, the rest has to agree to 1e-4,
and the flips are counted and shown with the difference that they make. For this, the score tensors keep their names
in the file (`ScoreProbe` reads them).
"""

from __future__ import annotations

import collections
import copy
import importlib.metadata
import json
import logging
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxscript import opset18
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from drsformer import checkpoint
from drsformer.config import SIZE_MULTIPLE, DRSformerConfig
from drsformer.session import TorchSession
from export import folding
from export.folding import Precision
from export.topk import Pattern, count_flips, masks, scores_of, with_pattern
from runtime.cli import console, main
from runtime.errors import GateError, InputError
from runtime.files import writing
from runtime.ort import EXECUTION_PROVIDERS, OrtSession
from runtime.pixels import to_batch, to_image
from runtime.session import Derainer

IO = Literal["tensor", "image"]

TOLERANCE = 1e-4
"""How far PyTorch and ONNX Runtime may differ, of a range of 1, once they have made the same selections."""

SIZES = ((64, 64), (96, 160), (200, 136))
"""Heights and widths at which a model of dynamic size is compared."""

OPSETS = range(18, 24)
"""What PyTorch's exporter writes without converting afterwards."""


class ImageGraph(nn.Module):
    """The image contract of `runtime.session.Derainer` around a network, in tensor operations.

    uint8 (1, H, W, 3), any H, W >= 1 -> the same. The first and the last operation are casts, since TensorRT for RTX
    accepts uint8 nowhere else. Padding gathers rows and columns by computed indices, because ONNX's Pad cannot
    reflect an axis that is not longer than its padding.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        x = image.float().permute(0, 3, 1, 2) / 255  # 1, 3, H, W
        H, W = x.shape[2:]
        x = x.index_select(2, _padded(H)).index_select(3, _padded(W))
        x = self.network(x)[:, :, :H, :W]
        return (x.clamp(0, 1) * 255).round().permute(0, 2, 3, 1).to(torch.uint8)


def _padded(length: int) -> Tensor:
    """Where each place of an axis padded to the size multiple comes from: reflected, or the border repeated where the
    axis is too short for that."""
    place = torch.arange((length + SIZE_MULTIPLE - 1) // SIZE_MULTIPLE * SIZE_MULTIPLE)
    reflected = length - 1 - (place - (length - 1)).abs()
    return torch.where(reflected[-1:] < 0, place.clamp(max=length - 1), reflected)


class _WithScores(nn.Module):
    """A network that also returns the scores of every attention layer, in the order of `masks(network)`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with scores_of(self.network) as scores:
            output = self.network(x)
        return output, *(scores[layer] for layer in masks(self.network))


def to_onnx(
    network: nn.Module, io: IO = "tensor", size: tuple[int, int] | None = None, opset: int = 20
) -> onnx.ModelProto:
    """Export a network, (1, 3, H, W) -> the same, that may hold the masks of `export.topk`.

    size: height and width, or None for any. The metadata of the result names its `io`, its `size_multiple` and under
    `scores` the tensor in which each attention layer's scores are.
    """
    scores = {layer: f"{layer}.scores" for layer in masks(network)}
    height, width = size or (8 * SIZE_MULTIPLE, 9 * SIZE_MULTIPLE)
    h, w = torch.export.Dim("h", min=1), torch.export.Dim("w", min=1)
    if io == "image":
        network = ImageGraph(network)
        example, shape = torch.zeros(1, height, width, 3, dtype=torch.uint8), {1: h, 2: w}
    else:
        example, shape = torch.rand(1, 3, height, width), {2: SIZE_MULTIPLE * h, 3: SIZE_MULTIPLE * w}
    with _quiet():
        program = torch.onnx.export(
            _WithScores(network).eval(),
            (example,),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=["input"],
            output_names=["output", *scores.values()],
            dynamic_shapes=None if size else (shape,),
            custom_translation_table={torch.ops.aten.pixel_unshuffle.default: _pixel_unshuffle},
        )
    assert program is not None
    model = program.model_proto
    _forget_sources(model)
    model.graph.value_info.extend(model.graph.output[1:])
    del model.graph.output[1:]  # the scores stay, as inner tensors
    _describe(model, io=io, size_multiple=1 if io == "image" else SIZE_MULTIPLE, scores=scores)
    return model


def _pixel_unshuffle(x: Any, downscale_factor: int) -> Any:
    """PyTorch's operator in two of ONNX's, whose SpaceToDepth puts the phases before the channels."""
    op: Any = opset18
    phases, channels = downscale_factor**2, x.shape[1]
    order = np.arange(phases * channels).reshape(phases, channels).T.flatten()
    shuffled = op.SpaceToDepth(x, blocksize=downscale_factor)
    return op.Gather(shuffled, op.Constant(value=onnx.numpy_helper.from_array(order)), axis=1)


def upcast(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with float32 in place of float16 and bfloat16, and the weights as they were rounded.

    It has the same nodes and must give what PyTorch gives to `TOLERANCE`, where the graph itself could only be compared
    to the precision of its type, and bfloat16 not at all in ONNX Runtime on a CPU.
    """
    model = copy.deepcopy(model)
    half = onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16

    def widen(tensor: onnx.TensorProto) -> None:
        if tensor.data_type in half:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    for tensor in model.graph.initializer:
        widen(tensor)
    for value in model.graph.value_info:
        if value.type.tensor_type.elem_type in half:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for node in model.graph.node:
        for attribute in node.attribute:
            widen(attribute.t)
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in half:
                attribute.i = onnx.TensorProto.FLOAT
    return model


class ScoreProbe:
    """Reads the scores inside a model that `export` wrote, on a copy of it in memory that returns them.

    ks: how many scores each mask keeps, by attention layer; empty for any other model.
    """

    def __init__(self, path: Path, provider: str = "cpu") -> None:
        model = onnx.load(path)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        tensors = json.loads(metadata.get("scores", "{}"))
        values = {value.name: value for value in model.graph.value_info if value.name in tensors.values()}
        self.ks: dict[str, tuple[int, ...]] = {}
        if tensors:
            config = DRSformerConfig.from_dict(json.loads(metadata["config"]))
            widths = {name: value.type.tensor_type.shape.dim[-1].dim_value for name, value in values.items()}
            self.ks = {layer: config.kept(widths[tensor]) for layer, tensor in tensors.items()}
        self._tensors = list(tensors.values())
        self._takes_images = metadata.get("io") == "image"
        model.graph.output.extend(values.values())
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors, as in OrtSession
        providers = [EXECUTION_PROVIDERS[provider]]
        self._engine = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)

    def __call__(self, batch: NDArray[np.float32]) -> dict[str, Tensor]:
        """Scores (1, heads, d, 1, d) by layer, for what `runtime.ort.OrtSession.run` takes."""
        if not self.ks:
            return {}
        feed = to_image(batch)[None] if self._takes_images else batch
        scores = self._engine.run(self._tensors, {"input": feed})
        return {layer: torch.from_numpy(array) for layer, array in zip(self.ks, scores, strict=True)}


@dataclass(frozen=True)
class Agreement:
    """How a model in ONNX Runtime agrees with PyTorch on one image of noise, in [0, 1].

    difference:      the largest, after the same top-k selections. For a model of images, what rounding to uint8 cannot
                     explain.
    flips:           selections that PyTorch, left alone, makes otherwise, of so many `selections`.
    free_difference: the largest where PyTorch makes its own selections.
    """

    height: int
    width: int
    difference: float
    flips: int
    selections: int
    free_difference: float


def verify(path: Path, network: nn.Module, sizes: Iterable[tuple[int, int]]) -> Iterator[Agreement]:
    """Compare the model at `path` with the network that it was made from, at each height and width."""
    session, probe, reference = OrtSession(path, "cpu"), ScoreProbe(path), _Unrounded(network, "cpu")
    rounding = 0.5 / 255 if session.metadata["io"] == "image" else 0.0
    ks = {layer: mask.ks for layer, mask in masks(network).items()}

    def answer(image: NDArray[np.uint8], selections: dict[str, Tensor] | None) -> tuple[NDArray, dict[str, Tensor]]:
        H, W, _ = image.shape
        with scores_of(network, selections) as scores:
            Derainer(reference)(image)
        output = reference.output[:, :, :H, :W]
        return output.clip(0, 1) if rounding else output, scores

    def distance(found: NDArray, expected: NDArray) -> float:
        return float(np.maximum(np.abs(found - expected) - rounding, 0).max())

    for height, width in sizes:
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        found, demanded = session.run(to_batch(image)), probe(to_batch(image))
        same, own = answer(image, demanded)
        flips = sum(count_flips(demanded[layer], own[layer], ks[layer]) for layer in ks)
        free, _ = answer(image, None) if flips else (same, own)
        selections = sum(own[layer][..., 0].numel() * sum(ks[layer]) for layer in ks)
        yield Agreement(height, width, distance(found, same), flips, selections, distance(found, free))


class _Unrounded(TorchSession):
    """Keeps what the network answered last, before it is made an image."""

    output: NDArray[np.float32]

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        self.output = super().run(batch)
        return self.output


@dataclass(frozen=True)
class Exported:
    """A model that was written, and what it was found to be. `operators` counts its nodes by type.

    A graph in half precision is compared as `widened` makes it.
    """

    output: Path
    operators: dict[str, int]
    precision: Precision
    agreements: tuple[Agreement, ...]
    seconds: float

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "output": str(self.output),
            "precision": self.precision,
            "nodes": sum(self.operators.values()),
            "topk": self.operators.get("TopK", 0),
            "bytes": self.output.stat().st_size,
            "compared_in": "fp32",
            "max_difference": max(a.difference for a in self.agreements),
            "max_difference_with_flips": max(a.free_difference for a in self.agreements),
            "flips": sum(a.flips for a in self.agreements),
            "seconds": round(self.seconds, 1),
        }

    def table(self) -> Table:
        """For people."""
        upcast = "both in float32 with the rounded weights; export.validate measures the file itself"
        caption = None if self.precision == "fp32" else upcast
        table = Table("size", title=f"{self.output}: PyTorch against ONNX Runtime", caption=caption)
        for column in ("max difference", "top-k selections flipped", "max difference with them"):
            table.add_column(column, justify="right")
        for a in self.agreements:
            table.add_row(
                f"{a.height}x{a.width}",
                f"{a.difference:.1e}",
                f"{a.flips} of {a.selections}",
                f"{a.free_difference:.1e}",
            )
        return table


def export(
    weights: Path,
    output: Path | None = None,
    topk: Pattern = "threshold",
    io: IO = "tensor",
    precision: Precision = "fp32",
    fold: bool = True,
    height: int | None = None,
    width: int | None = None,
    opset: int | None = None,
) -> Exported:
    """Export a checkpoint, prove the result against PyTorch, and write it.

    Raises InputError for arguments or a checkpoint that cannot be used, GateError where the proof fails and where the
    network's values on noise exceed float16; nothing is written then.

    Args:
        weights: Checkpoint, .safetensors or the authors' .pth.
        output: The .onnx file to write; beside the weights if not given.
        topk: How the attention keeps its k largest scores, see export/topk.py: threshold is the simplest, scatter keeps
            exactly k, rank needs no TopK operator.
        io: tensor for float32 (1, 3, H, W) in [0, 1], H and W multiples of 8; image for uint8 (1, H, W, 3) of any size.
        precision: What the network computes in; its input and output are float32 in any case, see export/folding.py.
        fold: Export the folded network, which is exactly equal and faster; otherwise the readable one.
        height: Fix the height of the input, together with its width.
        width: Fix the width of the input, together with its height.
        opset: Version of ONNX's operators, 18 to 23; if not given 20, or for bf16 22.
    """
    started = time.monotonic()
    output = output or weights.parent / f"{weights.stem or 'model'}.onnx"
    if output.suffix != ".onnx":
        raise InputError(f"`output`: expected a name ending in .onnx, found {output}")
    opset = opset or (22 if precision == "bf16" else 20)
    if opset not in OPSETS:
        raise InputError(f"`opset`: expected {OPSETS[0]} to {OPSETS[-1]}, found {opset}")
    if precision == "bf16" and opset < 22:
        raise InputError(f"`opset`: expected at least 22, whose convolutions know bfloat16, found {opset}")
    if precision != "fp32" and not fold:
        raise InputError(f"`precision` {precision}: the casts are placed in folding; leave --no-fold out")
    size = _fixed_size(height, width, io)
    trained = checkpoint.load(weights)
    with console.status("Exporting") as status:
        network = with_pattern(trained.model.requires_grad_(False), topk)
        exported = folding.fold(network, precision) if fold else network
        model = to_onnx(exported, io, size, opset)
        packages = ("torch", "onnx", "onnxscript", "drsformer-deploy")
        _describe(
            model,
            topk=topk,
            precision=precision,
            config=trained.model.config.to_dict(),
            weights_sha256=trained.sha256,
            provenance=trained.provenance,
            versions={name: _version(name) for name in packages},
        )
        onnx.checker.check_model(model, full_check=True)
        reference = network if precision == "fp32" else folding.upcast(exported)
        if topk == "scatter":  # of equal scores ONNX's TopK names the first; in PyTorch only the rank pattern does so
            reference = with_pattern(reference, "rank")
        # An image may have any size, so odd ones are what has to be seen.
        sizes = [size] if size else [(H - 3, W - 1) if io == "image" else (H, W) for H, W in SIZES]
        status.update("Comparing with PyTorch")
        watched = _largest(reference) if precision == "fp16" else nullcontext(dict[str, float]())
        with writing(output) as temporary, watched as largest:
            agreements = []
            onnx.save(upcast(model), temporary)
            for agreement in verify(temporary, reference, sizes):
                agreements.append(agreement)
                if not agreement.difference <= TOLERANCE:
                    raise GateError(
                        f"{output} is not written: the exported network differs from PyTorch by "
                        f"{agreement.difference:.1e} at {agreement.height}x{agreement.width}, "
                        f"more than {TOLERANCE}"
                    )
            for module, value in largest.items():
                if not value <= torch.finfo(torch.float16).max:
                    raise GateError(
                        f"{output} is not written: {module} meets {value:.2g} on an image of noise, "
                        "which float16 cannot hold; use --precision bf16"
                    )
            onnx.save(model, temporary)
    operators = collections.Counter(node.op_type for node in model.graph.node)
    done = Exported(output, dict(operators), precision, tuple(agreements), time.monotonic() - started)
    Console().print(done.table())
    return done


def _fixed_size(height: int | None, width: int | None, io: IO) -> tuple[int, int] | None:
    if height is None and width is None:
        return None
    if height is None or width is None:
        raise InputError("expected --height and --width together, found only one of them")
    for name, length in (("height", height), ("width", width)):
        if length < 1:
            raise InputError(f"`{name}`: expected at least 1, found {length}")
        if io == "tensor" and length % SIZE_MULTIPLE:
            raise InputError(f"`{name}`: expected a multiple of {SIZE_MULTIPLE}, found {length}; or give --io image")
    return height, width


@contextmanager
def _largest(network: nn.Module) -> Iterator[dict[str, float]]:
    """By module, the largest magnitude that it has taken or put out inside the block."""
    found: dict[str, float] = {}

    def note(name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        for tensor in (*arguments, output):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                found[name] = max(tensor.abs().max().item(), found.get(name, 0.0))

    hooks = [module.register_forward_hook(partial(note, name)) for name, module in network.named_modules()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of packages that it could use elsewhere and of its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _forget_sources(model: onnx.ModelProto) -> None:
    """Drop the stack traces, with paths of this machine, that the exporter leaves at every node and value. Where in
    the network a node comes from stays, as `namespace`."""
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for part in (model, graph, *values, *graph.node):
        kept = [entry for entry in part.metadata_props if entry.key == "namespace"]
        del part.metadata_props[:]
        part.metadata_props.extend(kept)
        part.doc_string = ""
    model.producer_name, model.producer_version = "drsformer-deploy", _version("drsformer-deploy")


def _describe(model: onnx.ModelProto, **metadata: Any) -> None:
    """Add to the model's metadata: text as it is, anything else as JSON."""
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main(export, __doc__, summary=Exported.summary)
