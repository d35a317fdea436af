"""The pair representation z of BioFormer: what it adds to attention, how genes update it, and where it comes from.

After AlphaFold 2's Evoformer (Jumper et al. 2021, supplement, algorithms 7 and 10). z is kept with the channels before
the column, so that updating it is one matrix product per cell and nothing of the size r^2 c^2 ever exists.

Shapes: B cells, i rows (queries) and j columns (keys) of r genes, H heads, C channels of z, E hidden size, P and Q
channels of the two sides of a product, K channels of the prior.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from genesplice_hf.errors import SequenceError
from genesplice_hf.layers.expression import ContinuousValueEmbedding
from genesplice_hf.layers.expression_config import PairExpressionConfig

# So many numbers of z are normalised at a time: what a cache holds, and more where kernels have a price of their own.
_CPU_NUMBERS, _GPU_NUMBERS = 2**18, 2**25


def effective_weight(module: nn.Module, size: int) -> torch.Tensor:
    """The matrix (out, `size`) of a Linear, with whatever an adapter wrapped around it adds."""
    if type(module) is nn.Linear:
        return module.weight
    like = next(module.parameters())
    identity = torch.eye(size, device=like.device, dtype=like.dtype if like.is_floating_point() else None)
    return (module(identity) - module(torch.zeros_like(identity[:1]))).transpose(0, 1)


class _NormalisedProjection(torch.autograd.Function):
    """W LN(z) over the channels without a normalised copy of z: a few rows at a time, in the backward pass again."""

    @staticmethod
    def forward(ctx: Any, z_BiCj: torch.Tensor, weight_HC: torch.Tensor, eps: float) -> torch.Tensor:
        working = torch.float64 if z_BiCj.dtype == torch.float64 else torch.float32
        batch, rows, _, columns = z_BiCj.shape
        out_BHij = torch.empty(batch, len(weight_HC), rows, columns, device=z_BiCj.device, dtype=working)
        rstd_Bi1j = torch.empty(batch, rows, 1, columns, device=z_BiCj.device, dtype=working)
        with torch.autocast(z_BiCj.device.type, enabled=False):
            weight = weight_HC.to(working)
            for cell, part in _parts(z_BiCj):
                centred = _centred(z_BiCj[cell, part].to(working))
                rstd = (centred.square().mean(1, keepdim=True) + eps).rsqrt_()
                rstd_Bi1j[cell, part] = rstd
                out_BHij[cell, :, part] = (torch.matmul(weight, centred) * rstd).transpose(0, 1)
        ctx.save_for_backward(z_BiCj, weight_HC, rstd_Bi1j)
        return out_BHij.to(z_BiCj.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHij: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None]:
        z_BiCj, weight_HC, rstd_Bi1j = ctx.saved_tensors
        working = rstd_Bi1j.dtype
        weight = weight_HC.to(working)
        grad_weight = torch.zeros_like(weight)
        grad_z = torch.empty_like(z_BiCj) if ctx.needs_input_grad[0] else None
        for cell, part in _parts(z_BiCj):
            rstd = rstd_Bi1j[cell, part]
            normal = _centred(z_BiCj[cell, part].to(working)).mul_(rstd)
            grad = grad_BHij[cell, :, part].to(working).transpose(0, 1)
            grad_weight += torch.matmul(grad, normal.transpose(1, 2)).sum(0)
            if grad_z is not None:
                inner = torch.matmul(weight.transpose(0, 1), grad)
                shared = (inner * normal).mean(1, keepdim=True)
                grad_z[cell, part] = _centred(inner).sub_(normal.mul_(shared)).mul_(rstd)
        return grad_z, grad_weight.to(weight_HC.dtype), None


def _parts(z_BiCj: torch.Tensor) -> list[tuple[int, slice]]:
    """(cell, rows) of parts that a cache holds."""
    batch, rows, channels, columns = z_BiCj.shape
    numbers = _GPU_NUMBERS if z_BiCj.is_cuda else _CPU_NUMBERS
    step = max(1, numbers // (channels * columns))
    return [(cell, slice(start, start + step)) for cell in range(batch) for start in range(0, rows, step)]


def _centred(x_nCj: torch.Tensor) -> torch.Tensor:
    return x_nCj - x_nCj.mean(1, keepdim=True)


class PairNorm(nn.Module):
    """The weights (C,) of z's LayerNorm; a bias would add a constant per head, which a softmax does not see."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class PairBias(nn.Module):
    """bias[b, h, i, j] = w_h LN(z_ij), (B, i, C, j) -> (B, H, i, j); without the norm where the config says so."""

    def __init__(self, config: PairExpressionConfig) -> None:
        super().__init__()
        self.eps = config.layer_norm_eps
        self.size = config.pair_hidden_size
        self.norm = PairNorm(self.size) if config.pair_layer_norm else None
        self.proj = nn.Linear(self.size, config.num_attention_heads, bias=False)

    def forward(self, z_BiCj: torch.Tensor) -> torch.Tensor:
        weight_HC = effective_weight(self.proj, self.size)
        if self.norm is None:
            return torch.matmul(weight_HC, z_BiCj.to(weight_HC.dtype)).transpose(1, 2)
        return _NormalisedProjection.apply(z_BiCj, weight_HC * self.norm.weight, self.eps)

    def nothing(self) -> torch.Tensor:
        """The 0 that a z of zeros gives, with gradients of 0: distributed training looks for every parameter."""
        return sum((parameter.sum() * 0 for parameter in self.parameters()), torch.zeros(()))  # type: ignore[return-value]


