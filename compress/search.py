"""The cheapest network within a budget in dB: prune, distil, quantise, export and prove, by one command.

    python -m compress.search --weights deraining.pth --data Rain200H/train --validate Rain200H/test \\
        --max-drop-db 0.1 --output bundle
    python -m compress.search --weights W --data light/train heavy/train --validate light/val heavy/val \\
        --max-drop-db 0.3 --latency 0.5 --iterations 20000 --precision bf16-mixed --output bundle
    python -m compress.search --weights W --data DIR --max-drop-db 0.2 --macs 0.5 --quantize --output bundle

First each kind of structure is taken out by itself; a kind whose loss makes the exported graph no faster is left alone
(`compress.prune --sensitivity`). Then, step by step, a part of what the network still costs is pruned, and what is left
is distilled against the whole network (`compress.distill`). That ends when --macs or --latency is reached, or at the
first network that loses more than the budget after distillation; the one before it is taken. It is exported, quantised
if that is asked for and pays, and proved in its bundle against the whole network (`export.validate`).

The drop is the PSNR of the whole network minus that of the candidate, the mean over the images of a folder, and the
budget holds in every folder of --validate. Latency is that of the exported graph in ONNX Runtime on the CPU, timed in
turn with the whole network and told as a part of its milliseconds.

Everything is kept in OUTPUT.work: the same command goes on from there after a kill, which costs the round of pruning or
the measurement that was under way, and of a distillation no more than some minutes. The checkpoints of all steps stay
there, with the table `search.json` and the plot `pareto.png`, which the bundle has too.
"""

# ruff: noqa: B008 - the defaults are frozen
from __future__ import annotations

import functools
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from compress import counts
from compress.distill import distill
from compress.importance import importances
from compress.latency import export_session, time_sessions
from compress.options import KINDS, Kind
from compress.prune import PruneOptions, prune
from compress.selection import TOLERANCE
from compress.sensitivity import measure_sensitivity
from compress.step_cache import OPTIONS, StepCache
from drsformer import checkpoint
from drsformer.config import SIZE_MULTIPLE
from drsformer.data import Pair, dataset_name, find_pairs
from drsformer.evaluation import evaluate_model
from drsformer.metrics import Protocol
from drsformer.model import DRSformer
from drsformer.patches import Patches
from drsformer.recipe import DataOptions, Hardware, Recipe
from export import tensorrt
from export.onnx import export
from export.validate import ValidateOptions
from export.validate import validate as compare
from runtime.bundle import describe_file, load, save
from runtime.cli import console, main, parse_size
from runtime.errors import GateError, InputError, expect_between
from runtime.files import writing
from runtime.manifest import MANIFEST
from runtime.ort import OrtSession
from runtime.session import describe_onnx
from runtime.trt import LIBRARIES

SAMPLES = 16
"""Patches that importance is measured on."""

TABLE, PLOT = "search.json", "pareto.png"
"""All candidates, and their drop in dB against their measured latency."""


@dataclass(frozen=True)
class Candidate:
    """A network on the way.

    kind:    "whole", "pruned", "distilled" or "int8".
    file:    where it is, below the folder of the work; None for the whole network.
    macs:    part of the whole network's; `latency`: part of its milliseconds, and `ms` what was measured.
    psnr:    by validation folder, in dB; `drop_db` is the largest drop against the whole network.
    """

    kind: str
    file: str | None
    params: int
    macs: float
    latency: float
    ms: float
    psnr: dict[str, float]
    drop_db: float

    def __str__(self) -> str:
        return (
            f"{self.kind}, {self.macs:.3f} of the MACs, {self.latency:.3f} of the milliseconds, "
            f"{self.drop_db:.3f} dB lost"
        )


@dataclass(frozen=True)
class Found:
    """What a search ended with: the bundle, the checkpoint that it was exported from, and what was taken."""

    bundle: Path
    weights: Path
    best: Candidate

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


