"""The network in PyTorch behind the contract that all engines of the runtime have, `runtime.session.Session`."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from drsformer.config import SIZE_MULTIPLE
from runtime.errors import InputError
from runtime.session import Session


class TorchSession(Session):
    """A network in PyTorch, in float32; on CUDA, PyTorch by default lets convolutions round to TF32, and so does this.

    Args:
        model: Takes and returns float32 (1, 3, H, W), H and W multiples of 8; it is moved to the device.
        device: See `torch_device`.

    Raises:
        InputError: There is no such device.
    """

    multiple = SIZE_MULTIPLE

    def __init__(self, model: nn.Module, device: str = "auto") -> None:
        self.device = torch_device(device)
        self.model = model.to(self.device)

    @torch.inference_mode()
    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.model(torch.from_numpy(batch).to(self.device)).cpu().numpy()


def torch_device(name: str = "auto") -> torch.device:
    """A device of PyTorch.

    Args:
        name: "auto", which is CUDA where there is one, else the CPU; or PyTorch's own name.

    Raises:
        InputError: CUDA is asked for, and PyTorch finds no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("`device`: expected a CUDA device, found none; use the CPU")
    return torch.device(name)
