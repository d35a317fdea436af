"""Negatives against brute force over every peak, and shuffles against the counts that they must keep."""

import logging
import math
from collections import Counter
from itertools import pairwise, permutations

import numpy as np
import pytest
from binding_files import DATASETS, SIZES, make_genome, make_peaks, overlap, places
from hypothesis import given
from hypothesis import strategies as st

from genesplice_hf.data.fasta import Genome
from genesplice_hf.data.intervals import NO_RANGES, RangeMap, Ranges, free_starts, merge, touches
from genesplice_hf.data.negatives import (
    CrossFactorNegatives,
    RandomNegatives,
    ScopedNegatives,
    distance_to_tss,
    gc_share,
    matched_negatives,
    read_reference_mask,
    repeat_share,
)
from genesplice_hf.data.peaks import read_peaks
from genesplice_hf.data.shuffle import dinucleotide_shuffle
from genesplice_hf.errors import DataError
from genesplice_hf.genome.interval import Interval

RANGE = st.tuples(st.integers(0, 60), st.integers(1, 12)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(st.lists(RANGE, max_size=12), st.lists(RANGE, min_size=1, max_size=12), st.integers(1, 20))
def test_ranges_equal_sets_of_positions(ranges, windows, length):
    covered = {place for start, end in ranges for place in range(start, end)}
    merged = merge(np.array([one[0] for one in ranges]), np.array([one[1] for one in ranges]))
    assert {place for start, end in zip(*merged, strict=True) for place in range(start, end)} == covered
    assert (merged.starts[1:] > merged.ends[:-1]).all()
    starts, ends = np.array(windows).T
    assert touches(merged, starts, ends).tolist() == [
        any(place in covered for place in range(start, end)) for start, end in windows
    ]
    free = free_starts(merged, 70, length)
    expected = {at for at in range(70 - length + 1) if not covered & set(range(at, at + length))}
    assert {place for start, end in zip(*free, strict=True) for place in range(start, end)} == expected


def test_random_windows_avoid_what_they_must(tmp_path):
    genome, peaks = make_genome(tmp_path), make_peaks(tmp_path)
    blacklist = Interval("1", 0, 8000)
    avoid = RangeMap.of_peaks(peaks, regions=[blacklist])
    sampler = RandomNegatives(genome, 200, avoid, chromosomes=[1, "chr2"], max_n=0.0)
    rng = np.random.default_rng(0)
    windows = [sampler.sample(rng) for _ in range(400)]
    taken = [*places(peaks), ("chr1", 0, 8000)]
    for chrom, start, end in windows:
        assert end - start == 200 and start >= 0 and end <= SIZES[chrom] and chrom != "chrX"
        assert not any(overlap((chrom, start, end), other) for other in taken)
        assert "N" not in genome.seq(chrom, start, end)
    share = sum(chrom == "chr1" for chrom, _, _ in windows) / 400
    # In proportion to length, but for windows with N that are drawn again: 30 kb against 20 kb, 2 kb of them N.
    assert abs(share - 0.62) < 0.08
    assert [sampler.sample(np.random.default_rng(5)) for _ in range(2)] == [
        sampler.sample(np.random.default_rng(5))
    ] * 2


def test_every_free_start_is_drawn(tmp_path):
    (tmp_path / "g.fa").write_text(">chr1\n" + "ACGT" * 5 + "\n")
    avoid = RangeMap([("chr1", np.array([6]), np.array([9]))])
    sampler = RandomNegatives(Genome(tmp_path / "g.fa"), 4, avoid)
    rng = np.random.default_rng(0)
    drawn = Counter(sampler.sample(rng)[1] for _ in range(2000))
    assert set(drawn) == {0, 1, 2, *range(9, 17)}
    assert min(drawn.values()) > 120
    with pytest.raises(DataError, match="No window of 12 bp"):
        RandomNegatives(Genome(tmp_path / "g.fa"), 12, avoid)
    with pytest.raises(DataError, match="`max_n`"):
        RandomNegatives(Genome(tmp_path / "g.fa"), 4, avoid, max_n=2)


def test_windows_of_n_alone_end_in_advice(tmp_path):
    (tmp_path / "g.fa").write_text(">chr1\n" + "N" * 50 + "\n")
    sampler = RandomNegatives(Genome(tmp_path / "g.fa"), 4, RangeMap([]))
    with pytest.raises(DataError, match="raise `max_n`"):
        sampler.sample(np.random.default_rng(0))
    assert RandomNegatives(Genome(tmp_path / "g.fa"), 4, RangeMap([]), max_n=1).sample(np.random.default_rng(0))


def test_matched_windows_have_the_features_of_the_positives(tmp_path):
    genome, peaks = make_genome(tmp_path), make_peaks(tmp_path)
    sampler = RandomNegatives(genome, 200, RangeMap.of_peaks(peaks))
    starts, ends = peaks.windows(200)
    inside = [row for row in range(len(peaks)) if starts[row] >= 0 and ends[row] <= SIZES[peaks.chrom(row)]]
    positives = [(peaks.chrom(row), int(starts[row]), int(ends[row])) for row in inside]
    found = matched_negatives(sampler, positives, np.random.default_rng(0), bins=20)
    values = [[gc_share(genome.array(*window)) for window in windows] for windows in (positives, found)]
    histograms = [np.histogram(one, bins=20, range=(0, 1))[0] / len(one) for one in values]
    assert np.abs(histograms[0] - histograms[1]).sum() / 2 <= 0.02
    assert np.ptp(values[0]) > 0.2
    assert not any(overlap(window, other) for window in found for other in places(peaks))
    sites = distance_to_tss({"1": np.array([100, 9000]), "chr2": np.array([500])})
    several = matched_negatives(
        sampler, positives[:20], np.random.default_rng(0), (gc_share, repeat_share, sites), bins=5
    )
    for one, other in zip(positives[:20], several, strict=True):
        for feature in (gc_share, repeat_share):
            counts = [np.histogram(feature(genome.array(*window)), bins=5, range=(0, 1))[0] for window in (one, other)]
            assert counts[0].tolist() == counts[1].tolist()
    with pytest.raises(DataError, match="found no partner in 3 draws"):
        matched_negatives(sampler, positives, np.random.default_rng(0), bins=50, max_draws=3)


def test_features_by_hand():
    letters = np.frombuffer(b"ACgtNNGG", dtype=np.uint8)
    assert gc_share(letters) == pytest.approx(4 / 6) and repeat_share(letters) == 0.25
    assert gc_share(np.frombuffer(b"NN", dtype=np.uint8)) == 0.5
    near = distance_to_tss({"chr1": np.array([104, 10_004])})
    assert near(letters, "1", 100) == 0 and near(letters, "chr9", 0) == 1
    assert near(letters, "chr1", 1100) == pytest.approx(math.log10(1001) / 7)


@pytest.mark.parametrize("length", [None, 400])
def test_scoped_negatives_never_touch_peaks_of_their_own(tmp_path, length):
    peaks = make_peaks(tmp_path)
    held_out = RangeMap([("chr1", np.array([12_000]), np.array([15_000]))])
    scoped = ScopedNegatives(peaks, length, chromosomes=["1", "X"], avoid=held_out)
    starts, ends = (peaks.start, peaks.end) if length is None else peaks.windows(length)
    windows = [(peaks.chrom(row), int(starts[row]), int(ends[row])) for row in range(len(peaks))]
    rng = np.random.default_rng(0)
    for code in scoped.datasets:
        own = places(peaks, lambda dataset, code=code: dataset == peaks.datasets[code])
        expected = [
            row
            for row, window in enumerate(windows)
            if window[0] in ("chr1", "chrX")
            and window[1] >= 0
            and not overlap(window, ("chr1", 12_000, 15_000))
            and not any(overlap(window, other) for other in own)
        ]
        assert scoped.rows(code).tolist() == expected and scoped.count(code) == len(expected)
        drawn = Counter(scoped.sample(code, rng)[:3] for _ in range(40 * len(expected)))
        assert set(drawn) == {windows[row] for row in expected}
        assert all(scoped.sample(code, rng).dataset == code for _ in range(3))
    assert len(scoped.datasets) == len(DATASETS)


def test_a_data_set_that_covers_all_is_left_out(tmp_path, caplog):
    lines = ["chr1\t0\t1000\tE0.CTCF.K562\t1", "chr1\t100\t200\tE1.SPI1.K562\t1", "chr1\t2000\t2100\tE0.CTCF.K562\t1"]
    (tmp_path / "p.bed").write_text("\n".join(lines) + "\n")
    peaks = read_peaks(tmp_path / "p.bed")
    with caplog.at_level(logging.INFO):
        scoped = ScopedNegatives(peaks)
    assert [peaks.datasets[code].target for code in scoped.datasets] == ["SPI1"]
    assert "E0.CTCF.K562 has no scoped negative and is left out" in caplog.text
    with pytest.raises(DataError, match="has no scoped negative"):
        scoped.sample(0, np.random.default_rng(0))
    assert scoped.sample(1, np.random.default_rng(0)) == ("chr1", 2000, 2100, 1)


def test_cross_factor_negatives_share_cell_and_window(tmp_path):
    peaks = make_peaks(tmp_path)
    cross = CrossFactorNegatives(peaks)
    rng, found = np.random.default_rng(0), 0
    for row in range(len(peaks)):
        code, window = int(peaks.dataset_codes[row]), places(peaks)[row]
        negative = cross.sample(code, *window, rng)
        own = peaks.datasets[code]
        others = {one.target for one in peaks.datasets if one.cell == own.cell and one.target != own.target}
        places_of = {
            target: places(peaks, lambda d, t=target, c=own.cell: (d.target, d.cell) == (t, c)) for target in others
        }
        bound = {target for target in others if any(overlap(window, one) for one in places_of[target])}
        if negative is None:
            assert others == bound
            continue
        found += 1
        assert negative[:3] == window
        assert peaks.datasets[negative.dataset].target in others - bound
        assert peaks.datasets[negative.dataset].cell == own.cell
    assert found > 50


@pytest.mark.parametrize("stem", ["GSE1.CTCF.K562", "E.yobble.open.bed", "GSE2.MYC.only"])
def test_reference_masks_lose_their_suffix_and_nothing_else(tmp_path, stem):
    path = tmp_path / f"{stem}.bed.bool.npy"
    np.save(path, np.array([True, False, True]))
    name, rows = read_reference_mask(path)
    assert name == stem and rows.tolist() == [0, 2]
    np.save(path, np.array([1.0]))
    with pytest.raises(DataError, match="bool array"):
        read_reference_mask(path)
    with pytest.raises(DataError, match="must end in"):
        read_reference_mask(tmp_path / "x.npy")


@given(st.text(alphabet="ACGTN", min_size=1, max_size=60), st.integers(0, 10))
def test_shuffles_keep_pairs_and_ends(sequence, seed):
    shuffled = dinucleotide_shuffle(sequence, np.random.default_rng(seed))
    assert Counter(pairwise(shuffled)) == Counter(pairwise(sequence))
    assert (shuffled[0], shuffled[-1], len(shuffled)) == (sequence[0], sequence[-1], len(sequence))
    assert shuffled == dinucleotide_shuffle(sequence, np.random.default_rng(seed))


def test_all_shuffles_are_equally_likely():
    sequence = "ACAGACTA"
    wanted = Counter(pairwise(sequence))
    possible = {"".join(one) for one in permutations(sequence) if Counter(pairwise(one)) == wanted}
    assert len(possible) > 3
    rng = np.random.default_rng(0)
    drawn = Counter(dinucleotide_shuffle(sequence, rng) for _ in range(600 * len(possible)))
    assert set(drawn) == possible
    # 600 expected; five standard deviations.
    assert all(abs(count - 600) < 125 for count in drawn.values())
    with pytest.raises(DataError):
        dinucleotide_shuffle("", rng)


def test_no_ranges():
    assert touches(NO_RANGES, np.array([0]), np.array([9])).tolist() == [False]
    assert [one.tolist() for one in free_starts(NO_RANGES, 10, 4)] == [[0], [7]]
    assert [one.tolist() for one in free_starts(Ranges(np.array([2]), np.array([90])), 10, 4)] == [[], []]
