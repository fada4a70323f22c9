"""The stage `provider` of `benchmarks.gpu`: does ONNX Runtime compute on this device what it computes on the CPU?"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Row, Stage
from benchmarks.training import pair_folders
from drsformer.data import dataset_name, find_pairs
from drsformer.evaluation import evaluate_derainer
from export.canaries import add_canaries
from export.onnx import ExportOptions, export
from export.options import Precision
from export.tensorrt import MODEL_FILE
from runtime.bundle import save
from runtime.canary import ask
from runtime.errors import InputError
from runtime.ort import OrtSession
from runtime.session import Derainer, describe_onnx

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")


@dataclass(frozen=True)
class Provider(Stage):
    """Does ONNX Runtime compute on this device what it computes on the CPU? For the networks given by --weights: how it
    answers their canaries, and what it loses on pairs against float32 on the CPU.

    Args:
        data: Folder of rain data for the drift in dB.
        limit: Pairs of each validation folder, the first ones.
    """

    data: Path | None = None
    limit: int = 9

    def measure(self) -> Row:
        if not self.weights:
            raise InputError("`weights`: expected networks, found none")
        sheet = self.sheet()
        folders = pair_folders(self.data, "val") if self.data else []
        with tempfile.TemporaryDirectory() as work:
            for weights in self.weights:
                for precision in PRECISIONS:
                    path, key = Path(work, weights.stem, precision, MODEL_FILE), f"{weights.stem} {precision}"
                    arguments = weights, precision, path, sheet.device.type
                    sheet.measure(f"{key} canaries", functools.partial(self.canaries, *arguments))
                    for folder in folders:
                        drift = functools.partial(self.drift, *arguments, folder)
                        sheet.measure(f"{key} {dataset_name(folder)}", drift)
        return sheet.summary()

    @staticmethod
    def canaries(weights: Path, precision: Precision, path: Path, provider: str) -> Row:
        """Of a bundle with the model: the lowest PSNR between an answer and the known one, and the floors."""
        exported(weights, precision, path)
        bundle = save(add_canaries(describe_onnx(path), path.parent), path.parent)
        answers = ask(OrtSession(bundle, provider), bundle)
        return {
            "passed": all(answer.passed for answer in answers),
            "PSNR dB": min(answer.psnr for answer in answers),
            "floor dB": max(answer.canary.floor_db for answer in answers),
        }

    def drift(self, weights: Path, precision: Precision, path: Path, provider: str, folder: Path) -> Row:
        """PSNR on Y of the first pairs on the device, and how far it is from that of float32 on the CPU."""
        reference = path.parent.with_name("fp32") / MODEL_FILE
        exported(weights, precision, path)
        exported(weights, "fp32", reference)
        pairs = find_pairs(folder)[: self.limit]
        here, cpu = (
            evaluate_derainer(Derainer(OrtSession(model, name)), pairs)
            for model, name in ((path, provider), (reference, "cpu"))
        )
        drifts = [here.rows[name]["psnr"] - row["psnr"] for name, row in cpu.rows.items()]
        return {
            "PSNR on Y": here.psnr,
            "drift dB": here.psnr - cpu.psnr,
            "worst drift dB": min(drifts),
            "images": here.images,
        }


def exported(weights: Path, precision: Precision, path: Path) -> None:
    """Export a model, unless it has been."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        export(weights, path, ExportOptions(precision=precision))
