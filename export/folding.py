"""Rewrite a DRSformer into an exactly equal network that takes fewer and faster operations.

A function of the readable network, pruned ones included, so there is no second definition to keep in step: every
folded tensor is computed from the readable network's parameters. What is rewritten, all of it exact:

- LayerNorm's scale and shift go into the 1x1 convolution that follows.
- Attention takes one product with V. Its masks are stacked, so one top-k and one softmax serve all of them, and a
  constant product adds them up. That constant holds the output projection too, since W (A V) = (W A) V. Q and K are
  not normalised at full resolution; the norms divide the small d x d product. That product is taken for every row of
  the image and added up: as one product over H x W, it would keep few of a GPU's multiprocessors busy.
- The MSFN's convolutions with two inputs a group are sums of two depthwise convolutions, over the even and the odd
  channels. The hidden channels are ordered so that no gather is left, and padded with zeros to whole vectors.
- An expert's last 1x1 convolution, its gate and its slice of the convolution that joins the experts are one C x C
  matrix. Its convolutions with dilation 2 are ordinary ones on each of the four images that have every second row and
  column, which GPUs are much faster at.

In float16 and bfloat16 the sums over H x W, the statistics of LayerNorm, the d x d products, the softmax and the gates
stay float32: these are where such networks turn black. In float16, whose range ends at 65504, LayerNorm also bounds
what can come out of every layer of attention and MSFN up to the residual connection, so where a bound is out of range,
the weights in between are scaled by powers of two to bring it back, whatever the image. The residual connections, the
MEFC and the other feed-forward networks have no such bound; `export.onnx` looks at their values on noise.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drsformer.model import (
    DRSformer,
    ExpertLayer,
    LayerNorm,
    MixedScaleFeedForward,
    MixtureOfExpertsCompensator,
    SparseTransformerBlock,
    TopKSparseAttention,
)
from export.options import Precision
from export.topk import with_pattern
from runtime.errors import InputError

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""What `fold` computes in, by name."""

CHANNEL_MULTIPLE = 8
"""Parts of the hidden layer are padded to multiples of this: the vectors of tensor cores and of AVX."""

IN_PARTS_BELOW_CHANNELS = 384
"""Hidden layers narrower than this are computed in four parts, which never need cutting; wider ones, whose maps are
small, in one piece and cut afterwards, which takes fewer operations."""

FP16_SAFE_VALUE = 2.0**14
"""Largest magnitude that a layer of a float16 network may put out, with room for rounding below 65504."""


