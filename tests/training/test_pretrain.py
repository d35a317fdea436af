"""Pretraining from end to end on a small invented genome: files, learning, hold-out, resume after a kill."""

import json
import os
import shutil
import signal
import socket
from multiprocessing import get_context, set_start_method
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from interruptions import KillAt
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, TrainerCallback

from genesplice_hf.errors import DataError, GeneSpliceError
from genesplice_hf.objectives.schedules import build_scheduler
from training.batches import Forwards
from training.checkpoints import last_complete_checkpoint
from training.command import end_process_group
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


def arguments_of(folder: Path, genomes: str) -> list[str]:
    arguments = ["--data_dir", genomes, "--genomes", "toy.fa", "--held_out", "two", "--output_dir", str(folder)]
    arguments += ["--window_bp", "64", "--step_bp", "16", "--batch_size", "16", "--max_steps", "20"]
    # fp32 on every machine, and no long chains where they are not what is tested.
    arguments += [
        "--precision",
        "fp32",
        "--max_markov_order",
        "3",
        "--warmup_steps",
        "2",
        "--save_steps",
        "5",
        "--learning_rate",
        "1e-2",
    ]
    return arguments


def run(folder: Path, genomes: str, *options: str, callbacks=()) -> dict:
    config = json.dumps(TINY | ({"is_decoder": True} if "causal" in options else {}))
    return main([*arguments_of(folder, genomes), f"--model_config={config}", *options], callbacks=callbacks)


@pytest.mark.parametrize(
    ("objective", "auto_class"), [("masked", AutoModelForMaskedLM), ("causal", AutoModelForCausalLM)]
)
def test_a_run_leaves_a_model_and_its_measurements(objective, auto_class, genomes, tmp_path) -> None:
    report = run(
        tmp_path,
        genomes,
        "--objective",
        objective,
        "--max_steps",
        "80",
        "--rc_probability",
        "0",
        "--max_markov_order",
        "11",
    )
    on_disk = json.loads((tmp_path / "metrics.json").read_text())
    assert on_disk["held_out"] == report["held_out"]
    assert set(report["held_out"]["toy"]) == {"model", *(f"markov-{order}" for order in range(12))}
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
    again = measure_heldout(model, tokenizer, corpus, LanguageModelSettings(), seed=0, orders=())
    assert set(again["toy"]) == {"model"}
    assert again["toy"]["model"] == pytest.approx(report["held_out"]["toy"]["model"], rel=1e-6)


STAGES = [{"window_bp": 32, "until_step": 11, "batch_size": 32}, {"window_bp": 128, "step_bp": 16, "batch_size": 8}]


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint-20" / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "options",
    [
        ["--objective", "masked"],
        ["--objective", "causal", "--streaming", "true", "--dataloader_workers", "1"],
        ["--streaming", "true", "--length_curriculum", *map(json.dumps, STAGES), "--gradient_accumulation", "2"],
    ],
    ids=["masked", "causal-streamed", "curriculum-streamed"],
)
def test_resume_after_a_kill_equals_the_uninterrupted_run(options, genomes, tmp_path) -> None:
    """122 windows are 8 steps of 16: the kill falls into the second pass (or stage), two steps after a checkpoint."""
    whole = run(tmp_path / "whole", genomes, *options)
    cut = (tmp_path / "cut", genomes, *options)
    # Fresh: a fork of a process in which libraries have started threads may wait for them for ever.
    child = get_context("spawn").Process(target=run, args=cut, kwargs={"callbacks": [KillAt(12)]})
    child.start()
    child.join(600)
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "cut" / "metrics.json").exists()
    torn = tmp_path / "cut" / "checkpoint-12"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_st')
    assert last_complete_checkpoint(tmp_path / "cut") == str(tmp_path / "cut" / "checkpoint-10")
    resumed = run(*cut, "--resume", "true")
    assert resumed["held_out"] == whole["held_out"]
    assert resumed["training"]["steps"] == whole["training"]["steps"] == 20
    losses = []
    for name in ("whole", "cut"):
        state = json.loads((tmp_path / name / "checkpoint-20" / "trainer_state.json").read_text())
        losses.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == 20
    assert same(final_weights(tmp_path / "whole"), final_weights(tmp_path / "cut"))


