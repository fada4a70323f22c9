"""What is installed: `derainer`, which a product embeds, and `drsformer-deploy`, each without the checkout."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

from drsformer.__main__ import COMMANDS
from runtime import Derainer, __version__
from runtime.images import Photo, read_rgb
from tests.support.bundles import flip, make_keys, write_bundle

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PHOTOGRAPH = ROOT / "docs" / "photographs" / "chelsea.jpg"
BASE = ("numpy", "onnxruntime", "pillow")
CLI = ("tyro", "rich")

PRODUCT = """
import compress, export, runtime
assert compress.OURS and export.OURS and runtime.OURS

import sys
import derainer
loaded = sorted(sys.modules)

import numpy as np
np.save("restored.npy", derainer.Derainer(provider="cpu")(np.load("image.npy")))
print(derainer.__version__, derainer.__file__, *loaded, sep="\\n")
"""


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A program that is told nothing of the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = [str(argument) for argument in command]
    return subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def output(*command: object, cwd: Path) -> str:
    """What a program prints, which must not fail."""
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done
    return done.stdout


def refusal(*command: object, cwd: Path) -> str:
    """The one line with which a command ends that cannot do what it was given."""
    done = run(*command, cwd=cwd)
    assert (done.returncode, done.stdout) == (2, ""), done
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("cpp", "build", "*.egg-info", "__pycache__"))


def build(folder: Path) -> Path:
    """The wheel of a distribution, from its source distribution and not from its folder."""
    output(sys.executable, "-c", "from setuptools.build_meta import build_sdist; build_sdist('.')", cwd=folder)
    (sdist,) = folder.glob("*.tar.gz")
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder)
    output(sys.executable, "-m", "pip", "wheel", *options, sdist, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(folder: Path, wheel: Path, *needed: str) -> Path:
    """A new environment with a wheel and with links to packages of this one; its folder of programs."""
    venv.create(folder, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    for name in with_requirements(*needed):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site_packages / top).exists():  # as of a namespace that two of them share
                (site_packages / top).symlink_to(str(distribution.locate_file(top)))
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python")
    output(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return folder / "bin"


def with_requirements(*names: str) -> set[str]:
    """Distributions, and those that they require, as far as they are installed."""
    found, left = set(), set(names)
    while left:
        name = left.pop()
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # for another system
            continue
        found.add(name)
        left |= {re.split(r"[^\w.-]", text)[0] for text in requirements if "extra ==" not in text} - found
    return found


@pytest.fixture(scope="module")
def derainer_wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("derainer") / "source"
    copy(ROOT / "runtime", folder)
    return build(folder)


@pytest.fixture(scope="module")
def base(derainer_wheel, tmp_path_factory) -> Path:
    """Programs of an environment with `derainer`."""
    return install(tmp_path_factory.mktemp("base"), derainer_wheel, *BASE)


@pytest.fixture(scope="module")
def cli(derainer_wheel, tmp_path_factory) -> Path:
    """Programs of an environment with `derainer[cli]`."""
    return install(tmp_path_factory.mktemp("cli"), derainer_wheel, *BASE, *CLI)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Programs of an environment with `drsformer-deploy`, without its extras."""
    folder = tmp_path_factory.mktemp("whole")
    for package in ("compress", "drsformer", "export", "runtime"):
        copy(ROOT / package, folder / "source" / package)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder / "source")
    return install(folder / "environment", build(folder / "source"), *BASE, *CLI)


