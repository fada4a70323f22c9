"""The C++ library: its own tests under sanitizers, and the same verdicts and the same bytes as Python.

Built once, into a temporary folder, with OpenVINO, in which it restores photographs there. What needs TensorRT runs on
stand-ins, which are linked and installed as an SDK is; where the real one is (TENSORRT_ROOT), it is compiled and linked
as well.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from drsformer.metrics import psnr_rgb
from drsformer.rendering import add_rain, draw_streaks
from export.canaries import add_canaries
from runtime import Derainer, InputError
from runtime.bundle import describe_file, load, save
from runtime.manifest import Engine, Profile, parse
from runtime.ort import SHIPPED
from runtime.pixels import IO, size_text
from runtime.session import describe_onnx
from runtime.version import __version__
from tests.support.bundles import ENGINES, add_canary, flip, make_keys, rewrite, write_bundle
from tests.support.images import random_image
from tests.support.onnx_files import FLOAT, FLOAT16, UINT8, write_network
from tests.support.tensorrt import PROFILES, make_bundle

SOURCE = Path(__file__).parents[1] / "runtime" / "cpp"
PHOTOGRAPHS = Path(__file__).parents[1] / "docs" / "photographs"
PACKAGES = "g++ cmake nlohmann-json3-dev libssl-dev catch2 libpng-dev"


def missing() -> str:
    """What cannot be found of what it takes to build."""
    headers = {"nlohmann-json": "nlohmann/json.hpp", "OpenSSL": "openssl/evp.h", "Catch2": "catch2", "libpng": "png.h"}
    folders = [Path("/usr/include"), Path("/usr/local/include")]
    lacking = [tool for tool in ("cmake", "c++") if not shutil.which(tool)]
    lacking += [name for name, header in headers.items() if not any((f / header).exists() for f in folders)]
    return ", ".join(lacking)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(missing()) and "CI" not in os.environ,
        reason=f"the C++ library needs {missing()}: apt-get install {PACKAGES}",
    ),
]


def run(
    *command: str | Path, input: bytes = b"", cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    sanitized = {
        "TBB_ENABLE_SANITIZERS": "1",  # without which the threads of OpenVINO do not start under them
        "LSAN_OPTIONS": f"suppressions={SOURCE / 'tests' / 'leaks.txt'}:print_suppressions=0",
    }
    env = os.environ | sanitized | environment
    return subprocess.run(command, input=input, capture_output=True, cwd=cwd, env=env)


def succeed(*command: str | Path, input: bytes = b"") -> bytes:
    done = run(*command, input=input)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Path:
    import openvino

    folder = tmp_path_factory.mktemp("build")
    configured = run(
        "cmake",
        "-S",
        SOURCE,
        "-B",
        folder,
        *(["-G", "Ninja"] if shutil.which("ninja") else []),
        "-DDERAINER_SANITIZE=ON",
        "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON",
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_CXX_FLAGS_DEBUG=-g1",
        "-DCMAKE_C_FLAGS=-Wpedantic -Wstrict-prototypes",
        "-DDERAINER_OPENVINO=ON",
        f"-DOpenVINO_DIR={openvino.utils.get_cmake_path()}",
    )
    said = " ".join((configured.stdout + configured.stderr).decode().split())
    assert configured.returncode == 0, said
    assert "CUDA 1" in said or "The library is built without:" in said
    compile_and_install(folder, folder / "installed")
    return folder


def compile_and_install(folder: Path, prefix: Path) -> None:
    succeed("cmake", "--build", folder, "--parallel", str(len(os.sched_getaffinity(0))))
    succeed("cmake", "--install", folder, "--prefix", prefix)


@pytest.fixture(scope="module")
def installed(build) -> Path:
    """Where the library is that has OpenVINO and no stand-ins."""
    return build / "installed"


@pytest.fixture(scope="module")
def on_fakes(build, tmp_path_factory) -> Path:
    """Where the library and the program `derain` are installed that were linked to the stand-ins, whose shared library
    is in a folder of its own. The core is not compiled again."""
    fakes = SOURCE / "tests" / "fake"
    library = shutil.copy(build / "tests" / "libnvinfer.so", tmp_path_factory.mktemp("sdk"))
    succeed(
        "cmake",
        "-S",
        SOURCE,
        "-B",
        build,
        f"-DCMAKE_MODULE_PATH={fakes}",
        f"-DTENSORRT_INCLUDE_DIR={fakes}",
        f"-DTENSORRT_LIBRARY={library}",
    )
    compile_and_install(build, build / "on_fakes")
    return build / "on_fakes"


def make_consumer(installed: Path, folder: Path) -> Path:
    """The program in C++; that in C is beside it."""
    succeed(
        "cmake",
        "-S",
        SOURCE / "tests" / "consumer",
        "-B",
        folder,
        f"-DCMAKE_PREFIX_PATH={installed}",
        "-DCMAKE_CXX_FLAGS=-fsanitize=address,undefined",
        "-DCMAKE_C_FLAGS=-fsanitize=address,undefined -Wstrict-prototypes",
    )
    succeed("cmake", "--build", folder)
    return folder / "consumer"


@pytest.fixture(scope="module")
def contract(build) -> Callable[..., bytes]:
    def contract(*arguments: object, input: bytes = b"") -> bytes:
        return succeed(build / "tests" / "contract", *map(str, arguments), input=input)

    return contract


def test_own_tests(build):
    assert b"100% tests passed" in succeed("ctest", "--test-dir", build, "--output-on-failure")


def test_version_is_that_of_python(tmp_path):
    """In a copy of the runtime alone, too, such as a source distribution."""
    shutil.copytree(SOURCE, tmp_path / "runtime" / "cpp")
    (tmp_path / "runtime" / "VERSION").write_text("7.8.9\n")
    succeed("cmake", "-S", tmp_path / "runtime" / "cpp", "-B", tmp_path / "build", "-DDERAINER_TESTS=OFF")
    assert "CMAKE_PROJECT_VERSION:STATIC=7.8.9" in (tmp_path / "build" / "CMakeCache.txt").read_text().splitlines()


def test_backends_are_those_that_are_asked_for(tmp_path):
    def configure(*options: str) -> tuple[int, str]:
        done = run("cmake", "-S", SOURCE, "-B", tmp_path / "build", "-DDERAINER_TESTS=OFF", *options)
        return done.returncode, " ".join((done.stdout + done.stderr).decode().split())

    status, said = configure("-DDERAINER_OPENVINO=OFF", "-DDERAINER_TENSORRT=OFF")
    assert status == 0
    assert "Only the core (bundles, image contract, tiles) and derainer-info are built, not the library" in said
    status, said = configure("-DDERAINER_OPENVINO=ON", "-DCMAKE_DISABLE_FIND_PACKAGE_OpenVINO=ON")
    assert status != 0
    assert "DERAINER_OPENVINO is ON. Missing: OpenVINO's CMake package: pip install openvino" in said


def test_installed_program(installed, tmp_path):
    info = installed / "bin" / "derainer-info"
    bundle = write_bundle(tmp_path / "bundle")
    assert b"All 4 files are as the manifest says" in succeed(info, bundle)
    (bundle / "manifest.json").unlink()
    assert b"found none at" in run(info, bundle).stderr


def test_installed_package(on_fakes, tmp_path):
    """Also that it finds the SDK it was linked to."""
    consumer = make_consumer(on_fakes, tmp_path / "consumer")
    bundle = make_bundle(tmp_path / "bundle", ENGINE, plan=b"tensor").folder
    assert succeed(consumer, bundle) == b"tensorrt \n"
    assert succeed(f"{consumer}-c", bundle) == f"{__version__} tensorrt\n".encode()
    (bundle / "0.engine").write_bytes(b"tenser")
    done = run(consumer, bundle)
    assert done.returncode == 2
    assert b"expected SHA-256" in done.stderr
    assert done.stderr.splitlines()[1] == b"sha256 == file.sha256"
    done = run(f"{consumer}-c", bundle)
    assert done.returncode == INVALID_BUNDLE
    assert b"expected SHA-256" in done.stderr
    assert run(f"{consumer}-c").returncode == INVALID_ARGUMENT
    done = run(on_fakes / "bin" / "derain")
    assert done.returncode == 2
    assert done.stderr.startswith(b"usage: derain")


def test_installed_package_is_derainer_and_nothing_else(on_fakes):
    assert sorted(path.name for path in (on_fakes / "include" / "derainer").iterdir()) == [
        "derainer.h",
        "derainer.hpp",
        "errors.hpp",
        "export.h",
        "pixels.hpp",
    ]
    (library,) = on_fakes.glob(f"lib*/**/libderainer.so.{__version__}")
    assert not list(on_fakes.rglob("*core*"))
    symbols = succeed("nm", "--dynamic", "--demangle", "--defined-only", library).decode()
    without_parameters = re.sub(r"\(.*", "", symbols)
    errors = (
        "DerainError",
        "InputError",
        "InvalidImage",
        "InvalidModel",
        "MismatchError",
        "UnprovenError",
        "DeviceError",
        "OutOfMemory",
        "CanaryError",
    )
    assert set(re.findall(r"derainer::\w+|nlohmann", without_parameters)) == {
        f"derainer::{name}" for name in ("Derainer", *errors)
    }
    functions = ("open", "restore", "restore_batch", "provider", "fallback_reason", "close", "error", "version")
    assert set(re.findall(r" T (derainer_\w+)", symbols)) == {f"derainer_{name}" for name in functions}


@pytest.mark.skipif("TENSORRT_ROOT" not in os.environ, reason="the real TensorRT is not installed")
def test_installed_package_with_the_real_library(installed, tmp_path):
    consumer = make_consumer(installed, tmp_path / "consumer")
    said = succeed(consumer, write_bundle(tmp_path / "bundle"))
    assert said.startswith(b"cpu ")
    assert b"CUDA finds no NVIDIA GPU" in said or b"expected an engine" in said


INVALID_IMAGE, INVALID_BUNDLE, DEVICE, MEMORY, INVALID_ARGUMENT = range(1, 6)  # of derainer.h
ENGINE = {"version": "11.4.0.106"}  # of the stand-in
LARGE = (Profile((64, 64), (64, 64), (256, 512)), Profile((64, 64), (64, 64), (512, 256)))
ONE_GROWS = (Profile((24, 16), (24, 16), (48, 64)), Profile((8, 96), (8, 96), (40, 256)))


@pytest.mark.parametrize(
    ("profiles", "sizes"),
    [
        (PROFILES, [(20, 30, "RGB"), (9, 100, "L"), (70, 50, "RGB"), (33, 210, "P"), (1, 1, "RGB")]),
        (LARGE, [(1, 1, "RGB"), (20, 20, "RGB"), (48, 200, "RGB"), (33, 520, "RGB")]),
        (ONE_GROWS, [(1, 1, "RGB"), (40, 60, "RGB"), (25, 90, "RGB"), (8, 130, "L"), (33, 70, "RGB")]),
    ],
)
def test_example_program(on_fakes, tmp_path, profiles, sizes):
    """PNG files through a bundle, with the golden network in place of an engine; grown, and in tiles, as in Python."""
    bundle = make_bundle(tmp_path / "bundle", {**ENGINE, "profiles": profiles}, plan=b"tensor").folder
    session = StandIn(8)
    session.limits = tuple((profile.min, profile.max) for profile in profiles)
    rainy, clean = tmp_path / "rainy.png", tmp_path / "clean.png"
    for height, width, mode in sizes:
        image = Image.fromarray(random_image(height, width)).convert(mode)
        image.save(rainy)
        succeed(on_fakes / "bin" / "derain", rainy, clean, bundle)
        with Image.open(clean) as restored:
            np.testing.assert_array_equal(np.asarray(restored), Derainer(session)(np.asarray(image.convert("RGB"))))


def test_example_program_refuses(on_fakes, tmp_path):
    derain = on_fakes / "bin" / "derain"
    bundle = make_bundle(tmp_path / "bundle", ENGINE, plan=b"tensor").folder
    rainy, clean = tmp_path / "rainy.png", tmp_path / "clean.png"
    Image.fromarray(random_image(8, 8)).save(rainy)
    succeed(derain, rainy, clean, bundle)
    before = clean.read_bytes()
    for mode in ("RGBA", "I;16"):
        Image.new(mode, (8, 8)).save(rainy)
        assert b"expected 8 bits a channel and no transparency" in run(derain, rainy, clean, bundle).stderr
    rainy.write_bytes(before[:-20])
    for arguments in (
        (rainy, clean, bundle),
        (tmp_path / "none.png", clean, bundle),
        (clean, tmp_path, bundle),
        (clean, clean, tmp_path),
        (clean, clean, bundle, tmp_path / "none.pem"),
        (clean, clean, bundle, ""),
        (),
    ):
        done = run(derain, *arguments)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
    assert clean.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"rainy.png", "clean.png", "bundle"}


def test_example_program_replaces_only_files(on_fakes, tmp_path):
    derain = on_fakes / "bin" / "derain"
    bundle = make_bundle(tmp_path / "bundle", ENGINE, plan=b"tensor").folder
    rainy, clean, folder = tmp_path / "rainy.png", tmp_path / "clean.png", tmp_path / "folder"
    Image.fromarray(random_image(24, 30)).save(rainy)
    succeed(derain, rainy, clean, bundle)
    before = clean.read_bytes()
    folder.mkdir()
    (folder / "private").write_text("private")
    (folder / "private").chmod(0o600)
    os.mkfifo(folder / "pipe")
    (folder / "device").symlink_to("/dev/null")
    for planted in ("clean.png.part", "clean.png"):
        (folder / planted).symlink_to("private")
    (folder / "usual").touch()
    files = set(tmp_path.rglob("*"))
    for name in ("pipe", "device"):
        done = run(derain, rainy, folder / name, bundle)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert b"expected a file to write, found a folder, a pipe or a device at" in done.stderr
    succeed(derain, rainy, folder / "clean.png", bundle)
    assert (folder / "clean.png").read_bytes() == before
    assert not (folder / "clean.png").is_symlink()
    assert (folder / "private").read_text() == "private"
    assert (folder / "pipe").is_fifo()
    assert (folder / "device").is_char_device()
    assert (folder / "clean.png").stat().st_mode == (folder / "usual").stat().st_mode
    done = run("bash", "-c", 'trap "" XFSZ; ulimit -f 1; exec "$@"', "bash", derain, rainy, clean, bundle)
    assert done.returncode == 2
    assert b"clean.png cannot be written: " in done.stderr
    assert clean.read_bytes() == before
    assert set(tmp_path.rglob("*")) == files


# On the CPU: photographs, to the bytes that Python has from the same engine.


class OpenVino:
    """The model of a bundle as a session of Python, in the engine of the C++ library."""

    limits: tuple = ()

    def __init__(self, bundle: Path) -> None:
        model = load(bundle).manifest.model
        self.graph_io, self.multiple = model.graph_io, model.graph_io.multiple
        import openvino

        core = openvino.Core()
        network = core.read_model((bundle / model.file).read_bytes())
        self.model = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(self, batch: np.ndarray) -> np.ndarray:
        return self.graph_io.answer(self.model([self.graph_io.feed(batch)])["output"])

    def run_image(self, image: np.ndarray) -> np.ndarray:
        return self.model([image[None]])["output"][0]


def bundle_of(folder: Path, write: Callable[[Path], object]) -> Path:
    """A bundle without an engine, whose model `write` writes."""
    folder.mkdir(parents=True)
    write(folder / "model.onnx")
    return save(describe_onnx(folder / "model.onnx"), folder).folder


def photograph(name: str) -> np.ndarray:
    return np.asarray(Image.open(PHOTOGRAPHS / f"{name}.jpg").convert("RGB"))


def in_cpp(installed: Path, rainy: np.ndarray, bundle: Path, folder: Path) -> np.ndarray:
    """Restored by the program in C++."""
    Image.fromarray(rainy).save(folder / "rainy.png")
    succeed(installed / "bin" / "derain", folder / "rainy.png", folder / "clean.png", bundle)
    return np.asarray(Image.open(folder / "clean.png"))


def in_c(
    installed: Path, rainy: np.ndarray, bundle: Path, folder: Path, provider: str = "auto", **environment: str
) -> tuple[int, str, np.ndarray]:
    """Status of the program in C, what it says, and the restored image, where there is one."""
    Image.fromarray(rainy).save(folder / "rainy.ppm")
    (folder / "clean.ppm").unlink(missing_ok=True)
    files = folder / "rainy.ppm", folder / "clean.ppm"
    done = run(installed / "bin" / "derain-c", *files, bundle, provider, cwd=folder, **environment)
    restored = np.asarray(Image.open(files[1])) if files[1].exists() else np.empty(0)
    return done.returncode, done.stderr.decode(), restored


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Path:
    """The network that ships, with its canaries, whose answers are those of ONNX Runtime."""
    folder = bundle_of(tmp_path_factory.mktemp("shipped") / "bundle", lambda path: shutil.copy(SHIPPED, path))
    save(add_canaries(load(folder).manifest, folder), folder)
    return folder


@pytest.mark.parametrize("name", ["chelsea", "coffee", "rocket"])
def test_photographs_are_restored(installed, shipped, tmp_path, name):
    clean = photograph(name)[:251, :333]
    rainy = add_rain(clean, draw_streaks(np.random.default_rng(0), *clean.shape[:2]))
    restored = in_cpp(installed, rainy, shipped, tmp_path)
    np.testing.assert_array_equal(restored, Derainer(OpenVino(shipped))(rainy))
    assert psnr_rgb(restored, Derainer(shipped, provider="cpu")(rainy)) > 60  # ONNX Runtime
    assert psnr_rgb(restored, clean) > psnr_rgb(rainy, clean) + 3
    assert list(shipped.parent.glob("bundle.*.canary-cpp"))
    if name == "chelsea":
        status, said, also_restored = in_c(installed, rainy, shipped, tmp_path)
        assert status == 0
        assert said.startswith("remark: it ran on the CPU: ")
        np.testing.assert_array_equal(also_restored, restored)


def as_io(io: IO, path: Path) -> None:
    """Write the network that ships as a graph of `io`."""
    model = onnx.load(SHIPPED)
    graph, make = model.graph, helper.make_node
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [f"float_{name}" if name in ("input", "output") else name for name in names]
    kind = FLOAT16 if io == "tensor16" else UINT8
    if io == "tensor16":
        before = [make("Cast", ["input"], ["float_input"], to=FLOAT)]
        after = [make("Cast", ["float_output"], ["output"], to=kind)]
    else:
        constants = {"peak": np.float32(255), "lowest": np.float32(0), "highest": np.float32(1)}
        graph.initializer.extend(numpy_helper.from_array(np.array(v), name) for name, v in constants.items())
        before = [
            make("Cast", ["input"], ["levels"], to=FLOAT),
            make("Div", ["levels", "peak"], ["divided"]),
            make("Transpose", ["divided"], ["float_input"], perm=[0, 3, 1, 2]),
        ]
        after = [
            make("Clip", ["float_output", "lowest", "highest"], ["clamped"]),
            make("Mul", ["clamped", "peak"], ["multiplied"]),
            make("Round", ["multiplied"], ["rounded"]),
            make("Cast", ["rounded"], ["whole"], to=kind),
            make("Transpose", ["whole"], ["output"], perm=[0, 2, 3, 1]),
        ]
    nodes = [*before, *graph.node, *after]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    shape = (1, "H", "W", 3) if io == "image" else (1, 3, "H", "W")
    graph.input.append(helper.make_tensor_value_info("input", kind, shape))
    graph.output.append(helper.make_tensor_value_info("output", kind, shape))
    helper.set_model_props(model, {"size_multiple": "8", "io": io})
    onnx.save(model, path)


@pytest.mark.parametrize("io", ["tensor16", "image"])
def test_every_kind_of_graph_restores(installed, shipped, tmp_path, io):
    bundle = bundle_of(tmp_path / "bundle", lambda path: as_io(io, path))
    rainy = np.ascontiguousarray(photograph("chelsea")[:96, :144])
    restored = in_cpp(installed, rainy, bundle, tmp_path)
    np.testing.assert_array_equal(restored, Derainer(OpenVino(bundle))(rainy))
    assert psnr_rgb(restored, Derainer(bundle, provider="cpu")(rainy)) > 60
    assert psnr_rgb(restored, Derainer(shipped, provider="cpu")(rainy)) > 50
    assert not np.array_equal(restored, rainy)


def test_a_graph_of_one_size_takes_tiles(installed, tmp_path):
    bundle = bundle_of(tmp_path / "bundle", lambda path: write_network(path, shape=(1, 3, 32, 40)))
    session = OpenVino(bundle)
    session.limits = (((32, 40), (32, 40)),)
    for height, width in ((32, 40), (9, 20), (70, 50)):
        image = random_image(height, width)
        np.testing.assert_array_equal(in_cpp(installed, image, bundle, tmp_path), Derainer(session)(image))


def test_refusals_on_the_cpu_have_their_codes(installed, shipped, tmp_path):
    image = random_image(16, 24)
    for name, options in (("tensor", {}), ("image", {"kind": UINT8, "finite": True})):
        nan = bundle_of(tmp_path / name, lambda path, options=options: write_network(path, float("nan"), **options))
        status, said, _ = in_c(installed, image, nan, tmp_path)
        assert (status, "NaN or infinity" in said) == (INVALID_BUNDLE, True)
    good = bundle_of(tmp_path / "good", lambda path: write_network(path, kind=UINT8, finite=True))
    np.testing.assert_array_equal(in_c(installed, image, good, tmp_path)[2], image // 2)
    status, said, _ = in_c(installed, image, shipped, tmp_path, "tensorrt")
    assert (status, "expected a bundle with an engine" in said) == (INVALID_BUNDLE, True)
    status, said, _ = in_c(installed, image, write_bundle(tmp_path / "engines"), tmp_path, "tensorrt")
    assert (status, "expected" in said) == (DEVICE, True)
    status, said, _ = in_c(installed, image, shipped, tmp_path, "gpu")
    assert (status, "expected the provider auto, tensorrt or cpu" in said) == (INVALID_ARGUMENT, True)
    damaged = shutil.copytree(shipped, tmp_path / "damaged")
    os.truncate(damaged / "model.onnx", 1000)
    status, said, _ = in_c(installed, image, damaged, tmp_path)
    assert (status, "bytes, found 1000" in said) == (INVALID_BUNDLE, True)


def test_too_little_memory_is_told(installed, shipped, tmp_path):
    """A sanitizer refuses what is larger than this."""
    limit = "allocator_may_return_null=1:max_allocation_size_mb=20"
    status, said, _ = in_c(installed, photograph("chelsea"), shipped, tmp_path, ASAN_OPTIONS=limit)
    assert (status, "use smaller tiles" in said) == (MEMORY, True)


def external(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """The same, kept in the file `weights`."""
    (moved := TensorProto()).CopyFrom(tensor)
    moved.ClearField("raw_data")
    moved.data_location = TensorProto.EXTERNAL
    moved.external_data.add(key="location", value="weights")
    return moved


def subgraph(tensor: onnx.TensorProto) -> onnx.GraphProto:
    return helper.make_graph([], "branch", [], [helper.make_tensor_value_info(tensor.name, FLOAT, [])], [tensor])


PLACES: dict[str, Callable[[onnx.TensorProto], tuple[list, list]]] = {
    "initializer": lambda t: ([], [t]),
    "constant": lambda t: ([helper.make_node("Constant", [], [t.name], value=t)], []),
    "branch": lambda t: (
        [
            helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True))),
            helper.make_node("If", ["yes"], [t.name], then_branch=subgraph(t), else_branch=subgraph(t)),
        ],
        [],
    ),
}
"""Where weights can be in a graph: nodes and initializers."""


@pytest.mark.parametrize("place", PLACES)
def test_weights_in_other_files_are_refused(installed, tmp_path, place):
    """Which nothing verifies, and OpenVINO would read from the current directory."""
    scale = numpy_helper.from_array(np.array(0.5, np.float32), "scale")
    (tmp_path / "weights").write_bytes(scale.raw_data)
    image = helper.make_tensor_value_info("input", FLOAT, (1, 3, "H", "W"))
    answer = helper.make_tensor_value_info("output", FLOAT, (1, 3, "H", "W"))
    for tensor, refused in ((scale, False), (external(scale), True)):
        nodes, initializers = PLACES[place](tensor)
        graph = helper.make_graph(
            [*nodes, helper.make_node("Mul", ["input", "scale"], ["output"])], "test", [image], [answer], initializers
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        helper.set_model_props(model, {"size_multiple": "8"})
        bundle = bundle_of(tmp_path / f"bundle{refused}", lambda path: write_network(path))
        (bundle / "model.onnx").write_bytes(model.SerializeToString())
        described = describe_file(bundle / "model.onnx", "onnx")
        rewrite(bundle, lambda m, file=described: m["files"][0].update(size=file.size, sha256=file.sha256))
        status, said, _ = in_c(installed, random_image(16, 24), bundle, tmp_path, "cpu")
        assert (status, "keeps them in other files" in said) == (INVALID_BUNDLE if refused else 0, refused), said


def with_engine(folder: Path, plan: bytes = b"tensor", **options: object) -> Path:
    """A bundle with a network that halves, and an engine for the stand-ins unless `options` say otherwise."""
    bundle = bundle_of(folder, write_network)
    manifest = load(bundle).manifest
    (bundle / "plan.engine").write_bytes(plan)
    usual = dict(flavor="tensorrt", **ENGINE, compute_capabilities=("8.6",), profiles=PROFILES, flags={})
    engine = Engine("plan.engine", **(usual | options), onnx_sha256=manifest.files[0].sha256)
    save(manifest.with_file(describe_file(bundle / "plan.engine", "engine"), engine), bundle)
    return bundle


def test_auto_takes_the_engine_where_it_runs(on_fakes, tmp_path):
    """On the stand-ins, whose GPU has the compute capability 8.6; else the CPU, and says why."""
    image = random_image(16, 24)
    engine, cpu = Derainer(StandIn(8))(image), Derainer(OpenVino(bundle_of(tmp_path / "cpu", write_network)))(image)
    bundle = with_engine(tmp_path / "fits")
    status, said, restored = in_c(on_fakes, image, bundle, tmp_path)
    assert (status, said) == (0, "")
    np.testing.assert_array_equal(restored, engine)
    np.testing.assert_array_equal(in_c(on_fakes, image, bundle, tmp_path, "cpu")[2], cpu)
    for name, bundle, refusal, reason in (
        ("gpu", with_engine(tmp_path / "gpu", compute_capabilities=("8.9",)), DEVICE, "for this GPU"),
        ("version", with_engine(tmp_path / "version", version="11.5.0"), DEVICE, "expected version 11.5.0"),
        ("plan", with_engine(tmp_path / "plan", b"other!"), INVALID_BUNDLE, "is refused"),
    ):
        status, said, restored = in_c(on_fakes, image, bundle, tmp_path)
        assert (status, reason in said) == (0, True), name
        np.testing.assert_array_equal(restored, cpu)
        status, said, _ = in_c(on_fakes, image, bundle, tmp_path, "tensorrt")
        assert (status, reason in said) == (refusal, True), name
    flip(bundle / "plan.engine", 0)
    status, said, _ = in_c(on_fakes, image, bundle, tmp_path)
    assert (status, "expected SHA-256" in said) == (INVALID_BUNDLE, True)


# Bundles: whatever one reader refuses, the other refuses.


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    folder = make_keys(tmp_path_factory.mktemp("keys"))
    (folder / "text.pem").write_text("-----BEGIN PUBLIC KEY-----\n")
    commands = (
        ["genpkey", "-algorithm", "rsa", "-out", folder / "rsa.pem"],
        ["pkey", "-in", folder / "private.pem", "-aes256", "-passout", "pass:x", "-out", folder / "locked.pem"],
        ["genpkey", "-algorithm", "x25519", "-out", folder / "exchange.pem"],
    )
    for command in commands:
        succeed("openssl", *command)
    return folder


@pytest.fixture
def agree(build) -> Callable[..., str]:
    def agree(bundle: Path, key: Path | None = None) -> str:
        """Whether both accept a bundle, "" if so, or else what C++ says."""
        try:
            load(bundle, key).verify()
            accepted = True
        except InputError:
            accepted = False
        done = run(build / "derainer-info", bundle, *([key] if key else []))
        said = done.stderr.decode()
        assert (done.returncode, accepted) in ((0, True), (2, False)), said
        assert len(said.splitlines()) == (0 if accepted else 1), said
        return said

    return agree


def move_out(bundle: Path, name: str) -> None:
    shutil.move(bundle / name, bundle.parent / name)
    (bundle / name).symlink_to(bundle.parent / name)


def rename(name: str) -> Callable[[Path], None]:
    return lambda b: rewrite(b, lambda m: (m["files"][0].update(name=name), m["model"].update(file=name)))


def images_at_once(count: int) -> Callable[[Path], None]:
    return lambda b: rewrite(b, lambda m: m["model"]["input"].update(shape=[count, 3, -1, -1]))


def profile(**sizes: list[int]) -> Callable[[Path], None]:
    return lambda b: rewrite(b, lambda m: m["engines"][0]["profiles"][0].update(sizes))


def canary(**fields: object) -> Callable[[Path], object]:
    """Add a canary, with other fields."""

    def damage(bundle: Path) -> None:
        rewrite(add_canary(bundle, np.copy), lambda manifest: manifest["canaries"][0].update(fields))

    return damage


def canary_drift(bundle: Path) -> None:
    rewrite(add_canary(bundle, np.copy), lambda manifest: manifest["drift"][0].update(file="canary.16x24.rgb"))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "none": (lambda b: None, ""),
    "more files": (lambda b: (b / "notes.txt").write_text("more"), ""),
    "a link inside": (lambda b: ((b / "model.onnx").rename(b / "real"), (b / "model.onnx").symlink_to("real")), ""),
    "flipped bit in a plan": (lambda b: flip(b / ENGINES[0], 50, 7), "expected SHA-256"),
    "flipped bit in the model": (lambda b: flip(b / "model.onnx", 0), "expected SHA-256"),
    "truncated": (lambda b: os.truncate(b / ENGINES[1], 50), "bytes, found 50"),
    "empty": (lambda b: os.truncate(b / "report.html", 0), "bytes, found 0"),
    "longer": (lambda b: (b / "report.html").write_text("<html>\n"), "expected 6 bytes, found 7"),
    "missing": (lambda b: (b / ENGINES[0]).unlink(), "found no such file"),
    "a folder": (lambda b: ((b / "report.html").unlink(), (b / "report.html").mkdir()), "found no such file"),
    "moved": (lambda b: move_out(b, "model.onnx"), "expected a file inside the bundle, found a link to"),
    "manifest moved": (lambda b: move_out(b, "manifest.json"), "expected a file inside the bundle"),
    "swapped": (lambda b: shutil.copy(b / ENGINES[0], b / ENGINES[1]), "expected SHA-256"),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "expected a bundle"),
    "no folder": (shutil.rmtree, "expected a bundle"),
    "traversal": (rename("../model.onnx"), "expected a plain file name"),
    "absolute": (rename("/etc/passwd"), "expected a plain file name"),
    "hidden": (rename(".hidden"), "expected a plain file name"),
    "backslash": (rename("a\\b"), "expected a plain file name"),
    "long": (rename("a" * 256), "expected a plain file name"),
    "itself": (rename("Manifest.json"), "expected a plain file name"),
    "control": (rename("a\n\033[31m"), "expected a plain file name"),
    "schema": (lambda b: rewrite(b, lambda m: m.update(schema=2)), "expected schema 1, found 2"),
    "no schema": (lambda b: rewrite(b, lambda m: m.pop("schema")), "expected schema 1, found null"),
    "new field": (lambda b: rewrite(b, lambda m: m["engines"][0].update(more=1)), "with the fields"),
    "smallest size": (profile(min=[64, 62]), "expected profiles in multiples of 4, found 64x62 to 1088x1920"),
    "largest size": (profile(max=[1090, 1920]), "expected profiles in multiples of 4, found 64x64 to 1090x1920"),
    "fastest size": (profile(opt=[255, 257]), ""),
    "several images": (profile(batch=[1, 4, 8]), ""),
    "images in no order": (profile(batch=[4, 1, 8]), "a profile of 1 to 1024 images, in ascending order"),
    "too many images": (profile(batch=[1, 1, 1025]), "a profile of 1 to 1024 images"),
    "any number of images": (images_at_once(-1), ""),
    "no images": (images_at_once(0), "expected an input of 1 to 1024 images, or -1 for any number"),
    "other model": (lambda b: rewrite(b, lambda m: m["engines"][0].update(onnx_sha256="0" * 64)), "another model"),
    "canary": (lambda b: add_canary(b, np.copy), ""),
    "no canaries": (lambda b: rewrite(b, lambda m: m.pop("canaries")), ""),
    "broken canary": (lambda b: flip(add_canary(b, np.copy) / "canary.16x24.rgb", 9), "expected SHA-256"),
    "canary of another size": (canary(height=20), "expected 2880 bytes for two images of 20x24, found 2304"),
    "canary without a floor": (canary(floor_db=None), "floor_db: expected"),
    "canary with a high floor": (canary(floor_db=100.5), "a floor of 0 to 100 dB"),
    "canary of no size": (canary(height=0), "a canary of at most 16384 pixels a side"),
    "canary in no multiples": (canary(height=6, width=64), "expected a canary in multiples of 4, found 6x64"),
    "canary of no file": (canary(file="other.rgb"), "expected one model, the engines and the canaries"),
    "drift of a canary": (canary_drift, "expected a drift of"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_same_verdict_on_bundles(agree, tmp_path, name):
    damage, message = DAMAGES[name]
    bundle = write_bundle(tmp_path / "bundle")
    damage(bundle)
    said = agree(bundle)
    assert message in said
    assert bool(message) == bool(said)


def test_same_verdict_on_signatures(build, agree, tmp_path, keys):
    assert "expected a bundle signed for" in agree(write_bundle(tmp_path / "unsigned"), keys / "public.pem")
    bundle = write_bundle(tmp_path / "bundle", key=keys / "private.pem")
    assert agree(bundle) == agree(bundle, keys / "public.pem") == agree(bundle, keys / "private.pem") == ""
    for other in ("others.pem", "others-private.pem"):
        assert "signed by somebody else" in agree(bundle, keys / other)
    for none in ("text.pem", "rsa.pem", "locked.pem", "exchange.pem"):
        assert "expected an Ed25519 public key in PEM" in agree(bundle, keys / none)
    assert "found no file at" in agree(bundle, keys / "none.pem")
    assert run(build / "derainer-info", bundle, "").returncode == 2  # as of a variable that is not set
    for byte in (0, 17, 300, (bundle / "manifest.json").stat().st_size - 1):
        flip(bundle / "manifest.json", byte)
        assert "signed by somebody else" in agree(bundle, keys / "public.pem")
        flip(bundle / "manifest.json", byte)
    signature = (bundle / "manifest.json.sig").read_bytes()
    for damaged in (b"", signature[:-1], signature + b"\0", bytes(64)):
        (bundle / "manifest.json.sig").write_bytes(damaged)
        assert "signed by somebody else" in agree(bundle, keys / "public.pem")
    (bundle / "manifest.json.sig").write_bytes(signature)
    flip(bundle / ENGINES[0], 3)
    assert "expected SHA-256" in agree(bundle, keys / "public.pem")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of everything in a JSON value."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def variants(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The manifest with another value in every place, without it, and with one more."""
    others = [
        None,
        True,
        0,
        -1,
        1,
        2**63,
        10**30,
        1.0,
        0.5,
        "",
        "1",
        "8.6",
        "a" * 64,
        "model.onnx",
        [],
        [0, 1],
        [9, 9],
        {},
    ]
    for path in places(manifest):
        for change in (*others, "remove", "add", "again"):
            changed = copy.deepcopy(manifest)
            parent: Any = {"": changed}
            for key in ("", *path[:-1]) if path else ():
                parent = parent[key]
            key = path[-1] if path else ""
            found = parent[key]
            if change == "remove":
                del parent[key]
            elif change == "add" and isinstance(found, dict):
                found["added"] = None
            elif change == "again" and isinstance(found, list) and found:
                found.append(copy.deepcopy(found[0]))
            else:
                parent[key] = change
            yield changed if path else parent.get("")


