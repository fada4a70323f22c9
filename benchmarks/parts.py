"""Carry files where only small ones pass: compress them, cut them into parts, and put them together again, bit for bit.

    python -m benchmarks.parts split teacher last.safetensors log.jsonl --output parts/
    python -m benchmarks.parts join parts/teacher.json --output weights/
    python -m benchmarks.parts split wheel wheels/*.whl --output parts/ --limit-mb 40

`split` writes NAME.json, which says what is in the parts, and NAME.00, NAME.01 and so on. Files of weights are taken
apart into byte planes first, the high bytes of all numbers and then the low ones: exponents lie close together and
compress well among themselves.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Annotated, Literal

import tyro

from runtime.cli import main
from runtime.errors import InputError, expect_between
from runtime.files import writing

LIMIT = 15 << 20
"""Bytes of a part at most, if no other limit is given."""

PLANES = {".safetensors": 2, ".pt": 4}
"""Bytes of a number in files that end so."""


def split(name: str, files: list[Path], output: Path, limit: int = LIMIT) -> list[Path]:
    """Write `files` as parts of at most `limit` bytes; returns what was written, the manifest first."""
    stream, described = b"", []
    for path in files:
        content, planes = path.read_bytes(), PLANES.get(path.suffix, 1)
        packed = [zlib.compress(content[i::planes], 6) for i in range(planes)]
        stream += b"".join(packed)
        described.append(
            {
                "file": path.name,
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "planes": [len(plane) for plane in packed],
            }
        )
    parts = [stream[i : i + limit] for i in range(0, len(stream), limit)]
    paths = [output / f"{name}.{i:02}" for i in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        with writing(path) as temporary:
            temporary.write_bytes(part)
    manifest = output / f"{name}.json"
    with writing(manifest) as temporary:
        temporary.write_text(json.dumps({"files": described, "parts": [path.name for path in paths]}, indent=1))
    return [manifest, *paths]


def join(manifest: Path, output: Path) -> list[Path]:
    """Write the files that were split, each once it is known to be whole. Raises InputError where a part is missing or
    was changed."""
    if not manifest.is_file():
        raise InputError(f"expected a file NAME.json that benchmarks.parts wrote, found none at {manifest}")
    try:
        told = json.loads(manifest.read_text())
        stream = memoryview(b"".join((manifest.parent / part).read_bytes() for part in told["parts"]))
        paths = []
        for file in told["files"]:
            content = bytearray(file["bytes"])
            for i, length in enumerate(file["planes"]):
                content[i :: len(file["planes"])] = zlib.decompress(stream[:length])
                stream = stream[length:]
            if hashlib.sha256(content).hexdigest() != file["sha256"]:
                raise ValueError(f"{file['file']} came out changed")
            paths.append(output / Path(file["file"]).name)
            with writing(paths[-1]) as temporary:
                temporary.write_bytes(content)
    except FileNotFoundError as error:
        raise InputError(f"{manifest}: expected all parts beside it, found no {Path(error.filename).name}") from None
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        raise InputError(f"{manifest}: expected it and its parts as benchmarks.parts wrote them ({error})") from None
    return paths


def parts(
    action: Annotated[Literal["split", "join"], tyro.conf.Positional],
    name: Annotated[str, tyro.conf.Positional],
    files: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    output: Path = Path("."),
    limit_mb: float = LIMIT / 1e6,
) -> list[Path]:
    """Split files, or join them again; returns the files written.

    Args:
        action: What to do.
        name: To split, what the parts are called; to join, the file NAME.json.
        files: What to split.
        output: Folder to write to.
        limit_mb: MB of a part at most.
    """
    if action == "join":
        return join(Path(name), output)
    if not files:
        raise InputError("expected files to split, found none")
    expect_between("limit_mb", limit_mb, 1e-6)
    return split(name, list(files), output, int(limit_mb * 1e6))


if __name__ == "__main__":
    main(parts, __doc__, summary=lambda paths: {path.name: path.stat().st_size for path in paths})
