"""The three forms of mask: equal away from ties, and on ties what each promises."""

from __future__ import annotations

import pytest
import torch

from drsformer.config import DRSformerConfig, preset
from drsformer.model import DRSformer, TopKMask
from export.topk import PATTERNS, count_flips, masks, scores_of, with_pattern
from tests.support.networks import fill, image

KS = (6, 8, 9, 9)  # of 12; two masks may keep equally many


def random_scores(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_definition(scores: torch.Tensor, ks: tuple[int, ...]) -> torch.Tensor:
    """Exactly k of each row, of equal scores the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    masks = [torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :k], True) for k in ks]
    return torch.stack(masks, dim=-2)


def marked(pattern: str, ks: tuple[int, ...], scores: torch.Tensor) -> torch.Tensor:
    """(..., masks, d) for scores (..., d)."""
    return PATTERNS[pattern](ks)(scores.unsqueeze(-2))


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.bool
    assert found.shape == expected.shape
    assert torch.equal(found, expected), f"{int((found != expected).sum())} of {found.numel()} entries differ"


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", range(5))
def test_patterns_agree_without_ties(pattern, seed):
    scores = random_scores(2, 3, 12, 12, seed=seed)
    assert_equal(marked(pattern, KS, scores), by_definition(scores, KS))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_width_of_one_keeps_its_only_score(pattern):
    mask = marked(pattern, (1,), random_scores(1, 5, 1, 1))
    assert mask.all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_k_of_all_keeps_all(pattern):
    half, everything = marked(pattern, (6, 12), random_scores(1, 2, 12, 12)).unbind(-2)
    assert (half.sum(-1) == 6).all()
    assert everything.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_constant_rows(dtype):
    """A flat image: the threshold keeps all, scatter exactly k, rank the first k."""
    scores = torch.full((1, 2, 12, 12), 0.25, dtype=dtype)
    assert marked("threshold", KS, scores).all()
    for k, mask, first in zip(
        KS, marked("scatter", KS, scores).unbind(-2), marked("rank", KS, scores).unbind(-2), strict=True
    ):
        assert (mask.sum(-1) == k).all()
        assert first[..., :k].all()
        assert not first[..., k:].any()


@pytest.mark.parametrize("seed", range(5))
def test_ties_of_float16(seed):
    """Scores that float16 makes equal. What is above the k-th largest is kept by all three, nothing below it by any."""
    scores = (0.01 * random_scores(1, 4, 48, 48, seed=seed) + 1).half()
    ks = (24, 32, 36, 38)
    assert_equal(marked("rank", ks, scores), by_definition(scores, ks))
    threshold, scatter, rank = (marked(p, ks, scores).unbind(-2) for p in ("threshold", "scatter", "rank"))
    assert any((t.sum(-1) > k).any() for t, k in zip(threshold, ks, strict=True)), "no ties to speak of"
    for k, t, s, r in zip(ks, threshold, scatter, rank, strict=True):
        kth = scores.sort(-1, descending=True).values[..., k - 1, None]
        assert torch.equal(t, scores >= kth)
        for exact in (s, r):
            assert (exact.sum(-1) == k).all()
            assert exact[scores > kth].all()
            assert not exact[scores < kth].any()


def test_known_tie():
    scores = torch.tensor([0.5, 0.9, 0.5, 0.1, 0.5])
    threshold, rank = (marked(p, (2,), scores).squeeze(-2) for p in ("threshold", "rank"))
    assert threshold.tolist() == [True, True, True, False, True]
    assert rank.tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_network_gives_the_same_with_any_pattern(pattern):
    network = fill(DRSformer(preset("drsformer-tiny")))
    other = with_pattern(network, pattern)
    x = image(32, 40)
    assert {type(mask) for mask in masks(other).values()} == {PATTERNS[pattern]}
    assert {type(mask) for mask in masks(network).values()} == {TopKMask}
    assert torch.equal(other(x), network(x))
    mine, theirs = dict(network.named_parameters()), dict(other.named_parameters())
    assert all(theirs[name] is parameter for name, parameter in mine.items())


def test_dense_network_has_no_masks():
    network = DRSformer(DRSformerConfig.regular(width=8, depths=(1, 1, 1, 1), heads=(1, 1, 1, 1), topk=()))
    assert not masks(with_pattern(network, "rank"))


@torch.no_grad()
def test_scores_are_those_that_the_masks_see():
    network = fill(DRSformer(preset("drsformer-tiny")))
    with scores_of(network) as scores:
        network(image(32, 40))
    assert list(scores) == list(masks(network))
    assert scores["latent.0.attn"].shape == (1, 4, 16, 1, 16)
    seen = scores["latent.0.attn"].clone()
    network(image(32, 40, seed=1))  # outside the block nothing is noted
    assert torch.equal(scores["latent.0.attn"], seen)


@torch.no_grad()
def test_replaced_scores_select_but_do_not_weigh():
    network, x = fill(DRSformer(preset("drsformer-tiny"))), image(32, 40)
    with scores_of(network) as own:
        plain = network(x)
    with scores_of(network, {layer: 7 * tensor - 2 for layer, tensor in own.items()}):
        assert torch.equal(network(x), plain)  # the same order of scores makes the same selections
    with scores_of(network, {layer: -tensor for layer, tensor in own.items()}):
        assert not torch.equal(network(x), plain)


def test_flips_are_counted():
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert count_flips(scores, scores + 1, (1, 2, 3)) == 0
    assert count_flips(scores, torch.tensor([[3.0, 4.0, 2.0, 1.0]]), (1, 2, 3)) == 1
    assert count_flips(scores, torch.tensor([[1.0, 2.0, 3.0, 4.0]]), (1, 2, 3)) == 1 + 2 + 1
    assert count_flips(torch.zeros(1, 4), torch.zeros(1, 4), (1, 2, 3)) == 0
