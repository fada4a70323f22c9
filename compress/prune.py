"""Make a network smaller by taking out what it needs least.

    python -m compress.prune --weights W --output half.safetensors --data Rain200H/train --macs 0.5
    python -m compress.prune --weights W --output P --data DIR --macs 0.7 --scope ffn experts --importance magnitude
    python -m compress.prune --weights W --output P --data light/train heavy/train --latency 0.6 --size 320x480
    python -m compress.prune --weights W --data DIR --sensitivity runs/sensitivity

What goes is gone: the result is an ordinary checkpoint with smaller tensors, which loads without this program.
Expect it to have lost quality, and train it on (`drsformer.train --init`, `compress.distill`).

What can go, by --scope, is told in `compress.groups`: hidden channels, heads and their channels, experts, channels
of the residual paths, blocks. Greedily, that is taken next whose loss in importance is least for what it saves, in
--rounds between which importance is measured anew. Widths end where vectors do (--round-to); in an MSFN each of the
four parts of the folded hidden layer does.

Every finished round and measurement is kept, in OUTPUT.work or below --sensitivity, until all is done: after a kill the
same command goes on from there.
"""

from __future__ import annotations

import csv
import functools
import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call

from compress import cost
from compress.cost import Latency, export_session, items, time_networks, time_sessions
from compress.groups import (
    KINDS,
    Dimension,
    Kind,
    PruningGroup,
    config_after,
    pruning_groups,
    remove,
)
from compress.step_cache import NO_CACHE, StepCache
from drsformer import checkpoint
from drsformer.config import LEVELS, NO_EXPERT, SIZE_MULTIPLE, BlockConfig, DRSformerConfig
from drsformer.data import Pair, dataset_name, find_pairs
from drsformer.evaluation import evaluate_model
from drsformer.metrics import Protocol
from drsformer.model import DRSformer, LayerNorm
from drsformer.patches import Patches
from drsformer.recipe import Recipe
from runtime.cli import console, main, parse_size, progress
from runtime.errors import GateError, InputError
from runtime.files import expect_other_files, writing

Importance = Literal["taylor", "fisher", "magnitude"]

UNUSED = 1e-6
"""Of the largest importance: what the whole energy of a tensor counts where importance is measured by gradients."""

LATENCY_TOLERANCE = 0.02
"""How far from its target a network may end, of the target."""


def importances(
    network: DRSformer,
    patches: Iterable[tuple[Tensor, Tensor]],
    found: Sequence[PruningGroup],
    importance: Importance = "taylor",
) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """What the loss of each unit would cost: by structure, for each of its axes, (units,) float64, at least 0; and the
    `grams` that `without` takes.

    taylor:    how much the L1 loss of a patch would change to first order, in absolute value, summed over patches
               (Molchanov et al., arXiv 1906.10771, with weights taken together unit by unit).
    fisher:    the same squared, the second-order term where the Hessian is taken to be Fisher's matrix.
    magnitude: the part of its tensors' energy that the unit has: the geometric mean of that of the weights that write
               into it and of those that read it. Of a block, the energy of what writes its results, in blocks of its
               level.

    With the first two, magnitude decides among units that no patch made use of.

    patches: rainy and clean, (3, P, P) each. Raises InputError for a network that answers with NaN.
    """
    weights = {name: parameter.detach().requires_grad_() for name, parameter in network.named_parameters()}
    magnitudes = _magnitudes(weights, found)
    scores = {name: [torch.zeros_like(axis) for axis in axes] for name, axes in magnitudes.items()}
    with _gram_matrices(network) as grams:
        for rainy, clean in patches:
            with torch.set_grad_enabled(importance != "magnitude"):
                loss = F.l1_loss(functional_call(network, weights, rainy[None]), clean[None])
            if not loss.isfinite():
                raise InputError("the network answers with NaN or infinity on a patch of --data; nothing is pruned")
            if importance == "magnitude":
                continue
            gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
            slopes = _Sums({name: weights[name] * gradient for name, gradient in zip(weights, gradients, strict=True)})
            for structure in found:
                for axis, score in zip(structure.axes, scores[structure.name], strict=True):
                    slope = slopes.of(axis, "reads")
                    score += slope**2 if importance == "fisher" else slope.abs()
    if importance == "magnitude":
        return magnitudes, grams
    little = UNUSED * max((float(score.max()) for axes in scores.values() for score in axes), default=0.0)
    for name, axes in scores.items():
        for score, magnitude in zip(axes, magnitudes[name], strict=True):
            score += little * magnitude
    return scores, grams


