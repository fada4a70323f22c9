"""Export to ONNX: the same numbers as PyTorch, from graphs that any runtime can load."""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from drsformer import checkpoint
from drsformer.config import BlockConfig, DRSformerConfig, MEFCConfig
from drsformer.model import DRSformer, GatedFeedForward
from drsformer.session import TorchSession
from export import folding, graph
from export.onnx import Exported, ExportOptions, export, table
from export.topk import PATTERNS, masks, scores_of, with_pattern
from export.verification import SIZES, SOME, TOLERANCE, ScoreProbe, verify
from runtime.errors import GateError, InputError
from runtime.ort import OrtSession
from runtime.pixels import ANY, to_batch
from runtime.session import Derainer
from tests.support.images import random_image
from tests.support.networks import fill, image, small

CONTROL_FLOW = {"If", "Loop", "Scan"}


EVERYTHING = small(
    (BlockConfig(3, 7, 5),),
    mefc_early=MEFCConfig(6, (("sep_conv_3x3", "none"),)),
    mefc_late=MEFCConfig(5, (("avg_pool_3x3", "dil_conv_5x5"),)),
)

WITHOUT_BLOCKS = DRSformerConfig.regular(width=4, depths=(0, 0, 0, 0), heads=(1, 1, 1, 1))


def save(folder: Path, config: DRSformerConfig) -> Path:
    network = DRSformer(config)
    fill(network)
    checkpoint.save(folder / "weights.safetensors", network, {"trained_on": ["noise"]})
    return folder / "weights.safetensors"


def metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> tuple[Path, Exported]:
    """Weights of a network with all there is, and their export for any size."""
    folder = tmp_path_factory.mktemp("everything")
    weights = save(folder, EVERYTHING)
    return weights, export(weights, folder / "new" / "model.onnx")


@pytest.fixture(scope="module")
def photographic(tmp_path_factory) -> tuple[Path, Exported]:
    """Weights of a network of convolutions alone, and their export as a graph of images."""
    folder = tmp_path_factory.mktemp("photographic")
    weights = save(folder, WITHOUT_BLOCKS)
    return weights, export(weights, options=ExportOptions(io="image"))


@pytest.mark.parametrize("size", [*SIZES, (8, 16), (32, 8)])
def test_one_model_gives_pytorchs_output_at_every_size(everything, size):
    weights, exported = everything
    batch = to_batch(random_image(*size))
    expected = TorchSession(checkpoint.load(weights).model, "cpu").run(batch)
    difference = np.abs(OrtSession(exported.output, "cpu").run(batch) - expected)
    assert difference.max() < TOLERANCE, f"max {difference.max():.2e}, mean {difference.mean():.2e}"
    assert np.abs(expected - batch).mean() > 0.01  # it does something


def test_export_says_what_it_found(everything):
    _, exported = everything
    summary = json.loads(json.dumps(exported.summary()))
    model = onnx.load(exported.output)
    assert summary["nodes"] == len(model.graph.node)
    assert summary["topk"] == 2
    assert summary["bytes"] == exported.output.stat().st_size
    assert 0 < summary["max_difference"] < TOLERANCE
    assert [a.size for a in exported.agreements] == list(SIZES)
    assert {a.selections for a in exported.agreements} == {3 * 7 * (3 + 4 + 5 + 5) + 2 * 5 * (2 + 3 + 3 + 4)}


def test_graph_is_plain_onnx(everything):
    _, exported = everything
    model = onnx.load(exported.output)
    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain for opset in model.opset_import} == {""}
    assert not model.functions
    assert not {node.op_type for node in model.graph.node} & CONTROL_FLOW
    (input,), (output,) = model.graph.input, model.graph.output
    for value in (input, output):
        batch, channels, *_ = value.type.tensor_type.shape.dim
        assert (batch.dim_value, channels.dim_value) == (1, 3)
    assert (input.name, output.name) == ("input", "output")


def test_blocks_of_one_structure_are_traced_once_and_keep_their_weights(tmp_path, monkeypatch):
    """Hidden widths of 7 and 8 are folded into tensors of equal shapes and still differ in how these are joined."""
    odd, even, other = BlockConfig(1, 8, 7), BlockConfig(1, 8, 8), BlockConfig(2, 4, 8)
    config = small((odd, even, other, odd, even))
    traced, trace = [], graph._trace
    monkeypatch.setattr(graph, "_trace", lambda network, *rest: traced.append(network) or trace(network, *rest))
    exported = export(save(tmp_path, config), tmp_path / "model.onnx")
    blocks = [block for level in config.levels().values() for block in level.blocks]
    assert len(traced) == 1 + len({(level.width, b) for level in config.levels().values() for b in level.blocks})
    assert len(traced) < 1 + len(blocks)
    assert all(agreement.difference < TOLERANCE for agreement in exported.agreements)
    names = [tensor.name for tensor in onnx.load(exported.output).graph.initializer]
    assert len(names) == len(set(names))


