"""A network as an ONNX graph, with what the graph says of itself in its metadata.

PyTorch's own exporter and optimiser do all the work, so there are no graph rewrites of ours to maintain; the price is
that the exporter reasons about symbolic sizes for two seconds a block and more. What makes the network faster belongs
in the module that is exported, a function of the readable one as `export.topk.with_pattern` is, where PyTorch can test
it. Only standard operators, no control flow.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import torch
from onnxscript import opset18
from torch import Tensor, nn

from drsformer.config import SIZE_MULTIPLE
from export.topk import masks, scores_of
from runtime.pixels import ANY, FINITE, IO, Size

PACKAGES = ("torch", "onnx", "onnxscript", "drsformer-deploy")
"""Packages whose versions shape a graph."""


class ImageGraph(nn.Module):
    """The image contract of `runtime.session.Derainer` around a network, in tensor operations.

    uint8 (B, H, W, 3), any H, W >= 1 -> the same, and `runtime.pixels.FINITE`. The first and the last operation are
    casts, since TensorRT for RTX accepts uint8 nowhere else. Padding gathers rows and columns by computed indices,
    because ONNX's Pad cannot reflect an axis that is not longer than its padding.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = image.float().permute(0, 3, 1, 2) / 255  # B, 3, H, W
        H, W = x.shape[2:]
        x = x.index_select(2, _padded_indices(H)).index_select(3, _padded_indices(W))
        x = self.network(x)[:, :, :H, :W]
        # NaN and infinity survive a sum. Scaled down, finite numbers cannot add up to infinity, however large they are.
        finite = (x * 2.0**-64).sum((1, 2, 3))
        return (x.clamp(0, 1) * 255).round().permute(0, 2, 3, 1).to(torch.uint8), finite


class Tensor16Graph(nn.Module):
    """A network with float16 in and out, (B, 3, H, W), as filters of videos have it on a GPU; inside it computes as it
    is."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.float()).half()


def _padded_indices(length: int) -> Tensor:
    """Where each index of an axis padded to the size multiple comes from: reflected, or the border repeated where the
    axis is too short for that. Without `abs`, which OpenVINO 2026.4 computes wrongly on constant integers, and with
    both bounds, so that no input of the graph's Clip is left out."""
    index = torch.arange((length + SIZE_MULTIPLE - 1) // SIZE_MULTIPLE * SIZE_MULTIPLE)
    last = length - 1
    reflected = torch.minimum(index, 2 * last - index)
    return torch.where(reflected[-1:] < 0, index.clamp(0, last), reflected)


class _WithScores(nn.Module):
    """A network that also returns the scores of every attention layer, in the order of `masks(network)`, behind what
    it returns itself."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with scores_of(self.network) as scores:
            output = self.network(x)
        outputs = output if isinstance(output, tuple) else (output,)
        return *outputs, *(scores[layer] for layer in masks(self.network))


def to_onnx(
    network: nn.Module, io: IO = "tensor", size: Size | None = None, opset: int = 20, batch: int = 1
) -> onnx.ModelProto:
    """Export a network as a graph from `input` to `output`, and where it takes images `runtime.pixels.FINITE`.

    Args:
        network: float32 (B, 3, H, W) -> the same; its masks may be those of `export.topk`.
        io: What the graph takes and gives.
        size: Height and width of its input, multiples of 8 where it takes tensors; None for any.
        opset: Version of ONNX's operators.
        batch: Number of images that it takes at once; `ANY` for any.

    Returns:
        The graph. Its metadata have its `io`, its `size_multiple` and, under `scores`, the name of the inner tensor
        that holds the scores of each attention layer.
    """
    scores = {layer: f"{layer}.scores" for layer in masks(network)}
    outputs = ["output", FINITE] if io == "image" else ["output"]
    images = 2 if batch == ANY else batch  # of 1 the exporter would make a constant
    height, width = size or (8 * SIZE_MULTIPLE, 9 * SIZE_MULTIPLE)
    h, w = torch.export.Dim("h", min=1), torch.export.Dim("w", min=1)
    if io == "image":
        network = ImageGraph(network)
        example, sides = torch.zeros(images, height, width, 3, dtype=torch.uint8), {1: h, 2: w}
    else:
        example = torch.rand(images, 3, height, width)
        if io == "tensor16":
            network, example = Tensor16Graph(network), example.half()
        sides = {2: SIZE_MULTIPLE * h, 3: SIZE_MULTIPLE * w}
    dynamic = {**({0: torch.export.Dim("batch", min=1)} if batch == ANY else {}), **({} if size else sides)}
    with _quiet():
        program = torch.onnx.export(
            _WithScores(network).eval(),
            (example,),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=["input"],
            output_names=[*outputs, *scores.values()],
            dynamic_shapes=(dynamic,) if dynamic else None,
            custom_translation_table={torch.ops.aten.pixel_unshuffle.default: _pixel_unshuffle},
        )
    assert program is not None
    model = program.model_proto
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)  # older runtimes refuse a later one
    _remove_sources(model)
    model.graph.value_info.extend(model.graph.output[len(outputs) :])
    del model.graph.output[len(outputs) :]  # the scores stay, as inner tensors
    add_metadata(model, io=io, size_multiple=1 if io == "image" else SIZE_MULTIPLE, scores=scores)
    return model


def _pixel_unshuffle(x: Any, downscale_factor: int) -> Any:
    """PyTorch's operator in two of ONNX's, whose SpaceToDepth puts the phases before the channels."""
    op: Any = opset18
    phases, channels = downscale_factor**2, x.shape[1]
    order = np.arange(phases * channels).reshape(phases, channels).T.flatten()
    shuffled = op.SpaceToDepth(x, blocksize=downscale_factor)
    return op.Gather(shuffled, op.Constant(value=onnx.numpy_helper.from_array(order)), axis=1)


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


def _remove_sources(model: onnx.ModelProto) -> None:
    """Remove the stack traces, with paths of this machine, that the exporter leaves at every node and value. Where in
    the network a node comes from stays, as `namespace`."""
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for part in (model, graph, *values, *graph.node):
        kept = [entry for entry in part.metadata_props if entry.key == "namespace"]
        del part.metadata_props[:]
        part.metadata_props.extend(kept)
        part.doc_string = ""
    model.producer_name, model.producer_version = "drsformer-deploy", _version("drsformer-deploy")


def add_metadata(model: onnx.ModelProto, **metadata: Any) -> None:
    """Add to a model's metadata: text as it is, anything else as JSON."""
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))


def versions() -> dict[str, str]:
    """The versions of `PACKAGES` on this machine."""
    return {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
