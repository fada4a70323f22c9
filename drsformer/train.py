"""Train a DRSformer.

    python -m drsformer.train --data Rain200H/train --output runs/rain200h
    python -m drsformer.train --network drsformer-xs --data light/train heavy/train --validate light/val heavy/val \\
        --clean photographs/ --rendered 0.6 --dry 0.05 --lr 1e-3 --patch 64 --output runs/xs
    torchrun --nproc-per-node 4 -m drsformer.train --data DDN/train --precision bf16-mixed --output runs/ddn

The defaults are the recipe of the released code (paper, section 4.1): L1 loss, AdamW, batches of 8 patches of
128x128, flips, 92,000 iterations at a constant rate and 208,000 more on a cosine, gradients clipped at norm 0.01.
The same command continues a run that was stopped from its last checkpoint, on a CPU bit for bit as if it had not been;
a job of limited time stops itself with --minutes.
OUTPUT gets `last.safetensors`, `best.safetensors` if there is validation, `log.jsonl`, TensorBoard's events, and
`state.pt` to continue from. With several machines it has to be a folder that all of them see.

Everything random in a patch depends on the seed and the patch's running number alone, so there is no generator state
to save, and a run sees the same patches on any number of devices. Devices, processes, precision and gradient
synchronisation are Lightning Fabric's, by --devices, torchrun or `fabric run`.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from lightning_fabric import Fabric
from lightning_fabric.loggers.tensorboard import TensorBoardLogger
from lightning_fabric.utilities.rank_zero import rank_zero_only
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from drsformer import checkpoint
from drsformer.config import SIZE_MULTIPLE, preset
from drsformer.data import Pair, find_pairs
from drsformer.evaluate import evaluate_model
from drsformer.metrics import Protocol
from drsformer.model import DRSformer, MixtureOfExpertsCompensator, SparseTransformerBlock
from drsformer.rain import (
    Layer,
    LayerSource,
    add_rain,
    crop,
    draw_streaks,
    flip,
    images_in,
    make_layer,
    rain_of_pair,
    read_streaks,
)
from runtime import images
from runtime.cli import console, main, progress
from runtime.errors import InputError, expect_between
from runtime.files import expect_other_files, writing

Loss = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]
"""Named terms whose sum is minimised, from the network and a batch of rainy and clean patches (B, 3, P, P). One that is
itself a module has its parameters trained and kept in the run's state, never in the networks that are saved."""

TURNED = 0.25
"""Fraction of the rendered layers of rain that are turned. In the pairs of the benchmarks rain falls near the vertical,
and a network that saw nothing else leaves slanted streaks where they are."""

LARGEST_SEED = 2**64 - 1
"""That PyTorch takes."""

Form = Callable[[DRSformer], DRSformer]
"""Makes of a network another one that computes the same function from the same parameters, such as a faster one."""


