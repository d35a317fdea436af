"""GPN-MSA: masked bases of one genome, seen together with the rows of a multiple alignment.

Benegas et al. 2025, A DNA language model based on multispecies alignment predicts the effects of genome-wide variants.
The one-hot columns of token and aligned species go through a RoFormer; `layers/roformer.py`.

Shapes: B batch, L tokens, P asked positions, E hidden size, S aligned species, V vocabulary, C labels.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from genesplice_hf.errors import SequenceError
from genesplice_hf.heads.losses import weighted_cross_entropy
from genesplice_hf.heads.prediction import PredictionHead, at_positions, masked_lm_loss
from genesplice_hf.heads.sequence import infer_problem_type, sequence_loss
from genesplice_hf.heads.token import TokenClassificationHead
from genesplice_hf.heads.token_pooling import pool_tokens
from genesplice_hf.layers.one_hot import OneHotEmbedding, ResizesOneHot
from genesplice_hf.layers.padding import as_mask, demand_one_input, real_positions, zero_padding
from genesplice_hf.layers.roformer import RoFormerAttention, RoFormerLayer, roformer_context
from genesplice_hf.layers.strict_loading import StrictPreTrainedModel
from genesplice_hf.models.gpn_msa.configuration_gpn_msa import GPNMSAConfig


class GPNMSAPreTrainedModel(ResizesOneHot, StrictPreTrainedModel):
    """Loading, initialisation and the declared abilities of every GPN-MSA class."""

    config: GPNMSAConfig
    config_class = GPNMSAConfig
    base_model_prefix = "gpn_msa"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RoFormerLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": RoFormerLayer, "attentions": RoFormerAttention}


class GPNMSAModel(GPNMSAPreTrainedModel):
    """GPN-MSA without a head."""

    def __init__(self, config: GPNMSAConfig) -> None:
        config.validate()
        super().__init__(config)
        self.embeddings = OneHotEmbedding(
            config.vocab_size, config.hidden_size, config.n_aux_features, config.aux_features_vocab_size
        )
        self.layers = nn.ModuleList(
            RoFormerLayer(config, config.layer_norm_eps) for _ in range(config.num_hidden_layers)
        )
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
        aux_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Runs the network.

        Args:
            input_ids: (B, L) ids of the reference row.
            attention_mask: (B, L), 1 = real; padding may stand on either side. None = every position is real.
            inputs_embeds: (B, L, E) instead of `input_ids`.
            aux_features: (B, L, S) ids of the aligned rows, without the reference; numbers (B, L, `n_aux_features`)
                with `aux_features_vocab_size=None`; None = zeros, which no published model was trained on.

        Returns:
            `last_hidden_state` (B, L, E), zero at padding; `hidden_states` with the embedding and every layer;
            `attentions`, eager only.

        Raises:
            SequenceError: both or none of ids and embeddings, an empty or too long sequence, an unknown id, features
                of another shape, a mask with holes.
        """
        demand_one_input(input_ids, inputs_embeds)
        x_BLE = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        x_BLE = x_BLE.to(self.dtype)
        if aux_features is not None:
            if not self.config.n_aux_features:
                raise SequenceError("`aux_features` need a model with `n_aux_features` > 0; leave them out.")
            x_BLE = self.embeddings.with_features(x_BLE, aux_features)
        mask_BL = real_positions(attention_mask)
        context = roformer_context(self.config, x_BLE, mask_BL)
        for layer in self.layers:
            x_BLE = layer(x_BLE, context)
        return BaseModelOutput(zero_padding(x_BLE, mask_BL))


class GPNMSAForMaskedLM(GPNMSAPreTrainedModel):
    """Predicts masked bases of the reference row; the aligned rows stay visible."""

    def __init__(self, config: GPNMSAConfig) -> None:
        config.validate()
        super().__init__(config)
        self.gpn_msa = GPNMSAModel(config)
        self.lm_head = PredictionHead(
            config.hidden_size,
            config.vocab_size,
            config.layer_norm_eps,
            activation=config.hidden_act,
            inner_size=config.embedding_size,
        )
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        loss_weight: torch.Tensor | None = None,
        aux_features: torch.Tensor | None = None,
        logits_positions: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """As `GPNMSAModel.forward`, and:

        Args:
            labels: (B, L) true ids, -100 where nothing is asked.
            loss_weight: (B, L) weight of each position in the loss; it is not changed.
            logits_positions: (B, P) positions whose logits (and loss) alone are wanted.

        Returns:
            `logits` (B, L, V), or (B, P, V) with `logits_positions`; `loss` sum(w ce) / sum(w).
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.gpn_msa(input_ids, attention_mask, inputs_embeds, aux_features, **kwargs)
        logits = self.lm_head(at_positions(outputs.last_hidden_state, logits_positions))
        labels, loss_weight = (
            None if target is None else at_positions(target, logits_positions) for target in (labels, loss_weight)
        )
        loss = masked_lm_loss(logits, labels, None, loss_weight, num_items)
        return MaskedLMOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class GPNMSAForSequenceClassification(GPNMSAPreTrainedModel):
    """One class, value or label set per sequence, from pooled states (`config.classifier_pooling`)."""

    def __init__(self, config: GPNMSAConfig) -> None:
        config.validate()
        super().__init__(config)
        self.gpn_msa = GPNMSAModel(config)
        self.classifier = TokenClassificationHead(config.hidden_size, config.num_labels, config.hidden_dropout_prob)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        aux_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """As `GPNMSAModel.forward`; `labels` as `heads.sequence.sequence_loss` takes them, `logits` (B, C)."""
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.gpn_msa(input_ids, attention_mask, inputs_embeds, aux_features, **kwargs)
        state, config = outputs.last_hidden_state, self.config
        mask = as_mask(None if attention_mask is None else attention_mask.bool(), state)
        pooled_BE = pool_tokens(state, mask, config.classifier_pooling, input_ids, config.special_token_ids)
        logits = self.classifier(pooled_BE)
        loss = None
        if labels is not None:
            problem = infer_problem_type(config.problem_type, config.num_labels, labels)
            loss = sequence_loss(logits, labels, problem, num_items)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class GPNMSAForTokenClassification(GPNMSAPreTrainedModel):
    """One label per base of the reference row."""

    def __init__(self, config: GPNMSAConfig) -> None:
        config.validate()
        super().__init__(config)
        self.gpn_msa = GPNMSAModel(config)
        self.classifier = TokenClassificationHead(config.hidden_size, config.num_labels, config.hidden_dropout_prob)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        aux_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """As `GPNMSAModel.forward`; `labels` (B, L) class ids, -100 = ignored; `logits` (B, L, C)."""
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.gpn_msa(input_ids, attention_mask, inputs_embeds, aux_features, **kwargs)
        logits = self.classifier(outputs.last_hidden_state)
        loss = None if labels is None else weighted_cross_entropy(logits, labels, None, num_items)
        return TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)
