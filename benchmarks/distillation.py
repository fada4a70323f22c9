"""Which terms of the loss help a student most? The ablation behind the defaults of `compress.distill`.

    python -m benchmarks.distillation --teacher weights/drsformer-xs.safetensors --student half.safetensors \\
        --data ../shared/data --run-dir runs/terms --output runs/terms

The same student, such as a pruned teacher, is distilled once for each row of `VARIANTS`, on the same patches in the
same order, and scored on all validation pairs. OUTPUT/distillation.json, and the same as a table in
OUTPUT/distillation.md, are written row by row; the same command goes on where it was stopped.

It is small: few steps, one seed. Differences of some hundredths of a dB say nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.harness import Row, Sheet
from benchmarks.training import pair_folders
from compress.distill import DistillOptions, distill
from compress.distillation import last_heads
from compress.options import LossWeights
from drsformer import checkpoint
from drsformer.config import LEVELS
from drsformer.data import dataset_name, find_pairs
from drsformer.evaluation import evaluate_model
from drsformer.recipe import DataOptions, Hardware, Recipe, Schedule
from drsformer.train import training_shown
from runtime.cli import main

VARIANTS = {
    "ground truth alone": LossWeights(l1_teacher=0),
    "teacher's output alone": LossWeights(l1=0),
    "both": LossWeights(),
    "both and features": LossWeights(features=0.01),
    "both and attention": LossWeights(attention=1.0),
    "both and frequency": LossWeights(frequency=0.1),
}
"""Weights of the further terms are such that each starts at a fraction of the first two. Attention is compared in all
levels where student and teacher have the same heads."""


def distillation(
    teacher: Path,
    student: Path,
    data: Path,
    run_dir: Path,
    output: Path,
    iterations: int = 150,
    lr: float = 4e-4,
    batch: int = 4,
    patch: int = 96,
) -> Row:
    """Distil the student with each variant of the loss, and score it.

    Args:
        teacher: Checkpoint to learn from.
        student: Checkpoint to start from.
        data: Folder of rain data: NAME/train and NAME/val with pairs, for every NAME.
        run_dir: Folder of the runs.
        output: Folder that gets the results.
        iterations: Steps of each run.
        lr: Learning rate at the start.
        batch: Patches in a step.
        patch: Height and width of a patch.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sheet = Sheet(output, "distillation", device, float("inf"))
    recipe = Recipe(
        iterations, constant=0, warmup=iterations // 10, lr=lr, batch=batch, patch=patch, clip=0.1, ema=0.98
    )

    def scored(weights: Path) -> Row:
        row: Row = {}
        for place in pair_folders(data, "val"):
            scores = evaluate_model(checkpoint.load(weights).model.to(device), find_pairs(place))
            row |= {f"{dataset_name(place)} PSNR": scores.psnr, f"{dataset_name(place)} SSIM": scores.ssim}
        return row

    configs = [checkpoint.load(path).model.config for path in (teacher, student)]
    found = {level: {last_heads(config, level) for config in configs} for level in LEVELS}
    shared = [level for level, shapes in found.items() if len(shapes) == 1 and None not in shapes]
    sheet.measure("teacher", lambda: scored(teacher))
    sheet.measure("student before", lambda: scored(student))
    for number, (name, variant) in enumerate(VARIANTS.items()):

        def run(number: int = number, variant: LossWeights = variant) -> Row:
            options = DistillOptions(
                run_dir / str(number),
                teacher,
                str(student),
                pair_folders(data, "train"),
                loss_weights=replace(variant, attention_levels=shared),
                recipe=recipe,
                data_options=DataOptions(dry=0.05),
                hardware=Hardware(devices="1", channels_last=True),
                schedule=Schedule(log_every=max(1, iterations // 10)),
            )
            with training_shown() as on_progress:
                distill(options, on_progress)
            return scored(options.output / "last.safetensors")

        sheet.measure(name, run)
    return sheet.summary()


if __name__ == "__main__":
    main(distillation, __doc__, summary=lambda summary: summary)
