"""Quantise an ONNX model to INT8, as far as a budget in dB allows.

    python -m compress.quantize --model model.onnx --data Rain200H/train --output int8.onnx --max-drop-db 0.1
    python -m compress.quantize --model camera.onnx --data DIR --output int8.onnx --max-drop-db 0.05 --limit 50

Static INT8 as pairs of QuantizeLinear and DequantizeLinear, which ONNX Runtime and TensorRT 10 and 11 both take: int8
with zero point 0, one scale for each channel of a weight and one for each activation, from the extremes that the
activations reached on real images. ONNX Runtime's quantiser calibrates and makes the pairs. Biases stay float32, as
TensorRT wants them; ONNX Runtime rounds them when it loads the model.

Quantised are convolutions and the products with the image-sized features: of attention with V, of gated experts. Never
quantised are LayerNorm, the norms and scores of attention, top-k, softmax and gates, which are small, and where such
networks break. Two of the quantiser's habits are undone. It lets everyone read a rounded tensor, also the residual
connections beside a convolution, and so rounds the image that is added to the output; here only what is quantised reads
it. And it rounds before a ReLU, which spends half of the steps on what the ReLU drops.

Where all of that together loses too much, the groups of nodes that cost most dB are freed, which is to leave them in
float32. They are ranked by what each costs when it alone is quantised. One group moves the PSNR no more than chance
does, so its cost is the drop that is to be expected: the error that it adds, in Y, is hardly correlated with the
network's own, so the two mean squares add up, which makes a drop of 10 log10(1 + added / own). How many of the ranking
have to be freed is then found by bisection, and there the drop itself is measured, on all images.

Whether INT8 is faster depends on the engine, so it is timed here, in ONNX Runtime on the CPU. On x86 that computes in
INT8 only where a rounded tensor has one reader, and the rest in float32 from rounded numbers, which takes longer than
float32 alone. TensorRT for RTX builds engines of these models; how fast they are has not been measured.
"""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from compress.counts import SIDE
from compress.latency import Latency, time_sessions
from drsformer.data import Pair, find_pairs
from drsformer.metrics import Protocol, luma, psnr
from runtime.cli import console, main, progress
from runtime.errors import GateError, InputError
from runtime.files import expect_other_files, writing
from runtime.ort import OrtSession
from runtime.pixels import to_image
from runtime.session import Derainer, Session

CROP = 128
"""Height and width of the parts of images on which the groups are ranked."""

ROWS_SHOWN = 20
"""Groups that the table lists, or all that were freed where these are more; the JSON and the model have them all."""

ROUNDING = 1 / 12
"""Mean square of the error of rounding to whole numbers: no network's own error is taken for less."""

