"""What timm asks of a network of stages, for the baselines that this repository holds."""

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from torch import nn
from torch.utils.checkpoint import checkpoint

from .errors import InputError
from .recomputation import count_batches_once


class StagedNet(nn.Module):
    """Four stages at 1/4, 1/8, 1/16 and 1/32 of the input size, a norm, the mean over all tokens, and a linear head.

    A subclass makes the modules, calls ``reset_classifier`` last, and has ``run_stages(x, count)``, the outputs of the
    first ``count`` stages, ``keep_stages(count)``, which removes the others, and ``group_matcher``.

    Args:
        dims: channels of the stages.
        in_chans: channels of the input.
        drop_rate: dropout before the head, while training.
    """

    classifier, final_norm = "head", "norm"  # where the subclass keeps them

    def __init__(self, dims: list[int], in_chans: int, drop_rate: float):
        super().__init__()
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**stage, "module": f"stage {stage}"} for stage, dim in enumerate(dims)
        ]

    def forward_features(self, x):
        """(N, in_chans, H, W) -> (N, num_features, H/32, W/32), normalised."""
        return self.get_submodule(self.final_norm)(self.run_stages(x, len(self.feature_info))[-1])

    def forward_head(self, x, pre_logits: bool = False):
        """(N, C, H, W) -> (N, num_classes), or the pooled (N, C) with ``pre_logits``."""
        if self.global_pool:
            x = x.mean((2, 3))
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x):
        """(N, in_chans, H, W) -> (N, num_classes)"""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self, x, indices=None, norm: bool = False, stop_early: bool = False, output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """The outputs of the stages; arguments, results and errors as of ``StripMLPNet.forward_intermediates``."""
        if output_fmt != "NCHW":
            raise InputError(f"output_fmt {output_fmt!r} is not 'NCHW', the layout of these feature maps")
        count = len(self.feature_info)
        indices, last = feature_take_indices(count, indices)
        outputs = self.run_stages(x, last + 1 if stop_early or intermediates_only else count)
        features = outputs[-1]
        if len(outputs) == count and (norm or not intermediates_only):
            features = self.get_submodule(self.final_norm)(features)
        intermediates = [features if norm and index == count - 1 else outputs[index] for index in indices]
        return intermediates if intermediates_only else (features, intermediates)

    def run_block(self, block: nn.Module, x):
        """``block(x)``, computed again in the backward pass where gradient checkpointing is on."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keeps only the blocks' inputs for the backward pass, which then computes the rest again."""
        self.grad_checkpointing = enable
        if enable:
            count_batches_once(self)

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.get_submodule(self.classifier)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a newly drawn one of ``num_classes`` outputs; 0 leaves it out.

        Raises:
            InputError: a ``global_pool`` other than None (as it is), ``"avg"`` and, without a head, ``""``.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if pool != "avg" and (pool or num_classes > 0):
            raise InputError(f"global_pool {pool!r} must be 'avg', or '' (no pooling) with num_classes 0")
        self.num_classes, self.global_pool = num_classes, pool
        parameter = next(self.parameters())
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.set_submodule(self.classifier, head.to(parameter.device, parameter.dtype))

    def prune_intermediate_layers(self, indices=1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Removes what comes after the last of the stages asked for, as timm's feature extraction does.

        Arguments and result as of ``StripMLPNet.prune_intermediate_layers``.
        """
        indices, last = feature_take_indices(len(self.feature_info), indices)
        is_cut = last < len(self.feature_info) - 1
        self.keep_stages(last + 1)
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or is_cut:
            self.reset_classifier(0, "")
        if prune_norm or is_cut:
            self.set_submodule(self.final_norm, nn.Identity())
        return indices


# ---- registration with timm ----------------------------------------------------------------------

def default_cfg(**entries) -> dict:
    """What timm is to know of a variant: ImageNet's classes, size and statistics, and ``entries``."""
    return {
        "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": (7, 7), "crop_pct": 224 / 256,
        "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, **entries,
    }


def create(network: type[StagedNet], variant: str, pretrained: bool, variants: dict, kwargs: dict) -> StagedNet:
    """A registered variant, for ``timm.create_model``."""
    return build_model_with_cfg(
        network, variant, pretrained, feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **(variants[variant] | kwargs),
    )
