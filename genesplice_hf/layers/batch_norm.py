"""Batch normalisation that checkpointing cannot count twice, and its folding into the convolution before it.

Ioffe and Szegedy, arXiv 1502.03167. With stored statistics the norm is one affine map per channel,

    norm(conv(x)) = scale * conv(x) + shift,   scale = weight / sqrt(running_var + eps),
                                               shift = bias - scale * running_mean

so that a convolution with `scale * kernel` and the bias `shift` gives the same without a second tensor of that size.

Shapes: B batch, C channels, L positions.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import batch_norm, conv1d, conv2d, pad
from torch.nn.modules.batchnorm import _BatchNorm

from genesplice_hf.layers.dilated_convolution import DilatedConv1d, DilatedConv2d


class _CountsOnce(_BatchNorm):
    """Leaves the running statistics alone while gradient checkpointing computes a block a second time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.track_running_stats and is_recomputing():
            # Copies, for checkpointing wants as many tensors kept as the first time.
            mean, var = self.running_mean.clone(), self.running_var.clone()
            return batch_norm(x, mean, var, self.weight, self.bias, True, 0.0, self.eps)
        return super().forward(x)


class BatchNorm1d(_CountsOnce, nn.BatchNorm1d):
    """`nn.BatchNorm1d`; with gradient checkpointing a batch enters its statistics once, not twice."""


class BatchNorm2d(_CountsOnce, nn.BatchNorm2d):
    """`nn.BatchNorm2d`; with gradient checkpointing a batch enters its statistics once, not twice."""


class Affine(NamedTuple):
    """scale * x + shift per channel; both (C,), at least float32."""

    scale: torch.Tensor
    shift: torch.Tensor


def affine_of(norm: nn.Module) -> Affine | None:
    """What a batch norm does with its stored statistics; None where it uses the batch's own, or is wrapped."""
    if not isinstance(norm, _BatchNorm) or norm.training or norm.running_var is None or not _is_plain(norm):
        return None
    working = torch.promote_types(norm.running_var.dtype, torch.float32)
    scale = (norm.running_var.to(working) + norm.eps).rsqrt() * norm.weight.to(working)
    return Affine(scale, norm.bias.to(working) - scale * norm.running_mean.to(working))


def foldable(conv: nn.Module, norm: nn.Module) -> Affine | None:
    """The affine map of `norm` where it may be folded into `conv`.

    None while the batch's own statistics are in use, and where an adapter, an offloading wrapper or a hook stands
    between the two.
    """
    is_ours = isinstance(conv, DilatedConv1d | DilatedConv2d) and conv.bias is None
    return affine_of(norm) if is_ours and _is_plain(conv) and not _has_hooks(conv) else None


def folded(weight: torch.Tensor, affine: Affine) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernel (C, ...) and bias (C,) of a convolution that includes the affine map, in the kernel's dtype."""
    scale = affine.scale.view(-1, *[1] * (weight.dim() - 1))
    return (weight.to(scale.dtype) * scale).to(weight.dtype), affine.shift.to(weight.dtype)


def convolve_and_norm(conv: nn.Module, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """norm(conv(x)), as one convolution where `foldable` says so."""
    affine = foldable(conv, norm)
    if affine is None:
        return norm(conv(x))
    module: Any = conv
    convolve = conv1d if isinstance(conv, DilatedConv1d) else conv2d
    return convolve(x, *folded(module.weight, affine), padding=module.padding, dilation=module.dilation)


def convolve_norm_pool(
    conv: nn.Module, norm: nn.Module, activation: Any, x_BCL: torch.Tensor, pool_size: int, tile_size: int
) -> torch.Tensor:
    """max pool of norm(conv(activation(x))), (B, C, ceil(L / pool_size)).

    Without gradients, and with the norm folded, `tile_size` positions (rounded to whole windows) are worked on at a
    time: the convolution's output, the largest tensor of such a network, never exists as a whole.

    Args:
        conv: kernel of odd size, as many outputs as inputs. norm: batch norm after it.
        activation: function before the convolution.
        x_BCL: input; it is not changed.
        pool_size: positions per window; the last window may be shorter.
        tile_size: positions per tile.
    """
    affine = None if torch.is_grad_enabled() else foldable(conv, norm)
    if affine is None or x_BCL.shape[-1] <= tile_size:
        return max_pool(convolve_and_norm(conv, norm, activation(x_BCL)), pool_size)
    module: Any = conv
    weight, bias = folded(module.weight, affine)
    length, (reach,), (dilation,) = x_BCL.shape[-1], module.padding, module.dilation
    step = max(tile_size // pool_size, 1) * pool_size
    out = x_BCL.new_empty(x_BCL.shape[0], len(weight), -(-length // pool_size))
    for start in range(0, length, step):
        stop = min(start + step, length)
        left, right = max(start - reach, 0), min(stop + reach, length)
        tile = pad(activation(x_BCL[..., left:right]), (reach - (start - left), reach - (right - stop)))
        pooled = max_pool(conv1d(tile, weight, bias, dilation=dilation), pool_size)
        out[..., start // pool_size : start // pool_size + pooled.shape[-1]] = pooled
    return out


def max_pool(x_BCL: torch.Tensor, size: int) -> torch.Tensor:
    """The largest value of every `size` positions; a shorter rest at the end is a window of its own."""
    return x_BCL if size == 1 else nn.functional.max_pool1d(x_BCL, size, size, ceil_mode=True)


def _is_plain(module: nn.Module) -> bool:
    # Offloading replaces `forward` on the instance; the weights may then be elsewhere until it is called.
    return "forward" not in vars(module)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_recomputing() -> bool:
    """Whether this is a block that gradient checkpointing computes a second time, in the backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
