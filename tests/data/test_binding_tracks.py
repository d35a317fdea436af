"""Binding tracks against sums by hand; without pyBigWig everything imports and the rest is left out by name."""

import runpy
import sys

import numpy as np
import pytest
from binding_files import SIZES, make_genome

from genesplice_hf.data.binding_batches import BindingCollator
from genesplice_hf.data.binding_tracks import (
    Experiment,
    TFBindTrackDataset,
    TFBindTracksOnly,
    TrackWindows,
    centre_crop,
    read_annotation,
)
from genesplice_hf.data.protein_embeddings import FactorStates
from genesplice_hf.errors import DataError
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer

ANNOTATION = """\
SRX1\thg38\tTFs and others\tctcf\tBlood\tK-562\tx
SRX2\thg38\tTFs and others\tSpi1\tBlood\tTHP-1\ty
SRX3\tmm10\tTFs and others\tCtcf\tLiver\tHepa 1-6\tz
"""
COVERAGE = {
    "SRX1": lambda at: at % 7 / 7,
    "SRX2": lambda at: np.where(at % 1000 < 300, np.nan, 2.0),
    "SRX3": lambda at: at * 0.0 + 5,
}


@pytest.fixture
def annotation(tmp_path):
    (tmp_path / "annotation.tsv").write_text(ANNOTATION)
    return read_annotation(tmp_path / "annotation.tsv")


@pytest.fixture
def folder(tmp_path):
    bigwig = pytest.importorskip("pyBigWig", reason="bigWig files are read by the optional package pyBigWig")
    for name, coverage in COVERAGE.items():
        file = bigwig.open(str(tmp_path / f"{name}.bw"), "w")
        file.addHeader(list(SIZES.items()))
        for chrom, size in SIZES.items():
            values = coverage(np.arange(size))
            known = np.flatnonzero(~np.isnan(values))
            file.addEntries(chrom, known.tolist(), values=values[known].astype(float).tolist(), span=1)
        file.close()
    (tmp_path / "loci.bed").write_text("track name=x\nchr1\t5000\t5100\nchr1\t90\t110\nchr2\t9000\t9500\n")
    return tmp_path


def expected(name, start, length, width=128, pool=np.sum):
    values = np.nan_to_num(COVERAGE[name](np.arange(start, start + length)))
    values[np.arange(start, start + length) < 0] = 0
    return pool(values.reshape(-1, width), axis=1)


def test_annotation_columns(annotation, tmp_path):
    assert annotation[1] == Experiment("SRX2", "hg38", "SPI1", "THP-1")
    assert read_annotation(tmp_path / "annotation.tsv", cell_column=5)[1].cell == "Blood"
    path = tmp_path / "bad.tsv"
    for text, told in (
        ("SRX1\thg38\tTFs\tCTCF\tBlood\n", "line 1: 6 columns"),
        (ANNOTATION * 2, "line 4: 'SRX1' stands twice"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=told):
            read_annotation(path)
    path.write_text("\n")
    with pytest.raises(DataError, match="no experiment"):
        read_annotation(path)
    with pytest.raises(DataError, match="`cell_column`"):
        read_annotation(path, cell_column=2)


@pytest.mark.parametrize("pool", ["sum", "mean"])
def test_rows_in_order_of_locus_and_experiment(folder, annotation, tmp_path, pool):
    genome, human = make_genome(tmp_path), annotation[:2]
    rows = TFBindTrackDataset(folder / "loci.bed", genome, folder, human, TrackWindows(1024, pool=pool, margin=2))
    assert len(rows) == 6 and rows.experiments == human
    for at, (middle, chrom) in enumerate([(5050, "chr1"), (100, "chr1"), (9250, "chr2")]):
        for which, one in enumerate(human):
            row = rows[2 * at + which]
            start = middle - 512
            assert (row["chrom"], row["start"], row["end"]) == (chrom, start, start + 1024)
            assert (row["experiment"], row["factor"], row["cell"]) == (one.accession, one.target, one.cell)
            reduce = np.sum if pool == "sum" else np.mean
            # Stored as float16.
            np.testing.assert_allclose(row["label"], expected(one.accession, start, 1024, pool=reduce), rtol=1e-3)
            assert len(row["sequence"]) == 1028
            if start > 2:
                assert row["sequence"] == genome.seq(chrom, start - 2, start + 1026)
    assert rows[3]["sequence"].startswith("N" * 414) and rows[-1]["experiment"] == "SRX2"
    with pytest.raises(IndexError):
        rows[6]


@pytest.mark.parametrize(("target", "first"), [(8, 0), (7, 0), (5, 1), (2, 3), (1, 3)])
def test_centre_crop_of_even_and_odd_lengths(target, first):
    assert centre_crop(np.arange(8), target).tolist() == list(range(first, first + target))
    assert centre_crop(np.arange(7), 7).tolist() == list(range(7)) and centre_crop(np.arange(7), 4)[0] == 1
    assert len(centre_crop(np.arange(8), None)) == 8
    with pytest.raises(DataError):
        centre_crop(np.arange(8), 9)


def test_cropped_labels(folder, annotation, tmp_path):
    genome = make_genome(tmp_path)
    rows = TFBindTrackDataset(folder / "loci.bed", genome, folder, annotation[:1], TrackWindows(1024, 5))
    np.testing.assert_allclose(rows[0]["label"], expected("SRX1", 5050 - 512, 1024)[1:6], rtol=1e-3)


def test_all_experiments_of_a_locus(folder, annotation, tmp_path):
    genome, human = make_genome(tmp_path), annotation[:2]
    single = TFBindTrackDataset(folder / "loci.bed", genome, folder, human, TrackWindows(512))
    several = TFBindTrackDataset(folder / "loci.bed", genome, folder, human, TrackWindows(512), all_experiments=True)
    tracks = TFBindTracksOnly(folder / "loci.bed", genome, folder, human, TrackWindows(512))
    assert len(several) == len(tracks) == 3
    for at in range(3):
        row = several[at]
        assert row["factors"] == ["CTCF", "SPI1"] and row["cells"] == ["K-562", "THP-1"]
        assert np.array_equal(row["label"], np.stack([single[2 * at]["label"], single[2 * at + 1]["label"]]))
        assert np.array_equal(tracks[at]["label"], row["label"].T) and "factors" not in tracks[at]
    tokenizer = NucleotideTokenizer(preset="enformer")
    factor = lambda name: FactorStates(np.ones((len(name), 3), np.float32), np.zeros(len(name), np.int64))  # noqa: E731
    one = BindingCollator(tokenizer, factor)([several[0], several[2]])
    assert one["input_ids"].shape == (2, 512) and one["protein_embeds"].shape == (2, 4, 3)
    assert one["pairs"].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]] and one["labels"].shape == (4, 4)
    only = BindingCollator(tokenizer, None)([tracks[0], tracks[0]])
    assert only["input_ids"].shape == (2, 512) and only["labels"].shape == (2, 4, 2) and "pairs" not in only


