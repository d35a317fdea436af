"""Binding tasks against what can be counted by hand, and a run from settings to metrics."""

import gzip
import json

import numpy as np
import pytest
from interruptions import PowerCut, StopAt

from genesplice_hf.errors import DataError
from genesplice_hf.genome.alphabet import reverse_complement
from training import binding, binding_data
from training.binding_data import (
    Motif,
    PeakSet,
    PlantedOptions,
    best_site_scores,
    clusters,
    core,
    describe,
    draw_site,
    information,
    peak_set_task,
    planted_task,
    read_motifs,
    read_peak_set,
    similarity,
)
from training.settings import parse_settings

CONFIGS = "training/configs"
TINY = {
    "dna_config": {
        "model_type": "genesplice_enformer",
        "dim": 24,
        "depth": 1,
        "heads": 2,
        "attn_dim_key": 4,
        "num_downsamples": 3,
        "dim_divisible_by": 2,
        "target_length": -1,
        "output_heads": {"human": 1},
        "dropout_rate": 0.0,
    },
    "model_options": {
        "hidden_dim": 16, "attn_heads": 2, "attn_dim_head": 8, "ff_mult": 1, "latent_heads": 8, "latent_dim": 8,
    },
}  # fmt: skip


def matrix(consensus, strength=0.97):
    rows = np.full((len(consensus), 4), (1 - strength) / 3)
    rows[np.arange(len(consensus)), ["ACGT".index(letter) for letter in consensus]] = strength
    return rows


def random_sequences(count, seed, motif=""):
    rng = np.random.default_rng(seed)
    sequences = ["".join(rng.choice(list("ACGT"), 40 - len(motif))) for _ in range(count)]
    return [sequence[:9] + motif + sequence[9:] for sequence in sequences]


@pytest.fixture
def peak_sets():
    chroms = [f"chr{1 + at % 4}" for at in range(40)]
    one, two = random_sequences(40, 1, "GGGGCCCC"), random_sequences(40, 2)
    one[3] = two[5]
    one[7] = one[6]
    return [PeakSet("A", one, chroms), PeakSet("B", two, chroms)]


def test_peaks_are_split_by_chromosome_and_shared_sequences_go(peak_sets):
    task = peak_set_task(peak_sets, ["3"], ["chr4"], residues=2, width=5)
    rows = {"train": task.train, "dev": task.dev, "test": task.test["test"]}
    homes = {}
    for one in peak_sets:
        for sequence, chrom in zip(one.sequences, one.chroms, strict=True):
            homes.setdefault(sequence, chrom)
    for name, wanted in (("train", {"chr1", "chr2"}), ("dev", {"chr3"}), ("test", {"chr4"})):
        assert {homes[row["sequence"]] for row in rows[name]} == wanted
    sequences = [row["sequence"] for part in rows.values() for row in part]
    assert len(sequences) == len(set(sequences)) == 77 and peak_sets[0].sequences[3] not in sequences
    assert (
        task.report["removed"] == {"in several sets": 2, "repeated": 1}
        and task.report["sequences_in_several_sets"] == 1
    )
    for part in rows.values():
        for row in part:
            assert row["factors"] == ["A", "B"] and row["label"].sum() == 1
            assert (row["sequence"] in peak_sets[0].sequences) == bool(row["label"][0])
    assert task.classes[0].labels.tolist() == [int(row["label"][0]) for row in rows["train"]]
    assert task.factors["A"].states.shape == (2, 5) and not np.array_equal(
        *(one.states for one in task.factors.values())
    )
    assert len(peak_set_task(peak_sets, [3], [4], max_rows=10).train) == 10


def test_peak_tasks_that_cannot_be(peak_sets, tmp_path):
    for sets, dev, test, told in (
        (peak_sets[:1], ["3"], ["4"], "at least two"),
        (peak_sets, ["3"], ["chr3"], "share"),
        (peak_sets, ["3"], ["9"], "'test' is empty"),
    ):
        with pytest.raises(DataError, match=told):
            peak_set_task(sets, dev, test)
    (tmp_path / "x.fa").write_text(">peak1\nACGT\n")
    with pytest.raises(DataError, match="chrom:start-end"):
        read_peak_set("A", tmp_path / "x.fa")


