"""Canaries: what answers wrongly restores no image, in whatever way it is wrong."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from export.canaries import add_canaries
from runtime import CanaryError, Derainer, InputError, MismatchError, UnprovenError, canary, open_session
from runtime.bundle import Bundle, describe_file, load, save
from runtime.derain import DerainOptions, derain
from runtime.images import Photo
from runtime.manifest import Drift
from runtime.ort import OrtSession
from runtime.session import describe_onnx
from tests.support.bundles import add_canary, flip, rewrite, write_bundle
from tests.support.onnx_files import UINT8, write_network
from tests.support.refusals import refusal

SIZES = ((16, 24), (64, 96))


def halve(image):
    """What the network of `write_bundle` makes of an image."""
    return np.rint(image * np.float32(0.5)).astype(np.uint8)


@pytest.fixture
def bundle(tmp_path) -> Path:
    folder = write_bundle(tmp_path / "bundle")
    for size in SIZES:
        add_canary(folder, halve, size)
    return folder


class Engine:
    """A stand-in of a bundle's engine that answers as its model does, but for a fault."""

    provider = "tensorrt"
    multiple = 4
    limits = (((4, 4), (2048, 2048)),)

    def __init__(self, opened: Bundle, fault: str = "none") -> None:
        self.path = opened.folder / opened.manifest.engines[0].file
        self.identity = {"device": "Stand-in", "driver": "1", "library": "TensorRT 0"}
        self.fault, self.runs = fault, 0

    def run(self, batch):
        output = batch * np.float32(0.5)
        self.runs += 1
        match self.fault:
            case "one channel":
                output[:, 1] += 0.02
            case "one size" if batch.shape[2:] == SIZES[1]:
                output = output[:, :, ::-1]
            case "second run" if self.runs > len(SIZES):  # as a CUDA graph that replays something else
                output = np.zeros_like(output)
            case "NaN":
                output[0, 0, 3, 5] = np.nan
            case "infinity":
                output[0, 2, 1, 1] = np.inf
        return output


FAULTS = ["one channel", "one size", "second run", "NaN", "infinity"]


