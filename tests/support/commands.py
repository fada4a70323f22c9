"""`python -m runtime.derain` within the process of a test, and a network that may take its time."""

import runpy
import sys
import time

import pytest

from runtime.errors import InputError


def command(monkeypatch, *arguments):
    """Run the command in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["derain", *map(str, arguments)])
    monkeypatch.delitem(sys.modules, "runtime.derain", raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("runtime.derain", run_name="__main__", alter_sys=True)
    return stop.value.code


class Session:
    """Halves every value, after a while. Refuses what is wider than 24 pixels."""

    multiple, provider = 1, "nowhere"

    def __init__(self, seconds=0.0):
        self.seconds = seconds

    def run(self, batch):
        time.sleep(self.seconds)
        if batch.shape[3] == 32:
            raise MemoryError
        if batch.shape[3] > 24:
            raise InputError("too wide")
        return batch / 2
