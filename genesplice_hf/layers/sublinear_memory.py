"""The exact gradient of a stack of linear-attention layers, with activations of one chunk at a time.

A linear-attention layer hands only its running sums from one chunk of tokens to the next. A chunk's graph can
therefore be thrown away after the forward pass and built again when its turn comes in the backward pass; the
gradient with respect to the sums is all that passes between chunks. Everything happens inside one
`torch.autograd.Function` whose inputs are the trainable parameters, so that each parameter's gradient arrives
exactly once: data parallelism, gradient accumulation, loss scaling and clipping see an ordinary backward pass.

Idea: Likhosherstov et al. 2021, "Sub-Linear Memory: How to Make Performers SLiM", NeurIPS.

Shapes: B batch, L tokens, C chunk, E hidden size, H heads, M features, D head size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import is_
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from genesplice_hf.errors import GeneSpliceError
from genesplice_hf.layers.sublinear_walks import (
    BidirectionalWalk,
    CausalWalk,
    CheckpointedWalk,
    ChunkedStack,
    Cotangent,
    GradientSums,
    ReversedCausalWalk,
    Walk,
)

# From this many layers on, `strategy="auto"` keeps the layers' inputs: computing them again costs about n^2 layers.
CHECKPOINT_FROM_LAYERS = 6


def sublinear_loss(
    embed: Callable[[int, int], torch.Tensor],
    layers: Sequence[Any],
    head_loss: Callable[[torch.Tensor, int, int], torch.Tensor],
    length: int,
    chunk_size: int,
    mask: torch.Tensor | None,
    is_causal: bool,
    states: Literal["store", "reverse"],
    strategy: Literal["auto", "sublinear", "checkpoint"],
    parameters: Sequence[nn.Parameter],
) -> torch.Tensor:
    """The loss of a whole sequence, computed and differentiated chunk by chunk.

    The gradient is that of ordinary backpropagation through the whole sequence, for the given parameters only; other
    tensors that `embed` or `head_loss` close over are constants. It is added up in float32 at least and handed over
    in the parameter's dtype; a parameter that the loss does not reach gets None, as in ordinary backpropagation. The
    autocast state of the call is restored for the backward pass. Nothing random may happen in the layers (no
    dropout), for every chunk is computed at least twice. Differentiating twice raises.

    Args:
        embed: `embed(start, stop)` gives the (B, stop - start, E) input of the first layer.
        layers: modules, or wrappers of one that list its parameters and buffers as `layer.tensors()`. Each offers
            `layer(x_BCE, mask_BC, state, is_causal) -> (x_BCE, state)` and `layer.sums(x_BCE, mask_BC) -> state`.
        head_loss: `head_loss(x_BCE, start, stop)` gives the scalar loss of these positions, already divided by the
            normaliser of the whole, so that the sum over the chunks is the loss.
        length: L. chunk_size: C, at least 1; the last chunk may be shorter.
        mask: (B, L) bool, True = real, or None when every position is real.
        is_causal: sums over the past (True) or over the whole sequence.
        states: causal only. "store" keeps the sums at the start of every chunk; "reverse" keeps those at the end of
            the sequence and subtracts chunk after chunk, so that memory does not grow with L at all.
        strategy: bidirectional only. "sublinear" computes a layer's input again whenever it is needed (about n^2
            layer evaluations, nothing kept); "checkpoint" keeps the (B, L, E) input of each layer; "auto" is
            "sublinear" for fewer than 6 layers.
        parameters: the trainable parameters (`requires_grad`), whole on this device.

    Returns:
        Scalar, in float32 at least.

    Raises:
        GeneSpliceError: an argument is not one of the above, parameters are sharded (FSDP, ZeRO-3), or carry hooks.
    """
    _demand("states", states, ("store", "reverse"))
    _demand("strategy", strategy, ("auto", "sublinear", "checkpoint"))
    _check_sizes(length, chunk_size, mask)
    parameters = list(dict.fromkeys(parameters))
    refuse_sharded(parameters)
    _refuse_hooks(parameters)
    stack = ChunkedStack(embed, layers, head_loss, length, chunk_size, mask)
    watched = Versions(parameters, layers)
    return _SublinearLoss.apply(_walk(stack, is_causal, states, strategy), watched, *parameters)


def refuse_sharded(parameters: Sequence[torch.Tensor]) -> None:
    """Raises when a parameter lives in pieces on several devices, which the second forward pass cannot gather."""
    for parameter in parameters:
        is_dtensor = hasattr(parameter, "device_mesh") and hasattr(parameter, "placements")
        is_flat = getattr(parameter, "_is_flat_param", False) or getattr(parameter, "_fsdp_flattened", False)
        if is_dtensor or is_flat or hasattr(parameter, "ds_id"):
            raise GeneSpliceError(
                "sub-linear memory (`slim_chunk_size` > 0) needs whole parameters, and these are sharded (FSDP or "
                "DeepSpeed ZeRO-3); train with DDP or ZeRO-1/2, or set `slim_chunk_size=-1`."
            )


def _refuse_hooks(parameters: Sequence[torch.Tensor]) -> None:
    if any(parameter._backward_hooks for parameter in parameters):
        raise GeneSpliceError(
            "a parameter has a gradient hook (`register_hook`), which would run once per chunk; use "
            "`register_post_accumulate_grad_hook`, or set `slim_chunk_size=-1`."
        )


def _demand(name: str, value: str, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise GeneSpliceError(f"`{name}` must be one of {', '.join(legal)}, got {value!r}.")


def _check_sizes(length: int, chunk_size: int, mask: torch.Tensor | None) -> None:
    if chunk_size < 1:
        raise GeneSpliceError(f"`chunk_size` must be at least 1 token, got {chunk_size}.")
    if length < 1:
        raise GeneSpliceError(f"`length` must be at least 1 token, got {length}; drop empty sequences.")
    if mask is not None and (mask.dim() != 2 or mask.shape[1] != length):
        raise GeneSpliceError(f"`mask` must be (batch, {length}) with True = real, got shape {tuple(mask.shape)}.")


def _walk(stack: ChunkedStack, is_causal: bool, states: str, strategy: str) -> Walk:
    if is_causal:
        return ReversedCausalWalk(stack) if states == "reverse" else CausalWalk(stack)
    if strategy == "checkpoint" or (strategy == "auto" and len(stack.layers) >= CHECKPOINT_FROM_LAYERS):
        return CheckpointedWalk(stack)
    return BidirectionalWalk(stack)


class _SublinearLoss(torch.autograd.Function):
    """(walk, ...) -> loss; the parameters are inputs only for their gradients to have a way out."""

    @staticmethod
    def forward(ctx: Any, walk: Walk, watched: "Versions", *parameters: torch.Tensor) -> torch.Tensor:
        ctx.walk, ctx.watched, ctx.parameters = walk, watched, parameters
        ctx.autocast = AutocastState.now(parameters)
        with ctx.autocast.entered():
            loss, kept = walk.forward()
        ctx.save_for_backward(*kept)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[Cotangent, ...]:
        # `once_differentiable` marks the gradients only where the upstream one has a graph. These depend on the
        # parameters too, and without the mark a penalty on the gradient would be taken for a constant.
        if torch.is_grad_enabled() and not upstream.requires_grad:
            upstream = upstream.detach().requires_grad_()
        return _gradients(ctx, upstream)


@once_differentiable
def _gradients(ctx: Any, upstream: torch.Tensor) -> tuple[Cotangent, ...]:
    ctx.watched.check()
    sums = GradientSums(ctx.parameters)
    with torch.enable_grad(), ctx.autocast.entered():
        ctx.walk.backward(ctx.saved_tensors, upstream.detach(), sums)
    return (None, None, *sums.result())


class Versions:
    """Weights and random features of the forward pass, which the backward pass must find as they were."""

    def __init__(self, parameters: Sequence[torch.Tensor], layers: Sequence[Any]) -> None:
        self.parameters, self.layers = parameters, layers
        self.tensors = self._tensors()
        self.counts = [tensor._version for tensor in self.tensors]

    def _tensors(self) -> list[torch.Tensor]:
        found = list(self.parameters)
        for layer in self.layers:
            is_module = isinstance(layer, nn.Module)
            found += [*layer.parameters(), *layer.buffers()] if is_module else layer.tensors()
        return [tensor for tensor in found if not tensor.is_inference()]

    def check(self) -> None:
        now = self._tensors()
        same = len(now) == len(self.tensors) and all(map(is_, now, self.tensors))
        if not same or self.counts != [tensor._version for tensor in now]:
            raise GeneSpliceError(
                "a parameter or buffer was changed between the forward and the backward pass, which computes the "
                "forward pass again; call `backward()` before the optimiser's step and before a forward pass that "
                "draws new random features, and do not shard the parameters (FSDP)."
            )


@dataclass(frozen=True)
class AutocastState:
    """(device type, enabled, dtype) of every device type that the computation may touch."""

    devices: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls, parameters: Sequence[torch.Tensor]) -> "AutocastState":
        kinds = sorted({"cpu"} | {parameter.device.type for parameter in parameters})
        kinds = [kind for kind in kinds if torch.amp.is_autocast_available(kind)]
        return cls(tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds))

    @contextmanager
    def entered(self) -> Iterator[None]:
        # Without the cache of cast weights: a copy made without gradient would be used again where one is needed,
        # and the weight's gradient would be lost.
        with ExitStack() as entered:
            for kind, enabled, dtype in self.devices:
                entered.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield
