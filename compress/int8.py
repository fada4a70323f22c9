"""INT8 in any part of an ONNX model, as pairs of QuantizeLinear and DequantizeLinear, and what that costs in dB.

The pairs are what ONNX Runtime and TensorRT 10 and 11 both take: int8 with zero point 0, one scale for each channel of
a weight and one for each activation. ONNX Runtime's quantiser makes the pairs and finds the extremes that activations
reach on real images. From there scales are tightened to what loses least in mean square: large values are rare, and to
clip them costs less than to round all others to the steps that they ask for. Biases stay float32, as TensorRT wants
them; ONNX Runtime rounds them when it loads the model.

Quantised are convolutions and the products with the image-sized features: of attention with V, of gated experts. Never
quantised are LayerNorm, the norms and scores of attention, top-k, softmax and gates, which are small, and where such
networks break. Two of the quantiser's habits are undone. It lets everyone read a rounded tensor, also the residual
connections beside a convolution, and so rounds the image that is added to the output; here only what is quantised reads
it. And it rounds before a ReLU, which spends half of the steps on what the ReLU drops.

Two things are there so that all CPUs and engines read the same file alike. Weights take 7 of the 8 bits: without VNNI,
x86 adds two products of 8 bits each in 16 bits, which overflow. And what is concatenated is bounded from below, by the
least that int8 can hold, before it is rounded: this changes nothing, but OpenVINO (2026.4) rounds a concatenation to
whole numbers, without its scale, if the rounding follows at once.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import re
import tempfile
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from drsformer.data import Pair
from drsformer.metrics import Protocol, lost_db, luma, psnr
from runtime.errors import DerainError, InputError
from runtime.ort import OrtSession
from runtime.pixels import Size
from runtime.progress import OnProgress, silent, track
from runtime.session import Derainer, Session

ROUNDING_ERROR = 1 / 12
"""Mean square of the error of rounding to whole numbers, in squared steps of 8 bits: no network's own error is taken
for less."""

SAMPLES = 1 << 15
"""Values of an activation that its scale is chosen by, at most."""

CLIPPING = 0.93 ** np.arange(20)
"""Fractions of the largest value of an activation, from 1 to a fourth, beyond which it may be clipped."""

Images = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Rainy and clean, uint8 (H, W, 3) each."""


