"""Three ways over the chunks of a sequence, each of which makes the gradient of the whole from graphs of one chunk.

Only running sums, their gradients and (in one of the three) the layers' inputs live longer than a chunk.
`layers/sublinear_memory.py` wraps a walk in an autograd function and says what it is for.

Shapes: B batch, L tokens, C chunk, E hidden size, H heads, M features, D head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch

from genesplice_hf.layers.linear_attention import LinearState

Cotangent: TypeAlias = torch.Tensor | None
Span: TypeAlias = tuple[int, int]


class Walk(Protocol):
    """One way over the chunks: what is kept after the forward pass, and how the gradient is made from it."""

    def forward(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The loss, and the tensors that the backward pass needs (called without gradient)."""

    def backward(self, kept: Sequence[torch.Tensor], upstream: torch.Tensor, sums: "GradientSums") -> None:
        """Adds the gradient of `upstream * loss` to `sums`."""


class GradientSums:
    """Adds up the parameters' gradients of many small graphs, in float32 at least."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self.parameters = parameters
        self._sums: list[Cotangent] = [None] * len(parameters)

    def pull_back(
        self, outputs: Sequence[torch.Tensor], cotangents: Sequence[Cotangent], leaves: Sequence[torch.Tensor] = ()
    ) -> list[Cotangent]:
        """Backpropagates `sum <outputs, cotangents>` once; None stands for a cotangent of zero.

        Returns:
            The gradient for each of `leaves`, None where the outputs do not depend on it. Those of the parameters
            are added to the sums.
        """
        pairs = [
            (output, cotangent.to(output.dtype))
            for output, cotangent in zip(outputs, cotangents, strict=True)
            if cotangent is not None and output.requires_grad
        ]
        if not pairs:
            return [None] * len(leaves)
        inputs = [*self.parameters, *leaves]
        heads, heads_cotangents = zip(*pairs, strict=True)
        gradients = torch.autograd.grad(heads, inputs, heads_cotangents, allow_unused=True)
        for index in range(len(self.parameters)):
            self._sums[index] = added(self._sums[index], gradients[index])
        return list(gradients[len(self.parameters) :])

    def result(self) -> list[Cotangent]:
        """One gradient per parameter, in its dtype; None where no graph reached it."""
        return [
            None if total is None else total.to(parameter.dtype)
            for total, parameter in zip(self._sums, self.parameters, strict=True)
        ]


def added(total: Cotangent, part: Cotangent) -> Cotangent:
    """total + part in float32 at least, None counting as zero; `total` is changed, `part` is not."""
    if part is None:
        return total
    if total is None:
        return part.detach().to(torch.promote_types(part.dtype, torch.float32), copy=True)
    return total.add_(part.detach())


def plus(one: Cotangent, other: Cotangent) -> Cotangent:
    """one + other, None counting as zero; neither is changed."""
    if one is None or other is None:
        return other if one is None else one
    return one + other


@dataclass(frozen=True)
class ChunkedStack:
    """Embedding, layers and loss of one batch, and its cut into chunks; the fields are those of `sublinear_loss`."""

    embed: Callable[[int, int], torch.Tensor]
    layers: Sequence[Any]
    head_loss: Callable[[torch.Tensor, int, int], torch.Tensor]
    length: int
    chunk_size: int
    mask: torch.Tensor | None

    @property
    def spans(self) -> list[Span]:
        starts = range(0, self.length, self.chunk_size)
        return [(start, min(start + self.chunk_size, self.length)) for start in starts]

    def mask_of(self, span: Span) -> torch.Tensor | None:
        return None if self.mask is None else self.mask[:, slice(*span)]

    def through(self, span: Span, states: Sequence[LinearState]) -> torch.Tensor:
        """(B, C, E) of one chunk behind the first `len(states)` bidirectional layers, whose sums are given."""
        x_BCE = self.embed(*span)
        for layer, state in zip(self.layers, states, strict=False):
            x_BCE, _ = layer(x_BCE, self.mask_of(span), state, False)
        return x_BCE


class CausalWalk:
    """Forward in time carrying the sums, then backward in time carrying their gradient ("store").

    The sums at the end of every chunk but the last are kept.
    """

    def __init__(self, stack: ChunkedStack) -> None:
        self.stack = stack
        self._stored: list[torch.Tensor] = []

    def forward(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Keeps the sums that every chunk but the first starts from."""
        stack, loss = self.stack, None
        states: list[LinearState | None] = [None] * len(stack.layers)
        for number, span in enumerate(stack.spans):
            self.keep_start(number, states)
            x_BCE = stack.embed(*span)
            for index, layer in enumerate(stack.layers):
                x_BCE, states[index] = self.through(index, layer, x_BCE, stack.mask_of(span), states[index])
            loss = added(loss, stack.head_loss(x_BCE, *span))
        return loss, self.kept()

    def through(
        self, index: int, layer: Any, x_BCE: torch.Tensor, mask: torch.Tensor | None, start: LinearState | None
    ) -> tuple[torch.Tensor, LinearState]:
        """One chunk through a layer, and the sums after it."""
        return layer(x_BCE, mask, start, True)

    def keep_start(self, number: int, states: Sequence[LinearState | None]) -> None:
        """Takes note of the sums before chunk `number`.

        They go into room made at once: small tensors that live long, one after each chunk, would keep the allocator
        from using the memory of the chunks again.
        """
        tensors = flat(states)
        if not self._stored:
            self._stored = [tensor.new_empty(len(self.stack.spans) - 1, *tensor.shape) for tensor in tensors]
        for stored, tensor in zip(self._stored, tensors, strict=True):
            stored[number - 1] = tensor

    def kept(self) -> list[torch.Tensor]:
        """What the backward pass needs."""
        return self._stored

    def begin(self, kept: Sequence[torch.Tensor]) -> None:
        """Takes over what `kept` gave."""
        self._stored = list(kept)

    def start_of(
        self, number: int, index: int, layer: Any, x_BCE: torch.Tensor, mask: torch.Tensor | None
    ) -> LinearState:
        """The sums of layer `index` before chunk `number`; asked layer by layer, from the last chunk to the second."""
        return LinearState(*(stored[number - 1] for stored in self._stored[2 * index : 2 * index + 2]))

    def backward(self, kept: Sequence[torch.Tensor], upstream: torch.Tensor, sums: GradientSums) -> None:
        self.begin(kept)
        cotangents: list[Cotangent] = [None] * (2 * len(self.stack.layers))
        for number, span in reversed(list(enumerate(self.stack.spans))):
            starts, ends, loss = self._rebuild(number, span)
            cotangents = sums.pull_back([loss, *flat(ends)], [upstream, *cotangents], flat(starts))

    def _rebuild(self, number: int, span: Span) -> tuple[list[LinearState], list[LinearState], torch.Tensor]:
        """The chunk's graph: its start states as leaves, its end states and its loss."""
        stack, starts, ends = self.stack, [], []
        mask_BC, x_BCE = stack.mask_of(span), stack.embed(*span)
        for index, layer in enumerate(stack.layers):
            start = None
            if number:
                with torch.no_grad():
                    start = leaf(self.start_of(number, index, layer, x_BCE, mask_BC))
                starts.append(start)
            x_BCE, end = layer(x_BCE, mask_BC, start, True)
            ends.append(end)
        return starts, ends, stack.head_loss(x_BCE, *span)