HUGE = re.compile(rb"(?<!\w)\d{19}")
"""Numbers beyond 64 bits, which C++ refuses where Python knows them."""

STRANGE = (
    b"", b" ", b"{", b"[]", b"null", b"1", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"{}x", b'{"schema": 1}',
    b'{"schema": 1, "schema": 1}', b'{"schema": NaN}', b'{"schema": 1}{"schema": 1}', b'{"schema": 01}',
    b"{'schema': 1}", b'{"schema": 1,}', b'{"schema": 1e0}', b'{"schema": true}', b'{"schema": "1"}', b"// 1\n{}",
    b'{"schema": \x01}',
)  # fmt: skip


def test_same_verdict_on_every_changed_field(contract, tmp_path):
    bundle = add_canary(write_bundle(tmp_path / "bundle"), np.copy)
    profile(batch=[1, 2, 4])(bundle)
    content = (bundle / "manifest.json").read_bytes()
    contents = [json.dumps(changed).encode() for changed in variants(json.loads(content))]
    contents += [content, b"\n\t " + content + b"\n", *STRANGE]
    contents += [
        content.replace(b"30.25", number) for number in (b"1e999", b"-1e999", b"NaN", b"Infinity", b"3e1", b"30")
    ]
    contents += [
        content.replace(b'"topk": "rank"', twice) for twice in (b'"topk": "rank", "topk": "rank"', b'"topk": null')
    ]
    folder = tmp_path / "manifests"
    folder.mkdir()
    for i, text in enumerate(contents):
        (folder / f"{i:05}").write_bytes(text)
    said = contract("parse", folder).decode().splitlines()
    assert len(said) == len(contents) > 1000
    accepted = 0
    for text, refusal in zip(contents, said, strict=True):
        try:
            parse(text)
            accepted += 1
            assert not refusal or HUGE.search(text), f"only C++ refuses {text[:3000]!r}: {refusal}"
        except InputError:
            assert refusal, f"only Python refuses {text[:3000]!r}"
    assert 100 < accepted < len(contents) / 2


