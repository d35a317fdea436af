"""The context-length experiment: same bases, same questions, and a page that says what was measured."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from genesplice_hf.errors import DataError
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer
from training.corpus import build_corpus
from training.experiments import context_length
from training.experiments.blocks import ask, cut_blocks, markov_losses, measure, write_blocks
from training.experiments.context_length import ContextSettings, compare_contexts, main, pretrain_settings
from training.experiments.context_length_card import card_text, paired_difference
from training.pretrain import lengths
from training.settings import parse_settings

CONFIG = Path(__file__).resolve().parents[2] / "training" / "configs" / "context_length.yaml"
TINY = {
    "model_type": "genesplice",
    "hidden_sizes": [8, 8],
    "pool_sizes": [4],
    "num_attention_heads": [1, 1],
    "head_dims": [8, 8],
    "intermediate_sizes": [8, 8],
    "num_encoder_layers": [1],
    "num_tower_layers": 1,
    "num_decoder_layers": [1],
    "local_windows": [4],
}


@pytest.fixture(scope="module")
def genomes(tmp_path_factory) -> str:
    """`a.fa`: 1,000 random bases, some N, and a contig of 300; `b.fa`: a contig that is held out whole."""
    folder, rng = tmp_path_factory.mktemp("genomes"), np.random.default_rng(0)

    def random_bases(length: int) -> str:
        return "".join(rng.choice(list("ACGT"), length))

    long = random_bases(1000)
    (folder / "a.fa").write_text(f">one\n{long[:200]}N{long[201:]}\n>two\n{random_bases(300)}\n")
    (folder / "b.fa").write_text(f">three\n{random_bases(150)}\n")
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer() -> NucleotideTokenizer:
    return NucleotideTokenizer(preset="genesplice")


@pytest.fixture(scope="module")
def blocks(genomes):
    return cut_blocks(genomes, ["a.fa", "b.fa"], ["three", "one:601-800"], 64)


def settings_of(genomes: str, folder: Path, **changes) -> ContextSettings:
    fields = {
        "data_dir": genomes,
        "genomes": ["a.fa", "b.fa"],
        "held_out": ["three", "one:601-800"],
        "contexts": [16, 64],
        "seeds": [0, 1],
        "passes": 0.5,
        "blocks_per_step": 2,
        "model_config": TINY,
        "warmup_steps": 1,
        "save_steps": 2,
        "precision": "fp32",
        "output_dir": str(folder / "runs"),
        "cards_dir": str(folder / "cards"),
    }
    return ContextSettings(**(fields | changes))


class Reader(nn.Module):
    """A language model by rule: its logits are a function of the ids of a window."""

    def __init__(self, rule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.rule(input_ids))


def test_blocks_are_whole_apart_and_without_n(blocks) -> None:
    train, held_out = blocks
    assert {len(block.sequence) for block in [*train, *held_out]} == {64}
    assert not any("N" in block.sequence for block in [*train, *held_out])
    # one: 0-600 in 9 blocks, of which 192-256 holds the N, and 800-1000 in 3; two: 4.
    assert [sum(f"|{chrom}:" in block.name for block in train) for chrom in ("one", "two", "three")] == [11, 4, 0]
    assert sorted(block.name for block in held_out) == [
        "a|one:600-664", "a|one:664-728", "a|one:728-792", "b|three:0-64", "b|three:64-128",
    ]  # fmt: skip
    assert len({block.name for block in [*train, *held_out]}) == len(train) + len(held_out)


@pytest.mark.parametrize(
    ("held_out", "block_bp", "message"),
    [
        (["four"], 64, r"`held_out` names \['four'\]"),
        (["three"], 2000, "no block of 2000 bp to train on"),
        (["one:1-32"], 64, "no block of 64 bp held out"),
        (["one", "two", "three"], 64, "no block of 64 bp to train on"),
    ],
)
def test_blocks_that_cannot_be_cut_are_named(held_out, block_bp, message, genomes) -> None:
    with pytest.raises(DataError, match=message):
        cut_blocks(genomes, ["a.fa", "b.fa"], held_out, block_bp)


def test_every_context_sees_the_same_bases_as_often(genomes, blocks, tmp_path) -> None:
    settings, train = settings_of(genomes, tmp_path), blocks[0]
    write_blocks(tmp_path / "runs" / "blocks" / context_length.TRAIN_FILE, train)
    per_step, seen = set(), []
    for context in settings.contexts:
        corpus_settings, _, how = pretrain_settings(settings, context, 0, len(train), tmp_path)
        windows = build_corpus(corpus_settings).train
        seen.append(sorted((row["chrom"], i) for row in windows for i in range(row["start"], row["end"])))
        assert lengths(corpus_settings)[0].window_bp == context
        per_step.add((how.batch_bp * how.gradient_accumulation, how.max_steps))
    assert seen[0] == seen[1] == sorted((block.name, i) for block in train for i in range(64))
    assert per_step == {(2 * 64, round(0.5 * 15 / 2))}


@pytest.mark.parametrize("share", [0.3, None], ids=["masked", "causal"])
def test_a_model_without_context_scores_the_same_at_every_context(share, blocks, tokenizer) -> None:
    questions = ask(blocks[1], tokenizer, share, shortest_bp=16)
    table = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    model = Reader(lambda ids: table[ids])
    found = [measure(model, tokenizer, questions, context, share is None) for context in (16, 32, 64)]
    assert found[0] == found[1] == found[2]
    assert set(found[0]) == {"all", "a", "b"}
    assert found[0]["all"]["bases"] == sum(len(question.base) for question in questions)


def test_masked_bases_are_hidden_and_asked_for_by_their_truth(blocks, tokenizer) -> None:
    for question in ask(blocks[1], tokenizer, 0.4, shortest_bp=16):
        assert "".join("ACGT"[base] for base in question.base) == "".join(
            question.block.sequence[i] for i in question.position
        )
        assert 0.2 < len(question.base) / 64 < 0.6
        asked = torch.zeros(64, dtype=torch.bool)
        asked[torch.from_numpy(question.position)] = True
        truth = tokenizer([question.block.sequence], return_tensors="pt")["input_ids"][0]
        assert torch.equal(question.ids[~asked], truth[~asked])
        assert (question.ids == tokenizer.mask_token_id).sum() > 0.5 * asked.sum()


def test_causal_models_are_asked_for_the_base_after_the_one_they_read(blocks, tokenizer) -> None:
    """A reader that is told the next base is right everywhere, at every context; one that repeats the last is not."""
    questions = ask(blocks[1], tokenizer, None, shortest_bp=16)
    assert all(len(question.position) == 64 - 4 and 0 not in question.position % 16 for question in questions)
    clairvoyant = Reader(lambda ids: 50.0 * nn.functional.one_hot(ids.roll(-1, dims=1), 16))
    repeating = Reader(lambda ids: 50.0 * nn.functional.one_hot(ids, 16))
    for context in (16, 64):
        assert measure(clairvoyant, tokenizer, questions, context, True)["all"]["accuracy"] == 1
        assert measure(repeating, tokenizer, questions, context, True)["all"]["accuracy"] < 0.6


def test_windows_do_not_see_each_other(blocks, tokenizer) -> None:
    questions = ask(blocks[1], tokenizer, 0.3, shortest_bp=16)
    seen = []
    model = Reader(lambda ids: seen.append(tuple(ids.shape)) or torch.zeros(*ids.shape, 16))
    found = measure(model, tokenizer, questions, 16, False)
    assert set(seen) == {(4, 16)}
    assert found["all"]["loss"] == pytest.approx(np.log(4))


def test_markov_chains_answer_the_same_questions(blocks, tokenizer) -> None:
    train, held_out = blocks
    questions = ask(held_out, tokenizer, 0.3, shortest_bp=16)
    found = markov_losses(train, questions)
    letters = "".join(block.sequence for block in train)
    strands = letters + letters.translate(str.maketrans("ACGT", "TGCA"))
    share = np.array([strands.count(base) + 1 for base in "ACGT"]) / (len(strands) + 4)
    base = np.concatenate([question.base for question in questions])
    assert found["markov-0"]["all"]["loss"] == pytest.approx(-np.log(share)[base].mean())
    assert found["markov-0"]["all"]["bases"] == len(base)


@pytest.fixture(scope="module")
def finished(genomes, tmp_path_factory) -> tuple[ContextSettings, dict]:
    settings = settings_of(genomes, tmp_path_factory.mktemp("experiment"))
    return settings, compare_contexts(settings)


def test_a_finished_experiment_holds_every_run(finished) -> None:
    settings, report = finished
    assert json.loads((Path(settings.output_dir) / "metrics.json").read_text())["runs"] == report["runs"]
    assert [(run["context_bp"], run["seed"]) for run in report["runs"]] == [(16, 0), (64, 0), (16, 1), (64, 1)]
    for name in ("parameters", "steps", "bases_seen"):
        assert len({run[name] for run in report["runs"]}) == 1
    assert report["runs"][0]["bases_seen"] == 4 * 2 * 64
    assert len({run[at]["all"]["bases"] for run in report["runs"] for at in ("own", "longest")}) == 1
    long = next(run for run in report["runs"] if run["context_bp"] == 64)
    assert long["own"] == long["longest"]
    for context in settings.contexts:
        losses = [run["own"]["all"]["loss"] for run in report["runs"] if run["context_bp"] == context]
        summary = report["results"][context]["own"]["all"]["loss"]
        assert summary == {"mean": pytest.approx(np.mean(losses)), "sd": pytest.approx(np.std(losses, ddof=1)), "n": 2}
        assert np.isfinite(losses).all() and losses[0] != losses[1]


def test_the_page_holds_the_measured_numbers_and_no_local_folder(finished) -> None:
    settings, report = finished
    folder = Path(settings.cards_dir)
    page = (folder / "context_length.md").read_text()
    stored = json.loads((folder / "context_length.json").read_text())
    for context in settings.contexts:
        assert f"{report['results'][context]['own']['all']['loss']['mean']:.4f}" in page
    for values in report["baselines"].values():
        assert f"{values['all']['loss']:.4f}" in page
    assert "What it cannot show" in page and f"{report['runs'][0]['parameters']:,} parameters" in page
    # The numbers alone make the page, also when they come back from the file.
    assert card_text(stored) == page
    assert settings.data_dir not in json.dumps(stored) + page
    assert (folder / "context_length.png").stat().st_size > 1000


def test_finished_runs_are_not_repeated_and_new_seeds_join(finished, monkeypatch) -> None:
    settings, report = finished
    started = []
    trained = context_length.pretrain
    monkeypatch.setattr(context_length, "pretrain", lambda *parts: started.append(parts[2].seed) or trained(*parts))
    assert compare_contexts(settings)["runs"] == report["runs"] and started == []
    more = compare_contexts(ContextSettings(**(vars(settings) | {"contexts": [64, 16], "seeds": [0, 1, 2]})))
    assert started == [2, 2] and len(more["runs"]) == 6
    with pytest.raises(DataError, match="learning_rate"):
        compare_contexts(ContextSettings(**(vars(settings) | {"learning_rate": 1.0})))


def test_a_run_that_was_cut_off_goes_on(genomes, finished, tmp_path, monkeypatch) -> None:
    """Killed after its checkpoint, before its result: the second attempt ends where an uninterrupted run does."""
    settings = settings_of(genomes, tmp_path, contexts=[64], seeds=[0])
    trained, resumed = context_length.pretrain, []

    def cut_off(corpus, language, how):
        trained(corpus, language, type(how)(**(vars(how) | {"save_steps": 2})))
        raise KeyboardInterrupt

    monkeypatch.setattr(context_length, "pretrain", cut_off)
    with pytest.raises(KeyboardInterrupt):
        compare_contexts(settings)
    monkeypatch.setattr(context_length, "pretrain", lambda *parts: resumed.append(parts[2].resume) or trained(*parts))
    (run,) = compare_contexts(settings)["runs"]
    whole = next(row for row in finished[1]["runs"] if (row["context_bp"], row["seed"]) == (64, 0))
    assert resumed == [True] and run["own"] == whole["own"]


def test_the_causal_objective_runs_too(genomes, tmp_path) -> None:
    settings = settings_of(
        genomes, tmp_path, objective="causal", model_config=TINY | {"is_decoder": True}, contexts=[16, 64], seeds=[0]
    )
    report = compare_contexts(settings)
    assert report["data"]["asked_bases"] == 5 * (64 - 4)
    assert "one seed cannot tell" in (Path(settings.cards_dir) / "context_length.md").read_text()


def test_paired_interval_equals_that_of_scipy() -> None:
    rng = np.random.default_rng(1)
    losses = rng.normal(1.3, 0.01, (2, 5))
    runs = [
        {"context_bp": context, "seed": seed, "own": {"all": {"loss": losses[row, seed]}}}
        for row, context in enumerate((512, 4096))
        for seed in range(5)
    ]
    found = paired_difference(runs, 4096, 512, "own")
    expected = stats.ttest_rel(losses[1], losses[0]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx((losses[1] - losses[0]).mean()) and found.n == 5


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ((0.0, 0.1, -0.1), "show no difference"),
        ((-0.1, -0.11, -0.12), "a lower loss"),
        ((0.1, 0.11, 0.12), "a higher loss"),
    ],
)
def test_the_verdict_follows_the_interval(losses, verdict) -> None:
    runs = [
        {"context_bp": context, "seed": seed, "own": {"all": {"loss": 1.3 + (loss if context == 64 else 0.0)}}}
        for seed, loss in enumerate(losses)
        for context in (16, 64)
    ]
    assert verdict in paired_difference(runs, 64, 16, "own").verdict


@pytest.mark.parametrize(
    "changes", [{"contexts": []}, {"contexts": [48, 64]}, {"contexts": [16, 16, 64]}, {"seeds": []}, {"seeds": [1, 1]}]
)
def test_settings_that_cannot_be_compared_are_named(changes) -> None:
    with pytest.raises(DataError, match="`contexts`"):
        ContextSettings(**changes)


def test_the_config_of_the_experiment_is_read() -> None:
    (settings,) = parse_settings((ContextSettings,), ["--config", str(CONFIG)])
    assert settings.contexts == [512, 4096, 32768, 131072] and len(settings.seeds) >= 3
    assert all(context % 128 == 0 for context in settings.contexts)


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(DataError, match="context_bp"):
        main(["--context_bp", "5"])
