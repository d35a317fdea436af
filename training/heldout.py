"""Held-out windows: bases predicted by a model beside Markov chains, on the same positions, and other objectives."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genesplice_hf.errors import DataError
from genesplice_hf.objectives.masked import DnaMLMCollator
from training.markov import MarkovChain, base_codes, count, predictions

logger = logging.getLogger(__name__)

# The tables of all twelve take 180 MB; every order more takes four times as much.
MARKOV_ORDERS = tuple(range(12))
# Bases per forward: 64 windows of 256, one window where it is longer.
_BATCH_BP = 64 * 256


class Corpus(NamedTuple):
    """What is trained on and what is only measured.

    Attributes:
        train: windows (rows by number, with `sequence`, `chrom`, `start` and `end`) that the chains are counted on;
            with a length curriculum the shortest ones, which leave the fewest bases out.
        held_out: rows with `sequence` and `example_id` by genome.
        by_stage: the windows of every stage of the length curriculum, in order.
    """

    train: Any
    held_out: dict[str, list[dict[str, Any]]]
    by_stage: Sequence[Any] = ()


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
    orders: Sequence[int] = MARKOV_ORDERS,
) -> dict[str, dict[str, dict[str, float]]]:
    """Loss (nats per base) and accuracy on the same held-out bases, by genome and method.

    The model's probabilities are renormalised over A, C, G, T, as the chains' are. A masked model is asked for
    bases chosen and corrupted with a fixed seed by the training collator; a causal one for all but the first.

    Args:
        model: a masked or a causal language model.
        tokenizer: of single bases.
        corpus: what the chains are counted on, and what is measured.
        settings: with `is_causal` (or else the model is asked as a masked one) and `mlm_probability`.
        seed: of the training; the masks of the measurement come from the next one.
        orders: of the chains to measure.
    """
    if not corpus.held_out:
        return {}
    chains = {order: MarkovChain(order) for order in range(max(orders, default=-1) + 1)}
    if chains:
        step = settings_overlap(corpus.train)
        count(chains, (corpus.train[i]["sequence"] for i in range(0, len(corpus.train), step)))
    return {
        genome: _measure(model, tokenizer, rows, chains, orders, settings, seed)
        for genome, rows in corpus.held_out.items()
    }


def settings_overlap(train: Any) -> int:
    """How many consecutive windows cover one base, so that the chains count each base about once."""
    if len(train) < 2:
        return 1
    first, second = train[0], train[1]
    if first["chrom"] != second["chrom"] or second["start"] <= first["start"]:
        return 1
    return max(1, (first["end"] - first["start"]) // (second["start"] - first["start"]))


class _Tally:
    """Sums over positions, so that the predictions of a batch are let go with it."""

    def __init__(self) -> None:
        self.loss = self.hits = 0.0
        self.bases = 0

    def add(self, log_probabilities: np.ndarray, base: np.ndarray) -> None:
        """Log probabilities (N, 4) and true bases (N,)."""
        self.loss -= float(log_probabilities[np.arange(len(base)), base].sum())
        self.hits += float((log_probabilities.argmax(1) == base).sum())
        self.bases += len(base)

    def result(self) -> dict[str, float]:
        loss = self.loss / self.bases if self.bases else float("nan")
        accuracy = self.hits / self.bases if self.bases else float("nan")
        return {"loss": loss, "bits_per_base": loss / np.log(2), "accuracy": accuracy, "bases": float(self.bases)}


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    chains: dict[int, MarkovChain],
    orders: Sequence[int],
    settings: Any,
    seed: int,
) -> dict[str, dict[str, float]]:
    tallies: dict[str, _Tally] = defaultdict(_Tally)
    for batch, logits, asked in _predictions(model, tokenizer, rows, settings, seed):
        tallies["model"].add(_log_softmax(logits), asked.base)
        for number, row in enumerate(batch if orders else ()):
            here = asked.row == number
            for order, table in predictions(chains, orders, base_codes(row["sequence"])):
                tallies[f"markov-{order}"].add(table[asked.position[here]], asked.base[here])
    return {name: tally.result() for name, tally in tallies.items()}


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
    is_causal = settings.is_causal
    collator = DnaMLMCollator(tokenizer, mlm_probability=settings.mlm_probability, seed=seed + 1)
    for batch in _batches(rows):
        if is_causal:
            inputs = tokenizer([row["sequence"] for row in batch], padding=True, return_tensors="pt")
            labels = inputs["input_ids"].numpy().copy()
            labels[:, 0] = -100
        else:
            inputs = collator(batch)
            labels = inputs.pop("labels").numpy()
        inputs.pop("loss_weight", None)
        logits = model(**{k: v.to(model.device) for k, v in inputs.items()}).logits.float().cpu().numpy()
        row, position = np.nonzero(np.isin(labels, bases))
        base = np.searchsorted(bases, labels[row, position])
        yield batch, logits[row, position - is_causal][:, bases], Asked(row, position, base)


@torch.inference_mode()
def measure_objectives(
    model: PreTrainedModel, corpus: Corpus, collator_of: Callable[[list[dict[str, Any]]], Any]
) -> dict[str, dict[str, float]]:
    """Mean losses (nats) and accuracies of an `EncoderForPreTraining` on the held-out windows, by genome.

    Losses are means over batches; a contrast is harder among more windows, so that `windows_per_batch` is told with
    it. `contrastive_accuracy` is the share of windows whose own view is the most similar of the batch.

    Args:
        model: with heads for what the collator asks.
        corpus: what is measured.
        collator_of: makes the collator from the held-out rows of a genome, among which partners are looked for.
    """
    model.eval()
    return {genome: _objectives(model, rows, collator_of(rows)) for genome, rows in corpus.held_out.items()}


def _objectives(model: PreTrainedModel, rows: list[dict[str, Any]], collator: Any) -> dict[str, float]:
    found: dict[str, list[float]] = defaultdict(list)
    # One window alone has nothing that it could be confused with.
    batches = list(_batches(rows, at_least=2))
    for batch in batches:
        try:
            inputs = {name: values.to(model.device) for name, values in collator(batch).items()}
        except DataError as error:
            logger.warning("Held-out segments are not measured: %s", error)
            return {}
        for name, value in _answers(model(**inputs), inputs).items():
            found[name].append(value)
    means = {name: float(np.mean(values)) for name, values in found.items()}
    return means | {"windows": float(len(rows)), "windows_per_batch": float(len(batches[0]))}


def _answers(outputs: Any, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Losses and accuracies of one batch."""
    names = ("mlm_loss", "contrastive_loss", "next_segment_loss")
    found = {name: outputs[name].item() for name in names if outputs.get(name) is not None}
    if outputs.get("view_embeddings") is not None:
        nearest = (outputs.embeddings @ outputs.view_embeddings.T).argmax(1).cpu()
        found["contrastive_accuracy"] = (nearest == torch.arange(len(nearest))).float().mean().item()
    if outputs.get("next_segment_logits") is not None:
        found["next_segment_accuracy"] = (
            ((outputs.next_segment_logits > 0) == (inputs["follows"] == 1)).float().mean().item()
        )
    return found


def _batches(rows: list[dict[str, Any]], at_least: int = 1) -> Iterator[list[dict[str, Any]]]:
    """Yields the rows, about `_BATCH_BP` bases at a time."""
    size = max(at_least, _BATCH_BP // max((len(row["sequence"]) for row in rows), default=1))
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    # Sums over many positions follow, so in the precision of the chains.
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
