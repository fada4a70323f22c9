"""Arrays of other libraries where they are, on a GPU or on the host, without a copy.

PyTorch, CuPy, Numba, CV-CUDA, NVIDIA's video codecs and NumPy offer their arrays by DLPack or by
`__cuda_array_interface__`. Both are a pointer with a description; here they are read and checked, in one place for all
engines. Nothing is taken over: the array stays its owner's.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import InputError, InvalidImage, one_line
from .pixels import ANY, FINITE, GraphIO

HOST, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
"""Kinds of memory in DLPack: the last two are pinned memory of the host, and what both can reach."""

SOME_GPU = -1
"""Where an array is whose library does not tell the GPU, as `__cuda_array_interface__` does not."""

KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
"""Of numbers in DLPack."""


class DLTensor(ctypes.Structure):
    """As dlpack.h has it; a capsule named dltensor begins with it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("kind", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class Array:
    """Somebody's array.

    Attributes:
        pointer: Address of its first number.
        dtype: As NumPy names it.
        strides: In numbers; None where they lie in a row.
        device: CUDA's number of the GPU, or `SOME_GPU`; None on the host.
        owner: What keeps the memory.
        stream: CUDA stream whose work so far it waits for; None where there is nothing to wait for.
        writable: Whether it may be written.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...] | None
    device: int | None
    owner: object
    stream: int | None = None
    writable: bool = True

    @property
    def is_contiguous(self) -> bool:
        expected = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        pairs = zip(self.shape, self.strides or expected, expected, strict=True)
        return all(length == 1 or stride == wanted for length, stride, wanted in pairs)

    def __str__(self) -> str:
        order = "" if self.is_contiguous else " that is not contiguous"
        return f"{self.dtype} {self.shape}{order} {_place(self.device)}{'' if self.writable else ', read-only'}"


def arrays_of(
    graph_io: GraphIO, tells: bool, device: int | None, stream: int, input: object, output: object, finite: object
) -> dict[str, Array]:
    """What a network reads and writes, by the names in its graph.

    Args:
        graph_io: What it takes and gives.
        tells: Whether its graph has the output `finite`.
        device: CUDA's number of the GPU on which it runs; None on the CPU.
        stream: CUDA stream on which it runs. Libraries with DLPack order their work on an array before it.
        input: Array as the graph has it.
        output: Another one of the same shape and type.
        finite: float32 (B,), a number for each image, or None.

    Raises:
        InvalidImage: One of them is no such array, or is elsewhere.
        InputError: `finite` is given, and the graph has none.
    """
    if finite is not None and not tells:
        raise InputError(
            "`finite`: expected a graph that says whether its answer is, found one without; leave it out and look at "
            "the output, or export the graph again with --io image"
        )
    source = read("input", input, stream)
    size = graph_io.size(source.shape) if len(source.shape) == 4 else (0, 0)
    images = source.shape[:1]  # none where it is no array of images
    fits = images > (0,) and source.shape == graph_io.shape(size, images[0]) and graph_io.batch in (ANY, images[0])
    fits = fits and all(side > 0 and side % graph_io.multiple == 0 for side in size)
    batch = "B" if graph_io.batch == ANY else graph_io.batch
    shape = f"({batch}, H, W, 3)" if graph_io.io == "image" else f"({batch}, 3, H, W)"
    sizes = f"{shape}, H and W multiples of {graph_io.multiple}," if graph_io.multiple > 1 else shape
    _expect("input", source, fits, graph_io.dtype, sizes, device)
    target = read("output", output, stream)
    _expect("output", target, target.shape == source.shape and target.writable, graph_io.dtype, source.shape, device)
    if finite is None:
        return {"input": source, "output": target}
    told = read(FINITE, finite, stream)
    _expect(FINITE, told, told.shape == images and told.writable, np.dtype(np.float32), images, device)
    return {"input": source, "output": target, FINITE: told}


def read(name: str, array: Any, stream: int = 0) -> Array:
    """An array of any library. Raises InvalidImage, which calls it `name`, for anything else."""
    try:
        if hasattr(array, "__dlpack__"):
            return _from_dlpack(array, stream)
        if hasattr(array, "__cuda_array_interface__"):
            return _from_cuda(array.__cuda_array_interface__)
    except Exception as error:  # of whatever library
        raise InvalidImage(
            f"`{name}`: {type(array).__name__} does not hand over its memory: {one_line(error)}"
        ) from error
    raise InvalidImage(
        f"`{name}`: expected an array with __dlpack__ or __cuda_array_interface__, found {type(array).__name__}"
    )


def _from_dlpack(array: Any, stream: int) -> Array:
    kind, _ = array.__dlpack_device__()
    if kind not in (HOST, CUDA, CUDA_HOST, CUDA_MANAGED):
        raise ValueError(f"memory of the host or of CUDA is expected, not of DLPack's kind {kind}")
    on_gpu = kind in (CUDA, CUDA_MANAGED)
    capsule = array.__dlpack__(stream=stream or 1) if on_gpu else array.__dlpack__()  # 1: the default stream, CUDA's 0
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = DLTensor.from_address(get_pointer(capsule, b"dltensor"))  # it goes with the capsule, which stays unused
    lanes = f"x{tensor.lanes}" if tensor.lanes != 1 else ""
    return Array(
        (tensor.data or 0) + tensor.offset,
        tuple(tensor.shape[: tensor.ndim]),
        f"{KINDS.get(tensor.kind, 'kind')}{tensor.bits}{lanes}",
        tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None,
        tensor.device if on_gpu else None,
        capsule,
    )


def _from_cuda(interface: dict[str, Any]) -> Array:
    dtype, strides = np.dtype(interface["typestr"]), interface.get("strides")
    pointer, read_only = interface["data"]
    return Array(
        pointer,
        tuple(interface["shape"]),
        dtype.name if dtype.isnative else dtype.str,
        tuple(stride // dtype.itemsize for stride in strides) if strides else None,
        SOME_GPU,
        interface,
        interface.get("stream"),
        not read_only,
    )


def _expect(name: str, found: Array, fits: bool, dtype: np.dtype, shape: object, device: int | None) -> None:
    there = found.device == device or (found.device == SOME_GPU and device is not None)
    if fits and there and found.dtype == dtype.name and found.is_contiguous:
        return
    raise InvalidImage(f"`{name}`: expected a contiguous array, {dtype} {shape} {_place(device)}, found {found}")


def _place(device: int | None) -> str:
    return "on the host" if device is None else "on a GPU" if device == SOME_GPU else f"on GPU {device}"
