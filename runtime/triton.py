"""What Triton Inference Server's python backend runs, in a model repository made by `export.triton`.

    pip install ./runtime                              # the distribution `derainer`, into the server's Python
    tritonserver --model-repository repository

Only the server imports this, through the `model.py` of the repository. Each instance of the model is a process of its
own that opens the bundle beside `model.py`. Where the configuration has a `max_batch_size`, the server hands over
several requests of equal size, whose images go through the network together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton  # pyright: ignore[reportMissingImports]  # there is one in the server only

from .errors import DerainError, InvalidImage, OutOfMemory
from .session import Derainer, open_session

CODES: dict[type[DerainError], str] = {
    InvalidImage: "INVALID_ARG",
    OutOfMemory: "UNAVAILABLE",
    DerainError: "INTERNAL",
}
"""What a client is told: whether to send another image, to try again later, or that the server is at fault. By name,
since the server has no codes yet when it looks at the model's configuration."""


class TritonPythonModel:
    """`input` uint8 (H, W, 3) RGB of any size, or (B, H, W, 3) where there are batches -> `output` of the same shape
    and type, as `Derainer` gives it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle, which verifies what is used of it. Where that fails, the model does not get ready and the
        server's log says why."""
        config = json.loads(args["model_config"])
        options = {key: v["string_value"] for key, v in config["parameters"].items()}
        self._most = int(config["max_batch_size"])
        folder = Path(args["model_repository"], args["model_version"], "bundle")
        height, width = map(int, options.get("tile", "0x0").split("x"))
        try:
            session = open_session(folder, options["provider"], int(options["threads"]))
            self._derain = Derainer(session, tile=(height, width) if height else None, batch=max(1, self._most))
        except DerainError as error:
            raise triton.TritonModelException(str(error)) from error
        triton.Logger.log_info(f"{args['model_instance_name']}: {folder} on {session.provider}")

    def execute(self, requests: list[Any]) -> list[Any]:
        """A response to each request. What is wrong with one is the answer to that one alone."""
        return self._answer([triton.get_input_tensor_by_name(request, "input").as_numpy() for request in requests])

    def _answer(self, inputs: list[Any]) -> list[Any]:
        batches = inputs if self._most else [each[None] for each in inputs]  # each B, H, W, 3
        try:
            restored = iter(self._derain.run_batch([image for batch in batches for image in batch]))
        except DerainError as error:
            if len(inputs) > 1:
                return [answer for each in inputs for answer in self._answer([each])]
            code = next(code for kind, code in CODES.items() if isinstance(error, kind))
            return [triton.InferenceResponse(error=triton.TritonError(str(error), getattr(triton.TritonError, code)))]
        outputs = (np.array([next(restored) for _ in batch], np.uint8) for batch in batches)
        return [
            triton.InferenceResponse([triton.Tensor("output", output.reshape(each.shape))])
            for output, each in zip(outputs, inputs, strict=True)
        ]
