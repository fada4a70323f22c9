"""The cheapest network within a budget in dB: prune, distil, quantise, export and prove, by one command.

    python -m compress.search --weights deraining.pth --data Rain200H/train --validate held-out \\
        --max-drop-db 0.1 --output bundle
    python -m compress.search --weights W --data light/train heavy/train --validate light/val heavy/val \\
        --max-drop-db 0.3 --latency 0.5 --iterations 20000 --precision bf16-mixed --output bundle
    python -m compress.search --weights W --data DIR --max-drop-db 0.2 --macs 0.5 --quantize --output bundle

First each kind of pruning group is pruned by itself; a kind whose loss makes the exported graph no faster is left alone
(`compress.prune --sensitivity`). Then each step leaves a fraction of what the network before it costs: it is pruned
from the whole network (`compress.prune`, which repairs what is left), and where that is outside the budget, distilled
against it (`compress.distill`); what comes after a distilled network is pruned from that. The steps end when --macs or
--latency is reached, or at the first network that is still outside after distillation; the one before it is taken, and
distilled if it has not been. It is exported, quantised if that is asked for and pays, and proved in its bundle against
the whole network (`export.validate`).

The drop is the PSNR of the whole network minus that of the candidate, the mean over the images of a folder, and the
budget holds in every folder of --validate. Latency is that of the exported graph in ONNX Runtime on the CPU, timed in
turn with the whole network and stated as a fraction of its milliseconds.

Everything is kept in OUTPUT.work: the same command goes on from there after a kill, which costs the round of pruning or
the measurement that was under way, and of a distillation no more than some minutes. The checkpoints of all steps stay
there, with the table `search.json` and the page `search.html`, on which every network is a point of a curve; the bundle
has both too.
"""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from compress.distill import DistillOptions, distill
from compress.options import KINDS, Kind, expect_multiples
from compress.prune import PruneOptions, prune
from compress.quantize import QuantizeOptions, quantize
from drsformer.data import dataset_name, files_of, files_sha256, find_pairs
from drsformer.metrics import Protocol
from drsformer.recipe import DataOptions, Hardware, Recipe
from drsformer.train import training_shown
from export.onnx import export
from export.tensorrt import MODEL_FILE, BuildOptions, build, expect_capabilities
from export.validate import ValidateOptions, validate
from runtime.cli import hxw, main, table_of
from runtime.errors import GateError, InputError, expect_between, expect_finite
from runtime.manifest import MANIFEST
from runtime.pixels import Size, size_text
from runtime.progress import OnProgress, silent

if TYPE_CHECKING:  # they load PyTorch, which takes its time
    from compress.candidates import Candidates
    from compress.pareto import Candidate
    from compress.step_cache import StepCache

logger = logging.getLogger("compress.search")  # also where this file is the command

SAMPLES = 16
"""Patches that importance is measured on."""

SCOPE_RATIO = 0.8
"""Least fraction of the MACs at which the kinds of pruning groups are timed: each alone goes about as far."""

PRUNED_FILE = "pruned.safetensors"
"""The pruned network of a step, in the folder of that."""


