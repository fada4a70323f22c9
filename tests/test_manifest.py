"""No file of a bundle is used before it is known to be the one that the manifest means."""

from __future__ import annotations

import builtins
import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from runtime import Derainer, DeviceError, InputError, ort
from runtime.bundle import Bundle, describe_file, load, save
from runtime.derain import DerainOptions, derain
from runtime.errors import MismatchError
from runtime.images import Photo, read_rgb
from runtime.manifest import Manifest, Profile, Tensor, dump, parse
from runtime.ort import OrtSession
from runtime.session import describe_onnx, open_session
from tests.support.bundles import ENGINES, FILES, flip, make_keys, rewrite, write_bundle
from tests.support.onnx_files import write_network
from tests.support.refusals import refusal


def open_candidate(*arguments):
    """As `export.validate` opens it; skips what is left of a test where PyTorch is not installed."""
    pytest.importorskip("torch")
    from export import runners

    return runners.open_candidate(*arguments)


@pytest.fixture(scope="session")
def keys(tmp_path_factory) -> Path:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("original") / "bundle")


@pytest.fixture
def bundle(original, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "bundle"))


# What a whole bundle is.


def test_comes_back_as_it_was_saved(bundle):
    opened = load(bundle)
    found = opened.manifest
    assert [file.name for file in found.files] == list(FILES)
    assert found.model.input == Tensor("input", "float32", (1, 3, -1, -1))
    assert (found.model.size_multiple, found.model.topk, found.model.config) == (4, "rank", {"a": 1})
    assert found.model.precision is found.model.provenance is found.model.weights_sha256 is None
    assert found.engines[1].profiles == (Profile((64, 64), (256, 256), (1088, 1920)),)
    assert found.drift[0].psnr_between is None
    opened.verify()
    before = (bundle / "manifest.json").read_bytes()
    assert save(found, bundle) == opened
    assert (bundle / "manifest.json").read_bytes() == before
    assert opened.unlisted() == []


def test_json_is_what_other_readers_are_told(original):
    """Names and types here are an interface: a change is a new schema."""
    found = json.loads((original / "manifest.json").read_text())
    assert list(found) == ["schema", "created_by", "model", "files", "engines", "drift", "canaries"]
    assert found["schema"] == 1
    assert found["files"][0].keys() == {"name", "sha256", "size", "role"}
    assert found["model"]["output"] == {"name": "output", "dtype": "float32", "shape": [1, 3, -1, -1]}
    assert list(found["model"]) == [
        "file",
        "io",
        "input",
        "output",
        "size_multiple",
        "precision",
        "topk",
        "config",
        "weights_sha256",
        "provenance",
    ]
    assert found["engines"][0] == {
        "file": ENGINES[0],
        "flavor": "rtx",
        "version": "1.7.1.116",
        "compute_capabilities": ["8.6"],
        "profiles": [{"min": [64, 64], "opt": [256, 256], "max": [1088, 1920]}],
        "flags": {"tf32": False},
        "onnx_sha256": found["files"][0]["sha256"],
        "build_seconds": None,
    }
    assert list(found["drift"][0]) == [
        "file",
        "provider",
        "reference_sha256",
        "data",
        "protocol",
        "images",
        "psnr_between",
        "max_difference",
        "reference_psnr",
        "candidate_psnr",
        "drop_db",
        "reference_ssim",
        "candidate_ssim",
        "input_psnr",
        "input_ssim",
    ]


def test_a_profile_of_several_images_says_so(original):
    """One of a single image is written as it was before there were others."""
    found = load(original).manifest
    profile = Profile((64, 64), (256, 256), (512, 512), batch=(1, 4, 8))
    changed = replace(found, engines=(replace(found.engines[0], profiles=(profile,)), found.engines[1]))
    content = json.loads(dump(changed))
    assert content["engines"][0]["profiles"][0]["batch"] == [1, 4, 8]
    assert content["engines"][1]["profiles"][0].keys() == {"min", "opt", "max"}
    assert parse(dump(changed)) == changed


