"""Networks with fixed weights, and images, that the tests share."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor, nn

from drsformer.config import BlockConfig, DRSformerConfig, LevelConfig

SMALL = {"width": 12, "depths": (1, 2, 1, 2), "heads": (1, 2, 4, 4), "expansion": 2.66}
"""Small, but with odd hidden widths, several heads and head widths, and levels of one and of two blocks."""


def fill(model: nn.Module) -> nn.Module:
    """Give every parameter values that depend on its name alone, the same on every machine and version."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(parameter.shape)
            noise = torch.from_numpy(noise.astype(np.float32))
            if parameter.dim() > 1 and "temperature" not in name:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


def image(height: int, width: int, seed: int = 0) -> Tensor:
    """(1, 3, H, W) float32 in [0, 1]."""
    values = np.random.RandomState(seed).random_sample((1, 3, height, width))
    return torch.from_numpy(values.astype(np.float32))


def small(blocks: tuple[BlockConfig, ...] = (), **parts) -> DRSformerConfig:
    """One block at the lowest level, and `blocks` at full resolution: exporting takes time for every block."""
    return DRSformerConfig(
        encoder=(LevelConfig(5, blocks), LevelConfig(4, ()), LevelConfig(8, ())),
        latent=LevelConfig(8, (BlockConfig(2, 5, 7),)),
        decoder=(LevelConfig(7, ()), LevelConfig(6, ()), LevelConfig(8, ())),
        up=(4, 5, 3),
        **parts,
    )
