"""spandrel loads and runs released checkpoints and ours."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from benchmarks.released import ReleasedDRSformer
from drsformer import checkpoint
from drsformer.config import DRSformerConfig, preset
from drsformer.model import DRSformer
from drsformer.session import TorchSession
from runtime.pixels import to_batch
from runtime.session import Derainer
from tests.support.networks import SMALL, fill, image

try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError):
    # Absent, or built for a PyTorch with CUDA and beside one without. spandrel takes three names from it for two other
    # architectures, LaMa and RestoreFormer, which are not run here; without those names it cannot be imported at all.
    functional = types.ModuleType("torchvision.transforms.functional")
    functional.InterpolationMode = functional.normalize = functional.rotate = None
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    sys.modules["torchvision"] = types.ModuleType("torchvision")
    sys.modules["torchvision.transforms"] = types.ModuleType("torchvision.transforms")
    sys.modules["torchvision.transforms.functional"] = functional

spandrel = pytest.importorskip("spandrel", reason="the extra spandrel is not installed")

import drsformer.spandrel  # noqa: E402, F401 - registers the architecture


@pytest.mark.parametrize("mefc", [True, False])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"params": {f"module.{k}": v for k, v in s.items()}}])
@torch.no_grad()
def test_a_released_checkpoint_loads_and_runs(tmp_path, mefc, wrap):
    released = fill(ReleasedDRSformer(**SMALL, mefc=mefc))
    torch.save(wrap(released.state_dict()), tmp_path / "deraining.pth")
    network = spandrel.ModelLoader().load_from_file(tmp_path / "deraining.pth")
    assert isinstance(network, spandrel.ImageModelDescriptor)
    assert network.architecture.id == "DRSformer"
    assert isinstance(network.model, DRSformer)
    assert network.model.config == DRSformerConfig.regular(**SMALL, mefc="both" if mefc else "none")
    assert (network.purpose, network.scale, network.input_channels, network.output_channels) == ("Restoration", 1, 3, 3)
    assert network.tags == ["12dim", "MEFC"][: 1 + mefc]
    assert not network.supports_half
    difference = network(image(24, 16)) - released(image(24, 16)).clamp(0, 1)
    assert difference.abs().max() < 1e-5, difference.abs().max()


def test_a_network_of_ours_does_what_it_does_here(tmp_path):
    """Also where the image has to be padded."""
    trained = checkpoint.load("weights/drsformer-xs.safetensors")
    network = spandrel.ModelLoader().load_from_file("weights/drsformer-xs.safetensors")
    rgb = np.random.default_rng(0).integers(0, 256, (37, 51, 3), np.uint8)
    output = network(torch.from_numpy(to_batch(rgb)))
    assert output.shape == (1, 3, 37, 51)
    expected = Derainer(TorchSession(trained.model, "cpu"))(rgb)
    np.testing.assert_array_equal((output[0].permute(1, 2, 0) * 255).round().byte().numpy(), expected)


def test_other_networks_are_not_taken_for_it():
    """Restormer has the same levels, down to their names, and blocks of its own in the refinement."""
    state = ReleasedDRSformer(**SMALL, mefc=False).state_dict()
    state = {name: tensor for name, tensor in state.items() if ".attn.attn" not in name and "ffn." not in name}
    for name in ("project_in", "dwconv", "project_out"):
        state |= {f"encoder_level1.0.ffn.{name}.weight": torch.zeros(4, 4, 1, 1)}
    state |= {"refinement.0.norm1.body.weight": torch.zeros(24)}
    architecture = spandrel.MAIN_REGISTRY["DRSformer"]
    assert not architecture.detect(state)
    assert not architecture.detect({})
    assert not architecture.detect({"a": 1, "b.c": torch.zeros(1)})


def test_every_preset_is_told_from_the_others_by_spandrel():
    """No architecture that spandrel knows takes it for its own."""
    for name in ("drsformer", "drsformer-nomefc", "drsformer-tiny"):
        with torch.device("meta"):
            state = DRSformer(preset(name)).state_dict()
        found = [arch.architecture.id for arch in spandrel.MAIN_REGISTRY if arch.detect(dict(state))]
        assert found == ["DRSformer"], name
