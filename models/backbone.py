"""What training code and timm's tools expect of a network of stages: head, features, checkpointing, freezing, sizes."""

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import group_parameters
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from .weights import fit_state_dict


class Backbone(nn.Module):
    """Stages, a norm, the mean over all tokens, and a linear head.

    A subclass has ``num_features``, ``head_hidden_size``, ``feature_info``, ``drop_rate`` and these methods:
    ``_run_stages(x, count)``, which returns the outputs of the first ``count`` stages; ``_keep_stages(count)``, which
    removes the others; ``group_matcher``. It calls ``reset_classifier`` at the end of its constructor.
    """

    classifier, final_norm = "head", "norm"  # the names of the subclass's modules
    grad_checkpointing = False

    def forward_features(self, x):
        """(N, in_chans, H, W) -> (N, num_features, H/32, W/32), normalised."""
        return getattr(self, self.final_norm)(self._run_stages(x, len(self.feature_info))[-1])

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

    def forward_intermediates(
        self, x, indices: int | list[int] | None = None, norm: bool = False, stop_early: bool = False,
        output_fmt: str = "NCHW", intermediates_only: bool = False,
    ):
        """The outputs of the stages: of Strip-MLP (N, C, H/4, W/4) to (N, 8C, H/32, W/32), ``patch_size`` 4.

        Args:
            x: (N, in_chans, H, W).
            indices: stages from 0, negative from the end; a number n: the last n; None: all.
            norm: normalise the last stage's output; the others have no norm.
            stop_early: skip the stages after the last one requested.
            output_fmt: ``"NCHW"``; anything else is a ValueError.
            intermediates_only: return only the list.

        Returns:
            ``(features, intermediates)``, features as ``forward_features`` returns them, or the last output if it
            stopped early. With ``intermediates_only``, the list of intermediates.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r} is not 'NCHW', the only layout of these feature maps")
        count = len(self.feature_info)
        indices, last = feature_take_indices(count, indices)
        outputs = self._run_stages(x, last + 1 if stop_early or intermediates_only else count)
        features = outputs[-1]
        if len(outputs) == count and (norm or not intermediates_only):
            features = getattr(self, self.final_norm)(features)
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
            setattr(self, self.final_norm, nn.Identity())
        return indices

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        module = self
        for name in self.classifier.split("."):  # PyTorch 2.6 cannot compile get_submodule
            module = getattr(module, name)
        return module

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a newly initialised one with ``num_classes`` outputs; 0 removes it.

        Raises:
            ValueError: a ``global_pool`` other than None (chosen automatically), ``"avg"`` and, without a head, ``""``.
        """
        if global_pool is None:
            global_pool = "avg" if num_classes > 0 else self.global_pool  # a head needs the mean
        if global_pool != "avg" and (global_pool or num_classes > 0):
            raise ValueError(f"global_pool {global_pool!r} must be 'avg', or '' (no pooling) with num_classes 0")
        self.num_classes, self.global_pool = num_classes, global_pool
        weight = next(self.parameters())  # the stem's
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.set_submodule(self.classifier, head.to(weight.device, weight.dtype).train(self.training))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keeps only the blocks' inputs for the backward pass, which then recomputes the rest."""
        for module in self.modules():
            if isinstance(module, (Backbone, Stage)):
                module.grad_checkpointing = enable
        if enable:
            count_batches_once(self)


class StripBackbone(Backbone):
    """What is Strip-MLP's own: its stages and shortcuts, and weights that depend on the input size."""

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
            ValueError: sides that are not multiples of ``8 * patch_size``.
        """
        weights = self.state_dict()
        self.img_size = check_img_size(img_size, self.patch_size)
        for blocks, size in zip(self.stages, map_sizes(self.img_size, self.patch_size), strict=False):  # some are gone
            for module in blocks.modules():
                if hasattr(module, "row_strip"):  # a CGSMM
                    _resize(module, size)
        self.load_state_dict(weights)
        update_model_input_size(self, self.img_size)

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
                (r"^norm", (99999,)),  # timm: as the group before
            ],
        }


def _resize(cgsmm: nn.Module, size: tuple[int, int]) -> None:
    """Gives a CGSMM's strip layers and position tables the shapes for maps of ``size``, without values."""
    height, width = cgsmm.size = size
    for strip, length in ((cgsmm.row_strip, width), (cgsmm.column_strip, height)):
        d, _, _, k = strip.weight.shape
        strip.weight.data = strip.weight.new_empty(d, length, length, k)
        strip.bias.data = strip.bias.new_empty(d, length)
    for position in (cgsmm.row_position, cgsmm.column_position):
        position.size = size
        position.table.data = position.table.new_empty(height + width + 1, position.table.shape[1])


class Stage(nn.Sequential):
    """Blocks that run one after the other; with gradient checkpointing, the backward pass computes each again."""

    grad_checkpointing = False

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        for block in self:
            x = run_block(block, x, self.grad_checkpointing)
        return x


