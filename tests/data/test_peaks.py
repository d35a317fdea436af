"""Peak files: the fast reader against the line reader, formats by hand, filters, cache and bad lines."""

import gzip
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genesplice_hf.data import peak_formats, peaks
from genesplice_hf.data.peak_formats import FORMATS, Dataset, Lines, Names, parse_block, parse_remap_name
from genesplice_hf.data.peaks import MOUSE_CHROMOSOMES, read_peaks
from genesplice_hf.errors import DataError

REMAP = """\
chr1\t100\t300\tGSE1.CTCF.K-562\t12\t.\t180\t181\t1,2,3
chr1\t250\t400\tGSE1.SPI1.THP-1_PMA_v1.5\t7.5\t.\t300\t301\t1,2,3
chrX\t10\t20\tENCSR1.CTCF.HeLa.S3\t0\t.\t15\t16\t1,2,3
chr22\t5\t9\tGSE1.CTCF.K-562\t3\t.\t6\t7\t1,2,3
chrY\t5\t9\tGSE1.CTCF.K-562\t3\t.\t6\t7\t1,2,3
"""


def write(folder, text=REMAP, name="p.bed"):
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    return path


def rows(table):
    return [
        (table.chrom(row), int(table.start[row]), int(table.end[row]), table.dataset(row).name, int(table.summit[row]))
        for row in range(len(table))
    ]


@pytest.mark.parametrize("name", ["p.bed", "p.bed.gz"])
def test_remap_lines(tmp_path, name):
    got = read_peaks(write(tmp_path, name=name))
    assert rows(got) == [
        ("chr1", 100, 300, "GSE1.CTCF.K-562", 180),
        ("chr1", 250, 400, "GSE1.SPI1.THP-1_PMA_v1.5", 300),
        ("chrX", 10, 20, "ENCSR1.CTCF.HeLa.S3", 15),
        ("chr22", 5, 9, "GSE1.CTCF.K-562", 6),
    ]
    assert got.dataset(1) == Dataset("GSE1", "SPI1", "THP-1_PMA_v1.5") and got.dataset(2).cell == "HeLa.S3"
    np.testing.assert_allclose(got.value, [12, 7.5, 0, 3])
    assert got.bytes_per_row <= 20 and len(got.datasets) == 3


@pytest.mark.parametrize("wanted", [[1, 22, "X"], ["1", "22", "x"], ["chr1", "chr22", "chrX"], np.array([1, 22, "X"])])
def test_every_spelling_of_chromosomes(tmp_path, wanted):
    got = read_peaks(write(tmp_path), chromosomes=wanted)
    assert {got.chrom(row) for row in range(len(got))} == {"chr1", "chr22", "chrX"}
    assert (
        len(got.filter(chromosomes=[1]))
        == len(got.filter(chromosomes=["1"]))
        == len(got.filter(chromosomes=["chr1"]))
        == 2
    )
    assert len(read_peaks(write(tmp_path, REMAP.replace("chr", "")), chromosomes=wanted)) == 4
    assert len(read_peaks(write(tmp_path), chromosomes=None)) == 5
    assert len(read_peaks(write(tmp_path), chromosomes=MOUSE_CHROMOSOMES)) == 3


def test_headers_comments_blank_lines_and_line_ends(tmp_path):
    plain = read_peaks(write(tmp_path))
    text = (
        "\ufeffbrowser position chr1\ntrack name=x\n#chrom\tstart\tend\tname\n\n" + REMAP.replace("\n", "\r\n") + "\n"
    )
    text = text.replace("chrX\t10", "#chr1\t1\t2\tGSE1.CTCF.K-562\t12\t.\t1\t2\t1,2,3\r\nchrX\t10")
    assert rows(read_peaks(write(tmp_path, text))) == rows(plain)
    assert rows(read_peaks(write(tmp_path, REMAP.replace("\t", " ")))) == rows(plain)
    assert rows(read_peaks(write(tmp_path, REMAP.rstrip("\n")))) == rows(plain)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("chr1\t1\t2\tGSE1.CTCF", r"line 6: column 4 must be EXPERIMENT.TARGET.CELL, was 'GSE1.CTCF'"),
        ("chr1\t1\t2\tGSE1..K562", "line 6: column 4"),
        ("chr1\t9\t5\tA.B.C", r"line 6: `start` \(9\) must be 0 or more and `end` \(5\) larger"),
        ("chr1\t5\t5\tA.B.C", r"`end` \(5\) larger"),
        ("chr1\t-4\t5\tA.B.C", r"`start` \(-4\) must be 0 or more"),
        ("chr1\tx\t5\tA.B.C", "line 6: `start` must be a whole number, was 'x'"),
        ("chr1\t1\t5.5\tA.B.C", "`end` must be a whole number"),
        ("chr1\t1\t1_000\tA.B.C", "`end` must be a whole number"),
        ("chr1\t1\t99999999999\tA.B.C", "`end`"),
        ("chr1\t1", "4 columns are needed, this line has 2"),
        ("chr1\t1\t5\tA.B.C\thigh", "the value column must hold a number, was 'high'"),
    ],
)
def test_bad_lines_are_named_or_skipped_and_counted(tmp_path, line, told):
    path = write(tmp_path, REMAP + line + "\n" + REMAP)
    with pytest.raises(DataError, match=told):
        read_peaks(path)
    got = read_peaks(path, on_error="skip")
    assert got.skipped == 1 and rows(got) == rows(read_peaks(write(tmp_path, name="q.bed"))) * 2