class StopAt(TrainerCallback):
    """Somebody presses Ctrl-C at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_leaves_a_checkpoint_and_nothing_is_read_again(genomes, tmp_path, monkeypatch) -> None:
    """Streamed or held in memory, at once or in two parts: the same weights; what was trained on is not read again."""
    whole = run(tmp_path / "whole", genomes)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", genomes, "--streaming", "true", callbacks=[StopAt(6)])
    assert signal.getsignal(signal.SIGINT) is handler
    assert last_complete_checkpoint(tmp_path / "cut") == str(tmp_path / "cut" / "checkpoint-7")
    read: list[int] = []
    original = Forwards.__getitem__
    monkeypatch.setattr(Forwards, "__getitem__", lambda self, i: read.append(i) or original(self, i))
    resumed = run(tmp_path / "cut", genomes, "--streaming", "true", "--resume", "true")
    # The data loader reads no window of the 7 steps that are done.
    assert read == list(range(7, 20))
    assert resumed["held_out"] == whole["held_out"]
    assert same(final_weights(tmp_path / "whole"), final_weights(tmp_path / "cut"))


def test_a_genome_that_changed_is_refused_by_name(genomes, tmp_path) -> None:
    data = tmp_path / "data"
    shutil.copytree(genomes, data)
    both = ["--genomes", "toy.fa", "other.fa", "--max_steps", "5"]
    run(tmp_path / "run", str(data), *both)
    elsewhere = data.rename(tmp_path / "elsewhere")
    run(tmp_path / "run", str(elsewhere), *both, "--resume", "true")
    text = (elsewhere / "other.fa").read_text()
    # One base of the same length: neither the size nor the index of windows tells.
    (elsewhere / "other.fa").write_text(text[:-2] + {"A": "C"}.get(text[-2], "A") + "\n")
    with pytest.raises(DataError, match=r"other\.fa changed since the run .* began.*'sha256'.*--overwrite true"):
        run(tmp_path / "run", str(elsewhere), *both, "--resume", "true")
    (elsewhere / "other.fa").unlink()
    with pytest.raises(DataError, match=r"other\.fa, which is not a file"):
        run(tmp_path / "run", str(elsewhere), *both, "--resume", "true")


def test_a_curriculum_with_equal_bases_per_step(genomes, tmp_path) -> None:
    stages = [{"window_bp": 32, "until_step": 3}, {"window_bp": 64, "until_step": 7}, {"window_bp": 256}]
    widths: list[tuple[int, ...]] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
            model.register_forward_pre_hook(
                lambda module, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
            )

    options = ["--batch_bp", "512", "--max_steps", "9", "--length_curriculum", *map(json.dumps, stages)]
    report = run(tmp_path, genomes, *options, callbacks=[Watch()])
    assert widths[:9] == [(16, 32)] * 3 + [(8, 64)] * 4 + [(2, 256)] * 2
    assert report["training"]["bases_seen"] == 9 * 512
    assert [stage["steps"] for stage in report["training"]["stages"]] == [3, 4, 2]
    assert [stage["windows"] for stage in report["training"]["stages"]] == [
        len(range(0, 2000 - bp + 1, bp // 4)) for bp in (32, 64, 256)
    ]
    # Chains are counted on the shortest windows; what is measured are windows of the last stage, 3 in 1,000 bases.
    assert report["training"]["train_windows"] == len(range(0, 2000 - 32 + 1, 8))
    assert report["held_out"]["toy"]["markov-0"]["bases"] == report["held_out"]["toy"]["model"]["bases"] < 3 * 256


def test_held_out_windows_may_have_a_length_of_their_own(genomes, tmp_path) -> None:
    options = ["--objective", "causal", "--max_steps", "2", "--warmup_steps", "0", "--heldout_window_bp"]
    bases = {
        window: run(tmp_path / window, genomes, *options, window)["held_out"]["toy"]["model"]["bases"]
        for window in ("16", "500")
    }
    assert bases == {"16": 62 * 15, "500": 2 * 499}


@pytest.mark.parametrize(
    ("schedule", "options"), [("triangular2", {"half_cycle_steps": 4}), ("one_cycle", {}), ("inverse_sqrt", {})]
)
def test_a_schedule_goes_by_its_name(schedule, options, genomes, tmp_path) -> None:
    chosen = ["--schedule", schedule, f"--schedule_options={json.dumps(options)}", "--save_steps", "10"]
    run(tmp_path, genomes, *chosen)
    state = json.loads((tmp_path / "checkpoint-20" / "trainer_state.json").read_text())
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    scheduler = build_scheduler(schedule, optimizer, 20, 2, **options)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step(), scheduler.step()
    found = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["--schedule", "trianglar"], r"'trianglar'; did you mean 'triangular'\?"),
        (["--schedule", "greedy"], r"'greedy' follows evaluations during training"),
        (["--schedule_options", '{"gamma": 2}'], r"'cosine' cannot be made from"),
        (["--batch_bp", "100"], r"`batch_bp` \(100\) must be a multiple of every window, it is none of 64"),
        (["--length_curriculum", '{"until_step": 5}'], r"A stage of `length_curriculum` has `window_bp`"),
        (["--length_curriculum", '{"window_bp": 64, "until_step": 5}'], r"ends at step 5, before `max_steps` \(20\)"),
        (["--model_config", '{"is_decoder": true}'], r"is_decoder=True, which does not fit `objective` masked"),
        (["--objective_weights", '{"masked": 1}'], r"`objective_weights` belongs to `objective` mixed"),
        (["--objective", "mixed", "--objective_weights", '{"masked": 1}'], r"must weigh two or three of"),
        (["--objective_options", '{"contrastive": {}}'], r"`objective_options` names \['contrastive'\]"),
    ],
)
def test_settings_that_do_not_fit_are_advice(options, advice, genomes, tmp_path) -> None:
    with pytest.raises(GeneSpliceError, match=advice):
        run(tmp_path, genomes, *options)


def one_of_two(rank: int, port: int, arguments: list[str], log: Path) -> None:
    """A process as torchrun starts it; notes the windows that it saw."""
    # This process is fresh, and its loaders have to inherit what is noted below.
    set_start_method("fork", force=True)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    # What the parent process has found out of itself: that it is alone.
    AcceleratorState._reset_state(reset_partial_state=True)
    original = Forwards.__getitem__

    def logged(self: Forwards, forward: int) -> list[dict]:
        rows = original(self, forward)
        with log.open("a", encoding="utf-8") as stream:
            stream.write("".join(f"{self.world_size} {row['example_id']}\n" for row in rows))
        return rows

    Forwards.__getitem__ = logged
    main(arguments)
    assert torch.distributed.get_world_size() == 2 and torch.distributed.get_backend() == "gloo"
    end_process_group()


def test_two_processes_see_every_window_once_and_learn_what_one_learns(genomes, tmp_path) -> None:
    """8 steps of 16 of the 122 windows: one pass and 6 windows of the next, shared by two processes."""
    plain = json.dumps(TINY | {"hidden_dropout": 0.0, "is_decoder": True})
    options = ["--max_steps", "8", "--save_steps", "4", "--objective", "causal", f"--model_config={plain}"]
    shared = ["--streaming", "true", "--batch_size", "4", "--gradient_accumulation", "2", "--dataloader_workers", "1"]
    arguments = arguments_of(tmp_path / "two", genomes) + options + shared
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [tmp_path / f"rank-{rank}.txt" for rank in range(2)]
    context = get_context("spawn")
    processes = [context.Process(target=one_of_two, args=(rank, port, arguments, logs[rank])) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0, 0]
    worlds, names = zip(*(line.split() for log in logs for line in log.read_text().splitlines()), strict=True)
    assert set(worlds) == {"2"} and len(names) == 128
    assert len(logs[0].read_text().splitlines()) == 64
    corpus = build_corpus(CorpusSettings(genomes, ["toy.fa"], ["two"], window_bp=64, step_bp=16))
    assert sorted(name for name in names if "#" not in name) == sorted(corpus.train["example_id"])
    assert len({name for name in names if name.endswith("#1")}) == 6
    report = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert report["training"]["bases_seen"] == 8 * 16 * 64
    run(tmp_path / "one", genomes, *options)
    weights = [load_file(tmp_path / name / "checkpoint-8" / "model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-5, msg=name)


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(tmp_path) -> None:
    assert last_complete_checkpoint(tmp_path) is None
