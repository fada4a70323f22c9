"""What this machine is, for those who have to know whether it is still the same one."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path


def processor() -> str:
    """The name of the processor."""
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def nvidia(query: str) -> str | None:
    """What nvidia-smi answers to a query such as "name,driver_version", a line for each GPU; None without it."""
    try:
        return subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
