"""One prediction per sequence: classification or regression on pooled states.

Shapes: B batch, L tokens, E hidden size, C labels.
"""

from typing import Literal

import torch
from torch import nn

from genesplice_hf.heads.losses import weighted_cross_entropy
from genesplice_hf.heads.pooling import AttentionPooling, first_real, last_real, masked_max, masked_mean

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]

_POOLINGS = {"mean": masked_mean, "max": masked_max, "cls": first_real, "last": last_real, "pooler": first_real}


class SequenceClassificationHead(nn.Module):
    """Pools the real positions, drops out and projects: (B, L, E) -> (B, C).

    All parameters of the head, the pooling query included, live here: the models call it `classifier`, which
    is the name that PEFT trains and saves. `pooling` is "mean", "max", "attention", "cls" (the first position),
    "last", or "pooler" (BERT's: tanh of a projection of the first position).
    """

    def __init__(self, hidden_size: int, num_labels: int, pooling: str, dropout: float) -> None:
        super().__init__()
        self.pooling = pooling
        self.attention_pooling = AttentionPooling(hidden_size) if pooling == "attention" else None
        self.pooler = nn.Linear(hidden_size, hidden_size) if pooling == "pooler" else None
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(hidden_size, num_labels)

    def forward(self, x_BLE: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self.dropout(self.pool(x_BLE, mask_BL)))

    def pool(self, x_BLE: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        if self.attention_pooling is not None:
            return self.attention_pooling(x_BLE, mask_BL)
        pooled_BE = _POOLINGS.get(self.pooling, masked_mean)(x_BLE, mask_BL)
        return pooled_BE if self.pooler is None else self.pooler(pooled_BE).tanh()


def infer_problem_type(declared: str | None, num_labels: int, labels: torch.Tensor) -> str:
    """The problem that labels of this dtype and shape pose; a declared one wins. Names are transformers'."""
    if declared is not None:
        return declared
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def sequence_loss(
    logits_BC: torch.Tensor,
    labels: torch.Tensor,
    problem_type: str,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Mean squared error, cross entropy or binary cross entropy, by `problem_type`.

    Args:
        logits_BC: (B, C). labels: (B,) class ids, -100 = ignored, (B,) or (B, C) values, or (B, C) zeros and ones.
        num_items_in_batch: labels of the whole optimiser step; None = mean over the labels of this batch.
    """
    logits_BC = logits_BC.float()
    if problem_type == "single_label_classification":
        return weighted_cross_entropy(logits_BC, labels, num_items_in_batch=num_items_in_batch)
    if problem_type == "regression":
        losses = (logits_BC - labels.view_as(logits_BC).float()).square()
    else:
        targets = labels.view_as(logits_BC).float()
        losses = nn.functional.binary_cross_entropy_with_logits(logits_BC, targets, reduction="none")
    return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch
