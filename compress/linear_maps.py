"""A network as a chain of linear maps: images pass it from one convolution that reads all channels to the next.

    passing = Passing(network, images)
    while passing.map:
        print(passing.map.name, passing.map.layer.weight.shape)
        passing.advance()
    outputs = passing.outputs

Between two maps lies what is not linear, or is the same for whatever passes: LayerNorm, depthwise convolutions,
attention, gates, activations, shuffles and concatenations. Weights may be changed on the way: a map is applied when it
is left.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drsformer.model import (
    DRSformer,
    ExpertLayer,
    MixedScaleFeedForward,
    MixtureOfExpertsCompensator,
    SparseTransformerBlock,
)
from export.topk import with_pattern


@dataclass(frozen=True)
class LinearMap:
    """A convolution that is about to be applied to each of several images.

    Attributes:
        name: Of the module, such as "latent.0.ffn.project_out".
        layer: The convolution, without groups.
        stream: The residual path before it, (1, C, H, W) for each image; of `patch_embed`, the images.
        inputs: What the convolution reads, (1, inputs, H, W), of the image with this number. Computed on demand.
        adds: Whether its output is added to the stream.
        written: What it wrote, or what it wrote and the stream before it where it adds, from the stream that follows;
            None where that does not tell.
        within: Whether the stream does not follow from its output alone, since it is the first map of a branch.
    """

    name: str
    layer: nn.Conv2d
    stream: list[Tensor]
    inputs: Callable[[int], Tensor]
    adds: bool = False
    written: Callable[[Tensor], Tensor] | None = None
    within: bool = False

    def output(self, number: int) -> Tensor:
        """(1, outputs, H, W) of the image with this number."""
        return self.layer(self.inputs(number))


Chain = Generator[LinearMap, list[Tensor], list[Tensor]]
"""Yields maps, is sent what each of them put out (an empty list for those `within`), and returns the stream."""


class Passing:
    """Images on their way through a network.

    Args:
        network: Of any form that `DRSformer` can have; stays as it is.
        images: (1, 3, H, W) each, RGB in [0, 1], H and W multiples of 8.

    Attributes:
        map: The one that comes next, None at the end.
        outputs: What the network makes of the images, at the end.
    """

    def __init__(self, network: DRSformer, images: Sequence[Tensor]) -> None:
        self.outputs: list[Tensor] = []
        self.chain = _chain(network, images)
        self.map: LinearMap | None = next(self.chain)

    def advance(self) -> list[Tensor]:
        """Apply the map and go on to the next one. Returns what it put out, for each image; nothing of one `within`."""
        assert self.map
        outputs = [] if self.map.within else [self.map.output(i) for i in range(len(self.map.stream))]
        try:
            self.map = self.chain.send(outputs)
        except StopIteration as end:
            self.map, self.outputs = None, end.value
        return outputs


def fast_twin(network: DRSformer) -> DRSformer:
    """The same network over the same parameters, with the same names of modules, that is faster on CPUs: masks take
    thresholds, and convolutions with two inputs a group are sums of two depthwise ones."""
    twin = with_pattern(network, "threshold")
    for module in twin.modules():
        if isinstance(module, MixedScaleFeedForward):
            module.dwconv3x3_1 = cast("nn.Conv2d", _PairwiseConvolution(module.dwconv3x3_1))
            module.dwconv5x5_1 = cast("nn.Conv2d", _PairwiseConvolution(module.dwconv5x5_1))
    return twin


class _PairwiseConvolution(nn.Module):
    """What a convolution with two inputs a group does, on the even and on the odd channels."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.padding = convolution.weight, convolution.padding

    def forward(self, x: Tensor) -> Tensor:
        first, second = (
            F.conv2d(x[:, i::2], self.weight[:, i : i + 1], padding=self.padding, groups=len(self.weight))
            for i in (0, 1)
        )
        return first + second


