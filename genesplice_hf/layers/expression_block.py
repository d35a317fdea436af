"""The one transformer block of all expression models, with switches for a pair representation.

norm_first:     m += drop(Attn(LN m, bias));  m += drop(MLP(LN m))
otherwise:      m = LN(m + drop(Attn(m, bias)));  m = LN(m + drop(MLP(m)))
with `use_opm`: z += OPM(m), where something reads z afterwards

Shapes: B cells, r genes of a cell, i queries and j keys, H heads, D head size, E hidden size, C channels of z.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.flex_attention import compile_friendly_flex_attention
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from genesplice_hf.layers.alibi import biased_mask
from genesplice_hf.layers.attention import eager_attention, full_attention_mask, open_empty_rows
from genesplice_hf.layers.expression_config import ExpressionConfig
from genesplice_hf.layers.pair_bias import (
    FactorizedPairBias,
    OuterProductUpdate,
    PairBias,
    PairEmbedding,
    PairProduct,
    PairTransition,
)

# The widest head of FlashAttention-2.
_FLASH_WIDTH = 256
Extra = tuple[torch.Tensor, torch.Tensor]
Terms = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
_NO_TERMS: Terms = (None, None, None)


@dataclass(frozen=True)
class ExpressionContext:
    """What all blocks share in one forward pass.

    Attributes:
        real: (B, r) bool, True = a gene; None = all are.
        visible: (B, 1, 1 or r, r) bool, which key a query sees, rows without a key opened; None = all.
        has_key: (B, 1, 1 or r, 1) bool, False where a query saw no key and gets zeros; None = all see one.
        mask: what the attention implementation takes where nothing is added to the logits.
        shared_bias: (B or 1, H or 1, i, j) added to the logits of every block; None = nothing.
        prior: (B, i, j, K) channels that factorized attention adds; None elsewhere.
        prior_weight: (C, K) of the map from them to z.
        groups: (B,) number of each cell's group; None = no groups.
    """

    real: torch.Tensor | None = None
    visible: torch.Tensor | None = None
    has_key: torch.Tensor | None = None
    mask: Any = None
    shared_bias: torch.Tensor | None = None
    prior: torch.Tensor | None = None
    prior_weight: torch.Tensor | None = None
    groups: torch.Tensor | None = None

    @property
    def terms(self) -> Terms:
        """What may need gradients: `shared_bias`, `prior` and `prior_weight`."""
        return self.shared_bias, self.prior, self.prior_weight

    def with_terms(self, terms: Terms) -> "ExpressionContext":
        """The same with other `terms`."""
        return ExpressionContext(self.real, self.visible, self.has_key, self.mask, *terms, self.groups)

    def additive(self, bias: torch.Tensor) -> torch.Tensor:
        """A bias (B or 1, H, i, j) with -inf at keys that cannot be seen."""
        return bias if self.visible is None else biased_mask(self.visible, bias)


def expression_context(
    config: ExpressionConfig,
    x_BrE: torch.Tensor,
    real_Br: torch.Tensor,
    generated_Br: torch.Tensor | None = None,
    visible_Bij: torch.Tensor | None = None,
    shared_bias: torch.Tensor | None = None,
    **pair: torch.Tensor | None,
) -> ExpressionContext:
    """The context of one batch.

    Args:
        real_Br: bool, True = a gene.
        generated_Br: bool; a generated gene is seen by itself alone, and sees itself and the genes that are given
            (scGPT's generative training).
        visible_Bij: bool (B, r, r), a further restriction (genes that are neighbours in a graph).
        shared_bias: added to the logits of every block.
        **pair: `prior`, `prior_weight` and `groups` of the context.

    Raises:
        ValueError: an implementation that cannot add what has to be added.
    """
    demand_additive(config, shared_bias is not None or generated_Br is not None or visible_Bij is not None)
    real = None if not torch.compiler.is_compiling() and bool(real_Br.all()) else real_Br
    visible = None if real is None else real[:, None, None, :]
    if generated_Br is not None:
        itself = torch.eye(real_Br.shape[1], dtype=torch.bool, device=real_Br.device)
        given = (real_Br & ~generated_Br)[:, None, None, :] | (itself & real_Br[:, None, None, :])
        visible = given
    if visible_Bij is not None:
        visible = visible_Bij[:, None] if visible is None else visible & visible_Bij[:, None]
    opened, has_key = (None, None) if visible is None else open_empty_rows(visible)
    mask: Any = opened
    if generated_Br is None and visible_Bij is None:
        mask = full_attention_mask(config, x_BrE, real, 0)
    return ExpressionContext(real, opened, has_key, mask, shared_bias, **pair)


def demand_additive(config: ExpressionConfig, has_more: bool = False) -> None:
    """Raises where flash attention is asked for and has to add something, or has heads that are too wide.

    Raises:
        ValueError: it cannot run; says why.
    """
    name = config._attn_implementation or ""
    if "flash" not in name:
        return
    if has_more or getattr(config, "has_additive_bias", False):
        raise ValueError(
            f'`attn_implementation="{name}"` adds nothing to attention logits, and this model has to '
            f"(use_pair_bias={config.use_pair_bias}, pair_mode={config.pair_mode!r}, "
            f"pair_init={getattr(config, 'pair_init', None)!r}); use \"sdpa\", or pair_mode='factorized' without a "
            "prior."
        )
    width = getattr(config, "largest_head_dim", config.head_dim)
    if width > _FLASH_WIDTH:
        raise ValueError(
            f'`attn_implementation="{name}"` has heads of at most {_FLASH_WIDTH}, and the last block needs {width} '
            f'(`num_hidden_layers` {config.num_hidden_layers}); use "sdpa".'
        )


class ExpressionAttention(nn.Module):
    """Attention over the genes of a cell; a tensor may be added to its logits, and channels to queries and keys."""

    def __init__(self, config: ExpressionConfig) -> None:
        super().__init__()
        self.config = config  # names the attention implementation
        self.is_causal = False
        self.num_key_value_groups = 1
        self.head_dim, self.scaling = config.head_dim, config.attention_scale
        size, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(size, inner, bias=config.attention_bias)
        self.k_proj = nn.Linear(size, inner, bias=config.attention_bias)
        self.v_proj = nn.Linear(size, inner, bias=config.attention_bias)
        self.out_proj = nn.Linear(inner, size)
        self.gate_proj = nn.Linear(size, inner) if config.use_gating else None

    def forward(
        self,
        x_BrE: torch.Tensor,
        context: ExpressionContext,
        bias_BHij: torch.Tensor | None = None,
        extra: Extra | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output (B, r, E) and weights (B, H, i, j) or None.

        Args:
            bias_BHij: added to the logits. extra: channels (B, H, r, D') that join queries (already scaled) and keys.
        """
        heads = (*x_BrE.shape[:2], -1, self.head_dim)
        query, key, value = (
            project(x_BrE).view(heads).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        scaling = self.scaling
        if extra is not None:
            more_keys = extra[1].expand(-1, key.shape[1], -1, -1)
            query = torch.cat([query * scaling, extra[0].to(query.dtype)], dim=-1)
            key, scaling = torch.cat([key, more_keys.to(key.dtype)], dim=-1), 1.0
            # Fused kernels want equal widths.
            value = nn.functional.pad(value, (0, query.shape[-1] - self.head_dim))
        bias = _sum(bias_BHij, context.shared_bias)
        out_BrHD, weights = self._attend(query, key, value, context, bias, scaling)
        if context.has_key is not None:
            out_BrHD = out_BrHD * context.has_key.transpose(1, 2).to(out_BrHD.dtype)
        out = out_BrHD[..., : self.head_dim].flatten(2)
        if self.gate_proj is not None:
            out = self.gate_proj(x_BrE).sigmoid() * out
        return self.out_proj(out), weights

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: ExpressionContext,
        bias: torch.Tensor | None,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        name = self.config._attn_implementation
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        mask = context.mask if bias is None else context.additive(bias.to(query.dtype))
        if name == "flex_attention" and isinstance(mask, torch.Tensor):
            return _flex(query, key, value, mask, scaling, dropout, self.training), None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)
        return attend(self, query, key, value, mask, scaling=scaling, dropout=dropout)


def _sum(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    dropout: float,
    training: bool,
) -> torch.Tensor:
    """Flex attention with a dense mask (B or 1, H or 1, 1 or i, j), bool or additive; (B, i, H, D)."""
    if dropout:
        raise ValueError('`flex_attention` has no dropout of attention weights; set it to 0, or use "sdpa".')
    dense = mask.expand(len(query), query.shape[1], query.shape[2], key.shape[2])

    def score(
        logit: torch.Tensor, cell: torch.Tensor, head: torch.Tensor, i: torch.Tensor, j: torch.Tensor
    ) -> torch.Tensor:
        found = dense[cell, head, i, j]
        return torch.where(found, logit, float("-inf")) if found.dtype == torch.bool else logit + found

    out = compile_friendly_flex_attention(query, key, value, training=training, score_mod=score, scale=scaling)
    return out.transpose(1, 2)


class ExpressionMLP(nn.Module):
    """down(drop(act(up x)))."""

    def __init__(self, config: ExpressionConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.dropout(self.activation(self.up(x))))


class ExpressionBlock(GradientCheckpointingLayer):
    """Attention, a feed-forward network and, where asked for, the update of z; `layer` counts from 0."""

    def __init__(self, config: ExpressionConfig, layer: int) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.attention = ExpressionAttention(config)
        self.norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = ExpressionMLP(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.pair_bias: PairBias | FactorizedPairBias | None = None
        self.opm: OuterProductUpdate | None = None
        self.pair_transition: PairTransition | None = None
        self.is_factorized = config.pair_mode == "factorized"
        if hasattr(config, "pair_hidden_size"):
            self._add_pair_path(config, layer)

    def _add_pair_path(self, config: Any, layer: int) -> None:
        if config.use_pair_bias:
            self.pair_bias = FactorizedPairBias(config) if self.is_factorized else PairBias(config)
        if config.updates_pair(layer):
            self.opm = OuterProductUpdate(config)
            self.pair_transition = PairTransition(config) if config.pair_transition else None
        self.symmetrize = config.symmetrize_pair

    def forward(
        self,
        m_BrE: torch.Tensor,
        z_BiCj: torch.Tensor | None,
        context: ExpressionContext,
        *tensors: Any,
        sources: Sequence[PairProduct] = (),
    ) -> tuple[torch.Tensor | None, ...]:
        """The states, z (None where there is none), and in factorized mode the factors of this block's update.

        Args:
            tensors: the `terms` of the context, and in factorized mode A and Q of every source in turn. Reentrant
                checkpoints give gradients to tensors that are arguments, and to none that an argument holds.
            sources: the products that A and Q belong to.
        """
        factors: Sequence[torch.Tensor] = ()
        if tensors:
            shared_bias, prior, prior_weight, *factors = tensors
            context = context.with_terms((shared_bias, prior, prior_weight))
        bias, extra = self._pair_terms(z_BiCj, context, sources, factors)
        if self.norm_first:
            m_BrE = m_BrE + self.dropout(self.attention(self.norm1(m_BrE), context, bias, extra)[0])
            m_BrE = m_BrE + self.dropout(self.mlp(self.norm2(m_BrE)))
        else:
            m_BrE = self.norm1(m_BrE + self.dropout(self.attention(m_BrE, context, bias, extra)[0]))
            m_BrE = self.norm2(m_BrE + self.dropout(self.mlp(m_BrE)))
        if self.opm is None:
            return m_BrE, z_BiCj
        if self.is_factorized:
            return m_BrE, None, *self.opm.factors(m_BrE, context.real)
        return m_BrE, self._updated(z_BiCj, m_BrE, context)

    def _pair_terms(
        self,
        z_BiCj: torch.Tensor | None,
        context: ExpressionContext,
        sources: Sequence[PairProduct],
        factors: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor | None, Extra | None]:
        if isinstance(self.pair_bias, FactorizedPairBias):
            bias = None
            if context.prior is not None and context.prior_weight is not None:
                bias = self.pair_bias.of_prior(context.prior, context.prior_weight)
            return bias, self.pair_bias(sources, factors)
        if self.pair_bias is None or z_BiCj is None:
            return None, None
        return self.pair_bias(z_BiCj), None

    def _updated(self, z_BiCj: torch.Tensor | None, m_BrE: torch.Tensor, context: ExpressionContext) -> torch.Tensor:
        assert self.opm is not None
        z_BiCj = self.opm(z_BiCj, m_BrE, context.real, context.groups)
        if self.pair_transition is not None:
            z_BiCj = self.pair_transition(z_BiCj, context.real)
        return (z_BiCj + z_BiCj.transpose(1, 3)) / 2 if self.symmetrize else z_BiCj


class ExpressionEncoder(nn.Module):
    """All blocks, and the norm after the last one where the config has it."""

    def __init__(self, config: ExpressionConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(ExpressionBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if config.final_layer_norm else None
        self.is_factorized = config.pair_mode == "factorized"

    def forward(
        self,
        m_BrE: torch.Tensor,
        z_BiCj: torch.Tensor | None,
        context: ExpressionContext,
        pair_embedding: nn.Module | None = None,
        genes_BrE: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The states (B, r, E), and z (B, i, C, j) or None.

        Args:
            pair_embedding, genes_BrE: in factorized mode, what z would begin with, and the genes' vectors it reads.
        """
        sources: list[PairProduct] = []
        factors: list[torch.Tensor] = []
        m_BrE = m_BrE + self._idle(z_BiCj, pair_embedding)
        if self.is_factorized and isinstance(pair_embedding, PairEmbedding) and pair_embedding.gene is not None:
            assert genes_BrE is not None
            sources.append(pair_embedding.gene)
            factors += pair_embedding.gene.factors(genes_BrE, context.real)
        bare, terms = context.with_terms(_NO_TERMS), context.terms
        for block in self.layer:
            m_BrE, z_BiCj, *own = block(m_BrE, z_BiCj, bare, *terms, *factors, sources=tuple(sources))
            if own:
                sources.append(block.opm)
                factors += own
        return m_BrE if self.final_norm is None else self.final_norm(m_BrE), z_BiCj

    def _idle(self, z_BiCj: torch.Tensor | None, pair_embedding: nn.Module | None) -> torch.Tensor | float:
        """0 with gradients of 0 for the pair biases that read a z of zeros: only the first one, where z is updated."""
        if z_BiCj is not None or pair_embedding is not None:
            return 0.0
        idle = []
        for block in self.layer:
            if block.pair_bias is not None:
                idle.append(block.pair_bias.nothing())
            if block.opm is not None:
                break
        return sum(value.to(self.layer[0].norm1.weight.device) for value in idle) if idle else 0.0  # type: ignore[return-value]
