"""Quantisation: what gets pairs and what never does, the ranking, the budget, and what cannot be used."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from compress.int8 import Feeds, Mixtures, Samples, best_scale, cpu_kernels
from compress.quantize import Quantised, QuantizeOptions, quantize
from compress.quantize import run as command_line
from drsformer import checkpoint
from drsformer.config import DRSformerConfig, MEFCConfig
from drsformer.metrics import psnr
from drsformer.model import DRSformer
from drsformer.rendering import add_rain, draw_streaks
from export.folding import fold
from export.graph import to_onnx
from export.onnx import ExportOptions, export
from export.runners import open_candidate
from export.topk import with_pattern
from export.validate import validate
from runtime.errors import GateError, InputError
from runtime.images import Photo, read_rgb
from runtime.ort import OrtSession
from runtime.pixels import to_batch, to_image
from runtime.session import Derainer
from tests.support.networks import fill

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SIZES = [(37, 45), (40, 48), (33, 41)]
"""Of which each is padded to the second, for which the models are exported: that is far quicker than for any size."""
OUTLIER = "encoder_level1.0.ffn"


def network() -> DRSformer:
    """A compensator and a block. One hidden channel is a thousand times as large as the others, which the layer after
    it takes back: nothing to float32, ruin to one scale for all channels."""
    config = DRSformerConfig.regular(width=8, depths=(1, 0, 0, 0), heads=(2, 2, 2, 2), expansion=2.0)
    mefc = MEFCConfig(4, (("sep_conv_3x3", "avg_pool_3x3"),))
    *upper, last = config.decoder
    config = dataclasses.replace(
        config, mefc_early=mefc, decoder=(*upper, dataclasses.replace(last, blocks=())), topk=("1/2", "3/4")
    )
    model = DRSformer(config)
    fill(model)
    weights = model.state_dict()  # which shares memory with the network
    weights[f"{OUTLIER}.project_in.weight"][3] *= 1000
    for name in ("dwconv3x3", "dwconv5x5"):
        weights[f"{OUTLIER}.{name}.weight"][3] /= 1000
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The network as a checkpoint and two models, and pairs whose targets it nearly reaches, or wholly."""
    folder = tmp_path_factory.mktemp("quantize")
    checkpoint.save(folder / "reference.safetensors", network(), {})
    export(folder / "reference.safetensors", folder / "model.onnx", ExportOptions(height=40, width=48))
    camera = fold(with_pattern(network().requires_grad_(False), "threshold"))
    onnx.save(to_onnx(camera, "image", SIZES[1]), folder / "camera.onnx")
    restore = Derainer(folder / "model.onnx")
    for i, (H, W) in enumerate(SIZES):
        generator = np.random.default_rng(i)
        image = generator.integers(0, 256, (H, W, 3), dtype=np.uint8)
        restored = restore(image)
        noisy = np.clip(restored + generator.integers(-9, 10, image.shape), 0, 255).astype(np.uint8)
        targets = {"pairs": noisy, "exact": restored} | ({"fixed": noisy} if i == 1 else {})
        for name, target in targets.items():
            Photo(image).save(folder / name / "input" / f"{i}.png")
            Photo(target).save(folder / name / "target" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def mixtures(folder) -> Mixtures:
    session = OrtSession(folder / "model.onnx", "cpu")
    images = [np.random.default_rng(i).integers(0, 256, (H, W, 3), dtype=np.uint8) for i, (H, W) in enumerate(SIZES)]
    return Mixtures(onnx.load(folder / "model.onnx"), Feeds(session, images))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Time little."""
    monkeypatch.setattr("compress.latency.TIMING_SECONDS", 0)


def metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def in_openvino(path: Path, batch: np.ndarray) -> np.ndarray:
    openvino = pytest.importorskip("openvino")
    return openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(batch)[0]


def go(model: Path, data: Path, output: Path, max_drop_db: float, **options) -> Quantised:
    return quantize(model, data, output, QuantizeOptions(max_drop_db, **options))


def test_what_is_quantised(folder, mixtures):
    model = onnx.load(folder / "model.onnx")
    types = {node.name: node.op_type for node in model.graph.node}
    chosen = [name for names in mixtures.groups.values() for name in names]
    assert len(chosen) == len(set(chosen))
    assert {name for name, kind in types.items() if kind == "Conv"} <= set(chosen)
    products = [group for group, names in mixtures.groups.items() if any(types[name] == "MatMul" for name in names)]
    assert products == ["mefc_early.steps.0.product", "encoder_level1.0.attn.product"]
    assert [len(mixtures.groups[group]) for group in products] == [1, 1]  # that of Q and K is not among them
    for group in ("patch_embed", f"{OUTLIER}.weight", f"{OUTLIER}.dw5", f"{OUTLIER}.pair", f"{OUTLIER}.out", "output"):
        assert group in mixtures.groups


def test_pairs_are_what_tensorrt_takes(mixtures):
    graph = mixtures.mixed(list(mixtures.groups)).graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    pairs = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for node in pairs:
        scale, zero = values[node.input[1]], values[node.input[2]]
        assert zero.dtype == np.int8
        assert not zero.any()
        assert (scale > 0).all()
        if node.input[0] in values:  # a weight
            assert node.op_type == "DequantizeLinear"
            assert scale.shape == values[node.input[0]].shape[:1]
            assert np.abs(values[node.input[0]].astype(int)).max() <= 64
        else:
            assert scale.shape == ()
    biases = {node.input[2] for node in graph.node if node.op_type == "Conv" and len(node.input) == 3}
    assert biases
    assert {values[bias].dtype for bias in biases} == {np.dtype(np.float32)}


def test_weights_take_all_bits_on_request_and_activations_always(folder, mixtures):
    model, session = onnx.load(folder / "model.onnx"), OrtSession(folder / "model.onnx", "cpu")
    images = [np.random.default_rng(i).integers(0, 256, (H, W, 3), dtype=np.uint8) for i, (H, W) in enumerate(SIZES)]
    full = Mixtures(model, Feeds(session, images), full_range=True)
    groups = list(mixtures.groups)
    seven, eight = (
        {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in each.mixed(groups).graph.initializer}
        for each in (mixtures, full)
    )
    weights = [name for name in eight if name.endswith("_quantized")]
    assert {np.abs(eight[name].astype(int)).max() for name in weights} == {127}
    for name in eight:
        if name.endswith("_scale"):
            ratio = 1.0 if eight[name].shape == () else 127 / 64
            np.testing.assert_allclose(seven[name], eight[name] * ratio, rtol=0.02, err_msg=name)


def test_concatenations_are_bounded_by_what_int8_can_hold_before_they_are_rounded(mixtures):
    graph = mixtures.mixed(list(mixtures.groups)).graph
    makers = {output: node for node in graph.node for output in node.output}
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    roundings = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    bounds = [(node, makers[node.input[0]]) for node in roundings if node.input[0] in makers]
    assert "Concat" not in {maker.op_type for _, maker in bounds}
    bounds = [(node, maker) for node, maker in bounds if maker.op_type == "Max"]
    assert bounds
    for node, maker in bounds:
        assert makers[maker.input[0]].op_type == "Concat"
        assert values[maker.input[1]] == -128 * values[node.input[1]]


def test_scales_clip_what_is_rare_and_nothing_else():
    largest = np.asarray(8 / 127, np.float32)
    even = np.linspace(-8, 8, 10000, dtype=np.float32)
    assert best_scale(even, largest) == largest
    rare = np.append(np.random.default_rng(0).normal(size=10**6), 8).astype(np.float32)
    scale = best_scale(rare, largest)
    lost, before = (
        np.square(step * np.clip(np.rint(rare / step), -128, 127) - rare).mean() for step in (scale, largest)
    )
    assert lost < before / 2
    assert best_scale(np.zeros(10, np.float32), largest) == largest


def test_samples_are_few_and_of_all_images_alike(folder, monkeypatch):
    monkeypatch.setattr("compress.int8.SAMPLES", 100)
    images = [np.full((40, 48, 3), i, np.uint8) for i in range(1, 6)]
    feeds = Feeds(OrtSession(folder / "model.onnx", "cpu"), images)
    samples = Samples(onnx.load(folder / "model.onnx"), ["input"], feeds)
    while samples.get_next() is not None:
        assert len(samples.values["input"]) <= 100
    _, counts = np.unique(samples.values["input"], return_counts=True)
    assert len(counts) == len(images)
    assert counts.max() <= counts.min() + 1


def test_every_tile_of_a_large_image_counts(folder):
    """A graph of one size, and an image of five times as much, black on the left and white on the right."""
    session = OrtSession(folder / "model.onnx", "cpu")
    wide = np.zeros((40, 200, 3), np.uint8)
    wide[:, 100:] = 255
    feeds, means = Feeds(session, [wide, wide[:, :48]]), []
    while (feed := feeds.get_next()) is not None:
        means.append(float(feed["input"].mean()))
    assert means[0] == means[1] == 0
    assert means[-2] == 1
    assert means[-1] == 0  # the second image
    assert len(means) > 4


def test_activations_have_scales_that_lose_less_than_those_of_extremes(folder, mixtures, monkeypatch):
    monkeypatch.setattr("compress.int8.CLIPPING", np.ones(1))
    images = [np.random.default_rng(i).integers(0, 256, (H, W, 3), dtype=np.uint8) for i, (H, W) in enumerate(SIZES)]
    model, session = onnx.load(folder / "model.onnx"), OrtSession(folder / "model.onnx", "cpu")
    extremes = Mixtures(model, Feeds(session, images))
    tight, wide = (
        {node.input[0]: values[node.input[1]] for node in graph.node if node.op_type == "QuantizeLinear"}
        for graph in (each.mixed(list(each.groups)).graph for each in (mixtures, extremes))
        for values in [{tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}]
    )
    assert tight.keys() == wide.keys()
    assert all(tight[tensor] <= wide[tensor] for tensor in wide)
    assert any(tight[tensor] < 0.9 * wide[tensor] for tensor in wide)


def test_openvino_rounds_as_onnx_runtime_does(folder, mixtures, tmp_path):
    batch = np.random.default_rng(5).random((1, 3, 40, 48), dtype=np.float32)
    onnx.save(mixtures.mixed(list(mixtures.groups)), tmp_path / "int8.onnx")
    plain, ours = (OrtSession(path, "cpu").run(batch) for path in (folder / "model.onnx", tmp_path / "int8.onnx"))
    lost, apart = (np.square(ours - other).mean() for other in (plain, in_openvino(tmp_path / "int8.onnx", batch)))
    assert apart < lost / 2  # without the bounds on concatenations it is more than twice `lost`


def test_the_shipped_network_loses_little_in_onnx_runtime_and_in_openvino(tmp_path):
    """All of it quantised, none left out. What it loses depends on the image, by some tenths of a dB either way."""
    photographs = [read_rgb(path)[:160, :192] for path in sorted((ROOT / "docs" / "photographs").glob("*.jpg"))]
    rainy = [add_rain(x, draw_streaks(np.random.default_rng(i), *x.shape[:2])) for i, x in enumerate(photographs)]
    model = ROOT / "runtime" / "drsformer-xs.onnx"
    session = OrtSession(model, "cpu")
    mixtures = Mixtures(onnx.load(model), Feeds(session, rainy[1:]))
    onnx.save(mixtures.mixed(list(mixtures.groups)), tmp_path / "int8.onnx")
    int8 = OrtSession(tmp_path / "int8.onnx", "cpu")

    def mean(run: Callable[[np.ndarray], np.ndarray]) -> float:
        pairs = zip(rainy[:2], photographs[:2], strict=True)
        return float(np.mean([psnr(to_image(run(to_batch(image))), clean) for image, clean in pairs]))

    whole = mean(session.run)
    assert whole > np.mean([psnr(*pair) for pair in zip(rainy[:2], photographs[:2], strict=True)]) + 5
    assert mean(int8.run) > whole - 0.5
    assert mean(lambda batch: in_openvino(tmp_path / "int8.onnx", batch)) > whole - 0.5


def test_only_what_is_quantised_reads_rounded_tensors(mixtures):
    graph = mixtures.mixed(list(mixtures.groups)).graph
    makers = {output: node for node in graph.node for output in node.output}
    chosen = {name for names in mixtures.groups.values() for name in names}
    for node in graph.node:
        for tensor in node.input:
            maker = makers.get(tensor)
            if maker is None or maker.op_type != "DequantizeLinear":
                continue
            assert node.op_type != "Relu"
            rounding = makers.get(maker.input[0])
            source = makers.get(rounding.input[0]) if rounding else None
            assert node.name in chosen or (source is not None and source.name in chosen)
    (last,) = (node for node in graph.node if "output" in node.output)
    assert "input" in last.input  # the image is added as it is


def test_nothing_quantised_is_the_model(folder, mixtures, tmp_path):
    onnx.save(mixtures.mixed([]), tmp_path / "none.onnx")
    batch = np.random.default_rng(0).random((1, 3, 40, 48), dtype=np.float32)
    np.testing.assert_array_equal(
        OrtSession(tmp_path / "none.onnx", "cpu").run(batch), OrtSession(folder / "model.onnx", "cpu").run(batch)
    )
    mixed, plain = mixtures.mixed([f"{OUTLIER}.out"]), onnx.load(folder / "model.onnx")
    assert (mixed.graph.input, mixed.graph.output) == (plain.graph.input, plain.graph.output)
    onnx.checker.check_model(mixed, full_check=True)
    assert sum(node.op_type == "QuantizeLinear" for node in mixed.graph.node) == 2


def test_large_budget_excludes_nothing(folder, tmp_path):
    done = go(folder / "model.onnx", folder / "pairs", tmp_path / "int8.onnx", max_drop_db=100)
    assert done.excluded == ()
    assert done.sensitivity == {}
    assert done.drop_db == done.all_db
    assert metadata(done.output)["precision"] == "int8"
    kept = metadata(folder / "model.onnx")
    assert {key: metadata(done.output)[key] for key in kept if key != "precision"} == {
        key: value for key, value in kept.items() if key != "precision"
    }
    found = validate(folder / "reference.safetensors", done.output, folder / "pairs")
    assert found.totals["drop_db"] == pytest.approx(done.drop_db, abs=0.02)  # PyTorch in place of ONNX Runtime
    assert found.selections
    assert open_candidate(done.output).multiple == 8


def test_budget_excludes_what_costs_most(folder, tmp_path):
    budget = 0.5
    done = go(folder / "model.onnx", folder / "pairs", tmp_path / "deep" / "int8.onnx", budget, calibrate=2)
    assert done.drop_db <= budget < done.all_db
    assert 0 < len(done.excluded) < len(done.groups)
    assert done.excluded == tuple(done.sensitivity)[: len(done.excluded)]
    assert done.sensitivity.keys() == done.groups.keys()
    assert list(done.sensitivity.values()) == sorted(done.sensitivity.values(), reverse=True)
    assert min(done.sensitivity.values()) >= 0
    assert {f"{OUTLIER}.weight", f"{OUTLIER}.dw3"} & set(done.excluded[:3])
    before, after = (Derainer(OrtSession(path, "cpu")) for path in (done.model, done.output))
    drops = []
    for i in range(len(SIZES)):
        rainy, clean = (read_rgb(folder / "pairs" / kind / f"{i}.png") for kind in ("input", "target"))
        drops.append(psnr(before(rainy), clean) - psnr(after(rainy), clean))
    assert np.mean(drops) == pytest.approx(done.drop_db)
    told = json.loads(metadata(done.output)["quantization"])
    assert told["float32"] == list(done.excluded)
    assert sorted(told["int8"] + told["float32"]) == sorted(done.groups)
    assert [path.name for path in done.output.parent.iterdir()] == ["int8.onnx"]


def test_budget_that_cannot_be_kept(folder, tmp_path):
    with pytest.raises(GateError, match="leave nothing to quantise"):
        go(folder / "model.onnx", folder / "exact", tmp_path / "int8.onnx", max_drop_db=0, limit=1)
    assert not list(tmp_path.iterdir())


def test_images_larger_than_the_model_are_cut(folder, tmp_path):
    for kind in ("input", "target"):
        Photo(np.random.default_rng(0).integers(0, 256, (56, 70, 3), dtype=np.uint8)).save(tmp_path / kind / "0.png")
    assert go(folder / "model.onnx", tmp_path, tmp_path / "int8.onnx", max_drop_db=9.0).images == 1


def test_images_in_and_out_of_fixed_size(folder, tmp_path):
    done = go(folder / "camera.onnx", folder / "fixed", tmp_path / "int8.onnx", max_drop_db=0.5)
    assert done.excluded
    assert done.size == SIZES[1]
    others = go(folder / "camera.onnx", folder / "pairs", tmp_path / "int8.onnx", max_drop_db=9.0)
    assert others.images == len(SIZES)  # padded, or in tiles


def test_command(folder, tmp_path, monkeypatch, capsys):
    def run(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(
            sys, "argv", ["quantize", "--data", str(folder / "pairs"), "--limit", "1", *map(str, arguments)]
        )
        with pytest.raises(SystemExit) as stopped:
            command_line()
        return stopped.value.code, *capsys.readouterr()

    status, printed, _ = run("--model", folder / "model.onnx", "--output", tmp_path / "q.onnx", "--max-drop-db", "9")
    assert status == 0
    assert f"than float32 on this CPU ({cpu_kernels()}) in ONNX Runtime" in printed
    summary = json.loads(printed.splitlines()[-1])
    assert summary["drop_db"] <= 9
    assert summary["bytes"] == (tmp_path / "q.onnx").stat().st_size
    status, printed, error = run("--model", tmp_path / "q.onnx", "--output", tmp_path / "r.onnx", "--max-drop-db", "9")
    assert (status, printed, error.count("\n")) == (2, "", 1)
    assert "quantised already" in error


def test_tensorrt_for_rtx_parses_it(mixtures):
    pytest.importorskip("tensorrt_rtx_bindings")
    from export.tensorrt import Compiler
    from runtime.trt import LIBRARIES

    content = mixtures.mixed(list(mixtures.groups)).SerializeToString()
    assert Compiler(LIBRARIES["rtx"].load(), LIBRARIES["rtx"], content).network.num_layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_drop_db=-0.1), "`max_drop_db`: expected at least 0"),
        (dict(max_drop_db=float("nan")), "`max_drop_db`: expected a finite number, found nan"),
        (dict(calibrate=0), "`calibrate`: expected at least 1, found 0"),
        (dict(limit=0), "`limit`: expected at least 1, found 0"),
        (dict(output="int8.engine"), "`output`: expected a name ending in .onnx"),
        (dict(output="model.onnx"), "`output`: expected another file than `model`"),
        (dict(model="missing.onnx"), "`model`: expected an ONNX file, found no file at"),
        (dict(model="truncated.onnx"), "truncated.onnx"),
        (dict(model="parts.onnx"), "`model`: expected all weights of .*parts.onnx, found some missing"),
        (dict(model="half.onnx"), "`model`: expected a float32 model, found one in float16"),
        (dict(model="reference.safetensors"), "reference.safetensors"),
        (dict(data="missing"), "missing: expected a folder of pairs"),
        (dict(data="empty"), "empty: expected .*; found nothing"),
        (dict(data="unpaired"), "counterpart"),
    ],
)
def test_refuses_what_it_cannot_use(folder, tmp_path, options, message):
    content = (folder / "model.onnx").read_bytes()
    (folder / "truncated.onnx").write_bytes(content[: len(content) // 2])
    half = onnx.load_from_string(content)
    half.graph.initializer.add(name="half", data_type=onnx.TensorProto.FLOAT16, dims=[1], raw_data=b"\0\0")
    onnx.save(half, folder / "half.onnx")
    onnx.save(onnx.load_from_string(content), folder / "parts.onnx", save_as_external_data=True, location="parts.data")
    (folder / "parts.data").unlink()
    (folder / "empty").mkdir(exist_ok=True)
    shutil.copytree(folder / "pairs", folder / "unpaired", dirs_exist_ok=True)
    (folder / "unpaired" / "target" / "1.png").unlink()
    options = {"model": "model.onnx", "data": "pairs", "max_drop_db": 1.0, **options}
    output = folder / options.pop("output") if "output" in options else tmp_path / "int8.onnx"
    model, data = (folder / options.pop(key) for key in ("model", "data"))
    with pytest.raises(InputError, match=message) as error:
        go(model, data, output, **options)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
    assert (folder / "model.onnx").read_bytes() == content