def itself(network: DRSformer) -> DRSformer:
    return network


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are the released code's. Raises InputError for values out of range.

    Args:
        iterations: Steps of the optimiser in all.
        constant: Steps at the initial learning rate, before the cosine begins; as in the paper, 92 of every 300 if not
            given.
        warmup: Steps over which the rate first rises from zero.
        lr: Initial learning rate. The released code has 3e-4, the paper 1e-4.
        lr_min: Learning rate at the end.
        weight_decay: Of AdamW.
        batch: Patches in a step, over all devices.
        patch: Height and width of a patch, a multiple of 8.
        clip: Largest norm of the gradient.
        ema: Decay of the running average of the weights, which is what is validated and saved; 0 for none.
        seed: Of the initial weights and of everything random in the patches.
    """

    iterations: int = 300_000
    constant: int | None = None
    warmup: int = 0
    lr: float = 3e-4
    lr_min: float = 1e-6
    weight_decay: float = 1e-4
    batch: int = 8
    patch: int = 128
    clip: float = 0.01
    ema: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        expect_between("iterations", self.iterations, 1)
        expect_between("constant", self.constant or 0, 0, self.iterations - 1)
        expect_between("warmup", self.warmup, 0, self.iterations - 1)
        expect_between("lr", self.lr, 0)
        expect_between("lr_min", self.lr_min, 0)
        expect_between("weight_decay", self.weight_decay, 0)
        expect_between("batch", self.batch, 1)
        if not self.clip > 0:
            raise InputError(f"`clip`: expected more than 0, found {self.clip:g}")
        if not 0 <= self.ema < 1:
            raise InputError(f"`ema`: expected at least 0 and less than 1, found {self.ema:g}")
        expect_between("seed", self.seed, 0, LARGEST_SEED)
        if self.patch < SIZE_MULTIPLE or self.patch % SIZE_MULTIPLE:
            raise InputError(f"`patch`: expected a multiple of {SIZE_MULTIPLE}, found {self.patch}")

    def learning_rate(self, iteration: int) -> float:
        """The rate of a step, counted from 0."""
        if iteration < self.warmup:
            return self.lr * (iteration + 1) / self.warmup
        start = max(self.iterations * 92 // 300 if self.constant is None else self.constant, self.warmup)
        turn = max(0, iteration - start) / (self.iterations - start)
        return self.lr_min + (self.lr - self.lr_min) * (1 + math.cos(math.pi * turn)) / 2


@dataclass(frozen=True)
class Hardware:
    """What to train on; as Lightning Fabric names it.

    Args:
        accelerator: Kind of device; auto takes CUDA or MPS where there is one, else the CPU.
        devices: How many devices of each machine, or auto; on the CPU, how many processes. torchrun decides itself.
        num_nodes: How many machines. torchrun decides itself.
        precision: bf16-mixed computes in bfloat16 and keeps the weights in float32.
        workers: Processes that cut patches, for each device; none means in the training process itself.
        channels_last: Keep tensors in NHWC order, which tensor cores and CPUs like.
        compile: Compile the network block by block with torch.compile; equal blocks share their code.
        cuda_graph: Record the passes of a step once and replay them, so that launching some thousand small kernels
            takes no time. On one CUDA device.
    """

    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: str = "auto"
    num_nodes: int = 1
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    workers: int = 0
    channels_last: bool = False
    compile: bool = False
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        expect_between("workers", self.workers, 0)
        expect_between("num_nodes", self.num_nodes, 1)
        if self.devices != "auto" and not (self.devices.isdecimal() and int(self.devices)):
            raise InputError(f"`devices`: expected a number or auto, found {self.devices}")

    def fabric(self, output: Path) -> Fabric:
        """Fabric with its processes launched. Raises InputError where the devices are not there."""
        logger = TensorBoardLogger(output, name=None, version="")
        if "LT_CLI_USED" in os.environ:  # `fabric run` has decided and launched
            return Fabric(loggers=logger)
        devices = "auto" if self.devices == "auto" else int(self.devices)
        nodes = self.num_nodes
        if torch.distributed.is_torchelastic_launched():
            devices = int(os.environ["LOCAL_WORLD_SIZE"])
            nodes = int(os.environ["WORLD_SIZE"]) // devices
        if nodes > 1 and not {"MASTER_ADDR", "SLURM_NTASKS"} & set(os.environ):
            raise InputError(
                f"`num_nodes`: expected a launcher that brings {nodes} machines together, found none; "
                f"start it on each with torchrun --nnodes {nodes}"
            )
        try:
            fabric = Fabric(
                accelerator=self.accelerator, devices=devices, num_nodes=nodes, precision=self.precision, loggers=logger
            )
        except (ValueError, RuntimeError) as error:
            raise InputError(f"cannot train on this hardware: {error}") from None
        fabric.launch()
        return fabric


@dataclass(frozen=True)
class Schedule:
    """How often things are done beside training.

    Args:
        validate_every: Iterations between validations.
        log_every: Iterations between lines of the log.
        save_minutes: Minutes between checkpoints; a run that is killed loses no more than that.
        minutes: Save and stop after so many minutes, finished or not; the same command goes on from there.
    """

    validate_every: int = 1000
    log_every: int = 100
    save_minutes: float = 3.0
    minutes: float | None = None

    def __post_init__(self) -> None:
        expect_between("validate_every", self.validate_every, 1)
        expect_between("log_every", self.log_every, 1)
        expect_between("save_minutes", self.save_minutes, 0)
        expect_between("minutes", self.minutes or 0, 0)


class Patches(Dataset[tuple[Tensor, Tensor]]):
    """Rainy and clean patches, (3, P, P) float32 RGB in [0, 1] each, as a function of a running number.

    A patch is cut out of a pair of one of the folders, each folder equally likely; or, with probability `rendered`, is
    a clean background (a target, or one of the further `clean` photographs) with rain put on it, equally likely drawn,
    that of a pair of one of the folders, or from `streaks`; or, with probability `dry`, shows the same clean background
    twice. Decoded images are kept in memory until they fill `cache_bytes`, in each process that cuts patches; those of
    `warm_up` are shared by all processes that are forked after it.
    """

    def __init__(
        self,
        folders: Sequence[Sequence[Pair]],
        recipe: Recipe,
        clean: Path | None = None,
        streaks: Path | None = None,
        rendered: float = 0.0,
        dry: float = 0.0,
        cache_bytes: int = 4 << 30,
    ) -> None:
        expect_between("rendered", rendered, 0, 1)
        expect_between("dry", dry, 0, 1)
        unpaired = round(rendered + dry, 9)  # floats that are meant to add up to 1 may miss it
        if unpaired > 1:
            raise InputError(f"`rendered` and --dry: expected at most 1 together, found {unpaired:g}")
        if clean and unpaired == 0:
            raise InputError("`clean` photographs are used for rendered and dry patches only: give --rendered or --dry")
        if streaks and rendered == 0:
            raise InputError("`streaks` are used for rendered patches only: give --rendered")
        if not folders and not (clean and unpaired == 1):
            raise InputError("nothing to train on: give --data, or --clean with --rendered and --dry that add up to 1")
        self.folders, self.recipe, self.rendered, self.unpaired = folders, recipe, rendered, unpaired
        self.backgrounds: list[Pair | Path] = [pair for folder in folders for pair in folder]
        self.backgrounds += images_in(clean) if clean else []
        self.layers: list[LayerSource] = [draw_streaks, *(partial(self._rain_of, folder) for folder in folders)]
        if streaks:
            self.layers.append(read_streaks(streaks))
        self.cache: dict[Pair | Path, NDArray[np.uint8]] = {}
        self.cache_left = cache_bytes

    def __len__(self) -> int:
        return 1 << 62

    @property
    def items(self) -> Sequence[Pair | Path]:
        """All that patches are cut out of."""
        return self.backgrounds

    def warm_up(self, shown: bool = True) -> None:
        """Decode images, with a progress bar if `shown`, until all are in the cache or one finds no room there. Raises
        InputError for one that cannot be read."""
        pool = ThreadPoolExecutor()
        with progress(shown) as bar:
            images_read = zip(self.items, pool.map(self._read, self.items), strict=True)
            for item, _ in bar.track(images_read, len(self.items), description="Reading images"):
                if item not in self.cache:
                    break
        pool.shutdown(cancel_futures=True)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.recipe.seed, number))
        kind, size = rng.random(), self.recipe.patch
        if kind < self.rendered:
            clean = self._cut(rng, self.backgrounds, size, size)[..., -3:]
            rainy = add_rain(clean, make_layer(rng, size, size, self.layers, turned=TURNED))
        elif kind < self.unpaired:
            rainy = clean = self._cut(rng, self.backgrounds, size, size)[..., -3:]
        else:
            folder = self.folders[int(rng.integers(len(self.folders)))]
            rainy, clean = np.split(self._cut(rng, folder, size, size), 2, axis=-1)
        return to_tensor(rainy), to_tensor(clean)

    def _cut(
        self, rng: np.random.Generator, items: Sequence[Pair | Path], height: int, width: int
    ) -> NDArray[np.uint8]:
        """A random place of a random item, flipped at random: (height, width, 3) of a photograph, or (height, width, 6)
        of a pair, rainy before clean. An image that is too small is mirrored at its border."""
        image = self._read(items[int(rng.integers(len(items)))])
        short = [(0, max(0, wanted - extent)) for wanted, extent in zip((height, width), image.shape, strict=False)]
        if any(missing for _, missing in short):
            image = np.pad(image, (*short, (0, 0)), mode="symmetric")
        return flip(rng, crop(rng, image, height, width))

    def _read(self, item: Pair | Path) -> NDArray[np.uint8]:
        if item in self.cache:
            return self.cache[item]
        image = images.read_rgb(item) if isinstance(item, Path) else np.concatenate(item.load(), axis=-1)
        if image.nbytes <= self.cache_left:
            self.cache_left -= image.nbytes
            self.cache[item] = image
        return image

    def _rain_of(self, folder: Sequence[Pair], rng: np.random.Generator, height: int, width: int) -> Layer:
        rainy, clean = np.split(self._cut(rng, folder, height, width), 2, axis=-1)
        return rain_of_pair(rainy, clean).astype(np.float32)


def to_tensor(patch: NDArray[np.uint8]) -> Tensor:
    """uint8 (H, W, 3) -> float32 (3, H, W) in [0, 1]."""
    return torch.from_numpy(patch.transpose(2, 0, 1) / np.float32(255))


def l1_loss(model: nn.Module, rainy: Tensor, clean: Tensor) -> dict[str, Tensor]:
    """The paper's loss (Eq. 1)."""
    return {"l1": F.l1_loss(model(rainy), clean)}


