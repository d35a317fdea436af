"""Every model and every objective from the settings of pretraining: collator, training, files, measurement."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from genesplice_hf.errors import DataError
from genesplice_hf.heads.pretraining import EncoderForPreTraining
from genesplice_hf.models.registry import REGISTRY
from genesplice_hf.objectives.causal import CLMCollator
from genesplice_hf.objectives.contrastive import ContrastiveCollator, ViewStrength
from genesplice_hf.objectives.masked import DnaMLMCollator
from genesplice_hf.objectives.mixed import MultiObjectiveCollator
from genesplice_hf.objectives.next_segment import NextSegmentCollator
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer
from training.corpus import lengths
from training.heldout import Corpus, measure_objectives
from training.objectives import LanguageModelSettings, build_collator, build_model
from training.pretrain import SETTINGS, check_schedule, main, plan_stages
from training.settings import parse_settings

TOKENIZER = NucleotideTokenizer(preset="genesplice")
NEAR = {"next_segment": {"min_distance_bp": 100}}


@pytest.fixture(autouse=True)
def no_plots(monkeypatch) -> None:
    """They take longer than the training, and `test_pretrain.py` looks at one."""
    monkeypatch.setattr("training.pretrain.plot_learning_curve", lambda *arguments: None)


@pytest.fixture(scope="module")
def genomes(tmp_path_factory) -> str:
    """`toy.fa` with two contigs of random bases."""
    folder, rng = tmp_path_factory.mktemp("genomes"), np.random.default_rng(0)
    one, two = ("".join(rng.choice(list("ACGT"), length)) for length in (3000, 1000))
    (folder / "toy.fa").write_text(f">one\n{one}\n>two\n{two}\n")
    return str(folder)


def tiny(model_type: str, **fields) -> dict:
    """The registry's tiny config as the `model_config` of a training config."""
    changed = REGISTRY[model_type].tiny_config(**fields).to_diff_dict()
    return {name: value for name, value in changed.items() if name != "transformers_version"} | fields


def run(folder: Path, genomes: str, config: dict, *options: str) -> dict:
    arguments = ["--data_dir", genomes, "--genomes", "toy.fa", "--held_out", "two", "--output_dir", str(folder)]
    arguments += [
        "--window_bp",
        "64",
        "--step_bp",
        "16",
        "--batch_size",
        "8",
        "--max_steps",
        "6",
        "--streaming",
        "true",
    ]
    arguments += ["--warmup_steps", "2", "--save_steps", "10", "--learning_rate", "1e-2", "--max_markov_order", "2"]
    return main([*arguments, "--precision", "fp32", f"--model_config={json.dumps(config)}", *options])