def _magnitudes(weights: Mapping[str, Tensor], found: Sequence[PruningGroup]) -> dict[str, list[Tensor]]:
    energies = {name: weight.detach() ** 2 for name, weight in weights.items()}
    shares = _Sums({name: energy / energy.sum().clamp_min(1e-30) for name, energy in energies.items()})
    wholes = _Sums(energies)

    def magnitude(structure: PruningGroup, axis: Dimension) -> Tensor:
        if structure.kind == "depth":  # a block has all of its tensors, so it is held against the other blocks
            energy = wholes.of(axis, "reads")
            return energy / energy.mean().clamp_min(1e-30)
        read = shares.of(axis, "reads")
        if not any(place.role == "writes" for place in axis.places):
            return read
        return (read * shares.of(axis, "writes")).sqrt()

    return {structure.name: [magnitude(structure, axis) for axis in structure.axes] for structure in found}


class _Sums:
    """Sums of values that belong to weights, `values` by their name."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.values = values
        self.along: dict[tuple[str, int | None], Tensor] = {}

    def of(self, axis: Dimension, role: str) -> Tensor:
        """Over the weights in this role, for each unit of the axis: (units,), float64."""
        total = torch.zeros(axis.units, dtype=torch.float64)
        for place in (*axis.places, *axis.zeroed):
            if place.role == role:
                part = self._along(place.tensor, place.dim)[place.units].sum(1)
                total[place.first : place.first + len(part)] += part
        return total

    def _along(self, name: str, dim: int | None) -> Tensor:
        if (name, dim) not in self.along:
            value = self.values[name].detach()
            value = value.flatten(0, 1) if dim is None else value.movedim(dim, 0)
            self.along[name, dim] = value.reshape(len(value), -1).sum(1).double()
        return self.along[name, dim]


@contextmanager
def _gram_matrices(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside the block, forward passes leave here the sum of x x^T over pixels, for each LayerNorm by its name."""
    grams: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def note(_: nn.Module, args: tuple[Tensor]) -> None:
            pixels = args[0].detach().movedim(1, 0).flatten(1)  # C, B * H * W
            grams[name] = grams.get(name, 0) + (pixels @ pixels.T).double()

        return note

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in network.named_modules()
        if isinstance(module, LayerNorm)
    ]
    try:
        yield grams
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Target:
    """What a network may cost, and how that is told from its config. `name` is that of the option."""

    name: str
    cost: Callable[[DRSformerConfig], float]
    bound: float


