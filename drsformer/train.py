"""Train a DRSformer.

    python -m drsformer.train --data Rain200H/train --output runs/rain200h
    python -m drsformer.train --network drsformer-xs --data light/train heavy/train --validate light/val heavy/val \\
        --clean photographs/ --rendered 0.6 --dry 0.05 --lr 1e-3 --patch 64 --output runs/xs
    torchrun --nproc-per-node 4 -m drsformer.train --data DDN/train --precision bf16-mixed --output runs/ddn

The defaults are the recipe of the released code (paper, section 4.1): L1 loss, AdamW, batches of 8 patches of
128x128, flips, 92,000 iterations at a constant rate and 208,000 more on a cosine, gradients clipped at norm 0.01.
The same command continues a run that was stopped, exactly where its last checkpoint was.

Everything random in a patch depends on the seed and the patch's running number alone, so there is no generator state
to save, and a run resumed on the same number of devices sees the same patches. Devices, processes, precision and
gradient synchronisation are Lightning Fabric's.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from lightning_fabric import Fabric
from lightning_fabric.loggers.tensorboard import TensorBoardLogger
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from drsformer import checkpoint
from drsformer.config import SIZE_MULTIPLE, preset
from drsformer.data import Pair, find_pairs
from drsformer.evaluate import evaluate_model
from drsformer.model import DRSformer
from drsformer.rain import (
    Layer,
    LayerSource,
    add_rain,
    crop,
    draw_streaks,
    flip,
    make_layer,
    rain_of_pair,
    read_streaks,
)
from runtime import images
from runtime.cli import InputError, console, main, progress, writing

Loss = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]
"""Named terms whose sum is minimised, from the network and a batch of rainy and clean patches (B, 3, P, P)."""


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are the released code's.

    Args:
        iterations: Steps of the optimiser in all.
        constant: Steps at the initial learning rate, before the cosine begins.
        warmup: Steps over which the rate first rises from zero.
        lr: Initial learning rate. The released code has 3e-4, the paper 1e-4.
        lr_min: Learning rate at the end.
        weight_decay: Of AdamW.
        batch: Patches in a step, on each device.
        patch: Height and width of a patch, a multiple of 8.
        clip: Largest norm of the gradient.
        ema: Decay of the running average of the weights, which is what is validated and saved; 0 for none.
        seed: Of the initial weights and of everything random in the patches.
    """

    iterations: int = 300_000
    constant: int = 92_000
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
        if self.patch < SIZE_MULTIPLE or self.patch % SIZE_MULTIPLE:
            raise InputError(f"--patch: expected a multiple of {SIZE_MULTIPLE}, found {self.patch}")
        for name in ("iterations", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name}: expected at least 1, found {getattr(self, name)}")

    def learning_rate(self, iteration: int) -> float:
        """The rate of a step, counted from 0."""
        if iteration < self.warmup:
            return self.lr * (iteration + 1) / self.warmup
        start = min(max(self.constant, self.warmup), self.iterations - 1)
        turn = max(0, iteration - start) / (self.iterations - start)
        return self.lr_min + (self.lr - self.lr_min) * (1 + math.cos(math.pi * turn)) / 2


@dataclass(frozen=True)
class Hardware:
    """What to train on; as Lightning Fabric names it.

    Args:
        accelerator: cpu, cuda, mps or auto.
        devices: How many devices, or auto; on the CPU, how many processes.
        num_nodes: How many machines.
        precision: 32-true, bf16-mixed or 16-mixed.
        workers: Processes that cut patches, for each device; none means in the training process itself.
        channels_last: Keep tensors in NHWC order, which tensor cores like.
        compile: Compile the network with torch.compile.
    """

    accelerator: str = "auto"
    devices: str = "auto"
    num_nodes: int = 1
    precision: str = "32-true"
    workers: int = 0
    channels_last: bool = False
    compile: bool = False

    def fabric(self, output: Path) -> Fabric:
        devices = int(self.devices) if self.devices.isdigit() else self.devices
        fabric = Fabric(
            accelerator=self.accelerator, devices=devices, num_nodes=self.num_nodes, precision=self.precision,  # pyright: ignore[reportArgumentType] - a string of the user's
            loggers=TensorBoardLogger(output, name=None, version=""),
        )  # fmt: skip
        fabric.launch()
        return fabric


