"""Checkpoints: one `.safetensors` that says what it is, and the authors' `.pth` files, read safely.

Our file holds the tensors, the config that rebuilds the network and where it comes from, so that any pruned network
loads from its file alone. The authors' files hold only tensors, but every width and depth can be read off their shapes.
So can those of the same tensors as other programs leave them: in any file of `torch.save` or safetensors whatever its
suffix, under any keys, with names that share a prefix, in half precision, beside whatever a training script keeps.
Nothing pickled is ever executed (`drsformer.unpickling`). Loading is strict: every tensor has its place and its shape,
or there is one line that says which has not.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialised
from torch import Tensor, nn

from drsformer import unpickling
from drsformer.config import EXPERTS, LEVELS, RELEASED_TOPK, BlockConfig, DRSformerConfig, LevelConfig, MEFCConfig
from drsformer.model import DRSformer
from runtime.errors import InputError
from runtime.files import writing

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of what `METADATA_KEY` holds."""

METADATA_KEY = "drsformer"
"""The one entry of the safetensors metadata: JSON with `format`, `config` and `provenance`. One, because the order of
several is not kept, and the same content shall give the same file."""

# The released names of the parameters, and ours.
RENAMES = [
    (r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", r"\1"),
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

WRAPPERS = ("params", "params_ema", "state_dict", "model_state_dict", "model", "net", "generator", "weights")
"""Keys under which training scripts keep the weights; those of the first one are taken, `params` as in the authors'
script. Other keys come after them."""

DEPTH = 4
"""How many keys may lead to the weights."""

LEFTOVERS = ("total_ops", "total_params", "n_averaged")
"""Last parts of the names of tensors that others than the network leave: the profiler thop, and PyTorch's averaging."""


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

    @property
    def origin(self) -> str:
        """What it was trained on, for people: weights for other data score far lower, and nothing else says so."""
        data = self.provenance.get("trained_on")
        return f"trained on {', '.join(dict.fromkeys(map(str, data)))}" if data else "of unknown training data"


def load(path: str | os.PathLike[str], weights_key: str | None = None) -> Checkpoint:
    """Read a checkpoint of ours, or one with the tensors of a DRSformer as the authors' code or another program saved
    it; the content decides, not the suffix. What is peculiar about the latter is logged.

    Args:
        path: File of safetensors or `torch.save`.
        weights_key: Key of the weights to take where a file holds several, such as "params_ema"; keys that lead to it
            are joined by dots. If not given, the first of `WRAPPERS`.

    Raises:
        InputError: The file is missing, damaged, of another kind, would have to execute code, or does not hold exactly
            one DRSformer under `weights_key`; told in one line.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; expected a .safetensors or .pth file")
    with path.open("rb") as file:
        start = file.read(16)
    description = None
    if start[8:9] == b"{":  # behind the length of the header, which is JSON; in no file of torch.save
        content, description = _read_safetensors(path)
    elif start.startswith((b"PK", b"\x80")):  # a zip archive or, formerly, a pickle
        content = unpickling.read(path)
    else:
        raise InputError(
            f"{path}: expected a checkpoint of safetensors or torch.save, found a file that is damaged or of another "
            f"kind and begins with {start!r}; was it downloaded in full?"
        )
    if description is None:
        model, provenance = from_tensors(path, _choose(path, content, weights_key)), {"source": path.name}
    elif weights_key is not None:
        raise InputError(
            f"`weights_key`: {path} holds the weights of one network only; expected none, found {weights_key!r}"
        )
    else:
        config, provenance = _parse(path, description)
        model = _build(path, config, content, {})
    return Checkpoint(model, provenance, file_sha256(path))


def from_tensors(source: str | os.PathLike[str], tensors: dict[str, Tensor]) -> DRSformer:
    """The network of these tensors, in evaluation mode, float32, on the CPU; its structure is read off their shapes.

    Args:
        source: Where they come from, for messages.
        tensors: By the released names or ours, which may share a prefix.

    Raises:
        InputError: They are not exactly those of a DRSformer.
    """
    names = our_names(tensors)
    dropped = {name.rpartition(".")[2] for name in tensors.keys() - names.values()}
    if not dropped <= set(LEFTOVERS):
        raise InputError(f"{source}: expected every tensor once, found some under two names")
    try:
        config = config_from_shapes({ours: tuple(tensors[name].shape) for ours, name in names.items()})
    except (KeyError, IndexError, ValueError, ArithmeticError) as error:
        raise InputError(f"{source}: not the tensors of a DRSformer ({error})") from None
    model = _build(source, config, {ours: tensors[name] for ours, name in names.items()}, names)
    if dropped:
        logger.warning("%s: tensors of no part of the network are dropped: %s", source, ", ".join(sorted(dropped)))
    if not config.topk:
        logger.warning("%s: without tensors attn1 to attn4, so its attention is taken for dense, without top-k", source)
    return model


def our_names(names: Iterable[str]) -> dict[str, str]:
    """The names of a network's tensors by what we call them, which knows no prefix that all share. `LEFTOVERS` have
    none."""
    kept = [name for name in names if name.rpartition(".")[2] not in LEFTOVERS]
    parts = [name.split(".")[:-1] for name in kept]
    shared = itertools.takewhile(lambda part: len(set(part)) == 1, zip(*parts, strict=False))
    prefix = "".join(f"{part[0]}." for part in shared)
    return {_rename(name.removeprefix(prefix)): name for name in kept}


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


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors, and our description of them if it is there."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: damaged, or not a .safetensors file ({error})") from None
    return state, metadata.get(METADATA_KEY)


def _parse(path: Path, description: str) -> tuple[DRSformerConfig, dict[str, Any]]:
    """Config and provenance from our description."""
    try:
        parts = json.loads(description)
        if parts["format"] != FORMAT:
            raise InputError(f"{path}: expected format {FORMAT}, found {parts['format']!r}; update this program")
        provenance = dict(parts["provenance"])
        for found, kind in ((provenance.get("trained_on") or [], str), (provenance.get("steps", []), dict)):
            if not isinstance(found, list) or not all(isinstance(each, kind) for each in found):
                raise ValueError(f"expected a list, found {found!r}")
        return DRSformerConfig.from_dict(parts["config"]), provenance
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: its metadata cannot be read ({error})") from None


def _choose(path: Path, content: Any, weights_key: str | None) -> dict[str, Tensor]:
    """The tensors among what a file holds that are taken for those of the network, by their names there."""
    ranks = {key: rank for rank, key in enumerate(WRAPPERS)}
    states = sorted(_states(content), key=lambda item: ranks.get(item[0].rpartition(".")[2], len(ranks)))
    if not states:
        tensors = [".".join(keys) for keys, value in _walk(content) if isinstance(value, Tensor)]
        found = f"{len(tensors)} others, such as {tensors[0]}" if tensors else "none"
        raise InputError(f"{path}: expected the tensors of a DRSformer, found {found}")
    keys = [key or "the file itself" for key, _ in states]
    if weights_key is not None and weights_key not in keys:
        raise InputError(
            f"`weights_key`: expected where {path} holds weights, {', '.join(keys)}, found {weights_key!r}"
        )
    taken = keys.index(weights_key) if weights_key is not None else 0
    if weights_key is None and len(states) > 1:
        logger.warning("%s: holds %s; %s is taken", path, " and ".join(keys), keys[0])
    return states[taken][1]


def _states(content: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """All dictionaries of tensors with an attention like DRSformer's among them, and the keys that lead to each."""
    for keys, value in ((), content), *_walk(content):
        if isinstance(value, dict):
            state = {str(name): tensor for name, tensor in value.items() if _is_plain(tensor)}
            if any(name.endswith("attn.temperature") for name in state):
                yield ".".join(keys), state


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor with all its values in memory: not sparse, quantized, nested or one without any."""
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and not value.is_meta
        and not (value.is_nested or value.is_quantized)
    )


def _walk(content: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All values in dictionaries of dictionaries, and the keys that lead to each. A pickle can hold itself."""
    if isinstance(content, dict) and len(keys) < DEPTH:
        for key, value in content.items():
            yield (*keys, str(key)), value
            yield from _walk(value, (*keys, str(key)))


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


def _build(
    source: str | os.PathLike[str], config: DRSformerConfig, state: dict[str, Tensor], names: dict[str, str]
) -> DRSformer:
    """A network with these tensors. `names`: what their source calls them, where that is something else."""
    with torch.device("meta"):  # nothing is allocated before the shapes are known to be those of the file
        model = DRSformer(config)
    _check_strictly(source, model.state_dict(), state, names)
    _expect_held(source, state)
    model.to_empty(device="cpu").load_state_dict(state)
    return model.eval()


def _expect_held(source: str | os.PathLike[str], state: dict[str, Tensor]) -> None:
    """Raise InputError unless each value of these tensors is in memory: a few bytes can be the view of any shape."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in state.values()}
    held, named = sum(storages.values()), sum(tensor.nbytes for tensor in state.values())
    if named > held:
        raise InputError(f"{source}: expected tensors with values of their own, found {named} bytes in {held}")


def _check_strictly(
    source: str | os.PathLike[str], expected: dict[str, Tensor], found: dict[str, Tensor], names: dict[str, str]
) -> None:
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        parts = [
            f"{len(wrong)} {what} (such as {names.get(wrong[0], wrong[0])})"
            for what, wrong in (("missing", missing), ("unknown", unknown))
            if wrong
        ]
        raise InputError(f"{source}: expected the {len(expected)} tensors of a DRSformer, found {' and '.join(parts)}")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape or not found[name].is_floating_point():
            raise InputError(
                f"{source}: {name}: expected floats of shape {tuple(tensor.shape)}, "
                f"found {found[name].dtype} {tuple(found[name].shape)}"
            )
        if not found[name].float().isfinite().all():
            raise InputError(f"{source}: {name} holds values that are not finite numbers")