# The image contract, byte by byte.


class StandIn:
    """The golden network as a session, which keeps the last input."""

    def __init__(self, multiple: int) -> None:
        self.multiple = multiple
        self.limits: tuple = ()
        self.last = np.empty(0)

    def run(self, batch: np.ndarray) -> np.ndarray:
        self.last = batch
        y, x = np.indices(batch.shape[2:])
        place = ((7 * y + 13 * x) % 32).astype(np.float32) / np.float32(31)
        return np.float32(0.75) * batch + np.float32(0.25) * place


@pytest.mark.parametrize(
    ("height", "width", "multiple"),
    [(1, 1, 1), (1, 1, 8), (7, 5, 8), (4, 5, 8), (9, 16, 8), (3, 100, 8), (33, 17, 16), (40, 23, 3), (1, 9, 8)],
)
def test_same_padding_and_input(contract, height, width, multiple):
    image, session = random_image(height, width), StandIn(multiple)
    restored = Derainer(session)(image)
    padded = session.last.shape[2:]
    assert contract("tensor", height, width, *padded, input=image.tobytes()) == session.last.tobytes()
    assert contract("restore", height, width, *padded, *padded, 0, input=image.tobytes()) == restored.tobytes()


def test_same_levels(contract):
    middle = (np.arange(256, dtype=np.float32) + np.float32(0.5)) / np.float32(255)
    near = [middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(2))]
    edges = np.array([-0.0, 0.0, -1e-30, 1.0, 1.0000001, 1e30, -1e30, 1e-45], np.float32)
    values = np.concatenate([*near, edges, np.random.default_rng(0).normal(0.5, 0.5, 3000).astype(np.float32)])
    answer = np.resize(values, (1, 3, 24, 60))
    session = StandIn(1)
    session.run = lambda batch: answer
    restored = Derainer(session)(random_image(24, 60))
    assert contract("levels", 24, 60, 24, 60, input=answer.tobytes()) == restored.tobytes()


