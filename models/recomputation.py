"""Gradient checkpointing computes a block again in the backward pass; BatchNorms must not count that batch twice."""

import contextlib

import torch
from torch import nn


def contexts(block: nn.Module):
    """Contexts of a checkpointed block's forward pass and of its recomputation, which must not count batches again."""
    return contextlib.nullcontext(), _KeptBuffers(block)


class _KeptBuffers:
    """A context that leaves a module's buffers, which are the statistics of its BatchNorms, as it found them."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __enter__(self):
        self.saved = [buffer.clone() for buffer in self.module.buffers()]

    def __exit__(self, *error):
        for buffer, saved in zip(self.module.buffers(), self.saved, strict=True):
            buffer.copy_(saved)


def count_batches_once(model: nn.Module) -> None:
    """Keeps the running statistics of BatchNorms from counting a batch again when gradient checkpointing recomputes it.

    For timm's models; Strip-MLP's own checkpointing sees to it.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(_keep_statistics)
            module.register_forward_hook(_put_statistics_back)


def _is_recomputation() -> bool:
    # A forward pass within a backward pass. A compiled recomputation leaves the statistics alone by itself.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _keep_statistics(module: nn.Module, inputs) -> None:
    if _is_recomputation():
        module.kept_statistics = [buffer.clone() for buffer in module.buffers()]


@torch.no_grad()
def _put_statistics_back(module: nn.Module, inputs, output) -> None:
    if _is_recomputation():
        for buffer, kept in zip(module.buffers(), module.kept_statistics, strict=True):
            buffer.copy_(kept)
