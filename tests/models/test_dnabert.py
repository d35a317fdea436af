"""DNABERT-1 in BERT classes, on values of transformers' BERT and of the fork that trained it (float64 as float32).

Shapes: B batch, L tokens, E hidden size, V vocabulary.
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from original_golden import Golden, read_golden
from transformers import AutoModelForMaskedLM, BertForMaskedLM, BertModel

import genesplice_hf
from genesplice_hf.errors import CheckpointError

FOLDER = Path(__file__).parents[1] / "golden" / "dnabert1"
# By the README of the golden case.
STATES, GRADIENTS = {"rtol": 0.0, "atol": 2e-5}, {"rtol": 1e-4, "atol": 1e-6}
# What the fixture's config.json says of itself.
FIXTURE = {"case", "reference", "seed", "dtype", "grad_keys"}
POOLER = ["bert.pooler.dense.bias", "bert.pooler.dense.weight"]


@cache
def golden() -> Golden:
    config = json.loads((FOLDER / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in FIXTURE}
    return read_golden("dnabert1", config, FOLDER)


def at_tokens(tensor: torch.Tensor) -> torch.Tensor:
    """Padded positions are stored as 0."""
    return tensor * golden().inputs["attention_mask"][..., None]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_golden_states(attention: str) -> None:
    case = golden()
    model = case.model()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        found = model(**case.inputs, output_hidden_states=True)
    assert torch.allclose(at_tokens(found.logits), case.outputs["logits"], **STATES)
    assert len(found.hidden_states) == 3
    for layer, state in enumerate(found.hidden_states):
        assert torch.allclose(at_tokens(state), case.outputs[f"hidden.{layer}"], **STATES)
    assert torch.allclose(found.loss, case.outputs["loss"], rtol=0, atol=1e-5)


def test_golden_gradients() -> None:
    case = golden()
    model = case.model()
    model(**case.inputs).loss.backward()
    keys = [key.removeprefix("grad.") for key in case.outputs if key.startswith("grad.")]
    assert len(keys) == 5
    for key in keys:
        assert torch.allclose(model.get_parameter(key).grad, case.outputs[f"grad.{key}"], **GRADIENTS), key


def test_the_fork_differs_by_its_second_bias_where_nothing_is_padded() -> None:
    case = golden()
    full = case.inputs["attention_mask"].bool().all(dim=1)
    assert full.any()
    with torch.no_grad():
        logits = case.model()(**{name: tensor for name, tensor in case.inputs.items() if name != "labels"}).logits
    expected = case.outputs["original.logits"] - case.weights["cls.predictions.bias"]
    assert torch.allclose(logits[full], expected[full], **STATES)


def test_the_base_keeps_the_pooler() -> None:
    case = golden()
    base = case.model(task="base")
    assert type(base) is BertModel
    batch = {name: tensor for name, tensor in case.inputs.items() if name != "labels"}
    with torch.no_grad():
        found = base(**batch)
    assert torch.allclose(found.pooler_output, case.outputs["pooled"], **STATES)
    assert torch.allclose(at_tokens(found.last_hidden_state), case.outputs["hidden.2"], **STATES)
    bare = {key.removeprefix("bert."): value for key, value in case.weights.items() if "pooler" not in key}
    headless = {key: value for key, value in bare.items() if not key.startswith("cls.")}
    again = genesplice_hf.from_original("dnabert1", case.config, headless)
    assert type(again) is BertModel and again.pooler is None
    with torch.no_grad():
        assert torch.equal(again(**batch).last_hidden_state, found.last_hidden_state)


def test_there_and_back_is_bit_exact(tmp_path: Path) -> None:
    """The pooler, which the masked language model does not use, comes back as zeros."""
    case = golden()
    model = case.model()
    assert type(model) is BertForMaskedLM
    assert model.config.conversion["ignored_keys"] == POOLER
    model.save_pretrained(tmp_path)
    for ours in (model, AutoModelForMaskedLM.from_pretrained(tmp_path)):
        config, tensors = genesplice_hf.to_original(ours)
        assert config == case.config
        assert tensors.keys() == case.weights.keys()
        for key, tensor in tensors.items():
            expected = torch.zeros_like(tensor) if key in POOLER else case.weights[key]
            assert torch.equal(tensor, expected), key
    base = case.model(task="base")
    again = genesplice_hf.from_original("dnabert1", *genesplice_hf.to_original(base))
    assert all(torch.equal(again.state_dict()[key], value) for key, value in base.state_dict().items())


@pytest.mark.parametrize("task", ["sequence_classification", "token_classification"])
def test_classifiers_go_there_and_back(task: str) -> None:
    case = golden()
    body = {key: tensor for key, tensor in case.weights.items() if key.startswith("bert.")}
    if task == "token_classification":
        body = {key: tensor for key, tensor in body.items() if key not in POOLER}
    weights = body | {"classifier.weight": torch.randn(3, 32), "classifier.bias": torch.randn(3)}
    config = case.config | {"id2label": {"0": "a", "1": "b", "2": "c"}, "architectures": None}
    source = genesplice_hf.from_original("dnabert1", config, weights, task=task)
    assert source.classifier.weight.shape == (3, 32)
    back, tensors = genesplice_hf.to_original(source)
    assert back == config | {"architectures": [type(source).__name__]}
    assert all(torch.equal(tensors[key], weights[key]) for key in weights)
    assert type(genesplice_hf.from_original("dnabert1", config, tensors)) is type(source)
    with pytest.raises(CheckpointError, match=r"missing: classifier\.bias, classifier\.weight"):
        case.model(task=task)


def test_keys_of_bert_pretraining_are_ignored_and_others_refused() -> None:
    case = golden()
    extra = {
        "bert.embeddings.position_ids": torch.arange(80)[None],
        "cls.seq_relationship.bias": torch.zeros(2),
        "cls.seq_relationship.weight": torch.zeros(2, 32),
    }
    model = genesplice_hf.from_original("dnabert1", case.config, case.weights | extra)
    assert model.config.conversion["ignored_keys"] == sorted([*extra, *POOLER])
    weights = dict(case.weights)
    weights["bert.stranger"] = weights.pop("bert.encoder.layer.1.output.dense.bias")
    with pytest.raises(
        CheckpointError, match=r"missing: bert\.encoder\.layer\.1\.output\.dense\.bias; unexpected: bert"
    ):
        genesplice_hf.from_original("dnabert1", case.config, weights)


def test_a_classifier_of_sequences_needs_the_pooler() -> None:
    case = golden()
    weights = {key: tensor for key, tensor in case.weights.items() if key not in POOLER and key.startswith("bert.")}
    weights |= {"classifier.weight": torch.randn(2, 32), "classifier.bias": torch.randn(2)}
    with pytest.raises(CheckpointError, match=r"missing: bert\.pooler"):
        genesplice_hf.from_original("dnabert1", case.config, weights, task="sequence_classification")


def test_published_settings_without_an_effect_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    """DNABERT's config.json holds settings of its fork."""
    case = golden()
    config = case.config | {"num_rnn_layer": 1, "rnn": "lstm", "split": 10}
    model = genesplice_hf.from_original("dnabert1", config, case.weights)
    assert model.config.upstream_config == {"num_rnn_layer": 1, "rnn": "lstm", "split": 10}
    assert "num_rnn_layer, rnn, split" in caplog.text
    assert genesplice_hf.to_original(model)[0].items() >= config.items()
