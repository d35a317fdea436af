"""DNABERT-2 without a head: a MosaicBERT.

    x = norm(word(ids) + type(token_type_ids));  each layer: norm(x + attention(x)), then norm(x + mlp(x))
    attention: softmax(q k^T / sqrt(D) - m_h |i - j|) v with (q, k, v) = Wqkv x;  mlp: wo (gelu(g) * u), (g, u) = W x

(Zhou et al., DNABERT-2, ICLR 2024, arXiv 2306.15006; Portes et al., MosaicBERT, arXiv 2312.17482; ALiBi: Press et
al., arXiv 2108.12409.)

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

from genesplice_hf.layers.alibi_attention import AlibiContext, alibi_attention
from genesplice_hf.layers.attention import eager_attention
from genesplice_hf.layers.padding import demand_one_input, real_positions
from genesplice_hf.layers.recording import demand_recordable
from genesplice_hf.layers.strict_loading import StrictPreTrainedModel
from genesplice_hf.models.dnabert2.configuration_dnabert2 import DNABERT2Config


class DNABERT2Attention(nn.Module):
    """Self-attention over all tokens, (B, L, E) -> (B, L, E) and weights (B, H, L, L) or None."""

    def __init__(self, config: DNABERT2Config) -> None:
        super().__init__()
        self.config = config
        self.is_causal = False
        self.num_key_value_groups = 1
        # Rows in the order q, k, v; heads inside each.
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_BLE: torch.Tensor, context: AlibiContext) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = (3, self.config.num_attention_heads, self.config.head_dim)
        query, key, value = self.Wqkv(x_BLE).unflatten(-1, heads).permute(2, 0, 3, 1, 4).unbind(0)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        scaling = self.config.head_dim**-0.5
        out_BLHD, weights = alibi_attention(function, self, query, key, value, context, scaling, dropout)
        return self.output(out_BLHD.flatten(2)), weights


class DNABERT2GatedMLP(nn.Module):
    """wo (gelu(g) * u), where g is the first half of the gated layers' output and u the second; no bias before wo."""

    def __init__(self, config: DNABERT2Config) -> None:
        super().__init__()
        self.gated_layers = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.wo = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_BLE: torch.Tensor) -> torch.Tensor:
        gate_BLF, up_BLF = self.gated_layers(x_BLE).chunk(2, dim=-1)
        return self.wo(self.dropout(nn.functional.gelu(gate_BLF) * up_BLF))


class DNABERT2Layer(GradientCheckpointingLayer):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: DNABERT2Config) -> None:
        super().__init__()
        self.attention = DNABERT2Attention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = DNABERT2GatedMLP(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x_BLE: torch.Tensor, context: AlibiContext) -> torch.Tensor:
        x_BLE = self.attention_norm(x_BLE + self.dropout(self.attention(x_BLE, context)[0]))
        return self.mlp_norm(x_BLE + self.mlp(x_BLE))


class DNABERT2PreTrainedModel(StrictPreTrainedModel):
    """Loading, initialisation and the declared abilities of every DNABERT-2 class."""

    config: DNABERT2Config
    config_class = DNABERT2Config
    base_model_prefix = "dnabert2"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DNABERT2Layer"]
    # Not flash attention, which takes no bias in transformers.
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": DNABERT2Layer, "attentions": DNABERT2Attention}


class DNABERT2Model(DNABERT2PreTrainedModel):
    """Encoder without a head."""

    def __init__(self, config: DNABERT2Config) -> None:
        config.validate()
        super().__init__(config)
        # No `padding_idx`: the mask hides the padding, and a token whose id happens to be the config's is trained.
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.embedding_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(DNABERT2Layer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Runs the network on sequences of any length.

        Args:
            input_ids: (B, L) token ids, `[CLS]` first and `[SEP]` last.
            attention_mask: (B, L), 1 = real; real positions are contiguous. None = all real.
            inputs_embeds: (B, L, E) in place of the word embeddings.
            token_type_ids: (B, L) segment of each token; None = all 0.

        Returns:
            `last_hidden_state` (B, L, E); `hidden_states` the normalised embeddings and what leaves every layer,
            `attentions` (B, H, L, L) with the eager implementation. What stands at padding has no meaning.

        Raises:
            SequenceError: both or none of ids and embeddings, an empty sequence, a mask with holes.
            ValueError: attentions are wanted of another implementation than eager; flash attention.
        """
        demand_one_input(input_ids, inputs_embeds)
        output_attentions = demand_recordable(self.config, kwargs)
        mask = real_positions(attention_mask)
        x_BLE = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            token_type_ids = torch.zeros(x_BLE.shape[:2], dtype=torch.long, device=x_BLE.device)
        x_BLE = self.dropout(self.embedding_norm(x_BLE + self.token_type_embeddings(token_type_ids)))
        context = AlibiContext.of(self.config, x_BLE, mask, output_attentions)
        for layer in self.layers:
            x_BLE = layer(x_BLE, context)
        return BaseModelOutput(x_BLE)
