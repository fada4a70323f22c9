"""Kernels for NVIDIA GPUs that compute a folded block in fewer passes over memory, in the Triton language.

    fast = fuse(fold(network, "fp16")).to("cuda", memory_format=torch.channels_last)

A folded network on a GPU waits for memory: each of its operators reads its input and writes its output once. Here
operators that follow each other share a pass, in the order (B, H, W, C) of channels_last:

- `normalised_pointwise`: LayerNorm's statistics and the 1x1 convolution behind it, of attention and MSFN alike.
- `depthwise`: the 3x3 convolution of Q, K and V.
- `mixed_depthwise`: both convolutions of an MSFN's hidden layer, 3x3 and 5x5, with their ReLU, written where the next
  pass reads them, so nothing is concatenated.
- `paired_projection`: the convolutions with two inputs a group, ReLU and the last 1x1 convolution.

Sums are float32; what is stored is rounded to the network's precision where the folded network rounds it, or less
often. No kernel has gradients. Without a GPU they run in Triton's interpreter (TRITON_INTERPRET=1), slowly: so they are
tested. (Triton Inference Server, of `export.triton`, only shares the name.)
"""

# To the type checker, what a kernel calls never returns.
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import copy
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from drsformer.model import DRSformer, SparseTransformerBlock
from export.folding import FoldedAttention, FoldedFeedForward

EPS = tl.constexpr(1e-5)
"""Of LayerNorm."""

PIXELS = 64
"""Pixels of a program, where they do not have to be fewer."""

TILE_WIDTH = 8
"""Pixels of a row in the tile of a program that convolves."""

CHANNELS = 32
"""Channels that a program loads at a time."""

ACCUMULATED = 16384
"""Values that a program of `paired_projection` adds up at the most: 64 registers of each of its 256 threads."""

PROJECTION_OPTIONS = {"num_warps": 8, "num_stages": 1}
"""Of `paired_projection`. Loads are not pipelined: in float32 that would take 1 MB of shared memory."""


