"""Every command of the project behind one name: `drsformer export.onnx ...` is `python -m export.onnx ...`."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from runtime.errors import one_line

COMMANDS = (
    *("drsformer.train", "drsformer.evaluate", "drsformer.rain"),
    *("compress.cost", "compress.prune", "compress.distill", "compress.quantize", "compress.search", "compress.grow"),
    *("export.onnx", "export.tensorrt", "export.validate", "export.triton"),
    *("runtime.derain", "runtime.bench", "runtime.info"),
)
"""Modules, as `python -m` takes them."""


def main() -> None:
    """Run the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("\n".join(help_lines()))
    elif (module := commands().get(name)) is not None:
        del sys.argv[1]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        print(f"error: expected a command, found {one_line(name)!r}; drsformer --help lists them", file=sys.stderr)
        sys.exit(2)


def commands() -> dict[str, str]:
    """Modules by the names of their commands; those of this package go without it."""
    return {module.removeprefix("drsformer."): module for module in COMMANDS}


def help_lines() -> list[str]:
    """What there is, each with the first line of its module, which is read and not imported, as that takes seconds."""
    lines = ["usage: drsformer COMMAND [OPTIONS]", "", "drsformer COMMAND --help shows examples and options:", ""]
    for name, module in commands().items():
        with (Path(__file__).parents[1] / Path(*module.split(".")).with_suffix(".py")).open() as file:
            lines.append(f"  {name:17} {file.readline().strip().strip(chr(34))}")
    return lines


if __name__ == "__main__":
    main()
