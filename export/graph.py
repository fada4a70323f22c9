"""A network as an ONNX graph, with what the graph says of itself in its metadata.

PyTorch's own exporter and optimiser write all of it, so there are no rewrites of operators to maintain. They take a
second or two for each block, so blocks of one structure are traced once: the network around them is traced with a call
in place of each, and what a block became goes there with the weights of that one. What makes the network faster belongs
in the module that is exported, a function of the readable one as `export.topk.with_pattern` is, where PyTorch can test
it. Only standard operators, no control flow.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import re
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import torch
from onnxscript import opset18
from torch import Tensor, nn

from drsformer.config import SIZE_MULTIPLE
from drsformer.model import DRSformer
from export.topk import masks, scores_of, shared_copy
from runtime.pixels import ANY, FINITE, IO, Size

CALL = "drsformer_deploy::Block"
"""Operator that stands for a block until the block's own graph takes its place."""

SCORES = ".scores"
"""What the inner tensor with the scores of an attention layer is called, behind the layer's name."""

FLOATS: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
}
"""What a block may compute in, by ONNX's number of it."""

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
    """A network that takes some of its weights as an argument, by name, and returns the scores of every attention
    layer, in the order of `masks(network)`, behind what it returns itself."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
        with scores_of(self.network) as scores:
            output = torch.func.functional_call(self.network, weights, (x,))
        outputs = output if isinstance(output, tuple) else (output,)
        return *outputs, *(scores[layer] for layer in masks(self.network))


class _Call(nn.Module):
    """Stands for a block while the network around it is traced. (B, C, H, W) -> the same."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(CALL, (x,), {"name": self.name}, dtype=x.dtype, shape=x.shape, version=1)


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
    scores = {layer: f"{layer}{SCORES}" for layer in masks(network)}
    blocks, network = _without_blocks(network)
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
    model = _trace(network, example, dynamic, outputs, opset)
    _insert_blocks(model, blocks, opset)
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)  # older runtimes refuse a later one
    _remove_sources(model)
    add_metadata(model, io=io, size_multiple=1 if io == "image" else SIZE_MULTIPLE, scores=scores)
    return model


def _without_blocks(network: nn.Module) -> tuple[dict[str, tuple[nn.Module, Hashable]], nn.Module]:
    """The blocks of a DRSformer by name, each with its structure, and the network with calls in their place. Any other
    network stays whole."""
    if not isinstance(network, DRSformer):
        return {}, network
    blocks, around = {}, shared_copy(network)
    for module, level in network.config.levels().items():
        for i, block in enumerate(level.blocks):
            name = f"{module}.{i}"
            blocks[name] = network.get_submodule(name), (level.width, block)
            around.set_submodule(name, _Call(name))
    return blocks, around


def _trace(
    network: nn.Module,
    example: Tensor,
    dynamic: Mapping[int, Any],
    outputs: Sequence[str],
    opset: int,
    weights: Mapping[str, Tensor] = MappingProxyType({}),
) -> onnx.ModelProto:
    """A network as PyTorch's exporter writes it, with the scores of its attention layers as inner tensors.

    Args:
        network: What is traced.
        example: Its input.
        dynamic: The sizes of the input that are no constants, by axis.
        outputs: Names of what it returns.
        opset: Version of ONNX's operators.
        weights: Those of its parameters and buffers, by name, that become inputs and no constants.
    """
    scores = [f"{layer}{SCORES}" for layer in masks(network)]
    with _quiet():
        program = torch.onnx.export(
            _WithScores(network).eval(),
            (example,),
            kwargs={"weights": dict(weights)},
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=["input", *weights],
            output_names=[*outputs, *scores],
            dynamic_shapes={"x": dynamic, "weights": dict.fromkeys(weights)} if dynamic else None,
            custom_translation_table={torch.ops.aten.pixel_unshuffle.default: _pixel_unshuffle},
        )
    assert program is not None
    model = program.model_proto
    model.graph.value_info.extend(model.graph.output[len(outputs) :])
    del model.graph.output[len(outputs) :]
    return model


def _insert_blocks(model: onnx.ModelProto, blocks: Mapping[str, tuple[nn.Module, Hashable]], opset: int) -> None:
    """Put the graph of each block in place of the call for it. Those of one structure that take one shape are traced
    once: of what a trace gives, only the weights are a block's own."""
    domain, _, operator = CALL.partition("::")
    types = {value.name: value.type.tensor_type for value in model.graph.value_info}
    traces: dict[Hashable, onnx.GraphProto] = {}
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        if (node.domain, node.op_type) != (domain, operator):
            model.graph.node.append(node)
            continue
        name = node.attribute[0].s.decode()
        block, structure = blocks[name]
        tensors = (*block.named_parameters(), *block.named_buffers())  # whole numbers follow from the structure
        weights = {key: tensor.detach() for key, tensor in tensors if tensor.is_floating_point()}
        kind = types[node.input[0]]
        shape = tuple(dim.dim_value or None for dim in kind.shape.dim)  # None where it is any
        if (structure, shape) not in traces:
            sizes = [length or some for length, some in zip(shape, (2, 0, 16, 24), strict=True)]  # channels are known
            example = torch.zeros(sizes, dtype=FLOATS[kind.elem_type])
            dynamic = {axis: torch.export.Dim.DYNAMIC for axis, length in enumerate(shape) if length is None}
            traces[structure, shape] = _trace(block, example, dynamic, ["output"], opset, weights).graph
        _append(model.graph, traces[structure, shape], node, name, weights)
    standard = [entry for entry in model.opset_import if entry.domain != domain]
    del model.opset_import[:]
    model.opset_import.extend(standard)


def _append(
    graph: onnx.GraphProto, trace: onnx.GraphProto, call: onnx.NodeProto, name: str, weights: Mapping[str, Tensor]
) -> None:
    """Append a block's trace to a graph, with its name before those of everything in it and with its weights."""
    names = {"": "", trace.input[0].name: call.input[0], trace.output[0].name: call.output[0]}
    names |= {key: f"network.{name}.{key}" for key in weights}  # as in a trace of the whole

    def renamed(value: str) -> str:
        return names.setdefault(value, f"{name}.{value}")

    for node in trace.node:
        new = graph.node.add()
        new.CopyFrom(node)
        new.name = f"{name}.{node.name}"
        new.input[:], new.output[:] = map(renamed, node.input), map(renamed, node.output)
        for entry in new.metadata_props:
            entry.value = re.sub(r"\bnetwork(?=[.:])", f"network.{name}", entry.value)
    for tensor in trace.initializer:
        new = graph.initializer.add()
        new.CopyFrom(tensor)
        new.name = renamed(tensor.name)
    for value in trace.value_info:
        if value.name.endswith(SCORES):
            new = graph.value_info.add()
            new.CopyFrom(value)
            new.name = renamed(value.name)
            for dim in new.type.tensor_type.shape.dim:
                dim.ClearField("dim_param")  # names of sizes are those of the trace, and elsewhere stand for others
    read = {value for node in trace.node for value in node.input}
    kinds = {dtype: kind for kind, dtype in FLOATS.items()}
    for key, tensor in weights.items():
        if key in read:
            content = tensor.flatten().view(torch.uint8).numpy().tobytes()
            graph.initializer.add(name=names[key], data_type=kinds[tensor.dtype], dims=tensor.shape, raw_data=content)


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
