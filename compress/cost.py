"""What a network costs: parameters, multiply-accumulates and, on request, milliseconds.

    python -m compress.cost --weights weights/drsformer-xs.safetensors
    python -m compress.cost --weights pruned.safetensors --latency --size 320x480
    python -m compress.cost --weights pruned.safetensors --vs full.safetensors --latency

MACs are counted for one image of 256x256, as the paper counts them (its "FLOPs"): 242.98 G for the released network,
every product of matrices or channels of the readable network once, norms and activations not at all. They follow from
the config alone, by formula, so that a search can ask thousands of times; the tests hold the formula against PyTorch's
counter.

MACs are not time. --latency exports the network, by `export.onnx` as it ships, and times it in ONNX Runtime on the CPU:
warm, the median of several runs, which alternate between the two networks where there are two. MACs are told by module
and by kind of layer, milliseconds for the network as a whole.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from drsformer import checkpoint
from drsformer.config import NO_EXPERT, SIZE_MULTIPLE, BlockConfig, DRSformerConfig, LevelConfig, MEFCConfig
from drsformer.model import DRSformer
from export.folding import fold
from export.graph import to_onnx
from export.topk import with_pattern
from runtime.cli import main, parse_size, progress
from runtime.ort import OrtSession
from runtime.timing import alternate

SIDE = 256
"""Height and width of the image for which MACs are told."""

PARTS = ("attention", "ffn", "mefc", "resampling")
"""What costs: the parts of the blocks, the compensators, and all convolutions between the levels, with the first and
the last one."""

SECONDS = 10.0
"""How long networks are timed together, see `runtime.timing.alternate`."""


class Item(NamedTuple):
    """The cost of some layers of one kind, such as "ffn 1x1", in one module of the network. MACs of one image."""

    module: str
    kind: str
    params: int
    macs: int

    @property
    def part(self) -> str:
        """One of `PARTS`."""
        return self.kind.split()[0]


def items(config: DRSformerConfig, height: int = SIDE, width: int = SIDE) -> Iterator[Item]:
    """The cost of a network, part by part, for an image of this size, multiples of 8."""
    (e1, e2, e3), latent, (d3, d2, d1), (u3, u2, u1) = config.encoder, config.latent, config.decoder, config.up
    full, half, quarter, eighth = (height * width // 4**i for i in range(4))

    def level(module: str, level: LevelConfig, pixels: int) -> Iterator[Item]:
        for block in level.blocks:
            yield from _attention(module, level.width, block, len(config.topk), pixels)
            yield from _feed_forward(module, level.width, block.hidden, config.feed_forward, pixels)

    def conv(module: str, inputs: int, outputs: int, kernel: int, pixels: int) -> Item:
        params = inputs * outputs * kernel * kernel
        return Item(module, "resampling", params, params * pixels)

    yield conv("patch_embed", 3, e1.width, 3, full)
    yield from _mefc("mefc_early", e1.width, config.mefc_early, full)
    yield from level("encoder_level1", e1, full)
    yield conv("down1_2", e1.width, e2.width // 4, 3, full)
    yield from level("encoder_level2", e2, half)
    yield conv("down2_3", e2.width, e3.width // 4, 3, half)
    yield from level("encoder_level3", e3, quarter)
    yield conv("down3_4", e3.width, latent.width // 4, 3, quarter)
    yield from level("latent", latent, eighth)
    yield conv("up4_3", latent.width, 4 * u3, 3, eighth)
    yield conv("reduce_chan_level3", u3 + e3.width, d3.width, 1, quarter)
    yield from level("decoder_level3", d3, quarter)
    yield conv("up3_2", d3.width, 4 * u2, 3, quarter)
    yield conv("reduce_chan_level2", u2 + e2.width, d2.width, 1, half)
    yield from level("decoder_level2", d2, half)
    yield conv("up2_1", d2.width, 4 * u1, 3, half)
    yield from level("decoder_level1", d1, full)
    yield from _mefc("mefc_late", d1.width, config.mefc_late, full)
    yield conv("output", d1.width, 3, 3, full)


def _attention(module: str, C: int, block: BlockConfig, masks: int, pixels: int) -> Iterator[Item]:
    inner = block.heads * block.head_dim
    norm = 2 * C
    yield Item(module, "attention 1x1", 4 * C * inner + norm, 4 * C * inner * pixels)
    yield Item(module, "attention depthwise", 27 * inner, 27 * inner * pixels)
    products = 1 + max(1, masks)  # of Q and K, then of every mask's matrix and V
    yield Item(module, "attention products", block.heads + masks, products * inner * block.head_dim * pixels)


def _feed_forward(module: str, C: int, hidden: int, kind: str, pixels: int) -> Iterator[Item]:
    pointwise, depthwise = {
        "msfn": (4, 2 * (9 + 25) + 2 * (9 + 25)),
        "gdfn": (3, 2 * 9),
        "dfn": (2, 9),
        "fn": (2, 0),
    }[kind]
    norm = 2 * C
    yield Item(module, "ffn 1x1", pointwise * C * hidden + norm, pointwise * C * hidden * pixels)
    yield Item(module, "ffn depthwise", depthwise * hidden, depthwise * hidden * pixels)


def _mefc(module: str, C: int, config: MEFCConfig | None, pixels: int) -> Iterator[Item]:
    if config is None:
        return
    gates = sum(len(step) for step in config.steps)
    gate = (C + gates) * config.gate_hidden  # once an image
    body = C * C + sum(_expert(name, C) for step in config.steps for name in step)
    yield Item(module, "mefc", gate + config.gate_hidden + gates + body, gate + body * pixels)


def _expert(name: str, C: int) -> int:
    """Weights of an expert with its part of the convolution that joins the experts."""
    if name == NO_EXPERT:
        return 0
    depthwise = C * int(name[-1]) ** 2
    layers = {"sep": 2, "dil": 1, "avg": 0}[name[:3]]
    return layers * (depthwise + C * C) + C * C


def macs(config: DRSformerConfig, height: int = SIDE, width: int = SIDE) -> int:
    """Multiply-accumulates for one image."""
    return sum(item.macs for item in items(config, height, width))


def params(config: DRSformerConfig) -> int:
    """Numbers that the network learned."""
    return sum(item.params for item in items(config))


@dataclass(frozen=True)
class Latency:
    """Milliseconds an image: the median of the runs, and the quartiles as the spread."""

    ms: float
    low: float
    high: float
    runs: int

    def __str__(self) -> str:
        return f"{self.ms:.1f} ms (quartiles {self.low:.1f} to {self.high:.1f}, {self.runs} runs)"


def export_session(network: DRSformer, size: tuple[int, int]) -> OrtSession:
    """The network as `export.onnx` exports it, for images of this size, in ONNX Runtime on the CPU."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "network.onnx"
        onnx.save(to_onnx(fold(with_pattern(network, "threshold")), size=size), path)
        return OrtSession(path, "cpu")


