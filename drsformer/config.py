"""What a DRSformer is made of: one frozen dataclass that can express every variant.

The released network, the paper's ablations and every pruned network are values of `DRSformerConfig`,
never other code. The price is that widths are spelled out block by block; `DRSformerConfig.regular`
and `preset` write that list for networks whose levels are regular.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

SIZE_MULTIPLE = 8
"""Height and width of the network's input must be multiples of this: three levels of downsampling by two."""

RELEASED_TOPK = ("1/2", "2/3", "3/4", "4/5")
"""Fractions of the channels of a head that the four masks keep (paper, section 4.1, and the released code)."""

LARGEST = 2**16
"""Most channels of anything, and most heads: what is larger is a damaged or hostile file."""

MOST_BLOCKS = 256
"""The same for the blocks of a level."""

MOST_PARTS = 64
"""The same for the fractions of the top-k masks, the steps of an MEFC and the experts of a step."""

FEED_FORWARDS = ("msfn", "gdfn", "dfn", "fn")
"""Feed-forward kinds of the paper's Table 3, best first."""

EXPERTS = (
    "sep_conv_1x1", "sep_conv_3x3", "sep_conv_5x5", "sep_conv_7x7",
    "dil_conv_3x3", "dil_conv_5x5", "dil_conv_7x7", "avg_pool_3x3",
)  # fmt: skip
"""Expert operations of an MEFC in the released order (paper, section 3.3)."""

NO_EXPERT = "none"
"""A pruned expert. It computes nothing, but its gate still takes part in the softmax, so that removing an
expert whose output is zero leaves the network's output as it was."""


@dataclass(frozen=True)
class BlockConfig:
    """One sparse transformer block: attention over `heads` heads of `head_dim` channels each (the same in Q,
    K and V), then a feed-forward network with `hidden` channels in each half of its hidden layer."""

    heads: int
    head_dim: int
    hidden: int


@dataclass(frozen=True)
class LevelConfig:
    """One level of the U: `width` channels on the residual path, and the blocks that work on them."""

    width: int
    blocks: tuple[BlockConfig, ...]


@dataclass(frozen=True)
class MEFCConfig:
    """A mixture-of-experts feature compensator: a gating MLP with `gate_hidden` channels, and for every step the
    names of its experts, from `EXPERTS` or `NO_EXPERT`. Raises ValueError for others, and for steps of unequal size."""

    gate_hidden: int
    steps: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        if unknown := {name for step in self.steps for name in step} - {*EXPERTS, NO_EXPERT}:
            raise ValueError(f"unknown expert {sorted(unknown)[0]!r}; known: {', '.join((*EXPERTS, NO_EXPERT))}")
        sizes = {len(step) for step in self.steps}
        hidden = self.gate_hidden
        if not isinstance(hidden, int) or not 1 <= hidden <= LARGEST or len(sizes) != 1 or 0 in sizes:
            raise ValueError(f"expected a gate and at least one step, all with as many experts, found {self}")
        if max(*sizes, len(self.steps)) > MOST_PARTS:
            raise ValueError(f"expected at most {MOST_PARTS} steps and experts in each, found more")

    @classmethod
    def regular(cls, experts: int = len(EXPERTS), steps: int = 4) -> MEFCConfig:
        """The first `experts` of `EXPERTS` in each step; the gate's hidden width is that of the released code.
        The paper's Table 4 has 1, 4 and 8 experts, without saying which the one and the four are."""
        if not 1 <= experts <= len(EXPERTS):
            raise ValueError(f"expected 1 to {len(EXPERTS)} experts, found {experts}")
        return cls(2 * steps * experts, (EXPERTS[:experts],) * steps)


LEVELS: dict[str, tuple[str | int, ...]] = {
    "encoder_level1": ("encoder", 0),
    "encoder_level2": ("encoder", 1),
    "encoder_level3": ("encoder", 2),
    "latent": ("latent",),
    "decoder_level3": ("decoder", 0),
    "decoder_level2": ("decoder", 1),
    "decoder_level1": ("decoder", 2),
}
"""The modules that hold blocks, in the order in which an image passes them, and where the level of each is in
`DRSformerConfig`."""


