"""The stage `train` of `benchmarks.gpu`: a teacher and its students, in as many commands as it takes.

The commands of the project do the work: `drsformer.train` and `compress.distill`. This adds the programme, `PLANS`,
a probe that measures how fast each form of a network trains here, and the way home in small files.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from benchmarks import parts
from benchmarks.harness import Row, Sheet, Stage, milliseconds, peak_memory, protected, synchronize
from compress.distill import DistillOptions, distill
from compress.distillation import Distillation
from compress.options import LossWeights
from drsformer import checkpoint
from drsformer.data import find_pairs
from drsformer.evaluation import evaluate_model
from drsformer.loop import compile_blocks, l1_loss, unchanged, untrained
from drsformer.model import DRSformer
from drsformer.patches import Patches
from drsformer.recipe import DataOptions, Hardware, Recipe, Schedule
from drsformer.train import TrainOptions, train, training_shown
from export.folding import DTYPES, trainable
from runtime.errors import InputError


@dataclass(frozen=True)
class Plan:
    """How one network of the programme is trained.

    network: by its name in `PRESETS`.
    start:   the plan, or one of the given weights, whose network it goes on from, or None to start afresh.
    teacher: the plan, or one of the given weights, whose network it learns from, or None.
    recipe:  see `drsformer.recipe`.
    rendered, dry, compressed: fractions of the patches.
    mix:     the sets of pairs, each as often as it is named; all of them alike if none is.
    dtype:   that its weights are kept in.
    """

    network: str
    recipe: Recipe
    start: str | None = None
    teacher: str | None = None
    rendered: float = 0.6
    dry: float = 0.05
    compressed: float = 0.0
    mix: tuple[str, ...] = ()
    dtype: Literal["fp16", "bf16"] = "fp16"


def _recipe(**changes: Any) -> Recipe:
    common: dict[str, Any] = dict(constant=0, warmup=200, lr=4e-4, batch=8, patch=128, clip=0.1, ema=0.999)
    return Recipe(**common | changes)


MIXED: dict[str, Any] = dict(rendered=0.3, compressed=0.1, mix=("rain100l",) * 2 + ("rain200h",) * 3 + ("rain800",))
"""What networks are trained on with that were trained on light and heavy rain before; see weights/HISTORY.md."""

BEFORE: dict[str, Any] = dict(mix=("rain100l", "rain200h"))
"""What networks were trained on before there was Rain800: theirs are the recipes of the shipped ones."""

PLANS = {
    "xs-3": Plan("drsformer-xs", _recipe(iterations=4000, lr=3e-4, batch=4, patch=192), "drsformer-xs", **MIXED),
    "s-2": Plan("drsformer-s", _recipe(iterations=3000, lr=3e-4, batch=4, patch=192), "drsformer-s", **MIXED),
    "m-4": Plan(
        "drsformer-m", _recipe(iterations=2000, lr=2e-4, batch=4, patch=192), "drsformer-m", dtype="bf16", **MIXED
    ),
    **{
        f"m-{percent}": Plan(
            "drsformer-m", _recipe(iterations=1500, batch=4, patch=192), f"drsformer-m-{percent}", "m-4", **MIXED
        )
        for percent in (50, 25, 15)
    },
    "teacher": Plan("drsformer-m", _recipe(iterations=6000, lr=5e-4), dtype="bf16", **BEFORE),
    "teacher-2": Plan(
        "drsformer-m", _recipe(iterations=4000, lr=3e-4, batch=4, patch=192), "teacher", dtype="bf16", **BEFORE
    ),
    "teacher-3": Plan(
        "drsformer-m", _recipe(iterations=1000, lr=2e-4, batch=4, patch=192), "teacher-2", dtype="bf16", **BEFORE
    ),
    "xs-2": Plan("drsformer-xs", _recipe(iterations=10000, patch=192), "xs", **BEFORE),
    "s": Plan("drsformer-s", _recipe(iterations=6000, lr=6e-4, patch=192), "xs-grown", **BEFORE),
    "half": Plan("drsformer-xs", _recipe(iterations=3000), "xs-half", **BEFORE),
    "half-distilled": Plan("drsformer-xs", _recipe(iterations=3000), "xs-half", "xs-2", **BEFORE),
    "half-scratch": Plan("drsformer-xs", _recipe(iterations=3000, lr=1.2e-3), "xs-half-scratch", **BEFORE),
    "tiny-teacher": Plan("drsformer-tiny", _recipe(iterations=4, warmup=0, batch=2, patch=32)),
    "tiny-student": Plan("drsformer-tiny", _recipe(iterations=4, warmup=0, batch=2, patch=32), teacher="tiny-teacher"),
}
"""The programme; the tiny ones are for trying it out."""


@dataclass(frozen=True)
class Train(Stage):
    """Train a network of the programme, or continue to, and send it home in small parts; or see what it would take.

    Args:
        recipe: Which one, see PLANS; with --probe several.
        data: Folder of rain data, such as benchmarks.pack unpacks.
        run_dir: Folder of the run, which stays on this machine.
        iterations: Instead of those of the recipe; the learning rate falls over all of them.
        batch: Instead of that of the recipe.
        patch: Instead of that of the recipe.
        workers: Processes that cut patches.
        init: Checkpoint to start from, instead of what its recipe names: a run in --run-dir, or one of --weights.
        teacher: Checkpoint of the teacher, likewise.
        minutes_each: Train each network for so many minutes at the most; then the next one.
        readable: Train through the readable form instead of the folded one.
        compile: Compile block by block.
        cuda_graph: Replay the passes of a step from a CUDA graph.
        channels_last: Keep tensors in NHWC order.
        probe: Only measure how fast each form trains, and how fast patches are cut.
        steps: Of a probe, for each form, after as many to warm up.
        state_limit_mb: Send the state to continue from as well, where it is no larger than this.
    """

    recipe: tuple[str, ...] = ("teacher",)
    data: Path | None = None
    run_dir: Path = Path("runs")
    iterations: int | None = None
    batch: int | None = None
    patch: int | None = None
    workers: int = 14
    init: Path | None = None
    teacher: Path | None = None
    minutes_each: float | None = None
    readable: bool = False
    compile: bool = False
    cuda_graph: bool = True
    channels_last: bool = True
    probe: bool = False
    steps: int = 20
    state_limit_mb: float = 0.0

    def plan(self, name: str) -> Plan:
        """With the changes that were asked for."""
        if name not in PLANS:
            raise InputError(f"`recipe`: expected one of {', '.join(PLANS)}, found {name}")
        given = {key: getattr(self, key) for key in ("iterations", "batch", "patch") if getattr(self, key) is not None}
        recipe = dataclasses.replace(PLANS[name].recipe, **given)
        return dataclasses.replace(PLANS[name], recipe=recipe)

    def measure(self) -> Row:
        sheet = self.sheet()
        folder = self.data
        for name in self.recipe:
            plan = self.plan(name)
            if self.probe:
                self.probe_forms(sheet, name, plan)
                if folder:
                    key = f"probe {name}: patches of {plan.recipe.patch} cut by {self.workers} workers"
                    sheet.measure(key, functools.partial(self.probe_loader, plan, folder))
            elif folder is None:
                raise InputError("`data`: expected rain data to train on, found none")
            else:
                self.train(sheet, name, plan, folder)
        return sheet.summary()

    # What it would take.

    def probe_forms(self, sheet: Sheet, name: str, plan: Plan) -> None:
        forms = [
            (form, compiled, last)
            for compiled in (True, False)
            for form in ("trainable", "readable")
            for last in (True, False)
        ]
        for form, compiled, last in forms:
            parts = [form, "compiled" if compiled else "eager", "NHWC" if last else "NCHW"]
            key = f"probe {name} {' '.join(parts)} batch {plan.recipe.batch} patch {plan.recipe.patch}"
            sheet.measure(key, functools.partial(self.probe_form, sheet.device, plan, form, compiled, last))

    def probe_form(self, device: torch.device, plan: Plan, form: str, compiled: bool, last: bool) -> Row:
        """Steps as `drsformer.loop.fit` makes them, on random patches, in bf16."""
        torch.compiler.reset()
        torch.backends.cudnn.benchmark = True
        row: Row = {}
        layout = torch.channels_last if last else torch.contiguous_format
        made = trainable if form == "trainable" else unchanged

        def place(network: DRSformer) -> DRSformer:
            network = made(network.to(device).to(memory_format=layout)).to(device)  # pyright: ignore[reportCallIssue]
            if compiled:
                compile_blocks(network)
            return network

        network = untrained(plan.network).to(device)
        stepped, loss = place(network), l1_loss
        if plan.teacher:
            loss = Distillation(place(untrained(PLANS[plan.teacher].network)), network, LossWeights())
        optimizer = torch.optim.AdamW(network.parameters(), 1e-5, fused=device.type == "cuda")
        shape = plan.recipe.batch, 3, plan.recipe.patch, plan.recipe.patch
        rainy, clean = (torch.rand(shape, device=device).contiguous(memory_format=layout) for _ in range(2))

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                terms = loss(stepped, rainy, clean)
            torch.stack(list(terms.values())).sum().backward()
            nn.utils.clip_grad_norm_(network.parameters(), plan.recipe.clip)
            optimizer.step()
            optimizer.zero_grad()

        started = time.monotonic()
        with peak_memory(device, row):
            step()
            synchronize(device)
            row["first step s"] = round(time.monotonic() - started, 1)
            milliseconds(device, step, self.steps)
            ms = statistics.median(milliseconds(device, step, self.steps))
        return {"steps/s": 1000 / ms, "patches/s": 1000 * plan.recipe.batch / ms, "ms": ms, **row}

    def probe_loader(self, plan: Plan, folder: Path) -> Row:
        """Batches that no network waits for, over some seconds after the first."""
        folders = [find_pairs(place) for place in training_folders(plan, folder)]
        patches = Patches(folders, plan.recipe, **self.data_options(plan, folder).sources_of_patches())
        patches.warm_up()
        size = plan.recipe.batch
        numbers = [list(range(i * size, (i + 1) * size)) for i in range(10_000)]
        loader = torch.utils.data.DataLoader(patches, batch_sampler=numbers, num_workers=self.workers)
        batches = iter(loader)
        next(batches)
        started, count = time.monotonic(), 0
        while time.monotonic() - started < self.steps / 4:
            next(batches)
            count += 1
        return {
            "patches/s": count * size / (time.monotonic() - started),
            "steps/s": count / (time.monotonic() - started),
        }

    # Doing it.

    def data_options(self, plan: Plan, folder: Path) -> DataOptions:
        clean, streaks = ((folder / name) if (folder / name).is_dir() else None for name in ("clean", "streaks"))
        return DataOptions(
            validate=pair_folders(folder, "val"),
            validate_limit=4,
            clean=clean,
            streaks=streaks,
            rendered=plan.rendered,
            dry=plan.dry,
            compressed=plan.compressed,
        )

    def network_of(self, name: str, rounded: bool = False) -> Path:
        """A checkpoint by the name of its plan, from its run here or from where an earlier machine sent it, or by that
        of its file; `rounded`, as it is sent, so that it is the same file on each machine. Raises InputError where
        there is none."""
        self.bring_back(name)
        files = [f"{name}.safetensors"] if rounded else ["last.safetensors", f"{name}.safetensors"]
        given = (path for path in self.weights if path.stem == name)
        for path in (*(self.run_dir / name / file for file in files), *given):
            if path.is_file():
                return path
        raise InputError(f"expected {name} in `weights`, or its run in {self.run_dir}, found neither")

    def bring_back(self, name: str) -> None:
        """Join what an earlier machine left of a run in the results, where this one has nothing of it."""
        sent = self.output / f"{name}.json"
        if sent.is_file() and not (self.run_dir / name).exists():
            parts.join(sent, self.run_dir / name)

    def train(self, sheet: Sheet, name: str, plan: Plan, folder: Path) -> None:
        """Train as long as time allows, score what came out on all validation pairs, and split it."""
        for option, path in (("init", self.init), ("teacher", self.teacher)):
            if path and not path.is_file():
                raise InputError(f"`{option}`: expected a checkpoint, found no file at {path}")
        before = sheet.rows.get(f"train {name}", {})
        if before.get("finished") and before["iterations"] == plan.recipe.iterations:
            return
        if plan.teacher and not self.teacher and not sheet.rows.get(f"train {plan.teacher}", {}).get("finished", True):
            sheet.unfinished.append(f"train {name}, whose teacher {plan.teacher} is not finished")
            return
        run = self.run_dir / name
        reserve = 60 if sheet.device.type == "cuda" else 0  # for scores and parts
        if reserve and sheet.seconds_left() < 2 * reserve:  # more would go into setting up than into training
            sheet.unfinished.append(f"train {name}")
            return
        minutes = max(0.0, (sheet.seconds_left() - reserve) / 60)
        if self.minutes_each is not None:
            minutes = min(minutes, self.minutes_each)
        options = {
            "output": run,
            "data": training_folders(plan, folder),
            "data_options": self.data_options(plan, folder),
            "recipe": plan.recipe,
            "hardware": Hardware(
                accelerator=cast("Any", sheet.device.type),
                devices="1",
                workers=self.workers,
                precision="bf16-mixed",
                channels_last=self.channels_last,
                compile=self.compile,
                cuda_graph=self.cuda_graph and sheet.device.type == "cuda",
            ),
            "schedule": Schedule(
                validate_every=max(1, plan.recipe.iterations // 4),
                log_every=max(1, plan.recipe.iterations // 200),
                save_minutes=2,
                minutes=minutes,
            ),
        }

        def work() -> Row:
            self.bring_back(name)
            init = self.init or (self.network_of(plan.start) if plan.start else None)
            with training_shown() as on_progress:
                if plan.teacher:
                    teacher = self.teacher or self.network_of(plan.teacher, rounded=True)
                    student = str(init or plan.network)
                    result = distill(DistillOptions(teacher=teacher, student=student, **options), on_progress)
                else:
                    network = None if init else plan.network
                    result = train(
                        TrainOptions(network=network, init=init, **options),
                        form=unchanged if self.readable else trainable,
                        on_progress=on_progress,
                    )
            return {"finished": result["finished"], **self.send(sheet.device, run, name, plan, folder)}

        row = protected(sheet.device, work)
        sheet.put(f"train {name}", {"iterations": plan.recipe.iterations, **row})
        if not row.get("finished"):
            sheet.unfinished.append(f"train {name}")

    def send(self, device: torch.device, run: Path, name: str, plan: Plan, folder: Path) -> Row:
        """Round the network of a run, score it on all validation pairs, and split it; returns the scores."""
        trained = checkpoint.load(run / "last.safetensors")
        rounded = run / f"{name}.safetensors"
        checkpoint.save(rounded, trained.model, trained.provenance, DTYPES[plan.dtype])
        network = checkpoint.load(rounded).model.to(device)
        log = run / "log.jsonl"
        row: Row = {"iteration": json.loads(log.read_text().splitlines()[-1])["iteration"]}
        for place in pair_folders(folder, "val"):
            scores = evaluate_model(network, find_pairs(place))
            label = f"{place.parent.name}/{place.name}"
            row |= {f"{label} PSNR": scores.psnr, f"{label} SSIM": scores.ssim, f"{label} images": scores.images}
        provenance = {**trained.provenance, "scores": {key: value for key, value in row.items() if "/" in key}}
        checkpoint.save(rounded, network, provenance, DTYPES[plan.dtype])
        state = run / "state.pt"
        extra = [state] if state.stat().st_size <= self.state_limit_mb * 1e6 else []
        for stale in self.output.glob(f"{name}.[0-9][0-9]"):
            stale.unlink()
        parts.split(name, [rounded, log, *extra], self.output)
        return row


def training_folders(plan: Plan, folder: Path) -> list[Path]:
    """The folders of pairs that a plan cuts patches out of, each as often as it is drawn from."""
    found = {path.parent.name: path for path in pair_folders(folder, "train")}
    for name in plan.mix:
        if name not in found:
            raise InputError(f"{folder}: expected {name}/train, found {', '.join(found)}")
    return [found[name] for name in plan.mix or found]


def pair_folders(folder: Path, split: str) -> list[Path]:
    """The folders of pairs of a split, such as rain100l/train."""
    found = sorted(path for path in folder.glob(f"*/{split}") if path.is_dir())
    if not found:
        raise InputError(f"{folder}: expected folders of pairs such as rain100l/{split}, found none")
    return found
