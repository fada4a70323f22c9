"""The kernels of `export.fused`: equal to the folded network in Triton's interpreter, and compiled for GPUs.

The interpreter computes what the kernels say, not how a GPU does it: its products of bfloat16 are wrong (it takes the
bits for integers), so bfloat16 is only compiled here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from drsformer.config import BlockConfig, DRSformerConfig, LevelConfig
from drsformer.model import DRSformer
from export.folding import DTYPES, FoldedAttention, FoldedFeedForward, Normalise, fold
from tests.support.networks import SMALL, fill, image, small

pytest.importorskip("triton", reason="there is no Triton for this system")
from export import fused


def with_block(width: int, block: BlockConfig) -> DRSformer:
    """A network with that block at full resolution."""
    config = small()
    encoder = (LevelConfig(width, (block,)), *config.encoder[1:])
    decoder = (*config.decoder[:2], LevelConfig(width + config.up[2], ()))
    return fill(DRSformer(dataclasses.replace(config, encoder=encoder, decoder=decoder)))


def features(width: int, height: int, across: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, width, height, across, generator=generator)


@pytest.mark.parametrize(
    ("width", "config", "size"),
    [
        (5, BlockConfig(1, 3, 7), (9, 11)),  # nothing is a multiple of anything, an odd number of hidden channels
        (16, BlockConfig(2, 8, 16), (8, 16)),  # everything is
        (20, BlockConfig(1, 12, 33), (3, 5)),  # an image that is smaller than a tile, hidden channels in several blocks
        (70, BlockConfig(1, 1, 1), (1, 9)),  # channels in several blocks, one head of one channel, one hidden channel
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_equal_to_the_folded_block(width: int, config: BlockConfig, size: tuple[int, int], precision: str) -> None:
    network = with_block(width, config)
    x = features(width, *size, batch=2)
    exact = fold(network).encoder_level1[0]
    folded = fold(network, precision)  # pyright: ignore[reportArgumentType]
    ours = fused.fuse(folded).encoder_level1[0]
    folded = folded.encoder_level1[0]
    assert isinstance(folded.attn, FoldedAttention)
    assert isinstance(folded.ffn, FoldedFeedForward)
    assert isinstance(ours.norm2, nn.Identity)
    with torch.no_grad():
        half = x.to(DTYPES[precision])  # pyright: ignore[reportArgumentType]
        for name, mine, theirs, reference in (
            ("attention", ours.attn(half), folded.attn(folded.norm1(half)), exact.attn(exact.norm1(x))),
            ("MSFN", ours.ffn(half), folded.ffn(folded.norm2(half)), exact.ffn(exact.norm2(x))),
        ):
            scale = reference.abs().max()
            assert mine.dtype == half.dtype
            error = (mine.float() - reference).abs().max() / scale
            if precision == "fp32":
                assert error < 2e-6, name
            else:  # as near to float32 as the folded block, which rounds in the same places
                assert error < 1.5 * (theirs.float() - reference).abs().max() / scale + 1e-3, name


def test_equal_to_the_folded_network() -> None:
    network = fill(DRSformer(DRSformerConfig.regular(**SMALL)))
    folded = fold(network)
    ours = fused.fuse(folded).to(memory_format=torch.channels_last)
    assert not any(isinstance(module, (Normalise, FoldedFeedForward)) for module in ours.modules())
    with torch.no_grad():
        assert (ours(image(8, 16)) - folded(image(8, 16))).abs().max() < 2e-5


def test_other_feed_forward_networks_stay() -> None:
    network = fill(DRSformer(small((BlockConfig(1, 4, 6),), feed_forward="gdfn")))
    folded = fold(network)
    ours = fused.fuse(folded)
    with torch.no_grad():
        assert (ours(image(8, 8)) - folded(image(8, 8))).abs().max() < 2e-5


def test_float16_stays_in_its_range() -> None:
    """A bright hidden layer that float16 could not hold without the scales of `fold`."""
    network = with_block(8, BlockConfig(1, 8, 8))
    with torch.no_grad():
        ffn = network.encoder_level1[0].ffn
        ffn.project_in.weight.mul_(3e4)
        ffn.project_out.weight.div_(3e4)
    exact, ours = (form.encoder_level1[0] for form in (fold(network), fused.fuse(fold(network, "fp16"))))
    x = features(8, 8, 8)
    with torch.no_grad():
        reference, found = exact.ffn(exact.norm2(x)), ours.ffn(x.half())
    assert found.isfinite().all()
    assert (found - reference).abs().max() < 5e-3 * reference.abs().max()


COMPILE = """
import json, sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from export import fused

POINTERS = {"x", "weight", "bias", "y", "kernel3", "kernel5"}
found = []
for kernel, constants, options in (
    (fused._normalised_pointwise, dict(PIXELS=fused.PIXELS, INPUTS=64, OUTPUTS=64), {}),
    (fused._depthwise, dict(PIXELS=fused.PIXELS, TILE_WIDTH=8, CHANNELS=fused.CHANNELS), {}),
    (fused._mixed_depthwise, dict(ODD=1, PIXELS=fused.PIXELS, TILE_WIDTH=8, CHANNELS=fused.CHANNELS), {}),
    (fused._paired_projection, dict(PIXELS=32, TILE_WIDTH=8, CHANNELS=fused.CHANNELS, OUTPUTS=512),
     fused.PROJECTION_OPTIONS),
):
    names = kernel.arg_names
    pointer = "*" + sys.argv[2]
    signature = {name: "constexpr" if name in constants else pointer if name in POINTERS else "i32" for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    compiled = compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
    found.append([kernel.__name__, compiled.metadata.shared, len(compiled.asm["cubin"])])
print(json.dumps(found))
"""


@pytest.mark.parametrize(("capability", "dtype"), [(80, "fp16"), (90, "bf16"), (86, "fp32")])
def test_compiles_for_gpus(tmp_path: Path, capability: int, dtype: str) -> None:
    """Into code of the card, within the 99 KB of shared memory that the smallest of them gives a program."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, str(capability), dtype]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    for name, shared, size in json.loads(answer.stdout):
        assert shared <= 99 * 1024, name
        assert size > 0
