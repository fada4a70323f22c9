"""The package `export`: what it declares, and commands that load what they need when they need it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import export

ROOT = Path(__file__).parents[1]

HEAVY = {
    "jinja2",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "polygraphy",
    "tensorrt",
    "tensorrt_rtx_bindings",
    "torch",
}

HELP = """
import runpy, sys
sys.argv = ["command", "--help"]
try:
    runpy.run_module("export.{command}", run_name="__main__", alter_sys=True)
except SystemExit as stopped:
    assert stopped.code == 0
print(*sys.modules)
"""

WITHOUT = """
import runpy, sys
sys.modules["{package}"] = None
sys.argv = ["command", *{arguments}]
runpy.run_module("export.{command}", run_name="__main__", alter_sys=True)
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_every_declared_name_is_there():
    for name in export.__all__:
        assert getattr(export, name).__module__.startswith(("typing", "export.")), name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = export.nothing


def test_import_is_light():
    loaded = python("import sys, export; print(*sys.modules)")
    assert not {name.partition(".")[0] for name in loaded.stdout.split()} & (HEAVY | {"rich", "tyro"})
    assert "export" in loaded.stdout.split()


@pytest.mark.parametrize("command", ["onnx", "tensorrt", "triton", "validate"])
def test_help_loads_nothing_heavy(command):
    shown = python(HELP.format(command=command))
    assert shown.returncode == 0, shown.stderr
    assert "--help" in shown.stdout
    assert not {name.partition(".")[0] for name in shown.stdout.splitlines()[-1].split()} & HEAVY


@pytest.mark.parametrize(
    ("command", "package", "extra", "arguments"),
    [
        ("onnx", "onnxscript", "export", "--weights weights/drsformer-xs.safetensors"),
        ("tensorrt", "onnx", "export", "--onnx runtime/drsformer-xs.onnx --output {folder}/bundle"),
        ("validate", "polygraphy", "export", "--reference a.pth --candidate b.onnx --data docs/photographs"),
        (
            "validate",
            "jinja2",
            "report",
            "--reference a.pth --candidate b.onnx --data docs --report {folder}",
        ),
    ],
)
def test_a_package_that_is_missing_is_one_line(command, package, extra, arguments, tmp_path):
    words = arguments.format(folder=tmp_path).split()
    refused = python(WITHOUT.format(command=command, package=package, arguments=words))
    assert refused.returncode == 2
    mend = f"pip install 'drsformer-deploy[{extra}]'"
    assert refused.stderr == f"error: needs the package {package}, which is not installed: {mend}\n"
    assert list(tmp_path.iterdir()) == []