def losses(folder: Path) -> list[float]:
    state = json.loads(next(folder.glob("checkpoint-*/trainer_state.json")).read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


LANGUAGE_MODELS = {"masked": AutoModelForMaskedLM, "causal": AutoModelForCausalLM}


@pytest.mark.parametrize(
    ("model_type", "objective"),
    [
        (model_type, objective)
        for model_type, entry in sorted(REGISTRY.items())
        for objective, auto in LANGUAGE_MODELS.items()
        if auto.__name__ in entry.auto_classes
    ],
)
def test_every_model_of_the_registry_trains(model_type, objective, genomes, tmp_path) -> None:
    """With its own attention, and with gradients accumulated: the loss begins near ln 16 and is per base."""
    fields = REGISTRY[model_type].causal_overrides if objective == "causal" else {}
    config = tiny(model_type, **fields)
    config.pop("initializer_range", None)
    # Models of longer tokens have other vocabularies than the tokenizer of this run.
    config["vocab_size"] = 16
    options = ["--objective", objective, "--attn_implementation", "none"]
    report = run(tmp_path, genomes, config, *options, "--gradient_accumulation", "2", "--batch_size", "4")
    first = losses(tmp_path)[0]
    assert abs(first - np.log(16)) < 0.3
    assert report["held_out"]["toy"]["model"]["loss"] < first
    auto = LANGUAGE_MODELS[objective]
    model = auto.from_pretrained(tmp_path / "model")
    assert isinstance(model, REGISTRY[model_type].auto_classes[auto.__name__])


def test_chunks_of_a_performer_train_as_whole_sequences_do(genomes, tmp_path) -> None:
    """In training with `slim_chunk_size` the model returns a loss and no logits; measured it is as any other."""
    found = {}
    for chunk in (-1, 30):
        config = tiny("genesplice_performer", is_decoder=True, slim_chunk_size=chunk)
        report = run(tmp_path / str(chunk), genomes, config, "--objective", "causal", "--max_steps", "3")
        found[chunk] = (losses(tmp_path / str(chunk)), report["held_out"]["toy"]["model"]["loss"])
    assert found[30][0] == pytest.approx(found[-1][0], rel=1e-4)
    # Saved weights are rounded to bfloat16.
    assert found[30][1] == pytest.approx(found[-1][1], rel=1e-2)


@pytest.mark.parametrize(
    ("options", "measured"),
    [
        (["--objective", "contrastive"], {"contrastive_loss", "contrastive_accuracy"}),
        (
            ["--objective", "next_segment", f"--objective_options={json.dumps(NEAR)}"],
            {"next_segment_loss", "next_segment_accuracy"},
        ),
        (
            [
                "--objective", "mixed", '--objective_weights={"masked": 1, "contrastive": 0.2, "next_segment": 0.5}',
                f"--objective_options={json.dumps(NEAR | {'contrastive_dim': 8})}",
            ],
            {"mlm_loss", "contrastive_loss", "contrastive_accuracy", "next_segment_loss", "next_segment_accuracy"},
        ),
        (
            ["--objective", "mixed", '--objective_weights={"causal": 1, "contrastive": 0.2}'],
            {"mlm_loss", "contrastive_loss", "contrastive_accuracy"},
        ),
    ],
    ids=["contrastive", "next_segment", "mixed", "mixed-causal"],
)  # fmt: skip
def test_an_encoder_with_heads_trains_and_its_plain_form_is_saved(options, measured, genomes, tmp_path) -> None:
    causal = "causal" in " ".join(options)
    report = run(tmp_path, genomes, tiny("genesplice", is_decoder=causal), *options)
    found = report["held_out"]["toy"]
    assert set(found["objectives"]) == measured | {"windows", "windows_per_batch"}
    assert all(np.isfinite(value) for value in found["objectives"].values())
    methods = {"model", *(f"markov-{order}" for order in range(3))} if "mlm_loss" in measured else set()
    assert set(found) == methods | {"objectives"}
    assert np.isfinite(losses(tmp_path)).all()
    plain = AutoModel.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    heads = EncoderForPreTraining.from_pretrained(tmp_path / "model_with_heads", dtype=torch.float32).eval()
    assert type(plain) is REGISTRY["genesplice"].auto_classes["AutoModel"]
    inputs = TOKENIZER(["ACGTTGCA" * 5], return_tensors="pt")
    assert torch.equal(plain(**inputs).last_hidden_state, heads.encoder(**inputs).last_hidden_state)
    if "mlm_loss" in measured:
        assert found["model"]["loss"] > 0 and heads(**inputs).logits.shape == (1, 40, 16)


def test_mixed_losses_are_weighted() -> None:
    weights = {"masked": 2.0, "contrastive": 0.25}
    settings = LanguageModelSettings("mixed", weights, {"contrastive_dim": 5}, tiny("genesplice"), rc_probability=0)
    model = build_model(settings, 0).eval()
    rows = [{"sequence": text, "example_id": i} for i, text in enumerate(["ACGTTGCAGT", "TTGACCATGA", "CCCATTAGGA"])]
    outputs = model(**build_collator(TOKENIZER, settings, 0)(rows))
    torch.testing.assert_close(outputs.loss, 2.0 * outputs.mlm_loss + 0.25 * outputs.contrastive_loss)
    assert outputs.embeddings.shape == (3, 5)


def test_objectives_are_means_over_batches_of_the_held_out_windows(monkeypatch) -> None:
    """Two batches of two windows against one call each."""
    monkeypatch.setattr("training.heldout._BATCH_BP", 20)
    settings = LanguageModelSettings("contrastive", model_config=tiny("genesplice"), rc_probability=0)
    model, collator = build_model(settings, 0), build_collator(TOKENIZER, settings, 3)
    rows = [{"sequence": text * 2, "example_id": i} for i, text in enumerate(["ACGTT", "TTGAC", "CCCAT", "GGTAC"])]
    found = measure_objectives(model, Corpus(None, {"toy": rows}), lambda rows: collator)["toy"]
    with torch.inference_mode():
        outputs = [model(**collator(rows[:2])), model(**collator(rows[2:]))]
    assert found["contrastive_loss"] == pytest.approx(np.mean([output.loss.item() for output in outputs]), rel=1e-6)
    hits = [
        [int(output.embeddings[i] @ output.view_embeddings[i] > output.embeddings[i] @ output.view_embeddings[1 - i])
         for i in range(2)] for output in outputs
    ]  # fmt: skip
    assert found["contrastive_accuracy"] == np.mean(hits)
    assert (found["windows"], found["windows_per_batch"]) == (4, 2)


def test_held_out_segments_without_a_partner_are_left_out() -> None:
    """Partners must lie far away, which two neighbours do not; the training is not lost for that."""
    row = {"chrom": "a", "sequence": "ACGTTGCAGT"}
    rows = [row | {"start": i, "end": i + 10, "example_id": f"g|a:{i}-{i + 10}"} for i in (0, 10)]
    settings = LanguageModelSettings("next_segment", model_config=tiny("genesplice"))
    options = {"negative_probability": 1.0}
    settings.objective_options = {"next_segment": options}
    model = build_model(settings, 0)
    measured = measure_objectives(
        model, Corpus(None, {"toy": rows}), lambda found: build_collator(TOKENIZER, settings, 1, found)
    )
    assert measured == {"toy": {}}


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        (LanguageModelSettings("masked", mlm_probability=0.3), DnaMLMCollator),
        (LanguageModelSettings("causal"), CLMCollator),
        (LanguageModelSettings("contrastive"), ContrastiveCollator),
        (LanguageModelSettings("next_segment"), NextSegmentCollator),
        (LanguageModelSettings("mixed", {"causal": 1, "next_segment": 1}), MultiObjectiveCollator),
    ],
)
def test_each_objective_has_its_collator(settings, kind) -> None:
    partners = [{"chrom": "a", "start": 0, "end": 4, "sequence": "ACGT", "example_id": "g|a:0-4"}]
    collator = build_collator(TOKENIZER, settings, 7, partners)
    assert type(collator) is kind
    parts = collator.collators if kind is MultiObjectiveCollator else [collator]
    assert {(part.seed, part.rc_probability) for part in parts} == {(7, 0.5)}


