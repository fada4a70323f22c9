"""Which engine of a bundle runs on a GPU. `runtime/cpp/choice.cpp` chooses alike."""

from __future__ import annotations

from collections.abc import Callable

from .bundle import Bundle
from .errors import DeviceError
from .manifest import FLAVOR_TITLES, Engine, Flavor


def choose_engine(bundle: Bundle, capability: str, version_of: Callable[[Flavor], str]) -> Engine:
    """The newest engine of a bundle that fits a GPU and the library that is installed.

    Args:
        bundle: An open bundle.
        capability: Compute capability of the GPU, such as "8.9".
        version_of: Tells the version of an installed library; raises DeviceError where it is not installed.

    Raises:
        DeviceError: No engine is for this GPU, or else what the newest of those that are lacks.
    """
    engines = bundle.manifest.engines
    fitting = [engine for engine in engines if runs_on(engine, capability)]
    if not fitting:
        found = "; ".join(f"{e.flavor} for {', '.join(e.compute_capabilities)}" for e in engines) or "no engine"
        raise DeviceError(
            f"{bundle.folder}: expected an engine for this GPU of compute capability {capability}, found "
            f"{found}; add one: python -m export.tensorrt --onnx "
            f"{bundle.folder / bundle.manifest.model.file} --output {bundle.folder} with "
            f"--compute-capability {capability}, or on this machine with --flavor tensorrt"
        )
    errors: list[DeviceError] = []
    for engine in reversed(fitting):  # the newest first
        try:
            version = version_of(engine.flavor)
            if fits_version(engine, version):
                return engine
            raise DeviceError(
                f"{bundle.folder / engine.file}: expected {FLAVOR_TITLES[engine.flavor]} {engine.version}, which it "
                f"was built with, found {version}; install that one or build the engine again"
            )
        except DeviceError as error:
            errors.append(error)
    raise errors[0]


def runs_on(engine: Engine, capability: str) -> bool:
    """Whether an engine was built for a GPU of this compute capability."""
    if engine.flags.get("hardware_compatible") is True:  # Ampere and later
        return _numbers(capability) >= (8, 0)
    return capability in engine.compute_capabilities


def fits_version(engine: Engine, version: str) -> bool:
    """Whether this version of its library can load an engine."""
    if engine.flags.get("version_compatible") is True:
        return _numbers(version) >= _numbers(engine.version)
    return version == engine.version


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())
