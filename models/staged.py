"""The interface that timm's tools expect of a network of stages, besides its forward pass."""

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from torch import nn
from torch.utils.checkpoint import checkpoint

from .errors import InputError
from .recomputation import count_batches_once


class StagedNet(nn.Module):
    """Stages, a norm, the mean over all tokens, and a linear head.

    A subclass has ``num_features``, ``head_hidden_size``, ``feature_info``, ``drop_rate`` and these methods:
    ``_run_stages(x, count)``, which returns the outputs of the first ``count`` stages; ``_keep_stages(count)``, which
    removes the others; ``group_matcher``. It calls ``reset_classifier`` at the end of its constructor.
    """

    classifier, final_norm = "head", "norm"  # where the subclass keeps them
    grad_checkpointing = False

    def forward_features(self, x):
        """(N, in_chans, H, W) -> (N, num_features, H/32, W/32), normalised."""
        return self.get_submodule(self.final_norm)(self._run_stages(x, len(self.feature_info))[-1])

    def forward_head(self, x, pre_logits: bool = False):
        """(N, C, H, W) -> (N, num_classes), or the pooled (N, C) with ``pre_logits``."""
        if self.global_pool:
            x = x.mean((2, 3))
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x):
        """(N, in_chans, H, W) -> (N, num_classes)"""
        return self.forward_head(self.forward_features(x))

    def _run_block(self, block: nn.Module, x):
        """``block(x)``, recomputed in the backward pass if gradient checkpointing is on."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def forward_intermediates(
        self,
        x,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """The outputs of the stages: of Strip-MLP (N, C, H/4, W/4) to (N, 8C, H/32, W/32), ``patch_size`` 4.

        Args:
            x: (N, in_chans, H, W).
            indices: stages from 0, negative from the end; a number n: the last n; None: all.
            norm: normalise the last stage's output; the others have no norm.
            stop_early: skip the stages after the last one requested.
            output_fmt: ``"NCHW"``.
            intermediates_only: return only the list.

        Returns:
            ``(features, intermediates)``, features as ``forward_features`` returns them, or the last output if it
            stopped early. With ``intermediates_only``, the list of intermediates.

        Raises:
            InputError: another ``output_fmt``.
            AssertionError: a stage that does not exist.
        """
        if output_fmt != "NCHW":
            raise InputError(f"output_fmt {output_fmt!r} is not 'NCHW', the only layout of these feature maps")
        count = len(self.feature_info)
        indices, last = feature_take_indices(count, indices)
        outputs = self._run_stages(x, last + 1 if stop_early or intermediates_only else count)
        features = outputs[-1]
        if len(outputs) == count and (norm or not intermediates_only):
            features = self.get_submodule(self.final_norm)(features)
        intermediates = [features if norm and index == count - 1 else outputs[index] for index in indices]
        return intermediates if intermediates_only else (features, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes everything after the last of the requested stages, as timm's feature extraction does.

        Args:
            indices: as for ``forward_intermediates``.
            prune_norm: remove the last norm too.
            prune_head: remove the head too. If a stage is removed, norm and head are removed in any case.

        Returns:
            The requested stages, counted from 0.
        """
        indices, last = feature_take_indices(len(self.feature_info), indices)
        is_cut = last < len(self.feature_info) - 1
        self._keep_stages(last + 1)
        self.feature_info = self.feature_info[:last + 1]
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or is_cut:
            self.reset_classifier(0, "")
        if prune_norm or is_cut:
            self.set_submodule(self.final_norm, nn.Identity())
        return indices

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.get_submodule(self.classifier)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a newly initialised one with ``num_classes`` outputs; 0 removes it.

        Raises:
            InputError: a ``global_pool`` other than None (chosen automatically), ``"avg"`` and, without a head, ``""``.
        """
        if global_pool is None:
            global_pool = "avg" if num_classes > 0 else self.global_pool  # a head needs the mean
        if global_pool != "avg" and (global_pool or num_classes > 0):
            raise InputError(f"global_pool {global_pool!r} must be 'avg', or '' (no pooling) with num_classes 0")
        self.num_classes, self.global_pool = num_classes, global_pool
        weight = next(self.parameters())  # the stem's
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.set_submodule(self.classifier, head.to(weight.device, weight.dtype).train(self.training))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keeps only the blocks' inputs for the backward pass, which then recomputes the rest."""
        self.grad_checkpointing = enable
        if enable:
            count_batches_once(self)
