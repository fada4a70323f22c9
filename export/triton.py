"""Make a model repository for NVIDIA's Triton Inference Server from a bundle.

    python -m export.triton --bundle bundle --output repository                  # images in, images out, on our runtime
    python -m export.triton --bundle bundle --output repository --instances 4 --threads 2    # for a CPU with 8 cores
    python -m export.triton --bundle bundle --output repository --name onnx --backend onnxruntime
    python -m export.triton --bundle bundle --output repository --name plan --backend tensorrt_plan
    tritonserver --model-repository repository

With the python backend a model takes `input` and returns `output`, both uint8 (H, W, 3) RGB of any size, so that a
client has nothing to get wrong. It needs this package in the server's Python, and runs whatever the bundle has, an
engine of TensorRT for RTX as well. The other two are the server's own; with them a model takes what its graph takes:
uint8 (1, H, W, 3) of any size after `export.onnx --io image`, else float32 (1, 3, H, W) in [0, 1] and padded.

A request is one image. Images differ in size and the graph takes one at a time, so that there is nothing to batch:
`max_batch_size` is 0, and what Triton calls dynamic batching only limits the queue. Requests run side by side in
instances, each with a network of its own, which has run once before the server calls the model ready.

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
from typing import Any, Literal

from runtime.bundle import Bundle, load
from runtime.cli import main, parse_size
from runtime.errors import InputError
from runtime.manifest import MANIFEST, SIGNATURE, Engine, Model
from runtime.pixels import Size
from runtime.session import Provider

Backend = Literal["tensorrt_plan", "onnxruntime", "python"]

OPTIONS: dict[Backend, set[str]] = {
    "tensorrt_plan": set(),
    "onnxruntime": {"threads"},
    "python": {"threads", "provider", "tile"},
}
"""Options that are not for every backend."""

TYPES = {"float32": "TYPE_FP32", "uint8": "TYPE_UINT8"}
"""As Triton names what NumPy does."""

BUNDLE = "bundle"
"""Where `runtime.triton` looks for it, beside `model.py`."""

MODEL_PY = "from runtime.triton import TritonPythonModel\n\n__all__ = ['TritonPythonModel']\n"

WARM_UP = 64
"""Height and width of the image that warms up a network for images of any size."""


@dataclass(frozen=True)
class Exported:
    """A model in a repository: its folder, the files in it, and what the server needs for it."""

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
    name: str = "drsformer",
    backend: Backend = "python",
    instances: int = 1,
    threads: int = 0,
    provider: Provider = "auto",
    tile: str | None = None,
    queue: int = 64,
    public_key: Path | None = None,
) -> Exported:
    """Add a model to a repository, which is made if it is not there.

    Raises InputError for a bundle that is not as its manifest and signature say or has no engine that Triton can load
    as a tensorrt_plan, a model of this name that is already there, and options that do not fit.

    Args:
        bundle: Folder with the network and its engines, if there are any.
        output: Folder of the repository.
        name: Of the model, by which clients ask for it.
        backend: What runs it in the server.
        instances: How many requests run at once (tensorrt_plan, onnxruntime: on each GPU). Each instance has the
            network in memory.
        threads: CPU threads of an instance; 0 is one for each core (onnxruntime, python).
        provider: Where it runs, as in runtime.derain (python).
        tile: Cut larger images into tiles of this height and width, given as HxW such as 1088x1088. If not given, as
            the memory demands that is free when an instance starts, and each takes it all for its own (python).
        queue: How many requests may wait; those above are refused at once, as unavailable. 0 is no limit.
        public_key: Refuse the bundle unless this key's owner signed it; see runtime/manifest.py.
    """
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise InputError(f"`name`: expected letters, digits and _.-, found {name!r}")
    for option, value, least in (("instances", instances, 1), ("threads", threads, 0), ("queue", queue, 0)):
        if value < least:
            raise InputError(f"`{option}`: expected {least} or more, found {value}")
    for option, given in (("threads", threads), ("provider", provider != "auto"), ("tile", tile)):
        if given and option not in OPTIONS[backend]:
            raise InputError(f"`{option}` is not for the backend {backend}: leave it out")
    folder = output / name
    if folder.exists():
        raise InputError(f"{folder} is already there: remove it, or give another --name or --output")
    opened = load(bundle, public_key)
    opened.verify()
    if tile:
        parse_size("tile", tile, opened.manifest.model.size_multiple)
    engines = _engines(opened, backend, provider)
    lines = [
        *_interface(name, backend, opened.manifest.model, engines),
        *_execution(backend, opened.manifest.model, engines, instances, threads, provider, tile),
    ]
    if queue:
        lines.append(f"dynamic_batching {{ default_queue_policy {{ max_queue_size: {queue} }} }}")

    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=output) as temporary:
        made = Path(temporary) / name
        version = made / "1"
        version.mkdir(parents=True)
        (made / "config.pbtxt").write_text("\n".join(lines) + "\n")
        if backend == "python":
            (version / "model.py").write_text(MODEL_PY)
            _copy(opened, version / BUNDLE, public_key)
        else:
            files = [engine.file for engine in engines] if backend == "tensorrt_plan" else [opened.manifest.model.file]
            for file in files:
                (version / file).write_bytes(opened.read(file))
        made.rename(folder)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return Exported(folder, backend, tuple(files), _needs(backend, engines))


def _engines(bundle: Bundle, backend: Backend, provider: Provider) -> tuple[Engine, ...]:
    """The engines of a bundle that the backend may run."""
    engines = bundle.manifest.engines
    if backend != "tensorrt_plan":
        return engines if backend == "python" and provider in ("auto", "tensorrt") else ()
    plans = tuple(engine for engine in engines if engine.flavor == "tensorrt")
    mend = "build one with export.tensorrt --flavor tensorrt, or use --backend python, which runs what there is"
    if not plans:
        found = "only engines of TensorRT for RTX, which Triton cannot load" if engines else "none"
        raise InputError(f"{bundle.folder}: expected an engine of TensorRT, found {found}; {mend}")
    for engine in plans:
        if engine.flags.get("strip_weights"):
            raise InputError(
                f"{bundle.folder / engine.file}: expected an engine with its weights, found one built "
                f"with --strip-weights, which Triton cannot fill in; {mend}"
            )
    return plans


def _interface(name: str, backend: Backend, model: Model, engines: Sequence[Engine]) -> list[str]:
    """What Triton's ModelConfig says of the model to everybody, and the images that it runs once before it is ready:
    the only size that the graph takes, or those that the engines are fastest at, or a small one."""

    def shape(size: Size) -> str:
        dims = (*size, 3) if backend == "python" else model.graph_io.shape(size)
        return f"dims: [{', '.join(map(str, dims))}]"

    height, width = model.graph_io.size(model.input.shape)
    kind = "data_type: " + TYPES["uint8" if backend == "python" else model.input.dtype]
    small = WARM_UP + -WARM_UP % model.size_multiple
    opts = [profile.opt for engine in engines for profile in engine.profiles]
    sizes = [(height, width)] if -1 not in (height, width) else dict.fromkeys(opts or [(small, small)])
    tensor = f"{kind} {shape((-1, -1) if backend == 'python' else (height, width))}"
    lines = [
        f'name: "{name}"',
        "max_batch_size: 0",
        f'input {{ name: "input" {tensor} }}',
        f'output {{ name: "output" {tensor} }}',
    ]
    for h, w in sizes:
        value = f"{kind} {shape((h, w))} zero_data: true"
        lines.append(f'model_warmup {{ name: "{h}x{w}" inputs {{ key: "input" value {{ {value} }} }} }}')
    return lines


def _execution(
    backend: Backend,
    model: Model,
    engines: Sequence[Engine],
    instances: int,
    threads: int,
    provider: Provider,
    tile: str | None,
) -> list[str]:
    """What Triton's ModelConfig says of how the model runs."""
    match backend:
        case "python":  # which finds the GPU itself
            return [
                'backend: "python"',
                f"instance_group {{ count: {instances} kind: KIND_MODEL }}",
                _parameter("provider", provider),
                _parameter("threads", threads),
                *([_parameter("tile", tile)] if tile else []),
            ]
        case "onnxruntime":
            return [
                'backend: "onnxruntime"',
                f'default_model_filename: "{model.file}"',
                f"instance_group {{ count: {instances} }}",
                _parameter("intra_op_thread_count", threads),
            ]
        case "tensorrt_plan":  # of its profiles, Triton takes the nearest to a request
            profiles = [f'"{i}"' for i in range(min(len(engine.profiles) for engine in engines))]
            return [
                'platform: "tensorrt_plan"',
                f'default_model_filename: "{engines[0].file}"',
                *(
                    f'cc_model_filenames {{ key: "{capability}" value: "{engine.file}" }}'
                    for engine in engines
                    for capability in engine.compute_capabilities
                ),
                f"instance_group {{ count: {instances} profile: [{', '.join(profiles)}] }}",
            ]


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
            return "drsformer-deploy in the server's Python"
        case "onnxruntime":
            return "Triton's onnxruntime backend"
        case "tensorrt_plan":
            versions = " and ".join(dict.fromkeys(engine.version for engine in engines))
            if all(engine.flags.get("version_compatible") for engine in engines):
                return f"TensorRT {versions} or later, --backend-config=tensorrt,version-compatible=true"
            return f"TensorRT {versions}, no other version"


if __name__ == "__main__":
    main(export, __doc__, summary=Exported.summary)
