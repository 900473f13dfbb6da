"""The interface that timm's tools expect of a Strip-MLP, besides its forward pass."""

import torch
from timm.models._input import update_model_input_size
from torch import nn

from .errors import InputError
from .input_size import check_img_size, map_sizes
from .staged import StagedNet
from .weights import fit_state_dict

FUSED_TOLERANCE = 5e-3  # relative to the largest output; TF32 alone causes a tenth of it


class TimmInterface(StagedNet):
    """The part of ``StripMLPNet`` for timm: layer groups, loading, input size, inference form, weight decay."""

    def _keep_stages(self, count: int) -> None:
        """Removes the stages after the first ``count``."""
        self.stages, self.merging = self.stages[:count], self.merging[:count - 1]
        for stage, names in ((2, ["shortcut_m1"]), (3, ["shortcut_s", "shortcut_m2"])):
            for name in names if stage >= count else []:
                setattr(self, name, nn.Identity())

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As PyTorch's. Released keys are converted, and weights for another input size are resized."""
        return super().load_state_dict(fit_state_dict(state_dict, self), strict, assign)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Makes this a network for images of another size, with weights resized by ``adapt_size``.

        The parameters stay the same objects. With ``dynamic_img_size``, windows have the new size from then on.

        Raises:
            InputError: sides that are not multiples of ``8 * patch_size``, or a network after ``fuse``.
        """
        weights, patch_size = self.state_dict(), self.stem.stride[0]
        if not any(key.endswith("_strip.weight") for key in weights):
            raise InputError("this network has no strip layers to resize; call set_input_size before fuse")
        self.img_size = check_img_size(img_size, patch_size)
        for blocks, size in zip(self.stages, map_sizes(self.img_size, patch_size), strict=False):  # some may be pruned
            for module in blocks.modules():
                if hasattr(module, "set_size"):
                    module.set_size(size)
        self.load_state_dict(weights)
        update_model_input_size(self, self.img_size)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Turns the network, in place, into its inference form: faster, equal within rounding, not trainable.

        See ``fused.py`` for what is folded. Its state dict has other keys, so load weights first.

        Raises:
            InputError: the two forms' outputs differ on a batch of two random images, because a part of the network was
                changed and the inference form was not. The network stays unchanged.
        """
        weight = self.stem.weight
        images = torch.randn(2, self.in_chans, *self.img_size, generator=torch.Generator().manual_seed(0)).to(weight)
        blocks = [block for stage in self.stages for block in stage]
        parts = [(block.token_mixing, block.channel_mixing) for block in blocks]
        with torch.autocast(weight.device.type, enabled=False):
            expected = self.eval()(images)
            for block in blocks:
                block.fuse()
            difference = float((self(images) - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        if not difference <= max(FUSED_TOLERANCE, 8 * torch.finfo(weight.dtype).eps):
            for block, (token_mixing, channel_mixing) in zip(blocks, parts, strict=True):
                block.token_mixing, block.channel_mixing = token_mixing, channel_mixing
            raise InputError(f"the inference form's outputs differ from the network's by {difference:.1e} of the "
                             "largest. models/fused.py repeats the network's formulas: change them there too, or do "
                             "not fuse (TEST.FUSE False)")
        self.stages.requires_grad_(False)
        return self

    def no_weight_decay(self) -> set[str]:
        """The biases of the strip layers, which timm would decay because they have two dimensions."""
        return {name for name, _ in self.named_parameters() if name.endswith("_strip.bias")}

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's patterns of layer groups: the stem, then the stages (``coarse``) or the blocks, last the head.

        The layers that lead into a stage belong to its first block.
        """
        first = () if coarse else (0,)
        return {
            "stem": r"^stem",
            "blocks": [
                (r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)", None),
                (r"^merging\.0", (1, *first)),
                (r"^(?:merging\.1|shortcut_m1)", (2, *first)),
                (r"^(?:merging\.2|shortcut_s|shortcut_m2)", (3, *first)),
                (r"^norm", (99999,)),  # timm's mark for the group before
            ],
        }
