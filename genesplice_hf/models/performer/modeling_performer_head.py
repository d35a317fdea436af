"""What all heads of the SLiM Performer share: the choice between ordinary and sub-linear training, and the latter.

Shapes: B batch, L tokens, C tokens of a chunk, E hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from genesplice_hf.errors import GeneSpliceError
from genesplice_hf.heads.losses import IGNORED, weighted_cross_entropy
from genesplice_hf.layers.linear_attention import LinearState
from genesplice_hf.layers.sublinear_memory import sublinear_loss
from genesplice_hf.models.performer.configuration_performer import PerformerConfig
from genesplice_hf.models.performer.modeling_performer_base import (
    PerformerModel,
    PerformerPreTrainedModel,
    TokenStream,
)
from genesplice_hf.models.performer.modeling_performer_layer import PerformerLayer

logger = logging.get_logger(__name__)

HeadLoss = Callable[[torch.Tensor, int, int], torch.Tensor]


@dataclass(frozen=True)
class _PlainLayer:
    """A layer without gradient checkpointing, which would compute every chunk a third time."""

    layer: PerformerLayer

    def sums(self, x_BCE: torch.Tensor, mask_BC: torch.Tensor | None) -> LinearState:
        return self.layer.sums(x_BCE, mask_BC)

    def __call__(self, *inputs: Any) -> tuple[torch.Tensor, LinearState]:
        return self.layer.run(*inputs)

    def tensors(self) -> list[torch.Tensor]:
        return [*self.layer.parameters(), *self.layer.buffers()]


class Targets:
    """Labels of a batch and the number that their losses are divided by; gives the loss of any stretch of tokens."""

    def __init__(
        self,
        labels: torch.Tensor,
        loss_weight: torch.Tensor | None = None,
        num_items: torch.Tensor | int | None = None,
        shift: int = 0,
    ) -> None:
        self.labels = labels[:, shift:]
        self.weight = None if loss_weight is None else loss_weight[:, shift:]
        if num_items is not None:
            self.divisor = torch.as_tensor(num_items).clamp(min=1)
        else:
            counted = self.labels != IGNORED
            total = counted.sum() if self.weight is None else (self.weight * counted).sum()
            self.divisor = total.to(torch.float64).clamp(min=torch.finfo(torch.float32).tiny)

    def share(self, logits_BCV: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Their part of the mean loss, from the logits of the tokens `start:stop`; the last may have no label."""
        labels = self.labels[:, start:stop]
        weight = None if self.weight is None else self.weight[:, start:stop]
        logits_BCV = logits_BCV[:, : labels.shape[1]]
        total = weighted_cross_entropy(logits_BCV, labels, weight, num_items_in_batch=1)
        return (total / self.divisor.to(total.device)).to(total.dtype)


class PerformerWithHead(PerformerPreTrainedModel):
    """A base model and what every head needs to train in chunks."""

    def __init__(self, config: PerformerConfig) -> None:
        config.validate()
        super().__init__(config)
        self.performer = PerformerModel(config)

    def trains_in_chunks(
        self, inputs: dict[str, Any], labels: torch.Tensor | None, slim_chunk_size: int | None, kwargs: dict[str, Any]
    ) -> bool:
        """Whether this call takes the sub-linear way; raises where it should but cannot.

        Embeddings that want a gradient of their own take the ordinary way, for the other one gives none to them.
        """
        chunk_size = self.performer.chunk_size(slim_chunk_size)
        embeds = inputs.get("inputs_embeds")
        given = inputs.get("input_ids") if embeds is None else embeds
        if not self.training or labels is None or given is None or not 0 < chunk_size < given.shape[1]:
            return False
        if embeds is not None and embeds.requires_grad:
            return False
        if kwargs.get("past_key_values") is not None:
            raise GeneSpliceError("`past_key_values` cannot be used in sub-linear training; pass all tokens.")
        if self.performer.is_recording(kwargs, "output_hidden_states", "output_attentions"):
            raise GeneSpliceError(
                "`output_hidden_states` and `output_attentions` are not available in sub-linear training; ask in "
                "evaluation, or pass `slim_chunk_size=-1`."
            )
        self._refuse_dropout()
        if any(layer.gradient_checkpointing for layer in self.performer.layers):
            logger.warning_once("gradient checkpointing has no effect while `slim_chunk_size` is at work.")
        return True

    def _refuse_dropout(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Dropout) and module.training and module.p > 0:
                raise GeneSpliceError(
                    f"`{name}` drops out with p={module.p}, but sub-linear training computes every chunk twice; set "
                    "it to 0 (`lora_dropout=0.0` for LoRA), or `slim_chunk_size=-1` (more memory)."
                )

    def chunked_loss(
        self, stream: TokenStream, head_loss: HeadLoss, slim_chunk_size: int | None, owner: nn.Module
    ) -> torch.Tensor:
        """The sum of `head_loss` over the chunks, differentiable for the trainable parameters of `owner`.

        The caller counts the training pass, before anything is computed with the random features of that pass.
        """

        def finished(x_BCE: torch.Tensor, start: int, stop: int) -> torch.Tensor:
            return head_loss(self.performer.finish(x_BCE, stream.mask_of(start, stop)), start, stop)

        return sublinear_loss(
            embed=partial(self.performer.embed, stream),
            layers=[_PlainLayer(layer) for layer in self.performer.layers],
            head_loss=finished,
            length=stream.length,
            chunk_size=self.performer.chunk_size(slim_chunk_size),
            mask=stream.mask,
            is_causal=self.config.is_decoder,
            states=self.config.slim_states,
            strategy=self.config.bidirectional_strategy,
            parameters=[parameter for parameter in owner.parameters() if parameter.requires_grad],
        )

    def chunked_token_loss(
        self,
        inputs: dict[str, Any],
        head: Callable[[torch.Tensor], torch.Tensor],
        targets: Targets,
        slim_chunk_size: int | None,
    ) -> torch.Tensor:
        self.performer.count_training_pass()

        def head_loss(x_BCE: torch.Tensor, start: int, stop: int) -> torch.Tensor:
            return targets.share(head(x_BCE), start, stop)

        return self.chunked_loss(self.performer.open(**inputs), head_loss, slim_chunk_size, self)
