"""The manifest of a bundle: what every file in it is. Pure: nothing here touches a disk.

    manifest = parse(Path("bundle/manifest.json").read_bytes())

The manifest is plain JSON for readers in any language: an object for each dataclass below, with all of its fields and
no others, lists for tuples and null for None. A reader that meets another `schema`, or any field that it does not
know, refuses the bundle rather than guess.
"""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .errors import InvalidModel
from .pixels import ANY, IO, GraphIO, Size, size_text
from .version import __version__

SCHEMA = 1
"""Version of the manifest's format. Any change to the fields below is a new one, but for those of `LATER`."""

LATER = {"later": True}
"""Marks a field that came later and that manifests may lack."""

MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.sig"

DEFAULT_MULTIPLE = 8
"""Size multiple of a graph whose metadata does not name one: that of the released network."""

MAX_CANARY = 16384
"""Pixels that a side of a canary may have."""

MAX_MULTIPLE = 1024
"""A larger one would have a small image padded to one that no memory holds."""

MAX_BATCH = 1024
"""Images that a graph or an engine may take at once."""

Role = Literal["onnx", "engine", "report", "canary"]
Flavor = Literal["rtx", "tensorrt"]

Proof = Literal["proven", "canary", "not proven"]
"""Of a model or an engine: whether it was judged against the full model, or has only canaries to be checked by."""

FLAVOR_TITLES: dict[Flavor, str] = {"rtx": "TensorRT for RTX", "tensorrt": "TensorRT"}
"""What the vendor calls the libraries that run engines."""


@dataclass(frozen=True)
class File:
    """A file of the bundle. `name` is a plain name, without folders; `size` is in bytes."""

    name: str
    sha256: str
    size: int
    role: Role

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.+-]{0,254}", self.name, re.ASCII) or self.name.lower() in (MANIFEST, SIGNATURE):
            raise InvalidModel(
                f"expected a plain file name of at most 255 letters, digits and _.+-, found {self.name!r}"
            )
        _check_sha256(self.sha256, self.name)