@pytest.mark.parametrize(
    ("height", "width", "multiple", "tile", "overlap"),
    [
        (50, 70, 8, (32, 40), 12),
        (64, 64, 8, (32, 32), 16),
        (33, 90, 8, (48, 24), 0),
        (97, 41, 1, (31, 17), 8),
        (20, 300, 4, (64, 64), 20),
        (130, 7, 8, (40, 48), 1),
    ],
)
def test_same_tiles(contract, height, width, multiple, tile, overlap):
    image = random_image(height, width)
    derain = Derainer(StandIn(multiple), tile=tile, overlap=overlap)
    size = derain.plan(height, width).size
    restored = contract("restore", height, width, *size, *tile, overlap, input=image.tobytes())
    assert restored == derain(image).tobytes()
    whole = Derainer(StandIn(multiple))(image)
    assert restored != whole.tobytes()


def test_same_plan(contract):
    """Of images of any size, by engines of any profiles, in tiles that are asked for or not."""
    random = np.random.default_rng(0)
    cases, expected = [], []
    for _ in range(1000):
        multiple = int(random.choice([1, 4, 8]))
        sides = np.sort(random.integers(1, 30, (int(random.integers(1, 4)), 2, 2)), axis=1) * multiple
        session = StandIn(multiple)
        session.limits = tuple(((int(a), int(b)), (int(c), int(d))) for (a, b), (c, d) in sides)
        H, W = (int(side) for side in random.integers(1, 50 * multiple, 2))
        tile, overlap = None, None
        if random.random() < 0.5:
            tile = int(random.integers(1, 30)) * multiple, int(random.integers(1, 30)) * multiple
            overlap = int(random.integers(0, min(tile) // 2 + 1)) if random.random() < 0.5 else None
        numbers = (H, W, multiple, *(tile or (0, 0)), -1 if overlap is None else overlap, *sides.flatten())
        cases.append(" ".join(map(str, numbers)))
        plan = Derainer(session, tile=tile, overlap=overlap).plan(H, W)
        taken = any(Profile(least, least, most).takes(*plan.tile) for least, most in session.limits)
        cut = f"{size_text(plan.size)} {size_text(plan.tile)} {plan.overlap}"
        expected.append(cut if taken else "refused")  # in Python by the session
    found = contract("plan", input="\n".join(cases).encode()).decode().splitlines()
    for case, ours, theirs in zip(cases, found, expected, strict=True):
        assert ours == theirs, case
    assert 100 < found.count("refused") < 500
    assert len(set(found)) > 500