def test_tracks_turn_round_with_the_strand(folder, annotation, tmp_path):
    tracks = TFBindTracksOnly(
        folder / "loci.bed", make_genome(tmp_path), folder, annotation[:2], TrackWindows(512, margin=2)
    )
    tokenizer = NucleotideTokenizer(preset="enformer")
    seen = set()
    for seed in range(12):
        batch = BindingCollator(tokenizer, None, training=True, max_shift=0, seed=seed)([tracks[0]])
        plain = BindingCollator(tokenizer, None)([tracks[0]])
        is_reverse = not np.array_equal(batch["input_ids"], plain["input_ids"])
        seen.add(is_reverse)
        assert np.array_equal(batch["labels"], plain["labels"].flip(1) if is_reverse else plain["labels"])
        if is_reverse:
            assert np.array_equal(3 - batch["input_ids"].flip(1), plain["input_ids"])
    assert seen == {True, False}


def test_assemblies_choose_genome_and_experiments(folder, annotation, tmp_path):
    genome = make_genome(tmp_path)
    loci = {"hg38": folder / "loci.bed", "mm10": folder / "loci.bed"}
    rows = TFBindTrackDataset(loci, {"hg38": genome, "mm10": genome}, folder, annotation, TrackWindows(256))
    assert [rows[at]["experiment"] for at in range(len(rows))] == ["SRX1", "SRX2"] * 3 + ["SRX3"] * 3
    with pytest.raises(DataError, match="no experiment of"):
        TFBindTrackDataset({"rn6": folder / "loci.bed"}, {"rn6": genome}, folder, annotation)
    with pytest.raises(DataError, match="same assemblies"):
        TFBindTrackDataset(loci, {"hg38": genome}, folder, annotation)


def test_lengths_that_do_not_fit():
    for options, told in (
        ({"context_length": 1000}, "multiple of `pool_width`"),
        ({"context_length": 1024, "target_length": 9}, r"`target_length` \(9\) must lie in 1..8"),
        ({"target_length": 0}, "`target_length`"),
        ({"pool": "max"}, "`pool`"),
        ({"margin": -1}, "`margin`"),
    ):
        with pytest.raises(DataError, match=told):
            TrackWindows(**options)


def test_files_and_places_that_do_not_fit(folder, annotation, tmp_path):
    genome = make_genome(tmp_path)
    absent = [*annotation, Experiment("SRX9", "hg38", "MAX", "K562")]
    with pytest.raises(DataError, match=r"lacks SRX9.bw \(1 of 4 files\)"):
        TFBindTrackDataset(folder / "loci.bed", genome, folder, absent)
    (tmp_path / "far.bed").write_text("chr1\t90000\t90100\n")
    rows = TFBindTrackDataset(tmp_path / "far.bed", genome, folder, annotation[:1], TrackWindows(256))
    with pytest.raises(DataError, match="chr1:89922-90178"):
        rows[0]
    (tmp_path / "unknown.bed").write_text("chr7\t10\t100\n")
    with pytest.raises(DataError, match="chr7"):
        TFBindTrackDataset(tmp_path / "unknown.bed", genome, folder, annotation[:1])
    (tmp_path / "turned.bed").write_text("chr1\t100\t10\n")
    with pytest.raises(DataError, match="Line 1 of"):
        TFBindTrackDataset(tmp_path / "turned.bed", genome, folder, annotation[:1])
    (tmp_path / "SRX1.bw").write_bytes(b"no bigWig")
    with pytest.raises(DataError, match=r"SRX1\.bw"):
        TFBindTrackDataset(folder / "loci.bed", genome, folder, annotation[:1])


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_import_without_pybigwig(tmp_path, annotation, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyBigWig", None)
    for name in ("bigwig", "binding_tracks"):
        assert runpy.run_module(f"genesplice_hf.data.{name}")["__name__"].endswith(name)
    (tmp_path / "loci.bed").write_text("chr1\t5000\t5100\n")
    (tmp_path / "SRX1.bw").write_bytes(b"x")
    with pytest.raises(ImportError, match=r"pip install genesplice-hf\[tracks\]"):
        TFBindTrackDataset(tmp_path / "loci.bed", make_genome(tmp_path), tmp_path, annotation[:1])