def choose(
    config: DRSformerConfig,
    found: Sequence[PruningGroup],
    scores: Mapping[str, Sequence[Tensor]],
    targets: Sequence[Target],
    floors: Mapping[str, float],
    round_to: int = 8,
) -> dict[str, list[list[int]]]:
    """The units to take out until all targets are met, or nothing is left to take out.

    Greedy: always the structure that loses least importance for what it saves of the target that is farthest away, but
    none that would take this target below its floor, given by its name. A block loses only what is left in it.
    """
    orders = {name: [score.argsort(stable=True).tolist() for score in axes] for name, axes in scores.items()}
    losses = {
        name: torch.stack([F.pad(score.sort().values.cumsum(0), (1, 0)) for score in axes]).sum(0)
        for name, axes in scores.items()
    }
    by_name = {structure.name: structure for structure in found}
    left = {structure.name: structure.units for structure in found}
    gone: dict[str, list[list[int]]] = {}
    frozen: set[str] = set()

    def excess(target: Target) -> float:
        return target.cost(config) / target.bound

    def narrowed(structure: PruningGroup, units: int) -> dict[str, list[list[int]]]:
        return {**gone, structure.name: [order[: structure.units - units] for order in orders[structure.name]]}

    def lost(name: str) -> float:
        return float(losses[name][by_name[name].units - left[name]])

    def inside(structure: PruningGroup, unit: int) -> list[str]:
        """The structures of a block, whose loss is part of its own; none for any other kind of unit."""
        modules = structure.axes[0].modules
        return [name for name in left if name.startswith(f"{modules[unit]}.")] if modules else []

    def offer(name: str, target: Target) -> tuple[float, float, str, int, DRSformerConfig] | None:
        """Loss for what is saved, then the greater saving first; with the number of units that stay."""
        structure = by_name[name]
        units = structure.fewer(left, round_to)
        if name in frozen or units is None:
            return None
        smaller = config_after(network_config, found, narrowed(structure, units))
        saving = target.cost(config) - target.cost(smaller)
        if saving <= 0 or target.cost(smaller) < floors[target.name]:
            return None
        loss = float(losses[name][structure.units - units]) - lost(name)
        for unit in orders[name][0][structure.units - left[name] : structure.units - units]:
            loss -= sum(lost(other) for other in inside(structure, unit))  # which has been lost already
        return max(0.0, loss) / saving, -saving, name, units, smaller

    network_config = config
    target, offers = targets[0], []
    while (farthest := max(targets, key=excess)) and excess(farthest) > 1:
        if not offers or target != farthest:
            target, offers = farthest, [each for name in left if (each := offer(name, farthest))]
            heapq.heapify(offers)
            if not offers:
                break
        best = offer(heapq.heappop(offers)[2], target)  # anew: what it saves has shrunk with the network
        if best is None:
            continue
        if offers and best > offers[0]:
            heapq.heappush(offers, best)
            continue
        _, _, name, left[name], config = best
        gone = narrowed(by_name[name], left[name])
        for unit in gone[name][0]:  # nothing more is taken out of a block that goes
            frozen.update(inside(by_name[name], unit))
        level = name.split(".")[0]  # whose blocks have less to lose now
        offers = [each for each in offers if each[2] != level]
        offers += [each for follower in {name, level} & left.keys() if (each := offer(follower, target))]
        heapq.heapify(offers)
    return gone


def prune_network(
    network: DRSformer,
    patches: Sequence[tuple[Tensor, Tensor]],
    targets: Sequence[Target],
    importance: Importance = "taylor",
    scope: Sequence[Kind] = KINDS,
    round_to: int = 8,
    rounds: int = 4,
    below: float = LATENCY_TOLERANCE,
    steps: StepCache = NO_CACHE,
) -> DRSformer:
    """Take out of a network what it needs least, until all targets are met. `network` stays as it is.

    patches: rainy and clean, (3, P, P) each, to measure importance on.
    below:   how far below a target it may end, of the target.
    steps:   where the network is kept after each round.

    Raises GateError where a target cannot be met within `NEAR`; the message says what stands in the way.
    """
    start = {target.name: target.cost(network.config) for target in targets}
    floors = {target.name: min(target.bound * (1 - below), start[target.name]) for target in targets}

    def smaller(network: DRSformer, bounds: Sequence[Target]) -> DRSformer:
        found = pruning_groups(network.config, scope)
        scores, grams = importances(network, patches, found, importance)
        return remove(network, choose(network.config, found, scores, bounds, floors, round_to), grams)

    with progress() as bar:
        for turn in bar.track(range(1, rounds + 1), description="Pruning"):
            bounds = [
                replace(target, bound=start[target.name] + (target.bound - start[target.name]) * turn / rounds)
                for target in targets
            ]
            if any(bound.cost(network.config) > bound.bound for bound in bounds):
                network = steps.network(f"round{turn}", functools.partial(smaller, network, bounds))
    for target in targets:
        reached = target.cost(network.config)
        if reached > target.bound * (1 + LATENCY_TOLERANCE):
            raise GateError(
                f"--{target.name}: expected {target.bound / start[target.name]:.3f}, reached "
                f"{reached / start[target.name]:.3f}: what is left in --scope {' '.join(scope)} is as narrow as "
                f"--round-to {round_to} lets it be, or would end more than {below:.0%} too low; widen the scope or "
                "lower --round-to"
            )
    return network


