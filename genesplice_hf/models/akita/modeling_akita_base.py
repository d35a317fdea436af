"""The trunk of Akita: a window of DNA through pooled, then dilated convolutions, to one state per bin.

Fudenberg, Kelley and Pollard 2020, Predicting 3D genome folding from DNA sequence with Akita.

Shapes: B batch, L bases, M bins of `pool_factor` bases, E trunk width.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from genesplice_hf.layers.base_channels import BaseChannels, FixedBaseChannels, demand_bases, window_mask
from genesplice_hf.layers.strict_loading import StrictPreTrainedModel
from genesplice_hf.models.akita.configuration_akita import AkitaConfig
from genesplice_hf.models.akita.modeling_akita_layer import (
    AkitaConvBlock,
    AkitaDilatedBlock,
    AkitaDilatedBlock2d,
    AkitaTrunkBlock,
)

# Standard deviation of a standard normal cut off at two of its deviations.
_TRUNCATED_STD = 0.87962566103423978


class AkitaPreTrainedModel(FixedBaseChannels, StrictPreTrainedModel):
    """Loading, initialisation and the declared abilities of every Akita class."""

    config: AkitaConfig
    config_class = AkitaConfig
    base_model_prefix = "akita"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = [AkitaConvBlock.__name__, AkitaDilatedBlock.__name__, AkitaDilatedBlock2d.__name__]
    # There is no attention: convolutions are the same under either stock name.
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": AkitaTrunkBlock}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """He normal as in Keras (truncated at two deviations), norms at 1, those that end a residual branch at 0."""
        super()._init_weights(module)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            std = math.sqrt(2 / module.weight[0].numel()) / _TRUNCATED_STD
            init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            if module.bias is not None:
                init.zeros_(module.bias)
        if isinstance(module, _BatchNorm) and getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)


class AkitaModel(AkitaPreTrainedModel):
    """Akita's trunk, without the contact map."""

    def __init__(self, config: AkitaConfig) -> None:
        config.validate()
        super().__init__(config)
        widths = [config.stem_filters, *config.tower_filters]
        self.embeddings = BaseChannels(config.pad_value)
        self.stem = AkitaConvBlock(config, 4, widths[0], config.stem_kernel_size, config.stem_pool_size)
        self.conv_tower = nn.ModuleList(
            AkitaConvBlock(config, width, wider, config.tower_kernel_size, config.tower_pool_size)
            for width, wider in pairwise(widths)
        )
        self.dilated = nn.ModuleList(AkitaDilatedBlock(config, widths[-1], dilation) for dilation in config.dilations)
        self.trunk_out = AkitaConvBlock(config, widths[-1], config.trunk_out_filters, config.trunk_out_kernel_size)
        self.activation = ACT2FN[config.hidden_act]
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Runs the trunk.

        Args:
            input_ids: (B, L) ids of any integer type: A, C, G, T = 0 .. 3, N = 4 (zeros), 5 or -1 padding.
            attention_mask: (B, L), 0 = `pad_value` in all channels. Convolutions are not masked: the network treats
                such bases as it treats N (with a pad value of 0), and bins of padding are bins like others.
            inputs_embeds: (B, L, 4) real values instead of `input_ids`, one channel per base.

        Returns:
            `last_hidden_state` (B, M, E), M = ceil(L / `config.pool_factor`); `hidden_states` (B, channels, positions)
            with the input, what leaves every block but the last, and `last_hidden_state`.

        Raises:
            SequenceError: both or none of ids and values, an empty sequence, an unknown id, another shape, a mask
                with holes or that hides a row.
            ValueError: attention weights are asked for.
        """
        if kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)):
            raise ValueError("`output_attentions`: Akita is made of convolutions, without attention; leave it out.")
        demand_bases(input_ids, inputs_embeds)
        x_BLC = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        x_BCL = self.embeddings.pad(x_BLC.to(self.dtype), window_mask(attention_mask, x_BLC)).transpose(1, 2)
        for block in (self.stem, *self.conv_tower, *self.dilated, self.trunk_out):
            x_BCL = block(x_BCL)
        return BaseModelOutput(self.activation(x_BCL).transpose(1, 2).contiguous())
