"""The training loop, which every way of training here uses.

`fit` trains a network by a recipe in a folder of its own, a `Run`, and goes on from the run's last checkpoint as if it
had not been stopped; on a CPU, bit for bit. `Learner` is what a step changes, `Housekeeping` what is done beside the
steps: the log, validation, checkpoints. Devices, processes, precision and gradient synchronisation are Lightning
Fabric's. The logger of this file says at the level INFO how a run begins and ends, and at DEBUG each line of its log.
"""

# ruff: noqa: B008 - the defaults are frozen
from __future__ import annotations

import io
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from lightning_fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from drsformer import checkpoint
from drsformer.config import preset
from drsformer.data import Pair
from drsformer.evaluation import evaluate_model
from drsformer.metrics import PERFECT_DB, Protocol
from drsformer.model import DRSformer, MixtureOfExpertsCompensator, SparseTransformerBlock
from drsformer.patches import Patches
from drsformer.recipe import Hardware, Recipe, Schedule
from runtime.errors import InputError
from runtime.files import writing
from runtime.progress import OnProgress, silent

logger = logging.getLogger(__name__)

Loss = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]
"""Named terms whose sum is minimised, from the network and a batch of rainy and clean patches (B, 3, P, P). One that is
itself a module has its parameters trained and kept in the run's state, never in the networks that are saved."""

Form = Callable[[DRSformer], DRSformer]
"""Makes of a network another one that computes the same function from the same parameters, such as a faster one."""


def l1_loss(model: nn.Module, rainy: Tensor, clean: Tensor) -> dict[str, Tensor]:
    """The paper's loss (Eq. 1), a `Loss`."""
    return {"l1": F.l1_loss(model(rainy), clean)}


def unchanged(network: DRSformer) -> DRSformer:
    """The network itself, a `Form`."""
    return network


def untrained(network: str, **changes: Any) -> DRSformer:
    """A network with random weights.

    Args:
        network: Name in `drsformer.config.PRESETS`.
        changes: What is different, see `drsformer.config.preset`.

    Raises:
        InputError: There is no such network.
    """
    try:
        return DRSformer(preset(network, **changes))
    except ValueError as error:
        raise InputError(f"`network`: {error}") from None


def network_files(output: Path) -> list[Path]:
    """The files in which a run in this folder leaves networks."""
    return [output / f"{name}.safetensors" for name in ("last", "best")]


def is_first_process() -> bool:
    """Whether this process is the one that reports for all processes of a training, or the only one."""
    return getattr(rank_zero_only, "rank", 0) == 0


def leave_processes() -> None:
    """Leave the group of processes of a training, at the end of a program: a group that is left to the end of the
    interpreter now and then aborts it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Run:
    """One training run in its folder: its checkpoint, its log and the networks it leaves.

    Args:
        output: The folder.
        options: What the result depends on, ready for JSON; a run is continued only with the same.
        provenance: Provenance of the networks, see `drsformer.checkpoint`.
    """

    def __init__(self, output: Path, options: dict[str, Any], provenance: dict[str, Any]) -> None:
        self.output, self.options, self.provenance = output, options, provenance
        self.log_path, self.state_path = output / "log.jsonl", output / "state.pt"

    def restore(self) -> dict[str, Any] | None:
        """The state of the last checkpoint, or None at the start of a run.

        Raises:
            InputError: The run was started with other options, or the folder holds something else.
        """
        if not self.state_path.exists():
            if (self.output / "last.safetensors").exists():
                raise InputError(f"{self.output} holds a network but no state to continue from; give another `output`")
            return None
        try:
            state = torch.load(self.state_path, map_location="cpu", weights_only=True)
            # What earlier versions did not note cannot have changed.
            before = {"files_sha256": self.options.get("files_sha256"), **json.loads(state.pop("options"))}
        except Exception as error:  # whatever a damaged file provokes
            raise InputError(f"{self.state_path}: damaged ({error}); remove the folder to start again") from None
        changed = [name for name in self.options if self.options[name] != before.get(name)]
        if changed:
            name = changed[0]
            raise InputError(
                f"{self.output} holds a run with {name}={before.get(name)}, not {self.options[name]}; "
                "give the same options to continue it, or another `output`"
            )
        return state

    def clean_up(self, iteration: int) -> None:
        """Remove what a killed process left behind after the checkpoint of `iteration`."""
        for leftover in self.output.glob(".state.*.pt"):
            leftover.unlink()
        lines = self.log_path.read_text(errors="replace").splitlines(keepends=True) if self.log_path.exists() else []
        with writing(self.log_path) as temporary:
            temporary.write_text("".join(line for line in lines if 0 <= _iteration(line) <= iteration))

    def save_state(self, state: dict[str, Any]) -> None:
        """Write the state to continue from, whole or not at all."""
        content = io.BytesIO()  # PyTorch's own error for a full disk does not say so
        torch.save({**state, "options": json.dumps(self.options)}, content)
        with writing(self.state_path) as temporary:
            temporary.write_bytes(content.getbuffer())

    def save_network(self, name: str, network: DRSformer, scores: dict[str, float]) -> None:
        """Write a network with its validation scores as `name`.safetensors."""
        checkpoint.save(self.output / f"{name}.safetensors", network, {**self.provenance, "scores": scores})

    def log(self, fabric: Fabric, iteration: int, values: dict[str, float]) -> None:
        """Add a line to the log and to TensorBoard's events."""
        fabric.log_dict(values, step=iteration)
        line = json.dumps({"iteration": iteration, **values})
        with open(self.log_path, "a") as file:
            file.write(line + "\n")
        logger.debug(line)


