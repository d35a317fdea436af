"""ALiBi: attention that forgets with distance, instead of positions (Press et al., arXiv 2108.12409, section 3).

The score of query i for key j gets -m_h |i - j| added; the slopes m_h are constants, so nothing is learned and no
length is built in. In causal attention a query sees j <= i only, where -m_h |i - j| is the paper's -m_h (i - j).

Shapes: H heads, Lq queries, Lk keys.
"""

import torch


def alibi_slopes(
    num_heads: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """(H,) slopes, all positive.

    For H a power of two the slope of head h = 0, ..., H - 1 is 2^(-8 (h + 1) / H). Otherwise: the slopes of the next
    lower power of two, then every second slope of the next higher one, from its first.
    """
    lower = 1 << (num_heads.bit_length() - 1)
    slopes = _geometric(lower) + _geometric(2 * lower)[::2][: num_heads - lower]
    return torch.tensor(slopes, device=device, dtype=dtype)


def _geometric(num_heads: int) -> list[float]:
    return [2.0 ** (-8 * (head + 1) / num_heads) for head in range(num_heads)]


def alibi_bias(slopes_H: torch.Tensor, distance: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(H, Lq, Lk) of what is added to the scores; `distance` (Lq, Lk) is i - j in tokens.

    The product is taken in the slopes' precision and cast last.
    """
    # Slopes turned round first: no second tensor of the full size.
    return (slopes_H.neg()[:, None, None] * distance.abs()).to(dtype)


def biased_mask(visible: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Bool `visible` (..., 1, Lq, Lk) as it is without a bias, otherwise (..., H, Lq, Lk): bias or -inf."""
    return visible if bias is None else torch.where(visible, bias, float("-inf"))


def alibi_implementation(name: str | None) -> str | None:
    """The attention implementation that serves a request for `name` under ALiBi.

    eager and sdpa take the bias as an additive mask. flex_attention runs as sdpa: its transformers form takes no bias
    per head.

    Raises:
        ValueError: flash attention, whose path in transformers takes no slopes.
    """
    if name is not None and "flash" in name:
        raise ValueError(
            f'`attn_implementation="{name}"` cannot add the bias of `position_embedding="alibi"`; use "sdpa", or a '
            'model with "rope".'
        )
    return "sdpa" if name == "flex_attention" else name
