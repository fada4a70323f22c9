"""Model repositories for Triton, without the server: `make serve-test` starts one."""

from __future__ import annotations

import importlib
import json
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

import runtime
from export.triton import ServeOptions, export
from runtime import Derainer, DeviceError, InvalidImage, InvalidModel, OutOfMemory
from runtime.bundle import Bundle, describe_file, load, save
from runtime.manifest import Engine, Profile
from runtime.session import describe_onnx
from tests.support import refusals
from tests.support.bundles import FILES, add_canary, flip, make_keys, write_bundle
from tests.support.onnx_files import write_network

triton: Any = model_config_pb2
"""Whose names are made when it is imported."""


@pytest.fixture
def bundle(tmp_path) -> Path:
    """Of a network for tensors, with two engines of TensorRT for RTX."""
    return write_bundle(tmp_path / "bundle")


def with_plans(folder: Path, profiles: dict[str, int], **flags: bool) -> Path:
    """Add an engine of TensorRT for each compute capability, with so many profiles."""
    opened = load(folder).manifest
    for capability, count in profiles.items():
        path = folder / f"model.tensorrt.sm{capability.replace('.', '')}.engine"
        path.write_bytes(capability.encode())
        engine = Engine(
            path.name,
            "tensorrt",
            "10.14.1",
            (capability,),
            tuple(Profile((64, 64), (256 + 8 * i, 256), (1088, 1920)) for i in range(count)),
            flags,
            opened.files[0].sha256,
        )
        opened = opened.with_file(describe_file(path, "engine"), engine)
    save(opened, folder)
    return folder


def only_model(folder: Path, **options) -> Path:
    folder.mkdir()
    save(describe_onnx(write_network(folder / "model.onnx", **options)), folder)
    return folder


