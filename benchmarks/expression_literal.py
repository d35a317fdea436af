"""BioFormer as its formulas stand, for comparison: every product of channels, a normalised copy of z, plain attention.

Its weights are those of our blocks, so that outputs can be compared.

Shapes: B cells, i rows and j columns of r genes, H heads, D head size, E hidden size, C channels of z, c of the
product.
"""

from collections.abc import Iterable

import torch
from torch import nn

from genesplice_hf.layers.expression_block import ExpressionBlock


class LiteralBlock(nn.Module):
    """One block on states (B, r, E) and z (B, r, r, C); the weights are those of `block`."""

    def __init__(self, block: ExpressionBlock, eps: float) -> None:
        super().__init__()
        assert block.opm is not None and block.pair_bias is not None
        self.block, self.eps = block, eps
        self.heads = block.attention.config.num_attention_heads

    def forward(self, m: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        m = m + self.attention(self.block.norm1(m), z)
        m = m + self.block.mlp(self.block.norm2(m))
        return m, z + self.outer_product(m)

    def attention(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """softmax(q k^T / sqrt(D) + W_z LN(z)) v, and the projection."""
        part, pair = self.block.attention, self.block.pair_bias
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (part.q_proj, part.k_proj, part.v_proj)
        )
        normal = nn.functional.layer_norm(z, z.shape[-1:], pair.norm.weight, None, self.eps)
        bias = pair.proj(normal).permute(0, 3, 1, 2)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + bias
        return part.out_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))

    def outer_product(self, m: torch.Tensor) -> torch.Tensor:
        """W vec(a_i x b_j) + b, with the (B, r, r, c, c) tensor."""
        opm = self.block.opm
        x = opm.norm(m)
        products = torch.einsum("bip,bjq->bijpq", opm.a(x), opm.b(x))
        return opm.out(products.flatten(3))


def run_literal(blocks: Iterable[LiteralBlock], m: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The states after all blocks."""
    for block in blocks:
        m, z = block(m, z)
    return m