class PairProduct(nn.Module):
    """z_ij = W (A_i o Q_j) + b: every product of channels, or channel by channel; W is (C, P, Q), or (C, P)."""

    def __init__(self, size: int, channels: int, is_outer: bool, bias: bool) -> None:
        super().__init__()
        self.size, self.channels, self.is_outer = size, channels, is_outer
        self.out = nn.Linear(size**2 if is_outer else size, channels, bias=bias)

    def weight(self) -> torch.Tensor:
        """W, (C, P, Q) or (C, P)."""
        flat = effective_weight(self.out, self.size**2 if self.is_outer else self.size)
        return flat.reshape(self.channels, self.size, self.size) if self.is_outer else flat

    def rows(self, a_BiP: torch.Tensor) -> torch.Tensor:
        """T of z_ij = T_i Q_j, (B, i, C, Q)."""
        if self.is_outer:
            # vec(A_i o Q_j) = (sum over p) A_ip Q_jq, summed over p first.
            weight = self.weight().permute(1, 0, 2).flatten(1)
            return (a_BiP @ weight.to(a_BiP.dtype)).unflatten(-1, (self.channels, self.size))
        return self.weight() * a_BiP[:, :, None]

    def weighted(self, a_BiP: torch.Tensor, heads_HC: torch.Tensor) -> torch.Tensor:
        """A' of w_h z_ij = A'_hi Q_j, (B, H, i, Q): the bias of one head without z."""
        # A copy, for products with few rows round by where a weight lies in memory.
        weight = self.weight().clone()
        if self.is_outer:
            return torch.einsum("bip,hpq->bhiq", a_BiP, torch.einsum("hc,cpq->hpq", heads_HC, weight))
        return a_BiP[:, None] * (heads_HC @ weight)[:, None]

    def add(
        self,
        z_BiCj: torch.Tensor | None,
        a_BiP: torch.Tensor,
        q_BjQ: torch.Tensor,
        real_Br: torch.Tensor | None,
    ) -> torch.Tensor:
        """z plus the product, or the product alone; zero in rows and columns of padding."""
        t_BiCQ = self.rows(a_BiP)
        bias = getattr(self.out, "bias", None)
        if bias is not None:
            # One more channel of ones, so that z is written once.
            ones = q_BjQ.new_ones(q_BjQ.shape[:2]) if real_Br is None else real_Br.to(q_BjQ.dtype)
            t_BiCQ = torch.cat([t_BiCQ, (ones[..., None] * bias)[..., None]], dim=-1)
            q_BjQ = torch.cat([q_BjQ, ones[..., None]], dim=-1)
        batch, rows, channels, _ = t_BiCQ.shape
        left, right = t_BiCQ.flatten(1, 2), q_BjQ.transpose(1, 2)
        if z_BiCj is None:
            return torch.bmm(left, right).view(batch, rows, channels, -1)
        return torch.baddbmm(z_BiCj.flatten(1, 2).to(left.dtype), left, right).view(batch, rows, channels, -1)


