"""The layer that departs first, in a model whose faults are known."""

from __future__ import annotations

import math
import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from drsformer.config import BlockConfig, MEFCConfig
from drsformer.model import DRSformer
from export import locate as module
from export.folding import fold
from export.graph import to_onnx
from export.locate import locate
from export.topk import with_pattern
from runtime import InvalidModel
from runtime.ort import SHIPPED
from tests.support.networks import fill, small
from tests.support.onnx_files import write_network

LAYER = "encoder_level2.1.attn.qkv"


def damaged(path, change):
    """The network that ships, with one layer's weights changed."""
    model = onnx.load(SHIPPED)
    (tensor,) = (t for t in model.graph.initializer if t.name == f"network.{LAYER}")
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), tensor.name))
    onnx.save(model, path)
    return path


@pytest.fixture
def right(monkeypatch):
    """What a damaged model is held against is the sound one: a compiler that gets one layer wrong."""
    monkeypatch.setattr(module, "upcast", lambda model: onnx.load(SHIPPED))


def test_a_sound_model_departs_nowhere():
    located = locate(SHIPPED)
    assert located.first is None
    assert len(located.layers) > 100
    assert located.layers[0].name == "patch_embed"
    assert max(layer.error for layer in located.layers) < 1e-4
    assert str(located).startswith("No layer departs from float32 by more than 0.001")


@pytest.mark.parametrize(("io", "precision"), [("tensor", "fp32"), ("image", "fp16")])
def test_every_layer_is_looked_at_under_its_own_name(tmp_path, io, precision):
    network = fill(DRSformer(small((BlockConfig(2, 4, 8),) * 2, mefc_late=MEFCConfig(5, (("sep_conv_3x3",),)))))
    folded = fold(with_pattern(network.requires_grad_(False), "threshold"), precision)
    model = to_onnx(folded, io, (16, 24))
    weights = {tensor.name for tensor in model.graph.initializer}
    layers = [node for node in model.graph.node if node.op_type == "Conv" and node.input[1] in weights]
    named = module._layers(model)
    assert [node.name for node in layers if node.output[0] not in named] == []
    known = dict(fold(network).named_parameters()) | dict(fold(network).named_buffers())
    assert [name for name in named.values() if not {name, f"{name}.weight"} & known.keys()] == []


def test_a_layer_that_is_wrong_is_named(tmp_path, right):
    def scale_one(weights):
        weights[3] *= 1.5
        return weights

    located = locate(damaged(tmp_path / "a.onnx", scale_one))
    assert located.first is not None
    assert located.first.name == LAYER
    before = located.layers[: located.layers.index(located.first)]
    assert before
    assert all(layer.error < 1e-4 for layer in before)
    assert f"departs from float32 is {LAYER}: by " in str(located)
    assert f"; {before[-1].name} before it by" in str(located)


def test_overflow_is_located(tmp_path, right):
    located = locate(damaged(tmp_path / "a.onnx", lambda weights: np.full_like(weights, np.float32(np.inf))))
    assert located.first is not None
    assert (located.first.name, located.first.error) == (LAYER, math.inf)
    assert f"{LAYER}: to NaN or infinity" in str(located)


def test_other_files(tmp_path):
    with pytest.raises(InvalidModel, match=r"expected weights named network\.\*, .* found none"):
        locate(write_network(tmp_path / "a.onnx"))
    shutil.copy(__file__, tmp_path / "b.onnx")
    with pytest.raises(InvalidModel, match="is not an ONNX model"):
        locate(tmp_path / "b.onnx")
