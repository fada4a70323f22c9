"""The networks that a search tries, all measured alike against the whole network, with their table and page."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compress.latency import export_session, time_sessions
from compress.pareto import Candidate, render
from compress.step_cache import StepCache
from drsformer import checkpoint, counts
from drsformer.data import Pair, dataset_name
from drsformer.evaluation import evaluate_model
from drsformer.metrics import Protocol, lost_db
from drsformer.model import DRSformer
from export.validate import ValidateOptions, validate
from runtime.errors import GateError
from runtime.files import writing
from runtime.ort import OrtSession
from runtime.pixels import Size, size_text
from runtime.progress import OnProgress, silent
from runtime.timing import machine

logger = logging.getLogger(__name__)

TABLE_FILE, PAGE_FILE = "search.json", "search.html"
"""All candidates, for programs and for people."""


class Candidates:
    """All candidates so far, of which the whole network is the first.

    Args:
        weights: Checkpoint of the whole network.
        folders: The validation pairs, by their folders.
        protocol: How they are measured.
        size: Height and width of the image that is timed.
        budget_db: Largest drop that is allowed.
        work: Folder that gets the table and the page.
        cache: Where measurements are kept.
        on_progress: See `runtime.progress`.
        weights_key: Key of the weights to take from a checkpoint that holds several.

    Attributes:
        rows: The candidates, in the order in which they came.
    """

    def __init__(
        self,
        weights: Path,
        folders: dict[Path, list[Pair]],
        protocol: Protocol,
        size: Size,
        budget_db: float,
        work: Path,
        cache: StepCache,
        on_progress: OnProgress = silent,
        weights_key: str | None = None,
    ) -> None:
        self.weights, self.folders, self.size, self.budget_db = weights, folders, size, budget_db
        self.work, self.cache, self.on_progress, self.weights_key = work, cache, on_progress, weights_key
        self.protocol: Protocol = protocol
        whole = checkpoint.load(weights, weights_key)
        self.network, self.sha256 = whole.model, whole.sha256
        self.session = functools.cache(lambda: export_session(self.network, size, on_progress))
        self.rows: list[Candidate] = []
        self._keep("whole", None, self._whole)

    def failure(self, name: str, make: Callable[[], Any]) -> str | None:
        """Try to make something, unless that is done. Returns why it cannot be made, if it cannot."""

        def tried() -> str | None:
            try:
                make()
            except GateError as error:
                return str(error)
            return None

        return self.cache.json(name, tried)

    def add(
        self, kind: str, file: str, make: Callable[[Path], Any] | None = None, like: Candidate | None = None
    ) -> Candidate:
        """Measure a checkpoint, unless that is done; before that `make`, if given, makes it or goes on with it. One of
        the same widths as `like` takes its time."""

        def measure() -> dict[str, Any]:
            if make:
                make(self.work / file)
            network = checkpoint.load(self.work / file).model
            if like:
                return self._scored(network) | {"latency": like.latency, "ms": like.ms}
            sessions = [self.session(), export_session(network, self.size, self.on_progress)]
            before, after = time_sessions(sessions, self.size, self.on_progress)
            return self._scored(network) | {"latency": after.ms / before.ms, "ms": after.ms}

        return self._keep(kind, file, measure)

    def add_quantized(self, file: str, model: Path, origin: Candidate) -> Candidate:
        """Measure the quantised form of a model, which is that of the candidate `origin`."""

        def measure() -> dict[str, Any]:
            sessions = [OrtSession(path, "cpu") for path in (model, self.work / file)]
            before, after = time_sessions(sessions, self.size, self.on_progress)
            psnr = {}
            for folder, pairs in self.folders.items():
                options = ValidateOptions(protocol=self.protocol, limit=len(pairs), weights_key=self.weights_key)
                found = validate(self.weights, self.work / file, folder, options, self.on_progress)
                psnr[dataset_name(folder)] = found.totals["candidate_psnr"]
            return {
                "params": origin.params,
                "macs": origin.macs,
                "latency": origin.latency * after.ms / before.ms,
                "ms": after.ms,
                "psnr": psnr,
            }

        return self._keep("int8", file, measure)

    def excess(self, candidate: Candidate) -> str:
        """By how much a candidate that is outside the budget is so, and where, for people."""
        whole = self.rows[0].psnr
        folder = max(candidate.psnr, key=lambda name: lost_db(whole[name], candidate.psnr[name]))
        return f"{candidate.drop_db - self.budget_db:.3g} dB over the budget of {self.budget_db:g} dB on {folder}"

    def _whole(self) -> dict[str, Any]:
        (timing,) = time_sessions([self.session()], self.size, self.on_progress)
        return self._scored(self.network) | {"latency": 1.0, "ms": timing.ms}

    def _scored(self, network: DRSformer) -> dict[str, Any]:
        return {
            "params": counts.params(network.config),
            "macs": counts.macs(network.config) / counts.macs(self.network.config),
            "psnr": {
                dataset_name(folder): evaluate_model(network, pairs, self.protocol, on_progress=self.on_progress).psnr
                for folder, pairs in self.folders.items()
            },
        }

    def _keep(self, kind: str, file: str | None, measure: Callable[[], dict[str, Any]]) -> Candidate:
        measured = self.cache.json(f"{kind}{len(self.rows)}", measure)
        whole = self.rows[0].psnr if self.rows else measured["psnr"]
        drop = max(lost_db(whole[folder], psnr) for folder, psnr in measured["psnr"].items())
        candidate = Candidate(kind, file, **measured, drop_db=drop)
        self.rows.append(candidate)
        logger.info(str(candidate))
        with writing(self.work / TABLE_FILE) as temporary:
            table = {
                "max_drop_db": self.budget_db,
                "protocol": self.protocol,
                "candidates": [asdict(each) for each in self.rows],
            }
            temporary.write_text(json.dumps(table, indent=1) + "\n")
        self._write_page(None)
        return candidate

    def take(self, taken: Candidate) -> None:
        """Mark on the page the one that is taken."""
        self._write_page(taken)

    def _write_page(self, taken: Candidate | None) -> None:
        config, pairs = self.network.config, {dataset_name(folder): pairs for folder, pairs in self.folders.items()}
        facts = {
            "whole network": f"{self.weights.name}, {counts.params(config) / 1e6:.2f} M parameters, "
            f"{counts.macs(config) / 1e9:.2f} GMAC for {counts.SIDE}x{counts.SIDE}, SHA-256 {self.sha256}",
            "drop": "PSNR of the whole network minus that of the other, the mean over a folder, where it is largest; "
            f"protocol {self.protocol}",
            "pairs": ", ".join(f"{name}: {len(found)}" for name, found in pairs.items()),
            "time": f"of one image of {size_text(self.size)} in ONNX Runtime {version('onnxruntime')} on the CPU, in "
            "turn with the whole network",
            "machine": f"{machine()['cpu']}, {machine()['cores']} cores",
        }
        with writing(self.work / PAGE_FILE) as temporary:
            temporary.write_text(render(self.rows, taken, self.budget_db, facts), encoding="utf-8")
