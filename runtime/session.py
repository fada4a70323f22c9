"""The image contract on top of that of engines, and how a model becomes a session.

An engine is whatever offers `runtime.contract.Session`. `Derainer` stands on any of them and is the only place that
knows how an image becomes the network's input and back, so that no two engines can disagree about padding or rounding.
It runs the whole image at once, as the authors do: the network's attention is global, and tiles change its answer.
Memory grows with the image, so one that does not fit is cut into tiles all the same, by `runtime.tiling`.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, cast, get_args

import numpy as np
from numpy.typing import NDArray

from . import tiling
from .bundle import Bundle, describe_file, load
from .canary import When, check
from .choice import choose_engine
from .contract import Session
from .errors import DeviceError, InputError, InvalidImage, OutOfMemory, UnprovenError, expect_between
from .machine import has_gpu
from .manifest import Manifest, describe
from .memory import available
from .pixels import GraphIO, expect_finite, to_batch, to_image

if TYPE_CHECKING:  # they load what they drive, which takes its time
    from .footprint import Footprint
    from .ort import OrtSession
    from .trt import TrtSession

logger = logging.getLogger(__name__)

Provider = Literal["auto", "cpu", "cuda", "ort-tensorrt", "tensorrt"]
"""Where a network runs; see `open_session`."""

PROVIDERS: tuple[Provider, ...] = get_args(Provider)

IMAGE_BYTES = 36
"""Bytes that an image takes for each of its pixels outside of the network, from the caller's to the answer."""

AMPLE_BYTES = 32_000
"""Bytes for each pixel with which no network has to be measured: `runtime.footprint.MARGIN` times the most that the
full one took in ONNX Runtime."""

BATCH = 8
"""Images at once, of a graph that takes any number, where nothing else is asked for."""


