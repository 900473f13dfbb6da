"""Where trained weights are: in a checkpoint file, in a folder of ``tools/export.py --format hub``, or on the Hub."""

import logging
from pathlib import Path

import huggingface_hub  # which timm requires

from models import InputError

WEIGHTS = "model.safetensors"  # the name that timm looks for, in a folder and on the Hub
PREFIX = "hf-hub:"
logger = logging.getLogger("strip_mlp")


def weights_file(source: str | Path) -> Path:
    """The file of a trained network. Every name of a network that a user gives goes through here; nothing else
    downloads.

    Args:
        source: a checkpoint file, which need not exist; a run's folder, for its ``best.pth``; a folder with
            ``model.safetensors``; or ``hf-hub:USER/NAME``, optionally with ``@REVISION``, for a repository on Hugging
            Face's Hub, which is downloaded once.

    Raises:
        InputError: the repository or its file cannot be downloaded.
    """
    name = str(source)
    if name.startswith(PREFIX):
        repository, _, revision = name.removeprefix(PREFIX).partition("@")
        try:
            return Path(huggingface_hub.hf_hub_download(repository, WEIGHTS, revision=revision or None))
        except Exception as error:  # many causes: the name, the network, access, the disk
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise InputError(f"{name} cannot be downloaded ({reason[0]}); check the name and the network") from error
    path = Path(source)
    if not path.is_dir():
        return path
    for name in (WEIGHTS, "best.pth"):
        if (path / name).is_file():
            logger.warning("%s is a folder; using its %s", path, name)
            return path / name
    raise InputError(f"{path} is a folder without {WEIGHTS} or best.pth; name a checkpoint file")
