"""Enformer adapted to new tracks: by a new head, by weights made from context, by attention to context.

Shapes: B batch, T bins, E embedding size, D context size, J context tokens.
"""

from typing import Any

import torch
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from genesplice_hf.errors import SequenceError
from genesplice_hf.heads.outputs import TrackPredictionOutput
from genesplice_hf.heads.track_adapters import ContextAdapter, ContextAttentionAdapter, HeadAdapter
from genesplice_hf.heads.tracks import track_loss
from genesplice_hf.models.enformer.configuration_enformer import EnformerConfig
from genesplice_hf.models.enformer.modeling_enformer_base import EnformerModel, EnformerPreTrainedModel


class EnformerAdaptation(EnformerPreTrainedModel):
    """What the adaptation classes share: the trunk, and a Poisson loss on as many bins as the labels have."""

    # The loss is a mean over bins with a target, of which the Trainer's count of labels knows nothing.
    accepts_loss_kwargs = False
    needed: tuple[str, ...] = ()

    def __init__(self, config: EnformerConfig) -> None:
        config.validate()
        missing = [name for name in self.needed if getattr(config, name) is None]
        if missing:
            raise ValueError(f"`{missing[0]}` must be set in the config of {type(self).__name__}, it is None.")
        super().__init__(config)
        self.enformer = EnformerModel(config)

    def _bins(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        target_length: int | None,
        kwargs: dict[str, Any],
    ) -> Any:
        if target_length is None and labels is not None:
            if labels.dim() != 3:
                raise SequenceError(f"`labels` must be (batch, bins, tracks), got shape {tuple(labels.shape)}.")
            target_length = labels.shape[-2]
        return self.enformer(input_ids, inputs_embeds, attention_mask, target_length, **kwargs)

    def _output(self, outputs: Any, logits: torch.Tensor, labels: torch.Tensor | None) -> TrackPredictionOutput:
        loss = None if labels is None else track_loss(logits, labels, None, "poisson", self.config.log_eps)
        return TrackPredictionOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            last_hidden_state=outputs.last_hidden_state,
        )


class EnformerForHeadAdaptation(EnformerAdaptation):
    """`config.num_tracks` new tracks on the embeddings, or with `post_transformer` on the transformer's output."""

    needed = ("num_tracks",)

    def __init__(self, config: EnformerConfig) -> None:
        super().__init__(config)
        norm_eps = config.layer_norm_eps if config.post_transformer and config.post_transformer_norm else None
        assert config.num_tracks is not None
        self.classifier = HeadAdapter(config.hidden_size, config.num_tracks, norm_eps, config.head_activation)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        target_length: int | None = None,
        **kwargs: Any,
    ) -> TrackPredictionOutput:
        """As `EnformerModel.forward`; `labels` (B, T, `num_tracks`), NaN = unknown; `logits` likewise.

        Without `target_length` there are as many bins as the labels have.
        """
        outputs = self._bins(input_ids, inputs_embeds, attention_mask, labels, target_length, kwargs)
        return self._output(outputs, self.classifier(outputs.last_hidden_state), labels)


class EnformerForContextAdaptation(EnformerAdaptation):
    """One track per context vector, whose weights a linear hypernetwork makes from it."""

    needed = ("context_dim",)

    def __init__(self, config: EnformerConfig) -> None:
        super().__init__(config)
        assert config.context_dim is not None
        self.classifier = ContextAdapter(config.hidden_size, config.context_dim, config.head_activation)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ContextAdapter):
            # Track weights of the size that a linear layer would have; larger ones saturate the softplus.
            init.normal_(module.to_context_weights, std=module.to_context_weights.numel() ** -0.5)
            init.zeros_(module.to_context_bias)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        target_length: int | None = None,
        context: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> TrackPredictionOutput:
        """As `EnformerForHeadAdaptation.forward`; `context` (tracks, D), or (B, tracks, D)."""
        outputs = self._bins(input_ids, inputs_embeds, attention_mask, labels, target_length, kwargs)
        return self._output(outputs, self.classifier(outputs.last_hidden_state, context), labels)


class EnformerForContextAttentionAdaptation(EnformerAdaptation):
    """One track per list of context tokens, to which every bin attends."""

    needed = ("context_dim",)

    def __init__(self, config: EnformerConfig) -> None:
        super().__init__(config)
        assert config.context_dim is not None
        self.classifier = ContextAttentionAdapter(
            config.hidden_size,
            config.context_dim,
            config.context_num_heads,
            config.context_head_dim,
            config.layer_norm_eps,
            config.head_activation,
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ContextAttentionAdapter):
            init.normal_(module.null_key)
            init.normal_(module.null_value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        target_length: int | None = None,
        context: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> TrackPredictionOutput:
        """As `EnformerForHeadAdaptation.forward`.

        Args:
            context: (tracks, J, D), or (tracks, D) for one token each. context_mask: (tracks, J), 1 = keep.
        """
        outputs = self._bins(input_ids, inputs_embeds, attention_mask, labels, target_length, kwargs)
        return self._output(outputs, self.classifier(outputs.last_hidden_state, context, context_mask), labels)
