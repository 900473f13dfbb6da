"""CGSMM on a map of any size, in overlapping windows of the size that its strip layers were built for.

MLP-DINO (IJCAI 2024) runs Strip-MLP on a detector's images like this. Along an axis, a map of S tokens is cut into
windows of length L: one if S <= L, padded with zeros at its end, else n = round(S/L + 1/2), which overlap by about o =
round((n L - S) / (n - 1) - 1/2) tokens. Window i starts at min(i (L - o), S - L). ``round`` rounds halves to even. The
windows are merged from first to last; where a window overlaps the result so far, the two are averaged.
"""

import torch
import torch.nn.functional as F


def cut(x, size: tuple[int, int]):
    """A map's windows of ``size`` (L_H, L_W): (N, C, H, W) -> (windows * N, C, L_H, L_W)

    A map of that size is its own window and is returned unchanged.
    """
    if x.shape[2:] == size:
        return x
    (n, c), (height, width) = x.shape[:2], size
    is_channels_last = _is_channels_last(x)
    rows, columns = (_starts(side, length, x.device) for side, length in zip(_sides(x.shape), size, strict=True))
    x = F.pad(x, (0, max(width - x.shape[3], 0), 0, max(height - x.shape[2], 0)))
    x = x.index_select(2, (rows[:, None] + torch.arange(height, device=x.device)).flatten())
    x = x.index_select(3, (columns[:, None] + torch.arange(width, device=x.device)).flatten())
    x = x.reshape(n, c, len(rows), height, len(columns), width).permute(2, 4, 0, 1, 3, 5)
    return _contiguous(x.reshape(-1, c, height, width), is_channels_last)


def merge(windows, shape: tuple[int, int, int, int]):
    """The map of ``shape`` (N, C, H, W) from its windows: (windows * N, C, L_H, L_W) -> (N, C, H, W)"""
    if windows.shape[2:] == shape[2:]:
        return windows
    n, c = shape[:2]
    sides = zip(_sides(shape), _sides(windows.shape), strict=True)
    rows, columns = (_shares(side, length, windows) for side, length in sides)
    (_, n_rows, height), (_, n_columns, width) = rows.shape, columns.shape
    x = windows.reshape(n_rows, n_columns, n, c, height, width).permute(2, 3, 0, 4, 1, 5)
    x = x.reshape(n, c, n_rows * height, n_columns * width)
    x = torch.matmul(rows.flatten(1)[None, None], torch.matmul(x, columns.flatten(1).T))
    return _contiguous(x, _is_channels_last(windows))


def _sides(shape):
    """(H, W) of (N, C, H, W), as numbers also under ``torch.jit.trace``, whose record is of one image size."""
    return [int(side) for side in shape[2:]] if torch.jit.is_tracing() else shape[2:]


def _is_channels_last(x) -> bool:
    return x.stride(1) == 1 and not x.is_contiguous()


def _contiguous(x, is_channels_last: bool):
    """``x.contiguous(memory_format=...)``, for which ``torch.vmap`` knows no channels-last format."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) if is_channels_last else x.contiguous()


def _starts(side: int, length: int, device: torch.device):
    """Where the windows along an axis start: (n,)"""
    if side <= length:
        return torch.zeros(1, dtype=torch.long, device=device)
    n = round(side / length + 0.5)
    overlap = round((n * length - side) / (n - 1) - 0.5)
    return (torch.arange(n, device=device) * (length - overlap)).clamp(max=side - length)


def _shares(side: int, length: int, like):
    """The weight of each token of each window in each token of the axis: (side, n, length)

    Of the windows that hold a token, in order, each except the first contributes half and halves the rest.
    """
    offset = torch.arange(side, device=like.device)[:, None] - _starts(side, length, like.device)  # (side, n)
    holds = (offset >= 0) & (offset < length)
    before = holds.cumsum(1) - holds.long()
    after = holds.sum(1, keepdim=True) - holds.cumsum(1)
    share = holds * 0.5 ** (after + (before > 0))
    return (share[:, :, None] * (offset[:, :, None] == torch.arange(length, device=like.device))).to(like.dtype)
