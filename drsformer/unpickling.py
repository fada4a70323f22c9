"""Reads what `torch.save` has written without running anything, whatever lies beside the tensors.

A pickle is a program: it names functions and calls them. PyTorch's restricted unpickler (`weights_only`) calls none but
its own that make tensors, and refuses the file for any other name. That is right for code and a nuisance for the time,
the path or the numpy number that many training scripts keep beside the weights. For a closed list of such harmless
types the unpickler is therefore given inert stand-ins in place of the real ones, so that their values are read and
forgotten. No name outside of PyTorch's list and this one is looked up, let alone called.
"""

from __future__ import annotations

import os
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from runtime.errors import InputError


class Forgotten:
    """Stands for a value that is not wanted: takes whatever a pickle does with it, and does nothing."""

    def __new__(cls, *_: object) -> Forgotten:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


class Entries:
    """Stands for a kind of dictionary, which becomes a plain one, without what it does for keys that are missing."""

    def __new__(cls, *_: object) -> OrderedDict[Any, Any]:
        return OrderedDict()  # the one of the unpickler's own types that takes items and attributes


class Items:
    """Stands for a kind of list, which becomes a plain one."""

    def __new__(cls, *_: object) -> list[Any]:
        return []


STAND_INS = {
    Forgotten: {
        "argparse": ["Namespace"],
        "builtins": ["bool", "bytes", "dict", "float", "frozenset", "int", "list", "range", "slice", "str", "tuple"],
        "datetime": ["date", "datetime", "time", "timedelta", "timezone"],
        "decimal": ["Decimal"],
        "fractions": ["Fraction"],
        "numpy": [
            *("bool", "bool_", "bytes_", "complex128", "complex64", "datetime64", "dtype", "float16", "float32"),
            *("float64", "int16", "int32", "int64", "int8", "ndarray", "str_", "timedelta64", "uint16", "uint32"),
            *("uint64", "uint8"),
        ],
        "numpy._core.multiarray": ["_reconstruct", "scalar"],
        "numpy.core.multiarray": ["_reconstruct", "scalar"],  # the same before NumPy 2
        "numpy.random._mt19937": ["MT19937"],
        "numpy.random._pcg64": ["PCG64"],
        "numpy.random._pickle": ["__bit_generator_ctor", "__generator_ctor", "__randomstate_ctor"],
        "numpy.random.bit_generator": ["SeedSequence", "__pyx_unpickle_SeedSequence"],
        "pathlib": ["Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"],
        "pathlib._local": ["Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"],
        "torch.torch_version": ["TorchVersion"],
        "types": ["SimpleNamespace"],
        "uuid": ["SafeUUID", "UUID"],
    },
    Entries: {
        "addict.addict": ["Dict"],
        "collections": ["defaultdict"],
        "easydict": ["EasyDict"],
        "lightning.fabric.utilities.data": ["AttributeDict"],
        "lightning_fabric.utilities.data": ["AttributeDict"],
        "pytorch_lightning.utilities.parsing": ["AttributeDict"],
        "yacs.config": ["CfgNode"],
    },
    Items: {"collections": ["deque"]},
}
"""The harmless types, by what stands for them, their modules and their names there."""


def read(path: str | os.PathLike[str]) -> Any:
    """The content of a file that `torch.save` has written: tensors on the CPU and plain containers as they are, values
    of the types in `STAND_INS` replaced by what stands for them.

    Raises InputError for a file that is damaged, and for one that names anything else, with that name.
    """
    stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (stand_in, f"{module}.{name}")
        for stand_in, modules in STAND_INS.items()
        for module, names in modules.items()
        for name in names
    ]
    try:
        with open(path, "rb") as file, torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a remark on the protocol, which is an error further on
            return torch.load(file, map_location="cpu", weights_only=True)  # of a path, it would go by the suffix
    except Exception as error:  # whatever a hostile or damaged file provokes
        reason = _reason(str(error), Path(path))
    raise InputError(f"{path}: refused: {reason}; expected tensors only")


def _reason(message: str, path: Path) -> str:
    """Why PyTorch did not read a file."""
    if name := re.search(r"GLOBAL (\S+)", message):
        return f"it holds pickled code, which would run {name[1]}"
    if "TorchScript" in message:
        return "it is a program in TorchScript"
    if re.search(r"Can only|Trying to call|persistent_load", message):
        return "it holds pickled code"
    if "Unsupported operand" in message and (names := _names(path)):
        return f"it is not pickled as by torch.save, and would run {', '.join(names[:3])}"
    return "damaged, or not a file of torch.save"


def _names(path: Path) -> list[str]:
    """The functions and classes that a pickle names, once each, as far as it can be followed; nothing is run."""
    names: list[str] = []
    texts: list[str] = []
    memo: list[str] = []
    try:
        for operation, argument, _ in pickletools.genops(_pickle(path)):
            match operation.name, argument:
                case "GLOBAL" | "INST", str():
                    names.append(argument.replace(" ", "."))
                case "STACK_GLOBAL", _:
                    names.append(".".join(texts[-2:]))
                case "MEMOIZE", _:
                    memo.append(texts[-1] if texts else "")
                case "BINGET" | "LONG_BINGET", int():
                    texts.append(memo[argument] if argument < len(memo) else "")
                case _, str():
                    texts.append(argument)
    except Exception:  # a damaged file, and what comes before the damage is known
        pass
    return list(dict.fromkeys(names))


def _pickle(path: Path) -> bytes:
    """The pickle itself, which torch.save packs into a zip archive together with the tensors."""
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
