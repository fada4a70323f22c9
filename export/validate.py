"""Does a candidate still do what the full model does? Both restore the same images, and a budget decides.

    python -m export.validate --reference W --candidate model.onnx --data Rain200L/test --max-drop-db 0.05
    python -m export.validate --reference W --candidate pruned.safetensors --data DIR --max-drop-db 0.3 --report out/
    python -m export.validate --reference W --candidate model.onnx --data photos/ --min-psnr 50
    python -m export.validate --reference W --candidate model.onnx --data Rain200L/test --tile 256x256

The reference is a checkpoint and runs in PyTorch in float32; the candidate, a .onnx file, a bundle with one or another
checkpoint, runs in its own runtime. Both get and give uint8 images by the one contract of `runtime.session.Derainer`,
as users do.

With ground truth (DATA in any layout of `drsformer.data`) the drop is the reference's PSNR minus the candidate's, and
--max-drop-db bounds its mean over the images. It says nothing about how alike two networks are that are both bad.
That is the PSNR between the two outputs, which --min-psnr bounds on every single image. It needs no ground truth, and
is all there is for a folder of plain images. Exit status: 0 within the budget or without one, 1 outside, 2 for bad
input.

Top-k selections that flip explain most of the drift between correct runtimes, so they are counted, layer by layer, from
the scores of both networks. The .onnx file itself makes the image that is judged; its scores come from a second run
of a copy that returns them, at the price of twice the time and memory.

With --tile the candidate restores each image in tiles, as `runtime.tiling` does with images that do not fit, and the
reference the same image as a whole: give both the same network to see what tiles cost. Flips are not counted then.

Polygraphy runs the two, one image at a time, since it keeps all outputs of a run. The metrics are those of
`drsformer.metrics`; Polygraphy's PSNR takes the largest value of an array for its peak.
"""

from __future__ import annotations

import dataclasses
import operator
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.datatype import DataType
from polygraphy.logger import G_LOGGER
from rich.console import Console
from torch import Tensor

from drsformer import checkpoint, metrics
from drsformer.data import LayoutError, Pair, find_pairs
from drsformer.session import TorchSession
from export.onnx import ScoreProbe
from export.report import Comparison, Crop, Validation, render
from export.topk import count_flips, masks, scores_of
from runtime.bundle import load_to_change, private_key, save
from runtime.cli import main, parse_size, progress
from runtime.errors import InputError
from runtime.files import writing
from runtime.images import list_images, read_rgb
from runtime.manifest import Drift
from runtime.ort import OrtSession
from runtime.pixels import Size
from runtime.session import Derainer, Provider, Session, open_session
from runtime.trt import TrtSession

CROP = 96
"""Height and width of the parts of images in the report."""

CROPS_SHOWN = 6
"""How many of the worst images the report shows a part of."""


Scores = dict[str, Tensor]
"""What attention looked at in one run, by layer: (1, heads, d, 1, d)."""


class Observed(Session):
    """A session, in whatever engine, and what its attention looked at.

    session:     what runs.
    run_observed: runs it: a batch as for `Session.run` -> its answer, and the scores.
    ks:          how many scores each mask keeps, by attention layer; empty where the engine does not tell its scores.
    description: what it is, for people.
    weights_sha256: hash of the checkpoint that it comes from, or "unknown".
    scores:      of the last run.
    """

    def __init__(
        self,
        session: Session,
        run_observed: Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], Scores]],
        ks: dict[str, tuple[int, ...]],
        description: str,
        weights_sha256: str,
    ) -> None:
        self.session, self.ks, self.weights_sha256 = session, ks, weights_sha256
        self.description = f"{description}, weights {weights_sha256[:12]}"
        self.multiple, self.limits = session.multiple, getattr(session, "limits", ())
        self.scores: Scores = {}
        self._run_observed = run_observed

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        output, self.scores = self._run_observed(batch)
        return output


def observe_checkpoint(path: Path, provider: Provider) -> Observed:
    """A checkpoint in PyTorch, on the CPU or on CUDA where the provider says so, else on what there is."""
    trained = checkpoint.load(path)
    session = TorchSession(trained.model, provider if provider in ("cpu", "cuda") else "auto")

    def run(batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], Scores]:
        with scores_of(session.model) as scores, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            output = session.run(batch)
        return output, {layer: tensor.cpu() for layer, tensor in scores.items()}

    ks = {layer: mask.ks for layer, mask in masks(trained.model).items()}
    return Observed(session, run, ks, f"{path}, PyTorch on {session.device}", trained.sha256)


def observe_model(session: OrtSession) -> Observed:
    """A .onnx file in ONNX Runtime, and a copy of it that returns its scores."""
    probe = ScoreProbe(session.path, session.provider)
    weights, pattern = (session.metadata.get(key, "unknown") for key in ("weights_sha256", "topk"))
    description = f"{session.path}, ONNX Runtime on {session.provider}, top-k by {pattern}"
    return Observed(session, lambda batch: (session.run(batch), probe(batch)), probe.ks, description, weights)


