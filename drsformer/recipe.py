"""What a training is asked for: the network, the recipe, the data, the hardware and the schedule. Nothing here loads
PyTorch until a training starts."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from drsformer.config import EXPERTS, SIZE_MULTIPLE, DRSformerConfig
from drsformer.data import Pair, dataset_name, files_of, files_sha256, find_pairs, images_in
from drsformer.metrics import Protocol
from runtime.errors import InputError, expect_between

if TYPE_CHECKING:
    from lightning_fabric import Fabric

LARGEST_SEED = 2**64 - 1
"""Largest seed that PyTorch takes."""


@dataclass(frozen=True)
class Variant:
    """What a named network has in place of its own: the paper's ablations.

    Args:
        topk: Fractions of the channels of a head that the masks of the attention keep, ascending, such as 1/2 4/5; none
            is dense attention.
        feed_forward: Feed-forward network of each block (Table 3).
        mefc: Where there are compensators (Table 4).
        experts: Experts in each step of a compensator (Table 4), the first ones of drsformer.config.EXPERTS.

    Raises:
        InputError: A value is out of range.
    """

    topk: tuple[str, ...] | None = None
    feed_forward: Literal["msfn", "gdfn", "dfn", "fn"] | None = None
    mefc: Literal["early", "late", "both", "none"] | None = None
    experts: int | None = None

    def __post_init__(self) -> None:
        expect_between("experts", 1 if self.experts is None else self.experts, 1, len(EXPERTS))

    def changes(self) -> dict[str, Any]:
        """What is different, for `drsformer.config.preset`."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return given | {"topk": ()} if self.topk == ("none",) else given


def read_config(path: Path) -> DRSformerConfig:
    """The structure that a JSON file describes: a whole one, as `DRSformerConfig.to_dict` gives it, or arguments of
    `DRSformerConfig.regular`, such as {"width": 32, "depths": [2, 3, 3, 4]}.

    Raises:
        InputError: The file holds something else, or the parts do not fit together.
    """
    try:
        found = json.loads(path.read_bytes())
        if "encoder" in found:
            return DRSformerConfig.from_dict(found)
        found = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
        return DRSformerConfig.regular(**found)
    except (ValueError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        raise InputError(
            f"`config`: expected a config of a network, or arguments of DRSformerConfig.regular, as JSON in {path} "
            f"({error})"
        ) from None


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are the released code's.

    Args:
        iterations: Steps of the optimiser in all.
        constant: Steps at the initial learning rate, before the cosine begins; as in the paper, 92 of every 300 if not
            given.
        warmup: Steps over which the rate first rises from zero.
        lr: Initial learning rate. The released code has 3e-4, the paper 1e-4.
        lr_min: Learning rate at the end.
        weight_decay: Weight decay of AdamW.
        batch: Patches in a step, over all devices.
        patch: Height and width of a patch in pixels, a multiple of 8.
        clip: Largest norm of the gradient.
        ema: Decay of the running average of the weights, which is what is validated and saved; 0 for none.
        seed: Seed of the initial weights and of everything random in the patches.

    Raises:
        InputError: A value is out of range.
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
    """What to train on, in the terms of Lightning Fabric.

    Args:
        accelerator: Kind of device; auto takes CUDA or MPS where there is one, else the CPU.
        devices: Number of devices of each machine, or auto; on the CPU, of processes. torchrun decides itself.
        num_nodes: Number of machines. torchrun decides itself.
        precision: Precision of the arithmetic; bf16-mixed computes in bfloat16 and keeps the weights in float32.
        workers: Processes that cut patches, for each device; with 0 the training process itself cuts them.
        channels_last: Keep tensors in NHWC order, which tensor cores and CPUs like.
        compile: Compile the network block by block with torch.compile; equal blocks share their code.
        cuda_graph: Record the passes of a step once and replay them, so that launching some thousand small kernels
            takes no time. On one CUDA device.

    Raises:
        InputError: A value is out of range.
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
        """Launch the processes of a training.

        Args:
            output: Folder that gets TensorBoard's events.

        Returns:
            Fabric in each of the processes, launched.

        Raises:
            InputError: This machine has no such devices, or several machines have no launcher.
        """
        import torch
        from lightning_fabric import Fabric
        from lightning_fabric.loggers.tensorboard import TensorBoardLogger

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
        minutes: Minutes after which to save and stop, finished or not; the same command goes on from there.

    Raises:
        InputError: A value is out of range.
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


@dataclass(frozen=True)
class DataOptions:
    """What to learn from besides pairs, and what to validate on.

    Args:
        validate: Folders of pairs to score the network on while it trains.
        validate_limit: Images of each folder to validate on, the first ones.
        protocol: Protocol of PSNR and SSIM; rain200 for Rain200L, Rain200H and SPA-Data, did for DID-Data and DDN-Data.
        clean: Folder of further clean photographs to put rain on.
        streaks: Folder of streak images to put on photographs, besides drawn ones and the rain of the pairs.
        rendered: Fraction of the patches that have rain put on a clean background.
        dry: Fraction of the patches that show no rain at all, from which the network learns to leave dry images alone.
        compressed: Fraction of the patches that have been through JPEG or H.264, rainy and clean alike, from which the
            network learns to find rain in the noise of a codec and to leave that noise alone. Needs PyAV.

    Raises:
        InputError: A value is out of range.
    """

    validate: list[Path] | None = None
    validate_limit: int = 20
    protocol: Protocol = "rain200"
    clean: Path | None = None
    streaks: Path | None = None
    rendered: float = 0.0
    dry: float = 0.0
    compressed: float = 0.0

    def __post_init__(self) -> None:
        expect_between("validate_limit", self.validate_limit, 1)

    def sources_of_patches(self) -> dict[str, Any]:
        """The fields that `drsformer.patches.Patches` takes, by their names."""
        return {
            "clean": self.clean,
            "streaks": self.streaks,
            "rendered": self.rendered,
            "dry": self.dry,
            "compressed": self.compressed,
        }

    def validation(self) -> list[tuple[str, list[Pair]]]:
        """Name and pairs of each folder to validate on.

        Raises:
            InputError: Two folders have the same name, or an image cannot be read: now and not after the first thousand
                iterations.
        """
        folders = self.validate or []
        if len(set(map(dataset_name, folders))) < len(folders):
            raise InputError(
                "`validate`: expected folders whose last two names differ, found "
                f"{' '.join(map(str, folders))}; rename one"
            )
        validation = [(dataset_name(folder), find_pairs(folder)[: self.validate_limit]) for folder in folders]
        for pair in (pair for _, pairs in validation for pair in pairs):
            pair.load()
        return validation

    def sources(self, *folders: Path) -> list[str]:
        """The names of `folders` and of the further ones that patches come from."""
        return [dataset_name(folder) for folder in (*folders, self.clean, self.streaks) if folder]

    def files_sha256(self, *files: Path) -> str:
        """SHA-256 over the names and sizes of `files` and of those in all folders here."""
        images = [path for folder in (self.clean, self.streaks) if folder for path in images_in(folder)]
        return files_sha256([*files, *images, *files_of(*map(find_pairs, self.validate or []))])

    def options(self) -> dict[str, Any]:
        """What the result of a run depends on besides the sources, ready for JSON."""
        return {
            "rendered": self.rendered,
            "dry": self.dry,
            "compressed": self.compressed,
            "validate": [dataset_name(folder) for folder in self.validate or []],
            "validate_limit": self.validate_limit,
            "protocol": self.protocol,
        }