def _chain(network: DRSformer, images: Sequence[Tensor]) -> Chain:
    twin = fast_twin(network)

    def plain(name: str, x: list[Tensor], written: Callable[[Tensor], Tensor] | None = None) -> Chain:
        layer = cast("nn.Conv2d", twin.get_submodule(name))
        return (yield LinearMap(name, layer, x, x.__getitem__, False, written))

    def blocks(level: str, x: list[Tensor]) -> Chain:
        for i, block in enumerate(getattr(twin, level)):
            x = yield from _block(f"{level}.{i}", block, x)
        return x

    def down(name: str, x: list[Tensor]) -> Chain:
        x = yield from plain(f"{name}.conv", x, lambda stream: F.pixel_shuffle(stream, 2))
        return [F.pixel_unshuffle(y, 2) for y in x]

    def up(name: str, x: list[Tensor], skip: list[Tensor], last: bool = False) -> Chain:
        channels = twin.get_parameter(f"{name}.conv.weight").shape[0] // 4
        written = (lambda stream: F.pixel_unshuffle(stream[:, :channels], 2)) if last else None
        x = yield from plain(f"{name}.conv", x, written)
        return [torch.cat([F.pixel_shuffle(y, 2), other], dim=1) for y, other in zip(x, skip, strict=True)]

    x = yield from plain("patch_embed", list(images), _itself if isinstance(twin.mefc_early, nn.Identity) else None)
    x = yield from _compensator("mefc_early", twin.mefc_early, x)
    level1 = yield from blocks("encoder_level1", x)
    level2 = yield from blocks("encoder_level2", (yield from down("down1_2", level1)))
    level3 = yield from blocks("encoder_level3", (yield from down("down2_3", level2)))
    x = yield from blocks("latent", (yield from down("down3_4", level3)))
    x = yield from plain("reduce_chan_level3", (yield from up("up4_3", x, level3)), _itself)
    x = yield from blocks("decoder_level3", x)
    x = yield from plain("reduce_chan_level2", (yield from up("up3_2", x, level2)), _itself)
    x = yield from blocks("decoder_level2", x)
    x = yield from blocks("decoder_level1", (yield from up("up2_1", x, level1, last=True)))
    x = yield from _compensator("mefc_late", twin.mefc_late, x)
    x = yield from plain("output", x)
    return [y + image for y, image in zip(x, images, strict=True)]


def _itself(stream: Tensor) -> Tensor:
    return stream


def _block(name: str, block: SparseTransformerBlock, x: list[Tensor]) -> Chain:
    for part, norm, reader in (("attn", block.norm1, "qkv"), ("ffn", block.norm2, "project_in")):
        branch = getattr(block, part)
        first, last = getattr(branch, reader), branch.project_out
        branch.project_out = nn.Identity()  # of this twin: so that the branch ends before its last map

        def normed(number: int, norm: nn.Module = norm, x: list[Tensor] = x) -> Tensor:
            return norm(x[number])

        def hidden(number: int, branch: nn.Module = branch, normed: Callable[[int], Tensor] = normed) -> Tensor:
            return branch(normed(number))

        yield LinearMap(f"{name}.{part}.{reader}", first, x, normed, within=True)
        outputs = yield LinearMap(f"{name}.{part}.project_out", last, x, hidden, True, _itself)
        x = [before + added for before, added in zip(x, outputs, strict=True)]
    return x


def _compensator(name: str, mefc: nn.Module, x: list[Tensor]) -> Chain:
    if not isinstance(mefc, MixtureOfExpertsCompensator):
        return x
    gates = [mefc.gates(each) for each in x]
    outputs = yield LinearMap(f"{name}.preprocess", mefc.preprocess, x, x.__getitem__)
    x = [F.relu(each) for each in outputs]
    for i, step in enumerate(mefc.steps):
        assert isinstance(step, ExpertLayer)
        if step.out is None:
            continue

        def scaled(number: int, i: int = i, step: ExpertLayer = step, x: list[Tensor] = x) -> Tensor:
            return step.scaled(x[number], gates[number][:, i])

        outputs = yield LinearMap(f"{name}.steps.{i}.out", step.out, x, scaled)
        x = [F.relu(before + F.relu(each)) for before, each in zip(x, outputs, strict=True)]
    return x
