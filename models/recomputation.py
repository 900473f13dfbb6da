"""Gradient checkpointing runs a block again in the backward pass; BatchNorms must not count that batch twice."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def count_batches_once(model: nn.Module) -> None:
    """Makes the model's BatchNorms leave their running statistics alone while a block is recomputed.

    ``StripMLPNet.set_grad_checkpointing`` calls it. timm's models need it too, and so does any model after its
    BatchNorms were replaced, as for SyncBatchNorm.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and _keep_statistics not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_keep_statistics)
            # Recomputation stops by an exception as soon as it has what it needs, perhaps within the BatchNorm.
            module.register_forward_hook(_restore_statistics, always_call=True)


def is_recomputation() -> bool:
    """Whether this is a forward pass within a backward pass; a compiled one leaves the statistics alone by itself."""
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
