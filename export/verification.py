"""The proof that an exported graph computes what PyTorch computes, whatever the top-k makes of rounding.

Which of two nearly equal scores is the larger one depends on how a runtime rounds, and one selection that flips can
move the output by 1e-3 although nothing is wrong. A looser tolerance would hide real faults as well. Instead PyTorch
makes the selections that ONNX Runtime's scores demand, the rest has to agree to `TOLERANCE`, and the flips are counted
and shown with the difference that they make. For this, the score tensors keep their names in the file (`ScoreProbe`
reads them).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from drsformer.config import DRSformerConfig
from drsformer.session import TorchSession
from export.topk import count_flips, masks, scores_of
from runtime.ort import EXECUTION_PROVIDERS, OrtSession
from runtime.pixels import ANY, DTYPES, GraphIO, Size, to_batch
from runtime.session import Derainer, Session

TOLERANCE = 1e-4
"""How far PyTorch and ONNX Runtime may differ, of a range of 1, once they have made the same selections."""

SOME = 3
"""Images at once at which a model of any number is compared: neither one nor the two that it was exported with."""

SIZES: tuple[Size, ...] = ((64, 64), (96, 160), (200, 136))
"""Heights and widths in pixels at which a model of any size is compared."""

Scores = dict[str, Tensor]
"""What attention looked at in one run, by layer: (1, heads, d, 1, d)."""


def upcast(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with float32 in place of float16 and bfloat16, in input and output too, and the weights as they
    were rounded.

    It has the same nodes and must give what PyTorch gives to `TOLERANCE`, where the graph itself could only be compared
    to the precision of its type, and bfloat16 not at all in ONNX Runtime on a CPU.
    """
    model = copy.deepcopy(model)
    half = onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16

    def upcast_tensor(tensor: onnx.TensorProto) -> None:
        if tensor.data_type in half:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    for tensor in model.graph.initializer:
        upcast_tensor(tensor)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type in half:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for node in model.graph.node:
        for attribute in node.attribute:
            upcast_tensor(attribute.t)
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in half:
                attribute.i = onnx.TensorProto.FLOAT
    return model


class ScoreProbe:
    """Reads the scores inside a model that `export.onnx` wrote, on a copy of it in memory that returns them.

    Attributes:
        ks: How many scores each mask keeps, by attention layer; empty for any other model.
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
        kind = model.graph.input[0].type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        batch = kind.shape.dim[0].dim_value or ANY
        self._graph_io = GraphIO(next(io for io in DTYPES if DTYPES[io] == dtype), multiple=1, batch=batch)
        model.graph.output.extend(values.values())
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors, as in OrtSession
        providers = [EXECUTION_PROVIDERS[provider]]
        self._engine = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)

    def __call__(self, batch: NDArray[np.float32]) -> Scores:
        """The scores for what `runtime.ort.OrtSession.run` takes, float32 (B, 3, H, W)."""
        if not self.ks:
            return {}
        scores = self._engine.run(self._tensors, {"input": self._graph_io.feed(batch)})
        return {layer: torch.from_numpy(each)[: len(batch)] for layer, each in zip(self.ks, scores, strict=True)}


class _Unrounded(Session):
    """A session and what it answered last, float32 (1, 3, H, W), before it is made an image."""

    output: NDArray[np.float32]

    def __init__(self, session: Session) -> None:
        self.multiple, self._session = session.multiple, session

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        self.output = self._session.run(batch)
        return self.output


@dataclass(frozen=True)
class Agreement:
    """How a model in ONNX Runtime agrees with PyTorch on images of noise, in [0, 1]: one, or as many as it takes at
    once, each of which PyTorch sees alone.

    Attributes:
        size: Height and width of the images in pixels.
        difference: Largest difference after the same top-k selections. For a model of images, what rounding to uint8
            cannot explain.
        flips: Selections that PyTorch, left alone, makes otherwise.
        selections: All selections.
        free_difference: Largest difference where PyTorch makes its own selections.
    """

    size: Size
    difference: float
    flips: int
    selections: int
    free_difference: float


def verify(path: Path, network: nn.Module, sizes: Iterable[Size]) -> Iterator[Agreement]:
    """Compare the model at `path` with the network that it was made from, at each height and width."""
    session, probe, reference = OrtSession(path, "cpu"), ScoreProbe(path), _Unrounded(TorchSession(network, "cpu"))
    rounding = 0.5 / 255 if session.metadata["io"] == "image" else 0.0
    ks = {layer: mask.ks for layer, mask in masks(network).items()}

    def answer(image: NDArray[np.uint8], selections: Scores | None) -> tuple[NDArray[np.float32], Scores]:
        H, W, _ = image.shape
        with scores_of(network, selections) as scores:
            Derainer(reference)(image)
        output = reference.output[:, :, :H, :W]
        return output.clip(0, 1) if rounding else output, scores

    def distance(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
        return float(np.maximum(np.abs(found - expected) - rounding, 0).max())

    def compare(found: NDArray[np.float32], demanded: Scores, image: NDArray[np.uint8]) -> Agreement:
        same, own = answer(image, demanded)
        flips = sum(count_flips(demanded[layer], own[layer], ks[layer]) for layer in ks)
        free, _ = answer(image, None) if flips else (same, own)
        selections = sum(own[layer][..., 0].numel() * sum(ks[layer]) for layer in ks)
        return Agreement(image.shape[:2], distance(found, same), flips, selections, distance(found, free))

    batch = SOME if session.graph_io.batch == ANY else session.graph_io.batch
    for size in sizes:
        images = np.random.default_rng(0).integers(0, 256, (batch, *size, 3), dtype=np.uint8)
        outputs, scores = session.run(to_batch(*images)), probe(to_batch(*images))
        compared = [
            compare(outputs[i : i + 1], {layer: scores[layer][i : i + 1] for layer in ks}, images[i])
            for i in range(batch)
        ]
        yield Agreement(
            size,
            difference=float(np.max([a.difference for a in compared])),  # NaN where there is one
            flips=sum(a.flips for a in compared),
            selections=sum(a.selections for a in compared),
            free_difference=float(np.max([a.free_difference for a in compared])),
        )


@contextmanager
def largest_values(network: nn.Module) -> Iterator[dict[str, float]]:
    """Inside the block, a forward pass leaves here the largest magnitude that each module takes or puts out."""
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
