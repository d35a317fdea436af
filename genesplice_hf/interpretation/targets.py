"""What is explained: the checked sequence, and the one number per sequence that is read off a model's logits.

Shapes: B batch, C labels.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from genesplice_hf.errors import GeneSpliceError, SequenceError

ScoreFunction = Callable[[torch.Tensor], torch.Tensor]

LEGAL_LETTERS = frozenset("ACGTN")


class Score(NamedTuple):
    """A score and its names for tables and axes; `of` maps float32 logits to one number a sequence, (B,)."""

    of: ScoreFunction
    name: str
    target_label: str


def check_sequence(sequence: str) -> str:
    """Returns `sequence` in upper case, or raises `SequenceError` unless it is made of A, C, G, T and N."""
    if not isinstance(sequence, str):
        raise SequenceError(f"`sequence` must be one string, was {type(sequence).__name__}")
    if not sequence:
        raise SequenceError("`sequence` is empty; pass at least one base")
    upper = sequence.upper()
    for position, letter in enumerate(upper, start=1):
        if letter not in LEGAL_LETTERS:
            raise SequenceError(
                f"`sequence` holds {sequence[position - 1]!r} at position {position}; use A, C, G, T or N "
                "(write U as T, and other ambiguity codes as N)"
            )
    return upper


def check_length(model: PreTrainedModel, num_tokens: int) -> None:
    """Raises `SequenceError` if the model declares fewer positions than `num_tokens`."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < num_tokens:
        raise SequenceError(
            f"`sequence` makes {num_tokens} tokens, the model takes {limit}; cut the sequence into windows"
        )


def resolve_score(config: Any, target: int | str | None, score: str | ScoreFunction) -> Score:
    """Builds the score that a caller names.

    Args:
        config: the model's config; `num_labels`, `label2id` and `problem_type` are read.
        target: label index or name; None means the only label, or the second of two.
        score: ``"logit"``: the target's logit (the prediction itself for a regressor).
            ``"logit_difference"``: the target's logit minus the log-sum-exp of the others, which is
            log(p / (1 - p)) under softmax and the plain difference for two labels. Or a callable
            that maps float32 logits of any shape to (B,).

    Raises:
        GeneSpliceError: the score is unknown or has no meaning for this model, or the target does not exist.
    """
    if callable(score):
        return _callable_score(score, target)
    if score not in _NAMED_SCORES:
        raise GeneSpliceError(f"`score` must be one of {sorted(_NAMED_SCORES)} or a callable, was {score!r}")
    index = _target_index(config, target)
    if score == "logit_difference":
        _check_difference(config)
    named = _NAMED_SCORES[score]
    label = _label(config, index)
    return Score(lambda logits: named(_check_logits(logits, config.num_labels), index), score, label)


def sequence_score(model: PreTrainedModel, score: Score, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Runs the model and returns one float32 score per sequence, (B,)."""
    logits = getattr(model(**inputs), "logits", None)
    if logits is None:
        raise GeneSpliceError(
            f"`model` ({type(model).__name__}) returns no `logits`; load it with a head, for example through "
            "AutoModelForSequenceClassification"
        )
    values = score.of(logits.float())
    if values.shape != logits.shape[:1]:
        raise GeneSpliceError(
            f"`score` must return one number per sequence, shape ({logits.shape[0]},), was {tuple(values.shape)}"
        )
    return values


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Switches dropout and the like off, then gives every module back the mode it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        # Module by module: a partly frozen model has parts in either mode.
        for module in training:
            module.training = True


def accepts_argument(model: PreTrainedModel, name: str) -> bool:
    """Says whether the model's forward takes the keyword `name`."""
    parameters = inspect.signature(model.forward).parameters.values()
    return any(p.name == name or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _logit(logits_BC: torch.Tensor, index: int) -> torch.Tensor:
    return logits_BC[:, index]


def _logit_difference(logits_BC: torch.Tensor, index: int) -> torch.Tensor:
    others = torch.cat([logits_BC[:, :index], logits_BC[:, index + 1 :]], dim=1)
    return logits_BC[:, index] - others.logsumexp(dim=1)


_NAMED_SCORES = {"logit": _logit, "logit_difference": _logit_difference}


def _callable_score(score: ScoreFunction, target: int | str | None) -> Score:
    if target is not None:
        raise GeneSpliceError(
            f"`target` ({target!r}) has no meaning beside a callable `score`; choose the label inside the callable"
        )
    name = getattr(score, "__name__", type(score).__name__)
    return Score(score, name, name)


def _target_index(config: Any, target: int | str | None) -> int:
    labels = [_label(config, index) for index in range(config.num_labels)]
    if target is None and len(labels) <= 2:
        return len(labels) - 1
    if isinstance(target, str) and target in labels:
        return labels.index(target)
    if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(labels):
        return target
    raise GeneSpliceError(f"`target` must be one of {labels} or an index below {len(labels)}, was {target!r}")


def _label(config: Any, index: int) -> str:
    return str((config.id2label or {}).get(index, index))


def _check_difference(config: Any) -> None:
    if config.num_labels < 2 or config.problem_type in ("regression", "multi_label_classification"):
        raise GeneSpliceError(
            "`score`='logit_difference' compares labels that exclude each other, which this model has not "
            f"(`num_labels`={config.num_labels}, `problem_type`={config.problem_type!r}); use 'logit'"
        )


def _check_logits(logits: torch.Tensor, num_labels: int) -> torch.Tensor:
    if logits.dim() != 2 or logits.shape[1] != num_labels:
        raise GeneSpliceError(
            f"the model's logits have shape {tuple(logits.shape)}, a sequence classifier's "
            f"are (batch, {num_labels}); pass a callable `score` that maps them to (batch,)"
        )
    return logits