def test_sizes_in_the_file_are_those_that_are_computed(everything):
    """ONNX Runtime takes sizes of one name for equal ones and reuses memory accordingly."""
    _, exported = everything
    model = onnx.load(exported.output)
    del model.graph.output[:]
    model.graph.output.extend(model.graph.value_info)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    found = session.run(None, {"input": to_batch(random_image(40, 56))})
    sizes: dict[str, set[int]] = {}
    for value, array in zip(model.graph.value_info, found, strict=True):
        for dim, length in zip(value.type.tensor_type.shape.dim, array.shape, strict=True):
            if dim.dim_param:
                sizes.setdefault(dim.dim_param, set()).add(length)
            else:
                assert dim.dim_value in (0, length), value.name
    assert {name: len(lengths) for name, lengths in sizes.items()} == dict.fromkeys(sizes, 1)


@pytest.mark.parametrize(("opset", "ir_version"), [(18, 8), (20, 9), (22, 10), (23, 11)])
def test_format_is_no_newer_than_the_operators(opset, ir_version):
    """ONNX Runtime 1.17 knows operator set 20 and IR version 9, and refuses a file of version 10 for that alone."""
    assert graph.to_onnx(nn.Conv2d(3, 3, 1), opset=opset).ir_version == ir_version


def test_file_says_where_it_comes_from_and_not_on_which_machine(everything):
    weights, exported = everything
    trained = checkpoint.load(weights)
    found = metadata(exported.output)
    assert found["size_multiple"] == "8"
    assert found["io"] == "tensor"
    assert found["topk"] == "threshold"
    assert found["weights_sha256"] == trained.sha256
    assert json.loads(found["provenance"]) == {"trained_on": ["noise"]}
    assert DRSformerConfig.from_dict(json.loads(found["config"])) == EVERYTHING
    assert json.loads(found["versions"])["torch"] == torch.__version__
    content = exported.output.read_bytes()
    for trace in (str(Path(graph.__file__).parents[1]), sys.prefix, "stack_trace"):
        assert trace.encode() not in content


def test_scores_can_be_read_from_the_file(everything):
    weights, exported = everything
    network = checkpoint.load(weights).model
    batch = to_batch(random_image(40, 48))
    with scores_of(network) as expected:
        TorchSession(network, "cpu").run(batch)
    probe = ScoreProbe(exported.output)
    found = probe(batch)
    assert probe.ks == {layer: mask.ks for layer, mask in masks(network).items()}
    assert found.keys() == expected.keys() == {"encoder_level1.0.attn", "latent.0.attn"}
    for layer, scores in found.items():
        assert scores.shape == expected[layer].shape
        assert (scores - expected[layer]).abs().max() < 1e-5


def test_probe_knows_no_scores_of_a_foreign_model(everything, tmp_path):
    model = onnx.load(everything[1].output)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    probe = ScoreProbe(tmp_path / "foreign.onnx")
    assert probe.ks == {}
    assert probe(to_batch(random_image(8, 8))) == {}


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_images_of_a_batch_do_not_see_each_other(pattern, fold):
    """A flat one among them, whose scores are all equal, and one brighter than all that were seen in training."""
    network = with_pattern(fill(DRSformer(EVERYTHING)).requires_grad_(False), pattern)
    network = folding.fold(network) if fold else network
    batch = torch.cat([image(32, 40, seed) for seed in range(4)])
    batch[1], batch[2] = 0.5, 2 * batch[2]
    together = network(batch)
    for i in range(4):
        difference = (together[i] - network(batch[i : i + 1])[0]).abs()
        assert difference.max() < 1e-5, f"image {i}: max {difference.max():.1e}, mean {difference.mean():.1e}"


@pytest.fixture(scope="module")
def any_batch(everything, tmp_path_factory) -> Exported:
    """The same network for any number of images."""
    return export(everything[0], tmp_path_factory.mktemp("any") / "model.onnx", ExportOptions(batch="any"))