class Folded(nn.Module):
    """A part of the network as a function of tensors, which `fold` computes from a readable part.

    Attributes:
        keep_fp32: Names of the tensors that stay in float32 whatever the rest computes in.
        trainable: Whether the tensors are computed anew in every pass, so that gradients reach the readable part;
            otherwise they are constants.
        fp16_safe: Whether weights are scaled so that nothing between a normalisation and the residual connection
            exceeds `FP16_SAFE_VALUE`.
    """

    keep_fp32: frozenset[str] = frozenset()

    def __init__(self, trainable: bool, fp16_safe: bool) -> None:
        super().__init__()
        self.trainable, self.fp16_safe = trainable, fp16_safe

    def take(self, *readable: nn.Module) -> None:
        """Fold a readable part. Called at the end of a subclass's constructor."""
        self.readable = nn.ModuleList(readable if self.trainable else [])
        if not self.trainable:
            for name, tensor in self.fold(*readable).items():
                self.register_buffer(name, tensor.clone(memory_format=torch.contiguous_format))

    def fold(self, *readable: Any) -> dict[str, Tensor]:
        raise NotImplementedError

    def compute(self, x: Tensor, **tensors: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        tensors = self.fold(*self.readable) if self.trainable else cast("dict[str, Tensor]", self._buffers)
        return self.compute(x, **tensors)


class Normalise(nn.Module):
    """LayerNorm without scale and shift. (B, C, H, W) -> the same; statistics in `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1).to(self.dtype)  # B, H, W, C
        return F.layer_norm(pixels, pixels.shape[-1:], eps=1e-5).permute(0, 3, 1, 2).to(x.dtype)


def with_norm(norm: LayerNorm, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (outputs, C, 1, 1) and bias (outputs) of a 1x1 convolution that has taken in the scale and shift of the
    LayerNorm before it."""
    return weight * norm.weight[:, None, None], weight.flatten(1) @ norm.bias


class FoldedAttention(Folded):
    """`TopKSparseAttention` behind a `Normalise`. (B, C, H, W) -> the same."""

    keep_fp32 = frozenset({"temperature", "out"})

    def __init__(self, norm: LayerNorm, attention: TopKSparseAttention, trainable: bool, fp16_safe: bool) -> None:
        super().__init__(trainable, fp16_safe)
        self.heads, self.topk = attention.heads, attention.topk
        self.take(norm, attention)

    def fold(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, norm: LayerNorm, attention: TopKSparseAttention
    ) -> dict[str, Tensor]:
        qkv, bias = with_norm(norm, attention.qkv.weight)
        dwconv = attention.qkv_dwconv.weight
        out = attention.project_out.weight.flatten(1).unflatten(1, (self.heads, -1)).movedim(1, 0)  # n, C, d
        if self.topk:
            out = (out.unsqueeze(-1) * torch.cat(list(attention.mix))).flatten(2)  # n, C, d * masks
        if self.fp16_safe:
            # Q and K are normalised, so their scale is free; the output projection makes up for that of V.
            inner = _normalised_bound(qkv, bias)
            scale = _scale(torch.maximum(inner, _depthwise_bound(dwconv, inner))).view(3 * self.heads, -1)
            scale = scale.amin(1, keepdim=True).expand_as(scale)  # one for each head
            qkv, bias = qkv * _column(scale.flatten()), bias * scale.flatten()
            out = out / scale[2 * self.heads :, :1, None]
        temperature = attention.temperature.unsqueeze(-1)
        return {"qkv": qkv, "bias": bias, "dwconv": dwconv, "temperature": temperature, "out": out}

    def compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, qkv: Tensor, bias: Tensor, dwconv: Tensor, temperature: Tensor, out: Tensor
    ) -> Tensor:
        return self.attend(
            F.conv2d(F.conv2d(x, qkv, bias), dwconv, padding=1, groups=dwconv.shape[0]), temperature, out
        )

    def attend(self, qkv: Tensor, temperature: Tensor, out: Tensor) -> Tensor:
        """(B, 3 * n * d, H, W): Q, K and V, all heads of each -> (B, C, H, W)."""
        B, _, H, W = qkv.shape
        q, k, v = qkv.reshape(B, 3 * self.heads, -1, H, W).split(self.heads, dim=1)  # each B, n, d, H, W
        matrix = self.matrix(q, k, temperature, out)
        return (matrix.to(v.dtype) @ v.reshape(B, -1, H * W)).view(B, -1, H, W)

    def matrix(self, q: Tensor, k: Tensor, temperature: Tensor, out: Tensor) -> Tensor:
        """What V (B, n*d, H*W) is multiplied with: the attention of all masks and the output projection. (B, C, n*d)"""
        with torch.autocast(q.device.type, enabled=False) if self.trainable else nullcontext():
            q, k = q.to(temperature.dtype), k.to(temperature.dtype)
            length_q = torch.linalg.vector_norm(q, dim=(3, 4), keepdim=True).clamp_min(1e-12)  # B, n, d, 1, 1
            k = k.permute(0, 1, 3, 4, 2)  # B, n, H, W, d
            length_k = torch.linalg.vector_norm(k, dim=(2, 3), keepdim=True).clamp_min(1e-12)  # B, n, 1, 1, d
            product = (q.transpose(2, 3) @ k).sum(2).unsqueeze(3)  # row by row of the image
            scores = product / (length_q * length_k) * temperature  # B, n, d, 1, d
            if self.topk:
                scores = torch.where(self.topk(scores), scores, float("-inf"))  # B, n, d, masks, d
            matrix = out @ scores.softmax(-1).flatten(2, 3)  # B, n, C, d
            return matrix.flatten(1, 2) if self.heads == 1 else matrix.transpose(1, 2).flatten(2)