@dataclass(frozen=True)
class Tensor:
    """An input or output of the network: `dtype` as NumPy names it, -1 in `shape` for a length that is not fixed."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """The network. What its ONNX file does not tell, as one from elsewhere may not, is None.

    Attributes:
        file: Name of the ONNX file.
        io: "tensor" for float32 and "tensor16" for float16 (B, 3, H, W) in [0, 1], "image" for uint8 (B, H, W, 3).
        input, output: B, the number of images at once, is the first length of their shapes: 1 mostly, or -1 for any.
        size_multiple: Number that height and width have to be multiples of; 1 for any size.
        precision: What it computes in, such as "fp16".
        topk: The pattern by which the attention keeps its k largest scores.
        config: Config of the network, see drsformer/config.py.
        weights_sha256: Hash of the checkpoint that it was exported from.
        provenance: Origin of that checkpoint: its training data, its parent, and the steps taken with their options.
    """

    file: str
    io: IO
    input: Tensor
    output: Tensor
    size_multiple: int
    precision: str | None
    topk: str | None
    config: dict[str, Any] | None
    weights_sha256: str | None
    provenance: dict[str, Any] | None

    @property
    def graph_io(self) -> GraphIO:
        """What its graph eats."""
        return GraphIO(self.io, self.size_multiple, self.input.shape[0])

    def __post_init__(self) -> None:
        if len(self.input.shape) != 4 or not _is_batch(self.input.shape[0]):
            raise InvalidModel(
                f"{self.file}: expected an input of 1 to {MAX_BATCH} images, or -1 for any number, and three more "
                f"lengths, found the shape {list(self.input.shape)}"
            )
        if not 1 <= self.size_multiple <= MAX_MULTIPLE:
            raise InvalidModel(
                f"{self.file}: expected a size multiple from 1 to {MAX_MULTIPLE}, found {self.size_multiple}"
            )


@dataclass(frozen=True)
class Profile:
    """Heights and widths that an engine takes, and those it is fastest at: (height, width) each; and how many images
    at once in `batch`, from the least to the most, with what it is fastest at between them."""

    min: tuple[int, int]
    opt: tuple[int, int]
    max: tuple[int, int]
    batch: tuple[int, int, int] = field(default=(1, 1, 1), metadata=LATER)

    def __post_init__(self) -> None:
        least, fastest, most = self.batch
        if not 1 <= least <= fastest <= most <= MAX_BATCH:
            raise InvalidModel(f"expected a profile of 1 to {MAX_BATCH} images, in ascending order, found {self.batch}")
        for low, opt, high in zip(self.min, self.opt, self.max, strict=True):
            if not 1 <= low <= opt <= high:
                raise InvalidModel(
                    f"expected a profile with 1 <= min <= opt <= max, found {self.min}, {self.opt}, {self.max}"
                )

    def __str__(self) -> str:
        most = f", up to {self.batch[2]} at once" if self.batch[2] > 1 else ""
        return " to ".join(dict.fromkeys((size_text(self.min), size_text(self.max)))) + most

    def takes(self, height: int, width: int, images: int = 1) -> bool:
        """Whether so many images of this size, already padded, fit at once; fewer than the least can be filled up."""
        fits = self.min[0] <= height <= self.max[0] and self.min[1] <= width <= self.max[1]
        return fits and images <= self.batch[2]


@dataclass(frozen=True)
class Engine:
    """A plan: the network compiled by one version of a library for some GPUs.

    Attributes:
        file: Name of the plan.
        version: Version of the library, in full.
        compute_capabilities: Kinds of GPU that it was built for, such as "8.6".
        flags: Further settings of the builder, by name, such as {"version_compatible": true}.
        onnx_sha256: Hash of the ONNX file that it was built from, which is the bundle's.
        build_seconds: How long that took; None where nobody looked.
    """

    file: str
    flavor: Flavor
    version: str
    compute_capabilities: tuple[str, ...]
    profiles: tuple[Profile, ...]
    flags: dict[str, Any]
    onnx_sha256: str
    build_seconds: float | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.+-]{1,100}", self.version, re.ASCII):
            raise InvalidModel(f"{self.file}: expected a version such as 11.4.0.106, found {self.version!r:.200}")
        for capability in self.compute_capabilities:
            if not re.fullmatch(r"\d+\.\d+", capability, re.ASCII):
                raise InvalidModel(f"{self.file}: expected compute capabilities such as 8.6, found {capability!r}")
        if not self.profiles:
            raise InvalidModel(f"{self.file}: expected at least one profile, found none")

    def profile_for(self, height: int, width: int, images: int = 1) -> int | None:
        """Index of the first profile that takes so many images of this size, already padded; None where none does."""
        return next((i for i, profile in enumerate(self.profiles) if profile.takes(height, width, images)), None)

    def max_batch(self, height: int, width: int) -> int:
        """How many images of this size, already padded, it takes at once at most; 0 where it takes none."""
        return max((profile.batch[2] for profile in self.profiles if profile.takes(height, width)), default=0)


@dataclass(frozen=True)
class Drift:
    """How far a file of the bundle is from the full model, as `export.validate` measures and names it.

    file:     what was measured, and `provider` where it ran.
    reference_sha256: hash of the full model's checkpoint.
    data:     which images, so many `images`, by which `protocol`; None without ground truth.
    psnr_between: the least over the images, in dB; None where the outputs are equal.
    max_difference: the largest, in levels of 255.
    The others are means over the images, and None without ground truth or where they are infinite; those of the rainy
    input are None in manifests that were written before there were such.
    """

    file: str
    provider: str
    reference_sha256: str
    data: str
    protocol: str | None
    images: int
    psnr_between: float | None
    max_difference: int
    reference_psnr: float | None = None
    candidate_psnr: float | None = None
    drop_db: float | None = None
    reference_ssim: float | None = None
    candidate_ssim: float | None = None
    input_psnr: float | None = field(default=None, metadata=LATER)
    input_ssim: float | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        _check_sha256(self.reference_sha256, f"drift of {self.file}")


@dataclass(frozen=True)
class Canary:
    """A known answer, by which a machine finds out whether what it runs is still the model.

    Attributes:
        file: Name of a file of two images, uint8 (2, height, width, 3) RGB without a header: the input, and what the
            model answers in float32.
        height: In pixels, a multiple of the model's size multiple, as `width`.
        floor_db: Least PSNR over RGB, in dB, between this answer and another that rounding can explain.
    """

    file: str
    height: int
    width: int
    floor_db: float

    @property
    def size(self) -> Size:
        return self.height, self.width

    def __post_init__(self) -> None:
        if not (min(self.size) >= 1 and max(self.size) <= MAX_CANARY and 0 <= self.floor_db <= 100):
            raise InvalidModel(
                f"{self.file}: expected a canary of at most {MAX_CANARY} pixels a side and a floor of 0 to 100 dB, "
                f"found {size_text(self.size)} and {self.floor_db}"
            )


@dataclass(frozen=True)
class Manifest:
    """What is in a bundle. One that contradicts itself raises InvalidModel on construction."""

    schema: int
    created_by: str
    model: Model
    files: tuple[File, ...]
    engines: tuple[Engine, ...] = ()
    drift: tuple[Drift, ...] = ()
    canaries: tuple[Canary, ...] = field(default=(), metadata=LATER)

    def __post_init__(self) -> None:
        by_name = {file.name: file for file in self.files}
        if len({name.lower() for name in by_name}) < len(self.files):  # some file systems do not tell A from a
            raise InvalidModel(f"expected every file once, found {[file.name for file in self.files]}")
        entries = (self.model, *self.engines, *self.canaries)
        roles = ["onnx", *["engine"] * len(self.engines), *["canary"] * len(self.canaries)]
        described = {entry.file: role for entry, role in zip(entries, roles, strict=True)}
        listed = {file.name: file.role for file in self.files if file.role in ("onnx", "engine", "canary")}
        if described != listed or len(described) < len(entries):
            raise InvalidModel(
                f"expected one model, the engines and the canaries under files, each described once, found "
                f"{list(listed)} there and {list(described)} described"
            )
        multiple = self.model.size_multiple
        for engine in self.engines:
            for profile in engine.profiles:
                if any(side % multiple for side in (*profile.min, *profile.max)):
                    raise InvalidModel(
                        f"{engine.file}: expected profiles in multiples of {multiple}, found "
                        f"{size_text(profile.min)} to {size_text(profile.max)}"
                    )
            if engine.onnx_sha256 != by_name[self.model.file].sha256:
                raise InvalidModel(
                    f"{engine.file} was built from another model: expected SHA-256 "
                    f"{by_name[self.model.file].sha256}, found {engine.onnx_sha256}; build it again"
                )
        for drift in self.drift:
            if drift.file not in self.networks:
                raise InvalidModel(f"expected a drift of one of {list(self.networks)}, found one of {drift.file!r}")
        for canary in self.canaries:
            if by_name[canary.file].size != canary.height * canary.width * 6:
                raise InvalidModel(
                    f"{canary.file}: expected {canary.height * canary.width * 6} bytes for two images of "
                    f"{size_text(canary.size)}, found {by_name[canary.file].size}"
                )
            if canary.height % multiple or canary.width % multiple:
                raise InvalidModel(
                    f"{canary.file}: expected a canary in multiples of {multiple}, found {size_text(canary.size)}"
                )

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the files that can run: the model and the engines."""
        return self.model.file, *(engine.file for engine in self.engines)

    def proof(self, name: str) -> Proof:
        """What the bundle has to say for one of `networks`."""
        if any(drift.file == name for drift in self.drift):
            return "proven"
        return "canary" if self.canaries else "not proven"

    def with_canary(self, file: File, canary: Canary) -> Manifest:
        """With one more canary."""
        return replace(self, files=(*self.files, file), canaries=(*self.canaries, canary))

    def with_file(self, file: File, engine: Engine | None = None) -> Manifest:
        """With one more engine or report, in place of one of the same name and what was measured on that."""
        return replace(
            self,
            files=(*(f for f in self.files if f.name != file.name), file),
            engines=(*(e for e in self.engines if e.file != file.name), *([engine] if engine else [])),
            drift=tuple(d for d in self.drift if d.file != file.name),
        )