def latency_model(
    config: DRSformerConfig, size: tuple[int, int], steps: StepCache = NO_CACHE
) -> Callable[[DRSformerConfig], float]:
    """Milliseconds of networks pruned from this one, estimated from their MACs and what a MAC takes in each part.

    Measured once: one block of each level is exported with all of its feed-forward network and with hardly any, and
    what it adds to a network without blocks is timed; so are the compensators. `steps`: where that is kept.
    """
    probes = {("resampling", "resampling"): _with_blocks(config, {})}
    twins = {}
    for module in LEVELS:
        blocks, encoder = config.levels()[module].blocks, module.replace("decoder", "encoder")
        if module != encoder and config.levels()[module] == config.levels()[encoder]:
            twins[module] = encoder
        elif blocks:
            block = blocks[len(blocks) // 2]
            thin = replace(block, hidden=2 - block.hidden % 2)
            probes[module, "ffn"] = _with_blocks(config, {module: (block,)})
            probes[module, "attention"] = _with_blocks(config, {module: (thin,)})
    for module in ("mefc_early", "mefc_late"):
        if mefc := getattr(config, module):
            probes[module, "mefc"] = replace(_with_blocks(config, {}), **{module: mefc})

    def measure() -> list[float]:
        return [latency.ms for latency in time_networks([DRSformer(probe) for probe in probes.values()], size)]

    ms = dict(zip(probes, steps.json("parts", measure), strict=True))
    rates = {}
    for (module, part), probe in probes.items():
        without_it = {"resampling": 0.0, "ffn": ms.get((module, "attention"), 0.0)}.get(
            part, ms["resampling", "resampling"]
        )
        spent = max(ms[module, part] - without_it, 1e-3)  # a part is never free, whatever the noise
        rates[module, part] = spent / _macs_of_parts(probe)[module, part]

    def rate(module: str, part: str) -> float:
        return rates[twins.get(module, module), part]

    def estimate(pruned: DRSformerConfig) -> float:
        return sum(rate(*part) * macs for part, macs in _macs_of_parts(pruned).items())

    return estimate


def _macs_of_parts(config: DRSformerConfig) -> dict[tuple[str, str], int]:
    """By module and part, such as ("latent", "ffn"); all resampling is one part."""
    parts: dict[tuple[str, str], int] = defaultdict(int)
    for item in items(config):
        parts["resampling" if item.part == "resampling" else item.module, item.part] += item.macs
    return parts


def _with_blocks(config: DRSformerConfig, blocks: Mapping[str, tuple[BlockConfig, ...]]) -> DRSformerConfig:
    """The same widths with these blocks only, by module, and no MEFC."""
    levels = [replace(config.levels()[module], blocks=blocks.get(module, ())) for module in LEVELS]
    e1, e2, e3, latent, d3, d2, d1 = levels
    return replace(config, encoder=(e1, e2, e3), latent=latent, decoder=(d3, d2, d1), mefc_early=None, mefc_late=None)


ATTEMPTS = 3
"""How often a network is pruned anew to meet a latency, with a better estimate each time."""

RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5)
"""Parts of the MACs at which sensitivity is measured, as far as a kind of structure goes."""


