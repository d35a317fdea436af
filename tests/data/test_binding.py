"""Rows, batches, balance and splits of binding data, on peaks that can be checked one by one."""

import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from binding_files import make_genome, make_peaks, overlap, places
from hypothesis import given
from hypothesis import strategies as st

from genesplice_hf.data.binding import (
    BindingDataset,
    cross_factor_source,
    matched_source,
    negative_sources,
    random_source,
    read_peaks_nr,
    scoped_source,
    shuffle_source,
)
from genesplice_hf.data.binding_batches import BalancedSampler, BindingCollator
from genesplice_hf.data.binding_splits import (
    edit_distance,
    even_chromosomes,
    similar_proteins,
    split_binding,
    split_report,
)
from genesplice_hf.data.contexts import Cell, ContextStrings, context_key, read_biotypes
from genesplice_hf.data.embedding_store import EncoderIdentity
from genesplice_hf.data.intervals import RangeMap
from genesplice_hf.data.negatives import CrossFactorNegatives, RandomNegatives, ScopedNegatives
from genesplice_hf.data.protein_embeddings import FactorStates
from genesplice_hf.errors import DataError
from genesplice_hf.genome.alphabet import reverse_complement
from genesplice_hf.genome.interval import Interval
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer

LENGTH = 256


@pytest.fixture
def files(tmp_path):
    return make_genome(tmp_path), make_peaks(tmp_path)


def sources(genome, peaks):
    sampler = RandomNegatives(genome, LENGTH, RangeMap.of_peaks(peaks))
    return {
        "random": random_source(sampler, peaks),
        "scoped": scoped_source(ScopedNegatives(peaks, LENGTH)),
        "shuffle": shuffle_source(),
        "cross_factor": cross_factor_source(CrossFactorNegatives(peaks)),
    }


def proteins(factor):
    """Residues of a factor: as many as its letters, filled with their places in the alphabet."""
    states = np.array([[ord(letter), at] for at, letter in enumerate(factor)], dtype=np.float32)
    return FactorStates(states, np.zeros(len(factor), dtype=np.int64))


def test_rows_by_kind(files):
    genome, peaks = files
    ratios = {"scoped": 2, "cross_factor": 0.5}
    rows = BindingDataset(peaks, genome, LENGTH, sources(genome, peaks), ratios, margin=3)
    kinds = Counter(rows[at]["kind"] for at in range(len(rows)))
    count = len(peaks)
    assert kinds == {
        "positive": count,
        "random": count,
        "scoped": 2 * count,
        "shuffle": count,
        "cross_factor": count // 2,
    }
    starts, _ = peaks.windows(LENGTH)
    for at in range(len(rows)):
        row = rows[at]
        window = row["chrom"], row["start"], row["end"]
        assert len(row["sequence"]) == LENGTH + 6 and row["end"] - row["start"] == LENGTH
        assert row["label"] == float(row["kind"] == "positive")
        own = places(peaks, lambda d, row=row: (d.target, d.cell) == (row["factor"], row["cell"]))
        if row["kind"] == "positive":
            assert (row["start"], row["read_value"]) == (starts[at], peaks.value[at])
            assert any(overlap(window, one) for one in own)
        elif row["kind"] == "random":
            assert not any(overlap(window, one) for one in places(peaks))
        elif row["kind"] == "cross_factor":
            assert not any(overlap(window, one) for one in own)
        if row["kind"] != "positive":
            assert math.isnan(row["read_value"])
        if row["kind"] not in ("shuffle",) and row["start"] >= 3 and row["end"] + 3 <= genome.contigs[row["chrom"]]:
            assert row["sequence"] == genome.seq(row["chrom"], row["start"] - 3, row["end"] + 3)
    assert rows.targets[:count] == [peaks.dataset(at).target for at in range(count)] == rows.targets[count : 2 * count]


def test_scoped_rows_never_hold_peaks_of_their_data_set(files):
    genome, peaks = files
    rows = BindingDataset(peaks, genome, LENGTH, {"scoped": sources(genome, peaks)["scoped"]})
    for at in range(len(peaks), len(rows)):
        row, own = rows[at], peaks.dataset(at - len(peaks))
        assert (row["factor"], row["cell"]) == (own.target, own.cell)
        assert not any(overlap((row["chrom"], row["start"], row["end"]), one) for one in places(peaks, own.__eq__))


