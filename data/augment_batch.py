"""The augmentation of a whole batch on its device: crops, flips and timm's operations on uint8 images.

Every operation takes images (N, 3, H, W), one value for each of them (N) and whether to sample bicubically, and
returns new images. Each agrees with Pillow's result for the same image: photometric ones within 1 level, geometric
ones within 1 level except for pixels at the border of the image's outside, where rounding may differ.

Nothing here waits for the device: what the draws hold is on the CPU, and is copied without waiting.
"""

import functools
import itertools
from collections.abc import Sequence

import torch
from torchvision.transforms.v2 import functional as F

from .augment import FILL, Draw, Step


def augment(images: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    """The images after the flips and the steps of their draws, one for each image."""
    flips = _copied(torch.tensor([draw.flip for draw in draws]), images)
    images = torch.where(_per_image(flips), images.flip(3), images)
    if draws[0].chains:
        total = 0
        for chains in zip(*(draw.chains for draw in draws), strict=True):  # of each image one of its chains
            weights, steps = zip(*chains, strict=True)
            total = total + _per_image(_copied(torch.tensor(weights), images)) * run(images, steps).float()
        images = (total + 0.5).clamp_(0, 255).byte()
    return run(images, [draw.steps for draw in draws])


def run(images: torch.Tensor, steps: Sequence[list[Step]]) -> torch.Tensor:
    """The images after all of their steps in turn; images that drew the same operation are processed together."""
    columns = []  # of each step: its operation, whether bicubic, and the images and values of those that drew it
    for column in itertools.zip_longest(*steps, fillvalue=Step("None")):
        groups = {}
        for index, step in enumerate(column):
            groups.setdefault((step.operation, step.bicubic), []).append((index, step.value))
        columns += [(kind, *zip(*rows, strict=True)) for kind, rows in groups.items() if kind[0] != "None"]
    indices = _copied(torch.tensor([index for _, chosen, _ in columns for index in chosen], dtype=torch.int64), images)
    values = _copied(torch.tensor([value for *_, row in columns for value in row], dtype=torch.float32), images)
    images, begin = images.clone(), 0
    for (name, bicubic), chosen, _ in columns:
        part, begin = slice(begin, begin + len(chosen)), begin + len(chosen)
        images[indices[part]] = _OPERATIONS[name](images[indices[part]], values[part], bicubic)
    return images


def _copied(tensor: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    return tensor.to(images.device, non_blocking=True)


# ---- photometric ---------------------------------------------------------------------------------


def _blend(start: torch.Tensor, images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """As ``Image.blend``: from ``start`` (factor 0) through the images (1) and beyond, cut to whole levels."""
    start = start.float()
    return (start + _per_image(factor) * (images.float() - start)).clamp_(0, 255).byte()


def _per_image(value: torch.Tensor) -> torch.Tensor:
    return value.view(-1, 1, 1, 1)


def _gray(images: torch.Tensor) -> torch.Tensor:
    """Luma (N, 1, H, W), in Pillow's fixed-point arithmetic."""
    red, green, blue = images.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _color(images, factor, bicubic):
    return _blend(_gray(images), images, factor)


def _contrast(images, factor, bicubic):
    mean = _gray(images).float().mean(dim=(1, 2, 3), keepdim=True)
    return _blend((mean + 0.5).floor(), images, factor)


def _brightness(images, factor, bicubic):
    return _blend(torch.zeros_like(images), images, factor)


def _sharpness(images, factor, bicubic):
    """From a 3x3 smoothing, which leaves the border as it is."""
    smooth = images.float()
    inner = smooth[:, :, 1:-1, 1:-1]
    if inner.numel():
        nine = sum(smooth[:, :, y : y + inner.shape[2], x : x + inner.shape[3]] for y in range(3) for x in range(3))
        smooth = smooth.clone()
        smooth[:, :, 1:-1, 1:-1] = ((nine + 4 * inner) / 13 + 0.5).floor()
    return _blend(smooth, images, factor)


def _posterize(images, bits, bicubic):
    dropped = (8 - bits).clamp(0, 8).int()
    return ((images.int() >> _per_image(dropped)) << _per_image(dropped)).byte()


def _solarize(images, threshold, bicubic):
    return torch.where(images < _per_image(threshold), images, 255 - images)


def _solarize_add(images, addition, bicubic):
    return torch.where(images < 128, (images + _per_image(addition)).clamp(max=255), images).byte()


def _gaussian_blur(images, radius, bicubic):
    """Pillow's: three box blurs along rows, three along columns, rounded after each; radius at most 2."""
    variance = radius**2 / 3
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    box = whole + fraction  # the half width of a box whose threefold blur has this variance
    reach = 2  # the largest box covers two pixels on either side
    weights = [((box - abs(k) + 1).clamp(0, 1) / (2 * box + 1)) for k in range(-reach, reach + 1)]
    images = images.float()
    for axis in (3, 2):
        size = images.shape[axis]
        inside = [(torch.arange(size, device=images.device) + k).clamp(0, size - 1) for k in range(-reach, reach + 1)]
        for _ in range(3):
            taps = zip(weights, inside, strict=True)
            images = (sum(_per_image(w) * images.index_select(axis, i) for w, i in taps) + 0.5).floor()
    return images.byte()


# ---- geometric -----------------------------------------------------------------------------------


def _shear_x(images, factor, bicubic):
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device) + 0.5
    return _shift_rows(images, factor[:, None] * rows, bicubic)


def _translate_x(images, pixels, bicubic):
    return _shift_rows(images, pixels[:, None].expand(-1, images.shape[2]), bicubic)


def _transposed(operation):
    return lambda images, value, bicubic: operation(images.mT, value, bicubic).mT


def _shift_rows(images: torch.Tensor, shift: torch.Tensor, bicubic: bool) -> torch.Tensor:
    """Each row sampled ``shift`` (N, H) pixels to the right."""
    width = images.shape[3]
    position = torch.arange(width, device=images.device) + 0.5 + shift[:, :, None]  # (N, H, W)
    index, fraction = _taps(position, width, bicubic)
    taps = [images.gather(3, i[:, None].expand_as(images)).float() for i in index]
    return _fill_outside(_interpolate(taps, fraction[:, None]), (position >= 0) & (position < width))


def _rotate(images, degrees, bicubic):
    """Counterclockwise about the centre."""
    height, width = images.shape[2:]
    angle = torch.deg2rad(-degrees)[:, None, None]
    x = torch.arange(width, device=images.device) + 0.5 - width / 2
    y = (torch.arange(height, device=images.device) + 0.5 - height / 2)[:, None]
    column = angle.cos() * x + angle.sin() * y + width / 2  # (N, H, W): where each pixel comes from
    row = angle.cos() * y - angle.sin() * x + height / 2
    columns, across = _taps(column, width, bicubic)
    rows, down = _taps(row, height, bicubic)
    flat, across, down = images.flatten(2), across.flatten(1)[:, None], down.flatten(1)[:, None]
    lines = []
    for i in rows:
        indices = [(width * i + j).flatten(1)[:, None].expand_as(flat) for j in columns]
        lines.append(_interpolate([flat.gather(2, index).float() for index in indices], across))
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return _fill_outside(_interpolate(lines, down).view(images.shape), inside)


def _taps(position: torch.Tensor, size: int, bicubic: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The pixels that a sample at ``position`` reads along one axis, and its distance from the last one before it."""
    position = position - 0.5
    first = position.floor()
    reach = (-1, 0, 1, 2) if bicubic else (0, 1)
    return [(first.long() + k).clamp_(0, size - 1) for k in reach], position - first


def _interpolate(taps: list[torch.Tensor], d: torch.Tensor) -> torch.Tensor:
    """Interpolates two taps linearly, and four with the cubic of Pillow's ``Image.transform`` (a = -1)."""
    if len(taps) == 2:
        return taps[0] + (taps[1] - taps[0]) * d
    a, b, c, e = taps
    return b + d * (c - a + d * (2 * (a - b) + c - e + d * (b - a + e - c)))


def _fill_outside(values: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    return torch.where(inside[:, None], values, _fill(values.device)).clamp_(0, 255).byte()


@functools.cache
def _fill(device: torch.device) -> torch.Tensor:
    """``FILL`` on a device; copying it there waits until the device has done everything before."""
    return torch.tensor(FILL, dtype=torch.float32, device=device).view(1, 3, 1, 1)


_OPERATIONS = {
    "AutoContrast": lambda images, value, bicubic: F.autocontrast_image(images),
    "Equalize": lambda images, value, bicubic: F.equalize_image(images),
    "Invert": lambda images, value, bicubic: F.invert_image(images),
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _color,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    "ShearX": _shear_x,
    "ShearY": _transposed(_shear_x),
    "TranslateX": _translate_x,
    "TranslateY": _transposed(_translate_x),
    "GaussianBlur": _gaussian_blur,
}


# ---- crop and resize -----------------------------------------------------------------------------

# Pillow resizes along rows, then along columns, with weights and sums in fixed point and a rounding to 8 bits after
# each. All its numbers are integers below 2^53, so float64 holds them exactly and the result equals Pillow's bit for
# bit, in whatever order a device adds. Without float64 (MPS), float32 is within 1 level.
_PRECISION = 22  # bits of Pillow's fixed-point weights


def resize_crops(images: torch.Tensor, crops: torch.Tensor, size: int, bicubic: torch.Tensor,
                 window: tuple[int, int] | None = None) -> torch.Tensor:
    """Each image's crop, resized to ``size`` x ``size``: like ``image.crop(crop).resize((size, size))``.

    Equal bit for bit if images are no larger than ``size``. If both sides shrink, Pillow 13 chooses the order of its
    two passes by cost, and so may round differently between them.

    Args:
        images: uint8 (N, H, W, 3).
        crops: int64 (N, 4) of top, left, height and width, on the images' device.
        size: of the resized crop, in pixels.
        bicubic: bool (N); False: bilinear.
        window: first and last (exclusive) row and column of the resized crop to keep; None: all of it.

    Returns:
        uint8 (N, S, S, 3), S = ``size`` or the window's.
    """
    dtype = torch.float32 if images.device.type == "mps" else torch.float64
    output = torch.arange(*(window or (0, size)), device=images.device, dtype=dtype)
    top, left, rows, columns = crops.unbind(1)
    across = _resize_weights(left, columns, images.shape[2], size, output, bicubic)  # (N, S, W)
    down = _resize_weights(top, rows, images.shape[1], size, output, bicubic)  # (N, S, H)
    lines = _rounded(torch.einsum("nsw,nhwc->nhsc", across, images.to(dtype)))
    return _rounded(torch.einsum("nth,nhsc->ntsc", down, lines)).byte()


def _rounded(sums: torch.Tensor) -> torch.Tensor:
    return (sums / 2**_PRECISION + 0.5).floor_().clamp_(0, 255)


def _resize_weights(begin, length, total: int, size: int, output, bicubic) -> torch.Tensor:
    """Pillow's weights, times 2^22, of each of ``total`` input pixels in each output pixel of a crop along one axis."""
    inputs = torch.arange(total, device=begin.device)
    begin, length, bicubic = (values[:, None, None] for values in (begin, length, bicubic))
    output = output[:, None]
    scale = length.to(output.dtype) / size
    stretch = scale.clamp(min=1)  # an image that shrinks is averaged over more pixels
    reach = (1 + bicubic.int()) * stretch
    centre = (output + 0.5) * scale
    first = (centre - reach + 0.5).long().clamp(min=0)
    last = torch.minimum((centre + reach + 0.5).long(), length)  # exclusive
    place = inputs - begin  # in the crop
    distance = ((place + (0.5 - centre)) / stretch).abs()
    value = torch.where(bicubic, _cubic(distance), (1 - distance).clamp(min=0))
    value = torch.where((place >= first) & (place < last), value, 0)
    value = value * 2**_PRECISION / value.sum(dim=2, keepdim=True)
    return torch.where(value < 0, (value - 0.5).ceil(), (value + 0.5).floor())


def _cubic(x: torch.Tensor, a: float = -0.5) -> torch.Tensor:
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))
