"""A bundle: a folder with a network, engines compiled from it, and a manifest that says what they are.

    from runtime import manifest

    bundle = manifest.load(Path("bundle"))                   # or load(Path("bundle"), public_key=Path("public.pem"))
    plan = bundle.read(bundle.manifest.engines[0].file)      # verified bytes, or InputError
    manifest.describe_onnx(Path("bundle/model.onnx")).save(Path("bundle"))    # makes a folder with a model a bundle

`manifest.json` names every file with its size and SHA-256, and no file is used before both are verified: a compiled
engine is native code to the library that loads it, and nothing inside it tells who made it. Hashes catch what breaks
or mixes up files. Against somebody who can write to the folder only a signature helps, since they can write a fitting
manifest too: Ed25519 over the exact bytes of `manifest.json`, detached and raw in `manifest.json.sig`, keys in PEM.

    openssl genpkey -algorithm ed25519 -out private.pem
    openssl pkey -in private.pem -pubout -out public.pem

The manifest is plain JSON for readers in any language: an object for each dataclass below, with all of its fields and
no others, lists for tuples and null for None. A reader that meets another `schema`, or any field that it does not
know, refuses the bundle rather than guess.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import sys
import types
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from runtime.cli import InputError, size_text, writing

SCHEMA = 1
"""Version of the manifest's format. Any change to the fields below is a new one."""

MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.sig"

DEFAULT_MULTIPLE = 8
"""Size multiple of a graph whose metadata does not name one: that of the released network."""

MAX_MULTIPLE = 1024
"""A larger one would have a small image padded to one that no memory holds."""

IO = Literal["tensor", "image"]
Role = Literal["onnx", "engine", "report"]
Flavor = Literal["rtx", "tensorrt"]
"""TensorRT for RTX or TensorRT."""


class MismatchError(InputError):
    """A file is not what the manifest or the signature says, so that nothing of the bundle may be used."""


@dataclass(frozen=True)
class File:
    """A file of the bundle. `name` is a plain name, without folders; `size` is in bytes."""

    name: str
    sha256: str
    size: int
    role: Role

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.+-]{0,254}", self.name, re.ASCII) or self.name.lower() in (MANIFEST, SIGNATURE):
            raise InputError(f"expected a plain file name of at most 255 letters, digits and _.+-, found {self.name!r}")
        _check_sha256(self.sha256, self.name)

    @classmethod
    def of(cls, path: Path, role: Role) -> File:
        """The entry for a file that is there."""
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            return cls(path.name, digest, stream.tell(), role)


@dataclass(frozen=True)
class Tensor:
    """An input or output of the network: `dtype` as NumPy names it, -1 in `shape` for a length that is not fixed."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """The network. What its ONNX file does not tell, as one from elsewhere may not, is None.

    file:           name of the ONNX file.
    io:             "tensor" for float32 (1, 3, H, W) in [0, 1], "image" for uint8 (1, H, W, 3).
    size_multiple:  what height and width have to be multiples of; 1 for any size.
    precision:      what it computes in, such as "fp16".
    topk:           the pattern by which the attention keeps its k largest scores.
    config:         of the network, see drsformer/config.py.
    weights_sha256: hash of the checkpoint that it was exported from.
    provenance:     of that checkpoint: what it was trained on, its parent, and the steps taken with their options.
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

    def __post_init__(self) -> None:
        if not 1 <= self.size_multiple <= MAX_MULTIPLE:
            raise InputError(
                f"{self.file}: expected a size multiple from 1 to {MAX_MULTIPLE}, found {self.size_multiple}"
            )


@dataclass(frozen=True)
class Profile:
    """Heights and widths that an engine takes, and those it is fastest at: (height, width) each."""

    min: tuple[int, int]
    opt: tuple[int, int]
    max: tuple[int, int]

    def __post_init__(self) -> None:
        for low, opt, high in zip(self.min, self.opt, self.max, strict=True):
            if not 1 <= low <= opt <= high:
                raise InputError(
                    f"expected a profile with 1 <= min <= opt <= max, found {self.min}, {self.opt}, {self.max}"
                )

    def takes(self, height: int, width: int) -> bool:
        """Whether an image of this size, already padded, fits."""
        return self.min[0] <= height <= self.max[0] and self.min[1] <= width <= self.max[1]