class Run:
    """One training run in its folder: its checkpoint, its log and the networks it leaves.

    options:    what the result depends on; a run is continued only with the same.
    provenance: for the networks, see `drsformer.checkpoint`.
    """

    def __init__(self, output: Path, options: dict[str, Any], provenance: dict[str, Any]) -> None:
        self.output, self.options, self.provenance = output, options, provenance
        self.log_path, self.state_path = output / "log.jsonl", output / "state.pt"

    def restore(self) -> dict[str, Any] | None:
        """The state of the last checkpoint, or None at the start of a run. Raises InputError where the run was
        started with other options, or where the folder holds something else."""
        if not self.state_path.exists():
            if (self.output / "last.safetensors").exists():
                raise InputError(f"{self.output} holds a network but no state to continue from; give another --output")
            return None
        try:
            state = torch.load(self.state_path, map_location="cpu", weights_only=True)
            before = json.loads(state.pop("options"))
        except Exception as error:  # whatever a damaged file provokes
            raise InputError(f"{self.state_path}: damaged ({error}); remove the folder to start again") from None
        changed = [name for name in self.options if self.options[name] != before.get(name)]
        if changed:
            name = changed[0]
            raise InputError(
                f"{self.output} holds a run with {name}={before.get(name)}, not {self.options[name]}; "
                "give the same options to continue it, or another --output"
            )
        return state

    def clean_up(self, iteration: int) -> None:
        """Remove what a killed process left behind after the checkpoint of `iteration`."""
        for leftover in self.output.glob(".state.*.pt"):
            leftover.unlink()
        lines = self.log_path.read_text().splitlines(keepends=True) if self.log_path.exists() else []
        whole = [line for line in lines if line.endswith("}\n")]
        with writing(self.log_path) as temporary:
            temporary.write_text("".join(line for line in whole if json.loads(line)["iteration"] <= iteration))

    def save_state(self, state: dict[str, Any]) -> None:
        content = io.BytesIO()  # PyTorch's own error for a full disk does not say so
        torch.save({**state, "options": json.dumps(self.options)}, content)
        with writing(self.state_path) as temporary:
            temporary.write_bytes(content.getbuffer())

    def save_network(self, name: str, network: DRSformer, scores: dict[str, float]) -> None:
        checkpoint.save(self.output / f"{name}.safetensors", network, {**self.provenance, "scores": scores})

    def log(self, fabric: Fabric, iteration: int, values: dict[str, float]) -> None:
        fabric.log_dict(values, step=iteration)
        line = json.dumps({"iteration": iteration, **values})
        with open(self.log_path, "a") as file:
            file.write(line + "\n")
        if not console.is_terminal:  # where there is no progress bar
            console.print(line, soft_wrap=True, markup=False, highlight=False)


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


