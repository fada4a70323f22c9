"""What a validation runs: networks in whatever engine, what their attention looks at, and Polygraphy around them.

reference, candidate = open_reference(Path("full.safetensors")), open_candidate(Path("bundle"))
outputs = run([Runner("reference", reference), Runner("candidate", candidate)], image)
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.datatype import DataType
from polygraphy.logger import G_LOGGER
from torch import Tensor

from drsformer import checkpoint
from drsformer.config import DRSformerConfig
from drsformer.session import TorchSession
from export.comparison import Timing
from export.topk import masks, scores_of
from export.verification import ScoreProbe, Scores
from runtime.errors import InputError
from runtime.ort import OrtSession
from runtime.pixels import Size
from runtime.progress import OnProgress, silent
from runtime.session import Derainer, Provider, Session, open_session
from runtime.timing import alternate, noise
from runtime.trt import TrtSession

TIMED_SIDE = 256
"""Height and width of the image on which two networks are timed, where both take it; as the MACs are counted."""

TIMED_ROUNDS, TIMED_SECONDS = 3, 3.0
"""How often two networks are timed: at least so many rounds, and as many as fit into so many seconds."""

Observation = Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], Scores]]
"""Runs a batch as `Session.run` does: its answer, and the scores."""


class Observed(Session):
    """A session, in whatever engine, and what its attention looked at.

    Attributes:
        session: What runs.
        path: File that it was read from.
        ks: How many scores each mask keeps, by attention layer; empty where the engine does not return its scores.
        description: What it is besides, for people.
        weights_sha256: Hash of the checkpoint that it comes from, or "unknown".
        origin: What a checkpoint was trained on, as `drsformer.checkpoint.Checkpoint.origin` says it.
        config: Of the network; None where it is not known.
        scores: Scores of the last run.
    """

    def __init__(
        self,
        session: Session,
        observe: Observation,
        path: Path,
        ks: dict[str, tuple[int, ...]],
        description: str,
        weights_sha256: str,
        origin: str = "",
        config: DRSformerConfig | None = None,
    ) -> None:
        self.session, self.path, self.ks = session, path, ks
        self.weights_sha256, self.origin, self.config = weights_sha256, origin, config
        self.description = f"{description}, weights {weights_sha256[:12]}"
        self.multiple, self.limits = session.multiple, getattr(session, "limits", ())
        self.scores: Scores = {}
        self._observe = observe

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        output, self.scores = self._observe(batch)
        return output


def open_reference(path: Path, provider: Provider = "auto", weights_key: str | None = None) -> Observed:
    """A checkpoint in PyTorch, on the CPU or on CUDA where the provider says so, else on what there is.

    Args:
        path: The checkpoint.
        provider: Where to run.
        weights_key: See `drsformer.checkpoint.load`.
    """
    trained = checkpoint.load(path, weights_key)
    session = TorchSession(trained.model, provider if provider in ("cpu", "cuda") else "auto")

    def observe(batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], Scores]:
        with scores_of(session.model) as scores, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            output = session.run(batch)
        return output, {layer: tensor.cpu() for layer, tensor in scores.items()}

    ks = {layer: mask.ks for layer, mask in masks(trained.model).items()}
    description = f"PyTorch on {session.device}, {trained.origin}"
    return Observed(session, observe, path, ks, description, trained.sha256, trained.origin, trained.model.config)


def open_candidate(path: Path, provider: Provider = "auto") -> Observed:
    """Whatever can be held against the full model: of a bundle what a `Derainer` runs, a .onnx file or a checkpoint.

    Raises:
        InputError: The path leads to anything else, or to what cannot run.
    """
    if path.is_dir() or path.suffix == ".onnx":
        session = open_session(path, provider, canary="never")  # it is about to be judged by more
        return _observed_model(session) if isinstance(session, OrtSession) else _observed_engine(session)
    if path.suffix in (".safetensors", ".pth", ".pt"):
        return open_reference(path, provider)
    raise InputError(f"`candidate`: expected a bundle or a .onnx, .safetensors or .pth file, found {path}")


def _observed_model(session: OrtSession) -> Observed:
    """A .onnx file in ONNX Runtime, and a copy of it that returns its scores."""
    probe = ScoreProbe(session.path, session.provider)
    weights, pattern = (session.metadata.get(key, "unknown") for key in ("weights_sha256", "topk"))
    description = f"ONNX Runtime on {session.provider}, top-k by {pattern}"
    return Observed(
        session,
        lambda batch: (session.run(batch), probe(batch)),
        session.path,
        probe.ks,
        description,
        weights,
        config=_config(session.metadata.get("config", "")),
    )


def _config(text: str) -> DRSformerConfig | None:
    """The config in the metadata of a model; None where it has none of ours."""
    try:
        return DRSformerConfig.from_dict(json.loads(text))
    except ValueError:
        return None


def _observed_engine(session: TrtSession) -> Observed:
    """An engine of a bundle, which does not return its scores."""
    description = f"{session.engine.flavor} {session.engine.version}"
    weights = session.bundle.manifest.model.weights_sha256 or "unknown"
    return Observed(session, lambda batch: (session.run(batch), {}), session.path, {}, description, weights)


def same_weights(reference: Observed, candidate: Observed) -> bool:
    """Whether both have the same weights: two checkpoints with equal ones, or one with those of the other in half
    precision; anything else by the hash of the checkpoint that it comes from."""
    if not (isinstance(reference.session, TorchSession) and isinstance(candidate.session, TorchSession)):
        return reference.weights_sha256 == candidate.weights_sha256
    first, second = reference.session.model.state_dict(), candidate.session.model.state_dict()
    return _rounds_to(first, second) or _rounds_to(second, first)


def _rounds_to(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and any(
        all(torch.equal(tensor.to(dtype).float(), second[name]) for name, tensor in first.items())
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    )


class Runner(BaseRunner):
    """A session as Polygraphy sees it: `image` in and `restored` out, both uint8 (H, W, 3).

    Attributes:
        session: What runs.
        derain: What makes images of it, in tiles where they are given.
    """

    def __init__(self, name: str, session: Observed, tile: Size | None = None, overlap: int | None = None) -> None:
        super().__init__(name=name)
        self.session = session
        self.derain = Derainer(session, tile=tile, overlap=overlap)

    def get_input_metadata_impl(self) -> TensorMetadata:
        return TensorMetadata().add("image", DataType.from_dtype(np.dtype(np.uint8)), (None, None, 3))

    def infer_impl(self, feed_dict: dict[str, NDArray[np.uint8]]) -> OrderedDict[str, NDArray[np.uint8]]:
        started = time.perf_counter()
        restored = self.derain(feed_dict["image"])
        self.inference_time = time.perf_counter() - started
        return OrderedDict(restored=restored)


def run(runners: Sequence[Runner], image: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """What each makes of a uint8 (H, W, 3) image; the scores are left in their sessions. One image at a time, since
    Polygraphy keeps all outputs of a run."""
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = Comparator.run(list(runners), data_loader=[{"image": image}])
    return [iteration["restored"] for _, (iteration,) in results]


def time_in_turn(reference: Observed, candidate: Observed, on_progress: OnProgress = silent) -> Timing:
    """How long two networks take for one image, in their engines and without being observed.

    Args:
        reference: The one.
        candidate: The other. Where it is made for certain sizes, one of them is taken.
        on_progress: Is told how far it is.
    """
    low, high = candidate.limits[0] if candidate.limits else ((1, 1), (TIMED_SIDE, TIMED_SIDE))
    height, width = (max(least, min(TIMED_SIDE, most)) for least, most in zip(low, high, strict=True))
    image, both = noise(height, width), (reference, candidate)
    calls = [partial(Derainer(observed.session), image) for observed in both]
    taken = 1000 * alternate(calls, TIMED_SECONDS, TIMED_ROUNDS, on_progress)
    places = [observed.description.partition(",")[0] for observed in both]
    first, second = np.median(taken, axis=1).round(3).tolist()
    ratio = round(np.median(taken[1] / taken[0]).item(), 4)
    return Timing((height, width), taken.shape[1], places[0], places[1], first, second, ratio)
