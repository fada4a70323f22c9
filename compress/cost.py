"""What a network costs: parameters, multiply-accumulates and, on request, milliseconds.

    python -m compress.cost --weights weights/drsformer-xs.safetensors
    python -m compress.cost --weights pruned.safetensors --latency --size 320x480
    python -m compress.cost --weights pruned.safetensors --vs full.safetensors --latency

MACs are counted for one image of 256x256, as the paper counts them (its "FLOPs", see `drsformer.counts`): 242.98 G for
the released network.

MACs are not time. --latency exports the network, by `export.onnx` as it ships, and times it in ONNX Runtime on the CPU:
warm, the median of several runs, which alternate between the two networks where there are two. MACs are listed by
module and by kind of layer, milliseconds for the network as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.table import Table

from compress.options import expect_multiples
from drsformer.counts import PARTS, SIDE, Item, items
from runtime.cli import hxw, main, progress_shown, table_of
from runtime.pixels import Size, size_text
from runtime.progress import OnProgress, silent, track

if TYPE_CHECKING:  # it loads PyTorch, which takes its time
    from compress.latency import Latency
    from drsformer.model import DRSformer


@dataclass(frozen=True)
class Cost:
    """What the network of a checkpoint costs: its items for an image of 256x256, and its latency where it was
    measured."""

    weights: Path
    items: tuple[Item, ...]
    latency: Latency | None = None
    weights_key: str | None = None

    @property
    def params(self) -> int:
        """Numbers that the network has learned."""
        return sum(item.params for item in self.items)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for an image of 256x256."""
        return sum(item.macs for item in self.items)

    def modules(self) -> dict[str, dict[str, float]]:
        """Parameters and GMAC of each module, in the order in which an image passes them, and the GMAC of its parts."""
        found = {}
        for module in dict.fromkeys(item.module for item in self.items):
            mine = [item for item in self.items if item.module == module]
            parts = {part: [item.macs for item in mine if item.part == part] for part in PARTS}
            found[module] = {
                "params": sum(item.params for item in mine),
                "gmacs": round(sum(item.macs for item in mine) / 1e9, 6),
                **{part: round(sum(macs) / 1e9, 6) for part, macs in parts.items() if macs},
            }
        return found

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        summary: dict[str, Any] = {
            "params": self.params,
            "gmacs": round(self.macs / 1e9, 4),
            "modules": self.modules(),
        }
        if self.latency:
            summary |= {
                "ms": round(self.latency.ms, 3),
                "ms_quartiles": [round(self.latency.low, 3), round(self.latency.high, 3)],
            }
        return summary


@dataclass(frozen=True)
class Costs:
    """One network, or two to compare."""

    network: Cost
    vs: Cost | None = None

    def __iter__(self) -> Iterator[Cost]:
        return iter([self.network] if self.vs is None else [self.network, self.vs])

    def ratios(self) -> dict[str, float]:
        """Cost of the one for each unit of the other's; empty where there is no other."""
        if self.vs is None:
            return {}
        mine, other = self.network.summary(), self.vs.summary()
        return {name: round(mine[name] / other[name], 4) for name in ("params", "gmacs", "ms") if name in mine}

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        if self.vs is None:
            return self.network.summary()
        return {**self.network.summary(), "vs": self.vs.summary(), "ratio": self.ratios()}


def count(
    weights: Path, vs: Path | None = None, weights_key: str | None = None, on_progress: OnProgress = silent
) -> Costs:
    """Count the parameters and MACs of a checkpoint, and of a second one to compare with.

    Args:
        weights: The checkpoint.
        vs: The second one.
        weights_key: Key of the weights to take where the first one holds several.
        on_progress: See `runtime.progress`.

    Raises:
        InputError: A checkpoint cannot be read.
    """
    costs = [Cost(weights, (), weights_key=weights_key), *([Cost(vs, ())] if vs else [])]
    loaded = _networks(costs, on_progress)
    return Costs(*(replace(each, items=tuple(items(one.config))) for each, one in zip(costs, loaded, strict=True)))


def _networks(costs: Sequence[Cost], on_progress: OnProgress) -> list[DRSformer]:
    on_progress("Loading", 0, len(costs))  # PyTorch first, which takes its time
    from drsformer import checkpoint

    loading = track(costs, len(costs), "Loading", on_progress)
    return [checkpoint.load(each.weights, each.weights_key).model for each in loading]


def time_costs(costs: Costs, size: Size = (SIDE, SIDE), on_progress: OnProgress = silent) -> Costs:
    """The same with the latency of each network, exported and timed in ONNX Runtime on the CPU.

    Args:
        costs: From `count`; the checkpoints are read again.
        size: Height and width of the image that is timed, multiples of 8.
        on_progress: See `runtime.progress`.
    """
    networks = _networks([*costs], on_progress)
    from compress.latency import time_networks

    times = time_networks(networks, size, on_progress)
    return Costs(*(replace(each, latency=latency) for each, latency in zip(costs, times, strict=True)))


def command(
    weights: Path,
    latency: bool = False,
    size: Annotated[Size, hxw("size")] = (SIDE, SIDE),
    vs: Path | None = None,
    weights_key: str | None = None,
) -> Costs:
    """Count the parameters and MACs of a checkpoint, and time it.

    Args:
        weights: Checkpoint, .safetensors or the authors' .pth.
        latency: Export it and time it as a whole in ONNX Runtime on the CPU.
        size: Height and width of the image that is timed, multiples of 8. MACs are always counted at 256x256.
        vs: A second checkpoint to compare with.
        weights_key: Key of the weights to take from --weights where it holds several, such as params_ema.
    """
    expect_multiples("size", size)
    with progress_shown() as on_progress:
        costs = count(weights, vs, weights_key, on_progress)
    for each in costs:
        Console().print(*_tables(each))
    if latency:
        with progress_shown() as on_progress:
            costs = time_costs(costs, size, on_progress)
        for each in costs:
            print(f"{each.weights}: {each.latency} at {size_text(size)} in ONNX Runtime on the CPU")
    if vs:
        print(f"{weights} of {vs}: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in costs.ratios().items()))
    return costs


def _tables(cost: Cost) -> list[Table]:
    """MACs and parameters, by module and by kind of layer."""
    parts = [part for part in PARTS if any(item.part == part for item in cost.items)]
    title = f"{cost.weights}: million MACs at {SIDE}x{SIDE}"
    modules = table_of(["module"], [*parts, "all", "parameters"], title)
    kinds = table_of(["kind"], ["million MACs", "share", "parameters"])
    for module in (*dict.fromkeys(item.module for item in cost.items), "all"):
        if module == "all":
            modules.add_section()
        chosen = [item for item in cost.items if module in (item.module, "all")]
        counts = [sum(item.macs for item in chosen if item.part == part) for part in parts]
        modules.add_row(
            module,
            *(f"{count / 1e6:.0f}" if count else "" for count in counts),
            f"{sum(counts) / 1e6:.0f}",
            str(sum(item.params for item in chosen)),
        )
    for kind in dict.fromkeys(item.kind for item in sorted(cost.items, key=lambda item: PARTS.index(item.part))):
        chosen = [item for item in cost.items if item.kind == kind]
        count = sum(item.macs for item in chosen)
        kinds.add_row(kind, f"{count / 1e6:.0f}", f"{count / cost.macs:.1%}", str(sum(item.params for item in chosen)))
    return [modules, kinds]


def run() -> None:
    """The command line."""
    main(command, __doc__, summary=Costs.summary)


if __name__ == "__main__":
    run()
