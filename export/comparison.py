"""What a validation finds: two networks on one image, and on all of them with a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray


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
    """

    name: str
    psnr_between: float
    max_difference: int
    flips: dict[str, int]
    reference_psnr: float | None = None
    candidate_psnr: float | None = None
    reference_ssim: float | None = None
    candidate_ssim: float | None = None

    @property
    def drop_db(self) -> float | None:
        """PSNR that the candidate loses, in dB; negative where it gains."""
        if self.reference_psnr is None or self.candidate_psnr is None:
            return None
        return 0.0 if self.reference_psnr == self.candidate_psnr else self.reference_psnr - self.candidate_psnr

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
        top: Row of its top left corner.
        left: Column of its top left corner.
        input: What both networks got, uint8 (h, w, 3).
        reference: What the reference made of it.
        candidate: What the candidate made of it.
    """

    top: int
    left: int
    input: NDArray[np.uint8]
    reference: NDArray[np.uint8]
    candidate: NDArray[np.uint8]

    def amplified(self) -> tuple[NDArray[np.uint8], int]:
        """The absolute difference of the outputs, times the largest power of two that keeps it below 256."""
        difference = np.abs(self.reference.astype(int) - self.candidate)
        factor = 2 ** int(math.log2(255 / max(1, difference.max())))
        return (difference * factor).astype(np.uint8), factor


class Column(NamedTuple):
    """A number that a `Comparison` has, and what sums it up over images."""

    field: str
    title: str
    format: str
    over_images: Literal["mean", "min", "max"] = "mean"


COLUMNS = (
    Column("reference_psnr", "PSNR\nref.", ".4f"),
    Column("candidate_psnr", "PSNR\ncand.", ".4f"),
    Column("drop_db", "drop\ndB", "+.4f"),
    Column("reference_ssim", "SSIM\nref.", ".4f"),
    Column("candidate_ssim", "SSIM\ncand.", ".4f"),
    Column("psnr_between", "between\ndB", ".2f", "min"),  # a mean is infinite as soon as two outputs are equal
    Column("max_difference", "max\ndiff.", "d", "max"),
    Column("flipped", "flips", ".4g"),
)


@dataclass(frozen=True)
class Validation:
    """A candidate against its reference.

    Attributes:
        facts: What was compared, for people: label and text.
        images: The two on each image.
        selections: Top-k selections that the network makes for one image, by layer, where flips were counted.
        uncounted: Layers of the reference that the candidate does not have, or not with the same scores.
        crops: Crops of the worst images, worst first, by the image's name.
        max_drop_db: Budget for the drop in PSNR, mean over the images; None where there is none.
        min_psnr: Budget for the PSNR between the outputs on every image; None where there is none.
    """

    facts: dict[str, str]
    images: list[Comparison]
    selections: dict[str, int]
    uncounted: list[str]
    crops: dict[str, Crop]
    max_drop_db: float | None = None
    min_psnr: float | None = None

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
    def passed(self) -> bool:
        """Whether the candidate is within every budget given. The drop is the mean over the images; `min_psnr` is for
        every single one."""
        within_drop = self.max_drop_db is None or self.totals["drop_db"] <= self.max_drop_db
        return within_drop and (self.min_psnr is None or self.totals["psnr_between"] >= self.min_psnr)

    @property
    def verdict(self) -> str:
        """One line for people."""
        if self.max_drop_db is None and self.min_psnr is None:
            return "Measured, without a budget"
        return "Within the budget" if self.passed else "Outside the budget"

    def summary(self) -> dict[str, Any]:
        """For JSON. Numbers are those of `totals`; None stands for infinity."""
        numbers = dict(self.totals)
        if self.worst.drop_db is not None:
            numbers["worst_drop_db"] = self.worst.drop_db
        return {
            "passed": self.passed,
            "images": len(self.images),
            **{key: round(value, 6) if math.isfinite(value) else None for key, value in numbers.items()},
            "max_drop_db": self.max_drop_db,
            "min_psnr": self.min_psnr,
        }

    def cells(self, image: Comparison) -> list[str]:
        """The row of a table for an image, after its name."""
        return [f"{getattr(image, column.field):{column.format}}" for column in self.columns]

    def last_row(self) -> list[str]:
        """The row of a table that sums up all images."""
        prefix = {"mean": "", "min": "≥ ", "max": "≤ "}
        return ["all", *(f"{prefix[c.over_images]}{self.total(c):{c.format}}" for c in self.columns)]