def test_the_number_of_images_is_the_first_length(tmp_path):
    for name, shape, batch in (("any", ("B", 3, "H", "W"), -1), ("four", (4, 3, 16, 16), 4)):
        model = describe_onnx(write_network(tmp_path / f"{name}.onnx", shape=shape)).model
        assert (model.input.shape[0], model.graph_io.batch) == (batch, batch)


def test_graph_of_images_is_described(tmp_path):
    path = write_network(tmp_path / "camera.onnx", kind=onnx.TensorProto.UINT8)
    model = describe_onnx(path).model
    assert (model.file, model.io, model.size_multiple) == ("camera.onnx", "image", 1)
    assert model.input == Tensor("input", "uint8", (1, -1, -1, 3))


def test_broken_metadata_is_refused(tmp_path):
    path = write_network(tmp_path / "m.onnx", metadata={"config": "{"})
    assert "expected JSON as config" in refusal(describe_onnx, path)


def test_derains_as_the_bare_model(bundle, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    expected = Derainer(bundle / "model.onnx", provider="cpu")(image)
    np.testing.assert_array_equal(Derainer(bundle, provider="cpu")(image), expected)
    np.testing.assert_array_equal(Derainer(str(bundle), provider="cpu")(image), expected)
    Photo(image).save(tmp_path / "in.png")
    derain(tmp_path / "in.png", tmp_path / "out.png", DerainOptions(bundle, "cpu"))
    np.testing.assert_array_equal(read_rgb(tmp_path / "out.png"), expected)
    np.testing.assert_array_equal(Derainer(open_candidate(bundle, "cpu"))(image), expected)


def test_engine_is_replaced(bundle):
    opened = load(bundle)
    (bundle / ENGINES[1]).write_bytes(b"rebuilt")
    drift = replace(opened.manifest.drift[0], file=ENGINES[1])
    changed = replace(opened.manifest, drift=(*opened.manifest.drift, drift))
    engine = replace(opened.manifest.engines[1], version="1.8")
    changed = changed.with_file(describe_file(bundle / ENGINES[1], "engine"), engine)
    save(changed, bundle)
    found = load(bundle).manifest
    assert load(bundle).read(ENGINES[1]) == b"rebuilt"
    assert sorted(file.name for file in found.files) == sorted(FILES)
    assert [engine.version for engine in found.engines] == ["1.7.1.116", "1.8"]
    assert found.drift == opened.manifest.drift  # what was measured on the former engine is gone


def test_profile_takes_what_lies_between():
    profile = Profile((64, 64), (256, 256), (1088, 1920))
    assert profile.takes(64, 1920)
    assert not profile.takes(1920, 64)
    assert not profile.takes(56, 64)
    assert not profile.takes(64, 64, images=2)


def test_engine_takes_as_many_images_as_its_profiles(original):
    several = Profile((64, 64), (256, 256), (512, 512), batch=(1, 4, 8))
    engine = replace(load(original).manifest.engines[0], profiles=(Profile((64, 64), (64, 64), (1088, 1920)), several))
    assert [engine.profile_for(512, 512, images) for images in (1, 2, 8, 9)] == [0, 1, 1, None]
    assert [engine.max_batch(*size) for size in ((512, 512), (1088, 64), (8, 8))] == [8, 1, 0]
    assert "min <= opt <= max" in refusal(Profile, (64, 64), (32, 256), (1088, 1920))
    assert "min <= opt <= max" in refusal(Profile, (0, 64), (32, 256), (1088, 1920))


# Damage.


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_seen(bundle, name):
    size = (bundle / name).stat().st_size
    for byte, bit in ((0, 0), (size // 2, 3), (size - 1, 7)):
        flip(bundle / name, byte, bit)
        for use in (load(bundle).read, load(bundle).path):
            assert f"{name}: expected SHA-256" in refusal(use, name)
        assert name in refusal(load(bundle).verify)
        flip(bundle / name, byte, bit)
    load(bundle).verify()


@pytest.mark.parametrize("name", FILES)
def test_other_lengths_are_seen(bundle, name):
    content = (bundle / name).read_bytes()
    for damaged in (content[:-1], content + b"\0", b""):
        (bundle / name).write_bytes(damaged)
        message = refusal(load(bundle).read, name)
        assert f"{name}: expected {len(content)} bytes, found {len(damaged)}" in message
        assert message == refusal(load(bundle).verify)


def test_swapped_files_are_seen(bundle):
    first, second = (bundle / name for name in ENGINES)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert "expected SHA-256" in refusal(load(bundle).read, ENGINES[0])


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_seen(bundle, name):
    (bundle / name).unlink()
    assert f"expected {name} of" in refusal(load(bundle).read, name)
    assert f"expected {name} of" in refusal(load(bundle).verify)
    (bundle / name).mkdir()
    assert f"expected {name} of" in refusal(load(bundle).read, name)


def test_manifest_of_another_bundle_is_seen(bundle, tmp_path):
    other = write_bundle(tmp_path / "other", scale=0.25)
    shutil.copy(other / "manifest.json", bundle / "manifest.json")
    assert "expected SHA-256" in refusal(load(bundle).verify)
    assert "expected SHA-256" in refusal(Derainer, bundle)


def test_no_bundle(bundle, tmp_path):
    for path in (tmp_path / "none", bundle / "model.onnx", tmp_path):
        assert f"found none at {path}" in refusal(load, path)
    assert "found none at" in refusal(Derainer, tmp_path)
    assert "found 'passwd'" in refusal(load(bundle).read, "passwd")


def test_other_files_are_named_and_do_no_harm(bundle):
    (bundle / "runtime.cache").touch()
    assert load(bundle).unlisted() == ["runtime.cache"]
    load(bundle).verify()
    assert "found 'runtime.cache'" in refusal(load(bundle).read, "runtime.cache")


def test_nothing_is_loaded_that_was_not_verified(bundle, monkeypatch):
    """The session gets the bytes that were hashed, and gets none of a damaged file."""
    seen = []

    class Spy(onnxruntime.InferenceSession):
        def __init__(self, model, *arguments, **options):
            seen.append(model)
            super().__init__(model, *arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Spy)
    Derainer(bundle, provider="cpu")
    assert seen == [(bundle / "model.onnx").read_bytes()]
    flip(bundle / "model.onnx", 100)
    for use in (Derainer, lambda path: OrtSession(load(path)), open_candidate):
        refusal(use, bundle)
    assert len(seen) == 1


def test_file_that_changes_meanwhile(bundle, monkeypatch):
    """Between hashing and handing out there is no second look at the file."""
    path, opened = bundle / ENGINES[0], load(bundle)
    content, real = path.read_bytes(), hashlib.sha256

    def sha256(data):
        flip(path, 5)
        return real(data)

    monkeypatch.setattr(hashlib, "sha256", sha256)
    assert opened.read(ENGINES[0]) == content != path.read_bytes()


def test_saves_nothing_that_does_not_hold(bundle):
    before = (bundle / "manifest.json").read_bytes()
    opened = load(bundle)
    made = opened.manifest
    for wrong in (
        replace(made, schema=2),
        replace(made, model=replace(made.model, config=[])),
        replace(made, drift=(replace(made.drift[0], drop_db=float("inf")),)),
    ):
        assert "expected" in refusal(save, wrong, bundle)
    flip(bundle / "report.html", 0)
    refusal(save, opened.manifest, bundle)
    assert (bundle / "manifest.json").read_bytes() == before


# Manifests that are not right.


def test_flipped_bit_of_the_manifest_is_a_refusal_or_another_manifest(original):
    """None goes unnoticed but in white space; none crashes."""

    def outcome(content: bytes) -> Manifest | str:
        try:
            return parse(content)
        except InputError as error:
            return str(error)

    content = (original / "manifest.json").read_bytes()
    whole = parse(content)
    for byte in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[byte] ^= 1 << byte % 7
        found = outcome(bytes(damaged))
        assert found != whole or chr(content[byte]).isspace()
        assert "\n" not in str(found)


def test_a_bundle_from_before_canaries_is_still_read(bundle):
    whole = load(bundle).manifest
    rewrite(bundle, lambda manifest: manifest.pop("canaries"))
    assert load(bundle).manifest == whole


def test_drift_recorded_before_the_input_was_scored_is_still_read(bundle):
    whole = load(bundle).manifest

    def without(manifest):
        del manifest["drift"][0]["input_psnr"], manifest["drift"][0]["input_ssim"]

    rewrite(bundle, without)
    assert load(bundle).manifest == whole
    save(whole, bundle)
    assert "input_psnr" in (bundle / "manifest.json").read_text()


def canary(**fields) -> dict:
    return {"file": "canary.rgb", "height": 32, "width": 31, "floor_db": 50} | fields


def canary_file(size: int = 6138) -> dict:
    return {"name": "canary.rgb", "sha256": 64 * "0", "size": size, "role": "canary"}


def with_canary(manifest: dict, size: int = 6138, **fields) -> None:
    manifest["files"].append(canary_file(size))
    manifest["canaries"].append(canary(**fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema=2), "expected schema 1, found 2"),
        (lambda m: m.update(schema="1"), "expected schema 1, found '1'"),
        (lambda m: m.update(schema=True), "manifest.schema: expected int, found true"),
        (lambda m: m.pop("schema"), "expected schema 1, found None"),
        (lambda m: m.update({"new\nline": 1}), r"found the fields .*'new\\nline'"),
        (lambda m: m.update(extra=1), "'drift'.*, found the fields .*'extra'"),
        (lambda m: m["model"].update(extra=1), "manifest.model: expected an object with the fields"),
        (lambda m: m["files"][0].pop("sha256"), r"manifest.files\[0\]: .*, found the fields .'name', 'size', 'role'."),
        (lambda m: m.update(files={}), "manifest.files: expected tuple.*, found {}"),
        (lambda m: m.update(model=None), "manifest.model: expected an object .*, found null"),
        (lambda m: m["files"][1].update(size="9"), r"manifest.files\[1\].size: expected int, found \"9\""),
        (lambda m: m["files"][1].update(size=9.0), "expected int, found 9.0"),
        (lambda m: m["files"][1].update(role="plan"), "expected Literal.*'engine'.*found \"plan\""),
        (lambda m: m["files"][1].update(sha256="0" * 63), "expected a SHA-256 of 64 digits"),
        (lambda m: m["files"][1].update(sha256="A" * 64), "expected a SHA-256 of 64 digits"),
        (lambda m: m["engines"][0]["profiles"][0].update(min=[64]), r"profiles\[0\].min: expected tuple"),
        (lambda m: m["engines"][0]["profiles"][0].update(min=[300, 64]), "1 <= min <= opt <= max"),
        (lambda m: m["engines"][0].update(profiles=[]), "expected at least one profile"),
        (lambda m: m["engines"][0]["profiles"][0].update(batch=[1, 8]), r"profiles\[0\].batch: expected tuple"),
        (lambda m: m["engines"][0]["profiles"][0].update(batch=[2, 1, 8]), r"ascending order, found \(2, 1, 8\)"),
        (lambda m: m["engines"][0]["profiles"][0].update(batch=[1, 1, 1025]), "a profile of 1 to 1024 images"),
        (lambda m: m["model"]["input"].update(shape=[0, 3, -1, -1]), r"1 to 1024 images, .* the shape \[0, 3,"),
        (lambda m: m["model"]["input"].update(shape=[3, -1, -1]), "and three more lengths, found the shape"),
        (lambda m: m["engines"][0]["profiles"][0].update(min=[66, 64]), "multiples of 4, found 66x64 to 1088x1920"),
        (lambda m: m["engines"][0]["profiles"][0].update(max=[1088, 1921]), "multiples of 4, found 64x64 to 1088x1921"),
        (lambda m: m["engines"][0].update(flavor="tensorflow"), "rtx"),
        (lambda m: m["engines"][0].update(compute_capabilities=["sm86"]), "such as 8.6, found 'sm86'"),
        (lambda m: m["engines"][0].update(onnx_sha256="0" * 64), "built from another model"),
        (lambda m: m["engines"][0].update(build_seconds="long"), 'build_seconds: expected float, found "long"'),
        (lambda m: m["canaries"].append(canary()), "expected one model, the engines and the canaries"),
        (lambda m: m["files"].append(canary_file()), "expected one model, the engines and the canaries"),
        (lambda m: with_canary(m, width=32), "canary.rgb: expected 6144 bytes for two images of 32x32, found 6138"),
        (lambda m: with_canary(m, size=6132, height=1022, width=1), "in multiples of 4, found 1022x1"),
        (lambda m: with_canary(m, height=0), "a canary of at most 16384 pixels a side"),
        (lambda m: with_canary(m, floor_db=101), "a floor of 0 to 100 dB, found 32x31 and 101.0"),
        (lambda m: with_canary(m, floor_db=None), "floor_db: expected float, found null"),
        (lambda m: m["engines"].pop(), "expected one model, the engines and the canaries"),
        (lambda m: m["engines"].append(m["engines"][0]), "expected one model, the engines and the canaries"),
        (lambda m: m["engines"][0].update(file="report.html"), "expected one model, the engines and the canaries"),
        (lambda m: m["engines"][0].update(file="model.onnx"), "expected one model, the engines and the canaries"),
        (lambda m: m["model"].update(file="other.onnx"), "expected one model, the engines and the canaries"),
        (lambda m: m["files"].pop(0), "expected one model, the engines and the canaries"),
        (lambda m: m["files"].append(m["files"][0]), "expected every file once"),
        (lambda m: m["drift"][0].update(file="report.html"), "expected a drift of"),
        (lambda m: m["drift"][0].pop("drop_db"), "expected an object with the fields"),
        (lambda m: m["drift"][0].update(input_psnr="30"), 'input_psnr: expected float, found "30"'),
        (lambda m: m["drift"][0].update(drop_db=True), "drop_db: expected float, found true"),
        (lambda m: m["drift"][0].update(reference_sha256="aa"), "expected a SHA-256 of 64 digits"),
    ],
)
def test_refuses_what_it_does_not_know(bundle, change, message):
    rewrite(bundle, change)
    with pytest.raises(InputError, match=message) as error:
        load(bundle)
    assert str(error.value).startswith(str(bundle / "manifest.json"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"schema": 1, "schema": 1}',
        b'{"schema": NaN}',
        b'{"schema": 1}{"schema": 1}',
    ],
)
def test_refuses_what_is_no_manifest(bundle, content):
    (bundle / "manifest.json").write_bytes(content)
    assert str(bundle / "manifest.json") in refusal(load, bundle)


