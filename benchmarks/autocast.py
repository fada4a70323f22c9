"""Our half-precision network against the one that NVIDIA ModelOpt's AutoCast makes of our float32 one.

    python -m export.onnx --weights weights/drsformer-xs.safetensors --output ours.onnx --precision fp16
    python -m modelopt.onnx.autocast --onnx_path runtime/drsformer-xs.onnx --output_path theirs.onnx -t fp16 \
        --keep_io_types -d calibration/
    python -m benchmarks.autocast --ours ours.onnx --theirs theirs.onnx --reference runtime/drsformer-xs.onnx \
        --data Rain100L/val Rain200H/val --output results

AutoCast comes with `nvidia-modelopt[onnx]` and wants other versions of ONNX than this project, so it takes a virtual
environment of its own; here only its files are read. It chooses by the values that it sees while the network runs on
`calibration/`, a folder of .npz files with an array `input`, float32 (1, 3, H, W); nodes with values above 512 stay
float32. Without `-d` it runs on noise of a size of its own, which fails in this network. Without `--keep_io_types`
input and output become float16 as well.

The files in `results/` were made by nvidia-modelopt 0.47.0 with onnx 1.21.0 and ONNX Runtime 1.24.4, from 256x256
pixels of four training images:

    theirs              by the command above
    theirs-fp16-io      without --keep_io_types
    theirs-excluded     with --op_types_to_exclude and the types that compute in float32 in ours: Clip Div Gather
                        GreaterOrEqual LayerNormalization MatMul Mul ReduceL2 ReduceSum Softmax TopK Where Unsqueeze
    theirs-excluded-2   and with those between them: Reshape Transpose
    large               the same network with the weights of every qkv and of the feed-forward's project_in times 2**12,
                        and of the project_out after them times 2**-12

OUTPUT/autocast.json, and the same as a table in OUTPUT/autocast.md, have a row for every file, named after the
reference and the file; further commands add rows.

AutoCast gives every dimension that it does not know one and the same name, and ONNX Runtime, which takes those to be
equal, may not run the file. "runs as it is" tells; all files are then compared without the shapes of inner tensors.

What it gives up: ONNX Runtime on a CPU has no float16 convolutions and products. It computes them in float32 and rounds
what comes out, so sums that overflow or lose digits inside an operator on a GPU do not here, and the drift is a lower
bound for both. Nothing is timed for the same reason.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from benchmarks.harness import Row, Sheet
from drsformer.config import SIZE_MULTIPLE
from drsformer.data import Pair, find_pairs
from drsformer.metrics import psnr, psnr_rgb
from runtime.cli import main
from runtime.errors import InputError
from runtime.pixels import to_batch, to_image

PRECISIONS = {"fp16": onnx.TensorProto.FLOAT16, "fp32": onnx.TensorProto.FLOAT}

BRIGHT = np.full((1, 3, 256, 256), 1, np.float32)
"""A flat white image, whose sums are the largest that an image of its size can have at the input."""


def counted(path: Path) -> Row:
    """What an ONNX file consists of. Operators that have weights count for the precision of those."""
    graph = onnx.load(path).graph
    operators = Counter(node.op_type for node in graph.node)
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    weighted = Counter(kinds.get(node.input[1]) for node in graph.node if node.op_type == "Conv")
    values: Counter[int] = Counter()
    for tensor in graph.initializer:
        values[tensor.data_type] += int(np.prod(tensor.dims))
    return {
        "nodes": operators.total(),
        "Cast": operators["Cast"],
        **{f"{name} Conv": weighted[kind] for name, kind in PRECISIONS.items()},
        **{f"{name} initialisers": list(kinds.values()).count(kind) for name, kind in PRECISIONS.items()},
        **{f"{name} values": values[kind] for name, kind in PRECISIONS.items()},
        "file MB": path.stat().st_size / 1e6,
    }


class Model:
    """An ONNX file in ONNX Runtime on the CPU. Unlike `runtime.ort.OrtSession` it also takes files whose input and
    output are float16.

    shapes: keep the shapes that the file tells of its inner tensors; without them ONNX Runtime finds its own.
    """

    def __init__(self, path: Path, shapes: bool = False) -> None:
        model = onnx.load(path)
        if not shapes:
            del model.graph.value_info[:]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # fatal errors; the others are raised
        providers = ["CPUExecutionProvider"]
        self._engine = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
        (self._input,) = self._engine.get_inputs()
        self.io = {"tensor(float)": "fp32", "tensor(float16)": "fp16"}[self._input.type]

    def __call__(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """(1, 3, H, W), H and W multiples of 8 -> the same, not clamped."""
        dtype = np.float16 if self.io == "fp16" else np.float32
        (output,) = self._engine.run(None, {self._input.name: batch.astype(dtype)})
        return np.asarray(output).astype(np.float32)


def runs(path: Path) -> bool:
    """Whether ONNX Runtime runs the file as it is."""
    try:
        Model(path, shapes=True)(BRIGHT)
    except Exception:  # ONNX Runtime's exceptions have no base of their own
        return False
    return True


def cropped(pair: Pair) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Rainy and clean image, without what is more than a multiple of 8."""
    rainy, clean = pair.load()
    H, W = (length // SIZE_MULTIPLE * SIZE_MULTIPLE for length in rainy.shape[:2])
    return rainy[:H, :W], clean[:H, :W]


def compared(path: Path, reference: Path, pairs: list[Pair]) -> Row:
    """What an ONNX file consists of, and how far its images are from the reference's: "PSNR" and "drop dB" are on luma
    and means over the pairs, "to reference" is between the two outputs over all channels, the least of all pairs. What
    is not finite is counted, and black in the images."""
    model, exact = Model(path), Model(reference)
    scores, drops, between, broken = [], [], [], 0
    for pair in pairs:
        rainy, clean = cropped(pair)
        found, expected = model(to_batch(rainy)), to_image(exact(to_batch(rainy)))
        broken += int((~np.isfinite(found)).sum())
        restored = to_image(np.nan_to_num(found, posinf=0, neginf=0))
        scores.append(psnr(restored, clean))
        drops.append(psnr(expected, clean) - scores[-1])
        between.append(psnr_rgb(restored, expected))
    white = model(BRIGHT)
    return {
        **counted(path),
        "input and output": model.io,
        "runs as it is": "yes" if runs(path) else "no",
        "PSNR": statistics.mean(scores),
        "drop dB": statistics.mean(drops),
        "largest drop dB": max(drops),
        "to reference dB": min(between) if min(between) < math.inf else "equal",
        "not finite": broken,
        "not finite, white": int((~np.isfinite(white)).sum()),
        "difference, white": float(np.abs(np.nan_to_num(white, posinf=0, neginf=0) - exact(BRIGHT)).max()),
    }


def autocast(
    ours: Path,
    theirs: tuple[Path, ...],
    reference: Path,
    data: tuple[Path, ...],
    output: Path,
    pairs: int = 3,
) -> Row:
    """Compare half-precision files of one network with its float32 one. Returns where the results are.

    Args:
        ours: Made by export.onnx with --precision fp16.
        theirs: Made by AutoCast of the reference.
        reference: The same network in float32.
        data: Folders of rainy images and their clean ones, in any layout of drsformer.data.
        output: Folder that gets the results; with results in it, what is missing is added.
        pairs: How many pairs to take from each folder, evenly spread.
    """
    if pairs < 1:
        raise InputError(f"`pairs`: expected at least 1, found {pairs}")
    for path in (ours, *theirs, reference):
        if not path.is_file():
            raise InputError(f"expected an ONNX file, found no file at {path}")
    chosen = [found[i * len(found) // pairs] for found in map(find_pairs, data) for i in range(min(pairs, len(found)))]
    sheet = Sheet(output, "autocast", torch.device("cpu"), float("inf"))
    sheet.run["ceilings"] |= {name: version(name) for name in ("onnx", "onnxruntime")}
    for path in (reference, ours, *theirs):
        sheet.measure(f"{reference.stem}: {path.stem}", functools.partial(compared, path, reference, chosen))
    return sheet.summary()


if __name__ == "__main__":
    main(autocast, __doc__, summary=lambda summary: summary)
