"""New tracks on the bins of a pretrained encoder: a plain head, a head made from context, attention to context.

The wrappers of enformer-pytorch's `finetune.py` (lucidrains), in their mathematics.

Shapes: B batch, M bins, T tracks, E width of the bins, J context tokens, D context size, H heads, K head size.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN

from genesplice_hf.errors import SequenceError

Activation = Callable[[torch.Tensor], torch.Tensor]


def activation(name: str | None) -> Activation:
    """ "softplus" (in float32 at least), any name of transformers' `ACT2FN`, or None for none.

    Raises:
        ValueError: an unknown name.
    """
    if name is None:
        return _as_it_is
    if name == "softplus":
        return _softplus
    if name not in ACT2FN:
        raise ValueError(
            f'`head_activation` must be "softplus", a name of transformers\' ACT2FN or None, got {name!r}.'
        )
    return ACT2FN[name]


class HeadAdapter(nn.Module):
    """activation(Linear(x)), or of LayerNorm(x): (B, M, E) -> (B, M, T)."""

    def __init__(self, hidden_size: int, num_tracks: int, norm_eps: float | None, head_activation: str | None) -> None:
        super().__init__()
        self.norm = None if norm_eps is None else nn.LayerNorm(hidden_size, norm_eps)
        self.to_tracks = nn.Linear(hidden_size, num_tracks)
        self.activation = activation(head_activation)

    def forward(self, x_BME: torch.Tensor) -> torch.Tensor:
        return self.activation(self.to_tracks(x_BME if self.norm is None else self.norm(x_BME)))


class ContextAdapter(nn.Module):
    """A track's weights and bias are linear in its context: pred[b, m, t] = activation(x . (c_t W) + c_t b)."""

    def __init__(self, hidden_size: int, context_dim: int, head_activation: str | None) -> None:
        super().__init__()
        self.to_context_weights = nn.Parameter(torch.zeros(context_dim, hidden_size))
        self.to_context_bias = nn.Parameter(torch.zeros(context_dim))
        self.activation = activation(head_activation)

    def forward(self, x_BME: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Args: context: (T, D), or (B, T, D) for rows with contexts of their own."""
        demand_context(context, self.to_context_bias.shape[0], x_BME.shape[0], (2, 3))
        context = context.to(x_BME.dtype)
        weight = context @ self.to_context_weights
        out_BMT = x_BME @ weight.transpose(-1, -2) + (context @ self.to_context_bias)[..., None, :]
        return self.activation(out_BMT)


class ContextAttentionAdapter(nn.Module):
    """Bins attend to the context tokens of each track, and one projection for all tracks reads the sum.

    pred[b, m, t] = activation(p . (x + out(attention(norm(x), norm(c_t)))) + bias). Nothing between `to_out` and `p`
    bends, so p is applied to both summands alone and no (B, T, M, E) tensor exists.
    """

    def __init__(
        self,
        hidden_size: int,
        context_dim: int,
        num_heads: int,
        head_dim: int,
        norm_eps: float,
        head_activation: str | None,
    ) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads, self.scaling = num_heads, head_dim**-0.5
        self.query_norm = nn.LayerNorm(hidden_size, norm_eps)
        self.key_values_norm = nn.LayerNorm(context_dim, norm_eps)
        self.to_queries = nn.Linear(hidden_size, inner, bias=False)
        self.to_key_values = nn.Linear(context_dim, 2 * inner, bias=False)
        self.null_key = nn.Parameter(torch.zeros(inner))
        self.null_value = nn.Parameter(torch.zeros(inner))
        self.to_out = nn.Linear(inner, hidden_size)
        self.to_pred = nn.Linear(hidden_size, 1)
        self.activation = activation(head_activation)

    def forward(
        self, x_BME: torch.Tensor, context: torch.Tensor, context_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Every row attends to the context of every track.

        Args:
            context: (T, J, D) tokens of each track, or (T, D) for one token each.
            context_mask: (T, J), 1 = keep; a key of no token is always kept beside them.
        """
        demand_context(context, self.key_values_norm.normalized_shape[0], None, (2, 3))
        context_TJD = context[:, None] if context.dim() == 2 else context
        mask_TJ = _demand_mask(context_mask, context_TJD)
        keys, values = self.to_key_values(self.key_values_norm(context_TJD.to(x_BME.dtype))).chunk(2, dim=-1)
        keys, values = self._with_null(keys, self.null_key), self._with_null(values, self.null_value)
        queries = self._heads(self.to_queries(self.query_norm(x_BME))) * self.scaling
        scores = torch.einsum("bmhk,tjhk->bthmj", queries, keys)
        if mask_TJ is not None:
            kept = nn.functional.pad(mask_TJ, (1, 0), value=True)
            scores = scores.masked_fill(~kept[None, :, None, None, :], torch.finfo(scores.dtype).min)
        attended = torch.einsum("bthmj,tjhk->bmthk", scores.softmax(-1), values).flatten(3)
        read = self.to_pred.weight[0]
        from_context = attended @ (read @ self.to_out.weight) + read @ self.to_out.bias
        return self.activation((x_BME @ read)[..., None] + from_context + self.to_pred.bias)

    def _with_null(self, tokens_TJI: torch.Tensor, null_I: torch.Tensor) -> torch.Tensor:
        null = null_I.to(tokens_TJI.dtype).expand(tokens_TJI.shape[0], 1, -1)
        return self._heads(torch.cat([null, tokens_TJI], dim=1))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


def demand_context(context: torch.Tensor | None, context_dim: int, rows: int | None, dims: tuple[int, ...]) -> None:
    """Raises unless a context of the right width is given, with as many rows as the batch where it has rows."""
    if context is None or context.dim() not in dims or context.shape[-1] != context_dim:
        got = "None" if context is None else f"shape {tuple(context.shape)}"
        raise SequenceError(
            f"`context` must be (tracks, {context_dim}) or have one more axis (see `forward`), got {got}; its "
            "last size is `context_dim`."
        )
    if rows is not None and context.dim() == 3 and context.shape[0] != rows:
        raise SequenceError(f"`context` has {context.shape[0]} rows for a batch of {rows}; pass one for each, or 2-D.")


def _demand_mask(mask: torch.Tensor | None, context_TJD: torch.Tensor) -> torch.Tensor | None:
    if mask is None:
        return None
    if tuple(mask.shape) != tuple(context_TJD.shape[:2]):
        raise SequenceError(
            f"`context_mask` must be (tracks, tokens) = {tuple(context_TJD.shape[:2])}, got {tuple(mask.shape)}."
        )
    return mask.bool()


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def _softplus(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.softplus(x if x.dtype == torch.float64 else x.float())
