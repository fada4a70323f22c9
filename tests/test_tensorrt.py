"""Engines, built by the real TensorRT for RTX without a GPU, and what is refused before and while building."""

from __future__ import annotations

import _thread
import ast
import functools
import importlib.metadata
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from drsformer.config import DRSformerConfig
from drsformer.model import DRSformer
from export import tensorrt
from export.folding import DTYPES, fold
from export.graph import to_onnx
from export.options import Precision
from export.tensorrt import BuildOptions, build
from export.topk import with_pattern
from runtime import trt
from runtime.bundle import load
from runtime.errors import DeviceError, InputError
from runtime.manifest import Profile
from runtime.pixels import ANY
from runtime.session import open_engine
from runtime.trt import LIBRARIES
from tests.support import refusals
from tests.support.networks import fill
from tests.support.tensorrt import Cuda, has_driver

pytest.importorskip("tensorrt_rtx_bindings")

VERSION = LIBRARIES["rtx"].load().__version__

SMALL: dict[str, Any] = dict(min=((16, 16),), opt=((32, 32),), max=((64, 96),))


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A network of ours as a file, without the proof of `export.onnx`: of one block and one size, since exporting takes
    time for every block and much more for a size left open."""

    @functools.cache
    def export(precision: Precision) -> Path:
        network = fill(DRSformer(DRSformerConfig.regular(width=4, depths=(0, 0, 0, 1), heads=(1, 1, 1, 2))))
        folded = fold(with_pattern(network.requires_grad_(False), "threshold"), precision)
        path = tmp_path_factory.mktemp("models") / f"{precision}.onnx"
        onnx.save(to_onnx(folded, size=(16, 24), opset=22), path)
        return path

    return export


def save(path: Path, *nodes: onnx.NodeProto, names: tuple[str, str] = ("input", "output")) -> Path:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, "h", "w"]) for name in names]
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:])
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("somewhere", 1)]
    made = helper.make_model(graph, opset_imports=imports, ir_version=10)
    helper.set_model_props(made, {"io": "tensor", "size_multiple": "8", "topk": "threshold"})
    onnx.save(made, path)
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """Any size, and built at once."""
    weights = np.random.default_rng(0).random((3, 3, 3, 3), dtype=np.float32)
    return save(
        tmp_path_factory.mktemp("model") / "model.onnx",
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weights)),
        helper.make_node("Conv", ["input", "w"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["output"]),
    )


@pytest.fixture(scope="session")
def built(model, tmp_path_factory) -> tensorrt.Built:
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    return build(model, folder, BuildOptions(compute_capability=("8.6",), **SMALL))


@pytest.fixture
def bundle(built, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(built.bundle.folder, tmp_path / "bundle"))


def refusal(onnx: Path, output: Path, **options: Any) -> str:
    return refusals.refusal(build, onnx, output, BuildOptions(**options))


# What is built


def test_a_bundle_is_complete_and_verifies(built, model):
    folder = built.bundle.folder
    loaded = load(folder)
    loaded.verify()
    canaries = ["canary.128x192.rgb", "canary.64x64.rgb"]
    files = sorted(path.name for path in folder.iterdir())
    assert files == [*canaries, "manifest.json", "model.onnx", "model.rtx.sm86.engine"]
    assert sorted(canary.file for canary in loaded.manifest.canaries) == canaries
    assert loaded.read("model.onnx") == model.read_bytes()
    (engine,) = loaded.manifest.engines
    assert (engine.flavor, engine.version, engine.compute_capabilities) == ("rtx", VERSION, ("8.6",))
    assert engine.profiles == (Profile((16, 16), (32, 32), (64, 96)),)
    assert engine.flags == {}
    assert loaded.manifest.model.input.shape == (1, 3, -1, -1)
    assert loaded.manifest.model.size_multiple == 8
    assert loaded.manifest.model.topk == "threshold"


def test_the_summary_is_json(built):
    summary = json.loads(json.dumps(built.summary()))
    assert summary["bytes"] == built.bundle.folder.joinpath(summary["engine"]).stat().st_size
    assert summary["layers"] >= 2
    assert summary["build_seconds"] > 0
    assert summary["peak_memory"] > 1e8


def test_one_engine_serves_several_kinds_of_gpu_and_joins_the_others(bundle, model):
    both = build(model, bundle, BuildOptions(compute_capability=("12.0", "8.9", "8.9"), **SMALL))
    assert both.engine.file == "model.rtx.sm89-sm120.engine"
    assert both.engine.compute_capabilities == ("8.9", "12.0")
    assert [e.file for e in both.bundle.manifest.engines] == ["model.rtx.sm86.engine", both.engine.file]
    both.bundle.verify()


def test_the_same_engine_again_replaces_the_former_with_the_same_bytes(bundle, built):
    # From the model inside the bundle, as the runtime's message proposes.
    again = build(bundle / "model.onnx", bundle, BuildOptions(compute_capability=("8.6",), **SMALL))
    assert [e.file for e in again.bundle.manifest.engines] == [built.engine.file]
    assert again.bundle.read(built.engine.file) == built.bundle.read(built.engine.file)


def test_a_model_of_images_of_any_size(tmp_path):
    camera = tmp_path / "camera.onnx"
    onnx.save(to_onnx(nn.Conv2d(3, 3, 3, padding=1), io="image"), camera)
    made = build(camera, tmp_path / "bundle", BuildOptions(min=((1, 1),), opt=((30, 31),), max=((33, 65),)))
    assert made.engine.profiles == (Profile((1, 1), (30, 31), (33, 65)),)
    assert made.engine.compute_capabilities == ("8.6", "8.9", "12.0")
    assert made.bundle.manifest.model.size_multiple == 1
    assert made.bundle.manifest.model.input.dtype == "uint8"
    outputs = onnx.load(made.bundle.folder / "model.onnx").graph.output
    assert [value.name for value in outputs] == [made.bundle.manifest.model.output.name, "finite"]


def test_a_model_of_float16(tmp_path):
    half = tmp_path / "half.onnx"
    onnx.save(to_onnx(nn.Conv2d(3, 3, 3, padding=1), io="tensor16"), half)
    made = build(half, tmp_path / "bundle", BuildOptions(min=((8, 8),), opt=((16, 24),), max=((32, 64),)))
    model = made.bundle.manifest.model
    assert (model.io, model.input.dtype, model.output.dtype) == ("tensor16", "float16", "float16")
    assert model.input.shape == (1, 3, -1, -1)


@pytest.mark.parametrize("precision", DTYPES)
def test_a_model_of_one_size_and_any_precision(exported, precision, tmp_path):
    made = build(exported(precision), tmp_path / "bundle")
    assert made.engine.profiles == (Profile((16, 24), (16, 24), (16, 24)),)
    assert made.bundle.manifest.model.input.dtype == "float32"


def test_signed_bundles_stay_signed(bundle, model, tmp_path):
    key, public = key_pair(tmp_path, "ours")
    other, _ = key_pair(tmp_path, "theirs")
    build(model, bundle, BuildOptions(compute_capability=("8.6",), sign=key, **SMALL))
    load(bundle, public).verify()
    assert "is a signed bundle" in refusal(model, bundle, **SMALL)
    assert "found another" in refusal(model, bundle, sign=other, **SMALL)
    added = build(model, bundle, BuildOptions(compute_capability=("8.9",), sign=key, **SMALL))
    assert len(load(bundle, public).manifest.engines) == len(added.bundle.manifest.engines) == 2


def test_other_folders_are_left_alone(model, tmp_path):
    (tmp_path / "input").mkdir()
    assert "found input in" in refusal(model, tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["input"]


def test_key_is_looked_at_before_the_work(model, tmp_path):
    assert "found no file at" in refusal(model, tmp_path / "bundle", sign=tmp_path / "missing.pem", **SMALL)
    assert not (tmp_path / "bundle").exists()


def key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.public.pem"
    private.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    return private, public


# Profiles


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [((64, 64), (720, 1280), (1088, 1920))]),
        ({"max": ((256, 512),)}, [((64, 64), (256, 512), (256, 512))]),
        ({"max": ((32, 4096),)}, [((32, 64), (32, 1280), (32, 4096))]),
        ({"opt": ((8, 2048),)}, [((8, 64), (8, 2048), (1088, 2048))]),
        ({"min": ((1200, 64),)}, [((1200, 64), (1200, 1280), (1200, 1920))]),
        (
            {"max": ((512, 64), (64, 512)), "min": ((8, 8),)},
            [((8, 8), (512, 64), (512, 64)), ((8, 8), (64, 512), (64, 512))],
        ),
    ],
)
def test_profiles(given, expected, built):
    found = tensorrt._profiles(built.bundle.manifest.model, BuildOptions(**given))
    assert [(p.min, p.opt, p.max) for p in found] == expected


@pytest.mark.parametrize(
    ("batch", "sides", "given", "expected"),
    [
        (-1, -1, {}, [(1088, (1, 1, 1))]),
        (-1, -1, {"batch": (8,)}, [(1088, (1, 8, 8))]),
        (-1, -1, {"batch": (1, 8), "max": ((1088, 1920), (512, 512))}, [(1088, (1, 1, 1)), (512, (1, 8, 8))]),
        (-1, 64, {"batch": (1, 4)}, [(64, (1, 1, 1)), (64, (1, 4, 4))]),
        (6, -1, {}, [(1088, (6, 6, 6))]),
        (6, 64, {}, [(64, (6, 6, 6))]),
    ],
)
def test_profiles_of_several_images(batch, sides, given, expected, built):
    model = built.bundle.manifest.model
    model = replace(model, input=replace(model.input, shape=(batch, 3, sides, sides)))
    found = tensorrt._profiles(model, BuildOptions(**given))
    assert [(p.max[0], p.batch) for p in found] == expected


@pytest.mark.parametrize("batch", [ANY, 4])
def test_a_model_of_several_images(tmp_path, batch):
    path = tmp_path / "model.onnx"
    onnx.save(to_onnx(nn.Conv2d(3, 3, 3, padding=1), batch=batch), path)
    options = BuildOptions(compute_capability=("8.6",), batch=(4,) if batch == ANY else (), **SMALL)
    made = load(build(path, tmp_path / "bundle", options).bundle.folder).manifest
    (profile,) = made.engines[0].profiles
    assert (made.model.graph_io.batch, profile.batch) == (batch, (1 if batch == ANY else 4, 4, 4))
    assert str(profile) == "16x16 to 64x96, up to 4 at once"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"batch": (2,)}, "`batch`: the model takes 1 images at once, neither more nor less: leave it out, or export"),
        ({"max": ((100, 96),)}, "`max`: expected multiples of 8, to which images are padded, found 100x96"),
        ({"min": ((128, 64),), "max": ((64, 128),)}, "expected `min` <= `opt` <= `max` in height and in width, found"),
        ({"opt": ((8, 8),) * 2, "max": ((8, 8),) * 3}, "`opt`: expected one, or 3 as for the other options"),
    ],
)
def test_profiles_that_cannot_be(given, line, model, tmp_path):
    assert line in refusal(model, tmp_path / "bundle", **given)
    assert not (tmp_path / "bundle").exists()


# What is refused


def test_unsupported_nodes_are_named_before_anything_is_built(tmp_path, monkeypatch):
    nodes = [
        helper.make_node("Relu", ["input"], ["a"], name="first"),
        helper.make_node("Derain", ["a"], ["b"], name="second", domain="somewhere"),
        helper.make_node("MelWeightMatrix", ["b"] * 5, ["output"], name="third"),
    ]
    monkeypatch.setattr(tensorrt.Compiler, "run", None)
    line = refusal(save(tmp_path / "odd.onnx", *nodes), tmp_path / "bundle")
    assert f"TensorRT for RTX {VERSION} does not support all nodes: Derain second (" in line
    assert "Plugin not found" in line
    assert "MelWeightMatrix third (" in line
    assert "first" not in line
    assert not (tmp_path / "bundle").exists()


def test_a_model_of_one_size_has_no_profiles(exported, tmp_path):
    assert "takes only images of 16x24" in refusal(exported("fp32"), tmp_path, max=((64, 64),))


def test_files_that_are_no_model(tmp_path):
    assert "found no file at" in refusal(tmp_path / "missing.onnx", tmp_path)
    (tmp_path / "text.onnx").write_text("not a model")
    assert "found another at" in refusal(tmp_path / "text.onnx", tmp_path)
    other = save(tmp_path / "other.onnx", helper.make_node("Relu", ["x"], ["y"]), names=("x", "y"))
    assert "other.onnx: another kind of network" in refusal(other, tmp_path)


def test_a_bundle_of_another_model_is_left_alone(bundle, exported):
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    assert "is a bundle of another model" in refusal(exported("fp32"), bundle)
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before


def test_a_damaged_engine_in_the_bundle_is_not_vouched_for(bundle, model):
    engine = bundle / "model.rtx.sm86.engine"
    engine.write_bytes(engine.read_bytes()[:-1])
    assert "expected" in refusal(model, bundle, compute_capability=("8.9",), **SMALL)


def test_kinds_of_gpu_that_the_library_does_not_know(model, tmp_path):
    line = refusal(model, tmp_path, compute_capability=("8.6", "9.0"))
    assert "builds for 7.5, 8.0, 8.6, 8.9, 12.0, 12.1, found 9.0; for other GPUs use `flavor` tensorrt" in line


@pytest.mark.parametrize("option", ["version_compatible", "hardware_compatible", "timing_cache"])
def test_options_of_the_other_library(option, model, tmp_path):
    line = refusal(model, tmp_path, **{option: tmp_path / "file" if option == "timing_cache" else True})
    assert f"`{option}` is not for TensorRT for RTX, which has `compute_capability`, `strip_weights`" in line
    line = refusal(model, tmp_path, flavor="tensorrt", compute_capability=("8.6",))
    assert "`compute_capability` is not for TensorRT, which has `hardware_compatible`" in line


def test_libraries_that_are_not_installed(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    assert "TensorRT is not installed" in (line := refusal(model, tmp_path, flavor="tensorrt"))
    assert "pip install tensorrt, which" in line
    assert "TensorRT for RTX is not installed" in (line := refusal(model, tmp_path))
    assert "pip install tensorrt-rtx-cu13-libs" in line


def no_gpu() -> str:
    raise DeviceError("no GPU")


def test_what_needs_a_gpu_says_so(model, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt, "gpu", no_gpu)
    assert refusal(model, tmp_path, strip_weights=True) == "no GPU"
    monkeypatch.setitem(sys.modules, "tensorrt", LIBRARIES["rtx"].load())
    assert refusal(model, tmp_path, flavor="tensorrt") == "no GPU"


def test_a_build_that_fails_tells_the_librarys_reason(model, tmp_path, monkeypatch):
    """Without a GPU, the library cannot take the weights out."""
    monkeypatch.setattr(tensorrt, "gpu", lambda: "8.6")
    line = refusal(model, tmp_path / "bundle", strip_weights=True, **SMALL)
    assert f"TensorRT for RTX {VERSION} cannot build the model: " in line
    assert "Error Code 1" in line
    assert not (tmp_path / "bundle").exists()


def test_a_build_that_is_interrupted_at_the_end_leaves_the_bundle_as_it_was(bundle, model, tmp_path, monkeypatch):
    """Here while it computes known answers, which it needs for a smallest size that the bundle has not met."""
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    larger = BuildOptions(compute_capability=("8.6",), min=((256, 256),), opt=((256, 256),), max=((256, 256),))
    with monkeypatch.context() as patch:
        patch.setattr("export.canaries.scene", lambda *size: (_ for _ in ()).throw(KeyboardInterrupt))
        for folder in (bundle, tmp_path / "new"):
            with pytest.raises(KeyboardInterrupt):
                build(model, folder, larger)
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    load(bundle).verify()
    (tmp_path / "new" / f"{tensorrt.STAGING}killed").mkdir()
    assert build(model, tmp_path / "new", larger).bundle.unlisted() == []


def test_an_interrupted_build_stops_and_leaves_nothing(model, tmp_path, monkeypatch):
    start = tensorrt.new_monitor

    def interrupting(trt, on_progress):
        threading.Timer(0.05, _thread.interrupt_main).start()
        return start(trt, on_progress)

    monkeypatch.setattr(tensorrt, "new_monitor", interrupting)
    with pytest.raises(KeyboardInterrupt):
        build(model, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--opt", "7x7"], "--opt: expected multiples of 8, to which images are padded, found 7x7"),
        (["--min", "64"], "--min: expected height and width as HxW such as 720x1280, found '64'"),
        (["--max", "8x8", "0x64"], "--max: expected height and width as HxW such as 720x1280, found '0x64'"),
        (
            ["--timing-cache", "t"],
            "--timing-cache is not for TensorRT for RTX, which has --compute-capability, --strip",
        ),
    ],
)
def test_the_command_refuses(model, tmp_path, monkeypatch, capsys, arguments, line):
    assert command(monkeypatch, "--onnx", model, "--output", tmp_path / "bundle", *arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {line}")
    assert not (tmp_path / "bundle").exists()


def test_the_command_builds(model, tmp_path, monkeypatch, capsys):
    sizes = ["--min", "16x16", "--opt", "32x32", "64x16", "--max", "64x96"]
    arguments = ["--onnx", model, "--output", tmp_path / "bundle", "--compute-capability", "8.6", *sizes]
    assert command(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    assert "GPUs" in printed
    assert json.loads(printed.splitlines()[-1])["compute_capabilities"] == ["8.6"]
    (engine,) = load(tmp_path / "bundle").manifest.engines
    assert [profile.opt for profile in engine.profiles] == [(32, 32), (64, 16)]


def command(monkeypatch, *arguments: object) -> object:
    monkeypatch.setattr(sys, "argv", ["tensorrt", *map(str, arguments)])
    monkeypatch.delitem(sys.modules, "export.tensorrt")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("export.tensorrt", run_name="__main__", alter_sys=True)
    return caught.value.code


def test_a_build_tells_how_far_it_is(model, tmp_path):
    told = []
    build(
        model, tmp_path / "bundle", BuildOptions(compute_capability=("8.6",), **SMALL), lambda *step: told.append(step)
    )
    stages = dict.fromkeys(stage for stage, *_ in told)
    assert list(stages) == ["Parsing", "Building engine", "Known answers"]
    for stage in stages:
        *_, (done, total, *_) = (step for name, *step in told if name == stage)
        assert done == total > 0
    assert any("Optimizing graph 1 of" in remark for *_, remark in told if isinstance(remark, str))


# Running, as far as it goes without a driver


def test_the_runtime_says_that_there_is_no_gpu(built):
    if has_driver():
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceError, match=r"CUDA finds no NVIDIA GPU with a driver \(cudaErrorInsufficientDriver\)"):
        open_engine(built.bundle)


def test_the_library_itself_refuses_without_a_driver(built, monkeypatch):
    """It is asked all the same where CUDA pretends to have a GPU; everything up to the engine is real."""
    if has_driver():
        pytest.skip("there is a GPU")
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", Cuda((8, 6)))
    with pytest.raises(DeviceError, match=r"TensorRT for RTX refuses .*model\.rtx\.sm86\.engine: .*35"):
        open_engine(built.bundle)


# TensorRT proper, which is not installed: the same calls, on stand-ins


@pytest.fixture
def stand_in(monkeypatch):
    """TensorRT for RTX under the name of TensorRT: the Python API is the same."""
    monkeypatch.setitem(sys.modules, "tensorrt", LIBRARIES["rtx"].load())
    monkeypatch.setattr(tensorrt, "gpu", lambda: "8.6")


def test_tensorrt_builds_for_the_gpu_in_the_machine(stand_in, model, tmp_path):
    made = build(model, tmp_path, BuildOptions(flavor="tensorrt", hardware_compatible=True, **SMALL))
    assert (made.engine.file, made.engine.compute_capabilities) == ("model.tensorrt.sm86.engine", ("8.6",))
    assert made.engine.flags == {"hardware_compatible": True}


def test_version_compatible_asks_for_the_lean_runtime(stand_in, model, tmp_path):
    assert "lean" in refusal(model, tmp_path, flavor="tensorrt", version_compatible=True, **SMALL)


class Timings:
    """A builder, its config and its timing cache, as far as a compiler touches them."""

    content = b""
    progress_monitor = None

    def create_timing_cache(self, content: bytes) -> Timings:
        self.content = content
        return self

    def set_timing_cache(self, timings: Timings, ignore_mismatch: bool) -> bool:
        return timings.content != b"of another GPU" and not ignore_mismatch

    def get_timing_cache(self) -> Timings:
        return self

    def serialize(self) -> bytes:
        return self.content + b"+"

    def build_serialized_network(self, network: object, config: object) -> bytes:
        return b"plan"


def test_timings_are_read_and_written(tmp_path):
    compiler = tensorrt.Compiler.__new__(tensorrt.Compiler)
    compiler._trt, compiler._library, compiler.network = LIBRARIES["rtx"].load(), LIBRARIES["tensorrt"], None
    compiler._builder = compiler._config = Timings()
    path = tmp_path / "timings"
    assert compiler.run(path) == compiler.run(path) == b"plan"
    assert path.read_bytes() == b"++"
    path.write_bytes(b"of another GPU")
    with pytest.raises(InputError, match=r"expected one of TensorRT .* on this GPU, found another"):
        compiler.run(path)


USED = {
    "": "Builder BuilderFlag CudaGraphStrategy ComputeCapability ExecutionContextAllocationStrategy ILogger OnnxParser "
    "HardwareCompatibilityLevel IProgressMonitor NetworkDefinitionCreationFlag OnnxParserRefitter Refitter Runtime",
    "Builder": "build_serialized_network create_builder_config create_network create_optimization_profile",
    "BuilderFlag": "STRIP_PLAN VERSION_COMPATIBLE",
    "ComputeCapability": "SM86 SM89 SM120",
    "CudaGraphStrategy": "DISABLED WHOLE_GRAPH_CAPTURE",
    "ExecutionContextAllocationStrategy": "USER_MANAGED",
    "HardwareCompatibilityLevel": "AMPERE_PLUS",
    "IBuilderConfig": "add_optimization_profile create_timing_cache get_timing_cache hardware_compatibility_level "
    "num_compute_capabilities progress_monitor set_compute_capability set_flag set_timing_cache",
    "ICudaEngine": "create_execution_context create_runtime_config get_tensor_name num_io_tensors",
    "IExecutionContext": "execute_async_v3 set_device_memory set_input_shape set_optimization_profile_async "
    "set_tensor_address update_device_memory_size_for_shapes",
    "IHostMemory": "nbytes",
    "ILogger": "Severity log",
    "INetworkDefinition": "num_layers",
    "IOptimizationProfile": "set_shape",
    "IProgressMonitor": "phase_finish phase_start step_complete",
    "IRuntimeCache": "deserialize serialize",
    "IRuntimeConfig": "create_runtime_cache cuda_graph_strategy set_execution_context_allocation_strategy "
    "set_runtime_cache",
    "ITimingCache": "serialize",
    "NetworkDefinitionCreationFlag": "STRONGLY_TYPED",
    "OnnxParser": "get_error num_errors parse supports_model_v2",
    "OnnxParserRefitter": "refit_from_bytes",
    "ParserError": "desc node_name node_operator",
    "Refitter": "refit_cuda_engine",
    "Runtime": "deserialize_cuda_engine engine_host_code_allowed",
}
"""All that we use of the API, by class."""

RTX_ONLY = {"ComputeCapability", "CudaGraphStrategy", "IRuntimeCache", "num_compute_capabilities", "set_runtime_cache",
            "set_compute_capability", "create_runtime_cache", "cuda_graph_strategy"}  # fmt: skip

LIST = """
import importlib, json, sys
api = importlib.import_module(sys.argv[1])
print(json.dumps({"": dir(api), **{name: dir(getattr(api, name)) for name in dir(api) if name[0].isupper()}}))
"""

STUB = "".join(
    f"void *{name}(void) {{ return 0; }}\n"
    for name in (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getPluginRegistry",
        "createNvOnnxParserRefitter_INTERNAL",
        "createNvOnnxParser_INTERNAL",
        "getBuilderPluginRegistry",
        "getNvOnnxParserVersion",
        "initLibNvInferPlugins",
    )
)
"""All that the Python bindings of TensorRT import from its library."""


def api_of(module: str, libraries: Path | str = "") -> dict[str, list[str]]:
    """The names in a module and in its classes, in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-c", LIST, module],
        env={**os.environ, "LD_LIBRARY_PATH": str(libraries)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout)


