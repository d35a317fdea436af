"""Contacts as vectors and maps, their reverse complement, and examples with augmentation."""

from pathlib import Path

import numpy as np
import pytest
import torch

from genesplice_hf.data.contacts import (
    Augmentation,
    ContactCollator,
    ContactDataset,
    augment,
    map_size,
    map_to_vector,
    rc_permutation,
    vector_as_map,
    window_ids,
)
from genesplice_hf.data.fasta import Genome
from genesplice_hf.errors import DataError
from genesplice_hf.genome.alphabet import reverse_complement
from genesplice_hf.genome.interval import Interval
from genesplice_hf.heads.contacts import num_pairs, vector_to_map


def symmetric_map(num_bins: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(num_bins, num_bins, 2))
    return values + values.transpose(1, 0, 2)


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
@pytest.mark.parametrize("num_bins", [4, 5, 9, 448])
def test_the_size_comes_back_from_the_number_of_pairs(num_bins: int, offset: int) -> None:
    assert map_size(num_pairs(num_bins, offset), offset) == num_bins


@pytest.mark.parametrize("pairs", [0, 2, 5, 99_680])
def test_a_number_that_is_no_triangle_is_refused(pairs: int) -> None:
    with pytest.raises(DataError, match="whole n"):
        map_size(pairs, 2)


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_maps_and_vectors_are_each_others_inverse_outside_the_band(offset: int) -> None:
    contact_map = symmetric_map(7)
    vector = map_to_vector(contact_map, offset)
    far = np.abs(np.subtract.outer(np.arange(7), np.arange(7))) >= offset
    for found in (
        vector_as_map(vector, offset),
        vector_to_map(torch.tensor(vector), 7, offset, fill=float("nan")).numpy(),
    ):
        assert np.array_equal(found[far], contact_map[far])
        assert np.isnan(found[~far]).all()


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
@pytest.mark.parametrize("num_bins", [4, 5, 8])
def test_the_reverse_complement_flips_both_axes_and_is_its_own_inverse(num_bins: int, offset: int) -> None:
    contact_map, permutation = symmetric_map(num_bins), rc_permutation(num_bins, offset)
    flipped = map_to_vector(contact_map[::-1, ::-1], offset)
    assert np.array_equal(map_to_vector(contact_map, offset)[permutation], flipped)
    assert np.array_equal(permutation[permutation], np.arange(len(permutation)))


def test_a_map_that_is_not_square_is_refused() -> None:
    for shape in ((3, 4), (5,), (2, 2)):
        with pytest.raises(DataError, match="contact_map"):
            map_to_vector(np.zeros(shape), 2)


@pytest.mark.parametrize(("shift", "expected"), [(2, [4, 4, 0, 1, 2]), (-2, [2, 3, 4, 4, 4]), (0, [0, 1, 2, 3, 4])])
def test_a_shift_brings_in_unknown_bases(shift: int, expected: list[int]) -> None:
    ids = np.array([0, 1, 2, 3, 4], dtype=np.uint8)
    kept = ids.copy()
    found, labels = augment(ids, None, Augmentation(shift), rc_permutation(4, 2))
    assert found.tolist() == expected and labels is None
    assert np.array_equal(ids, kept)


def test_the_reverse_complement_of_bases_and_labels_belong_together() -> None:
    """A mark in the sequence stays where its contacts are."""
    sequence = "ACGGTNAAC" * 4
    ids, permutation = window_ids(sequence), rc_permutation(6, 2)
    labels = map_to_vector(symmetric_map(6), 2)
    found, flipped = augment(ids, labels, Augmentation(rc=True), permutation)
    assert np.array_equal(found, window_ids(reverse_complement(sequence)))
    again, back = augment(found, flipped, Augmentation(rc=True), permutation)
    assert np.array_equal(again, ids) and np.array_equal(back, labels)


def test_ids_of_letters() -> None:
    assert window_ids("AcgTUNRn").tolist() == [0, 1, 2, 3, 3, 4, 4, 4]


@pytest.fixture
def genome(tmp_path: Path) -> Genome:
    (tmp_path / "toy.fa").write_text(">one\nACGTACGTNACGTTTT\n>two\nGGGGCCCCAAAATTTT\n")
    return Genome(tmp_path / "toy.fa")