class Candidates:
    """All candidates so far in `rows`, measured alike against the whole network, which is the first of them.

    folders: the validation pairs, by their folders; `protocol`: how they are measured.
    steps:   where measurements are kept; `search.json` and `pareto.png` come beside them, into `work`.
    """

    def __init__(
        self,
        weights: Path,
        folders: dict[Path, list[Pair]],
        protocol: Protocol,
        size: tuple[int, int],
        budget: float,
        work: Path,
        steps: StepCache,
    ) -> None:
        self.weights, self.folders, self.size, self.budget = weights, folders, size, budget
        self.work, self.steps = work, steps
        self.protocol: Protocol = protocol
        self.network = checkpoint.load(weights).model
        self.session = functools.cache(lambda: export_session(self.network, size))
        self.rows: list[Candidate] = []
        self._keep("whole", None, self._whole)

    def add(self, kind: str, file: str, make: Callable[[Path], Any], like: Candidate | None = None) -> Candidate:
        """Have a checkpoint made, unless that is done, and measure it; one of the same structure as `like` takes its
        time."""

        def measure() -> dict[str, Any]:
            make(self.work / file)
            network = checkpoint.load(self.work / file).model
            if like:
                return self._scored(network) | {"latency": like.latency, "ms": like.ms}
            before, after = time_sessions([self.session(), export_session(network, self.size)], self.size)
            return self._scored(network) | {"latency": after.ms / before.ms, "ms": after.ms}

        return self._keep(kind, file, measure)

    def add_quantized(self, file: str, model: Path, origin: Candidate, make: Callable[[Path], Any]) -> Candidate:
        """Have the quantised form of a model made, which is that of the candidate `origin`, and measure it."""

        def measure() -> dict[str, Any]:
            make(self.work / file)
            before, after = time_sessions([OrtSession(path, "cpu") for path in (model, self.work / file)], self.size)
            psnr = {
                dataset_name(folder): compare(
                    self.weights,
                    self.work / file,
                    folder,
                    ValidateOptions(protocol=self.protocol, limit=len(pairs)),
                ).totals["candidate_psnr"]
                for folder, pairs in self.folders.items()
            }
            return {
                "params": origin.params,
                "macs": origin.macs,
                "latency": origin.latency * after.ms / before.ms,
                "ms": after.ms,
                "psnr": psnr,
            }

        return self._keep("int8", file, measure)

    def _whole(self) -> dict[str, Any]:
        (timing,) = time_sessions([self.session()], self.size)
        return self._scored(self.network) | {"latency": 1.0, "ms": timing.ms}

    def _scored(self, network: DRSformer) -> dict[str, Any]:
        return {
            "params": counts.params(network.config),
            "macs": counts.macs(network.config) / counts.macs(self.network.config),
            "psnr": {
                dataset_name(folder): evaluate_model(network, pairs, self.protocol).psnr
                for folder, pairs in self.folders.items()
            },
        }

    def _keep(self, kind: str, file: str | None, measure: Callable[[], dict[str, Any]]) -> Candidate:
        measured = self.steps.json(f"candidate{len(self.rows)}", measure)
        whole = self.rows[0].psnr if self.rows else measured["psnr"]
        drop = max(whole[folder] - psnr for folder, psnr in measured["psnr"].items())
        candidate = Candidate(kind, file, **measured, drop_db=drop)
        self.rows.append(candidate)
        console.print(str(candidate), soft_wrap=True)
        with writing(self.work / TABLE) as temporary:
            table = {
                "max_drop_db": self.budget,
                "protocol": self.protocol,
                "candidates": [asdict(each) for each in self.rows],
            }
            temporary.write_text(json.dumps(table, indent=1) + "\n")
        with writing(self.work / PLOT) as temporary:
            self._plot().savefig(temporary, dpi=120)
        return candidate

    def _plot(self) -> Figure:
        """Drop in dB, better upwards, against measured latency."""
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for kind, mark in (("pruned", "x"), ("distilled", "o-"), ("int8", "s"), ("whole", "D")):
            if points := [each for each in self.rows if each.kind == kind]:
                axes.plot([each.latency for each in points], [each.drop_db for each in points], mark, label=kind)
        axes.axhline(self.budget, color="grey", linewidth=1, label=f"budget, {self.budget:g} dB")
        axes.invert_yaxis()
        axes.set(xlabel=f"part of the whole network's {self.rows[0].ms:.1f} ms", ylabel="drop in PSNR, dB")
        axes.grid(alpha=0.3)
        axes.legend()
        return figure

    def table(self, best: Candidate) -> Table:
        """For people; what was taken is marked."""
        table = Table("", "network", title=escape(str(self.work)))
        for column in ("parameters", "MACs", "time", "ms", *map(escape, self.rows[0].psnr), "drop, dB"):
            table.add_column(column, justify="right")
        for each in self.rows:
            table.add_row(
                "*" if each == best else "",
                each.kind,
                str(each.params),
                f"{each.macs:.3f}",
                f"{each.latency:.3f}",
                f"{each.ms:.1f}",
                *(f"{psnr:.3f}" for psnr in each.psnr.values()),
                f"{each.drop_db:.3f}",
            )
        return table


