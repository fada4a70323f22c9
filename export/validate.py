"""Does a candidate still do what the full model does? Both restore the same images, and budgets decide.

    python -m export.validate --reference W --candidate model.onnx --data Rain200L/test --max-drop-db 0.05
    python -m export.validate --reference W --candidate pruned.safetensors --data DIR --max-drop-db 0.3 --report out/
    python -m export.validate --reference W --candidate model.onnx --data photos/ --min-psnr 50
    python -m export.validate --reference W --candidate model.onnx --data Rain200L/test --tile 256x256

The reference is a checkpoint and runs in PyTorch in float32; the candidate, a .onnx file, a bundle with one or another
checkpoint, runs in its own runtime. Both get and give uint8 images by the one contract of `runtime.session.Derainer`,
as users do.

With ground truth (DATA in any layout of `drsformer.data`) the drop is the reference's PSNR minus the candidate's.
--max-drop-db bounds its mean over the images, --max-worst-drop-db the one on the image where it is largest. A candidate
may keep both and be of no use, because the reference is of none: the rainy input is scored beside the two, a network
that scores below it is warned of, and --min-gain-db bounds what the candidate gains over it. How alike the two are says
the PSNR between their outputs, which --min-psnr bounds on every single image. It needs no ground truth, and is all
there is for a folder of plain images. Exit status: 0 within all budgets or without any, 1 outside, 2 for bad input.

Top-k selections that flip explain most of the drift between correct runtimes of the same weights, so there they are
counted, layer by layer, from the scores of both networks. The .onnx file itself makes the image that is judged; its
scores come from a second run of a copy that returns them, at the price of twice the time and memory. Other weights, as
those of a pruned or distilled network, choose differently by right, which says nothing.

With --report both are timed as well, in turn on one image, which takes some more runs of each.

With --tile the candidate restores each image in tiles, as `runtime.tiling` does with images that do not fit, and the
reference the same image as a whole: give both the same network to see what tiles cost. Flips are not counted then.

Polygraphy runs the two, one image at a time, since it keeps all outputs of a run. The metrics are those of
`drsformer.metrics`; Polygraphy's PSNR takes the largest value of an array for its peak.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import numpy as np
import tyro
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from drsformer import metrics
from drsformer.counts import macs, params
from drsformer.data import LayoutError, Pair, find_pairs
from export.comparison import Comparison, Crop, Extent, Picture, Validation
from runtime.bundle import load, load_to_change, private_key, save
from runtime.cli import hxw, main, progress_shown, typed
from runtime.errors import DerainError, InputError, expect_between, expect_finite
from runtime.files import expect_output, report_file
from runtime.images import list_images, read_rgb
from runtime.manifest import Drift
from runtime.pictures import largest_difference, webp
from runtime.pixels import Size, expect_multiples, size_text
from runtime.progress import OnProgress, silent, track
from runtime.session import Provider

if TYPE_CHECKING:  # they load PyTorch and ONNX Runtime, which takes its time
    from export.runners import Observed
    from runtime.ort import OrtSession
    from runtime.trt import TrtSession

logger = logging.getLogger("export.validate")  # also where this file is the command

PICTURES_SHOWN = 10
"""How many of the worst images the report shows; a typical one comes besides."""

ROWS_SHOWN = 50
"""Images that the table in a terminal lists one by one; the report lists all."""


@dataclass(frozen=True)
class ValidateOptions:
    """How a candidate is judged.

    Args:
        max_drop_db: Budget for the drop in PSNR, mean over the images; needs clean images, as the next two.
        max_worst_drop_db: Budget for the drop in PSNR on the worst image.
        min_gain_db: Budget for the mean PSNR of the candidate minus that of the rainy input.
        min_psnr: Budget for the PSNR between the two outputs, on every image.
        protocol: Protocol of PSNR and SSIM: rain200 for Rain200L, Rain200H and SPA-Data, did for DID-Data and DDN-Data.
        report: HTML file to write, or folder for a report.html.
        limit: Number of images to use, the first ones; all if not given.
        provider: Provider that both run on; auto is CUDA where there is one, else the CPU. Of a bundle with engines
            auto judges the one for this GPU, where there is one that runs, else the model.
        tile: Height x width, such as 256x256, of tiles in which the candidate restores; if not given, an image that it
            cannot take as a whole is refused.
        overlap: Pixels that tiles share; 64 by default, or a quarter of the shorter side.
        record: Write what was measured into the manifest of the bundle, if it keeps the budget.
        sign: Private key, Ed25519 in PEM, to sign that manifest with.
        locate: Name the layer of the candidate's model that departs first from what it is in float32; of a bundle's
            engine, that of the model it was built from.
        weights_key: Key of the weights to take from a reference that holds several, such as params_ema.
    """

    max_drop_db: float | None = None
    max_worst_drop_db: float | None = None
    min_gain_db: float | None = None
    min_psnr: float | None = None
    protocol: metrics.Protocol = "rain200"
    report: Path | None = None
    limit: int | None = None
    provider: Provider = "auto"
    tile: Annotated[Size, hxw("tile")] | None = None
    overlap: int | None = None
    record: bool = False
    sign: Path | None = None
    locate: bool = False
    weights_key: str | None = None

    @property
    def report_file(self) -> Path | None:
        """Where the report is written."""
        return self.report and report_file(self.report)


def validate(
    reference: Path,
    candidate: Path,
    data: Path,
    options: ValidateOptions = ValidateOptions(),
    on_progress: OnProgress = silent,
    command: str | None = None,
) -> Validation:
    """Compare a candidate with its reference on images; write the report and the record if they are asked for. The
    logger of this module warns of a network that makes the images worse.

    Args:
        reference: Checkpoint of the full model.
        candidate: What is judged: a .onnx file, a bundle, or another checkpoint.
        data: Folder of rainy and clean images, or of any images.
        options: How it is judged.
        on_progress: Called for every image.
        command: The command line that asks for it, which the report shows.

    Returns:
        What was found, and whether it is within the budgets.

    Raises:
        InputError: The options, the files or the images cannot be used.
    """
    _check(candidate, options)
    sources = _find(data)[: options.limit]
    paired = isinstance(sources[0], Pair)
    for budget in ("max_drop_db", "max_worst_drop_db", "min_gain_db"):
        if getattr(options, budget) is not None and not paired:
            raise InputError(f"`{budget}`: {data} has no ground truth to measure PSNR against; give `min_psnr`")

    from drsformer.checkpoint import file_sha256
    from export.graph import versions
    from export.runners import Runner, open_candidate, open_reference, run, time_in_turn
    from export.topk import count_flips
    from runtime.ort import installed
    from runtime.timing import machine

    full = open_reference(reference, options.provider, options.weights_key)
    judged = open_candidate(candidate, options.provider)
    if options.tile:
        expect_multiples("tile", options.tile, judged.multiple)
    runners = Runner("reference", full), Runner("candidate", judged, options.tile, options.overlap)
    images: list[Comparison] = []
    worst: list[tuple[Comparison, Picture]] = []
    selections: dict[str, int] = {}
    uncounted = _uncounted(full, judged, options)

    def compare(source: Pair | Path) -> tuple[Comparison, Callable[[], Picture]]:
        nonlocal selections
        image, target = source.load() if isinstance(source, Pair) else (read_rgb(source), None)
        try:
            plan = runners[1].derain.plan(*image.shape[:2])
            if not options.tile and plan.count > 1:
                raise InputError(
                    f"expected an image that the candidate takes as a whole, found one for {plan}; give `tile` to "
                    "judge tiles"
                )
            ours, theirs = run(runners, image)
            if uncounted is None:
                selections = {layer: full.scores[layer][..., 0].numel() * sum(ks) for layer, ks in full.ks.items()}
            flips = {
                layer: count_flips(full.scores[layer], judged.scores[layer], full.ks[layer]) for layer in selections
            }
            comparison = _compare(source.name, image, ours, theirs, target, flips, options.protocol)
        except DerainError as error:
            raise type(error)(f"{source.name}: {error}") from error
        except ValueError as error:
            raise InputError(f"{source.name}: {error}") from error
        return comparison, partial(_picture, image, ours, theirs, target)

    for source in track(sources, len(sources), "Comparing", on_progress):
        comparison, picture = compare(source)
        images.append(comparison)
        if options.report_file and (len(worst) < PICTURES_SHOWN or comparison.badness > worst[-1][0].badness):
            worst.append((comparison, picture()))
            worst.sort(key=lambda entry: entry[0].badness, reverse=True)
            del worst[PICTURES_SHOWN:]
    facts = {
        "reference": _described(full, options),
        "candidate": _described(judged, options),
        "images": f"{len(images)} of {data}" + (f", protocol {options.protocol}" if paired else ""),
        "SHA-256 of the reference": full.weights_sha256,
        "SHA-256 of the candidate": file_sha256(judged.path),
        "measured": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "machine": ", ".join(f"{name} {value}" for name, value in machine().items()),
        "versions": ", ".join(f"{package} {version}" for package, version in versions().items()),
    }
    timing = time_in_turn(full, judged, on_progress) if options.report_file else None
    if timing:
        facts["milliseconds"] = str(timing)
    if command:
        facts["command"] = command
    if options.tile:
        overlap = runners[1].derain.plan(*options.tile).overlap
        facts["tiles"] = f"{size_text(options.tile)}, {overlap} pixels of overlap"
    validation = Validation(
        facts=facts,
        images=images,
        selections=selections,
        uncounted=uncounted,
        pictures={comparison.name: picture for comparison, picture in worst},
        origin=full.origin,
        max_drop_db=options.max_drop_db,
        max_worst_drop_db=options.max_worst_drop_db,
        min_gain_db=options.min_gain_db,
        min_psnr=options.min_psnr,
        extents={"reference": _extent(full), "candidate": _extent(judged)},
        timing=timing,
    )
    if options.report_file and (typical := validation.typical).name not in validation.pictures:
        validation.pictures[typical.name] = compare(sources[images.index(typical)])[1]()
    for warning in validation.warnings:
        logger.warning(warning)
    if options.locate:
        from export.locate import locate

        on_progress("Comparing layers", 0, 0)
        located = locate(model_of(candidate), options.provider if options.provider in installed() else "cpu")
        on_progress("Comparing layers", 1, 1)
        validation = dataclasses.replace(validation, located=str(located))
    if options.report_file:
        from export import report

        report.write(options.report_file, validation)
    if options.record and validation.passed:
        _record(candidate, _drift(full, judged, data, options.protocol, validation), options.sign)
    return validation


def _check(candidate: Path, options: ValidateOptions) -> None:
    """Raise InputError, before the work, for options that cannot be used."""
    if options.report_file:
        import export.report  # noqa: F401 - so that a package that it lacks is told
    if options.limit is not None:
        expect_between("limit", options.limit, 1)
    for name in ("max_drop_db", "max_worst_drop_db", "min_gain_db", "min_psnr"):
        if (budget := getattr(options, name)) is not None:
            expect_finite(name, budget)
    if options.sign and not options.record:
        raise InputError("`sign`: expected `record` with it, which changes the manifest that is signed")
    if options.locate:
        model_of(candidate)
    if options.record:
        if not candidate.is_dir():
            raise InputError(f"`record`: expected a bundle as `candidate`, found {candidate}")
        if options.tile:
            raise InputError("`record`: expected whole images, as the manifest says, found `tile`")
        load_to_change(candidate, options.sign)
        if options.sign:
            private_key(options.sign)
    if options.report_file:
        expect_output(options.report_file)


def model_of(candidate: Path) -> Path:
    """The ONNX file of a candidate. Raises InputError for a checkpoint, which has none."""
    if candidate.is_dir():
        return candidate / load(candidate).manifest.model.file
    if candidate.suffix != ".onnx":
        raise InputError(f"`locate`: expected a .onnx file or a bundle as `candidate`, found {candidate}")
    return candidate


def _drift(
    reference: Observed, candidate: Observed, data: Path, protocol: metrics.Protocol, validation: Validation
) -> Drift:
    """What was measured, as the manifest of the candidate's bundle records it."""
    session = cast("OrtSession | TrtSession", candidate.session)
    found = {**validation.summary(), "max_difference": max(image.max_difference for image in validation.images)}
    return Drift(
        file=session.path.name,
        provider=session.provider,
        reference_sha256=reference.weights_sha256,
        data=f"{data.resolve().parent.name}/{data.resolve().name}",
        protocol=protocol if "drop_db" in found else None,
        **{field.name: found[field.name] for field in dataclasses.fields(Drift) if field.name in found},
    )


