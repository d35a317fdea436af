"""Genome and read_fasta against plain slicing, pysam and the `datasets` FASTA builder's columns."""

import gzip
import logging
import os
import pickle

import numpy as np
import pysam
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genesplice_hf.data import fasta
from genesplice_hf.data.fasta import Genome, read_fasta
from genesplice_hf.errors import DataError
from genesplice_hf.genome.alphabet import reverse_complement

RECORDS = {
    "chr1": "ACGTNacgtnRYKMSWBDHVUu" * 7 + "AC",
    "chr2": "T",
    "chrM": "GATTACAgattaca" * 5,
    "scaffold_12": "CCGG" * 15,
}


def as_fasta(records, width=60, newline="\n", final_newline=True):
    lines = []
    for name, sequence in records.items():
        lines.append(f">{name} of a test\tfile")
        lines += [sequence[at : at + width] for at in range(0, len(sequence), width)]
    return newline.join(lines) + newline * final_newline


def write(path, text=None, compress=False):
    content = (as_fasta(RECORDS) if text is None else text).encode()
    path.write_bytes(gzip.compress(content) if compress else content)
    return path


def bgzip(source, target):
    pysam.tabix_compress(str(source), str(target))
    return target


def make(kind, folder):
    plain = write(folder / "plain.fa")
    if kind == "plain":
        return plain
    if kind == "gzip":
        return write(folder / "g.fa.gzip", compress=True)
    if kind == "gzip named fa":
        return write(folder / "g.fa", compress=True)
    if kind == "plain named gz":
        return write(folder / "p.fa.gz")
    if kind == "indexed plain":
        pysam.faidx(str(plain))
        return plain
    path = bgzip(plain, folder / "b.fa.gz")
    if kind == "indexed bgzip":
        pysam.faidx(str(path))
    return path


KINDS = ["plain", "gzip", "gzip named fa", "plain named gz", "bgzip", "indexed plain", "indexed bgzip"]


@pytest.fixture(params=KINDS)
def genome(request, tmp_path):
    return Genome(make(request.param, tmp_path))


def test_contigs_keep_their_order(genome):
    assert list(genome.contigs.items()) == [(name, len(bases)) for name, bases in RECORDS.items()]


def test_every_interval_equals_slicing(genome):
    bases = RECORDS["chr1"]
    for start in range(0, len(bases), 5):
        for end in range(start, len(bases) + 1, 7):
            assert genome.seq("chr1", start, end) == bases[start:end]
            assert genome.seq("chr1", start, end, "-") == reverse_complement(bases[start:end])


def test_array_holds_the_letters(genome):
    letters = genome.array("chrM", 3, 11)
    assert letters.dtype == np.uint8 and letters.shape == (8,)
    assert letters.tobytes().decode() == RECORDS["chrM"][3:11]
    with pytest.raises(ValueError, match="read-only"):
        letters[0] = 0


