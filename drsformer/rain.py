"""Render rain on clean photographs.

    python -m drsformer.rain photographs/ rainy/ --strength 0.2
    python -m drsformer.rain photographs/ rainy/ --strength 1.0 --streaks streaks/ --seed 7

The output folder gets `input/` (rainy) and `target/` (clean), ready for training and evaluation. What kind of rain it
is, and what it lacks, is said in `drsformer.rendering`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from drsformer.rendering import render_folder
from runtime.cli import main, progress_shown


def command(
    clean: Annotated[Path, tyro.conf.Positional],
    output: Annotated[Path, tyro.conf.Positional],
    strength: float | None = None,
    streaks: Path | None = None,
    seed: int = 0,
) -> int:
    """Render rain on every photograph of a folder; returns their number. The same seed gives the same rain.

    Args:
        clean: Folder of clean photographs.
        output: Folder that gets input/ and target/, as PNG.
        strength: Strength from 0, light, to 1, heavy; random for each photograph if not given.
        streaks: Folder of streak images on black to use instead of drawn streaks.
        seed: Number that the rain depends on.
    """
    with progress_shown() as on_progress:
        return render_folder(clean, output, strength, streaks, seed, on_progress)


if __name__ == "__main__":
    main(command, __doc__, summary=lambda count: {"images": count})