def observe_engine(session: TrtSession) -> Observed:
    """An engine of a bundle, which does not tell its scores."""
    description = f"{session.path}, {session.engine.flavor} {session.engine.version}"
    weights = session.bundle.manifest.model.weights_sha256 or "unknown"
    return Observed(session, lambda batch: (session.run(batch), {}), {}, description, weights)


def open_candidate(path: Path, provider: Provider = "auto") -> Observed:
    """Whatever can be held against the full model, ready to run; of a bundle what a `Derainer` runs. Raises InputError
    for anything else."""
    if path.is_dir() or path.suffix == ".onnx":
        session = open_session(path, provider)
        return observe_model(session) if isinstance(session, OrtSession) else observe_engine(session)
    if path.suffix in (".safetensors", ".pth", ".pt"):
        return observe_checkpoint(path, provider)
    raise InputError(f"`candidate`: expected a bundle or a .onnx, .safetensors or .pth file, found {path}")


class Runner(BaseRunner):
    """A session as Polygraphy sees it: `image` in; `restored`, an image as well, and the scores by layer out."""

    def __init__(self, name: str, session: Observed, tile: Size | None = None, overlap: int | None = None) -> None:
        super().__init__(name=name)
        self.session = session
        self.derain = Derainer(session, tile=tile, overlap=overlap)

    def get_input_metadata_impl(self) -> TensorMetadata:
        return TensorMetadata().add("image", DataType.from_dtype(np.dtype(np.uint8)), (None, None, 3))

    def infer_impl(self, feed_dict: dict[str, NDArray[np.uint8]]) -> OrderedDict[str, NDArray | Tensor]:
        started = time.perf_counter()
        restored = self.derain(feed_dict["image"])
        self.inference_time = time.perf_counter() - started
        return OrderedDict(restored=restored, **self.session.scores)


def validate(
    reference: Path,
    candidate: Path,
    data: Path,
    max_drop_db: float | None = None,
    min_psnr: float | None = None,
    protocol: metrics.Protocol = "rain200",
    report: Path | None = None,
    limit: int | None = None,
    provider: Provider = "auto",
    tile: str | None = None,
    overlap: int | None = None,
    record: bool = False,
    sign: Path | None = None,
) -> Validation:
    """Compare a candidate with its reference on images, print what was found, and say whether it keeps the budget.

    Raises InputError for arguments, files or images that cannot be used.

    Args:
        reference: Checkpoint of the full model.
        candidate: What is to be judged: a .onnx file, a bundle, or another checkpoint.
        data: Folder of rainy and clean images, or of any images.
        max_drop_db: Budget for the drop in PSNR, mean over the images; needs clean images.
        min_psnr: Budget for the PSNR between the two outputs, on every image.
        protocol: How to measure; rain200 for Rain200L, Rain200H and SPA-Data, did for DID-Data and DDN-Data.
        report: The .html file to write, or the folder for a report.html.
        limit: Use only so many images, the first ones.
        provider: Where both run; auto is CUDA where there is one, else the CPU. Of a bundle with engines auto judges
            the one for this GPU, where there is one that runs, else the model.
        tile: Height x width, such as 256x256, of tiles in which the candidate restores; if not given, an image that it
            cannot take as a whole is refused.
        overlap: Pixels that tiles share; 64 by default, or a quarter of the shorter side.
        record: Write what was measured into the manifest of the bundle, if it keeps the budget.
        sign: Private key, Ed25519 in PEM, to sign that manifest with.
    """
    if limit is not None and limit < 1:
        raise InputError(f"`limit`: expected at least 1, found {limit}")
    if record and not candidate.is_dir():
        raise InputError(f"`record`: expected a bundle as --candidate, found {candidate}")
    if sign and not record:
        raise InputError("`sign`: expected --record with it, which changes the manifest that is signed")
    if record:
        load_to_change(candidate, sign)  # before the work
    if sign:
        private_key(sign)
    if record and tile:
        raise InputError("`record`: expected whole images, as the manifest says, found --tile")
    sources = _find(data)[:limit]
    if max_drop_db is not None and not isinstance(sources[0], Pair):
        raise InputError(f"`max_drop_db`: {data} has no ground truth to measure a drop against; give --min-psnr")
    sessions = observe_checkpoint(reference, provider), open_candidate(candidate, provider)
    size = parse_size("tile", tile, sessions[1].multiple) if tile else None
    if size:
        sessions[1].ks = {}  # each tile makes selections of its own
    runners = [Runner("reference", sessions[0]), Runner("candidate", sessions[1], size, overlap)]
    images: list[Comparison] = []
    worst: list[tuple[Comparison, Crop]] = []
    selections: dict[str, int] = {}
    with progress() as bar, G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        for source in bar.track(sources, description="Comparing"):
            image, target = source.load() if isinstance(source, Pair) else (read_rgb(source), None)
            try:
                plan = runners[1].derain.plan(*image.shape[:2])
                if not size and plan.count > 1:
                    raise InputError(
                        f"expected an image that the candidate takes as a whole, found one for {plan}; "
                        "give --tile to judge tiles"
                    )
                ours, theirs = (results[0] for _, results in Comparator.run(runners, data_loader=[{"image": image}]))
                selections = _shared_selections(*sessions)
                flips = {layer: count_flips(ours[layer], theirs[layer], sessions[0].ks[layer]) for layer in selections}
                comparison = _compare(source.name, ours["restored"], theirs["restored"], target, flips, protocol)
            except (InputError, ValueError) as error:
                raise InputError(f"{source.name}: {error}") from error
            images.append(comparison)
            if comparison.max_difference:
                worst.append((comparison, _crop(image, ours["restored"], theirs["restored"])))
                worst.sort(key=lambda entry: entry[0].badness, reverse=True)
                del worst[CROPS_SHOWN:]
    facts = {
        "reference": sessions[0].description,
        "candidate": sessions[1].description,
        "images": f"{len(images)} of {data}" + (f", protocol {protocol}" if isinstance(sources[0], Pair) else ""),
    }
    if size:
        facts["tiles"] = f"{tile}, {runners[1].derain.plan(*size).overlap} pixels of overlap"
    uncounted = [] if size else [layer for layer in sessions[0].ks if layer not in selections]
    crops = {comparison.name: crop for comparison, crop in worst}
    validation = Validation(facts, images, selections, uncounted, crops, max_drop_db, min_psnr)
    Console().print(validation.table())
    if uncounted:
        print(f"Flips are not counted in {len(uncounted)} layers that the candidate does not have alike.")
    if report:
        report = report if report.suffix == ".html" else report / "report.html"
        with writing(report) as temporary:
            temporary.write_text(render(validation), encoding="utf-8")
        print(f"Report: {report}")
    print(validation.verdict)
    judged = sessions[1].session
    if record and validation.passed and isinstance(judged, (OrtSession, TrtSession)):
        _record(
            candidate, sessions[0].weights_sha256, judged.path.name, judged.provider, data, protocol, validation, sign
        )
    return validation


def _record(
    folder: Path,
    reference: str,
    file: str,
    provider: str,
    data: Path,
    protocol: str,
    validation: Validation,
    sign: Path | None,
) -> None:
    """Put what was measured on a file of a bundle into its manifest, in place of what was on the same data against the
    same reference."""
    manifest = load_to_change(folder, sign)
    found = {**validation.summary(), "max_difference": max(image.max_difference for image in validation.images)}
    drift = Drift(
        file=file,
        provider=provider,
        reference_sha256=reference,
        data=f"{data.resolve().parent.name}/{data.resolve().name}",
        protocol=protocol if "drop_db" in found else None,
        **{field.name: found[field.name] for field in dataclasses.fields(Drift) if field.name in found},
    )
    same = operator.attrgetter("file", "provider", "reference_sha256", "data")
    others = (former for former in manifest.drift if same(former) != same(drift))
    save(dataclasses.replace(manifest, drift=(*others, drift)), folder, sign)


def _find(data: Path) -> list[Pair] | list[Path]:
    """The pairs in a folder, or else the images in it."""
    try:
        return find_pairs(data)
    except LayoutError:
        if data.is_dir() and (images := list_images(data)):
            return images
        raise


def _shared_selections(reference: Observed, candidate: Observed) -> dict[str, int]:
    """How many selections an image takes, by layer, in the layers whose scores the two have alike."""
    return {
        layer: reference.scores[layer][..., 0].numel() * sum(ks)
        for layer, ks in reference.ks.items()
        if candidate.ks.get(layer) == ks and candidate.scores[layer].shape == reference.scores[layer].shape
    }


def _compare(
    name: str,
    reference: NDArray[np.uint8],
    candidate: NDArray[np.uint8],
    target: NDArray[np.uint8] | None,
    flips: dict[str, int],
    protocol: metrics.Protocol,
) -> Comparison:
    quality = {}
    if target is not None:
        for who, restored in (("reference", reference), ("candidate", candidate)):
            quality[f"{who}_psnr"] = metrics.psnr(restored, target, protocol)
            quality[f"{who}_ssim"] = metrics.ssim(restored, target, protocol)
    difference = int(np.abs(reference.astype(int) - candidate).max())
    return Comparison(name, metrics.psnr_rgb(reference, candidate), difference, flips, **quality)


def _crop(image: NDArray[np.uint8], reference: NDArray[np.uint8], candidate: NDArray[np.uint8]) -> Crop:
    """The window with the largest sum of squared differences between the outputs."""
    squared = ((reference.astype(int) - candidate) ** 2).sum(2)
    h, w = (min(CROP, length) for length in squared.shape)
    sums = np.pad(squared.cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # of everything above and to the left
    windows = sums[h:, w:] - sums[:-h, w:] - sums[h:, :-w] + sums[:-h, :-w]
    top, left = (int(i) for i in np.unravel_index(windows.argmax(), windows.shape))
    return Crop(top, left, *(array[top : top + h, left : left + w].copy() for array in (image, reference, candidate)))


if __name__ == "__main__":
    main(validate, __doc__, summary=Validation.summary, status=lambda validation: 0 if validation.passed else 1)
