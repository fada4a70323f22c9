"""Make a network smaller by removing what it needs least, and let what is left make up for it.

    python -m compress.prune --weights W --output half.safetensors --data Rain200H/train --macs 0.5
    python -m compress.prune --weights W --output P --data DIR --macs 0.7 --scope ffn experts --no-recover
    python -m compress.prune --weights W --output P --data light/train heavy/train --latency 0.6 --size 320x480
    python -m compress.prune --weights W --data DIR --sensitivity runs/sensitivity

The result is an ordinary checkpoint with smaller tensors, which loads without this program.
Where it has lost more than it may, train it on (`drsformer.train --init`, `compress.distill`).

What can be removed, by --scope, is listed in `compress.groups`: hidden channels, heads and their channels, experts,
channels of the residual paths, blocks. Greedily, that is removed next whose loss in importance is least for what it
saves of the target (with --weigh-time: and of the milliseconds), in --rounds between which importance is measured anew.
Importance is what the image loses after the best repair (`compress.obs`), and after each round the weights that are
left are solved anew for what the whole network does (`compress.recover`), which takes rainy images alone. Widths end
where vectors do (--round-to); in an MSFN each of the four parts of the folded hidden layer does.

Every finished round and measurement is kept, in OUTPUT.work or below --sensitivity, until all is done: after a kill the
same command goes on from there.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro
from rich.console import Console
from rich.table import Table

from compress.options import KINDS, Importance, Kind, expect_multiples
from drsformer import counts
from drsformer.config import NO_EXPERT, DRSformerConfig
from drsformer.data import Pair, dataset_name, files_of, files_sha256, find_pairs
from drsformer.metrics import Protocol
from drsformer.recipe import Recipe
from runtime.cli import as_options, console, hxw, main, progress_shown, table_of
from runtime.errors import GateError, InputError, expect_between
from runtime.files import expect_output
from runtime.pixels import Size, size_text
from runtime.progress import OnProgress, silent

if TYPE_CHECKING:  # they load PyTorch, which takes its time
    from torch import Tensor

    from compress.latency import Latency
    from compress.selection import Measure, Repair, Target
    from compress.step_cache import StepCache
    from drsformer.checkpoint import Checkpoint
    from drsformer.model import DRSformer

WORK_FOLDER = "work"
"""Folder below that of the sensitivity, for its measurements."""

SENSITIVITY_RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5)
"""Fractions of the MACs at which sensitivity is measured."""

NOT_OF_SENSITIVITY = frozenset({"macs", "params", "latency", "weigh_time", "rounds", "recover", "calibration"})
"""Options that sensitivity does not depend on."""

LATENCY_ATTEMPTS = 3
"""How often a network is pruned anew to meet a latency, with a better estimate each time."""


@dataclass(frozen=True)
class PruneOptions:
    """How far to prune, and how.

    Args:
        macs: Fraction of the MACs that may remain.
        params: Fraction of the parameters that may remain.
        latency: Fraction of the milliseconds that may remain, of the exported graph in ONNX Runtime on the CPU.
        importance: Measure of what is needed: obs, the error that is left after the best repair; from gradients, taylor
            (first order) or fisher (second); or magnitude.
        weigh_time: Remove what costs least for what it saves of the target and of the milliseconds, and not of the
            target alone. They are estimated from parts of the exported graph, which are timed first: minutes, and never
            twice the same.
        rotate: With obs, thin residual paths in their principal directions and not by channels.
        recover: Solve the weights that are left anew after each round, so that they make up for what was removed.
        scope: Kinds of pruning groups from which units may be removed.
        round_to: Multiple at which widths end, where hardware has vectors.
        rounds: How often importance is measured anew on the way.
        samples: Patches that importance is measured on.
        calibration: Patches that recovery is fitted to and judged by.
        patch: Height and width of these patches, a multiple of 8.
        limit: Pairs of each folder whose PSNR is measured, the first ones.
        protocol: Protocol of PSNR; rain200 for Rain200L, Rain200H and SPA-Data, did for DID-Data and DDN-Data.
        size: Height and width of the image that is timed, multiples of 8.
        weights_key: Key of the weights to take from a checkpoint that holds several, such as params_ema.

    Raises:
        InputError: A value is out of range.
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    importance: Importance = "obs"
    weigh_time: bool = False
    rotate: bool = True
    recover: bool = True
    scope: tuple[Kind, ...] = KINDS
    round_to: int = 8
    rounds: int = 2
    samples: int = 16
    calibration: int = 32
    patch: int = 128
    limit: int = 8
    protocol: Protocol = "rain200"
    size: Annotated[Size, hxw("size")] = (256, 256)
    weights_key: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("macs", self.macs), ("params", self.params), ("latency", self.latency)):
            if value is not None and not 0 < value <= 1:
                raise InputError(f"`{name}`: expected a fraction above 0 and up to 1, found {value}")
        if not self.scope:
            raise InputError("`scope`: expected at least one, found none")
        for name in ("round_to", "rounds", "samples", "limit"):
            expect_between(name, getattr(self, name), 1)
        expect_between("calibration", self.calibration, 2)
        expect_multiples("size", self.size)

    @property
    def fractions(self) -> dict[str, float]:
        """The targets that are set, by their names."""
        given = {"macs": self.macs, "params": self.params, "latency": self.latency}
        return {name: fraction for name, fraction in given.items() if fraction}