@dataclass(frozen=True)
class Engine:
    """A plan: the network compiled by one version of a library for some GPUs.

    file:                 name of the plan.
    version:              of the library, in full.
    compute_capabilities: of the GPUs that it was built for, such as "8.6".
    flags:                what the builder was told besides, by name, such as {"version_compatible": true}.
    onnx_sha256:          hash of the ONNX file that it was built from, which is the bundle's.
    build_seconds:        how long that took; None where nobody looked.
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
            raise InputError(f"{self.file}: expected a version such as 11.4.0.106, found {self.version!r:.200}")
        for capability in self.compute_capabilities:
            if not re.fullmatch(r"\d+\.\d+", capability, re.ASCII):
                raise InputError(f"{self.file}: expected compute capabilities such as 8.6, found {capability!r}")
        if not self.profiles:
            raise InputError(f"{self.file}: expected at least one profile, found none")


@dataclass(frozen=True)
class Drift:
    """How far a file of the bundle is from the full model, as `export.validate` measures and names it.

    file:     what was measured, and `provider` where it ran.
    reference_sha256: hash of the full model's checkpoint.
    data:     which images, so many `images`, by which `protocol`; None without ground truth.
    psnr_between: the least over the images, in dB; None where the outputs are equal.
    max_difference: the largest, in levels of 255.
    The others are means over the images, and None without ground truth or where they are infinite.
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

    def __post_init__(self) -> None:
        _check_sha256(self.reference_sha256, f"drift of {self.file}")


@dataclass(frozen=True)
class Manifest:
    """What is in a bundle. One that contradicts itself raises InputError on construction."""

    schema: int
    created_by: str
    model: Model
    files: tuple[File, ...]
    engines: tuple[Engine, ...] = ()
    drift: tuple[Drift, ...] = ()

    def __post_init__(self) -> None:
        by_name = {file.name: file for file in self.files}
        if len({name.lower() for name in by_name}) < len(self.files):  # some file systems do not tell A from a
            raise InputError(f"expected every file once, found {[file.name for file in self.files]}")
        described = {self.model.file: "onnx", **{engine.file: "engine" for engine in self.engines}}
        listed = {file.name: file.role for file in self.files if file.role in ("onnx", "engine")}
        if described != listed or len(described) <= len(self.engines):
            raise InputError(
                f"expected one model and the engines under files, each described once, found "
                f"{list(listed)} there and {list(described)} described"
            )
        multiple = self.model.size_multiple
        for engine in self.engines:
            for profile in engine.profiles:
                if any(side % multiple for side in (*profile.min, *profile.max)):
                    raise InputError(
                        f"{engine.file}: expected profiles in multiples of {multiple}, found "
                        f"{size_text(profile.min)} to {size_text(profile.max)}"
                    )
            if engine.onnx_sha256 != by_name[self.model.file].sha256:
                raise InputError(
                    f"{engine.file} was built from another model: expected SHA-256 "
                    f"{by_name[self.model.file].sha256}, found {engine.onnx_sha256}; build it again"
                )
        for drift in self.drift:
            if drift.file not in described:
                raise InputError(f"expected a drift of one of {list(described)}, found one of {drift.file!r}")

    def with_file(self, file: File, engine: Engine | None = None) -> Manifest:
        """With one more engine or report, in place of one of the same name and what was measured on that."""
        return replace(
            self,
            files=(*(f for f in self.files if f.name != file.name), file),
            engines=(*(e for e in self.engines if e.file != file.name), *([engine] if engine else [])),
            drift=tuple(d for d in self.drift if d.file != file.name),
        )

    def save(self, folder: Path, key: Path | None = None) -> Bundle:
        """Verify the files in `folder` and make it a bundle, signed if there is a private key (PEM, Ed25519).

        Comes last: a folder is a bundle from the moment that it has a manifest. Without a key, a former signature
        goes. Raises InputError where files differ from this manifest, a field has another type than it says, or the
        key cannot be used.
        """
        bundle = Bundle(folder, self)
        bundle.verify()
        content = (json.dumps(asdict(self), indent=2) + "\n").encode()
        parse(content)  # what nobody could read is not written
        if key is None:
            (folder / SIGNATURE).unlink(missing_ok=True)
        else:
            signature = _sign(content, key)
            with writing(folder / SIGNATURE) as temporary:
                temporary.write_bytes(signature)
        with writing(folder / MANIFEST) as temporary:
            temporary.write_bytes(content)
        return bundle


