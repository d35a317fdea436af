"""HyenaDNA without a head: embedding, blocks, final norm.

(Nguyen et al., HyenaDNA: long-range genomic sequence modeling at single nucleotide resolution, arXiv 2306.15794.)

Shapes: B batch, L tokens, E hidden size.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from genesplice_hf.errors import GeneSpliceError, SequenceError
from genesplice_hf.layers.padding import demand_one_input, real_positions, zero_padding
from genesplice_hf.layers.strict_loading import StrictPreTrainedModel
from genesplice_hf.models.hyenadna.configuration_hyenadna import HyenaDNAConfig
from genesplice_hf.models.hyenadna.modeling_hyenadna_layer import (
    HyenaFilter,
    HyenaLayer,
    decay_rates,
    filter_positions,
    normalized,
)


class HyenaDNAPreTrainedModel(StrictPreTrainedModel):
    """Loading, initialisation and the declared abilities of every HyenaDNA class."""

    config: HyenaDNAConfig
    config_class = HyenaDNAConfig
    base_model_prefix = "hyenadna"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HyenaLayer"]
    # There is no attention; the one mechanism goes by either stock name, flash and flex are refused.
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": HyenaLayer}
    # Neighbouring positions of a long sequence have the same bfloat16.
    _keep_in_fp32_modules_strict = ["filter.positions", "filter.times", "filter.decay"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if getattr(module, "feeds_residual", False):
            # Residual outputs shrink with depth, so that the variance of the sum does not grow with it.
            std = self.config.initializer_range / math.sqrt(2 * self.config.n_layer)
            init.normal_(module.weight, mean=0.0, std=std)
        if isinstance(module, HyenaFilter):
            _init_filter(module, self.config)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As in transformers; the new number is kept as it is, where it is no multiple of the published padding."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if self.config.vocab_size % self.config.pad_vocab_size_multiple:
            self.config.pad_vocab_size_multiple = 1
        return embeddings


class HyenaDNAModel(HyenaDNAPreTrainedModel):
    """The causal stack of long convolutions."""

    def __init__(self, config: HyenaDNAConfig) -> None:
        config.validate()
        super().__init__(config)
        # No `padding_idx`: the published models train this row as any other, and masks hide it here.
        self.word_embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(HyenaLayer(config, is_first=index == 0) for index in range(config.n_layer))
        self.final_dropout = nn.Dropout(config.resid_dropout)
        self.ln_f = nn.LayerNorm(config.d_model, config.layer_norm_epsilon)
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
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Runs the network.

        Args:
            input_ids: (B, L) token ids, L at most `config.max_seq_len`.
            attention_mask: (B, L), 1 = real; None = all real, whatever the ids are. Real positions are contiguous;
                padding may stand on either side and changes nothing at real positions. (The original has no mask:
                there padding on the left takes part in everything behind it.)
            inputs_embeds: (B, L, E) instead of `input_ids`.

        Returns:
            `last_hidden_state` (B, L, E), zero at padding. `hidden_states` on request: the embedding, what every
            block but the last adds to the sum of all branches, and `last_hidden_state`.

        Raises:
            SequenceError: both or none of ids and embeddings, an empty or too long sequence, a mask with holes.
            GeneSpliceError: attention weights or a cache are asked for, which this architecture does not have.
        """
        demand_one_input(input_ids, inputs_embeds)
        self._refuse_attention(kwargs)
        x_BLE: torch.Tensor = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        self._demand_length(x_BLE.shape[1])
        mask = real_positions(attention_mask)
        residual_BLE = None
        for layer in self.layers:
            x_BLE, residual_BLE = layer(x_BLE, residual_BLE, mask)
        x_BLE = normalized(self.ln_f, self.final_dropout(x_BLE) + residual_BLE)
        return BaseModelOutput(zero_padding(x_BLE, mask))

    def _demand_length(self, length: int) -> None:
        limit = self.config.max_seq_len
        if length > limit:
            raise SequenceError(
                f"the input has {length} tokens, but this model reads at most {limit} (`max_seq_len`), which is "
                f"{self.config.soft_max_bp} bp and two special tokens; cut the sequence into windows, or load a model "
                "for longer ones."
            )

    def _refuse_attention(self, kwargs: dict[str, Any]) -> None:
        if kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)):
            raise GeneSpliceError(
                "`output_attentions`: HyenaDNA has long convolutions and no attention; leave it out."
            )
        if kwargs.get("past_key_values") is not None:
            raise GeneSpliceError("`past_key_values`: HyenaDNA has no cache; pass the whole sequence.")


def _init_filter(module: HyenaFilter, config: HyenaDNAConfig) -> None:
    if module.freq is not None:
        init.constant_(module.freq, float(config.activation_freq))
    if module.bias is not None:
        init.normal_(module.bias, mean=0.0, std=1.0)
    if module.positions is not None:
        positions, times = filter_positions(config)
        init.copy_(module.positions, positions)
        init.copy_(module.times, times)
    if module.decay is not None:
        init.copy_(module.decay, decay_rates(config))
