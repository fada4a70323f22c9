"""Compile an ONNX model for NVIDIA GPUs, into a bundle that `runtime.trt` runs.

    python -m export.tensorrt --onnx model.onnx --output bundle                     # for RTX cards; needs no GPU
    python -m export.tensorrt --onnx model.onnx --output bundle --compute-capability 8.9 --max 2176x3840
    python -m export.tensorrt --onnx model.onnx --output bundle --max 1088x1920 1920x1088 --opt 720x1280 1280x720
    python -m export.tensorrt --onnx batches.onnx --output bundle --max 1088x1920 512x512 --batch 1 8
    python -m export.tensorrt --onnx model.onnx --output bundle --flavor tensorrt   # for the GPU in this machine

The bundle is a folder: the model, an engine for each call, and at last the manifest, which makes it a bundle. Another
call adds an engine; the same kind of engine is replaced. Precision is in the model (`export.onnx --precision`), since
TensorRT 11 knows no other, so the same file serves TensorRT 10, 11 and TensorRT for RTX, always strongly typed.

TensorRT for RTX compiles in two halves: here, without any GPU, into an engine that serves all the kinds of GPU that are
named, and on the user's machine for the one that is there. TensorRT measures its kernels, so it needs the GPU.

Before anything is built, the library has to accept every node of the model. Without a GPU nothing more can be proved
of an engine than that the library built it: whether it runs, and how near it is, `export.validate` finds out where it
runs. The flavor tensorrt has not been run: its calls were made on TensorRT for RTX and compared with TensorRT's Python
API.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from runtime.bundle import Bundle, describe_file, load_to_change, private_key, save
from runtime.cli import hxw, main, progress_shown, table_of
from runtime.errors import InputError, expect_between
from runtime.files import writing
from runtime.manifest import (
    MANIFEST,
    MAX_BATCH,
    Engine,
    File,
    Flavor,
    Manifest,
    Model,
    Profile,
    Tensor,
    describe,
    read_graph_io,
)
from runtime.memory import peak
from runtime.pixels import ANY, Size, expect_multiples, size_text
from runtime.progress import OnProgress, silent
from runtime.trt import LIBRARIES, Library, gpu, new_log

STAGING = ".building."
"""How the name of the folder begins that holds what is built until all of it is there."""

MODEL_FILE = "model.onnx"
"""Name of the model in a new bundle."""

DEFAULT_SIZES = {"min": (64, 64), "opt": (720, 1280), "max": (1088, 1920)}
"""Heights and widths in pixels for a model of any size; what is not given moves to fit what is."""

FLAGS = ("version_compatible", "hardware_compatible", "strip_weights")
"""Options that the manifest records of an engine."""


@dataclass(frozen=True)
class BuildOptions:
    """What an engine is built for.

    Args:
        flavor: Library to build for: rtx for TensorRT for RTX, which needs no GPU to build; tensorrt for TensorRT.
        compute_capability: Kinds of GPU that the engine serves, 8.6 8.9 12.0 if not given (rtx; TensorRT builds for the
            GPU in the machine).
        min: Least height x width, 64x64 if not given. As --opt and --max, one for all profiles or one for each.
        opt: Height x width to be fastest at, 720x1280 if not given.
        max: Largest height x width, 1088x1920 if not given.
        batch: Most images at once, which it is also fastest at; 1 if not given. One for all profiles or one for each,
            as memory has to hold so many of the largest size. For a model of any number of images.
        version_compatible: Serve later versions of the library as well; slower (tensorrt).
        hardware_compatible: Serve all GPUs from Ampere on; slower (tensorrt).
        strip_weights: Leave the weights out; they are put in from the model when it is loaded. Needs a GPU.
        timing_cache: File of measured kernels to read, if there is one, and to write: the next build is quicker
            (tensorrt).
        sign: Private key, Ed25519 in PEM, to sign the manifest with.
    """

    flavor: Flavor = "rtx"
    compute_capability: tuple[str, ...] = ()
    min: tuple[Annotated[Size, hxw("min")], ...] = ()
    opt: tuple[Annotated[Size, hxw("opt")], ...] = ()
    max: tuple[Annotated[Size, hxw("max")], ...] = ()
    batch: tuple[int, ...] = ()
    version_compatible: bool = False
    hardware_compatible: bool = False
    strip_weights: bool = False
    timing_cache: Path | None = None
    sign: Path | None = None


@dataclass(frozen=True)
class Built:
    """An engine that was added to a bundle.

    Attributes:
        bundle: The bundle with it.
        engine: What its manifest says of the engine.
        layers: How many layers the library parsed the model into.
        bytes: Size of the engine.
        seconds: How long everything took.
        peak_memory: Most memory that this process has taken so far, in bytes; None where the system does not say.
    """

    bundle: Bundle
    engine: Engine
    layers: int
    bytes: int
    seconds: float
    peak_memory: int | None

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "bundle": str(self.bundle.folder),
            "engine": self.engine.file,
            "library": f"{self.engine.flavor} {self.engine.version}",
            "compute_capabilities": self.engine.compute_capabilities,
            "engines": [engine.file for engine in self.bundle.manifest.engines],
            "layers": self.layers,
            "bytes": self.bytes,
            "build_seconds": self.engine.build_seconds,
            "seconds": round(self.seconds, 1),
            "peak_memory": self.peak_memory,
        }


def build(
    onnx: Path,
    output: Path,
    options: BuildOptions = BuildOptions(),
    on_progress: OnProgress = silent,
) -> Built:
    """Compile a model and add the engine to a bundle, which is made if there is none.

    Args:
        onnx: Model that `export.onnx` wrote.
        output: Folder of the bundle.
        options: What the engine is built for.
        on_progress: Called with how far the work is, in part from another thread.

    Raises:
        InputError: The library is not installed, the model has nodes that it does not support, profiles and options do
            not fit, the bundle is of another model, a GPU is needed and missing, or the build fails.
    """
    started = time.monotonic()
    library = LIBRARIES[options.flavor]
    for name in ("compute_capability", *FLAGS, "timing_cache"):
        if getattr(options, name) and name not in library.options:
            known = ", ".join(f"`{option}`" for option in sorted(library.options))
            raise InputError(f"`{name}` is not for {library.title}, which has {known}")
    if not onnx.is_file():
        raise InputError(f"`onnx`: expected an ONNX file, found no file at {onnx}")
    if options.sign:
        private_key(options.sign)  # before the work
    content = onnx.read_bytes()
    described = _describe(onnx, content)
    if (output / MANIFEST).exists():
        described = _existing(output, described, options.sign)
    elif output.is_dir() and (others := _others(output, onnx)):
        raise InputError(
            f"`output`: expected a bundle or a folder with nothing else in it, found {others[0]} in {output}; name a "
            "new folder"
        )
    profiles = _profiles(described.model, options)
    trt = library.load()
    capabilities = _capabilities(library, options.compute_capability)
    if options.strip_weights:
        gpu()  # which TensorRT for RTX needs for this as well
    flags = {name: True for name in FLAGS if getattr(options, name)}

    on_progress("Parsing", 0, 0)
    compiler = Compiler(trt, library, content)
    on_progress("Parsing", 1, 1)
    if library.capabilities:
        members = _known_capabilities(trt)
        compiler.target([members[capability] for capability in capabilities])
    if -1 in described.model.input.shape:
        for profile in profiles:
            sizes = zip((profile.min, profile.opt, profile.max), profile.batch, strict=True)
            compiler.add_profile(*(described.model.graph_io.shape(size, images) for size, images in sizes))
    compiler.set_flags(flags)
    compiling = time.monotonic()
    plan = compiler.run(options.timing_cache, on_progress)
    seconds = time.monotonic() - compiling

    targets = "-".join("sm" + capability.replace(".", "") for capability in capabilities)
    engine = Engine(
        file=f"{Path(described.model.file).stem}.{options.flavor}.{targets}.engine",
        flavor=options.flavor,
        version=trt.__version__,
        compute_capabilities=capabilities,
        profiles=profiles,
        flags=flags,
        onnx_sha256=hashlib.sha256(content).hexdigest(),
        build_seconds=round(seconds, 1),
    )
    from export.canaries import add_canaries

    output.mkdir(parents=True, exist_ok=True)
    for killed in output.glob(f"{STAGING}*"):
        shutil.rmtree(killed)
    # Until all files are there the bundle is what it was: its manifest fits no others.
    with tempfile.TemporaryDirectory(prefix=STAGING, dir=output) as temporary:
        made = Path(temporary)
        (made / described.model.file).write_bytes(content)
        (made / engine.file).write_bytes(plan)
        described = described.with_file(describe_file(made / engine.file, "engine"), engine)
        manifest = add_canaries(described, made, on_progress)
        for path in made.iterdir():
            path.replace(output / path.name)
    bundle = save(manifest, output, options.sign)
    return Built(bundle, engine, compiler.network.num_layers, plan.nbytes, time.monotonic() - started, peak())


def _others(folder: Path, onnx: Path) -> list[str]:
    """Names of what is in a folder besides the model, and what a killed build left."""
    names = (path.name for path in folder.iterdir())
    return [name for name in names if name != onnx.name and not name.startswith(STAGING)]


class Compiler:
    """One model in one library.

    Raises:
        InputError: On construction, the library does not support the model.
    """

    def __init__(self, trt: Any, library: Library, content: bytes) -> None:
        self._trt = trt
        self._library = library
        self._log = new_log(trt)
        self._builder = trt.Builder(self._log)
        scratch = self._new_network()  # which its parser does not keep alive
        coverage = trt.OnnxParser(scratch, self._log)
        if not coverage.supports_model_v2(content):
            raise InputError(f"{library.title} {trt.__version__} does not support all nodes: {_errors(coverage)}")
        self.network = self._new_network()
        self._parser = trt.OnnxParser(self.network, self._log)  # the network refers to its weights
        if not self._parser.parse(content):
            raise InputError(f"{library.title} {trt.__version__} cannot read the model: {_errors(self._parser)}")
        self._config = self._builder.create_builder_config()

    def _new_network(self) -> Any:
        return self._builder.create_network(1 << int(self._trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    def target(self, capabilities: Sequence[Any]) -> None:
        """Build one engine for these kinds of GPU, members of the library's `ComputeCapability` (TensorRT for RTX)."""
        self._config.num_compute_capabilities = len(capabilities)
        for i, capability in enumerate(capabilities):
            self._config.set_compute_capability(capability, i)

    def add_profile(self, low: Sequence[int], opt: Sequence[int], high: Sequence[int]) -> None:
        """Take inputs of shapes from `low` to `high`."""
        profile = self._builder.create_optimization_profile()
        profile.set_shape("input", low, opt, high)
        self._config.add_optimization_profile(profile)

    def set_flags(self, flags: Iterable[str]) -> None:
        if "version_compatible" in flags:
            self._config.set_flag(self._trt.BuilderFlag.VERSION_COMPATIBLE)
        if "strip_weights" in flags:
            self._config.set_flag(self._trt.BuilderFlag.STRIP_PLAN)
        if "hardware_compatible" in flags:
            self._config.hardware_compatibility_level = self._trt.HardwareCompatibilityLevel.AMPERE_PLUS

    def run(self, timing_cache: Path | None, on_progress: OnProgress = silent) -> Any:
        """The plan, a buffer. It is built in a thread of its own, so that ctrl-C is heard while the library works,
        which then ends its step and stops."""
        if timing_cache:
            self._read_timings(timing_cache)
        with ThreadPoolExecutor(1) as pool:
            monitor = new_monitor(self._trt, on_progress)
            self._config.progress_monitor = monitor
            future = pool.submit(self._builder.build_serialized_network, self.network, self._config)
            try:
                plan = future.result()
            except KeyboardInterrupt:
                monitor.cancelled = True
                raise
        if plan is None:
            raise InputError(
                f"{self._library.title} {self._trt.__version__} cannot build the model: {self._log.reason()}"
            )
        if timing_cache:
            with writing(timing_cache) as temporary:
                temporary.write_bytes(self._config.get_timing_cache().serialize())
        return plan

    def _read_timings(self, path: Path) -> None:
        timings = self._config.create_timing_cache(path.read_bytes() if path.exists() else b"")
        if timings is None or not self._config.set_timing_cache(timings, False):
            raise InputError(
                f"`timing_cache`: expected one of {self._library.title} {self._trt.__version__} on this "
                f"GPU, found another at {path}; name a new file"
            )