def _iteration(line: str) -> int:
    """That of a line of the log; -1 where it is none, such as what is left when a machine crashes."""
    try:
        return int(json.loads(line)["iteration"]) if line.endswith("\n") else -1
    except (ValueError, KeyError, TypeError):
        return -1


class Objective(nn.Module):
    """What a step differentiates, and what Fabric wraps: the loss of a network, with the parameters of both."""

    def __init__(self, network: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, rainy: Tensor, clean: Tensor) -> dict[str, Tensor]:
        return self.loss(self.network, rainy, clean)


def compile_blocks(network: nn.Module) -> None:
    """Have the blocks and compensators compiled, each when it first runs; equal ones share their code. The whole
    network in one piece would take many times as long."""
    torch._dynamo.config.recompile_limit = 64  # kinds of blocks, each with and without gradients
    for part in network.modules():
        if isinstance(part, (SparseTransformerBlock, MixtureOfExpertsCompensator)):
            part.compile(dynamic=False)


def record_graph(objective: Objective, recipe: Recipe, hardware: Hardware, fabric: Fabric) -> None:
    """Have the forward and the backward pass of an objective replayed from a CUDA graph.

    Raises:
        InputError: There is not exactly one CUDA device.
    """
    if fabric.device.type != "cuda" or fabric.world_size > 1:
        raise InputError(f"`cuda_graph`: expected one CUDA device, found {fabric.world_size} x {fabric.device.type}")
    layout = torch.channels_last if hardware.channels_last else torch.contiguous_format
    shape = recipe.batch, 3, recipe.patch, recipe.patch
    patches = tuple(torch.rand(shape, device=fabric.device).contiguous(memory_format=layout) for _ in range(2))
    half = hardware.precision == "bf16-mixed"
    with torch.autocast("cuda", torch.bfloat16, enabled=half, cache_enabled=False):
        torch.cuda.make_graphed_callables(objective, patches, allow_unused_input=True)