@pytest.mark.parametrize("infinite", ["1e999", "NaN", "-Infinity"])
def test_refuses_infinite_numbers(original, infinite):
    content = (original / "manifest.json").read_text()
    message = refusal(parse, content.replace("30.25", infinite).encode())
    assert "expected float, found Infinity" in message or infinite in message
    assert "Infinity" in refusal(parse, content.replace('"tf32": false', '"tf32": Infinity').encode())


def test_refuses_a_field_that_is_there_twice(original):
    """The last one counts here and elsewhere maybe the first."""
    content = (original / "manifest.json").read_text()
    twice = content.replace('"topk": "rank"', '"topk": "rank", "topk": "rank"')
    assert "a field twice among ['file'" in refusal(parse, twice.encode())


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../model.onnx",
        "/etc/passwd",
        "a/b.onnx",
        "a\\b.onnx",
        "C:model.onnx",
        "..\\x",
        ".hidden",
        "model.onnx\n",
        "model onnx",
        "mödel.onnx",
        "model.onnx\0",
        "-rf",
        "manifest.json",
        "manifest.json.sig",
    ],
)
def test_refuses_names_that_lead_elsewhere(bundle, name):
    rewrite(bundle, lambda m: (m["files"][0].update(name=name), m["model"].update(file=name)))
    assert "expected a plain file name" in refusal(load, bundle)