class Patches(Dataset[tuple[Tensor, Tensor]]):
    """Rainy and clean patches, (3, P, P) float32 RGB in [0, 1] each, as a function of a running number.

    A patch is cut out of a pair of one of the folders, each folder equally likely; or, with probability `rendered`, is
    a clean background (a target, or one of the further `clean` photographs) with rain from a pair of a folder, or from
    `streaks`, put on it; or, with probability `dry`, shows the same clean background twice. Decoded images
    are kept in memory until they fill `cache_bytes`.
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
        self.folders, self.recipe, self.rendered, self.dry = folders, recipe, rendered, dry
        self.backgrounds: list[Pair | Path] = [pair for folder in folders for pair in folder]
        self.backgrounds += images.list_images(clean) if clean else []
        if not self.backgrounds:
            raise InputError("nothing to train on: give --data, or --clean with --rendered 1")
        if not folders and rendered + dry < 1:
            raise InputError(f"without --data all patches are rendered or dry: expected --rendered and --dry to add "
                             f"up to 1, found {rendered + dry:g}")  # fmt: skip
        self.layers: list[LayerSource] = [self._rain_of(folder) for folder in folders]
        if streaks:
            self.layers.append(read_streaks(streaks))
        self.layers = self.layers or [draw_streaks]
        self.cache: dict[Path, NDArray[np.uint8]] = {}
        self.cache_left = cache_bytes

    def __len__(self) -> int:
        return 1 << 62

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.recipe.seed, number))
        kind, size = rng.random(), self.recipe.patch
        if kind < self.rendered:
            clean = self._cut(rng, self.backgrounds, size, size)[..., -3:]
            rainy = add_rain(clean, make_layer(rng, size, size, self.layers))
        elif kind < self.rendered + self.dry:
            rainy = clean = self._cut(rng, self.backgrounds, size, size)[..., -3:]
        else:
            folder = self.folders[int(rng.integers(len(self.folders)))]
            rainy, clean = np.split(self._cut(rng, folder, size, size), 2, axis=-1)
        as_tensor = lambda patch: torch.from_numpy(patch.transpose(2, 0, 1) / np.float32(255))  # noqa: E731
        return as_tensor(rainy), as_tensor(clean)

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
        key = item if isinstance(item, Path) else item.input
        if key in self.cache:
            return self.cache[key]
        image = images.read_rgb(item) if isinstance(item, Path) else np.concatenate(item.load(), axis=-1)
        if image.nbytes <= self.cache_left:
            self.cache_left -= image.nbytes
            self.cache[key] = image
        return image

    def _rain_of(self, folder: Sequence[Pair]) -> LayerSource:
        def source(rng: np.random.Generator, height: int, width: int) -> Layer:
            rainy, clean = np.split(self._cut(rng, folder, height, width), 2, axis=-1)
            return rain_of_pair(rainy, clean).astype(np.float32)

        return source


def l1_loss(model: nn.Module, rainy: Tensor, clean: Tensor) -> dict[str, Tensor]:
    """The paper's loss (Eq. 1)."""
    return {"l1": F.l1_loss(model(rainy), clean)}


class Run:
    """One training run in its folder.

    `state.pt` (everything needed to continue), `log.jsonl` (one object a line), TensorBoard's event file,
    `last.safetensors` (the averaged weights) and, where there is validation, `best.safetensors`.
    """

    def __init__(self, output: Path, options: dict[str, Any]) -> None:
        self.output, self.options = output, options
        self.log_path, self.state_path = output / "log.jsonl", output / "state.pt"

    def save(self, state: dict[str, Any]) -> None:
        with writing(self.state_path) as temporary:
            torch.save({**state, "options": json.dumps(self.options)}, temporary)

    def restore(self) -> dict[str, Any] | None:
        """The state of the last checkpoint, or None at the start of a run; the log is cut back to it. Raises InputError
        where the run was started with other options."""
        if not self.state_path.exists():
            self.log_path.unlink(missing_ok=True)
            return None
        try:
            state = torch.load(self.state_path, map_location="cpu", weights_only=True)
            before = json.loads(state.pop("options"))
        except Exception as error:  # whatever a damaged file provokes
            raise InputError(f"{self.state_path}: damaged ({error}); remove it to start again") from None
        changed = [name for name in self.options if self.options[name] != before.get(name)]
        if changed:
            name = changed[0]
            raise InputError(f"{self.output} holds a run with {name}={before.get(name)}, not {self.options[name]}; "
                             "give the same options to continue it, or another --output")  # fmt: skip
        lines = self.log_path.read_text().splitlines() if self.log_path.exists() else []
        kept = [line for line in lines if json.loads(line)["iteration"] <= state["iteration"]]
        with writing(self.log_path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))
        return state

    def log(self, fabric: Fabric, iteration: int, values: dict[str, float]) -> None:
        fabric.log_dict(values, step=iteration)
        with open(self.log_path, "a") as file:
            file.write(json.dumps({"iteration": iteration, **values}) + "\n")


