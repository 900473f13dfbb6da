"""Crops and resizes whole batches like Pillow, with two products with a small matrix for each image and axis.

Pillow resizes along rows, then along columns, with weights and sums in fixed point and a rounding to 8 bits after each.
All its numbers are integers below 2^53, so float64 holds them exactly and the result equals Pillow's bit for bit, in
whatever order a device adds. Without float64 (MPS), float32 is within 1 level.
"""

import torch

PRECISION = 22  # bits of Pillow's fixed-point weights
_A = -0.5  # of Pillow's cubic


def resize_crops(images: torch.Tensor, crops: torch.Tensor, size: int, window: tuple[int, int] | None = None,
                 bicubic: bool = True) -> torch.Tensor:  # fmt: skip
    """Each image's crop, resized to ``size`` x ``size``: like ``image.crop(crop).resize((size, size))``.

    Equal bit for bit if images are no larger than ``size``. If both sides shrink, Pillow 13 chooses the order of its
    two passes by cost, and so may round differently between them.

    Args:
        images: uint8 (N, H, W, 3).
        crops: int64 (N, 4) of top, left, height and width, on the images' device.
        size: of the resized crop, in pixels.
        window: first and last (exclusive) row and column of the resized crop to keep; None: all of it.
        bicubic: else bilinear.

    Returns:
        uint8 (N, S, S, 3), S = ``size`` or the window's.
    """
    height, width = images.shape[1:3]
    top, left, rows, columns = crops.unbind(1)
    across = weights(left, columns, width, size, window, bicubic)  # (N, S, W)
    down = weights(top, rows, height, size, window, bicubic)  # (N, S, H)
    lines = torch.einsum("nsw,nhwc->nhsc", across, images.to(across.dtype))
    lines = (lines / 2**PRECISION + 0.5).floor_().clamp_(0, 255)
    pixels = torch.einsum("nth,nhsc->ntsc", down, lines)
    return (pixels / 2**PRECISION + 0.5).floor_().clamp_(0, 255).byte()


def weights(begin: torch.Tensor, length: torch.Tensor, total: int, size: int, window: tuple[int, int] | None,
            bicubic: bool) -> torch.Tensor:  # fmt: skip
    """Pillow's weights, times 2^22, of each input pixel in each output pixel along one axis.

    Args:
        begin, length: int64 (N), the crop along this axis.
        total: of the image along this axis.
        size, window, bicubic: as in ``resize_crops``.

    Returns:
        float64 (N, S, total), float32 on MPS.
    """
    dtype = torch.float32 if begin.device.type == "mps" else torch.float64
    output = torch.arange(*(window or (0, size)), device=begin.device, dtype=dtype)[:, None]
    inputs = torch.arange(total, device=begin.device)
    begin, length = begin[:, None, None], length[:, None, None]
    scale = length.to(dtype) / size
    stretch = scale.clamp(min=1)  # an image that shrinks is averaged over more pixels
    reach = (2 if bicubic else 1) * stretch
    centre = (output + 0.5) * scale
    first = (centre - reach + 0.5).long().clamp(min=0)
    last = torch.minimum((centre + reach + 0.5).long(), length)  # exclusive
    place = inputs - begin  # in the crop
    distance = ((place + (0.5 - centre)) / stretch).abs()
    value = _cubic(distance) if bicubic else (1 - distance).clamp(min=0)
    value = torch.where((place >= first) & (place < last), value, 0)
    value = value * 2**PRECISION / value.sum(dim=2, keepdim=True)
    return torch.where(value < 0, (value - 0.5).ceil(), (value + 0.5).floor())


def _cubic(x: torch.Tensor) -> torch.Tensor:
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _A
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))