def record(objective: Objective, recipe: Recipe, hardware: Hardware, fabric: Fabric) -> None:
    """Have the forward and the backward pass of an objective replayed from a CUDA graph. Raises InputError where there
    is not exactly one CUDA device."""
    if fabric.device.type != "cuda" or fabric.world_size > 1:
        raise InputError(f"`cuda_graph`: expected one CUDA device, found {fabric.world_size} x {fabric.device.type}")
    layout = torch.channels_last if hardware.channels_last else torch.contiguous_format
    shape = recipe.batch, 3, recipe.patch, recipe.patch
    patches = tuple(torch.rand(shape, device=fabric.device).contiguous(memory_format=layout) for _ in range(2))
    half = hardware.precision == "bf16-mixed"
    with torch.autocast("cuda", torch.bfloat16, enabled=half, cache_enabled=False):
        torch.cuda.make_graphed_callables(objective, patches, allow_unused_input=True)


def fit(
    fabric: Fabric,
    model: DRSformer,
    patches: Patches,
    recipe: Recipe,
    run: Run,
    *,
    loss: Loss = l1_loss,
    form: Form = itself,
    validate: Sequence[tuple[str, Sequence[Pair]]] = (),
    protocol: Protocol = "rain200",
    hardware: Hardware = Hardware(),
    schedule: Schedule = Schedule(),
) -> dict[str, Any]:
    """The training loop, which every way of training here uses. Trains `model` in place until `recipe` is done,
    continuing the run if it has begun, and returns the last validation scores, by "folder psnr" and "folder ssim", the
    "iteration" reached, and whether it is "finished", which `cadence.minutes` may have prevented.

    Steps run through the `form` of the model; everything that is validated and saved is the model itself. The first
    process validates, logs and saves; the logged loss is that of its own patches. Raises InputError when the weights
    are no longer numbers; the last checkpoint is then left as it was.
    """
    begun = time.monotonic()
    if recipe.batch % fabric.world_size:
        raise InputError(f"`batch`: expected a multiple of the {fabric.world_size} devices, found {recipe.batch}")
    state = run.restore()
    model = model.to(fabric.device)
    if hardware.channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema)) if recipe.ema else None
    averaged = cast("DRSformer", average.module) if average else model
    objective = Objective(form(model), loss).to(fabric.device)
    learned = loss if isinstance(loss, nn.Module) else nn.Module()  # what the loss itself learns
    parameters = [*model.parameters(), *learned.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, recipe.lr, weight_decay=recipe.weight_decay, fused=fabric.device.type == "cuda"
    )
    if state:
        model.load_state_dict(state["model"])
        learned.load_state_dict(state["loss"])
        optimizer.load_state_dict(state["optimizer"])
        if average:
            average.load_state_dict(state["average"])
    if hardware.compile:
        compile_blocks(objective.network)
    torch.backends.cudnn.benchmark = True  # all patches have one size
    if hardware.cuda_graph:
        record(objective, recipe, hardware, fabric)
    trained, optimizer = fabric.setup(objective, optimizer)
    done, best, scores, scored = (
        (state["iteration"], state["best"], state["scores"], state["scored"]) if state else (0, -math.inf, {}, 0)
    )
    if fabric.is_global_zero:
        run.clean_up(done)
        if state:  # a killed process may not have come to this
            run.save_network("last", averaged, scores if scored == done else {})
    if hardware.workers:
        patches.warm_up(fabric.is_global_zero)

    share = recipe.batch // fabric.world_size
    first = fabric.global_rank * share
    loader = fabric.setup_dataloaders(
        DataLoader(
            patches,
            batch_sampler=[
                range(i * recipe.batch + first, i * recipe.batch + first + share)  # pyright: ignore[reportArgumentType]
                for i in range(done, recipe.iterations)
            ],
            num_workers=hardware.workers,
            persistent_workers=hardware.workers > 0,
            pin_memory=fabric.device.type == "cuda",
        ),
        use_distributed_sampler=False,
    )

    sums: dict[str, Tensor] = {}
    iteration, counted, seconds, saved = done, 0, 0.0, time.monotonic()
    with progress(fabric.is_global_zero, loss="{task.fields[loss]}", speed="{task.fields[speed]}") as bar:
        task = bar.add_task("Training", total=recipe.iterations, completed=done, loss="", speed="")
        started = time.monotonic()
        for iteration, (rainy, clean) in enumerate(loader, done + 1):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate(iteration - 1)
            if hardware.channels_last:
                rainy, clean = (x.contiguous(memory_format=torch.channels_last) for x in (rainy, clean))
            terms = trained(rainy, clean)
            fabric.backward(torch.stack(list(terms.values())).sum())
            fabric.clip_gradients(trained, optimizer, max_norm=recipe.clip, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad()
            if average:
                average.update_parameters(model)
            for name, term in terms.items():
                sums[name] = sums.get(name, torch.zeros_like(term)) + term.detach()
            counted += 1
            bar.advance(task)

            last = iteration == recipe.iterations
            stop = schedule.minutes is not None and fabric.broadcast(time.monotonic() - begun > 60 * schedule.minutes)
            log = last or iteration % schedule.log_every == 0
            score = bool(validate) and (last or iteration % schedule.validate_every == 0)
            save = fabric.is_global_zero and (last or stop or time.monotonic() - saved > 60 * schedule.save_minutes)
            # The device runs behind this loop, which waits for it here and nowhere else.
            if (log or score or save) and not torch.stack([p.isfinite().all() for p in parameters]).all():
                raise InputError(
                    f"the weights are no longer numbers at iteration {iteration}: lower --lr or --clip, "
                    "and give another --output"
                )
            seconds += time.monotonic() - started
            if log:
                means = {name: term.item() / counted for name, term in sums.items()}
                speed = counted * recipe.batch / seconds
                bar.update(task, loss=f"loss {sum(means.values()):.4f}", speed=f"{speed:.1f} patches/s")
                if fabric.is_global_zero:
                    rate = optimizer.param_groups[0]["lr"]
                    run.log(fabric, iteration, {**means, "lr": rate, "patches_per_second": round(speed, 2)})
                sums, counted, seconds = {}, 0, 0.0
            if score and fabric.is_global_zero:
                scores, scored = _scores(averaged, validate, protocol), iteration
                run.log(fabric, iteration, scores)
                mean = float(np.mean([value for name, value in scores.items() if name.endswith(" psnr")]))
                if mean > best:
                    best = mean
                    run.save_network("best", averaged, scores)
            if save:
                run.save_state(
                    {
                        "iteration": iteration,
                        "best": best,
                        "scores": scores,
                        "scored": scored,
                        "model": model.state_dict(),
                        "average": average.state_dict() if average else None,
                        "loss": learned.state_dict(),
                        "optimizer": optimizer.state_dict(),
                    }
                )
                run.save_network("last", averaged, scores if scored == iteration else {})
                saved = time.monotonic()
            if stop:
                break
            started = time.monotonic()
    model.load_state_dict(averaged.state_dict())
    scores = fabric.broadcast(scores)
    if iteration == recipe.iterations:
        finished = "Had finished" if done == iteration else "Finished"
        told = f"{finished} after {iteration} iterations: {run.output / 'last.safetensors'}"
    else:
        told = (
            f"Not finished: stopped by --minutes at iteration {iteration} of {recipe.iterations}. "
            "The same command goes on from there."
        )
    if fabric.is_global_zero:
        console.print(told, soft_wrap=True, highlight=False)
    return {**scores, "iteration": iteration, "finished": iteration == recipe.iterations}


def _scores(network: DRSformer, validate: Sequence[tuple[str, Sequence[Pair]]], protocol: Protocol) -> dict[str, float]:
    """PSNR and SSIM on each folder; 100 dB stands for images restored without any error. Nothing is compiled or tuned
    for the many sizes of whole images."""
    scores = {}
    for name, pairs in validate:
        with torch.compiler.set_stance("force_eager"), torch.backends.cudnn.flags(enabled=True, benchmark=False):
            result = evaluate_model(network, pairs, protocol)
        scores |= {f"{name} psnr": min(result.psnr, 100.0), f"{name} ssim": result.ssim}
    return scores


@dataclass(frozen=True)
class DataOptions:
    """What to learn from besides pairs, and what to validate on.

    Args:
        validate: Folders of pairs to score the network on while it trains.
        validate_limit: Images of each folder to validate on, the first ones.
        protocol: How to measure; rain200 for Rain200L, Rain200H and SPA-Data, did for DID-Data and DDN-Data.
        clean: Folder of further clean photographs to put rain on.
        streaks: Folder of streak images to put on photographs, besides drawn ones and the rain of the pairs.
        rendered: Fraction of the patches that have rain put on a clean background.
        dry: Fraction of the patches that show no rain at all, from which the network learns to leave dry images alone.
    """

    validate: list[Path] | None = None
    validate_limit: int = 20
    protocol: Protocol = "rain200"
    clean: Path | None = None
    streaks: Path | None = None
    rendered: float = 0.0
    dry: float = 0.0

    def __post_init__(self) -> None:
        expect_between("validate_limit", self.validate_limit, 1)

    def sources_of_patches(self) -> dict[str, Any]:
        """Those of its fields that `Patches` takes."""
        return {"clean": self.clean, "streaks": self.streaks, "rendered": self.rendered, "dry": self.dry}

    def validation(self) -> list[tuple[str, list[Pair]]]:
        """Name and pairs of each folder to validate on. Raises InputError for folders of one name, and for an image
        that cannot be read, now and not after the first thousand iterations."""
        folders = self.validate or []
        if len(set(map(short, folders))) < len(folders):
            raise InputError(
                "`validate`: expected folders whose last two names differ, found "
                f"{' '.join(map(str, folders))}; rename one"
            )
        validation = [(short(folder), find_pairs(folder)[: self.validate_limit]) for folder in folders]
        for pair in (pair for _, pairs in validation for pair in pairs):
            pair.load()
        return validation

    def sources(self, *folders: Path) -> list[str]:
        """The names of `folders` and of the further ones that patches come from."""
        return [short(folder) for folder in (*folders, self.clean, self.streaks) if folder]

    def options(self) -> dict[str, Any]:
        """What the result of a run depends on besides the sources."""
        return {
            "rendered": self.rendered,
            "dry": self.dry,
            "validate": [short(folder) for folder in self.validate or []],
            "validate_limit": self.validate_limit,
            "protocol": self.protocol,
        }


def train(
    output: Path,
    data: list[Path] | None = None,
    network: str | None = None,
    init: Path | None = None,
    data_options: Annotated[DataOptions, tyro.conf.OmitArgPrefixes] = DataOptions(),
    recipe: Annotated[Recipe, tyro.conf.OmitArgPrefixes] = Recipe(),
    hardware: Annotated[Hardware, tyro.conf.OmitArgPrefixes] = Hardware(),
    schedule: Annotated[Schedule, tyro.conf.OmitArgPrefixes] = Schedule(),
    form: Annotated[Form, tyro.conf.Suppress] = itself,
) -> dict[str, Any]:
    """Train a network, or continue its training; returns what `fit` does.

    Args:
        output: Folder of the run.
        data: Folders of pairs, in any layout that drsformer.evaluate reads; each is drawn from equally often.
        network: Name of the network to start, see drsformer.config.PRESETS; drsformer if neither this nor --init is
            given.
        init: Checkpoint to start from, in place of a fresh network.
        material: What else to learn from, and what to validate on.
        recipe: How to train.
        hardware: What to train on.
        cadence: How often to validate, log and save, and when to stop.
        form: What the steps run through, see `fit`; only for callers from Python.
    """
    if init and network:
        raise InputError("`init` brings its own network: leave --network out")
    expect_other_files(*networks_of(output), init=init)
    folders = [find_pairs(folder) for folder in data or []]
    validation = data_options.validation()
    patches = Patches(
        folders, recipe, data_options.clean, data_options.streaks, data_options.rendered, data_options.dry
    )
    torch.manual_seed(recipe.seed)
    start = checkpoint.load(init) if init else None
    model = start.model.train() if start else fresh(network or "drsformer")
    options = {
        "network": None if start else network or "drsformer",
        "parent": start.sha256 if start else None,
        "data": data_options.sources(*(data or [])),
        **data_options.options(),
        **dataclasses.asdict(recipe),
        "precision": hardware.precision,
    }
    earlier = start.provenance.get("steps", []) if start else []
    provenance = {
        "trained_on": options["data"],
        "parent": options["parent"],
        "steps": [*earlier, {"command": "drsformer.train", "options": options}],
    }
    fabric = hardware.fabric(output)
    if fabric.is_global_zero:
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        console.print(f"{parameters:.2f} M parameters, {len(patches.backgrounds)} backgrounds, on {fabric.device}")
    return fit(
        fabric,
        model,
        patches,
        recipe,
        Run(output, options, provenance),
        form=form,
        validate=validation,
        protocol=data_options.protocol,
        hardware=hardware,
        schedule=schedule,
    )


def networks_of(output: Path) -> list[Path]:
    """The files in which a run in this folder leaves networks."""
    return [output / f"{name}.safetensors" for name in ("last", "best")]


def fresh(network: str) -> DRSformer:
    """A network by its name in `PRESETS`, with random weights. Raises InputError for an unknown one."""
    try:
        return DRSformer(preset(network))
    except ValueError as error:
        raise InputError(f"`network`: {error}") from None


def short(folder: Path) -> str:
    """The last two parts of a path, links as they are: they name a data set without telling where it lies."""
    return "/".join(Path(os.path.abspath(folder)).parts[1:][-2:])


def first_process_only(scores: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a run for the last line of its command, which one process prints for all."""
    return scores if getattr(rank_zero_only, "rank", 0) == 0 else None


if __name__ == "__main__":
    main(train, __doc__, summary=first_process_only)
