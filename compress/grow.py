"""Make a trained network larger without changing what it computes (Net2Net, arXiv 1511.05641).

    python -m compress.grow --weights small.safetensors --depths 2 4 4 4 --hidden 2 --output larger.safetensors

Blocks are added whose output is zero, and hidden channels that are dead. Train the result on with `drsformer.train
--init` or `compress.distill`: it starts from what the small network knows. Residual widths and heads stay, since
LayerNorm and top-k count channels, and so do experts, since a gate that counts as nothing in a softmax learns nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from drsformer.counts import macs, params
from runtime.cli import console, main
from runtime.errors import InputError
from runtime.files import expect_output


@dataclass(frozen=True)
class GrowOptions:
    """What a network grows to.

    Args:
        depths: Blocks in each level of the encoder, and of the decoder in return; at least as many as there are.
        hidden: Factor for the hidden channels of each feed-forward network.
        seed: Seed of the new weights and of the places where they go.
        weights_key: Key of the weights to take from a checkpoint that holds several, such as params_ema.
    """

    depths: tuple[int, int, int, int]
    hidden: int = 1
    seed: int = 0
    weights_key: str | None = None


def grow(weights: Path, output: Path, options: GrowOptions) -> dict[str, float]:
    """Grow a checkpoint.

    Args:
        weights: Checkpoint, .safetensors or the authors' .pth.
        output: Larger checkpoint to write, .safetensors.
        options: What to grow it to.

    Returns:
        "gmacs_before", "params_before", "gmacs_after" and "params_after"; MACs are those for an image of 256x256.

    Raises:
        InputError: Arguments or the checkpoint cannot be used.
    """
    from compress.net2net import enlarge
    from drsformer import checkpoint

    if output.suffix != ".safetensors":
        raise InputError(f"`output`: expected a name ending in .safetensors, found {output}")
    expect_output(output, weights=weights)
    small = checkpoint.load(weights, options.weights_key)
    larger = enlarge(small.model, options.depths, options.hidden, seed=options.seed)
    checkpoint.save(output, larger, checkpoint.provenance_after(small, "compress.grow", asdict(options)))
    summary = {}
    for name, config in (("before", small.model.config), ("after", larger.config)):
        summary |= {f"gmacs_{name}": macs(config) / 1e9, f"params_{name}": params(config)}
    return summary


def command(weights: Path, output: Path, options: Annotated[GrowOptions, tyro.conf.arg(name="")]) -> dict[str, float]:
    """Grow a checkpoint, and print by how much.

    Args:
        weights: Checkpoint, .safetensors or the authors' .pth.
        output: Larger checkpoint to write, .safetensors.
        options: What to grow it to.
    """
    summary = grow(weights, output, options)
    console.print(
        "{gmacs_before:.2f} -> {gmacs_after:.2f} GMAC, {params_before} -> {params_after} parameters".format(**summary)
    )
    return summary


def run() -> None:
    """The command line."""
    main(command, __doc__, summary=lambda summary: summary)


if __name__ == "__main__":
    run()