def test_rows_depend_on_seed_epoch_and_place_alone(files):
    genome, peaks = files
    one, two = (BindingDataset(peaks, genome, LENGTH, sources(genome, peaks)) for _ in range(2))
    last = len(one) - 1
    backwards = [two[at] for at in range(last, -1, -1)][::-1]
    assert [str(one[at]) for at in range(len(one))] == [str(row) for row in backwards]
    assert one[-1]["sequence"] == one[last]["sequence"]
    before = [one[at]["sequence"] for at in range(len(one))]
    one.set_epoch(1)
    after = [one[at]["sequence"] for at in range(len(one))]
    assert before[: len(peaks)] == after[: len(peaks)] and before != after
    with pytest.raises(IndexError):
        one[len(one)]


def test_bins_are_labelled_by_the_peaks_of_the_data_set(files):
    genome, peaks = files
    rows = BindingDataset(peaks, genome, LENGTH, sources(genome, peaks), bin_bp=32)
    for at in range(0, len(rows), 3):
        row = rows[at]
        if row["kind"] in ("shuffle", "scoped"):
            assert not row["label"].any()
        if row["kind"] == "positive":
            own = places(peaks, peaks.dataset(at).__eq__)
            expected = [
                float(any(overlap((row["chrom"], start, start + 32), one) for one in own))
                for start in range(row["start"], row["end"], 32)
            ]
            assert row["label"].tolist() == expected and sum(expected) > 0


def test_matched_rows_and_wrong_arguments(files):
    genome, peaks = files
    windows = [("chr1", at, at + LENGTH) for at in range(len(peaks))]
    rows = BindingDataset(peaks, genome, LENGTH, {"matched": matched_source(windows)})
    assert [rows[len(peaks) + at]["start"] for at in (0, 7)] == [0, 7]
    for options, told in (
        ({"bin_bp": 100}, "multiple of `bin_bp`"),
        ({"margin": -1}, "`margin`"),
        ({"ratios": {"scoped": 1}}, "`ratios` names"),
    ):
        with pytest.raises(DataError, match=told):
            BindingDataset(peaks, genome, LENGTH, **options)
    with pytest.raises(DataError, match="at least one row"):
        BindingDataset(peaks.rows(np.array([], dtype=int)), genome)
    with pytest.raises(DataError, match="leave this kind out"):
        BindingDataset(peaks, genome, LENGTH, {"none": lambda positive, rng: None})[len(peaks)]


def test_numbers_of_peaks_are_missing_and_never_zero(tmp_path, files):
    genome, peaks = files
    datasets = [
        {"dataset_name": peaks.dataset(0).name, "peaks_NR": 1234},
        {"dataset_name": "E.X.Y", "peaks_NR": "77"},
        {"dataset_name": "E.X.Z", "peaks_NR": "NA"},
        {"dataset_name": "E.X.W", "peaks_NR": 0},
        {"dataset_name": "E.X.V"},
    ]
    path = tmp_path / "experiments.json"
    path.write_text(json.dumps({"experiments": [{"details": {"datasets": datasets}}, {"details": None}]}))
    counts = read_peaks_nr(path)
    assert counts == {peaks.dataset(0).name: 1234.0, "E.X.Y": 77.0}
    rows = BindingDataset(peaks, genome, LENGTH, peaks_nr=counts)
    assert rows[0]["peaks_nr"] == 1234
    other = next(at for at in range(len(peaks)) if peaks.dataset(at) != peaks.dataset(0))
    assert math.isnan(rows[other]["peaks_nr"])
    path.write_text("[]")
    with pytest.raises(DataError, match="`experiments`"):
        read_peaks_nr(path)


def collator(**options):
    return BindingCollator(NucleotideTokenizer(preset="enformer"), proteins, **options)


