"""Measure, prove and train on a CUDA machine.

    python -m benchmarks.gpu correct --output results/
    python -m benchmarks.gpu speed   --output results/ --weights weights/drsformer-xs.safetensors --minutes 9
    python -m benchmarks.gpu kernels --output results/
    python -m benchmarks.gpu train   --output results/ --data data/ --run-dir runs/ --recipe teacher --minutes 9
    python -m benchmarks.gpu answers --output results/
    python -m benchmarks.gpu provider --output results/ --weights weights/drsformer-xs.safetensors --data data/

Each stage writes OUTPUT/STAGE.json and the same as a table in OUTPUT/STAGE.md, row by row, the important ones first. It
starts no row that it cannot expect to finish within --minutes; the same command goes on from there. A row that fails
says why, and the next one is tried. benchmarks/README.md says what is measured and how; `benchmarks.plan` is what is
wanted of it first. All of it runs on a CPU too, with --device cpu, small networks and small sizes: that is what the
tests do.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.answers import Answers
from benchmarks.contestants import (
    Contestant,
    Form,
    Subject,
    Torch,
    contestants,
    formed,
    from_preset,
    from_weights,
    picture,
)
from benchmarks.harness import (
    LOST,
    Row,
    Sheet,
    Size,
    Stage,
    kind_of,
    milliseconds,
    parse_sizes,
    peak_memory,
    protected,
    synchronize,
)
from benchmarks.provider import Provider
from benchmarks.training import Train, pair_folders
from drsformer.data import dataset_name, find_pairs
from drsformer.evaluation import evaluate_model
from export.folding import DTYPES, fold
from export.options import Precision
from export.topk import PATTERNS, count_flips, masks, scores_of, with_pattern
from runtime.cli import console, main
from runtime.pixels import size_text


@contextmanager
def exact_float32() -> Iterator[None]:
    """Inside, no product of float32 is rounded to TF32."""
    products, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, convolutions


def difference(output: Tensor, reference: Tensor) -> Row:
    """How far two outputs are from each other; PSNR for a peak of 1."""
    output, reference = output.double(), reference.double()
    distance = output - reference
    mean = distance.square().mean().item()
    return {
        "max difference": distance.abs().max().item(),
        "relative error": (distance.norm() / reference.norm()).item(),
        "PSNR dB": -10 * float(np.log10(mean)) if mean > 0 else "identical",
        "not finite": int((~output.isfinite()).sum()),
    }


def answer(subject: Subject, form: Form, precision: Precision, image: Tensor, device: torch.device) -> Tensor:
    network = copy.deepcopy(formed(subject, form, precision)).to(device)
    with torch.no_grad():
        return network(image.to(device) if form == "folded" else image.to(device, DTYPES[precision])).float()


HALVES: tuple[Precision, ...] = ("fp16", "bf16")

SCORED: tuple[tuple[Form, Precision], ...] = (
    ("readable", "fp32"), ("folded", "fp32"), ("folded", "fp16"), ("folded", "bf16"),
)  # fmt: skip
"""Whose PSNR is measured; drift is against the first."""

WEIGHED: tuple[tuple[Form, Precision], ...] = (
    ("released", "fp32"), ("folded", "fp16"), ("readable", "fp32"), ("folded", "fp32"),
)  # fmt: skip
"""Whose memory is measured."""


@dataclass(frozen=True)
class Correct(Stage):
    """Is the folded network the readable one on this device, in every precision? And how much memory does it take?

    Args:
        sizes: Heights and widths at which float32 is compared and memory measured.
        large: Height and width of the images that are meant to overflow half precision.
        data: Folder of rain data for the drift in dB of the networks given by --weights.
    """

    sizes: tuple[str, ...] = ("256x256", "512x512", "720x1280", "1080x1920")
    large: str = "1024x1024"
    data: Path | None = None

    def measure(self) -> Row:
        sheet = self.sheet()
        subjects = [from_preset(self.network), *map(from_weights, self.weights)]
        sizes, (large,) = parse_sizes(self.sizes), parse_sizes([self.large], "large")
        H, W = large
        images = {
            f"image {size_text(sizes[0])}": picture(sizes[0]),
            f"image {self.large}": picture(large),
            f"bright {self.large}": torch.full((1, 3, H, W), 0.98),
            f"black {self.large}": torch.zeros(1, 3, H, W),
        }
        with exact_float32():
            for subject in subjects:
                name, same = subject.name, functools.partial(self.same, sheet.device, subject)
                for size in sizes[:2]:
                    sheet.measure(f"{name} folded fp32 {size_text(size)}", functools.partial(same, size))
                sheet.measure(f"{name} folded fp64 64x64", functools.partial(same, (64, 64), dtype=torch.float64))
                for title, image in images.items():
                    for precision in HALVES:
                        sheet.measure(
                            f"{name} folded {precision} {title}",
                            functools.partial(self.drift, sheet.device, subject, precision, image),
                        )
                for pattern in PATTERNS:
                    for precision in DTYPES:
                        sheet.measure(
                            f"{name} folded {precision} {pattern} {size_text(sizes[0])}",
                            functools.partial(self.patterned, sheet.device, subject, pattern, precision, sizes[0]),
                        )
        for subject in (subject for subject in subjects if subject.trained):
            for place in pair_folders(self.data, "val") if self.data else []:
                for form, precision in SCORED:
                    key = f"{subject.name} {form} {precision} {dataset_name(place)}"
                    sheet.measure(key, functools.partial(self.scored, sheet, subject, form, precision, place))
        for size in sizes:
            for form, precision in WEIGHED:
                sheet.measure(
                    f"memory {subjects[0].name} {form} {precision} {size_text(size)}",
                    functools.partial(self.memory, sheet.device, subjects[0], form, precision, size),
                )
        return sheet.summary()

    @staticmethod
    def same(device: torch.device, subject: Subject, size: Size, dtype: torch.dtype = torch.float32) -> Row:
        """Readable against folded in one precision: freely, and after the same top-k selections."""
        readable = copy.deepcopy(subject.network).to(dtype)
        folded = fold(readable).to(device)
        readable, image = readable.to(device), picture(size).to(device, dtype)
        with torch.no_grad():
            with scores_of(readable) as own:
                reference = readable(image)
            with scores_of(folded) as found:
                output = folded(image)
            with scores_of(readable, found):
                same = readable(image)
        flips = sum(count_flips(own[layer], found[layer], mask.ks) for layer, mask in masks(readable).items())
        return {
            **difference(output, reference),
            "flipped": flips,
            "max difference, same selections": (output - same).abs().max().item(),
        }

    @staticmethod
    def drift(device: torch.device, subject: Subject, precision: Precision, image: Tensor) -> Row:
        """Folded in half precision against readable in float32."""
        reference = answer(subject, "readable", "fp32", image, device)
        return difference(answer(subject, "folded", precision, image, device), reference)

    @staticmethod
    def patterned(device: torch.device, subject: Subject, pattern: Any, precision: Precision, size: Size) -> Row:
        """A form of mask in the folded network against readable in float32."""
        network = with_pattern(subject.network, pattern)
        variant = dataclasses.replace(subject, network=network)
        reference = answer(subject, "readable", "fp32", picture(size), device)
        with torch.no_grad():
            output = fold(variant.network, precision).to(device)(picture(size).to(device))
        return difference(output, reference)

    @staticmethod
    def scored(sheet: Sheet, subject: Subject, form: Form, precision: Precision, place: Path) -> Row:
        """Scores on all pairs of a folder, with TF32 as PyTorch has it by default, and the drift."""
        network = copy.deepcopy(formed(subject, form, precision)).to(sheet.device)
        scores = evaluate_model(network, find_pairs(place))
        reference = sheet.rows.get(f"{subject.name} readable fp32 {dataset_name(place)}", {}).get("PSNR on Y")
        row: Row = {"PSNR on Y": scores.psnr, "SSIM on Y": scores.ssim, "images": scores.images}
        return row | ({"drift dB": scores.psnr - reference} if reference is not None else {})

    @staticmethod
    def memory(device: torch.device, subject: Subject, form: Form, precision: Precision, size: Size) -> Row:
        """Of one forward pass in eager mode, weights included."""
        row: Row = {}
        with peak_memory(device, row):
            output = answer(subject, form, precision, picture(size), device)
        return row | {"not finite": int((~output.isfinite()).sum())}


ROUNDS = 3
"""How often the contestants take turns."""


@dataclass(frozen=True)
class Speed(Stage):
    """How fast are the released network and ours, in every engine that is here?

    Args:
        sizes: Heights and widths, the most important first.
        batches: Numbers of images at once, likewise; all sizes come with the first, then all with the second.
        seconds: Of measurement for each contestant in each of three rounds, about.
        only: Run only contestants in whose names one of these is, and the one that all are compared with.
    """

    sizes: tuple[str, ...] = ("720x1280", "256x256", "1080x1920", "512x512")
    batches: tuple[int, ...] = (1, 8)
    seconds: float = 1.0
    only: tuple[str, ...] = ("",)

    def measure(self) -> Row:
        sheet = self.sheet()
        torch.backends.cudnn.benchmark = True
        torch._dynamo.config.recompile_limit = 256
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        subject, small = from_preset(self.network), [from_weights(path) for path in self.weights]
        for batch in self.batches:
            for size in parse_sizes(self.sizes):
                first, *others = contestants(subject, small, batch)
                chosen = [other for other in others if any(part in other.name for part in self.only)]
                self.compete(sheet, [first, *chosen], size, batch)
        return sheet.summary()

    def compete(self, sheet: Sheet, entrants: list[Contestant], size: Size, batch: int) -> None:
        """Time all entrants that have no row yet, in turn, against the first, which is always timed with them."""
        torch.compiler.reset()  # what was compiled for other sizes
        key = lambda contestant: f"{size_text(size)} batch {batch}: {contestant.name}"  # noqa: E731
        first, *others = entrants
        missing = [contestant for contestant in others if sheet.wants(key(contestant), 20)]
        if not missing and not sheet.wants(key(first), 20):
            return
        entrants = [first, *missing]
        image = picture(size, batch).to(sheet.device)
        rows: dict[str, Row] = {contestant.name: {} for contestant in entrants}
        times: dict[str, list[float]] = {contestant.name: [] for contestant in entrants}
        reference: list[Tensor] = []
        compiled: dict[Any, float] = {}  # seconds that it took, by what was compiled
        later: dict[str, float] = {}  # seconds of one more turn, about

        def turn(contestant: Contestant) -> Row:
            row, started = rows[contestant.name], time.monotonic()
            with torch.no_grad():
                call = contestant.start(image)
                once = milliseconds(sheet.device, call, 1)[0]
                row.setdefault("set-up s", round(time.monotonic() - started, 1))
                if not times[contestant.name]:
                    output = call().float().cpu()
                    row["not finite"] = int((~output.isfinite()).sum())
                    if contestant is first:
                        reference.append(output)
                    elif reference and contestant.subject is first.subject:
                        row["relative error"] = difference(output, reference[0])["relative error"]
                runs = round(min(max(1000 * self.seconds / once, 3), 50))
                times[contestant.name] += milliseconds(sheet.device, call, runs)
            later[contestant.name] = (runs + 5) * once / 1000 + 0.5
            return row

        def expected(contestant: Contestant) -> float:
            """Seconds of a first turn, most of it to compile what is not compiled yet, and of the later turns of all
            who have had their first."""
            compiles = contestant.compiles is not None and contestant.compiles not in compiled
            first_turn = 1.2 * max([60, *compiled.values()]) if compiles else 20
            return first_turn + (ROUNDS - 1) * sum(later.values())

        for number in range(ROUNDS):
            for contestant in list(entrants):
                name = contestant.name
                if number == 0 and contestant is not first and not sheet.wants(key(contestant), expected(contestant)):
                    entrants.remove(contestant)
                    continue
                if number and sheet.seconds_left() < later[name] + 10:
                    continue
                started = time.monotonic()
                console.print(f"{key(contestant)}, round {number + 1}", highlight=False)
                result = protected(sheet.device, lambda contestant=contestant: turn(contestant))
                if number == 0 and contestant.compiles:
                    compiled.setdefault(contestant.compiles, time.monotonic() - started)
                if "error" in result:
                    if number == 0 or result["error"].startswith(LOST):  # else what was measured before stands
                        sheet.put(key(contestant), result)
                    entrants.remove(contestant)
                    continue
                low, median, high = statistics.quantiles(times[name], n=4)
                row = {"ms": median, "quartile 1": low, "quartile 3": high, "runs": len(times[name])}
                if times[first.name]:
                    row["times as fast"] = statistics.median(times[first.name]) / median
                row |= rows[name]
                row |= contestant.work(size, batch).floor(sheet.run["ceilings"], contestant.precision)
                row["times its floor"] = median / row["floor ms"]
                sheet.put(key(contestant), row)


@dataclass(frozen=True)
class Kernels(Stage):
    """Where does the time of the folded network go?

    Args:
        sizes: Heights and widths.
        runs: Passes to profile.
        only: Run only contestants in whose names one of these is.
    """

    sizes: tuple[str, ...] = ("720x1280",)
    runs: int = 3
    only: tuple[str, ...] = ("",)

    def measure(self) -> Row:
        sheet = self.sheet()
        torch.backends.cudnn.benchmark = True
        torch._dynamo.config.recompile_limit = 256
        subject = from_preset(self.network)
        of = functools.partial(Torch, subject)
        entrants = [
            of("folded", "fp16"),
            of("folded", "fp16", compiled=True),
            of("folded", "fp16", channels_last=True),
            of("folded", "fp16", compiled=True, channels_last=True),
            of("fused", "fp16", channels_last=True),
            of("released", "fp16"),
            *(Torch(from_weights(path), "folded", "fp16", compiled=True) for path in self.weights),
        ]
        for size in parse_sizes(self.sizes):
            for contestant in entrants:
                if not any(part in contestant.name for part in self.only):
                    continue
                key = f"{size_text(size)} {contestant.name}"
                if not sheet.wants(f"{key}: all", sheet.longest):
                    continue
                console.print(key, highlight=False)
                started = time.monotonic()
                found: dict[str, Row] = {}
                result = protected(sheet.device, functools.partial(self.split, sheet, contestant, size, found))
                sheet.longest = max(sheet.longest, time.monotonic() - started)
                for kind, row in found.items():
                    sheet.rows[f"{key}: {kind}"] = row
                sheet.put(f"{key}: all", result)
        return sheet.summary()

    def split(self, sheet: Sheet, contestant: Torch, size: Size, found: dict[str, Row]) -> Row:
        """Leaves a row for each kind of operator in `found`, and one for each of the kernels that take longest; returns
        the sum."""
        device = sheet.device
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        image = picture(size).to(device)
        with torch.no_grad():
            call = contestant.start(image)
            elapsed = statistics.median(milliseconds(device, call, 5))
            with profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
                for _ in range(self.runs):
                    call()
                synchronize(device)
        work = contestant.work(size, 1)
        kinds, kernels = Tally(), Tally()
        for kind, name, ms in timed_operators(profiler.events(), device):
            kinds.add(kind, ms / self.runs)
            kernels.add(name, ms / self.runs)
        everything = kinds.sum()
        for kind, row in kinds.rows():
            if moved := work.bytes[kind]:
                bandwidth = moved / row["ms"] / 1e6
                row |= {
                    "GMAC": work.macs[kind] / 1e9,
                    "GB moved": moved / 1e9,
                    "GB/s": bandwidth,
                    "of copy bandwidth": bandwidth / sheet.run["ceilings"]["copy GB/s"],
                }
            found[kind] = row
        for name, row in list(kernels.rows())[:20]:
            found[f"kernel {name[:120]}"] = row
        for row in found.values():
            row["share"] = row["ms"] / everything
            row["launches"] /= self.runs
        return {"ms": everything, "ms without profiler": elapsed}


class Tally:
    """Milliseconds and launches by name."""

    def __init__(self) -> None:
        self.found: dict[str, Row] = {}

    def add(self, name: str, ms: float) -> None:
        row = self.found.setdefault(name, {"ms": 0.0, "launches": 0})
        row["ms"] += ms
        row["launches"] += 1

    def sum(self) -> float:
        return sum(row["ms"] for row in self.found.values())

    def rows(self) -> list[tuple[str, Row]]:
        """The longest first."""
        return sorted(self.found.items(), key=lambda item: -item[1]["ms"])


def timed_operators(events: Any, device: torch.device) -> Iterator[tuple[str, str, float]]:
    """Kind, name of the kernel and milliseconds of everything that ran: on CUDA of every kernel, by the operator of
    PyTorch that launched it, or by its own name where none did, as in compiled code; on a CPU of every operator."""
    if device.type != "cuda":
        for event in events:
            if event.name.startswith("aten::"):
                shapes = [tuple(shape) for shape in event.input_shapes or []]
                yield kind_of(event.name[6:], shapes), event.name, event.self_cpu_time_total / 1000
        return
    owners: Counter[tuple[str, float]] = Counter()
    for event in events:
        if not event.name.startswith("aten::"):
            continue
        shapes = [tuple(shape) for shape in event.input_shapes or []]
        for kernel in event.kernels:
            owners[kernel.name, kernel.duration] += 1
            yield kind_of(event.name[6:], shapes), kernel.name, kernel.duration / 1000
    for event in events:
        if event.device_type.name == "CUDA" and not _annotates(event):
            duration = event.device_time_total
            if owners[event.name, duration]:
                owners[event.name, duration] -= 1
            else:
                yield kind_of_kernel(event.name), event.name, duration / 1000


def _annotates(event: Any) -> bool:
    """Whether this is a span that contains kernels and not a kernel itself."""
    return getattr(event, "is_user_annotation", False) or "Torch-Compiled Region" in event.name


KERNELS = {
    "export.fused": r"^_(normalised_pointwise|depthwise|mixed_depthwise|paired_projection)",
    "fused elementwise": r"triton_poi",
    "fused reduction": r"triton_(red|per)",
    "depthwise convolution": r"depthwise|dgrad2d_c1|conv2d_c1",
    "concatenation": r"CatArray",
    "copy or cast": r"Memcpy|Memset|copy_kernel|nchwToNhwc|nhwcToNchw",
    "dense convolution or matrix product": r"gemm|nvjet|cutlass|xmma|implicit|sgemm|conv|triton_tem",
}
"""Kinds of kernels that no operator of PyTorch launched, by a pattern for their names; the first that fits."""


def kind_of_kernel(name: str) -> str:
    return next((kind for kind, pattern in KERNELS.items() if re.search(pattern, name)), "other")


def gpu(
    stage: Annotated[
        Annotated[Correct, tyro.conf.subcommand("correct")]
        | Annotated[Speed, tyro.conf.subcommand("speed")]
        | Annotated[Train, tyro.conf.subcommand("train")]
        | Annotated[Kernels, tyro.conf.subcommand("kernels")]
        | Annotated[Answers, tyro.conf.subcommand("answers")]
        | Annotated[Provider, tyro.conf.subcommand("provider")],
        tyro.conf.OmitSubcommandPrefixes,
        tyro.conf.OmitArgPrefixes,
    ],
) -> Row:
    """Run a stage.

    Args:
        stage: What to measure.
    """
    return stage.measure()


def training_failed(summary: Row) -> int:
    """The exit status: 1 where a training failed, whose row says why. Other rows that fail are results."""
    return int(any(key.startswith("train ") for key in summary["errors"]))


if __name__ == "__main__":
    main(gpu, __doc__, summary=lambda summary: summary, status=training_failed)
