"""Attributions from gradients on the token embeddings: gradient x input, and integrated gradients.

Shapes: T tokens, E embedding size, L bases, S steps of the path.
"""

import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genesplice_hf.errors import GeneSpliceError
from genesplice_hf.genome.alphabet import BASES
from genesplice_hf.interpretation.encoding import SingleBaseLayout, encode, single_base_layout
from genesplice_hf.interpretation.targets import (
    Score,
    ScoreFunction,
    accepts_argument,
    check_length,
    check_sequence,
    evaluation_mode,
    resolve_score,
    sequence_score,
)

logger = logging.getLogger(__name__)

# Share of the change in score that the attributions may miss before a warning is due.
TOLERATED_GAP = 0.05


@dataclass(frozen=True, eq=False)
class AttributionResult:
    """How much each token contributes to the score, in the score's unit; positive raises it.

    Attributes:
        sequence: the explained sequence, upper case.
        tokens: T token strings, special tokens included.
        attributions: (T,) float32.
        score: score of the sequence.
        baseline_score: score of the baseline; None for gradient x input, which has none.
        prefix: index of the first base's token, None unless one token is one base.
    """

    sequence: str
    tokens: list[str]
    attributions: np.ndarray
    score: float
    baseline_score: float | None
    prefix: int | None

    @property
    def base_attributions(self) -> np.ndarray:
        """(L,) the part of `attributions` that belongs to the bases, for single-base tokenizers only."""
        if self.prefix is None:
            raise GeneSpliceError("`base_attributions` needs one token per base; use `attributions` and `tokens`")
        return self.attributions[self.prefix : self.prefix + len(self.sequence)]

    @property
    def completeness_gap(self) -> float:
        """Sum of the attributions minus (score - baseline score): 0 for an exact path integral."""
        if self.baseline_score is None:
            raise GeneSpliceError("`completeness_gap` exists for integrated gradients only")
        return float(self.attributions.sum(dtype=np.float64)) - (self.score - self.baseline_score)


def gradient_x_input(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequence: str,
    *,
    target: int | str | None = None,
    score: Literal["logit", "logit_difference"] | ScoreFunction = "logit",
) -> AttributionResult:
    """Multiplies each token's embedding with the score's gradient there (Shrikumar et al., arXiv:1605.01713).

    One forward and one backward pass: a first look, exact for linear models only. Arguments and errors as for
    `integrated_gradients`.
    """
    explained = _Explained(model, tokenizer, sequence, resolve_score(model.config, target, score))
    with evaluation_mode(model):
        gradient_TE, scores = explained.gradients(explained.embeddings_TE[None])
    return explained.result(gradient_TE[0] * explained.embeddings_TE, float(scores[0]), None)


def integrated_gradients(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequence: str,
    *,
    target: int | str | None = None,
    score: Literal["logit", "logit_difference"] | ScoreFunction = "logit",
    baseline: Literal["bases", "zero"] | torch.Tensor = "bases",
    steps: int = 32,
    batch_size: int = 16,
) -> AttributionResult:
    """Integrates the gradient along the straight line from `baseline` to the sequence's embeddings.

    Sundararajan et al., arXiv:1703.01365, equation 1. The integral is a Gauss-Legendre sum, so that
    `completeness_gap` shrinks fast with `steps`; a gap above 5 % of the change in score is logged as a warning.

    Args:
        model: a sequence classifier or regressor whose forward takes `inputs_embeds`.
        tokenizer: the model's tokenizer.
        sequence: A, C, G, T and N in either case; explained in upper case.
        target, score: as in `in_silico_mutagenesis`.
        baseline: ``"bases"``: every base becomes the mean of the four bases' embeddings, special tokens stay
            (single-base tokenizers only). ``"zero"``: all embeddings 0; no good for models that normalise the
            embeddings first (RMSNorm, LayerNorm), which jump there. Or a tensor (T, E).
        steps: points on the path.
        batch_size: points per forward and backward pass.

    Raises:
        SequenceError: the sequence is empty, holds other letters or is too long for the model.
        GeneSpliceError: an option cannot be used, or the model takes no `inputs_embeds`.
    """
    if steps < 1 or batch_size < 1:
        raise GeneSpliceError(f"`steps` ({steps}) and `batch_size` ({batch_size}) must be at least 1")
    explained = _Explained(model, tokenizer, sequence, resolve_score(model.config, target, score))
    start_TE = explained.baseline(baseline)
    difference_TE = explained.embeddings_TE - start_TE
    fractions_S, weights_S = _unit_quadrature(steps, difference_TE)
    mean_TE = torch.zeros_like(difference_TE)
    with evaluation_mode(model):
        for fractions, weights in zip(fractions_S.split(batch_size), weights_S.split(batch_size), strict=True):
            path_STE = start_TE + fractions[:, None, None] * difference_TE
            mean_TE += torch.einsum("s,ste->te", weights, explained.gradients(path_STE)[0])
        ends = explained.scores(torch.stack([explained.embeddings_TE, start_TE]))
    result = explained.result(mean_TE * difference_TE, float(ends[0]), float(ends[1]))
    _warn_of_gap(result, steps)
    return result


