"""The finished steps of a long command, so that one that was killed does again only what it had not finished.

    cache = StepCache(Path("half.work"), {"weights": sha256, "macs": 0.5})
    rates = cache.json("rates", lambda: measure(network))
    half = cache.network("half", lambda: prune_network(network, targets, importances))

Each step is one file, written whole or not at all, and made only where it is not there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from drsformer import checkpoint
from drsformer.model import DRSformer
from runtime.errors import InputError
from runtime.files import writing

OPTIONS = "options.json"
"""What the steps in a folder depend on."""


class StepCache:
    """Steps by their names.

    Args:
        folder: Where they are kept; without one, nothing is.
        options: What the steps depend on, JSON-able; None to take the folder as it is.

    Raises:
        InputError: The folder holds steps of other options, or anything else.
    """

    def __init__(self, folder: Path | None = None, options: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        if folder is None or options is None:
            return
        path, wanted = folder / OPTIONS, json.loads(json.dumps(options))
        if not path.exists():
            if folder.exists() and any(folder.iterdir()):
                raise InputError(f"{folder}: expected the steps of this command or no such folder, found other files")
            with writing(path) as temporary:
                temporary.write_text(json.dumps(wanted, indent=1) + "\n")
        try:
            before = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{path}: expected the options of the steps in this folder, found something else; remove "
                "the folder to start again"
            ) from error
        for name in {**wanted, **before}:
            if wanted.get(name) != before.get(name):
                raise InputError(
                    f"{folder} holds steps with {name}={before.get(name)}, not {wanted.get(name)}; give the same "
                    "options to go on, or remove it to start again"
                )

    def within(self, name: str) -> StepCache:
        """The steps of a stage, in a folder of its own."""
        return StepCache(self.folder / name if self.folder else None)

    def json(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, JSON-able, or has returned before."""
        if self.folder is None:
            return make()
        path = self.folder / f"{name}.json"
        if not path.exists():
            made = json.dumps(make(), indent=1)
            with writing(path) as temporary:
                temporary.write_text(made + "\n")
        return json.loads(path.read_text())

    def network(self, name: str, make: Callable[[], DRSformer]) -> DRSformer:
        """The network that `make` returns, or has returned before."""
        if self.folder is None:
            return make()
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            return checkpoint.load(path).model
        made = make()
        checkpoint.save(path, made, {})
        return made

    def remove(self) -> None:
        """Remove them all, and last what says of which command they are."""
        if self.folder is not None:
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != OPTIONS:
                    path.unlink()
            shutil.rmtree(self.folder)


NO_CACHE = StepCache()
"""No steps are kept."""
