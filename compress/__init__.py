"""Making a DRSformer smaller: what it costs, pruning, distillation, quantisation, and the search over all three.

    from compress import PruneOptions, macs
    from compress.prune import prune

    pruned = prune(Path("full.safetensors"), [Path("Rain200H/train")], Path("half.safetensors"), PruneOptions(macs=0.5))

Each command `python -m compress.NAME` is a function of the same name in its file: `prune`, `distill`, `quantize`,
`search`, `grow`; of `cost`, `count` and `time_costs`. The names below are what other programs may rely on besides.
`import compress` does not load PyTorch; the first use of a name that needs it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from drsformer.counts import macs, params
from runtime.lazy import lazy_names

from .options import KINDS, LossWeights

if TYPE_CHECKING:
    from .distill import DistillOptions
    from .distillation import Distillation
    from .groups import PruningGroup, origins, pruning_groups, remove
    from .grow import GrowOptions
    from .importance import importances
    from .latency import Latency, latency_model
    from .net2net import enlarge
    from .obs import costs_after_repair
    from .prune import PruneOptions
    from .quantize import QuantizeOptions
    from .recover import recover
    from .search import SearchOptions
    from .selection import Target, prune_network

__all__ = [
    "KINDS",
    "DistillOptions",
    "Distillation",
    "GrowOptions",
    "Latency",
    "LossWeights",
    "PruneOptions",
    "PruningGroup",
    "QuantizeOptions",
    "SearchOptions",
    "Target",
    "costs_after_repair",
    "enlarge",
    "importances",
    "latency_model",
    "macs",
    "origins",
    "params",
    "prune_network",
    "pruning_groups",
    "recover",
    "remove",
]

__getattr__ = lazy_names(
    __name__,
    {
        "DistillOptions": "distill",
        "Distillation": "distillation",
        "GrowOptions": "grow",
        "Latency": "latency",
        "PruneOptions": "prune",
        "PruningGroup": "groups",
        "QuantizeOptions": "quantize",
        "SearchOptions": "search",
        "Target": "selection",
        "costs_after_repair": "obs",
        "enlarge": "net2net",
        "importances": "importance",
        "latency_model": "latency",
        "origins": "groups",
        "prune_network": "selection",
        "pruning_groups": "groups",
        "recover": "recover",
        "remove": "groups",
    },
)