class Learner:
    """A network on its device with all that a step changes: its average, what the loss learns, the optimiser.

    Its arguments are those of `fit`, and `state`: what the method of this name gave at the run's last checkpoint, or
    None at the start of a run.

    Attributes:
        model: The network that is trained.
        averaged: The network that is validated and saved: the running average of `model` if the recipe has one, else
            `model` itself.
    """

    def __init__(
        self,
        fabric: Fabric,
        model: DRSformer,
        recipe: Recipe,
        hardware: Hardware,
        loss: Loss,
        form: Form,
        state: dict[str, Any] | None,
    ) -> None:
        self.fabric, self.recipe, self.hardware = fabric, recipe, hardware
        self.model = model = model.to(fabric.device)
        if hardware.channels_last:
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema)) if recipe.ema else None
        self.averaged = cast("DRSformer", self.average.module) if self.average else model
        objective = Objective(form(model), loss).to(fabric.device)
        self.learned = loss if isinstance(loss, nn.Module) else nn.Module()  # what the loss itself learns
        self.parameters = [*model.parameters(), *self.learned.parameters()]
        optimizer = torch.optim.AdamW(
            self.parameters, recipe.lr, weight_decay=recipe.weight_decay, fused=fabric.device.type == "cuda"
        )
        if state:
            model.load_state_dict(state["model"])
            self.learned.load_state_dict(state["loss"])
            optimizer.load_state_dict(state["optimizer"])
            if self.average:
                self.average.load_state_dict(state["average"])
        if hardware.compile:
            compile_blocks(objective.network)
        torch.backends.cudnn.benchmark = True  # all patches have one size
        if hardware.cuda_graph:
            record_graph(objective, recipe, hardware, fabric)
        self.objective, self.optimizer = fabric.setup(objective, optimizer)

    def step(self, iteration: int, rainy: Tensor, clean: Tensor) -> dict[str, Tensor]:
        """One step of the optimiser.

        Args:
            iteration: Number of the step, counted from 1.
            rainy: This process's share of the batch, float32 (B, 3, P, P) in [0, 1].
            clean: The same without rain.

        Returns:
            The terms of the loss before the step.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(iteration - 1)
        if self.hardware.channels_last:
            rainy, clean = (x.contiguous(memory_format=torch.channels_last) for x in (rainy, clean))
        terms = self.objective(rainy, clean)
        self.fabric.backward(torch.stack(list(terms.values())).sum())
        self.fabric.clip_gradients(self.objective, self.optimizer, max_norm=self.recipe.clip, error_if_nonfinite=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update_parameters(self.model)
        return terms

    def expect_numbers(self, iteration: int) -> None:
        """Raise InputError where weights are infinite or NaN. Waits for the device."""
        if not torch.stack([p.isfinite().all() for p in self.parameters]).all():
            raise InputError(
                f"the weights are no longer numbers at iteration {iteration}: lower `lr` or `clip`, "
                "and give another `output`"
            )

    def state(self) -> dict[str, Any]:
        """All that a run needs to go on exactly."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "loss": self.learned.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }


class Meter:
    """The mean of each term of the loss and the speed of the steps since both were last read.

    Args:
        batch: Patches in a step, over all devices.
        earlier: What `state` gave before a stop.
    """

    def __init__(self, batch: int, **earlier: Any) -> None:
        self.batch = batch
        self._reset(**earlier)

    def _reset(self, sums: Mapping[str, float] = MappingProxyType({}), steps: int = 0, seconds: float = 0.0) -> None:
        self.sums: dict[str, Tensor | float] = dict(sums)
        self.steps, self.seconds = steps, seconds

    def state(self) -> dict[str, Any]:
        """What is counted since the last reading."""
        sums = {name: float(term) for name, term in self.sums.items()}
        return {"sums": sums, "steps": self.steps, "seconds": self.seconds}

    def start(self) -> None:
        """Start the clock."""
        self.started = time.monotonic()

    def stop(self) -> None:
        """Stop the clock, for what is no part of a step."""
        self.seconds += time.monotonic() - self.started

    def add(self, terms: dict[str, Tensor]) -> None:
        """Count a step. Does not wait for the device."""
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + term.detach()
        self.steps += 1

    def read(self) -> tuple[dict[str, float], float]:
        """The means by the names of the terms, and patches per second; what comes next is measured afresh."""
        means = {name: float(term) / self.steps for name, term in self.sums.items()}
        speed = self.steps * self.batch / self.seconds
        self._reset()
        return means, speed


