"""The TensorRT session: on stand-ins for CUDA and the library that record what is asked of them, and up to the missing
driver on the real ones."""

from __future__ import annotations

import gc
import os
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from runtime import trt
from runtime.bundle import Bundle
from runtime.errors import DerainError, DeviceError, InputError, InvalidImage, InvalidModel, OutOfMemory
from runtime.manifest import Profile
from runtime.pixels import ANY, to_batch
from runtime.session import Derainer, open_engine
from runtime.trt import TrtSession, cache_path
from tests.support.tensorrt import PROFILES, Code, Cuda, Library, has_driver, make_bundle


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return make_bundle(tmp_path / "bundle", {})


@pytest.fixture
def install(monkeypatch):
    """Put the stand-ins in place of the real modules."""

    def install(cuda: Cuda | None = None, library: Library | None = None, **options) -> tuple[Cuda, Library]:
        cuda = cuda or Cuda()
        library = library or Library(cuda, **options)
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
        for name in ("tensorrt", "tensorrt_rtx_libs", "tensorrt_rtx_bindings"):
            monkeypatch.setitem(sys.modules, name, library)
        return cuda, library

    return install


def batch(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((1, 3, height, width), dtype=np.float32)


def check(session: TrtSession, height: int, width: int, seed: int = 0) -> None:
    x = batch(height, width, seed)
    y = session.run(x)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, 1 - x)


def refusal(bundle: Bundle) -> str:
    with pytest.raises(DerainError) as caught:
        open_engine(bundle)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Running


def test_memory_is_taken_once_for_the_largest_size(bundle, install):
    cuda, _ = install()
    session = open_engine(bundle)
    assert session.multiple == 8
    assert session.provider == "tensorrt"
    assert cuda.calls == ["stream", *["malloc 24576"] * 4]  # 16 x 128 x 3 x 4 bytes, here and there, in and out
    check(session, 8, 16)
    check(session, 8, 16, seed=1)
    check(session, 8, 8)
    assert cuda.calls.count("malloc 24576") == 4
    assert [c for c in cuda.calls if "malloc" in c][4:] == [f"malloc {4 * 8 * 16 * 3}"]


def test_a_graph_is_captured_in_the_second_run_at_a_size(bundle, install):
    cuda, library = install()
    session = open_engine(bundle)
    runs = []
    for seed, width in enumerate((16, 16, 16, 8, 16)):
        start = len(cuda.calls)
        check(session, 8, width, seed)
        runs.append([call for call in cuda.calls[start:] if "malloc" not in call])
    replayed = ["up", "launch", "down", "synchronize"]
    assert runs[0] == ["up", "enqueue", "down", "synchronize"]
    assert runs[1] == ["up", "begin", "enqueue", "end", "instantiate", "destroy captured", *replayed[1:]]
    assert runs[2] == replayed
    assert runs[3] == runs[0]
    assert runs[4] == replayed
    assert [context.shape for context in library.contexts] == [(1, 3, 8, 16), (1, 3, 8, 8)]


def test_an_answer_is_the_callers_own(bundle, install):
    install()
    session = open_engine(bundle)
    answer = session.run(batch(8, 8))
    session.run(batch(8, 8, seed=1))
    np.testing.assert_array_equal(answer, 1 - batch(8, 8))


def test_the_profile_is_chosen_by_size(bundle, install):
    _, library = install()
    session = open_engine(bundle)
    for height, width, profile in ((32, 32, 0), (16, 48, 1), (8, 8, 0), (8, 128, 1)):
        check(session, height, width)
        assert library.contexts[-1].profile == profile
    with pytest.raises(InvalidImage, match="of height x width 8x8 to 32x32 or 8x40 to 16x128, found 32x40"):
        session.run(batch(32, 40))


def test_larger_images_are_cut_to_the_profile_that_takes_fewest_tiles(bundle, install):
    _, library = install()
    derain = Derainer(open_engine(bundle))
    for size, tile in (((32, 40), (32, 32)), ((30, 32), (32, 32)), ((40, 36), (16, 40)), ((99, 200), (16, 128))):
        assert derain.plan(*size).tile == tile
        image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        np.testing.assert_array_equal(derain(image), 255 - image)
        assert library.contexts[-1].shape == (1, 3, *tile)
    with pytest.raises(InputError, match="is known only with the provider cpu"):
        Derainer(open_engine(bundle), memory=10**9)


