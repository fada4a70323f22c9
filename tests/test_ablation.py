"""The paper's tables by command: the right networks, trained once each, scored as evaluation scores them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks import ablation
from benchmarks.ablation import TABLES, Ablation
from drsformer import checkpoint
from drsformer.config import EXPERTS, PRESETS, DRSformerConfig, MEFCConfig, preset
from drsformer.data import find_pairs
from drsformer.evaluation import evaluate_model
from drsformer.recipe import Hardware, Recipe
from runtime.errors import InputError
from tests.support.images import noise, save

MICRO = dict(width=4, depths=(1, 0, 0, 0), heads=(1, 1, 1, 1), expansion=2.0, mefc="none")


@pytest.fixture
def options(tmp_path, monkeypatch) -> Ablation:
    monkeypatch.setitem(PRESETS, "micro", MICRO)
    for i, folder in enumerate(("input", "target")):
        save(tmp_path / "rain" / folder / "a.png", noise(i))
    return Ablation(
        "3",
        [tmp_path / "rain"],
        [tmp_path / "rain"],
        tmp_path / "runs",
        tmp_path / "results",
        network="micro",
        recipe=Recipe(iterations=2, batch=1, patch=16),
        hardware=Hardware(accelerator="cpu", devices="1"),
    )


def configs(table: str) -> list[DRSformerConfig]:
    return [preset("drsformer", **entry.variant.changes()) for entry in TABLES[table].values()]


def test_rows_are_the_papers_networks():
    released = preset("drsformer")
    assert [config.feed_forward for config in configs("3")] == ["fn", "dfn", "gdfn", "msfn"]
    assert all(replace(config, feed_forward="msfn") == released for config in configs("3"))
    eight, four, one = (MEFCConfig.regular(experts) for experts in (8, 4, 1))
    found = [(config.mefc_early, config.mefc_late) for config in configs("4")]
    assert found == [(None, None), (eight, None), (None, eight), (one, one), (four, four), (eight, eight)]
    assert four.steps == (EXPERTS[:4],) * 4
    assert [config.topk for config in configs("k")] == [("1/2",), ("2/3",), ("3/4",), ("4/5",), released.topk, ()]
    best = [max(table.values(), key=lambda entry: entry.psnr or 0) for table in TABLES.values()]
    assert all((entry.psnr, entry.ssim) == (32.18, 0.9330) for entry in best)
    assert all(preset("drsformer", **entry.variant.changes()) == released for entry in best)


def test_a_table_is_trained_and_scored_and_shares_the_whole_network_with_the_next(options, monkeypatch):
    assert ablation.ablation(options)["errors"] == []
    (run,) = json.loads((options.output / "ablation-3.json").read_text())["runs"]
    assert list(run["rows"]) == ["FN", "DFN", "GDFN", "MSFN"]
    networks = {
        network.config.feed_forward: network
        for network in (checkpoint.load(path).model for path in options.run_dir.glob("*/last.safetensors"))
    }
    for name, row in run["rows"].items():
        scores = evaluate_model(networks[name.lower()], find_pairs(options.test[0]))
        place = "rain PSNR" if "rain PSNR" in row else next(key for key in row if key.endswith(" PSNR"))
        assert row[place] == pytest.approx(scores.psnr, abs=2e-3)
        assert row["paper PSNR"] == TABLES["3"][name].psnr
    assert "| MSFN |" in (options.output / "ablation-3.md").read_text()

    before = (options.output / "ablation-3.json").read_text()
    monkeypatch.setattr(ablation, "train", None)  # everything is there already
    ablation.ablation(options)
    assert (options.output / "ablation-3.json").read_text() == before
    monkeypatch.undo()

    monkeypatch.setitem(PRESETS, "micro", MICRO)
    assert ablation.ablation(replace(options, table="k"))["errors"] == []
    assert len(list(options.run_dir.iterdir())) == 4 + 5  # of six rows, one is the whole network


def test_another_recipe_does_not_mix_with_a_table_and_time_that_is_up_leaves_rows_to_do(options):
    stopped = ablation.ablation(replace(options, minutes=0.0))
    assert stopped["rows"] == 0
    assert stopped["unfinished"] == list(TABLES["3"])
    ablation.ablation(options)
    with pytest.raises(
        InputError, match=r"expected network micro as in its rows, found drsformer-tiny; give another `output`"
    ):
        ablation.ablation(replace(options, network="drsformer-tiny"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": "drsformer-xxl"}, "`network`: expected one of .*drsformer-xs"),
        ({"limit": 0}, "`limit`"),
        ({"seeds": (0, -1)}, "`seeds`"),
        ({"minutes": -1}, "`minutes`"),
        ({"hardware": Hardware(devices="2")}, "`devices`: expected 1, found 2"),
    ],
)
def test_mistakes_are_told_in_one_line(options, change, message):
    with pytest.raises(InputError, match=message):
        replace(options, **change)


def test_the_noise_between_seeds_stands_beside_their_mean(options):
    assert ablation.ablation(replace(options, seeds=(3, 5)))["errors"] == []
    assert len(list(options.run_dir.iterdir())) == 2 * 4
    (run,) = json.loads((options.output / "ablation-3.json").read_text())["runs"]
    pairs = find_pairs(options.test[0])
    found = [
        evaluate_model(network, pairs).psnr
        for network in (checkpoint.load(path).model for path in options.run_dir.glob("*/last.safetensors"))
        if network.config.feed_forward == "gdfn"
    ]
    row = {key.split()[-1]: value for key, value in run["rows"]["GDFN"].items() if not key.startswith("paper")}
    psnr, least, most = row["PSNR"], row["least"], row["most"]
    assert (least, most) == pytest.approx((min(found), max(found)), abs=2e-3)
    assert least < psnr == pytest.approx(sum(found) / 2, abs=2e-3)

    alone = replace(options, recipe=replace(options.recipe, seed=5), output=options.output / "alone")
    ablation.ablation(alone)  # the same networks
    assert len(list(options.run_dir.iterdir())) == 2 * 4