@dataclass(frozen=True)
class SearchOptions:
    """What to look for, and how.

    Args:
        max_drop_db: Budget for the drop in PSNR in each validation folder, in dB, mean over the images.
        validate: Folders of pairs that the drop is measured on; those of --data if not given, which flatters.
        macs: Fraction of the MACs to reach; if neither this nor --latency is given, as few as the budget allows.
        latency: Fraction of the milliseconds to reach, of the exported graph in ONNX Runtime on the CPU.
        step: Fraction of the MACs, or with --latency of the milliseconds, that a step leaves.
        quantize: Try INT8 at the end, with what is left of the budget, calibrated on the first folder of --data.
        compute_capability: Kinds of GPU, such as 8.9, to add an engine for; needs TensorRT for RTX.
        round_to: Multiple at which widths end, where hardware has vectors.
        size: Height and width of the image that is timed, multiples of 8.
        limit: Images of each validation folder to use, the first ones.
        protocol: Protocol of PSNR; rain200 for Rain200L, Rain200H and SPA-Data, did for DID-Data and DDN-Data.
        recipe: How to distil in each step.
        hardware: What to distil on: one device.
        weights_key: Key of the weights to take from a checkpoint that holds several, such as params_ema.

    Raises:
        InputError: A value is out of range.
    """

    max_drop_db: float
    validate: list[Path] | None = None
    macs: float | None = None
    latency: float | None = None
    step: float = 0.8
    quantize: bool = False
    compute_capability: tuple[str, ...] = ()
    round_to: int = 8
    size: Annotated[Size, hxw("size")] = (256, 256)
    limit: int = 20
    protocol: Protocol = "rain200"
    recipe: Recipe = field(default_factory=lambda: Recipe(iterations=10_000))
    hardware: Hardware = field(default_factory=lambda: Hardware(devices="1"))
    weights_key: str | None = None

    def __post_init__(self) -> None:
        expect_finite("max_drop_db", self.max_drop_db)
        expect_between("max_drop_db", self.max_drop_db, 0)
        expect_between("round_to", self.round_to, 1)
        expect_between("limit", self.limit, 1)
        expect_multiples("size", self.size)
        for name, fraction in (("macs", self.macs), ("latency", self.latency), ("step", self.step)):
            if fraction is not None and not 0 < fraction < 1:
                raise InputError(f"`{name}`: expected a fraction between 0 and 1, found {fraction:g}")
        if self.macs and self.latency:
            raise InputError("expected `macs` or `latency`, found both")
        if self.hardware.devices != "1":
            raise InputError(
                f"`devices`: a search distils on 1, found {self.hardware.devices}; compress.distill takes several"
            )
        if self.hardware.num_nodes != 1:
            raise InputError(
                f"`num_nodes`: a search distils on 1, found {self.hardware.num_nodes}; compress.distill takes several"
            )

    @property
    def target(self) -> tuple[str, float | None]:
        """What is to become less, "macs" or "latency", and the fraction to reach if there is one."""
        return ("latency", self.latency) if self.latency else ("macs", self.macs)


@dataclass(frozen=True)
class Found:
    """What a search ended with.

    Attributes:
        bundle: Folder of the proved bundle.
        weights: The checkpoint that it was exported from.
        best: What was taken.
        candidates: All that was tried.
    """

    bundle: Path
    weights: Path
    best: Candidate
    candidates: tuple[Candidate, ...]

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        numbers = {name: getattr(self.best, name) for name in ("macs", "latency", "ms", "drop_db")}
        return {
            "bundle": str(self.bundle),
            "weights": str(self.weights),
            "kind": self.best.kind,
            "params": self.best.params,
            **{name: round(number, 4) for name, number in numbers.items()},
        }


