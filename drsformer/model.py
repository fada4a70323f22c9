"""DRSformer (Chen et al., CVPR 2023), leaf to root.

Written to be read: every layer is the paper's equation, and computes what the released code computes. What makes
it fast to run (`export`) or different in structure (`compress`) is derived from this definition by functions; there
is no second copy. Shapes: B images, C channels, H x W pixels, n heads of d channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drsformer.config import NO_EXPERT, SIZE_MULTIPLE, BlockConfig, DRSformerConfig, LevelConfig, MEFCConfig


def conv1x1(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, bias=False)


def conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)


def depthwise(channels: int, kernel: int, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(channels, channels, kernel, padding=padding, dilation=dilation, groups=channels, bias=False)


class LayerNorm(nn.Module):
    """Normalises each pixel over its channels. (B, C, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # B, H, W, C
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=1e-5).permute(0, 3, 1, 2)


class TopKMask(nn.Module):
    """Marks the k largest scores of every row, for several k at once (the operator T_k of Eq. 6).

    (..., 1, d) scores -> (..., masks, d) bool: each row of scores becomes one row for each k. Exactly k entries are
    marked, also among equal scores, as the index-scatter of the released code does. The marked sets are nested, so
    one top-k serves all.
    """

    def __init__(self, ks: tuple[int, ...]) -> None:
        super().__init__()
        self.ks = ks

    def forward(self, scores: Tensor) -> Tensor:
        largest = scores.topk(self.ks[-1], dim=-1).indices
        place = torch.arange(self.ks[-1], device=scores.device).expand(largest.shape)
        rank = torch.full_like(scores, self.ks[-1], dtype=torch.long).scatter(-1, largest, place)
        return torch.cat([rank < k for k in self.ks], dim=-2)


class TopKSparseAttention(nn.Module):
    """Top-k sparse attention, TKSA (Eq. 4 to 6): channels attend to channels, once for every k, and learned weights add
    up the results. (B, C, H, W) -> the same."""

    def __init__(self, width: int, block: BlockConfig, ks: tuple[int, ...]) -> None:
        super().__init__()
        inner = block.heads * block.head_dim
        self.heads = block.heads
        self.temperature = nn.Parameter(torch.ones(block.heads, 1, 1))
        self.qkv = conv1x1(width, 3 * inner)
        self.qkv_dwconv = depthwise(3 * inner, 3)
        self.project_out = conv1x1(inner, width)
        self.topk = TopKMask(ks) if ks else None  # None: dense attention
        self.mix = nn.ParameterList(torch.tensor([0.2]) for _ in ks)

    def forward(self, x: Tensor) -> Tensor:
        B, _, H, W = x.shape
        qkv = self.qkv_dwconv(self.qkv(x))
        q, k, v = qkv.view(B, 3, self.heads, -1, H * W).unbind(1)  # each B, n, d, H*W
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        scores = q @ k.transpose(-2, -1) * self.temperature  # B, n, d, d
        if self.topk is None:
            out = scores.softmax(-1) @ v
        else:
            out = torch.zeros_like(v)
            for weight, mask in zip(self.mix, self.topk(scores.unsqueeze(-2)).unbind(-2), strict=True):
                out = out + weight * (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v)
        return self.project_out(out.view(B, -1, H, W))


