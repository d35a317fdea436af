"""From an encoder's states to the outputs of its task classes: logits, and the loss where there are labels.

Shapes: B batch, L tokens, P wanted positions, E hidden size, V vocabulary, C labels.
"""

from typing import TypeAlias

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from genesplice_hf.heads.losses import weighted_cross_entropy
from genesplice_hf.heads.pooling import without_special
from genesplice_hf.heads.prediction import at_positions
from genesplice_hf.heads.sequence import SequenceClassificationHead, infer_problem_type, sequence_loss
from genesplice_hf.layers.padding import as_mask

Count: TypeAlias = torch.Tensor | int | None


def masked_lm_output(
    head: nn.Module,
    outputs: BaseModelOutput,
    labels: torch.Tensor | None,
    loss_weight: torch.Tensor | None,
    logits_positions: torch.Tensor | None,
    num_items_in_batch: Count,
) -> MaskedLMOutput:
    """Logits (B, L, V) of all positions, or (B, P, V) of some, and their loss.

    Args:
        labels: (B, L) true ids, -100 where nothing is asked. loss_weight: (B, L) weight of each label.
        logits_positions: (B, P) positions whose logits and loss are wanted; None = all.
    """
    logits = head(at_positions(outputs.last_hidden_state, logits_positions))
    labels, loss_weight = (x if x is None else at_positions(x, logits_positions) for x in (labels, loss_weight))
    loss = None if labels is None else weighted_cross_entropy(logits, labels, loss_weight, num_items_in_batch)
    return MaskedLMOutput(loss, logits, outputs.hidden_states, outputs.attentions)


def sequence_output(
    head: SequenceClassificationHead,
    config: PreTrainedConfig,
    outputs: BaseModelOutput,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    num_items_in_batch: Count,
) -> SequenceClassifierOutput:
    """Logits (B, C) from the pooled states; special tokens (`config.special_token_ids`) stay out of mean, max, last.

    Args:
        input_ids: (B, L), to tell special tokens by; None = they count.
        attention_mask: (B, L), 1 = real; None = all real. labels: as `sequence_loss` takes them.
    """
    state = outputs.last_hidden_state
    mask = as_mask(None if attention_mask is None else attention_mask.bool(), state)
    if head.pooling not in ("cls", "pooler"):
        mask = without_special(mask, input_ids, config.special_token_ids)
    logits = head(state, mask)
    loss = None
    if labels is not None:
        problem = infer_problem_type(config.problem_type, config.num_labels, labels)
        loss = sequence_loss(logits, labels, problem, num_items_in_batch)
    return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


def token_output(
    head: nn.Module, outputs: BaseModelOutput, labels: torch.Tensor | None, num_items_in_batch: Count
) -> TokenClassifierOutput:
    """Logits (B, L, C) of every position; `labels` (B, L) class ids, -100 = ignored."""
    logits = head(outputs.last_hidden_state)
    loss = None if labels is None else weighted_cross_entropy(logits, labels, None, num_items_in_batch)
    return TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)
