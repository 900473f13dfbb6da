"""Global response normalisation and the linear layer after it, in forms that move less memory than autograd's.

These maps are the network's widest, three times the block's, so each pass over one matters. The formula, with the L2
norm g of each channel over H and W, is ``grn_plain``; the tests compare both fast forms with it.
"""

import torch
import torch.nn.functional as F

from .strip_ops import without_autocast

EPS = 1e-6


def grn_plain(x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """``gamma * (x * n) + beta + x`` with ``n = g / (mean of g over the channels + 1e-6)``: the reference.

    Args:
        x: (N, H, W, C).
        gamma, beta: (1, 1, 1, C).
    """
    g = x.norm(dim=(1, 2), keepdim=True)
    return gamma * (x * (g / (g.mean(dim=-1, keepdim=True) + EPS))) + beta + x


def grn(x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """``grn_plain`` in the precision of x, with its derivative in closed form. Its sums have at least 32 bits."""
    with without_autocast(x):
        return _GRN.apply(x, gamma, beta)


def grn_linear(
    x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """``linear(grn(x), weight, bias)``: (N, H, W, C) -> (N, H, W, C_out), in the precision of x.

    GRN multiplies each channel of an image by one number, so it can be folded into the weight, which then differs per
    image, and beta into the bias. If a map has more tokens than channels, this moves less memory than the map.
    """
    with without_autocast(x):
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        if not folds(x):
            return F.linear(_GRN.apply(x, gamma, beta), weight, bias)
        bias = bias + (weight * beta.view(-1).to(x.dtype)).sum(1)
        return scaled_linear(x, grn_scale(_Norm.apply(x), gamma), weight, bias)


def scaled_linear(x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``linear(x * scale, weight, bias)`` for a scale (N, 1, 1, C): (N, H, W, C) -> (N, H, W, C_out)"""
    n, h, w, c = x.shape
    if not folds(x):
        return F.linear(x * scale.to(x.dtype), weight, bias)
    weights = weight * scale.view(n, 1, c).to(x.dtype)  # (N, C_out, C)
    return torch.bmm(x.reshape(n, h * w, c), weights.transpose(1, 2)).view(n, h, w, -1) + bias


def folds(x: torch.Tensor) -> bool:
    """Whether a map (N, H, W, C) has at least as many tokens as channels."""
    return x.shape[1] * x.shape[2] >= x.shape[3]


def channel_norm(x: torch.Tensor) -> torch.Tensor:
    """The L2 norm of each channel over H and W, in at least 32 bits: (N, H, W, C) -> (N, 1, 1, C)"""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):  # several times faster there
        return x.square().sum((1, 2), keepdim=True).sqrt()
    return torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))


def grn_scale(norm: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """The factor by which GRN multiplies each channel, given its norm: (N, 1, 1, C) -> (N, 1, 1, C)"""
    return 1 + gamma * (norm / (norm.mean(dim=-1, keepdim=True) + EPS))


def grn_scale_grad(
    norm: torch.Tensor, gamma: torch.Tensor, dscale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of ``grn_scale``: the gradient of gamma (1, 1, 1, C), and what x is multiplied by for its own (N, 1, 1, C)."""
    mean = norm.mean(dim=-1, keepdim=True) + EPS
    of_gamma = dscale * (norm / mean)
    dnorm = (dscale * gamma - (of_gamma * gamma).mean(dim=-1, keepdim=True)) / mean
    return of_gamma.sum(0, keepdim=True), _direction(norm, dnorm)


def _direction(norm, dnorm):
    """What the gradient of a norm gives its input, over that input; nothing where the norm is 0."""
    return torch.where(norm > 0, dnorm / norm, 0)


def _differentiable(norm, x):
    """The norm of x that a backward pass saved; computed again where that pass is itself to be differentiated."""
    return _Norm.apply(x) if torch.is_grad_enabled() else norm


class _Norm(torch.autograd.Function):
    """``channel_norm``, whose gradient PyTorch forms on several maps of 32 bits."""

    @staticmethod
    def forward(ctx, x):
        norm = channel_norm(x)
        ctx.save_for_backward(x, norm)
        return norm

    @staticmethod
    def backward(ctx, dnorm):
        x, norm = ctx.saved_tensors
        return x * _direction(_differentiable(norm, x), dnorm).to(x.dtype)


class _GRN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma, beta):
        norm = channel_norm(x)
        ctx.save_for_backward(x, gamma, beta, norm)
        return torch.addcmul(beta.to(x.dtype), x, grn_scale(norm, gamma).to(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        x, gamma, beta, norm = ctx.saved_tensors
        norm = _differentiable(norm, x)
        dscale = (dy * x).sum((1, 2), keepdim=True, dtype=norm.dtype)  # (N, 1, 1, C)
        dbeta = dy.sum((1, 2), keepdim=True, dtype=norm.dtype).sum(0, keepdim=True)
        dgamma, direction = grn_scale_grad(norm, gamma, dscale)
        dx = torch.addcmul(dy * grn_scale(norm, gamma).to(x.dtype), x, direction.to(x.dtype))
        return dx, dgamma.to(gamma.dtype), dbeta.to(beta.dtype)
