"""What timm's tools ask of a model beside its forward pass."""

from timm.models._features import feature_take_indices
from torch import nn

from .errors import InputError
from .recomputation import count_batches_once
from .weights import fit_state_dict


class TimmInterface:
    """The part of ``StripMLPNet`` that timm knows: its features, its head, its layer groups, how it loads and saves
    memory."""

    def forward_intermediates(
        self,
        x,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """The outputs of the stages: (N, C, H/4, W/4) to (N, 8C, H/32, W/32) for ``patch_size`` 4.

        Args:
            x: (N, in_chans, H, W).
            indices: stages from 0, negative from the end; a number n: the last n; None: all.
            norm: normalise the last stage's output; the others have no norm.
            stop_early: leave out the stages after the last one asked for.
            output_fmt: ``"NCHW"``.
            intermediates_only: return the list alone.

        Returns:
            ``(features, intermediates)``, features as ``forward_features`` returns them, or the last output where it
            stopped early. With ``intermediates_only`` the list of intermediates.

        Raises:
            InputError: another ``output_fmt``.
            AssertionError: a stage that does not exist.
        """
        if output_fmt != "NCHW":
            raise InputError(f"output_fmt {output_fmt!r} is not 'NCHW', the one layout of Strip-MLP's feature maps")
        count = len(self.stages)
        indices, last = feature_take_indices(count, indices)
        outputs = self._run_stages(x, last + 1 if stop_early or intermediates_only else count)
        features = outputs[-1]
        if len(outputs) == count and (norm or not intermediates_only):
            features = self.norm(features)
        intermediates = [features if norm and index == count - 1 else outputs[index] for index in indices]
        return intermediates if intermediates_only else (features, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what comes after the last of the stages asked for, as timm's feature extraction does.

        Args:
            indices: as ``forward_intermediates`` takes them.
            prune_norm: remove the last norm too.
            prune_head: remove the head too. Norm and head are removed in any case where a stage is.

        Returns:
            The stages asked for, counted from 0.
        """
        indices, last = feature_take_indices(len(self.stages), indices)
        is_cut = last < len(self.stages) - 1
        self.stages, self.merging = self.stages[:last + 1], self.merging[:last]
        for stage, names in ((2, ["shortcut_m1"]), (3, ["shortcut_s", "shortcut_m2"])):
            for name in names if stage > last else []:
                setattr(self, name, nn.Identity())
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or is_cut:
            self.reset_classifier(0, "")
        if prune_norm or is_cut:
            self.norm = nn.Identity()
        return indices

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a newly initialised one of ``num_classes`` outputs; 0 leaves it out.

        Raises:
            InputError: a ``global_pool`` other than None (keep the present one), ``"avg"`` and, without a head, ``""``.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if pool != "avg" and (pool or num_classes > 0):
            raise InputError(f"global_pool {pool!r} must be 'avg', or '' (no pooling) with num_classes 0")
        self.num_classes, self.global_pool = num_classes, pool
        weight = self.stem.weight
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head = head.to(weight.device, weight.dtype)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As PyTorch's. Released keys are converted, and weights for another input size are resized."""
        return super().load_state_dict(fit_state_dict(state_dict, self), strict, assign)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keeps only the blocks' inputs for the backward pass, which then computes the rest again."""
        self.grad_checkpointing = enable
        if enable:
            count_batches_once(self)

    def fuse(self) -> nn.Module:
        """Turns the network, in place, into its inference form: faster, equal within rounding, not to be trained.

        See ``fused.py`` for what is folded. Its state dict has other keys, so load weights before.
        """
        for stage in self.stages:
            for block in stage:
                block.fuse()
        return self.eval()

    def no_weight_decay(self) -> set[str]:
        """The biases of the strip layers, which timm would decay because they have two dimensions."""
        return {name for name, _ in self.named_parameters() if name.endswith("_strip.bias")}

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's patterns of layer groups: the stem, then the stages (``coarse``) or the blocks, last the head.

        What leads into a stage belongs to its first block.
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
