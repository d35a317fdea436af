"""Pretraining from end to end on a small invented genome: files, learning, hold-out, resume after a kill."""

import json
import os
import signal
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, TrainerCallback

from genesplice_hf.errors import DataError
from training.checkpoints import last_complete_checkpoint
from training.heldout import measure_heldout
from training.pretrain import CorpusSettings, LanguageModelSettings, build_corpus, main

# A repeat, so that a few steps are enough to learn something that counting single bases cannot.
UNIT = "ACCGTTAGCATGGA"
TINY = {
    "model_type": "genesplice",
    "hidden_sizes": [16],
    "pool_sizes": [],
    "num_attention_heads": [2],
    "head_dims": [8],
    "intermediate_sizes": [24],
    "num_encoder_layers": [],
    "num_tower_layers": 2,
    "num_decoder_layers": [],
    "local_windows": [],
    "tower_window": 8,
    "hidden_dropout": 0.1,
}


@pytest.fixture(scope="module")
def genomes(tmp_path_factory) -> str:
    """`toy.fa` with two contigs of a noisy repeat, and `other.fa` with one of random bases."""
    folder, rng = tmp_path_factory.mktemp("genomes"), np.random.default_rng(0)

    def noisy(length: int, noise: float) -> str:
        bases = np.array(list((UNIT * length)[:length]))
        changed = rng.random(length) < noise
        bases[changed] = rng.choice(list("ACGT"), changed.sum())
        return "".join(bases)

    (folder / "toy.fa").write_text(f">one\n{noisy(2000, 0.05)}\n>two\n{noisy(1000, 0.05)}\n")
    (folder / "other.fa").write_text(f">three\n{noisy(900, 1.0)}\n")
    return str(folder)


def run(folder: Path, genomes: str, *options: str, callbacks=()) -> dict:
    arguments = ["--data_dir", genomes, "--genomes", "toy.fa", "--held_out", "two", "--output_dir", str(folder)]
    arguments += ["--window_bp", "64", "--step_bp", "16", "--batch_size", "16", "--max_steps", "20"]
    arguments += ["--warmup_steps", "2", "--save_steps", "5", "--learning_rate", "1e-2"]
    arguments += [f"--model_config={json.dumps(TINY | ({'is_decoder': True} if 'causal' in options else {}))}"]
    return main([*arguments, *options], callbacks=callbacks)


@pytest.mark.parametrize(
    ("objective", "auto_class"), [("masked", AutoModelForMaskedLM), ("causal", AutoModelForCausalLM)]
)
def test_a_run_leaves_a_model_and_its_measurements(objective, auto_class, genomes, tmp_path) -> None:
    report = run(tmp_path, genomes, "--objective", objective, "--max_steps", "80", "--rc_probability", "0")
    on_disk = json.loads((tmp_path / "metrics.json").read_text())
    assert on_disk["held_out"] == report["held_out"]
    assert set(report["held_out"]["toy"]) == {"model", "markov-0", "markov-3", "markov-5", "markov-8"}
    losses = {name: row["loss"] for name, row in report["held_out"]["toy"].items()}
    assert losses["model"] < losses["markov-0"]
    assert losses["markov-3"] < losses["markov-0"]
    assert report["training"]["bases_seen"] == 80 * 16 * 64
    assert report["training"]["train_windows"] == len(range(0, 2000 - 64 + 1, 16))
    assert (tmp_path / "learning_curve.png").stat().st_size > 1000
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    model, tokenizer = (cls.from_pretrained(tmp_path / "model") for cls in (auto_class, AutoTokenizer))
    logits = model(**tokenizer(["ACGT"], return_tensors="pt")).logits
    assert logits.shape == (1, 4, 16) and torch.isfinite(logits).all()


def test_the_measured_model_is_the_saved_one(genomes, tmp_path) -> None:
    """Weights are rounded to bfloat16 before they are measured, in float32: the published file scores the same."""
    report = run(tmp_path, genomes)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", dtype=torch.float32, attn_implementation="sdpa")
    corpus = build_corpus(CorpusSettings(genomes, ["toy.fa"], ["two"], window_bp=64, step_bp=16))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    again = measure_heldout(model, tokenizer, corpus, LanguageModelSettings(), seed=0)
    assert again["toy"]["model"] == pytest.approx(report["held_out"]["toy"]["model"], rel=1e-6)


class KillAt(TrainerCallback):
    """The power fails at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("objective", ["masked", "causal"])
def test_resume_after_a_kill_equals_the_uninterrupted_run(objective, genomes, tmp_path) -> None:
    """122 windows are 8 steps of 16: the kill falls into the second epoch, two steps after a checkpoint."""
    options = ["--objective", objective]
    whole = run(tmp_path / "whole", genomes, *options)
    cut = (tmp_path / "cut", genomes, *options)
    child = get_context("fork").Process(target=run, args=cut, kwargs={"callbacks": [KillAt(12)]})
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "cut" / "metrics.json").exists()
    torn = tmp_path / "cut" / "checkpoint-12"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_st')
    assert last_complete_checkpoint(tmp_path / "cut") == str(tmp_path / "cut" / "checkpoint-10")
    resumed = run(*cut, "--resume", "true")
    assert resumed["held_out"] == whole["held_out"]
    assert resumed["training"]["steps"] == whole["training"]["steps"] == 20
    losses, weights = [], []
    for name in ("whole", "cut"):
        state = json.loads((tmp_path / name / "checkpoint-20" / "trainer_state.json").read_text())
        losses.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
        weights.append(load_file(tmp_path / name / "checkpoint-20" / "model.safetensors"))
    assert losses[0] == losses[1] and len(losses[0]) == 20
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(tmp_path) -> None:
    assert last_complete_checkpoint(tmp_path) is None


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