def test_batches_hold_windows_and_factors_once(files):
    genome, peaks = files
    rows = BindingDataset(peaks, genome, LENGTH, sources(genome, peaks))
    picked = [rows[at] for at in (0, len(peaks) * 3, 0, 1, 5)]
    batch = collator()(picked)
    plain = collator(deduplicate=False)(picked)
    assert "pairs" not in plain and len(plain["input_ids"]) == len(plain["protein_embeds"]) == 5
    windows, factors = batch["pairs"].T
    assert len(batch["input_ids"]) == len({row["sequence"] for row in picked}) < 5
    assert len(batch["protein_embeds"]) == len({row["factor"] for row in picked}) < 5
    assert torch.equal(batch["input_ids"][windows], plain["input_ids"])
    for name in ("protein_embeds", "protein_mask", "protein_chain_ids"):
        assert torch.equal(batch[name][factors], plain[name])
    for at, row in enumerate(picked):
        assert plain["protein_mask"][at].sum() == len(row["factor"])
        assert not plain["protein_embeds"][at, len(row["factor"]) :].any()
        assert plain["input_ids"][at].tolist() == NucleotideTokenizer(preset="enformer")(row["sequence"])["input_ids"]
    assert batch["labels"].tolist() == [row["label"] for row in picked]
    assert "read_value" not in batch and "attention_mask" not in batch
    values = collator(read_values=True, pad_to_multiple_of=8)(picked)
    assert (
        values["protein_embeds"].shape[1] == 8 and math.isnan(values["read_value"][1]) and len(values["peaks_nr"]) == 5
    )


def test_contexts_and_residue_ids_in_batches(files):
    genome, peaks = files
    picked = [BindingDataset(peaks, genome, LENGTH)[at] for at in range(4)]

    class Words:
        def __call__(self, texts, padding, return_tensors):
            return {
                "input_ids": torch.tensor([[len(text)] for text in texts]),
                "attention_mask": torch.ones(len(texts), 1, dtype=torch.long),
            }

    ids = BindingCollator(
        NucleotideTokenizer(preset="enformer"),
        lambda factor: FactorStates(np.arange(len(factor)), np.zeros(len(factor), dtype=np.int64)),
        contexts=lambda cell: np.array([len(cell), 1]),
        context_texts=ContextStrings(),
        context_tokenizer=Words(),
    )(picked)
    assert ids["context"].tolist() == [[len(row["cell"]), 1] for row in picked] and ids["context"].dtype == torch.long
    assert ids["context_input_ids"][0, 0] == len(ContextStrings()(picked[0]["cell"]))
    assert ids["protein_input_ids"].dtype == torch.long and set(
        ids["protein_input_ids"][~ids["protein_mask"]].tolist()
    ) <= {20}
    with pytest.raises(DataError, match="given together"):
        collator(context_texts=ContextStrings())
    with pytest.raises(DataError, match="`max_shift`"):
        collator(max_shift=-1)
    with pytest.raises(DataError, match="at least one row"):
        collator()([])
    empty = BindingCollator(
        NucleotideTokenizer(preset="enformer"), lambda f: FactorStates(np.zeros((0, 2)), np.zeros(0))
    )
    with pytest.raises(DataError, match="has no residues"):
        empty(picked)


def test_augmentation_turns_labels_with_the_strand_and_leaves_evaluation_alone(files):
    genome, peaks = files
    rows = BindingDataset(peaks, genome, LENGTH, bin_bp=32, margin=2)
    training, letters = collator(training=True), np.array(list("ACGTN?"))
    seen = set()
    for at in range(40):
        row = rows[at]
        batch = training([row, row])
        assert len(batch["input_ids"]) == 1 and torch.equal(batch["labels"][0], batch["labels"][1])
        got = "".join(letters[batch["input_ids"][0]])
        options = {
            (shift, strand): (text if strand == "+" else reverse_complement(text))
            for shift in range(-2, 3)
            for strand in "+-"
            for text in [row["sequence"].upper()[2 + shift : 2 + shift + LENGTH]]
        }
        shift, strand = next(key for key, text in options.items() if text == got)
        seen.add((shift, strand))
        expected = row["label"] if strand == "+" else row["label"][::-1]
        assert batch["labels"][0].tolist() == expected.tolist()
        still = collator()([row])
        assert "".join(letters[still["input_ids"][0]]) == options[0, "+"]
        assert still["labels"][0].tolist() == row["label"].tolist()
    assert len(seen) == 10
    first = training([rows[0]])["input_ids"]
    assert torch.equal(first, collator(training=True)([rows[1], rows[0]])["input_ids"][1:])
    differs = [
        not torch.equal(first, collator(training=True, seed=seed)([rows[0]])["input_ids"]) for seed in range(1, 9)
    ]
    assert any(differs)
    with pytest.raises(DataError, match="margin of 2 bp, less than `max_shift`"):
        collator(training=True, max_shift=3)([rows[0]])


