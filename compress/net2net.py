"""Making a network larger without changing what it computes (Net2Net, arXiv 1511.05641)."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from drsformer.config import EXPERTS, LARGEST, LEVELS, MOST_BLOCKS, BlockConfig, LevelConfig, MEFCConfig
from drsformer.model import DRSformer
from drsformer.recipe import LARGEST_SEED
from runtime.errors import InputError, expect_between


def enlarge(
    model: DRSformer, depths: tuple[int, int, int, int], hidden: int, experts: int = 0, seed: int = 0
) -> DRSformer:
    """Grow a network. What is new has random weights, stands at random positions, and adds nothing to the output.

    Args:
        model: Stays as it is.
        depths: Blocks in each level of the encoder, and of the decoder in return; those that are added put out zero. A
            level that has no block, to make others like, stays without.
        hidden: Factor for the hidden channels of each MSFN; those that are added are dead.
        experts: More experts for each step of an MEFC, whose gates never open, in training neither.
        seed: Seed of the new weights and of the places where they go.

    Returns:
        The larger network, in evaluation mode.

    Raises:
        InputError: `depths` takes blocks away, there are too many blocks or channels, or a level cannot be grown: odd
            hidden widths, whose channels pair up in a ring (`compress.groups`), and feed-forward networks other than
            the MSFN.
    """
    expect_between("hidden", hidden, 1)
    expect_between("experts", experts, 0, len(EXPERTS))
    expect_between("seed", seed, 0, LARGEST_SEED)
    for blocks in depths:
        expect_between("depths", blocks, 0, MOST_BLOCKS)
    torch.manual_seed(seed)
    rng, config = np.random.default_rng(seed), model.config
    mirrored = zip(config.levels().items(), (*depths, *depths[-2::-1]), strict=True)  # the decoder mirrors the encoder
    depth = {module: blocks if level.blocks else 0 for (module, level), blocks in mirrored}
    levels, positions = {}, {}
    for module, level in config.levels().items():
        if depth[module] < len(level.blocks):
            raise InputError(
                f"`depths`: expected at least the {len(level.blocks)} blocks of {module}, found {depth[module]}"
            )
        odd = any(block.hidden % 2 for block in level.blocks)
        if hidden > 1 and (config.feed_forward != "msfn" or odd):
            raise InputError(
                f"{module}: expected blocks whose MSFN has an even hidden width, found others; leave `hidden` at 1"
            )
        positions[module] = sorted(rng.choice(depth[module], len(level.blocks), replace=False).tolist())
        wide = [dataclasses.replace(block, hidden=hidden * block.hidden) for block in level.blocks]
        if (widest := max((block.hidden for block in wide), default=0)) > LARGEST:
            raise InputError(f"`hidden`: expected at most {LARGEST} hidden channels, found {widest} in {module}")
        blocks = wide[:1] * depth[module]
        for position, block in zip(positions[module], wide, strict=True):
            blocks[position] = block
        levels[module] = LevelConfig(level.width, tuple(blocks))
    mefcs = {
        name: _with_experts(mefc, experts) for name in ("mefc_early", "mefc_late") if (mefc := getattr(config, name))
    }
    larger = DRSformer(config.with_levels(levels, **mefcs)).eval()
    old, new = model.state_dict(), larger.state_dict()
    for module in LEVELS:
        for i in range(depth[module]):
            name = f"{module}.{i}"
            if i not in positions[module]:
                new[f"{name}.attn.project_out.weight"].zero_()
                new[f"{name}.ffn.project_out.weight"].zero_()
                continue
            source = f"{module}.{positions[module].index(i)}"
            block = config.levels()[module].blocks[positions[module].index(i)]
            for key in [key for key in old if key.startswith(f"{source}.") and (hidden == 1 or ".ffn." not in key)]:
                new[key.replace(source, name, 1)].copy_(old[key])
            if hidden > 1:
                _widen(old, new, f"{source}.ffn", f"{name}.ffn", block, hidden, rng)
    for key in old:
        if not key.startswith(tuple(LEVELS)) and not key.startswith(tuple(mefcs)):
            new[key].copy_(old[key])
    for name in mefcs:
        _add_experts(old, new, name, getattr(config, name), experts)
    return larger


def _widen(
    old: dict[str, Tensor],
    new: dict[str, Tensor],
    source: str,
    name: str,
    block: BlockConfig,
    factor: int,
    rng: np.random.Generator,
) -> None:
    """Spread the pairs of hidden channels of an MSFN among dead ones: what reads every other of those is zero, and what
    writes into the rest."""
    h, H = block.hidden, factor * block.hidden
    for half, convolution in enumerate(("dwconv3x3_1", "dwconv5x5_1")):
        units = torch.from_numpy(np.sort(rng.choice(H // 2, h // 2, replace=False)))
        dead = torch.tensor([unit for unit in range(H // 2) if unit not in units.tolist()])
        channels = half * H + torch.stack([2 * units, 2 * units + 1], 1).flatten()
        outputs = torch.cat([units, H // 2 + units])
        unread, unwritten = dead[::2], half * H + torch.stack([2 * dead[1::2], 2 * dead[1::2] + 1], 1).flatten()
        new[f"{name}.project_in.weight"][unwritten] = 0
        new[f"{name}.project_out.weight"][:, half * H + torch.cat([unread, H // 2 + unread])] = 0
        for layer in ("project_in", "dwconv3x3", "dwconv5x5"):
            new[f"{name}.{layer}.weight"][channels] = old[f"{source}.{layer}.weight"][half * h : (half + 1) * h]
        new[f"{name}.{convolution}.weight"][outputs] = old[f"{source}.{convolution}.weight"]
        columns = old[f"{source}.project_out.weight"][:, half * h : (half + 1) * h]
        new[f"{name}.project_out.weight"][:, half * H + outputs] = columns


def _with_experts(mefc: MEFCConfig, more: int) -> MEFCConfig:
    return MEFCConfig(mefc.gate_hidden, tuple((*step, *EXPERTS[-more:]) if more else step for step in mefc.steps))


def _add_experts(old: dict[str, Tensor], new: dict[str, Tensor], name: str, mefc: MEFCConfig, more: int) -> None:
    steps, count = len(mefc.steps), len(mefc.steps[0])
    for key in [key for key in old if key.startswith(f"{name}.")]:
        if ".gate.2." in key:
            gates = new[key].unflatten(0, (steps, count + more))
            gates[:, :count] = old[key].unflatten(0, (steps, count))
            gates[:, count:] = -40 if key.endswith("bias") else 0
        elif key.endswith(".out.weight"):
            new[key][:, : old[key].shape[1]] = old[key]
        else:
            new[key].copy_(old[key])