def test_the_longest_unused_size_goes_first(bundle, install):
    cuda, library = install()
    session = open_engine(bundle, sizes=2)
    for width in (32, 32, 24, 24, 32, 16, 16, 32):  # 16 takes the place of 24
        check(session, 8, width)
    assert len(library.contexts) == 3
    assert cuda.calls.count("destroy graph") == 1
    check(session, 8, 24)
    assert len(library.contexts) == 4


def test_where_memory_grows_the_graphs_in_it_go(bundle, install):
    cuda, library = install()
    session = open_engine(bundle)
    for width in (8, 8, 16, 16, 8, 8, 8):
        check(session, 8, width)
    assert [context.shape[3] for context in library.contexts] == [8, 16, 8]
    assert cuda.calls.index("destroy graph") < cuda.calls.index("free") < cuda.calls.index("malloc 1536")
    assert len(cuda.graphs) == 2


SMALL_IN_BATCHES = (Profile((8, 8), (16, 16), (32, 32)), Profile((8, 8), (16, 16), (16, 16), batch=(2, 4, 4)))


def test_images_of_a_size_go_through_the_profile_that_takes_so_many(tmp_path, install):
    cuda, library = install()
    session = open_engine(make_bundle(tmp_path / "bundle", {"profiles": SMALL_IN_BATCHES}, batch=ANY))
    assert cuda.calls.count("malloc 12288") == 4  # 4 x 16 x 16 x 3 x 4 bytes, as many as one of 32 x 32
    assert [session.max_batch(size) for size in ((16, 16), (24, 16))] == [4, 1]
    derain = Derainer(session)
    assert [derain.batch_size(*size) for size in ((9, 16), (17, 16), (64, 64))] == [4, 1, 1]
    images = [np.random.default_rng(i).integers(0, 256, (9 + i % 2, 16, 3), dtype=np.uint8) for i in range(7)]
    large = np.random.default_rng(7).integers(0, 256, (40, 24, 3), dtype=np.uint8)
    restored = derain.run_batch([*images[:3], large, *images[3:]])
    for found, image in zip(restored, (*images[:3], large, *images[3:]), strict=True):
        np.testing.assert_array_equal(found, 255 - image)
    shapes = [(context.profile, context.shape) for context in library.contexts]
    assert shapes[:2] == [(1, (4, 3, 16, 16)), (1, (3, 3, 16, 16))]
    assert {shape[0] for _, shape in shapes[2:]} == {1}  # tiles
    session.run(batch(16, 16))
    assert (library.contexts[-1].profile, library.contexts[-1].shape) == (0, (1, 3, 16, 16))
    with pytest.raises(InvalidImage, match=r"or 8x8 to 16x16, up to 4 at once, found 5 of 16x16"):
        session.run(np.concatenate([batch(16, 16)] * 5))


@pytest.mark.parametrize("io", ["tensor", "image"])
def test_a_profile_of_more_images_is_filled_up(tmp_path, install, io):
    _, library = install(dtype="uint8" if io == "image" else "float32", finite=0.5 if io == "image" else None)
    profiles = {"profiles": (Profile((8, 8), (16, 16), (16, 16), batch=(4, 4, 4)),)}
    derain = Derainer(open_engine(make_bundle(tmp_path / "bundle", profiles, io=io, batch=4)))
    images = [np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8) for i in range(6)]
    for found, image in zip((*derain.run_batch(images), derain(images[0])), (*images, images[0]), strict=True):
        np.testing.assert_array_equal(found, 255 - image)
    assert {context.shape[0] for context in library.contexts} == {4}
    assert len(library.contexts) == 1


