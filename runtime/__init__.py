"""Runs an exported deraining network: NumPy and ONNX Runtime, no PyTorch.

    import numpy as np
    from PIL import Image
    from runtime import Derainer

    derain = Derainer()                           # the network that ships with the project; or Derainer("model.onnx")
    rainy = np.asarray(Image.open("rainy.jpg").convert("RGB"))   # uint8 (H, W, 3), any size
    clean = derain(rainy)                         # the same shape and type
    Image.fromarray(clean).save("clean.png")

`Derainer` is the whole interface; `runtime.images` reads and writes files with everything around the pixels, and
`python -m runtime.derain` does both for files and folders. What a user got wrong raises `InputError`, with one line.
"""

from .errors import GateError, InputError, MismatchError
from .session import Derainer, Session, open_session
from .version import __version__

__all__ = ["Derainer", "GateError", "InputError", "MismatchError", "Session", "__version__", "open_session"]
