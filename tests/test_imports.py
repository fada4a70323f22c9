"""Imports run one way: between the packages, and between the files of each."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PACKAGES = {
    "runtime": set(),
    "drsformer": {"runtime"},
    "export": {"runtime", "drsformer"},
    "compress": {"runtime", "drsformer", "export"},
}
"""What each package may import."""

RUNTIME = [
    *("version", "lazy", "errors", "files", "progress", "pixels"),  # the ground
    *("arrays", "memory", "machine", "contract", "tiling"),
    *("manifest", "bundle"),
    *("ort", "trt", "choice", "canary", "footprint"),
    *("session", "images", "pipeline", "hlg", "video"),  # the roof, and the files that it restores
    *("timing", "cli", "bench", "derain", "info", "triton"),
]
"""Files of the runtime from the ground up; each imports only files before it."""

STRANGERS = [{"ort", "trt", "choice", "canary"}]
"""Files that do not know each other."""


def modules(root: Path, package: str) -> dict[str, Path]:
    """Python files of a package by their dotted names."""
    files = sorted((root / package).glob("*.py"))
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(name: str, path: Path) -> set[str]:
    """Dotted names of what a file imports, anywhere in it; what is imported from a module, as if it were one too."""
    found: set[str] = set()
    package = name.split(".")[:-1] if path.name != "__init__.py" else name.split(".")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def graph(root: Path) -> dict[str, set[str]]:
    """Which files of the packages each of them imports, by dotted names."""
    known = {name: path for package in PACKAGES for name, path in modules(root, package).items()}
    return {name: (imports(name, path) & known.keys()) - {name, *PACKAGES} for name, path in known.items()}


def circle(edges: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_packages_import_one_way():
    for package, allowed in PACKAGES.items():
        for name, path in modules(ROOT, package).items():
            ours = {found.split(".")[0] for found in imports(name, path)} & {*PACKAGES, "tests", "benchmarks"}
            assert ours <= {package, *allowed}, name


def test_files_import_one_way():
    assert circle(graph(ROOT)) == []


def test_a_circle_is_found(tmp_path):
    for package in PACKAGES:
        for path in (ROOT / package).glob("*.py"):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(path.read_text())
    with open(tmp_path / "runtime" / "bundle.py", "a") as file:
        file.write("\n\ndef planted():\n    from . import session\n")
    assert {"runtime.bundle", "runtime.session"} <= set(circle(graph(tmp_path)))


def test_the_runtime_stands_on_its_ground():
    assert {f"runtime.{name}" for name in RUNTIME} == modules(ROOT, "runtime").keys() - {"runtime"}
    for name, below in graph(ROOT).items():
        if name.startswith("runtime."):
            file, floor = name.removeprefix("runtime."), RUNTIME.index(name.removeprefix("runtime."))
            wrong = {other.removeprefix("runtime.") for other in below} - set(RUNTIME[:floor])
            wrong |= {other for group in STRANGERS if file in group for other in group if f"runtime.{other}" in below}
            assert not wrong, f"runtime/{file}.py imports {', '.join(sorted(wrong))}"


def test_the_runtime_imports_itself_relatively():
    """So that its files can be installed under another name."""
    for name, path in modules(ROOT, "runtime").items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert not str(node.module).startswith("runtime"), name


def test_the_runtime_does_not_know_torch():
    for name, path in modules(ROOT, "runtime").items():
        found = {module.split(".")[0] for module in imports(name, path)}
        assert not found & {"torch", "onnx", "safetensors", "lightning_fabric"}, name


@pytest.mark.parametrize("package", PACKAGES)
def test_only_commands_know_the_command_line(package):
    for name, path in modules(ROOT, package).items():
        found = {module.split(".")[0] for module in imports(name, path)}
        if found & {"tyro", "rich"} and name != "runtime.cli":
            assert "runtime.cli.main" in imports(name, path), name


def test_import_is_light():
    """What a product imports brings neither the command line nor an engine."""
    code = "import sys, runtime; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found = {name.split(".")[0] for name in loaded.stdout.split()}
    assert "numpy" in found
    assert not found & {"tyro", "rich", "torch", "onnxruntime", "onnx", "PIL", "av", "cuda"}


def test_no_test_imports_another():
    """What tests share is in tests/support."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        tests = {module for module in imports(name, path) if module.startswith("tests.test_")}
        assert not tests, name