def search(
    weights: Path,
    data: list[Path],
    output: Path,
    max_drop_db: float,
    validate: list[Path] | None = None,
    macs: float | None = None,
    latency: float | None = None,
    step: float = 0.8,
    quantize: bool = False,
    compute_capability: tuple[str, ...] = (),
    round_to: int = 8,
    size: str = "256x256",
    limit: int = 20,
    protocol: Protocol = "rain200",
    recipe: Annotated[Recipe, tyro.conf.OmitArgPrefixes] = Recipe(iterations=10_000),
    hardware: Annotated[Hardware, tyro.conf.OmitArgPrefixes] = Hardware(devices="1"),
) -> Found:
    """Look for the cheapest network within the budget and make a bundle of it, or go on with that.

    Raises InputError for arguments or files that cannot be used, GateError where no smaller network is within the
    budget, or none that reaches --macs or --latency; the message says how far it went, and there is no bundle then.

    Args:
        weights: Checkpoint of the whole network, .safetensors or the authors' .pth.
        data: Folders of pairs to measure importance on and to distil with.
        output: Folder of the bundle, which is not there yet.
        max_drop_db: Budget for the drop in PSNR in each validation folder, mean over the images.
        validate: Folders of pairs that the drop is measured on; those of --data if not given, which flatters.
        macs: Part of the MACs to reach; if neither this nor --latency is given, as few as the budget allows.
        latency: Part of the milliseconds to reach, of the exported graph in ONNX Runtime on the CPU.
        step: Part of the MACs, or with --latency of the milliseconds, that a step leaves.
        quantize: Try INT8 at the end, with what is left of the budget, calibrated on the first folder of --data.
        compute_capability: Kinds of GPU, such as 8.9, to add an engine for; needs TensorRT for RTX.
        round_to: Widths end at multiples of this, where hardware has vectors.
        size: Height and width of the image that is timed.
        limit: Images of each validation folder to use, the first ones.
        protocol: How to measure; rain200 for Rain200L, Rain200H and SPA-Data, did for DID-Data and DDN-Data.
        recipe: How to distil in each step.
        hardware: What to distil on: one device.
    """
    expect_between("max_drop_db", max_drop_db, 0)
    expect_between("round_to", round_to, 1)
    expect_between("limit", limit, 1)
    for name, part in (("macs", macs), ("latency", latency), ("step", step)):
        if part is not None and not 0 < part < 1:
            raise InputError(f"`{name}`: expected a fraction between 0 and 1, found {part:g}")
    if macs and latency:
        raise InputError("expected --macs or --latency, found both")
    if not output.name:
        raise InputError(f"`output`: expected the name of a folder, found {output}")
    if hardware.devices != "1":
        raise InputError(f"`devices`: a search distils on 1, found {hardware.devices}; compress.distill takes several")
    if compute_capability:
        LIBRARIES["rtx"].load()
    work = output.with_name(f"{output.name}.work")
    ours = (work / OPTIONS).exists() and (output / MANIFEST).exists()
    if output.exists() and not ours and (output.is_file() or any(output.iterdir())):
        raise InputError(f"`output`: expected a folder that is not there yet, found {output}; name another one")
    sources, height_width = validate or data, parse_size("size", size, SIZE_MULTIPLE)
    found = DataOptions(validate=sources, validate_limit=limit).validation()
    folders = {folder: pairs for folder, (_, pairs) in zip(sources, found, strict=True)}
    patches = Patches([find_pairs(folder) for folder in data], recipe)
    steps = StepCache(
        work,
        {
            "weights": checkpoint.load(weights).sha256,
            "data": [dataset_name(folder) for folder in data],
            "validate": [dataset_name(folder) for folder in sources],
            "limit": limit,
            "protocol": protocol,
            "max_drop_db": max_drop_db,
            "macs": macs,
            "latency": latency,
            "step": step,
            "quantize": quantize,
            "compute_capability": compute_capability,
            "round_to": round_to,
            "size": size,
            **asdict(recipe),
            "precision": hardware.precision,
        },
    )
    candidates = Candidates(weights, folders, protocol, height_width, max_drop_db, work, steps)
    pairs = [pair for found in folders.values() for pair in found]
    rows = steps.json(
        "sensitivity",
        lambda: measure_sensitivity(
            candidates.network,
            pairs,
            functools.partial(importances, patches=[patches[number] for number in range(SAMPLES)]),
            height_width,
            work / "sensitivity",
            [step],
            round_to=round_to,
            protocol=protocol,
            cache=steps.within("sensitivity"),
        ),
    )
    slow = [row["kind"] for row in rows[1:] if row["latency"] >= 1]
    if slow and len(slow) == len(rows) - 1:
        raise GateError(f"the exported graph gets no faster, whatever is taken out; see {work / 'sensitivity'}")
    if slow:
        console.print(f"Left alone, since the exported graph gets no faster without: {', '.join(slow)}")
    scope: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind not in slow)
    name, goal = ("latency", latency) if latency else ("macs", macs)
    best, ended = candidates.rows[0], None

    def thin(path: Path) -> None:
        if not path.exists():
            part: dict[str, Any] = {name: max(step, (goal or 0) / getattr(best, name))}
            options = PruneOptions(
                **part,
                scope=scope,
                round_to=round_to,
                samples=SAMPLES,
                patch=recipe.patch,
                limit=1,
                protocol=protocol,
                size=height_width,
            )
            prune(work / best.file if best.file else weights, data, path, options)

    def teach(path: Path) -> None:
        student = str(path.with_name("pruned.safetensors"))
        distill(
            path.parent,
            weights,
            student,
            data,
            data_options=DataOptions(protocol=protocol),
            recipe=recipe,
            hardware=hardware,
        )

    for number in itertools.count(1):
        if best.file and goal and getattr(best, name) <= goal * (1 + TOLERANCE):
            break
        try:
            pruned = candidates.add("pruned", f"step{number}/pruned.safetensors", thin)
        except GateError as error:
            ended = f"nothing more can be taken out ({error})"
            break
        if pruned.macs >= best.macs:
            ended = "nothing more can be taken out"
            break
        distilled = candidates.add("distilled", f"step{number}/last.safetensors", teach, like=pruned)
        if distilled.drop_db > max_drop_db:
            ended = f"the next step, {distilled}, is outside it"
            break
        best = distilled
    if best.file is None or (goal and ended):
        wanted = f"{goal:.3f} of the {'MACs' if name == 'macs' else 'milliseconds'}" if goal else "a smaller network"
        raise GateError(
            f"`max_drop_db` {max_drop_db:g}: expected {wanted} within it, found {best} at best: {ended}; "
            "try more --iterations, a larger --step or a larger budget; all networks are in "
            f"{work}, see {TABLE} and {PLOT} there"
        )

    found, model = work / best.file, work / "model.onnx"
    if not model.exists():
        export(found, model)
    if quantize:
        best, model = _quantized(candidates, best, model, data[0], limit)
    Console().print(candidates.table(best))
    if not output.exists() or not any(output.iterdir()):
        bundle = _bundle(candidates, model, compute_capability)
        if output.exists():
            output.rmdir()
        bundle.rename(output)
    print(f"{output}: {best}")
    return Found(output, found, best)