def parse(content: bytes) -> Manifest:
    """A manifest from its JSON. Raises InvalidModel."""
    try:
        found = json.loads(content.decode(), object_pairs_hook=_object, parse_constant=_refuse_constant)
        if isinstance(found, dict) and found.get("schema") != SCHEMA:
            raise InvalidModel(
                f"expected schema {SCHEMA}, found {found.get('schema')!r:.100}; use the version of "
                "drsformer-deploy that made the bundle, or make it again"
            )
        return _parse(Manifest, found, "manifest")
    except InvalidModel as error:
        raise InvalidModel(f"{error!s:.1000}") from error  # what was found may be of any length
    except (ValueError, RecursionError) as error:
        raise InvalidModel(f"expected JSON, found what is not: {error!s:.1000}") from error


def dump(manifest: Manifest) -> bytes:
    """The inverse of `parse`."""
    return (json.dumps(asdict(manifest, dict_factory=_without_ones), indent=2) + "\n").encode()


def describe(file: File, input: Tensor, output: Tensor, metadata: dict[str, str]) -> Manifest:
    """The manifest of a bundle with only this model, by the metadata that `export.onnx` wrote into it. Raises
    InvalidModel for another kind of network."""
    graph_io = read_graph_io((input, output), metadata)
    try:
        config, provenance = (json.loads(metadata.get(key, "null")) for key in ("config", "provenance"))
    except (ValueError, RecursionError) as error:
        raise InvalidModel(
            f"{file.name}: expected JSON as config and provenance in its metadata, found {error}"
        ) from error
    model = Model(
        file=file.name,
        io=graph_io.io,
        input=input,
        output=output,
        size_multiple=graph_io.multiple,
        precision=metadata.get("precision"),
        topk=metadata.get("topk"),
        config=config,
        weights_sha256=metadata.get("weights_sha256"),
        provenance=provenance,
    )
    return Manifest(SCHEMA, f"drsformer-deploy {__version__}", model, (file,))