def config(folder: Path) -> Any:
    """As Triton reads it, which knows no other fields."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), triton.ModelConfig())


def warm_ups(found: Any) -> list[list[int]]:
    return [list(sample.inputs["input"].dims) for sample in found.model_warmup]


def refusal(bundle: Path, output: Path, **options: Any) -> str:
    return refusals.refusal(export, bundle, output, ServeOptions(**options))


def test_unknown_fields_are_found():
    with pytest.raises(text_format.ParseError):
        text_format.Parse('nothing: "a"', triton.ModelConfig())


# What each backend is given.


def test_python(bundle, tmp_path):
    options = ServeOptions(instances=3, threads=2, provider="cpu", tile=(64, 96), queue=5)
    made = export(bundle, tmp_path / "r", options)
    assert made.folder == tmp_path / "r" / "drsformer"
    bundled = [f"1/bundle/{name}" for name in sorted((*FILES, "manifest.json"))]
    assert made.files == (*bundled, "1/model.py", "config.pbtxt")
    assert load(made.folder / "1" / "bundle") == replace(load(bundle), folder=made.folder / "1" / "bundle")
    found = config(made.folder)
    assert (found.name, found.backend, found.max_batch_size) == ("drsformer", "python", 0)
    for tensor, name in ((found.input[0], "input"), (found.output[0], "output")):
        assert (tensor.name, tensor.data_type, list(tensor.dims)) == (name, triton.TYPE_UINT8, [-1, -1, 3])
    assert [(group.count, group.kind) for group in found.instance_group] == [(3, triton.ModelInstanceGroup.KIND_MODEL)]
    parameters = {key: value.string_value for key, value in found.parameters.items()}
    assert parameters == {"provider": "cpu", "threads": "2", "tile": "64x96"}
    assert found.dynamic_batching.default_queue_policy.max_queue_size == 5
    assert warm_ups(found) == [[64, 64, 3]]
    assert found.model_warmup[0].inputs["input"].data_type == triton.TYPE_UINT8


def test_python_with_engines_runs_once_what_they_are_fastest_at(bundle, tmp_path):
    assert warm_ups(config(export(bundle, tmp_path / "r").folder)) == [[256, 256, 3]]


def test_onnxruntime(bundle, tmp_path):
    made = export(bundle, tmp_path, ServeOptions("o", "onnxruntime", threads=2))
    assert made.files == ("1/model.onnx", "config.pbtxt")
    assert (made.folder / "1" / "model.onnx").read_bytes() == (bundle / "model.onnx").read_bytes()
    found = config(made.folder)
    assert (found.backend, found.max_batch_size, found.default_model_filename) == ("onnxruntime", 0, "model.onnx")
    assert (found.input[0].data_type, list(found.input[0].dims)) == (triton.TYPE_FP32, [1, 3, -1, -1])
    assert list(found.output[0].dims) == [1, 3, -1, -1]
    assert found.parameters["intra_op_thread_count"].string_value == "2"
    assert found.instance_group[0].kind == triton.ModelInstanceGroup.KIND_AUTO
    assert warm_ups(found) == [[1, 3, 64, 64]]


def test_graph_of_float16(tmp_path):
    folder = only_model(tmp_path / "bundle", kind=onnx.TensorProto.FLOAT16)
    found = config(export(folder, tmp_path, ServeOptions(backend="onnxruntime")).folder)
    for tensor in (found.input[0], found.output[0]):
        assert (tensor.data_type, list(tensor.dims)) == (triton.TYPE_FP16, [1, 3, -1, -1])
    assert warm_ups(found) == [[1, 3, 64, 64]]


@pytest.mark.parametrize(
    ("backend", "dims", "warm_up"),
    [
        ("onnxruntime", [1, -1, -1, 3], [1, 64, 64, 3]),
        ("python", [-1, -1, 3], [64, 64, 3]),
    ],
)
def test_graph_of_images(tmp_path, backend, dims, warm_up):
    folder = only_model(tmp_path / "bundle", kind=onnx.TensorProto.UINT8)
    found = config(export(folder, tmp_path, ServeOptions(backend=backend)).folder)
    assert (found.input[0].data_type, list(found.input[0].dims)) == (triton.TYPE_UINT8, dims)
    assert warm_ups(found) == [warm_up]
    assert [output.name for output in found.output] == ["output"]
    folder = only_model(tmp_path / "finite", kind=onnx.TensorProto.UINT8, finite=True)
    found = config(export(folder, tmp_path, ServeOptions("told", backend=backend)).folder)
    outputs = [(output.name, output.data_type, list(output.dims)) for output in found.output]
    finite = [("finite", triton.TYPE_FP32, [1])] if backend == "onnxruntime" else []
    assert outputs == [("output", triton.TYPE_UINT8, dims), *finite]


@pytest.mark.parametrize(
    ("backend", "dims", "warm_up"),
    [
        ("onnxruntime", [1, 3, 16, 24], [1, 3, 16, 24]),
        ("python", [-1, -1, 3], [16, 24, 3]),  # any image that the client's padding makes as large
    ],
)
def test_graph_of_one_size(tmp_path, backend, dims, warm_up):
    folder = only_model(tmp_path / "b", shape=(1, 3, 16, 24))
    found = config(export(folder, tmp_path, ServeOptions(backend=backend)).folder)
    assert list(found.input[0].dims) == list(found.output[0].dims) == dims
    assert warm_ups(found) == [warm_up]


def test_warm_up_is_a_multiple(tmp_path):
    folder = only_model(tmp_path / "b", metadata={"size_multiple": "48"})
    assert warm_ups(config(export(folder, tmp_path, ServeOptions(backend="onnxruntime")).folder)) == [[1, 3, 96, 96]]


def test_tensorrt_plan(bundle, tmp_path):
    options = ServeOptions("p", "tensorrt_plan", instances=2, queue=0)
    made = export(with_plans(bundle, {"8.6": 3, "9.0": 2}), tmp_path, options)
    plans = {"8.6": "model.tensorrt.sm86.engine", "9.0": "model.tensorrt.sm90.engine"}
    assert made.files == (*(f"1/{name}" for name in plans.values()), "config.pbtxt")
    assert "TensorRT 10.14.1, no other version" in made.needs
    found = config(made.folder)
    assert (found.platform, found.max_batch_size) == ("tensorrt_plan", 0)
    assert found.default_model_filename == plans["8.6"]
    assert dict(found.cc_model_filenames) == plans
    assert (found.instance_group[0].count, list(found.instance_group[0].profile)) == (2, ["0", "1"])  # that both have
    assert (found.input[0].data_type, list(found.input[0].dims)) == (triton.TYPE_FP32, [1, 3, -1, -1])
    assert warm_ups(found) == [[1, 3, 256, 256], [1, 3, 264, 256], [1, 3, 272, 256]]
    assert not found.HasField("dynamic_batching")


def test_version_compatible_plan_tells_what_the_server_needs(bundle, tmp_path):
    bundle = with_plans(bundle, {"8.6": 1}, version_compatible=True)
    made = export(bundle, tmp_path, ServeOptions(backend="tensorrt_plan"))
    assert "--backend-config=tensorrt,version-compatible=true" in made.needs


@pytest.mark.parametrize(
    ("backend", "dims", "warm_up"),
    [("python", [-1, -1, 3], [64, 64, 3]), ("onnxruntime", [3, -1, -1], [3, 64, 64])],
)
def test_batches(tmp_path, backend, dims, warm_up):
    folder = only_model(tmp_path / "b", shape=("B", 3, "H", "W"))
    found = config(export(folder, tmp_path, ServeOptions("m", backend, batch=8, queue=0)).folder)
    assert (found.max_batch_size, found.HasField("dynamic_batching")) == (8, True)
    assert list(found.input[0].dims) == list(found.output[0].dims) == dims
    assert [(sample.batch_size, list(sample.inputs["input"].dims)) for sample in found.model_warmup] == [
        (1, warm_up),
        (8, warm_up),
    ]
    alone = config(export(folder, tmp_path, ServeOptions("alone", backend)).folder)
    assert alone.max_batch_size == 0
    assert list(alone.input[0].dims) == (dims if backend == "python" else [-1, 3, -1, -1])
    assert warm_ups(alone) == [warm_up if backend == "python" else [1, 3, 64, 64]]


def test_every_image_of_a_batch_says_whether_it_was_finite(tmp_path):
    folder = only_model(tmp_path / "b", kind=onnx.TensorProto.UINT8, shape=("B", "H", "W", 3), finite=True)
    for batch, dims in ((1, [-1]), (4, [1])):
        output = config(export(folder, tmp_path, ServeOptions(f"m{batch}", "onnxruntime", batch=batch)).folder).output[
            1
        ]
        assert (output.name, list(output.dims), output.HasField("reshape")) == ("finite", dims, batch > 1)


def test_batches_of_a_tensorrt_plan(bundle, tmp_path):
    opened = load(with_plans(bundle, {"8.6": 2})).manifest
    model = replace(opened.model, input=replace(opened.model.input, shape=(-1, 3, -1, -1)))
    several = Profile((64, 64), (128, 128), (256, 256), batch=(1, 8, 8))
    engines = [
        replace(engine, profiles=(engine.profiles[0], several)) if engine.flavor == "tensorrt" else engine
        for engine in opened.engines
    ]
    save(replace(opened, model=model, engines=tuple(engines)), bundle)
    found = config(export(bundle, tmp_path, ServeOptions("p", "tensorrt_plan", batch=8)).folder)
    assert (found.max_batch_size, list(found.instance_group[0].profile)) == (8, ["1"])
    assert [(sample.batch_size, *sample.inputs["input"].dims) for sample in found.model_warmup] == [
        (1, 3, 128, 128),
        (8, 3, 128, 128),
    ]
    message = refusal(bundle, tmp_path, name="q", backend="tensorrt_plan", batch=9)
    assert "256x256, up to 8 at once; build it by python -m export.tensorrt with --batch" in message


def test_batches_of_a_model_of_one_image_are_refused(bundle, tmp_path):
    for backend in ("python", "onnxruntime"):
        message = refusal(bundle, tmp_path / "r", backend=backend, batch=8)
        assert "`batch`: expected a model of any number of images at once, found one of 1" in message


# What is refused, and that nothing is left of it.


def test_engines_that_triton_cannot_load(bundle, tmp_path):
    message = refusal(bundle, tmp_path / "r", backend="tensorrt_plan")
    assert "TensorRT for RTX, which Triton cannot load" in message
    assert "python -m export.tensorrt --flavor tensorrt" in message
    assert "`backend` python" in message
    assert "found none" in refusal(only_model(tmp_path / "b"), tmp_path / "r", backend="tensorrt_plan")
    stripped = with_plans(bundle, {"8.6": 1}, strip_weights=True)
    assert "--strip-weights" in refusal(stripped, tmp_path / "r", backend="tensorrt_plan")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("backend", ["python", "onnxruntime"])
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_nothing_is_copied_of_a_bundle_that_is_not_whole(bundle, tmp_path, backend, name):
    flip(bundle / name, 2, bit=6)
    assert name in refusal(bundle, tmp_path / "r", backend=backend)
    assert not (tmp_path / "r").exists()


def test_signature(tmp_path):
    keys = make_keys(tmp_path)
    bundle = write_bundle(tmp_path / "bundle", key=keys / "private.pem")
    assert "expected a signature" in refusal(bundle, tmp_path / "r", public_key=keys / "others.pem")
    assert not (tmp_path / "r").exists()
    made = export(bundle, tmp_path / "r", ServeOptions(public_key=keys / "public.pem"))
    load(made.folder / "1" / "bundle", keys / "public.pem").verify()


def test_bundle_that_changes_meanwhile(bundle, tmp_path, monkeypatch):
    def verify_then_change(self: Bundle) -> None:
        flip(bundle / "report.html", 2)

    monkeypatch.setattr(Bundle, "verify", verify_then_change)
    assert "report.html" in refusal(bundle, tmp_path / "r")
    assert list((tmp_path / "r").iterdir()) == []


def test_manifest_that_changes_meanwhile(bundle, tmp_path, monkeypatch):
    other = write_bundle(tmp_path / "other", scale=0.25)
    verify = Bundle.verify

    def verify_then_change(self: Bundle) -> None:
        verify(self)
        shutil.copy(other / "manifest.json", bundle)

    monkeypatch.setattr(Bundle, "verify", verify_then_change)
    assert "expected SHA-256" in refusal(bundle, tmp_path / "r")
    assert list((tmp_path / "r").iterdir()) == []


def test_model_that_is_there_stays(bundle, tmp_path):
    made = export(bundle, tmp_path / "r")
    before = (made.folder / "config.pbtxt").stat()
    assert "already there" in refusal(bundle, tmp_path / "r", instances=2)
    assert (made.folder / "config.pbtxt").stat() == before
    export(bundle, tmp_path / "r", ServeOptions("another"))
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["another", "drsformer"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(name="../a"), "`name`"),
        (dict(name=""), "`name`"),
        (dict(name='a"'), "`name`"),
        (dict(name=".a"), "`name`"),
        (dict(instances=0), "`instances`"),
        (dict(threads=-1), "`threads`"),
        (dict(queue=-1), "`queue`"),
        (dict(batch=0), "`batch`"),
        (dict(tile=(8, 8), backend="onnxruntime"), "`tile`"),
        (dict(provider="cpu", backend="onnxruntime"), "`provider`"),
        (dict(threads=1, backend="tensorrt_plan"), "`threads`"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, named):
    assert named in refusal(tmp_path / "none", tmp_path / "r", **options)


def test_command(bundle, tmp_path, monkeypatch, capsys):
    def command(*arguments: object) -> object:
        monkeypatch.setattr(sys, "argv", ["triton", *map(str, arguments)])
        monkeypatch.delitem(sys.modules, "export.triton", raising=False)
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module("export.triton", run_name="__main__", alter_sys=True)
        return stopped.value.code

    assert command("--bundle", bundle, "--output", tmp_path / "r", "--tile", "64x96") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["backend"] == "python"
    assert command("--bundle", tmp_path / "none", "--output", tmp_path / "r", "--name", "b") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert command("--bundle", bundle, "--output", tmp_path / "q", "--tile", "0x8") == 2
    assert capsys.readouterr().err.startswith("error: --tile: expected height and width as HxW")


# What the python backend runs.


class Backend(SimpleNamespace):
    """In place of the module that there is only inside the server, as far as it is used."""

    class TritonModelException(Exception):
        pass

    class TritonError(Exception):
        INTERNAL, INVALID_ARG, UNAVAILABLE = 1, 3, 4

        def __init__(self, message: str, code: int) -> None:
            super().__init__(message)
            self.code = code

    Logger = SimpleNamespace(log_info=print)

    @staticmethod
    def Tensor(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:  # noqa: N802
        return name, array

    @staticmethod
    def InferenceResponse(tensors=(), error=None) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(tensors=dict(tensors), error=error)

    @staticmethod
    def get_input_tensor_by_name(request: dict[str, np.ndarray], name: str) -> SimpleNamespace:
        return SimpleNamespace(as_numpy=lambda: request[name])


def started(folder: Path, monkeypatch):
    """The model of a repository as the server starts it."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Backend)
    monkeypatch.delitem(sys.modules, "runtime.triton", raising=False)
    monkeypatch.setitem(sys.modules, "derainer", runtime)  # by the name that its distribution gives it
    monkeypatch.setitem(sys.modules, "derainer.triton", importlib.import_module("runtime.triton"))
    model = runpy.run_path(str(folder / "1" / "model.py"))["TritonPythonModel"]()
    parameters = {key: {"string_value": value.string_value} for key, value in config(folder).parameters.items()}
    model.initialize(
        {
            "model_config": json.dumps({"parameters": parameters, "max_batch_size": config(folder).max_batch_size}),
            "model_repository": str(folder),
            "model_version": "1",
            "model_instance_name": "drsformer_0_0",
        }
    )
    return model