@dataclass(frozen=True)
class Pruned:
    """What was made of a network.

    Attributes:
        output: Checkpoint that was written.
        before: Config before pruning.
        after: Config after it.
        psnr: In dB, mean over `images` pairs of the data, before and after.
        images: Pairs that PSNR was measured on.
        latency: Measured milliseconds before and after, where a target asked for it.
        missed: Says in one line by how much a latency target is missed; None where it is met.
    """

    output: Path
    before: DRSformerConfig
    after: DRSformerConfig
    psnr: tuple[float, float]
    images: int
    latency: tuple[Latency, Latency] | None = None
    missed: str | None = None

    def ratios(self) -> dict[str, float]:
        """What is left of parameters, MACs and, if measured, milliseconds, as fractions."""
        ratios = {count.__name__: count(self.after) / count(self.before) for count in (counts.params, counts.macs)}
        return ratios | ({"latency": self.latency[1].ms / self.latency[0].ms} if self.latency else {})

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "output": str(self.output),
            "params": counts.params(self.after),
            "gmacs": round(counts.macs(self.after) / 1e9, 4),
            "ratio": {name: round(ratio, 4) for name, ratio in self.ratios().items()},
            "psnr_before": round(self.psnr[0], 4),
            "psnr": round(self.psnr[1], 4),
            "images": self.images,
        }


class Inputs(NamedTuple):
    """A checkpoint and the data to prune it by.

    Attributes:
        trained: The checkpoint.
        pairs: PSNR is measured on these.
        patches: Importance is measured on these: rainy and clean, (3, P, P) float32 in [0, 1] each.
        calibration: Recovery is fitted to these and judged by them: rainy, likewise.
        options: What the pruned network depends on, JSON-able.
        key: What its measurements depend on besides, for a `StepCache`.
    """

    trained: Checkpoint
    pairs: list[Pair]
    patches: list[tuple[Tensor, Tensor]]
    calibration: list[Tensor]
    options: dict[str, Any]
    key: dict[str, Any]


def read_inputs(weights: Path, data: Sequence[Path], options: PruneOptions) -> Inputs:
    """Read and check what `prune` takes. Raises InputError for files that cannot be used."""
    from compress.groups import pruning_groups
    from drsformer import checkpoint
    from drsformer.patches import Patches

    if not data:
        raise InputError("`data`: expected at least one, found none")
    folders, trained = [find_pairs(folder) for folder in data], checkpoint.load(weights, options.weights_key)
    if not pruning_groups(trained.model.config, options.scope):
        scope = " ".join(options.scope)
        raise InputError(f"`scope` {scope}: expected kinds that {weights} has, found none; widen the scope")
    patches = Patches(folders, Recipe(patch=options.patch))
    used = {
        "data": [dataset_name(folder) for folder in data],
        "files_sha256": files_sha256(files_of(*folders)),
        "weights_key": options.weights_key,
        **options.fractions,
        "importance": options.importance,
        "weigh_time": options.weigh_time,
        "rotate": options.rotate,
        "recover": options.recover,
        "round_to": options.round_to,
        "rounds": options.rounds,
        "scope": list(options.scope),
        "samples": options.samples,
        "calibration": options.calibration,
        "patch": options.patch,
    }
    measured = {"limit": options.limit, "protocol": options.protocol, "size": size_text(options.size)}
    return Inputs(
        trained,
        [pair for folder in folders for pair in folder[: options.limit]],
        [patches[number] for number in range(options.samples)],
        [patches[number][0] for number in range(options.calibration if options.recover else 0)],
        used,
        {"weights": trained.sha256, **used, **measured},
    )