def test_refuses_links_that_lead_out(bundle, tmp_path):
    for name in ("model.onnx", "manifest.json"):
        shutil.move(bundle / name, tmp_path / name)
        (bundle / name).symlink_to(tmp_path / name)
        assert "expected a file inside the bundle, found a link to" in refusal(Derainer, bundle)
    outside = tmp_path / "link-to-bundle"
    (bundle / "model.onnx").unlink()
    (bundle / "manifest.json").unlink()
    for name in ("model.onnx", "manifest.json"):
        shutil.move(tmp_path / name, bundle / name)
    outside.symlink_to(bundle)
    Derainer(outside)  # the folder itself may be one


# Which engine of a bundle runs.


class Plan:
    """Stands in for the engine of a bundle on a machine that has what it needs."""

    multiple, provider = 4, "tensorrt"

    def __init__(self, bundle: Bundle, device: int | None) -> None:
        self.path, self.engine, self.bundle = bundle.folder / ENGINES[0], bundle.manifest.engines[0], bundle
        self.plan = bundle.read(ENGINES[0])


def test_engine_runs_where_it_can(bundle, monkeypatch):
    monkeypatch.setattr("runtime.session.open_engine", Plan)
    for provider in ("auto", "tensorrt"):
        assert isinstance(open_session(bundle, provider), Plan)
    assert isinstance(open_session(bundle, "cpu"), OrtSession)
    save(describe_onnx(bundle / "model.onnx"), bundle)  # now without engines
    assert isinstance(open_session(bundle, "auto"), OrtSession)
    assert "expected a bundle with an engine" in refusal(open_session, bundle, "tensorrt")
    assert "expected a bundle with an engine" in refusal(open_session, bundle / "model.onnx", "tensorrt")
    assert "expected one of auto, cpu" in refusal(open_session, bundle, "gpu")