Images = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Rainy and clean."""


class Feeds(CalibrationDataReader, Session):
    """What a graph is fed with for each image, as ONNX Runtime's calibration asks for it; a session that keeps it."""

    def __init__(self, session: OrtSession, images: Iterable[NDArray[np.uint8]]) -> None:
        self.multiple, self.limits = session.multiple, session.limits
        self._takes_images = session.input.dtype == "uint8"
        self._images = iter(images)
        self._feed: NDArray

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        self._feed = to_image(batch)[None] if self._takes_images else batch
        return batch

    def get_next(self) -> dict[str, NDArray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        image = next(self._images, None)
        if image is None:
            return None
        Derainer(self)(image)
        return {"input": self._feed}


class Mixtures:
    """A float32 model in which any part of what can be quantised is.

    groups: the names of the nodes of each group by its name, such as "latent.0.ffn.dw5", in the order of the graph.
    """

    def __init__(self, model: onnx.ModelProto, feeds: CalibrationDataReader) -> None:
        self._model = model
        self._nodes = {node.name: node for node in model.graph.node}
        self._makers = {output: node.name for node in model.graph.node for output in node.output}
        self.groups: dict[str, list[str]] = {}
        for node in _quantisable(model):
            self.groups.setdefault(_group(node, self._makers), []).append(node.name)
        names = [name for group in self.groups.values() for name in group]
        self._full = _with_pairs(model, names, feeds) if names else model

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
    """Where in the network a node is: the name of its weight without the number of a part, or that of the module."""
    if node.op_type == "Conv" and node.input[1] not in makers:
        return re.sub(r"^(network\.)+|(_\d+)+$", "", node.input[1].removesuffix(".weight"))
    namespace = next((entry.value for entry in node.metadata_props if entry.key == "namespace"), "")
    modules = re.findall(r"network\.([\w.]+): ", namespace)
    return f"{modules[-1]}.product" if modules else node.name


def _with_pairs(model: onnx.ModelProto, nodes: list[str], feeds: CalibrationDataReader) -> onnx.ModelProto:
    """The model as ONNX Runtime's quantiser makes it, with pairs for all these nodes."""
    with tempfile.TemporaryDirectory() as folder, _quiet():
        plain, full = Path(folder) / "plain.onnx", Path(folder) / "full.onnx"
        onnx.save(model, plain)
        quantize_static(
            plain,
            full,
            feeds,
            QuantFormat.QDQ,
            ["Conv", "MatMul"],
            per_channel=True,
            nodes_to_quantize=nodes,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
        )
        return onnx.load(full)


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


def _middle(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The middle of an image, of at most this height and width."""
    top, left = (max(0, (length - part) // 2) for length, part in zip(image.shape, size, strict=False))
    return image[top : top + size[0], left : left + size[1]]


class Ranking:
    """Tells what a model is expected to lose on parts of images."""

    def __init__(self, reference: Derainer, images: list[Images]) -> None:
        self._rainy = [rainy for rainy, _ in images]
        self._answers = [luma(reference(rainy), "did") for rainy in self._rainy]
        errors = (answer - luma(clean, "did") for answer, (_, clean) in zip(self._answers, images, strict=True))
        self._own = [max(float((error**2).mean()), ROUNDING) for error in errors]

    def expected_db(self, model: onnx.ModelProto) -> float:
        """The mean over the images."""
        derain = _derainer(model)
        drops = []
        for rainy, answer, own in zip(self._rainy, self._answers, self._own, strict=True):
            added = ((luma(derain(rainy), "did") - answer) ** 2).mean()
            drops.append(10 * math.log10(1 + added / own))
        return float(np.mean(drops))


class Drop:
    """Measures by how much the PSNR of a model is below that of the float32 model, mean over some pairs."""

    def __init__(self, reference: Derainer, pairs: list[Pair], protocol: Protocol) -> None:
        self._pairs = pairs
        self._protocol: Protocol = protocol
        self._reference = self._psnr(reference, "float32")

    def __call__(self, model: onnx.ModelProto, description: str) -> float:
        drops = [
            0.0 if before == after else before - after  # both may be infinite
            for before, after in zip(self._reference, self._psnr(_derainer(model), description), strict=True)
        ]
        return float(np.mean(drops))

    def _psnr(self, derain: Derainer, description: str) -> list[float]:
        found: list[float] = []
        with progress() as bar:
            for pair in bar.track(self._pairs, description=f"Measuring {description}"):
                rainy, clean = pair.load()
                try:
                    found.append(psnr(derain(rainy), clean, self._protocol))
                except InputError as error:
                    raise InputError(f"{pair.name}: {error}") from error
        return found


@dataclass(frozen=True)
class Quantised:
    """A quantised model that was written.

    drop_db:     mean drop of PSNR against the float32 model, of `all_db` with every group quantised.
    groups:      how many nodes each has.
    freed:       the groups that stayed float32, the costliest first.
    sensitivity: what each group is expected to cost when it alone is quantised, in dB, costliest first; empty where
                 nothing had to be freed.
    plain, int8: the time for an image of `size` before and after.
    """

    model: Path
    output: Path
    drop_db: float
    all_db: float
    groups: dict[str, int]
    freed: tuple[str, ...]
    sensitivity: dict[str, float]
    images: int
    size: tuple[int, int]
    plain: Latency
    int8: Latency
    seconds: float

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "output": str(self.output),
            "drop_db": round(self.drop_db, 4),
            "all_quantised_drop_db": round(self.all_db, 4),
            "images": self.images,
            "nodes": sum(self.groups.values()),
            "nodes_freed": sum(self.groups[group] for group in self.freed),
            "freed": self.freed,
            "sensitivity": {group: round(db, 5) for group, db in self.sensitivity.items()},
            "bytes": self.output.stat().st_size,
            "bytes_float32": self.model.stat().st_size,
            "ms": round(self.int8.ms, 3),
            "ms_float32": round(self.plain.ms, 3),
            "time_ratio": round(self.int8.ms / self.plain.ms, 4),
            "seconds": round(self.seconds, 1),
        }

    def table(self) -> Table:
        """For people."""
        title = f"{escape(str(self.output))}: what each group is expected to cost when it alone is quantised"
        table = Table("group", title=title)
        for column in ("nodes", "dB"):
            table.add_column(column, justify="right")
        table.add_column("stays")
        rows = max(ROWS_SHOWN, len(self.freed))
        for group, db in list(self.sensitivity.items())[:rows]:
            stays = "float32" if group in self.freed else "INT8"
            table.add_row(escape(group), str(self.groups[group]), f"{db:.4f}", stays)
        if len(self.sensitivity) > rows:
            table.add_row(f"... and {len(self.sensitivity) - rows} more")
        return table

    def verdict(self) -> str:
        """How the time compares, in words."""
        height, width = self.size
        ratio = self.int8.ms / self.plain.ms
        how = "faster" if ratio < 1 else "slower"
        return (
            f"INT8 is {how} than float32 on this CPU in ONNX Runtime: {height}x{width} takes {self.int8.ms:.1f} "
            f"ms, {ratio:.2f} times the {self.plain.ms:.1f} ms of float32"
        )


def quantize(
    model: Path,
    data: Path,
    output: Path,
    max_drop_db: float,
    calibrate: int = 8,
    limit: int | None = None,
    protocol: Protocol = "rain200",
) -> Quantised:
    """Quantise a model within a budget, print what was found, and write it.

    Raises InputError for arguments, a model or images that cannot be used, GateError where the budget leaves nothing to
    quantise; nothing is written then.

    Args:
        model: Model in float32 that export.onnx wrote.
        data: Folder of rainy and clean images.
        output: The .onnx file to write.
        max_drop_db: Budget for the drop in PSNR against the float32 model, mean over the images.
        calibrate: At most so many images to calibrate and to rank with, spread over the folder.
        limit: Use only so many images, the first ones.
        protocol: How to measure; rain200 for Rain200L, Rain200H and SPA-Data, did for DID-Data and DDN-Data.
    """
    started = time.monotonic()
    if not 0 <= max_drop_db < math.inf:
        raise InputError(f"`max_drop_db`: expected 0 or more dB, found {max_drop_db}")
    for option, value in (("--calibrate", calibrate), ("--limit", limit)):
        if value is not None and value < 1:
            raise InputError(f"{option}: expected at least 1, found {value}")
    if output.suffix != ".onnx":
        raise InputError(f"`output`: expected a name ending in .onnx, found {output}")
    expect_other_files(output, model=model)
    source = _read(model)
    session = OrtSession(model, "cpu")
    pairs = find_pairs(data)[:limit]
    sample = [pair.load() for pair in pairs[:: math.ceil(len(pairs) / calibrate)]]
    drop = Drop(Derainer(session), pairs, protocol)  # which also finds images that the model cannot take
    with console.status("Calibrating"):
        mixtures = Mixtures(source, Feeds(session, (rainy for rainy, _ in sample)))
    groups = list(mixtures.groups)
    if not groups:
        raise InputError(f"`model`: expected convolutions with constant weights, found none in {model}")

    freed, sensitivity = 0, {}
    mixed = mixtures.mixed(groups)
    drop_db = all_db = drop(mixed, "INT8")
    print(f"Everything quantised loses {all_db:.4f} dB on {len(pairs)} images, of {max_drop_db} dB allowed")
    if drop_db > max_drop_db:
        height, width = _size(session, CROP)
        parts = [(_middle(rainy, (height, width)), _middle(clean, (height, width))) for rainy, clean in sample]
        ranking = Ranking(Derainer(session), parts)
        with progress() as bar:
            costs = {g: ranking.expected_db(mixtures.mixed([g])) for g in bar.track(groups, description="Ranking")}
        sensitivity = dict(sorted(costs.items(), key=lambda cost: -cost[1]))
        groups = list(sensitivity)
        kept, freed, least_db = 0, len(groups), all_db  # so many freed are too few, and so many suffice
        while freed - kept > 1:
            tried = (kept + freed) // 2
            candidate = mixtures.mixed(groups[tried:])
            found = drop(candidate, f"with {tried} of {len(groups)} groups freed")
            if found <= max_drop_db:
                freed, mixed, drop_db = tried, candidate, found
            else:
                kept, least_db = tried, found
        if freed == len(groups):
            raise GateError(
                f"{output} is not written: {max_drop_db} dB leave nothing to quantise; with {groups[-1]} "
                f"alone, the group that costs least, the model loses {least_db:.4f} dB"
            )
    _describe(
        mixed,
        int8=groups[freed:],
        float32=groups[:freed],
        sensitivity=sensitivity,
        drop_db=drop_db,
        images=len(pairs),
        protocol=protocol,
        data=f"{data.resolve().parent.name}/{data.resolve().name}",
    )
    onnx.checker.check_model(mixed, full_check=True)
    with writing(output) as temporary:
        onnx.save(mixed, temporary)
    size = _size(session, SIDE)
    plain, int8 = time_sessions([session, OrtSession(output, "cpu")], size)
    done = Quantised(
        model,
        output,
        drop_db,
        all_db,
        {group: len(nodes) for group, nodes in mixtures.groups.items()},
        tuple(groups[:freed]),
        sensitivity,
        len(pairs),
        size,
        plain,
        int8,
        time.monotonic() - started,
    )
    if sensitivity:
        Console().print(done.table())
    print(f"{freed} of {len(groups)} groups freed, {drop_db:.4f} dB lost")
    print(done.verdict())
    return done


def _read(path: Path) -> onnx.ModelProto:
    """The model at a path. Raises InputError where there is none in float32."""
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
                f"`model`: expected a float32 model, found one in {name} at {path}; export it without --precision"
            )
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        raise InputError(f"`model`: expected a float32 model, found one that is quantised already at {path}")
    return model


def _size(session: OrtSession, side: int) -> tuple[int, int]:
    """Height and width that the model was exported for, or `side` where it takes any."""
    shape = session.input.shape
    height, width = shape[1:3] if session.input.dtype == "uint8" else shape[2:]
    return (side if height < 0 else height), (side if width < 0 else width)


def _describe(model: onnx.ModelProto, **found: Any) -> None:
    """Write into the metadata that it is quantised, and what was found."""
    entries = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {**entries, "precision": "int8", "quantization": json.dumps(found)})


if __name__ == "__main__":
    main(quantize, __doc__, summary=Quantised.summary)
