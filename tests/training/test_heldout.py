"""Held-out measurement against loops over positions, with a model whose answers are known.

The toy model reads the previous and the next base, so that its probabilities can be worked out by hand.
"""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers.modeling_outputs import MaskedLMOutput

from genesplice_hf.objectives.masked import DnaMLMCollator
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer
from training import heldout
from training.heldout import Corpus, measure_heldout, settings_overlap
from training.markov import MarkovChain, base_codes, chain_predictions
from training.objectives import LanguageModelSettings

TOKENIZER = NucleotideTokenizer(preset="genesplice")
SEED, WINDOW = 3, 30


class Toy(torch.nn.Module):
    """Logits of position i: the row of a random table that belongs to the token that the model sees there."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))
        self.device = torch.device("cpu")

    def forward(self, input_ids, attention_mask) -> MaskedLMOutput:
        return MaskedLMOutput(logits=self.table[input_ids])


def sequences(count: int, seed: int, letters: str = "ACGT") -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(letters), WINDOW)) for _ in range(count)]


def windows(texts: list[str], step: int) -> list[dict]:
    return [
        {"chrom": "c", "start": i * step, "end": i * step + WINDOW, "sequence": text, "example_id": f"toy|c:{i}"}
        for i, text in enumerate(texts)
    ]


@pytest.fixture
def corpus() -> Corpus:
    held_out = {"one": windows(sequences(5, 1, "ACGTN"), WINDOW), "two": windows(sequences(2, 2), WINDOW)}
    return Corpus(Dataset.from_list(windows(sequences(9, 0), WINDOW)), held_out)


def asked_positions(rows: list[dict], settings: LanguageModelSettings) -> list[list[int]]:
    """Positions of every row that are to be predicted, and what the model sees there."""
    if settings.objective == "causal":
        return [[i for i in range(1, WINDOW) if row["sequence"][i] != "N"] for row in rows]
    collator = DnaMLMCollator(TOKENIZER, mlm_probability=settings.mlm_probability, seed=SEED + 1)
    return [[i for i, label in enumerate(labels) if label != -100] for labels in collator(rows)["labels"].tolist()]


def seen(rows: list[dict], settings: LanguageModelSettings) -> torch.Tensor:
    if settings.objective == "causal":
        return TOKENIZER([row["sequence"] for row in rows], return_tensors="pt")["input_ids"]
    return DnaMLMCollator(TOKENIZER, mlm_probability=settings.mlm_probability, seed=SEED + 1)(rows)["input_ids"]


def summary(rows: list[tuple[list[float], int]]) -> dict[str, float]:
    """Mean of -log p of the true base, and the share of bases that are the likeliest (the first of equals)."""
    losses = [-values[base] for values, base in rows]
    hits = [values.index(max(values)) == base for values, base in rows]
    loss = sum(losses) / len(losses)
    return {"loss": loss, "bits_per_base": loss / math.log(2), "accuracy": np.mean(hits), "bases": len(rows)}


def normalised(scores: list[float]) -> list[float]:
    total = math.log(sum(math.exp(score) for score in scores))
    return [score - total for score in scores]


@pytest.mark.parametrize("objective", ["masked", "causal"])
@pytest.mark.parametrize("batch_bp", [10, 2 * WINDOW, 64 * 256])
def test_loss_and_accuracy_are_those_of_a_loop(objective, batch_bp, corpus, monkeypatch) -> None:
    monkeypatch.setattr(heldout, "_BATCH_BP", batch_bp)
    settings, toy = LanguageModelSettings(objective=objective, mlm_probability=0.3), Toy()
    measured = measure_heldout(toy, TOKENIZER, corpus, settings, SEED)
    chains = {order: MarkovChain(order).fit(corpus.train["sequence"]) for order in range(12)}
    assert set(measured) == {"one", "two"}
    for name, rows in corpus.held_out.items():
        ids, by_method = seen(rows, settings), {"model": []}
        for b, positions in enumerate(asked_positions(rows, settings)):
            text = rows[b]["sequence"]
            for i in positions:
                base, shift = "ACGT".index(text[i]), 1 if objective == "causal" else 0
                scores = toy.table[ids[b, i - shift]].tolist()[5:9]
                by_method["model"].append((normalised(scores), base))
                for order in range(12):
                    table = chain_predictions(chains, order, base_codes(text))
                    by_method.setdefault(f"markov-{order}", []).append((table[i].tolist(), base))
        expected = {method: summary(values) for method, values in by_method.items()}
        assert measured[name].keys() == expected.keys()
        for method, numbers in expected.items():
            assert measured[name][method] == pytest.approx(numbers, rel=1e-5), (name, method)


@pytest.mark.parametrize("objective", ["masked", "causal"])
def test_the_same_seed_asks_the_same_and_the_model_is_left_in_evaluation_mode(objective, corpus) -> None:
    settings, toy = LanguageModelSettings(objective=objective, mlm_probability=0.3), Toy().train()
    first, second = (measure_heldout(toy, TOKENIZER, corpus, settings, SEED) for _ in range(2))
    assert first == second
    assert not toy.training


@pytest.mark.parametrize(("step", "overlap"), [(WINDOW, 1), (10, 3), (15, 2), (40, 1), (1, 30)])
def test_overlap_is_how_often_a_base_is_covered(step, overlap) -> None:
    assert settings_overlap(Dataset.from_list(windows(sequences(4, 0), step))) == overlap


def test_overlap_is_not_read_across_contigs() -> None:
    """Two windows that both start a contig say nothing; thinning by them would starve the chains."""
    rows = windows(sequences(2, 0), 0)
    rows[1]["chrom"] = "d"
    assert settings_overlap(Dataset.from_list(rows)) == 1
    assert settings_overlap(Dataset.from_list(rows[:1])) == 1


def test_overlapping_windows_give_the_chains_each_base_once(corpus) -> None:
    """The same genome in overlapping windows and end to end: the same counts, the same losses."""
    genome = "".join(sequences(9, 0))
    overlapping = [genome[i : i + WINDOW] for i in range(0, len(genome) - WINDOW + 1, 10)]
    dense = corpus._replace(train=Dataset.from_list(windows(overlapping, 10)))
    settings = LanguageModelSettings(objective="causal", mlm_probability=0.3)
    results = [measure_heldout(Toy(), TOKENIZER, part, settings, SEED) for part in (corpus, dense)]
    assert results[0] == results[1]