def time_sessions(sessions: Sequence[OrtSession], size: tuple[int, int]) -> list[Latency]:
    """Time networks on an image of this size: in turn, so that what disturbs the machine disturbs all of them alike."""
    batch = np.random.default_rng(0).random((1, 3, *size), dtype=np.float32)
    seconds = alternate([functools.partial(session.run, batch) for session in sessions], SECONDS)
    quartiles = 1000 * np.quantile(seconds, (0.25, 0.5, 0.75), axis=1).T
    return [Latency(middle, low, high, seconds.shape[1]) for low, middle, high in quartiles.tolist()]


def time_networks(networks: Sequence[DRSformer], size: tuple[int, int]) -> list[Latency]:
    """Export networks as they ship and time them, see `time_sessions`."""
    with progress() as bar:
        sessions = [export_session(network, size) for network in bar.track(networks, description="Exporting")]
    return time_sessions(sessions, size)


@dataclass(frozen=True)
class Cost:
    """What a network costs. `latency` is None where it was not measured."""

    weights: Path
    items: tuple[Item, ...]
    latency: Latency | None = None

    @property
    def params(self) -> int:
        return sum(item.params for item in self.items)

    @property
    def macs(self) -> int:
        return sum(item.macs for item in self.items)

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        summary: dict[str, Any] = {"params": self.params, "gmacs": round(self.macs / 1e9, 4)}
        if self.latency:
            summary |= {
                "ms": round(self.latency.ms, 3),
                "ms_quartiles": [round(self.latency.low, 3), round(self.latency.high, 3)],
            }
        return summary

    def tables(self) -> list[Table]:
        """For people: by module and by kind."""
        modules = Table("module", title=f"{escape(str(self.weights))}: million MACs at {SIDE}x{SIDE}")
        parts = [part for part in PARTS if any(item.part == part for item in self.items)]
        kinds = Table("kind")
        for column in (*parts, "all", "parameters"):
            modules.add_column(column, justify="right")
        for column in ("million MACs", "share", "parameters"):
            kinds.add_column(column, justify="right")
        for module in (*dict.fromkeys(item.module for item in self.items), "all"):
            if module == "all":
                modules.add_section()
            chosen = [item for item in self.items if module in (item.module, "all")]
            counts = [sum(item.macs for item in chosen if item.part == part) for part in parts]
            modules.add_row(
                module,
                *(f"{count / 1e6:.0f}" if count else "" for count in counts),
                f"{sum(counts) / 1e6:.0f}",
                str(sum(item.params for item in chosen)),
            )
        for kind in dict.fromkeys(item.kind for item in sorted(self.items, key=lambda item: PARTS.index(item.part))):
            chosen = [item for item in self.items if item.kind == kind]
            count = sum(item.macs for item in chosen)
            kinds.add_row(
                kind, f"{count / 1e6:.0f}", f"{count / self.macs:.1%}", str(sum(item.params for item in chosen))
            )
        return [modules, kinds]


