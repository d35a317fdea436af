"""Masking overlapping k-mers: above all, no label may be read off what stays visible."""

import itertools

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from genesplice_hf.errors import GeneSpliceError
from genesplice_hf.objectives.masked import KmerSpanCollator
from genesplice_hf.tokenization.tokenization_kmer import KmerTokenizer

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NAMES = {f"{name[1:-1].lower()}_token": name for name in SPECIALS}
MASK = 4
# Offsets around a centre in the data collator of DNABERT (Ji et al. 2021), by k.
DNABERT_OFFSETS = {3: [-1, 1], 4: [-1, 1, 2], 5: [-2, -1, 1, 2], 6: [-2, -1, 1, 2, 3]}


def kmer_text_tokenizer(k: int) -> PreTrainedTokenizerFast:
    """Reads k-mers written with spaces, by a plain dictionary: independent of our own k-mer tokenizer."""
    vocabulary = SPECIALS + ["".join(letters) for letters in itertools.product("ATCG", repeat=k)]
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES)


def random_dna(length: int, seed: int) -> str:
    return "".join(np.random.default_rng(seed).choice(list("ACGT"), length))


def kmer_ids(tokenizer, sequence: str, k: int) -> list[int]:
    return tokenizer(" ".join(sequence[i : i + k] for i in range(len(sequence) - k + 1)))["input_ids"]


def standard_error(share: float, count: int) -> float:
    return np.sqrt(share * (1 - share) / count)


def readable(labels: np.ndarray, seen: np.ndarray, k: int) -> np.ndarray:
    """For each labelled token: can its whole k-mer be read off tokens that show the truth?"""
    shows_truth = (labels == -100) | (seen == labels)
    known = np.zeros(len(labels) + k - 1, bool)
    for j in range(k):
        known[np.flatnonzero(shows_truth) + j] = True
    return np.lib.stride_tricks.sliding_window_view(known, k).all(1)[labels != -100]


