"""Make a model repository for NVIDIA's Triton Inference Server from a bundle.

    python -m export.triton --bundle bundle --output repository                  # images in, images out, on our runtime
    python -m export.triton --bundle bundle --output repository --instances 4 --threads 2    # for a CPU with 8 cores
    python -m export.triton --bundle bundle --output repository --batch 8
    python -m export.triton --bundle bundle --output repository --name onnx --backend onnxruntime
    python -m export.triton --bundle bundle --output repository --name plan --backend tensorrt_plan
    tritonserver --model-repository repository

With the python backend a model takes `input` and returns `output`, both uint8 (H, W, 3) RGB of any size, so that a
client has nothing to get wrong. It needs the distribution `derainer` in the server's Python (pip install ./runtime),
and runs whatever the bundle has, an engine of TensorRT for RTX as well. The other two are the server's own; with them a
model takes what its graph takes: uint8 (1, H, W, 3) of any size after `export.onnx --io image`, else float32
or, after `--io tensor16`, float16 (1, 3, H, W) in [0, 1] and padded. A graph of images also has an output `finite`,
float32 (1,): where that is NaN or infinite, so was the network's answer, and the image is none.

A request is one image, of any size: `max_batch_size` is 0, and what Triton calls dynamic batching only limits the
queue. With --batch, for a model that takes several images at once (export.onnx --batch any), the server puts waiting
requests of equal size together, and every shape begins with the number of images: clients send uint8 (1, H, W, 3).
Requests run side by side in instances, each with a network of its own, which has run once before the server calls the
model ready.

The bundle is verified before any of it is copied, and with the python backend again when it is loaded. A signature is
verified here only: who can write to a model repository can run code in the server anyway.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from runtime.bundle import Bundle, load
from runtime.cli import hxw, main
from runtime.errors import InputError, InvalidModel, expect_between
from runtime.manifest import MANIFEST, SIGNATURE, Engine, Model
from runtime.pixels import ANY, FINITE, Size, expect_multiples, size_text
from runtime.session import Provider

Backend = Literal["tensorrt_plan", "onnxruntime", "python"]

BACKEND_OPTIONS: dict[Backend, set[str]] = {
    "tensorrt_plan": set(),
    "onnxruntime": {"threads"},
    "python": {"threads", "provider", "tile"},
}
"""Options that are not for every backend."""

DATA_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "uint8": "TYPE_UINT8"}
"""As Triton names what NumPy does."""

BUNDLE_FOLDER = "bundle"
"""Where `derainer.triton` looks for the bundle, beside `model.py`."""

MODEL_PY = "from derainer.triton import TritonPythonModel\n\n__all__ = ['TritonPythonModel']\n"

WARM_UP_PIXELS = 64
"""Height and width of the image that warms up a network for images of any size."""


@dataclass(frozen=True)
class ServeOptions:
    """How the server runs a model.

    Args:
        name: Name of the model, by which clients ask for it.
        backend: Backend that runs it in the server.
        instances: Number of requests that run at once (tensorrt_plan, onnxruntime: on each GPU). Each instance has the
            network in memory.
        threads: CPU threads of an instance; 0 is one for each core (onnxruntime, python).
        provider: Provider that it runs on, as in runtime.derain (python).
        tile: Height x width, such as 1088x1088, of the tiles into which larger images are cut. If not given, as the
            memory demands that is free when an instance starts, and each takes it all for its own (python).
        batch: Most images of equal size that the server puts together from requests that wait; clients then send
            images with one more axis in front. For a model that takes several at once; 1 is for any.
        queue: Number of requests that may wait; those above are refused at once, as unavailable. 0 is no limit.
        public_key: Refuse the bundle unless this key's owner signed it; see runtime/bundle.py.
    """

    name: str = "drsformer"
    backend: Backend = "python"
    instances: int = 1
    threads: int = 0
    provider: Provider = "auto"
    tile: Annotated[Size, hxw("tile")] | None = None
    batch: int = 1
    queue: int = 64
    public_key: Path | None = None


@dataclass(frozen=True)
class Exported:
    """A model in a repository.

    Attributes:
        folder: Folder of the model.
        backend: Backend that runs it.
        files: Files in the folder.
        needs: What the server needs for it.
    """

    folder: Path
    backend: Backend
    files: tuple[str, ...]
    needs: str

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return {"model": str(self.folder), "backend": self.backend, "files": self.files, "needs": self.needs}


def export(
    bundle: Path,
    output: Path,
    options: Annotated[ServeOptions, tyro.conf.arg(name="")] = ServeOptions(),
) -> Exported:
    """Add a model to a repository.

    Args:
        bundle: Folder with the network and its engines, if there are any.
        output: Folder of the repository, which is made if there is none.
        options: How the server runs the model.

    Raises:
        InputError: The bundle is not as its manifest and signature say, or has no engine that Triton can load as a
            tensorrt_plan; there is a model of this name; or the options do not fit.
    """
    if not re.fullmatch(r"\w[\w.-]*", options.name, re.ASCII):
        raise InputError(f"`name`: expected letters, digits and _.-, found {options.name!r}")
    for name, least in (("instances", 1), ("threads", 0), ("queue", 0), ("batch", 1)):
        expect_between(name, getattr(options, name), least)
    for name, default in (("threads", 0), ("provider", "auto"), ("tile", None)):
        if getattr(options, name) != default and name not in BACKEND_OPTIONS[options.backend]:
            raise InputError(f"`{name}` is not for the backend {options.backend}: leave it out")
    folder = output / options.name
    if folder.exists():
        raise InputError(f"{folder} is already there: remove it, or give another `name` or `output`")
    opened = load(bundle, options.public_key)
    opened.verify()
    model = opened.manifest.model
    if options.tile:
        expect_multiples("tile", options.tile, model.size_multiple)
    engines = _engines(opened, options)
    if options.batch > 1:
        _expect_batches(opened, options, engines)
    lines = [*_interface(options, model, engines), *_execution(options, model, engines)]
    if options.backend != "python" and model.io == "image" and FINITE in _outputs(opened):
        dims = "[1] reshape { shape: [] }" if options.batch > 1 else f"[{model.graph_io.batch}]"
        lines.append(f'output {{ name: "{FINITE}" data_type: {DATA_TYPES["float32"]} dims: {dims} }}')

    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{options.name}.", dir=output) as temporary:
        made = Path(temporary) / options.name
        version = made / "1"
        version.mkdir(parents=True)
        (made / "config.pbtxt").write_text("\n".join(lines) + "\n")
        if options.backend == "python":
            (version / "model.py").write_text(MODEL_PY)
            _copy(opened, version / BUNDLE_FOLDER, options.public_key)
        else:
            for file in [engine.file for engine in engines] if options.backend == "tensorrt_plan" else [model.file]:
                (version / file).write_bytes(opened.read(file))
        made.rename(folder)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return Exported(folder, options.backend, tuple(files), _needs(options.backend, engines))


def _engines(bundle: Bundle, options: ServeOptions) -> tuple[Engine, ...]:
    """The engines of a bundle that the backend may run."""
    engines = bundle.manifest.engines
    if options.backend != "tensorrt_plan":
        return engines if options.backend == "python" and options.provider in ("auto", "tensorrt") else ()
    plans = tuple(engine for engine in engines if engine.flavor == "tensorrt")
    mend = "build one by python -m export.tensorrt --flavor tensorrt, or use `backend` python, which runs what there is"
    if not plans:
        found = "only engines of TensorRT for RTX, which Triton cannot load" if engines else "none"
        raise InputError(f"{bundle.folder}: expected an engine of TensorRT, found {found}; {mend}")
    for engine in plans:
        if engine.flags.get("strip_weights"):
            raise InputError(
                f"{bundle.folder / engine.file}: expected an engine with its weights, found one without, "
                f"which Triton cannot fill in; {mend} and leave --strip-weights out"
            )
    return plans


def _expect_batches(bundle: Bundle, options: ServeOptions, engines: Sequence[Engine]) -> None:
    """Raise InputError unless the backend can run so many images of the model at once."""
    found = bundle.manifest.model.graph_io.batch
    if found != ANY and (found == 1 or options.backend != "python"):
        raise InputError(
            f"`batch`: expected a model of any number of images at once, found one of {found} in {bundle.folder}; "
            "export it by python -m export.onnx with --batch any"
        )
    for engine in engines if options.backend == "tensorrt_plan" else ():
        if not _profiles(engine, options.batch):
            raise InputError(
                f"`batch`: expected a profile of {options.batch} images at once in {bundle.folder / engine.file}, "
                f"found {' or '.join(map(str, engine.profiles))}; build it by python -m export.tensorrt with --batch"
            )


def _profiles(engine: Engine, batch: int) -> list[int]:
    """Which profiles of an engine take so many images at once."""
    return [i for i, profile in enumerate(engine.profiles) if profile.batch[2] >= batch]


def _outputs(bundle: Bundle) -> list[str]:
    """Names of what the graph of a bundle returns. Raises InvalidModel where it is none."""
    from google.protobuf.message import DecodeError
    from onnx import load_from_string

    name = bundle.manifest.model.file
    try:
        return [value.name for value in load_from_string(bundle.read(name)).graph.output]
    except DecodeError as error:
        raise InvalidModel(f"{bundle.folder / name}: expected an ONNX model, found another file") from error


def _interface(options: ServeOptions, model: Model, engines: Sequence[Engine]) -> list[str]:
    """What Triton's ModelConfig says of the model to everybody, and the images that it runs once before it is ready:
    the only size that the graph takes, or those that the engines are fastest at, or a small one; with batches alone and
    as many as there may be."""
    images, batched = options.backend == "python", options.batch > 1

    def shape(size: Size, at_once: int | None = None) -> str:
        """Without the number of images where that is Triton's to say."""
        dims = model.graph_io.shape(size, at_once)
        if images:
            dims = (*size, 3)
        elif batched:
            dims = dims[1:]
        return f"dims: [{', '.join(map(str, dims))}]"

    height, width = model.graph_io.size(model.input.shape)
    kind = "data_type: " + DATA_TYPES["uint8" if images else model.input.dtype]
    small = WARM_UP_PIXELS + -WARM_UP_PIXELS % model.size_multiple
    fixed = (height, width) if -1 not in (height, width) else None
    fastest = [(profile.opt, profile.batch[2]) for engine in engines for profile in engine.profiles]
    samples = {
        (fixed or size, at_once): None
        for size, most in fastest or [((small, small), options.batch)]
        for at_once in (1, options.batch)
        if at_once <= most and (options.backend != "tensorrt_plan" or options.batch <= most)
    }
    tensor = f"{kind} {shape((-1, -1) if images else (height, width))}"
    lines = [
        f'name: "{options.name}"',
        f"max_batch_size: {options.batch if batched else 0}",
        f'input {{ name: "input" {tensor} }}',
        f'output {{ name: "output" {tensor} }}',
    ]
    for size, at_once in samples:
        name = size_text(size) if at_once == 1 else f"{at_once} of {size_text(size)}"
        value = f"{kind} {shape(size, max(1, model.graph_io.batch))} zero_data: true"
        count = f"batch_size: {at_once} " if batched else ""
        lines.append(f'model_warmup {{ name: "{name}" {count}inputs {{ key: "input" value {{ {value} }} }} }}')
    return lines