def _quantized(candidates: Candidates, best: Candidate, model: Path, data: Path, limit: int) -> tuple[Candidate, Path]:
    """The INT8 form of a model if it is faster and within the budget, else the model itself."""
    from compress.quantize import quantize  # loads ONNX Runtime's quantiser

    left, protocol = candidates.budget - best.drop_db, candidates.protocol
    try:
        int8 = candidates.add_quantized(
            "int8.onnx", model, best, lambda path: quantize(model, data, path, left, limit=limit, protocol=protocol)
        )
    except GateError as error:
        console.print(f"INT8 is not taken: {error}", soft_wrap=True, markup=False)
        return best, model
    if int8.drop_db > candidates.budget or int8.latency >= best.latency:
        console.print(f"INT8 is not taken: {int8}", soft_wrap=True)
        return best, model
    return int8, candidates.work / "int8.onnx"


def _bundle(candidates: Candidates, model: Path, compute_capability: tuple[str, ...]) -> Path:
    """A bundle in the folder of the work, proved. Raises GateError where the proof fails."""
    folder = candidates.work / "bundle"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if compute_capability:
        tensorrt.build(model, folder, tensorrt.BuildOptions(compute_capability=compute_capability))
    else:
        shutil.copyfile(model, folder / tensorrt.MODEL_FILE)
        save(describe_onnx(folder / tensorrt.MODEL_FILE), folder)
    files = [folder / TABLE, folder / PLOT]
    for file in files:
        shutil.copyfile(candidates.work / file.name, file)
    for number, (source, pairs) in enumerate(candidates.folders.items(), 1):
        files.append(folder / f"report{number}.html")
        proof = compare(
            candidates.weights,
            folder,
            source,
            ValidateOptions(
                max_drop_db=candidates.budget,
                protocol=candidates.protocol,
                report=files[-1],
                limit=len(pairs),
                record=True,
            ),
        )
        if not proof.passed:
            raise GateError(
                f"{model}: expected at most {candidates.budget:g} dB lost on {source}, found "
                f"{proof.totals['drop_db']:.4f} dB in its bundle; see {files[-1]}"
            )
    found = load(folder).manifest
    for file in files:
        found = found.with_file(describe_file(file, "report"))
    save(found, folder)
    return folder


if __name__ == "__main__":
    main(search, __doc__, summary=Found.summary)
