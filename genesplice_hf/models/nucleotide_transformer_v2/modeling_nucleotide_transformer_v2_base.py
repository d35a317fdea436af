"""The Nucleotide Transformer v2 without a head.

    x = embedding(ids);  each layer: x + attention(norm(x)), then x + ffn(norm(x));  final norm
    attention: rotary queries and keys;  ffn: W_out (silu(g) * u) with (g, u) = W_in x

(Dalla-Torre et al., Nucleotide Transformer, Nature Methods 2024, section "Nucleotide Transformer v2"; the ESM layout
of Lin et al. 2023.)

Shapes: B batch, L tokens, H heads, D head size, E hidden size, F intermediate size.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from genesplice_hf.errors import SequenceError
from genesplice_hf.layers.attention import eager_attention, full_attention_mask
from genesplice_hf.layers.padding import demand_one_input, real_positions, zero_padding
from genesplice_hf.layers.recording import demand_recordable
from genesplice_hf.layers.rotary import rotary_table, rotate
from genesplice_hf.layers.strict_loading import StrictPreTrainedModel
from genesplice_hf.models.nucleotide_transformer_v2.configuration_nucleotide_transformer_v2 import (
    NucleotideTransformerV2Config,
)

# Share of masked tokens in pre-training: 15 % are asked, 80 % of those are masked.
_MASKED_IN_TRAINING = 0.15 * 0.8


class NucleotideTransformerV2Attention(nn.Module):
    """Self-attention over all tokens, (B, L, E) -> (B, L, E) and weights (B, H, L, L) or None."""

    def __init__(self, config: NucleotideTransformerV2Config) -> None:
        super().__init__()
        self.config = config  # names the attention implementation
        self.is_causal = False
        self.num_key_value_groups = 1
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, x_BLE: torch.Tensor, mask: Any, table: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key = (rotate(self._heads(project(x_BLE)), table) for project in (self.query, self.key))
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        scaling = self.config.head_dim**-0.5
        value = self._heads(self.value(x_BLE))
        out_BLHD, weights = function(self, query, key, value, mask, scaling=scaling, dropout=dropout)
        return self.output(out_BLHD.flatten(2)), weights

    def _heads(self, x_BLE: torch.Tensor) -> torch.Tensor:
        return x_BLE.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)


class GatedFeedForward(nn.Module):
    """W_out (silu(g) * u), where g is the first half of W_in x and u the second."""

    def __init__(self, config: NucleotideTransformerV2Config) -> None:
        super().__init__()
        self.input = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.add_bias_ffn)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.add_bias_ffn)

    def forward(self, x_BLE: torch.Tensor) -> torch.Tensor:
        gate_BLF, up_BLF = self.input(x_BLE).chunk(2, dim=-1)
        return self.output(nn.functional.silu(gate_BLF) * up_BLF)


class NucleotideTransformerV2Layer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: NucleotideTransformerV2Config) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = NucleotideTransformerV2Attention(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.feed_forward = GatedFeedForward(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x_BLE: torch.Tensor, mask: Any, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x_BLE = x_BLE + self.dropout(self.attention(self.attention_norm(x_BLE), mask, table)[0])
        return x_BLE + self.dropout(self.feed_forward(self.feed_forward_norm(x_BLE)))


class NucleotideTransformerV2PreTrainedModel(StrictPreTrainedModel):
    """Loading, initialisation and the declared abilities of every Nucleotide Transformer v2 class."""

    config: NucleotideTransformerV2Config
    config_class = NucleotideTransformerV2Config
    base_model_prefix = "nucleotide_transformer_v2"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NucleotideTransformerV2Layer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": NucleotideTransformerV2Layer,
        "attentions": NucleotideTransformerV2Attention,
    }


class NucleotideTransformerV2Model(NucleotideTransformerV2PreTrainedModel):
    """Encoder without a head."""

    def __init__(self, config: NucleotideTransformerV2Config) -> None:
        config.validate()
        super().__init__(config)
        # No `padding_idx`: the mask hides the padding.
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_norm = (
            nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if config.emb_layer_norm_before else None
        )
        self.layers = nn.ModuleList(NucleotideTransformerV2Layer(config) for _ in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Runs the network.

        Args:
            input_ids: (B, L) token ids, `<cls>` first.
            attention_mask: (B, L), 1 = real; real positions are contiguous. None = all real.
            inputs_embeds: (B, L, E) instead of `input_ids`; token dropout is skipped then.

        Returns:
            `last_hidden_state` (B, L, E) after the final norm; `hidden_states` the input of every layer and then the
            last state, `attentions` (B, H, L, L) with the eager implementation.

        Raises:
            SequenceError: both or none of ids and embeddings, an empty sequence, one longer than
                `config.max_tokens`, a mask with holes.
            ValueError: attentions are wanted of another implementation than eager.
        """
        demand_one_input(input_ids, inputs_embeds)
        demand_recordable(self.config, kwargs)
        mask = real_positions(attention_mask)
        x_BLE = self._embed(input_ids, mask) if inputs_embeds is None else inputs_embeds
        self._demand_length(x_BLE.shape[1])
        if self.embedding_norm is not None:
            x_BLE = self.embedding_norm(x_BLE)
        x_BLE = zero_padding(x_BLE, mask)
        attention = full_attention_mask(self.config, x_BLE, mask, past=0)
        table = self._rotary_table(x_BLE)
        for layer in self.layers:
            x_BLE = layer(x_BLE, attention, table)
        return BaseModelOutput(self.final_norm(x_BLE))

    def _embed(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        x_BLE = self.embeddings(input_ids)
        if not self.config.token_dropout:
            return x_BLE
        masked = input_ids == self.config.mask_token_id
        counted = masked if mask is None else masked & mask
        length = input_ids.shape[1] if mask is None else mask.sum(1, keepdim=True)
        share = counted.sum(1, keepdim=True) / length
        scale = ((1 - _MASKED_IN_TRAINING) / (1 - share)).to(x_BLE.dtype)
        return x_BLE.masked_fill(masked[..., None], 0.0) * scale[..., None]

    def _rotary_table(self, x_BLE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Made anew in every call: what a first call under `inference_mode` would keep has no backward pass.
        working = torch.promote_types(x_BLE.dtype, torch.float32)
        return rotary_table(x_BLE.shape[1], self.config.head_dim, self.config.rope_theta, 0, x_BLE.device, working)

    def _demand_length(self, num_tokens: int) -> None:
        limit, k = self.config.max_tokens, self.config.bases_per_token
        if num_tokens <= limit:
            return
        in_bases = "" if k is None else f" (`<cls>` and {(limit - 1) * k:,} bases as {k}-mers)"
        raise SequenceError(
            f"`input_ids` hold {num_tokens:,} tokens, this model reads {limit:,}{in_bases}; cut the sequence into "
            "windows, or raise `max_position_embeddings` in the config (untested lengths)."
        )
