"""Windows against a slow twin, the laws of tiling, and the stream against the list."""

import logging
from collections import Counter

import pysam
import pytest
from datasets import concatenate_datasets
from datasets.distributed import split_dataset_by_node
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from genesplice_hf.data import windows
from genesplice_hf.data.fasta import Genome
from genesplice_hf.data.windows import iter_windows, stream_windows, windows_dataset
from genesplice_hf.errors import DataError
from genesplice_hf.genome.alphabet import reverse_complement
from genesplice_hf.genome.interval import Interval

RECORDS = {"chr1": "ACGTTGCAAC" * 10 + "ACG", "chr2": "ccgga" * 5, "chr3": "GAT"}


@pytest.fixture(scope="module")
def genome(tmp_path_factory):
    path = tmp_path_factory.mktemp("genome") / "g.fa"
    path.write_text("".join(f">{name}\n{bases}\n" for name, bases in RECORDS.items()))
    return Genome(path)


def bounds(rows, chrom="chr1"):
    return [(row["start"], row["end"]) for row in rows if row["chrom"] == chrom]


def slow_bounds(start, end, window, step, last):
    """Tiles `[start, end)` base by base, as the docstring of `iter_windows` says it."""
    found, at = [], start
    while at + window <= end:
        found.append((at, at + window))
        at += step
    covered = found[-1][1] if found else start
    if covered < end and at < end:
        if last == "short":
            found.append((at, end))
        if last == "shift" and end - start >= window:
            found.append((end - window, end))
    return found


def test_worked_example(genome):
    assert list(iter_windows(genome, 40, regions=[Interval("2", 0, 25)], last="short")) == [
        {"chrom": "chr2", "start": 0, "end": 25, "sequence": "ccgga" * 5, "example_id": "chr2:0-25"}
    ]
    assert bounds(iter_windows(genome, 40, last="shift")) == [(0, 40), (40, 80), (63, 103)]
    assert bounds(iter_windows(genome, 40, last="drop")) == [(0, 40), (40, 80)]
    assert bounds(iter_windows(genome, 40, last="short")) == [(0, 40), (40, 80), (80, 103)]


@settings(max_examples=150, deadline=None)
@given(
    window=st.integers(1, 110),
    step=st.integers(1, 60),
    start=st.integers(0, 60),
    length=st.integers(1, 43),
    last=st.sampled_from(["shift", "drop", "short"]),
)
def test_equals_the_slow_twin(genome, window, step, start, length, last):
    expected = slow_bounds(start, start + length, window, step, last)
    region = [Interval("chr1", start, start + length)]
    if not expected:
        with pytest.raises(DataError, match="fits into no region"):
            iter_windows(genome, window, step, region, last=last)
        return
    rows = list(iter_windows(genome, window, step, region, last=last))
    assert bounds(rows) == expected
    assert [row["sequence"] for row in rows] == [RECORDS["chr1"][low:high] for low, high in expected]


@settings(max_examples=60, deadline=None)
@given(
    holes=st.lists(st.tuples(st.integers(0, 95), st.integers(1, 20)), max_size=5),
    last=st.sampled_from(["shift", "short"]),
)
def test_windows_cover_everything_but_the_holes(genome, holes, last):
    exclude = [Interval("1", start, min(103, start + length), "-") for start, length in holes]
    # Windows of one base fit everywhere, so the two together must make up the contig.
    rows = list(iter_windows(genome, 1, exclude=exclude, last=last))
    held = {base for start, end in bounds(rows) for base in range(start, end)}
    assert held == set(range(103)) - {base for hole in exclude for base in range(hole.start, hole.end)}


@given(st.integers(0, 95), st.integers(1, 8), st.integers(2, 30))
@settings(max_examples=60, deadline=None)
def test_no_window_touches_a_hole(genome, start, length, window):
    hole = Interval("chr1", start, start + length)
    rows = iter_windows(genome, window, 1, exclude=[hole], last="short")
    assert not any(hole.overlaps(Interval(row["chrom"], row["start"], row["end"])) for row in rows)


def test_a_region_that_is_wholly_excluded_is_an_error(genome):
    with pytest.raises(DataError, match="fits into no region"):
        iter_windows(genome, 5, regions=[Interval("chr3", 0, 3)], exclude=[Interval("chr3", 0, 3)], last="short")


def test_minus_strand_regions(genome):
    row = next(iter_windows(genome, 7, regions=[Interval("chr1", 10, 17, "-")], name="toy"))
    assert row["sequence"] == reverse_complement(RECORDS["chr1"][10:17])
    assert row["example_id"] == "toy|chr1:10-17(-)"


