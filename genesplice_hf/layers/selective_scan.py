"""The selective scan of Mamba: a linear recurrence whose decay depends on the input, in plain torch.

    h_t = exp(delta_t A) * h_(t-1) + delta_t x_t B_t        y_t = C_t . h_t

(Gu and Dao, Mamba, arXiv 2312.00752, eq. 2a-2b with zero-order hold of A and Euler's rule for B.)

The sequence is worked through in chunks. Everything but the recurrence itself is computed for a whole chunk at once;
the recurrence is one fused multiply-add per step on a CPU and a parallel prefix (log2 of the chunk passes over it) on
an accelerator. Only products of decays are ever formed, each at most 1 for A <= 0, never their reciprocals: nothing
can overflow, however strong the decay. The backward pass keeps one state per chunk and computes the chunk again, so
that memory is O(L D + chunk D N).

Shapes: B batch, L tokens, T tokens of a chunk, D channels, N states per channel. Inside, time comes first.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import torch

ScanBackend = Literal["auto", "torch", "mamba_ssm"]

# Numbers of a chunk of states on a CPU: two such buffers stay in its caches.
_CPU_CHUNK_NUMBERS = 2**19
_CPU_MIN_CHUNK = 8
_LOG2_E = math.log2(math.e)


class _Inputs(NamedTuple):
    """Arguments in working precision, time first.

    Attributes:
        u_TBD: delta * x.
        delta_TBD: step sizes.
        A_ND: decay rates.
        B_TBN, C_TBN: what is written to and read from the states.
    """

    u_TBD: torch.Tensor
    delta_TBD: torch.Tensor
    A_ND: torch.Tensor
    B_TBN: torch.Tensor
    C_TBN: torch.Tensor

    def part(self, start: int, stop: int) -> "_Inputs":
        u, delta, A, B, C = self
        return _Inputs(u[start:stop], delta[start:stop], A, B[start:stop], C[start:stop])


def selective_scan(
    x_BLD: torch.Tensor,
    delta_BLD: torch.Tensor,
    A_DN: torch.Tensor,
    B_BLN: torch.Tensor,
    C_BLN: torch.Tensor,
    chunk_size: int = 256,
    backend: ScanBackend = "auto",
) -> torch.Tensor:
    """y (B, L, D) of the recurrence at the head of this file, from a state of zero.

    Args:
        x_BLD: input; y has its dtype. States and sums are kept in at least float32.
        delta_BLD: step sizes, >= 0.
        A_DN: decay rates per unit of delta, <= 0.
        B_BLN, C_BLN: what each token writes to and reads from the states.
        chunk_size: tokens worked on at once, at most; it changes no result.
        backend: "torch"; "mamba_ssm" = the kernel of that package, for CUDA tensors below float64; "auto" = that
            kernel where it is installed and fits.

    Raises:
        ValueError: an unknown backend, or "mamba_ssm" where it cannot run; `chunk_size` below 1.
    """
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")
    inputs = (x_BLD, delta_BLD, A_DN, B_BLN, C_BLN)
    kernel = _chosen_kernel(x_BLD, backend)
    if kernel is not None:
        return call_kernel(kernel, *inputs)
    if x_BLD.device.type != "cpu":
        return scan_in_chunks(*inputs, chunk_size, parallel=True)
    fitting = _CPU_CHUNK_NUMBERS // max(x_BLD[:, 0].numel() * A_DN.shape[1], 1)
    return scan_in_chunks(*inputs, min(chunk_size, max(fitting, _CPU_MIN_CHUNK)), parallel=False)


def scan_in_chunks(
    x_BLD: torch.Tensor,
    delta_BLD: torch.Tensor,
    A_DN: torch.Tensor,
    B_BLN: torch.Tensor,
    C_BLN: torch.Tensor,
    chunk_size: int,
    parallel: bool,
) -> torch.Tensor:
    """`selective_scan` in torch, by exactly these chunks; `parallel` as in `accumulate`."""
    working = torch.promote_types(x_BLD.dtype, torch.float32)
    x, delta, B, C = (tensor.to(working).transpose(0, 1) for tensor in (x_BLD, delta_BLD, B_BLN, C_BLN))
    inputs = (delta * x, delta, A_DN.to(working).t(), B, C)
    y: torch.Tensor = _Scan.apply(*inputs, min(chunk_size, len(x)), parallel)  # type: ignore[no-untyped-call]
    return y.transpose(0, 1).to(x_BLD.dtype)


def call_kernel(
    kernel: Callable[..., torch.Tensor],
    x_BLD: torch.Tensor,
    delta_BLD: torch.Tensor,
    A_DN: torch.Tensor,
    B_BLN: torch.Tensor,
    C_BLN: torch.Tensor,
) -> torch.Tensor:
    """`selective_scan` by a kernel that takes (x, delta, A, B, C) with time last, A in float32, all others alike."""
    x, delta, B, C = (
        tensor.to(x_BLD.dtype).transpose(1, 2).contiguous() for tensor in (x_BLD, delta_BLD, B_BLN, C_BLN)
    )
    return kernel(x, delta, A_DN.float(), B, C).transpose(1, 2)


@cache
def _mamba_kernel() -> Callable[..., torch.Tensor] | None:
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    return selective_scan_fn


def _chosen_kernel(x: torch.Tensor, backend: str) -> Callable[..., torch.Tensor] | None:
    if backend not in ("auto", "torch", "mamba_ssm"):
        raise ValueError(f"`backend` must be auto, torch or mamba_ssm, got {backend!r}.")
    fits = x.is_cuda and x.dtype != torch.float64
    kernel = _mamba_kernel() if backend != "torch" and (fits or backend == "mamba_ssm") else None
    if backend != "mamba_ssm":
        return kernel
    if kernel is None or not fits:
        reason = "the package is not installed" if kernel is None else f"got {x.dtype} on {x.device}"
        raise ValueError(
            f"`backend`='mamba_ssm' needs that package and CUDA tensors below float64, but {reason}; use 'auto'."
        )
    return kernel


class _Scan(torch.autograd.Function):
    """The recurrence over chunks, forwards for the values and backwards for their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        chunk_size: int,
        parallel: bool,
    ) -> torch.Tensor:
        inputs = _Inputs(*(tensor.contiguous() for tensor in (u, delta, A, B, C)))
        y_TBD, starts, keeps = torch.empty_like(inputs.u_TBD), [], any(ctx.needs_input_grad)
        state_BND = u.new_zeros(u.shape[1], *A.shape)
        buffers = _Buffers(state_BND, chunk_size)
        for start in range(0, len(u), chunk_size):
            part = inputs.part(start, start + chunk_size)
            if keeps:
                starts.append(state_BND)
            _, states = buffers.states(part, state_BND, parallel)
            state_BND = states[-1].clone()
            torch.matmul(part.C_TBN[..., None, :], states, out=y_TBD[start : start + chunk_size, :, None])
        ctx.save_for_backward(*inputs, *starts)
        ctx.chunk_size, ctx.parallel = chunk_size, parallel
        return y_TBD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs, starts = _Inputs(*saved[:5]), saved[5:]
        grads = _Inputs(*(torch.zeros_like(tensor) for tensor in inputs))
        buffers, carry, dy = _Buffers(starts[0], ctx.chunk_size), None, dy.contiguous()
        for index in reversed(range(len(starts))):
            span = (index * ctx.chunk_size, (index + 1) * ctx.chunk_size)
            carry = _chunk_gradients(
                inputs.part(*span), grads.part(*span), dy[slice(*span)], starts[index], carry, buffers, ctx.parallel
            )
        return *grads, None, None