def test_the_wheel_is_whole_and_holds_nothing_else(derainer_wheel):
    with zipfile.ZipFile(derainer_wheel) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(f"derainer-{__version__}.dist-info/METADATA").decode()
        assert wheel.read("derainer/drsformer-xs.onnx") == (ROOT / "runtime" / "drsformer-xs.onnx").read_bytes()
        assert wheel.read(f"derainer-{__version__}.dist-info/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert {"derainer/py.typed", "derainer/VERSION"} <= names
    templates = {f"derainer/templates/{path.name}" for path in (ROOT / "runtime" / "templates").iterdir()}
    assert templates <= names
    assert {name.partition("/")[0] for name in names} == {"derainer", f"derainer-{__version__}.dist-info"}
    required = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", metadata, re.MULTILINE)
    assert sorted(name.lower() for name in required) == sorted(BASE)


def test_a_product_may_have_names_like_ours(cli, tmp_path):
    (tmp_path / "runtime.py").write_text("OURS = True")
    for package in ("compress", "export"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("OURS = True")
    (tmp_path / "product.py").write_text(PRODUCT)
    image = read_rgb(PHOTOGRAPH)[:61, :90]
    np.save(tmp_path / "image.npy", image)
    version, file, *loaded = output(cli / "python", "product.py", cwd=tmp_path).splitlines()
    assert version == __version__
    assert Path(file).is_relative_to(cli.parent)
    assert not {"tyro", "rich", "torch", "onnxruntime", "PIL"} & set(loaded)
    np.testing.assert_array_equal(np.load(tmp_path / "restored.npy"), Derainer(provider="cpu")(image))


def test_scripts_are_the_commands(cli, tmp_path):
    image = read_rgb(PHOTOGRAPH)[:61, :90]
    Photo(image).save(tmp_path / "a.png")
    assert output(cli / "derain", "a.png", "b.png", "--provider", "cpu", cwd=tmp_path).startswith("1 image restored")
    np.testing.assert_array_equal(read_rgb(tmp_path / "b.png"), Derainer(provider="cpu")(image))
    assert "expected an image" in refusal(cli / "derain", "none.png", "b.png", cwd=tmp_path)
    timed = output(cli / "derainer-bench", "--size", "16x16", "--seconds", "0", cwd=tmp_path).splitlines()[-1]
    assert json.loads(timed)["timings"][0]["peak_mib"]
    bundle = write_bundle(tmp_path / "bundle")
    assert json.loads(output(cli / "derainer-info", bundle, cwd=tmp_path).splitlines()[-1])["engines"]
    flip(bundle / "model.onnx", 100)
    assert "expected SHA-256" in refusal(cli / "derainer-info", bundle, cwd=tmp_path)


@pytest.mark.parametrize("command", [("derain",), ("python", "-m", "derainer.derain")])
def test_help_shows_the_command_as_it_is_typed(cli, tmp_path, command):
    typed = " ".join(command)
    text = output(cli / command[0], *command[1:], "--help", cwd=tmp_path)
    assert text.startswith(f"usage: {typed} ")
    assert f"    {typed} rainy.jpg clean.jpg" in text


@pytest.mark.parametrize(
    "command", ["derain a.png b.png", "derainer-info a", "derainer-bench", "python -m derainer.derain a.png b.png"]
)
def test_commands_without_their_extra(base, tmp_path, command):
    program, *arguments = command.split()
    line = refusal(base / program, *arguments, cwd=tmp_path)
    assert line.endswith(", which is not installed: pip install 'derainer[cli]'")


def test_videos_and_signatures_without_their_extras(cli, tmp_path):
    (tmp_path / "a.mp4").touch()
    assert "pip install av" in refusal(cli / "derain", "a.mp4", "b.mp4", cwd=tmp_path)
    bundle = write_bundle(tmp_path / "bundle", key=make_keys(tmp_path) / "private.pem")
    told = refusal(cli / "derainer-info", bundle, "--public-key", tmp_path / "public.pem", cwd=tmp_path)
    assert "pip install cryptography" in told


def test_a_report_with_its_extra_and_without(derainer_wheel, cli, tmp_path):
    Photo(read_rgb(PHOTOGRAPH)[:61, :90]).save(tmp_path / "a.png")
    arguments = ("a.png", "b.png", "--provider", "cpu", "--report", "page.html")
    assert refusal(cli / "derain", *arguments, cwd=tmp_path).endswith(": pip install 'derainer[report]'")
    reporting = install(tmp_path / "reporting", derainer_wheel, *BASE, *CLI, "Jinja2")
    assert output(reporting / "derain", *arguments, cwd=tmp_path).endswith("Report: page.html\n")
    assert "<dd>derain a.png b.png --provider cpu --report page.html</dd>" in (tmp_path / "page.html").read_text()


def test_one_name_for_all_commands(whole, tmp_path):
    listed = re.findall(r"^  ([\w.]+) +\w.*", output(whole / "drsformer", cwd=tmp_path), re.MULTILINE)
    assert [name if "." in name else f"drsformer.{name}" for name in listed] == list(COMMANDS)
    (tmp_path / "x.safetensors").touch()
    arguments = ("--weights", "x.safetensors", "--output", "x.onnx")
    for command in (("drsformer", "export.onnx"), ("python", "-m", "export.onnx")):
        line = refusal(whole / command[0], *command[1:], *arguments, cwd=tmp_path)
        told = r"error: needs the package \w+, which is not installed: pip install 'drsformer-deploy\[(torch|export)\]'"
        assert re.fullmatch(told, line)
    assert "expected a command, found 'onnx'" in refusal(whole / "drsformer", "onnx", cwd=tmp_path)
    bundle = write_bundle(tmp_path / "bundle")
    assert "All 4 files are as the manifest says" in output(whole / "drsformer", "runtime.info", bundle, cwd=tmp_path)


def test_help_needs_no_extra(whole, tmp_path):
    for module in COMMANDS:
        text = output(whole / "python", "-m", module, "--help", cwd=tmp_path)
        assert text.startswith(f"usage: python -m {module} ")


def test_every_command_has_its_name():
    packages = {module.partition(".")[0] for module in COMMANDS}
    files = [file for package in packages for file in (ROOT / package).glob("*.py")]
    programs = {f"{file.parent.name}.{file.stem}" for file in files if '__name__ == "__main__"' in file.read_text()}
    assert programs - {"drsformer.__main__", "runtime.footprint"} == set(COMMANDS)


def floors(pyproject: Path) -> dict[str, str]:
    """Lowest versions by the names of packages."""
    project = tomllib.loads(pyproject.read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    return {found[1].lower(): found[2] for text in texts if (found := re.fullmatch(r"([\w-]+)>=([\d.]+)", text))}


def test_floors_are_those_that_are_tested():
    """`make floors-test` runs at the versions of constraints-floors.txt."""
    lowest = floors(ROOT / "runtime" / "pyproject.toml")
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-floors.txt").read_text(), re.MULTILINE))
    tried = {name: lowest[name] for name in (*BASE, *CLI, "av", "cryptography")}
    assert tried.items() <= pinned.items()
    assert lowest.items() <= floors(ROOT / "pyproject.toml").items()
