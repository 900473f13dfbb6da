"""The image sizes that a network accepts, the sizes of its feature maps, and the errors for other sizes."""

from timm.layers import to_2tuple

from .errors import InputError


def check_img_size(img_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """(height, width) of the images; raises InputError for sides that are not multiples of ``8 * patch_size``."""
    sides = tuple(to_2tuple(img_size))
    if len(sides) != 2:
        raise InputError(f"img_size {sides} is neither a single side nor (height, width)")
    multiple = 8 * patch_size
    for side in sides:
        if side < multiple or side % multiple:
            raise InputError(f"img_size {side} is not a multiple of {multiple} (patch size {patch_size} x 8); "
                             f"the nearest valid sizes are {_legal_sizes(side, multiple)}")
    return sides


def map_sizes(img_size: tuple[int, int], patch_size: int) -> list[tuple[int, int]]:
    """(H, W) of the feature maps of the four stages."""
    return [tuple(side // patch_size // 2**stage for side in img_size) for stage in range(4)]


def check_images(x, img_size: tuple[int, int], multiple: int, dynamic_img_size: bool):
    """Returns x, (N, C, H, W); raises InputError if a network for ``img_size`` does not accept its size."""
    if x.ndim == 4 and (x.shape[2:] == img_size or (dynamic_img_size and min(x.shape[2:]) >= multiple)):
        return x
    got = f"got a batch of shape {tuple(x.shape)}"
    if dynamic_img_size:
        raise InputError(f"this network takes images (N, C, H, W) of at least {multiple}x{multiple} pixels, {got}")
    legal = "; ".join(f"valid near {side}: {_legal_sizes(side, multiple)}" for side in dict.fromkeys(x.shape[-2:]))
    raise InputError(
        f"this network was built for images of {'x'.join(map(str, img_size))}, {got}; resize the images, build the "
        f"network with their img_size ({legal}), or build it with dynamic_img_size=True for any size"
    )


def _legal_sizes(size: int, multiple: int) -> str:
    """The multiples nearest to ``size``, for a message."""
    below, above = size // multiple * multiple, -(-size // multiple) * multiple
    return " and ".join(str(legal) for legal in sorted({below, above})) if below else f"{multiple} and up"
