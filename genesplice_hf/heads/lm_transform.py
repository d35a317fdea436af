"""The masked-LM head of BERT's line: dense, GELU, LayerNorm, decoder (Devlin et al., arXiv 1810.04805, section 3.1).

Shapes: E hidden size, V vocabulary.
"""

import torch
from torch import nn


class TransformedLMHead(nn.Module):
    """(..., E) -> (..., V), with exact GELU and a bias per token of the vocabulary."""

    def __init__(self, hidden_size: int, vocab_size: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, layer_norm_eps)
        self.decoder = nn.Linear(hidden_size, vocab_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.norm(nn.functional.gelu(self.dense(x))))
