"""What a validation finds: two networks on one image, and on all of them with budgets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drsformer.metrics import lost_db, mean_gain, shortfall
from runtime.pictures import Window
from runtime.pixels import Size, size_text

FEW_IMAGES = 10
"""With fewer than so many there is a remark."""


@dataclass(frozen=True)
class Comparison:
    """Two networks on one image.

    Attributes:
        name: Name of the image.
        psnr_between: PSNR between the two outputs, over all channels, in dB; inf where they are equal.
        max_difference: Largest difference between the two outputs, in levels of 255.
        flips: Top-k selections that differ, by layer, where both networks have the layer.
        reference_psnr: PSNR of the reference against ground truth, in dB; this and the next are None where there is
            none.
        candidate_psnr: PSNR of the candidate against ground truth, in dB.
        reference_ssim: SSIM of the reference against ground truth.
        candidate_ssim: SSIM of the candidate against ground truth.
        input_psnr: PSNR of the rainy input, which both got, against ground truth, in dB.
        input_ssim: SSIM of the rainy input against ground truth.
    """

    name: str
    psnr_between: float
    max_difference: int
    flips: dict[str, int]
    reference_psnr: float | None = None
    candidate_psnr: float | None = None
    reference_ssim: float | None = None
    candidate_ssim: float | None = None
    input_psnr: float | None = None
    input_ssim: float | None = None

    @property
    def drop_db(self) -> float | None:
        """PSNR that the candidate loses, in dB, see `drsformer.metrics.lost_db`."""
        if self.reference_psnr is None or self.candidate_psnr is None:
            return None
        return lost_db(self.reference_psnr, self.candidate_psnr)

    @property
    def badness(self) -> float:
        """What the worst image has most of: the drop, or without ground truth the PSNR between the outputs negated, in
        dB."""
        return -self.psnr_between if self.drop_db is None else self.drop_db

    @property
    def flipped(self) -> int:
        """Top-k selections that differ in all layers."""
        return sum(self.flips.values())


@dataclass(frozen=True, eq=False)
class Crop:
    """The part of an image where two outputs differ most.

    Attributes:
        window: Where it is.
        input: What both networks got, uint8 (h, w, 3).
        reference: What the reference made of it.
        candidate: What the candidate made of it.
        target: What it ought to be; None where nobody knows.
    """

    window: Window
    input: NDArray[np.uint8]
    reference: NDArray[np.uint8]
    candidate: NDArray[np.uint8]
    target: NDArray[np.uint8] | None = None

    def amplified(self) -> tuple[NDArray[np.uint8], int]:
        """The absolute difference of the outputs, times the largest power of two that keeps it below 256."""
        difference = np.abs(self.reference.astype(int) - self.candidate)
        factor = 2 ** int(math.log2(255 / max(1, difference.max())))
        return (difference * factor).astype(np.uint8), factor


@dataclass(frozen=True, eq=False)
class Picture:
    """A whole image for people to look at, and its crop.

    Attributes:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        layers: WebP files of "rainy", "reference", "candidate" and, where it is known, "clean", of one size, which is
            smaller than that of the image where that is large.
        crop: Where the outputs differ most.
    """

    height: int
    width: int
    layers: dict[str, bytes]
    crop: Crop


class Extent(NamedTuple):
    """How large a network is: bytes of its file, and parameters and MACs for one image of 256x256 where they are
    known."""

    bytes: int
    params: int | None = None
    macs: int | None = None


class Timing(NamedTuple):
    """How long the two took for one image, from uint8 to uint8, in turn in the same run.

    Attributes:
        size: Height and width of the image.
        rounds: How often each was timed.
        reference: Where the reference ran.
        candidate: Where the candidate ran.
        reference_ms: Median of its milliseconds.
        candidate_ms: Median of its milliseconds.
        ratio: Median over the rounds of the candidate's time over the reference's.
    """

    size: Size
    rounds: int
    reference: str
    candidate: str
    reference_ms: float
    candidate_ms: float
    ratio: float

    def __str__(self) -> str:
        return (
            f"medians of {self.rounds} runs in turn on one image of {size_text(self.size)}: {self.reference} against "
            f"{self.candidate}"
        )


class Column(NamedTuple):
    """A number that a `Comparison` has, and what sums it up over images."""

    field: str
    title: str
    format: str
    over_images: Literal["mean", "min", "max"] = "mean"

    def text(self, value: float) -> str:
        """A value of this column, for people."""
        if self.field == "psnr_between" and value == math.inf:
            return "equal"
        return f"{value:{self.format}}"


COLUMNS = (
    Column("input_psnr", "PSNR\ninput", ".2f"),
    Column("reference_psnr", "PSNR\nref.", ".2f"),
    Column("candidate_psnr", "PSNR\ncand.", ".2f"),
    Column("drop_db", "drop\ndB", "+z.4f"),
    Column("input_ssim", "SSIM\ninput", ".4f"),
    Column("reference_ssim", "SSIM\nref.", ".4f"),
    Column("candidate_ssim", "SSIM\ncand.", ".4f"),
    Column("psnr_between", "between\ndB", ".2f", "min"),  # a mean is infinite as soon as two outputs are equal
    Column("max_difference", "max\ndiff.", "d", "max"),
    Column("flipped", "flips", ".4g"),
)


@dataclass(frozen=True)
class Budget:
    """A bound on what was measured, in dB.

    Attributes:
        measure: What is bounded, for people.
        found: What was measured.
        limit: The bound.
        is_floor: Whether the bound is the least that is allowed, or else the most.
    """

    measure: str
    found: float
    limit: float
    is_floor: bool = False

    @property
    def kept(self) -> bool:
        """Whether what was measured is within the bound."""
        return self.found >= self.limit if self.is_floor else self.found <= self.limit

    def __str__(self) -> str:
        bound, beyond = ("at least", "too little") if self.is_floor else ("at most", "too much")
        margin = f"{abs(self.found - self.limit):.3g} dB {'to spare' if self.kept else beyond}"
        return f"{self.measure} {self.found:z.4f} dB, {bound} {self.limit:g} dB ({margin})"


@dataclass(frozen=True)
class Validation:
    """A candidate against its reference.

    Attributes:
        facts: What was compared, for people: label and text.
        images: The two on each image.
        selections: Top-k selections that the network makes for one image, by layer, where flips were counted.
        uncounted: Why flips were not counted, in one line; None where they were.
        pictures: Some of the images, worst first, by the image's name.
        extents: How large "reference" and "candidate" are.
        origin: What the reference was trained on, as `drsformer.checkpoint.Checkpoint.origin` says it.
        max_drop_db: Budget for the drop in PSNR, mean over the images; this and the next are None where there is none.
        max_worst_drop_db: Budget for the drop in PSNR on the image where it is largest.
        min_gain_db: Budget for the gain of the candidate's PSNR over that of the rainy input, see
            `drsformer.metrics.mean_gain`.
        min_psnr: Budget for the PSNR between the outputs on every image.
        timing: How long they took, where that was measured.
        located: Which layer departs first, in one line, where that was asked for; see `export.locate`.
    """

    facts: dict[str, str]
    images: list[Comparison]
    selections: dict[str, int]
    uncounted: str | None
    pictures: dict[str, Picture]
    origin: str = "of unknown training data"
    max_drop_db: float | None = None
    max_worst_drop_db: float | None = None
    min_gain_db: float | None = None
    min_psnr: float | None = None
    extents: dict[str, Extent] = field(default_factory=dict)
    timing: Timing | None = None
    located: str | None = None

    @property
    def columns(self) -> list[Column]:
        """Those of `COLUMNS` that these images have."""
        without = [] if self.selections else ["flipped"]
        return [c for c in COLUMNS if c.field not in without and getattr(self.images[0], c.field) is not None]

    def total(self, column: Column) -> float:
        """What sums up a column."""
        values = [getattr(image, column.field) for image in self.images]
        return getattr(np, column.over_images)(values).item()

    @property
    def totals(self) -> dict[str, float]:
        """What sums up each column, by field."""
        return {column.field: self.total(column) for column in self.columns}

    @property
    def worst(self) -> Comparison:
        """The image with most `badness`."""
        return max(self.images, key=lambda image: image.badness)

    @property
    def typical(self) -> Comparison:
        """The image that half of the others are at least as bad as."""
        ranked = sorted(self.images, key=lambda image: image.badness, reverse=True)
        return ranked[len(ranked) // 2]

    @property
    def gains(self) -> dict[str, float]:
        """The gain in PSNR over the rainy input, in dB, of "reference" and "candidate" where it is known."""
        known = [(image, image.input_psnr) for image in self.images if image.input_psnr is not None]
        return {
            who: mean_gain((getattr(image, f"{who}_psnr"), rainy) for image, rainy in known)
            for who in ("reference", "candidate")
            if known
        }

    @property
    def budgets(self) -> list[Budget]:
        """The bounds given, those that are not kept first."""
        budgets = []
        if self.max_drop_db is not None:
            budgets.append(Budget("mean drop in PSNR", self.totals["drop_db"], self.max_drop_db))
        if self.max_worst_drop_db is not None and self.worst.drop_db is not None:
            measure = f"drop in PSNR on the worst image ({self.worst.name})"
            budgets.append(Budget(measure, self.worst.drop_db, self.max_worst_drop_db))
        if self.min_gain_db is not None:
            budgets.append(Budget("gain over the rainy input", self.gains["candidate"], self.min_gain_db, True))
        if self.min_psnr is not None:
            budgets.append(Budget("PSNR between the outputs", self.totals["psnr_between"], self.min_psnr, True))
        return sorted(budgets, key=lambda budget: budget.kept)

    @property
    def passed(self) -> bool:
        """Whether the candidate is within every budget given."""
        return all(budget.kept for budget in self.budgets)

    @property
    def warnings(self) -> list[str]:
        """What makes the numbers worthless however good they look, in a line each: networks that do harm."""
        return [
            shortfall(f"The {who}", gain, self.origin if who == "reference" else None)
            for who, gain in self.gains.items()
            if gain < 0
        ]

    @property
    def remarks(self) -> list[str]:
        """What to know about the numbers, in a line each."""
        remarks, count = [], len(self.images)
        if count < FEW_IMAGES:
            images = "1 image" if count == 1 else f"{count} images"
            remarks.append(f"Judged on {images}; fewer than {FEW_IMAGES} say little about others.")
        if self.uncounted:
            remarks.append(f"Flips are not counted: {self.uncounted}.")
        return remarks

    @property
    def headline(self) -> str:
        """The verdict in some words."""
        if not self.passed:
            return "Outside the budget"
        if self.warnings:
            return "Worse than no network"
        return "Within the budget" if self.budgets else "Measured, without a budget"

    @property
    def verdict(self) -> str:
        """One line for people, with every budget and its margin."""
        budgets = "; ".join(map(str, self.budgets))
        return f"{self.headline}: {budgets}" if budgets else self.headline

    def summary(self) -> dict[str, Any]:
        """For JSON. Numbers are those of `totals`, the drop on the worst image and the gain of the candidate over the
        rainy input; None stands for infinity."""
        numbers = dict(self.totals)
        if self.worst.drop_db is not None:
            numbers["worst_drop_db"] = self.worst.drop_db
        if self.gains:
            numbers["gain_db"] = self.gains["candidate"]
        return {
            "passed": self.passed,
            "images": len(self.images),
            **{key: round(value, 6) + 0.0 if math.isfinite(value) else None for key, value in numbers.items()},
            "max_drop_db": self.max_drop_db,
            "max_worst_drop_db": self.max_worst_drop_db,
            "min_gain_db": self.min_gain_db,
            "min_psnr": self.min_psnr,
            "warnings": self.warnings,
            **({"timing": self.timing._asdict()} if self.timing else {}),
            **({"located": self.located} if self.located else {}),
        }

    def cells(self, image: Comparison) -> list[str]:
        """The row of a table for an image, after its name."""
        return [column.text(getattr(image, column.field)) for column in self.columns]

    def last_row(self) -> list[str]:
        """The row of a table that sums up all images."""
        signs = {"mean": "", "min": "≥ ", "max": "≤ "}
        row = ["all"]
        for column in self.columns:
            total = self.total(column)
            row.append(f"{signs[column.over_images] if 0 < total < math.inf else ''}{column.text(total)}")
        return row
