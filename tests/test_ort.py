"""OrtSession on networks of one or two nodes."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from runtime import Derainer, DerainError, DeviceError, InputError, InvalidImage, InvalidModel, machine
from runtime.manifest import Tensor, read_graph_io
from runtime.ort import SHIPPED, OrtSession
from runtime.pixels import ANY, GraphIO
from tests.support.onnx_files import FLOAT, FLOAT16, UINT8, write_network


def refusal(*arguments, **options):
    with pytest.raises(DerainError) as error:
        OrtSession(*arguments, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


def random_batch(height, width):
    return np.random.default_rng(0).random((1, 3, height, width), dtype=np.float32)


def test_runs(tmp_path):
    session = OrtSession(write_network(tmp_path / "m.onnx", metadata={"size_multiple": "4", "topk": "scatter"}))
    batch = random_batch(8, 12)
    np.testing.assert_array_equal(session.run(batch), batch * np.float32(0.5))
    assert session.multiple == 4
    assert session.metadata == {"size_multiple": "4", "topk": "scatter"}
    assert session.provider in ("cpu", "cuda")


def test_multiple_defaults_to_that_of_the_released_network(tmp_path):
    assert OrtSession(write_network(tmp_path / "m.onnx", metadata={})).multiple == 8


@pytest.mark.parametrize("text", ["", "0", "-8", "8.0", "eight"])
def test_refuses_a_senseless_multiple(tmp_path, text):
    path = write_network(tmp_path / "m.onnx", metadata={"size_multiple": text})
    assert repr(text) in refusal(path)


def test_graph_of_images_runs_behind_the_same_contract(tmp_path):
    session = OrtSession(write_network(tmp_path / "m.onnx", scale=0.25, kind=UINT8))
    image = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    assert session.multiple == 1
    np.testing.assert_array_equal(Derainer(session)(image), (image * np.float32(0.25)).astype(np.uint8))
    restored = session.run(random_batch(7, 9))
    assert restored.shape == (1, 3, 7, 9)
    assert restored.dtype == np.float32
    np.testing.assert_allclose(restored * 255, np.rint(restored * 255), atol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_graph_of_images_that_answers_with_nan_says_so(tmp_path, value):
    """Its clamp hides it. Graphs that do not tell, as they once were, go on working."""
    image = np.full((9, 16, 3), 100, np.uint8)
    told = OrtSession(write_network(tmp_path / "told.onnx", value, UINT8, finite=True))
    for tile in (None, (8, 8)):
        with pytest.raises(InvalidModel, match="NaN or infinity"):
            Derainer(told, tile=tile)(image)
    assert np.isnan(told.run(random_batch(9, 16))).all()  # as a graph of tensors would, for canaries
    good = Derainer(OrtSession(write_network(tmp_path / "good.onnx", 0.5, UINT8, finite=True)))
    np.testing.assert_array_equal(good(image), image // 2)
    old = Derainer(OrtSession(write_network(tmp_path / "old.onnx", value, UINT8)))
    assert old(image).shape == image.shape


def test_every_image_of_a_batch_has_its_own_finite():
    output, graph_io = np.full((3, 8, 8, 3), 51, np.uint8), GraphIO("image", 1, ANY)
    answer = graph_io.answer(output, np.array([1, np.nan, -1], np.float32))
    assert np.isnan(answer[1]).all()
    np.testing.assert_array_equal(answer[[0, 2]], np.float32(51) / np.float32(255))
    with pytest.raises(InvalidModel, match="NaN or infinity"):
        graph_io.images(output, np.array([1, 2, np.inf], np.float32))


@pytest.mark.parametrize(
    "more",
    [Tensor("score", "float32", (1,)), Tensor("finite", "uint8", (1,)), Tensor("finite", "float32", (1, 1))],
)
def test_other_outputs_are_refused(more):
    image = [Tensor("input", "uint8", (1, -1, -1, 3)), Tensor("output", "uint8", (1, -1, -1, 3))]
    assert read_graph_io([*image, Tensor("finite", "float32", (1,))], {}) == GraphIO("image", 1)
    with pytest.raises(InputError, match="beside them at most one named finite"):
        read_graph_io([*image, more], {})


def test_graph_of_float16_runs_behind_the_same_contract(tmp_path):
    session = OrtSession(write_network(tmp_path / "m.onnx", scale=0.25, kind=FLOAT16))
    batch = random_batch(16, 24)
    restored = session.run(batch)
    assert (session.graph_io, session.input.dtype) == (GraphIO("tensor16", 8), "float16")
    assert restored.dtype == np.float32
    assert 0 < np.abs(restored - 0.25 * batch).max() < 2**-11  # rounded to 11 bits
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    same = write_network(tmp_path / "same.onnx", scale=1.0, kind=FLOAT16)
    np.testing.assert_array_equal(Derainer(same, provider="cpu")(levels), levels)


def test_float16_on_one_side_alone_is_refused():
    tensors = [Tensor("input", "float16", (1, 3, -1, -1)), Tensor("output", "float32", (1, 3, -1, -1))]
    with pytest.raises(InputError, match="both float16"):
        read_graph_io(tensors, {})


def test_derainer_takes_a_path(tmp_path):
    path = write_network(tmp_path / "m.onnx", scale=1.0)
    image = np.random.default_rng(0).integers(0, 256, (5, 11, 3), dtype=np.uint8)
    for model in (path, str(path)):
        np.testing.assert_array_equal(Derainer(model, provider="cpu")(image), image)


def test_refuses_a_missing_file(tmp_path):
    assert str(tmp_path / "none.onnx") in refusal(tmp_path / "none.onnx")
    assert str(tmp_path) in refusal(tmp_path)  # a folder


def test_refuses_a_broken_file(tmp_path):
    whole = write_network(tmp_path / "m.onnx").read_bytes()
    path = tmp_path / "broken.onnx"
    for content in (b"", b"not an ONNX file\n", whole[:10], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        assert f"{path} is not an ONNX model" in refusal(path)


@pytest.mark.parametrize(
    "network",
    [
        dict(names=("image", "output")),
        dict(names=("input", "restored")),
        dict(kind=TensorProto.DOUBLE),
        dict(kind=FLOAT16, shape=(1, "H", "W", 3)),
        dict(shape=(1, 1, "H", "W")),
        dict(shape=(1, 3, "H", "W", 1)),
        dict(kind=UINT8, shape=(1, 3, "H", "W")),
    ],
)
def test_refuses_another_network(tmp_path, network):
    message = refusal(write_network(tmp_path / "m.onnx", **network))
    assert "another kind of network" in message
    assert network.get("names", ("input", "output"))[0] in message.split("found")[1]


def test_static_graph_takes_its_size_only(tmp_path):
    session = OrtSession(write_network(tmp_path / "m.onnx", shape=(1, 3, 16, 24)))
    image = np.full((15, 20, 3), 100, np.uint8)
    assert set(Derainer(session)(image).ravel()) == {50}
    assert set(Derainer(session)(image.transpose(1, 0, 2)).ravel()) == {50}  # two tiles
    with pytest.raises(InvalidImage, match=r"24x16 pixels, found 16x24 .*without --height"):
        session.run(random_batch(24, 16))
    assert set(Derainer(session)(np.full((33, 24, 3), 100, np.uint8)).ravel()) == {50}  # three tiles of its size


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_checkpoint_is_not_taken_for_a_model(tmp_path, suffix):
    (tmp_path / f"w{suffix}").write_bytes(b"weights")
    with pytest.raises(InvalidModel, match=r"the checkpoint .*; export it first: python -m export.onnx --weights"):
        OrtSession(tmp_path / f"w{suffix}")


def test_says_when_a_run_fails(tmp_path):
    path = write_network(tmp_path / "m.onnx")
    model = onnx.load(path)
    scale = helper.make_tensor("scale", FLOAT, [1, 3, 8, 16], np.ones(3 * 8 * 16))  # fits no other size
    model.graph.initializer[0].CopyFrom(scale)
    onnx.save(model, path)
    with pytest.raises(DeviceError, match="failed on 32x8 pixels") as error:
        OrtSession(path).run(random_batch(8, 32))
    assert "\n" not in str(error.value)


def test_threads(tmp_path):
    path = write_network(tmp_path / "m.onnx")
    assert OrtSession(path, threads=1)._engine.get_session_options().intra_op_num_threads == 1
    assert "found -1" in refusal(path, threads=-1)


def test_a_gpu_is_not_for_the_cpu(tmp_path):
    path = write_network(tmp_path / "m.onnx")
    assert OrtSession(path, "cpu", device=0).provider == "cpu"
    assert "`device`: expected none with the provider cpu" in refusal(path, provider="cpu", device=1)
    assert "`device`: expected at least 0, found -1" in refusal(path, provider="cpu", device=-1)
    with pytest.raises(InputError, match="`device`"):
        Derainer(path, "auto", device=1)


def test_the_gpu_is_the_one_to_which_cuda_gives_the_number(monkeypatch):
    """And not the one of nvidia-smi, which counts otherwise."""
    names = [b"Slow", b"Fast"]

    class Driver:
        def cuInit(self, flags):  # noqa: N802
            return 0

        def cuDeviceGet(self, device, index):  # noqa: N802
            device._obj.value = index
            return 0 if index < len(names) else 101

        def cuDeviceGetName(self, name, size, device):  # noqa: N802
            name.value = names[device.value]
            return 0

        def cuDeviceGetUuid_v2(self, uuid, device):  # noqa: N802
            uuid.raw = bytes([device.value]) * 16
            return 0

    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: Driver())
    assert [machine.cuda_device(i) for i in range(3)] == ["Slow " + "00" * 16, "Fast " + "01" * 16, None]
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert machine.cuda_device(0) is None  # without a driver


def test_refuses_an_unknown_provider(tmp_path):
    assert "auto, cpu, cuda" in refusal(write_network(tmp_path / "m.onnx"), provider="tpu")


def test_refuses_cuda_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    path = write_network(tmp_path / "m.onnx")
    message = refusal(path, provider="cuda")
    assert "only cpu" in message
    assert "onnxruntime-gpu" in message
    assert OrtSession(path, provider="auto").provider == "cpu"


def test_tensorrt_falls_back_to_cuda_and_auto_does_without(tmp_path, monkeypatch):
    """The nodes that TensorRT does not take run on CUDA; compiling them all is nothing to do unasked."""
    asked = []

    class Engine(onnxruntime.InferenceSession):
        def __init__(self, path, options, providers):
            asked.append(providers)
            super().__init__(path, options, providers=["CPUExecutionProvider"])

    every = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: every)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Engine)
    path = write_network(tmp_path / "m.onnx")
    assert "ort-tensorrt does not start" in refusal(path, provider="ort-tensorrt")
    OrtSession(path, provider="auto")
    OrtSession(path, provider="cpu")
    assert [[name for name, _ in providers] for providers in asked] == [every, every[1:], every[2:]]
    assert "expected none with the provider cpu" in refusal(path, provider="auto", device=2)
    assert asked[-1] == [("CUDAExecutionProvider", {"device_id": "2"}), ("CPUExecutionProvider", {})]


def test_cuda_that_does_not_start(tmp_path, monkeypatch, capsys):
    """An ONNX Runtime built for CUDA falls back to the CPU on a machine without it."""

    class Engine(onnxruntime.InferenceSession):
        def __init__(self, path, options, providers):
            assert [name for name, _ in providers] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
            super().__init__(path, options, ["CPUExecutionProvider"])

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcudart.so"))
    monkeypatch.setattr(onnxruntime, "InferenceSession", Engine)
    path = write_network(tmp_path / "m.onnx")
    assert "cuda does not start" in refusal(path, provider="cuda")
    assert OrtSession(path, provider="auto").provider == "cpu"
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "libcudart" in printed.err


def test_shipped_model():
    assert OrtSession().path == SHIPPED