@pytest.fixture
def engine(monkeypatch):
    """Put a stand-in in place of the engines; returns those that were opened."""

    def engine(fault: str) -> list[Engine]:
        opened: list[Engine] = []

        def open_engine(bundle: Bundle, device: int | None) -> Engine:
            opened.append(Engine(bundle, fault))
            return opened[-1]

        monkeypatch.setattr("runtime.session.open_engine", open_engine)
        return opened

    return engine


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_engine_restores_nothing(bundle, engine, tmp_path, fault):
    engine(fault)
    for make in (open_session, Derainer):
        with pytest.raises(CanaryError) as error:
            make(bundle, "tensorrt")
        message = str(error.value)
        assert "\n" not in message
        for part in ("model.rtx-sm86.engine", "expected at least 50.0 dB", "found", "Stand-in, TensorRT 0", "build it"):
            assert part in message
    Photo(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(CanaryError):
        derain(tmp_path / "a.png", tmp_path / "b.png", DerainOptions(model=bundle, provider="tensorrt"))
    assert not (tmp_path / "b.png").exists()
    assert not list(tmp_path.glob("*.canary"))


def test_nan_that_a_graph_of_images_clamps_is_found(tmp_path):
    """Its canaries' answers may look right all the same."""
    hides = OrtSession(write_network(tmp_path / "hides.onnx", np.nan, UINT8), "cpu")
    folder = tmp_path / "bundle"
    folder.mkdir()
    model = write_network(folder / "model.onnx", np.nan, UINT8, finite=True)
    save(describe_onnx(model), folder)
    add_canary(folder, hides.run_image)
    with pytest.raises(CanaryError, match="found NaN or infinity in it"):
        open_session(folder, "cpu")


@pytest.mark.parametrize("fault", FAULTS)
def test_auto_goes_on_with_the_model_and_says_why(bundle, engine, caplog, fault):
    engine(fault)
    session = open_session(bundle, "auto")
    assert isinstance(session, OrtSession)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "its model on cpu is tried in place of its engine" in record.getMessage()
    assert "answers wrongly here" in record.getMessage()


def test_a_right_engine_is_asked_once_on_a_machine(bundle, engine):
    opened = engine("none")
    for _ in range(3):
        open_session(bundle, "auto")
    assert [session.runs for session in opened] == [canary.ROUNDS * len(SIZES), 0, 0]
    open_session(bundle, "auto", canary="always")
    open_session(bundle, "auto", canary="never")
    assert [session.runs for session in opened[3:]] == [canary.ROUNDS * len(SIZES), 0]


@pytest.mark.parametrize("what", ["device", "driver", "library"])
def test_it_is_asked_again_where_something_has_changed(bundle, monkeypatch, what):
    sessions = []

    def open_engine(opened, device):
        sessions.append(Engine(opened))
        sessions[-1].identity[what] += str(len(sessions) // 2)
        return sessions[-1]

    monkeypatch.setattr("runtime.session.open_engine", open_engine)
    for _ in range(4):
        open_session(bundle, "auto")
    asked = [bool(session.runs) for session in sessions]
    assert asked == [True, True, False, True]
    open_session(bundle, "auto")
    assert not sessions[-1].runs  # both are remembered


def test_who_does_not_tell_where_it_runs_is_asked_every_time(bundle, monkeypatch):
    sessions = []

    def open_engine(opened, device):
        sessions.append(Engine(opened))
        sessions[-1].identity["driver"] = ""
        return sessions[-1]

    monkeypatch.setattr("runtime.session.open_engine", open_engine)
    for _ in range(2):
        open_session(bundle, "auto")
    assert all(session.runs for session in sessions)


@pytest.mark.parametrize("how", ["writable", "broken", "another host", "no list"])
def test_a_record_that_cannot_be_trusted_does_not_count(bundle, engine, how):
    opened = engine("none")
    open_session(bundle, "auto")
    (record,) = bundle.parent.glob("bundle.*.canary")
    assert record.stat().st_mode & 0o777 == 0o600
    match how:
        case "writable":
            record.chmod(0o666)
        case "broken":
            record.write_text("[{")
        case "no list":
            record.write_text("{}")
        case _:
            record.write_text(json.dumps([each | {"host": "elsewhere"} for each in json.loads(record.read_text())]))
    open_session(bundle, "auto")
    assert opened[-1].runs


def test_a_bundle_that_moves_takes_no_record_along(bundle, engine, tmp_path):
    opened = engine("none")
    open_session(bundle, "auto")
    open_session(shutil.copytree(bundle, tmp_path / "b"), "auto")
    assert opened[-1].runs


def test_where_no_record_can_be_kept_it_is_asked_again(bundle, engine, monkeypatch):
    opened = engine("none")
    monkeypatch.setattr("runtime.canary.writing", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "no")))
    for _ in range(2):
        open_session(bundle, "auto")
    assert all(session.runs for session in opened)


def test_an_exchanged_model_with_an_honest_manifest(bundle):
    """Whoever exchanges the model and writes a fitting manifest has the hashes right, and the answers wrong."""
    write_network(bundle / "model.onnx", 0.55, metadata={"size_multiple": "4", "config": '{"a": 1}', "topk": "rank"})
    digest = describe_file(bundle / "model.onnx", "onnx")

    def honest(manifest):
        manifest["files"][0].update(sha256=digest.sha256, size=digest.size)
        for entry in manifest["engines"]:
            entry["onnx_sha256"] = digest.sha256

    rewrite(bundle, honest)
    load(bundle).verify()
    with pytest.raises(CanaryError, match=r"model\.onnx is not used.* expected at least 50\.0 dB .*found 30\.8 dB"):
        open_session(bundle, "cpu")