class Housekeeping:
    """What is done beside the steps, each when it is due: the log, validation and checkpoints.

    Its arguments are those of `fit`, and `state`: that of the run's last checkpoint, or None at the start of a run.

    Attributes:
        done: Iterations that the run had done when this process took it up.
        scores: Scores of the last validation.
    """

    def __init__(
        self,
        learner: Learner,
        run: Run,
        schedule: Schedule,
        validate: Sequence[tuple[str, Sequence[Pair]]],
        protocol: Protocol,
        state: dict[str, Any] | None,
        on_progress: OnProgress,
    ) -> None:
        self.fabric, self.learner, self.run, self.schedule = learner.fabric, learner, run, schedule
        self.validate, self.on_progress = validate, on_progress
        self.protocol: Protocol = protocol
        self.done, self.best, self.scores, self.scored = (
            (state["iteration"], state["best"], state["scores"], state["scored"]) if state else (0, -math.inf, {}, 0)
        )
        self.iterations = learner.recipe.iterations
        self.meter, self.remark = Meter(learner.recipe.batch, **(state or {}).get("meter", {})), ""

    def begin(self) -> None:
        """Put the folder in order, and start the clocks of the log and of the checkpoints."""
        if self.fabric.is_global_zero:
            self.run.clean_up(self.done)
            if self.done:  # a killed process may not have come to this
                self._save_network(self.done)
        self.saved = time.monotonic()
        self._show(self.done)
        self.meter.start()

    def after(self, iteration: int, terms: dict[str, Tensor], out_of_time: bool) -> None:
        """Do what is due after a step.

        Args:
            iteration: Number of the step, counted from 1.
            terms: Terms of its loss.
            out_of_time: Whether the run stops here, finished or not.

        Raises:
            InputError: The weights are no longer numbers; the last checkpoint is left as it was.
        """
        self.meter.add(terms)
        last, first_process = iteration == self.iterations, self.fabric.is_global_zero
        log = last or iteration % self.schedule.log_every == 0
        score = bool(self.validate) and (last or iteration % self.schedule.validate_every == 0)
        late = time.monotonic() - self.saved > 60 * self.schedule.save_minutes
        save = first_process and (last or out_of_time or late)
        if log or score or save:  # the device runs behind the loop, which waits for it here and nowhere else
            self.learner.expect_numbers(iteration)
        self.meter.stop()
        if log:
            self._log(iteration)
        self._show(iteration)
        if score and first_process:
            self._score(iteration)
        if save:
            self._save(iteration)
        self.meter.start()

    def _show(self, iteration: int) -> None:
        if self.fabric.is_global_zero:
            self.on_progress("Training", iteration, self.iterations, self.remark)

    def _log(self, iteration: int) -> None:
        means, speed = self.meter.read()
        self.remark = f"loss {sum(means.values()):.4f}, {speed:.1f} patches/s"
        if self.fabric.is_global_zero:
            rate = self.learner.optimizer.param_groups[0]["lr"]
            self.run.log(self.fabric, iteration, {**means, "lr": rate, "patches_per_second": round(speed, 2)})

    def _score(self, iteration: int) -> None:
        self.scores, self.scored = validation_scores(self.learner.averaged, self.validate, self.protocol), iteration
        self.run.log(self.fabric, iteration, self.scores)
        mean = float(np.mean([value for name, value in self.scores.items() if name.endswith(" psnr")]))
        if mean > self.best:
            self.best = mean
            self.run.save_network("best", self.learner.averaged, self.scores)

    def _save(self, iteration: int) -> None:
        progress = {"iteration": iteration, "best": self.best, "scores": self.scores, "scored": self.scored}
        self.run.save_state({**progress, "meter": self.meter.state(), **self.learner.state()})
        self._save_network(iteration)
        self.saved = time.monotonic()

    def _save_network(self, iteration: int) -> None:
        self.run.save_network("last", self.learner.averaged, self.scores if self.scored == iteration else {})


def validation_scores(
    network: DRSformer, validate: Sequence[tuple[str, Sequence[Pair]]], protocol: Protocol
) -> dict[str, float]:
    """PSNR and SSIM on each folder, as "folder psnr" and "folder ssim"; at most `PERFECT_DB`. Nothing is compiled or
    tuned for the many sizes of whole images."""
    scores = {}
    for name, pairs in validate:
        with torch.compiler.set_stance("force_eager"), torch.backends.cudnn.flags(enabled=True, benchmark=False):
            result = evaluate_model(network, pairs, protocol)
        scores |= {f"{name} psnr": min(result.psnr, PERFECT_DB), f"{name} ssim": result.ssim}
    return scores


