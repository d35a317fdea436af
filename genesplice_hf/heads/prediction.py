"""Logits per token for masked language models, and their loss for labels or for probabilities.

Shapes: B batch, L tokens, P asked positions, E hidden size, V vocabulary.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN

from genesplice_hf.errors import GeneSpliceError, SequenceError
from genesplice_hf.heads.losses import weighted_cross_entropy
from genesplice_hf.layers.hierarchical import take_tokens


class PredictionHead(nn.Module):
    """Linear, activation, LayerNorm, and the decoder over the vocabulary; (..., E) -> (..., V).

    The head of BERT's line (Devlin et al., arXiv 1810.04805, section 3.1).
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        layer_norm_eps: float,
        bias: bool = True,
        has_transform: bool = True,
        activation: str = "gelu",
        inner_size: int | None = None,
    ) -> None:
        super().__init__()
        inner = hidden_size if inner_size is None else inner_size
        self.dense = nn.Linear(hidden_size, inner, bias=bias) if has_transform else None
        self.activation = ACT2FN[activation]
        self.norm = nn.LayerNorm(inner, layer_norm_eps, bias=bias) if has_transform else None
        self.decoder = nn.Linear(inner, vocab_size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.dense is not None and self.norm is not None:
            x = self.norm(self.activation(self.dense(x)))
        return self.decoder(x)


def at_positions(x: torch.Tensor, positions_BP: torch.Tensor | None) -> torch.Tensor:
    """x (B, L, ...) at the asked positions, (B, P, ...); all of it for None.

    Raises:
        SequenceError: positions of another shape.
    """
    if positions_BP is None:
        return x
    if positions_BP.dim() != 2 or positions_BP.shape[0] != x.shape[0]:
        raise SequenceError(
            f"`logits_positions` must be (batch, positions) with {x.shape[0]} rows, got shape "
            f"{tuple(positions_BP.shape)}."
        )
    return take_tokens(x, positions_BP)


def masked_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    output_probs: torch.Tensor | None = None,
    loss_weight: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor | None:
    """`weighted_cross_entropy` with labels, `soft_cross_entropy` with probabilities, None with neither.

    Raises:
        GeneSpliceError: both are given.
    """
    if labels is not None and output_probs is not None:
        raise GeneSpliceError("pass `labels` or `output_probs`, not both.")
    if labels is not None:
        return weighted_cross_entropy(logits, labels, loss_weight, num_items_in_batch)
    if output_probs is not None:
        return soft_cross_entropy(logits, output_probs, loss_weight, num_items_in_batch)
    return None


def soft_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    loss_weight: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross entropy in float32 (nats) against probabilities; positions whose probabilities are all 0 do not count.

    Args:
        logits, targets: (..., V). loss_weight: (...) float or None for ones.

    Returns:
        Scalar sum(w ce) / num_items_in_batch when that is given, otherwise sum(w ce) / sum(w); 0 (with a gradient of
        0) when nothing counts.
    """
    working = logits.dtype if logits.dtype == torch.float64 else torch.float32
    targets = targets.to(device=logits.device, dtype=working)
    losses = -(targets * logits.to(working).log_softmax(-1)).sum(-1)
    weight = (targets != 0).any(-1).to(working)
    if loss_weight is not None:
        weight = weight * loss_weight.to(weight)
    total = (losses * weight).sum()
    if num_items_in_batch is not None:
        return total / torch.as_tensor(num_items_in_batch).clamp(min=1)
    return total / weight.sum().clamp(min=torch.finfo(working).tiny)
