"""GPN without a head: one-hot bases through dilated convolutions, or through rotary attention.

Benegas, Batra and Song 2023, DNA language models are powerful predictors of genome-wide variant effects (legacy
layout); the v2 layout is that of songlab-cal/gpn, `gpn/model.py`.

Shapes: B batch, L tokens, E hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from genesplice_hf.errors import SequenceError
from genesplice_hf.layers.one_hot import OneHotEmbedding, ResizesOneHot
from genesplice_hf.layers.padding import demand_one_input, real_positions, zero_padding
from genesplice_hf.layers.roformer import RoFormerAttention, RoFormerLayer, roformer_context
from genesplice_hf.layers.strict_loading import StrictPreTrainedModel
from genesplice_hf.models.gpn.configuration_gpn import GPNConfig
from genesplice_hf.models.gpn.modeling_gpn_layer import (
    ByteNetLayer,
    ConvNetLayer,
    GPNContext,
    GPNLayer,
    LegacyLayer,
)


class GPNPreTrainedModel(ResizesOneHot, StrictPreTrainedModel):
    """Loading, initialisation and the declared abilities of every GPN class."""

    config: GPNConfig
    config_class = GPNConfig
    base_model_prefix = "gpn"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LegacyLayer", "ConvNetLayer", "ByteNetLayer", "RoFormerLayer"]
    # They concern the roformer encoder; convolutions are the same under every name.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": [GPNLayer, RoFormerLayer], "attentions": RoFormerAttention}


class GPNModel(GPNPreTrainedModel):
    """GPN without a head."""

    def __init__(self, config: GPNConfig) -> None:
        config.validate()
        super().__init__(config)
        self.embeddings: nn.Module
        if config.embedding == "one_hot":
            self.embeddings = OneHotEmbedding(
                config.vocab_size, config.hidden_size, config.n_aux_features, config.aux_features_vocab_size
            )
        else:
            self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
        self.layers = nn.ModuleList(_layer(config, index) for index in range(config.num_hidden_layers))
        self.final_norm = None
        if config.layout == "v2":
            self.final_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, bias=config.bias)
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
        input_probs: torch.Tensor | None = None,
        aux_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Runs the network.

        Args:
            input_ids: (B, L) token ids.
            attention_mask: (B, L), 1 = real; padding may stand on either side. None = every position is real.
            inputs_embeds: (B, L, E) instead of `input_ids`.
            input_probs: (B, L, V) probabilities of tokens instead of `input_ids`.
            aux_features: integer (B, L, `n_aux_features` / `aux_features_vocab_size`), or float
                (B, L, `n_aux_features`) where the latter is None; None = zeros.

        Returns:
            `last_hidden_state` (B, L, E), zero at padding; `hidden_states` with the embedding, every layer but the
            last, and `last_hidden_state`; `attentions` of the roformer encoder, eager only.

        Raises:
            SequenceError: not exactly one input, an empty sequence, an unknown id, features of another shape, a mask
                with holes, or a sequence beyond the limit of the roformer encoder.
        """
        x_BLE = self._embed(input_ids, inputs_embeds, input_probs, aux_features)
        mask_BL = real_positions(attention_mask)
        context: Any = GPNContext(mask_BL)
        if self.config.encoder == "roformer":
            context = roformer_context(self.config, x_BLE, mask_BL)
        for layer in self.layers:
            x_BLE = layer(x_BLE, context)
        if self.final_norm is not None:
            x_BLE = self.final_norm(x_BLE)
        return BaseModelOutput(zero_padding(x_BLE, mask_BL))

    def _embed(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        input_probs: torch.Tensor | None,
        aux_features: torch.Tensor | None,
    ) -> torch.Tensor:
        if input_probs is not None:
            if input_ids is not None or inputs_embeds is not None:
                raise SequenceError("pass exactly one of `input_ids`, `inputs_embeds` and `input_probs`.")
            x_BLE = self._expected_embedding(input_probs)
        else:
            demand_one_input(input_ids, inputs_embeds)
            x_BLE = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        x_BLE = x_BLE.to(self.dtype)
        if aux_features is None:
            return x_BLE
        if not isinstance(self.embeddings, OneHotEmbedding) or not self.config.n_aux_features:
            raise SequenceError(
                "`aux_features` were given to a model without columns for them; leave them out, or make a config "
                "with `n_aux_features` and one-hot input."
            )
        return self.embeddings.with_features(x_BLE, aux_features)

    def _expected_embedding(self, probs_BLV: torch.Tensor) -> torch.Tensor:
        """The mean embedding under the probabilities."""
        if isinstance(self.embeddings, OneHotEmbedding):
            return self.embeddings.widen(probs_BLV)
        weight: Any = self.embeddings.weight
        return probs_BLV.to(weight.dtype) @ weight


def _layer(config: GPNConfig, index: int) -> nn.Module:
    if config.layout == "legacy":
        return LegacyLayer(config, index)
    if config.encoder == "roformer":
        return RoFormerLayer(config, config.roformer_layer_norm_eps)
    return ConvNetLayer(config, index) if config.encoder == "convnet" else ByteNetLayer(config, index)
