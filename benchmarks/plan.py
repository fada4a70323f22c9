"""What is to be found out where a GPU is at hand, the most wanted first: five steps, each one command.

    python -m benchmarks.plan answers     --output benchmarks/results/h100
    python -m benchmarks.plan onnxruntime --output benchmarks/results/h100 --weights weights/*.safetensors --data data/
    python -m benchmarks.plan missing     --output benchmarks/results/h100 --weights weights/*.safetensors --data data/
    python -m benchmarks.plan training    --output benchmarks/results/h100 --weights weights/*.safetensors \\
        runs/drsformer-m.safetensors weights/teacher/drsformer-m-50.safetensors --data data/ --run-dir runs/
    python -m benchmarks.plan kernels     --output benchmarks/results/h100

    answers      what TensorRT for RTX and TensorRT say on this card, word for word
    onnxruntime  ONNX Runtime's CUDA provider: how fast, with input and output bound and as a CUDA graph; how far from
                 the CPU, and how it answers the canaries
    missing      what no table has yet: the released network compiled, further sizes and batches, memory by size, the
                 drift in dB
    training     drsformer-xs, -s and -m trained on, then m distilled into what was pruned from it
    kernels      the kernels of `export.fused`, which no GPU has run: are they right, how fast are they beside the
                 compiled network, and where does the time go

A step is one or more stages of `benchmarks.gpu` with what is wanted of them, and everything said there holds: rows are
written one by one, and the same command goes on where it was stopped, by a limit of time or by force. --device cpu with
a small --network, --sizes and --recipe try a step out anywhere.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks.answers import Answers
from benchmarks.gpu import Correct, Kernels, Speed, training_failed
from benchmarks.harness import Row, Stage
from benchmarks.provider import Provider
from benchmarks.training import Train
from runtime.cli import main

Step = Literal["answers", "onnxruntime", "missing", "training", "kernels"]


@dataclass(frozen=True)
class Wanted(Stage):
    """What all steps are told; each takes what it needs.

    Args:
        data: Folder of rain data, such as benchmarks.pack unpacks.
        run_dir: Folder of engines and runs, which stays on this machine.
        sizes: Heights and widths, instead of those of the step.
        batches: Numbers of images at once, likewise.
        recipe: Networks to train, likewise; see PLANS in benchmarks/training.py.
        minutes_each: Minutes for which each network is trained at the most.
    """

    data: Path | None = None
    run_dir: Path = Path("runs")
    sizes: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1, 8)
    recipe: tuple[str, ...] = ("xs-3", "s-2", "m-4", "m-50", "m-25", "m-15")
    minutes_each: float = 4.0

    def common(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Stage)}


def answers(wanted: Wanted) -> list[Stage]:
    size = wanted.sizes[0] if wanted.sizes else "256x256"
    return [Answers(**wanted.common(), size=size, run_dir=wanted.run_dir / "answers")]


def onnxruntime(wanted: Wanted) -> list[Stage]:
    sizes = wanted.sizes or ("256x256", "720x1280")
    return [
        Provider(**wanted.common(), data=wanted.data),
        Speed(**wanted.common(), sizes=sizes, batches=wanted.batches, only=("ONNX Runtime",)),
    ]


def missing(wanted: Wanted) -> list[Stage]:
    sizes = wanted.sizes or ("720x1280", "256x256", "512x512", "1080x1920")
    large = wanted.sizes[0] if wanted.sizes else Correct.large
    only = "released torch.compile", "folded torch.compile", "released eager"
    return [
        Speed(**wanted.common(), sizes=sizes, batches=wanted.batches, only=only),
        Correct(**wanted.common(), sizes=sizes, large=large, data=wanted.data),
    ]


def training(wanted: Wanted) -> list[Stage]:
    return [
        Train(
            **wanted.common(),
            recipe=wanted.recipe,
            data=wanted.data,
            run_dir=wanted.run_dir,
            minutes_each=wanted.minutes_each,
            state_limit_mb=40,
        )
    ]


def kernels(wanted: Wanted) -> list[Stage]:
    sizes = wanted.sizes or ("720x1280", "256x256")
    return [
        Speed(
            **wanted.common(),
            sizes=sizes,
            batches=wanted.batches[:1],
            only=("fused", "folded torch.compile CUDA graph fp16"),
        ),
        Kernels(**wanted.common(), sizes=sizes[:1], only=("fused",)),
    ]


STEPS: dict[Step, Callable[[Wanted], list[Stage]]] = {
    "answers": answers,
    "onnxruntime": onnxruntime,
    "missing": missing,
    "training": training,
    "kernels": kernels,
}


def plan(
    step: Annotated[Step, tyro.conf.Positional], wanted: Annotated[Wanted, tyro.conf.arg(name="")]
) -> dict[str, Row]:
    """Work through a step.

    Args:
        step: Which one.
        wanted: With what.

    Returns:
        The summary of each of its stages.

    Raises:
        InputError: A file, a name or the device cannot be used.
    """
    deadline = time.monotonic() + 60 * wanted.minutes
    summaries = {}
    for stage in STEPS[step](wanted):
        left = max(0.0, deadline - time.monotonic()) / 60
        summaries[type(stage).__name__.lower()] = dataclasses.replace(stage, minutes=left).measure()
    return summaries


if __name__ == "__main__":
    main(
        plan,
        __doc__,
        summary=lambda summaries: summaries,
        status=lambda summaries: max(map(training_failed, summaries.values())),
    )