def test_balanced_sampler(files):
    groups = ["a"] * 900 + ["b"] * 90 + ["c"] * 10
    sampler = BalancedSampler(groups, seed=1)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == 1000 and drawn == list(sampler)
    counts = Counter(groups[row] for row in drawn)
    assert all(abs(count - 1000 / 3) < 75 for count in counts.values())
    sampler.set_epoch(1)
    assert list(sampler) != drawn and len(list(BalancedSampler(groups, 10))) == 10
    with pytest.raises(DataError):
        BalancedSampler([])


def test_splits_share_nothing_that_is_held_out(files):
    _, peaks = files
    union = split_binding(peaks, chromosomes=[2], targets=["CTCF"])
    both = split_binding(peaks, chromosomes=["chr2"], targets=["CTCF"], combine="intersection")
    for part in (union.train, both.train):
        assert all(part.chrom(row) != "chr2" and part.dataset(row).target != "CTCF" for row in range(len(part)))
    assert len(union.train) == len(both.train) and union.unused == 0
    assert all(
        union.valid.chrom(row) == "chr2" or union.valid.dataset(row).target == "CTCF"
        for row in range(len(union.valid))
    )
    assert all(
        both.valid.chrom(row) == "chr2" and both.valid.dataset(row).target == "CTCF" for row in range(len(both.valid))
    )
    assert len(union.train) + len(union.valid) == len(peaks) == len(both.train) + len(both.valid) + both.unused
    cells = split_binding(peaks, cells=["HeLa"])
    assert {dataset.cell for dataset in map(cells.valid.dataset, range(len(cells.valid)))} == {"HeLa"}
    assert even_chromosomes(peaks) == ["chr2"]
    for options, told in (
        ({}, "at least one"),
        ({"targets": ["CTCT"]}, "nearest is 'CTCF'"),
        ({"chromosomes": [1, 2, "X"]}, "train part would be empty"),
        ({"combine": "both", "targets": ["MAX"]}, "`combine`"),
        ({"targets": ["MAX"], "cells": ["HeLa"], "combine": "intersection"}, "validation part would be empty"),
    ):
        with pytest.raises(DataError, match=told):
            split_binding(peaks, **options)


@pytest.mark.parametrize(
    "held_out", [{"chromosomes": [2]}, {"targets": ["MAX"]}, {"chromosomes": ["chrX"], "cells": ["HeLa"]}]
)
def test_negatives_keep_to_their_part_of_a_split(files, held_out):
    genome, peaks = files
    split = split_binding(peaks, **held_out)
    for part, own, other in (("train", split.train, split.valid), ("valid", split.valid, split.train)):
        sources = negative_sources(split, part, genome, LENGTH, blacklist=[Interval("chr1", 0, 3000)])
        rows = BindingDataset(own, genome, LENGTH, sources)
        chroms = {own.chrom(row) for row in range(len(own))}
        for at in range(len(own), len(rows)):
            row = rows[at]
            window = row["chrom"], row["start"], row["end"]
            assert row["chrom"] in chroms and row["label"] == 0
            if part == "train" or row["kind"] == "random":
                assert not any(overlap(window, one) for one in places(other))
            if row["kind"] == "random":
                assert not any(overlap(window, one) for one in [*places(own), ("chr1", 0, 3000)])
            else:
                bound = places(peaks, own.dataset(at - 2 * len(own)).__eq__)
                assert not any(overlap(window, one) for one in bound)
    several = negative_sources(split, "train", genome, LENGTH, ("cross_factor", "shuffle"))
    assert len(BindingDataset(split.train, genome, LENGTH, several)) == 3 * len(split.train)
    with pytest.raises(DataError, match="same peaks"):
        peaks.joined(dataclasses.replace(peaks, chroms=("1", "2", "3")))
    for wrong in (("test", ("random",)), ("train", ("hard",))):
        with pytest.raises(DataError):
            negative_sources(split, wrong[0], genome, LENGTH, wrong[1])