def test_files_without_peaks(tmp_path):
    with pytest.raises(DataError, match="there is no"):
        read_peaks(tmp_path / "absent.bed")
    with pytest.raises(DataError, match="holds no peak"):
        read_peaks(write(tmp_path, "track name=x\n"))
    with pytest.raises(DataError, match="check `chromosomes`"):
        read_peaks(write(tmp_path), chromosomes=[7])
    cut = gzip.compress(REMAP.encode())[:-10]
    (tmp_path / "cut.bed.gz").write_bytes(cut)
    with pytest.raises(DataError, match="truncated"):
        read_peaks(tmp_path / "cut.bed.gz")


def test_other_formats(tmp_path):
    crm = read_peaks(write(tmp_path, "chr1\t100\t900\tCTCF,SPI1,CTCF\t9\t.\t400\t401\n"), "crm")
    assert [crm.dataset(row).target for row in range(len(crm))] == ["CTCF", "SPI1"]
    assert crm.start.tolist() == [100, 100] and crm.summit.tolist() == [400, 400]
    narrow = write(tmp_path, "chr1\t100\t300\tp1\t5\t.\t8.25\t4\t3\t50\nchr1\t500\t700\tp2\t5\t.\t1\t4\t3\t-1\n")
    got = read_peaks(narrow, "narrowpeak", target="CTCF", cell="K562")
    assert got.summit.tolist() == [150, 600] and got.value.tolist() == [8.25, 1.0]
    assert got.dataset(0) == Dataset("", "CTCF", "K562")
    assert read_peaks(narrow, "narrowpeak", target="CTCF", value_column="q_value").value.tolist() == [3, 3]
    assert read_peaks(narrow, "narrowpeak", target="CTCF", value_column=8).value.tolist() == [4, 4]
    broad = read_peaks(write(tmp_path, "chr1\t100\t300\tp1\t5\t.\t2\t4\t3\n"), "broadpeak", target="H3K27ac")
    assert broad.summit.tolist() == [200] and broad.value.tolist() == [2]
    text = (
        "# MACS\nchr\tstart\tend\tlength\tabs_summit\tpileup\t-log10(pvalue)\tfold_enrichment\t-log10(qvalue)\tname\n"
    )
    macs = read_peaks(write(tmp_path, text + "chr1\t101\t300\t200\t151\t7\t5\t3.5\t2\tp\n"), "macs", target="CTCF")
    assert (macs.start[0], macs.end[0], macs.summit[0], macs.value[0]) == (100, 300, 150, 3.5)
    bare = read_peaks(write(tmp_path, "chr1\t100\t300\nchr1\t400\t500\n"), "bed", target="CTCF")
    assert np.isnan(bare.value).all() and bare.summit.tolist() == [200, 450]
    mixed = read_peaks(write(tmp_path, "chr1\t100\t300\tA.B.C\t.\t.\t.\t.\n"))
    assert np.isnan(mixed.value).all() and mixed.summit.tolist() == [200]


def test_options_that_do_not_fit(tmp_path):
    path = write(tmp_path)
    for options, told in (
        ({"kind": "gff"}, "`kind`"),
        ({"kind": "bed"}, "`target` must be given"),
        ({"target": "CTCF"}, "must not be given"),
        ({"value_column": "height"}, "`value_column`"),
        ({"value_column": 2}, "4 or more"),
        ({"on_error": "ignore"}, "`on_error`"),
    ):
        with pytest.raises(DataError, match=told):
            read_peaks(path, **options)


NAMES = st.sampled_from(["A.B.C", "GSE1.CTCF.K562", "GSE1.CTCF.K562.v2", "E.MAX-MYC.x_y"])
LINE = st.tuples(
    st.sampled_from(["chr1", "chr2", "X", "chr10", "chrUn"]), st.integers(0, 10**8), st.integers(1, 10**4), NAMES,
    st.one_of(st.integers(0, 1000).map(str), st.floats(0, 1e6).map(lambda x: f"{x:.4f}")), st.integers(-5, 10**4),
)  # fmt: skip