def new_monitor(trt: Any, on_progress: OnProgress) -> Any:
    """Tells the steps of a build, with the innermost phase under way as a remark. Set `cancelled` to end the build."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = False
            self._phases: dict[str, tuple[int, int]] = {}  # steps done and all steps, the outermost phase first

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = (0, num_steps)
            self._report()

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._phases[phase_name] = (step + 1, self._phases[phase_name][1])
            self._report()
            return not self.cancelled

        def phase_finish(self, phase_name: str) -> None:
            done, total = self._phases.pop(phase_name)
            if not self._phases and done < total:  # a build may need fewer steps than it announced
                on_progress(phase_name, total, total)

        def _report(self) -> None:
            (stage, (done, total)), *within = self._phases.items()
            remarks = [f"{name} {count} of {steps}" for name, (count, steps) in within]
            on_progress(stage, done, total, *remarks[-1:])

    return Monitor()


def _errors(parser: Any) -> str:
    """What a parser could not do, as one line: the node's type, its name and the reason."""
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    lines = [f"{error.node_operator()} {error.node_name()} ({error.desc()})" for error in errors]
    more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
    return (", ".join(lines[:5]) or "no reason given") + more


def _describe(path: Path, content: bytes) -> Manifest:
    """The manifest of a bundle with only this model."""
    from google.protobuf.message import DecodeError
    from onnx import load_from_string
    from onnx.helper import tensor_dtype_to_np_dtype

    def tensor(value: Any) -> Tensor:
        kind = value.type.tensor_type
        shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
        return Tensor(value.name, tensor_dtype_to_np_dtype(kind.elem_type).name, shape)

    try:
        model = load_from_string(content)
    except DecodeError as error:
        raise InputError(f"`onnx`: expected an ONNX file, found another at {path}") from error
    tensors = [tensor(value) for value in (*model.graph.input, *model.graph.output)]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    file = File(MODEL_FILE, hashlib.sha256(content).hexdigest(), len(content), "onnx")
    try:
        read_graph_io(tensors, metadata)  # however many tensors there are
        source, answer, *_ = tensors
        return describe(file, source, answer, metadata)
    except InputError as error:
        raise InputError(f"`onnx`: {path}: {error}") from error