def test_each_request_has_its_own_answer(bundle, tmp_path, monkeypatch):
    model = started(export(bundle, tmp_path / "r", ServeOptions(threads=1, provider="cpu")).folder, monkeypatch)
    image = np.random.default_rng(0).integers(0, 256, (13, 7, 3), dtype=np.uint8)
    requests = [image, image[:0], image[::-1].copy(), image.astype(np.float32), image[..., 0]]
    answers = model.execute([{"input": array} for array in requests])
    derain = Derainer(bundle, "cpu")
    for i in (0, 2):
        assert answers[i].error is None
        np.testing.assert_array_equal(answers[i].tensors["output"], derain(requests[i]))
    for i in (1, 3, 4):
        assert (answers[i].tensors, answers[i].error.code) == ({}, Backend.TritonError.INVALID_ARG)
        assert "expected an" in str(answers[i].error)


def test_requests_of_equal_size_go_through_the_network_together(tmp_path, monkeypatch):
    """One that fails takes no other with it."""
    folder = only_model(tmp_path / "bundle", shape=("B", 3, "H", "W"), metadata={"size_multiple": "4"})
    model = started(export(folder, tmp_path / "r", ServeOptions(provider="cpu", batch=4)).folder, monkeypatch)
    session, runs = model._derain.session, []
    run = session.run
    monkeypatch.setattr(session, "run", lambda batch: runs.append(len(batch)) or run(batch))
    images = np.random.default_rng(0).integers(0, 256, (6, 13, 7, 3), dtype=np.uint8)
    requests = [images[:1], images[1:3], images[3:]]
    derain = Derainer(folder, "cpu")
    for answer, request in zip(model.execute([{"input": array} for array in requests]), requests, strict=True):
        np.testing.assert_array_equal(answer.tensors["output"], np.stack([derain(image) for image in request]))
    assert runs == [4, 2]
    runs.clear()
    good, odd, other = model.execute([{"input": array} for array in (images[:1], images[:1, :0], images[1:2])])
    assert odd.error.code == Backend.TritonError.INVALID_ARG
    assert runs == [1, 1]
    for answer, image in ((good, images[0]), (other, images[1])):
        np.testing.assert_array_equal(answer.tensors["output"], derain(image)[None])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidImage("odd"), Backend.TritonError.INVALID_ARG),
        (OutOfMemory("full"), Backend.TritonError.UNAVAILABLE),
        (DeviceError("cudaErrorIllegalAddress"), Backend.TritonError.INTERNAL),
        (InvalidModel("NaN"), Backend.TritonError.INTERNAL),
    ],
)
def test_code_tells_whose_fault_it_is(bundle, tmp_path, monkeypatch, error, code):
    def fail(images):
        raise error

    model = started(export(bundle, tmp_path / "r", ServeOptions(provider="cpu")).folder, monkeypatch)
    model._derain = SimpleNamespace(run_batch=fail)
    (answer,) = model.execute([{"input": np.zeros((1, 1, 3), np.uint8)}])
    assert (str(answer.error), answer.error.code) == (str(error), code)


def test_tiles(bundle, tmp_path, monkeypatch):
    model = started(export(bundle, tmp_path / "r", ServeOptions(provider="cpu", tile=(64, 96))).folder, monkeypatch)
    assert model._derain.plan(500, 500).tile == (64, 96)
    assert "`tile`: expected multiples of 4" in refusal(bundle, tmp_path / "q", tile=(64, 62))


def test_bundle_is_verified_when_it_is_loaded(bundle, tmp_path, monkeypatch):
    folder = export(bundle, tmp_path / "r", ServeOptions(provider="cpu")).folder
    flip(folder / "1" / "bundle" / "model.onnx", 100)
    with pytest.raises(Backend.TritonModelException, match="expected SHA-256"):
        started(folder, monkeypatch)


def test_a_model_that_answers_wrongly_does_not_get_ready(bundle, tmp_path, monkeypatch):
    folder = export(add_canary(bundle, lambda image: 255 - image), tmp_path / "r", ServeOptions(provider="cpu")).folder
    with pytest.raises(Backend.TritonModelException, match=r"model\.onnx is not used, since it answers wrongly here"):
        started(folder, monkeypatch)
