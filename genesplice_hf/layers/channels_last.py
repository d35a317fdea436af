"""Convolution blocks over (batch, position, channel) without a transpose: norm, activation, convolution, skip.

    x + W quick_gelu(norm(x)) + b      quick_gelu(y) = y sigmoid(1.702 y) = silu(1.702 y) / 1.702

The norm of an evaluating or frozen block is one scale and one shift per channel, which are fused with the activation;
the factor 1 / 1.702 is left to the matrix product that follows. In training the activation is computed again in the
backward pass, so that only the input is kept. Modules that were replaced (adapters, other norms) are called as they
are.

Shapes: B batch, L positions, C channels, N = B L, K kernel size, O output channels.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.activations import ACT2FN

from genesplice_hf.layers.batch_norm import is_recomputing

GAIN = 1.702


class BatchNorm(nn.BatchNorm1d):
    """`BatchNorm1d` that may take its statistics from all processes (`is_synced`), on any backend."""

    def __init__(self, num_channels: int, eps: float, momentum: float, is_synced: bool = False) -> None:
        super().__init__(num_channels, eps, momentum)
        self.is_synced = is_synced


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x sigmoid(1.702 x)."""
    return x * torch.sigmoid(GAIN * x)


def norm_act(norm: nn.Module, x_BLC: torch.Tensor, hidden_act: str = "quick_gelu") -> tuple[torch.Tensor, float]:
    """activation(norm(x)) as (values, factor): what is wanted is values * factor, left to the product that follows."""
    if hidden_act != "quick_gelu":
        return ACT2FN[hidden_act](normalized(norm, x_BLC)), 1.0
    if not isinstance(norm, _BatchNorm) or (norm.training and not _is_plain(norm)):
        return nn.functional.silu(GAIN * normalized(norm, x_BLC)), 1 / GAIN
    if norm.training:
        return _trained_norm_act(norm, x_BLC.flatten(0, 1)).view_as(x_BLC), 1 / GAIN
    scale_C, shift_C = _stored_affine(norm, x_BLC)
    if torch.is_grad_enabled():
        return _AffineSilu.apply(x_BLC, GAIN * scale_C, GAIN * shift_C), 1 / GAIN
    scale_C, shift_C = ((GAIN * part).to(x_BLC.dtype) for part in (scale_C, shift_C))
    return nn.functional.silu(torch.addcmul(shift_C, x_BLC, scale_C), inplace=True), 1 / GAIN


def normalized(norm: nn.Module, x_BLC: torch.Tensor) -> torch.Tensor:
    """norm(x) by the module itself."""
    if isinstance(norm, BatchNorm) and norm.training and _world_size(norm) > 1:
        return _synced(norm, x_BLC.flatten(0, 1)).view_as(x_BLC)
    return norm(x_BLC.flatten(0, 1)).view_as(x_BLC)