def test_options_reach_the_collators() -> None:
    options = {"contrastive": {"second": ["mutation"], "strength": {"mutation": [0.2, 0.3]}, "rc_probability": 0.0}}
    settings = LanguageModelSettings("mixed", {"masked": 1, "contrastive": 1}, options, mlm_probability=0.4)
    collator = build_collator(TOKENIZER, settings, 0)
    assert collator.tokens.mlm_probability == 0.4 and collator.tokens.rc_probability == 0.5
    assert collator.contrastive.views[1] == {"mutation"} and collator.contrastive.rc_probability == 0
    assert collator.contrastive.strength == ViewStrength(mutation=[0.2, 0.3])


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        (LanguageModelSettings("mixed", {"masked": 1, "causal": 1}), r"not both of the first two"),
        (LanguageModelSettings("mixed", {"masked": 1, "tracks": 1}), r"must weigh two or three of"),
        (LanguageModelSettings("causal", model_config={"is_decoder": False}), r"set `is_decoder: true`"),
    ],
)
def test_objectives_that_cannot_be_are_advice(settings, advice) -> None:
    with pytest.raises(DataError, match=advice):
        build_model(settings, 0)


CONFIGS = Path(__file__).resolve().parents[2] / "training" / "configs"


@pytest.mark.parametrize(
    "name", ["genesplice_nano", "genesplice_long", "slim_performer_causal", "slim_performer_masked"]
)
def test_the_configs_of_pretraining_hold_out_the_same_bases_and_fit_their_models(name) -> None:
    corpus, objective, training = parse_settings(SETTINGS, ["--config", str(CONFIGS / f"{name}.yaml")])
    nano, _, _ = parse_settings(SETTINGS, ["--config", str(CONFIGS / "genesplice_nano.yaml")])
    assert (corpus.genomes, corpus.held_out) == (nano.genomes, nano.held_out) and len(corpus.held_out) == 12
    check_schedule(training)
    windows = [rows(9)] * len(lengths(corpus))
    stages = plan_stages(Corpus(windows[0], {}, windows), corpus, training)
    assert stages[-1].until_step == training.max_steps
    assert len({stage.window_bp * stage.batch_size for stage in stages}) == 1
    assert build_model(objective, 0).num_parameters() < 3_000_000


def rows(count: int) -> list[dict]:
    return [{"sequence": "ACGT", "example_id": i} for i in range(count)]