def test_motifs_are_read_and_scored(tmp_path):
    path = tmp_path / "m.pfm.gz"
    path.write_bytes(gzip.compress(b"# head\n>MA1_MA1.1.Arnt\n4 16 0 0\n0.0\t0.0\t20.0\t0.0\n>plain\n1 1 1 1\n"))
    motifs = read_motifs(path)
    assert [motif.factor for motif in motifs] == ["MA1.1.Arnt", "plain"]
    np.testing.assert_allclose(motifs[0].probabilities[0], np.array([4.5, 16.5, 0.5, 0.5]) / 22)
    assert information(motifs[1].probabilities) == pytest.approx([0])
    for text, told in (
        (">a\n1 2 3\n", "line 2: four numbers"),
        ("1 2 3 4\n", "header"),
        (">a\nx y z w\n", "line 2"),
        ("#\n", "no matrix"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=told):
            read_motifs(path)


def test_cores_similarity_and_clusters():
    wide = np.vstack([np.full((3, 4), 0.25), matrix("ACGTTGCA"), np.full((2, 4), 0.25)])
    np.testing.assert_array_equal(core(wide, 8), matrix("ACGTTGCA"))
    assert core(matrix("ACG"), 8).shape == (8, 4) and (core(matrix("ACG"), 8)[3:] == 0.25).all()
    one, other = matrix("AACCGGTA"), matrix("TTTTTCAG")
    turned = matrix(reverse_complement("AACCGGTA"))
    shifted = matrix("GAACCGGT")
    assert similarity(one, one) == similarity(one, turned) == pytest.approx(1)
    assert similarity(one, shifted) == similarity(shifted, one) == pytest.approx(1)
    assert similarity(one, other) < 0.6
    found = clusters([one, other, turned, shifted], 0.9)
    assert found[0] == found[2] == found[3] != found[1]


def test_descriptions_hold_both_strands():
    rng = np.random.default_rng(0)
    one = describe(Motif("x", matrix("AACCGGTA")), 8, 0.0, rng).states
    turned = describe(Motif("x", matrix("TACCGGTT")), 8, 0.0, rng).states
    np.testing.assert_allclose(one, turned[::-1], atol=1e-6)
    assert one.shape == (2, 32) and (one**2).mean() == pytest.approx(1)
    noisy = np.stack([describe(Motif("x", matrix("AACCGGTA")), 8, 0.5, rng).states for _ in range(200)])
    assert np.sqrt(((noisy - one) ** 2).mean()) == pytest.approx(0.5, rel=0.05)


def test_sites_follow_the_matrix():
    rng = np.random.default_rng(0)
    assert {draw_site(matrix("AACCGGGG", 1 - 1e-12), rng) for _ in range(50)} == {"AACCGGGG", "CCCCGGTT"}
    probabilities = np.tile([[0.1, 0.2, 0.3, 0.4]], (4000, 1))
    site = draw_site(probabilities, rng)
    # A random strand: C and G, A and T change places.
    counts = sorted(site.count(letter) / 4000 for letter in "ACGT")
    np.testing.assert_allclose(counts, [0.1, 0.2, 0.3, 0.4], atol=0.03)


@pytest.fixture
def motifs():
    rng = np.random.default_rng(5)
    consensus = ["".join(rng.choice(list("ACGT"), 9)) for _ in range(20)]
    return [Motif(f"F{at}", matrix(word)) for at, word in enumerate([*consensus, consensus[0], consensus[1]])]


def test_planted_windows_hold_a_site_and_ask_for_others(motifs):
    options = PlantedOptions(window_bp=30, windows=10, negatives=2, held_out=0.3)
    task = planted_task(motifs, options)
    held_out = set(task.report["held_out_factors"])
    assert 2 <= len(held_out) <= 6 and task.report["motifs"] == 22
    for twin in (("F0", "F20"), ("F1", "F21")):
        assert len(held_out & set(twin)) != 1
    named = {motif.factor: motif for motif in motifs}
    for part, rows in (("train", task.train), ("held-out factors", task.test["held-out factors"])):
        asked = {factor for row in rows for factor in row["factors"]}
        assert asked <= (held_out if part != "train" else set(named) - held_out)
        assert all(len(row["sequence"]) == 30 and row["label"].tolist() == [1, 0, 0] for row in rows)
        scores = best_site_scores(rows, named).reshape(-1, 3)
        assert (scores[:, 0] > scores[:, 1:].max(axis=1)).mean() > 0.95
    again = planted_task(motifs, options)
    assert [row["sequence"] for row in again.train] == [row["sequence"] for row in task.train]
    with pytest.raises(DataError, match="too few"):
        planted_task(motifs[:2], options)


def write_task(folder, peak_sets):
    for one in peak_sets:
        records = [
            f">{chrom}:{at}-{at + 40}\n{seq}\n"
            for at, (seq, chrom) in enumerate(zip(one.sequences, one.chroms, strict=True))
        ]
        (folder / f"{one.factor}.fa").write_text("".join(records))


def words_of_a_run(folder, output_dir, dna_config=TINY["dna_config"]):
    return [
        "--config", f"{CONFIGS}/tfbind_ctcf_pu1.yaml", "--data_dir", str(folder),
        "--peak_fastas", json.dumps({"A": "A.fa", "B": "B.fa"}), "--dev_chromosomes", "3", "--test_chromosomes", "4",
        "--dna_config", json.dumps(dna_config), "--model_options", json.dumps(TINY["model_options"]),
        "--output_dir", str(output_dir), "--batch_size", "8", "--epochs", "12", "--learning_rate", "3e-3",
    ]  # fmt: skip


def test_a_run_from_settings_to_metrics(tmp_path, peak_sets, capsys):
    write_task(tmp_path, peak_sets)
    words = words_of_a_run(tmp_path, tmp_path / "run")
    report = binding.main(words)
    assert set(report["results"]) == {"test", "test, mean of factors", "test, A or B", "test, factors exchanged"}
    # The planted word makes the two sets easy to tell apart; other vectors turn the answer round.
    assert report["results"]["test"]["auroc"]["mean"] > 0.75
    assert report["results"]["test, factors exchanged"]["auroc"]["mean"] < 0.25
    assert "5-mer logistic regression" in report["baselines"] and "TFBind, test" in capsys.readouterr().out
    stored = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert stored["task"]["windows"]["test"] == {"A": 8, "B": 10} and stored["task"]["windows"]["dev"] == {
        "A": 10,
        "B": 10,
    }
    assert np.load(tmp_path / "run" / "seed-0" / "test_scores.npy").shape == (2 * 18,)
    assert stored["per_seed"][0]["final_loss"] < 0.69
    with pytest.raises(DataError, match="already holds a run"):
        binding.main(words)


def test_a_resumed_run_is_an_uninterrupted_one(tmp_path, peak_sets):
    """The first of two seeds is finished, the second cut in its second pass, with dropout and random strands."""
    write_task(tmp_path, peak_sets)
    changed = ["--epochs", "2", "--evaluations_per_epoch", "2", "--seeds", "0", "1", "--run_baselines", "false"]
    random = TINY["dna_config"] | {"dropout_rate": 0.3}
    strands = ["--augment_reverse_complement", "true"]
    whole = binding.main([*words_of_a_run(tmp_path, tmp_path / "whole", random), *changed, *strands])
    steps = whole["per_seed"][0]["steps"]
    cut = [*words_of_a_run(tmp_path, tmp_path / "cut", random), *changed, *strands]
    first = [*cut, "--seeds", "0"]
    binding.main(first)
    settings, train = parse_settings(binding.SETTINGS, [*cut, "--resume", "true"])
    with pytest.raises(PowerCut):
        binding.train_binding(settings, train, callbacks=[StopAt(steps - 1)])
    written = (tmp_path / "cut/seed-0/test_scores.npy").stat().st_mtime_ns
    resumed = binding.main([*cut, "--resume", "true"])
    assert (tmp_path / "cut/seed-0/test_scores.npy").stat().st_mtime_ns == written
    assert [run["test"] for run in resumed["per_seed"]] == [run["test"] for run in whole["per_seed"]]
    assert [run["final_loss"] for run in resumed["per_seed"]] == [run["final_loss"] for run in whole["per_seed"]]
    for seed in (0, 1):
        scores = [np.load(tmp_path / run / f"seed-{seed}/test_scores.npy") for run in ("whole", "cut")]
        np.testing.assert_array_equal(*scores)
    with pytest.raises(DataError, match="learning_rate was"):
        binding.main([*cut, "--resume", "true", "--learning_rate", "1"])


def test_planted_runs_measure_held_out_factors(tmp_path, motifs):
    (tmp_path / "m.pfm").write_text(
        "".join(
            f">{motif.factor}\n"
            + "".join(" ".join(f"{100 * value:.3f}" for value in row) + "\n" for row in motif.probabilities)
            for motif in motifs
        )
    )
    settings, train = parse_settings(
        binding.SETTINGS,
        [
            "--config", f"{CONFIGS}/tfbind_jaspar.yaml", "--data_dir", str(tmp_path), "--motifs", "m.pfm",
            "--planted", json.dumps({"windows": 10, "window_bp": 32, "held_out": 0.3}),
            "--dna_config", json.dumps(TINY["dna_config"]), "--model_options", json.dumps(TINY["model_options"]),
            "--output_dir", str(tmp_path / "run"), "--epochs", "1", "--batch_size", "32",
        ],
    )  # fmt: skip
    report = binding.train_binding(settings, train)
    assert {"known factors", "held-out factors"} <= set(report["results"])
    assert report["baselines"]["best site of the matrix, held-out factors"]["auroc"] > 0.95
    assert set(report["task"]["held_out_factors"]) <= {motif.factor for motif in motifs}


def test_settings_that_cannot_be(tmp_path):
    for words, told in (
        (["--task", "planted_motifs"], "`motifs` must name"),
        (["--task", "planted_motifs", "--motifs", "m.pfm", "--planted", '{"noize": 1}'], "`planted` may hold"),
        (["--peak_fastas", "{}"], "at least two"),
    ):
        (tmp_path / "m.pfm").write_text(">a\n1 2 3 4\n")
        settings, train = parse_settings(binding.SETTINGS, [*words, "--data_dir", str(tmp_path)])
        with pytest.raises(DataError, match=told):
            binding.train_binding(settings, train)


def test_configs_can_be_read():
    for name in ("tfbind_ctcf_pu1", "tfbind_jaspar"):
        settings, train = parse_settings(binding.SETTINGS, ["--config", f"{CONFIGS}/{name}.yaml"])
        assert settings.task in ("peak_sets", "planted_motifs") and train.best_metric == "auroc"
        assert binding_data.PlantedOptions(**settings.planted)