def _existing(folder: Path, described: Manifest, sign: Path | None) -> Manifest:
    """The manifest of the bundle that is added to. Raises InputError where it is of another model."""
    existing = load_to_change(folder, sign)
    found, expected = (next(f.sha256 for f in m.files if f.role == "onnx") for m in (described, existing))
    if found != expected:
        raise InputError(
            f"{folder} is a bundle of another model: expected SHA-256 {expected}, found {found} at `onnx`; give "
            "another `output`"
        )
    return existing


def expect_capabilities(library: Library, named: Sequence[str]) -> list[str]:
    """All kinds of GPU that a library builds for, in ascending order. Raises InputError where it does not for some of
    `named`, and DeviceError where it is not installed."""
    trt = library.load()
    known = list(_known_capabilities(trt))
    for capability in named:
        if capability not in known:
            raise InputError(
                f"`compute_capability`: {library.title} {trt.__version__} builds for {', '.join(known)}, "
                f"found {capability}; for other GPUs use `flavor` tensorrt on a machine with one"
            )
    return known


def _capabilities(library: Library, named: Sequence[str]) -> tuple[str, ...]:
    if library.capabilities is None:
        return (gpu(),)
    known = expect_capabilities(library, named)
    return tuple(capability for capability in known if capability in (named or library.capabilities))


