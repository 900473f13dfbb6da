"""Strip-MLP and the MLP baselines of its paper. Importing this package registers them with timm.

``strip_mlp_{tiny_light,tiny,small,base}``, ``smlpnet_{tiny,small,base}``, ``wave_mlp_{tiny,small,medium,base}``.
"""

from . import _torchvision, registry  # noqa: F401, checks torchvision; registers the variants with timm
from .build import build_model, timm_arguments
from .errors import InputError, MissingFileError
from .freeze import freeze_stages, set_train_mode
from .recomputation import count_batches_once
from .smlpnet import SMLPNet
from .strip_mlp import StripMLPNet
from .wavemlp import WaveMLP
from .weights import (
    adapt_size,
    average_state_dict,
    check_fit,
    convert_released_state_dict,
    load_pretrained,
    load_strict,
    model_state_dict,
    to_released_state_dict,
)

__all__ = [
    "InputError",
    "MissingFileError",
    "SMLPNet",
    "StripMLPNet",
    "WaveMLP",
    "adapt_size",
    "average_state_dict",
    "build_model",
    "check_fit",
    "convert_released_state_dict",
    "count_batches_once",
    "freeze_stages",
    "load_pretrained",
    "load_strict",
    "model_state_dict",
    "set_train_mode",
    "timm_arguments",
    "to_released_state_dict",
]