def fit(
    fabric: Fabric,
    model: DRSformer,
    patches: Patches,
    recipe: Recipe,
    run: Run,
    *,
    loss: Loss = l1_loss,
    form: Form = unchanged,
    validate: Sequence[tuple[str, Sequence[Pair]]] = (),
    protocol: Protocol = "rain200",
    hardware: Hardware = Hardware(),
    schedule: Schedule = Schedule(),
    on_progress: OnProgress = silent,
) -> dict[str, Any]:
    """Train a network until the recipe is done, continuing the run if it has begun.

    The first process validates, logs and saves; the logged loss is that of its own patches.

    Args:
        fabric: Fabric, launched.
        model: The network, trained in place; it is what is validated and saved.
        patches: What to train on.
        recipe: How to train.
        run: The folder of the run.
        loss: What is minimised.
        form: Form of the network through which the steps run.
        validate: Name and pairs of each folder to validate on.
        protocol: Protocol of the validation scores.
        hardware: Workers, memory layout, compilation; the devices are those of `fabric`.
        schedule: How often to validate, log and save, and when to stop.
        on_progress: See `runtime.progress`; remarks on the loss and the speed.

    Returns:
        The last validation scores, by "folder psnr" and "folder ssim", the "iteration" reached, and whether the run is
        "finished", which `schedule.minutes` may have prevented.

    Raises:
        InputError: The batch cannot be shared out, the run cannot be continued, an image cannot be read, or the weights
            are no longer numbers; the last checkpoint is then left as it was.
    """
    begun = time.monotonic()
    if recipe.batch % fabric.world_size:
        raise InputError(f"`batch`: expected a multiple of the {fabric.world_size} devices, found {recipe.batch}")
    if fabric.is_global_zero:
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        logger.info(f"{parameters:.2f} M parameters, {len(patches.backgrounds)} backgrounds, on {fabric.device}")
    state = run.restore()
    learner = Learner(fabric, model, recipe, hardware, loss, form, state)
    housekeeping = Housekeeping(learner, run, schedule, validate, protocol, state, on_progress)
    iteration = done = housekeeping.done
    if hardware.workers:
        patches.warm_up(on_progress if fabric.is_global_zero else silent)
    batches = _batches(fabric, patches, recipe, hardware, done)
    housekeeping.begin()
    for iteration, (rainy, clean) in enumerate(batches, done + 1):
        terms = learner.step(iteration, rainy, clean)
        stop = schedule.minutes is not None and fabric.broadcast(time.monotonic() - begun > 60 * schedule.minutes)
        housekeeping.after(iteration, terms, stop)
        if stop:
            break
    model.load_state_dict(learner.averaged.state_dict())
    finished = iteration == recipe.iterations
    if fabric.is_global_zero:
        logger.info(_ending(run, done, iteration, recipe.iterations))
    return {**fabric.broadcast(housekeeping.scores), "iteration": iteration, "finished": finished}


def _batches(fabric: Fabric, patches: Patches, recipe: Recipe, hardware: Hardware, done: int) -> DataLoader:
    """This process's share of each batch that is left to do, on its device."""
    share = recipe.batch // fabric.world_size
    first = fabric.global_rank * share
    loader = DataLoader(
        patches,
        batch_sampler=[
            range(i * recipe.batch + first, i * recipe.batch + first + share)  # pyright: ignore[reportArgumentType]
            for i in range(done, recipe.iterations)
        ],
        num_workers=hardware.workers,
        persistent_workers=hardware.workers > 0,
        pin_memory=fabric.device.type == "cuda",
    )
    return cast("DataLoader", fabric.setup_dataloaders(loader, use_distributed_sampler=False))


def _ending(run: Run, done: int, iteration: int, iterations: int) -> str:
    if iteration < iterations:
        return (
            f"Not finished: out of time at iteration {iteration} of {iterations}. The same command goes on from there."
        )
    finished = "Had finished" if done == iteration else "Finished"
    return f"{finished} after {iteration} iterations: {run.output / 'last.safetensors'}"
