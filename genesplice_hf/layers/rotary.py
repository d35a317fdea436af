"""Rotary position embedding, rotate-half form (Su et al., RoFormer, arXiv 2104.09864, eq. 15).

Angles are computed in float64 and cos/sin are cast last: in float32 the angle of position 10^6 is off by
up to 0.06 rad. Shapes: B batch, H heads, L tokens, D head size.
"""

import torch


def rotary_table(
    num_tokens: int, head_dim: int, theta: float, start: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine tables, each (L, D), of the positions start .. start + num_tokens - 1 (in tokens)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    positions = torch.arange(start, start + num_tokens, dtype=torch.float64, device=device)
    angles = positions[:, None] * theta**-exponent
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BHLD: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotates every pair (x_i, x_{i + D/2}) by its position's angle; the result has the dtype of the input."""
    cos, sin = table
    first, second = x_BHLD.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x_BHLD * cos + turned * sin).to(x_BHLD.dtype)
