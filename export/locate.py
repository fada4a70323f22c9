"""Which layer of a model departs first from what the model is in float32.

A proof or a canary that fails says that the answer is wrong, and not where. Here the output of every convolution and
every product with weights is compared, from the front, between the model as it runs and the same model in float32 in
ONNX Runtime on a CPU without optimizations. An engine does not show its inside; the model that it was built from does,
with the provider ort-tensorrt also in TensorRT.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from export.canaries import canary_sizes, scene
from export.verification import upcast
from runtime.errors import InvalidModel, device_error
from runtime.ort import EXECUTION_PROVIDERS
from runtime.pixels import to_batch
from runtime.session import describe_onnx

LIMITS = {"fp32": 1e-3}
"""Relative error of a layer that rounding explains in float32, TF32 included."""

COARSE_LIMIT = 0.1
"""The same in half precision and int8."""

PREFIX = "network."
"""What `export.onnx` puts before the names of weights."""


@dataclass(frozen=True)
class Layer:
    """A layer of a model, and how far its output is from what it is in float32.

    Attributes:
        name: As in the state dict of the folded network (`export.folding`), or of the readable one with --no-fold.
        error: Norm of the difference over the norm of the output in float32; infinite where NaN or infinity is in it.
    """

    name: str
    error: float


@dataclass(frozen=True)
class Located:
    """The layers from the front, and the first one that departs by more than `limit`, where there is one."""

    layers: tuple[Layer, ...]
    limit: float

    @property
    def first(self) -> Layer | None:
        return next((layer for layer in self.layers if not layer.error <= self.limit), None)

    def __str__(self) -> str:
        largest = max(self.layers, key=lambda layer: layer.error)
        if self.first is None:
            return (
                f"No layer departs from float32 by more than {self.limit:g} of its output: the most is "
                f"{largest.error:.1e}, at {largest.name}. What is wrong is in the weights, or outside of the model."
            )
        i = self.layers.index(self.first)
        before = f"; {self.layers[i - 1].name} before it by {self.layers[i - 1].error:.1e}" if i else ""
        by = f"by {self.first.error:.1e} of its output" if math.isfinite(self.first.error) else "to NaN or infinity"
        return f"The first layer that departs from float32 is {self.first.name}: {by}{before}."


def locate(path: Path, provider: str = "cpu") -> Located:
    """Compare the layers of a model, on the smaller picture of those that canaries are made of.

    Args:
        path: A .onnx file that `export.onnx` wrote.
        provider: Where it runs: "cpu", "cuda" or "ort-tensorrt".

    Raises:
        InvalidModel: It is another file, or has no layers whose weights are named.
        DeviceError: It does not run there.
    """
    described, model = describe_onnx(path), onnx.load(path)
    layers, graph_io, precision = _layers(model), described.model.graph_io, described.model.precision
    if not layers:
        raise InvalidModel(f"{path}: expected weights named {PREFIX}*, as export.onnx names them, found none")
    batch = to_batch(scene(*canary_sizes(described)[0]))
    wide = replace(graph_io, io="image" if graph_io.io == "image" else "tensor")
    expected = _run(upcast(model), list(layers), wide.feed(batch), "cpu", optimized=False)
    found = _run(model, list(layers), graph_io.feed(batch), provider, optimized=True)
    errors = (_error(a, b) for a, b in zip(found, expected, strict=True))
    compared = tuple(Layer(name, error) for name, error in zip(layers.values(), errors, strict=True))
    return Located(compared, LIMITS.get(precision or "", COARSE_LIMIT))


def _layers(model: onnx.ModelProto) -> dict[str, str]:
    """The tensors to compare, and the names of the layers that put them out."""
    weights = {tensor.name for tensor in model.graph.initializer if tensor.name.startswith(PREFIX)}
    names: dict[str, str] = {}
    for node in model.graph.node:
        used = [name for name in node.input if name in weights]
        if used and node.op_type in ("Conv", "MatMul"):
            name = re.sub(rf"^({PREFIX})+|\.weight$", "", used[0])  # a graph of images is a network around one
            names[node.output[0]] = re.sub(r"^(patch_embed|output)\.\d$", r"\1", name)  # beside casts
    return names


def _run(
    model: onnx.ModelProto, tensors: Sequence[str], feed: np.ndarray, provider: str, optimized: bool
) -> Sequence[Any]:
    """These tensors inside a model."""
    model = copy.deepcopy(model)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors, as in OrtSession
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        engine = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=[EXECUTION_PROVIDERS[provider]]
        )
        return engine.run(list(tensors), {"input": feed})
    except Exception as error:  # ONNX Runtime's exceptions have no base of their own
        raise device_error(f"the layers cannot be looked at with the provider {provider}", error) from error


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    difference = np.linalg.norm(found.astype(np.float64) - expected)
    if not np.isfinite(difference):
        return math.inf
    return float(difference / max(np.linalg.norm(expected.astype(np.float64)), 1e-30))
