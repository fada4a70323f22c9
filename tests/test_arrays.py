"""Arrays of other libraries, where they are: on the host for real, on GPUs that are stand-ins, and on a GPU where there
is one."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from runtime import Derainer, DeviceError, InputError, InvalidImage, machine, ort
from runtime.arrays import read
from runtime.manifest import Profile
from runtime.ort import OrtSession
from runtime.session import open_engine
from tests.support.arrays import OnGpu, WithInterface
from tests.support.images import random_image
from tests.support.onnx_files import FLOAT, FLOAT16, UINT8, write_network
from tests.support.tensorrt import Cuda, Library, make_bundle


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def batch(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((1, 3, height, width), dtype=np.float32)


# What an array says of itself


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8", "int64", "complex64"])
def test_numpy(dtype):
    array = np.ones((2, 3, 4), dtype)
    found = read("input", array)
    assert (found.pointer, found.shape, found.dtype) == (array.ctypes.data, (2, 3, 4), dtype)
    assert (found.device, found.is_contiguous, found.writable) == (None, True, True)


def test_order_and_offset():
    array = np.zeros((4, 1, 6), np.float32)
    for view, contiguous in (
        (array[2:], True),
        (array[:, :, ::2], False),
        (array.T, False),
        (array[:1, :, :3], True),
        (array[:, :, :3], False),
        (array[::-1], False),
    ):
        found = read("input", view)
        assert (found.pointer, found.is_contiguous) == (view.ctypes.data, contiguous)
        assert ("not contiguous" in str(found)) is not contiguous


def test_torch():
    torch = pytest.importorskip("torch")
    tensor = torch.rand(1, 3, 8, 16)
    found = read("input", tensor[:, :, 4:])
    assert (found.pointer, found.shape, found.is_contiguous) == (tensor[:, :, 4:].data_ptr(), (1, 3, 4, 16), False)
    assert not read("input", tensor.to(memory_format=torch.channels_last)).is_contiguous
    assert read("input", tensor.bfloat16()).dtype == "bfloat16"
    assert "gradient" in refusal(read, "input", tensor.requires_grad_())


def test_memory_is_borrowed():
    array = np.ones((8, 8), np.float32)
    before = sys.getrefcount(array)
    found = read("input", array)
    assert sys.getrefcount(array) > before
    del found
    assert sys.getrefcount(array) == before


def test_on_a_gpu():
    cuda = Cuda((8, 6), (8, 6))
    array = OnGpu(cuda, batch(8, 8), device=1)
    assert str(read("input", array, stream=9)) == "float32 (1, 3, 8, 8) on GPU 1"
    read("input", array)
    assert array.streams == [9, 1]  # in DLPack, 1 is what is 0 in CUDA
    for read_only in (False, True):
        found = read("input", WithInterface(array, 77, read_only))
        assert (found.pointer, found.stream, found.writable) == (array.pointer, 77, not read_only)
        assert str(found) == f"float32 (1, 3, 8, 8) on a GPU{', read-only' * read_only}"
    spaced = WithInterface(array)
    spaced.__cuda_array_interface__["strides"] = (1536, 512, 64, 4)
    assert not read("input", spaced).is_contiguous
    spaced.__cuda_array_interface__["strides"] = (768, 256, 32, 4)
    assert read("input", spaced).is_contiguous
    spaced.__cuda_array_interface__["typestr"] = ">f4"
    assert read("input", spaced).dtype == ">f4"


def test_what_is_no_array():
    assert "`input`: expected an array with __dlpack__ or __cuda_array_interface__, found list" in refusal(
        read, "input", [1]
    )
    elsewhere = SimpleNamespace(__dlpack_device__=lambda: (7, 0), __dlpack__=np.zeros(3).__dlpack__)
    assert "DLPack's kind 7" in refusal(read, "input", elsewhere)
    broken = SimpleNamespace(__cuda_array_interface__={"shape": (1,)})
    assert "does not hand over its memory" in refusal(read, "input", broken)


# ONNX Runtime


@pytest.mark.parametrize(("kind", "dtype"), [(FLOAT, np.float32), (FLOAT16, np.float16)])
def test_onnx_runtime_reads_and_writes_tensors_where_they_are(tmp_path, kind, dtype):
    session = OrtSession(write_network(tmp_path / "m.onnx", kind=kind), "cpu")
    source = batch(8, 16).astype(dtype)
    target = np.full_like(source, np.nan)
    session.enqueue(source, target)
    np.testing.assert_array_equal(target, source * dtype(0.5))
    source[...] = np.inf
    session.enqueue(source, target)
    assert np.isinf(target).all()  # neither clamped nor refused


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_onnx_runtime_reads_and_writes_images_where_they_are(tmp_path, value):
    session = OrtSession(write_network(tmp_path / "m.onnx", value, UINT8, finite=True), "cpu")
    source = random_image(9, 13)[None]
    target, finite = np.zeros_like(source), np.full(1, 7, np.float32)
    session.enqueue(source, target)
    assert finite[0] == 7
    session.enqueue(source, target, finite=finite)
    assert np.isfinite(finite).all() == np.isfinite(value)
    if np.isfinite(value):
        np.testing.assert_array_equal(target[0], Derainer(session)(source[0]))


def test_torch_in_onnx_runtime(tmp_path):
    torch = pytest.importorskip("torch")
    session = OrtSession(write_network(tmp_path / "m.onnx"), "cpu")
    source = torch.rand(1, 3, 16, 8)
    target = torch.empty_like(source)
    session.enqueue(source, target)
    assert torch.equal(target, source * 0.5)


def test_arrays_that_do_not_fit_are_refused(tmp_path):
    session = OrtSession(write_network(tmp_path / "m.onnx"), "cpu")
    good = batch(8, 16)
    for source, target, line in (
        (good.astype(np.float64), good, "`input`: .*found float64"),
        (
            good[0],
            good,
            r"`input`: .*\(1, 3, H, W\), H and W multiples of 8, on the host, found .*\(3, 8, 16\)",
        ),
        (batch(8, 12), good, r"found float32 \(1, 3, 8, 12\)"),
        (good[:, :, :0], good, r"found float32 \(1, 3, 0, 16\)"),
        (np.zeros((1, 8, 16, 3), np.float32), good, r"found float32 \(1, 8, 16, 3\)"),
        (batch(8, 32)[..., ::2], good, "`input`: expected a contiguous array, .*that is not contiguous"),
        (good, batch(16, 8), r"`output`: .*float32 \(1, 3, 8, 16\) on the host, found float32 \(1, 3, 16, 8\)"),
        (good, good.astype(np.float16), "`output`: .*found float16"),
        (OnGpu(Cuda(), good), good, "`input`: .*on the host, found float32 .* on GPU 0"),
        (good, WithInterface(OnGpu(Cuda(), good)), "`output`: .*on the host, found float32 .* on a GPU"),
    ):
        with pytest.raises(InvalidImage, match=line):
            session.enqueue(source, target)
    assert "`finite`: expected a graph that" in refusal(session.enqueue, good, good, finite=np.zeros(1, np.float32))
    locked = good.copy()
    locked.setflags(write=False)
    assert "`output`: ndarray does not hand over" in refusal(session.enqueue, good, locked)
    fixed = OrtSession(write_network(tmp_path / "fixed.onnx", shape=(1, 3, 16, 24)), "cpu")
    assert "takes only images of 24x16" in refusal(fixed.enqueue, good, good.copy())
    session.close()
    with pytest.raises(RuntimeError, match="closed"):
        session.enqueue(good, good.copy())


def test_onnx_runtime_on_a_gpu_waits_for_the_callers_streams_first(tmp_path, monkeypatch):
    """With stand-ins for the engine and the wait."""
    cuda, told = Cuda((8, 6), (8, 6)), []
    session = OrtSession(write_network(tmp_path / "m.onnx"), "cpu")

    class Binding:
        def bind_input(self, *arguments):
            told.append(("in", *arguments))

        def bind_output(self, *arguments):
            told.append(("out", *arguments))

    session._gpu = 1
    session._engine = SimpleNamespace(io_binding=Binding, run_with_iobinding=lambda binding: told.append("run"))
    monkeypatch.setattr(ort, "wait_for_stream", lambda *arguments: told.append(arguments))
    source, target = (OnGpu(cuda, batch(8, 16), device=1) for _ in range(2))
    session.enqueue(source, WithInterface(target, stream=77), stream=5)
    shape = (1, 3, 8, 16)
    assert sorted(told[:2]) == [(1, 5), (1, 77)]
    assert told[2:] == [
        ("in", "input", "cuda", 1, np.float32, shape, source.pointer),
        ("out", "output", "cuda", 1, np.float32, shape, target.pointer),
        "run",
    ]
    other = OnGpu(cuda, batch(8, 16), device=0)
    assert "on GPU 1, found float32 (1, 3, 8, 16) on GPU 0" in refusal(session.enqueue, other, target)


def test_the_wait_is_on_the_gpu_of_the_stream(monkeypatch):
    told = []

    class Driver:
        code = 0

        def __getattr__(self, name):
            def call(*arguments):
                told.append(name)
                if name == "cuDeviceGet":
                    arguments[0]._obj.value = arguments[1]
                if name == "cuDevicePrimaryCtxRetain":
                    assert arguments[1].value == 1
                    arguments[0]._obj.value = 1234
                if name == "cuStreamSynchronize":
                    assert arguments[0].value == 99
                    return self.code
                return 0

            return call

    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: Driver())
    machine.wait_for_stream(1, 99)
    assert told[2:] == [
        "cuDevicePrimaryCtxRetain",
        "cuCtxPushCurrent_v2",
        "cuStreamSynchronize",
        "cuCtxPopCurrent_v2",
        "cuDevicePrimaryCtxRelease_v2",
    ]
    Driver.code = 700
    with pytest.raises(DeviceError, match="CUDA failed with 700"):
        machine.wait_for_stream(1, 99)
    assert told[-2:] == ["cuCtxPopCurrent_v2", "cuDevicePrimaryCtxRelease_v2"]


@pytest.mark.parametrize(("init", "count", "found"), [(0, 2, True), (0, 0, False), (100, 2, False)])
def test_a_gpu_is_found_by_the_driver_alone(monkeypatch, init, count, found):
    def tell(pointer):
        pointer._obj.value = count
        return 0

    driver = SimpleNamespace(cuInit=lambda flags: init, cuDeviceGetCount=tell)
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: driver)
    assert machine.has_gpu() is found


def test_there_is_no_gpu_without_a_driver(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(machine.ctypes, "CDLL", missing)
    assert not machine.has_gpu()


# TensorRT


@pytest.fixture
def install(monkeypatch):
    """Put the stand-ins in place of the real modules."""

    def install(cuda: Cuda | None = None, **options) -> tuple[Cuda, Library]:
        cuda = cuda or Cuda()
        library = Library(cuda, **options)
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
        monkeypatch.setitem(sys.modules, "tensorrt", library)
        return cuda, library

    return install


def test_an_engine_works_on_the_stream_of_its_caller(tmp_path, install):
    cuda, _ = install()
    session = open_engine(make_bundle(tmp_path / "bundle", {}))
    x = batch(8, 16)
    source, target = OnGpu(cuda, x), OnGpu(cuda, np.zeros_like(x))
    stream = cuda.callers_stream()
    before = len(cuda.calls)
    for seed in range(3):
        source.numpy[...] = batch(8, 16, seed)
        session.enqueue(source, target, stream)
        assert (target.numpy == 0).all()  # nobody has waited for it
        cuda.cudaStreamSynchronize(stream)
        np.testing.assert_array_equal(target.numpy, 1 - source.numpy)
        target.numpy[...] = 0
    assert source.streams == [stream] * 3
    assert [call for call in cuda.calls[before:] if "malloc" not in call] == ["enqueue", "synchronize"] * 3  # no copy
    again = OnGpu(cuda, np.zeros_like(x))
    session.enqueue(source, again, stream)
    cuda.cudaStreamSynchronize(stream)
    assert (target.numpy == 0).all()
    np.testing.assert_array_equal(again.numpy, 1 - source.numpy)


def test_runs_wait_for_the_callers_work_and_the_other_way_round(tmp_path, install):
    """They share the memory between the layers, which a larger image, and the end, take away."""
    cuda, library = install()
    session = open_engine(make_bundle(tmp_path / "bundle", {}), sizes=2)
    source, target, more = (OnGpu(cuda, batch(8, 16)) for _ in range(3))
    stream, other = cuda.callers_stream(), cuda.callers_stream()

    def enqueued(then) -> None:
        target.numpy[...] = 0
        session.enqueue(source, target, stream)
        assert (target.numpy == 0).all()
        then()
        np.testing.assert_array_equal(target.numpy, 1 - source.numpy)

    def run(height: int, width: int) -> None:
        np.testing.assert_array_equal(session.run(batch(height, width)), 1 - batch(height, width))

    def enqueue_elsewhere() -> None:
        session.enqueue(source, more, other)
        cuda.cudaStreamSynchronize(other)
        np.testing.assert_array_equal(more.numpy, 1 - source.numpy)

    enqueued(lambda: run(8, 16))
    enqueued(lambda: run(8, 16))  # by a CUDA graph
    enqueued(lambda: run(32, 32))  # with more memory
    enqueued(lambda: (run(8, 8), run(8, 24)))  # in place of its context
    enqueued(enqueue_elsewhere)
    enqueued(session.close)
    with pytest.raises(RuntimeError, match="closed"):
        session.enqueue(source, target, stream)
    library.contexts.clear()
    assert set(cuda.blocks) == {source.pointer, target.pointer, more.pointer}
    assert (cuda.graphs, cuda.events) == ({}, {})


def test_work_that_an_array_says_to_be_under_way_is_waited_for(tmp_path, install):
    cuda, _ = install()
    session = open_engine(make_bundle(tmp_path / "bundle", {}))
    source, target = (OnGpu(cuda, np.zeros((1, 3, 8, 8), np.float32)) for _ in range(2))
    stream, producer = cuda.callers_stream(), cuda.callers_stream()
    cuda.enqueue(producer, lambda: source.numpy.fill(0.25))
    session.enqueue(WithInterface(source, producer), WithInterface(target), stream)
    cuda.cudaStreamSynchronize(stream)
    assert (target.numpy == 0.75).all()


@pytest.mark.parametrize("told", [0.5, np.nan])
def test_an_engine_of_images_tells_its_caller(tmp_path, install, told):
    cuda, _ = install(dtype="uint8", finite=told)
    profile = {"profiles": (Profile((1, 1), (8, 8), (40, 40)),)}
    session = open_engine(make_bundle(tmp_path / "bundle", profile, io="image"))
    image = random_image(9, 13)[None]
    source, target = OnGpu(cuda, image), OnGpu(cuda, image)
    finite, stream = OnGpu(cuda, np.full(1, 7, np.float32)), cuda.callers_stream()
    for argument in (None, finite, None):
        finite.numpy[...] = 7
        session.enqueue(source, target, stream, argument)
        cuda.cudaStreamSynchronize(stream)
        np.testing.assert_array_equal(target.numpy, 255 - image)
        np.testing.assert_array_equal(finite.numpy, told if argument else 7)


def test_engines_refuse_arrays_that_do_not_fit(tmp_path, install):
    cuda, library = install(Cuda((8, 6), (8, 6)))
    session = open_engine(make_bundle(tmp_path / "bundle", {}), device=1)
    good, large = (OnGpu(cuda, batch(*size), device=1) for size in ((8, 16), (32, 40)))
    for source, target, line in (
        (batch(8, 16), good, "on GPU 1, found float32 .* on the host"),
        (OnGpu(cuda, batch(8, 16), device=0), good, "on GPU 1, found float32 .* on GPU 0"),
        (OnGpu(cuda, batch(8, 12), device=1), good, "multiples of 8"),
        (large, large, "8x8 to 32x32 or 8x40 to 16x128, found 32x40"),
        (good, WithInterface(good, read_only=True), "`output`: .*read-only"),
    ):
        with pytest.raises(InvalidImage, match=line):
            session.enqueue(source, target)
    assert "`finite`: expected a graph that says" in refusal(session.enqueue, good, good, finite=good)
    library.failing = True
    with pytest.raises(DeviceError, match="failed on 16x8 pixels: out of luck"):
        session.enqueue(good, good)
    assert cuda.current == 0


# On a GPU, where there is one


def has_cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available() and "cuda" in ort.installed()


@pytest.mark.skipif(not has_cuda(), reason="needs a GPU, PyTorch and ONNX Runtime for CUDA")
@pytest.mark.parametrize("on_default_stream", [True, False])
def test_torch_on_a_gpu(tmp_path, on_default_stream):
    import torch

    last = torch.cuda.device_count() - 1
    tensors = OrtSession(write_network(tmp_path / "tensors.onnx"), "cuda", device=last)
    assert tensors.identity["device"].startswith(torch.cuda.get_device_name(last))
    images = OrtSession(write_network(tmp_path / "images.onnx", np.nan, UINT8, finite=True), "cuda", device=last)
    with torch.cuda.device(last):
        stream = torch.cuda.default_stream() if on_default_stream else torch.cuda.Stream()
        with torch.cuda.stream(stream):
            source, mixing = (torch.rand(1, 3, 96, 96, device="cuda") for _ in range(2))
            target = torch.empty_like(source)
            for _ in range(10):
                source = source @ mixing / 96  # under way, and has to be waited for
                tensors.enqueue(source, target, stream.cuda_stream)
                assert torch.equal(target, source * 0.5)
            image = torch.randint(0, 256, (1, 61, 93, 3), dtype=torch.uint8, device="cuda")
            finite = torch.zeros(1, device="cuda")
            images.enqueue(image, torch.empty_like(image), stream.cuda_stream, finite)
            assert finite.isnan().all()
    with pytest.raises(InvalidImage, match="on the host"):
        tensors.enqueue(source.cpu(), target)


def test_several_images_at_once(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 16, 3), dtype=np.uint8)
    output, finite = np.empty_like(images), np.full(3, np.nan, np.float32)
    some = OrtSession(write_network(tmp_path / "any.onnx", 0.5, UINT8, shape=("B", "H", "W", 3), finite=True), "cpu")
    some.enqueue(images, output, finite=finite)
    np.testing.assert_array_equal(output, images // 2)
    assert np.isfinite(finite).all()
    with pytest.raises(InvalidImage, match=r"`finite`: expected .*\(3,\)"):
        some.enqueue(images, output, finite=finite[:1])
    two = OrtSession(write_network(tmp_path / "two.onnx", 0.5, UINT8, shape=(2, "H", "W", 3)), "cpu")
    with pytest.raises(InvalidImage, match=r"`input`: expected .*\(2, H, W, 3\)"):
        two.enqueue(images, output)
    two.enqueue(images[:2], output[:2])
