"""Quantise an ONNX model to INT8, as far as a budget in dB allows.

    python -m compress.quantize --model model.onnx --data Rain200H/train --output int8.onnx --max-drop-db 0.1
    python -m compress.quantize --model camera.onnx --data DIR --output int8.onnx --max-drop-db 0.05 --limit 50

What is quantised, and how, stands in `compress.int8`: convolutions and products, as pairs of QuantizeLinear and
DequantizeLinear that ONNX Runtime and TensorRT both take.

Where all of that together loses too much, the groups of nodes that cost most dB are excluded, which is to leave them in
float32. They are ranked by what each costs when it alone is quantised. One group moves the PSNR no more than chance
does, so its cost is the drop that is to be expected from the error that it adds. How many of the ranking have to be
excluded is then found by bisection, and there the drop itself is measured, on all images.

Whether INT8 is faster depends on the engine, so it is timed here, in ONNX Runtime on the CPU. On x86 that computes in
INT8 only where a rounded tensor has one reader, and the rest in float32 from rounded numbers, which takes longer than
float32 alone. TensorRT for RTX builds engines of these models; how fast they are has not been measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from drsformer.counts import SIDE
from drsformer.metrics import Protocol
from runtime.cli import main, progress_shown, table_of
from runtime.errors import GateError, InputError, expect_between, expect_finite
from runtime.files import expect_output, writing
from runtime.pixels import Size, size_text
from runtime.progress import OnProgress, silent, track

if TYPE_CHECKING:  # they load ONNX, which takes its time
    import onnx
    from numpy.typing import NDArray

    from compress.int8 import Drop, Mixtures, Ranking
    from compress.latency import Latency

RANKING_SIDE = 128
"""Height and width, in pixels, of the middles of images on which the groups are ranked."""

ROWS_SHOWN = 20
"""Groups that the table lists, or all that were excluded where these are more; the JSON and the model have them all."""


@dataclass(frozen=True)
class QuantizeOptions:
    """How far to quantise.

    Args:
        max_drop_db: Budget for the drop in PSNR against the float32 model, in dB, mean over the images.
        calibrate: Images to calibrate and to rank with, at most, spread over the folder.
        limit: Images to use, the first ones; all if not given.
        protocol: Protocol of PSNR; rain200 for Rain200L, Rain200H and SPA-Data, did for DID-Data and DDN-Data.
        full_range: Let weights take all 8 bits instead of 7. CPUs without VNNI lose more then, not less.

    Raises:
        InputError: A value is out of range.
    """

    max_drop_db: float
    calibrate: int = 8
    limit: int | None = None
    protocol: Protocol = "rain200"
    full_range: bool = False

    def __post_init__(self) -> None:
        expect_finite("max_drop_db", self.max_drop_db)
        expect_between("max_drop_db", self.max_drop_db, 0)
        expect_between("calibrate", self.calibrate, 1)
        if self.limit is not None:
            expect_between("limit", self.limit, 1)


@dataclass(frozen=True)
class Quantised:
    """A quantised model that was written.

    Attributes:
        model: The float32 model.
        output: The quantised one.
        drop_db: Mean drop of PSNR against the float32 model, in dB.
        all_db: The same with every group quantised.
        groups: How many nodes each group has.
        excluded: The groups that stayed float32, the costliest first.
        sensitivity: What each group is expected to cost when it alone is quantised, in dB, costliest first; empty where
            nothing had to be excluded.
        images: Pairs that the drop was measured on.
        size: Height and width of the image that was timed.
        plain: Its time in float32.
        int8: Its time after quantisation.
        kernels: Kind of CPU that all of this was measured on, see `compress.int8.cpu_kernels`.
        seconds: What all of this took.
    """

    model: Path
    output: Path
    drop_db: float
    all_db: float
    groups: dict[str, int]
    excluded: tuple[str, ...]
    sensitivity: dict[str, float]
    images: int
    size: Size
    plain: Latency
    int8: Latency
    kernels: str
    seconds: float

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "output": str(self.output),
            "drop_db": round(self.drop_db, 4) + 0.0,
            "all_quantised_drop_db": round(self.all_db, 4) + 0.0,
            "images": self.images,
            "nodes": sum(self.groups.values()),
            "nodes_excluded": sum(self.groups[group] for group in self.excluded),
            "excluded": self.excluded,
            "sensitivity": {group: round(db, 5) for group, db in self.sensitivity.items()},
            "bytes": self.output.stat().st_size,
            "bytes_float32": self.model.stat().st_size,
            "ms": round(self.int8.ms, 3),
            "ms_float32": round(self.plain.ms, 3),
            "time_ratio": round(self.int8.ms / self.plain.ms, 4),
            "kernels": self.kernels,
            "seconds": round(self.seconds, 1),
        }


def quantize(
    model: Path, data: Path, output: Path, options: QuantizeOptions, on_progress: OnProgress = silent
) -> Quantised:
    """Quantise a model within a budget, write it and time it.

    Args:
        model: Model in float32 that export.onnx wrote.
        data: Folder of rainy and clean images.
        output: The .onnx file to write.
        options: How far.
        on_progress: See `runtime.progress`.

    Raises:
        InputError: Arguments, the model or images cannot be used.
        GateError: The budget leaves nothing to quantise; nothing is written.
    """
    import onnx

    from compress.int8 import Drop, Feeds, Mixtures, Ranking, cpu_kernels, describe, exported_size, read_float32
    from compress.latency import time_sessions
    from drsformer.data import find_pairs
    from runtime.ort import OrtSession
    from runtime.session import Derainer

    started = time.monotonic()
    if output.suffix != ".onnx":
        raise InputError(f"`output`: expected a name ending in .onnx, found {output}")
    expect_output(output, model=model)
    source = read_float32(model)
    session = OrtSession(model, "cpu")
    pairs = find_pairs(data)[: options.limit]
    sample = [pair.load() for pair in pairs[:: math.ceil(len(pairs) / options.calibrate)]]
    drop = Drop(Derainer(session), pairs, options.protocol, on_progress)  # which also finds images that it cannot take
    rainy = track((rainy for rainy, _ in sample), len(sample), "Calibrating", on_progress)
    mixtures = Mixtures(source, Feeds(session, rainy), options.full_range)
    groups, sensitivity = list(mixtures.groups), {}
    if not groups:
        raise InputError(f"`model`: expected convolutions with constant weights, found none in {model}")

    excluded, mixed = 0, mixtures.mixed(groups)
    drop_db = all_db = drop(mixed, "INT8")
    if all_db > options.max_drop_db:
        size = exported_size(session, RANKING_SIDE)
        ranking = Ranking(Derainer(session), [(_middle(rainy, size), _middle(clean, size)) for rainy, clean in sample])
        sensitivity = _rank(mixtures, ranking, on_progress)
        groups = list(sensitivity)
        excluded, mixed, drop_db = _exclude(mixtures, groups, drop, options.max_drop_db, all_db)
    describe(
        mixed,
        int8=groups[excluded:],
        float32=groups[:excluded],
        sensitivity=sensitivity,
        drop_db=drop_db,
        images=len(pairs),
        protocol=options.protocol,
        kernels=cpu_kernels(),
        data=f"{data.resolve().parent.name}/{data.resolve().name}",
    )
    onnx.checker.check_model(mixed, full_check=True)
    with writing(output) as temporary:
        onnx.save(mixed, temporary)
    size = exported_size(session, SIDE)
    plain, int8 = time_sessions([session, OrtSession(output, "cpu")], size, on_progress)
    return Quantised(
        model=model,
        output=output,
        drop_db=drop_db,
        all_db=all_db,
        groups={group: len(nodes) for group, nodes in mixtures.groups.items()},
        excluded=tuple(groups[:excluded]),
        sensitivity=sensitivity,
        images=len(pairs),
        size=size,
        plain=plain,
        int8=int8,
        kernels=cpu_kernels(),
        seconds=time.monotonic() - started,
    )


def _rank(mixtures: Mixtures, ranking: Ranking, on_progress: OnProgress) -> dict[str, float]:
    """What each group is expected to cost when it alone is quantised, in dB, costliest first."""
    groups = track(mixtures.groups, len(mixtures.groups), "Ranking", on_progress)
    costs = {group: ranking.expected_db(mixtures.mixed([group])) for group in groups}
    return dict(sorted(costs.items(), key=lambda cost: -cost[1]))


def _exclude(
    mixtures: Mixtures, groups: Sequence[str], drop: Drop, budget: float, all_db: float
) -> tuple[int, onnx.ModelProto, float]:
    """How many of the groups, from the costliest, have to stay float32; with the model and its drop in dB. `all_db` is
    the drop, above the budget, with none of them. Raises GateError where all of them have to."""
    too_few, enough, least_db, found = 0, len(groups), all_db, None
    while enough - too_few > 1:
        tried = (too_few + enough) // 2
        candidate = mixtures.mixed(groups[tried:])
        drop_db = drop(candidate, f"with {tried} of {len(groups)} groups excluded")
        if drop_db <= budget:
            enough, found = tried, (candidate, drop_db)
        else:
            too_few, least_db = tried, drop_db
    if found is None:
        raise GateError(
            f"nothing is written: {budget} dB leave nothing to quantise; with {groups[-1]} alone, the group that costs "
            f"least, the model loses {least_db:z.4f} dB"
        )
    return enough, *found


def _middle(image: NDArray, size: Size) -> NDArray:
    """The middle of an image, of at most this height and width."""
    top, left = (max(0, (length - wanted) // 2) for length, wanted in zip(image.shape, size, strict=False))
    return image[top : top + size[0], left : left + size[1]]


def command(
    model: Path,
    data: Path,
    output: Path,
    options: Annotated[QuantizeOptions, tyro.conf.arg(name="")],
) -> Quantised:
    """Quantise a model within a budget, and print what was found.

    Args:
        model: Model in float32 that export.onnx wrote.
        data: Folder of rainy and clean images.
        output: The .onnx file to write.
        options: How far.
    """
    with progress_shown() as on_progress:
        done = quantize(model, data, output, options, on_progress)
    print(
        f"Everything quantised loses {done.all_db:z.4f} dB on {done.images} images, of {options.max_drop_db} dB allowed"
    )
    if done.sensitivity:
        Console().print(_table(done))
    print(f"{len(done.excluded)} of {len(done.groups)} groups excluded, {done.drop_db:z.4f} dB lost")
    ratio = done.int8.ms / done.plain.ms
    print(
        f"INT8 is {'faster' if ratio < 1 else 'slower'} than float32 on this CPU ({done.kernels}) in ONNX Runtime: "
        f"{size_text(done.size)} takes {done.int8.ms:.1f} ms, {ratio:.2f} times the {done.plain.ms:.1f} ms of float32"
    )
    return done


def _table(done: Quantised) -> Table:
    """What the groups are expected to cost, and which are excluded."""
    title = f"{done.output}: what each group is expected to cost when it alone is quantised"
    groups = table_of(["group", "stays"], ["nodes", "dB"], title)
    rows = max(ROWS_SHOWN, len(done.excluded))
    for group, db in list(done.sensitivity.items())[:rows]:
        stays = "float32" if group in done.excluded else "INT8"
        groups.add_row(escape(group), stays, str(done.groups[group]), f"{db:z.4f}")
    if len(done.sensitivity) > rows:
        groups.add_row(f"... and {len(done.sensitivity) - rows} more")
    return groups


def run() -> None:
    """The command line."""
    main(command, __doc__, summary=Quantised.summary)


if __name__ == "__main__":
    run()
