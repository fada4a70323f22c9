"""The contract of every engine."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Session(Protocol):
    """A network in one engine, ready to run.

    One without `limits` takes any size, and nobody knows the memory of one without `footprint`.

    Attributes:
        multiple: The height and width that `run` takes are multiples of this; 1 where any size will do.
        limits: Pairs of the smallest and the largest (height, width), one of which is enough; () for any size.
        footprint: `runtime.footprint.Footprint`, or None where it is not known. Where the session lacks it and its
            `provider` is "cpu", as of ONNX Runtime, it is measured when it is needed, which may take seconds.
        graph_io: `runtime.pixels.GraphIO`. Where it says that the graph takes images, the session has a method
            `run_image`, uint8 (H, W, 3) -> the same, which answers as `run` does without the way through float32, and
            raises InvalidModel where the graph says that the network answered with NaN or infinity; and `run_images`
            for several, uint8 (B, H, W, 3) -> the same.
        max_batch: Method that says how many images of a (height, width) `run` takes at once at most. A session
            without it takes one.
        enqueue: Method `enqueue(input, output, stream=0, finite=None)`, for what is on a GPU already. It runs the
            network from one array to another, both as the graph has them (`graph_io`), where the session runs (on the
            host for the CPU), of any library that has DLPack or `__cuda_array_interface__`. In the order of `stream`,
            a CUDA stream's number: after what was enqueued there before, and before what will be. It may come back
            earlier, so the arrays have to stay until the stream is done. Nothing is added to the graph: no padding, no
            tiles, and around a graph of tensors no clamping, rounding or check for NaN. Into `finite`, an array like
            the others, goes what a graph of images says of its answer (`runtime.pixels.FINITE`); who leaves that out is
            told nothing. Raises InvalidImage for other arrays.
        identity: Names and versions of the library, the device and its driver, by which `runtime.canary` knows a
            machine again. What lacks it, or leaves one of them empty, has to answer the canaries every time.
    """

    multiple: int

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 (B, 3, H, W) RGB in [0, 1] -> the same shape, not clamped; B is 1, or more where `max_batch` says so.
        Safe to call from several threads."""
        ...
