"""Markov chains against counting in dictionaries, one base at a time."""

import math
from collections import Counter

import numpy as np
import pytest

from training import markov
from training.markov import MarkovChain, base_codes, chain_predictions, count, predictions

COMPLEMENT = {"A": "T", "C": "G", "G": "C", "T": "A", "N": "N"}


def random_sequence(length: int, seed: int, letters: str = "ACGT") -> str:
    return "".join(np.random.default_rng(seed).choice(list(letters), length))


def counted(sequences: list[str], order: int) -> Counter:
    """(context, base) -> occurrences on both strands; contexts or bases with N do not count."""
    counts = Counter()
    for sequence in sequences:
        forward = sequence.upper()
        backward = "".join(COMPLEMENT[base] for base in reversed(forward))
        for strand in (forward, backward):
            for i in range(order, len(strand)):
                if "N" not in strand[i - order : i + 1]:
                    counts[strand[i - order : i], strand[i]] += 1
    return counts


def log_probability(counts: Counter, context: str, base: str) -> float:
    """Add-one smoothing over the four bases."""
    return math.log((counts[context, base] + 1) / (sum(counts[context, other] for other in "ACGT") + 4))


SEQUENCES = [random_sequence(120, 0), random_sequence(60, 1, "ACGTN").lower(), "AC", ""]


@pytest.mark.parametrize("order", [0, 1, 2, 3, 5])
def test_predictions_are_the_dictionarys(order) -> None:
    chain, counts = MarkovChain(order).fit(SEQUENCES), counted(SEQUENCES, order)
    text = random_sequence(80, 2, "ACGTN")
    table = chain.log_probabilities(base_codes(text))
    for i in range(len(text)):
        context = text[max(0, i - order) : i]
        if len(context) < order or "N" in context:
            assert np.isnan(table[i]).all()
        else:
            expected = [log_probability(counts, context, base) for base in "ACGT"]
            np.testing.assert_allclose(table[i], expected, rtol=0, atol=1e-12)


def test_every_row_is_a_distribution() -> None:
    table = MarkovChain(2).fit(SEQUENCES).log_probabilities(base_codes("ACGTACGT"))
    np.testing.assert_allclose(np.exp(table[2:]).sum(1), 1, atol=1e-12)


def test_a_chain_that_saw_nothing_is_undecided() -> None:
    np.testing.assert_allclose(np.exp(MarkovChain(1).log_probabilities(base_codes("AC"))[1]), 0.25)


def test_fitting_again_adds_to_the_counts() -> None:
    once = MarkovChain(2).fit(SEQUENCES)
    bit_by_bit = MarkovChain(2)
    for sequence in SEQUENCES:
        bit_by_bit.fit([sequence])
    assert np.array_equal(once.counts, bit_by_bit.counts)


def test_both_strands_count_the_same() -> None:
    forward = random_sequence(200, 3)
    backward = "".join(COMPLEMENT[base] for base in reversed(forward))
    assert np.array_equal(MarkovChain(3).fit([forward]).counts, MarkovChain(3).fit([backward]).counts)


@pytest.mark.parametrize("text", ["", "A", "ACG", "NACGTNNACGT"])
def test_short_contexts_fall_back_to_the_longest_that_is_known(text) -> None:
    chains = {order: MarkovChain(order).fit(SEQUENCES) for order in range(4)}
    counts = {order: counted(SEQUENCES, order) for order in range(4)}
    table = chain_predictions(chains, 3, base_codes(text))
    assert table.shape == (len(text), 4)
    for i in range(len(text)):
        known = text[:i].rpartition("N")[2][-3:]
        expected = [log_probability(counts[len(known)], known, base) for base in "ACGT"]
        np.testing.assert_allclose(table[i], expected, rtol=0, atol=1e-12)


def test_letters_become_codes_in_alphabetical_order() -> None:
    assert base_codes("ACGTacgtNRn").tolist() == [0, 1, 2, 3, 0, 1, 2, 3, -1, -1, -1]


@pytest.mark.parametrize("bases_at_a_time", [1, 70, 10**6])
def test_counting_together_and_in_bundles_is_counting_alone(bases_at_a_time, monkeypatch) -> None:
    """Sequences that share a bundle share no context."""
    monkeypatch.setattr(markov, "_BASES_AT_A_TIME", bases_at_a_time)
    chains = {order: MarkovChain(order) for order in (0, 2, 6, 11)}
    count(chains, SEQUENCES)
    for order, chain in chains.items():
        expected = counted(SEQUENCES, order)
        assert chain.counts.sum() - 4 ** (order + 1) == expected.total()
        for (context, base), times in expected.items():
            index = int("".join(str("ACGT".index(letter)) for letter in context) or "0", 4)
            assert chain.counts[index, "ACGT".index(base)] == times + 1


def test_one_sweep_gives_every_order_what_it_gives_alone() -> None:
    chains = {order: MarkovChain(order).fit(SEQUENCES) for order in (0, 1, 4, 7)}
    codes = base_codes(random_sequence(90, 5, "ACGTN"))
    swept = dict(predictions(chains, (1, 4, 5, 7), codes))
    assert list(swept) == [1, 4, 5, 7]
    for order in (1, 4, 7):
        own = chains[order].log_probabilities(codes)
        known = ~np.isnan(own[:, 0])
        assert np.array_equal(swept[order][known], own[known])
        assert np.array_equal(swept[order], chain_predictions(chains, order, codes))
        assert not np.isnan(swept[order]).any()
    assert np.array_equal(swept[5], swept[4])