def test_a_batch_is_answered_as_its_images_one_by_one(everything, any_batch):
    """At this size to the byte; and as by the graph that takes one at a time."""
    of_one, of_any = OrtSession(everything[1].output, "cpu"), OrtSession(any_batch.output, "cpu")
    assert (of_one.graph_io.batch, of_any.graph_io.batch) == (1, ANY)
    assert of_any.input.shape == of_any.output.shape == (ANY, 3, ANY, ANY)
    images = [random_image(29, 37, seed) for seed in range(3)]
    images[1][:] = 128
    one_by_one = [Derainer(of_one)(image) for image in images]
    for derain in (Derainer(of_one), Derainer(of_any)):
        for found, expected, rainy in zip(derain.run_batch(images), one_by_one, images, strict=True):
            np.testing.assert_array_equal(found, expected)
            assert (found != rainy).any()
    batch = to_batch(*(random_image(32, 40, seed) for seed in range(3)))
    np.testing.assert_array_equal(of_any.run(batch), np.concatenate([of_any.run(batch[i : i + 1]) for i in range(3)]))


def test_proof_of_a_batch_counts_all_of_its_images(everything, any_batch):
    for one, some in zip(everything[1].agreements, any_batch.agreements, strict=True):
        assert (some.size, some.selections) == (one.size, SOME * one.selections)
        assert 0 < some.difference < TOLERANCE


def test_proof_of_a_batch_notices_images_that_see_each_other(everything, any_batch, monkeypatch):
    """A graph whose first image leaks into the last."""
    run = OrtSession.run

    def leak(self, batch):
        output = run(self, batch)
        output[-1] += 1e-2 * output[0]
        return output

    monkeypatch.setattr(OrtSession, "run", leak)
    network = with_pattern(checkpoint.load(everything[0]).model, "threshold")
    (agreement,) = verify(any_batch.output, network, [(64, 64)])
    assert agreement.difference > 10 * TOLERANCE


def test_verification_notices_other_weights(everything):
    weights, exported = everything
    network = with_pattern(checkpoint.load(weights).model, "threshold")
    with torch.no_grad():
        network.output.weight[0, 0, 0, 0] += 1e-2
    (agreement,) = verify(exported.output, network, [(64, 64)])
    assert agreement.difference > 10 * TOLERANCE
    assert agreement.flips == 0


def test_verification_tells_flips_from_faults(everything):
    """Scores that are pushed about before the top-k stand for a runtime that rounds differently: the selections
    differ, and nothing else does."""
    weights, exported = everything
    network = with_pattern(checkpoint.load(weights).model, "threshold")
    noise = torch.Generator().manual_seed(0)
    mask = masks(network)["latent.0.attn"]
    mask.register_forward_pre_hook(lambda _, args: (args[0] + 0.3 * torch.randn(args[0].shape, generator=noise),))
    (agreement,) = verify(exported.output, network, [(64, 64)])
    assert agreement.flips > 0
    assert agreement.difference < TOLERANCE < agreement.free_difference