def test_model_runs_where_no_engine_can(bundle, monkeypatch, caplog):
    class Missing(Plan):
        def __init__(self, bundle: Bundle, device: int | None) -> None:
            raise DeviceError("CUDA finds no GPU")

    monkeypatch.setattr("runtime.session.open_engine", Missing)
    assert isinstance(open_session(bundle, "auto"), OrtSession)
    assert refusal(open_session, bundle, "tensorrt") == "CUDA finds no GPU"
    assert not caplog.records
    monkeypatch.setattr(ort, "installed", lambda: ["cpu"])
    assert refusal(open_session, bundle, "auto", device=1) == "CUDA finds no GPU"
    monkeypatch.setattr("runtime.session.has_gpu", lambda: True)
    assert isinstance(open_session(bundle, "auto"), OrtSession)
    assert [record.getMessage() for record in caplog.records] == [
        f"{bundle}: its model on cpu is tried in place of its engine: CUDA finds no GPU"
    ]


def test_damaged_engine_is_no_reason_to_run_something_else(bundle, monkeypatch):
    monkeypatch.setattr("runtime.session.open_engine", Plan)
    flip(bundle / ENGINES[0], 50)
    for provider in ("auto", "tensorrt"):
        with pytest.raises(MismatchError):
            open_session(bundle, provider)


