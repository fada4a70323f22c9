"""Planted redundancy: a network made larger without changing what it computes."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from compress.structures import LEVELS, level_of
from drsformer.config import EXPERTS, BlockConfig, LevelConfig, MEFCConfig
from drsformer.model import DRSformer


def grow(
    model: DRSformer, depths: tuple[int, int, int, int], hidden: int, experts: int = 0, seed: int = 0
) -> DRSformer:
    """The same function with blocks whose output is zero, up to `depths` in each level of the encoder and its mirror
    image, `hidden` times the hidden channels of each MSFN, the new ones dead, and `experts` more of those in each step
    of an MEFC, whose gates never open. What is new has random weights elsewhere, and stands at random places.

    Hidden widths have to be even: a ring of odd width cannot be made larger (`compress.structures`).
    """
    rng, config = np.random.default_rng(seed), model.config
    depth = dict(zip(("encoder_level1", "encoder_level2", "encoder_level3", "latent"), depths, strict=True))
    depth |= {f"decoder_level{i}": depths[i - 1] for i in (1, 2, 3)}
    levels, places = {}, {}
    for module in LEVELS:
        level = level_of(config, module)
        places[module] = sorted(rng.choice(depth[module], len(level.blocks), replace=False).tolist())
        wide = [dataclasses.replace(block, hidden=hidden * block.hidden) for block in level.blocks]
        blocks = [wide[0]] * depth[module]
        for place, block in zip(places[module], wide, strict=True):
            blocks[place] = block
        levels[module] = LevelConfig(level.width, tuple(blocks))
    e1, e2, e3, latent, d3, d2, d1 = levels.values()
    mefcs = {name: _with_experts(mefc, experts) for name in ("mefc_early", "mefc_late")
             if (mefc := getattr(config, name))}  # fmt: skip
    larger = DRSformer(
        dataclasses.replace(config, encoder=(e1, e2, e3), latent=latent, decoder=(d3, d2, d1), **mefcs)
    ).eval()
    old, new = model.state_dict(), larger.state_dict()
    for module in LEVELS:
        for i in range(depth[module]):
            name = f"{module}.{i}"
            if i not in places[module]:
                new[f"{name}.attn.project_out.weight"].zero_()
                new[f"{name}.ffn.project_out.weight"].zero_()
                continue
            source = f"{module}.{places[module].index(i)}"
            block = level_of(config, module).blocks[places[module].index(i)]
            for key in [key for key in old if key.startswith(f"{source}.") and ".ffn." not in key]:
                new[key.replace(source, name, 1)].copy_(old[key])
            _widen(old, new, f"{source}.ffn", f"{name}.ffn", block, hidden, rng)
    for key in old:
        if not key.startswith(tuple(LEVELS)) and not key.startswith(tuple(mefcs)):
            new[key].copy_(old[key])
    for name in mefcs:
        _add_experts(old, new, name, getattr(config, name), experts)
    return larger


def _widen(
    old: dict[str, Tensor], new: dict[str, Tensor], source: str, name: str, block: BlockConfig, factor: int,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """Spread the pairs of hidden channels of an MSFN among dead ones: what reads every other of those is zero, and what
    writes into the rest."""
    h, H = block.hidden, factor * block.hidden
    assert h % 2 == 0
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
