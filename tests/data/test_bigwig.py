"""Targets from coverage against a slow twin that says each step in plain loops; files read back what was written."""

import builtins
import math
import multiprocessing
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from track_files import write_bigwig, write_fasta

from genesplice_hf.data.bed import read_bed
from genesplice_hf.data.bigwig import BigWig, bin_coverage, clip_extremes
from genesplice_hf.data.bigwig_tracks import BigWigSource, CoverageOptions, write_targets
from genesplice_hf.data.fasta import Genome
from genesplice_hf.data.target_table import Target, TargetTable
from genesplice_hf.data.tracks import TrackDataset, TrackOptions
from genesplice_hf.errors import DataError

NAN = math.nan
POOLS = ["sum", "mean", "avg", "sum_sqrt", "mean_sqrt", "avg_sqrt", "median", "max", "peak"]


def slow_bins(values, target, width, crop, blacklist, interp):
    """The steps one base at a time, in float64."""
    values, size = list(map(float, values)), len(values)
    bins = (size - 2 * crop) // width
    if interp:
        known = {-1: 0.0, size: 0.0} | {at: value for at, value in enumerate(values) if not math.isnan(value)}
        for at in range(size):
            left, right = max(k for k in known if k <= at), min(k for k in known if k >= at)
            share = (at - left) / (right - left) if right > left else 0.0
            values[at] = known[left] + share * (known[right] - known[left])
    ranked = sorted(values)
    median = (ranked[(size - 1) // 2] + ranked[size // 2]) / 2
    baseline = 0.0 if bins < 8 or any(map(math.isnan, values)) else median
    for at, value in enumerate(values):
        if any(low <= at < high for low, high in blacklist) and not math.isnan(value):
            values[at] = min(max(value, -baseline), baseline)
    values = [baseline if math.isnan(value) else value for value in values]
    values = [value * target.scale for value in values[crop : size - crop]]
    return [slow_clip(slow_pool(values[width * b : width * (b + 1)], target.sum_stat), target) for b in range(bins)]


def slow_pool(values, kind):
    total, mean, ranked = sum(values), sum(values) / len(values), sorted(values)
    middle = (ranked[(len(values) - 1) // 2] + ranked[len(values) // 2]) / 2
    return {
        "sum": lambda: total, "mean": lambda: mean, "avg": lambda: mean, "median": lambda: middle,
        "sum_sqrt": lambda: -1 + math.sqrt(1 + total), "mean_sqrt": lambda: -1 + math.sqrt(1 + mean),
        "avg_sqrt": lambda: -1 + math.sqrt(1 + mean), "max": lambda: max(values),
        "peak": lambda: min(max(math.sqrt(4 * mean), 0), 1),
    }[kind]()  # fmt: skip


def slow_clip(value, target):
    if target.clip_soft is not None and value > target.clip_soft:
        value = target.clip_soft - 1 + math.sqrt(value - target.clip_soft + 1)
    limit = min(65504.0, 65504.0 if target.clip is None else target.clip)
    return min(max(value, -limit), limit)


@given(
    seed=st.integers(0, 10**6),
    pool=st.sampled_from(POOLS),
    width=st.integers(1, 6),
    bins=st.integers(1, 12),
    crop=st.integers(0, 5),
    gaps=st.sampled_from([0.0, 0.2, 1.0]),
    interp=st.booleans(),
    soft=st.sampled_from([None, 1.0, 3.0]),
    hard=st.sampled_from([None, 2.5, 40.0]),
    scale=st.sampled_from([1.0, 0.5, 7.0]),
    blacklist=st.lists(st.tuples(st.integers(-5, 60), st.integers(1, 20)), max_size=2),
)
def test_equals_the_slow_twin(seed, pool, width, bins, crop, gaps, interp, soft, hard, scale, blacklist):
    generator = np.random.default_rng(seed)
    values = generator.gamma(1.0, 4.0, bins * width + 2 * crop).astype(np.float32)
    values[generator.random(len(values)) < gaps] = NAN
    holes = [(low, low + size) for low, size in blacklist]
    target = Target("t", clip=hard, clip_soft=soft, scale=scale, sum_stat=pool)
    binned = bin_coverage(values, target, width, crop, holes, interp)
    assert binned.dtype == np.float16 and binned.shape == (bins,)
    expected = slow_bins(values, target, width, crop, holes, interp)
    np.testing.assert_allclose(binned.astype(float), expected, rtol=2**-10, atol=1e-5)


def test_a_window_worked_by_hand():
    """Eight bins of two: the median 2 is the baseline that the blacklisted base falls to, and then bins are summed."""
    values = np.array([2.0] * 14 + [100.0, 3.0], dtype=np.float32)
    assert bin_coverage(values, Target("t"), 2).tolist() == [4.0] * 7 + [103.0]
    assert bin_coverage(values, Target("t"), 2, blacklist=[(14, 15)]).tolist() == [4.0] * 7 + [5.0]
    # soft first: 103 -> 4 - 1 + sqrt(100), and only then the hard limit.
    soft = Target("t", clip_soft=4.0)
    assert bin_coverage(values, soft, 2).tolist() == [4.0] * 7 + [13.0]
    assert bin_coverage(values, Target("t", clip_soft=4.0, clip=12.0), 2).tolist() == [4.0] * 7 + [12.0]


def test_gaps_hide_the_baseline_unless_they_are_filled():
    values = np.full(16, 4.0, dtype=np.float32)
    values[3] = NAN
    assert bin_coverage(values, Target("t"), 2)[1] == 4.0
    assert bin_coverage(values, Target("t"), 2, interp_nan=True)[1] == 8.0
    values[3] = 4.0
    values[2] = NAN
    assert bin_coverage(values, Target("t", sum_stat="max"), 2, blacklist=[(0, 2)]).tolist() == [0.0] + [4.0] * 7


def test_float16_holds_what_is_too_large():
    assert bin_coverage(np.full(4, 1e6, np.float32), Target("t"), 2).tolist() == [65504.0, 65504.0]


def test_extremes_are_clipped_to_their_quantile_per_track():
    targets = np.arange(-100, 101, dtype=np.float16).reshape(3, 67)
    assert clip_extremes(targets, 0.75).min() == -50 and clip_extremes(targets, 0.75).max() == 50
    assert np.array_equal(clip_extremes(targets, 1.0), targets)
    with pytest.raises(DataError, match="`clip_pct`"):
        clip_extremes(targets, 1.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(10), Target("t"), 4), r"multiple of `pool_width` \(4\) without .* of 10 bp 10 are left"),
        ((np.zeros(8), Target("t"), 2, 4), r"of 8 bp 0 are left"),
        ((np.zeros(8), Target("t"), 0), "`pool_width` must be 1 or more"),
        ((np.zeros(8), Target("t7", sum_stat="total"), 2), r"`sum_stat` of 't7' must be one of .*was 'total'"),
        ((np.full(8, -3.0), Target("t7", sum_stat="sum_sqrt"), 2), r"`sum_stat` 'sum_sqrt' of 't7' .*`scale=-1`"),
    ],
)  # fmt: skip
def test_windows_and_tracks_that_do_not_fit(arguments, message):
    with pytest.raises(DataError, match=message):
        bin_coverage(*arguments)


CONTIGS = {"chr1": 100, "chr2": 40}


@pytest.fixture
def wig(tmp_path):
    return write_bigwig(tmp_path / "a.bw", CONTIGS, [("chr1", 10, range(1, 81)), ("chr2", 0, [0.5] * 40)])


def test_values_off_the_chromosome_and_in_gaps_are_nan(wig):
    values = BigWig(wig).values("chr1", -2, 14)
    assert np.isnan(values[:12]).all() and values[12:].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert np.isnan(BigWig(wig).values("1", 88, 105)[2:]).all()
    assert np.isnan(BigWig(wig).values("chr2", 50, 60)).all()
    assert BigWig(wig).values("2", 38, 42)[:2].tolist() == [0.5, 0.5]


def test_a_contig_that_the_file_lacks_is_named_with_file_and_range(wig):
    with pytest.raises(
        DataError, match=r"a\.bw at 0-based chr3:5-9: the file has no contig 'chr3'; the nearest .*'chr"
    ):
        BigWig(wig).values("chr3", 5, 9)


def test_files_that_are_no_bigwig(tmp_path):
    (tmp_path / "x.bw").write_bytes(b"no such thing" * 10)
    with pytest.raises(DataError, match=r"x\.bw is no whole bigWig file"):
        BigWig(tmp_path / "x.bw")
    with pytest.raises(DataError, match=r"there is no .*y\.bw"):
        BigWig(tmp_path / "y.bw")


def test_a_missing_package_is_told_at_use(wig, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "pyBigWig":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install genesplice-hf\[tracks\]"):
        BigWig(wig)


def _in_child(file, queue):
    queue.put(file.values("chr1", 10, 13).tolist())


def test_every_process_opens_its_own_handle(wig):
    file = BigWig(wig)
    assert pickle.loads(pickle.dumps(file)).values("chr1", 10, 13).tolist() == [1.0, 2.0, 3.0]
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(file, queue))
    child.start()
    assert queue.get() == [1.0, 2.0, 3.0]
    child.join()
    assert file.values("chr1", 87, 90).tolist() == [78.0, 79.0, 80.0]


@pytest.fixture
def two_tracks(tmp_path, wig):
    write_bigwig(tmp_path / "b.bw", CONTIGS, [("chr1", 0, [1.0] * 100), ("chr2", 0, [2.0] * 40)])
    targets = (Target("a", file="a.bw"), Target("b", file="b.bw", sum_stat="mean", scale=3.0))
    return TargetTable(targets, (1, 0))


def write_bed(tmp_path, text):
    (tmp_path / "w.bed").write_text(text)
    return read_bed(tmp_path / "w.bed")


def test_a_source_of_two_tracks(tmp_path, two_tracks):
    bed = write_bed(tmp_path, "chr1\t10\t30\nchr2\t0\t20\n")
    options = CoverageOptions(pool_width=4, crop_bp=4, folder=tmp_path)
    source = BigWigSource(two_tracks, bed, options)
    assert (source.num_bins, source.num_tracks, len(source)) == (3, 2, 2)
    assert source.read(0).labels.tolist() == [[26.0, 3.0], [42.0, 3.0], [58.0, 3.0]]
    assert source.read(1).labels.tolist() == [[2.0, 6.0]] * 3


def test_the_blacklist_reaches_only_its_windows(tmp_path, two_tracks):
    (tmp_path / "black.bed").write_text("1\t12\t14\nchr2\t100\t200\n")
    black = read_bed(tmp_path / "black.bed")
    bed = write_bed(tmp_path, "chr1\t10\t26\nchr2\t0\t16\n")
    options = {"pool_width": 2, "folder": tmp_path, "blacklist": black}
    first = BigWigSource(two_tracks, bed, CoverageOptions(**options)).read(0).labels[:, 0]
    # Values 3 and 4 lie below the median 8.5, so nothing happens; with a buffer of 12 the last ones are cut.
    assert first.tolist() == [3, 7, 11, 15, 19, 23, 27, 31]
    wide = BigWigSource(two_tracks, bed, CoverageOptions(**options, blacklist_buffer_bp=12))
    assert wide.read(0).labels[:, 0].tolist() == [3, 7, 11, 15, 17, 17, 17, 17]
    assert wide.read(1).labels[:, 1].tolist() == [6.0] * 8


def test_written_targets_are_the_windows_clipped_over_all(tmp_path, two_tracks):
    bed = write_bed(tmp_path, "chr1\t10\t30\nchr1\t70\t90\n")
    options = CoverageOptions(pool_width=4, folder=tmp_path)
    source = BigWigSource(two_tracks, bed, options)
    plain = np.stack([source.read(index).labels for index in range(2)])
    assert np.array_equal(np.load(write_targets(tmp_path / "t.npy", two_tracks, bed, options, clip_pct=None)), plain)
    clipped = np.load(write_targets(tmp_path / "c.npy", two_tracks, bed, options, clip_pct=0.5))
    limits = np.quantile(plain.reshape(-1, 2).astype(np.float32), 0.5, axis=0)
    np.testing.assert_allclose(clipped, np.clip(plain.astype(np.float32), -limits, limits), rtol=2**-10)


def test_a_dataset_of_fasta_bed_and_bigwig(tmp_path, two_tracks):
    genome = Genome(write_fasta(tmp_path / "g.fa", {"chr1": "ACGTN" * 20, "chr2": "T" * 40}))
    write_bed(tmp_path, "track x\nchr1\t10\t30\tvalid\n2\t20\t40\ttrain\n")
    data = TrackDataset.from_bigwig(
        two_tracks, tmp_path / "w.bed", genome, TrackOptions(context_length=24), CoverageOptions(4, folder=tmp_path)
    )
    first, second = data[0], data[1]
    assert first["interval"] == ("chr1", 8, 32) and first["input_ids"].tolist() == [3, 4] + [0, 1, 2, 3, 4] * 4 + [
        0,
        1,
    ]
    assert second["interval"] == ("chr2", 18, 42) and second["input_ids"].tolist() == [3] * 22 + [4, 4]
    assert first["labels"].tolist() == [[10.0, 3.0], [26.0, 3.0], [42.0, 3.0], [58.0, 3.0], [74.0, 3.0]]
    assert data.strand_pair == (1, 0)


@pytest.mark.parametrize(
    ("bed", "options", "message"),
    [
        ("chr1\t0\t10\n", {"pool_width": 4}, r"multiple of `pool_width` \(4\)"),
        ("chr1\t0\t8\nchr1\t0\t12\n", {"pool_width": 4}, r"Line 2 of .*of one length, but this one has 12 bp"),
        ("chr1\t0\t8\nchrX\t0\t8\n", {"pool_width": 4}, r"a\.bw at 0-based chrX:0-8: the file has no contig 'chrX'"),
    ],
)
def test_windows_that_do_not_fit_are_told_at_once(tmp_path, two_tracks, bed, options, message):
    with pytest.raises(DataError, match=message):
        BigWigSource(two_tracks, write_bed(tmp_path, bed), CoverageOptions(**options, folder=tmp_path))


def test_a_track_without_a_file(tmp_path, two_tracks):
    bed = write_bed(tmp_path, "chr1\t0\t8\n")
    with pytest.raises(DataError, match="`file` of the track 'c' is empty"):
        BigWigSource(TargetTable((Target("c"),)), bed, CoverageOptions(4))
