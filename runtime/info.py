"""Verifies a bundle and tells what is in it.

    python -m runtime.info bundle/
    python -m runtime.info bundle/ --public-key public.pem
    python -m runtime.info bundle/ --require-proof --canary

Every file is compared with the size and the SHA-256 in the manifest, and with --public-key the manifest with its
signature. The model and each engine are proven, which is to have been judged against the full model by
`export.validate --record`; or have canaries only, known answers that each machine compares with its own; or are NOT
PROVEN. With --canary, what can run here answers the canaries now. What else is in the folder is named and does no harm:
nothing loads it. The last line is one JSON object.

Exit status: 0 if the bundle is whole; 1 if a file is not proven and --require-proof is given, or a canary is answered
wrongly; else 2, after one line that says what is wrong.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

# First of all, as it says what to install where tyro is missing.
from .cli import main, progress_shown

# isort: split
import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .bundle import Bundle, load
from .canary import Answer, ask
from .contract import Session
from .errors import DerainError, MismatchError
from .manifest import SIGNATURE, Manifest, Profile, Proof
from .ort import OrtSession, installed
from .pixels import size_text
from .progress import OnProgress, silent, track
from .trt import TrtSession

PROOFS: dict[Proof, str] = {"proven": "proven", "canary": "by canary only", "not proven": "NOT PROVEN"}
"""In words."""


@dataclass(frozen=True)
class Asked:
    """How what runs here answered the canaries of a bundle.

    Attributes:
        file: Name of the model or the engine.
        provider: Where it ran.
        answers: One for each canary that it takes; none where it did not run.
        error: Why it did not run.
    """

    file: str
    provider: str
    answers: tuple[Answer, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Report:
    """A bundle whose files are as its manifest says.

    Attributes:
        asked: How they answered the canaries, where they were asked.
        failed: A canary was answered wrongly, or there is no proof where one is required.
    """

    bundle: Bundle
    asked: tuple[Asked, ...] = ()
    failed: bool = False

    @property
    def unproven(self) -> list[str]:
        """Names of the model and the engines that were not judged against the full model."""
        manifest = self.bundle.manifest
        return [name for name in manifest.networks if manifest.proof(name) != "proven"]

    @property
    def wrong(self) -> list[str]:
        """Names of the files that answered a canary wrongly, and where."""
        return [f"{a.file} on {a.provider}" for a in self.asked if not all(answer.passed for answer in a.answers)]


def ask_all(bundle: Bundle, on_progress: OnProgress = silent) -> tuple[Asked, ...]:
    """Have everything of a bundle that can run here answer its canaries, whatever is known of it.

    Args:
        bundle: An open bundle.
        on_progress: Is told how far it is.
    """
    ways: list[tuple[str, str, Callable[[], Session]]] = [
        (engine.file, "tensorrt", partial(TrtSession, bundle, engine)) for engine in bundle.manifest.engines
    ]
    model = bundle.manifest.model.file
    ways += [
        (model, name, partial(OrtSession, bundle, name))
        for name in ("cuda", "ort-tensorrt", "cpu")
        if name in installed()
    ]

    def asked(file: str, provider: str, way: Callable[[], Session]) -> Asked:
        try:
            return Asked(file, provider, tuple(ask(way(), bundle)))
        except MismatchError:
            raise
        except DerainError as error:
            return Asked(file, provider, error=str(error))

    return tuple(asked(*way) for way in track(ways, len(ways), "Asking the canaries", on_progress))


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
            ["name", "role", "bytes", "SHA-256", "proof"],
            [
                [
                    *(f.name, f.role, f"{f.size:,}", f.sha256[:12]),
                    PROOFS[manifest.proof(f.name)] if f.name in manifest.networks else "",
                ]
                for f in manifest.files
            ],
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
                "\n".join(map(_profile_text, e.profiles)),
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


def _profile_text(profile: Profile) -> str:
    sizes = " / ".join(map(size_text, (profile.min, profile.opt, profile.max)))
    return sizes if profile.batch == (1, 1, 1) else f"{sizes}, {' / '.join(map(str, profile.batch))} images"


def canary_table(asked: Iterable[Asked]) -> Table:
    """How the canaries were answered, for people."""
    rows: list[list[str]] = []
    for each in asked:
        rows += [
            [
                f"{each.file} on {each.provider}",
                size_text(answer.canary.size),
                {math.inf: "equal", -math.inf: "NaN"}.get(answer.psnr, f"{answer.psnr:.1f}"),
                f"{answer.canary.floor_db:.1f}",
                f"{answer.milliseconds:.0f}",
                "right" if answer.passed else "WRONG",
            ]
            for answer in each.answers
        ]
        if each.error:
            rows.append([f"{each.file} on {each.provider}", "", "", "", "", f"does not run: {each.error}"])
    return _table("canaries", ["file", "size", "dB", "floor", "ms", ""], rows)


def summary(report: Report) -> dict[str, Any]:
    """For JSON."""
    bundle, manifest = report.bundle, report.bundle.manifest
    return {
        "bundle": os.fspath(bundle.folder),
        "schema": manifest.schema,
        "files": len(manifest.files),
        "bytes": sum(file.size for file in manifest.files),
        "engines": [engine.file for engine in manifest.engines],
        "proof": {name: manifest.proof(name) for name in manifest.networks},
        "canaries": [
            {
                "file": each.file,
                "provider": each.provider,
                "height": answer.canary.height,
                "width": answer.canary.width,
                "psnr_db": round(answer.psnr, 2) if math.isfinite(answer.psnr) else None,
                "floor_db": answer.canary.floor_db,
                "passed": answer.passed,
                "milliseconds": round(answer.milliseconds, 3),
            }
            for each in report.asked
            for answer in each.answers
        ],
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
    bundle: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="BUNDLE")],
    public_key: Path | None = None,
    canary: bool = False,
    require_proof: bool = False,
) -> Report:
    """Verify a bundle and print what is in it.

    Args:
        bundle: Folder of the bundle.
        public_key: Refuse the bundle unless this key's owner signed it; see runtime/bundle.py.
        canary: Have the model and the engines answer the canaries on this machine.
        require_proof: Exit with status 1 unless the model and every engine were judged against the full model.
    """
    opened = info(bundle, public_key)
    if public_key is not None:
        signature = f"verified with {public_key}"
    else:
        signature = "not verified, as no --public-key was given" if (bundle / SIGNATURE).is_file() else "none"
    console = Console()
    for table in tables(opened.manifest):
        console.print(table)
    report = Report(opened)
    if canary:
        with progress_shown() as on_progress:
            report = Report(opened, ask_all(opened, on_progress))
        console.print(canary_table(report.asked))
    print(f"All {len(opened.manifest.files)} files are as the manifest says. Signature: {signature}.")
    if unlisted := opened.unlisted():
        print(f"Not in the manifest: {unlisted}")
    if report.wrong:
        print(f"failed: a canary was answered wrongly by {', '.join(report.wrong)}", file=sys.stderr)
    if require_proof and report.unproven:
        print(f"failed: not judged against the full model: {', '.join(report.unproven)}", file=sys.stderr)
    return replace(report, failed=bool(report.wrong or (require_proof and report.unproven)))


def run() -> None:
    """The command line."""
    main(command, __doc__, summary, status=lambda report: int(report.failed))


if __name__ == "__main__":
    run()