class Feeds(CalibrationDataReader, Session):
    """What a graph is fed with for each image, as ONNX Runtime's calibration asks for it; a session that keeps it.

    Args:
        session: Of the graph.
        images: uint8 (H, W, 3) each.
    """

    def __init__(self, session: OrtSession, images: Iterable[NDArray[np.uint8]]) -> None:
        self.multiple, self.limits = session.multiple, session.limits
        self._graph_io = session.graph_io
        self._images = iter(images)
        self._feeds: deque[NDArray] = deque()  # several of an image that is cut into tiles

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        self._feeds.append(self._graph_io.feed(batch))
        return batch

    def get_next(self) -> dict[str, NDArray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        while not self._feeds:
            image = next(self._images, None)
            if image is None:
                return None
            Derainer(self)(image)
        return {"input": self._feeds.popleft()}


class Samples(CalibrationDataReader):
    """Hands on what a graph is fed with, and keeps some of the values that its tensors have.

    Args:
        model: The graph, in float32.
        tensors: Names of tensors.
        feeds: What the graph is fed with.

    Attributes:
        values: By the name of the tensor, (n,) float32, n at most `SAMPLES`, spread over all images.
    """

    def __init__(self, model: onnx.ModelProto, tensors: Iterable[str], feeds: CalibrationDataReader) -> None:
        self.values = {tensor: np.empty(0, np.float32) for tensor in tensors}
        self._feeds = feeds
        self._strides = dict.fromkeys(self.values, 1)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors, as in OrtSession
        content = _sampled(model, self.values).SerializeToString()
        self._session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])

    def get_next(self) -> dict[str, NDArray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        feed = self._feeds.get_next()
        if feed is not None:
            found = self._session.run([f"{tensor}_sample" for tensor in self.values], feed)
            for tensor, values in zip(self.values, found, strict=True):
                self._keep(tensor, np.asarray(values))
        return feed

    def _keep(self, tensor: str, values: NDArray[np.float32]) -> None:
        kept = np.concatenate([self.values[tensor], values[:: self._strides[tensor]]])
        while len(kept) > SAMPLES:
            kept, self._strides[tensor] = kept[::2], 2 * self._strides[tensor]
        self.values[tensor] = kept


class Mixtures:
    """A float32 model, of which any groups of nodes can be quantised.

    Args:
        model: The model.
        feeds: What it is calibrated on.
        full_range: Weights take 8 bits instead of 7.

    Attributes:
        groups: The names of the nodes of each group by its name, such as "latent.0.ffn.dw5", in the order of the graph.
    """

    def __init__(self, model: onnx.ModelProto, feeds: CalibrationDataReader, full_range: bool = False) -> None:
        self._model = model
        self._nodes = {node.name: node for node in model.graph.node}
        self._makers = {output: node.name for node in model.graph.node for output in node.output}
        self.groups: dict[str, list[str]] = {}
        for node in _quantisable(model):
            self.groups.setdefault(_group(node, self._makers), []).append(node.name)
        names = [name for group in self.groups.values() for name in group]
        self._full = _with_pairs(model, names, feeds, full_range) if names else model

    def mixed(self, groups: Collection[str]) -> onnx.ModelProto:
        """The model with these groups quantised."""
        quantised = {name for group in groups for name in self.groups[group]}
        used, nodes = {output.name for output in self._model.graph.output}, []
        for twin in reversed(self._full.graph.node):
            node = onnx.NodeProto()
            if twin.name in self._nodes:
                node.CopyFrom(self._nodes[twin.name])
                for i, tensor in enumerate(node.input):
                    rounded = self._makers.get(tensor) in quantised and node.op_type != "Relu"
                    if rounded or node.name in quantised:
                        node.input[i] = twin.input[i]
            elif used.isdisjoint(twin.output):
                continue
            else:
                node.CopyFrom(twin)
            used.update(node.input)
            nodes.append(node)
        mixed = onnx.ModelProto()
        mixed.CopyFrom(self._model)
        del mixed.graph.node[:], mixed.graph.initializer[:]
        mixed.graph.node.extend(reversed(nodes))
        tensors = {tensor.name: tensor for m in (self._full, self._model) for tensor in m.graph.initializer}
        mixed.graph.initializer.extend(tensor for name, tensor in tensors.items() if name in used)
        return mixed


def _quantisable(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Convolutions, and products of two computed tensors that do not lead to the scores of attention, which the model's
    metadata names."""
    weights = {tensor.name for tensor in model.graph.initializer}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    scores = set(json.loads(metadata.get("scores", "{}")).values())
    leading = set(scores)
    for node in reversed(model.graph.node):
        if node.op_type != "Conv" and not leading.isdisjoint(node.output):
            leading.update(node.input)
    for node in model.graph.node:
        computed = weights.isdisjoint(node.input)
        convolution = node.op_type == "Conv" and not computed
        product = node.op_type == "MatMul" and computed and bool(scores) and leading.isdisjoint(node.output)
        if convolution or product:
            yield node


def _group(node: onnx.NodeProto, makers: dict[str, str]) -> str:
    """Where in the network a node is: the name of its weight without the number of a piece, or that of the module."""
    if node.op_type == "Conv" and node.input[1] not in makers:
        return re.sub(r"^(network\.)+|(_\d+)+$", "", node.input[1].removesuffix(".weight"))
    namespace = next((entry.value for entry in node.metadata_props if entry.key == "namespace"), "")
    modules = re.findall(r"network\.([\w.]+): ", namespace)
    return f"{modules[-1]}.product" if modules else node.name


def _with_pairs(
    model: onnx.ModelProto, nodes: list[str], feeds: CalibrationDataReader, full_range: bool
) -> onnx.ModelProto:
    """The model as ONNX Runtime's quantiser makes it, with pairs for all these nodes, then with scales that lose least
    and with bounds on concatenations."""
    weights, chosen = {tensor.name for tensor in model.graph.initializer}, set(nodes)
    tensors = {
        tensor: None
        for node in model.graph.node
        if node.name in chosen
        for tensor in (*node.input, *node.output)
        if tensor not in weights
    }
    samples = Samples(model, tensors, feeds)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        plain, full = Path(folder) / "plain.onnx", Path(folder) / "full.onnx"
        onnx.save(model, plain)
        quantize_static(
            plain,
            full,
            samples,
            QuantFormat.QDQ,
            ["Conv", "MatMul"],
            per_channel=True,
            reduce_range=not full_range,
            nodes_to_quantize=nodes,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
        )
        return _bounded(_tightened(onnx.load(full), samples))


def _sampled(model: onnx.ModelProto, tensors: Iterable[str]) -> onnx.ModelProto:
    """The model with outputs NAME_sample, at most `SAMPLES` values of each tensor, an odd number of places apart, since
    with an even one they could all come from a few columns of the image."""
    sampled = onnx.ModelProto()
    sampled.CopyFrom(model)
    constants = {"all": -1, "first": 0, "last": np.iinfo(np.int64).max, "most": SAMPLES, "one": 1, "two": 2}
    for name, value in constants.items():
        sampled.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value]), f"samples_{name}"))

    def add(operator: str, output: str, *inputs: str) -> str:
        sampled.graph.node.append(onnx.helper.make_node(operator, inputs, [output], name=output))
        return output

    for tensor in tensors:
        flat = add("Reshape", f"{tensor}_flat", tensor, "samples_all")
        excess = add("Div", f"{tensor}_excess", add("Size", f"{tensor}_size", tensor), "samples_most")
        stride = add("Add", f"{tensor}_stride", add("Mul", f"{tensor}_even", excess, "samples_two"), "samples_one")
        sample = add("Slice", f"{tensor}_sample", flat, "samples_first", "samples_last", "samples_first", stride)
        sampled.graph.output.append(onnx.helper.make_tensor_value_info(sample, onnx.TensorProto.FLOAT, [None]))
    return sampled


def _tightened(model: onnx.ModelProto, samples: Samples) -> onnx.ModelProto:
    """The model with the scales of activations that lose least."""
    scales = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            scale = scales[node.input[1]]
            found = best_scale(samples.values[node.input[0]], onnx.numpy_helper.to_array(scale))
            scale.CopyFrom(onnx.numpy_helper.from_array(found, scale.name))
    return model


def best_scale(values: NDArray[np.float32], largest: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scale by which rounding to int8 loses least in mean square.

    Args:
        values: (n,)
        largest: The scale that clips nothing, (), above 0.

    Returns:
        The scale, (), at most `largest`.
    """
    scales = [np.float32(largest * fraction) for fraction in CLIPPING]
    rounded = (scale * np.clip(np.rint(values / scale), -128, 127) for scale in scales)
    return np.asarray(scales[int(np.argmin([np.square(each - values).mean() for each in rounded]))])


def _bounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a bound from below between each concatenation and the rounding of it."""
    concatenated = {output for node in model.graph.node if node.op_type == "Concat" for output in node.output}
    scales = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for original in model.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        if node.op_type == "QuantizeLinear" and (tensor := node.input[0]) in concatenated:
            least = np.iinfo(np.int8).min * onnx.numpy_helper.to_array(scales[node.input[1]])
            model.graph.initializer.append(onnx.numpy_helper.from_array(least, f"{tensor}_least"))
            node.input[0] = f"{tensor}_bounded"
            nodes.append(onnx.helper.make_node("Max", [tensor, f"{tensor}_least"], [node.input[0]], name=node.input[0]))
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def cpu_kernels() -> str:
    """Which INT8 kernels this machine's CPU allows, on which the speed and, with weights of 8 bits, the drop depend."""
    machine = platform.machine()
    if machine not in ("x86_64", "AMD64"):
        return machine
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return machine
    return f"{machine} {'with' if re.search(r'avx(512)?_vnni', flags) else 'without'} VNNI"


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser advises to rewrite the graph first, which the exporter has done."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _derainer(model: onnx.ModelProto) -> Derainer:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        return Derainer(OrtSession(path, "cpu"))


class Ranking:
    """Tells what a model is expected to lose in PSNR.

    Its error, in Y, is hardly correlated with the network's own where little of it is quantised, so the two mean
    squares add up, which makes a drop of 10 log10(1 + added / own).

    Args:
        reference: The float32 model.
        images: Rainy and clean.
    """

    def __init__(self, reference: Derainer, images: list[Images]) -> None:
        self._rainy = [rainy for rainy, _ in images]
        self._answers = [luma(reference(rainy), "did") for rainy in self._rainy]
        errors = (answer - luma(clean, "did") for answer, (_, clean) in zip(self._answers, images, strict=True))
        self._own = [max(float((error**2).mean()), ROUNDING_ERROR) for error in errors]

    def expected_db(self, model: onnx.ModelProto) -> float:
        """The mean over the images, at least 0."""
        derain = _derainer(model)
        drops = []
        for rainy, answer, own in zip(self._rainy, self._answers, self._own, strict=True):
            added = ((luma(derain(rainy), "did") - answer) ** 2).mean()
            drops.append(10 * math.log10(1 + added / own))
        return float(np.mean(drops))


class Drop:
    """Measures by how much the PSNR of a model is below that of the float32 model.

    Args:
        reference: The float32 model.
        pairs: The drop is the mean over these.
        protocol: How PSNR is measured.
        on_progress: See `runtime.progress`.

    Raises:
        InputError: An image that the model cannot take.
    """

    def __init__(
        self, reference: Derainer, pairs: Sequence[Pair], protocol: Protocol, on_progress: OnProgress = silent
    ) -> None:
        self._pairs, self._on_progress = pairs, on_progress
        self._protocol: Protocol = protocol
        self._reference = self._psnr(reference, "float32")

    def __call__(self, model: onnx.ModelProto, description: str) -> float:
        """The drop in dB, negative where the model is better."""
        drops = [
            lost_db(before, after)
            for before, after in zip(self._reference, self._psnr(_derainer(model), description), strict=True)
        ]
        return float(np.mean(drops))

    def _psnr(self, derain: Derainer, description: str) -> list[float]:
        found: list[float] = []
        for pair in track(self._pairs, len(self._pairs), f"Measuring {description}", self._on_progress):
            rainy, clean = pair.load()
            try:
                found.append(psnr(derain(rainy), clean, self._protocol))
            except DerainError as error:
                raise type(error)(f"{pair.name}: {error}") from error
        return found


def read_float32(path: Path) -> onnx.ModelProto:
    """Read the model at a path. Raises InputError where there is none in float32."""
    if not path.is_file():
        raise InputError(f"`model`: expected an ONNX file, found no file at {path}")
    try:
        model = onnx.load(path)
    except DecodeError as error:
        raise InputError(f"`model`: expected an ONNX file, found another at {path}") from error
    except (onnx.checker.ValidationError, FileNotFoundError) as error:  # weights in a file of their own
        raise InputError(f"`model`: expected all weights of {path}, found some missing: {error}") from error
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    for kind, name in ((onnx.TensorProto.FLOAT16, "float16"), (onnx.TensorProto.BFLOAT16, "bfloat16")):
        if kind in kinds:
            raise InputError(
                f"`model`: expected a float32 model, found one in {name} at {path}; export it "
                "without the --precision of python -m export.onnx"
            )
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        raise InputError(f"`model`: expected a float32 model, found one that is quantised already at {path}")
    return model


def exported_size(session: OrtSession, side: int) -> Size:
    """Height and width that the model was exported for, or `side` where it takes any."""
    height, width = session.graph_io.size(session.input.shape)
    return (side if height < 0 else height), (side if width < 0 else width)


def describe(model: onnx.ModelProto, **found: Any) -> None:
    """Write into the metadata that it is quantised, and what was found."""
    entries = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {**entries, "precision": "int8", "quantization": json.dumps(found)})