class Arrange(nn.Module):
    """Puts the channels of a weight, its first axis, in the given order; None gives a channel of zeros."""

    index: Tensor

    def __init__(self, order: Iterable[int | None]) -> None:
        super().__init__()
        self.register_buffer("index", torch.tensor([-1 if i is None else i for i in order]), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        padded = torch.cat([weight, torch.zeros_like(weight[:1])])
        return padded.index_select(0, self.index % padded.shape[0])


class FoldedFeedForward(Folded):
    """`MixedScaleFeedForward` behind a `Normalise`. (B, C, H, W) -> the same.

    The channels of each half of the hidden layer are ordered even ones first, so it lies in four parts: even and odd of
    the first half, even and odd of the second. The second pair of convolutions sees, for each half, the concatenation
    [p, s] of what the 3x3 and the 5x5 kernels made of it; its group j has channels 2j and 2j + 1 of that as its first
    and second. With an even number of hidden channels the first ones of all groups are [p even, s even], and the second
    ones [p odd, s odd]. With an odd number one group joins the last of p with the first of s, and in those after it
    even and odd change places: [p even, s odd] and [p odd, s even].
    """

    def __init__(self, norm: LayerNorm, ffn: MixedScaleFeedForward, trainable: bool, fp16_safe: bool) -> None:
        super().__init__(trainable, fp16_safe)
        h = ffn.dwconv3x3_1.out_channels
        first = (h + 1) // 2  # groups whose first channel is in p
        part = -(-first // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE
        self.part, self.odd, self.convolutions = part, h % 2, 4 if h < IN_PARTS_BELOW_CHANNELS else 1
        # Where s begins in the first and in the second channels.
        self.starts = (first, h - first) if self.odd else (part, part)
        rows = [range(half * h + parity, (half + 1) * h, 2) for half in (0, 1) for parity in (0, 1)]
        self.hidden = Arrange(i for row in rows for i in _fill(row, part))
        self.groups = Arrange(_fill([*_fill(range(first), self.starts[0]), *range(first, h)], 2 * part))
        self.take(norm, ffn)

    def fold(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, norm: LayerNorm, ffn: MixedScaleFeedForward
    ) -> dict[str, Tensor]:
        h = ffn.dwconv3x3_1.out_channels
        weight, bias = (self.hidden(tensor) for tensor in with_norm(norm, ffn.project_in.weight))
        dw3, dw5 = self.hidden(ffn.dwconv3x3.weight), self.hidden(ffn.dwconv5x5.weight)
        # For each half, the kernels of the first and of the second channels.
        pairs = [
            [self.groups(convolution.weight[:, i : i + 1]) for i in (0, 1)]
            for convolution in (ffn.dwconv3x3_1, ffn.dwconv5x5_1)
        ]
        outputs = ffn.project_out.weight.transpose(0, 1)
        outputs = torch.cat([self.groups(outputs[:h]), self.groups(outputs[h:])])
        if self.fp16_safe:  # a ReLU lets positive factors pass: what one layer is scaled by, the next one takes back
            inner = _normalised_bound(weight, bias)
            scale = _scale(
                torch.maximum(inner, torch.maximum(_depthwise_bound(dw3, inner), _depthwise_bound(dw5, inner)))
            )
            weight, bias, inner = weight * _column(scale), bias * scale, inner * scale
            scales = self.joined([scale[None]], [scale[None]])
            bounds = self.joined([_depthwise_bound(dw3, inner)[None]], [_depthwise_bound(dw5, inner)[None]])
            factors = []
            for half in (0, 1):
                kernels = [kernel / _column(x) for kernel, x in zip(pairs[half], scales[half], strict=True)]
                first, second = (
                    _depthwise_bound(kernel, x[0]) for kernel, x in zip(kernels, bounds[half], strict=True)
                )
                factors.append(_scale(first + second))
                pairs[half] = [kernel * _column(factors[half]) for kernel in kernels]
            outputs = outputs / _column(torch.cat(factors))
        tensors = {
            f"{name}_{i}": piece
            for name, whole in (("weight", weight), ("bias", bias), ("dw3", dw3), ("dw5", dw5))
            for i, piece in enumerate(whole.chunk(self.convolutions))
        }
        tensors |= {f"pair_{half}_{i}": pairs[half][i] for half in (0, 1) for i in (0, 1)}
        return {**tensors, "out": outputs.transpose(0, 1)}

    def compute(self, x: Tensor, **tensors: Tensor) -> Tensor:
        p, s = [], []
        for i in range(self.convolutions):
            y = F.conv2d(x, tensors[f"weight_{i}"], tensors[f"bias_{i}"])
            p.append(F.relu(_depthwise(y, tensors[f"dw3_{i}"])))
            s.append(F.relu(_depthwise(y, tensors[f"dw5_{i}"])))
        joined = [
            F.relu(_depthwise(first, tensors[f"pair_{half}_0"]) + _depthwise(second, tensors[f"pair_{half}_1"]))
            for half, (first, second) in enumerate(self.joined(p, s))
        ]
        return F.conv2d(torch.cat(joined, dim=1), tensors["out"])

    def joined(self, p: Sequence[Tensor], s: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """First and second channels of all groups for both halves, from p and s in one piece or four parts."""
        cuts = [[start, self.part - start] if start < self.part else [start] for start in self.starts * 2]
        if len(p) == 1:
            pieces = iter(p[0].split([size for cut in cuts for size in cut], dim=1))
            before_and_after = [[next(pieces) for _ in cut] for cut in cuts]
            s = s[0].chunk(4, dim=1)
        else:
            before_and_after = [x.split(cut, dim=1) if cut[1:] else [x] for x, cut in zip(p, cuts, strict=True)]

        def join(part: int, other: int) -> Tensor:
            before, *after = before_and_after[part]
            return torch.cat([before, s[other], *after], dim=1)

        return [(join(i, i + self.odd), join(i + 1, i + 1 - self.odd)) for i in (0, 2)]


class FoldedExperts(nn.Module):
    """`ExpertLayer`, with experts that end before their last 1x1 convolution. (B, C, H, W), gates -> the same."""

    keep_fp32 = frozenset({"out"})
    present: Tensor
    out: Tensor

    def __init__(self, layer: ExpertLayer) -> None:
        super().__init__()
        assert layer.out is not None
        matrices = layer.out.weight.flatten(1).chunk(len(layer.present), 1)
        found = list(zip(layer.experts, matrices, layer.present, strict=True))
        found.sort(key=lambda part: _is_dilated(part[0]))
        self.experts, self.dilated, columns = nn.ModuleList(), nn.ModuleList(), []
        for expert, matrix, _ in found:
            if isinstance(expert, nn.Sequential):
                *layers, last = expert
                matrix = matrix @ _weight(last).flatten(1)
                if _weight(layers[0]).shape[-1] == 1:  # a depthwise 1x1 convolution is a factor for each channel
                    first, pointwise, relu, second = layers
                    _weight(pointwise).mul_(_weight(first).view(1, -1, 1, 1))
                    matrix = matrix * _weight(second).flatten()
                    layers = [pointwise, relu]
                expert = nn.Sequential(*layers)
            if _is_dilated(expert):
                self.dilated.append(_on_phases(cast("nn.Sequential", expert)[0]))
            else:
                self.experts.append(expert)
            columns.append(matrix)
        self.register_buffer("out", torch.stack(columns, dim=1))  # C, experts, C
        self.register_buffer("present", torch.tensor([number for *_, number in found]), persistent=False)

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        matrix = (self.out * gates.index_select(1, self.present)[:, None, :, None]).flatten(2)  # B, C, experts * C
        features = [expert(x) for expert in self.experts]
        if self.dilated:
            phases = F.pixel_unshuffle(x, 2)
            features.append(F.pixel_shuffle(torch.cat([expert(phases) for expert in self.dilated], dim=1), 2))
        features = torch.cat(features, dim=1).flatten(2)
        return F.relu(x + F.relu((matrix.to(x.dtype) @ features).view(x.shape)))


def _is_dilated(expert: nn.Module) -> bool:
    first = expert[0] if isinstance(expert, nn.Sequential) else expert
    return isinstance(first, nn.Conv2d) and first.dilation != (1, 1)


def _on_phases(convolution: nn.Module) -> nn.Conv2d:
    """What a depthwise convolution with dilation 2 does, on the pixel-unshuffled image: each of the four phases of a
    channel meets the same kernel, without dilation."""
    weight = _weight(convolution).repeat_interleave(4, 0)
    channels, _, size, _ = weight.shape
    plain = nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels, bias=False, dtype=weight.dtype)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    return plain


class Cast(nn.Module):
    """Any tensor -> the same in `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def fold(network: DRSformer, precision: Precision = "fp32") -> DRSformer:
    """An exactly equal network, constant and for inference.

    Args:
        network: float32 (B, 3, H, W) -> the same, with any masks of `export.topk`; it stays as it is. Where it is
            float64, so is what is float32 otherwise.
        precision: What the new network computes in between its input and its output.

    Raises:
        InputError: A weight is beyond the range of float16.
    """
    base = next(network.parameters()).dtype
    dtype = base if precision == "fp32" else DTYPES[precision]
    twin = copy.deepcopy(network).double().requires_grad_(False).eval()
    for block in _blocks(twin):
        _fold_block(block, base, trainable=False, fp16_safe=precision == "fp16")
    keep_fp32: list[Tensor] = []
    for compensator in (twin.mefc_early, twin.mefc_late):
        if isinstance(compensator, MixtureOfExpertsCompensator):
            keep_fp32 += compensator.gate.parameters()
            for i, step in enumerate(compensator.steps):
                if isinstance(step, ExpertLayer) and step.out is not None:
                    compensator.steps[i] = FoldedExperts(step)
    for module in twin.modules():
        keep_fp32 += [module.get_buffer(name) for name in getattr(module, "keep_fp32", ())]
    kept = {id(tensor) for tensor in keep_fp32}
    for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(base if id(tensor) in kept else dtype)
            if not tensor.isfinite().all():
                raise InputError(f"{name}: expected weights in the range of {precision}, found larger ones; use bf16")
    if dtype != base:
        twin.patch_embed = nn.Sequential(Cast(dtype), twin.patch_embed)
        twin.output = nn.Sequential(twin.output, Cast(base))
    return twin


def trainable(network: DRSformer) -> DRSformer:
    """The network in its folded form over the same parameters, for training: it computes the same function, faster on
    GPUs, and gradients reach the parameters of `network`. Masks are those of the threshold pattern; compensators stay
    as they are."""
    twin = with_pattern(network, "threshold")
    for block in _blocks(twin):
        _fold_block(block, next(network.parameters()).dtype, trainable=True, fp16_safe=False)
    return twin


def upcast(folded: DRSformer) -> DRSformer:
    """A network that `fold` made in half precision, with its rounded weights, that computes in float32."""
    twin = copy.deepcopy(folded).float()
    for module in twin.modules():
        if isinstance(module, Cast):
            module.dtype = torch.float32
    return twin


def _blocks(network: DRSformer) -> Iterator[SparseTransformerBlock]:
    return (module for module in network.modules() if isinstance(module, SparseTransformerBlock))


def _fold_block(block: SparseTransformerBlock, base: torch.dtype, trainable: bool, fp16_safe: bool) -> None:
    norm1, attention, norm2 = block.norm1, block.attn, block.norm2
    assert isinstance(norm1, LayerNorm)
    assert isinstance(attention, TopKSparseAttention)
    assert isinstance(norm2, LayerNorm)
    block.norm1, block.attn = Normalise(base), FoldedAttention(norm1, attention, trainable, fp16_safe)
    if isinstance(block.ffn, MixedScaleFeedForward):
        block.norm2, block.ffn = Normalise(base), FoldedFeedForward(norm2, block.ffn, trainable, fp16_safe)
    elif not trainable:  # the other kinds of Table 3 begin with a 1x1 convolution too
        project_in = cast("nn.Conv2d", block.ffn.project_in)
        weight, bias = with_norm(norm2, project_in.weight)
        project_in.weight, project_in.bias = nn.Parameter(weight), nn.Parameter(bias)
        block.norm2 = Normalise(base)


def _fill(channels: Iterable[int | None], length: int) -> list[int | None]:
    """The channels and as many zeros as `length` needs."""
    channels = list(channels)
    return [*channels, *[None] * (length - len(channels))]


def _weight(convolution: nn.Module) -> Tensor:
    assert isinstance(convolution, nn.Conv2d)
    return convolution.weight


def _column(x: Tensor) -> Tensor:
    """(C,) as a factor for the output channels of a convolution's weight."""
    return x.view(-1, 1, 1, 1)


def _depthwise(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=weight.shape[0])


def _normalised_bound(weight: Tensor, bias: Tensor) -> Tensor:
    """What a 1x1 convolution behind a normalisation can put out at most, by channel: a normalised pixel of C channels
    is no longer than sqrt(C)."""
    return weight.flatten(1).norm(dim=1) * weight.shape[1] ** 0.5 + bias.abs()


def _depthwise_bound(weight: Tensor, largest: Tensor) -> Tensor:
    """What a depthwise convolution can put out at most, by channel, if its input is bounded by `largest`."""
    return weight.abs().flatten(1).sum(1) * largest


def _scale(largest: Tensor) -> Tensor:
    """The power of two, at most 1, that brings each value below `FP16_SAFE_VALUE`."""
    return 0.5 ** (largest / FP16_SAFE_VALUE).clamp_min(1).log2().ceil()
