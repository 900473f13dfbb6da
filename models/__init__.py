"""Strip-MLP and the MLP baselines of its paper. Importing this package registers them with timm.

``strip_mlp_{tiny_light,tiny,small,base}``, ``smlpnet_{tiny,small,base}``, ``wave_mlp_{tiny,small,medium,base}``.
"""

from importlib.metadata import version

try:
    import torchvision  # noqa: F401, before timm imports it
except ModuleNotFoundError:
    raise
except (ImportError, OSError, RuntimeError) as error:  # a missing symbol, library or operator
    torch_version = version("torch")
    raise ImportError(
        f"torchvision {version('torchvision')} does not fit PyTorch {torch_version} ({str(error).splitlines()[0]}); "
        f"run: pip install 'torchvision==0.{int(torch_version.split('.')[1]) + 15}.*'"
    ) from error

# ruff: isort: split
from . import registry  # noqa: F401, registers the variants with timm
from .backbone import count_batches_once, freeze_stages, set_train_mode
from .build import build_model, timm_arguments
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
    own_keys,
    to_released_state_dict,
)

__all__ = [
    "SMLPNet", "StripMLPNet", "WaveMLP", "adapt_size", "average_state_dict", "build_model", "check_fit",
    "convert_released_state_dict", "count_batches_once", "freeze_stages", "load_pretrained", "load_strict",
    "model_state_dict", "own_keys", "set_train_mode", "timm_arguments", "to_released_state_dict",
]