def _measure(inputs: Inputs, options: PruneOptions, on_progress: OnProgress) -> Measure:
    from compress.importance import importances
    from compress.obs import costs_after_repair

    if options.importance == "obs":
        rainy = [rainy for rainy, _ in inputs.patches]
        return functools.partial(costs_after_repair, patches=rainy, rotate=options.rotate, on_progress=on_progress)
    return functools.partial(
        importances, patches=inputs.patches, importance=options.importance, on_progress=on_progress
    )


def _repair(inputs: Inputs, options: PruneOptions, on_progress: OnProgress) -> Repair:
    from compress.recover import remove_and_recover
    from compress.selection import remove_only

    if not options.recover:
        return remove_only
    whole = inputs.trained.model
    return functools.partial(remove_and_recover, whole=whole, patches=inputs.calibration, on_progress=on_progress)


def expect_checkpoint(output: Path, weights: Path) -> None:
    """Raise InputError or OSError where a pruned checkpoint cannot be written there."""
    if output.suffix != ".safetensors":
        raise InputError(f"`output`: expected the name of a file ending in .safetensors, found {output}")
    expect_output(output, weights=weights)


def prune(
    weights: Path,
    data: Sequence[Path],
    output: Path,
    options: PruneOptions,
    on_progress: OnProgress = silent,
    below: float | None = None,
) -> Pruned:
    """Prune a checkpoint, or go on with that.

    Args:
        weights: Checkpoint, .safetensors or the authors' .pth.
        data: Folders of rainy and clean images, to measure importance and PSNR on.
        output: Pruned checkpoint to write, .safetensors; rounds are kept in OUTPUT.work until it is written.
        options: How far to prune, and how; at least one target.
        on_progress: See `runtime.progress`.
        below: Fraction of its target by which the network may end below it; if not given, that by which it may miss it.

    Returns:
        What was made. A network that misses only the measured latency is written too: see `Pruned.missed`.

    Raises:
        InputError: Arguments or files cannot be used.
        GateError: A target cannot be met; nothing is written.
    """
    from compress.latency import latency_model
    from compress.selection import TOLERANCE, Target, prune_network
    from compress.step_cache import StepCache
    from drsformer import checkpoint
    from drsformer.evaluation import evaluate_model

    if not options.fractions:
        raise InputError("expected `macs`, `params` or `latency`, found none")
    expect_checkpoint(output, weights)
    inputs = read_inputs(weights, data, options)
    network = inputs.trained.model
    cache = StepCache(output.with_name(f"{output.name}.work"), inputs.key)  # which also shows that it can be written
    estimate = None
    if options.latency or options.weigh_time:
        estimate = latency_model(network.config, options.size, cache, on_progress)
    narrow = functools.partial(
        prune_network,
        time=estimate if options.weigh_time else None,
        measure=_measure(inputs, options, on_progress),
        repair=_repair(inputs, options, on_progress),
        scope=options.scope,
        round_to=options.round_to,
        rounds=options.rounds,
        below=TOLERANCE if below is None else below,
        on_progress=on_progress,
    )
    targets = [
        Target(name, count, options.fractions[name] * count(network.config))
        for name, count in (("macs", counts.macs), ("params", counts.params))
        if name in options.fractions
    ]
    times = missed = None
    try:
        if options.latency and estimate:
            smaller, times, missed = _prune_to_latency(
                network, options.latency, estimate, options.size, targets, narrow, cache, on_progress
            )
        else:
            smaller = narrow(network, targets, cache=cache)
    except GateError:
        cache.remove()
        raise
    before, after = (
        evaluate_model(each, inputs.pairs, options.protocol, on_progress=on_progress).psnr
        for each in (network, smaller)
    )
    scores = {"psnr": round(after, 4), "images": len(inputs.pairs), "protocol": options.protocol}
    provenance = checkpoint.provenance_after(inputs.trained, "compress.prune", inputs.options, scores=scores)
    checkpoint.save(output, smaller, provenance)
    cache.remove()
    return Pruned(output, network.config, smaller.config, (before, after), len(inputs.pairs), times, missed)