def measure_sensitivity(
    network: DRSformer,
    pairs: Sequence[Pair],
    patches: Sequence[tuple[Tensor, Tensor]],
    size: tuple[int, int],
    output: Path,
    ratios: Sequence[float],
    scope: Sequence[Kind] = KINDS,
    protocol: Protocol = "rain200",
    steps: StepCache = NO_CACHE,
    **options: Any,
) -> list[dict[str, Any]]:
    """What it costs to take out structures of one kind only, for each kind: PSNR on `pairs` and latency of the export
    against the part of the MACs that is left, for `ratios` in falling order. Writes `sensitivity.json`, `.csv` and
    `.png` to the folder `output`.

    Each network is timed in turn with the whole one, and `latency` is its part of those milliseconds: no more than two
    are held at once, and how busy the machine is when does not matter.

    steps:   where networks and measurements are kept.
    options: of `prune_network`, beside targets, scope and rounds, of which there is one for each ratio.
    """
    macs = cost.macs(network.config)
    kinds: list[Kind] = [kind for kind in scope if pruning_groups(network.config, [kind])]
    whole = functools.cache(lambda: export_session(network, size))

    def measure(kind: str, pruned: DRSformer) -> dict[str, Any]:
        before, after = time_sessions(
            [whole(), export_session(pruned, size) if pruned is not network else whole()], size
        )
        row = {
            "kind": kind,
            "macs": cost.macs(pruned.config) / macs,
            "params": cost.params(pruned.config),
            "psnr": evaluate_model(pruned, pairs, protocol).psnr,
            "latency": after.ms / before.ms,
            "ms": after.ms,
            "ms_low": after.low,
            "ms_high": after.high,
        }
        console.print("{kind}: {macs:.3f} of the MACs, {latency:.3f} of the time, {psnr:.2f} dB".format(**row))
        return row

    rows = [steps.json("nothing", lambda: measure("nothing", network))]
    for kind in kinds:
        pruned = network
        for ratio in ratios:
            target, name = Target("macs", cost.macs, ratio * macs), f"{kind}-{ratio:g}"
            try:
                smaller = prune_network(
                    pruned, patches, [target], scope=[kind], rounds=1, below=1.0, steps=steps.within(name), **options
                )
            except GateError:  # this kind goes no further
                break
            if smaller.config != pruned.config:  # otherwise the last step has gone this far already
                rows.append(steps.json(name, functools.partial(measure, kind, smaller)))
            pruned = smaller
    with writing(output / "sensitivity.json") as temporary:
        temporary.write_text(json.dumps(rows, indent=1) + "\n")
    with writing(output / "sensitivity.csv") as temporary, open(temporary, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(rows)
    with writing(output / "sensitivity.png") as temporary:
        _plot(rows, kinds).savefig(temporary, dpi=120)
    return rows


def _plot(rows: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> Figure:
    figure, columns = Figure(figsize=(10, 4), layout="constrained"), {"psnr": "PSNR, dB", "latency": "part of the time"}
    for axes, (column, label) in zip(figure.subplots(1, 2), columns.items(), strict=True):
        for kind in kinds:
            points = [row for row in rows if row["kind"] in ("nothing", kind)]
            axes.plot([row["macs"] for row in points], [row[column] for row in points], marker="o", label=kind)
        axes.set(xlabel="part of the MACs that is left", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


@dataclass(frozen=True)
class Pruned:
    """What was made of a network. PSNR is over `images` pairs of the data, before and after; `latency` is measured
    milliseconds before and after, where a target asked for it; `missed` says so in one line where it is not met."""

    output: Path
    before: DRSformerConfig
    after: DRSformerConfig
    psnr: tuple[float, float]
    images: int
    latency: tuple[Latency, Latency] | None = None
    missed: str | None = None

    def ratios(self) -> dict[str, float]:
        """What is left, of one."""
        ratios = {count.__name__: count(self.after) / count(self.before) for count in (cost.params, cost.macs)}
        return ratios | ({"latency": self.latency[1].ms / self.latency[0].ms} if self.latency else {})

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "output": str(self.output),
            "params": cost.params(self.after),
            "gmacs": round(cost.macs(self.after) / 1e9, 4),
            "ratio": {name: round(ratio, 4) for name, ratio in self.ratios().items()},
            "psnr_before": round(self.psnr[0], 4),
            "psnr": round(self.psnr[1], 4),
            "images": self.images,
        }

    def table(self) -> Table:
        """For people: what each level was, and what it is."""
        table = Table("level", "width", "blocks", "heads x channels", "hidden", title=escape(str(self.output)))

        def told(values: Iterable[Any]) -> str:
            return " ".join(
                f"{value} (x{count})" if count > 1 else str(value) for value, count in Counter(values).items()
            )

        for module in LEVELS:
            was, now = self.before.levels()[module], self.after.levels()[module]
            columns = (
                [level.width for level in (was, now)],
                [len(level.blocks) for level in (was, now)],
                [told(f"{block.heads}x{block.head_dim}" for block in level.blocks) for level in (was, now)],
                [told(block.hidden for block in level.blocks) for level in (was, now)],
            )
            table.add_row(module, *(f"{old} -> {new}" if old != new else f"{old}" for old, new in columns))
        for module in ("mefc_early", "mefc_late"):
            if was := getattr(self.before, module):
                now = getattr(self.after, module)
                experts = [sum(name != NO_EXPERT for step in mefc.steps for name in step) for mefc in (was, now)]
                table.add_row(
                    module, "", "", f"{experts[0]} -> {experts[1]} experts", f"{was.gate_hidden} -> {now.gate_hidden}"
                )
        return table


def prune(
    weights: Path,
    data: list[Path],
    output: Path | None = None,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    importance: Importance = "taylor",
    scope: tuple[Kind, ...] = KINDS,
    round_to: int = 8,
    rounds: int = 4,
    samples: int = 16,
    patch: int = 128,
    limit: int = 8,
    protocol: Protocol = "rain200",
    size: str = "256x256",
    sensitivity: Path | None = None,
) -> Pruned | None:
    """Prune a checkpoint, or measure how it takes it.

    Raises InputError for arguments or files that cannot be used, GateError where a target cannot be met; no checkpoint
    is written then. A network that misses only the measured --latency is written, but the exit status is 1.

    Args:
        weights: Checkpoint, .safetensors or the authors' .pth.
        data: Folders of rainy and clean images, to measure importance and PSNR on.
        output: Pruned checkpoint to write, .safetensors.
        macs: Part of the MACs that may remain.
        params: Part of the parameters that may remain.
        latency: Part of the milliseconds that may remain, of the exported graph in ONNX Runtime on the CPU.
        importance: How to tell what is needed: from gradients, taylor (first order) or fisher (second); or magnitude.
        scope: Kinds of structures that may be taken out.
        round_to: Widths end at multiples of this, where hardware has vectors.
        rounds: How often importance is measured anew on the way.
        samples: Patches that importance is measured on.
        patch: Height and width of these patches, a multiple of 8.
        limit: Pairs whose PSNR is told, the first ones of each folder.
        protocol: How to measure; rain200 for Rain200L, Rain200H and SPA-Data, did for DID-Data and DDN-Data.
        size: Height and width of the image that is timed.
        sensitivity: Folder for what each kind of structure costs, in PSNR and milliseconds, as table and plot.
    """
    fractions = {name: value for name, value in (("macs", macs), ("params", params), ("latency", latency)) if value}
    for name, value in (("macs", macs), ("params", params), ("latency", latency)):
        if value is not None and not 0 < value <= 1:
            raise InputError(f"`{name}`: expected a fraction above 0 and up to 1, found {value}")
    if bool(output) != bool(fractions) or not (output or sensitivity):
        raise InputError("expected --output with --macs, --params or --latency; or --sensitivity with a folder")
    if output and (output.suffix != ".safetensors" or output.is_dir()):
        raise InputError(f"`output`: expected the name of a file ending in .safetensors, found {output}")
    if output:
        expect_other_files(output, weights=weights)
    for name, given in (("data", data), ("scope", scope)):
        if not given:
            raise InputError(f"`{name}`: expected at least one, found none")
    for name, value in (("round-to", round_to), ("rounds", rounds), ("samples", samples), ("limit", limit)):
        if value < 1:
            raise InputError(f"`{name}`: expected at least 1, found {value}")
    height_width = parse_size("size", size, SIZE_MULTIPLE)
    folders, trained = [find_pairs(folder) for folder in data], checkpoint.load(weights)
    if not pruning_groups(trained.model.config, scope):
        raise InputError(f"`scope` {' '.join(scope)}: expected kinds that {weights} has, found none; widen the scope")
    images = [pair for folder in folders for pair in folder[:limit]]
    cut = Patches(folders, Recipe(patch=patch))
    patches = [cut[number] for number in range(samples)]
    how: dict[str, Any] = dict(importance=importance, round_to=round_to)
    options = {
        "data": [dataset_name(folder) for folder in data],
        **fractions,
        **how,
        "rounds": rounds,
        "scope": list(scope),
        "samples": samples,
        "patch": patch,
    }
    inputs = {"weights": trained.sha256, **options, "limit": limit, "protocol": protocol, "size": size}
    measured = StepCache(sensitivity / "work", inputs) if sensitivity else NO_CACHE
    if sensitivity:
        rows = measure_sensitivity(
            trained.model, images, patches, height_width, sensitivity, RATIOS, scope, protocol, measured, **how
        )
        Console().print(_sensitivity_table(rows))
    if not output:
        measured.remove()
        return None
    steps = StepCache(
        output.with_name(f"{output.name}.work"), inputs
    )  # which also shows at once that it can be written
    narrow = functools.partial(prune_network, trained.model, patches, scope=scope, rounds=rounds, **how)
    targets = [
        Target(name, getattr(cost, name), fractions[name] * getattr(cost, name)(trained.model.config))
        for name in ("macs", "params")
        if name in fractions
    ]
    times = missed = None
    try:
        if latency:
            network, times, missed = _prune_to_latency(trained.model, latency, height_width, targets, narrow, steps)
        else:
            network = narrow(targets, steps=steps)
    except GateError:
        steps.remove()
        measured.remove()
        raise
    psnr = tuple(evaluate_model(each, images, protocol).psnr for each in (trained.model, network))
    scores = {"psnr": round(psnr[1], 4), "images": len(images), "protocol": protocol}
    provenance = checkpoint.provenance_after(trained, "compress.prune", options, scores=scores)
    checkpoint.save(output, network, provenance)
    steps.remove()
    measured.remove()
    pruned = Pruned(output, trained.model.config, network.config, (psnr[0], psnr[1]), len(images), times, missed)
    Console().print(pruned.table())
    print(
        ", ".join(f"{name} {ratio:.4f}" for name, ratio in pruned.ratios().items())
        + f" of {weights}; PSNR {psnr[0]:.2f} -> {psnr[1]:.2f} dB on {len(images)} pairs, protocol {protocol}"
    )
    if missed:
        console.print(f"failed: {missed}", soft_wrap=True)
    return pruned


def _prune_to_latency(
    network: DRSformer,
    latency: float,
    size: tuple[int, int],
    others: Sequence[Target],
    narrow: Callable[..., DRSformer],
    steps: StepCache,
) -> tuple[DRSformer, tuple[Latency, Latency], str | None]:
    """Prune to a part of the milliseconds by estimate, measure, and correct the estimate by what was found. Where there
    are other targets it may end below. With the network, its times before and after, and why they miss the target."""
    estimate = latency_model(network.config, size, steps)
    bound = latency * estimate(network.config)
    whole, attempts = functools.cache(lambda: export_session(network, size)), []

    def measure(pruned: DRSformer) -> list[dict[str, Any]]:
        return [asdict(taken) for taken in time_sessions([whole(), export_session(pruned, size)], size)]

    for attempt in range(ATTEMPTS):
        target = Target("latency", estimate, min(bound, estimate(network.config)))
        try:
            pruned = narrow([*others, target], steps=steps.within(f"attempt{attempt}"))
        except GateError:  # the corrected estimate asks for more than can go
            if not attempts:
                raise
            break
        taken = steps.json(f"attempt{attempt}", functools.partial(measure, pruned))
        before, after = (Latency(**each) for each in taken)
        ratio = after.ms / before.ms
        off = ratio / latency - 1
        attempts.append((max(0.0, off) if others else abs(off), pruned, (before, after)))
        if attempts[-1][0] <= LATENCY_TOLERANCE:
            break
        bound *= latency / ratio
    off, pruned, (before, after) = min(attempts, key=lambda attempt: attempt[0])
    missed = (
        f"--latency: expected {latency:.3f}, measured {after.ms / before.ms:.3f} at best after correcting the "
        f"estimate by parts {len(attempts) - 1} times; before: {before}, after: {after}; where the quartiles are "
        "wide, try again on a quiet machine or with a larger --size"
    )
    return pruned, (before, after), missed if off > LATENCY_TOLERANCE else None


def _sensitivity_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("taken out")
    for column in ("MACs left", "parameters", "PSNR, dB", "time left", "ms", "ms, quartiles"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["kind"],
            f"{row['macs']:.3f}",
            str(row["params"]),
            f"{row['psnr']:.2f}",
            f"{row['latency']:.3f}",
            f"{row['ms']:.1f}",
            f"{row['ms_low']:.1f} to {row['ms_high']:.1f}",
        )
    return table


if __name__ == "__main__":
    main(
        prune,
        __doc__,
        summary=lambda pruned: pruned.summary() if pruned else None,
        status=lambda pruned: 1 if pruned and pruned.missed else 0,
    )
