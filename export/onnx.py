"""Turn a trained checkpoint into an ONNX model, proved to compute what PyTorch computes.

    python -m export.onnx --weights weights/drsformer-xs.safetensors --output model.onnx
    python -m export.onnx --weights deraining_rain200H.pth --output rain200h.onnx --topk rank
    python -m export.onnx --weights W --output camera.onnx --io image --height 480 --width 640
    python -m export.onnx --weights W --output batches.onnx --batch any
    python -m export.onnx --weights W --output half.onnx --precision fp16
    python -m export.onnx --weights W --output filter.onnx --precision fp16 --io tensor16

The file takes and returns `input` and `output`: float32 (1, 3, H, W) RGB in [0, 1], H and W any multiples of 8, with
--io tensor16 the same in float16, or with --io image uint8 (1, H, W, 3) of any size, then with `finite`, which says
whether the answer was (`runtime.pixels.FINITE`). --batch puts another number of images in place of the 1; what a
network makes of each does not depend on the others. Only standard operators, no control flow (export/graph.py). It is
written once it has passed ONNX's checker and given PyTorch's output in ONNX Runtime to 1e-4 at several sizes, after the
same top-k selections: those that flip through rounding are counted and shown (export/verification.py).
"""

from __future__ import annotations

import collections
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from drsformer.config import SIZE_MULTIPLE
from export.options import Pattern, Precision
from runtime.cli import main, progress_shown, table_of
from runtime.errors import GateError, InputError, expect_between
from runtime.files import expect_output, writing
from runtime.manifest import MAX_BATCH
from runtime.pixels import ANY, IO, Size, size_text
from runtime.progress import OnProgress, silent, track

if TYPE_CHECKING:  # it loads PyTorch, which takes its time
    from export.verification import Agreement

OPSETS = range(18, 24)
"""What PyTorch's exporter writes without converting afterwards."""

DEFAULT_OPSET, BFLOAT16_OPSET = 20, 22
"""The second is the first one whose convolutions know bfloat16."""


@dataclass(frozen=True)
class ExportOptions:
    """How a network becomes an ONNX model.

    Args:
        topk: Form of the top-k masks, see export/topk.py: threshold is the simplest, scatter keeps exactly k, rank
            needs no TopK operator.
        io: Input and output: tensor for float32 (1, 3, H, W) in [0, 1], H and W multiples of 8; tensor16 for the same
            in float16; image for uint8 (1, H, W, 3) of any size.
        precision: Precision of the network's weights and operations, whatever its input and output are, see
            export/folding.py.
        fold: Export the folded network, which is exactly equal and faster; otherwise the readable one.
        height: Height of the input in pixels, fixed together with its width; if not given, any.
        width: Width of the input in pixels, fixed together with its height; if not given, any.
        batch: Number of images at once, or any. With a number the graph takes neither more nor less, and works as long
            on one image as on all.
        opset: Version of ONNX's operators, 18 to 23; if not given 20, or for bf16 22.
        weights_key: Key of the weights to take from a checkpoint that holds several, such as params_ema.
    """

    topk: Pattern = "threshold"
    io: IO = "tensor"
    precision: Precision = "fp32"
    fold: bool = True
    height: int | None = None
    width: int | None = None
    batch: int | Literal["any"] = 1
    opset: int | None = None
    weights_key: str | None = None


@dataclass(frozen=True)
class Exported:
    """A model that was written, and what it was found to be.

    Attributes:
        output: File of the model.
        operators: How many nodes it has of each type.
        precision: What it computes in. In half precision it was compared as `export.verification.upcast` makes it.
        agreements: How it agrees with PyTorch, for each size compared.
        seconds: How long everything took.
    """

    output: Path
    operators: Mapping[str, int]
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