def _known_capabilities(trt: Any) -> dict[str, Any]:
    """The library's names for kinds of GPU, such as SM86, by compute capability, in ascending order."""
    members = trt.ComputeCapability.__members__
    numbers = sorted(int(name[2:]) for name in members if name.startswith("SM"))
    return {f"{n // 10}.{n % 10}": members[f"SM{n}"] for n in numbers}


def _profiles(model: Model, options: BuildOptions) -> tuple[Profile, ...]:
    """The profiles for what is given as min, opt and max."""
    given = {name: getattr(options, name) for name in DEFAULT_SIZES}
    fixed, images = model.graph_io.size(model.input.shape), model.graph_io.batch
    if images != ANY and options.batch:
        raise InputError(
            f"`batch`: the model takes {images} images at once, neither more nor less: leave it out, or export it by "
            "python -m export.onnx with --batch any"
        )
    if -1 not in fixed and any(given.values()):
        raise InputError(
            f"the model takes only images of {size_text(fixed)}: leave out `min`, `opt` and `max`, or export it by "
            "python -m export.onnx without --height and --width"
        )
    count = max(1, len(options.batch), *(len(sizes) for sizes in given.values()))
    for name, values in {**given, "batch": options.batch}.items():
        if len(values) not in (0, 1, count):
            raise InputError(f"`{name}`: expected one, or {count} as for the other options, found {len(values)}")
    for name, sizes in given.items():
        for size in sizes:
            expect_multiples(name, size, model.size_multiple)
    for most in options.batch:
        expect_between("batch", most, 1, MAX_BATCH)
    if -1 not in fixed:
        given = dict.fromkeys(DEFAULT_SIZES, (fixed,))
    batches = [(images, images, images)] if images != ANY else [(1, most, most) for most in options.batch or (1,)]
    return tuple(
        _profile({name: v[i % len(v)] for name, v in given.items() if v}, batches[i % len(batches)])
        for i in range(count)
    )


