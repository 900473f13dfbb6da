"""Strip-MLP with a part removed or connected differently, for ablations (the last three keys of MODEL.STRIP_MLP)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .strip_mlp import CGSMM, LSMM, StripMixingBlock, StripMLPNet
from .windows import cut, merge


class ParallelCGSMM(CGSMM):
    """Both strip layers read the input. In the cascade, the column layer reads the row layer's output.

    The layers and their parameters are those of the cascade.
    """

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        windows = cut(x, self.size)
        row = self.row_strip(self.row_position(windows))
        y = F.gelu(self.norm(self.row_fuse(torch.cat([row, windows], dim=1))))
        column = self.column_strip(self.column_position(windows))
        y, column = (merge(part, x.shape) for part in (y, column))
        return self.column_fuse(torch.cat([y, column], dim=1))


class AblatedMixingBlock(StripMixingBlock):
    """Token mixing by CGSMM and LSMM on half of the channels each, or by one of them on all channels.

    ``mixers`` is ``"both"``, ``"cgsmm"`` or ``"lsmm"``; without ``cascade``, CGSMM's strip layers run in parallel.
    """

    def __init__(self, dim, size, num_patches, strip_width, mixers: str, cascade: bool):
        super().__init__(dim, size, num_patches, strip_width)
        del self.cgsmm, self.lsmm
        width = dim // 2 if mixers == "both" else dim
        if mixers != "lsmm":
            self.cgsmm = (CGSMM if cascade else ParallelCGSMM)(width, size, num_patches, strip_width)
        if mixers != "cgsmm":
            self.lsmm = LSMM(width)

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        x = self.conv(F.gelu(self.conv_norm(x)))
        x = F.gelu(self.proj_norm(self.proj_in(x)))
        mixers = [module for name, module in self.named_children() if name in ("cgsmm", "lsmm")]
        mixed = [mixer(part) for mixer, part in zip(mixers, x.chunk(len(mixers), dim=1), strict=True)]
        return self.proj_out(torch.cat(mixed, dim=1))


class Nothing(nn.Module):
    """Replaces a branch that is removed from a sum."""

    def forward(self, x):
        """Anything -> 0"""
        return 0


def build_ablated(mixers: str, cascade: bool, shortcuts: bool, **kwargs) -> StripMLPNet:
    """A ``StripMLPNet`` of ``kwargs`` with a choice of token mixers, and optionally without the cross-stage shortcuts.

    With ``"both", True, True`` it is the full network.
    """
    token_mixing = partial(AblatedMixingBlock, mixers=mixers, cascade=cascade)
    model = StripMLPNet(token_mixing=token_mixing, **kwargs)
    if not shortcuts:
        model.shortcut_m1 = model.shortcut_s = model.shortcut_m2 = Nothing()
    return model