def _record(folder: Path, drift: Drift, sign: Path | None) -> None:
    """Put what was measured on a file of a bundle into its manifest, in place of what was on the same data against the
    same reference."""
    manifest = load_to_change(folder, sign)
    same = operator.attrgetter("file", "provider", "reference_sha256", "data")
    others = (former for former in manifest.drift if same(former) != same(drift))
    save(dataclasses.replace(manifest, drift=(*others, drift)), folder, sign)


def _find(data: Path) -> list[Pair] | list[Path]:
    """The pairs in a folder, or else the images in it."""
    try:
        return find_pairs(data)
    except LayoutError:
        if data.is_dir() and (images := list_images(data)):
            return images
        raise


def _uncounted(reference: Observed, candidate: Observed, options: ValidateOptions) -> str | None:
    """Why flips are not counted, or None where they are."""
    from export.runners import same_weights

    if not reference.ks:
        return "the reference makes no top-k selections"
    if options.tile:
        return "each tile makes selections of its own"
    if not same_weights(reference, candidate):
        return "only the same weights ought to choose alike, and the candidate's are others or unknown"
    return None if candidate.ks == reference.ks else "the candidate does not return its scores"


def _described(observed: Observed, options: ValidateOptions) -> str:
    """What was compared, for people. A file beside the report goes without its folder, since the two may move."""
    beside = options.report_file and options.report_file.resolve().parent == observed.path.resolve().parent
    return f"{observed.path.name if beside else observed.path}, {observed.description}"


