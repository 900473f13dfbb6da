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
    layout, (n, c), (height, width) = _layout(x), x.shape[:2], size
    rows, columns = (_starts(side, length, x.device) for side, length in zip(x.shape[2:], size, strict=True))
    x = F.pad(x, (0, max(width - x.shape[3], 0), 0, max(height - x.shape[2], 0)))
    x = x.index_select(2, (rows[:, None] + torch.arange(height, device=x.device)).flatten())
    x = x.index_select(3, (columns[:, None] + torch.arange(width, device=x.device)).flatten())
    x = x.reshape(n, c, len(rows), height, len(columns), width).permute(2, 4, 0, 1, 3, 5)
    return x.reshape(-1, c, height, width).contiguous(memory_format=layout)


def merge(windows, shape: tuple[int, int, int, int]):
    """The map of ``shape`` (N, C, H, W) from its windows: (windows * N, C, L_H, L_W) -> (N, C, H, W)"""
    if windows.shape[2:] == shape[2:]:
        return windows
    n, c, *sides = shape
    rows, columns = (_shares(side, length, windows) for side, length in zip(sides, windows.shape[2:], strict=True))
    (_, n_rows, height), (_, n_columns, width) = rows.shape, columns.shape
    x = windows.reshape(n_rows, n_columns, n, c, height, width).permute(2, 3, 0, 4, 1, 5)
    x = x.reshape(n, c, n_rows * height, n_columns * width)
    x = torch.matmul(rows.flatten(1)[None, None], torch.matmul(x, columns.flatten(1).T))
    return x.contiguous(memory_format=_layout(windows))


def _layout(x) -> torch.memory_format:
    return torch.channels_last if x.stride(1) == 1 and not x.is_contiguous() else torch.contiguous_format


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
