"""Checkpoints: one `.safetensors` that says what it is, and the authors' `.pth` files, read safely.

Our file holds the tensors, the config that rebuilds the network and where it comes from, so that any pruned network
loads from its file alone. The authors' files hold only tensors, but every width and depth can be read off their shapes.
Nothing pickled is ever executed: PyTorch's restricted unpickler reads tensors and plain containers and refuses the
rest. Loading is strict: every tensor has its place and its shape, or there is one line that says which has not.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialised
from torch import Tensor

from drsformer.config import EXPERTS, LEVELS, RELEASED_TOPK, BlockConfig, DRSformerConfig, LevelConfig, MEFCConfig
from drsformer.model import DRSformer
from runtime.errors import InputError
from runtime.files import writing

FORMAT = 1
"""Version of what `METADATA_KEY` holds."""

METADATA_KEY = "drsformer"
"""The one entry of the safetensors metadata: JSON with `format`, `config` and `provenance`. One, because the order of
several is not kept, and the same content shall give the same file."""

# The released names of the parameters, and ours.
RENAMES = [
    (r"^module\.", ""),
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"\.norm([12])\.body\.", r".norm\1."),
    (r"\.attn\.attn(\d)$", lambda m: f".attn.mix.{int(m[1]) - 1}"),
    (r"^(down|up)(\d_\d)\.body\.0\.", r"\1\2.conv."),
    (r"^encoder_level0\.", "mefc_early."),
    (r"^refinement\.", "mefc_late."),
    (r"^(mefc_\w+)\.layers\.0\.ca_fc\.", r"\1.gate."),
    (r"^(mefc_\w+)\.layers\.1\.preprocess\.op\.0\.", r"\1.preprocess."),
    (r"^(mefc_\w+)\.layers\.1\._ops\.(\d)\._ops\.(\d)\.op\.", r"\1.steps.\2.experts.\3."),
    (r"^(mefc_\w+)\.layers\.1\._ops\.(\d)\._out\.0\.", r"\1.steps.\2.out."),
]


@dataclass(frozen=True)
class Checkpoint:
    """A network read from a file.

    Attributes:
        model: The network in evaluation mode, float32, on the CPU.
        provenance: What `provenance_after` made, as far as it is known; of a file of the authors only its `source`.
        sha256: SHA-256 of the file, in hexadecimal.
    """

    model: DRSformer
    provenance: dict[str, Any]
    sha256: str


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a network.

    Args:
        path: A `.safetensors` of ours, or a `.pth` or `.pt` in the authors' format.

    Raises:
        InputError: The file is missing, damaged, of another kind, would have to execute code, or does not hold exactly
            one DRSformer.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; expected a .safetensors or .pth file")
    if path.suffix == ".safetensors":
        config, state, provenance = _read_safetensors(path)
    elif path.suffix in (".pth", ".pt"):
        config, state, provenance = _read_pickle(path)
    else:
        raise InputError(f"{path}: expected a checkpoint ending in .safetensors, .pth or .pt")
    with torch.device("meta"):  # nothing is allocated before the shapes are known to be those of the file
        model = DRSformer(config)
    _check_strictly(path, model.state_dict(), state)
    model.to_empty(device="cpu").load_state_dict(state)
    return Checkpoint(model.eval(), provenance, file_sha256(path))


def save(
    path: str | os.PathLike[str], model: DRSformer, provenance: dict[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    """Write a network with its config, whole or not at all.

    Args:
        path: A name ending in `.safetensors`.
        model: The network, on any device.
        provenance: Where it comes from, ready for JSON, see `provenance_after`.
        dtype: Type of the weights in the file. With a shorter one than float32 the file is smaller and the weights are
            rounded; they are read back as float32.

    Raises:
        InputError: The name ends otherwise.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: expected a name ending in .safetensors")
    description = {"format": FORMAT, "config": model.config.to_dict(), "provenance": provenance}
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    with writing(path) as temporary:
        temporary.write_bytes(serialised(state, {METADATA_KEY: json.dumps(description)}))


