"""The readable network against the released one, and against its own promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.released import ReleasedDRSformer
from drsformer import checkpoint
from drsformer.config import EXPERTS, FEED_FORWARDS, NO_EXPERT, PRESETS, DRSformerConfig, MEFCConfig, preset
from drsformer.model import (
    DepthwiseFeedForward,
    DRSformer,
    FeedForward,
    GatedFeedForward,
    MixtureOfExpertsCompensator,
    TopKMask,
)
from tests.support.networks import SMALL, fill, image


def released_pair(tmp_path: Path, mefc: bool, **structure) -> tuple[ReleasedDRSformer, DRSformer]:
    """The yardstick with fixed weights, and the readable network loaded from its checkpoint."""
    released = fill(ReleasedDRSformer(**structure, mefc=mefc))
    torch.save({"params": released.state_dict()}, tmp_path / "released.pth")
    return released, checkpoint.load(tmp_path / "released.pth").model


@pytest.mark.parametrize("mefc", [True, False])
def test_yardstick_reproduces_numbers_of_the_authors_code(mefc):
    """The golden values were printed by the authors' own code with the same weights and image."""
    golden = json.loads((Path(__file__).parent / "golden" / "released.json").read_text())
    released = fill(ReleasedDRSformer(**SMALL, mefc=mefc))
    output = released(image(24, 32))[0, :, ::3, ::4].flatten()
    expected = torch.tensor(golden["mefc" if mefc else "nomefc"])
    assert (output - expected).abs().max() < 5e-6


@pytest.mark.parametrize("mefc", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (24, 40), (64, 64)])
@torch.no_grad()
def test_readable_network_equals_released_network(tmp_path, mefc, size):
    """Not at 8x8: its latent level is one pixel, all scores are 1 or -1, and which of them top-k keeps is left open."""
    released, model = released_pair(tmp_path, mefc, **SMALL)
    x = image(*size)
    difference = (released.double()(x.double()) - model.double()(x.double())).abs()
    assert difference.max() < 1e-12, f"max {difference.max():.2e}, mean {difference.mean():.2e}"
    assert (model(x.double()) - x).abs().mean() > 0.01  # it does something


@torch.no_grad()
def test_batch_is_independent_images(tmp_path):
    _, model = released_pair(tmp_path, True, **SMALL)
    x = torch.cat([image(16, 24, seed) for seed in range(3)])
    each = torch.cat([model(x[i : i + 1]) for i in range(3)])
    assert (model(x) - each).abs().max() < 1e-5


def macs(model: torch.nn.Module, size: int) -> float:
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("name", "millions", "giga"), [("drsformer", 33.655, 242.98), ("drsformer-nomefc", 32.610, 175.37)]
)
def test_size_of_the_released_networks(name, millions, giga):
    with torch.device("meta"):
        model = DRSformer(preset(name))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=5e-4)
    assert macs(model, 256) / 1e9 == pytest.approx(giga, abs=5e-3)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match=", ".join(PRESETS)):
        preset("drsformer-xxl")


@pytest.mark.parametrize(
    "variant",
    [
        *({"feed_forward": kind} for kind in FEED_FORWARDS),
        {"topk": ()},
        {"topk": ("1/2",)},
        {"topk": ("1/3", "1")},
        *({"mefc": place} for place in ("early", "late", "both")),
        *({"mefc": "both", "experts": count} for count in (1, 4, 8)),
    ],
)
@torch.no_grad()
def test_ablations_of_the_paper_run(variant):
    model = fill(DRSformer(DRSformerConfig.regular(width=8, depths=(1, 1, 1, 1), heads=(1, 2, 2, 4), **variant)))
    assert DRSformerConfig.from_dict(json.loads(json.dumps(model.config.to_dict()))) == model.config
    x = image(16, 16)
    assert model(x).isfinite().all()
    assert (model(x) - x).abs().mean() > 1e-3


