"""The strip-mixing operator (paper section 3) behind one function, ``strip_mix``.

Work: a stage of N images, C_in channels and side L costs ``N * C_in * L * L * K * L`` multiply-accumulates, the K rows
of a strip times its L tokens for each output token, and must read and write ``N * C_in * L * L`` numbers each. That is
``K * L / 2`` multiply-accumulates per number moved: 84 at L = 56, 10 at L = 7. On a GPU, with its hundreds of
operations per number, the operator is therefore bound by memory traffic at every stage, on a CPU by arithmetic in the
early ones.

Two forms: ``strip_mix_plain`` transcribes the formula and is the reference that the tests compare with; ``strip_mix``
arranges the same sums as one batched matrix product, a matrix per channel of a patch.
"""

import torch
import torch.nn.functional as F


def strip_mix(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, axis: str) -> torch.Tensor:
    """Mixes every token with its strip: its own row (column) and the ``K // 2`` rows (columns) on either side.

    With channel ``c = p * D + d`` (patch p, channel d of the patch) and zeros outside the map,
    ``axis="row"`` computes
    ``y[n, c, h, j] = bias[d, j] + sum over k, i of weight[d, j, i, k] * x[n, c, h + k - K//2, i]``
    and ``axis="column"`` the same on the transposed map.

    Args:
        x: feature map, (N, C, H, W) with C a multiple of D.
        weight: (D, L, L, K), L the length of a strip: W for rows, H for columns; K odd. Shared by all patches.
        bias: (D, L).
        axis: ``"row"`` or ``"column"``.

    Returns:
        (N, C, H, W).
    """
    if axis == "column":
        return strip_mix(x.transpose(2, 3), weight, bias, "row").transpose(2, 3)
    n, c, h, _ = x.shape
    d, length, _, width = weight.shape
    x = x.reshape(n, c // d, d, h, length).permute(2, 0, 1, 3, 4)  # (N, C, H, W) -> (D, N, P, H, W)
    x = F.pad(x, (0, 0, width // 2, width // 2))
    strips = torch.cat([x[:, :, :, k:k + h] for k in range(width)], dim=-1)  # (D, N, P, H, K*W)
    y = torch.baddbmm(
        bias.unsqueeze(1),  # (D, 1, L)
        strips.reshape(d, -1, width * length),
        weight.permute(0, 3, 2, 1).reshape(d, width * length, length),
    )
    return y.reshape(d, n, -1, h, length).permute(1, 2, 0, 3, 4).reshape(n, c, h, length)


def strip_mix_plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, axis: str) -> torch.Tensor:
    """``strip_mix`` as the formula has it: slow, and the reference for every other form."""
    if axis == "column":
        return strip_mix_plain(x.transpose(2, 3), weight, bias, "row").transpose(2, 3)
    n, c, h, _ = x.shape
    d, length, _, width = weight.shape
    x = F.pad(x.reshape(n, c // d, d, h, length), (0, 0, width // 2, width // 2))
    y = torch.einsum("npdhik,djik->npdhj", x.unfold(3, width, 1), weight) + bias[:, None]
    return y.reshape(n, c, h, length)