def provenance_after(
    parent: Checkpoint | None,
    command: str,
    options: dict[str, Any],
    trained_on: Sequence[str] | None = None,
    scores: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The provenance of a network that a command has made.

    Args:
        parent: What the command started from, or None for a network with random weights.
        command: The command's dotted name.
        options: What its result depends on, ready for JSON.
        trained_on: Names of the data sets that the network was trained on; those of the parent if not given.
        scores: What was measured of it, if anything was.

    Returns:
        Ready for JSON: `trained_on`, None where nobody knows; `parent`, the SHA-256 of its file or None; `steps`, the
        commands with their options, oldest first; and `scores`, where they are given.
    """
    earlier = parent.provenance if parent else {}
    return {
        "trained_on": earlier.get("trained_on") if trained_on is None else list(trained_on),
        "parent": parent.sha256 if parent else None,
        "steps": [*earlier.get("steps", []), {"command": command, "options": options}],
        **({} if scores is None else {"scores": scores}),
    }


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_safetensors(path: Path) -> tuple[DRSformerConfig, dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: damaged, or not a .safetensors file ({error})") from None
    if METADATA_KEY not in metadata:
        raise InputError(f"{path}: expected a checkpoint saved by drsformer, found a .safetensors without its metadata")
    try:
        description = json.loads(metadata[METADATA_KEY])
        if description["format"] != FORMAT:
            raise InputError(f"{path}: expected format {FORMAT}, found {description['format']!r}; update this program")
        config, provenance = DRSformerConfig.from_dict(description["config"]), dict(description["provenance"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: its metadata cannot be read ({error})") from None
    return config, state, provenance


def _read_pickle(path: Path) -> tuple[DRSformerConfig, dict[str, Tensor], dict[str, Any]]:
    with path.open("rb") as file:
        start = file.read(16)
    if not start.startswith((b"PK", b"\x80")):
        raise InputError(
            f"{path}: expected a PyTorch checkpoint, found a file that begins with {start!r}; was it "
            "downloaded in full?"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile or damaged file provokes
        reason = "it holds pickled code" if "nsupported" in str(error) else "damaged, or not a PyTorch file"
        raise InputError(f"{path}: refused: {reason}; expected tensors only") from None
    if isinstance(content, dict):
        content = next((content[key] for key in ("params_ema", "params", "state_dict") if key in content), content)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path}: expected a state dict, bare or under 'params', found something else")
    state = {_rename(str(name)): tensor for name, tensor in content.items()}
    if len(state) < len(content):
        raise InputError(f"{path}: expected every tensor once, found some under two names")
    try:
        config = config_from_shapes({name: tuple(tensor.shape) for name, tensor in state.items()})
    except (KeyError, IndexError, ValueError, ArithmeticError) as error:
        raise InputError(f"{path}: not the tensors of a DRSformer ({error})") from None
    return config, state, {"source": path.name}


def _rename(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def config_from_shapes(shapes: dict[str, tuple[int, ...]]) -> DRSformerConfig:
    """The config of the network whose parameters, under our names, have these shapes.

    Shapes say everything but the top-k fractions (four masks are taken for the released ones) and which experts
    an MEFC of fewer than eight has (the first ones).

    Args:
        shapes: Shapes of the parameters by their names.

    Raises:
        KeyError, IndexError, ValueError, ArithmeticError: They fit no DRSformer.
    """

    def block(prefix: str) -> BlockConfig:
        heads = shapes[f"{prefix}.attn.temperature"][0]
        inner = shapes[f"{prefix}.attn.project_out.weight"][1]
        hidden = shapes[f"{prefix}.ffn.project_in.weight"][0]
        return BlockConfig(heads, inner // heads, hidden // 2 if kind in ("msfn", "gdfn") else hidden)

    def level(name: str, width: int) -> LevelConfig:
        count = len({key.split(".")[1] for key in shapes if key.startswith(f"{name}.")})
        return LevelConfig(width, tuple(block(f"{name}.{i}") for i in range(count)))

    def mefc(name: str, width: int) -> MEFCConfig | None:
        if f"{name}.gate.0.weight" not in shapes:
            return None
        steps = len({key.split(".")[2] for key in shapes if key.startswith(f"{name}.steps.")})
        gates = shapes[f"{name}.gate.2.weight"][0]
        return MEFCConfig(shapes[f"{name}.gate.0.weight"][0], (EXPERTS[: gates // steps],) * steps)

    some_block = next((key.split(".attn.")[0] for key in shapes if key.endswith(".attn.temperature")), None)
    if some_block is None:
        raise ValueError("no attention in it")
    if f"{some_block}.ffn.dwconv3x3_1.weight" in shapes:
        kind = "msfn"
    elif f"{some_block}.ffn.dwconv.weight" not in shapes:
        kind = "fn"
    else:
        halves = shapes[f"{some_block}.ffn.project_in.weight"][0] // shapes[f"{some_block}.ffn.project_out.weight"][1]
        kind = "gdfn" if halves == 2 else "dfn"
    masks = sum(key.startswith(f"{some_block}.attn.mix.") for key in shapes)
    if masks not in (0, len(RELEASED_TOPK)):
        raise ValueError(f"{masks} attention masks, and shapes do not say how much each keeps")
    w1 = shapes["patch_embed.weight"][0]
    w2, w3, w4 = (4 * shapes[f"down{i}.conv.weight"][0] for i in ("1_2", "2_3", "3_4"))
    u3, u2, u1 = (shapes[f"up{i}.conv.weight"][0] // 4 for i in ("4_3", "3_2", "2_1"))
    d3, d2, d1 = shapes["reduce_chan_level3.weight"][0], shapes["reduce_chan_level2.weight"][0], w1 + u1
    widths = dict(zip(LEVELS, (w1, w2, w3, w4, d3, d2, d1), strict=True))
    return DRSformerConfig.regular().with_levels(  # all of which is replaced
        {module: level(module, width) for module, width in widths.items()},
        up=(u3, u2, u1),
        topk=RELEASED_TOPK if masks else (),
        feed_forward=kind,
        mefc_early=mefc("mefc_early", w1),
        mefc_late=mefc("mefc_late", d1),
    )


def _check_strictly(path: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        parts = [
            f"{len(names)} {what} (such as {names[0]})"
            for what, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise InputError(f"{path}: expected the {len(expected)} tensors of a DRSformer, found {' and '.join(parts)}")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape or not found[name].is_floating_point():
            raise InputError(
                f"{path}: {name}: expected floats of shape {tuple(tensor.shape)}, "
                f"found {found[name].dtype} {tuple(found[name].shape)}"
            )
        if not found[name].isfinite().all():
            raise InputError(f"{path}: {name} holds values that are not finite numbers")