def pointwise(layer: nn.Module, x_BLC: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """layer(factor * x), for a linear layer."""
    if factor == 1.0 or type(layer) is not nn.Linear:
        return layer(x_BLC if factor == 1.0 else x_BLC * factor)
    out = torch.addmm(layer.bias, x_BLC.flatten(0, 1), layer.weight.t(), alpha=factor)
    return out.unflatten(0, x_BLC.shape[:2])


def add_pointwise(
    y_BLC: torch.Tensor, layer: nn.Module, x_BLC: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y + layer(factor * x) without the bias, the bias or None where it was added); y may be overwritten."""
    if type(layer) is not nn.Linear:
        return y_BLC + layer(x_BLC * factor), None
    y, x, weight = y_BLC.flatten(0, 1), x_BLC.flatten(0, 1), layer.weight.t()
    # Autocast leaves operations in place alone.
    if torch.is_grad_enabled() or not y.dtype == x.dtype == weight.dtype:
        return torch.addmm(y, x, weight, alpha=factor).view_as(y_BLC), layer.bias
    return y.addmm_(x, weight, alpha=factor).view_as(y_BLC), layer.bias


def conv(layer: nn.Module, x_BLC: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """(B, L, O): the convolution of factor * x, of odd kernel size, with zeros beyond the ends."""
    if type(layer) is not nn.Conv1d:
        return layer((x_BLC * factor).transpose(1, 2)).transpose(1, 2)
    weight = layer.weight if factor == 1.0 else layer.weight * factor
    # Seen as an image of one row whose channels come last in memory, nothing has to be moved.
    image = x_BLC.transpose(1, 2).unsqueeze(2)
    out = nn.functional.conv2d(image, weight.unsqueeze(2), layer.bias, padding=(0, layer.kernel_size[0] // 2))
    return out.squeeze(2).transpose(1, 2).contiguous()


def conv_from_bases(layer: nn.Module, x_BLC: torch.Tensor) -> torch.Tensor:
    """`conv` for few input channels and a wide kernel: one matrix product over all K C inputs of a position."""
    if type(layer) is not nn.Conv1d:
        return layer(x_BLC.transpose(1, 2)).transpose(1, 2)
    size = layer.kernel_size[0]
    padded = nn.functional.pad(x_BLC, (0, 0, size // 2, size // 2))
    windows = padded.unfold(1, size, 1).flatten(2)
    return nn.functional.linear(windows, layer.weight.flatten(1), layer.bias)


def _is_plain(norm: _BatchNorm) -> bool:
    """Whether its statistics are those of this process's batch, kept as a running average."""
    return isinstance(norm, nn.BatchNorm1d) and norm.track_running_stats and norm.affine and _world_size(norm) == 1


def _world_size(norm: nn.Module) -> int:
    if not getattr(norm, "is_synced", False) or not torch.distributed.is_available():
        return 1
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _stored_affine(norm: _BatchNorm, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """norm(x) = x scale + shift with the running statistics, in float32 at least."""
    working = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, variance = norm.running_mean.to(working), norm.running_var.to(working)
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is None:
        return scale, -mean * scale
    scale = norm.weight.to(working) * scale
    return scale, norm.bias.to(working) - mean * scale


def _trained_norm_act(norm: nn.BatchNorm1d, x_NC: torch.Tensor) -> torch.Tensor:
    running: tuple = (None, None)
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if not is_recomputing():
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
        running = (norm.running_mean, norm.running_var)
    if x_NC.shape[0] < 2:
        raise ValueError(
            "batch statistics need more than one position in all; pass longer sequences or more of them, or call "
            "model.freeze_batch_norm()."
        )
    return _BatchNormSilu.apply(x_NC, norm.weight, norm.bias, *running, momentum, norm.eps)


def _synced(norm: BatchNorm, x_NC: torch.Tensor) -> torch.Tensor:
    """Batch norm with the mean and variance over the positions of all processes."""
    wide = x_NC if x_NC.dtype == torch.float64 else x_NC.float()
    total = all_reduce(torch.cat([wide.sum(0), wide.new_tensor([len(wide)])]))
    count = total[-1].detach()
    mean = total[:-1] / count
    variance = all_reduce((wide - mean).square().sum(0)) / count
    if not is_recomputing():
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            momentum = norm.momentum or 1.0 / float(norm.num_batches_tracked)
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
            norm.running_var.lerp_((variance * count / (count - 1)).to(norm.running_var.dtype), momentum)
    scaled = (wide - mean) * torch.rsqrt(variance + norm.eps) * norm.weight.to(wide) + norm.bias.to(wide)
    return scaled.to(x_NC.dtype)


class _AffineSilu(torch.autograd.Function):
    """silu(x scale + shift), keeping x alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale_C: torch.Tensor, shift_C: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, scale_C, shift_C)
        return nn.functional.silu(_affine(x, scale_C, shift_C), inplace=True)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:  # type: ignore[override]
        x, scale_C, shift_C = ctx.saved_tensors
        inner = torch.ops.aten.silu_backward(grad, _affine(x, scale_C, shift_C))
        axes = tuple(range(inner.dim() - 1))
        by_scale = (inner * x).sum(axes, dtype=scale_C.dtype) if ctx.needs_input_grad[1] else None
        by_shift = inner.sum(axes, dtype=shift_C.dtype) if ctx.needs_input_grad[2] else None
        return inner * scale_C.to(inner.dtype), by_scale, by_shift


class _BatchNormSilu(torch.autograd.Function):
    """silu(1.702 batch_norm(x)) with the statistics of the batch, keeping x alone; updates the running ones."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NC: torch.Tensor,
        weight_C: torch.Tensor,
        bias_C: torch.Tensor,
        running_mean_C: torch.Tensor | None,
        running_var_C: torch.Tensor | None,
        momentum: float,
        eps: float,
    ) -> torch.Tensor:
        y_NC, mean_C, inverse_C = torch.native_batch_norm(
            x_NC, weight_C, bias_C, running_mean_C, running_var_C, True, momentum, eps
        )
        ctx.save_for_backward(x_NC, weight_C, bias_C, mean_C, inverse_C)
        ctx.eps = eps
        return nn.functional.silu(y_NC.mul_(GAIN), inplace=True)

    @staticmethod
    def backward(ctx: Any, grad_NC: torch.Tensor) -> tuple:  # type: ignore[override]
        x_NC, weight_C, bias_C, mean_C, inverse_C = ctx.saved_tensors
        scale_C = weight_C.to(inverse_C.dtype) * inverse_C
        shift_C = bias_C.to(inverse_C.dtype) - mean_C * scale_C
        inner_NC = torch.ops.aten.silu_backward(grad_NC, _affine(x_NC, GAIN * scale_C, GAIN * shift_C)).mul_(GAIN)
        wanted = list(ctx.needs_input_grad[:3])
        grads = torch.ops.aten.native_batch_norm_backward(
            inner_NC, x_NC, weight_C, None, None, mean_C, inverse_C, True, ctx.eps, wanted
        )
        return *(part if want else None for part, want in zip(grads, wanted, strict=True)), None, None, None, None


def _affine(x: torch.Tensor, scale_C: torch.Tensor, shift_C: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(shift_C.to(x.dtype), x, scale_C.to(x.dtype))
