"""The blocks of Enformer: convolution blocks that halve the length, and transformer layers over bins.

(Avsec et al., Effective gene expression prediction from sequence by integrating long-range interactions, Nature
Methods 2021, extended data figure 1.)

Shapes: B batch, L positions, C channels, n bins, E width of the transformer, H heads, K key size, D value size.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.integrations.flex_attention import compile_friendly_flex_attention
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from genesplice_hf.layers.attention import AttentionFunction, eager_attention
from genesplice_hf.layers.attention_pooling import AttentionPool2
from genesplice_hf.layers.channels_last import BatchNorm, add_pointwise, conv, conv_from_bases, norm_act
from genesplice_hf.layers.relative_position import relative_basis, relative_shift
from genesplice_hf.layers.rotary import rotary_table, rotate
from genesplice_hf.models.enformer.configuration_enformer import EnformerConfig


def batch_norm(config: EnformerConfig, num_channels: int) -> BatchNorm:
    return BatchNorm(num_channels, config.batch_norm_eps, config.batch_norm_momentum, config.sync_batch_norm)


class EnformerStem(GradientCheckpointingLayer):
    """Bases (B, L, 4) -> (B, ceil(L / 2), C): wide convolution, pointwise block with a skip, pooling."""

    def __init__(self, config: EnformerConfig) -> None:
        super().__init__()
        width = config.tower_widths[0]
        self.hidden_act = config.hidden_act
        self.conv = nn.Conv1d(4, width, 15, padding=7)
        self.norm = batch_norm(config, width)
        self.pointwise = nn.Linear(width, width)
        self.pool = AttentionPool2(width)

    def forward(self, x_BLC: torch.Tensor) -> torch.Tensor:
        x_BLC = conv_from_bases(self.conv, x_BLC)
        activated, factor = norm_act(self.norm, x_BLC, self.hidden_act)
        return self.pool(*add_pointwise(x_BLC, self.pointwise, activated, factor))


class EnformerConvBlock(GradientCheckpointingLayer):
    """(B, L, C) -> (B, ceil(L / 2), C'): convolution block, pointwise block with a skip, pooling."""

    def __init__(self, config: EnformerConfig, width: int, out_width: int) -> None:
        super().__init__()
        self.hidden_act = config.hidden_act
        self.norm1 = batch_norm(config, width)
        self.conv = nn.Conv1d(width, out_width, 5, padding=2)
        self.norm2 = batch_norm(config, out_width)
        self.pointwise = nn.Linear(out_width, out_width)
        self.pool = AttentionPool2(out_width)

    def forward(self, x_BLC: torch.Tensor) -> torch.Tensor:
        x_BLC = conv(self.conv, *norm_act(self.norm1, x_BLC, self.hidden_act))
        activated, factor = norm_act(self.norm2, x_BLC, self.hidden_act)
        return self.pool(*add_pointwise(x_BLC, self.pointwise, activated, factor))


class Positions(NamedTuple):
    """What the layers of one forward pass know of positions: the basis (2n - 1, D), or cosine and sine (n, K)."""

    basis: torch.Tensor | None
    rotary: tuple[torch.Tensor, torch.Tensor] | None

    @classmethod
    def of(cls, config: EnformerConfig, x_BnE: torch.Tensor) -> "Positions":
        num_bins, device, dtype = x_BnE.shape[1], x_BnE.device, x_BnE.dtype
        if config.position_embedding_type == "rope":
            return cls(None, rotary_table(num_bins, config.attn_dim_key, config.rope_theta, 0, device, dtype))
        size = config.dim // config.heads
        return cls(relative_basis(num_bins, size, config.gamma_normalization, dtype, device), None)


class EnformerAttention(nn.Module):
    """Attention of all bins to all bins, (B, n, E) -> (B, n, E) and weights (B, H, n, n) or None.

    logits[i, j] = (q_i + u) . k_j + (q_i + w) . r_(j - i), where r is a projection of the positional basis and q is
    scaled before the biases u and w are added.
    """

    def __init__(self, config: EnformerConfig) -> None:
        super().__init__()
        self.config = config
        self.is_causal = False
        self.num_key_value_groups = 1
        inner, size = config.heads * config.attn_dim_key, config.dim // config.heads
        self.to_q = nn.Linear(config.dim, inner, bias=False)
        self.to_k = nn.Linear(config.dim, inner, bias=False)
        self.to_v = nn.Linear(config.dim, config.dim, bias=False)
        self.to_out = nn.Linear(config.dim, config.dim)
        if config.position_embedding_type == "relative":
            self.to_rel_k = nn.Linear(size, inner, bias=False)
            self.rel_content_bias = nn.Parameter(torch.zeros(1, config.heads, 1, config.attn_dim_key))
            self.rel_pos_bias = nn.Parameter(torch.zeros(1, config.heads, 1, config.attn_dim_key))
        self.pos_dropout = nn.Dropout(config.pos_dropout)
        self._rel_k: tuple[tuple, torch.Tensor] | None = None

    def forward(self, x_BnE: torch.Tensor, positions: Positions) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = (self._heads(project(x_BnE)) for project in (self.to_q, self.to_k, self.to_v))
        dropout = self.config.attn_dropout if self.training else 0.0
        scaling = self.config.attn_dim_key**-0.5
        if positions.rotary is not None:
            query, key = rotate(query, positions.rotary), rotate(key, positions.rotary)
            function = _function(self.config, query)
            out, weights = function(self, query, key, value, None, scaling=scaling, dropout=dropout)
        else:
            out, weights = self._relative(query * scaling, key, value, positions, dropout)
        return self.to_out(out.flatten(2)), weights

    def _relative(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: Positions, dropout: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rel_k = self._relative_keys(positions).unflatten(-1, (self.config.heads, -1)).permute(1, 2, 0)
        bias = relative_shift((query + self.rel_pos_bias) @ rel_k.to(query.dtype))
        function = _biased_function(self.config, query)
        return function(self, query + self.rel_content_bias, key, value, bias, scaling=1.0, dropout=dropout)

    def _relative_keys(self, positions: Positions) -> torch.Tensor:
        """(2n - 1, H K); kept between calls in evaluation, as long as the weight and the table are the same."""
        basis = positions.basis
        assert basis is not None
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.to_rel_k(self.pos_dropout(basis))
        weight = self.to_rel_k.weight
        # Adapters put another module here, whose own weights would not be seen.
        if type(self.to_rel_k) is not nn.Linear or weight.is_inference():
            return self.to_rel_k(basis)
        of_weight = (weight.data_ptr(), weight._version, weight.dtype, weight.device)
        state = (*of_weight, tuple(basis.shape), basis.dtype, torch.is_autocast_enabled(weight.device.type))
        if self._rel_k is None or self._rel_k[0] != state:
            self._rel_k = state, self.to_rel_k(basis)
        return self._rel_k[1]

    def train(self, mode: bool = True) -> "EnformerAttention":
        self._rel_k = None
        return super().train(mode)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)


class EnformerTransformerLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); dropout stands before the ReLU."""

    def __init__(self, config: EnformerConfig) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(config.dim, config.layer_norm_eps)
        self.attn = EnformerAttention(config)
        self.ffn_norm = nn.LayerNorm(config.dim, config.layer_norm_eps)
        self.fc1 = nn.Linear(config.dim, 2 * config.dim)
        self.fc2 = nn.Linear(2 * config.dim, config.dim)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x_BnE: torch.Tensor, positions: Positions) -> torch.Tensor:
        x_BnE = x_BnE + self.dropout(self.attn(self.attn_norm(x_BnE), positions)[0])
        inner = self.dropout(self.fc1(self.ffn_norm(x_BnE))).relu()
        return x_BnE + self.dropout(self.fc2(inner))


def demand_no_flash(config: EnformerConfig) -> None:
    """Raises where flash attention is asked for and cannot compute what the config describes."""
    name = config._attn_implementation or ""
    if "flash" not in name:
        return
    if config.position_embedding_type == "relative":
        raise ValueError(
            f'`attn_implementation="{name}"` takes no positional bias, which Enformer adds; use "sdpa", '
            '"flex_attention" or "eager". A model trained from scratch may have `position_embedding_type="rope"`.'
        )
    if config.attn_dim_key != config.dim // config.heads:
        raise ValueError(
            f'`attn_implementation="{name}"` needs keys as wide as values: set `attn_dim_key` to `dim` / `heads` '
            f"({config.dim // config.heads}), it is {config.attn_dim_key}."
        )


def _function(config: EnformerConfig, query: torch.Tensor) -> AttentionFunction:
    demand_no_flash(config)
    return ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention)


def _biased_function(config: EnformerConfig, query: torch.Tensor) -> AttentionFunction:
    """The implementation for attention with a bias.

    On a CPU `sdpa` stands for the plain products as well: with a bias, and keys and values of different widths, torch
    has no fast kernel there and is slower than they are.
    """
    demand_no_flash(config)
    name = config._attn_implementation
    if name == "flex_attention":
        return _flex_with_bias
    if name == "sdpa" and query.device.type == "cpu":
        return _eager_with_bias
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, _eager_with_bias)


def _eager_with_bias(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias_BHnn: torch.Tensor,
    scaling: float = 1.0,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T + bias) v; the bias may be a view, for the product is added while it is copied."""
    batch, heads = query.shape[:2]
    logits = torch.baddbmm(
        bias_BHnn.flatten(0, 1), query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), alpha=scaling
    )
    weights = logits.softmax(dim=-1).to(value.dtype).unflatten(0, (batch, heads))
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def _flex_with_bias(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias_BHnn: torch.Tensor,
    scaling: float = 1.0,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Flex attention, whose kernel reads the bias where it lies."""
    if dropout > 0:
        raise ValueError(
            "`attn_dropout` must be 0 to train with flex_attention, which has no dropout; set it to 0 or use sdpa."
        )

    def add_bias(score: Any, row: Any, head: Any, i: Any, j: Any) -> Any:
        return score + bias_BHnn[row, head, i, j]

    out = compile_friendly_flex_attention(query, key, value, module.training, score_mod=add_bias, scale=scaling)
    return out.transpose(1, 2).contiguous(), None