def _profile(given: dict[str, Size], batch: tuple[int, int, int]) -> Profile:
    """For so many images. What size is not given is the default, moved to fit what is."""
    low, opt, high = (np.array(given.get(name, default)) for name, default in DEFAULT_SIZES.items())
    for name, value in (("min", low), ("max", high)):
        if name not in given:
            others = [np.array(size) for size in given.values()]
            value[:] = (np.minimum if name == "min" else np.maximum).reduce([value, *others])
    if "opt" not in given:
        opt = opt.clip(low, high)
    low, opt, high = (tuple(value.tolist()) for value in (low, opt, high))
    if not all(a <= b <= c for a, b, c in zip(low, opt, high, strict=True)):
        raise InputError(
            f"expected `min` <= `opt` <= `max` in height and in width, found {size_text(low)}, {size_text(opt)} and "
            f"{size_text(high)}"
        )
    return Profile(low, opt, high, batch)


def table(built: Built) -> Table:
    """All engines of the bundle, for a terminal."""
    keys = ["engine", "library", "GPUs", "height x width"]
    engines = table_of(keys, ["MB", "built in"], f"{built.bundle.folder}: engines")
    manifest = built.bundle.manifest
    bytes_of = {file.name: file.size for file in manifest.files}
    for engine in manifest.engines:
        engines.add_row(
            engine.file,
            f"{engine.flavor} {engine.version}",
            ", ".join(engine.compute_capabilities),
            "\n".join(map(str, engine.profiles)),
            f"{bytes_of[engine.file] / 1e6:.1f}",
            f"{engine.build_seconds} s",
        )
    return engines


def command(
    onnx: Path,
    output: Path,
    options: Annotated[BuildOptions, tyro.conf.arg(name="")] = BuildOptions(),
) -> Built:
    """Compile a model, add the engine to a bundle and print what the bundle has.

    Args:
        onnx: Model that export.onnx wrote.
        output: Folder of the bundle, which is made if there is none.
        options: What the engine is built for.
    """
    with progress_shown() as on_progress:
        built = build(onnx, output, options, on_progress)
    Console().print(table(built))
    return built


if __name__ == "__main__":
    main(command, __doc__, summary=Built.summary)
