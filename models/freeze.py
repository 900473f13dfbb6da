"""Frozen stages, for fine-tuning that keeps the first stages of a network as they were loaded."""

from timm.models import group_parameters
from torch import nn

from .errors import InputError


def freeze_stages(model: nn.Module, count: int) -> None:
    """Excludes the stem and the first ``count`` stages from training; ``set_train_mode`` keeps their statistics.

    The stages are the coarse groups of the model's ``group_matcher``, which timm's models have too. The layers that
    lead into a stage belong to it.

    Raises:
        InputError: the model has no ``group_matcher``, or fewer stages.
    """
    if count == 0:
        return
    if not hasattr(model, "group_matcher"):
        raise InputError(f"{type(model).__name__} does not define its stages (group_matcher); set "
                         "TRAIN.FREEZE_STAGES 0")
    groups = group_parameters(model, model.group_matcher(coarse=True))  # stem, stages, head
    if count > len(groups) - 2:
        raise InputError(f"TRAIN.FREEZE_STAGES is {count}; {type(model).__name__} has {len(groups) - 2} stages")
    for group in range(count + 1):
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
