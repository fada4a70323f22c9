"""`python -m runtime.info`: what a bundle is, told after all of it was verified."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
from rich.console import Console

from runtime.bundle import load, save
from runtime.info import tables
from runtime.manifest import Drift
from runtime.session import describe_onnx
from tests.support.bundles import ENGINES, FILES, add_canary, flip, make_keys, rewrite, write_bundle
from tests.support.onnx_files import write_network


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "bundle")


def command(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["info", *map(str, arguments)])
    monkeypatch.delitem(sys.modules, "runtime.info", raising=False)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("runtime.info", run_name="__main__", alter_sys=True)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, *capsys.readouterr()


def test_tells_what_is_there(bundle, monkeypatch, capsys):
    (bundle / "notes.txt").touch()
    status, printed, error = command(monkeypatch, capsys, bundle)
    assert (status, error) == (0, "")
    found = load(bundle).manifest
    for file in found.files:
        assert any(
            file.name in line and f"{file.size:,}" in line and file.sha256[:12] in line for line in printed.splitlines()
        )
    for fact in (
        "float32 (1, 3, any, any)",
        "multiples of 4",
        "rank",
        "rtx 1.7.1.116",
        "tf32: False",
        "64x64 / 256x256 / 1088x1920",
        "3 of val",
        "protocol rain200",
        12 * "a",
        "30.2500",
        "equal",
        "Signature: none",
        "Not in the manifest: ['notes.txt']",
    ):
        assert fact in printed, fact
    assert json.loads(printed.splitlines()[-1]) == {
        "bundle": str(bundle),
        "schema": 1,
        "files": 4,
        "bytes": sum((bundle / name).stat().st_size for name in FILES),
        "engines": list(ENGINES),
        "proof": dict(zip(("model.onnx", *ENGINES), ("proven", "not proven", "not proven"), strict=True)),
        "canaries": [],
        "drift": [asdict(found.drift[0])],
        "worst_drop_db": 0.0,
        "unlisted": ["notes.txt"],
    }


def test_bundle_with_a_model_alone(tmp_path, monkeypatch, capsys):
    path = write_network(tmp_path / "model.onnx", metadata={"provenance": '{"steps": [{"command": "train"}, 7]}'})
    save(describe_onnx(path), tmp_path)
    status, printed, _ = command(monkeypatch, capsys, tmp_path)
    assert status == 0
    assert "train" in printed
    assert "engines  " not in printed
    assert "drift from" not in printed
    assert json.loads(printed.splitlines()[-1])["worst_drop_db"] is None


def test_every_file_is_proven_or_not(bundle, monkeypatch, capsys):
    status, printed, error = command(monkeypatch, capsys, bundle, "--require-proof")
    assert status == 1
    assert error == f"failed: not judged against the full model: {', '.join(ENGINES)}\n"
    lines = {name: next(line for line in printed.splitlines() if name in line) for name in ("model.onnx", *ENGINES)}
    assert " proven" in lines["model.onnx"]
    assert all("NOT PROVEN" in lines[name] for name in ENGINES)
    add_canary(bundle, lambda image: np.rint(image * np.float32(0.5)).astype(np.uint8), (64, 64))
    _, printed, _ = command(monkeypatch, capsys, bundle, "--require-proof")
    assert printed.count("by canary only") == 2
    proofs = json.loads(printed.splitlines()[-1])["proof"]
    assert proofs == {"model.onnx": "proven"} | dict.fromkeys(ENGINES, "canary")
    save(describe_onnx(bundle / "model.onnx"), bundle)
    rewrite(bundle, lambda manifest: manifest.update(drift=[drift_of("model.onnx")]))
    assert command(monkeypatch, capsys, bundle, "--require-proof")[0] == 0


def test_tables_keep_names_and_numbers_whole_at_80_columns(bundle):
    manifest = load(bundle).manifest
    name, data = "model_" * 12, "data_" * 15 + "/test"
    psnrs = dict(psnr_between=101.9012, input_psnr=26.3512, reference_psnr=36.1234, candidate_psnr=36.1)
    found = Drift(name, "cpu", 64 * "a", data, "rain200", 1000, max_difference=255, drop_db=-10.0123, **psnrs)
    file, model = replace(manifest.files[0], name=name, size=123_456_789), replace(manifest.model, file=name)
    console = Console(width=80)
    with console.capture() as capture:
        for table in tables(replace(manifest, files=(file,), model=model, engines=(), drift=(found,))):
            console.print(table)
    lines = capture.get().splitlines()
    assert all(len(line) <= 80 for line in lines)
    words = capture.get().split()
    assert {"123,456,789", "proven", "26.3512", "36.1234", "36.1000", "-10.0123", "101.9012"} <= set(words)
    assert name in "".join(line.split()[0] for line in lines[4:] if line.strip())


def drift_of(name: str) -> dict:
    return asdict(Drift(name, "cpu", 64 * "a", "val", None, 12, 80.0, 1))


def test_canaries_on_demand(bundle, monkeypatch, capsys):
    add_canary(bundle, lambda image: np.rint(image * np.float32(0.5)).astype(np.uint8), (16, 24))
    status, printed, error = command(monkeypatch, capsys, bundle, "--canary")
    assert (status, error) == (0, "")
    (found,) = json.loads(printed.splitlines()[-1])["canaries"]
    assert found.pop("milliseconds") > 0
    assert found == {
        "file": "model.onnx",
        "provider": "cpu",
        "height": 16,
        "width": 24,
        "psnr_db": None,
        "floor_db": 50.0,
        "passed": True,
    }
    assert "does not run: " in printed  # the engines, for which there is no GPU
    add_canary(bundle, lambda image: image, (64, 64))
    status, printed, error = command(monkeypatch, capsys, bundle, "--canary")
    assert (status, error) == (1, "failed: a canary was answered wrongly by model.onnx on cpu\n")
    assert [found["passed"] for found in json.loads(printed.splitlines()[-1])["canaries"]] == [True, False]


def test_text_of_a_bundle_is_only_text(bundle, monkeypatch, capsys):
    found = load(bundle).manifest
    save(replace(found, created_by="[red]x[/nothing]\x1b[2J"), bundle)
    (bundle / "\x1b[2J").touch()
    status, printed, _ = command(monkeypatch, capsys, bundle)
    assert status == 0
    assert "[red]x[/nothing]?[2J" in printed
    assert "\x1b" not in printed


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_mismatch_is_one_line_and_status_2(bundle, monkeypatch, capsys, name):
    flip(bundle / name, 2, bit=6)
    status, printed, error = command(monkeypatch, capsys, bundle)
    assert (status, printed) == (2, "")
    assert len(error.splitlines()) == 1
    assert name in error
    (bundle / name).unlink()
    assert command(monkeypatch, capsys, bundle)[0] == 2


def test_signature(tmp_path, monkeypatch, capsys):
    keys = make_keys(tmp_path)
    bundle = write_bundle(tmp_path / "bundle", key=keys / "private.pem")
    status, printed, _ = command(monkeypatch, capsys, bundle, "--public-key", keys / "public.pem")
    assert status == 0
    assert f"Signature: verified with {keys / 'public.pem'}" in printed
    assert "not verified" in command(monkeypatch, capsys, bundle)[1]
    status, printed, error = command(monkeypatch, capsys, bundle, "--public-key", keys / "others.pem")
    assert (status, printed) == (2, "")
    assert "expected a signature" in error


def test_usage(tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, capsys)[0] == 2
    assert command(monkeypatch, capsys, tmp_path / "none")[0] == 2
    assert "python -m runtime.info bundle/" in command(monkeypatch, capsys, "--help")[1]