class ReversedCausalWalk(CausalWalk):
    """As `CausalWalk`, but only the last sums are kept, and chunk after chunk is subtracted from them ("reverse").

    A difference of floats is not what was there before the sum. So the sums are carried together with what rounding
    cut off (Knuth's exact sum of two floats, TAOCP 2, 4.2.2, theorem B), and come back as they were.
    """

    def __init__(self, stack: ChunkedStack) -> None:
        super().__init__(stack)
        self._exact: list[ExactState | None] = [None] * len(stack.layers)

    def through(
        self, index: int, layer: Any, x_BCE: torch.Tensor, mask: torch.Tensor | None, start: LinearState | None
    ) -> tuple[torch.Tensor, LinearState]:
        own = layer.sums(x_BCE, mask)
        self._exact[index] = exact = plus_exactly(self._exact[index], own)
        return layer(x_BCE, mask, start, True)[0], exact.rounded

    def keep_start(self, number: int, states: Sequence[LinearState | None]) -> None:
        """Nothing: the last sums are enough."""

    def kept(self) -> list[torch.Tensor]:
        """The last sums, and what rounding cut off from them."""
        return [tensor for exact in self._exact if exact is not None for state in exact for tensor in state]

    def begin(self, kept: Sequence[torch.Tensor]) -> None:
        states = unflat(kept)
        self._exact = [ExactState(*pair) for pair in zip(states[::2], states[1::2], strict=True)]

    def start_of(
        self, number: int, index: int, layer: Any, x_BCE: torch.Tensor, mask: torch.Tensor | None
    ) -> LinearState:
        own = layer.sums(x_BCE, mask)
        self._exact[index] = exact = plus_exactly(self._exact[index], LinearState(-own.numerator, -own.denominator))
        return exact.rounded


