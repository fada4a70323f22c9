"""What this machine is, for those who have to know whether it is still the same one."""

from __future__ import annotations

import ctypes
import platform
import re
import subprocess
import sys
from pathlib import Path


def processor() -> str:
    """The name of the processor."""
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def cuda_device(index: int) -> str | None:
    """Name and UUID of the GPU to which CUDA gives this number; None where there is no such. Asks the driver, since
    nvidia-smi counts in another order and knows nothing of CUDA_VISIBLE_DEVICES."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    device, name, uuid = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.create_string_buffer(16)
    if (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), index)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetUuid_v2(uuid, device)
    ):
        return None
    return f"{name.value.decode(errors='replace')} {uuid.raw.hex()}"


def nvidia(query: str) -> str | None:
    """What nvidia-smi answers to a query such as "name,driver_version", a line for each GPU; None without it."""
    try:
        return subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