def sensitivity_of(
    weights: Path,
    data: Sequence[Path],
    output: Path,
    options: PruneOptions,
    keep: bool = False,
    on_progress: OnProgress = silent,
) -> list[dict[str, Any]]:
    """Measure what each kind of pruning group of a checkpoint costs, or go on with that.

    Args:
        weights: Checkpoint, .safetensors or the authors' .pth.
        data: Folders of rainy and clean images, to measure importance and PSNR on.
        output: Folder that gets `sensitivity.json`, `.csv` and `.png`.
        options: How to prune; `NOT_OF_SENSITIVITY` do not count.
        keep: Leave the measurements in OUTPUT/work, where the same call finds them.
        on_progress: See `runtime.progress`.

    Returns:
        The rows, see `compress.sensitivity.measure_sensitivity`.

    Raises:
        InputError: Arguments or files cannot be used.
    """
    from compress.sensitivity import measure_sensitivity
    from compress.step_cache import StepCache

    inputs = read_inputs(weights, data, options)
    key = {name: value for name, value in inputs.key.items() if name not in NOT_OF_SENSITIVITY}
    cache = StepCache(output / WORK_FOLDER, key)
    rows = measure_sensitivity(
        inputs.trained.model,
        inputs.pairs,
        _measure(inputs, options, on_progress),
        options.size,
        output,
        SENSITIVITY_RATIOS,
        scope=options.scope,
        round_to=options.round_to,
        protocol=options.protocol,
        cache=cache,
        on_progress=on_progress,
    )
    if not keep:
        cache.remove()
    return rows


def _prune_to_latency(
    network: DRSformer,
    latency: float,
    estimate: Callable[[DRSformerConfig], float],
    size: Size,
    others: Sequence[Target],
    narrow: Callable[..., DRSformer],
    cache: StepCache,
    on_progress: OnProgress,
) -> tuple[DRSformer, tuple[Latency, Latency], str | None]:
    """Prune to a fraction of the milliseconds by estimate, measure, and correct the estimate by what was found. Where
    there are other targets it may end below. With the network, its times before and after, and why they miss the
    target."""
    from compress.latency import Latency, export_session, time_sessions
    from compress.selection import TOLERANCE, Target

    bound = latency * estimate(network.config)
    whole, attempts = functools.cache(lambda: export_session(network, size, on_progress)), []

    def measure(pruned: DRSformer) -> list[dict[str, Any]]:
        sessions = [whole(), export_session(pruned, size, on_progress)]
        return [asdict(taken) for taken in time_sessions(sessions, size, on_progress)]

    for attempt in range(LATENCY_ATTEMPTS):
        target = Target("latency", estimate, min(bound, estimate(network.config)))
        try:
            pruned = narrow(network, [*others, target], cache=cache.within(f"attempt{attempt}"))
        except GateError:  # the corrected estimate asks for more than can be removed
            if not attempts:
                raise
            break
        taken = cache.json(f"attempt{attempt}", functools.partial(measure, pruned))
        before, after = (Latency(**each) for each in taken)
        ratio = after.ms / before.ms
        off = ratio / latency - 1
        attempts.append((max(0.0, off) if others else abs(off), pruned, (before, after)))
        if attempts[-1][0] <= TOLERANCE:
            break
        bound *= latency / ratio
    _, pruned, (before, after) = min(attempts, key=lambda attempt: attempt[0])
    ratio = after.ms / before.ms
    missed = (
        f"`latency`: expected {latency:.3f}, measured {ratio:.3f} at best after correcting the "
        f"estimate by parts {len(attempts) - 1} times; before: {before}, after: {after}; where the quartiles are "
        "wide, try again on a quiet machine or with a larger `size`"
    )
    return pruned, (before, after), missed if ratio > latency * (1 + TOLERANCE) else None


