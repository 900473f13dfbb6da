"""Which sizes of a Strip-MLP fit together, and what to say of those that do not."""

from timm.layers import to_2tuple


def check_sizes(img_size, patch_size, embed_dim, depths, num_patches, strip_width) -> tuple[int, int]:
    """(height, width) of the input; raises ValueError when the sizes of a ``StripMLPNet`` do not fit together."""
    sides = tuple(to_2tuple(img_size))
    if len(sides) != 2:
        raise ValueError(f"img_size {sides} is neither a side nor (height, width)")
    multiple = 8 * patch_size
    for side in sides:
        if side < multiple or side % multiple:
            raise ValueError(
                f"img_size {side} is not a multiple of {multiple} (patch size {patch_size} x 8); "
                f"the nearest legal sizes are {legal_sizes(side, multiple)}"
            )
    if len(depths) != 4 or min(depths) < 1:
        raise ValueError(f"depths {tuple(depths)} must be four numbers, each at least 1")
    if num_patches < 1:
        raise ValueError(f"num_patches {num_patches} must be at least 1")
    if embed_dim % (2 * num_patches):
        raise ValueError(
            f"embed_dim {embed_dim} is not a multiple of 2 x num_patches ({2 * num_patches}): half of the channels are "
            f"cut into {num_patches} patches"
        )
    if strip_width < 1 or strip_width % 2 == 0:
        raise ValueError(f"strip_width {strip_width} must be odd, at least 1: a strip is centred on its row")
    return sides


def legal_sizes(size: int, multiple: int) -> str:
    """The multiples next to ``size``, for a message."""
    below, above = size // multiple * multiple, -(-size // multiple) * multiple
    return " and ".join(str(legal) for legal in sorted({below, above})) if below else f"{multiple} and up"