@dataclass(frozen=True)
class Costs:
    """One network, or two to compare."""

    network: Cost
    vs: Cost | None = None

    def ratios(self) -> dict[str, float]:
        """Cost of the one for each unit of the other's."""
        assert self.vs
        mine, other = self.network.summary(), self.vs.summary()
        return {name: round(mine[name] / other[name], 4) for name in ("params", "gmacs", "ms") if name in mine}

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        if self.vs is None:
            return self.network.summary()
        return {**self.network.summary(), "vs": self.vs.summary(), "ratio": self.ratios()}


def cost(weights: Path, latency: bool = False, size: str = f"{SIDE}x{SIDE}", vs: Path | None = None) -> Costs:
    """Count the parameters and MACs of a checkpoint, and time it.

    Args:
        weights: Checkpoint, .safetensors or the authors' .pth.
        latency: Export it and time it as a whole in ONNX Runtime on the CPU.
        size: Height and width of the image that is timed. MACs are always told at 256x256.
        vs: A second checkpoint to compare with.
    """
    height_width = parse_size("size", size, SIZE_MULTIPLE)
    paths = [weights] if vs is None else [weights, vs]
    networks = [checkpoint.load(path).model for path in paths]
    times = time_networks(networks, height_width) if latency else [None] * len(paths)
    costs = Costs(
        *(
            Cost(path, tuple(items(network.config)), taken)
            for path, network, taken in zip(paths, networks, times, strict=True)
        )
    )
    for each in (costs.network, costs.vs):
        if each:
            Console().print(*each.tables())
            if each.latency:
                print(f"{each.weights}: {each.latency} at {size} in ONNX Runtime on the CPU")
    if vs:
        print(f"{weights} of {vs}: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in costs.ratios().items()))
    return costs


if __name__ == "__main__":
    main(cost, __doc__, summary=Costs.summary)