def run_block(block: nn.Module, x, grad_checkpointing: bool):
    """``block(x)``, computed again in the backward pass if gradient checkpointing is on."""
    if grad_checkpointing and torch.is_grad_enabled():
        return checkpoint(block, x, use_reentrant=False)
    return block(x)


# ---- BatchNorm under gradient checkpointing ------------------------------------------------------

def count_batches_once(model: nn.Module) -> None:
    """Makes the model's BatchNorms keep their running statistics while a block is computed again.

    ``Backbone.set_grad_checkpointing`` calls it. timm's models need it too, and so does any model whose BatchNorms
    were replaced, for example by SyncBatchNorm.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and _keep_statistics not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_keep_statistics)
            # An exception ends the second computation as soon as it has what it needs, possibly inside the BatchNorm.
            module.register_forward_hook(_restore_statistics, always_call=True)


def _is_recomputation() -> bool:
    """Whether this is a forward pass within a backward pass; a compiled network keeps the statistics anyway."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _keep_statistics(module: nn.Module, inputs) -> None:
    if _is_recomputation():
        module.kept_statistics = [buffer.clone() for buffer in module.buffers()]


@torch.no_grad()
def _restore_statistics(module: nn.Module, inputs, output) -> None:
    if _is_recomputation():
        for buffer, kept in zip(module.buffers(), module.kept_statistics, strict=True):
            buffer.copy_(kept)
        del module.kept_statistics


# ---- frozen stages -------------------------------------------------------------------------------

def freeze_stages(model: nn.Module, count: int) -> None:
    """Excludes the stem and the first ``count`` stages from training; ``set_train_mode`` keeps their statistics.

    The stages are the coarse groups of the model's ``group_matcher``, which timm's models have too. The layers that
    lead into a stage belong to it.

    Raises:
        ValueError: the model has no ``group_matcher``, or fewer stages.
    """
    if count == 0:
        return
    if not hasattr(model, "group_matcher"):
        raise ValueError(f"{type(model).__name__} does not define its stages (group_matcher); set "
                         "TRAIN.FREEZE_STAGES 0")
    groups = group_parameters(model, model.group_matcher(coarse=True))  # stem, stages, and the head if there is one
    head = {id(p) for p in model.get_classifier().parameters()} if hasattr(model, "get_classifier") else set()
    stages = [i for i in groups if i and not any(id(model.get_parameter(name)) in head for name in groups[i])]
    if count > len(stages):
        raise ValueError(f"TRAIN.FREEZE_STAGES is {count}; {type(model).__name__} has {len(stages)} stages")
    for group in (0, *stages[:count]):
        for name in groups[group]:
            model.get_parameter(name).requires_grad_(False)


def set_train_mode(model: nn.Module) -> None:
    """``model.train()``, but in evaluation mode what is frozen: no drop path there, and BatchNorms keep to their
    running statistics."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


# ---- the sizes of images and feature maps --------------------------------------------------------

def check_img_size(img_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """(height, width) of the images; raises ValueError for sides that are not multiples of ``8 * patch_size``."""
    sides = tuple(to_2tuple(img_size))
    if len(sides) != 2:
        raise ValueError(f"img_size {sides} is neither a single side nor (height, width)")
    multiple = 8 * patch_size
    for side in sides:
        if side < multiple or side % multiple:
            raise ValueError(f"img_size {side} is not a multiple of {multiple} (patch size {patch_size} x 8); "
                             f"the nearest valid sizes are {_valid_sizes(side, multiple)}")
    return sides


def map_sizes(img_size: tuple[int, int], patch_size: int) -> list[tuple[int, int]]:
    """(H, W) of the feature maps of the four stages."""
    return [tuple(side // patch_size // 2**stage for side in img_size) for stage in range(4)]


def check_images(x, img_size: tuple[int, int], multiple: int, dynamic_img_size: bool = False):
    """Returns x, (N, C, H, W); raises ValueError if a network for ``img_size`` does not accept its size."""
    if x.ndim == 4 and (x.shape[2:] == img_size or (dynamic_img_size and min(x.shape[2:]) >= multiple)):
        return x
    got = f"got a batch of shape {tuple(x.shape)}"
    if dynamic_img_size:
        raise ValueError(f"this network takes images (N, C, H, W) of at least {multiple}x{multiple} pixels, {got}")
    valid = "; ".join(f"valid near {side}: {_valid_sizes(side, multiple)}" for side in dict.fromkeys(x.shape[-2:]))
    raise ValueError(
        f"this network was built for images of {'x'.join(map(str, img_size))}, {got}; resize the images, or build the "
        f"network with another img_size ({valid}); Strip-MLP also takes any size with dynamic_img_size=True"
    )


def _valid_sizes(size: int, multiple: int) -> str:
    """The multiples nearest to ``size``, for a message."""
    below, above = size // multiple * multiple, -(-size // multiple) * multiple
    return " and ".join(str(valid) for valid in sorted({below, above})) if below else f"{multiple} and up"