def test_validates_what_runs(bundle, monkeypatch):
    assert isinstance(open_candidate(bundle, "auto").session, OrtSession)
    monkeypatch.setattr("runtime.session.open_engine", Plan)
    for provider in ("auto", "tensorrt"):
        observed = open_candidate(bundle, provider)
        assert isinstance(observed.session, Plan)
        assert observed.path == bundle / ENGINES[0]
        assert observed.description == "rtx 1.7.1.116, weights unknown"
        assert observed.ks == observed.scores == {}
    assert isinstance(open_candidate(bundle, "cpu").session, OrtSession)


# Weights outside of the files that are verified.


def test_weights_in_another_file(tmp_path, monkeypatch):
    folder = tmp_path / "bundle"
    folder.mkdir()
    model = onnx.load(write_network(tmp_path / "m.onnx"))
    for tensor in model.graph.initializer:
        tensor.raw_data = onnx.numpy_helper.to_array(tensor).tobytes()
        tensor.ClearField("float_data")
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (folder / "weights.bin").exists()
    OrtSession(folder / "model.onnx", "cpu")  # a file that is no bundle may
    assert "not an ONNX model that ONNX Runtime can load" in refusal(describe_onnx, folder / "model.onnx")
    plain = describe_onnx(tmp_path / "m.onnx")
    file = describe_file(folder / "model.onnx", "onnx")
    save(replace(plain, files=(file,), model=replace(plain.model, file=file.name)), folder)
    monkeypatch.chdir(folder)  # where ONNX Runtime would look
    for provider in ("auto", "cpu"):
        assert "not an ONNX model that ONNX Runtime can load" in refusal(open_session, folder, provider)


