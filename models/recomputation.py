"""Gradient checkpointing runs a block again in the backward pass; BatchNorms must not count that batch twice."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def count_batches_once(model: nn.Module) -> None:
    """Makes the model's BatchNorms keep their running statistics while a block is recomputed.

    ``StripMLPNet.set_grad_checkpointing`` calls it. timm's models need it too, and so does any model whose BatchNorms
    were replaced, for example by SyncBatchNorm.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and _keep_statistics not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_keep_statistics)
            # An exception ends the recomputation as soon as it has what it needs, possibly inside the BatchNorm.
            module.register_forward_hook(_restore_statistics, always_call=True)


def is_recomputation() -> bool:
    """Whether this is a forward pass within a backward pass; a compiled network keeps the statistics anyway."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _keep_statistics(module: nn.Module, inputs) -> None:
    if is_recomputation():
        module.kept_statistics = [buffer.clone() for buffer in module.buffers()]


@torch.no_grad()
def _restore_statistics(module: nn.Module, inputs, output) -> None:
    if is_recomputation():
        for buffer, kept in zip(module.buffers(), module.kept_statistics, strict=True):
            buffer.copy_(kept)
        del module.kept_statistics