@dataclass(frozen=True)
class Bundle:
    """A folder and its manifest. Files are named as in the manifest; every method raises MismatchError where one is
    missing or another than it says."""

    folder: Path
    manifest: Manifest

    def read(self, name: str) -> bytes:
        """The content of a file: the very bytes that were verified, whatever happens to the file meanwhile."""
        file = self._file(name)
        with self._open(file) as stream:
            content = stream.read()
        self._compare(file, hashlib.sha256(content).hexdigest())
        return content

    def path(self, name: str) -> Path:
        """Where a file is, just verified. For what is dangerous to load, `read` it."""
        file = self._file(name)
        with self._open(file) as stream:
            self._compare(file, hashlib.file_digest(stream, "sha256").hexdigest())
        return self.folder / name

    def verify(self) -> None:
        """Verify every file."""
        for file in self.manifest.files:
            self.path(file.name)

    def unlisted(self) -> list[str]:
        """Names of what else is in the folder."""
        known = {MANIFEST, SIGNATURE, *(file.name for file in self.manifest.files)}
        return sorted(path.name for path in self.folder.iterdir() if path.name not in known)

    def _file(self, name: str) -> File:
        for file in self.manifest.files:
            if file.name == name:
                return file
        raise InputError(f"{self.folder}: expected one of {[f.name for f in self.manifest.files]}, found {name!r}")

    def _open(self, file: File) -> BufferedReader:
        path = _inside(self.folder, file.name)
        if path is None:
            raise MismatchError(f"{self.folder}: expected {file.name} of {file.size} bytes, found no such file")
        stream = path.open("rb")
        size = os.fstat(stream.fileno()).st_size
        if size != file.size:
            stream.close()
            raise MismatchError(f"{self.folder / file.name}: expected {file.size} bytes, found {size}; {_MEND}")
        return stream

    def _compare(self, file: File, sha256: str) -> None:
        if sha256 != file.sha256:
            raise MismatchError(f"{self.folder / file.name}: expected SHA-256 {file.sha256}, found {sha256}; {_MEND}")


_MEND = "fetch or build the bundle again"


def load(folder: str | os.PathLike[str], public_key: str | os.PathLike[str] | None = None) -> Bundle:
    """Open a bundle. Its files are verified as they are read.

    public_key: of the one who has to have signed it (PEM, Ed25519), who may as well give the private key.

    Raises InputError for a folder that is no bundle, an unknown schema, a manifest with an unknown, missing or wrong
    field, and with a public key, for a missing or wrong signature.
    """
    folder = Path(folder)
    path = _inside(folder, MANIFEST)
    if path is None:
        raise InputError(f"expected a bundle, which is a folder with a {MANIFEST}, found none at {folder}")
    content = path.read_bytes()
    if public_key is not None:
        signature = _inside(folder, SIGNATURE)
        if signature is None:
            raise MismatchError(f"{folder}: expected a bundle signed for {public_key}, found no {SIGNATURE}")
        _check_signature(content, signature, Path(public_key))
    try:
        return Bundle(folder, parse(content))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def parse(content: bytes) -> Manifest:
    """A manifest from its JSON. Raises InputError."""
    try:
        found = json.loads(content.decode(), object_pairs_hook=_object, parse_constant=_refuse_constant)
        if isinstance(found, dict) and found.get("schema") != SCHEMA:
            raise InputError(
                f"expected schema {SCHEMA}, found {found.get('schema')!r:.100}; use the version of "
                "drsformer-deploy that made the bundle, or make it again"
            )
        return _parse(Manifest, found, "manifest")
    except InputError as error:
        raise InputError(f"{error!s:.1000}") from error  # what was found may be of any length
    except (ValueError, RecursionError) as error:
        raise InputError(f"expected JSON, found what is not: {error!s:.1000}") from error


def load_to_change(folder: Path, key: Path | None) -> Manifest:
    """The manifest of a bundle that is to be saved again with the private key `key`. Raises InputError as `load` does,
    and for a signed bundle without the key of its signature."""
    signed = (folder / SIGNATURE).exists()
    if signed and key is None:
        raise InputError(f"{folder} is a signed bundle, and a change needs a new signature: give its key as --sign")
    return load(folder, key if signed else None).manifest


