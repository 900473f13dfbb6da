"""Imports torchvision before timm does. If it was built for another PyTorch, the error says what to install."""

from importlib.metadata import version

try:
    import torchvision  # noqa: F401
except ModuleNotFoundError:
    raise
except (ImportError, OSError, RuntimeError) as error:  # a missing symbol, library or operator
    torch_version = version("torch")
    raise ImportError(
        f"torchvision {version('torchvision')} does not fit PyTorch {torch_version} ({str(error).splitlines()[0]}); "
        f"run: pip install 'torchvision==0.{int(torch_version.split('.')[1]) + 15}.*'"
    ) from error
