"""Akita: contact maps of the folded genome from one million bases.

Shapes: B batch, L bases, N bins of the map, P pairs, T targets.
"""

from typing import Any

import torch
from transformers.utils.generic import can_return_tuple

from genesplice_hf.heads.contacts import ContactPredictionOutput, contact_loss, vector_to_map
from genesplice_hf.models.akita.configuration_akita import AkitaConfig
from genesplice_hf.models.akita.modeling_akita_base import AkitaModel, AkitaPreTrainedModel
from genesplice_hf.models.akita.modeling_akita_head import AkitaContactHead


class AkitaForContactPrediction(AkitaPreTrainedModel):
    """Predicts log(observed / expected) contacts of every pair of bins, per experiment."""

    # The loss is a mean over the pairs of a batch, not a sum that the optimiser step divides.
    accepts_loss_kwargs = False

    def __init__(self, config: AkitaConfig) -> None:
        config.validate()
        super().__init__(config)
        self.akita = AkitaModel(config)
        self.classifier = AkitaContactHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_maps: bool = False,
        **kwargs: Any,
    ) -> ContactPredictionOutput:
        """As `AkitaModel.forward`, and:

        Args:
            labels: (B, P, T) contacts of the pairs, NaN = unknown; P = `config.num_pairs(L)`, in the order of
                `torch.triu_indices(N, N, diagonal_offset)` with N = `config.map_size(L)`.
            return_maps: also return symmetric maps, and the trunk's states.

        Returns:
            `logits` (B, P, T); `loss`, the mean squared error; `contact_maps` (B, N, N, T), 0 near the diagonal.

        Raises:
            SequenceError: as the trunk; labels of another shape, or too few bins for `target_crop`.
        """
        outputs = self.akita(input_ids, attention_mask, inputs_embeds, **kwargs)
        state, config = outputs.last_hidden_state, self.config
        logits = self.classifier(state)
        loss = None if labels is None else contact_loss(logits, labels)
        maps = None
        if return_maps:
            maps = vector_to_map(logits, state.shape[1] - 2 * config.target_crop, config.diagonal_offset)
        return ContactPredictionOutput(loss, logits, maps, state if return_maps else None, outputs.hidden_states)
