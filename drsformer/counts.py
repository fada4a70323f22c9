"""Parameters and multiply-accumulates of a network, by formula from its config alone.

So a search can ask thousands of times; the tests hold the formula against PyTorch's counter.

MACs are counted as the paper counts its "FLOPs": every product of matrices or channels of the readable network once,
norms and activations not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from drsformer.config import NO_EXPERT, BlockConfig, DRSformerConfig, MEFCConfig

SIDE = 256
"""Height and width, in pixels, of the image for which MACs are counted unless stated otherwise."""

PARTS = ("attention", "ffn", "mefc", "resampling")
"""What costs: the two halves of the blocks, the compensators, and all convolutions between the levels, with the first
and the last one."""


class Item(NamedTuple):
    """The cost of the layers of one kind, such as "ffn 1x1", in one module: parameters, and MACs for one image."""

    module: str
    kind: str
    params: int
    macs: int

    @property
    def part(self) -> str:
        """One of `PARTS`."""
        return self.kind.split()[0]


def items(config: DRSformerConfig, height: int = SIDE, width: int = SIDE) -> Iterator[Item]:
    """The cost of a network, module by module in the order in which an image passes them, and in each by kind of layer.

    Args:
        config: Of the network.
        height: Of the image, a multiple of 8.
        width: Likewise.
    """
    levels, (u3, u2, u1) = config.levels(), config.up
    e1, e2, e3, latent, d3, d2, d1 = (level.width for level in levels.values())
    full, half, quarter, eighth = (height * width // 4**i for i in range(4))

    def level(module: str, pixels: int) -> Iterator[Item]:
        for block in levels[module].blocks:
            yield from _attention(module, levels[module].width, block, len(config.topk), pixels)
            yield from _feed_forward(module, levels[module].width, block.hidden, config.feed_forward, pixels)

    def conv(module: str, inputs: int, outputs: int, kernel: int, pixels: int) -> Item:
        params = inputs * outputs * kernel * kernel
        return Item(module, "resampling", params, params * pixels)

    yield conv("patch_embed", 3, e1, 3, full)
    yield from _mefc("mefc_early", e1, config.mefc_early, full)
    yield from level("encoder_level1", full)
    yield conv("down1_2", e1, e2 // 4, 3, full)
    yield from level("encoder_level2", half)
    yield conv("down2_3", e2, e3 // 4, 3, half)
    yield from level("encoder_level3", quarter)
    yield conv("down3_4", e3, latent // 4, 3, quarter)
    yield from level("latent", eighth)
    yield conv("up4_3", latent, 4 * u3, 3, eighth)
    yield conv("reduce_chan_level3", u3 + e3, d3, 1, quarter)
    yield from level("decoder_level3", quarter)
    yield conv("up3_2", d3, 4 * u2, 3, quarter)
    yield conv("reduce_chan_level2", u2 + e2, d2, 1, half)
    yield from level("decoder_level2", half)
    yield conv("up2_1", d2, 4 * u1, 3, half)
    yield from level("decoder_level1", full)
    yield from _mefc("mefc_late", d1, config.mefc_late, full)
    yield conv("output", d1, 3, 3, full)


def _attention(module: str, C: int, block: BlockConfig, masks: int, pixels: int) -> Iterator[Item]:
    inner = block.heads * block.head_dim
    norm = 2 * C
    yield Item(module, "attention 1x1", 4 * C * inner + norm, 4 * C * inner * pixels)
    yield Item(module, "attention depthwise", 27 * inner, 27 * inner * pixels)
    products = 1 + max(1, masks)  # of Q and K, then of every mask's matrix and V
    yield Item(module, "attention products", block.heads + masks, products * inner * block.head_dim * pixels)


def _feed_forward(module: str, C: int, hidden: int, kind: str, pixels: int) -> Iterator[Item]:
    pointwise, depthwise = {
        "msfn": (4, 2 * (9 + 25) + 2 * (9 + 25)),
        "gdfn": (3, 2 * 9),
        "dfn": (2, 9),
        "fn": (2, 0),
    }[kind]
    norm = 2 * C
    yield Item(module, "ffn 1x1", pointwise * C * hidden + norm, pointwise * C * hidden * pixels)
    yield Item(module, "ffn depthwise", depthwise * hidden, depthwise * hidden * pixels)


def _mefc(module: str, C: int, config: MEFCConfig | None, pixels: int) -> Iterator[Item]:
    if config is None:
        return
    gates = sum(len(step) for step in config.steps)
    gate = (C + gates) * config.gate_hidden  # once an image
    body = C * C + sum(_expert(name, C) for step in config.steps for name in step)
    yield Item(module, "mefc", gate + config.gate_hidden + gates + body, gate + body * pixels)


def _expert(name: str, C: int) -> int:
    """Weights of an expert with its share of the convolution that joins the experts."""
    if name == NO_EXPERT:
        return 0
    depthwise = C * int(name[-1]) ** 2
    layers = {"sep": 2, "dil": 1, "avg": 0}[name[:3]]
    return layers * (depthwise + C * C) + C * C


def macs(config: DRSformerConfig, height: int = SIDE, width: int = SIDE) -> int:
    """Multiply-accumulates for one image of this size, multiples of 8."""
    return sum(item.macs for item in items(config, height, width))


def params(config: DRSformerConfig) -> int:
    """Numbers that the network has learned."""
    return sum(item.params for item in items(config))
