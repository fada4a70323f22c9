"""Programs other than ONNX Runtime compute the same from exported models: OpenVINO, and simplifiers of graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from drsformer.config import MEFCConfig
from drsformer.model import DRSformer
from export.folding import fold
from export.graph import to_onnx
from export.topk import with_pattern
from export.verification import TOLERANCE
from runtime.pixels import FINITE, to_batch
from tests.support.images import random_image
from tests.support.networks import fill, small

pytestmark = pytest.mark.slow

NETWORK = small(mefc_late=MEFCConfig(5, (("avg_pool_3x3", "dil_conv_5x5"),)))
"""A block and a mixture of experts: exporting takes time for every part."""

ODD, EVEN = ((61, 93), (5, 3)), ((64, 96), (40, 24))
"""Heights and widths, in pixels: of images, the second too small to be padded by reflection; and of tensors."""

MODELS = {
    "tensor": dict(io="tensor", precision="fp32", sizes=EVEN, tolerance=TOLERANCE),
    "image": dict(io="image", precision="fp32", sizes=ODD, tolerance=1),  # a level, where rounding falls otherwise
    "fp16": dict(io="tensor", precision="fp16", sizes=EVEN, tolerance=5e-3),  # OpenVINO rounds the weights alone
}
"""What is exported, at which sizes it runs, and how far any value of its output may be from ONNX Runtime's."""


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory) -> tuple[str, Path]:
    """The name of an export and its file, of `NETWORK`."""
    model = MODELS[request.param]
    network = with_pattern(fill(DRSformer(NETWORK)).requires_grad_(False), "threshold")
    path = tmp_path_factory.mktemp("consumers") / f"{request.param}.onnx"
    onnx.save(to_onnx(fold(network, model["precision"]), model["io"]), path)
    return request.param, path


class Spoilt(nn.Module):
    """A network that answers a black pixel with infinity or NaN, and grey ones with numbers whose sum is infinite."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.log() * 1e37 if self.kind == "infinity" else (x - 0.1).sqrt() * 3e38


def in_onnx_runtime(model: onnx.ModelProto, fed: np.ndarray, name: str = "output") -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors, as in OrtSession
    engine = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(engine.run([name], {"input": fed})[0])


def in_openvino(path: Path, fed: np.ndarray, fixed: bool, name: str = "output") -> np.ndarray:
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    model = core.read_model(path)
    if fixed:
        model.reshape(list(fed.shape))
    return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([fed])[name]  # not bfloat16


def after_onnxsim(path: Path, fed: np.ndarray, fixed: bool, name: str = "output") -> np.ndarray:
    onnxsim = pytest.importorskip("onnxsim")
    simplified, valid = onnxsim.simplify(
        str(path), overwrite_input_shapes={"input": list(fed.shape)} if fixed else None
    )
    assert valid
    return in_onnx_runtime(simplified, fed, name)


def after_onnxslim(path: Path, fed: np.ndarray, fixed: bool, name: str = "output") -> np.ndarray:
    onnxslim = pytest.importorskip("onnxslim")
    shapes = [f"input:{','.join(map(str, fed.shape))}"] if fixed else None
    return in_onnx_runtime(onnxslim.slim(str(path), input_shapes=shapes), fed, name)


def as_it_is(path: Path, fed: np.ndarray, fixed: bool, name: str = "output") -> np.ndarray:
    return in_onnx_runtime(onnx.load(path), fed, name)


@pytest.mark.parametrize("consume", [as_it_is, in_openvino, after_onnxsim, after_onnxslim])
@pytest.mark.parametrize("kind", ["infinity", "NaN"])
def test_a_graph_of_images_says_everywhere_whether_its_answer_was_finite(tmp_path, kind, consume):
    path = tmp_path / "model.onnx"
    onnx.save(to_onnx(Spoilt(kind), "image"), path)
    image = np.full((1, 61, 93, 3), 40, np.uint8)
    good = consume(path, image, False, FINITE)
    assert good.shape == (1,)
    assert np.isfinite(good).all()
    image[0, 60, 92, 1] = 0
    assert not np.isfinite(consume(path, image, False, FINITE)).all()


@pytest.mark.parametrize("fixed", [False, True], ids=["any size", "one size"])
@pytest.mark.parametrize("consume", [in_openvino, after_onnxsim, after_onnxslim])
def test_another_program_computes_the_same(exported, consume, fixed):
    name, path = exported
    for size in MODELS[name]["sizes"]:
        image = random_image(*size)
        fed = image[None] if name == "image" else to_batch(image)
        expected = in_onnx_runtime(onnx.load(path), fed).astype(np.float64)
        found = consume(path, fed, fixed)
        assert found.shape == expected.shape
        difference = np.abs(found - expected)
        assert difference.max() <= MODELS[name]["tolerance"], f"{size}: {difference.max()}, mean {difference.mean()}"
