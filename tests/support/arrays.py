"""Arrays on GPUs that are stand-ins, as other libraries offer theirs."""

from __future__ import annotations

import ctypes

import numpy as np

from runtime.arrays import CUDA, DLTensor
from tests.support.tensorrt import Cuda

get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


class OnGpu:
    """What a library with DLPack has on a GPU. `streams` are those that it was asked to order its work before."""

    def __init__(self, cuda: Cuda, content: np.ndarray, device: int = 0) -> None:
        former, cuda.thread.device = cuda.current, device
        _, self.pointer = cuda.cudaMalloc(content.nbytes)
        cuda.thread.device = former
        self.numpy = cuda.blocks[self.pointer][: content.nbytes].view(content.dtype).reshape(content.shape)
        self.numpy[...] = content
        self.device = device
        self.streams: list[int] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self.device

    def __dlpack__(self, *, stream: int) -> object:
        self.streams.append(stream)
        capsule = self.numpy.__dlpack__()
        tensor = DLTensor.from_address(get_pointer(capsule, b"dltensor"))
        tensor.device_type, tensor.device = CUDA, self.device
        return capsule


class WithInterface:
    """The same of a library with `__cuda_array_interface__` alone, whose work on it is on `stream`."""

    def __init__(self, array: OnGpu, stream: int | None = None, read_only: bool = False) -> None:
        self.array = array
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": array.numpy.shape,
            "typestr": array.numpy.dtype.str,
            "data": (array.pointer, read_only),
            "stream": stream,
        }