@triton.jit
def _normalised_pointwise(
    x, weight, bias, y, pixels, C, outputs, PIXELS: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    there = (pixel < pixels)[:, None]
    total = tl.zeros((PIXELS,), tl.float32)
    for start in range(0, C, INPUTS):
        channel = start + tl.arange(0, INPUTS)
        values = tl.load(x + pixel[:, None] * C + channel, there & (channel < C), 0).to(tl.float32)
        total += tl.sum(values, 1)
    mean = (total / C)[:, None]
    squares = tl.zeros((PIXELS,), tl.float32)
    for start in range(0, C, INPUTS):
        channel = start + tl.arange(0, INPUTS)
        values = tl.load(x + pixel[:, None] * C + channel, there & (channel < C), 0).to(tl.float32)
        squares += tl.sum(tl.where(channel < C, (values - mean) * (values - mean), 0), 1)
    scale = tl.rsqrt(squares / C + EPS)[:, None]
    result = tl.zeros((PIXELS, OUTPUTS), tl.float32)
    for start in range(0, C, INPUTS):
        channel = start + tl.arange(0, INPUTS)
        values = tl.load(x + pixel[:, None] * C + channel, there & (channel < C), 0).to(tl.float32)
        normalised = ((values - mean) * scale).to(x.dtype.element_ty)
        matrix = tl.load(
            weight + output * C + channel[:, None], (channel < C)[:, None] & (output < outputs), 0
        )  # inputs x outputs; its zeros cancel what was not loaded
        result = tl.dot(normalised, matrix, result, input_precision="ieee")
    result += tl.load(bias + output, output < outputs, 0).to(tl.float32)
    tl.store(y + pixel[:, None] * outputs + output, result.to(y.dtype.element_ty), there & (output < outputs))


@triton.jit
def _tile(H, W, PIXELS: tl.constexpr, TILE_WIDTH: tl.constexpr):
    """Number of the image, and row and column of each pixel of a tile: axis 0 of the grid counts tiles."""
    across = tl.cdiv(W, TILE_WIDTH)
    down = tl.cdiv(H, PIXELS // TILE_WIDTH)
    number = tl.program_id(0)
    image = number // (across * down)
    place = number % (across * down)
    index = tl.arange(0, PIXELS)
    row = place // across * (PIXELS // TILE_WIDTH) + index // TILE_WIDTH
    column = place % across * TILE_WIDTH + index % TILE_WIDTH
    return image, row, column


@triton.jit
def _offset(image, row, column, H, W, C):
    """Where the channels of pixels begin, in an array (B, H, W, C)."""
    return ((image.to(tl.int64) * H + row) * W + column) * C


@triton.jit
def _shifted(x, image, row, column, channel, known, H, W, C):
    """Some channels of shifted pixels in float32; 0 beyond the image, as convolutions are padded."""
    inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    offset = _offset(image, row, column, H, W, C)[:, None]
    return tl.load(x + offset + channel, inside[:, None] & known, 0).to(tl.float32)


@triton.jit
def _kernel(weight, tap, channel, known, C):
    """One tap of depthwise kernels, an array (taps, C)."""
    return tl.load(weight + tap * C + channel, known, 0).to(tl.float32)


@triton.jit
def _depthwise(
    x, weight, y, H, W, C, PIXELS: tl.constexpr, TILE_WIDTH: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    image, row, column = _tile(H, W, PIXELS, TILE_WIDTH)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < C
    result = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for tap in tl.static_range(9):
        values = _shifted(x, image, row + tap // 3 - 1, column + tap % 3 - 1, channel, known, H, W, C)
        result += values * _kernel(weight, tap, channel, known, C)
    inside = ((row < H) & (column < W))[:, None] & known
    tl.store(y + _offset(image, row, column, H, W, C)[:, None] + channel, result.to(y.dtype.element_ty), inside)


@triton.jit
def _mixed_depthwise(
    x, kernel3, kernel5, y, H, W, part8, start_even, start_odd,
    ODD: tl.constexpr, PIXELS: tl.constexpr, TILE_WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # See FoldedFeedForward: x has four parts, even and odd channels of either half. y has, for either half, the first
    # and then the second inputs of all groups, 2 * part each: p up to where s begins, s, and what is left of p.
    image, row, column = _tile(H, W, PIXELS, TILE_WIDTH)
    number = tl.program_id(1)
    within = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    part = part8 * 8  # so the compiler sees that it is a multiple of 8, and loads whole vectors
    known = within < part
    channel = number * part + within
    C = 4 * part
    p = tl.zeros((PIXELS, CHANNELS), tl.float32)
    s = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for down in range(5):  # a loop that stays one keeps the compiler from loading all taps at once
        between = known & (down > 0) & (down < 4)
        for across in tl.static_range(5):
            values = _shifted(x, image, row + down - 2, column + across - 2, channel, known, H, W, C)
            s += values * _kernel(kernel5, down * 5 + across, channel, known, C)
            if across > 0 and across < 4:
                p += values * _kernel(kernel3, (down - 1) * 3 + across - 1, channel, between, C)
    inside = ((row < H) & (column < W))[:, None] & known
    half, parity = number // 2, number % 2
    other = (parity + ODD) % 2  # where an odd number of hidden channels puts s
    pixel = y + _offset(image, row, column, H, W, 2 * C)[:, None] + half * C
    start = tl.where(parity == 0, start_even, start_odd)
    at = parity * 2 * part + within + tl.where(within < start, 0, part)
    tl.store(pixel + at, tl.maximum(p, 0).to(y.dtype.element_ty), inside)
    at = other * 2 * part + within + tl.where(other == 0, start_even, start_odd)
    tl.store(pixel + at, tl.maximum(s, 0).to(y.dtype.element_ty), inside)


@triton.jit
def _groups(
    x, weight, image, row, column, group, base, known, H, W, groups, SIZE: tl.constexpr, PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Convolutions with two inputs a group, SIZE x SIZE, and ReLU. `weight`: (2, taps, groups)."""
    C = 4 * groups
    result = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for down in range(SIZE):
        for across in tl.static_range(SIZE):
            for i in tl.static_range(2):
                channel = base + i * groups + group
                values = _shifted(
                    x, image, row + down - SIZE // 2, column + across - SIZE // 2, channel, known, H, W, C
                )
                tap = (i * SIZE + down) * SIZE + across
                result += values * _kernel(weight, tap, group, known, groups)
    return tl.maximum(result, 0)


@triton.jit
def _paired_projection(
    x, kernel3, kernel5, weight, y, H, W, groups, outputs,
    PIXELS: tl.constexpr, TILE_WIDTH: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    image, row, column = _tile(H, W, PIXELS, TILE_WIDTH)
    output = tl.arange(0, OUTPUTS)
    result = tl.zeros((PIXELS, OUTPUTS), tl.float32)
    for start in range(0, groups, CHANNELS):
        group = start + tl.arange(0, CHANNELS)
        known = group < groups
        matrix = weight + output * 2 * groups + group[:, None]  # groups x outputs
        there = known[:, None] & (output < outputs)
        first = _groups(x, kernel3, image, row, column, group, 0, known, H, W, groups, 3, PIXELS, CHANNELS)
        result = tl.dot(first.to(x.dtype.element_ty), tl.load(matrix, there, 0), result, input_precision="ieee")
        second = _groups(x, kernel5, image, row, column, group, 2 * groups, known, H, W, groups, 5, PIXELS, CHANNELS)
        result = tl.dot(
            second.to(x.dtype.element_ty), tl.load(matrix + groups, there, 0), result, input_precision="ieee"
        )
    inside = ((row < H) & (column < W))[:, None] & (output < outputs)
    tl.store(y + _offset(image, row, column, H, W, outputs)[:, None] + output, result.to(y.dtype.element_ty), inside)


def normalised_pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm without scale and shift and a 1x1 convolution: (B, H, W, C) -> (B, H, W, outputs).

    Args:
        x: Contiguous, float32, float16 or bfloat16, as all of it.
        weight: (outputs, C).
        bias: (outputs,).
    """
    *shape, C = x.shape
    outputs = weight.shape[0]
    y = x.new_empty(*shape, outputs)
    pixels, block = x.numel() // C, _block(outputs, 64)
    grid = (_parts(pixels, PIXELS), _parts(outputs, block))
    _launch(_normalised_pointwise, grid, x, weight, bias, y, pixels, C, outputs, PIXELS, _block(C, 64), block)
    return y


def depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """A 3x3 convolution of each channel by itself: (B, H, W, C) -> the same. `weight`: (9, C)."""
    B, H, W, C = x.shape
    y = torch.empty_like(x)
    grid = (_tiles(B, H, W, PIXELS), _parts(C, CHANNELS))
    _launch(_depthwise, grid, x, weight, y, H, W, C, PIXELS, TILE_WIDTH, CHANNELS)
    return y


def mixed_depthwise(x: Tensor, kernel3: Tensor, kernel5: Tensor, starts: tuple[int, int], odd: int) -> Tensor:
    """The hidden layer of an MSFN up to its groups: (B, H, W, 4 * part) -> (B, H, W, 8 * part).

    Args:
        x: Four parts, in the order of `FoldedFeedForward`.
        kernel3: (9, 4 * part).
        kernel5: (25, 4 * part).
        starts: Where the 5x5 path begins among the first and the second inputs of the groups.
        odd: Whether the number of hidden channels is odd: 0 or 1.

    Returns:
        For either half, the first inputs of all groups and then the second ones.
    """
    B, H, W, C = x.shape
    y = x.new_empty(B, H, W, 2 * C)
    grid = (_tiles(B, H, W, PIXELS), 4, _parts(C // 4, CHANNELS))
    _launch(_mixed_depthwise, grid, x, kernel3, kernel5, y, H, W, C // 32, *starts, odd, PIXELS, TILE_WIDTH, CHANNELS)
    return y


def paired_projection(x: Tensor, kernel3: Tensor, kernel5: Tensor, weight: Tensor) -> Tensor:
    """The second half of an MSFN: (B, H, W, 4 * groups) -> (B, H, W, C).

    Args:
        x: As `mixed_depthwise` leaves it.
        kernel3: (2, 9, groups): of the first and the second inputs of the first half.
        kernel5: (2, 25, groups): of those of the second half.
        weight: (C, 2 * groups).
    """
    B, H, W, C = x.shape
    outputs = weight.shape[0]
    y = x.new_empty(B, H, W, outputs)
    block = _block(outputs)
    pixels = min(PIXELS, max(16, ACCUMULATED // block))
    grid, sizes = (_tiles(B, H, W, pixels),), (H, W, C // 4, outputs)
    blocks = (pixels, TILE_WIDTH, CHANNELS, block)
    _launch(_paired_projection, grid, x, kernel3, kernel5, weight, y, *sizes, *blocks, **PROJECTION_OPTIONS)
    return y


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Tensor | int, **options: int) -> None:
    kernel[grid](*arguments, **options)


def _parts(length: int, part: int) -> int:
    return -(-length // part)


def _tiles(B: int, H: int, W: int, pixels: int) -> int:
    return B * _parts(H, pixels // TILE_WIDTH) * _parts(W, TILE_WIDTH)


def _block(channels: int, largest: int | None = None) -> int:
    """A power of two for so many channels: 16 at least, as products want it."""
    block = max(16, 1 << (channels - 1).bit_length())
    return min(block, largest) if largest else block


def _taps(kernels: Tensor) -> Tensor:
    """(C, 1, size, size) -> (size * size, C)."""
    return kernels.flatten(1).t().contiguous()


def _pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), contiguous; of a network in channels_last that copies nothing."""
    return x.permute(0, 2, 3, 1).contiguous()


class FusedAttention(nn.Module):
    """A constant `FoldedAttention` with the `Normalise` before it. (B, C, H, W) -> the same."""

    def __init__(self, attention: FoldedAttention) -> None:
        super().__init__()
        self.attention = attention
        self.register_buffer("weight", attention.get_buffer("qkv").flatten(1))
        self.register_buffer("kernel", _taps(attention.get_buffer("dwconv")))

    def forward(self, x: Tensor) -> Tensor:
        attention = self.attention
        qkv = depthwise(
            normalised_pointwise(_pixels(x), self.get_buffer("weight"), attention.get_buffer("bias")),
            self.get_buffer("kernel"),
        )
        return attention.attend(
            qkv.permute(0, 3, 1, 2), attention.get_buffer("temperature"), attention.get_buffer("out")
        )


class FusedFeedForward(nn.Module):
    """A constant `FoldedFeedForward` with the `Normalise` before it. (B, C, H, W) -> the same."""

    def __init__(self, folded: FoldedFeedForward) -> None:
        super().__init__()
        self.starts, self.odd = folded.starts, folded.odd

        def whole(name: str) -> Tensor:
            return torch.cat([folded.get_buffer(f"{name}_{i}") for i in range(folded.convolutions)])

        def pair(half: int) -> Tensor:
            return torch.stack([_taps(folded.get_buffer(f"pair_{half}_{i}")) for i in (0, 1)])

        self.register_buffer("weight", whole("weight").flatten(1))
        self.register_buffer("bias", whole("bias"))
        self.register_buffer("dw3", _taps(whole("dw3")))
        self.register_buffer("dw5", _taps(whole("dw5")))
        self.register_buffer("pair3", pair(0))
        self.register_buffer("pair5", pair(1))
        self.register_buffer("out", folded.get_buffer("out").flatten(1).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        weights = self.get_buffer
        hidden = normalised_pointwise(_pixels(x), weights("weight"), weights("bias"))
        hidden = mixed_depthwise(hidden, weights("dw3"), weights("dw5"), self.starts, self.odd)
        return paired_projection(hidden, weights("pair3"), weights("pair5"), weights("out")).permute(0, 3, 1, 2)


def fuse(folded: DRSformer) -> DRSformer:
    """The same network with the kernels of this file in its blocks, for inference on NVIDIA GPUs.

    Args:
        folded: What `export.folding.fold` made; it stays as it is. Blocks of the other kinds of Table 3 keep their
            feed-forward network.
    """
    twin = copy.deepcopy(folded)
    for block in twin.modules():
        if isinstance(block, SparseTransformerBlock):
            if isinstance(block.attn, FoldedAttention):
                block.norm1, block.attn = nn.Identity(), FusedAttention(block.attn)
            if isinstance(block.ffn, FoldedFeedForward):
                block.norm2, block.ffn = nn.Identity(), FusedFeedForward(block.ffn)
    return twin
