"""The top-k masks of the attention, in the forms that runtimes can execute.

All three keep the same entries of a row of scores as long as the k-th largest differs from the next one:

- `threshold` keeps what is at least as large as the k-th largest (the paper's Eq. 6): one TopK, whose values all masks
  compare with. The simplest, and the default. Entries that equal the k-th largest are all kept, so a row with ties may
  keep more than k; all of them then share the weight.
- `scatter` keeps the entries that TopK names (the released code), so exactly k. It needs ScatterElements. Of equal
  entries ONNX's TopK names the lowest index first; PyTorch's leaves the choice open (on a CPU it names the highest of
  a constant row), so that on ties the exported network may differ from the one in PyTorch, and both are right.
- `rank` keeps an entry that fewer than k entries of its row beat, where a larger one beats it and so does an equal one
  of lower index. Exactly k, lowest index first, in every runtime; only comparisons and sums, for runtimes without TopK
  or where it is slow. It compares every pair: d * d * d values a head instead of d * d.

Ties are not exotic: a flat image makes all scores of a head equal, and in float16 distinct scores collapse. Anything
that swaps which of two equal entries counts is a valid reading of Eq. 6, but the output may move by some 1e-3.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from drsformer.model import TopKMask
from export.options import Pattern

Network = TypeVar("Network", bound=nn.Module)


class ThresholdMask(TopKMask):
    """Marks the scores that reach the k-th largest of their row: at least k, more where scores equal it."""

    last: Tensor

    def __init__(self, ks: tuple[int, ...]) -> None:
        super().__init__(ks)
        self.register_buffer("last", torch.tensor(ks) - 1, persistent=False)

    def forward(self, scores: Tensor) -> Tensor:
        largest = scores.topk(self.ks[-1], dim=-1).values
        least = largest.index_select(-1, self.last)  # ..., 1, masks
        return scores >= least.transpose(-2, -1)


class RankMask(TopKMask):
    """Marks the scores that fewer than k of their row beat: exactly k, of equal scores the first."""

    def forward(self, scores: Tensor) -> Tensor:
        place = torch.arange(scores.shape[-1], device=scores.device)
        earlier = place < place.unsqueeze(-1)  # d, d: the column comes before the row
        score, rival = scores.unsqueeze(-1), scores.unsqueeze(-2)
        beaten = (rival > score) | ((rival == score) & earlier)  # ..., 1, d, d
        rank = beaten.float().sum(-1)  # exact, and a sum of floats is what every runtime has
        return torch.cat([rank < k for k in self.ks], dim=-2)


PATTERNS: dict[Pattern, type[TopKMask]] = {"threshold": ThresholdMask, "scatter": TopKMask, "rank": RankMask}


def masks(network: nn.Module) -> dict[str, TopKMask]:
    """The masks of a network by the name of the layer that holds them, such as "encoder_level1.0.attn"."""
    return {name.rpartition(".")[0]: m for name, m in network.named_modules() if isinstance(m, TopKMask)}


def with_pattern(network: Network, pattern: Pattern) -> Network:
    """The same network with another form of mask. The weights are shared; `network` itself stays as it is."""
    twin = shared_copy(network)
    device = next(network.parameters()).device
    for layer, mask in masks(twin).items():
        twin.get_submodule(layer).topk = PATTERNS[pattern](mask.ks).to(device)
    return twin


def shared_copy(network: Network) -> Network:
    """A copy of the modules over the same parameters and buffers."""
    return copy.deepcopy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})


@contextmanager
def scores_of(network: nn.Module, replace: dict[str, Tensor] | None = None) -> Iterator[dict[str, Tensor]]:
    """Inside the block, a forward pass leaves here the scores that every mask sees, by layer.

    Args:
        network: Any network with masks.
        replace: Scores by layer, (B, heads, d, 1, d), by which each mask chooses instead of its own, while the
            attention still weighs with its own: the network makes the selections that another one made.
    """
    scores: dict[str, Tensor] = {}

    def hook(layer: str):
        def note(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
            scores[layer] = args[0]
            return None if replace is None else (replace[layer],)

        return note

    handles = [mask.register_forward_pre_hook(hook(layer)) for layer, mask in masks(network).items()]
    try:
        yield scores
    finally:
        for handle in handles:
            handle.remove()


def count_flips(scores: Tensor, others: Tensor, ks: tuple[int, ...]) -> int:
    """How many selections of two score matrices of equal shape, (B, heads, d, 1, d), differ: entries that a mask keeps
    by the first and not by the second, summed over masks, of which each keeps one of `ks`. Ties are broken by index,
    so equal scores never differ."""
    rank = RankMask(ks)
    return int((rank(scores) & ~rank(others)).sum())
