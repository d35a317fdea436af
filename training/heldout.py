"""Held-out language modelling: loss and accuracy of a model beside Markov chains, on the same positions."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genesplice_hf.objectives.masked import DnaMLMCollator
from training.markov import MarkovChain, base_codes, chain_predictions

MARKOV_ORDERS = (0, 3, 5, 8)
_BATCH = 64


class Corpus(NamedTuple):
    """Training windows, and held-out windows (rows with `sequence` and `example_id`) by genome."""

    train: Dataset
    held_out: dict[str, list[dict[str, Any]]]


class Asked(NamedTuple):
    """The positions of one batch that are predicted: window, position and true base (A0 C1 G2 T3)."""

    row: np.ndarray
    position: np.ndarray
    base: np.ndarray


def measure_heldout(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    settings: Any,
    seed: int,
) -> dict[str, dict[str, dict[str, float]]]:
    """Loss (nats per base) and accuracy on the same held-out bases, by genome and method.

    The model's probabilities are renormalised over A, C, G, T, as the chains' are. A masked model is asked for
    bases chosen and corrupted with a fixed seed by the training collator; a causal one for all but the first.
    """
    step = settings_overlap(corpus.train)
    sequences = [row["sequence"] for row in corpus.train.select(range(0, len(corpus.train), step))]
    chains = {order: MarkovChain(order).fit(sequences) for order in range(max(MARKOV_ORDERS) + 1)}
    return {
        genome: _measure(model, tokenizer, rows, chains, settings, seed) for genome, rows in corpus.held_out.items()
    }


def settings_overlap(train: Dataset) -> int:
    """How many consecutive windows cover one base, so that the chains count each base about once."""
    if len(train) < 2:
        return 1
    first, second = train[0], train[1]
    if first["chrom"] != second["chrom"] or second["start"] <= first["start"]:
        return 1
    return max(1, (first["end"] - first["start"]) // (second["start"] - first["start"]))


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    chains: dict[int, MarkovChain],
    settings: Any,
    seed: int,
) -> dict[str, dict[str, float]]:
    scores: dict[str, list[np.ndarray]] = {}
    truth = []
    for batch, logits, asked in _predictions(model, tokenizer, rows, settings, seed):
        truth.append(asked.base)
        scores.setdefault("model", []).append(_log_softmax(logits))
        codes = [base_codes(row["sequence"]) for row in batch]
        for order in MARKOV_ORDERS:
            table = np.stack([chain_predictions(chains, order, code) for code in codes])
            scores.setdefault(f"markov-{order}", []).append(table[asked.row, asked.position])
    base = np.concatenate(truth)
    return {name: _loss_and_accuracy(np.concatenate(parts), base) for name, parts in scores.items()}


@torch.inference_mode()
def _predictions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    settings: Any,
    seed: int,
) -> Iterator[tuple[list[dict[str, Any]], np.ndarray, Asked]]:
    """Yields the rows of a batch, the model's logits of A, C, G, T (N, 4) and the N positions asked."""
    model.eval()
    bases = np.array(tokenizer.convert_tokens_to_ids(list("ACGT")))
    collator = DnaMLMCollator(tokenizer, mlm_probability=settings.mlm_probability, seed=seed + 1)
    for first in range(0, len(rows), _BATCH):
        batch = rows[first : first + _BATCH]
        if settings.objective == "masked":
            inputs = collator(batch)
            labels = inputs.pop("labels").numpy()
        else:
            inputs = tokenizer([row["sequence"] for row in batch], padding=True, return_tensors="pt")
            labels = inputs["input_ids"].numpy().copy()
            labels[:, 0] = -100
        inputs.pop("loss_weight", None)
        logits = model(**{k: v.to(model.device) for k, v in inputs.items()}).logits.float().cpu().numpy()
        row, position = np.nonzero(np.isin(labels, bases))
        base = np.searchsorted(bases, labels[row, position])
        shift = 0 if settings.objective == "masked" else 1
        yield batch, logits[row, position - shift][:, bases], Asked(row, position, base)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def _loss_and_accuracy(log_probabilities: np.ndarray, base: Sequence[int] | np.ndarray) -> dict[str, float]:
    picked = log_probabilities[np.arange(len(base)), base]
    return {
        "loss": float(-picked.mean()),
        "bits_per_base": float(-picked.mean() / np.log(2)),
        "accuracy": float((log_probabilities.argmax(1) == base).mean()),
        "bases": float(len(base)),
    }