def test_canaries_that_the_engine_does_not_take_are_left_out(bundle):
    opened = load(bundle)
    session = Engine(opened)
    session.limits = (((32, 32), (2048, 2048)),)
    assert [answer.canary.size for answer in canary.ask(session, opened)] == [SIZES[1]]


def test_a_broken_canary_is_a_broken_bundle(bundle):
    flip(bundle / "canary.16x24.rgb", 7)
    with pytest.raises(MismatchError, match=r"canary\.16x24\.rgb: expected SHA-256"):
        open_session(bundle, "cpu")


def test_unknown_time(bundle):
    with pytest.raises(InputError, match="`canary`: expected one of first, always, never, found 'often'"):
        open_session(bundle, "cpu", canary="often")


# Proofs belong to the file that was judged.


def test_a_proof_of_the_model_is_none_of_the_engine(bundle, engine, caplog):
    manifest = load(bundle).manifest
    proofs = {name: manifest.proof(name) for name in manifest.networks}
    assert proofs == {"model.onnx": "proven", "model.rtx-sm86.engine": "canary", "model.rtx-sm89.engine": "canary"}
    engine("none")
    assert open_session(bundle, "auto").provider == "tensorrt"
    with pytest.raises(UnprovenError, match=r"model\.rtx-sm86\.engine: expected a proof .* --candidate .* --record"):
        Derainer(bundle, "tensorrt", require_proof=True)
    assert isinstance(Derainer(bundle, require_proof=True).session, OrtSession)
    assert "in place of its engine: " in caplog.records[-1].getMessage()


def test_without_any_proof(bundle, tmp_path):
    rewrite(bundle, lambda manifest: manifest.update(drift=[]))
    assert "expected a proof" in refusal(Derainer, bundle, "cpu", require_proof=True)
    assert "expected a bundle" in refusal(Derainer, bundle / "model.onnx", require_proof=True)
    assert "found a session" in refusal(Derainer, open_session(bundle, "cpu"), require_proof=True)


def test_a_proof_of_the_engine(bundle, engine):
    engine("none")
    manifest = load(bundle).manifest
    drift = Drift(manifest.engines[0].file, "tensorrt", 64 * "b", "val", "rain200", 3, 90.0, 1)
    rewrite(bundle, lambda m: m["drift"].append(vars(drift)))
    assert Derainer(bundle, "tensorrt", require_proof=True).session.provider == "tensorrt"


# Making them.


def test_known_answers_are_the_models(tmp_path):
    write_network(tmp_path / "model.onnx", 0.5)
    bundle = save(add_canaries(describe_onnx(tmp_path / "model.onnx"), tmp_path), tmp_path)
    assert [(c.size, c.floor_db) for c in bundle.manifest.canaries] == [((64, 64), 50.0), ((128, 192), 50.0)]
    for entry in bundle.manifest.canaries:
        image, answer = np.frombuffer(bundle.read(entry.file), np.uint8).reshape(2, *entry.size, 3)
        assert image.std() > 30
        np.testing.assert_array_equal(answer, halve(image))
    assert add_canaries(bundle.manifest, tmp_path) == bundle.manifest  # once is enough


def test_sizes_of_a_model_of_one_size_and_of_an_engine_of_large_ones(tmp_path):
    write_network(tmp_path / "model.onnx", 0.5, shape=(1, 3, 24, 40))
    assert [c.size for c in add_canaries(describe_onnx(tmp_path / "model.onnx"), tmp_path).canaries] == [(24, 40)]
    folder = write_bundle(tmp_path / "bundle")
    manifest = load(folder).manifest
    assert [c.size for c in add_canaries(manifest, folder).canaries] == [(64, 64), (128, 192)]

    def large(content):
        for entry in content["engines"]:
            entry["profiles"][0].update(min=[256, 512], opt=[256, 512])

    folder = write_bundle(tmp_path / "large")
    rewrite(folder, large)
    sizes = [c.size for c in add_canaries(load(folder).manifest, folder).canaries]
    assert sizes == [(64, 64), (128, 192), (256, 512)]