class MixedScaleFeedForward(nn.Module):
    """Mixed-scale feed-forward network, MSFN (Eq. 7), paired as in the released code: both branches are cut in two, the
    3x3 path continues with the first halves and the 5x5 path with the second halves, and there each output channel
    sees two neighbouring inputs. (B, C, H, W) -> the same."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.project_in = conv1x1(width, 2 * hidden)
        self.dwconv3x3 = depthwise(2 * hidden, 3)
        self.dwconv5x5 = depthwise(2 * hidden, 5)
        self.dwconv3x3_1 = nn.Conv2d(2 * hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.dwconv5x5_1 = nn.Conv2d(2 * hidden, hidden, 5, padding=2, groups=hidden, bias=False)
        self.project_out = conv1x1(2 * hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project_in(x)
        p1, p2 = F.relu(self.dwconv3x3(x)).chunk(2, dim=1)
        s1, s2 = F.relu(self.dwconv5x5(x)).chunk(2, dim=1)
        p = F.relu(self.dwconv3x3_1(torch.cat([p1, s1], dim=1)))
        s = F.relu(self.dwconv5x5_1(torch.cat([p2, s2], dim=1)))
        return self.project_out(torch.cat([p, s], dim=1))


class GatedFeedForward(nn.Module):
    """Gated-dconv feed-forward network, GDFN (Restormer, arXiv 2111.09881, Eq. 3; Table 3 of the paper)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.project_in = conv1x1(width, 2 * hidden)
        self.dwconv = depthwise(2 * hidden, 3)
        self.project_out = conv1x1(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        return self.project_out(F.gelu(gate) * value)


class DepthwiseFeedForward(nn.Module):
    """Feed-forward network with a depthwise convolution, DFN (LocalViT, arXiv 2104.05707; Table 3)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.project_in = conv1x1(width, hidden)
        self.dwconv = depthwise(hidden, 3)
        self.project_out = conv1x1(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.project_out(F.gelu(self.dwconv(F.gelu(self.project_in(x)))))


class FeedForward(nn.Module):
    """Plain feed-forward network, FN (ViT, arXiv 2010.11929; Table 3)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.project_in = conv1x1(width, hidden)
        self.project_out = conv1x1(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.project_out(F.gelu(self.project_in(x)))


FEED_FORWARD_CLASSES = {
    "msfn": MixedScaleFeedForward,
    "gdfn": GatedFeedForward,
    "dfn": DepthwiseFeedForward,
    "fn": FeedForward,
}


class SparseTransformerBlock(nn.Module):
    """Sparse transformer block, STB (Eq. 2 and 3). (B, C, H, W) -> the same."""

    def __init__(self, width: int, block: BlockConfig, config: DRSformerConfig) -> None:
        super().__init__()
        self.norm1: nn.Module = LayerNorm(width)
        self.attn: nn.Module = TopKSparseAttention(width, block, config.kept(block.head_dim))
        self.norm2: nn.Module = LayerNorm(width)
        self.ffn: nn.Module = FEED_FORWARD_CLASSES[config.feed_forward](width, block.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


def expert(name: str, width: int) -> nn.Module:
    """One expert of an MEFC by its name in `config.EXPERTS` (section 3.3). (B, C, H, W) -> the same."""
    kind, kernel = name[:-3].rstrip("_"), int(name[-1])
    if kind == "avg_pool":
        return nn.AvgPool2d(kernel, stride=1, padding=kernel // 2, count_include_pad=False)
    if kind == "dil_conv":
        return nn.Sequential(depthwise(width, kernel, dilation=2), conv1x1(width, width))
    return nn.Sequential(
        depthwise(width, kernel), conv1x1(width, width), nn.ReLU(), depthwise(width, kernel), conv1x1(width, width)
    )


class ExpertLayer(nn.Module):
    """One step of an MEFC: experts in parallel, each scaled by its gate, joined by a 1x1 convolution."""

    def __init__(self, width: int, names: tuple[str, ...]) -> None:
        super().__init__()
        self.present = [i for i, name in enumerate(names) if name != NO_EXPERT]
        self.experts = nn.ModuleList(expert(names[i], width) for i in self.present)
        self.out = conv1x1(width * len(self.present), width) if self.present else None

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """x: (B, C, H, W); gates: (B, experts), pruned ones included."""
        if self.out is None:
            return x
        return F.relu(x + F.relu(self.out(self.scaled(x, gates))))

    def scaled(self, x: Tensor, gates: Tensor) -> Tensor:
        """What the experts make of x, each scaled by its gate: (B, C * experts that are present, H, W)."""
        parts = [gates[:, i, None, None, None] * f(x) for i, f in zip(self.present, self.experts, strict=True)]
        return torch.cat(parts, dim=1)


class MixtureOfExpertsCompensator(nn.Module):
    """Mixture-of-experts feature compensator, MEFC (Eq. 8 and 9): a small network looks at the mean of every channel
    and decides how much each expert of each step counts. (B, C, H, W) -> the same."""

    def __init__(self, width: int, config: MEFCConfig) -> None:
        super().__init__()
        gates = sum(len(step) for step in config.steps)
        self.gate = nn.Sequential(nn.Linear(width, config.gate_hidden), nn.ReLU(), nn.Linear(config.gate_hidden, gates))
        self.preprocess = conv1x1(width, width)
        self.steps = nn.ModuleList(ExpertLayer(width, step) for step in config.steps)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gates(x)
        x = F.relu(self.preprocess(x))
        for i, step in enumerate(self.steps):
            x = step(x, gates[:, i])
        return x

    def gates(self, x: Tensor) -> Tensor:
        """How much each expert of each step counts: (B, steps, experts)."""
        means = x.mean((2, 3), dtype=next(self.gate.parameters()).dtype)  # float16 cannot add up so many pixels
        return self.gate(means).unflatten(1, (len(self.steps), -1)).softmax(-1)


class Downsample(nn.Module):
    """Halves the resolution. (B, C, H, W) -> (B, C', H/2, W/2)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = conv3x3(inputs, outputs // 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(self.conv(x), 2)


class Upsample(nn.Module):
    """Doubles the resolution. (B, C, H, W) -> (B, C', 2H, 2W)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = conv3x3(inputs, 4 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2)


class DRSformer(nn.Module):
    """The whole network (section 3.1, Figure 2).

    (B, 3, H, W) RGB in [0, 1], H and W multiples of 8 -> the same shape, the image without rain; values may
    leave [0, 1] a little, and whoever makes an image of them clamps. Raises ValueError for any other shape.
    """

    def __init__(self, config: DRSformerConfig) -> None:
        super().__init__()
        self.config = config
        (e1, e2, e3), latent, (d3, d2, d1) = config.encoder, config.latent, config.decoder

        def blocks(level: LevelConfig) -> nn.Sequential:
            return nn.Sequential(*(SparseTransformerBlock(level.width, block, config) for block in level.blocks))

        def mefc(part: MEFCConfig | None, width: int) -> nn.Module:
            return MixtureOfExpertsCompensator(width, part) if part else nn.Identity()

        self.patch_embed: nn.Module = conv3x3(3, e1.width)
        self.mefc_early = mefc(config.mefc_early, e1.width)
        self.encoder_level1 = blocks(e1)
        self.down1_2 = Downsample(e1.width, e2.width)
        self.encoder_level2 = blocks(e2)
        self.down2_3 = Downsample(e2.width, e3.width)
        self.encoder_level3 = blocks(e3)
        self.down3_4 = Downsample(e3.width, latent.width)
        self.latent = blocks(latent)
        self.up4_3 = Upsample(latent.width, config.up[0])
        self.reduce_chan_level3 = conv1x1(config.up[0] + e3.width, d3.width)
        self.decoder_level3 = blocks(d3)
        self.up3_2 = Upsample(d3.width, config.up[1])
        self.reduce_chan_level2 = conv1x1(config.up[1] + e2.width, d2.width)
        self.decoder_level2 = blocks(d2)
        self.up2_1 = Upsample(d2.width, config.up[2])
        self.decoder_level1 = blocks(d1)
        self.mefc_late = mefc(config.mefc_late, d1.width)
        self.output: nn.Module = conv3x3(d1.width, 3)

    def forward(self, image: Tensor) -> Tensor:
        if image.dim() != 4 or image.shape[1] != 3 or image.shape[2] % SIZE_MULTIPLE or image.shape[3] % SIZE_MULTIPLE:
            raise ValueError(
                f"expected (B, 3, H, W) with H and W multiples of {SIZE_MULTIPLE}, found {tuple(image.shape)}"
            )
        level1 = self.encoder_level1(self.mefc_early(self.patch_embed(image)))
        level2 = self.encoder_level2(self.down1_2(level1))
        level3 = self.encoder_level3(self.down2_3(level2))
        x = self.latent(self.down3_4(level3))
        x = self.decoder_level3(self.reduce_chan_level3(torch.cat([self.up4_3(x), level3], dim=1)))
        x = self.decoder_level2(self.reduce_chan_level2(torch.cat([self.up3_2(x), level2], dim=1)))
        x = self.mefc_late(self.decoder_level1(torch.cat([self.up2_1(x), level1], dim=1)))
        return self.output(x) + image
