"""Enformer without a head: bases -> bins of 128 bases with 3,072 features each.

Shapes: B batch, L bases, n bins before the crop, T bins after it, E width of the transformer.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from genesplice_hf.errors import SequenceError
from genesplice_hf.layers.attention_pooling import AttentionPool2
from genesplice_hf.layers.base_channels import BaseChannels, FixedBaseChannels, demand_bases, window_mask
from genesplice_hf.layers.channels_last import norm_act, pointwise, quick_gelu
from genesplice_hf.layers.norm import FreezesBatchNorm
from genesplice_hf.layers.recording import demand_recordable
from genesplice_hf.layers.strict_loading import StrictPreTrainedModel
from genesplice_hf.models.enformer.configuration_enformer import EnformerConfig
from genesplice_hf.models.enformer.modeling_enformer_layer import (
    EnformerAttention,
    EnformerConvBlock,
    EnformerStem,
    EnformerTransformerLayer,
    Positions,
    batch_norm,
    demand_no_flash,
)

# Standard deviation of a standard normal cut off at two of its own.
_TRUNCATED_STD = 0.87962566103423978


class EnformerPreTrainedModel(FixedBaseChannels, FreezesBatchNorm, StrictPreTrainedModel):
    """Loading, initialisation and the declared abilities of every Enformer class."""

    config: EnformerConfig
    config_class = EnformerConfig
    base_model_prefix = "enformer"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EnformerStem", "EnformerConvBlock", "EnformerTransformerLayer"]
    _supports_sdpa = True
    # With rotary positions; a clear error otherwise.
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": EnformerTransformerLayer, "attentions": EnformerAttention}

    def post_init(self) -> None:
        super().post_init()
        demand_no_flash(self.config)
        if self.config.use_checkpointing:
            self.gradient_checkpointing_enable()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, AttentionPool2):
            init.zeros_(module.weight)
            init.eye_(module.weight)
            if not getattr(module.weight, "_is_hf_initialized", False):
                module.weight.mul_(module.INITIAL_GAIN)
        elif isinstance(module, (nn.Linear, nn.Conv1d)):
            _init_product(module, self.config.initializer)
        elif isinstance(module, EnformerAttention):
            _init_attention(module, self.config)
        else:
            super()._init_weights(module)


class EnformerModel(EnformerPreTrainedModel):
    """The trunk: convolutions and pooling, transformer, crop, final pointwise block."""

    def __init__(self, config: EnformerConfig) -> None:
        config.validate()
        super().__init__(config)
        widths = config.tower_widths
        self.embeddings = BaseChannels(config.pad_value)
        self.stem = EnformerStem(config)
        self.conv_tower = nn.ModuleList(
            EnformerConvBlock(config, width, out_width) for width, out_width in pairwise(widths)
        )
        self.layers = nn.ModuleList(EnformerTransformerLayer(config) for _ in range(config.depth))
        self.final = None if config.post_transformer else EnformerFinal(config)
        if self.final is None:
            # The whole trunk's checkpoint serves this one too.
            self._keys_to_ignore_on_load_unexpected = [r"^(enformer\.)?final\."]
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        target_length: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Runs the network on sequences of any length.

        Args:
            input_ids: (B, L) of any integer dtype: A, C, G, T = 0-3, N = 4 (zeros), 5 or -1 = `pad_value`.
            inputs_embeds: (B, L, 4) real-valued channels in their place; differentiable.
            attention_mask: (B, L), 0 = padding, which becomes `pad_value`. The published weights never saw a mask:
                the transformer's attention is not masked, so that padding is a part of the window and has an effect.
            target_length: bins of the centre to return, -1 = all; None = `config.target_length`. For this call only.

        Returns:
            `last_hidden_state` (B, T, 2E), or (B, T, E) with `post_transformer`; `hidden_states` the input of the
            transformer and what leaves every layer, (B, n, E), n = ceil(L / bin size) before the crop; `attentions`
            (B, H, n, n) with the eager implementation.

        Raises:
            SequenceError: both or none of ids and channels, another shape, an empty sequence, an id that stands for
                nothing, a mask with holes or a row of padding alone, fewer bins than `target_length`.
            ValueError: attentions are wanted of another implementation than eager; flash attention.
        """
        demand_bases(input_ids, inputs_embeds)
        demand_recordable(self.config, kwargs)
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        x = self.stem(self.embeddings.pad(x, window_mask(attention_mask, x)).to(self.stem.conv.weight.dtype))
        for block in self.conv_tower:
            x = block(x)
        positions = Positions.of(self.config, x)
        for layer in self.layers:
            x = layer(x, positions)
        x = crop_centre(x, self.config.target_length if target_length is None else target_length)
        return BaseModelOutput(x if self.final is None else self.final(x))


class EnformerFinal(nn.Module):
    """(B, T, E) -> (B, T, 2E): the block before the heads."""

    def __init__(self, config: EnformerConfig) -> None:
        super().__init__()
        self.hidden_act = config.hidden_act
        self.norm = batch_norm(config, config.dim)
        self.conv = nn.Linear(config.dim, 2 * config.dim)
        self.dropout = nn.Dropout(config.dropout_rate / 8)

    def forward(self, x_BTE: torch.Tensor) -> torch.Tensor:
        x = self.dropout(pointwise(self.conv, *norm_act(self.norm, x_BTE, self.hidden_act)))
        return quick_gelu(x) if self.hidden_act == "quick_gelu" else ACT2FN[self.hidden_act](x)


def crop_centre(x_BnE: torch.Tensor, length: int) -> torch.Tensor:
    """The `length` bins in the middle (of an odd number too many, one more is cut from the end); -1 = all.

    Raises:
        SequenceError: there are fewer.
    """
    num_bins = x_BnE.shape[1]
    if length == -1:
        return x_BnE
    if not 0 < length <= num_bins:
        raise SequenceError(
            f"`target_length` ({length}) must be -1 (all) or 1 to {num_bins}, the bins of this sequence; pass a "
            "longer sequence, or `target_length=-1` in this call."
        )
    start = (num_bins - length) // 2
    return x_BnE[:, start : start + length]


def _init_product(module: nn.Linear | nn.Conv1d, initializer: str) -> None:
    """TensorFlow (Sonnet): truncated normal of 1/sqrt(fan-in), bias 0; torch: uniform up to 1/sqrt(fan-in)."""
    bound = 1 / math.sqrt(module.weight[0].numel())
    if initializer == "torch":
        init.uniform_(module.weight, -bound, bound)
    else:
        init.trunc_normal_(module.weight, std=bound, a=-2 * bound, b=2 * bound)
    if module.bias is None:
        return
    if initializer == "torch":
        init.uniform_(module.bias, -bound, bound)
    else:
        init.zeros_(module.bias)


def _init_attention(module: EnformerAttention, config: EnformerConfig) -> None:
    """Variance 2 / fan-in of queries, keys, values and positional biases, and an output that starts at 0."""
    if config.initializer == "torch":
        for bias in (getattr(module, name, None) for name in ("rel_content_bias", "rel_pos_bias")):
            if bias is not None:
                init.normal_(bias)
        return
    fans = [(tensor, config.heads) for tensor in module.parameters(recurse=False)]
    projections = [module.to_q, module.to_k, module.to_v, getattr(module, "to_rel_k", None)]
    fans += [(layer.weight, layer.weight.shape[1]) for layer in projections if layer is not None]
    for tensor, fan_in in fans:
        std = math.sqrt(2 / fan_in) / _TRUNCATED_STD
        init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)
    init.zeros_(module.to_out.weight)
    init.zeros_(module.to_out.bias)