def test_report_tells_what_leaks(files, caplog):
    _, peaks = files
    split = split_binding(peaks, targets=["MAX", "MYC"])
    protein = "MKVLAAGIVGLCAKAYEESETFIKGKERKTYQRRREGGQEEDACHLPQNQTDGGEVVQDVN" * 2
    changed = "W" + protein[1:40] + protein[42:]
    sequences = {"CTCF": protein, "MAX": changed, "MYC": protein[::-1], "SPI1": "MLQACKMEGF" * 12}
    with caplog.at_level("INFO"):
        report = split_report(split, sequences)
    assert report.similar_targets == (("MAX", "CTCF", 1 - 3 / len(protein)),)
    assert report.shared_targets == () and set(report.shared_cells) == {"HeLa"} and len(report.shared_chromosomes) == 3
    brute = sum(any(overlap(one, other) for other in places(split.train)) for one in places(split.valid))
    assert report.overlapping == brute > 0
    assert (report.train, report.valid, report.unused) == (len(split.train), len(split.valid), 0)
    assert "MAX = CTCF (98%)" in str(report) and str(report) in caplog.text
    assert split_report(split_binding(peaks, chromosomes=[2])).overlapping == 0
    assert split_report(split).similar_targets is None
    assert similar_proteins({"CTCF"}, {"MAX"}, sequences, identity=0.99) == []


@given(st.text(alphabet="ABC", max_size=12), st.text(alphabet="ABC", max_size=12))
def test_edit_distance_equals_the_table(one, two):
    row = list(range(len(two) + 1))
    for at, letter in enumerate(one, start=1):
        previous, row[0] = row[:], at
        for to, other in enumerate(two, start=1):
            row[to] = min(previous[to] + 1, row[to - 1] + 1, previous[to - 1] + (letter != other))
    assert edit_distance(one, two) == row[-1]


def test_context_strings(tmp_path):
    path = tmp_path / "biotypes.tsv"
    path.write_text(
        "biotype\tgerm_layer\tcellline_cat\tnote\nMCF-7\tectoderm\tcancer\tx\nHeLa\t\tNA\ty\nK562_PMA\tmesoderm\t\tz\n"
    )
    strings = ContextStrings(read_biotypes(path))
    assert strings("MCF-7_E2_10nM") == "cell type: MCF-7 | E2 10nM | ectoderm | cancer"
    assert strings("HeLa") == "cell type: HeLa" and strings("K562_PMA") == "cell type: K562 | PMA | mesoderm"
    assert strings("K562") == "cell type: K562" and strings.unknown == {"K562"}
    assert ContextStrings()("THP-1_v1.5") == "cell type: THP-1 | v1.5"
    assert Cell.parse("A_b_c") == Cell("A", "b c")
    path.write_text(path.read_text().replace("\t", ","))
    assert read_biotypes(path, columns=["note"])["MCF-7"] == ("x",)
    with pytest.raises(DataError, match="must have the column 'tissue'"):
        read_biotypes(path, columns=["tissue"])


def test_context_keys_tell_encoders_apart():
    keys = {
        context_key(text, EncoderIdentity(name, revision, layer, pooling, length))
        for text in ("a", "b")
        for name in ("x", "y")
        for revision in ("", "1")
        for layer in (-1, 3)
        for pooling in ("cls", "mean")
        for length in (256, None)
    }
    assert len(keys) == 64
    assert context_key("a", EncoderIdentity("x")) == context_key("a", EncoderIdentity("x"))