@pytest.mark.parametrize(
    ("pattern", "io", "operators"), [("scatter", "image", {"TopK", "ScatterElements"}), ("rank", "tensor", set())]
)
def test_patterns_at_fixed_size(tmp_path, pattern, io, operators):
    weights = save(tmp_path, small(feed_forward="fn"))
    exported = export(weights, options=ExportOptions(topk=pattern, io=io, height=40, width=24))
    assert exported.output == tmp_path / "weights.onnx"
    assert exported.agreements[0].selections == 2 * 5 * (2 + 3 + 3 + 4)
    assert exported.operators.keys() & {"TopK", "ScatterElements", "NonZero"} == operators
    assert metadata(exported.output)["topk"] == pattern
    assert [a.size for a in exported.agreements] == [(40, 24)]
    with pytest.raises(InputError, match="24x40"):
        OrtSession(exported.output, "cpu").run(to_batch(random_image(24, 24)))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ties_in_onnx_runtime(tmp_path, pattern):
    """In ONNX, scatter and rank keep exactly k, of equal scores the first; the threshold keeps all that are equal."""
    ks = (3, 5, 6)
    scores = torch.randint(4, (1, 2, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    scores[0, 0, 0] = 1  # a flat row
    mask = PATTERNS[pattern](ks).eval()
    rows = scores.unsqueeze(-2)
    torch.onnx.export(mask, (rows,), tmp_path / "mask.onnx", input_names=["scores"], verbose=False)
    found = onnxruntime.InferenceSession(tmp_path / "mask.onnx").run(None, {"scores": rows.numpy()})[0]
    ordered = scores.sort(dim=-1, descending=True, stable=True)
    for k, mask in zip(ks, np.moveaxis(found, -2, 0), strict=True):
        if pattern == "threshold":
            expected = scores >= ordered.values[..., k - 1, None]
        else:
            expected = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, ordered.indices[..., :k], True)
        np.testing.assert_array_equal(mask, expected.numpy())


def test_graph_of_two_images_fills_up_and_drops(tmp_path):
    weights = save(tmp_path, small(feed_forward="fn"))
    exported = export(weights, options=ExportOptions(topk="scatter", io="image", height=17, width=24, batch=2))
    assert exported.agreements[0].selections == 2 * 2 * 5 * (2 + 3 + 3 + 4)
    session = OrtSession(exported.output, "cpu")
    assert session.input.shape == (2, 17, 24, 3)
    assert ScoreProbe(exported.output)(to_batch(random_image(17, 24)))["latent.0.attn"].shape[0] == 1
    images = [random_image(17, 24, seed) for seed in range(3)]
    derain = Derainer(session)
    alone = [derain(image) for image in images]
    assert len({image.tobytes() for image in alone}) == 3
    for found, expected in zip(derain.run_batch(images), alone, strict=True):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(InputError, match="takes 2 images at once, found 3; export it with --batch"):
        session.run(to_batch(*images))


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (3, 5), (4, 12), (5, 8), (8, 8), (33, 47)])
def test_graph_of_images_keeps_the_contract(photographic, size):
    """Padding by reflection or, for few pixels, repetition; clamping, cropping, rounding."""
    weights, exported = photographic
    network = with_pattern(checkpoint.load(weights).model, "threshold")
    (agreement,) = verify(exported.output, network, [size])
    assert agreement.difference < TOLERANCE  # beyond rounding
    image = random_image(*size)
    restored = Derainer(exported.output, "cpu")(image)
    assert restored.shape == image.shape
    assert 0 < np.abs(restored.astype(int) - image).mean() < 100


def test_graph_of_images_begins_and_ends_with_a_cast(photographic):
    """TensorRT for RTX takes uint8 nowhere else."""
    graph = onnx.load(photographic[1].output).graph
    readers = [node.op_type for node in graph.node if "input" in node.input]
    (writer,) = (node.op_type for node in graph.node if "output" in node.output)
    assert set(readers) <= {"Cast", "Shape"}
    assert "Cast" in readers
    assert writer == "Cast"
    uint8, float32 = onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT
    assert [v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)] == [uint8, uint8, float32]
    assert [value.name for value in graph.output] == ["output", "finite"]
    assert metadata(photographic[1].output)["size_multiple"] == "1"


def test_graph_of_float16(tmp_path):
    """Proved as it computes, in float32; what is left is the rounding of input and output, and the selections that it
    moves."""
    weights = save(tmp_path, small(feed_forward="fn"))
    exported = export(weights, options=ExportOptions(io="tensor16"))
    assert [a.size for a in exported.agreements] == list(SIZES)
    assert max(a.difference for a in exported.agreements) < TOLERANCE
    content = onnx.load(exported.output).graph
    float16 = onnx.TensorProto.FLOAT16
    assert [v.type.tensor_type.elem_type for v in (*content.input, *content.output)] == [float16, float16]
    assert (metadata(exported.output)["io"], metadata(exported.output)["size_multiple"]) == ("tensor16", "8")
    batch = to_batch(random_image(40, 48))
    expected = TorchSession(checkpoint.load(weights).model, "cpu").run(batch)
    assert 0 < np.abs(OrtSession(exported.output, "cpu").run(batch) - expected).max() < 5e-3
    assert ScoreProbe(exported.output)(batch).keys() == {"latent.0.attn"}


def test_graph_of_images_has_no_operator_that_others_get_wrong(photographic):
    """OpenVINO 2026.4 computes Abs of constant integers wrongly, so whatever is reshaped to one size."""
    nodes = onnx.load(photographic[1].output).graph.node
    assert "Abs" not in {node.op_type for node in nodes}
    bounds = [node.input[1:] for node in nodes if node.op_type == "Clip"]
    assert bounds
    assert all(len(pair) == 2 and all(pair) for pair in bounds)


