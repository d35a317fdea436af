"""What pretraining adds to an encoder: the options, the head of contrast and of next segments, and its loss.

Shapes: B examples, L tokens, E hidden size, P size of an embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import nn
from transformers import PreTrainedConfig

from genesplice_hf.heads.contrast import mean_over_processes
from genesplice_hf.heads.losses import IGNORED
from genesplice_hf.heads.pooling import masked_mean


@dataclass(frozen=True)
class PretrainingOptions:
    """What is learned, and how much of it.

    Attributes:
        contrastive_dim: P.
        contrastive_temperature: t of `info_nce`.
        mlm_weight, contrastive_weight, next_segment_weight: shares in the loss; an objective with weight 0 has no
            parameters.
        special_token_ids: ids that stand for no DNA and stay out of the mean over a sequence ([CLS], [SEP], ...).
    """

    contrastive_dim: int = 128
    contrastive_temperature: float = 0.07
    mlm_weight: float = 1.0
    contrastive_weight: float = 0.1
    next_segment_weight: float = 0.0
    special_token_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        # A list where a config was read from a file.
        object.__setattr__(self, "special_token_ids", tuple(self.special_token_ids))
        weights = (self.mlm_weight, self.contrastive_weight, self.next_segment_weight)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(
                "`mlm_weight`, `contrastive_weight` and `next_segment_weight` must be 0 or more and not all 0, they "
                f"are {weights}; raise one of them."
            )
        if self.contrastive_temperature <= 0 or self.contrastive_dim < 1:
            raise ValueError(
                f"`contrastive_temperature` ({self.contrastive_temperature}) must be above 0 and `contrastive_dim` "
                f"({self.contrastive_dim}) at least 1."
            )

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "PretrainingOptions":
        """What `config.pretraining_options` says; without it the config's fields of these names, else defaults."""
        stored = getattr(config, "pretraining_options", None)
        if stored is None:
            names = [field.name for field in fields(cls)]
            stored = {name: getattr(config, name) for name in names if hasattr(config, name)}
        return cls(**stored)


class TwoLayers(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, in_size: int, hidden_size: int, out_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, out_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_proj(nn.functional.gelu(self.dense(x)))


class PretrainingHead(nn.Module):
    """The parameters that pretraining needs beside the encoder and the token head; models call it
    `pretraining_head`."""

    def __init__(self, hidden_size: int, options: PretrainingOptions) -> None:
        super().__init__()
        contrasts, pairs = options.contrastive_weight > 0, options.next_segment_weight > 0
        self.projection = TwoLayers(hidden_size, hidden_size, options.contrastive_dim) if contrasts else None
        self.next_segment = TwoLayers(4 * hidden_size, hidden_size, 1) if pairs else None

    def embed(self, state_BLE: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        """(B, P) embeddings of length 1 in float32 (or float64); needs the contrast."""
        assert self.projection is not None
        projected = self.projection(masked_mean(state_BLE, mask_BL))
        working = torch.float64 if projected.dtype == torch.float64 else torch.float32
        return nn.functional.normalize(projected.to(working), dim=-1)

    def judge(self, state_BLE: torch.Tensor, segment_ids_BL: torch.Tensor) -> torch.Tensor:
        """(B,) log odds that the second segment follows the first, from the means of both; needs the objective."""
        assert self.next_segment is not None
        first, second = (masked_mean(state_BLE, segment_ids_BL == segment) for segment in (0, 1))
        features = torch.cat([first, second, first * second, (first - second).abs()], dim=-1)
        return self.next_segment(features).squeeze(-1)


def next_segment_loss(logits_B: torch.Tensor, follows_B: torch.Tensor, gather: bool = False) -> torch.Tensor:
    """Mean binary cross entropy in nats over the pairs whose answer is not -100.

    Args:
        logits_B: (B,) log odds. follows_B: (B,) 1 where B follows A, 0 where not.
        gather: the mean over the pairs of all processes.
    """
    asked = follows_B != IGNORED
    logits_B = logits_B if logits_B.dtype == torch.float64 else logits_B.float()
    targets = follows_B.clamp(min=0).to(logits_B)
    losses = nn.functional.binary_cross_entropy_with_logits(logits_B, targets, reduction="none")
    return mean_over_processes((losses * asked).sum(), asked.sum(), gather)
