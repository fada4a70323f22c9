"""What each kind of pruning group costs when it alone is pruned: PSNR and milliseconds against MACs, in rows and as a
plot."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from compress.groups import pruning_groups
from compress.latency import export_session, time_sessions
from compress.options import KINDS, Kind
from compress.selection import Measure, Target, prune_network
from compress.step_cache import NO_CACHE, StepCache
from drsformer import counts
from drsformer.data import Pair
from drsformer.evaluation import evaluate_model
from drsformer.metrics import Protocol
from drsformer.model import DRSformer
from runtime.errors import GateError
from runtime.files import writing
from runtime.pixels import Size
from runtime.progress import OnProgress, silent


def measure_sensitivity(
    network: DRSformer,
    pairs: Sequence[Pair],
    measure: Measure,
    size: Size,
    output: Path,
    ratios: Sequence[float],
    *,
    scope: Sequence[Kind] = KINDS,
    round_to: int = 8,
    protocol: Protocol = "rain200",
    cache: StepCache = NO_CACHE,
    on_progress: OnProgress = silent,
) -> list[dict[str, Any]]:
    """Prune each kind of group by itself and measure what that costs.

    Each network is timed in turn with the whole one, and `latency` is its fraction of those milliseconds: no more than
    two are held at once, and how busy the machine is when does not matter.

    Args:
        network: Stays as it is.
        pairs: PSNR is the mean over these.
        measure: Tells the importance of units, see `compress.selection`.
        size: Height and width of the image that is timed, multiples of 8.
        output: Folder that gets `sensitivity.json`, `.csv` and `.png`.
        ratios: Fractions of the MACs to leave, in falling order, as far as a kind of group goes.
        scope: Kinds of groups.
        round_to: Widths end at multiples of this.
        protocol: How PSNR is measured.
        cache: Where networks and measurements are kept.
        on_progress: See `runtime.progress`.

    Returns:
        The rows: first "nothing", the network itself, then by kind the ratios that it reaches; each with "kind",
        fractions "macs" and "latency", "params", "psnr" in dB, "ms" and its quartiles "ms_low" and "ms_high".
    """
    macs = counts.macs(network.config)
    kinds: list[Kind] = [kind for kind in scope if pruning_groups(network.config, [kind])]
    whole = functools.cache(lambda: export_session(network, size, on_progress))
    rows: list[dict[str, Any]] = []

    def measured(kind: str, pruned: DRSformer) -> dict[str, Any]:
        session = whole() if pruned is network else export_session(pruned, size, on_progress)
        before, after = time_sessions([whole(), session], size, on_progress)
        return {
            "kind": kind,
            "macs": counts.macs(pruned.config) / macs,
            "params": counts.params(pruned.config),
            "psnr": evaluate_model(pruned, pairs, protocol, on_progress=on_progress).psnr,
            "latency": after.ms / before.ms,
            "ms": after.ms,
            "ms_low": after.low,
            "ms_high": after.high,
        }

    def add(name: str, kind: str, pruned: DRSformer) -> None:
        rows.append(cache.json(name, functools.partial(measured, kind, pruned)))

    def remark() -> str:
        return "{macs:.3f} of the MACs, {latency:.3f} of the time, {psnr:.2f} dB".format(**rows[-1])

    on_progress("Sensitivity: nothing", 0, 1)
    add("nothing", "nothing", network)
    on_progress("Sensitivity: nothing", 1, 1, remark())
    for kind in kinds:
        pruned = network
        on_progress(f"Sensitivity: {kind}", 0, len(ratios))
        for done, ratio in enumerate(ratios, 1):
            target, name = Target("macs", counts.macs, ratio * macs), f"{kind}-{ratio:g}"
            try:
                smaller = prune_network(
                    pruned,
                    [target],
                    measure,
                    scope=[kind],
                    round_to=round_to,
                    rounds=1,
                    below=1.0,
                    cache=cache.within(name),
                )
            except GateError:
                on_progress(f"Sensitivity: {kind}", len(ratios), len(ratios), f"{ratio:g} is more than can go")
                break
            if smaller.config == pruned.config:  # the last step has gone this far already
                on_progress(f"Sensitivity: {kind}", done, len(ratios))
                continue
            add(name, kind, smaller)
            pruned = smaller
            on_progress(f"Sensitivity: {kind}", done, len(ratios), remark())
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
    figure = Figure(figsize=(10, 4), layout="constrained")
    columns = {"psnr": "PSNR, dB", "latency": "fraction of the time"}
    for axes, (column, label) in zip(figure.subplots(1, 2), columns.items(), strict=True):
        for kind in kinds:
            points = [row for row in rows if row["kind"] in ("nothing", kind)]
            axes.plot([row["macs"] for row in points], [row[column] for row in points], marker="o", label=kind)
        axes.set(xlabel="fraction of the MACs that is left", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
