"""Verifies a bundle and tells what is in it.

    python -m runtime.info bundle/
    python -m runtime.info bundle/ --public-key public.pem

Every file is compared with the size and the SHA-256 in the manifest, and with --public-key the manifest with its
signature. Exit status: 0 if the bundle is whole, else 2, after one line that says what is wrong. What else is in the
folder is named and does no harm: nothing loads it. The last line is one JSON object.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

# First of all, as it says what to install where tyro is missing.
from .cli import main

# isort: split
import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .bundle import Bundle, load
from .manifest import SIGNATURE, Manifest


def info(bundle: Path, public_key: Path | None = None) -> Bundle:
    """Open a bundle and verify every file of it.

    Args:
        bundle: Folder of the bundle.
        public_key: Key (PEM, Ed25519) of the one who has to have signed it.

    Raises:
        InputError: Anything is not as the manifest or the signature says.
    """
    opened = load(bundle, public_key)
    opened.verify()
    return opened


def tables(manifest: Manifest) -> list[Table]:
    """Files, model, engines and drift, for people; those that there are."""
    model = manifest.model
    result = [
        _table(
            "files",
            ["name", "role", "bytes", "SHA-256"],
            [[f.name, f.role, f"{f.size:,}", f.sha256[:12]] for f in manifest.files],
        ),
        _table(
            "model",
            ["", ""],
            [
                ["file", model.file],
                *(
                    [which, f"{t.name}, {t.dtype} ({', '.join('any' if n < 0 else str(n) for n in t.shape)})"]
                    for which, t in (("input", model.input), ("output", model.output))
                ),
                ["height and width", f"multiples of {model.size_multiple}" if model.size_multiple > 1 else "any"],
                ["precision", model.precision or "not stated"],
                ["top-k", model.topk or "not stated"],
                ["weights", (model.weights_sha256 or "not stated")[:12]],
                ["steps", _steps(model.provenance) or "not stated"],
                ["made by", manifest.created_by],
            ],
        ),
    ]
    if manifest.engines:
        rows = [
            [
                e.file,
                f"{e.flavor} {e.version}",
                " ".join(e.compute_capabilities),
                "\n".join(" / ".join(f"{h}x{w}" for h, w in (p.min, p.opt, p.max)) for p in e.profiles),
                "\n".join(f"{name}: {value}" for name, value in e.flags.items()),
            ]
            for e in manifest.engines
        ]
        result.append(_table("engines", ["file", "library", "GPUs", "min / opt / max HxW", "flags"], rows))
    if manifest.drift:
        rows = [
            [
                f"{d.file} on {d.provider}\n{d.reference_sha256[:12]}",
                f"{d.images} of {d.data}\nprotocol {d.protocol or 'none'}",
                _db(d.input_psnr),
                _db(d.reference_psnr),
                _db(d.candidate_psnr),
                _db(d.drop_db),
                "equal" if d.psnr_between is None else _db(d.psnr_between),
            ]
            for d in manifest.drift
        ]
        titles = ["file\nfull model", "images", "PSNR\ninput", "PSNR\nfull", "PSNR\nthis", "drop\ndB", "between\ndB"]
        result.append(_table("drift from the full model", titles, rows))
    return result


def summary(bundle: Bundle) -> dict[str, Any]:
    """For JSON."""
    manifest = bundle.manifest
    return {
        "bundle": os.fspath(bundle.folder),
        "schema": manifest.schema,
        "files": len(manifest.files),
        "bytes": sum(file.size for file in manifest.files),
        "engines": [engine.file for engine in manifest.engines],
        "drift": [asdict(drift) for drift in manifest.drift],
        "worst_drop_db": max((d.drop_db for d in manifest.drift if d.drop_db is not None), default=None),
        "unlisted": bundle.unlisted(),
    }


def _table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """Of text from a bundle of which nobody knows who wrote it: no markup, nothing that steers a terminal."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("".join(c if c.isprintable() or c == "\n" else "?" for c in escape(cell)) for cell in row))
    return table


def _steps(provenance: dict[str, Any] | None) -> str:
    """The commands that made the checkpoint, oldest first."""
    steps = (provenance or {}).get("steps")
    return " -> ".join(str(s.get("command")) for s in steps if isinstance(s, dict)) if isinstance(steps, list) else ""


def _db(value: float | None) -> str:
    return "" if value is None else f"{value:z.4f}"


def command(
    bundle: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="BUNDLE")], public_key: Path | None = None
) -> Bundle:
    """Verify a bundle and print what is in it.

    Args:
        bundle: Folder of the bundle.
        public_key: Refuse the bundle unless this key's owner signed it; see runtime/bundle.py.
    """
    opened = info(bundle, public_key)
    if public_key is not None:
        signature = f"verified with {public_key}"
    else:
        signature = "not verified, as no --public-key was given" if (bundle / SIGNATURE).is_file() else "none"
    console = Console()
    for table in tables(opened.manifest):
        console.print(table)
    print(f"All {len(opened.manifest.files)} files are as the manifest says. Signature: {signature}.")
    if unlisted := opened.unlisted():
        print(f"Not in the manifest: {unlisted}")
    return opened


def run() -> None:
    """The command line."""
    main(command, __doc__, summary)


if __name__ == "__main__":
    run()
