"""DRSformer for spandrel, the library with which chaiNNer, ComfyUI and others load networks: import this file, and
spandrel knows the architecture.

    import drsformer.spandrel
    from spandrel import ModelLoader

    network = ModelLoader().load_from_file("deraining.pth")
    clean = network(rainy)  # (1, 3, H, W) in [0, 1]

In ComfyUI, that import alone in a file of `custom_nodes` lets its upscaling nodes load the checkpoints of DRSformer.

spandrel reads files by its own rules and hands on tensors alone, so the structure is read off their shapes, as for any
checkpoint that is not of this project (`drsformer.checkpoint`): a network with other top-k fractions than the released
ones, which only our metadata tells, is refused or, with as many of them, taken for one with the released ones.

spandrel imports torchvision for two other architectures. PyPI's torchvision is built for PyTorch with CUDA; beside one
without, its import fails, and that of spandrel with it: take both from PyPI or both from PyTorch's index.
"""

from __future__ import annotations

from spandrel import (
    MAIN_REGISTRY,
    Architecture,
    ArchSupport,
    ImageModelDescriptor,
    ModelTiling,
    SizeRequirements,
    StateDict,
)

from drsformer import checkpoint
from drsformer.config import SIZE_MULTIPLE
from drsformer.model import DRSformer

__all__ = ["DRSformerArchitecture"]


class DRSformerArchitecture(Architecture[DRSformer]):
    """All DRSformers whose structure can be read off their tensors, under the released names or ours."""

    def __init__(self) -> None:
        super().__init__(id="DRSformer", detect=_is_drsformer)

    def load(self, state_dict: StateDict) -> ImageModelDescriptor[DRSformer]:
        """The network and how it may be used.

        Raises:
            InputError: The tensors are not exactly those of a DRSformer.
        """
        model = checkpoint.from_tensors("state dict", state_dict)
        width = model.config.encoder[0].width
        return ImageModelDescriptor(
            model,
            model.state_dict(),
            architecture=self,
            purpose="Restoration",
            tags=[f"{width}dim", *(["MEFC"] if model.config.mefc_early or model.config.mefc_late else [])],
            supports_half=False,  # sums over the image overflow; `export.onnx --precision fp16` keeps those in float32
            supports_bfloat16=True,
            scale=1,
            input_channels=3,
            output_channels=3,
            size_requirements=SizeRequirements(multiple_of=SIZE_MULTIPLE),
            tiling=ModelTiling.DISCOURAGED,  # attention goes by statistics of the whole image
        )


def _is_drsformer(state_dict: StateDict) -> bool:
    """By what it does not share with Restormer and other relatives: weights of top-k masks, the MSFN, or an MEFC."""
    names = checkpoint.our_names(state_dict)
    own = (".attn.mix.0", ".ffn.dwconv5x5_1.weight", ".gate.0.weight")
    return {"patch_embed.weight", "reduce_chan_level3.weight"} <= names.keys() and any(n.endswith(own) for n in names)


MAIN_REGISTRY.add(ArchSupport.from_architecture(DRSformerArchitecture()), ignore_duplicates=True)
