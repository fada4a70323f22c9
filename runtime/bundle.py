"""A bundle on disk: a folder whose `manifest.json` says what every file in it is.

    bundle = load(Path("bundle"))                            # or load(Path("bundle"), public_key=Path("public.pem"))
    plan = bundle.read(bundle.manifest.engines[0].file)      # verified bytes, or InvalidModel

The manifest names every file with its size and SHA-256, and no file is used before both are verified: a compiled
engine is native code to the library that loads it, and nothing inside it tells who made it. Hashes catch what breaks
or mixes up files. Against somebody who can write to the folder only a signature helps, since they can write a fitting
manifest too: Ed25519 over the exact bytes of `manifest.json`, detached and raw in `manifest.json.sig`, keys in PEM.

    openssl genpkey -algorithm ed25519 -out private.pem
    openssl pkey -in private.pem -pubout -out public.pem
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

from .errors import InputError, InvalidModel, MismatchError
from .files import writing
from .manifest import MANIFEST, SIGNATURE, File, Manifest, Role, dump, parse

MEND = "fetch or build the bundle again"


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

    def beside(self, name: str, kind: str) -> Path:
        """Where a machine keeps what it has found out about a file: beside the folder and not in it, since whoever
        delivers a bundle should not deliver that too."""
        folder = self.folder.resolve()
        return folder.with_name(f"{folder.name}.{self._file(name).sha256[:12]}.{kind}")

    def unlisted(self) -> list[str]:
        """Names of what else is in the folder."""
        known = {MANIFEST, SIGNATURE, *(file.name for file in self.manifest.files)}
        return sorted(path.name for path in self.folder.iterdir() if path.name not in known)

    def _file(self, name: str) -> File:
        for file in self.manifest.files:
            if file.name == name:
                return file
        raise InvalidModel(f"{self.folder}: expected one of {[f.name for f in self.manifest.files]}, found {name!r}")

    def _open(self, file: File) -> BufferedReader:
        path = _inside(self.folder, file.name)
        if path is None:
            raise MismatchError(f"{self.folder}: expected {file.name} of {file.size} bytes, found no such file")
        stream = path.open("rb")
        size = os.fstat(stream.fileno()).st_size
        if size != file.size:
            stream.close()
            raise MismatchError(f"{self.folder / file.name}: expected {file.size} bytes, found {size}; {MEND}")
        return stream

    def _compare(self, file: File, sha256: str) -> None:
        if sha256 != file.sha256:
            raise MismatchError(f"{self.folder / file.name}: expected SHA-256 {file.sha256}, found {sha256}; {MEND}")


def load(folder: str | os.PathLike[str], public_key: str | os.PathLike[str] | None = None) -> Bundle:
    """Open a bundle. Its files are verified as they are read.

    Args:
        folder: Folder of the bundle.
        public_key: Key (PEM, Ed25519) of the one who has to have signed it; their private key will do as well.

    Raises:
        InvalidModel: For a folder that is no bundle, an unknown schema, a manifest with an unknown, missing or wrong
            field, and with a public key, for a missing or wrong signature.
        InputError: For a public key that cannot be used.
    """
    folder = Path(folder)
    path = _inside(folder, MANIFEST)
    if path is None:
        raise InvalidModel(f"expected a bundle, which is a folder with a {MANIFEST}, found none at {folder}")
    content = path.read_bytes()
    if public_key is not None:
        signature = _inside(folder, SIGNATURE)
        if signature is None:
            raise MismatchError(f"{folder}: expected a bundle signed for {public_key}, found no {SIGNATURE}")
        _check_signature(content, signature, Path(public_key))
    try:
        return Bundle(folder, parse(content))
    except InvalidModel as error:
        raise InvalidModel(f"{path}: {error}") from error


def describe_file(path: Path, role: Role) -> File:
    """The manifest's entry for a file that is there."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return File(path.name, digest, stream.tell(), role)


def save(manifest: Manifest, folder: Path, key: Path | None = None) -> Bundle:
    """Verify the files in `folder` and make it a bundle, signed if there is a private key (PEM, Ed25519).

    Comes last: a folder is a bundle from the moment that it has a manifest. Without a key, a former signature goes.

    Raises:
        InputError: Where files differ from the manifest, a field has another type than it says, or the key cannot be
            used.
    """
    bundle = Bundle(folder, manifest)
    bundle.verify()
    content = dump(manifest)
    parse(content)  # what nobody could read is not written
    if key is None:
        (folder / SIGNATURE).unlink(missing_ok=True)
    else:
        signature = private_key(key).sign(content)
        with writing(folder / SIGNATURE) as temporary:
            temporary.write_bytes(signature)
    with writing(folder / MANIFEST) as temporary:
        temporary.write_bytes(content)
    return bundle


def load_to_change(folder: Path, key: Path | None) -> Manifest:
    """The manifest of a bundle that is to be saved again with the private key `key`. Raises InputError as `load` does,
    and for a signed bundle without the key of its signature."""
    signed = (folder / SIGNATURE).exists()
    if signed and key is None:
        raise InputError(f"{folder} is a signed bundle, and a change needs a new signature: give its key as `sign`")
    return load(folder, key if signed else None).manifest


def _inside(folder: Path, name: str) -> Path | None:
    """The path of a file in a folder; None where there is none. Raises InputError for a link that leads out."""
    path = folder / name
    if not path.is_file():
        return None
    if path.resolve().parent != folder.resolve():
        raise MismatchError(f"{path}: expected a file inside the bundle, found a link to {path.resolve()}")
    return path


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