def search(
    weights: Path, data: Sequence[Path], output: Path, options: SearchOptions, on_progress: OnProgress = silent
) -> Found:
    """Look for the cheapest network within the budget and make a bundle of it, or go on with that. The logger of
    `compress` says at the level INFO what was found on the way.

    Args:
        weights: Checkpoint of the whole network, .safetensors or the authors' .pth.
        data: Folders of pairs to measure importance on and to distil with.
        output: Folder of the bundle, which is not there yet; everything else is kept in OUTPUT.work.
        options: What to look for, and how.
        on_progress: See `runtime.progress`.

    Raises:
        InputError: Arguments or files cannot be used.
        GateError: No smaller network is within the budget, or none that reaches the target; the message says how far it
            went, and there is no bundle then.
    """
    from compress.candidates import PAGE_FILE, TABLE_FILE, Candidates
    from compress.step_cache import OPTIONS, StepCache
    from drsformer import checkpoint
    from runtime.trt import LIBRARIES

    if not output.name:
        raise InputError(f"`output`: expected the name of a folder, found {output}")
    if options.compute_capability:
        expect_capabilities(LIBRARIES["rtx"], options.compute_capability)
    work = output.with_name(f"{output.name}.work")
    ours = (work / OPTIONS).exists() and (output / MANIFEST).exists()
    if output.exists() and not ours and (output.is_file() or any(output.iterdir())):
        raise InputError(f"`output`: expected a folder that is not there yet, found {output}; name another one")
    options.hardware.fabric(work)  # which shows that there is such a device
    sources = options.validate or list(dict.fromkeys(data))
    validation = DataOptions(validate=sources, validate_limit=options.limit).validation()
    folders = {folder: pairs for folder, (_, pairs) in zip(sources, validation, strict=True)}
    given = {name: value for name, value in asdict(options).items() if name not in ("recipe", "hardware")}
    cache = StepCache(
        work,
        {
            **given,
            "version": 3,  # of the steps: how they are pruned has changed
            "weights": checkpoint.load(weights, options.weights_key).sha256,
            "data": [dataset_name(folder) for folder in data],
            "files_sha256": files_sha256(files_of(*map(find_pairs, [*data, *sources]))),
            "validate": [dataset_name(folder) for folder in sources],
            "size": size_text(options.size),
            **asdict(options.recipe),
            "precision": options.hardware.precision,
        },
    )
    candidates = Candidates(
        weights,
        folders,
        options.protocol,
        options.size,
        options.max_drop_db,
        work,
        cache,
        on_progress,
        options.weights_key,
    )
    scope = _scope(candidates, data, options, cache, on_progress)
    best, ended = _descend(candidates, data, options, scope, on_progress)
    name, goal = options.target
    if best.file is None or (goal and ended):
        wanted = f"{goal:.3f} of the {'MACs' if name == 'macs' else 'milliseconds'}" if goal else "a smaller network"
        raise GateError(
            f"`max_drop_db` {options.max_drop_db:g}: expected {wanted} within it, found {best} at best: {ended}; "
            "with another `output` try more `iterations`, a larger `step` or a larger budget; all networks are in "
            f"{work}, see {TABLE_FILE} and {PAGE_FILE} there"
        )
    if best.kind == "pruned":
        best = min(_distilled(candidates, best, data, options, on_progress), best, key=lambda each: each.drop_db)
    assert best.file
    found = work / best.file
    model = found.parent / best.kind / MODEL_FILE
    if not model.exists():
        model.parent.mkdir(exist_ok=True)
        export(found, model, on_progress=on_progress)
    if options.quantize:
        best, model = _quantized(candidates, best, model, data[0], options, on_progress)
    candidates.take(best)
    if not output.exists() or not any(output.iterdir()):
        bundle = _bundle(candidates, model, options, on_progress)
        if output.exists():
            output.rmdir()
        bundle.rename(output)
    return Found(output, found, best, tuple(candidates.rows))


def _scope(
    candidates: Candidates, data: Sequence[Path], options: SearchOptions, cache: StepCache, on_progress: OnProgress
) -> tuple[Kind, ...]:
    """The kinds of pruning groups without which the exported graph gets faster. Raises GateError for none."""
    from compress.groups import pruning_groups
    from compress.obs import costs_after_repair
    from compress.sensitivity import measure_sensitivity
    from drsformer.patches import Patches

    patches = Patches([find_pairs(folder) for folder in data], options.recipe)
    pairs = [pair for pairs in candidates.folders.values() for pair in pairs]
    output = candidates.work / "sensitivity"
    rows = cache.json(
        "sensitivity",
        lambda: measure_sensitivity(
            candidates.network,
            pairs,
            functools.partial(
                costs_after_repair, patches=[patches[number][0] for number in range(SAMPLES)], on_progress=on_progress
            ),
            options.size,
            output,
            [max(options.step, SCOPE_RATIO)],
            round_to=options.round_to,
            protocol=options.protocol,
            cache=cache.within("sensitivity"),
            on_progress=on_progress,
        ),
    )
    slow = [row["kind"] for row in rows[1:] if row["latency"] >= 1]
    scope: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind not in slow)
    if not pruning_groups(candidates.network.config, scope):
        raise GateError(f"the exported graph gets no faster, whatever is removed; see {output}")
    if slow:
        logger.info(f"Left alone, since the exported graph gets no faster without: {', '.join(slow)}")
    return scope