class _Explained:
    """One sequence as embeddings, with the score and its gradient at any point of the embedding space."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sequence: str, score: Score):
        _check_embeddings_accepted(model)
        self._model, self._score = model, score
        self.sequence = check_sequence(sequence)
        inputs = encode(tokenizer, [self.sequence], next(model.parameters()).device)
        self._ids_T = inputs.pop("input_ids")[0]
        self._other_inputs = inputs
        check_length(model, len(self._ids_T))
        self.tokens = tokenizer.convert_ids_to_tokens(self._ids_T.tolist())
        self.layout = single_base_layout(tokenizer, self.sequence, self._ids_T)
        self.embeddings_TE = self._embed(self._ids_T)

    def scores(self, embeddings_STE: torch.Tensor) -> torch.Tensor:
        """Scores S points without a gradient, (S,)."""
        with torch.no_grad():
            return self._forward(embeddings_STE)

    def gradients(self, embeddings_STE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the score's gradient at S points, (S, T, E), and the scores, (S,)."""
        with torch.enable_grad():
            points_STE = embeddings_STE.detach().requires_grad_(True)
            scores_S = self._forward(points_STE)
            # Only the points are asked for: the parameters' own gradients stay untouched.
            (gradients_STE,) = torch.autograd.grad(scores_S.sum(), points_STE)
        return gradients_STE, scores_S.detach()

    def baseline(self, choice: str | torch.Tensor) -> torch.Tensor:
        """Returns the baseline's embeddings, (T, E)."""
        if isinstance(choice, torch.Tensor):
            return self._check_baseline(choice)
        if choice == "zero":
            return torch.zeros_like(self.embeddings_TE)
        if choice == "bases" and self.layout is not None:
            return self._mean_base(self.layout)
        raise GeneSpliceError(
            f"`baseline` must be 'zero', a (T, E) tensor or, for single-base tokenizers, 'bases'; was {choice!r}"
        )

    def result(self, contributions_TE: torch.Tensor, score: float, baseline_score: float | None) -> AttributionResult:
        """Sums contributions over the embedding and names them."""
        attributions = contributions_TE.detach().double().sum(dim=-1).float().cpu().numpy()
        prefix = self.layout.prefix if self.layout else None
        return AttributionResult(self.sequence, self.tokens, attributions, score, baseline_score, prefix)

    def _forward(self, embeddings_STE: torch.Tensor) -> torch.Tensor:
        others = {name: tensor.expand(len(embeddings_STE), -1) for name, tensor in self._other_inputs.items()}
        return sequence_score(self._model, self._score, {"inputs_embeds": embeddings_STE, **others})

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self._model.get_input_embeddings()(ids)

    def _check_baseline(self, baseline: torch.Tensor) -> torch.Tensor:
        if baseline.shape != self.embeddings_TE.shape:
            raise GeneSpliceError(
                f"`baseline` must have the embeddings' shape {tuple(self.embeddings_TE.shape)}, "
                f"was {tuple(baseline.shape)}"
            )
        return baseline.to(self.embeddings_TE)

    def _mean_base(self, layout: SingleBaseLayout) -> torch.Tensor:
        baseline_TE = self.embeddings_TE.clone()
        mean_E = self._embed(layout.base_ids.to(baseline_TE.device)).mean(dim=0)
        known = [layout.prefix + index for index, base in enumerate(self.sequence) if base in BASES]
        baseline_TE[known] = mean_E
        return baseline_TE


def _check_embeddings_accepted(model: PreTrainedModel) -> None:
    if not accepts_argument(model, "inputs_embeds"):
        raise GeneSpliceError(
            f"`model` ({type(model).__name__}) takes no `inputs_embeds`, which gradients need; "
            "use in_silico_mutagenesis"
        )


def _warn_of_gap(result: AttributionResult, steps: int) -> None:
    change = abs(result.score - (result.baseline_score or 0.0))
    # Below this the gap is rounding of float32 scores.
    if abs(result.completeness_gap) > max(TOLERATED_GAP * change, 1e-4):
        logger.warning(
            "the attributions miss the change in score (%.3g) by %.3g: raise `steps` (%d) or use another `baseline`",
            change,
            result.completeness_gap,
            steps,
        )


def _unit_quadrature(steps: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gauss-Legendre points and weights on [0, 1], in the dtype and on the device of `like`."""
    points, weights = np.polynomial.legendre.leggauss(steps)
    return torch.from_numpy((points + 1) / 2).to(like), torch.from_numpy(weights / 2).to(like)
