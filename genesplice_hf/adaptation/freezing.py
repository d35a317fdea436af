"""Freeze and unfreeze parts of a model: parameters, and the running statistics of batch normalisation."""

from collections.abc import Collection

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_HOOK = "_frozen_batch_norm_hook"


def freeze(module: nn.Module) -> nn.Module:
    """Stop the training of every parameter of `module`; returns the same module."""
    return module.requires_grad_(False)


def unfreeze(module: nn.Module) -> nn.Module:
    """Let every parameter of `module` train; returns the same module."""
    return module.requires_grad_(True)


def freeze_batch_norm(model: nn.Module, skip: Collection[str] = ()) -> int:
    """Keep batch normalisation on its stored statistics and parameters, also after `model.train()`.

    `requires_grad=False` does not stop the running mean and variance from drifting in train mode, and an
    adapter file does not hold them: a model trained that way cannot be restored from base and adapter.

    Args:
        model: The model whose batch-norm layers are frozen in place.
        skip: Names of direct children left alone, for instance the task head.

    Returns:
        The number of batch-norm layers that are now frozen.
    """
    layers = [layer for name, layer in _batch_norms(model) if name.split(".")[0] not in skip]
    for layer in layers:
        freeze(layer)
        if not hasattr(layer, _HOOK):
            setattr(layer, _HOOK, layer.register_forward_pre_hook(_use_stored_statistics))
    return len(layers)


def unfreeze_batch_norm(model: nn.Module) -> int:
    """Undo `freeze_batch_norm`; returns the number of layers released (0 where none was frozen)."""
    layers = [layer for _, layer in _batch_norms(model) if hasattr(layer, _HOOK)]
    for layer in layers:
        getattr(layer, _HOOK).remove()
        delattr(layer, _HOOK)
        unfreeze(layer).train(model.training)
    return len(layers)


def _batch_norms(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)]


def _use_stored_statistics(layer: nn.Module, inputs: tuple) -> None:
    # `model.train()` reaches every child, so the layer is put back right before it computes.
    layer.eval()