class OuterProductUpdate(PairProduct):
    """z_ij += W vec(A_i x Q_j) + b with A = a(LN m), Q = b(LN m): no mean and no division, row i from `a`.

    `pair_update` "hadamard" takes A_i * Q_j channel by channel, "low_rank" after a map of each to `opm_rank` channels.
    """

    def __init__(self, config: PairExpressionConfig) -> None:
        is_low_rank = config.pair_update == "low_rank"
        inner = config.opm_hidden_size
        # Factorized attention never sees a constant.
        super().__init__(
            config.opm_rank if is_low_rank else inner,
            config.pair_hidden_size,
            is_outer=config.pair_update == "outer_product",
            bias=config.pair_mode == "full",
        )
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.a = nn.Linear(config.hidden_size, inner)
        self.b = nn.Linear(config.hidden_size, inner)
        self.left = nn.Linear(inner, config.opm_rank, bias=False) if is_low_rank else None
        self.right = nn.Linear(inner, config.opm_rank, bias=False) if is_low_rank else None

    def factors(self, m_BrE: torch.Tensor, real_Br: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """A (B, i, P) and Q (B, j, Q), zero at padding."""
        x_BrE = self.norm(m_BrE)
        a_BiP, q_BjQ = self.a(x_BrE), self.b(x_BrE)
        if self.left is not None and self.right is not None:
            a_BiP, q_BjQ = self.left(a_BiP), self.right(q_BjQ)
        if real_Br is None:
            return a_BiP, q_BjQ
        return a_BiP * real_Br[..., None], q_BjQ * real_Br[..., None]

    def forward(
        self,
        z_BiCj: torch.Tensor | None,
        m_BrE: torch.Tensor,
        real_Br: torch.Tensor | None = None,
        groups_B: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The updated z; with groups (numbers from 0) every cell gets the mean update of its group."""
        a_BiP, q_BjQ = self.factors(m_BrE, real_Br)
        if groups_B is None:
            return self.add(z_BiCj, a_BiP, q_BjQ, real_Br)
        update = self.add(None, a_BiP, q_BjQ, real_Br)
        sums = torch.zeros_like(update).index_add(0, groups_B, update)
        sizes = torch.bincount(groups_B, minlength=len(groups_B)).clamp(min=1).to(update.dtype)
        mean = (sums / sizes[:, None, None, None])[groups_B]
        return mean if z_BiCj is None else z_BiCj + mean


class GenePairProduct(PairProduct):
    """z_ij = W (u(g_i) * v(g_j)): a pair from the two genes' vectors, of rank `pair_init_rank`."""

    def __init__(self, config: PairExpressionConfig) -> None:
        super().__init__(config.pair_init_rank, config.pair_hidden_size, is_outer=False, bias=False)
        self.u = nn.Linear(config.hidden_size, config.pair_init_rank, bias=False)
        self.v = nn.Linear(config.hidden_size, config.pair_init_rank, bias=False)

    def factors(self, genes_BrE: torch.Tensor, real_Br: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """u(g) (B, i, P) and v(g) (B, j, P), zero at padding."""
        real = 1 if real_Br is None else real_Br[..., None]
        return self.u(genes_BrE) * real, self.v(genes_BrE) * real


class FactorizedPairBias(nn.Module):
    """The bias of a z that is never made: more channels of queries and keys, exact where no norm reads z.

    z before block l is a sum of products over earlier blocks k, so w_h z_ij = sum_k (A^k M^kl_h)_i Q^k_j + a constant,
    which the softmax does not see.
    """

    def __init__(self, config: PairExpressionConfig) -> None:
        super().__init__()
        self.size = config.pair_hidden_size
        self.proj = nn.Linear(self.size, config.num_attention_heads, bias=False)

    def forward(
        self, sources: Sequence[PairProduct], factors: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What joins queries (B, H, r, D') and keys (B, 1, r, D'); `factors` are A and Q of each source in turn."""
        if not sources:
            return None
        heads_HC = effective_weight(self.proj, self.size)
        queries = [source.weighted(a, heads_HC) for source, a in zip(sources, factors[::2], strict=True)]
        return torch.cat(queries, dim=-1), torch.cat(list(factors[1::2]), dim=-1)[:, None]

    def of_prior(self, prior_BijK: torch.Tensor, weight_CK: torch.Tensor) -> torch.Tensor:
        """The additive bias (B, H, i, j) of prior channels that a map to z would have added."""
        weight_HK = effective_weight(self.proj, self.size) @ weight_CK
        return (prior_BijK.to(weight_HK.dtype) @ weight_HK.transpose(0, 1)).permute(0, 3, 1, 2)

    def nothing(self) -> torch.Tensor:
        """0 with gradients of 0, where there is no source yet."""
        return sum((parameter.sum() * 0 for parameter in self.parameters()), torch.zeros(()))  # type: ignore[return-value]


class PairTransition(nn.Module):
    """z += W2 relu(W1 LN z) (the Evoformer's pair transition), on (B, i, C, j)."""

    def __init__(self, config: PairExpressionConfig) -> None:
        super().__init__()
        size = config.pair_hidden_size
        self.norm = nn.LayerNorm(size, config.layer_norm_eps)
        self.up = nn.Linear(size, size * config.pair_transition_factor)
        self.down = nn.Linear(size * config.pair_transition_factor, size)

    def forward(self, z_BiCj: torch.Tensor, real_Br: torch.Tensor | None) -> torch.Tensor:
        update = self.down(torch.relu(self.up(self.norm(z_BiCj.transpose(2, 3))))).transpose(2, 3)
        return z_BiCj + (update if real_Br is None else update * real_pairs(real_Br))


def real_pairs(real_Br: torch.Tensor) -> torch.Tensor:
    """(B, i, 1, j) bool, True where both genes are real."""
    return (real_Br[:, :, None] & real_Br[:, None, :])[:, :, None]


class ScalarPairEmbedding(ContinuousValueEmbedding):
    """The value network at the width of z, on one number per pair; a zero becomes a constant that is not zero."""

    def __init__(self, config: PairExpressionConfig) -> None:
        super().__init__(config.pair_hidden_size, config.max_value, config.pair_dropout, config.layer_norm_eps)


class PairEmbedding(nn.Module):
    """z before the first block from the two genes, from prior channels, or from both; no edge adds exactly 0."""

    def __init__(self, config: PairExpressionConfig) -> None:
        super().__init__()
        self.gene = GenePairProduct(config) if "gene" in config.pair_init else None
        self.prior = None
        if "prior" in config.pair_init:
            self.prior = nn.Linear(config.prior_size, config.pair_hidden_size, bias=False)
        self.prior_size = config.prior_size
        self.dropout = nn.Dropout(config.pair_dropout)

    def prior_weight(self) -> torch.Tensor:
        """(C, K) of the map of prior channels."""
        assert self.prior is not None
        return effective_weight(self.prior, self.prior_size)

    def forward(
        self, genes_BrE: torch.Tensor, prior_BijK: torch.Tensor | None, real_Br: torch.Tensor | None
    ) -> torch.Tensor | None:
        z_BiCj = None
        if self.prior is not None and prior_BijK is not None:
            weight_CK = self.prior_weight()
            z_BiCj = torch.matmul(weight_CK, prior_BijK.transpose(2, 3).to(weight_CK.dtype))
            z_BiCj = z_BiCj if real_Br is None else z_BiCj * real_pairs(real_Br)
        if self.gene is not None:
            z_BiCj = self.gene.add(z_BiCj, *self.gene.factors(genes_BrE, real_Br), real_Br)
        return None if z_BiCj is None else self.dropout(z_BiCj)


def directed(forward_BijK: torch.Tensor, direction: str) -> torch.Tensor:
    """Prior channels as rows of z see them: of edges that leave the row's gene, reach it, or both (2K)."""
    if direction == "forward":
        return forward_BijK
    backward = forward_BijK.transpose(1, 2)
    return backward if direction == "backward" else torch.cat([forward_BijK, backward], dim=-1)


def check_pair_values(config: PairExpressionConfig, pair_values: torch.Tensor, genes: int) -> torch.Tensor:
    """`pair_values` as (B, i, j, channels): one for "scalar_mlp", `prior_channels` for "prior", C for "zeros".

    Raises:
        SequenceError: another shape, or a model whose z takes none.
    """
    number = {"zeros": config.pair_hidden_size, "scalar_mlp": 1}.get(config.pair_init, config.prior_channels)
    given = pair_values[..., None] if pair_values.dim() == 3 else pair_values
    if given.dim() != 4 or given.shape[1:3] != (genes, genes) or given.shape[-1] != number or not number:
        wanted = f"(cells, {genes}, {genes}, {number})" + (f" or (cells, {genes}, {genes})" if number == 1 else "")
        raise SequenceError(
            f"`pair_values` must be {wanted if number else 'left out'} with pair_init={config.pair_init!r}, got "
            f"{tuple(pair_values.shape)}; rows are queries, columns keys."
        )
    return given
