"""Bundles and keys, and ways to damage them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from runtime.bundle import describe_file, load, save
from runtime.manifest import Canary, Drift, Engine, Profile
from runtime.session import describe_onnx
from tests.support.onnx_files import write_network

ENGINES = ("model.rtx-sm86.engine", "model.rtx-sm89.engine")


FILES = ("model.onnx", *ENGINES, "report.html")


def write_bundle(folder: Path, scale: float = 0.5, key: Path | None = None) -> Path:
    """A network that multiplies by `scale`, two plans that are none, and a report."""
    folder.mkdir()
    write_network(folder / "model.onnx", scale, metadata={"size_multiple": "4", "config": '{"a": 1}', "topk": "rank"})
    made = describe_onnx(folder / "model.onnx")
    for i, name in enumerate(ENGINES):
        (folder / name).write_bytes(bytes(range(100)) + b"%d %.2f" % (i, scale))
        engine = Engine(
            file=name,
            flavor="rtx",
            version="1.7.1.116",
            compute_capabilities=("8.6",),
            flags={"tf32": False},
            profiles=(Profile((64, 64), (256, 256), (1088, 1920)),),
            onnx_sha256=made.files[0].sha256,
        )
        made = made.with_file(describe_file(folder / name, "engine"), engine)
    (folder / "report.html").write_text("<html>")
    made = made.with_file(describe_file(folder / "report.html", "report"))
    drift = Drift("model.onnx", "cpu", 64 * "a", "val", "rain200", 3, None, 0, reference_psnr=30.25, drop_db=0.0)
    save(replace(made, drift=(drift,)), folder, key)
    return folder


def add_canary(
    folder: Path, answer: Callable[[np.ndarray], np.ndarray], size: tuple[int, int] = (16, 24), floor_db: float = 50.0
) -> Path:
    """Add a canary of noise to a bundle, whose known answer `answer` makes of it: uint8 (H, W, 3) -> the same."""
    image = np.random.default_rng(size[0]).integers(0, 256, (*size, 3), dtype=np.uint8)
    path = folder / f"canary.{size[0]}x{size[1]}.rgb"
    path.write_bytes(np.stack([image, answer(image)]).tobytes())
    entry = Canary(path.name, *size, floor_db=floor_db)
    save(load(folder).manifest.with_canary(describe_file(path, "canary"), entry), folder)
    return folder


def make_keys(folder: Path) -> Path:
    """private.pem and public.pem as the documentation says; also those of somebody else."""
    for private, public in (("private", "public"), ("others-private", "others")):
        private, public = (folder / f"{name}.pem" for name in (private, public))
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
        subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return folder


def flip(path: Path, byte: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def rewrite(bundle: Path, change: Callable[[dict], object]) -> None:
    """Change the manifest as JSON."""
    content = json.loads((bundle / "manifest.json").read_text())
    change(content)
    (bundle / "manifest.json").write_text(json.dumps(content))