def missing_in(api: dict[str, list[str]]) -> list[str]:
    return [f"{kind}.{name}" for kind, names in USED.items() for name in names.split() if name not in api.get(kind, [])]


def test_rtx_has_every_name_that_we_use():
    api = api_of("tensorrt_rtx_bindings")
    assert missing_in(api) == []
    sources = [ast.parse(Path(module.__file__).read_text()) for module in (tensorrt, trt)]
    accessed = {node.attr for source in sources for node in ast.walk(source) if isinstance(node, ast.Attribute)}
    listed = {name for names in USED.values() for name in names.split()}
    telling = {name for names in api.values() for name in names if "_" in name.strip("_") or name[0].isupper()}
    assert accessed & telling - {"ERROR"} <= listed


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_bindings") is None, reason="no bindings of TensorRT")
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_tensorrt_has_every_name_that_we_use(tmp_path):
    """NVIDIA's own Python bindings of TensorRT, which load without its library if something has its name and symbols.
    That the names are there is all that this shows."""
    (tmp_path / "stub.c").write_text(STUB)
    major = importlib.metadata.version("tensorrt-cu13-bindings").split(".")[0]
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        library = f"lib{name}.so.{major}"
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", library, "stub.c"]
        subprocess.run(command, cwd=tmp_path, check=True)
    missing = missing_in(api_of("tensorrt_bindings", tmp_path))
    assert {part for name in missing for part in name.split(".") if part in RTX_ONLY}
    assert [name for name in missing if not RTX_ONLY & set(name.split("."))] == []
