"""What every command of the package has in common: it answers at once, and its public names are there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import compress
from compress import groups

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["", ".cost", ".distill", ".grow", ".prune", ".quantize", ".search"])
def test_pytorch_waits_until_it_is_needed(name):
    """So that --help answers at once, and a missing package is one line."""
    code = f"import sys, compress{name}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "drsformer.config" in done.stdout.split()
    assert not {"torch", "onnx", "onnxruntime", "matplotlib", "lightning_fabric"} & set(done.stdout.split())


def test_public_names():
    public = {name: getattr(compress, name) for name in compress.__all__}
    assert public["remove"] is groups.remove
    with pytest.raises(AttributeError, match="no attribute 'shrink'"):
        compress.shrink  # noqa: B018
