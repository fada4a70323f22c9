"""Imports run one way: runtime, then drsformer, then export, then compress."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "runtime": set(),
    "drsformer": {"runtime"},
    "export": {"runtime", "drsformer"},
    "compress": {"runtime", "drsformer", "export"},
}
OURS = {*MAY_IMPORT, "tests", "benchmarks"}


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(str(node.module).split(".")[0])
    return names


@pytest.mark.parametrize("package", [name for name in MAY_IMPORT if (ROOT / name).is_dir()])
def test_imports_run_one_way(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        wrong = imported(path) & OURS - {package} - MAY_IMPORT[package]
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_runtime_does_not_know_torch():
    for path in (ROOT / "runtime").rglob("*.py"):
        assert not imported(path) & {"torch", "onnx", "safetensors", "lightning_fabric"}, path
