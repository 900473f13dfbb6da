"""Small networks and random numbers for them, the same each time, and comparisons of tensors."""

import torch

from models import StripMLPNet, to_released_state_dict

SIZES = {"img_size": 32, "num_classes": 5, "embed_dim": 8, "depths": (1, 1, 2, 1), "num_patches": 2}


def tiny_net(seed=0, **kwargs) -> StripMLPNet:
    """A Strip-MLP of five blocks, newly initialised."""
    torch.manual_seed(seed)
    return StripMLPNet(**SIZES | kwargs)


def draw(*shape, seed=1) -> torch.Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomise(module, seed=0):
    """The module in float64, all of its parameters and statistics drawn anew, so that no zero or one hides an error."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                is_variance = name.endswith("running_var")
                tensor.copy_(drawn.abs() + 0.5 if is_variance else drawn / tensor[0].numel() ** 0.5)
    return module


def as_stored(weights, layout: str) -> dict[str, torch.Tensor]:
    """A state dict as files hold it: ``"own"``, or released, with column strips spelt ``"proj_w"``, or ``"proh_w"`` as
    in MLP-DINO."""
    if layout == "own":
        return weights
    return {key.replace("proj_w", layout): value for key, value in to_released_state_dict(weights).items()}


def shapes(model) -> dict[str, tuple]:
    """The shape of each parameter by its name."""
    return {key: tuple(p.shape) for key, p in model.named_parameters()}


def equal(found, expected) -> bool:
    """Whether two lists of tensors hold the same numbers."""
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def relative_error(value, reference) -> float:
    """The norm of the difference against the norm of the reference, in float64; each a tensor or a list of numbers."""
    value, reference = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (value, reference))
    return float((value - reference).norm() / reference.norm())
