"""Folding: equal to the readable network to rounding, at every width and edge; and float16 that cannot overflow."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from drsformer.config import BlockConfig, DRSformerConfig, LevelConfig, MEFCConfig, preset
from drsformer.model import DRSformer, ExpertLayer, MixedScaleFeedForward, TopKSparseAttention
from export.folding import (
    FP16_SAFE_VALUE,
    Folded,
    FoldedAttention,
    FoldedFeedForward,
    Normalise,
    _normalised_bound,
    fold,
    trainable,
)
from export.topk import PATTERNS, masks, scores_of, with_pattern
from runtime.errors import InputError
from tests.support.networks import SMALL, fill, image

HALVES = ("fp16", "bf16")


def network(**options) -> DRSformer:
    return fill(DRSformer(DRSformerConfig.regular(**{**SMALL, **options})))


def difference(one: torch.nn.Module, other: torch.nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return (one(x).double() - other(x).double()).abs().max().item()


def pruned() -> DRSformer:
    """Every block of another structure, and experts missing."""

    def level(width: int, *blocks: tuple[int, int, int]) -> LevelConfig:
        return LevelConfig(width, tuple(BlockConfig(*block) for block in blocks))

    steps = (("none",) * 3, ("avg_pool_3x3", "none", "sep_conv_1x1"), ("none", "none", "dil_conv_5x5"))
    config = DRSformerConfig(
        encoder=(level(7, (1, 5, 3), (2, 3, 1)), level(12), level(8, (3, 1, 17))),
        latent=level(20, (2, 9, 2), (1, 7, 33)),
        decoder=(level(9, (3, 2, 6)), level(5, (1, 1, 1)), level(13, (1, 13, 11))),
        up=(6, 3, 6),
        mefc_early=MEFCConfig(3, steps),
        mefc_late=MEFCConfig(5, steps[1:]),
    )
    return fill(DRSformer(config))


CASES = {
    "odd hidden widths": {},
    "one head": {"heads": (1, 1, 1, 1)},
    "even hidden widths": {"expansion": 1.0},
    "one hidden channel": {"expansion": 0.1, "width": 10, "heads": (1, 1, 1, 1)},
    "aligned hidden width": {"width": 16, "expansion": 1.0, "heads": (1, 2, 4, 8)},
    "compensators": {"mefc": "both"},
    "dense attention": {"topk": ()},
    "one mask": {"topk": ("1/3",)},
    "gated": {"feed_forward": "gdfn"},
    "depthwise": {"feed_forward": "dfn"},
    "plain": {"feed_forward": "fn"},
}


@pytest.mark.parametrize("case", CASES)
def test_folded_equals_readable(case):
    readable = network(**CASES[case]).double()
    assert difference(fold(readable), readable, image(24, 40).double()) < 1e-10


def test_folded_equals_readable_after_pruning():
    readable = pruned().double()
    assert difference(fold(readable), readable, image(24, 40).double()) < 1e-10


@pytest.mark.parametrize("hidden", [*range(1, 20), 127, 383, 384, 385])
@torch.no_grad()
def test_feed_forward_at_every_width(hidden):
    """The pairing of channels depends on whether their number is odd and how much padding there is."""
    config = DRSformerConfig.regular(**SMALL)
    block = BlockConfig(1, 4, hidden)
    one = dataclasses.replace(config, encoder=(LevelConfig(config.encoder[0].width, (block,)), *config.encoder[1:]))
    readable = fill(DRSformer(one)).double()
    assert isinstance(readable.encoder_level1[0].ffn, MixedScaleFeedForward)
    before, after = readable.encoder_level1[0], fold(readable).encoder_level1[0]
    x = torch.randn(2, config.encoder[0].width, 9, 7, dtype=torch.float64)
    assert (after(x) - before(x)).abs().max() < 1e-10


def test_parts_are_padded_to_whole_vectors():
    ffn = fold(network()).encoder_level1[0].ffn
    assert isinstance(ffn, FoldedFeedForward)
    assert {
        tensor.shape[0] % 8 for name, tensor in ffn.named_buffers() if name.startswith(("weight", "dw", "pair"))
    } == {0}


@pytest.mark.parametrize(
    "x",
    [torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16), image(8, 8), image(8, 128)],
    ids=["black", "white", "smallest", "narrow"],
)
def test_edge_images(x):
    readable = with_pattern(network(mefc="both").double(), "rank")  # on a flat image all scores are equal
    assert difference(fold(readable), readable, x.double()) < 1e-10


@torch.no_grad()
def test_dead_channels():
    """Channels of Q that are zero have no direction; their norm is clamped, as in the readable network."""
    readable = network().double()
    for name, parameter in readable.named_parameters():
        if name.endswith("qkv_dwconv.weight"):
            parameter[:2] = 0
            parameter[2] *= 1e-14
        if name.endswith("norm1.bias"):
            parameter.zero_()
    readable = with_pattern(readable, "rank")
    assert difference(fold(readable), readable, image(16, 24).double()) < 1e-10


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_keep_their_places_and_see_the_same_scores(pattern):
    readable = with_pattern(network().double(), pattern)
    folded = fold(readable)
    assert list(masks(folded)) == list(masks(readable))
    assert {type(mask) for mask in masks(folded).values()} == {PATTERNS[pattern]}
    with torch.no_grad(), scores_of(readable) as before, scores_of(folded) as after:
        readable(image(16, 24).double())
        folded(image(16, 24).double())
    assert all((before[layer] - after[layer]).abs().max() < 1e-10 for layer in before)


def test_network_stays_as_it_was():
    readable = network(mefc="both")
    before = copy.deepcopy(readable.state_dict())
    fold(readable, "fp16")
    assert readable.encoder_level1[0].attn.__class__.__name__ == "TopKSparseAttention"
    assert all(torch.equal(tensor, before[name]) for name, tensor in readable.state_dict().items())
    assert all(parameter.requires_grad for parameter in readable.parameters())


def test_multiplications_of_the_full_network():
    """242.98 GMAC at 256x256 before."""
    with torch.device("meta"):
        readable = DRSformer(preset("drsformer"))
    readable = readable.to_empty(device="cpu").apply(_zero)
    folded = fold(readable).to("meta")
    with FlopCounterMode(display=False) as counter:
        folded(torch.empty(1, 3, 256, 256, device="meta"))
    assert 203e9 < counter.get_total_flops() / 2 < 206e9  # zeros of padded widths included


def _zero(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        torch.nn.init.zeros_(parameter)


def test_trainable_network_has_the_gradients_of_the_readable_one():
    readable = network(mefc="late").double()
    twin = trainable(readable)
    x, target = image(16, 24).double(), image(16, 24, seed=1).double()

    def gradients(form: torch.nn.Module) -> list[Tensor]:
        readable.zero_grad()
        (form(x) - target).square().mean().backward()
        return [parameter.grad.clone() for parameter in readable.parameters() if parameter.grad is not None]

    for found, expected in zip(gradients(twin), gradients(readable), strict=True):
        assert (found - expected).abs().max() < 1e-10
    assert {id(p) for p in twin.parameters()} == {id(p) for p in readable.parameters()}


def test_trainable_network_follows_its_parameters():
    readable = network()
    twin = trainable(readable)
    with torch.no_grad():
        for parameter in readable.parameters():
            parameter.mul_(0.9)
    assert difference(twin, readable, image(16, 24)) < 1e-4


@pytest.mark.parametrize("precision", HALVES)
def test_half_precision_computes_in_half_and_keeps_fp32_where_it_should(precision):
    folded = fold(with_pattern(network(mefc="both"), "threshold"), precision)
    dtypes = {name: tensor.dtype for name, tensor in (*folded.named_parameters(), *folded.named_buffers())}
    keep_fp32 = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert {name.rpartition(".")[2] for name in keep_fp32} == {"temperature", "out", "weight", "bias"}
    assert all(".gate." in name for name in keep_fp32 if name.endswith(("weight", "bias")))
    x = image(16, 24)
    with torch.no_grad():
        assert folded(x).dtype == torch.float32
        with scores_of(folded) as scores:
            folded(x)
    assert {tensor.dtype for tensor in scores.values()} == {torch.float32}


def smooth(readable: DRSformer) -> DRSformer:
    """Without masks and with a small influence of the blocks, so that rounding is all that differs."""
    with torch.no_grad():
        for name, parameter in readable.named_parameters():
            if name.endswith(("project_out.weight", "output.weight")):
                parameter.mul_(0.1)
    return readable


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_half_precision_is_close(precision, tolerance):
    readable = smooth(network(topk=(), mefc="both"))
    assert difference(fold(readable, precision), readable, image(32, 24)) < tolerance


@torch.no_grad()
def enlarge(readable: DRSformer, factor: float) -> DRSformer:
    """The same function with large values inside: what one layer multiplies, a later one divides."""
    for module in readable.modules():
        if isinstance(module, MixedScaleFeedForward):
            module.project_in.weight *= factor
            module.project_out.weight /= factor
    for name, parameter in readable.named_parameters():
        if name.endswith("qkv.weight"):
            parameter *= factor
        elif name.endswith("attn.project_out.weight"):
            parameter /= factor
    return readable


@torch.no_grad()
def test_large_weights_do_not_overflow_float16():
    readable = enlarge(smooth(network(topk=())), 2.0**15)
    x = image(32, 24)
    assert not copy.deepcopy(readable).half()(x.half()).isfinite().all()
    assert difference(fold(readable, "fp16"), readable, x) < 2e-3


@torch.no_grad()
def test_what_a_depthwise_convolution_takes_back_does_not_overflow_float16_before_it():
    readable = smooth(network(topk=()))
    for block in (module for module in readable.modules() if isinstance(module, TopKSparseAttention)):
        block.qkv.weight *= 2.0**17
        block.qkv_dwconv.weight /= 2.0**17
    x = image(32, 24)
    folded = fold(readable, "fp16")
    assert difference(folded, readable, x) < 2e-3
    for module in (module for module in folded.modules() if isinstance(module, FoldedAttention)):
        assert _normalised_bound(module.qkv.float(), module.bias.float()).max() <= FP16_SAFE_VALUE


@torch.no_grad()
def test_megapixels_do_not_overflow_float16():
    """Sums over a million bright pixels: the norms of Q and K, their product, and the means that gate the experts."""
    folded = fold(with_pattern(network(mefc="early"), "rank"), "fp16")
    attention = folded.encoder_level1[0].attn
    assert isinstance(attention, FoldedAttention)
    q = torch.full((1, 1, 12, 1024, 1024), 8.0, dtype=torch.float16)
    assert not (q.flatten(3) @ q.flatten(3).transpose(-2, -1)).isfinite().all()
    matrix = attention.matrix(q, q, attention.temperature, attention.out)
    pixel = q[..., :1, :1]
    torch.testing.assert_close(matrix, attention.matrix(pixel, pixel, attention.temperature, attention.out))
    bright = torch.full((1, 12, 1024, 1024), 8.0, dtype=torch.float16)
    gates = []
    folded.mefc_early.gate.register_forward_hook(lambda _, inputs, output: gates.append(inputs[0]))
    folded.mefc_early.steps = torch.nn.ModuleList()
    with pytest.raises(RuntimeError):  # without steps there is nothing to gate
        folded.mefc_early(bright)
    assert torch.equal(gates[0], torch.full((1, 12), 8.0))


@torch.no_grad()
def test_flat_bright_pixels_do_not_overflow_float16():
    x = torch.full((1, 12, 4, 4), 60000.0, dtype=torch.float16)
    assert torch.equal(Normalise(torch.float32)(x), torch.zeros_like(x))


def test_weights_beyond_float16_are_refused():
    readable = network()
    with torch.no_grad():
        readable.patch_embed.weight[0] = 1e6
    with pytest.raises(InputError, match=r"patch_embed.*fp16.*bf16"):
        fold(readable, "fp16")
    fold(readable, "bf16")


def test_folded_parts_are_where_the_readable_ones_were():
    folded = fold(network(mefc="both"))
    assert all(isinstance(block.attn, Folded) for block in folded.latent)
    assert not any(isinstance(module, ExpertLayer) for module in folded.modules())
