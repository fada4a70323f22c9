"""Which channels of a network go together, by the dependency graph of Torch-Pruning (Fang et al., arXiv 2301.12900).

    for part in coupled_channels(network, ["down1_2.conv"])["down1_2.conv"]:
        print(part.layer, part.side, part.channels[0])

The graph cannot be asked about the network itself. Version 1.6.1 takes pixel shuffles for element-wise operations and
reshapes for flattening: it is wrong without a word, or fills the memory and is never done. So it sees a stand-in, the
network's own `forward` with native layers in place of those that it does not understand, under their names. There, the
convolution before a pixel-unshuffle has as many outputs as the level behind it has channels, four times as many as in
the network, and that before a pixel-shuffle a fourth.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch_pruning import DependencyGraph, ops, prune_conv_out_channels

from drsformer.config import SIZE_MULTIPLE
from drsformer.model import (
    DepthwiseFeedForward,
    Downsample,
    DRSformer,
    ExpertLayer,
    FeedForward,
    GatedFeedForward,
    LayerNorm,
    MixedScaleFeedForward,
    MixtureOfExpertsCompensator,
    TopKSparseAttention,
    Upsample,
    conv1x1,
)


class CoupledChannels(NamedTuple):
    """Channels of a layer of the stand-in that go together with the outputs of another, the root.

    Attributes:
        layer: Name of the layer.
        side: Which of its channels they are; "both" where it works channel by channel.
        channels: (outputs of the root, n) int64: the n channels that go with each, ascending.
        width: How many channels the layer has on this side.
    """

    layer: str
    side: Literal["inputs", "outputs", "both"]
    channels: Tensor
    width: int


class CompensatorStandIn(nn.Module):
    """Stands for an MEFC. All of it is as wide as its level, so what it computes is added to what it reads, which
    couples the two, and the gate gives as many channels."""

    def __init__(self, mefc: MixtureOfExpertsCompensator) -> None:
        super().__init__()
        width = mefc.preprocess.in_channels
        self.gate = nn.Sequential(conv1x1(width, 1), conv1x1(1, width))
        self.preprocess = mefc.preprocess
        self.steps = mefc.steps

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gate(x)
        x = x + self.preprocess(x)
        for step in self.steps:
            assert isinstance(step, ExpertLayer)
            if step.out is not None:
                x = x + step.out(torch.cat([expert(x) for expert in step.experts], dim=1))
        return x


def coupled_channels(network: DRSformer, roots: Iterable[str]) -> dict[str, list[CoupledChannels]]:
    """Everything that goes together with the outputs of convolutions, these included.

    Args:
        network: Its weights are not looked at, so it may be on the meta device.
        roots: The names of the convolutions.

    Returns:
        By the names of the convolutions, each of them the first of its list.
    """
    shown = stand_in(network).to_empty(device="cpu")  # the meta device is slower with images as small as this one
    names = {module: name for name, module in shown.named_modules()}
    with torch.enable_grad():
        image = torch.zeros(1, 3, SIZE_MULTIPLE, SIZE_MULTIPLE)
        graph = DependencyGraph().build_dependency(shown, (image,))
    concatenations = [node for node in graph.module2node.values() if node.type == ops.OPTYPE.CONCAT]
    assert all(node.module.offsets for node in concatenations), "a concatenation that is not understood"

    def coupled(root: str) -> Iterator[CoupledChannels]:
        convolution = shown.get_submodule(root)
        assert isinstance(convolution, nn.Conv2d)
        outputs = list(range(convolution.out_channels))
        for item in graph.get_pruning_group(convolution, prune_conv_out_channels, outputs):
            layer = item.dep.layer
            pairs = torch.tensor(sorted(zip(item.root_idxs, item.idxs, strict=True)))
            channels = pairs[:, 1].view(len(outputs), -1)
            if isinstance(layer, nn.BatchNorm2d):
                yield CoupledChannels(names[layer], "both", channels, layer.num_features)
            elif isinstance(layer, nn.Conv2d) and graph.is_in_channel_pruning_fn(item.dep.pruning_fn):
                yield CoupledChannels(names[layer], "inputs", channels, layer.in_channels)
            elif isinstance(layer, nn.Conv2d):
                yield CoupledChannels(names[layer], "outputs", channels, layer.out_channels)

    return {root: list(coupled(root)) for root in roots}


def stand_in(network: DRSformer) -> DRSformer:
    """A copy of a network in which native layers stand for others. Its channels depend on each other as those of the
    network do; what it computes is of no use."""
    copied = copy.deepcopy(network)
    for name, module in list(copied.named_modules()):
        if (native := _native(name, module)) is not None:
            copied.set_submodule(name, native)
    for name, level in copied.config.levels().items():  # the graph counts channels back to here, but not for 500 layers
        copied.get_submodule(name).add_module("end", nn.BatchNorm2d(level.width))
    return copied


def _native(name: str, module: nn.Module) -> nn.Module | None:
    """What stands for a module, or None if that can stay."""
    if isinstance(module, LayerNorm):
        return nn.BatchNorm2d(len(module.weight))
    if isinstance(module, TopKSparseAttention):
        return _branch("qkv", module.project_out.out_channels)
    if isinstance(module, MixedScaleFeedForward | GatedFeedForward | DepthwiseFeedForward | FeedForward):
        return _branch("project_in", module.project_out.out_channels)
    if isinstance(module, Downsample):
        conv = conv1x1(module.conv.in_channels, 4 * module.conv.out_channels)
        return nn.Sequential(OrderedDict(conv=conv, unshuffle=nn.MaxPool2d(2)))
    if isinstance(module, Upsample):
        conv = conv1x1(module.conv.in_channels, module.conv.out_channels // 4)
        return nn.Sequential(OrderedDict(conv=conv, shuffle=nn.Upsample(scale_factor=2)))
    if isinstance(module, MixtureOfExpertsCompensator):
        return CompensatorStandIn(module)
    if isinstance(module, nn.Conv2d) and ".experts." in name:  # depthwise, or with as many outputs as inputs
        return nn.BatchNorm2d(module.in_channels)
    return None


def _branch(first: str, width: int) -> nn.Sequential:
    """Attention or feed-forward network: what is inside has nothing to do with the residual path."""
    return nn.Sequential(OrderedDict({first: conv1x1(width, 1), "project_out": conv1x1(1, width)}))
