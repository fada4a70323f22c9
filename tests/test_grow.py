"""Growing changes the size of a network and nothing that it computes."""

from __future__ import annotations

import pytest
import torch

from compress.grow import GrowOptions, grow
from compress.net2net import enlarge
from drsformer import checkpoint
from drsformer.config import DRSformerConfig
from drsformer.model import DRSformer
from runtime.errors import InputError
from tests.support.networks import SMALL, fill, image


def small(**changes: object) -> DRSformer:
    return fill(DRSformer(DRSformerConfig.regular(**{**SMALL, "expansion": 2.0, **changes})))


@pytest.mark.parametrize(
    ("depths", "hidden"), [((1, 2, 1, 2), 1), ((2, 2, 3, 2), 1), ((1, 2, 1, 2), 2), ((2, 3, 1, 4), 3)]
)
def test_a_grown_network_computes_the_same(depths, hidden):
    network, x = small(mefc="both"), image(24, 40)
    grown = enlarge(network, depths, hidden)
    assert [len(level.blocks) for level in (*grown.config.encoder, grown.config.latent)] == list(depths)
    with torch.no_grad():
        torch.testing.assert_close(grown(x), network(x), rtol=0, atol=1e-5)


def test_a_level_without_blocks_stays_without():
    """Pruning may have left the encoder a block that the decoder has not."""
    network, x = small(depths=(0, 2, 1, 2)), image(24, 40)
    grown = enlarge(network, (1, 2, 2, 2), 1)
    assert [len(level.blocks) for level in (*grown.config.encoder, grown.config.latent)] == [0, 2, 2, 2]
    with torch.no_grad():
        torch.testing.assert_close(grown(x), network(x), rtol=0, atol=1e-5)


def test_gradients_reach_what_is_new():
    """Else the new blocks would stay as they are."""
    grown = enlarge(small(), (2, 2, 1, 2), 1)
    grown(image(16, 16)).square().mean().backward()
    old, new = (sum(p.grad.abs().sum() for p in block.attn.project_out.parameters()) for block in grown.encoder_level1)
    assert old > 0
    assert new > 0


def test_refusals():
    with pytest.raises(InputError, match="`depths`: expected at least the 2 blocks of encoder_level2, found 1"):
        enlarge(small(), (1, 1, 1, 2), 1)
    with pytest.raises(InputError, match="even hidden width"):
        enlarge(small(expansion=2.66), (1, 2, 1, 2), 2)
    with pytest.raises(InputError, match="`depths`: expected 0 to 256, found 300"):
        enlarge(small(), (300, 2, 1, 2), 1)
    with pytest.raises(InputError, match="`hidden`: expected at most 65536 hidden channels, found 240000"):
        enlarge(small(), (1, 2, 1, 2), 10_000)
    with pytest.raises(InputError, match="`hidden`: expected at least 1"):
        enlarge(small(), (1, 2, 1, 2), 0)
    with pytest.raises(InputError, match=r"`seed`: expected 0 to \d+, found -1"):
        enlarge(small(), (1, 2, 1, 2), 1, seed=-1)


def test_a_grown_checkpoint_says_where_it_comes_from(tmp_path):
    checkpoint.save(tmp_path / "small.safetensors", small(), {"steps": [{"command": "x"}]})
    summary = grow(tmp_path / "small.safetensors", tmp_path / "larger.safetensors", GrowOptions((2, 2, 2, 2)))
    larger = checkpoint.load(tmp_path / "larger.safetensors")
    assert summary["params_after"] == sum(p.numel() for p in larger.model.parameters()) > summary["params_before"]
    assert summary["gmacs_after"] > summary["gmacs_before"]
    assert [step["command"] for step in larger.provenance["steps"]] == ["x", "compress.grow"]
    assert larger.provenance["parent"] == checkpoint.load(tmp_path / "small.safetensors").sha256
    with pytest.raises(InputError, match="expected a name ending in"):
        grow(tmp_path / "small.safetensors", tmp_path / "larger.pth", GrowOptions((2, 2, 2, 2)))
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "small.safetensors")
    for name in ("small", "link"):
        with pytest.raises(InputError, match=f"`output`: expected another file than `weights`, found .*{name}"):
            grow(tmp_path / "small.safetensors", tmp_path / f"{name}.safetensors", GrowOptions((2, 2, 2, 2)))
    assert checkpoint.load(tmp_path / "small.safetensors").sha256 == larger.provenance["parent"]
