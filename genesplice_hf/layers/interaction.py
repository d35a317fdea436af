"""Fine-grained interactions: how well the best tokens of one set match each token of another, per head.

Late interaction as in FILIP (Yao et al., arXiv 2111.07783, eq. 3), its maximum softened: the log of the mean of
exponentials at a temperature. A learned null key stands for "nothing matches". Chunks of residues with a running
log-sum-exp give the same numbers and gradients as the whole map, which is then never held.

Shapes: B batch, H heads, T bins, R residues, K latent size, E and P widths.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig
from transformers import initialization as init

from genesplice_hf.layers.interaction_norm import InteractionNorm, normalize_map

# Far below every similarity, and finite, so that a chunk of padding alone keeps finite gradients.
_HIDDEN = -1e30
COSINE_EPS = 1e-6


class Latents(NamedTuple):
    """A set projected for the interaction: `keys` (B, H, L, K), and `values` of the same shape where they are used."""

    keys: torch.Tensor
    values: torch.Tensor | None = None


class Interaction(nn.Module):
    """Similarity of every bin to every residue per head, reduced over the residues.

    The config names `latent_heads`, `latent_dim`, `interaction`, `filip_reduce`, `filip_temperature`,
    `learn_temperature`, `interaction_similarity`, `interaction_norm`, `interaction_norm_affine`,
    `interaction_norm_eps`, `interaction_norm_position`, `null_residue`, `normalize_null`, `residue_dropout` and
    `interaction_chunk_size`.
    """

    def __init__(self, config: PreTrainedConfig, size: int, context_size: int) -> None:
        super().__init__()
        self.config = config
        inner = config.latent_heads * config.latent_dim
        self.to_latent = nn.Linear(size, inner)
        self.context_to_latent = nn.Linear(context_size, inner)
        self.to_value = nn.Linear(context_size, inner) if config.interaction == "attention" else None
        shape = (config.latent_heads, config.latent_dim)
        self.null_residue = nn.Parameter(torch.empty(shape)) if config.null_residue else None
        self.log_temperature = nn.Parameter(torch.empty(())) if config.learn_temperature else None
        self.norm = InteractionNorm.of(config)

    def initialize(self) -> None:
        """Unit latents of normalised states, a null key of unit normals."""
        for layer in (self.to_latent, self.context_to_latent, self.to_value):
            if layer is not None:
                init.normal_(layer.weight, std=layer.in_features**-0.5)
                init.zeros_(layer.bias)
        if self.null_residue is not None:
            init.normal_(self.null_residue)
        if self.log_temperature is not None:
            init.constant_(self.log_temperature, torch.tensor(self.config.filip_temperature).log().item())

    @property
    def temperature(self) -> torch.Tensor | float:
        if self.log_temperature is None:
            return self.config.filip_temperature
        log = self.log_temperature
        return (log if log.dtype == torch.float64 else log.float()).exp()

    def bin_latents(self, x_BTE: torch.Tensor) -> Latents:
        """The bins' side, float32 at least."""
        return Latents(self._similar(self.to_latent(x_BTE)))

    def residue_latents(self, p_BRP: torch.Tensor) -> Latents:
        """The residues' side, float32 at least."""
        keys = self._similar(self.context_to_latent(p_BRP))
        return Latents(keys, None if self.to_value is None else self._heads(self.to_value(p_BRP)))

    def forward(
        self,
        bins: Latents,
        residues: Latents,
        mask_BR: torch.Tensor | None,
        mask_BT: torch.Tensor | None = None,
        chunk_size: int | None = None,
    ) -> torch.Tensor:
        """Interactions (B, T, H); the batch of either side may be 1.

        Args:
            mask_BR, mask_BT: bool, True = real; None = all real.
            chunk_size: residues at a time; None = as the config says (whose None is all at once).
        """
        with no_autocast(bins.keys):
            mask = self._visible(residues, mask_BR)
            chunk_size = self.config.interaction_chunk_size if chunk_size is None else chunk_size
            if chunk_size is not None and self.can_chunk:
                reduced = self._in_chunks(bins.keys, residues.keys, mask, chunk_size)
            else:
                reduced = self._at_once(bins, residues, mask)
        y_BTH = reduced.transpose(1, 2)
        if self.norm is None or self.config.interaction_norm_position == "pre":
            return y_BTH
        return self.norm(y_BTH, mask_BT)

    def scores(self, bins: Latents, residues: Latents, mask_BR: torch.Tensor | None) -> torch.Tensor:
        """Similarities (B, H, T, R), 0 at padding."""
        scores = self._product(bins.keys, residues.keys)
        return scores if mask_BR is None else scores.masked_fill(~mask_BR[:, None, None, :], 0.0)

    @property
    def can_chunk(self) -> bool:
        """Whether the reduction needs no more than a chunk of the map at once."""
        is_pre = self.norm is not None and self.config.interaction_norm_position == "pre"
        return self.config.interaction != "attention" and not is_pre

    def _at_once(self, bins: Latents, residues: Latents, mask: torch.Tensor | None) -> torch.Tensor:
        scores = self._product(bins.keys, residues.keys)
        null = self._null_scores(bins.keys)
        if null is not None:
            scores = torch.cat([grown_to(null, scores), scores], dim=-1)
            mask = None if mask is None else nn.functional.pad(mask, (1, 0), value=True)
        if self.norm is not None and self.config.interaction_norm_position == "pre":
            scores = normalize_map(self.norm, scores, mask)
        if self.config.interaction == "attention":
            return self._pooled(bins.keys, residues.values, scores, mask)
        return reduce_scores(scores, mask, self._reduction, self.temperature)

    def _pooled(
        self, keys: torch.Tensor, values: torch.Tensor | None, scores: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Values of the residues, pooled by the softmax of the scores, times the bins' latents; null is worth 0."""
        assert values is not None
        weights = _hide(scores / self.temperature, mask).softmax(-1)
        if self.null_residue is not None:
            weights = weights[..., 1:]
        return (keys * (weights @ values.to(weights.dtype))).sum(-1)

    def _in_chunks(self, a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor | None, chunk_size: int) -> torch.Tensor:
        temperature, kind = self.temperature, self._reduction

        def part(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor | None) -> Running:
            return Running.of(_hide(self._product(a, b), mask), kind, temperature, mask)

        null = self._null_scores(a)
        total = None if null is None else Running.of(null, kind, temperature, None)
        for start in range(0, b.shape[2], chunk_size):
            piece = b[:, :, start : start + chunk_size]
            seen = None if mask is None else mask[:, start : start + chunk_size]
            if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
                found = Running(*checkpoint(part, a, piece, seen, use_reentrant=False))
            else:
                found = part(a, piece, seen)
            total = found if total is None else total.merged(found)
        assert total is not None
        return total.result(kind, temperature)

    @property
    def _reduction(self) -> str:
        if self.config.interaction == "mean":
            return "mean"
        return "softmax" if self.config.interaction_norm == "softmax_residue" else self.config.filip_reduce

    def _null_scores(self, a_BHTK: torch.Tensor) -> torch.Tensor | None:
        """(B, H, T, 1)."""
        if self.null_residue is None:
            return None
        null = self.null_residue.to(a_BHTK.dtype)
        if self.config.interaction_similarity == "cosine":
            null = nn.functional.normalize(null, dim=-1, eps=COSINE_EPS) if self.config.normalize_null else null
        return self._scaled((a_BHTK * null[:, None]).sum(-1, keepdim=True))

    def _product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self._scaled(a @ b.transpose(-1, -2))

    def _scaled(self, scores: torch.Tensor) -> torch.Tensor:
        is_cosine = self.config.interaction_similarity == "cosine"
        return scores if is_cosine else scores * self.config.latent_dim**-0.5

    def _similar(self, x_BLI: torch.Tensor) -> torch.Tensor:
        x_BHLK = self._heads(x_BLI)
        x_BHLK = x_BHLK if x_BHLK.dtype == torch.float64 else x_BHLK.float()
        is_cosine = self.config.interaction_similarity == "cosine"
        return nn.functional.normalize(x_BHLK, dim=-1, eps=COSINE_EPS) if is_cosine else x_BHLK

    def _heads(self, x_BLI: torch.Tensor) -> torch.Tensor:
        return x_BLI.unflatten(-1, (self.config.latent_heads, self.config.latent_dim)).transpose(1, 2)

    def _visible(self, residues: Latents, mask_BR: torch.Tensor | None) -> torch.Tensor | None:
        """The mask less the residues that are dropped in training; a row is never emptied."""
        rate = self.config.residue_dropout
        if not self.training or not rate:
            return mask_BR
        shape = residues.keys.shape[0], residues.keys.shape[2]
        mask = residues.keys.new_ones(shape, dtype=torch.bool) if mask_BR is None else mask_BR
        kept = mask & (torch.rand(shape, device=mask.device) >= rate)
        return kept if self.null_residue is not None else torch.where(kept.any(1, keepdim=True), kept, mask)


class Running(NamedTuple):
    """What a reduction has seen so far.

    Attributes:
        first: (B, H, T) log-sum-exp ("logavgexp", "softmax"), maximum ("max") or sum ("mean").
        count: (B, 1, 1) how many residues.
        value: (B, H, T) softmax-weighted mean; unused but for "softmax".
        code: 0 = log-sum-exp, 1 = log-sum-exp with value, 2 = maximum, 3 = sum.
    """

    first: torch.Tensor
    count: torch.Tensor
    value: torch.Tensor
    code: int

    @classmethod
    def of(
        cls, scores: torch.Tensor, kind: str, temperature: torch.Tensor | float, mask: torch.Tensor | None
    ) -> "Running":
        """Of hidden scores (B, H, T, R)."""
        code = ("logavgexp", "softmax", "max", "mean").index(kind)
        if mask is None:
            count = scores.new_full((1, 1, 1), scores.shape[-1])
        else:
            count = mask.sum(-1).to(scores.dtype)[:, None, None]
        if kind == "max":
            return cls(scores.amax(-1), count, count, code)
        if kind == "mean":
            seen = scores if mask is None else scores.masked_fill(~mask[:, None, None, :], 0.0)
            return cls(seen.sum(-1), count, count, code)
        warm = scores / temperature
        total = warm.logsumexp(-1)
        if kind == "logavgexp":
            return cls(total, count, count, code)
        return cls(total, count, (warm.softmax(-1) * scores).sum(-1), code)

    def merged(self, other: "Running") -> "Running":
        """Of both."""
        count = self.count + other.count
        if self.code == 2:
            return Running(torch.maximum(self.first, other.first), count, count, self.code)
        if self.code == 3:
            return Running(self.first + other.first, count, count, self.code)
        total = torch.logaddexp(self.first, other.first)
        if self.code == 0:
            return Running(total, count, count, self.code)
        value = self.value * (self.first - total).exp() + other.value * (other.first - total).exp()
        return Running(total, count, value, self.code)

    def result(self, kind: str, temperature: torch.Tensor | float) -> torch.Tensor:
        """(B, H, T)."""
        if kind == "logavgexp":
            return temperature * (self.first - self.count.log())
        return {"max": self.first, "mean": self.first / self.count, "softmax": self.value}[kind]


def reduce_scores(
    scores: torch.Tensor, mask: torch.Tensor | None, kind: str, temperature: torch.Tensor | float
) -> torch.Tensor:
    """(B, H, T, R) -> (B, H, T) over the entries where `mask` (B, R) is True; None = all.

    Args:
        kind: "logavgexp" = temperature * (logsumexp(s / temperature) - log(count)), "max", "mean", or "softmax" = the
            mean weighted by softmax(s / temperature).
    """
    return Running.of(_hide(scores, mask), kind, temperature, mask).result(kind, temperature)


def grown_to(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """x with the batch of `like`."""
    return x.expand(like.shape[0], *x.shape[1:])


def no_autocast(x: torch.Tensor) -> Any:
    """Keeps float32 products float32 inside autocast."""
    return torch.autocast(x.device.type, enabled=False)


def _hide(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return scores if mask is None else scores.masked_fill(~mask[:, None, None, :], _HIDDEN)
