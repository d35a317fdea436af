"""What is trained on and what is kept out, streamed or in memory, and settings that cannot be."""

from pathlib import Path

import numpy as np
import pytest

from genesplice_hf.errors import DataError
from training.corpus import CorpusSettings, build_corpus, lengths


@pytest.fixture(scope="module")
def genomes(tmp_path_factory) -> str:
    """`toy.fa` with two contigs, and `other.fa` with one, of random bases."""
    folder, rng = tmp_path_factory.mktemp("genomes"), np.random.default_rng(0)
    one, two, three = ("".join(rng.choice(list("ACGT"), length)) for length in (2000, 1000, 900))
    (folder / "toy.fa").write_text(f">one\n{one}\n>two\n{two}\n")
    (folder / "other.fa").write_text(f">three\n{three}\n")
    return str(folder)


def covered(rows) -> set[tuple[str, int]]:
    return {(row["chrom"], i) for row in rows for i in range(row["start"], row["end"])}


@pytest.mark.parametrize(
    ("held_out", "kept_bp"),
    [(["two"], 2000), (["one:501-1000"], 2500), (["one:1-64", "two"], 1936), (["one:501-1000", "one:801-1500"], 2000)],
)
def test_no_held_out_base_is_trained_on(held_out, kept_bp, genomes) -> None:
    corpus = build_corpus(CorpusSettings(genomes, ["toy.fa"], held_out, window_bp=50, step_bp=7))
    train, kept = covered(corpus.train), covered(corpus.held_out["toy"])
    assert not train & kept
    assert kept
    # What `last="drop"` leaves over is less than a window at the end of each stretch.
    assert kept_bp - 4 * 50 < len(train) <= kept_bp
    for row in [*corpus.train, *corpus.held_out["toy"]]:
        assert len(row["sequence"]) == row["end"] - row["start"] == 50


def test_a_region_is_kept_out_of_every_genome_that_has_it(genomes, tmp_path) -> None:
    """The same contig in two files: training on the second copy would be training on the test."""
    for name in ("first.fa", "second.fa"):
        (tmp_path / name).write_text((Path(genomes) / "toy.fa").read_text())
    corpus = build_corpus(CorpusSettings(str(tmp_path), ["first.fa", "second.fa"], ["two"], window_bp=50))
    assert set(corpus.train["chrom"]) == {"one"}
    assert set(corpus.held_out) == {"first", "second"}


def test_a_genome_that_is_wholly_held_out_is_only_measured(genomes) -> None:
    corpus = build_corpus(CorpusSettings(genomes, ["toy.fa", "other.fa"], ["three"], window_bp=50))
    assert set(corpus.train["chrom"]) == {"one", "two"}
    assert {name: {row["chrom"] for row in rows} for name, rows in corpus.held_out.items()} == {"other": {"three"}}


def test_long_regions_are_thinned_to_the_number_asked_for(genomes) -> None:
    corpus = build_corpus(
        CorpusSettings(genomes, ["toy.fa"], ["two"], window_bp=50, step_bp=50, max_heldout_windows=7)
    )
    assert [row["start"] for row in corpus.held_out["toy"]] == list(range(0, 1000, 150))


@pytest.mark.parametrize(
    ("names", "held_out", "advice"),
    [
        (["toy.fa"], ["chrX"], r"`held_out` names \['chrX'\], which no genome in `genomes` has"),
        (["toy.fa"], ["two", "five:1-10"], r"`held_out` names \['five:1-10'\], which no genome"),
        (["toy.fa"], ["one", "two"], r"names every contig of `genomes`; leave some to train on"),
        ([], [], r"`genomes` must name at least one FASTA file"),
        (["absent.fa"], [], r"absent\.fa"),
        (["toy.fa"], ["two:900-1100"], r"1100|two"),
    ],
)
def test_a_corpus_that_cannot_be_is_advice(names, held_out, advice, genomes) -> None:
    with pytest.raises(DataError, match=advice):
        build_corpus(CorpusSettings(genomes, names, held_out, window_bp=50))


@pytest.mark.parametrize("held_out", [["two"], ["one:501-1000", "three"], ["one", "two:1-300"]])
def test_streamed_or_in_memory_the_windows_have_the_same_numbers(held_out, genomes) -> None:
    settings = {
        "window_bp": 50,
        "step_bp": 7,
        "length_curriculum": [{"window_bp": 20, "until_step": 3}, {"window_bp": 90}],
    }
    memory, streamed = (
        build_corpus(CorpusSettings(genomes, ["toy.fa", "other.fa"], held_out, streaming=streaming, **settings))
        for streaming in (False, True)
    )
    assert memory.held_out == streamed.held_out
    assert [len(windows) for windows in memory.by_stage] == [len(windows) for windows in streamed.by_stage]
    for held, read in zip(memory.by_stage, streamed.by_stage, strict=True):
        assert list(held) == [read[number] for number in range(len(read))]
    # The chains are counted on the shortest windows, held-out windows are as long as the last.
    assert len(memory.train) == len(memory.by_stage[0])
    assert {len(row["sequence"]) for rows in memory.held_out.values() for row in rows} == {90}


def test_by_default_windows_start_a_quarter_apart(genomes) -> None:
    corpus = build_corpus(CorpusSettings(genomes, ["other.fa"], window_bp=100))
    assert corpus.train["start"] == list(range(0, 801, 25))
    assert build_corpus(CorpusSettings(genomes, ["other.fa"], window_bp=3)).train["start"] == list(range(898))


@pytest.mark.parametrize(
    ("stages", "advice"),
    [
        ([{"until_step": 3}], r"has `window_bp` and may have"),
        ([{"window_bp": 64, "until_stop": 3}], r"got \{'window_bp': 64, 'until_stop': 3\}"),
        ([{"window_bp": 64, "until_step": 0}], r"`until_step` .* above 0, got 0"),
        ([{"window_bp": 0.5}], r"`window_bp` .* whole number above 0, got 0\.5"),
        (
            [{"window_bp": 64}, {"window_bp": 128, "until_step": 5}],
            r"each larger than the one before, got \[None, 5\]",
        ),
        ([{"window_bp": 64, "until_step": 5}, {"window_bp": 128, "until_step": 5}], r"got \[5, 5\]"),
    ],
)
def test_a_curriculum_that_cannot_be_is_advice(stages, advice) -> None:
    with pytest.raises(DataError, match=advice):
        lengths(CorpusSettings(length_curriculum=stages))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_genome_without_bases_is_advice(streaming, tmp_path) -> None:
    (tmp_path / "empty.fa").write_text(f">a\n{'N' * 300}\n")
    with pytest.raises(DataError, match=r"empty\.fa with at most 10% N|hold more than 10% N"):
        build_corpus(CorpusSettings(str(tmp_path), ["empty.fa"], window_bp=50, streaming=streaming))


def test_a_held_out_region_shorter_than_its_window_is_advice(genomes) -> None:
    with pytest.raises(DataError, match=r"region one:1-40 has 40 bp, less than one held-out window \(50 bp\)"):
        build_corpus(CorpusSettings(genomes, ["toy.fa"], ["one:1-40"], window_bp=50))
    corpus = build_corpus(CorpusSettings(genomes, ["toy.fa"], ["one:1-40"], window_bp=50, heldout_window_bp=20))
    assert [row["start"] for row in corpus.held_out["toy"]] == [0, 20]
