"""One prediction per position. Shapes: B batch, L tokens, E hidden size, C labels."""

import torch
from torch import nn


class TokenClassificationHead(nn.Module):
    """Drops out and projects every position: (B, L, E) -> (B, L, C)."""

    def __init__(self, hidden_size: int, num_labels: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(hidden_size, num_labels)

    def forward(self, x_BLE: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self.dropout(x_BLE))
