"""BED: what is passed over, what is kept, and what is refused with its line."""

import gzip

import pytest

from genesplice_hf.data.bed import read_bed
from genesplice_hf.errors import DataError
from genesplice_hf.genome.interval import Interval

TEXT = (
    "browser position chr1:1-100\n"
    "track name=peaks description='two words'\n"
    "# a comment\n"
    "#chrom\tstart\tend\tsplit\tsignal\tstrand\n"
    "\n"
    "chr1\t0\t10\ttrain\t1.5\t-\n"
    "   \n"
    "chr2\t5\t7\tvalid\t\t.\r\n"
)


def write(tmp_path, text, name="x.bed"):
    path = tmp_path / name
    path.write_bytes(text.encode())
    return path


def test_headers_comments_and_blank_lines_are_passed_over_and_columns_kept(tmp_path):
    bed = read_bed(write(tmp_path, TEXT))
    assert bed.intervals == (Interval("chr1", 0, 10, "-"), Interval("chr2", 5, 7, "+"))
    assert bed.lines == (6, 8)
    assert bed.names == ("split", "signal", "strand")
    assert bed.column("split") == bed.column(4) == ["train", "valid"]
    assert bed.column("signal") == ["1.5", ""]


@pytest.mark.parametrize(
    "header", ["chrom start end split", "chr chromStart chromEnd split", "#chr\tStart\tEnd\tsplit"]
)
def test_a_line_of_names_without_a_number_is_a_header(tmp_path, header):
    bed = read_bed(write(tmp_path, f"{header}\nchr1 1 2 test\n"))
    assert bed.intervals == (Interval("chr1", 1, 2),) and bed.column("split") == ["test"]


def test_gzip_is_told_by_content(tmp_path):
    path = tmp_path / "peaks.bed"
    path.write_bytes(gzip.compress(TEXT.encode()))
    assert read_bed(path).intervals == read_bed(write(tmp_path, TEXT, "y.bed")).intervals


def test_any_white_space_and_a_sixth_column_that_is_no_strand(tmp_path):
    bed = read_bed(write(tmp_path, "chr1   3  9 a   0  word\nchr1\t4\t8\twith space\n"))
    assert [str(part) for part in bed.intervals] == ["chr1:4-9", "chr1:5-8"]
    assert bed.column("name") == ["a", "with space"]


def test_chrom_map_and_aliases(tmp_path):
    path = write(tmp_path, "NC_1 1 2\n1 1 2\nMT 0 1\n")
    bed = read_bed(path, chrom_map={"NC_1": "chr7"}, contigs=["chr1", "chr7", "chrM"])
    assert [part.chrom for part in bed.intervals] == ["chr7", "chr1", "chrM"]
    assert [part.chrom for part in read_bed(path).intervals] == ["NC_1", "1", "MT"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chr1\t0\t5\n\nchr1\t9\t4\n", r"Line 3 of .*x\.bed: `end` \(4\) must be larger than `start` \(9\)"),
        ("chr1\t9\t9\n", r"Line 1 of .*`end` \(9\) must be larger than `start` \(9\)"),
        ("chr1\t-2\t4\n", r"Line 1 of .*`start` must be 0 or more, was -2"),
        ("chr1\t2\n", r"Line 1 of .*must hold chrom, start and end, but has 2 columns"),
        ("chr1\t2\t4\nchr1\tx\t4\n", r"Line 2 of .*whole numbers in columns 2 and 3"),
        ("chr1\t1e3\t4000\n", r"Line 1 of .*whole numbers in columns 2 and 3"),
        ("track name=a\n\n#nothing\n", r"holds no BED row"),
        ("", r"holds no BED row"),
        ("chr2\t0\t1\nchr12\t0\t1\n", r"Line 2 of .*'chr12', which is unknown; .*the 3 names are 'chr2', 'chr1'"),
    ],
)  # fmt: skip
def test_bad_rows_are_named_with_their_line(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_bed(write(tmp_path, text), contigs=["chr1", "chr2", "chrX"])


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "x.bed"
    path.write_bytes(b"chr1\t0\t5\n\xff\xfe\x00\n")
    with pytest.raises(DataError, match=r"Line 2 of .* is no text"):
        read_bed(path)


def test_columns_that_are_not_there(tmp_path):
    bed = read_bed(write(tmp_path, "chr1\t0\t5\ttrain\nchr1\t0\t5\n"))
    with pytest.raises(DataError, match=r"`column` 4 must stand in every row of .*line 2 has 3 columns"):
        bed.column(4)
    with pytest.raises(DataError, match=r"`column` must be one of \['name'.*was 'nonsense'"):
        bed.column("nonsense")
    with pytest.raises(DataError, match=r"`column` 3 must"):
        bed.column(3)
