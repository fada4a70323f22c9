"""Milliseconds of networks as `export.onnx` exports them, in ONNX Runtime on the CPU, measured or estimated from parts.

A measurement takes seconds and an export more, so pruning asks an estimate, `latency_model`, by what the parts of the
network took when they were timed.
"""

from __future__ import annotations

import functools
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch

from compress.step_cache import NO_CACHE, StepCache
from drsformer.config import BlockConfig, DRSformerConfig
from drsformer.counts import items
from drsformer.model import DRSformer
from export.folding import fold
from export.graph import to_onnx
from export.topk import with_pattern
from runtime.ort import OrtSession
from runtime.pixels import Size
from runtime.progress import OnProgress, silent, track
from runtime.timing import alternate

TIMING_SECONDS = 10.0
"""How long networks are timed together, see `runtime.timing.alternate`."""

MIN_PART_MS = 1e-3
"""Milliseconds that a part of a network takes at least, whatever the noise: it is never free."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds an image: the median of the runs, and the quartiles as the spread."""

    ms: float
    low: float
    high: float
    runs: int

    def __str__(self) -> str:
        return f"{self.ms:.1f} ms (quartiles {self.low:.1f} to {self.high:.1f}, {self.runs} runs)"


def export_session(network: DRSformer, size: Size | None, on_progress: OnProgress = silent) -> OrtSession:
    """The network as `export.onnx` exports it, for images of this size or of any, in ONNX Runtime on the CPU."""
    on_progress("Exporting", 0, 1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "network.onnx"
        onnx.save(to_onnx(fold(with_pattern(network, "threshold")), size=size), path)
        session = OrtSession(path, "cpu")
    on_progress("Exporting", 1, 1)
    return session


def time_sessions(sessions: Sequence[OrtSession], size: Size, on_progress: OnProgress = silent) -> list[Latency]:
    """Time networks on an image of this size: in turn, so that what disturbs the machine disturbs all of them alike."""
    batch = np.random.default_rng(0).random((1, 3, *size), dtype=np.float32)
    calls = [functools.partial(session.run, batch) for session in sessions]
    seconds = alternate(calls, TIMING_SECONDS, on_progress=on_progress)
    quartiles = 1000 * np.quantile(seconds, (0.25, 0.5, 0.75), axis=1).T
    return [Latency(middle, low, high, seconds.shape[1]) for low, middle, high in quartiles.tolist()]


def time_networks(networks: Sequence[DRSformer], size: Size, on_progress: OnProgress = silent) -> list[Latency]:
    """Export networks and time them, see `time_sessions`."""
    exported = track(networks, len(networks), "Exporting", on_progress)
    return time_sessions([export_session(network, size) for network in exported], size, on_progress)


def latency_model(
    config: DRSformerConfig, size: Size, cache: StepCache = NO_CACHE, on_progress: OnProgress = silent
) -> Callable[[DRSformerConfig], float]:
    """Estimate the milliseconds of networks pruned from this one: MACs and channels of the residual path, each counted
    with what one took where it is in the network.

    Measured once, as what it adds to a network without blocks: for each level a block of its largest widths,
    the same with hardly any feed-forward network, and with hardly any attention either, which leaves LayerNorms and
    additions; and the compensators.

    Args:
        config: Of the network that is to be pruned.
        size: Height and width of the image that is timed, multiples of 8.
        cache: Where the measurement is kept.
        on_progress: See `runtime.progress`.

    Returns:
        A function from the config of a pruned network to its estimated milliseconds.
    """
    nothing = "resampling", "resampling"
    probes: dict[tuple[str, str], DRSformerConfig] = {nothing: _with_blocks(config, {})}
    twins: dict[str, str] = {}
    for module, level in config.levels().items():
        encoder = module.replace("decoder", "encoder")
        if module != encoder and level == config.levels()[encoder]:
            twins[module] = encoder
        elif level.blocks:
            most = {
                name: max(getattr(block, name) for block in level.blocks) for name in ("heads", "head_dim", "hidden")
            }
            block = BlockConfig(**most)
            thin = replace(block, hidden=2 - block.hidden % 2)
            bare = replace(thin, heads=1, head_dim=1)
            for part, probe in (("ffn", block), ("attention", thin), ("stream", bare)):
                probes[module, part] = _with_blocks(config, {module: (probe,)})
    for module in ("mefc_early", "mefc_late"):
        if mefc := getattr(config, module):
            probes[module, "mefc"] = replace(_with_blocks(config, {}), **{module: mefc})

    def measure() -> list[float]:
        networks = [DRSformer(probe) for probe in probes.values()]
        return [latency.low for latency in time_networks(networks, size, on_progress)]  # least disturbed by others

    ms = dict(zip(probes, cache.json("parts", measure), strict=True))
    rates = {}
    for (module, part), probe in probes.items():
        without = {"ffn": (module, "attention"), "attention": (module, "stream")}.get(part, nothing)
        before = _sizes(probes[without]) if (module, part) != nothing else {}
        added = _sizes(probe)[module, part] - before.get((module, part), 0)
        spent = ms[module, part] - (ms[without] if before else 0)
        rates[module, part] = max(spent, MIN_PART_MS) / added if added else 0.0

    def rate(module: str, part: str) -> float:
        return rates[twins.get(module, module), part]

    def estimate(pruned: DRSformerConfig) -> float:
        return sum(rate(*part) * size for part, size in _sizes(pruned).items())

    return estimate


def _sizes(config: DRSformerConfig) -> dict[tuple[str, str], int]:
    """By module and part what its time grows with: MACs, such as of ("latent", "ffn"), all resampling being one part;
    and of ("latent", "stream") the channels of the residual path, once for each block."""
    sizes: dict[tuple[str, str], int] = defaultdict(int)
    for item in items(config):
        sizes["resampling" if item.part == "resampling" else item.module, item.part] += item.macs
    for module, level in config.levels().items():
        if level.blocks:
            sizes[module, "stream"] = level.width * len(level.blocks)
    return sizes


def _with_blocks(config: DRSformerConfig, blocks: Mapping[str, tuple[BlockConfig, ...]]) -> DRSformerConfig:
    """The same widths with these blocks only, by module, and no MEFC."""
    levels = {module: replace(level, blocks=blocks.get(module, ())) for module, level in config.levels().items()}
    return config.with_levels(levels, mefc_early=None, mefc_late=None)