@pytest.mark.parametrize("cache", ["mmap", "memory"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_written_beside_the_file(kind, cache, tmp_path):
    path = make(kind, tmp_path)
    before = sorted(os.listdir(tmp_path))
    genome = Genome(path, cache=cache)
    assert genome.seq("scaffold_12", 0, 60) == RECORDS["scaffold_12"]
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(("kind", "indices"), [("plain", {".fai"}), ("bgzip", {".fai", ".gzi"})])
def test_index_is_written_when_asked_for_and_used(kind, indices, tmp_path):
    path = make(kind, tmp_path)
    genome = Genome(path, index=True)
    assert {name.removeprefix(path.name) for name in os.listdir(tmp_path) if name.startswith(path.name)} == {
        "",
        *indices,
    }
    assert isinstance(genome._store, fasta._IndexedContigs)
    assert genome.seq("chrM", 0, 70) == RECORDS["chrM"]


def test_index_of_plain_gzip_is_refused(tmp_path):
    with pytest.raises(DataError, match="recompress it with bgzip"):
        Genome(make("gzip", tmp_path), index=True)


def test_index_that_cannot_be_written(tmp_path):
    ragged = write(tmp_path / "ragged.fa", ">a\nACGT\nAC\nACGT\n")
    with pytest.raises(DataError, match="No index can be written"):
        Genome(ragged, index=True)
    assert Genome(ragged).seq("a", 0, 10) == "ACGTACACGT"


def test_index_older_than_the_file_is_not_trusted(tmp_path, caplog):
    path = make("indexed plain", tmp_path)
    write(path, ">chr1\nGGGGTTTT\n")
    os.utime(f"{path}.fai", (1, 1))
    with caplog.at_level(logging.WARNING):
        assert Genome(path).seq("chr1", 0, 8) == "GGGGTTTT"
    assert "older" in caplog.text


def test_index_of_another_file_is_noticed_on_reading(tmp_path):
    path = write(tmp_path / "a.fa", ">a\nACGTACGT\n>b\nACGTACGT\n")
    pysam.faidx(str(path))
    write(path, ">a\nACGT\nAC\n>b\nACGT\n")
    os.utime(path, (1, 1))
    # Across a header the letters are illegal, past the end there are none.
    for chrom in ("a", "b"):
        with pytest.raises(DataError, match="delete the index"):
            Genome(path).seq(chrom, 0, 8)


def test_broken_index(tmp_path):
    path = make("plain", tmp_path)
    (tmp_path / "plain.fa.fai").write_text("not an index\n")
    with pytest.raises(DataError, match="index"):
        Genome(path)


def test_aliases_are_resolved_and_said_once(tmp_path, caplog):
    genome = Genome(write(tmp_path / "a.fa"))
    with caplog.at_level(logging.INFO, logger="genesplice_hf.data.fasta"):
        assert [genome.resolve(chrom) for chrom in ("1", "1", "MT", "M", "chr2")] == [
            "chr1", "chr1", "chrM", "chrM", "chr2",
        ]  # fmt: skip
    assert [record.args[1:] for record in caplog.records] == [("1", "chr1"), ("MT", "chrM"), ("M", "chrM")]


def test_the_files_own_name_wins_over_an_alias(tmp_path):
    genome = Genome(write(tmp_path / "a.fa", ">1\nAAAA\n>chr1\nCCCC\n"))
    assert (genome.seq("1", 0, 4), genome.seq("chr1", 0, 4)) == ("AAAA", "CCCC")


def test_unknown_contig_suggests_the_nearest(genome):
    with pytest.raises(DataError, match=r"was 'scafold_12'.*'scaffold_12'"):
        genome.seq("scafold_12", 0, 1)


@pytest.mark.parametrize(("start", "end"), [(-1, 3), (0, 157), (9, 3), (157, 158)])
def test_interval_outside_the_contig(genome, start, end):
    with pytest.raises(DataError, match="<= 156"):
        genome.array("chr1", start, end)


def test_bad_arguments(tmp_path):
    path = write(tmp_path / "a.fa")
    with pytest.raises(DataError, match="`strand`"):
        Genome(path).seq("chr1", 0, 1, "x")
    with pytest.raises(DataError, match="`cache`"):
        Genome(path, cache="disk")
    with pytest.raises(DataError, match="there is no"):
        Genome(tmp_path / "b.fa")


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("final_newline", [True, False])
def test_line_ends(tmp_path, newline, final_newline):
    text = "\n" + as_fasta(RECORDS, newline=newline, final_newline=final_newline)
    genome = Genome(write(tmp_path / "a.fa", text))
    assert {name: genome.seq(name, 0, length) for name, length in genome.contigs.items()} == RECORDS


@settings(max_examples=40, deadline=None)
@given(
    records=st.lists(st.text("ACGTNacgtn", min_size=1, max_size=40), min_size=1, max_size=5),
    width=st.integers(1, 20),
    block=st.integers(1, 50),
)
def test_the_block_size_does_not_matter(tmp_path_factory, records, width, block):
    named = {f"c{n}": bases for n, bases in enumerate(records)}
    path = write(tmp_path_factory.mktemp("fasta") / "a.fa", as_fasta(named, width))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fasta, "_BLOCK_BYTES", block)
        rows = read_fasta(path)
        genome = Genome(path, cache="memory")
    assert rows["sequence"] == records
    assert {name: genome.seq(name, 0, length) for name, length in genome.contigs.items()} == named


BAD = {
    "empty": ("", "holds no FASTA record"),
    "blank": ("\n\n", "holds no FASTA record"),
    "no header": ("ACGT\nAC\n", "no `>` header"),
    "cut at the start": ("CGT\n>b\nACGT\n", "no `>` header"),
    "header at the end": (">a\nACGT\n>b", "'b' has no sequence"),
    "header in the middle": (">a\n>b\nACGT\n", "'a' has no sequence"),
    "no name": (">\nACGT\n", "no name"),
    "name twice": (">a x\nACGT\n>a y\nAC\n", "'a' twice"),
    "illegal letter": (">a\nACGT\nAC*T\n", r"'a' holds '\*' at base 7"),
    "illegal letter in the second": (">a\nAC\n>b\nAJ\n", "'b' holds 'J' at base 2"),
    "not text": (">a\nAC\xff\n", "'a' holds"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("read", [Genome, read_fasta])
@pytest.mark.parametrize("compress", [False, True])
def test_bad_files(tmp_path, case, read, compress):
    text, message = BAD[case]
    path = write(tmp_path / "bad.fa", text, compress)
    with pytest.raises(DataError, match=message):
        read(path)


@pytest.mark.parametrize("case", ["name twice", "illegal letter"])
def test_bad_files_get_no_index(tmp_path, case):
    path = write(tmp_path / "bad.fa", BAD[case][0])
    with pytest.raises(DataError, match=BAD[case][1]):
        Genome(path, index=True)
    assert os.listdir(tmp_path) == ["bad.fa"]


def test_truncated_gzip(tmp_path):
    path = make("gzip", tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="truncated gzip"):
        Genome(path)


@pytest.mark.parametrize("kind", ["bgzip", "indexed bgzip"])
def test_truncated_bgzip(tmp_path, kind):
    path = make(kind, tmp_path)
    stamp = path.stat()
    path.write_bytes(path.read_bytes()[:-28])
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(DataError, match="truncated bgzip"):
        Genome(path)


def test_illegal_letter_behind_an_index_is_noticed_on_reading(tmp_path):
    path = write(tmp_path / "a.fa", ">a\nACGT\nAC*T\n")
    pysam.faidx(str(path))
    genome = Genome(path)
    assert genome.seq("a", 0, 6) == "ACGTAC"
    with pytest.raises(DataError, match="illegal letters"):
        genome.seq("a", 4, 8)


def test_pickled_genome_reads_the_same(genome):
    copy = pickle.loads(pickle.dumps(genome))
    assert copy.contigs == genome.contigs
    assert copy.seq("1", 10, 90, "-") == genome.seq("1", 10, 90, "-")


def test_read_fasta_rows(tmp_path):
    rows = read_fasta(make("gzip", tmp_path))
    assert rows.column_names == ["id", "description", "sequence"]
    assert dict(zip(rows["id"], rows["sequence"], strict=True)) == RECORDS
    assert set(rows["description"]) == {"of a test\tfile"}


def test_read_fasta_takes_proteins_when_told(tmp_path):
    path = write(tmp_path / "p.fa", ">p\nMEEPQSDPSV*\n")
    with pytest.raises(DataError, match="'E' at base 2"):
        read_fasta(path)
    assert read_fasta(path, letters=None)["sequence"][0] == "MEEPQSDPSV*"
    assert read_fasta(path, letters=None)["description"][0] == ""
