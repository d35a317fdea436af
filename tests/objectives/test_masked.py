"""Masked batches of tokens that share no bases: rates, what is drawn, determinism, and bad input."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from genesplice_hf.errors import GeneSpliceError
from genesplice_hf.objectives.masked import DnaMLMCollator, KmerSpanCollator
from genesplice_hf.tokenization.tokenization_bpe import BPEDnaTokenizer
from genesplice_hf.tokenization.tokenization_kmer import KmerTokenizer
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer

MASK = 4


@pytest.fixture(scope="module")
def base_tokenizer() -> NucleotideTokenizer:
    return NucleotideTokenizer(preset="genesplice")


def random_dna(length: int, seed: int) -> str:
    return "".join(np.random.default_rng(seed).choice(list("ACGT"), length))


def random_features(count: int, length: int, seed: int = 0) -> list[dict]:
    draw = np.random.default_rng(seed)
    return [{"input_ids": draw.integers(5, 9, length), "example_id": i} for i in range(count)]


def standard_error(share: float, count: int) -> float:
    return np.sqrt(share * (1 - share) / count)


@pytest.mark.parametrize("probability", [0.05, 0.15, 0.5])
def test_rate_and_shares(base_tokenizer, probability):
    features = random_features(64, 512)
    batch = DnaMLMCollator(base_tokenizer, mlm_probability=probability, seed=1)(features)
    original = torch.tensor(np.stack([f["input_ids"] for f in features]))
    labelled = batch["labels"] != -100
    count, total = labelled.sum().item(), labelled.numel()
    assert abs(count / total - probability) < 3 * standard_error(probability, total)
    assert torch.equal(batch["labels"][labelled], original[labelled])
    assert torch.equal(batch["input_ids"][~labelled], original[~labelled])
    seen = batch["input_ids"][labelled]
    # A random base is the true one in a quarter of the draws.
    for share, expected in (
        ((seen == MASK).float().mean().item(), 0.8),
        ((seen == batch["labels"][labelled]).float().mean().item(), 0.1 + 0.1 / 4),
    ):
        assert abs(share - expected) < 3 * standard_error(expected, count)


def test_random_bases_are_uniform_and_nothing_else(base_tokenizer):
    collator = DnaMLMCollator(base_tokenizer, 1.0, mask_share=0.0, random_share=1.0, keep_share=0.0, seed=0)
    seen = collator([{"input_ids": [5] * 20_000}])["input_ids"][0].numpy()
    counts = np.bincount(seen, minlength=10)
    assert counts[5:9].sum() == 20_000
    assert np.abs(counts[5:9] / 20_000 - 0.25).max() < 4 * standard_error(0.25, 20_000)


def test_specials_n_unknown_and_pads_are_never_chosen(base_tokenizer):
    collator = DnaMLMCollator(base_tokenizer, mlm_probability=1.0, seed=0)
    ids = [2, 5, 9, 1, 6, 4, 3, 7, 0, 0]
    first = {"input_ids": ids, "attention_mask": [1] * 8 + [0, 0]}
    batch = collator([first, {"input_ids": [8] * 12, "attention_mask": [1] * 12}])
    assert batch["labels"][0].tolist() == [-100, 5, -100, -100, 6, -100, -100, 7] + [-100] * 4
    untouched = batch["labels"][0] == -100
    assert batch["input_ids"][0][untouched].tolist() == [2, 9, 1, 4, 3, 0, 0, 0, 0]
    masked = collator([{"input_ids": [5, 6, 7], "special_tokens_mask": [0, 1, 0]}])
    assert masked["labels"].tolist() == [[5, -100, 7]]
    unseen = collator([{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 0]}])
    assert unseen["labels"].tolist() == [[5, 6, -100]]


def test_spans_have_the_asked_rate_and_mean_length(base_tokenizer):
    collator = DnaMLMCollator(base_tokenizer, mlm_probability=0.15, span_length=5.0, seed=2)
    labelled = (collator(random_features(200, 1000))["labels"] != -100).numpy()
    runs = [len(list(g)) for row in labelled[:, 1:-1] for chosen, g in itertools.groupby(row) if chosen]
    # Neighbours inside a run move together: count runs, not tokens, as independent draws.
    assert abs(labelled.mean() - 0.15) < 3 * standard_error(0.15, labelled.size / 5.0)
    assert abs(np.mean(runs) - 5.0) < 4 * np.std(runs) / np.sqrt(len(runs))
    shares = np.bincount(runs, minlength=4)[1:4] / len(runs)
    geometric = 0.2 * 0.8 ** np.arange(3)
    assert np.abs(shares - geometric).max() < 4 * standard_error(0.2, len(runs))


def test_spans_are_as_frequent_at_the_first_token_as_later(base_tokenizer):
    collator = DnaMLMCollator(base_tokenizer, mlm_probability=0.3, span_length=8.0, seed=3)
    labelled = (collator(random_features(4000, 12))["labels"] != -100).numpy()
    assert np.abs(labelled.mean(0) - 0.3).max() < 4 * standard_error(0.3, 4000)


def by_example(collator, features: list[dict], batch_size: int, workers: int = 0) -> dict[int, tuple]:
    """Corrupted ids and labels without pads, by example."""
    rows = {}
    for start, batch in enumerate(DataLoader(features, batch_size, collate_fn=collator, num_workers=workers)):
        for i, feature in enumerate(features[start * batch_size : (start + 1) * batch_size]):
            real = batch["attention_mask"][i] == 1
            rows[feature["example_id"]] = tuple(
                batch[name][i][real].tolist() for name in ("input_ids", "labels", "loss_weight")
            )
    return rows


def mixed_features() -> list[dict]:
    draw = np.random.default_rng(5)
    letters = list("ACGTacgtN")
    return [{"sequence": "".join(draw.choice(letters, 20 + 7 * i)), "example_id": f"chr1:{i}"} for i in range(23)]


@pytest.mark.parametrize("make", ["base", "span", "kmer"])
def test_example_depends_on_seed_epoch_and_itself_alone(base_tokenizer, make):
    arguments = {"soft_mask_weight": 0.5, "rc_probability": 0.5, "seed": 11}
    if make == "kmer":
        collator = KmerSpanCollator(KmerTokenizer(k=4, stride=1, preset="dnabert4"), **arguments)
    else:
        collator = DnaMLMCollator(base_tokenizer, span_length=3.0 if make == "span" else None, **arguments)
    features = mixed_features()
    expected = by_example(collator, features, batch_size=23)
    assert by_example(collator, features, batch_size=1) == expected
    assert by_example(collator, features[::-1], batch_size=5) == expected
    assert by_example(pickle.loads(pickle.dumps(collator)), features, batch_size=4) == expected
    collator.set_epoch(1)
    assert by_example(collator, features, batch_size=23) != expected
    collator.set_epoch(0)
    assert by_example(collator, features, batch_size=23) == expected


def test_workers_change_nothing_and_hear_of_new_epochs(base_tokenizer):
    collator = DnaMLMCollator(base_tokenizer, soft_mask_weight=0.5, rc_probability=0.5, seed=11)
    features = mixed_features()
    loader = DataLoader(features, 4, collate_fn=collator, num_workers=2, persistent_workers=True)
    for epoch in (0, 1):
        collator.set_epoch(epoch)
        here = [collator(features[i : i + 4]) for i in range(0, len(features), 4)]
        for ours, theirs in zip(here, loader, strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("size", [1, 40, 10_000])
def test_working_in_parts_changes_nothing(base_tokenizer, monkeypatch, size):
    collator = DnaMLMCollator(base_tokenizer, soft_mask_weight=0.5, span_length=3.0, seed=0)
    expected = collator(mixed_features())
    monkeypatch.setattr("genesplice_hf.objectives.masked._TOKENS_AT_A_TIME", size)
    again = collator(mixed_features())
    assert all(torch.equal(expected[name], again[name]) for name in expected)


def test_an_unnamed_example_is_known_by_its_content(base_tokenizer):
    collator = DnaMLMCollator(base_tokenizer, mlm_probability=0.5, seed=0)
    ids = random_features(1, 50)[0]["input_ids"]
    alone = collator([{"input_ids": ids}])
    other = random_features(1, 80, seed=9)[0]["input_ids"]
    together = collator([{"input_ids": other}, {"input_ids": ids}])
    assert torch.equal(together["labels"][1, :50], alone["labels"][0])
    for padded, mask, cut in (
        ([*ids, 0, 0], [1] * 50 + [0, 0], slice(0, 50)),
        ([0, 0, *ids], [0, 0] + [1] * 50, slice(2, 52)),
    ):
        batch = collator([{"input_ids": padded, "attention_mask": mask}])
        assert torch.equal(batch["labels"][0, cut], alone["labels"][0])
        assert torch.equal(batch["input_ids"][0, cut], alone["input_ids"][0])


def test_weights_stand_only_where_labels_do(base_tokenizer):
    collator = DnaMLMCollator(base_tokenizer, mlm_probability=0.5, soft_mask_weight=0.1, seed=0)
    batch = collator([{"sequence": "acgtACGT" * 10}, {"sequence": "acgt"}])
    labelled = batch["labels"] != -100
    assert (batch["loss_weight"][~labelled] == 0).all()
    lower = torch.arange(80) % 8 < 4
    expected = torch.where(lower, 0.1, 1.0)
    assert torch.equal(batch["loss_weight"][0][labelled[0]], expected[labelled[0]])


def test_non_overlapping_kmers():
    tokenizer = KmerTokenizer(k=3, stride=3)
    collator = DnaMLMCollator(tokenizer, 1.0, mask_share=0.0, random_share=1.0, keep_share=0.0, seed=0)
    sequence = random_dna(3 * 400, seed=0) + "NAC"
    plain = tokenizer(sequence)["input_ids"]
    batch = collator([{"sequence": sequence}])
    names = {i: t for t, i in tokenizer.get_vocab().items()}
    for before, after, label in zip(plain, batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), strict=True):
        is_dna = set(names[before]) <= set("ACGT")
        assert label == (before if is_dna else -100)
        assert len(names[after]) == len(names[before]) and (is_dna or after == before)


def test_bpe():
    tokenizer = BPEDnaTokenizer.train([random_dna(3000, seed=1)], vocab_size=60)
    collator = DnaMLMCollator(tokenizer, 1.0, mask_share=0.0, random_share=1.0, keep_share=0.0, seed=0)
    batch = collator([{"sequence": random_dna(3000, seed=2)}, {"sequence": "ACGTNNNNAcg"}])
    dna = {i for t, i in tokenizer.get_vocab().items() if set(t) <= set("ACGT")}
    labelled = batch["labels"] != -100
    assert set(batch["labels"][labelled].tolist()) <= dna
    assert set(batch["input_ids"][labelled].tolist()) == dna
    assert set(batch["input_ids"][~labelled].tolist()) == {1, 2, 3, tokenizer.get_vocab()["N"]}


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"mlm_probability": 0}, "mlm_probability"), ({"mlm_probability": 1.5}, "mlm_probability"),
        ({"mlm_probability": "0.15"}, "mlm_probability"), ({"mlm_probability": float("nan")}, "mlm_probability"),
        ({"mask_share": 0.9}, "mask_share"), ({"mask_share": -0.1, "keep_share": 1.0}, "mask_share"),
        ({"span_length": 1.0}, "span_length"), ({"span_length": "3"}, "span_length"),
        ({"span_length": 3.0, "mlm_probability": 1.0}, "span_length"),
    ],
)  # fmt: skip
def test_bad_arguments(base_tokenizer, arguments, name):
    with pytest.raises(GeneSpliceError, match=f"`{name}`"):
        DnaMLMCollator(base_tokenizer, seed=0, **arguments)


def test_tokenizers_that_do_not_fit(base_tokenizer):
    with pytest.raises(GeneSpliceError, match="no mask token"):
        DnaMLMCollator(NucleotideTokenizer(preset="enformer"))
    with pytest.raises(GeneSpliceError, match="use `KmerSpanCollator`"):
        DnaMLMCollator(KmerTokenizer(k=3, stride=1))
    with pytest.raises(GeneSpliceError, match="use `DnaMLMCollator`"):
        KmerSpanCollator(KmerTokenizer(k=3, stride=3))
    with pytest.raises(GeneSpliceError, match="`span_length` is for single-base"):
        DnaMLMCollator(KmerTokenizer(k=3, stride=3), span_length=3.0)
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "[MASK]": 2, "[PAD]": 3}, unk_token="[UNK]"))
    words = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", mask_token="[MASK]", pad_token="[PAD]"
    )
    with pytest.raises(GeneSpliceError, match="no token of A, C, G and T"):
        DnaMLMCollator(words)
    words.pad_token = None
    with pytest.raises(GeneSpliceError, match="pad token"):
        DnaMLMCollator(words)


def test_bad_batches(base_tokenizer):
    collator = DnaMLMCollator(base_tokenizer, seed=0)
    with pytest.raises(GeneSpliceError, match="`features` is empty"):
        collator([])
    with pytest.raises(GeneSpliceError, match="neither `input_ids` nor `sequence`"):
        collator([{"labels": [1]}])
    with pytest.raises(GeneSpliceError, match="range from 5 to 10"):
        collator([{"input_ids": [5, 10]}])
    with pytest.raises(GeneSpliceError, match="range from -1"):
        collator([{"input_ids": [5, -1]}])