# Signatures.


def test_signed_bundle(tmp_path, keys):
    bundle = write_bundle(tmp_path / "bundle", key=keys / "private.pem")
    load(bundle, keys / "public.pem").verify()
    Derainer(bundle, public_key=keys / "public.pem")
    load(bundle, keys / "private.pem")
    load(bundle)  # who has no key need not look
    check = [
        "openssl",
        "pkeyutl",
        "-verify",
        "-pubin",
        "-inkey",
        keys / "public.pem",
        "-rawin",
        "-in",
        bundle / "manifest.json",
        "-sigfile",
        bundle / "manifest.json.sig",
    ]
    assert subprocess.run(check, capture_output=True).returncode == 0
    for others in ("others.pem", "others-private.pem"):
        assert "expected a signature of manifest.json" in refusal(load, bundle, keys / others)

    for byte in (0, 31, 32, 63):
        flip(bundle / "manifest.json.sig", byte)
        assert "expected a signature of manifest.json" in refusal(load, bundle, keys / "public.pem")
        flip(bundle / "manifest.json.sig", byte)
    signature = (bundle / "manifest.json.sig").read_bytes()
    for damaged in (b"", signature[:-1], signature + b"\0"):
        (bundle / "manifest.json.sig").write_bytes(damaged)
        assert "expected a signature of manifest.json" in refusal(load, bundle, keys / "public.pem")
    (bundle / "manifest.json.sig").write_bytes(signature)

    size = (bundle / "manifest.json").stat().st_size
    for byte in (*range(0, size, 97), size - 1):
        flip(bundle / "manifest.json", byte)
        assert "expected a signature of manifest.json" in refusal(load, bundle, keys / "public.pem")
        flip(bundle / "manifest.json", byte)

    flip(bundle / "model.onnx", 9)  # the signature is not all that is looked at
    assert "expected SHA-256" in refusal(Derainer, bundle, public_key=keys / "public.pem")


def test_unsigned_where_a_signature_is_demanded(bundle, keys, tmp_path):
    assert "expected a bundle signed for" in refusal(load, bundle, keys / "public.pem")
    assert "found no manifest.json.sig" in refusal(Derainer, bundle, public_key=keys / "public.pem")
    images = tmp_path / "in.png"
    Photo(np.zeros((8, 8, 3), np.uint8)).save(images)
    assert "expected a bundle signed for" in refusal(
        derain, images, tmp_path / "out.png", DerainOptions(bundle, public_key=keys / "public.pem")
    )