def test_examples_of_an_npz(tmp_path: Path) -> None:
    ids = np.arange(24, dtype=np.uint8).reshape(2, 12) % 5
    targets = np.stack([map_to_vector(symmetric_map(6, seed), 2) for seed in range(2)]).astype(np.float16)
    np.savez(tmp_path / "set.npz", sequence=ids, target=targets)
    dataset = ContactDataset.from_npz(tmp_path / "set.npz")
    assert len(dataset) == 2 and dataset.num_bins == 6
    row = dataset[1]
    assert np.array_equal(row["input_ids"], ids[1]) and row["labels"].dtype == np.float32
    assert np.array_equal(row["labels"], targets[1].astype(np.float32)) and row["index"] == 1


def test_examples_of_a_genome_and_a_memory_map(tmp_path: Path, genome: Genome) -> None:
    targets = np.stack([map_to_vector(symmetric_map(4, seed), 2) for seed in range(2)]).astype(np.float16)
    np.save(tmp_path / "targets.npy", targets)
    intervals = [Interval("one", 2, 10), Interval("two", 2, 10, "-")]
    dataset = ContactDataset.from_genome(genome, intervals, tmp_path / "targets.npy")
    assert isinstance(dataset.targets, np.memmap)
    assert np.array_equal(dataset[0]["input_ids"], window_ids("GTACGTNA"))
    assert np.array_equal(dataset[1]["input_ids"], window_ids(reverse_complement("GGCCCCAA")))


@pytest.mark.parametrize(
    ("ids", "targets", "message"),
    [
        (np.zeros((2, 8), np.uint8), np.zeros((3, 3, 1)), "2 windows"),
        (np.zeros((2, 8), np.uint8), np.zeros((2, 4, 1)), "whole n"),
        (np.zeros(2, np.uint8), np.zeros((2, 3, 1)), "bases"),
        ([Interval("one", 0, 8)], np.zeros((1, 3, 1)), "genome"),
    ],
)
def test_bad_examples_are_refused(ids: np.ndarray, targets: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ContactDataset(ids, targets)


def test_bad_intervals_are_refused(genome: Genome) -> None:
    targets = np.zeros((2, 3, 1))
    for intervals, message in (
        ([Interval("one", 0, 8), Interval("two", 0, 9)], "one length"),
        ([Interval("one", 0, 8), Interval("two", 10, 18)], "length"),
        ([Interval("one", 0, 8), Interval("three", 0, 8)], "nearest"),
    ):
        with pytest.raises(DataError, match=message):
            ContactDataset(intervals, targets, 2, genome)


def examples(num_rows: int = 6) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {
            "input_ids": rng.integers(0, 4, 40).astype(np.uint8),
            "labels": rng.normal(size=(num_pairs(5, 2), 1)).astype(np.float32),
            "index": index,
        }
        for index in range(num_rows)
    ]


def test_what_is_drawn_depends_on_seed_epoch_and_row_alone() -> None:
    collator, rows = ContactCollator(5, seed=3), examples()
    whole = collator(rows)
    parts = [collator([row]) for row in reversed(rows)]
    for name in ("input_ids", "labels"):
        assert torch.equal(whole[name], torch.cat([part[name] for part in reversed(parts)]))
    drawn = [collator.draw(index) for index in range(200)]
    assert {way.shift for way in drawn} == set(range(-11, 12)) and {way.rc for way in drawn} == {True, False}
    collator.set_epoch(1)
    assert [collator.draw(index) for index in range(200)] != drawn


def test_evaluation_changes_nothing() -> None:
    rows = examples()
    found = ContactCollator(5, training=False)(rows)
    assert np.array_equal(found["input_ids"].numpy(), np.stack([row["input_ids"] for row in rows]))
    assert found["input_ids"].dtype == torch.uint8 and found["labels"].dtype == torch.float32


def test_bad_augmentation_is_refused() -> None:
    for options in ({"max_shift": -1}, {"rc_probability": 1.5}):
        with pytest.raises(DataError, match="max_shift"):
            ContactCollator(5, **options)