def command(
    weights: Path,
    data: list[Path],
    output: Path | None = None,
    options: Annotated[PruneOptions, tyro.conf.arg(name="")] = PruneOptions(),
    sensitivity: Path | None = None,
) -> Pruned | None:
    """Prune a checkpoint, or measure how it takes it.

    Args:
        weights: Checkpoint, .safetensors or the authors' .pth.
        data: Folders of rainy and clean images, to measure importance and PSNR on.
        output: Pruned checkpoint to write, .safetensors.
        options: How far to prune, and how.
        sensitivity: Folder for what each kind of pruning group costs, in PSNR and milliseconds, as table and plot.
    """
    if bool(output) != bool(options.fractions) or not (output or sensitivity):
        raise InputError("expected --output with --macs, --params or --latency; or --sensitivity with a folder")
    if output:
        expect_checkpoint(output, weights)
    if sensitivity:
        with progress_shown() as on_progress:
            rows = sensitivity_of(weights, data, sensitivity, options, bool(output), on_progress)
        Console().print(_sensitivity_table(rows))
    if not output:
        return None
    try:
        with progress_shown() as on_progress:
            pruned = prune(weights, data, output, options, on_progress)
    except GateError:
        _forget(sensitivity)
        raise
    _forget(sensitivity)
    Console().print(_table(pruned))
    before, after = pruned.psnr
    print(
        ", ".join(f"{name} {ratio:.4f}" for name, ratio in pruned.ratios().items())
        + f" of {weights}; PSNR {before:.2f} -> {after:.2f} dB on {pruned.images} pairs, protocol {options.protocol}"
    )
    if pruned.missed:
        console.print(f"failed: {as_options(pruned.missed)}", soft_wrap=True)
    return pruned


def _forget(sensitivity: Path | None) -> None:
    """Remove the measurements that `sensitivity_of` has kept."""
    from compress.step_cache import StepCache

    if sensitivity:
        StepCache(sensitivity / WORK_FOLDER).remove()


def _table(pruned: Pruned) -> Table:
    """What each level was, and what it is."""
    levels = table_of(["level", "width", "blocks", "heads x channels", "hidden"], title=str(pruned.output))

    def counted(values: Iterable[Any]) -> str:
        return " ".join(f"{value} (x{count})" if count > 1 else str(value) for value, count in Counter(values).items())

    for module, was in pruned.before.levels().items():
        now = pruned.after.levels()[module]
        columns = (
            [level.width for level in (was, now)],
            [len(level.blocks) for level in (was, now)],
            [counted(f"{block.heads}x{block.head_dim}" for block in level.blocks) for level in (was, now)],
            [counted(block.hidden for block in level.blocks) for level in (was, now)],
        )
        levels.add_row(module, *(f"{old} -> {new}" if old != new else f"{old}" for old, new in columns))
    for module in ("mefc_early", "mefc_late"):
        if was := getattr(pruned.before, module):
            now = getattr(pruned.after, module)
            experts = [sum(name != NO_EXPERT for step in mefc.steps for name in step) for mefc in (was, now)]
            levels.add_row(
                module, "", "", f"{experts[0]} -> {experts[1]} experts", f"{was.gate_hidden} -> {now.gate_hidden}"
            )
    return levels


def _sensitivity_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    kinds = table_of(["pruned"], ["MACs left", "parameters", "PSNR, dB", "time left", "ms", "ms, quartiles"])
    for row in rows:
        kinds.add_row(
            row["kind"],
            f"{row['macs']:.3f}",
            str(row["params"]),
            f"{row['psnr']:.2f}",
            f"{row['latency']:.3f}",
            f"{row['ms']:.1f}",
            f"{row['ms_low']:.1f} to {row['ms_high']:.1f}",
        )
    return kinds


def run() -> None:
    """The command line."""
    main(
        command,
        __doc__,
        summary=lambda pruned: pruned.summary() if pruned else None,
        status=lambda pruned: 1 if pruned and pruned.missed else 0,
    )


if __name__ == "__main__":
    run()
