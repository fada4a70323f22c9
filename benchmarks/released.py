"""The released network, operation for operation, under the released names: the yardstick.

Tests hold the readable network and everything derived from it against this one, and its `state_dict` is a checkpoint in
the authors' format; benchmarks time it as what a user has today. Deliberately naive: four top-k selections, four
softmaxes, four products with V, LayerNorm on a reshaped tensor, two-input group convolutions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXPERTS = ("sep1", "sep3", "sep5", "sep7", "dil3", "dil5", "dil7", "avg3")


class Named(nn.Module):
    """A module with the given children and no forward."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class Norm(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.body = Named()
        self.body.weight = nn.Parameter(torch.ones(c))
        self.body.bias = nn.Parameter(torch.zeros(c))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = x.reshape(b, c, h * w).transpose(1, 2)
        variance = x.var(-1, keepdim=True, unbiased=False)
        x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(variance + 1e-5) * self.body.weight + self.body.bias
        return x.transpose(1, 2).reshape(b, c, h, w)


class Attention(nn.Module):
    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(c, 3 * c, 1, bias=False)
        self.qkv_dwconv = nn.Conv2d(3 * c, 3 * c, 3, padding=1, groups=3 * c, bias=False)
        self.project_out = nn.Conv2d(c, c, 1, bias=False)
        self.attn1, self.attn2, self.attn3, self.attn4 = (nn.Parameter(torch.tensor([0.2])) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        d = c // self.heads
        q, k, v = (t.reshape(b, self.heads, d, h * w) for t in self.qkv_dwconv(self.qkv(x)).chunk(3, dim=1))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        out = torch.zeros_like(v)
        counts = (int(d / 2), int(d * 2 / 3), int(d * 3 / 4), int(d * 4 / 5))
        for weight, count in zip((self.attn1, self.attn2, self.attn3, self.attn4), counts, strict=True):
            index = torch.topk(scores, k=count, dim=-1, largest=True)[1]
            mask = torch.zeros_like(scores).scatter_(-1, index, 1.0)
            kept = torch.where(mask > 0, scores, torch.full_like(scores, float("-inf"))).softmax(-1)
            out = out + (kept @ v) * weight
        return self.project_out(out.reshape(b, c, h, w))


class FeedForward(nn.Module):
    def __init__(self, c: int, expansion: float) -> None:
        super().__init__()
        h = int(c * expansion)
        self.project_in = nn.Conv2d(c, 2 * h, 1, bias=False)
        self.dwconv3x3 = nn.Conv2d(2 * h, 2 * h, 3, padding=1, groups=2 * h, bias=False)
        self.dwconv5x5 = nn.Conv2d(2 * h, 2 * h, 5, padding=2, groups=2 * h, bias=False)
        self.dwconv3x3_1 = nn.Conv2d(2 * h, h, 3, padding=1, groups=h, bias=False)
        self.dwconv5x5_1 = nn.Conv2d(2 * h, h, 5, padding=2, groups=h, bias=False)
        self.project_out = nn.Conv2d(2 * h, c, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project_in(x)
        a, b = F.relu(self.dwconv3x3(x)).chunk(2, dim=1), F.relu(self.dwconv5x5(x)).chunk(2, dim=1)
        first = F.relu(self.dwconv3x3_1(torch.cat([a[0], b[0]], dim=1)))
        second = F.relu(self.dwconv5x5_1(torch.cat([a[1], b[1]], dim=1)))
        return self.project_out(torch.cat([first, second], dim=1))


class Block(nn.Module):
    def __init__(self, c: int, heads: int, expansion: float) -> None:
        super().__init__()
        self.norm1, self.attn = Norm(c), Attention(c, heads)
        self.norm2, self.ffn = Norm(c), FeedForward(c, expansion)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


def expert(name: str, c: int) -> nn.Module:
    kernel = int(name[-1])
    if name.startswith("avg"):
        return nn.AvgPool2d(kernel, 1, kernel // 2, count_include_pad=False)
    if name.startswith("dil"):
        spread = nn.Conv2d(c, c, kernel, padding=kernel - 1, dilation=2, groups=c, bias=False)
        return nn.Sequential(spread, nn.Conv2d(c, c, 1, bias=False))
    first, last = (nn.Conv2d(c, c, kernel, padding=kernel // 2, groups=c, bias=False) for _ in range(2))
    inner, outer = (nn.Conv2d(c, c, 1, bias=False) for _ in range(2))
    return nn.Sequential(first, inner, nn.ReLU(), last, outer)


class MEFC(nn.Module):
    def __init__(self, c: int, steps: int = 4) -> None:
        super().__init__()
        gates = steps * len(EXPERTS)
        gate = nn.Sequential(nn.Linear(c, 2 * gates), nn.ReLU(), nn.Linear(2 * gates, gates))

        def one_step() -> nn.Module:
            experts = [expert(name, c) for name in EXPERTS]
            ops = [e if isinstance(e, nn.AvgPool2d) else Named(op=e) for e in experts]
            join = nn.Sequential(nn.Conv2d(c * len(EXPERTS), c, 1, bias=False), nn.ReLU())
            return Named(_ops=nn.ModuleList(ops), _out=join)

        preprocess = Named(op=nn.Sequential(nn.Conv2d(c, c, 1, bias=False), nn.ReLU()))
        body = Named(preprocess=preprocess, _ops=nn.ModuleList(one_step() for _ in range(steps)))
        self.layers = nn.ModuleList([Named(ca_fc=gate), body])

    def forward(self, x: Tensor) -> Tensor:
        gate, body = self.layers
        weights = gate.ca_fc(F.adaptive_avg_pool2d(x, 1).flatten(1)).view(x.shape[0], len(body._ops), -1).softmax(-1)
        x = body.preprocess.op(x)
        for i, step in enumerate(body._ops):
            ops = [op if isinstance(op, nn.AvgPool2d) else op.op for op in step._ops]
            scaled = [op(x) * weights[:, i, j].view(-1, 1, 1, 1) for j, op in enumerate(ops)]
            x = F.relu(step._out(torch.cat(scaled, dim=1)) + x)
        return x


class ReleasedDRSformer(nn.Module):
    """(B, 3, H, W) in [0, 1], H and W multiples of 8 -> the same shape. Without MEFC it is the variant for Rain200L and
    SPA-Data. The defaults are the released widths and depths."""

    def __init__(
        self,
        width: int = 48,
        depths: tuple[int, int, int, int] = (4, 6, 6, 8),
        heads: tuple[int, int, int, int] = (1, 2, 4, 8),
        expansion: float = 2.66,
        mefc: bool = True,
    ) -> None:
        super().__init__()

        def level(i: int, c: int) -> nn.Sequential:
            return nn.Sequential(*(Block(c, heads[i], expansion) for _ in range(depths[i])))

        def resize(inputs: int, outputs: int, shuffle: nn.Module) -> nn.Module:
            return Named(body=nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), shuffle))

        c = width
        self.mefc = mefc
        self.patch_embed = Named(proj=nn.Conv2d(3, c, 3, padding=1, bias=False))
        if mefc:
            self.encoder_level0 = MEFC(c)
        self.encoder_level1 = level(0, c)
        self.down1_2 = resize(c, c // 2, nn.PixelUnshuffle(2))
        self.encoder_level2 = level(1, 2 * c)
        self.down2_3 = resize(2 * c, c, nn.PixelUnshuffle(2))
        self.encoder_level3 = level(2, 4 * c)
        self.down3_4 = resize(4 * c, 2 * c, nn.PixelUnshuffle(2))
        self.latent = level(3, 8 * c)
        self.up4_3 = resize(8 * c, 16 * c, nn.PixelShuffle(2))
        self.reduce_chan_level3 = nn.Conv2d(8 * c, 4 * c, 1, bias=False)
        self.decoder_level3 = level(2, 4 * c)
        self.up3_2 = resize(4 * c, 8 * c, nn.PixelShuffle(2))
        self.reduce_chan_level2 = nn.Conv2d(4 * c, 2 * c, 1, bias=False)
        self.decoder_level2 = level(1, 2 * c)
        self.up2_1 = resize(2 * c, 4 * c, nn.PixelShuffle(2))
        self.decoder_level1 = level(0, 2 * c)
        if mefc:
            self.refinement = MEFC(2 * c)
        self.output = nn.Conv2d(2 * c, 3, 3, padding=1, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_embed.proj(image)
        level1 = self.encoder_level1(self.encoder_level0(x) if self.mefc else x)
        level2 = self.encoder_level2(self.down1_2.body(level1))
        level3 = self.encoder_level3(self.down2_3.body(level2))
        x = self.latent(self.down3_4.body(level3))
        x = self.decoder_level3(self.reduce_chan_level3(torch.cat([self.up4_3.body(x), level3], 1)))
        x = self.decoder_level2(self.reduce_chan_level2(torch.cat([self.up3_2.body(x), level2], 1)))
        x = self.decoder_level1(torch.cat([self.up2_1.body(x), level1], 1))
        return self.output(self.refinement(x) if self.mefc else x) + image