def read_graph_io(tensors: Sequence[Tensor], metadata: dict[str, str]) -> GraphIO:
    """What a graph with these inputs and outputs eats. Raises InvalidModel where that is neither tensors nor images."""
    match tensors:
        case [Tensor("input", "float32" | "float16" as dtype, (batch, 3, _, _)), Tensor("output", answered, _)] if (
            answered == dtype and _is_batch(batch)
        ):
            text = metadata.get("size_multiple", str(DEFAULT_MULTIPLE))
            if not re.fullmatch(r"\d{1,4}", text) or not 1 <= int(text) <= MAX_MULTIPLE:
                raise InvalidModel(
                    f"expected a whole number from 1 to {MAX_MULTIPLE} as size_multiple in its metadata, "
                    f"found {text!r:.100}"
                )
            return GraphIO("tensor" if dtype == "float32" else "tensor16", int(text), batch)
        case [Tensor("input", "uint8", (batch, _, _, 3)), Tensor("output", "uint8", _)] | [
            Tensor("input", "uint8", (batch, _, _, 3)),
            Tensor("output", "uint8", _),
            Tensor("finite", "float32", (_,)),
        ] if _is_batch(batch):
            return GraphIO("image", 1, batch)
    found = "; ".join(f"{t.name} {t.dtype} {t.shape}" for t in tensors)
    raise InvalidModel(
        "another kind of network: expected one input named input and one output named output, both "
        f"float32 or both float16 (B, 3, H, W), or both uint8 (B, H, W, 3) and beside them at most one named finite, "
        f"float32 (B,), found {found}"
    )


def _is_batch(length: int) -> bool:
    """Whether a graph may take so many images at once."""
    return length == ANY or 1 <= length <= MAX_BATCH


def _without_ones(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of an object, without the batch of a profile that takes one image: readers from before there were
    others take it then."""
    return {name: value for name, value in entries if (name, value) != ("batch", (1, 1, 1))}


def _parse(kind: Any, value: Any, where: str) -> Any:
    """JSON as an object of a type: one of the dataclasses above, or what their fields are made of."""
    arguments = get_args(kind)
    if is_dataclass(kind):
        names = [each.name for each in fields(kind)]
        later = {each.name for each in fields(kind) if each.metadata == LATER}
        if not isinstance(value, dict) or not set(names) - later <= set(value) <= set(names):
            found = f"the fields {list(value)}" if isinstance(value, dict) else json.dumps(value)
            raise InvalidModel(f"{where}: expected an object with the fields {names}, found {found}")
        hints = get_type_hints(kind)
        return kind(**{name: _parse(hints[name], value[name], f"{where}.{name}") for name in names if name in value})  # type: ignore
    if get_origin(kind) is types.UnionType:
        return None if value is None else _parse(arguments[0], value, where)
    if get_origin(kind) is tuple and isinstance(value, list):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(value) == len(kinds):
            return tuple(_parse(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    elif get_origin(kind) is Literal:
        if value in arguments:
            return value
    elif kind is float:
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
    elif type(value) is (get_origin(kind) or kind):
        return value
    expected = getattr(kind, "__name__", kind) if not arguments else str(kind).replace("typing.", "")
    raise InvalidModel(f"{where}: expected {expected}, found {json.dumps(value)}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a field that is there twice, two readers may take different ones."""
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError(f"a field twice among {[name for name, _ in pairs]}")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"the number {name}")


def _check_sha256(text: str, name: str) -> None:
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise InvalidModel(f"{name}: expected a SHA-256 of 64 digits 0-9 and a-f, found {text!r}")