def mask_per_token(ids: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The reference scheme, written as a loop: centres, offsets, then 80/10/10 for every token alone."""
    draw = np.random.default_rng(seed)
    labels, seen = np.full(len(ids), -100), ids.copy()
    for center in np.flatnonzero(draw.random(len(ids)) < 0.15 / k):
        for offset in [0, *DNABERT_OFFSETS[k]]:
            if 0 <= center + offset < len(ids):
                labels[center + offset] = ids[center + offset]
    for i in np.flatnonzero(labels != -100):
        action = draw.random()
        if action < 0.8:
            seen[i] = MASK
        elif action < 0.9:
            seen[i] = draw.integers(len(SPECIALS), len(SPECIALS) + 4**k)
    return labels, seen


@pytest.mark.parametrize("k, leak", [(3, 0.264), (4, 0.335), (5, 0.390), (6, 0.45)])
def test_the_measure_sees_the_leak_of_the_reference(k, leak):
    ids = np.array(kmer_ids(kmer_text_tokenizer(k), random_dna(100_000, seed=k), k))
    masked = [mask_per_token(ids, k, seed) for seed in range(3)]
    assert abs(np.mean([readable(*pair, k).mean() for pair in masked]) - leak) < 0.02
    assert abs(np.mean([(labels != -100).mean() for labels, _ in masked]) - 0.141) < 0.005


def collate_long(k: int, seed: int, **arguments) -> tuple[np.ndarray, np.ndarray]:
    tokenizer = kmer_text_tokenizer(k)
    collator = KmerSpanCollator(tokenizer, seed=seed, **arguments)
    batch = collator([{"input_ids": kmer_ids(tokenizer, random_dna(60_000, seed=seed), k)}])
    return batch["labels"][0].numpy(), batch["input_ids"][0].numpy()


def run_lengths(labels: np.ndarray) -> np.ndarray:
    return np.array([len(list(g)) for chosen, g in itertools.groupby(labels != -100) if chosen])


@pytest.mark.parametrize("scheme", ["hide_bases", "dnabert"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("k", [3, 4, 5, 6])
def test_no_label_is_readable(k, seed, scheme):
    labels, seen = collate_long(k, seed, scheme=scheme, mask_share=1.0, random_share=0.0, keep_share=0.0)
    assert readable(labels, seen, k).sum() == 0
    # With a keep share exactly the kept runs are readable; independent random k-mers cannot spell the truth.
    labels, seen = collate_long(k, seed, scheme=scheme, random_kind="independent")
    lengths = run_lengths(labels)
    error = np.sqrt(0.1 * 0.9 * (lengths**2).sum()) / lengths.sum()
    share = readable(labels, np.where(seen == labels, seen, MASK), k).mean()
    assert share <= 0.1 + 3 * error
    assert share > 0.02


@pytest.mark.parametrize("k", [3, 6])
def test_span_rate_and_width(k):
    labels, _ = collate_long(k, seed=4)
    width = 6 + k - 1
    # The tokens of a span move together.
    assert abs((labels != -100).mean() - 0.15) < 3 * standard_error(0.15, len(labels) / width)
    assert run_lengths(labels)[1:-1].min() == width
    labels, _ = collate_long(k, seed=4, scheme="dnabert")
    expected = 1 - (1 - 0.15 / k) ** k
    assert abs((labels != -100).mean() - expected) < 3 * standard_error(expected, len(labels) / k)
    assert run_lengths(labels)[1:-1].min() == k


def test_ends_are_masked_as_often_as_the_middle():
    tokenizer = kmer_text_tokenizer(3)
    collator = KmerSpanCollator(tokenizer, mlm_probability=0.3, seed=0)
    sequence = random_dna(22, seed=0)
    ids = kmer_ids(tokenizer, sequence, 3)
    batch = collator([{"input_ids": ids, "example_id": i} for i in range(3000)])
    share = (batch["labels"] != -100).float().mean(0).numpy()
    assert np.abs(share - 0.3).max() < 4 * standard_error(0.3, 3000)


def spell(tokens: list[str]) -> str:
    """Joins k-mers that each move one base on; fails where neighbours contradict each other."""
    for left, right in itertools.pairwise(tokens):
        assert left[1:] == right[:-1]
    return tokens[0] + "".join(token[-1] for token in tokens[1:])


@pytest.mark.parametrize("k", [3, 6])
def test_consistent_random_runs_spell_dna(k):
    tokenizer = kmer_text_tokenizer(k)
    sequence = random_dna(4000, seed=k)
    shares = {"mask_share": 0.0, "random_share": 1.0, "keep_share": 0.0}
    batch = KmerSpanCollator(tokenizer, seed=1, **shares)([{"input_ids": kmer_ids(tokenizer, sequence, k)}])
    lie = spell(tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist()))
    known = np.zeros(len(sequence), bool)
    for i in np.flatnonzero(batch["labels"][0].numpy() == -100):
        known[i : i + k] = True
    same = np.array(list(lie)) == np.array(list(sequence))
    assert same[known].all()
    hidden = (~known).sum()
    assert hidden > 100 and abs(same[~known].mean() - 0.25) < 4 * standard_error(0.25, hidden)


def test_independent_random_runs_do_not_agree():
    tokenizer = kmer_text_tokenizer(6)
    collator = KmerSpanCollator(
        tokenizer, mask_share=0.0, random_share=1.0, keep_share=0.0, random_kind="independent", seed=1
    )
    batch = collator([{"input_ids": kmer_ids(tokenizer, random_dna(500, seed=0), 6)}])
    with pytest.raises(AssertionError):
        spell(tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist()))


def test_one_decision_per_run():
    labels, seen = collate_long(6, seed=3)
    kinds = []
    chosen = np.flatnonzero(labels != -100)
    for run in np.split(chosen, np.flatnonzero(np.diff(chosen) > 1) + 1):
        masked, kept = (seen[run] == MASK), (seen[run] == labels[run])
        assert masked.all() or not masked.any()
        kinds.append("mask" if masked.all() else "keep" if kept.all() else "random")
    for kind, share in (("mask", 0.8), ("random", 0.1), ("keep", 0.1)):
        assert abs(kinds.count(kind) / len(kinds) - share) < 3 * standard_error(share, len(kinds))


def test_specials_unknown_windows_and_pads_are_untouched():
    tokenizer, k = kmer_text_tokenizer(4), 4
    collator = KmerSpanCollator(tokenizer, mlm_probability=1.0, seed=0)
    inner = kmer_ids(tokenizer, "ACGTTGCANACGATTC", k)
    ids = [2, *inner, 3]
    batch = collator([{"input_ids": ids}, {"input_ids": [2, *kmer_ids(tokenizer, "ACGTTG" * 9, k), 3]}])
    is_kmer = np.array(ids) >= len(SPECIALS)
    assert inner.count(1) == k
    assert batch["labels"][0, : len(ids)].tolist() == np.where(is_kmer, ids, -100).tolist()
    kept = batch["input_ids"][0, : len(ids)].numpy()[~is_kmer]
    assert kept.tolist() == np.array(ids)[~is_kmer].tolist()
    assert (batch["labels"][0, len(ids) :] == -100).all() and (batch["input_ids"][0, len(ids) :] == 0).all()
    only_specials = collator([{"input_ids": [2, 1, 3]}])
    assert only_specials["input_ids"].tolist() == [[2, 1, 3]] and (only_specials["labels"] == -100).all()


def test_pieces_of_one_sequence_do_not_leak_across_their_border():
    tokenizer, k = kmer_text_tokenizer(6), 6
    ids = kmer_ids(tokenizer, random_dna(20_005, seed=0), k)
    pieces = [i for start in range(0, len(ids), 10) for i in (2, *ids[start : start + 10], 3)]
    collator = KmerSpanCollator(tokenizer, mask_share=1.0, random_share=0.0, keep_share=0.0, seed=0)
    batch = collator([{"input_ids": pieces}])
    inner = np.isin(pieces, [2, 3], invert=True)
    labels, seen = batch["labels"][0].numpy(), batch["input_ids"][0].numpy()
    assert (labels[~inner] == -100).all()
    assert (labels != -100).sum() > 1000
    assert readable(labels[inner], seen[inner], k).sum() == 0


def test_works_on_pairs_and_short_sequences():
    tokenizer = kmer_text_tokenizer(3)
    first, second = kmer_ids(tokenizer, "ACGTA", 3), kmer_ids(tokenizer, "GGC", 3)
    collator = KmerSpanCollator(tokenizer, mlm_probability=1.0, mask_share=1.0, random_share=0.0, keep_share=0.0)
    batch = collator([{"input_ids": [2, *first, 3, *second, 3], "token_type_ids": [0] * 5 + [1] * 2}])
    assert batch["input_ids"].tolist() == [[2, 4, 4, 4, 3, 4, 3]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 0, 1, 1]]


def test_with_our_kmer_tokenizer_from_raw_strings():
    tokenizer = KmerTokenizer(k=6, stride=1, preset="dnabert6")
    collator = KmerSpanCollator(tokenizer, soft_mask_weight=0.0, mlm_probability=0.5, seed=0)
    batch = collator([{"sequence": random_dna(200, seed=1).lower() + random_dna(200, seed=2)}, {"sequence": "ACG"}])
    labelled = batch["labels"][0] != -100
    assert labelled.sum() > 100 and (batch["labels"][1] == -100).all()
    start = torch.arange(batch["labels"].shape[1]) - 1
    lower_share = ((200 - start).clamp(0, 6) / 6).float()
    torch.testing.assert_close(batch["loss_weight"][0][labelled], (1 - lower_share)[labelled])


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"scheme": "token"}, "scheme"), ({"random_kind": "any"}, "random_kind"), ({"span_bases": 0}, "span_bases"),
        ({"span_bases": 2.5}, "span_bases"), ({"keep_share": 0.3}, "keep_share"),
    ],
)  # fmt: skip
def test_bad_span_arguments(arguments, name):
    with pytest.raises(GeneSpliceError, match=f"`{name}`"):
        KmerSpanCollator(kmer_text_tokenizer(3), seed=0, **arguments)


def test_tokens_that_do_not_overlap() -> None:
    kmers = kmer_text_tokenizer(3)
    with pytest.raises(GeneSpliceError, match="neighbouring tokens of feature 1 do not share 2 bases"):
        KmerSpanCollator(kmers, seed=0)(
            [{"input_ids": kmer_ids(kmers, "ACGTACG", 3)}, {"input_ids": kmers("ACG TAC")["input_ids"]}]
        )
