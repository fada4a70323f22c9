"""How much memory there is, and how much of it this process takes. Only Linux tells, in /proc; elsewhere all of this
answers None."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
STATUS = PROC / "self" / "status"
CGROUP = Path("/sys/fs/cgroup")


def available() -> int | None:
    """What this process could take besides what it has, in bytes: that which the machine has free, or what its
    container, service or job (a control group) may take, if that is less."""
    try:
        free = proc_bytes(PROC / "meminfo", "MemAvailable")
    except (OSError, LookupError):
        return None
    return min([free, *_left_to_groups()])


def _left_to_groups() -> Iterator[int]:
    """What is left to each of the control groups that this process is in, and to those around them."""
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":  # version 2
            root, files, cached = CGROUP, ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            files, cached = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"
            root = CGROUP / "memory"
        else:
            continue
        group = Path(name)
        for folder in (root / each.relative_to("/") for each in (group, *group.parents)):
            try:
                most, taken = (int((folder / file).read_text()) for file in files)
                unused = re.findall(rf"^{cached} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
                yield max(0, most - taken + int(unused[0]))
            except (OSError, ValueError, LookupError):  # not shown here, or no bound
                continue


def peak() -> int | None:
    """The most that this process has taken so far, in bytes. What `resource` knows includes the parent's, from before
    the program was loaded."""
    try:
        return proc_bytes(STATUS, "VmHWM")
    except (OSError, LookupError):
        return None


def proc_bytes(path: Path, name: str) -> int:
    """An entry of a file in /proc, in bytes. Raises OSError or LookupError where there is none."""
    return int(re.findall(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE)[0]) * 1024