def test_images_go_in_and_come_out(tmp_path, install):
    install(dtype="uint8")
    bundle = make_bundle(tmp_path / "bundle", {"profiles": (Profile((1, 1), (8, 8), (40, 40)),)}, io="image")
    derain = Derainer(open_engine(bundle))
    image = np.random.default_rng(0).integers(0, 256, (13, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(derain(image), 255 - image)
    tall = np.random.default_rng(1).integers(0, 256, (90, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(derain(tall), 255 - tall)  # in tiles


@pytest.mark.parametrize("finite", [0.5, np.nan, np.inf])
def test_an_engine_of_images_says_whether_its_answer_was_finite(tmp_path, install, finite):
    cuda, library = install(dtype="uint8", finite=finite)
    bundle = make_bundle(tmp_path / "bundle", {"profiles": (Profile((1, 1), (8, 8), (40, 40)),)}, io="image")
    derain = Derainer(open_engine(bundle))
    for size in ((13, 7), (90, 7)):  # the second in tiles
        image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        for _ in range(2):  # the second by a CUDA graph
            if finite == 0.5:
                np.testing.assert_array_equal(derain(image), 255 - image)
            else:
                with pytest.raises(InvalidModel, match="NaN or infinity"):
                    derain(image)
    assert "malloc 4" in cuda.calls
    library.contexts.clear()
    derain.close()
    assert cuda.blocks == {}


def test_float16_goes_in_and_comes_out(tmp_path, install):
    install(dtype="float16")
    session = open_engine(make_bundle(tmp_path / "bundle", {}, io="tensor16"))
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    batch = to_batch(image)
    np.testing.assert_array_equal(session.run(batch), (1 - batch.astype(np.float16)).astype(np.float32))
    np.testing.assert_array_equal(Derainer(session)(image), 255 - image)


def test_threads_take_turns(bundle, install):
    install()
    session = open_engine(bundle)
    failures = []

    def work(seed: int) -> None:
        try:
            for i in range(20):
                check(session, 8, 8 * (1 + (seed + i) % 3), seed)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("explicit", [True, False])
def test_everything_is_freed(bundle, install, explicit):
    cuda, library = install()
    session = open_engine(bundle)
    for width in (8, 8, 16, 16):
        check(session, 8, width)
    if explicit:
        session.close()
        session.close()
        with pytest.raises(RuntimeError, match="closed"):
            session.run(batch(8, 8))
    library.contexts.clear()
    del session
    gc.collect()
    assert (cuda.blocks, cuda.graphs, cuda.captured, cuda.calls[-1]) == ({}, {}, {}, "destroy stream")


def test_memory_that_does_not_suffice(bundle, install):
    install(Cuda(memory=4 * 24576 + 1000))
    session = open_engine(bundle)
    with pytest.raises(OutOfMemory, match="cudaErrorMemoryAllocation; use smaller images"):
        session.run(batch(8, 16))
    check(session, 8, 8)  # what is left is in order
    assert "cudaErrorMemoryAllocation" in refusal(bundle)


@pytest.mark.parametrize(("fault", "reason"), [("failing", "out of luck"), ("unmeasured", "shapes that no one knows")])
def test_a_run_that_fails_tells_the_reason(bundle, install, fault, reason):
    """`unmeasured`: no memory is known for a size, which is an error."""
    _, library = install()
    session = open_engine(bundle)
    setattr(library, fault, True)
    with pytest.raises(DeviceError, match=f"failed on 8x8 pixels: {reason}"):
        session.run(batch(8, 8))
    setattr(library, fault, False)
    check(session, 8, 8)


@pytest.mark.parametrize(
    ("fault", "reason"), [("failing", "out of luck"), ("synchronizes", "cudaErrorStreamCaptureInvalidated")]
)
def test_a_size_that_cannot_be_captured(bundle, install, fault, reason):
    cuda, library = install()
    session = open_engine(bundle)
    check(session, 8, 8)
    setattr(library, fault, True)
    for _ in range(2):
        with pytest.raises(DerainError) as caught:
            session.run(batch(8, 8))
        line = f"0.engine cannot be captured in a CUDA graph: {reason}; give TrtSession cuda_graphs=False"
        assert str(caught.value).endswith(line)
    assert (cuda.capturing, cuda.captured) == (None, {})
    setattr(library, fault, False)
    check(session, 8, 8)


def test_without_cuda_graphs(bundle, install):
    cuda, library = install()
    library.synchronizes = True
    session = open_engine(bundle, cuda_graphs=False)
    for seed in range(3):
        check(session, 8, 8, seed)
    assert "begin" not in cuda.calls


@pytest.mark.parametrize("explicit", [True, False])
def test_a_session_stays_on_the_gpu_that_was_current(bundle, install, explicit):
    cuda, library = install(Cuda((7, 5), (8, 6)))
    assert "for this GPU of compute capability 7.5" in refusal(bundle)
    cuda.cudaSetDevice(1)
    assert trt.gpu() == "8.6"
    session = open_engine(bundle)
    assert cuda.current == 1
    failures: list[BaseException] = []

    def work(session: TrtSession) -> None:
        """In a new thread, where the first GPU is current."""
        try:
            for seed in range(3):
                check(session, 8, 8, seed)
            assert cuda.current == 0
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, args=(session,))
    thread.start()
    thread.join()
    assert failures == []
    cuda.cudaSetDevice(0)
    library.failing = True
    with pytest.raises(DeviceError, match="failed"):
        session.run(batch(8, 16))
    assert cuda.current == 0
    if explicit:
        session.close()
    library.contexts.clear()
    del session
    gc.collect()
    assert (cuda.current, cuda.used, cuda.blocks) == (0, {1}, {})


def test_the_gpu_that_is_asked_for(bundle, install):
    cuda, library = install(Cuda((7, 5), (8, 6)))
    for device in (2, -1):
        with pytest.raises(DeviceError, match=f"`device`: expected a GPU from 0 to 1, found {device}"):
            open_engine(bundle, device)
    assert library.runtimes == []
    session = open_engine(bundle, 1)
    assert session.identity["device"] == "Stand-in 8.6 " + "01" * 16
    check(session, 8, 8)
    assert cuda.current == 0
    session.close()
    library.contexts.clear()
    assert (cuda.used, cuda.blocks) == ({1}, {})
    np.testing.assert_array_equal(Derainer(bundle.folder, "tensorrt", device=1)(np.zeros((8, 8, 3), np.uint8)), 255)


def test_tensorrt_without_runtime_configs(tmp_path, install):
    _, library = install(version="10.1.0")
    check(open_engine(make_bundle(tmp_path / "bundle", {"version": "10.1.0"})), 8, 8)
    assert library.configs == []


# TensorRT for RTX


@pytest.fixture
def rtx(tmp_path) -> Bundle:
    return make_bundle(tmp_path / "bundle", {"flavor": "rtx"})


def test_rtx_captures_graphs_itself_and_keeps_its_kernels(rtx, install):
    cuda, library = install()
    session = open_engine(rtx)
    for _ in range(3):
        check(session, 8, 8)
    session.close()
    assert "begin" not in cuda.calls
    assert library.configs[0].cuda_graph_strategy == "whole"
    assert library.configs[0].cache is not None
    assert library.configs[0].deserialized is None
    path = cache_path(rtx, rtx.manifest.engines[0])
    assert path.read_bytes() == b"kernels"
    assert path.parent == rtx.folder.parent
    open_engine(rtx)
    assert library.configs[1].deserialized == b"kernels"


def test_rtx_without_cuda_graphs(rtx, install):
    _, library = install()
    check(open_engine(rtx, cuda_graphs=False), 8, 8)
    assert library.configs[0].cuda_graph_strategy == "disabled"


def test_a_cache_is_read_again_whatever_new_files_permit(rtx, install):
    _, library = install()
    mask = os.umask(0o002)
    try:
        open_engine(rtx).close()
    finally:
        os.umask(mask)
    assert cache_path(rtx, rtx.manifest.engines[0]).stat().st_mode & 0o777 == 0o600
    open_engine(rtx)
    assert library.configs[1].deserialized == b"kernels"


def test_a_cache_that_others_could_write_is_not_read(rtx, install):
    _, library = install()
    path = cache_path(rtx, rtx.manifest.engines[0])
    path.write_bytes(b"code")
    path.chmod(0o666)
    open_engine(rtx)
    assert library.configs[0].deserialized is None


def test_a_cache_that_does_not_fit_or_cannot_be_written_does_no_harm(rtx, install, monkeypatch):
    _, library = install()
    library.accepts_cache = False
    path = cache_path(rtx, rtx.manifest.engines[0])
    path.write_bytes(b"of another GPU")
    session = open_engine(rtx)
    check(session, 8, 8)
    monkeypatch.setattr(trt, "writing", lambda path, mode: (_ for _ in ()).throw(PermissionError(path)))
    session.close()
    assert path.read_bytes() == b"of another GPU"


# What is chosen, and what is refused


def test_the_newest_engine_that_this_machine_can_run(tmp_path, install):
    install()
    engines = {}, {"profiles": PROFILES[:1]}, {"compute_capabilities": ("8.9", "9.0")}, {"version": "10.9"}
    bundle = make_bundle(tmp_path / "bundle", *engines)
    assert open_engine(bundle).path == bundle.folder / "1.engine"


@pytest.mark.parametrize(
    ("options", "version", "capability", "runs"),
    [
        ({}, "11.4.1", (8, 6), False),
        ({"flags": {"version_compatible": True}}, "11.4.1", (8, 6), True),
        ({"flags": {"version_compatible": True}}, "12.0.0", (8, 6), True),
        ({"flags": {"version_compatible": True}}, "11.3.9", (8, 6), False),
        ({"flags": {"version_compatible": False}}, "11.4.0", (8, 6), True),
        ({"flags": {"version_compatible": False}}, "11.4.1", (8, 6), False),
        ({"flags": {"version_compatible": "no"}}, "11.4.0", (8, 6), True),
        ({}, "11.4.0", (9, 0), False),
        ({"flags": {"hardware_compatible": True}}, "11.4.0", (9, 0), True),
        ({"flags": {"hardware_compatible": True}}, "11.4.0", (7, 5), False),
        ({"flags": {"hardware_compatible": False}}, "11.4.0", (9, 0), False),
        ({"compute_capabilities": ("8.6", "12.0")}, "11.4.0", (12, 0), True),
    ],
)
def test_version_and_gpu(tmp_path, install, options, version, capability, runs):
    _, library = install(Cuda(capability), version=version)
    bundle = make_bundle(tmp_path / "bundle", options)
    if runs:
        check(open_engine(bundle), 8, 8)
        trusted = options.get("flags") == {"version_compatible": True}
        assert library.runtimes[0].engine_host_code_allowed is trusted
    else:
        assert "expected" in refusal(bundle)
        assert library.runtimes == []


def test_another_version_is_named(bundle, install):
    install(version="11.5.0")
    line = refusal(bundle)
    assert "expected TensorRT 11.4.0, which it was built with, found 11.5.0; install that one or build" in line


def test_another_gpu_is_named_with_the_command_that_helps(bundle, install):
    install(Cuda((12, 0)))
    line = refusal(bundle)
    assert "expected an engine for this GPU of compute capability 12.0, found tensorrt for 8.6; add one: " in line
    assert f"python -m export.tensorrt --onnx {bundle.folder / 'model.onnx'} --output {bundle.folder} with" in line


def test_a_bundle_without_engines(tmp_path, install):
    install()
    assert "found no engine; add one" in refusal(make_bundle(tmp_path / "bundle"))


@pytest.mark.parametrize(("devices", "code"), [(-1, "cudaErrorInsufficientDriver"), (0, "cudaSuccess")])
def test_without_a_gpu_the_library_is_not_touched(bundle, install, monkeypatch, devices, code):
    install(Cuda(devices=devices))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert f"CUDA finds no NVIDIA GPU with a driver ({code})" in refusal(bundle)


def test_without_cudas_bindings(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    assert "pip install cuda-bindings" in refusal(bundle)


def test_without_the_library(bundle, install, monkeypatch):
    install()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "TensorRT is not installed" in (line := refusal(bundle))
    assert line.endswith(": pip install tensorrt, which fetches it from NVIDIA's package index, or use the SDK")


def test_without_rtx(rtx, install, monkeypatch):
    install()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    assert refusal(rtx).endswith(": pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings")


def test_an_engine_is_verified_before_it_is_deserialised(bundle, install):
    _, library = install()
    (bundle.folder / "0.engine").write_bytes(b"evil")
    assert "expected SHA-256" in refusal(bundle)
    assert library.plans == []


def test_an_engine_that_the_library_refuses(tmp_path, install):
    install()
    line = refusal(make_bundle(tmp_path / "bundle", {}, plan=b"other"))
    assert "TensorRT refuses" in line
    assert "a plan of another kind; build it again" in line


def test_weights_are_put_back_from_the_verified_model(tmp_path, install):
    _, library = install()
    bundle = make_bundle(tmp_path / "bundle", {"flags": {"strip_weights": True}})
    open_engine(bundle)
    assert library.refits == [b"weights", "refitted"]
    open_engine(make_bundle(tmp_path / "whole", {"flags": {"strip_weights": False}}))
    assert len(library.refits) == 2
    (bundle.folder / "model.onnx").write_bytes(b"Weights")
    assert "expected SHA-256" in refusal(bundle)


# The real libraries, on a machine without a driver


def test_the_real_bindings_of_cuda_say_what_is_missing(rtx):
    pytest.importorskip("cuda.bindings.runtime")
    if has_driver():
        pytest.skip("there is a GPU")
    assert "CUDA finds no NVIDIA GPU with a driver (cudaErrorInsufficientDriver)" in refusal(rtx)


def test_the_real_bindings_have_every_name_that_the_stand_in_has():
    runtime = pytest.importorskip("cuda.bindings.runtime")
    names = [name for name in vars(Cuda) if name.startswith("cuda")]
    assert len(names) > 15
    for name in names:
        assert hasattr(runtime, name), name
        if isinstance(group := getattr(Cuda, name), SimpleNamespace):
            assert set(vars(group)) <= set(dir(getattr(runtime, name))), name
    assert {code.name: int(code) for code in Code} == {c.name: int(getattr(runtime.cudaError_t, c.name)) for c in Code}
