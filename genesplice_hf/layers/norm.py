"""Normalisation: root mean square, and batch normalisation that can be held at its stored statistics.

RMS: Zhang and Sennrich, arXiv 1910.07467, eq. 4. Batch norm: Ioffe and Szegedy, arXiv 1502.03167.

Shapes: C channels.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension; computed in float32, cast back."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        working = x.dtype if x.dtype == torch.float64 else torch.float32
        wide = x.to(working)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight.to(working)).to(x.dtype)


class HeldBatchNorm:
    """Mixed into the class of a batch norm that is frozen: `model.train()` leaves it in evaluation mode."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The class is made at run time, so that copies and pickles name the one that it was made of.
        return _new_held, (_free_class(type(self)),), self.__dict__


def freeze_batch_norm(module: nn.Module, skip: Collection[str] = ()) -> list[str]:
    """Keeps batch normalisation on its stored statistics and parameters, also after `train()`.

    `requires_grad=False` does not stop the running mean and variance from drifting in train mode. Every kind of batch
    norm is frozen, `SyncBatchNorm` too; convert to that before freezing, for the conversion makes new layers.

    Args:
        module: whose batch norms are frozen in place.
        skip: names of direct children left alone.

    Returns:
        The names of those that were not frozen before.
    """
    layers = [
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and name.split(".")[0] not in skip
    ]
    free = [name for name, layer in layers if not isinstance(layer, HeldBatchNorm)]
    for _, layer in layers:
        layer.requires_grad_(False)
        if not isinstance(layer, HeldBatchNorm):
            layer.__class__ = _held_class(type(layer))
        layer.eval()
    return free


def unfreeze_batch_norm(module: nn.Module) -> list[str]:
    """Undoes `freeze_batch_norm`: parameters train, and the mode is the module's; returns the names of the layers."""
    held = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, HeldBatchNorm)]
    for _, layer in held:
        assert isinstance(layer, nn.Module)
        layer.__class__ = _free_class(type(layer))
        layer.requires_grad_(True).train(module.training)
    return [name for name, _ in held]


class FreezesBatchNorm:
    """Gives a model `freeze_batch_norm()` and `unfreeze_batch_norm()`."""

    def freeze_batch_norm(self) -> None:
        """Holds every batch norm at its stored statistics, also after `train()`; its parameters stop training."""
        freeze_batch_norm(self)  # type: ignore[arg-type]

    def unfreeze_batch_norm(self) -> None:
        """Lets every batch norm train again."""
        unfreeze_batch_norm(self)  # type: ignore[arg-type]


_held_classes: dict[type, type] = {}


def _held_class(kind: type) -> type:
    if kind not in _held_classes:
        _held_classes[kind] = type(f"Held{kind.__name__}", (HeldBatchNorm, kind), {"__module__": __name__})
    return _held_classes[kind]


def _free_class(held: type) -> type:
    return next(kind for kind, made in _held_classes.items() if made is held)


def _new_held(kind: type) -> Any:
    made = _held_class(kind)
    return made.__new__(made)  # type: ignore[call-overload]