def _descend(
    candidates: Candidates,
    data: Sequence[Path],
    options: SearchOptions,
    scope: tuple[Kind, ...],
    on_progress: OnProgress,
) -> tuple[Candidate, str | None]:
    """Prune step by step, and distil where that leaves the budget, until the target is reached: the last network within
    the budget, and why the steps ended if not for the target."""
    from compress.selection import TOLERANCE

    name, goal = options.target
    best = origin = candidates.rows[0]  # the origin is what is pruned: what was trained last, else the whole network
    asked, number = 1.0, 1  # the fraction of the origin that the best one was to be, whatever it is by the clock
    while True:
        if best.file and goal and getattr(best, name) <= goal * (1 + TOLERANCE):
            return best, None
        file, cost = f"step{number}/{PRUNED_FILE}", getattr(best, name)
        fraction = min(asked, cost / getattr(origin, name)) * max(options.step, (goal or 0) / cost)
        target: dict[str, Any] = {name: fraction}
        how = PruneOptions(
            **target,
            scope=scope,
            round_to=options.round_to,
            samples=SAMPLES,
            patch=options.recipe.patch,
            limit=1,
            protocol=options.protocol,
            size=options.size,
            weights_key=None if origin.file else options.weights_key,
        )
        if failed := _thin(candidates, origin, best, data, candidates.work / file, how, on_progress):
            return best, f"nothing more can be removed ({failed})"
        found = candidates.add("pruned", file)
        if getattr(found, name) >= cost:  # by the clock: where MACs are to go, it is smaller
            asked, number = fraction, number + 1
            continue
        if found.drop_db > options.max_drop_db:
            found = _distilled(candidates, found, data, options, on_progress)
        if found.drop_db > options.max_drop_db:
            return best, f"the next step, {found}, is outside it, {candidates.excess(found)}"
        origin, asked = (found, 1.0) if found.kind == "distilled" else (origin, fraction)
        best, number = found, number + 1


def _thin(
    candidates: Candidates,
    origin: Candidate,
    best: Candidate,
    data: Sequence[Path],
    output: Path,
    how: PruneOptions,
    on_progress: OnProgress,
) -> str | None:
    """Prune the origin as near to what is asked for as that goes, since a step need not be exact; where MACs are to go,
    to a network smaller than the best one so far. Returns why that cannot be, if it cannot."""
    before = candidates.work / origin.file if origin.file else candidates.weights

    def attempt(below: float | None) -> None:
        pruned = prune(before, data, output, how, on_progress, below)
        if not how.latency and pruned.ratios()["macs"] * origin.macs >= best.macs:
            raise GateError("it would be as large as the one before")

    failed = None
    for name, below in (("exactly", None), ("farther", 1.0)):
        failed = candidates.failure(f"{output.parent.name}-{name}", functools.partial(attempt, below))
        if failed is None:
            return None
    output.unlink(missing_ok=True)
    return failed


def _distilled(
    candidates: Candidates, pruned: Candidate, data: Sequence[Path], options: SearchOptions, on_progress: OnProgress
) -> Candidate:
    """A pruned candidate, distilled against the whole network."""
    assert pruned.file

    def teach(path: Path) -> None:
        how = DistillOptions(
            path.parent,
            candidates.weights,
            str(path.with_name(PRUNED_FILE)),
            [*data],
            data_options=DataOptions(protocol=options.protocol),
            recipe=options.recipe,
            hardware=options.hardware,
            weights_key=options.weights_key,
        )
        distill(how, on_progress)

    file = Path(pruned.file).with_name("last.safetensors").as_posix()
    return candidates.add("distilled", file, teach, like=pruned)