def test_n_rich_windows_are_left_out_and_counted(tmp_path, caplog):
    path = tmp_path / "n.fa"
    path.write_text(">a\nACGTNNNNnnnnACGN\n")
    genome = Genome(path)
    with caplog.at_level(logging.INFO, logger="genesplice_hf.data.windows"):
        assert bounds(iter_windows(genome, 4), "a") == [(0, 4), (12, 16)]
    assert "2 windows with more than 0.5 N" in caplog.text
    assert bounds(iter_windows(genome, 4, max_n_fraction=0.0), "a") == [(0, 4)]
    assert len(bounds(iter_windows(genome, 4, max_n_fraction=1.0), "a")) == 4


def test_short_stretches_are_counted(genome, caplog):
    with caplog.at_level(logging.INFO, logger="genesplice_hf.data.windows"):
        iter_windows(genome, 30)
    assert "2 stretches shorter than 30 bp" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_bp": 0}, "`window_bp`"),
        ({"window_bp": 5, "step_bp": 0}, "`step_bp`"),
        ({"window_bp": 5, "last": "pad"}, "`last`"),
        ({"window_bp": 5, "max_n_fraction": 1.5}, "`max_n_fraction`"),
        ({"window_bp": 500}, "fits into no region"),
        ({"window_bp": 5, "regions": [Interval("chr9", 0, 9)]}, "must be a contig"),
        ({"window_bp": 5, "regions": [Interval("chr1", 0, 104)]}, "<= 103"),
        ({"window_bp": 5, "exclude": [Interval("chr2", 0, 99)]}, "<= 25"),
    ],
)
@pytest.mark.parametrize("function", [iter_windows, windows_dataset, stream_windows])
def test_arguments_are_checked_at_the_call(genome, function, options, message):
    with pytest.raises(DataError, match=message):
        function(genome, **options)


OPTIONS = {"window_bp": 10, "step_bp": 3, "last": "short", "name": "toy"}


def test_dataset_and_stream_hold_the_same_rows(genome):
    rows = list(iter_windows(genome, **OPTIONS))
    dataset = windows_dataset(genome, **OPTIONS)
    assert dataset.to_list() == rows and dataset.features == windows.WINDOW_FEATURES
    assert not dataset.cache_files
    assert list(stream_windows(genome, **OPTIONS)) == rows


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(windows, "_WINDOWS_PER_SHARD", 4)


@pytest.mark.parametrize("last", ["shift", "drop", "short"])
@pytest.mark.parametrize("step_bp", [3, 10, 15])
def test_shards_are_the_whole(genome, small_shards, last, step_bp):
    options = OPTIONS | {"last": last, "step_bp": step_bp}
    stream = stream_windows(genome, **options)
    assert stream.num_shards > 2
    assert list(stream) == list(iter_windows(genome, **options))


@pytest.mark.parametrize("seen", [0, 1, 4, 9, 30])
def test_a_stream_goes_on_where_it_stopped(genome, small_shards, seen):
    whole = list(stream_windows(genome, **OPTIONS))
    stopped = stream_windows(genome, **OPTIONS)
    rows = iter(stopped)
    assert [next(rows) for _ in range(seen)] == whole[:seen]
    resumed = stream_windows(genome, **OPTIONS)
    resumed.load_state_dict(stopped.state_dict())
    assert list(resumed) == whole[seen:]


def test_processes_share_the_stream(genome, small_shards):
    ids = [row["example_id"] for row in iter_windows(genome, **OPTIONS)]
    parts = [split_dataset_by_node(stream_windows(genome, **OPTIONS), rank, 2) for rank in range(2)]
    assert Counter(row["example_id"] for part in parts for row in part) == Counter(ids)


def test_shuffled_stream_holds_the_same_rows(genome, small_shards):
    rows = list(iter_windows(genome, **OPTIONS))
    shuffled = list(stream_windows(genome, **OPTIONS).shuffle(seed=1, buffer_size=8))
    assert shuffled != rows
    assert sorted(shuffled, key=str) == sorted(rows, key=str)


def test_loader_workers_read_an_indexed_file_apart(tmp_path, small_shards):
    path = tmp_path / "g.fa"
    path.write_text("".join(f">{name}\n{bases}\n" for name, bases in RECORDS.items()))
    pysam.faidx(str(path))
    genome = Genome(path)
    # The parent has read before the workers start, so they inherit an open handle.
    expected = {row["example_id"]: row["sequence"] for row in iter_windows(genome, **OPTIONS)}
    rows = list(DataLoader(stream_windows(genome, **OPTIONS), batch_size=None, num_workers=2))
    assert len(rows) == len(expected)
    assert {row["example_id"]: row["sequence"] for row in rows} == expected


def test_genomes_can_be_put_together(genome):
    parts = [windows_dataset(genome, 20, name=name) for name in ("a", "b")]
    both = concatenate_datasets(parts)
    assert len(set(both["example_id"])) == len(both) == 2 * len(parts[0])