@given(st.lists(LINE, min_size=1, max_size=40))
def test_fast_reader_equals_line_reader(lines):
    text = "\n".join(
        f"{chrom}\t{start}\t{start + length}\t{name}\t{score}\t.\t{max(0, start + summit)}\t0"
        for chrom, start, length, name, score, summit in lines
    ).encode()
    answers = []
    for fast in (True, False):
        names, reader = Names(FORMATS["remap"], [*range(1, 23), "X"], None), Lines("x", skip=False)
        if fast:
            assert (
                peak_formats._in_one_stroke(text, FORMATS["remap"], 5, Names(FORMATS["remap"], None, None)) is not None
            )
            block = parse_block(text, FORMATS["remap"], 5, names, reader)
        else:
            block = reader.parse(text, FORMATS["remap"], 5, names)
        texts = [[names.chroms[code] for code in block.chrom], [names.datasets[code] for code in block.dataset]]
        answers.append([texts, *(column.tolist() for column in block[2:6]), block.elsewhere])
    assert answers[0] == answers[1]


def test_blocks_are_cut_at_lines(tmp_path, monkeypatch):
    path = write(tmp_path, REMAP * 50)
    whole = read_peaks(path)
    monkeypatch.setattr(peaks, "_BLOCK_BYTES", 37)
    assert rows(read_peaks(path)) == rows(whole)
    path.write_text(REMAP * 50 + "chr1\t5\t1\tA.B.C\n")
    with pytest.raises(DataError, match="line 251"):
        read_peaks(path)


def test_cache_is_keyed_by_file_and_options(tmp_path):
    path, cache = write(tmp_path), tmp_path / "cache"
    first = read_peaks(path, cache=cache)
    assert isinstance(first.start, np.memmap) and rows(first) == rows(read_peaks(path))
    assert len(list(cache.iterdir())) == 1
    read_peaks(path, cache=cache)
    assert len(list(cache.iterdir())) == 1
    assert len(read_peaks(path, cache=cache, chromosomes=[1])) == 2
    assert len(list(cache.iterdir())) == 2
    path.write_text(REMAP.replace("chr22\t5", "chr22\t4"))
    os.utime(path, ns=(1, 1))
    assert rows(read_peaks(path, cache=cache))[3][1] == 4
    path.write_text("chr1\t5\t1\tA.B.C\n")
    with pytest.raises(DataError, match="line 1"):
        read_peaks(path, cache=cache)
    assert len(list(cache.iterdir())) == 3


def test_filters(tmp_path):
    table = read_peaks(write(tmp_path), chromosomes=None)
    assert len(table.filter(targets=["CTCF"])) == 4 and len(table.filter(exclude_targets=["CTCF"])) == 1
    assert len(table.filter(cells=["K-562"], chromosomes=["chr1"])) == 1
    assert len(table.filter(exclude_cells=["K-562", "HeLa.S3"])) == 1
    assert [table.filter(usable=lambda name: name == "SPI1").dataset(0).target] == ["SPI1"]
    half = table.filter(fraction=0.6, seed=3)
    assert len(half) == 3 and rows(half) == rows(table.filter(fraction=0.6, seed=3))
    assert set(rows(half)) <= set(rows(table))
    for options, told in (
        ({"targets": ["CTCT"]}, "nearest is 'CTCF'"),
        ({"cells": ["K562"]}, "nearest is 'K-562'"),
        ({"chromosomes": [3]}, "`chromosomes` names 3"),
        ({"fraction": 0}, "`fraction`"),
    ):
        with pytest.raises(DataError, match=told):
            table.filter(**options)
    # A name list far beyond what chained conditions would bear.
    many = [f"T{at}" for at in range(2000)]
    big = read_peaks(write(tmp_path, "".join(f"chr1\t{at}\t{at + 9}\tE.T{at}.c\t1\n" for at in range(2000))))
    assert len(big.filter(targets=many[::2])) == 1000


def test_windows(tmp_path):
    table = read_peaks(write(tmp_path))
    starts, ends = table.windows(50)
    assert starts.tolist() == [155, 275, -10, -19] and (ends - starts == 50).all()
    assert table.windows(51, "midpoint")[0].tolist()[0] == 175
    for wrong in ({"length": 0}, {"length": 5, "center": "start"}):
        with pytest.raises(DataError):
            table.windows(**wrong)


def test_remap_names():
    assert parse_remap_name("GSE1.CTCF.a.b.c") == Dataset("GSE1", "CTCF", "a.b.c")
    assert Dataset("GSE1", "CTCF", "a.b.c").name == "GSE1.CTCF.a.b.c"