class ExactState(NamedTuple):
    """Sums as they are rounded, and what rounding cut off."""

    rounded: LinearState
    residue: LinearState


def plus_exactly(state: ExactState | None, own: LinearState) -> ExactState:
    """state + own with twice the digits."""
    if state is None:
        return ExactState(own, LinearState(*map(torch.zeros_like, own)))
    pairs = [_two_sum(total, rest, part) for total, rest, part in zip(*state, own, strict=True)]
    return ExactState(*(LinearState(*side) for side in zip(*pairs, strict=True)))


def _two_sum(total: torch.Tensor, rest: torch.Tensor, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rough = total + part
    virtual = rough - total
    rest = rest + ((total - (rough - virtual)) + (part - virtual))
    exact = rough + rest
    return exact, rest - (exact - rough)


class BidirectionalWalk:
    """Every layer's sums over the whole sequence are leaves; their gradients go back layer by layer.

    Layer r needs the sums of its whole input, and so its input is computed from the embedding again and again.
    """

    def __init__(self, stack: ChunkedStack) -> None:
        self.stack = stack

    def forward(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Keeps the sums of every layer."""
        stack, loss = self.stack, None
        states: list[LinearState] = []
        for layer in stack.layers:
            total: list[Cotangent] = [None, None]
            for span in stack.spans:
                own = layer.sums(stack.through(span, states), stack.mask_of(span))
                total = [added(*pair) for pair in zip(total, own, strict=True)]
            states.append(LinearState(*total))
        for span in stack.spans:
            loss = added(loss, stack.head_loss(stack.through(span, states), *span))
        return loss, flat(states)

    def backward(self, kept: Sequence[torch.Tensor], upstream: torch.Tensor, sums: GradientSums) -> None:
        stack, states = self.stack, [leaf(state) for state in unflat(kept)]
        cotangents: list[Cotangent] = [None] * len(kept)

        def pull_back(outputs: Sequence[torch.Tensor], given: Sequence[Cotangent], depth: int) -> None:
            found = sums.pull_back(outputs, given, flat(states[:depth]))
            cotangents[: 2 * depth] = map(added, cotangents[: 2 * depth], found)

        for span in stack.spans:
            loss = stack.head_loss(stack.through(span, states), *span)
            pull_back([loss], [upstream], len(states))
        # The gradient of layer r's sums is complete when the loss and all layers above have been pulled back.
        for depth in reversed(range(len(states))):
            for span in stack.spans:
                own = stack.layers[depth].sums(stack.through(span, states[:depth]), stack.mask_of(span))
                pull_back(own, cotangents[2 * depth : 2 * depth + 2], depth)


class CheckpointedWalk:
    """As `BidirectionalWalk`, but the (B, L, E) input of each layer is kept: n layers again instead of n^2."""

    def __init__(self, stack: ChunkedStack) -> None:
        self.stack = stack

    def forward(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Keeps the sums of every layer, then the input of every layer and the output of the last."""
        stack, loss = self.stack, None
        states: list[LinearState] = []
        inputs = [torch.cat([stack.embed(*span) for span in stack.spans], dim=1)]
        for layer in stack.layers:
            total: list[Cotangent] = [None, None]
            for span in stack.spans:
                own = layer.sums(inputs[-1][:, slice(*span)], stack.mask_of(span))
                total = [added(*pair) for pair in zip(total, own, strict=True)]
            states.append(LinearState(*total))
            inputs.append(self._layer(layer, inputs[-1], states[-1]))
        for span in stack.spans:
            loss = added(loss, stack.head_loss(inputs[-1][:, slice(*span)], *span))
        return loss, [*flat(states), *inputs]

    def _layer(self, layer: Any, x_BLE: torch.Tensor, state: LinearState) -> torch.Tensor:
        spans = self.stack.spans
        chunks = [layer(x_BLE[:, slice(*span)], self.stack.mask_of(span), state, False)[0] for span in spans]
        return torch.cat(chunks, dim=1)

    def backward(self, kept: Sequence[torch.Tensor], upstream: torch.Tensor, sums: GradientSums) -> None:
        stack, depth = self.stack, len(self.stack.layers)
        states, inputs = unflat(kept[: 2 * depth]), list(kept[2 * depth :])
        x_BLE = inputs.pop()
        # The gradient of the layer's output at hand, chunk by chunk.
        cotangents: list[Cotangent] = []
        for span in stack.spans:
            x_BCE = x_BLE[:, slice(*span)].detach().requires_grad_()
            cotangents += sums.pull_back([stack.head_loss(x_BCE, *span)], [upstream], [x_BCE])
        for layer, state in zip(reversed(stack.layers), reversed(states), strict=True):
            cotangents = self._layer_backward(layer, inputs.pop(), leaf(state), cotangents, sums)
        for span, cotangent in zip(stack.spans, cotangents, strict=True):
            sums.pull_back([stack.embed(*span)], [cotangent])

    def _layer_backward(
        self,
        layer: Any,
        x_BLE: torch.Tensor,
        state: LinearState,
        cotangents: list[Cotangent],
        sums: GradientSums,
    ) -> list[Cotangent]:
        """Gradient of the layer's output -> gradient of its input, both chunk by chunk."""
        of_state: list[Cotangent] = [None, None]
        of_input: list[Cotangent] = []
        chunks = [(x_BLE[:, slice(*span)].detach().requires_grad_(), span) for span in self.stack.spans]
        for (x_BCE, span), cotangent in zip(chunks, cotangents, strict=True):
            out_BCE, _ = layer(x_BCE, self.stack.mask_of(span), state, False)
            gradient, *found = sums.pull_back([out_BCE], [cotangent], [x_BCE, *state])
            of_input.append(gradient)
            of_state = [added(*pair) for pair in zip(of_state, found, strict=True)]
        for index, (x_BCE, span) in enumerate(chunks):
            own = layer.sums(x_BCE, self.stack.mask_of(span))
            (gradient,) = sums.pull_back(own, of_state, [x_BCE])
            of_input[index] = plus(of_input[index], gradient)
        return of_input


def flat(states: Sequence[LinearState | None]) -> list[torch.Tensor]:
    return [tensor for state in states if state is not None for tensor in state]


def unflat(tensors: Sequence[torch.Tensor]) -> list[LinearState]:
    return [LinearState(*pair) for pair in zip(tensors[::2], tensors[1::2], strict=True)]


def leaf(state: LinearState) -> LinearState:
    """The same sums as leaves of a new graph."""
    return LinearState(*(tensor.detach().requires_grad_() for tensor in state))
