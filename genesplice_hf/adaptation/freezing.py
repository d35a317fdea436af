"""Freeze and unfreeze parts of a model: parameters, and the running statistics of batch normalisation.

Every `freeze_*` and `train_only_*` returns a `Snapshot` of what it found, which `restore_requires_grad` brings back.
Parameters are chosen by identity, so that one with two names is one. Call them once before training, never in
`forward`.
"""

import logging
from collections.abc import Collection, Iterable
from typing import NamedTuple

from torch import nn

from genesplice_hf.adaptation.targets import HEAD_NAMES
from genesplice_hf.errors import GeneSpliceError
from genesplice_hf.layers import norm

logger = logging.getLogger(__name__)

# What a model calls its stack of layers, best first.
_STACKS = ("layers", "layer", "blocks", "h")


class Snapshot(NamedTuple):
    """What was trainable before: (parameter, whether it trained), and the batch norms that this call froze."""

    requires_grad: list[tuple[nn.Parameter, bool]]
    batch_norms: list[str]


def freeze(module: nn.Module) -> nn.Module:
    """Stop the training of every parameter of `module`; returns the same module."""
    return module.requires_grad_(False)


def unfreeze(module: nn.Module) -> nn.Module:
    """Let every parameter of `module` train; returns the same module."""
    return module.requires_grad_(True)


def freeze_all(model: nn.Module) -> Snapshot:
    """Stop the training of every parameter. Batch statistics go on moving; see `freeze_batch_norm`."""
    return _train_only(model, [])


def freeze_batch_norm(model: nn.Module, skip: Collection[str] = ()) -> Snapshot:
    """Keep batch normalisation on its stored statistics and parameters, also after `model.train()`.

    `requires_grad=False` does not stop the running mean and variance from drifting in train mode, and an
    adapter file does not hold them: a model trained that way cannot be restored from base and adapter.

    Args:
        model: The model whose batch-norm layers, `SyncBatchNorm` too, are frozen in place.
        skip: Names of direct children left alone, for instance the task head.

    Returns:
        What was before; its `batch_norms` are the layers that were not frozen yet.
    """
    before = _snapshot(model)
    return before._replace(batch_norms=norm.freeze_batch_norm(model, skip))


def unfreeze_batch_norm(model: nn.Module) -> int:
    """Undo `freeze_batch_norm`; returns the number of layers released (0 where none was frozen)."""
    return len(norm.unfreeze_batch_norm(model))


def train_only_layer_norms(model: nn.Module, include_head: bool = False) -> Snapshot:
    """Train the layer norms (RMS norms too) outside the task head, and the head where wanted; nothing else.

    Raises:
        GeneSpliceError: There are none, or `include_head` without a head.
    """
    head = _heads(model)
    outside = [module for module in model.modules() if _is_layer_norm(module) and not _within(module, head)]
    if not outside:
        raise GeneSpliceError(f"{type(model).__name__} has no layer norms; choose another way to adapt it.")
    return _train_only(model, [*outside, *_wanted_head(model, include_head)])


def train_only_last_n_layers(model: nn.Module, n: int, include_head: bool = True) -> Snapshot:
    """Train the last `n` layers of the model's stack, and the head where wanted; nothing else.

    Args:
        model: Its stack is the longest `ModuleList` called `layers`, `layer`, `blocks` or `h`.
        n: 0 = the head alone.
        include_head: Whether the task head (`classifier`, `score`) trains as well.

    Raises:
        GeneSpliceError: There is no such stack, it has fewer layers, or `include_head` without a head.
    """
    stack = _layer_stack(model)
    if not 0 <= n <= len(stack):
        raise GeneSpliceError(f"`n` must be 0 to {len(stack)}, the layers of {type(model).__name__}, got {n}.")
    return _train_only(model, [*stack[len(stack) - n :], *_wanted_head(model, include_head)])


def restore_requires_grad(model: nn.Module, snapshot: Snapshot) -> None:
    """Brings back what `snapshot` found, batch norms that its call froze included.

    Raises:
        GeneSpliceError: The snapshot is of another model.
    """
    own = {id(parameter) for parameter in model.parameters()}
    if not all(id(parameter) in own for parameter, _ in snapshot.requires_grad):
        raise GeneSpliceError("`snapshot` is of another model, or parameters were replaced since it was taken.")
    for name in snapshot.batch_norms:
        layer = model.get_submodule(name)
        norm.unfreeze_batch_norm(layer)
        layer.train(model.training)
    for parameter, flag in snapshot.requires_grad:
        parameter.requires_grad_(flag)
    _log(model)


def _snapshot(model: nn.Module) -> Snapshot:
    return Snapshot([(parameter, parameter.requires_grad) for parameter in model.parameters()], [])


def _train_only(model: nn.Module, modules: Iterable[nn.Module]) -> Snapshot:
    before = _snapshot(model)
    chosen = {id(parameter) for module in modules for parameter in module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    _log(model)
    return before


def _log(model: nn.Module) -> None:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    logger.info("%d tensors with %d numbers train", len(trainable), sum(map(nn.Parameter.numel, trainable)))


def _heads(model: nn.Module) -> list[nn.Module]:
    return [child for name, child in model.named_children() if name in HEAD_NAMES]


def _wanted_head(model: nn.Module, include_head: bool) -> list[nn.Module]:
    head = _heads(model)
    if include_head and not head:
        raise GeneSpliceError(
            f"`include_head` needs a task head ({' or '.join(HEAD_NAMES)}), and {type(model).__name__} has none; pass "
            "`include_head=False`."
        )
    return head if include_head else []


def _is_layer_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__


def _within(module: nn.Module, parents: Iterable[nn.Module]) -> bool:
    return any(module is inner for parent in parents for inner in parent.modules())


def _layer_stack(model: nn.Module) -> nn.ModuleList:
    stacks = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    for wanted in _STACKS:
        found = [part for name, part in stacks if name.rpartition(".")[2] == wanted]
        if found:
            return max(found, key=len)
    raise GeneSpliceError(f"{type(model).__name__} has no ModuleList called {', '.join(_STACKS)} to count layers of.")
