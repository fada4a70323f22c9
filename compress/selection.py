"""Which units to remove: greedily, always where least importance is lost for what is saved, until targets are met.

Importance is measured anew in every round, since what a unit is worth depends on the others, and the target is
approached in equal steps. What measures a network, and what makes up for a removal, are functions that are passed in.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.groups import PruningGroup, Removal, config_after, pruning_groups
from compress.importance import Grams, Measured
from compress.options import KINDS, Kind
from compress.rotation import remove_rotated, settled
from compress.step_cache import NO_CACHE, StepCache
from drsformer.config import DRSformerConfig
from drsformer.model import DRSformer
from runtime.errors import GateError
from runtime.progress import OnProgress, silent, track

TOLERANCE = 0.02
"""Fraction of its target by which a network may miss it."""

Measure = Callable[[DRSformer, Sequence[PruningGroup]], Measured]
"""Tells what the units of these groups are worth, such as `compress.obs.costs_after_repair` with its patches."""

Repair = Callable[[DRSformer, Sequence[Removal], Grams], DRSformer]
"""Makes the network of a round from the one before it and what all rounds so far remove, of which the last one is still
to be done, such as `compress.recover.remove_and_recover` with the whole network and patches."""


def remove_only(network: DRSformer, rounds: Sequence[Removal], grams: Grams) -> DRSformer:
    """The `Repair` that corrects the scales of LayerNorms and leaves all other weights as they are."""
    return remove_rotated(network, rounds[-1], grams)


@dataclass(frozen=True)
class Target:
    """What a network may cost.

    Attributes:
        name: Of the option that asks for it.
        cost: Tells the cost from the config.
        bound: The cost to reach, at most.
    """

    name: str
    cost: Callable[[DRSformerConfig], float]
    bound: float


def choose(
    config: DRSformerConfig,
    groups: Sequence[PruningGroup],
    scores: Mapping[str, Sequence[Tensor]],
    targets: Sequence[Target],
    floors: Mapping[str, float],
    round_to: int = 8,
    time: Callable[[DRSformerConfig], float] | None = None,
) -> dict[str, list[list[int]]]:
    """Choose the units to remove until all targets are met, or nothing is left to remove.

    Greedy: always from the group that loses least importance for what it saves, of those that save something of the
    target that is farthest away, but never so much that this target would end below its floor. A block loses only what
    is left in it.

    Args:
        config: Of the network.
        groups: Of this network.
        scores: Importance of each unit, at least 0: by the name of its group, for each dimension, (units,).
        targets: At least one.
        floors: By the name of each target, the cost below which it must not end.
        round_to: Widths end at multiples of this.
        time: Tells the milliseconds from the config. With it, what is saved is a fraction of the target's cost plus a
            fraction of the time, since MACs and parameters are not time; without, it is the former alone.

    Returns:
        The units, as `compress.groups.remove` takes them.
    """
    orders = {name: [score.argsort(stable=True).tolist() for score in dims] for name, dims in scores.items()}
    losses = {
        name: torch.stack([F.pad(score.sort().values.cumsum(0), (1, 0)) for score in dims]).sum(0)
        for name, dims in scores.items()
    }
    by_name = {group.name: group for group in groups}
    left = {group.name: group.units for group in groups}
    pruned: dict[str, list[list[int]]] = {}
    frozen: set[str] = set()

    def excess(target: Target) -> float:
        return target.cost(config) / target.bound

    def narrowed(group: PruningGroup, units: int) -> dict[str, list[list[int]]]:
        return {**pruned, group.name: [order[: group.units - units] for order in orders[group.name]]}

    def lost(name: str) -> float:
        return float(losses[name][by_name[name].units - left[name]])

    def inside(group: PruningGroup, unit: int) -> list[str]:
        """The groups of a block, whose loss is part of its own; none for any other kind of unit."""
        modules = group.dims[0].modules
        return [name for name in left if name.startswith(f"{modules[unit]}.")] if modules else []

    def offer(name: str, target: Target) -> tuple[float, float, str, int, DRSformerConfig] | None:
        """Loss for what is saved, then the greater saving first; with the number of units that stay."""
        group = by_name[name]
        units = group.fewer(left, round_to)
        if name in frozen or units is None:
            return None
        smaller = config_after(whole, groups, narrowed(group, units))
        saving = target.cost(config) - target.cost(smaller)
        if saving <= 0 or target.cost(smaller) < floors[target.name]:
            return None
        saving /= target.cost(whole)
        if time:
            saving += (time(config) - time(smaller)) / time(whole)
        loss = float(losses[name][group.units - units]) - lost(name)
        for unit in orders[name][0][group.units - left[name] : group.units - units]:
            loss -= sum(lost(other) for other in inside(group, unit))  # which has been lost already
        return max(0.0, loss) / saving, -saving, name, units, smaller

    whole = config
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
        pruned = narrowed(by_name[name], left[name])
        for unit in pruned[name][0]:  # nothing more is removed from a block that is removed
            frozen.update(inside(by_name[name], unit))
        level = name.split(".")[0]  # whose blocks have less to lose now
        offers = [each for each in offers if each[2] != level]
        offers += [each for follower in {name, level} & left.keys() if (each := offer(follower, target))]
        heapq.heapify(offers)
    return pruned


def prune_network(
    network: DRSformer,
    targets: Sequence[Target],
    measure: Measure,
    *,
    repair: Repair = remove_only,
    scope: Sequence[Kind] = KINDS,
    round_to: int = 8,
    rounds: int = 4,
    below: float = TOLERANCE,
    time: Callable[[DRSformerConfig], float] | None = None,
    cache: StepCache = NO_CACHE,
    on_progress: OnProgress = silent,
) -> DRSformer:
    """Remove from a network what it needs least, until all targets are met.

    Args:
        network: Stays as it is.
        targets: At least one.
        measure: Tells the importance of the units of a network, once a round.
        repair: Makes the smaller network of each round.
        scope: Kinds of groups that may be pruned.
        round_to: Widths end at multiples of this.
        rounds: How often importance is measured.
        below: Fraction of its target by which a network may end below it.
        time: See `choose`.
        cache: Where the network is kept after each round.
        on_progress: See `runtime.progress`.

    Raises:
        GateError: A target cannot be met within `TOLERANCE`; the message says what stands in the way.
    """
    start = {target.name: target.cost(network.config) for target in targets}
    floors = {target.name: min(target.bound * (1 - below), start[target.name]) for target in targets}

    removed: list[Removal] = []

    def smaller(network: DRSformer, bounds: Sequence[Target], turn: int) -> DRSformer:
        groups = pruning_groups(network.config, scope)
        measured = functools.cache(functools.partial(measure, network, groups))

        def chosen() -> dict[str, Any]:
            scores, _, directions = measured()
            units = choose(network.config, groups, scores, bounds, floors, round_to, time)
            removal = settled(network, groups, units, directions)
            rotations = {name: rotation.tolist() for name, rotation in removal.rotations.items()}
            return {"units": removal.units, "rotations": rotations}

        def repaired() -> DRSformer:
            return repair(network, removed, measured().grams)

        found = cache.json(f"round{turn}", chosen)
        rotations = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in found["rotations"].items()}
        removed.append(Removal(found["units"], rotations))
        return cache.network(f"round{turn}", repaired)

    for turn in track(range(1, rounds + 1), rounds, "Pruning", on_progress):
        bounds = [
            replace(target, bound=start[target.name] + (target.bound - start[target.name]) * turn / rounds)
            for target in targets
        ]
        if any(bound.cost(network.config) > bound.bound for bound in bounds):
            network = smaller(network, bounds, turn)
    for target in targets:
        reached = target.cost(network.config)
        if reached > target.bound * (1 + TOLERANCE):
            raise GateError(
                f"`{target.name}`: expected {target.bound / start[target.name]:.3f}, reached "
                f"{reached / start[target.name]:.3f}: what is left in `scope` {' '.join(scope)} is as narrow as "
                f"`round_to` {round_to} lets it be, or would end more than {below:.0%} too low; widen the scope or "
                "lower `round_to`"
            )
    return network
