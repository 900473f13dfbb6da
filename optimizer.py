"""Parameter groups and the optimiser."""

import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, get_optimizer_info
from torch import nn

from utils import InputError


def build_optimizer(config, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser over two groups: with weight decay, and without it (one-dimensional parameters and biases).

    Position tables and GRN's gamma and beta have more than one dimension and so decay, as in the released code. With
    TRAIN.LAYER_DECAY below 1 there are two groups for each layer, with an ``lr_scale`` for the LRScheduler. ``adamw``
    and ``sgd`` are PyTorch's fused ones, which skip an update on the device itself; all others are timm's.
    """
    scales, groups = layer_scales(model, config.TRAIN.LAYER_DECAY), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_exempt = parameter.ndim <= 1 or name.endswith("bias")
            weight_decay = 0.0 if is_exempt else config.TRAIN.WEIGHT_DECAY
            group = {"params": [], "weight_decay": weight_decay, "lr_scale": scales[name]}
            groups.setdefault((is_exempt, scales[name]), group)["params"].append(parameter)
    groups = [groups[key] for key in sorted(groups)]
    options, lr = config.TRAIN.OPTIMIZER, config.TRAIN.BASE_LR
    if options.NAME == "adamw":
        return torch.optim.AdamW(groups, lr=lr, eps=options.EPS, betas=tuple(options.BETAS), fused=True)
    if options.NAME != "sgd":
        return _timm_optimizer(options, groups, lr)
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=options.MOMENTUM, nesterov=True, fused=True)
    for group in groups:  # PyTorch would leave them uninitialised if the very first step were skipped
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _timm_optimizer(options, groups: list[dict], lr: float) -> torch.optim.Optimizer:
    info = get_optimizer_info(options.NAME)
    if info.second_order:
        raise InputError(f"TRAIN.OPTIMIZER.NAME {options.NAME} needs second derivatives; choose another")
    kwargs = {"momentum": options.MOMENTUM} if info.has_momentum else {}
    kwargs |= {"eps": options.EPS} if info.has_eps else {}
    kwargs |= {"betas": tuple(options.BETAS)} if info.has_betas and info.num_betas == 2 else {}
    try:
        return create_optimizer_v2(groups, opt=options.NAME, lr=lr, **kwargs)
    except (ImportError, AssertionError) as error:
        raise InputError(f"TRAIN.OPTIMIZER.NAME {options.NAME} cannot be used ({error or 'a package is missing'}); "
                         "choose another") from error


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimiser itself skips an update if ``found_inf`` is set, as PyTorch's fused ones do."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """The learning-rate factor of every parameter: 1 in the head, and in each layer before ``decay`` times the next's.

    The layers are the groups of the model's ``group_matcher``, as in timm: the stem, the blocks, the head.
    """
    names = [name for name, _ in model.named_parameters()]
    if decay == 1:
        return dict.fromkeys(names, 1.0)
    if not hasattr(model, "group_matcher"):
        raise InputError(f"{type(model).__name__} does not define its layers (group_matcher); set TRAIN.LAYER_DECAY 1")
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    return {name: decay ** (last - layers[name]) for name in names}