def fit(
    fabric: Fabric,
    model: DRSformer,
    patches: Patches,
    recipe: Recipe,
    run: Run,
    provenance: dict[str, Any],
    *,
    loss: Loss = l1_loss,
    validate: Sequence[tuple[str, Sequence[Pair]]] = (),
    validate_every: int = 1000,
    log_every: int = 100,
    save_minutes: float = 3.0,
    hardware: Hardware = Hardware(),
) -> dict[str, float]:
    """The training loop, which every way of training here uses. Trains `model` in place until `recipe` is done,
    continuing the run if it has begun, and returns the last validation scores.

    Raises InputError when the loss is no longer a number; the last checkpoint is left as it was.
    """
    if hardware.channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema)).to(fabric.device)
    averaged = cast("DRSformer", average.module)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    state = run.restore()
    if state:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
    done, best = (state["iteration"], state["best"]) if state else (0, -math.inf)
    if hardware.compile:
        model.compile()
    trained, optimizer = fabric.setup(model, optimizer)

    group = recipe.batch * fabric.world_size  # patches of one iteration over all devices
    first = recipe.batch * fabric.global_rank
    loader = fabric.setup_dataloaders(
        DataLoader(
            patches,
            batch_sampler=[range(i * group + first, i * group + first + recipe.batch)  # pyright: ignore[reportArgumentType]
                           for i in range(done, recipe.iterations)],
            num_workers=hardware.workers,
            persistent_workers=hardware.workers > 0,
            pin_memory=fabric.device.type == "cuda",
        ),
        use_distributed_sampler=False,
    )  # fmt: skip

    def save(iteration: int) -> None:
        checkpoint.save(run.output / "last.safetensors", averaged, {**provenance, "scores": scores})
        run.save({"iteration": iteration, "best": best, "model": model.state_dict(), "average": average.state_dict(),
                  "optimizer": optimizer.state_dict()})  # fmt: skip

    scores: dict[str, float] = {}
    sums: dict[str, Tensor] = {}
    counted = 0
    since, saved = time.monotonic(), time.monotonic()
    with progress(loss="loss {task.fields[loss]:.4f}", speed="{task.fields[speed]:.1f} patches/s") as bar:
        task = bar.add_task("Training", total=recipe.iterations, completed=done, loss=math.nan, speed=0.0)
        for iteration, (rainy, clean) in enumerate(loader, done + 1):
            for parameters in optimizer.param_groups:
                parameters["lr"] = recipe.learning_rate(iteration - 1)
            if hardware.channels_last:
                rainy, clean = (x.contiguous(memory_format=torch.channels_last) for x in (rainy, clean))
            terms = loss(trained, rainy, clean)
            total = torch.stack(list(terms.values())).sum()
            fabric.backward(total)
            fabric.clip_gradients(trained, optimizer, max_norm=recipe.clip, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
            for name, term in terms.items():
                sums[name] = sums.get(name, torch.zeros_like(term)) + term.detach()
            counted += 1
            bar.advance(task)

            if iteration % log_every == 0 or iteration == recipe.iterations:
                means = {name: term.item() / counted for name, term in sums.items()}
                if not all(math.isfinite(mean) for mean in means.values()):
                    raise InputError(f"the loss is not a number at iteration {iteration}; lower --lr or --clip, "
                                     f"and start again from {run.output / 'last.safetensors'}")  # fmt: skip
                speed = counted * group / (time.monotonic() - since)
                since, sums, counted = time.monotonic(), {}, 0
                bar.update(task, loss=sum(means.values()), speed=speed)
                if fabric.is_global_zero:
                    rate = optimizer.param_groups[0]["lr"]
                    run.log(fabric, iteration, {**means, "lr": rate, "patches_per_second": round(speed, 2)})
            last = iteration == recipe.iterations
            if fabric.is_global_zero and validate and (iteration % validate_every == 0 or last):
                scores = {}
                for name, pairs in validate:
                    result = evaluate_model(averaged, pairs)
                    scores |= {f"{name} psnr": result.psnr, f"{name} ssim": result.ssim}
                run.log(fabric, iteration, scores)
                mean = float(np.mean([value for name, value in scores.items() if name.endswith("psnr")]))
                if mean > best:
                    best = mean
                    checkpoint.save(run.output / "best.safetensors", averaged, {**provenance, "scores": scores})
            if fabric.is_global_zero and (last or time.monotonic() - saved > 60 * save_minutes):
                save(iteration)
                saved = time.monotonic()
    fabric.barrier()
    model.load_state_dict(averaged.state_dict())
    return scores


def train(
    output: Path,
    data: list[Path] | None = None,
    network: str = "drsformer",
    init: Path | None = None,
    validate: list[Path] | None = None,
    clean: Path | None = None,
    streaks: Path | None = None,
    rendered: float = 0.0,
    dry: float = 0.0,
    recipe: Annotated[Recipe, tyro.conf.OmitArgPrefixes] = Recipe(),
    hardware: Annotated[Hardware, tyro.conf.OmitArgPrefixes] = Hardware(),
    validate_every: int = 1000,
    validate_limit: int = 20,
    log_every: int = 100,
    save_minutes: float = 3.0,
) -> dict[str, float]:
    """Train a network, or continue its training; returns the last validation scores by folder.

    Args:
        output: Folder of the run: checkpoints, log, TensorBoard events.
        data: Folders of pairs, in any layout that drsformer.evaluate reads; each is drawn from equally often.
        network: Name of the network to start, see drsformer.config.PRESETS.
        init: Checkpoint to start from, in place of a fresh network.
        validate: Folders of pairs to score the network on while it trains.
        clean: Folder of further clean photographs to put rain on.
        streaks: Folder of streak images to put on photographs, besides the rain of the pairs.
        rendered: Fraction of the patches that have rain put on a clean background.
        dry: Fraction of the patches that show no rain at all, from which the network learns to leave dry images alone.
        recipe: How to train.
        hardware: What to train on.
        validate_every: Iterations between validations.
        validate_limit: Images of each folder to validate on.
        log_every: Iterations between lines of the log.
        save_minutes: Minutes between checkpoints; a run that is killed loses no more than that.
    """
    folders = [find_pairs(folder) for folder in data or []]
    validation = [(_short(folder), find_pairs(folder)[:validate_limit]) for folder in validate or []]
    patches = Patches(folders, recipe, clean, streaks, rendered, dry)
    torch.manual_seed(recipe.seed)
    start = checkpoint.load(init) if init else None
    try:
        model = start.model.train() if start else DRSformer(preset(network))
    except ValueError as error:
        raise InputError(f"--network: {error}") from None
    options = {
        "network": network if start is None else None,
        "parent": start.sha256 if start else None,
        "data": [_short(folder) for folder in data or []],
        "clean": _short(clean) if clean else None,
        "streaks": _short(streaks) if streaks else None,
        "rendered": rendered,
        "dry": dry,
        **dataclasses.asdict(recipe),
        "precision": hardware.precision,
    }
    step = {"command": "drsformer.train", "options": options}
    provenance = {
        "trained_on": options["data"] + [name for name in (options["clean"], options["streaks"]) if name],
        "parent": options["parent"],
        "steps": [*(start.provenance.get("steps", []) if start else []), step],
    }
    fabric = hardware.fabric(output)
    if fabric.is_global_zero:
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        console.print(f"{parameters:.2f} M parameters, {len(patches.backgrounds)} backgrounds, on {fabric.device}")
    return fit(
        fabric, model, patches, recipe, Run(output, options), provenance, validate=validation, hardware=hardware,
        validate_every=validate_every, log_every=log_every, save_minutes=save_minutes,
    )  # fmt: skip


def _short(folder: Path) -> str:
    """The last two parts of a path: they name a data set, and keep a machine's other folders out of the file."""
    return "/".join(folder.resolve().parts[-2:])


if __name__ == "__main__":
    main(train, __doc__, summary=dict)
