"""Batch norm over the images of all processes, so that a training does not depend on how many there are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Sum = Callable[[Tensor], object]
"""Adds up all processes' tensors in place."""


def has_batch_norm(model: nn.Module) -> bool:
    """Whether the network has batch norm, which makes an image's output depend on the others of its batch."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


@contextmanager
def over_all(model: nn.Module, total: Sum) -> Iterator[None]:
    """Within, the model's batch norms learn from all processes' images; names and values stay as they are."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.forward = partial(_uncompiled(), norm, total)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


@cache
def _uncompiled() -> Callable[..., Tensor]:
    """`_forward` as torch.compile leaves it alone; a decorator would import torch's compiler in every command."""
    left_alone: Callable[..., Tensor] = torch.compiler.disable(_forward)
    return left_alone


def _forward(norm: _BatchNorm, total: Sum, x: Tensor) -> Tensor:
    if not norm.training:
        return type(norm).forward(norm, x)
    apply: Any = _Normalise.apply  # torch 2.11 has no types for it
    y, mean, variance, count = apply(x, norm.weight, norm.bias, norm.eps, total)
    if norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        share = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
        unbiased = variance * (count / (count - 1).clamp(min=1))
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), share)
    inside: Any = norm
    normalised: Tensor = inside.act(inside.drop(y)) if hasattr(norm, "act") else y  # those of timm have both inside
    return normalised


class _Normalise(torch.autograd.Function):
    """(n, c, ...) -> the same, mean and biased variance (c,) float32, and n times the places, of all processes.

    Sums are added in float64: those of squares would lose the variance of a large mean otherwise.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, total: Sum
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own = x.numel() // x.shape[1]
        places = [0, *range(2, x.ndim)]
        # Of no images at all, the mean would be no number.
        centre = x.float().mean(places).double() if own else x.new_zeros(x.shape[1], dtype=torch.float64)
        spread = x.float().var(places, correction=0).double() if own else torch.zeros_like(centre)
        sums = torch.cat([centre, spread + centre**2, torch.ones_like(centre[:1])]) * own
        total(sums)
        count = sums[-1]
        mean, squares = (sums[:-1] / count).view(2, -1)
        variance = (squares - mean**2).clamp(min=0).float()
        mean, count = mean.float(), count.float()
        y = F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), count)
        ctx.total, ctx.places = total, places
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        shape = (1, -1, *[1] * (x.ndim - 2))
        grad = grads[0].float()
        normed = (x.float() - mean.view(shape)) * scale.view(shape)
        own = torch.cat([grad.sum(ctx.places), (grad * normed).sum(ctx.places)])
        sums = own.double()
        ctx.total(sums)
        level, slope = (sums / count).float().view(2, *shape[:1], -1, *shape[2:])
        factor = scale if weight is None else scale * weight.float()
        wanted = (grad - level - normed * slope) * factor.view(shape)
        of_bias, of_weight = own.view(2, -1)
        plain = weight is None
        return (
            wanted.to(x.dtype),
            None if plain else of_weight.to(weight.dtype),
            None if plain else of_bias.to(weight.dtype),
            None,
            None,
        )