def _compare(
    name: str,
    image: NDArray[np.uint8],
    reference: NDArray[np.uint8],
    candidate: NDArray[np.uint8],
    target: NDArray[np.uint8] | None,
    flips: dict[str, int],
    protocol: metrics.Protocol,
) -> Comparison:
    quality = {}
    if target is not None:
        for who, restored in (("input", image), ("reference", reference), ("candidate", candidate)):
            quality[f"{who}_psnr"] = metrics.psnr(restored, target, protocol)
            quality[f"{who}_ssim"] = metrics.ssim(restored, target, protocol)
    difference = int(np.abs(reference.astype(int) - candidate).max())
    return Comparison(name, metrics.psnr_rgb(reference, candidate), difference, flips, **quality)


def _picture(
    image: NDArray[np.uint8],
    reference: NDArray[np.uint8],
    candidate: NDArray[np.uint8],
    target: NDArray[np.uint8] | None,
) -> Picture:
    layers = {"rainy": image, "reference": reference, "candidate": candidate}
    if target is not None:
        layers["clean"] = target
    height, width, _ = image.shape
    files = {kind: webp(layer) for kind, layer in layers.items()}
    window = largest_difference(reference, candidate)
    parts = (window.of(part) for part in (image, reference, candidate))
    return Picture(height, width, files, Crop(window, *parts, target=None if target is None else window.of(target)))


