"""Token losses that respect weights and the batch size of the whole optimiser step.

transformers' Trainer passes `num_items_in_batch` to every model whose forward accepts keyword arguments and
then expects sum / num_items_in_batch; a plain mean would train with the loss multiplied by accumulation steps
times processes.
"""

import torch
from torch import nn

IGNORED = -100


def weighted_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    loss_weight: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross entropy in float32 (nats) over the labels that are not -100.

    Args:
        logits: (..., V). labels: (...) int. loss_weight: (...) float or None for ones.
        num_items_in_batch: labelled tokens of the whole optimiser step.

    Returns:
        Scalar sum(w ce) / num_items_in_batch when that is given, otherwise sum(w ce) / sum(w); 0 (with a
        gradient of 0) when nothing is labelled.
    """
    labels = labels.reshape(-1).to(logits.device)
    working = logits.dtype if logits.dtype == torch.float64 else torch.float32
    losses = nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).to(working), labels, ignore_index=IGNORED, reduction="none"
    )
    weight = (labels != IGNORED).to(working)
    if loss_weight is not None:
        weight = weight * loss_weight.reshape(-1).to(weight)
    total = (losses * weight).sum()
    if num_items_in_batch is not None:
        return total / torch.as_tensor(num_items_in_batch).clamp(min=1)
    return total / weight.sum().clamp(min=torch.finfo(working).tiny)


def shift_left(values: torch.Tensor, fill: float | int) -> torch.Tensor:
    """Moves (B, L) values one position to the left, so that position i holds what token i must predict."""
    return nn.functional.pad(values, (0, 1), value=fill)[:, 1:]