class Derainer:
    """Takes the rain out of images. Keeps no state between calls, so threads may share one.

    Tiles depend on the memory, and the answer on the tiles: give `tile` for the same bytes on every machine.

    Args:
        model: Path of a bundle or of a .onnx file, or a session of any engine; None is the network that ships with the
            project.
        provider: See `open_session`; not for a session.
        public_key: Key (PEM, Ed25519) of the one who has to have signed the bundle.
        memory: Bytes that the whole process may take for one image; None is three quarters of what is free when this
            object is made, where the system and the session tell. Threads that share one take it each.
        tile: Height and width of the tiles into which larger images are cut, whatever the memory.
        overlap: Pixels that those tiles share; None is 64, or a quarter of the shorter side.
        canary: See `open_session`, as for the next two; not for a session.
        require_proof: Run only what the bundle's manifest says was judged against the full model.
        threads: CPU threads, 0 for all cores.
        batch: Images that `run_batch` hands to the network at once, if that takes so many; None is as many as it
            takes, or `BATCH` of a graph that takes any number.
        device: CUDA's number of the GPU, see `open_session`.

    Raises:
        InvalidModel: For a model that cannot be loaded, and a bundle whose files are not those of its manifest, or not
            proven where that is required.
        DeviceError: For a provider that is not there, or that answers a canary wrongly.
        InputError: For a memory, tile, overlap or batch that cannot be, and a GPU with the provider cpu.
    """

    session: Session

    def __init__(
        self,
        model: Session | str | os.PathLike[str] | None = None,
        provider: str = "auto",
        public_key: str | os.PathLike[str] | None = None,
        memory: int | None = None,
        tile: tiling.Size | None = None,
        overlap: int | None = None,
        canary: When = "first",
        require_proof: bool = False,
        threads: int = 0,
        batch: int | None = None,
        device: int | None = None,
    ) -> None:
        if batch is not None:
            expect_between("batch", batch, 1)
        if memory is not None and tile:
            raise InputError("expected a memory or a tile, found both")
        if overlap is not None and not tile:
            raise InputError("expected an overlap only with a tile")
        if model is None or isinstance(model, (str, os.PathLike)):
            model = open_session(model, provider, threads, public_key, canary, require_proof, device)
        elif public_key is not None or require_proof:
            raise InputError("expected the path of a bundle, whose signature or proof is demanded, found a session")
        self.session = model
        self._tile, self._overlap, self._batch = tile, overlap, batch
        self._threads: dict[int, ThreadPoolExecutor] = {}
        if memory is None:
            free = available()
            self._memory = math.inf if free is None else free * 0.75
        elif footprint := self._footprint:
            self._memory = memory - footprint.fixed
        else:
            raise InputError(
                "how much memory a network takes is known only with the provider cpu, on Linux; give the "
                "size of tiles in place of a memory"
            )
        if tile:
            self.plan(tile[0] + 1, tile[1] + 1)  # raises for tiles into which nothing could be cut

    def __call__(self, image: NDArray[np.uint8], on_tile: tiling.OnTile | None = None) -> NDArray[np.uint8]:
        """uint8 (H, W, 3) RGB with H, W >= 1 -> the same shape and type.

        This is the image contract, to the bit that of the authors' test script: divide by 255, pad right and bottom
        to the next multiple of `session.multiple` by reflection without repeating the border, run, clamp to [0, 1],
        crop, multiply by 255, round half to even. An axis that is not longer than its padding cannot be reflected
        (the authors' script fails there); it repeats its border instead. An image that is smaller than the session's
        limits is padded up to them. If `plan` says so it is the padded image that is cut into tiles; `on_tile` is told
        how many of them are done, and of how many.

        Raises:
            InvalidImage: For any other array.
            InvalidModel: The network answers with NaN or infinity.
            OutOfMemory: Not even tiles of the image would fit into the memory, or it gives out.
            DeviceError: Where the network runs fails.
        """
        _check(image)
        H, W, _ = image.shape
        plan = self.plan(H, W)
        padded = _pad(image, plan.size)
        if self._graph_io.io == "image" and plan.tile == plan.size:
            restored = cast("OrtSession | TrtSession", self.session).run_image(padded)
            if on_tile:
                on_tile(1, 1)
            return np.ascontiguousarray(restored[:H, :W])

        def restore(rows: slice, columns: slice) -> NDArray[np.float32]:
            return self.session.run(to_batch(padded[rows, columns]))

        restored = tiling.blend(plan, restore, on_tile)[:, :, :H, :W]
        expect_finite(restored)
        return to_image(restored)

    def run_batch(self, images: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """Restore images of any sizes, uint8 (H, W, 3) each, as a call does each.

        Those that are equally large once they are padded go through the network together, `batch_size` at once; those
        that need tiles go one by one, and so do those whose batch exhausts the memory. Where a graph takes one at a
        time, all go one by one, and the answers are those of calls to the byte. An engine may work on a batch in other
        blocks, which round otherwise: ONNX Runtime on the CPU differed by a level of 255 in a few pixels.

        Raises:
            InvalidImage: For any other array, before one is restored.
            DerainError: What a call raises. None of the images is returned then.
        """
        for image in images:
            _check(image)
        groups: dict[tiling.Size, list[int]] = {}
        for i, image in enumerate(images):
            groups.setdefault(self.plan(*image.shape[:2]).size, []).append(i)
        restored: dict[int, NDArray[np.uint8]] = {}
        for size, members in groups.items():
            step = self.batch_size(*size)
            for first in range(0, len(members), step):
                together = members[first : first + step]
                try:
                    answers = self._run_together([images[i] for i in together], size)
                except OutOfMemory:
                    if len(together) == 1:
                        raise
                    answers = [self(images[i]) for i in together]
                restored.update(zip(together, answers, strict=True))
        return [restored[i] for i in range(len(images))]

    def _run_together(self, images: list[NDArray[np.uint8]], size: tiling.Size) -> list[NDArray[np.uint8]]:
        """Restore images that are padded to one size and fit at once."""
        if len(images) == 1:
            return [self(images[0])]
        padded = [_pad(image, size) for image in images]
        if self._graph_io.io == "image":
            answers = cast("OrtSession | TrtSession", self.session).run_images(np.stack(padded))
            return [np.ascontiguousarray(a[: i.shape[0], : i.shape[1]]) for a, i in zip(answers, images, strict=True)]
        restored = []
        for answer, image in zip(self.session.run(to_batch(*padded)), images, strict=True):
            cropped = answer[None, :, : image.shape[0], : image.shape[1]]
            expect_finite(cropped)
            restored.append(to_image(cropped))
        return restored

    def batch_size(self, height: int, width: int) -> int:
        """How many images of this size `run_batch` hands to the network at once: as many as the graph, the engine's
        profile, the memory and `batch` allow; 1 where they are cut into tiles, or too large for those."""
        max_batch = getattr(self.session, "max_batch", None)
        try:
            plan = self.plan(height, width)
        except OutOfMemory:
            return 1
        if max_batch is None or plan.tile != plan.size:
            return 1
        most = max_batch(plan.size)
        most = min(most, self._batch or (BATCH if most == sys.maxsize else most))
        area = math.prod(plan.size)
        if self._least_batch == 1 and most * area * AMPLE_BYTES > self._memory and (footprint := self._footprint):
            most = min(most, int(self._memory / (area * (footprint.per_pixel + IMAGE_BYTES))))
        return max(1, most)

    @property
    def _graph_io(self) -> GraphIO:
        return getattr(self.session, "graph_io", GraphIO("tensor", self.session.multiple))

    @property
    def _least_batch(self) -> int:
        """How many images the network works on even for one."""
        return max(1, self._graph_io.batch)

    def submit(self, image: NDArray[np.uint8], on_tile: tiling.OnTile | None = None) -> Future[NDArray[np.uint8]]:
        """Restore an image in a thread of this object, one after another, while the caller reads the next and writes
        the last one. What a call raises, the future's `result` does; `cancel` takes back what has not begun."""
        return self._thread.submit(self, image, on_tile)

    @property
    def _thread(self) -> ThreadPoolExecutor:
        """That of this process: a fork copies the object, but no thread."""
        return self._threads.setdefault(os.getpid(), ThreadPoolExecutor(1, "derainer"))

    def warm_up(self, sizes: Iterable[tiling.Size] = ((256, 256),)) -> None:
        """Restore an image of each (height, width), so that the first of a user's does not wait for what a library
        sets up and compiles at the first of a size. Raises what a call does."""
        for height, width in sizes:
            self(np.zeros((height, width, 3), np.uint8))

    def close(self) -> None:
        """Free what the session holds, at once instead of at the end of its life: memory on a GPU, that of ONNX
        Runtime. Waits for what was submitted. Not during a call, and no call may follow. `with Derainer(...) as
        derain:` closes at its end."""
        self._thread.shutdown()
        close = getattr(self.session, "close", None)
        if close:
            close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def plan(self, height: int, width: int) -> tiling.Plan:
        """How an image of this size is cut: as a whole if it fits. Raises OutOfMemory where not even tiles do."""
        multiple = self.session.multiple
        size = height + -height % multiple, width + -width % multiple
        limits = getattr(self.session, "limits", ())
        if self._tile:
            return tiling.plan(size, multiple, limits, tile=self._tile, overlap=self._overlap)
        area, pixels = size[0] * size[1], math.inf
        if self._least_batch * area * AMPLE_BYTES > self._memory and (footprint := self._footprint):
            pixels = (self._memory - area * IMAGE_BYTES) / footprint.per_pixel
        return tiling.plan(size, multiple, limits, pixels)

    @functools.cached_property
    def _footprint(self) -> Footprint | None:
        if hasattr(self.session, "footprint"):
            return getattr(self.session, "footprint")  # noqa: B009 - the protocol does not demand it
        if getattr(self.session, "provider", None) != "cpu":
            return None
        from .footprint import measure

        session = cast("OrtSession", self.session)
        footprint = measure(session.model, session.threads)
        if footprint is None:
            logger.warning(
                "%s: how much memory it takes cannot be measured; without `tile`, images are restored whole",
                session.path,
            )
        return footprint


def _check(image: NDArray[np.uint8]) -> None:
    """Raise InvalidImage unless it is an image."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise InvalidImage(f"expected an RGB image as a uint8 array of shape (height, width, 3), found {found}")
    if image.size == 0:
        raise InvalidImage(f"expected an image of at least one pixel, found shape {image.shape}")


def _pad(image: NDArray[np.uint8], size: tiling.Size) -> NDArray[np.uint8]:
    """The image padded right and bottom to `size`, by reflection where an axis is longer than its padding."""
    for axis, length in enumerate(image.shape[:2]):
        padding = size[axis] - length
        widths = [(0, padding) if i == axis else (0, 0) for i in range(3)]
        image = np.pad(image, widths, mode="reflect" if length > padding else "edge")
    return image


def open_session(
    model: str | os.PathLike[str] | Bundle | None = None,
    provider: str = "auto",
    threads: int = 0,
    public_key: str | os.PathLike[str] | None = None,
    canary: When = "first",
    require_proof: bool = False,
    device: int | None = None,
) -> OrtSession | TrtSession:
    """The network at a path, ready to run.

    Args:
        model: Path of a bundle or of a .onnx file, or an open bundle; None is the network that ships.
        provider: "tensorrt" is the bundle's engine, in TensorRT or TensorRT for RTX; "cuda", "cpu" and "ort-tensorrt"
            (its TensorRT provider) run the ONNX model in ONNX Runtime; "auto" is the bundle's engine where it runs, or
            else CUDA where it works, or else the CPU. Why "auto" does not take an engine is logged: as a warning, or
            where there is no GPU as information.
        threads: CPU threads, 0 for all cores.
        public_key: Key (PEM, Ed25519) of the one who has to have signed the bundle.
        canary: When what runs has to answer the bundle's canaries, see `runtime.canary`: "first", "always" or "never".
            Where it does not, "auto" goes on with what it takes next.
        require_proof: Run only files of the bundle that were judged against the full model, as its manifest records.
        device: CUDA's number of the GPU, as CUDA_VISIBLE_DEVICES has them. None is the first one; for an engine, the
            calling thread's current one.

    Raises:
        InvalidModel: The model cannot be loaded, a bundle's files are not those of its manifest, or none is proven.
        DeviceError: The provider is not there.
        CanaryError: What runs here answers a canary wrongly.
        InputError: The provider is unknown, the public key cannot be used, or a GPU was asked for where the CPU runs.
    """
    if provider not in PROVIDERS:
        raise InputError(f"`provider`: expected one of {', '.join(PROVIDERS)}, found {provider!r}")
    if model is not None and not isinstance(model, Bundle) and Path(model).is_dir():
        model = load(model, public_key)
    elif public_key is not None:
        raise InputError(f"expected a bundle to verify with {public_key}, found {model or 'no model named'}")
    if provider == "tensorrt" and not (isinstance(model, Bundle) and model.manifest.engines):
        found = model.folder if isinstance(model, Bundle) else model or "no model named"
        raise InputError(
            f"provider tensorrt: expected a bundle with an engine, found {found}; build one with export.tensorrt, or "
            "run the ONNX model with the provider ort-tensorrt"
        )
    if not isinstance(model, Bundle):
        from .ort import OrtSession

        if require_proof:
            raise UnprovenError(f"expected a bundle, whose manifest records proofs, found {model or 'no model named'}")
        return OrtSession(model, provider, threads, device)
    ways = _ways(model, provider, threads, device)
    for i, (title, way) in enumerate(ways, 1):
        try:
            session = way()
            if require_proof and model.manifest.proof(session.path.name) != "proven":
                raise UnprovenError(
                    f"{session.path}: expected a proof against the full model in the manifest, found none; judge it: "
                    f"python -m export.validate --candidate {model.folder} --record, or leave out the demand for one"
                )
            check(session, model, session.path.name, canary)
        except (DeviceError, UnprovenError) as error:
            if i == len(ways):
                raise
            level = logging.INFO if type(error) is DeviceError and not has_gpu() else logging.WARNING
            logger.log(level, "%s: %s is tried in place of %s: %s", model.folder, ways[i][0], title, error)
        else:
            return session
    raise AssertionError  # the last way returns or raises


def _ways(
    bundle: Bundle, provider: str, threads: int, device: int | None
) -> list[tuple[str, Callable[[], OrtSession | TrtSession]]]:
    """What a provider may run of a bundle, the best first."""
    from .ort import OrtSession, installed

    ways: list[tuple[str, Callable[[], OrtSession | TrtSession]]] = []
    if bundle.manifest.engines and provider in ("auto", "tensorrt"):
        ways.append(("its engine", lambda: open_engine(bundle, device)))
    if provider == "auto":
        names = [name for name in ("cuda", "cpu") if name in installed()]
        if device and (ways or len(names) > 1):
            names.remove("cpu")  # a GPU was asked for, and what is tried before says what it lacks
    else:
        names = [] if provider == "tensorrt" else [provider]
    for name in names:
        ways.append((f"its model on {name}", functools.partial(OrtSession, bundle, name, threads, device)))
    return ways


def open_engine(bundle: Bundle, device: int | None = None, sizes: int = 8, cuda_graphs: bool = True) -> TrtSession:
    """The engine of a bundle for the GPU and the libraries of this machine; for the rest see `runtime.trt.TrtSession`.
    Raises DeviceError where there is none, or no such GPU."""
    from .trt import TrtSession, gpu, library_version

    return TrtSession(bundle, choose_engine(bundle, gpu(device), library_version), device, sizes, cuda_graphs)


def describe_onnx(path: Path) -> Manifest:
    """The manifest of a bundle with only this model, a file that ONNX Runtime can load without any other. Raises
    InvalidModel for one that it cannot."""
    from .ort import OrtSession

    session = OrtSession(path, "cpu")
    described = describe(describe_file(path, "onnx"), session.input, session.output, session.metadata)
    OrtSession(Bundle(path.parent, described), "cpu")
    return described