def _extent(observed: Observed) -> Extent:
    size, config = observed.path.stat().st_size, observed.config
    return Extent(size, params(config), macs(config)) if config else Extent(size)


def table(validation: Validation) -> Table:
    """What was found on each image and on all of them, for a terminal."""
    images = Table(box=box.SIMPLE, padding=0, show_edge=False)
    images.add_column("image", overflow="fold")  # a long name takes several lines, and the numbers stay whole
    for column in validation.columns:
        images.add_column(column.title, justify="right", no_wrap=True)
    for image in validation.images[:ROWS_SHOWN]:
        images.add_row(escape(image.name), *validation.cells(image))
    if len(validation.images) > ROWS_SHOWN:
        images.add_row(f"... and {len(validation.images) - ROWS_SHOWN} more")
    images.add_section()
    images.add_row(*validation.last_row())
    return images


def command(
    reference: Path,
    candidate: Path,
    data: Path,
    options: Annotated[ValidateOptions, tyro.conf.arg(name="")] = ValidateOptions(),
) -> Validation:
    """Compare a candidate with its reference and print what was found.

    Args:
        reference: Checkpoint of the full model.
        candidate: What is judged: a .onnx file, a bundle, or another checkpoint.
        data: Folder of rainy and clean images, or of any images.
        options: How it is judged.
    """
    with progress_shown() as on_progress:
        validation = validate(reference, candidate, data, options, on_progress, typed())
    console = Console()
    console.print(table(validation))
    for warning in validation.warnings:
        console.print(f"Warning: {warning}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    for remark in validation.remarks:
        print(remark)
    if options.report_file:
        print(f"Report: {options.report_file}")
    if validation.located:
        print(validation.located)
    print(validation.verdict)
    return validation


if __name__ == "__main__":
    main(command, __doc__, summary=Validation.summary, status=lambda validation: 0 if validation.passed else 1)
