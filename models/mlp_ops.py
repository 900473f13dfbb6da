"""The channel mixing's MLP behind one function: linear, GELU, GRN, linear.

Its maps are the network's widest. On a GPU the kernels of ``map_triton.py`` add the first layer's bias, apply GELU, and
sum up GRN's norms in one pass over them, and form the gradient of all three in another.
"""

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from .response_norm import folds, grn_linear, grn_scale, grn_scale_grad
from .strip_ops import strip_triton, uses_kernels, without_autocast

if strip_triton is not None:
    from . import map_triton

torch.fx.wrap("grn_linear")  # what it does depends on the input's size

def mlp(x: torch.Tensor, fc1: nn.Linear, grn: nn.Module, fc2: nn.Linear, form: str) -> torch.Tensor:
    """``fc2(grn(gelu(fc1(x))))``: (N, H, W, C_in) -> (N, H, W, C_out)

    Args:
        grn: a module with GRN's ``gamma`` and ``beta``, (1, 1, 1, C).
        form: as ``strip_ops.strip_mix`` has it.
    """
    if not (uses_kernels(x, form) and type(fc1) is nn.Linear):
        return grn_linear(F.gelu(fc1(x)), grn.gamma, grn.beta, fc2.weight, fc2.bias)
    x = F.linear(x, fc1.weight)
    with without_autocast(x):
        return _GELUGRNLinear.apply(x, fc1.bias, grn.gamma, grn.beta, fc2.weight.to(x.dtype), fc2.bias.to(x.dtype))


class _GELUGRNLinear(torch.autograd.Function):
    """``linear(grn(gelu(x + bias)), weight, out_bias)``, which keeps x and one more map."""

    @staticmethod
    def forward(ctx, x, bias, gamma, beta, weight, out_bias):
        n, h, w, c = x.shape
        tokens = x.reshape(n, h * w, c)
        y, squares = map_triton.gelu_squares(tokens.mT, bias, folds(x))
        norm = squares.sum(1).sqrt().view(n, 1, 1, c)
        scale = grn_scale(norm, gamma).view(n, c)
        if folds(x):  # GRN's scale and beta go into the weight, which then is the image's own, and the bias
            y = y.mT
            weights = weight * scale.to(x.dtype)[:, None]  # (N, C_out, C)
            out = torch.bmm(y, weights.mT).add_(out_bias + (weight * beta.view(-1).to(x.dtype)).sum(1))
        else:
            y = torch.empty_like(tokens)
            map_triton.affine_gelu(tokens.mT, None, bias, scale, beta.view(-1), y.mT)
            out = F.linear(y, weight, out_bias)
        ctx.save_for_backward(x, y, bias, gamma, beta, weight, norm, scale)
        return out.view(n, h, w, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, y, bias, gamma, beta, weight, norm, scale = ctx.saved_tensors
        n, h, w, c = x.shape
        dout, tokens = dout.reshape(n, h * w, -1), x.reshape(n, h * w, c)
        dout_bias = dout.sum((0, 1))
        if folds(x):
            weights = weight * scale.to(x.dtype)[:, None]
            dy, gain = torch.bmm(dout, weights), None
            dweights = torch.bmm(dout.mT, y)  # (N, C_out, C)
            dscale = (dweights * weight).sum(1, dtype=norm.dtype)
            dweight = (dweights * scale.to(x.dtype)[:, None]).sum(0).addr(dout_bias, beta.view(-1).to(x.dtype))
            dbeta = dout_bias @ weight
        else:
            dy, gain = dout @ weight, scale
            dweight = dout.flatten(0, 1).T @ y.flatten(0, 1)
            sums = map_triton.gelu_dots(tokens.mT, dy.mT, bias, None, None).sum(1)  # (N, 2, C)
            dbeta, dscale = sums[:, 0].sum(0), sums[:, 1]
        dgamma, direction = grn_scale_grad(norm, gamma, dscale.view(n, 1, 1, c))
        dx, sums = map_triton.gelu_grad(tokens.mT, dy.mT, bias, gain, direction.view(n, c))
        return dx.mT.view(x.shape), sums.sum(0), dgamma, dbeta.view(beta.shape), dweight, dout_bias