class _Buffers:
    """Room for the decays and states of one chunk, used again for every chunk: fresh pages cost more than the sums."""

    def __init__(self, state_BND: torch.Tensor, chunk_size: int) -> None:
        self._decays, self._states = (state_BND.new_empty(chunk_size, *state_BND.shape) for _ in range(2))
        # Made once, for a view costs a third of what is done with it.
        self._decay_slabs, self._state_slabs = _slabs(self._decays), _slabs(self._states)

    def states(self, part: _Inputs, start_BND: torch.Tensor, parallel: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(decays, states), each (T, B, N, D)."""
        length = len(part.u_TBD)
        decays, states = self._decays[:length], self._states[:length]
        # A power of 2 costs a third of an exponential.
        torch.mul(part.delta_TBD[:, :, None], part.A_ND * _LOG2_E, out=decays).exp2_()
        torch.mul(part.u_TBD[:, :, None], part.B_TBN[..., None], out=states)
        states[0].addcmul_(decays[0], start_BND)
        if parallel:
            return decays, accumulate(decays, states, parallel)
        _accumulate_by_steps(self._decay_slabs[1:length], self._state_slabs[:length])
        return decays, states


def accumulate(decays: torch.Tensor, x: torch.Tensor, parallel: bool, backwards: bool = False) -> torch.Tensor:
    """In place along the first axis: x_t += decays_t * x_(t-1) for t = 1, 2, ...; `backwards` is its transpose,
    x_t += decays_(t+1) * x_(t+1) for t = T - 2, T - 3, ...; decays_0 is read by neither.

    Args:
        decays, x: (T, ...), contiguous. parallel: log2(T) passes over everything in place of T small steps.
    """
    if parallel:
        return _accumulate_by_doubling(decays[1:], x, backwards)
    factors, slabs = _slabs(decays)[1:], _slabs(x)
    _accumulate_by_steps(*((factors[::-1], slabs[::-1]) if backwards else (factors, slabs)))
    return x


def _slabs(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    # Flat, for one dimension has the least to set up.
    return x.view(len(x), -1).unbind()


def _accumulate_by_steps(factors: Sequence[torch.Tensor], slabs: Sequence[torch.Tensor]) -> None:
    last = slabs[0]
    for slab, factor in zip(slabs[1:], factors, strict=True):
        last = slab.addcmul_(factor, last)


def _accumulate_by_doubling(factors: torch.Tensor, x: torch.Tensor, backwards: bool) -> torch.Tensor:
    """Hillis and Steele's prefix sums: after the pass with `shift`, x_t holds 2 shift terms.

    Args:
        factors: (T - 1, ...) between neighbours; later the products over `shift` of them.
    """
    shift = 1
    while shift < len(x):
        into, out_of = (x[:-shift], x[shift:]) if backwards else (x[shift:], x[:-shift])
        into += factors * out_of
        factors = factors[shift:] * factors[:-shift]
        shift *= 2
    return x


def _chunk_gradients(
    part: _Inputs,
    grads: _Inputs,
    dy_TBD: torch.Tensor,
    start_BND: torch.Tensor,
    carry_BND: torch.Tensor | None,
    buffers: _Buffers,
    parallel: bool,
) -> torch.Tensor:
    """Writes one chunk's gradients into `grads`; gives the gradient for the state before the chunk.

    With g_t the gradient for h_t: g_t = C_t dy_t + exp(delta_(t+1) A) g_(t+1), and g_t h_(t-1) is that for the decay.
    """
    decays, states = buffers.states(part, start_BND, parallel)
    slopes = dy_TBD[:, :, None] * part.C_TBN[..., None]
    if carry_BND is not None:
        slopes[-1] += carry_BND
    accumulate(decays, slopes, parallel, backwards=True)
    torch.matmul(states, dy_TBD[..., None], out=grads.C_TBN[..., None])
    torch.matmul(slopes, part.u_TBD[..., None], out=grads.B_TBN[..., None])
    torch.matmul(part.B_TBN[..., None, :], slopes, out=grads.u_TBD[..., None, :])
    # From here on the gradient for the exponents delta_t A, but for the state before.
    slopes *= decays
    carry_BND = slopes[0].clone()
    slopes[1:] *= states[:-1]
    slopes[0] *= start_BND
    torch.sum(torch.mul(slopes, part.A_ND, out=states), dim=2, out=grads.delta_TBD)
    grads.A_ND.add_(slopes.mul_(part.delta_TBD[:, :, None]).sum((0, 1)))
    return carry_BND
