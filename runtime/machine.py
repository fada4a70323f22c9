"""What this machine is, for those who have to know whether it is still the same one."""

from __future__ import annotations

import ctypes
import platform
import re
import subprocess
import sys
from pathlib import Path

from .errors import DeviceError


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
        driver = _cuda_driver()
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


def wait_for_stream(index: int, stream: int) -> None:
    """Wait until a GPU, by CUDA's number, has done what is on a stream of it, whichever is the calling thread's current
    one. Raises DeviceError."""
    driver, device, context = _cuda_driver(), ctypes.c_int(), ctypes.c_void_p()

    def check(code: int) -> None:
        if code:
            raise DeviceError(f"CUDA failed with {code} where it had to wait for stream {stream} of GPU {index}")

    check(driver.cuInit(0))
    check(driver.cuDeviceGet(ctypes.byref(device), index))
    check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))  # that of CUDA's runtime
    try:
        check(driver.cuCtxPushCurrent_v2(context))
        try:
            check(driver.cuStreamSynchronize(ctypes.c_void_p(stream)))
        finally:
            driver.cuCtxPopCurrent_v2(ctypes.byref(context))
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(device)


def has_gpu() -> bool:
    """Whether NVIDIA's driver finds a GPU, whatever else is installed to use it with."""
    try:
        driver, count = _cuda_driver(), ctypes.c_int()
    except OSError:
        return False
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _cuda_driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def nvidia(query: str) -> str | None:
    """What nvidia-smi answers to a query such as "name,driver_version", a line for each GPU; None without it."""
    try:
        return subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
