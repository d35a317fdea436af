"""Pairs of segments: true successors, wrong ones from far away, and nothing but the sequence that tells them apart."""

import random

import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader

from genesplice_hf.data.fasta import Genome
from genesplice_hf.data.windows import windows_dataset
from genesplice_hf.errors import DataError, GeneSpliceError, SequenceError
from genesplice_hf.objectives.next_segment import NextSegmentCollator, is_elsewhere
from genesplice_hf.tokenization.tokenization_kmer import KmerTokenizer
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer

PAIRS = {"A": "T", "C": "G", "G": "C", "T": "A", "N": "N"}
WINDOW = 40


@pytest.fixture(scope="module")
def tokenizer() -> NucleotideTokenizer:
    return NucleotideTokenizer(preset="genesplice")


def windows(
    contigs: int = 3, per_contig: int = 40, length: int = WINDOW, name: str = "g", strand: str = "", seed: int = 0
) -> list[dict]:
    """Window rows, contig after contig; no half occurs twice."""
    letters = random.Random(f"{seed}{name}{strand}{length}")
    rows = []
    for chrom in range(contigs):
        for start in range(0, per_contig * length, length):
            place = f"c{chrom}:{start}-{start + length}{strand}"
            text = "".join(letters.choices("ACGT", k=length))
            rows.append(
                {"chrom": f"c{chrom}", "start": start, "end": start + length, "sequence": text,
                 "example_id": f"{name}|{place}"}
            )  # fmt: skip
    return rows


def collator(tokenizer, partners, **options) -> NextSegmentCollator:
    return NextSegmentCollator(tokenizer, partners, **({"min_distance_bp": 100, "seed": 0} | options))