def _execution(options: ServeOptions, model: Model, engines: Sequence[Engine]) -> list[str]:
    """What Triton's ModelConfig says of how the model runs."""
    match options.backend:
        case "python":  # which finds the GPU itself
            lines = [
                'backend: "python"',
                f"instance_group {{ count: {options.instances} kind: KIND_MODEL }}",
                _parameter("provider", options.provider),
                _parameter("threads", options.threads),
                *([_parameter("tile", size_text(options.tile))] if options.tile else []),
            ]
        case "onnxruntime":
            lines = [
                'backend: "onnxruntime"',
                f'default_model_filename: "{model.file}"',
                f"instance_group {{ count: {options.instances} }}",
                _parameter("intra_op_thread_count", options.threads),
            ]
        case "tensorrt_plan":  # of its profiles, Triton takes the nearest to a request
            common = set.intersection(*(set(_profiles(engine, options.batch)) for engine in engines))
            profiles = [f'"{i}"' for i in sorted(common)]
            lines = [
                'platform: "tensorrt_plan"',
                f'default_model_filename: "{engines[0].file}"',
                *(
                    f'cc_model_filenames {{ key: "{capability}" value: "{engine.file}" }}'
                    for engine in engines
                    for capability in engine.compute_capabilities
                ),
                f"instance_group {{ count: {options.instances} profile: [{', '.join(profiles)}] }}",
            ]
    if options.queue or options.batch > 1:
        limit = f"default_queue_policy {{ max_queue_size: {options.queue} }} " if options.queue else ""
        lines.append(f"dynamic_batching {{ {limit}}}")
    return lines


def _parameter(key: str, value: object) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'


def _copy(bundle: Bundle, folder: Path, public_key: Path | None) -> None:
    """All that the manifest names, to a new folder."""
    folder.mkdir()
    for file in bundle.manifest.files:
        (folder / file.name).write_bytes(bundle.read(file.name))
    for name in (MANIFEST, SIGNATURE):
        if (bundle.folder / name).exists():
            shutil.copyfile(bundle.folder / name, folder / name)
    load(folder, public_key).verify()  # another manifest may have come meanwhile


def _needs(backend: Backend, engines: Sequence[Engine]) -> str:
    match backend:
        case "python":
            return "derainer in the server's Python"
        case "onnxruntime":
            return "Triton's onnxruntime backend"
        case "tensorrt_plan":
            versions = " and ".join(dict.fromkeys(engine.version for engine in engines))
            if all(engine.flags.get("version_compatible") for engine in engines):
                return f"TensorRT {versions} or later, --backend-config=tensorrt,version-compatible=true"
            return f"TensorRT {versions}, no other version"


if __name__ == "__main__":
    main(export, __doc__, summary=Exported.summary)