@torch.no_grad()
def test_feed_forwards_of_table_3_are_what_their_papers_say():
    gdfn, dfn, fn = (fill(kind(6, 10)) for kind in (GatedFeedForward, DepthwiseFeedForward, FeedForward))
    x = torch.randn(2, 6, 9, 7)

    def gelu(z):
        return z * (1 + torch.erf(z / 2**0.5)) / 2

    gate, value = gdfn.dwconv(gdfn.project_in(x)).split(10, dim=1)
    assert (gdfn(x) - gdfn.project_out(gelu(gate) * value)).abs().max() < 1e-6
    assert (dfn(x) - dfn.project_out(gelu(dfn.dwconv(gelu(dfn.project_in(x)))))).abs().max() < 1e-6
    assert (fn(x) - fn.project_out(gelu(fn.project_in(x)))).abs().max() < 1e-6


@torch.no_grad()
def test_all_fractions_at_one_is_dense_attention():
    """Keeping everything once, with weight one, is the attention without top-k."""
    structure = {"width": 8, "depths": (1, 1, 1, 1), "heads": (1, 2, 2, 4)}
    sparse = fill(DRSformer(DRSformerConfig.regular(**structure, topk=("1",))))
    for name, parameter in sparse.named_parameters():
        if ".mix." in name:
            parameter.fill_(1.0)
    dense = DRSformer(DRSformerConfig.regular(**structure, topk=()))
    dense.load_state_dict({k: v for k, v in sparse.state_dict().items() if ".mix." not in k})
    assert (sparse(image(16, 24)) - dense(image(16, 24))).abs().max() < 1e-6


@pytest.mark.parametrize("fill_value", [0.0, 0.5, 1.0])
@torch.no_grad()
def test_flat_image_stays_finite(tmp_path, fill_value):
    """Nothing to attend to: equal scores everywhere, zero variance, zero norms."""
    _, model = released_pair(tmp_path, True, **SMALL)
    assert model(torch.full((1, 3, 16, 16), fill_value)).isfinite().all()


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 4, 16, 16), (1, 3, 12, 16), (1, 3, 16, 20)])
def test_wrong_input_shape_is_named(shape):
    model = DRSformer(preset("drsformer-tiny"))
    with pytest.raises(ValueError, match="multiples of 8"):
        model(torch.zeros(shape))


def test_mask_marks_exactly_the_k_largest_also_among_ties():
    mask = TopKMask((1, 3, 5))
    scores = torch.tensor([[[[3.0, 1.0, 2.0, 5.0, 4.0], [7.0] * 5]]])
    first, second, third = mask(scores.unsqueeze(-2)).unbind(-2)
    assert first[0, 0, 0].tolist() == [False, False, False, True, False]
    assert second[0, 0, 0].tolist() == [True, False, False, True, True]
    assert [m[0, 0, 1].sum().item() for m in (first, second, third)] == [1, 3, 5]
    assert ((second | first) == second).all()
    assert ((third | second) == third).all()


@torch.no_grad()
def test_pruned_expert_with_zero_output_changes_nothing():
    """Its gate stays in the softmax, so the others keep their share."""
    full = fill(MixtureOfExpertsCompensator(6, MEFCConfig.regular(4, steps=2)))
    dead = 2
    full.steps[0].experts[dead][-1].weight.zero_()
    names = tuple(NO_EXPERT if i == dead else EXPERTS[i] for i in range(4))
    pruned = MixtureOfExpertsCompensator(6, MEFCConfig(full.gate[0].out_features, (names, EXPERTS[:4])))
    state = full.state_dict()
    left = [i for i in range(4) if i != dead]
    for key in [key for key in state if key.startswith("steps.0.experts.")]:
        value, index = state.pop(key), int(key.split(".")[3])
        if index != dead:
            state[key.replace(f"experts.{index}", f"experts.{left.index(index)}")] = value
    out = state["steps.0.out.weight"]
    state["steps.0.out.weight"] = torch.cat([out[:, 6 * i : 6 * i + 6] for i in left], dim=1)
    pruned.load_state_dict(state)
    x = torch.randn(2, 6, 8, 8)
    assert (full(x) - pruned(x)).abs().max() < 1e-6
