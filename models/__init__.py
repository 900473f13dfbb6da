"""Strip-MLP networks. Importing this package registers ``strip_mlp_{tiny_light,tiny,small,base}`` with timm."""

from .build import build_model, count_batches_once
from .strip_mlp import StripMLPNet
from .weights import (
    convert_released_state_dict,
    load_pretrained,
    load_strict,
    model_state_dict,
    to_released_state_dict,
)

__all__ = [
    "StripMLPNet",
    "build_model",
    "convert_released_state_dict",
    "count_batches_once",
    "load_pretrained",
    "load_strict",
    "model_state_dict",
    "to_released_state_dict",
]
