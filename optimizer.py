"""Parameter groups and the optimiser."""

import torch
from torch import nn


def build_optimizer(config, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD over two groups: with weight decay, and without it (one-dimensional parameters and biases).

    Position tables and GRN's gamma and beta have more than one dimension and so decay, as in the released code. The
    optimisers are PyTorch's fused ones, which leave out a step on the device itself where ``found_inf`` is set.
    """
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (no_decay if parameter.ndim <= 1 or name.endswith("bias") else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": config.TRAIN.WEIGHT_DECAY}, {"params": no_decay, "weight_decay": 0.0}]
    options, lr = config.TRAIN.OPTIMIZER, config.TRAIN.BASE_LR
    if options.NAME == "adamw":
        return torch.optim.AdamW(groups, lr=lr, eps=options.EPS, betas=tuple(options.BETAS), fused=True)
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=options.MOMENTUM, nesterov=True, fused=True)
    for parameter in decay + no_decay:  # PyTorch would leave them uninitialised if the very first step were left out
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