def describe(file: File, input: Tensor, output: Tensor, metadata: dict[str, str]) -> Manifest:
    """The manifest of a bundle with only this model, by the metadata that `export.onnx` wrote into it. Raises
    InputError for another kind of network."""
    io, multiple = contract((input, output), metadata)
    try:
        config, provenance = (json.loads(metadata.get(key, "null")) for key in ("config", "provenance"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{file.name}: expected JSON as config and provenance in its metadata, found {error}"
        ) from error
    model = Model(
        file=file.name,
        io=io,
        input=input,
        output=output,
        size_multiple=multiple,
        precision=metadata.get("precision"),
        topk=metadata.get("topk"),
        config=config,
        weights_sha256=metadata.get("weights_sha256"),
        provenance=provenance,
    )
    return Manifest(SCHEMA, _program(), model, (file,))


def describe_onnx(path: Path) -> Manifest:
    """`describe` for a file that ONNX Runtime can load without any other. Raises InputError for one that it cannot."""
    from runtime.ort import OrtSession  # which imports this module

    session = OrtSession(path, "cpu")
    described = describe(File.of(path, "onnx"), session.input, session.output, session.metadata)
    OrtSession(Bundle(path.parent, described), "cpu")
    return described


def contract(tensors: Sequence[Tensor], metadata: dict[str, str]) -> tuple[IO, int]:
    """What a graph with these inputs and outputs takes: tensors or images, and of which size multiple. Raises
    InputError for a graph that takes neither."""
    match tensors:
        case [Tensor("input", "float32", (_, 3, _, _)), Tensor("output", "float32", _)]:
            text = metadata.get("size_multiple", str(DEFAULT_MULTIPLE))
            if not re.fullmatch(r"\d{1,4}", text) or not 1 <= int(text) <= MAX_MULTIPLE:
                raise InputError(
                    f"expected a whole number from 1 to {MAX_MULTIPLE} as size_multiple in its metadata, "
                    f"found {text!r:.100}"
                )
            return "tensor", int(text)
        case [Tensor("input", "uint8", (_, _, _, 3)), Tensor("output", "uint8", _)]:
            return "image", 1
    found = "; ".join(f"{t.name} {t.dtype} {t.shape}" for t in tensors)
    raise InputError(
        "another kind of network: expected one input named input and one output named output, both "
        f"float32 (1, 3, H, W) or both uint8 (1, H, W, 3), found {found}"
    )


def _parse(kind: Any, value: Any, where: str) -> Any:
    """JSON as an object of a type: one of the dataclasses above, or what their fields are made of."""
    arguments = get_args(kind)
    if is_dataclass(kind):
        names = [field.name for field in fields(kind)]
        if not isinstance(value, dict) or sorted(value) != sorted(names):
            found = f"the fields {list(value)}" if isinstance(value, dict) else json.dumps(value)
            raise InputError(f"{where}: expected an object with the fields {names}, found {found}")
        hints = get_type_hints(kind)
        return kind(**{name: _parse(hints[name], value[name], f"{where}.{name}") for name in names})  # type: ignore
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
    raise InputError(f"{where}: expected {expected}, found {json.dumps(value)}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a field that is there twice, two readers may take different ones."""
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError(f"a field twice among {[name for name, _ in pairs]}")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"the number {name}")


def _inside(folder: Path, name: str) -> Path | None:
    """The path of a file in a folder; None where there is none. Raises InputError for a link that leads out."""
    path = folder / name
    if not path.is_file():
        return None
    if path.resolve().parent != folder.resolve():
        raise MismatchError(f"{path}: expected a file inside the bundle, found a link to {path.resolve()}")
    return path


def _check_sha256(text: str, name: str) -> None:
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise InputError(f"{name}: expected a SHA-256 of 64 digits 0-9 and a-f, found {text!r}")


def _sign(content: bytes, key: Path) -> bytes:
    return private_key(key).sign(content)


def private_key(path: Path) -> Any:
    """The Ed25519 private key in a PEM file. Raises InputError for any other file, and without `cryptography`."""
    return _load_key(path, "private")


def _check_signature(content: bytes, signature: Path, public_key: Path) -> None:
    key = _load_key(public_key, "public")
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature.read_bytes(), content)
    except InvalidSignature:
        raise MismatchError(
            f"{signature}: expected a signature of {MANIFEST} for {public_key}, found another; the "
            f"manifest was changed or signed by somebody else"
        ) from None


def _load_key(path: Path, kind: Literal["private", "public"]) -> Any:
    """The Ed25519 key in a PEM file; a private key has the public one in it."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise InputError(
            "signatures need the package cryptography, which is not installed: pip install cryptography"
        ) from error
    if not path.is_file():
        raise InputError(f"expected a {kind} key, found no file at {path}")
    content = path.read_bytes()
    try:
        if b"PRIVATE KEY" in content:
            key = serialization.load_pem_private_key(content, password=None)
        else:
            key = serialization.load_pem_public_key(content)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path}: expected an Ed25519 {kind} key in PEM without a password, found none") from error
    if kind == "public" and isinstance(key, ed25519.Ed25519PrivateKey):
        return key.public_key()
    if not isinstance(key, ed25519.Ed25519PrivateKey if kind == "private" else ed25519.Ed25519PublicKey):
        raise InputError(f"{path}: expected an Ed25519 {kind} key, found {type(key).__name__}")
    return key


def _program() -> str:
    """Who writes a manifest, with version."""
    name = "drsformer-deploy"
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:  # run from the source tree
        return name
