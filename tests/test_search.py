"""The search finds the cheapest network within a budget, goes on after a kill, and says when there is none."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from compress import candidates as trying
from compress import latency, sensitivity
from compress import prune as pruning
from compress import search as searching
from compress.latency import Latency
from compress.search import SearchOptions, search
from drsformer import checkpoint, counts
from drsformer.config import DRSformerConfig
from drsformer.model import DRSformer
from drsformer.recipe import Hardware, Recipe
from export.comparison import Comparison, Validation
from export.onnx import ExportOptions, export
from runtime.bundle import load
from runtime.errors import GateError, InputError
from runtime.progress import silent
from runtime.session import Derainer
from tests.support.networks import fill

pytestmark = pytest.mark.slow

CONFIG = DRSformerConfig.regular(8, (0, 0, 1, 1), (1, 1, 2, 2), 4.0)
RECIPE = Recipe(iterations=2, constant=0, batch=1, patch=16)
CPU = Hardware(accelerator="cpu", devices="1")


def by_macs(networks, size, on_progress=silent):
    """Stands for the clock, whose milliseconds are million MACs of anything but attention."""
    taken = [
        network
        if isinstance(network, float)
        else sum(item.macs for item in counts.items(network.config, *size) if item.part != "attention") / 1e6
        for network in networks
    ]
    return [Latency(ms, ms, ms, 1) for ms in taken]


def stand_in(patch: pytest.MonkeyPatch) -> None:
    for module in (latency, sensitivity, trying):
        patch.setattr(module, "time_sessions", by_macs)
        patch.setattr(module, "export_session", lambda network, size, on_progress: network)
    patch.setattr(latency, "time_networks", by_macs)
    patch.setattr(searching, "SAMPLES", 1)
    one_size = ExportOptions(height=24, width=24)  # is quicker
    patch.setattr(searching, "export", functools.partial(export, options=one_size))


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    stand_in(monkeypatch)


ROWS = [{"kind": kind, "latency": latency} for kind, latency in (("nothing", 1.0), ("ffn", 0.7), ("heads", 1.01))]
"""Sensitivity, as far as the search looks at it."""


@pytest.fixture
def without_ends(monkeypatch):
    """Only the steps: no sensitivity, no export and no proof."""
    monkeypatch.setattr(sensitivity, "measure_sensitivity", lambda *args, **options: ROWS)
    monkeypatch.setattr(searching, "export", lambda weights, model, on_progress: model.touch())
    monkeypatch.setattr(searching, "_bundle", lambda candidates, *args: candidates.work / "step1")


@pytest.fixture
def by_size(monkeypatch, without_ends):
    """Stands for the eye: a network loses 10 dB times the part of its MACs that is gone. Nothing is trained."""
    whole = counts.macs(CONFIG)
    monkeypatch.setattr(
        trying,
        "evaluate_model",
        lambda network, pairs, protocol, on_progress: types.SimpleNamespace(
            psnr=20 + 10 * counts.macs(network.config) / whole
        ),
    )
    monkeypatch.setattr(
        searching,
        "prune",
        lambda weights, data, output, options, *args, **more: pruning.prune(
            weights,
            data,
            output,
            dataclasses.replace(options, importance="magnitude", rounds=1),
            *args,
            **more,
        ),
    )
    monkeypatch.setattr(
        searching,
        "distill",
        lambda options, on_progress: shutil.copyfile(options.student, options.output / "last.safetensors"),
    )


def fill_folder(folder: Path) -> None:
    """A checkpoint and two pairs of noise."""
    rng = np.random.default_rng(0)
    for kind in ("input", "target"):
        (folder / "data" / kind).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).save(folder / "data" / kind / f"{i}.png")
    checkpoint.save(folder / "w.safetensors", fill(DRSformer(CONFIG)), {"trained_on": ["rain"]})


def go(folder: Path, output: str = "bundle", **options):
    given = {"max_drop_db": 9.0, "macs": 0.7, "size": (64, 64), "round_to": 1, "recipe": RECIPE, "hardware": CPU}
    wanted = SearchOptions(**{**given, **options})
    return search(folder / "w.safetensors", [folder / "data"], folder / output, wanted)


@pytest.fixture
def folder(tmp_path) -> Path:
    fill_folder(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> Path:
    """A folder with what a search left."""
    folder = tmp_path_factory.mktemp("search")
    fill_folder(folder)
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        go(folder)
    return folder


def forbid(monkeypatch, *names: str) -> None:
    for name in names:
        monkeypatch.setattr(name, None)  # cannot be called


def test_bundle_holds_the_proven_network_and_what_was_tried(searched):
    work = searched / "bundle.work"
    table = json.loads((work / "search.json").read_text())
    kinds = [row["kind"] for row in table["candidates"]]
    assert kinds == ["whole", "pruned", "pruned", "distilled"]
    macs = [row["macs"] for row in table["candidates"]]
    assert macs == pytest.approx([1, 0.8, 0.7, 0.7], rel=0.02)
    assert all(row["latency"] < 1 for row in table["candidates"][1:])
    page = (work / "search.html").read_text()
    assert page == (searched / "bundle" / "search.html").read_text()
    assert "3 distilled</a>, taken" in page
    assert str(searched) not in page
    assert (work / "sensitivity" / "sensitivity.png").exists()

    bundle = load(searched / "bundle")
    bundle.verify()
    assert bundle.unlisted() == []
    (known,) = bundle.manifest.canaries  # of the one size that an INT8 model of this search takes
    reports = {"report1.html", "search.json", "search.html"}
    assert {file.name for file in bundle.manifest.files} == {"model.onnx", known.file, *reports}
    report = (searched / "bundle" / "report1.html").read_text()
    assert "bundle.work" not in report  # where it was made, and is not any more
    assert "<dd>model.onnx, ONNX Runtime on " in report
    (drift,) = bundle.manifest.drift
    assert drift.protocol == "rain200"
    assert drift.images == 2
    best = checkpoint.load(work / "step2" / "last.safetensors")
    assert bundle.manifest.model.weights_sha256 == best.sha256
    steps = [step["command"] for step in best.provenance["steps"]]
    assert steps == ["compress.prune", "compress.distill"]  # the second step, too, is pruned from the whole network
    assert best.provenance["trained_on"] == [f"{searched.name}/data"]
    assert Derainer(searched / "bundle")(np.zeros((20, 22, 3), np.uint8)).shape == (20, 22, 3)


def test_same_command_finds_everything_done(searched, monkeypatch):
    forbid(monkeypatch, "compress.search.prune", "compress.search.distill", "compress.candidates.evaluate_model")
    forbid(
        monkeypatch, "compress.sensitivity.measure_sensitivity", "compress.search.export", "compress.search.validate"
    )
    found = go(searched)
    summary = json.loads(json.dumps(found.summary()))
    assert summary["macs"] == pytest.approx(0.7, rel=0.02)
    assert Path(summary["weights"]).exists()
    with pytest.raises(InputError, match=r"bundle\.work holds steps with macs=0\.7, not 0\.6; give the same options"):
        go(searched, macs=0.6)


@pytest.mark.parametrize(
    ("module", "name", "killed_in", "times"), [(searching, "distill", 1, 2), (trying, "evaluate_model", 2, 5)]
)
def test_killed_search_goes_on_to_the_same_network(
    searched, folder, without_ends, monkeypatch, module, name, killed_in, times
):
    does, calls = getattr(module, name), []

    def killed(*args, **options):
        calls.append(name)
        result = does(*args, **options)
        if len(calls) == killed_in:
            raise KeyboardInterrupt
        return result

    rows = json.loads((searched / "bundle.work" / "sensitivity" / "sensitivity.json").read_text())
    monkeypatch.setattr(sensitivity, "measure_sensitivity", lambda *args, **options: rows)  # its milliseconds vary
    monkeypatch.setattr(module, name, killed)
    with pytest.raises(KeyboardInterrupt):
        go(folder)
    assert not (folder / "bundle").exists()
    go(folder)
    assert len(calls) == times
    networks = [
        checkpoint.load(each / "bundle.work" / "step2" / "last.safetensors").model.state_dict()
        for each in (searched, folder)
    ]
    assert all(torch.equal(tensor, networks[1][key]) for key, tensor in networks[0].items())


def test_search_killed_while_it_proves_leaves_no_bundle_and_goes_on(searched, tmp_path, monkeypatch):
    folder = tmp_path / searched.name
    shutil.copytree(searched, folder)
    shutil.rmtree(folder / "bundle")
    validate = searching.validate
    monkeypatch.setattr(searching, "validate", lambda *args: validate(*args) and sys.exit(9))
    with pytest.raises(SystemExit):
        go(folder)
    assert not (folder / "bundle").exists()
    monkeypatch.setattr(searching, "validate", validate)
    go(folder)
    load(folder / "bundle").verify()


def test_bundle_that_fails_its_proof_is_not_left(searched, tmp_path, monkeypatch):
    folder = tmp_path / searched.name
    shutil.copytree(searched, folder)
    shutil.rmtree(folder / "bundle")
    failed = Validation({}, [Comparison("0", 30.0, 9, {}, 40.0, 30.5)], {}, None, {}, max_drop_db=9.0)
    monkeypatch.setattr(searching, "validate", lambda *args: failed)
    expected = (
        r"model\.onnx, in its bundle on .*data: Outside the budget: mean drop in PSNR 9\.5000 dB, at most 9 dB "
        r"\(0\.5 dB too much\); see .*report1\.html"
    )
    with pytest.raises(GateError, match=expected):
        go(folder)
    assert not (folder / "bundle").exists()


@pytest.mark.parametrize(("drop", "speed", "taken"), [(0.5, 0.5, True), (5.0, 0.5, False), (0.5, 1.5, False)])
def test_int8_is_taken_where_it_is_faster_and_within_the_budget(folder, by_size, monkeypatch, drop, speed, taken):
    def quantize(model, data, output, options, on_progress):
        assert (data, options.limit, options.protocol) == (folder / "data", 20, "rain200")
        assert options.max_drop_db == pytest.approx(1, abs=0.1)
        output.touch()

    monkeypatch.setattr(searching, "quantize", quantize)
    monkeypatch.setattr(
        trying, "validate", lambda *args, **options: types.SimpleNamespace(totals={"candidate_psnr": 28 - drop})
    )
    monkeypatch.setattr(trying, "OrtSession", lambda path, provider: speed if "int8" in path.name else 1.0)
    found = go(folder, quantize=True, macs=0.8, max_drop_db=3.0)
    assert found.best.kind == ("int8" if taken else "distilled")
    rows = json.loads((folder / "bundle.work" / "search.json").read_text())["candidates"]
    assert rows[-1]["latency"] == pytest.approx(speed * rows[-2]["latency"])
    assert rows[-1]["drop_db"] == pytest.approx(2 + drop)
    assert [row["kind"] for row in rows] == ["whole", "pruned", "distilled", "int8"]


def test_without_a_target_the_budget_is_used_up(folder, by_size, monkeypatch):
    found = go(folder, macs=None, max_drop_db=4.5)
    assert found.best.macs == pytest.approx(0.64, rel=0.02)  # the next would be 0.51, which loses 4.9 dB
    work = folder / "bundle.work"
    table = json.loads((work / "search.json").read_text())["candidates"]
    tried = [(row["file"], row["kind"]) for row in table[1:]]
    assert tried == [
        ("step1/pruned.safetensors", "pruned"),
        ("step2/pruned.safetensors", "pruned"),
        ("step3/pruned.safetensors", "pruned"),
        ("step3/last.safetensors", "distilled"),  # outside the budget, and still so
        ("step2/last.safetensors", "distilled"),  # what is taken
    ]
    assert [row["drop_db"] for row in table[1:]] == pytest.approx([2, 3.6, 4.88, 4.88, 3.6], abs=0.15)
    assert found.weights == work / "step2" / "last.safetensors"


def test_distillation_that_loses_is_not_taken(folder, by_size, monkeypatch):
    psnr = iter([30.0, 28.0, 27.0])  # of the whole network, pruned and distilled
    monkeypatch.setattr(trying, "evaluate_model", lambda *args, **options: types.SimpleNamespace(psnr=next(psnr)))
    found = go(folder, macs=0.8)
    assert (found.best.kind, found.best.drop_db) == ("pruned", 2)
    assert found.weights == folder / "bundle.work" / "step1" / "pruned.safetensors"


def test_network_that_leaves_the_budget_is_distilled_and_pruned_on(folder, by_size, monkeypatch):
    """Distilling gives back half of what was lost here."""
    shown = trying.evaluate_model
    distilled = set()

    def distill(options, on_progress):
        shutil.copyfile(options.student, options.output / "last.safetensors")
        distilled.add(counts.params(checkpoint.load(options.output / "last.safetensors").model.config))

    def evaluate(network, *args, **options):
        psnr = shown(network, *args, **options).psnr
        return types.SimpleNamespace(psnr=30 - (30 - psnr) / 2 if counts.params(network.config) in distilled else psnr)

    monkeypatch.setattr(searching, "distill", distill)
    monkeypatch.setattr(trying, "evaluate_model", evaluate)
    found = go(folder, macs=None, max_drop_db=2.2)
    table = json.loads((folder / "bundle.work" / "search.json").read_text())["candidates"]
    assert [row["kind"] for row in table] == ["whole", "pruned", "pruned", "distilled", "pruned", "distilled"]
    assert found.best.kind == "distilled"
    assert found.best.macs == pytest.approx(0.64, rel=0.02)
    assert found.weights == folder / "bundle.work" / "step2" / "last.safetensors"
    files = found.weights, folder / "bundle.work" / "step3" / "pruned.safetensors"
    taken, after = ([step["command"] for step in checkpoint.load(file).provenance["steps"]] for file in files)
    assert taken == ["compress.prune"]  # from the whole network; no training took place here
    assert after == ["compress.prune", "compress.prune"]  # from what was distilled


def test_what_follows_a_distilled_network_is_pruned_from_it(folder, by_size, monkeypatch):
    """Distilling makes up for most of what was lost, and what is pruned afterwards loses as little."""
    shown, origins, does, taught = trying.evaluate_model, [], searching.prune, []

    def distill(options, on_progress):
        taught.append(options.student)
        shutil.copyfile(options.student, options.output / "last.safetensors")

    def evaluate(network, *args, **options):
        psnr = shown(network, *args, **options).psnr
        return types.SimpleNamespace(psnr=30 - (30 - psnr) / (8 if taught else 1))

    monkeypatch.setattr(searching, "distill", distill)
    monkeypatch.setattr(trying, "evaluate_model", evaluate)
    monkeypatch.setattr(searching, "prune", lambda *args: (origins.append(args[0]), does(*args))[1])
    found = go(folder, macs=0.42, max_drop_db=2.2)
    work = folder / "bundle.work"
    assert origins == [folder / "w.safetensors"] * 2 + [work / "step2" / "last.safetensors"] * 2
    assert len(taught) == 2  # the second step, and at the end what is taken
    assert found.best.macs == pytest.approx(0.42, rel=0.02)


@pytest.mark.parametrize("macs", [None, 0.7])
def test_budget_that_cannot_be_met_is_told(folder, by_size, macs):
    wanted = "0.700 of the MACs" if macs else "a smaller network"
    expected = (
        rf"`max_drop_db` 1: expected {wanted} within it, found whole, 1\.000 of the MACs.*: "
        r"the next step, distilled, 0\.\d+ of .*, (1\.9|2\.0)\d+ dB lost, is outside it, "
        rf"(0\.9\d*|1(\.0\d*)?) dB over the budget of 1 dB on {folder.name}/data; with another "
        r"`output` try more `iterations`"
    )
    with pytest.raises(GateError, match=expected) as error:
        go(folder, max_drop_db=1.0, macs=macs)
    assert "\n" not in str(error.value)
    assert not (folder / "bundle").exists()
    assert "Nothing is taken so far" in (folder / "bundle.work" / "search.html").read_text()


def test_the_weights_that_are_named_are_searched(folder, by_size):
    other = DRSformerConfig.regular(12, (0, 0, 1, 1), (1, 1, 2, 2), 4.0)
    states = {
        name: fill(DRSformer(config)).state_dict() for name, config in (("params", other), ("params_ema", CONFIG))
    }
    torch.save(states, folder / "w.safetensors")  # the content decides, not the suffix
    found = go(folder, weights_key="params_ema")
    assert found.candidates[0].params == counts.params(CONFIG)
    assert found.best.params < counts.params(CONFIG)
    assert checkpoint.load(found.weights).model.config.encoder[0].width <= 8
    shutil.rmtree(folder / "bundle")
    with pytest.raises(InputError, match="holds steps with weights_key=params_ema, not None"):
        go(folder)


def test_names_that_look_like_markup(folder, by_size):
    assert go(folder, "[/a]").best.kind == "distilled"


def test_target_near_the_whole_network_is_reached_by_a_smaller_one(folder, by_size):
    assert go(folder, macs=0.99).best.kind == "distilled"


def test_folder_named_twice_to_prune_by_is_validated_on_once(folder, by_size):
    data = [folder / "data"] * 2
    wanted = SearchOptions(9.0, macs=0.8, size=(64, 64), round_to=1, recipe=RECIPE, hardware=CPU)
    assert list(search(folder / "w.safetensors", data, folder / "bundle", wanted).best.psnr) == [f"{folder.name}/data"]


def test_folders_that_cannot_be_told_apart_are_refused(folder):
    shutil.copytree(folder / "data", folder / "more" / folder.name / "data")
    with pytest.raises(InputError, match="`validate`: expected folders whose last two names differ"):
        go(folder, validate=[folder / "data", folder / "more" / folder.name / "data"])


def test_everything_is_measured_by_the_protocol(folder, without_ends, monkeypatch):
    seen = {}

    def spy(module, name, protocol_of):
        does = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *args, **options: (
                seen.setdefault(name, set()).add(protocol_of(args, options)),
                does(*args, **options),
            )[1],
        )

    monkeypatch.setattr(
        trying, "validate", lambda *args, **options: types.SimpleNamespace(totals={"candidate_psnr": 20.0})
    )
    monkeypatch.setattr(trying, "OrtSession", lambda path, provider: 1.0)
    monkeypatch.setattr(searching, "quantize", lambda *args: None)
    spy(trying, "evaluate_model", lambda args, options: args[2])
    spy(searching, "distill", lambda args, options: args[0].data_options.protocol)
    for name in ("prune", "quantize"):
        spy(searching, name, lambda args, options: args[3].protocol)
    spy(sensitivity, "measure_sensitivity", lambda args, options: options["protocol"])
    spy(trying, "validate", lambda args, options: args[3].protocol)
    go(folder, macs=0.8, protocol="did", quantize=True)
    assert seen == {name: {"did"} for name in seen}
    assert len(seen) == 6
    for file in ("search.json", "options.json"):  # what is told, and what a resumption compares
        assert json.loads((folder / "bundle.work" / file).read_text())["protocol"] == "did"


def test_target_that_nothing_reaches_is_told(folder, by_size):
    with pytest.raises(GateError, match=r"0\.010 of the MACs within it, found .*: nothing more can be removed"):
        go(folder, macs=0.01, step=0.02, round_to=8)


def test_step_that_cannot_be_that_exact_goes_farther(folder, by_size, monkeypatch):
    asked, does = [], searching.prune

    def prune(*args):
        asked.append(args[-1])
        if args[-1] is None:
            raise GateError("expected 0.800, reached 0.830")
        return does(*args)

    monkeypatch.setattr(searching, "prune", prune)
    found = go(folder, macs=0.8)
    assert asked == [None, 1.0]
    assert found.best.macs <= 0.8 * 1.02


def test_step_that_went_farther_is_gone_on_from(folder, by_size, monkeypatch):
    """The first one goes to half of the MACs, though only a fifth was to go."""
    does, fractions = searching.prune, []

    def prune(weights, data, output, how, *args):
        fractions.append(how.macs)
        return does(weights, data, output, dataclasses.replace(how, macs=min(how.macs, 0.5)), *args)

    monkeypatch.setattr(searching, "prune", prune)
    found = go(folder, macs=0.4)
    assert fractions == pytest.approx([0.8, 0.4], rel=0.02)
    assert found.best.macs == pytest.approx(0.4, rel=0.02)


def test_step_that_changes_nothing_goes_farther(folder, by_size):
    """Within the tolerance of a target near the whole network, that is the whole network."""
    found = go(folder, macs=0.99, round_to=32)
    assert found.best.macs < 0.99


def test_step_that_failed_is_not_tried_again(folder, by_size, monkeypatch):
    tried, does = [], searching.prune
    monkeypatch.setattr(searching, "prune", lambda *args: (tried.append(args[2]), does(*args))[1])
    for _ in range(2):
        with pytest.raises(GateError, match="nothing more can be removed"):
            go(folder, macs=0.01, step=0.02, round_to=8)
    assert len(tried) == 2  # the second goes as far as it can


@pytest.mark.parametrize(("goal", "step", "slower"), [(0.6, 0.8, 1.04), (0.9, 0.97, 1.09)])
def test_clock_that_goes_otherwise_asks_for_less_each_time(folder, by_size, monkeypatch, goal, step, slower):
    """Candidates are timed anew, on a machine with other work on it by this much more."""
    asked, does = [], searching.prune

    def timed(networks, size, on_progress=silent):
        return [dataclasses.replace(t, ms=t.ms * (slower if i else 1)) for i, t in enumerate(by_macs(networks, size))]

    monkeypatch.setattr(trying, "time_sessions", timed)
    monkeypatch.setattr(searching, "prune", lambda *args: (asked.append(args[3].latency), does(*args))[1])
    found = go(folder, macs=None, latency=goal, step=step)
    assert found.best.latency <= goal * 1.02
    assert all(later < before for before, later in zip([1, *asked], asked, strict=False))


def test_step_that_the_clock_finds_no_faster_is_passed_over(folder, by_size, monkeypatch):
    calls = []

    def timed(networks, size, on_progress=silent):
        calls.append(len(networks))
        slower = 1.5 if len(calls) == 2 else 1  # the first step
        return [dataclasses.replace(t, ms=t.ms * (slower if i else 1)) for i, t in enumerate(by_macs(networks, size))]

    monkeypatch.setattr(trying, "time_sessions", timed)
    found = go(folder, macs=None, latency=0.6)
    assert [each.latency > 1 for each in found.candidates[:3]] == [False, True, False]
    assert found.best.latency <= 0.6 * 1.02


def test_int8_that_cannot_be_is_not_tried_again(folder, by_size, monkeypatch):
    tried = []

    def quantize(*args):
        tried.append(args)
        raise GateError("too much is lost")

    def bundle(candidates, *args):
        (candidates.work / "bundle").mkdir()
        return candidates.work / "bundle"

    monkeypatch.setattr(searching, "quantize", quantize)
    monkeypatch.setattr(searching, "_bundle", bundle)
    for _ in range(2):
        assert go(folder, macs=0.8, quantize=True).best.kind == "distilled"
        (folder / "bundle").rmdir()
    assert len(tried) == 1


def test_latency_is_reached_by_leaving_alone_what_takes_no_time(folder, by_size, monkeypatch):
    """The clock here does not see attention."""
    scopes = []
    does = searching.prune
    monkeypatch.setattr(searching, "prune", lambda *args: (scopes.append(args[3].scope), does(*args))[1])
    found = go(folder, macs=None, latency=0.75)
    assert found.best.latency == pytest.approx(0.75, rel=0.02)
    assert scopes == [("ffn", "experts", "width", "depth")] * 2


def test_network_that_never_gets_faster_is_told(folder, by_size, monkeypatch):
    kinds = ("ffn", "heads", "width", "depth")
    rows = [{"kind": "nothing", "latency": 1.0}, *({"kind": kind, "latency": 1.2} for kind in kinds)]
    monkeypatch.setattr(sensitivity, "measure_sensitivity", lambda *args, **options: rows)
    with pytest.raises(GateError, match="gets no faster, whatever is removed"):
        go(folder)


def test_kind_that_was_not_timed_is_not_called_slow(folder, by_size, monkeypatch):
    """One that does not reach the fraction by itself has no row."""
    scopes, does = [], searching.prune
    rows = [{"kind": "nothing", "latency": 1.0}, *({"kind": kind, "latency": 1.2} for kind in ("ffn", "depth"))]
    monkeypatch.setattr(sensitivity, "measure_sensitivity", lambda *args, **options: rows)
    monkeypatch.setattr(searching, "prune", lambda *args: (scopes.append(args[3].scope), does(*args))[1])
    go(folder, macs=0.8)
    assert scopes == [("heads", "experts", "width")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop_db": -1.0}, "`max_drop_db`: expected at least 0"),
        ({"max_drop_db": float("inf")}, "`max_drop_db`: expected a finite number, found inf"),
        ({"macs": 1.5}, "`macs`: expected a fraction"),
        ({"latency": 0.5}, "expected `macs` or `latency`, found both"),
        ({"step": 1.0}, "`step`: expected a fraction"),
        ({"size": (20, 20)}, "`size`"),
        ({"limit": 0}, "`limit`: expected at least 1"),
        ({"round_to": 0}, "`round_to`: expected at least 1"),
        ({"hardware": Hardware(devices="2")}, "`devices`: a search distils on 1, found 2"),
        ({"hardware": Hardware(devices="1", num_nodes=2)}, "`num_nodes`: a search distils on 1, found 2"),
        ({"hardware": Hardware(devices="1", accelerator="mps")}, "cannot train on this hardware"),
        ({"compute_capability": ("8,9",)}, "`compute_capability`: TensorRT for RTX .* builds for .*, found 8,9"),
        ({"validate": [Path("nowhere")]}, "nowhere"),
        ({"output": "data"}, "`output`: expected a folder that is not there yet"),
        ({"output": "w.safetensors"}, "`output`: expected a folder that is not there yet"),
        ({"output": "/"}, "`output`: expected the name of a folder, found /"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_done(folder, options, message):
    with pytest.raises(InputError, match=message) as error:
        go(folder, **options)
    assert "\n" not in str(error.value)
    assert not list(folder.glob("*.work"))