def test_public_key_for_what_is_no_bundle(bundle, keys):
    """A demand that cannot be met is not dropped in silence."""
    for model in (bundle / "model.onnx", None, OrtSession(bundle / "model.onnx")):
        assert "expected" in refusal(Derainer, model, public_key=keys / "public.pem")


def test_signature_of_another_bundle(bundle, keys, tmp_path):
    other = write_bundle(tmp_path / "other", scale=0.25, key=keys / "private.pem")
    shutil.copy(other / "manifest.json.sig", bundle)
    assert "changed or signed by somebody else" in refusal(load, bundle, keys / "public.pem")


def test_signature_goes_with_the_manifest_that_it_was_for(tmp_path, keys):
    bundle = write_bundle(tmp_path / "bundle", key=keys / "private.pem")
    save(load(bundle).manifest, bundle)
    assert not (bundle / "manifest.json.sig").exists()
    save(load(bundle).manifest, bundle, keys / "private.pem")
    load(bundle, keys / "public.pem")


def test_keys_that_are_none(bundle, keys, tmp_path):
    (bundle / "manifest.json.sig").write_bytes(bytes(64))
    (tmp_path / "text.pem").write_text("key")
    rsa = ["openssl", "genpkey", "-algorithm", "rsa", "-out", tmp_path / "rsa.pem"]
    locked = [
        "openssl",
        "pkey",
        "-in",
        keys / "private.pem",
        "-aes256",
        "-passout",
        "pass:x",
        "-out",
        tmp_path / "locked.pem",
    ]
    public = ["openssl", "pkey", "-in", tmp_path / "rsa.pem", "-pubout", "-out", tmp_path / "rsa-public.pem"]
    for command in (rsa, locked, public):
        subprocess.run(command, check=True, capture_output=True)
    before = (bundle / "manifest.json").read_bytes()
    for key in (tmp_path / "text.pem", tmp_path / "locked.pem", tmp_path / "rsa-public.pem", tmp_path / "rsa.pem"):
        assert f"{key}: expected an Ed25519 public key" in refusal(load, bundle, key)
    for key in (tmp_path / "text.pem", keys / "public.pem", tmp_path / "rsa.pem", tmp_path / "locked.pem"):
        assert f"{key}: expected an Ed25519 private key" in refusal(save, load(bundle).manifest, bundle, key)
    assert "found no file at" in refusal(load, bundle, tmp_path / "none.pem")
    assert (bundle / "manifest.json").read_bytes() == before
    assert (bundle / "manifest.json.sig").read_bytes() == bytes(64)


def test_without_cryptography(bundle, keys, monkeypatch):
    (bundle / "manifest.json.sig").write_bytes(bytes(64))
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == "cryptography":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    for use in (lambda: load(bundle, keys / "public.pem"), lambda: save(load(bundle).manifest, bundle, keys / "x.pem")):
        assert "pip install cryptography" in refusal(use)
    load(bundle).verify()


def test_runtime_imports_no_cryptography():
    code = "import sys, runtime.info, runtime.derain; sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_contradictions_are_refused_on_construction(original):
    found = load(original).manifest
    assert "built from another model" in refusal(
        found.with_file, found.files[1], replace(found.engines[0], onnx_sha256="0" * 64)
    )
    assert "expected one model" in refusal(found.with_file, found.files[1])


def test_the_example_of_the_specification_is_a_manifest():
    text = (Path(__file__).parents[1] / "docs" / "bundle-format.md").read_text()
    examples = [block.partition("```")[0] for block in text.split("```json\n")[1:]]
    assert examples
    for example in examples:
        assert parse(example.encode()).model.file == "model.onnx"