@dataclass(frozen=True)
class DRSformerConfig:
    """Structure of one network, from which it can be rebuilt without anything else.

    encoder:    levels 1, 2, 3, at full, half and quarter resolution.
    latent:     level 4, at an eighth.
    decoder:    levels 3, 2, 1. Level 1 works on the plain concatenation of encoder level 1 and the upsampled
                level 2, so its width is the sum of the two.
    up:         channels that the upsampling layers bring to levels 3, 2, 1.
    topk:       fractions of a head's channels that each mask keeps, as exact strings ("2/3"), ascending;
                empty means dense attention.
    feed_forward: one of `FEED_FORWARDS`.
    mefc_early, mefc_late: compensators before encoder level 1 and after decoder level 1, or None.

    Raises ValueError where the parts do not fit together.
    """

    encoder: tuple[LevelConfig, LevelConfig, LevelConfig]
    latent: LevelConfig
    decoder: tuple[LevelConfig, LevelConfig, LevelConfig]
    up: tuple[int, int, int]
    topk: tuple[str, ...] = RELEASED_TOPK
    feed_forward: str = "msfn"
    mefc_early: MEFCConfig | None = None
    mefc_late: MEFCConfig | None = None

    def __post_init__(self) -> None:
        if len(self.encoder) != 3 or len(self.decoder) != 3 or len(self.up) != 3:
            raise ValueError("expected three encoder levels, three decoder levels and three upsamplings")
        if self.feed_forward not in FEED_FORWARDS:
            raise ValueError(f"unknown feed_forward {self.feed_forward!r}; known: {', '.join(FEED_FORWARDS)}")
        for level in (*self.encoder, self.latent, *self.decoder):
            widths = [level.width, *(n for b in level.blocks for n in (b.heads, b.head_dim, b.hidden))]
            if any(not isinstance(n, int) or not 1 <= n <= LARGEST for n in (*widths, *self.up)):
                raise ValueError(f"expected whole numbers from 1 to {LARGEST} as widths and heads, found {level}")
            if any(block.heads * block.head_dim > LARGEST for block in level.blocks):
                raise ValueError(f"expected at most {LARGEST} channels in all heads of a block, found {level}")
            if len(level.blocks) > MOST_BLOCKS:
                raise ValueError(f"expected at most {MOST_BLOCKS} blocks in a level, found {len(level.blocks)}")
        for level in (*self.encoder[1:], self.latent):
            if level.width % 4:
                raise ValueError(f"levels 2 to 4 of the encoder need a multiple of 4 as width, found {level.width}")
        expected = self.encoder[0].width + self.up[2]
        if self.decoder[2].width != expected:
            raise ValueError(
                f"decoder level 1 must be encoder level 1 plus up[2] = {expected} channels wide, "
                f"found {self.decoder[2].width}"
            )
        if len(self.topk) > MOST_PARTS:
            raise ValueError(f"expected at most {MOST_PARTS} top-k fractions, found {len(self.topk)}")
        fractions = [_fraction(f) for f in self.topk]
        if fractions != sorted(set(fractions)) or any(not 0 < f <= 1 for f in fractions):
            raise ValueError(f"expected ascending top-k fractions in (0, 1], found {', '.join(self.topk)}")

    @classmethod
    def regular(
        cls,
        width: int = 48,
        depths: tuple[int, int, int, int] = (4, 6, 6, 8),
        heads: tuple[int, int, int, int] = (1, 2, 4, 8),
        expansion: float = 2.66,
        topk: tuple[str, ...] = RELEASED_TOPK,
        feed_forward: str = "msfn",
        mefc: str = "none",
        experts: int = len(EXPERTS),
    ) -> DRSformerConfig:
        """A network as the paper describes it (sections 3.1 and 4.1): width doubles from level to level, the decoder
        mirrors the encoder, decoder level 1 has twice the width. `mefc` is "early", "late", "both" or "none"
        (Table 4). The defaults, with mefc="both", are the released network."""
        if mefc not in ("early", "late", "both", "none"):
            raise ValueError(f"unknown mefc {mefc!r}; known: early, late, both, none")

        def level(i: int, width: int) -> LevelConfig:
            if width % heads[i]:
                raise ValueError(f"{width} channels of level {i + 1} cannot be split over {heads[i]} heads")
            block = BlockConfig(heads[i], width // heads[i], int(width * expansion))
            return LevelConfig(width, (block,) * depths[i])

        w1, w2, w3, w4 = (width * 2**i for i in range(4))
        compensator = MEFCConfig.regular(experts)
        return cls(
            encoder=(level(0, w1), level(1, w2), level(2, w3)),
            latent=level(3, w4),
            decoder=(level(2, w3), level(1, w2), level(0, 2 * w1)),
            up=(w3, w2, w1),
            topk=topk,
            feed_forward=feed_forward,
            mefc_early=compensator if mefc in ("early", "both") else None,
            mefc_late=compensator if mefc in ("late", "both") else None,
        )

    def levels(self) -> dict[str, LevelConfig]:
        """The levels by the names of their modules, in the order of `LEVELS`."""
        return dict(zip(LEVELS, (*self.encoder, self.latent, *self.decoder), strict=True))

    def with_levels(self, levels: dict[str, LevelConfig], **changes: Any) -> DRSformerConfig:
        """With all levels replaced, by the names of their modules, and further fields by theirs."""
        e1, e2, e3, latent, d3, d2, d1 = (levels[module] for module in LEVELS)
        return dataclasses.replace(self, encoder=(e1, e2, e3), latent=latent, decoder=(d3, d2, d1), **changes)

    def kept(self, head_dim: int) -> tuple[int, ...]:
        """How many of `head_dim` scores each mask keeps in a row: int(width * fraction), at least one, which for
        the released fractions and head widths from 2 on is what the released code keeps."""
        return tuple(max(1, math.floor(head_dim * _fraction(f))) for f in self.topk)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DRSformerConfig:
        """The inverse of `to_dict`, also after a round trip through JSON. Raises ValueError for missing, unknown
        or ill-typed entries."""

        def block(d: dict[str, Any]) -> BlockConfig:
            d = dict(d)
            if "head_width" in d:  # its former name
                d["head_dim"] = d.pop("head_width")
            return BlockConfig(**d)

        def level(d: dict[str, Any]) -> LevelConfig:
            return LevelConfig(d["width"], tuple(block(b) for b in d["blocks"]))

        def mefc(d: dict[str, Any] | None) -> MEFCConfig | None:
            return MEFCConfig(d["gate_hidden"], tuple(tuple(step) for step in d["steps"])) if d else None

        try:
            parts = dict(data)
            parts.update(
                encoder=tuple(level(d) for d in data["encoder"]),
                latent=level(data["latent"]),
                decoder=tuple(level(d) for d in data["decoder"]),
                up=tuple(data["up"]),
                topk=tuple(data["topk"]),
                mefc_early=mefc(data["mefc_early"]),
                mefc_late=mefc(data["mefc_late"]),
            )
            return cls(**parts)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a DRSformer config: {type(error).__name__}: {error}") from None


def _fraction(text: str) -> Fraction:
    try:
        if not isinstance(text, str):
            raise TypeError
        if not re.fullmatch(r"[0-9]{1,20}([/.][0-9]{1,20})?", text):  # an exponent can take for ever
            raise ValueError
        return Fraction(text)
    except (ValueError, ZeroDivisionError, TypeError):
        raise ValueError(f"expected a top-k fraction such as '2/3', found {text!r}") from None


# One row a network; every column is an argument of `DRSformerConfig.regular`.
PRESETS: dict[str, dict[str, Any]] = {
    "drsformer":        dict(width=48, depths=(4, 6, 6, 8), heads=(1, 2, 4, 8), expansion=2.66, mefc="both"),
    "drsformer-nomefc": dict(width=48, depths=(4, 6, 6, 8), heads=(1, 2, 4, 8), expansion=2.66, mefc="none"),
    "drsformer-m":      dict(width=48, depths=(2, 3, 3, 4), heads=(1, 2, 4, 8), expansion=2.66, mefc="none"),
    "drsformer-s":      dict(width=16, depths=(2, 4, 4, 4), heads=(1, 2, 4, 8), expansion=2.0, mefc="none"),
    "drsformer-xs":     dict(width=16, depths=(1, 2, 2, 2), heads=(1, 2, 4, 8), expansion=1.0, mefc="none"),
    "drsformer-tiny":   dict(width=8, depths=(1, 1, 1, 1), heads=(1, 2, 2, 4), expansion=2.0, mefc="none"),
}  # fmt: skip


def preset(name: str, **changes: Any) -> DRSformerConfig:
    """The config of a named network, but for `changes`, which are arguments of `DRSformerConfig.regular`. Raises
    ValueError that lists the known names, and where the parts do not fit together."""
    if name not in PRESETS:
        raise ValueError(f"unknown network {name!r}; known: {', '.join(PRESETS)}")
    arguments = PRESETS[name] | changes
    if "experts" in changes and arguments["mefc"] == "none":
        raise ValueError(f"expected a compensator (mefc) for the experts in {name}, found none")
    return DRSformerConfig.regular(**arguments)