def _quantized(
    candidates: Candidates,
    best: Candidate,
    model: Path,
    data: Path,
    options: SearchOptions,
    on_progress: OnProgress,
) -> tuple[Candidate, Path]:
    """The INT8 form of a model if it is faster and within the budget, else the model itself."""
    budget = QuantizeOptions(options.max_drop_db - best.drop_db, limit=options.limit, protocol=options.protocol)
    output = model.with_name("int8.onnx")
    file = output.relative_to(candidates.work)
    name = "-".join((*file.parts[:-1], file.stem))
    if failed := candidates.failure(name, lambda: quantize(model, data, output, budget, on_progress)):
        logger.info(f"INT8 is not taken: {failed}")
        return best, model
    int8 = candidates.add_quantized(file.as_posix(), model, best)
    if int8.drop_db > options.max_drop_db:
        logger.info(f"INT8 is not taken: {int8}, {candidates.excess(int8)}")
        return best, model
    if int8.latency >= best.latency:
        logger.info(f"INT8 is not taken: {int8}, which is no faster than without it")
        return best, model
    return int8, output


def _bundle(candidates: Candidates, model: Path, options: SearchOptions, on_progress: OnProgress) -> Path:
    """A bundle in the folder of the work, proved. Raises GateError where the proof fails."""
    from compress.candidates import PAGE_FILE, TABLE_FILE
    from export.canaries import add_canaries
    from runtime.bundle import describe_file, load, save
    from runtime.session import describe_onnx

    folder = candidates.work / "bundle"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if options.compute_capability:
        build(model, folder, BuildOptions(compute_capability=options.compute_capability), on_progress)
    else:
        shutil.copyfile(model, folder / MODEL_FILE)
        save(add_canaries(describe_onnx(folder / MODEL_FILE), folder, on_progress), folder)
    files = [folder / TABLE_FILE, folder / PAGE_FILE]
    for file in files:
        shutil.copyfile(candidates.work / file.name, file)
    for number, (source, pairs) in enumerate(candidates.folders.items(), 1):
        files.append(folder / f"report{number}.html")
        budget = ValidateOptions(
            max_drop_db=options.max_drop_db,
            protocol=options.protocol,
            report=files[-1],
            limit=len(pairs),
            record=True,
            weights_key=options.weights_key,
        )
        proof = validate(candidates.weights, folder, source, budget, on_progress)
        if not proof.passed:
            raise GateError(f"{model}, in its bundle on {source}: {proof.verdict}; see {files[-1]}")
    manifest = load(folder).manifest
    for file in files:
        manifest = manifest.with_file(describe_file(file, "report"))
    save(manifest, folder)
    return folder


def command(
    weights: Path,
    data: list[Path],
    output: Path,
    options: Annotated[SearchOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")],
) -> Found:
    """Look for the cheapest network within the budget, and print what was tried.

    Args:
        weights: Checkpoint of the whole network, .safetensors or the authors' .pth.
        data: Folders of pairs to measure importance on and to distil with.
        output: Folder of the bundle, which is not there yet.
        options: What to look for, and how.
    """
    with training_shown(logging.getLogger("compress")) as on_progress:
        found = search(weights, data, output, options, on_progress)
    Console().print(_table(found))
    print(f"{output}: {found.best}")
    return found


def _table(found: Found) -> Table:
    """All that was tried; what was taken is marked."""
    numbers = ["parameters", "MACs", "time", "ms", *found.candidates[0].psnr, "drop, dB"]
    networks = table_of(["", "network"], numbers, str(found.bundle))
    for each in found.candidates:
        networks.add_row(
            "*" if each == found.best else "",
            each.kind,
            str(each.params),
            f"{each.macs:.3f}",
            f"{each.latency:.3f}",
            f"{each.ms:.1f}",
            *(f"{psnr:.3f}" for psnr in each.psnr.values()),
            f"{each.drop_db:z.3f}",
        )
    return networks


def run() -> None:
    """The command line."""
    main(command, __doc__, summary=Found.summary)


if __name__ == "__main__":
    run()
