"""Runs an exported deraining network: NumPy and ONNX Runtime, no PyTorch.

    import numpy as np
    from PIL import Image
    from derainer import Derainer                 # in the checkout: from runtime import Derainer

    derain = Derainer()                           # the network that ships with the project; or Derainer("model.onnx")
    rainy = np.asarray(Image.open("rainy.jpg").convert("RGB"))   # uint8 (H, W, 3), any size
    clean = derain(rainy)                         # the same shape and type
    Image.fromarray(clean).save("clean.png")

`Derainer` is the whole interface; `derainer.images` reads and writes files with everything around the pixels, and the
command `derain` does both for files and folders. What goes wrong raises a `DerainError` of one line
(`derainer.errors` has its kinds).

A product installs this package as the distribution `derainer` (pyproject.toml beside this file), as `runtime` is a name
that it may have itself; in the checkout the same files are the package `runtime`.
"""

from .errors import (
    CanaryError,
    DerainError,
    DeviceError,
    GateError,
    InputError,
    InvalidImage,
    InvalidModel,
    MismatchError,
    OutOfMemory,
    UnprovenError,
)
from .session import Derainer, Session, open_session
from .version import __version__

__all__ = [
    "CanaryError",
    "DerainError",
    "Derainer",
    "DeviceError",
    "GateError",
    "InputError",
    "InvalidImage",
    "InvalidModel",
    "MismatchError",
    "OutOfMemory",
    "Session",
    "UnprovenError",
    "__version__",
    "open_session",
]