def export(
    weights: Path,
    output: Path | None = None,
    options: ExportOptions = ExportOptions(),
    on_progress: OnProgress = silent,
) -> Exported:
    """Export a checkpoint, prove the result against PyTorch, and write it.

    Args:
        weights: Checkpoint, .safetensors or the authors' .pth.
        output: File to write; None is one beside the weights.
        options: How the network becomes a model.
        on_progress: Called with how far the work is.

    Raises:
        InputError: The options or the checkpoint cannot be used.
        GateError: The proof fails, or the network's values on noise exceed float16. Nothing is written then.
    """
    started = time.monotonic()
    output = output or weights.parent / f"{weights.stem or 'model'}.onnx"
    if output.suffix != ".onnx":
        raise InputError(f"`output`: expected a name ending in .onnx, found {output}")
    expect_output(output, weights=weights)
    opset, size, batch = _opset(options), _size(options), _batch(options)
    if options.precision != "fp32" and not options.fold:
        raise InputError(f"`fold`: expected on, since it places the casts of {options.precision}, found off")

    import onnx
    import torch

    from drsformer import checkpoint
    from export import folding
    from export.graph import add_metadata, to_onnx, versions
    from export.topk import with_pattern
    from export.verification import SIZES, TOLERANCE, largest_values, upcast, verify

    trained = checkpoint.load(weights, options.weights_key)
    on_progress("Exporting", 0, 0)
    network = with_pattern(trained.model.requires_grad_(False), options.topk)
    exported = folding.fold(network, options.precision) if options.fold else network
    model = to_onnx(exported, options.io, size, opset, batch)
    add_metadata(
        model,
        topk=options.topk,
        precision=options.precision,
        config=trained.model.config.to_dict(),
        weights_sha256=trained.sha256,
        provenance=trained.provenance,
        versions=versions(),
    )
    onnx.checker.check_model(model, full_check=True)
    on_progress("Exporting", 1, 1)

    reference = network if options.precision == "fp32" else folding.upcast(exported)
    if options.topk == "scatter":  # of equal scores ONNX's TopK names the first; in PyTorch only the rank pattern does
        reference = with_pattern(reference, "rank")
    # An image may have any size, so odd ones are what has to be seen.
    sizes = [size] if size else [(H - 3, W - 1) if options.io == "image" else (H, W) for H, W in SIZES]
    watched = largest_values(reference) if options.precision == "fp16" else nullcontext(dict[str, float]())
    agreements: list[Agreement] = []
    with writing(output) as temporary, watched as largest:
        onnx.save(upcast(model), temporary)
        for agreement in track(verify(temporary, reference, sizes), len(sizes), "Comparing with PyTorch", on_progress):
            agreements.append(agreement)
            if not agreement.difference <= TOLERANCE:
                raise GateError(
                    f"{output} is not written: the exported network differs from PyTorch by "
                    f"{agreement.difference:.1e} at {size_text(agreement.size)}, more than {TOLERANCE}"
                )
        for module, value in largest.items():
            if not value <= torch.finfo(torch.float16).max:
                raise GateError(
                    f"{output} is not written: {module} meets {value:.2g} on an image of noise, which float16 cannot "
                    "hold; use `precision` bf16"
                )
        onnx.save(model, temporary)
    operators = collections.Counter(node.op_type for node in model.graph.node)
    return Exported(output, operators, options.precision, tuple(agreements), time.monotonic() - started)


def _opset(options: ExportOptions) -> int:
    bfloat16 = options.precision == "bf16"
    if options.opset is None:
        return BFLOAT16_OPSET if bfloat16 else DEFAULT_OPSET
    expect_between("opset", options.opset, OPSETS[0], OPSETS[-1])
    if bfloat16 and options.opset < BFLOAT16_OPSET:
        raise InputError(
            f"`opset`: expected at least {BFLOAT16_OPSET}, whose convolutions know bfloat16, found {options.opset}"
        )
    return options.opset


def _size(options: ExportOptions) -> Size | None:
    """Height and width of the input, or None for any."""
    if options.height is None and options.width is None:
        return None
    if options.height is None or options.width is None:
        raise InputError("expected `height` and `width` together, found only one of them")
    for name, length in (("height", options.height), ("width", options.width)):
        expect_between(name, length, 1)
        if options.io != "image" and length % SIZE_MULTIPLE:
            raise InputError(f"`{name}`: expected a multiple of {SIZE_MULTIPLE}, found {length}; or give `io` image")
    return options.height, options.width


def _batch(options: ExportOptions) -> int:
    """Number of images at once, or `ANY`."""
    if options.batch == "any":
        return ANY
    expect_between("batch", options.batch, 1, MAX_BATCH)
    return options.batch


def table(exported: Exported) -> Table:
    """How a model agrees with PyTorch, for a terminal."""
    upcast = "both in float32 with the rounded weights; export.validate measures the file itself"
    caption = None if exported.precision == "fp32" else upcast
    numbers = ["max difference", "top-k selections flipped", "max difference with them"]
    sizes = table_of(["size"], numbers, f"{exported.output}: PyTorch against ONNX Runtime", caption)
    for a in exported.agreements:
        sizes.add_row(
            size_text(a.size), f"{a.difference:.1e}", f"{a.flips} of {a.selections}", f"{a.free_difference:.1e}"
        )
    return sizes


def command(
    weights: Path,
    output: Path | None = None,
    options: Annotated[ExportOptions, tyro.conf.arg(name="")] = ExportOptions(),
) -> Exported:
    """Export a checkpoint and print how the model agrees with PyTorch.

    Args:
        weights: Checkpoint, .safetensors or the authors' .pth.
        output: ONNX file to write; beside the weights if not given.
        options: How the network becomes a model.
    """
    with progress_shown() as on_progress:
        exported = export(weights, output, options, on_progress)
    Console().print(table(exported))
    return exported


if __name__ == "__main__":
    main(command, __doc__, summary=Exported.summary)