@pytest.mark.parametrize("difference", [2 * TOLERANCE, math.nan])
def test_failed_proof_writes_nothing(everything, tmp_path, monkeypatch, difference):
    weights, exported = everything
    model = onnx.load(exported.output)
    del model.metadata_props[:]
    found = dataclasses.replace(exported.agreements[0], difference=difference)
    monkeypatch.setattr("export.graph.to_onnx", lambda *_: model)
    monkeypatch.setattr("export.verification.verify", lambda *_: iter([found]))
    with pytest.raises(GateError, match="not written"):
        export(weights, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_what_float16_cannot_hold_is_not_written(tmp_path):
    """GDFN has no bound between its convolutions; here they put out a million, and the last one divides by it."""
    network = fill(DRSformer(small(feed_forward="gdfn")))
    for module in network.modules():
        if isinstance(module, GatedFeedForward):
            with torch.no_grad():
                module.project_in.weight.mul_(2.0**12)
                module.project_out.weight.mul_(2.0**-24)
    checkpoint.save(tmp_path / "w.safetensors", network, {})
    export(tmp_path / "w.safetensors", tmp_path / "bf16.onnx", ExportOptions(precision="bf16"))
    with pytest.raises(GateError, match="which float16 cannot hold; use `precision` bf16"):
        export(tmp_path / "w.safetensors", tmp_path / "fp16.onnx", ExportOptions(precision="fp16"))
    assert not (tmp_path / "fp16.onnx").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(opset=17), "`opset`: expected 18 to 23, found 17"),
        (dict(opset=21, precision="bf16"), "`opset`: expected at least 22"),
        (dict(fold=False, precision="fp16"), "`fold`: expected on, .* fp16, found off"),
        (dict(height=64), "`height` and `width` together, found only one"),
        (dict(height=64, width=60), "`width`: expected a multiple of 8, found 60"),
        (dict(io="tensor16", height=64, width=60), "`width`: expected a multiple of 8, found 60"),
        (dict(height=0, width=64), "`height`: expected at least 1, found 0"),
        (dict(io="image", height=-1, width=64), "`height`: expected at least 1, found -1"),
        (dict(batch=0), "`batch`: expected 1 to 1024, found 0"),
    ],
)
def test_refuses_options_that_it_cannot_use(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        export(tmp_path / "weights.safetensors", options=ExportOptions(**options))


def test_refuses_files_that_it_cannot_use(tmp_path):
    with pytest.raises(InputError, match=r"`output`: expected a name ending in \.onnx, found model\.pth"):
        export(tmp_path / "weights.safetensors", Path("model.pth"))
    with pytest.raises(InputError, match=r"missing\.pth"):
        export(tmp_path / "missing.pth")


def test_command(tmp_path, monkeypatch, capfd):
    weights, output = save(tmp_path, small(topk=(), feed_forward="fn")), tmp_path / "m.onnx"
    command = ["onnx", "--weights", str(weights), "--output", str(output), "--height", "16", "--width", "24"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.delitem(sys.modules, "export.onnx", raising=False)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("export.onnx", run_name="__main__", alter_sys=True)
    printed = capfd.readouterr()
    assert stopped.value.code == 0
    assert all(line.startswith(("Exporting", "Comparing")) for line in printed.err.splitlines())  # no other's remarks
    assert "16x24" in printed.out
    assert json.loads(printed.out.splitlines()[-1])["topk"] == 0  # dense attention
    assert output.exists()


def test_weights_are_chosen_among_those_of_a_file(tmp_path):
    networks = {"params": DRSformer(small()), "params_ema": fill(DRSformer(small()))}
    torch.save({key: network.state_dict() for key, network in networks.items()}, tmp_path / "net.pth")
    image = random_image(24, 24)
    expected = {key: Derainer(TorchSession(network, "cpu"))(image).astype(int) for key, network in networks.items()}
    assert np.abs(expected["params"] - expected["params_ema"]).max() > 9
    for key in networks:
        export(tmp_path / "net.pth", tmp_path / f"{key}.onnx", ExportOptions(height=24, width=24, weights_key=key))
        assert np.abs(Derainer(tmp_path / f"{key}.onnx")(image) - expected[key]).max() <= 1


def test_half_precision_is_compared_in_float32(everything):
    _, exported = everything
    assert table(exported).row_count == len(SIZES)
    assert table(exported).caption is None
    assert "float32" in str(table(dataclasses.replace(exported, precision="fp16")).caption)
