"""Coordinates: worked examples of the two file conventions, round trips, and complaints."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genesplice_hf.errors import DataError
from genesplice_hf.genome.interval import Interval, contig_aliases

starts = st.integers(0, 10**9)
lengths = st.integers(1, 10**6)


def test_the_first_ten_bases_in_both_conventions():
    ucsc, bed = Interval.parse("chr1:1-10"), Interval.from_bed_line("chr1\t0\t10")
    assert ucsc == bed == Interval("chr1", 0, 10)
    assert ucsc.length_bp == 10


def test_commas_and_colons_in_the_text_form():
    assert Interval.parse("chr1:1,000-2,000") == Interval("chr1", 999, 2000)
    assert Interval.parse("HLA-A*01:01:5-6") == Interval("HLA-A*01:01", 4, 6)


def test_bed_strand_stands_in_the_sixth_column():
    assert Interval.from_bed_line("chr1\t5\t9\tname\t0\t-\n").strand == "-"
    assert Interval.from_bed_line("chr1 5 9 name 0 .").strand == "+"
    assert Interval.from_bed("chr1", 5, 9, "-") == Interval("chr1", 5, 9, "-")


def test_numpy_integers_are_stored_as_python_integers():
    interval = Interval("chr1", np.int64(3), np.uint8(7))
    assert type(interval.start) is int and interval == Interval("chr1", 3, 7)


@given(starts, lengths)
def test_text_form_round_trip(start, length):
    interval = Interval("chrX", start, start + length)
    assert Interval.parse(str(interval)) == interval


@given(st.integers(0, 30), st.integers(1, 30), st.integers(0, 30), st.integers(1, 30))
def test_overlap_is_a_common_base(a, len_a, b, len_b):
    left, right = Interval("c", a, a + len_a), Interval("c", b, b + len_b, "-")
    common = set(range(a, a + len_a)) & set(range(b, b + len_b))
    assert left.overlaps(right) == right.overlaps(left) == bool(common)


def test_other_contigs_do_not_overlap():
    assert not Interval("a", 0, 9).overlaps(Interval("b", 0, 9))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("", 0, 1), "`chrom`"),
        (("c", -1, 1), "`start` must be 0 or more"),
        (("c", 5, 5), "`end` \\(5\\) must be larger"),
        (("c", 1.5, 3), "`start` must be a whole number"),
        (("c", 0, "3"), "`end` must be a whole number"),
        (("c", 0, 1, "*"), "`strand`"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(DataError, match=message):
        Interval(*fields)


@pytest.mark.parametrize("text", ["chr1", "chr1:5", "chr1:a-b", "chr1:0-5", ":1-2", "chr1:,-5"])
def test_text_that_is_not_an_interval(text):
    with pytest.raises(DataError):
        Interval.parse(text)


@pytest.mark.parametrize("line", ["chr1\t5", "chr1\ta\tb", "track name=x"])
def test_lines_that_are_not_bed(line):
    with pytest.raises(DataError, match="BED line"):
        Interval.from_bed_line(line)


def test_alias_rule():
    assert contig_aliases("chr1") == ("1",)
    assert contig_aliases("X") == ("chrX",)
    assert contig_aliases("MT")[0] == "chrM"
    assert contig_aliases("chrM")[0] == "MT"


@given(st.sampled_from(["1", "22", "X", "chrY", "II", "M", "MT", "chrM", "chrMT"]))
def test_aliases_are_mutual(chrom):
    assert all(chrom in contig_aliases(alias) for alias in contig_aliases(chrom))
