"""The layer of the SLiM Performer: linear attention and a feed-forward network, over a chunk or over everything.

Modules bear the names of the published code, so that its state dicts load without renaming.

Shapes: B batch, L tokens, C tokens of a chunk, H heads, D head size, M features, E hidden size.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from genesplice_hf.layers.feature_maps import (
    PROJECTED,
    key_features,
    orthogonal_projection,
    query_features,
    read_out_query,
)
from genesplice_hf.layers.linear_attention import (
    LinearState,
    attention_weights,
    bidirectional_attention,
    causal_attention,
    chunk_sums,
    working_dtype,
)
from genesplice_hf.layers.padding import zero_padding
from genesplice_hf.models.performer.configuration_performer import PerformerConfig


class PerformerAttention(nn.Module):
    """Linear attention with projections; features and sums are float32 at least, whatever the parameters are."""

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__()
        self.config = config
        self.q_map = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_map = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_map = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_map = nn.Linear(config.hidden_size, config.hidden_size) if config.output_projection else None
        if self.o_map is not None:
            self.o_map.feeds_residual = True  # initialised smaller
        features = None
        if config.feature_map in PROJECTED:
            # The published models draw directions for each head, performer-pytorch one set for all heads.
            heads = config.num_attention_heads if config.feature_map == "favor+" else 1
            features = torch.empty(heads, config.head_dim, config.num_features)
        self.register_buffer("features", features)

    def draw_features(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """New random directions in the shape of the buffer."""
        norms: Literal["sqrt", "gaussian"] = "sqrt" if self.config.feature_map == "favor+" else "gaussian"
        heads = self.features.shape[0]
        return orthogonal_projection(heads, self.config.head_dim, self.config.num_features, norms, generator)

    def sums(self, x_BLE: torch.Tensor, mask_BL: torch.Tensor | None) -> LinearState:
        """The sums over these tokens alone."""
        key_BLE, value_BLE = self.k_map(x_BLE), self.v_map(x_BLE)
        with _no_autocast(x_BLE):
            return chunk_sums(*self._key_value(key_BLE, value_BLE, mask_BL))

    def forward(
        self,
        x_BLE: torch.Tensor,
        mask_BL: torch.Tensor | None,
        state: LinearState | None,
        is_causal: bool,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, LinearState]:
        """Output (B, L, E), weights (B, H, L, L) on request, and the state that `PerformerLayer.forward` returns."""
        query_BLE = self.q_map(x_BLE)
        reads_keys = is_causal or state is None or output_attentions
        projections = (self.k_map(x_BLE), self.v_map(x_BLE)) if reads_keys else None
        with _no_autocast(x_BLE):
            query = query_features(self._heads(query_BLE), self.config.feature_map, self.features)
            key, value = (None, None) if projections is None else self._key_value(*projections, mask_BL)
            out_BHLD, weights, state = self._attend(query, key, value, state, is_causal, output_attentions)
            out_BLE = out_BHLD.transpose(1, 2).flatten(2).to(query_BLE.dtype)
        return out_BLE if self.o_map is None else self.o_map(out_BLE), weights, state

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        state: LinearState | None,
        is_causal: bool,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, LinearState]:
        eps = self.config.denominator_eps
        if is_causal:
            out, state = causal_attention(query, key, value, state, self.config.attention_block_size, eps)
        else:
            state = chunk_sums(key, value) if state is None else state
            query = read_out_query(query, state.denominator, self.config.feature_map)
            out = bidirectional_attention(query, state, eps)
        weights = attention_weights(query, key, is_causal, eps) if output_attentions else None
        return out, weights, state

    def _key_value(
        self, key_BLE: torch.Tensor, value_BLE: torch.Tensor, mask_BL: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        key = key_features(self._heads(key_BLE), config.feature_map, self.features, mask_BL, config.stabilizer)
        return key, self._heads(zero_padding(value_BLE, mask_BL))

    def _heads(self, x_BLE: torch.Tensor) -> torch.Tensor:
        x_BHLD = x_BLE.unflatten(-1, (self.config.num_attention_heads, -1)).transpose(1, 2)
        return x_BHLD.to(working_dtype(x_BLE))


class PerformerLayer(GradientCheckpointingLayer):
    """Attention and feed-forward network, each with a skip, a norm before it ("pre") or after it ("branch")."""

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__()
        self.is_pre_norm = config.norm_placement == "pre"
        self.attention = PerformerAttention(config)
        self.layernorm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layernorm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.U_map = nn.Linear(config.hidden_size, config.intermediate_size)
        self.V_map = nn.Linear(config.intermediate_size, config.hidden_size)
        self.V_map.feeds_residual = True  # initialised smaller
        self.activation = ACT2FN[config.hidden_act]
        self.attention_dropout = nn.Dropout(config.attention_dropout)
        self.hidden_dropout = nn.Dropout(config.hidden_dropout)

    def sums(self, x_BCE: torch.Tensor, mask_BC: torch.Tensor | None) -> LinearState:
        """The sums over these tokens alone; needs no state."""
        return self.attention.sums(self.layernorm1(x_BCE) if self.is_pre_norm else x_BCE, mask_BC)

    def forward(
        self,
        x_BCE: torch.Tensor,
        mask_BC: torch.Tensor | None,
        state: LinearState | None,
        is_causal: bool,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, LinearState]:
        """One layer over a chunk, or over everything.

        Args:
            mask_BC: bool, True = real; None = all real.
            state: causal: the sums before these tokens (None = there are none). Bidirectional: the sums over the
                whole sequence (None = these tokens are the whole sequence).
            is_causal: which of the two.

        Returns:
            (B, C, E), and the sums after these tokens (causal) or those that were read (bidirectional).
        """
        return self.run(x_BCE, mask_BC, state, is_causal, output_attentions)

    def run(
        self,
        x_BCE: torch.Tensor,
        mask_BC: torch.Tensor | None,
        state: LinearState | None,
        is_causal: bool,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, LinearState]:
        """`forward`, which gradient checkpointing does not wrap."""
        inputs = self.layernorm1(x_BCE) if self.is_pre_norm else x_BCE
        attended, _, state = self.attention(inputs, mask_BC, state, is_causal, output_attentions)
        attended = attended if self.is_pre_norm else self.layernorm1(attended)
        x_BCE = x_BCE + self.attention_dropout(attended)
        inputs = self.layernorm2(x_BCE) if self.is_pre_norm else x_BCE
        fed = self.V_map(self.activation(self.U_map(inputs)))
        fed = fed if self.is_pre_norm else self.layernorm2(fed)
        return x_BCE + self.hidden_dropout(fed), state


def _no_autocast(x: torch.Tensor) -> AbstractContextManager:
    """Sums, and the products that go into them, keep their precision inside autocast."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