def origins(rows: list[dict]) -> dict[str, dict]:
    """Second half -> the window that it belongs to."""
    return {row["sequence"][len(row["sequence"]) // 2 :]: row for row in rows}


def test_half_of_the_pairs_are_true_and_the_others_come_from_elsewhere(tokenizer):
    rows = windows()
    made = collator(tokenizer, rows)
    true = wrong = 0
    for epoch in range(10):
        made.set_epoch(epoch)
        for row, (first, second, follows) in zip(rows, made.pairs(rows), strict=True):
            assert first == row["sequence"][:20]
            origin = origins(rows)[second]
            assert follows == (origin is row)
            gap = max(origin["start"] - row["end"], row["start"] - origin["end"])
            assert follows or origin["chrom"] != row["chrom"] or gap >= 100
            true, wrong = true + follows, wrong + (not follows)
    assert stats.binomtest(true, true + wrong).pvalue > 1e-3


def test_wrong_halves_come_from_the_whole_pool_evenly(tokenizer):
    rows = windows(contigs=11, per_contig=1)
    made = collator(tokenizer, rows, negative_probability=1.0)
    many = [rows[0] | {"example_id": f"g|{i}"} for i in range(2000)]
    drawn = [origins(rows)[second]["chrom"] for _, second, _ in made.pairs(many)]
    counts = [drawn.count(row["chrom"]) for row in rows]
    assert counts[0] == 0 and stats.chisquare(counts[1:]).pvalue > 1e-3


def test_the_batch(tokenizer):
    rows = windows(per_contig=4, length=6)
    made = collator(tokenizer, rows, pad_to_multiple_of=4)
    batch, pairs = made(rows), made.pairs(rows)
    assert set(batch) == {"input_ids", "attention_mask", "segment_ids", "follows"}
    assert batch["follows"].tolist() == [int(follows) for *_, follows in pairs]
    assert 0 < sum(batch["follows"].tolist()) < len(rows)
    expected = [tokenizer(first + second)["input_ids"] + [0, 0] for first, second, _ in pairs]
    assert batch["input_ids"].tolist() == expected
    assert batch["attention_mask"].tolist() == [[1] * 6 + [0] * 2] * len(rows)
    assert batch["segment_ids"].tolist() == [[0, 0, 0, 1, 1, 1, -1, -1]] * len(rows)
    assert {values.dtype for values in batch.values()} == {torch.int64}


def test_halves_are_equally_long_whatever_the_windows_are(tokenizer):
    """Of an odd window the last base is left out, and a longer or shorter partner gives as many bases as needed."""
    rows = [row for length in (9, 10, 14, 17) for row in windows(2, 10, length)]
    made = collator(tokenizer, rows, negative_probability=0.5)
    for row, (first, second, _) in zip(rows, made.pairs(rows), strict=True):
        assert len(first) == len(second) == len(row["sequence"]) // 2
    lengths = [(len(first), follows) for first, _, follows in made.pairs(rows)]
    assert {follows for length, follows in lengths if length == 8} == {True, False}


def test_species_and_strand_agree(tokenizer):
    """A wrong half of another genome, or read along the other strand, would be known by that alone."""
    kinds = [("yeast", ""), ("yeast", "(-)"), ("phage", ""), ("phage", "(-)")]
    parts = {kind: windows(2, 10, name=kind[0], strand=kind[1]) for kind in kinds}
    pool = [row for part in parts.values() for row in part]
    made = collator(tokenizer, pool, negative_probability=1.0)
    for part in parts.values():
        assert {second for _, second, _ in made.pairs(part)} <= set(origins(part))
    by_column = [row | {"strand": "-"} for row in windows(2, 10)] + windows(2, 10, seed=1)
    made = collator(tokenizer, by_column, negative_probability=1.0)
    assert {second for _, second, _ in made.pairs(by_column[:20])} <= set(origins(by_column[:20]))


def test_n_and_soft_masking_say_nothing(tokenizer):
    """Whatever stands in for B has the N and the case of the true B, so that only its bases can differ."""
    letters = random.Random(4)
    rows = [row | {"sequence": "".join(letters.choices("ACGTacgtNn", k=WINDOW))} for row in windows(4, 30)]
    pool = windows(4, 30, seed=1)
    made = collator(tokenizer, pool, negative_probability=1.0)
    for row, (_, second, follows) in zip(rows, made.pairs(rows), strict=True):
        true = row["sequence"][20:]
        assert not follows and second.upper() != true.upper()
        assert [letter in "Nn" for letter in second] == [letter in "Nn" for letter in true]
        assert [letter.islower() for letter in second] == [letter.islower() for letter in true]


def test_a_half_with_n_is_never_brought_in(tokenizer):
    rows, pool = windows(1, 10), windows(2, 10, seed=1)
    spoiled = [row | {"sequence": row["sequence"][:-1] + "N"} for row in pool[:18]]
    made = collator(tokenizer, spoiled + pool[18:], negative_probability=1.0)
    assert {second for _, second, _ in made.pairs(rows)} == set(origins(pool[18:]))


def test_a_pair_is_turned_as_a_whole(tokenizer):
    rows = windows()
    plain, turned = (collator(tokenizer, rows, rc_probability=share)(rows) for share in (0.0, 1.0))
    for one, other in zip(plain["input_ids"], turned["input_ids"], strict=True):
        text = tokenizer.decode(one)
        assert tokenizer.decode(other) == "".join(PAIRS[letter] for letter in reversed(text))
    assert torch.equal(plain["follows"], turned["follows"])
    assert torch.equal(plain["segment_ids"], turned["segment_ids"])


def test_segments_of_tokens_that_are_longer_than_a_base():
    """A token belongs to the half in which it begins; special tokens belong to none."""
    rows = windows(per_contig=4, length=14)
    kmers = KmerTokenizer(k=3, stride=3, add_prefix=True, add_suffix=True)
    batch = collator(kmers, rows)(rows)
    texts = [first + second for first, second, _ in collator(kmers, rows).pairs(rows)]
    assert batch["input_ids"].tolist() == kmers(texts)["input_ids"]
    # Bases 0-2, 3-5, 6-8, 9-11, 12, 13: the third k-mer begins at base 6, before the border at 7.
    assert batch["segment_ids"].tolist() == [[-1, 0, 0, 0, 1, 1, 1, -1]] * len(rows)
    overlapping = KmerTokenizer(k=3, stride=1)
    segments = collator(overlapping, rows)(rows)["segment_ids"]
    framed = len(overlapping("ACGT")["input_ids"]) - 2
    assert segments[0].tolist() == [-1] * (framed // 2) + [0] * 7 + [1] * 5 + [-1] * (framed // 2)


def test_neither_batch_nor_order_nor_worker_changes_a_pair(tokenizer):
    rows = windows()
    made = collator(tokenizer, rows, rc_probability=0.5)
    expected = as_pairs(made(rows))
    assert [pair for row in rows for pair in as_pairs(made([row]))] == expected
    assert as_pairs(made(rows[::-1]))[::-1] == expected
    loader = DataLoader(rows, batch_size=7, num_workers=2, collate_fn=made)
    assert [pair for batch in loader for pair in as_pairs(batch)] == expected
    made.set_epoch(1)
    assert sum(one != other for one, other in zip(as_pairs(made(rows)), expected, strict=True)) > 60


def as_pairs(batch: dict) -> list[tuple[list[int], int]]:
    return list(zip(batch["input_ids"].tolist(), batch["follows"].tolist(), strict=True))


def test_rows_of_a_fasta_file(tokenizer, tmp_path):
    letters = random.Random(0)
    text = "".join(f">chr{i}\n{''.join(letters.choices('ACGT', k=2000))}\n" for i in range(2))
    (tmp_path / "small.fa").write_text(text)
    rows = windows_dataset(Genome(tmp_path / "small.fa"), window_bp=100, name="small")
    batch = collator(tokenizer, rows)(list(rows))
    true = [tokenizer(row["sequence"])["input_ids"] for row in rows]
    same = [ids == whole for ids, whole in zip(batch["input_ids"].tolist(), true, strict=True)]
    assert same == batch["follows"].bool().tolist() and 10 < sum(same) < 30


@pytest.mark.parametrize(("start", "expected"), [(0, False), (250, False), (299, False), (300, True), (1000, True)])
def test_how_far_is_elsewhere(start, expected):
    row, other = ({"chrom": "c", "start": s, "end": s + 100} for s in (100, start))
    assert is_elsewhere(row, other, 100) == is_elsewhere(other, row, 100) == expected
    assert is_elsewhere(row, other | {"chrom": "d"}, 100)


def test_a_pool_without_a_partner_is_named(tokenizer):
    rows = windows(contigs=1, per_contig=3)
    with pytest.raises(DataError, match=r"512 windows .* \(3 rows\).* 1000 bp away from c0:0-40; lower"):
        collator(tokenizer, rows, min_distance_bp=1000, negative_probability=1.0)(rows)
    short = windows(contigs=3, length=10)
    with pytest.raises(DataError, match="no half of 20 bases"):
        collator(tokenizer, short, negative_probability=1.0)(rows)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        ([], GeneSpliceError, "`features` is empty"),
        (
            [{"sequence": "ACGT"}],
            GeneSpliceError,
            r"feature 0 .* lacks \['chrom', 'start', 'end'\]",
        ),
        ([{"chrom": "c", "start": 0, "end": 1, "sequence": "A"}], SequenceError, "2 bases or more"),
        ([{"chrom": "c", "start": 0, "end": 2, "sequence": 5}], GeneSpliceError, "feature 0"),
    ],
)
def test_bad_features(tokenizer, features, error, message):
    with pytest.raises(error, match=message):
        collator(tokenizer, windows())(features)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_probability": 1.5}, "`negative_probability`"),
        ({"min_distance_bp": -1}, "`min_distance_bp`"),
        ({"min_distance_bp": 1.5}, "`min_distance_bp`"),
        ({"rc_probability": 2}, "`rc_probability`"),
    ],
)
def test_bad_arguments(tokenizer, options, message):
    with pytest.raises(GeneSpliceError, match=message):
        collator(tokenizer, windows(), **options)


@pytest.mark.parametrize(
    ("pool", "message"), [([], "`partners` is empty"), ([{"sequence": "A"}], "row 0 of `partners`")]
)
def test_bad_pools(tokenizer, pool, message):
    with pytest.raises(GeneSpliceError, match=message):
        collator(tokenizer, pool)
