"""Nucleotide Transformer v1 in ESM classes, on values of the original JAX code (float64, stored as float32).

Shapes: B batch, L tokens, E hidden size, V vocabulary.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from nucleotide_transformer_golden import STATES, at_tokens, classifier_weights, golden
from transformers import AutoModelForMaskedLM, EsmForMaskedLM, EsmForSequenceClassification, EsmModel

import genesplice_hf
from genesplice_hf.errors import CheckpointError

# By the README of the golden case.
GRADIENTS = {"rtol": 1e-4, "atol": 1e-6}
EPSILONS = [("original", "eps1e-5."), ("config", "eps1e-12."), (1e-5, "eps1e-5.")]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("epsilon", "prefix"), EPSILONS)
def test_golden_states(epsilon: Any, prefix: str, attention: str) -> None:
    case = golden()
    model = case.model(layer_norm_eps=epsilon)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        found = model(**case.inputs, output_hidden_states=True)
    assert torch.allclose(at_tokens(found.logits), case.outputs[f"{prefix}logits"], **STATES)
    assert len(found.hidden_states) == 3
    for layer, state in enumerate(found.hidden_states):
        assert torch.allclose(at_tokens(state), case.outputs[f"{prefix}hidden.{layer}"], **STATES)
    assert torch.allclose(found.loss, case.outputs[f"{prefix}loss"], rtol=0, atol=1e-5)


def test_golden_gradients() -> None:
    case = golden()
    model = case.model(layer_norm_eps="original")
    model(**case.inputs).loss.backward()
    keys = [key.removeprefix("grad.") for key in case.outputs if key.startswith("grad.")]
    assert len(keys) == 6
    for key in keys:
        assert torch.allclose(model.get_parameter(key).grad, case.outputs[f"grad.{key}"], **GRADIENTS), key


def test_the_two_epsilons_differ_as_documented() -> None:
    case = golden()
    batch = {name: case.inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = [case.model(layer_norm_eps=value)(**batch).logits for value in ("config", "original")]
    assert 1e-4 < at_tokens(logits[0] - logits[1]).abs().max() < 1e-3


@pytest.mark.parametrize("value", ["tiny", 0, -1e-5])
def test_an_epsilon_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match="layer_norm_eps"):
        golden().model(layer_norm_eps=value)


def test_there_and_back_is_bit_exact(tmp_path: Path) -> None:
    """Also after a file of transformers, which keeps the record of the conversion in its config."""
    case = golden()
    model = case.model()
    assert type(model) is EsmForMaskedLM
    model.save_pretrained(tmp_path)
    for ours in (model, AutoModelForMaskedLM.from_pretrained(tmp_path)):
        assert ours.config.conversion["source"] == "nt_v1"
        config, tensors = genesplice_hf.to_original(ours)
        assert config == case.config
        assert tensors.keys() == case.weights.keys()
        assert all(torch.equal(tensors[key], case.weights[key]) for key in tensors)


def test_the_base_has_no_untrained_pooler_and_the_same_states() -> None:
    case = golden()
    base = case.model(task="base")
    assert type(base) is EsmModel and base.pooler is None
    assert base.config.conversion["ignored_keys"] == sorted(key for key in case.weights if key.startswith("lm_head."))
    headless = {key: tensor for key, tensor in case.weights.items() if key.startswith("esm.")}
    bare = {key.removeprefix("esm."): tensor for key, tensor in headless.items()}
    for weights in (headless, bare):
        again = genesplice_hf.from_original("nt_v1", case.config, weights)
        assert type(again) is EsmModel
        assert all(torch.equal(again.state_dict()[key], value) for key, value in base.state_dict().items())
    with torch.no_grad():
        states = base(case.inputs["input_ids"], case.inputs["attention_mask"]).last_hidden_state
    assert torch.allclose(at_tokens(states), case.outputs["eps1e-12.hidden.2"], **STATES)


def test_a_contact_head_that_is_missing_is_made_and_recorded() -> None:
    case = golden()
    weights = {key: tensor for key, tensor in case.weights.items() if "contact_head" not in key}
    model = genesplice_hf.from_original("nt_v1", case.config, weights)
    assert model.config.conversion["generated_keys"] == [
        "esm.contact_head.regression.weight",
        "esm.contact_head.regression.bias",
    ]
    assert case.model().config.conversion["generated_keys"] == []
    with torch.no_grad():
        assert torch.equal(model(**case.inputs).logits, case.model()(**case.inputs).logits)


def test_a_file_with_position_ids_loads_and_says_so() -> None:
    case = golden()
    extra = {"esm.embeddings.position_ids": torch.arange(42)[None]}
    model = genesplice_hf.from_original("nt_v1", case.config, case.weights | extra)
    assert model.config.conversion["ignored_keys"] == ["esm.embeddings.position_ids"]


@pytest.mark.parametrize("task", ["sequence_classification", "token_classification"])
def test_classifiers_go_there_and_back(task: str) -> None:
    case = golden()
    config = case.config | {"id2label": {"0": "a", "1": "b", "2": "c"}}
    source = genesplice_hf.from_original("nt_v1", config, classifier_weights(task), task=task)
    assert source.config.num_labels == 3 and source.config.id2label[2] == "c"
    _, tensors = genesplice_hf.to_original(source)
    again = genesplice_hf.from_original("nt_v1", config, tensors)
    assert type(again) is type(source)
    with pytest.raises(CheckpointError, match=r"missing: classifier\."):
        case.model(task=task)


def test_all_faults_stand_in_one_error() -> None:
    case = golden()
    weights = dict(case.weights)
    weights["esm.stranger"] = weights.pop("lm_head.dense.bias")
    weights["lm_head.decoder.weight"] = weights["lm_head.decoder.weight"].T
    with pytest.raises(CheckpointError) as error:
        genesplice_hf.from_original("nt_v1", case.config, weights)
    for part in (
        "missing: lm_head.dense.bias",
        "unexpected: esm.stranger",
        "mis-shaped: lm_head.decoder.weight is (32, 265), needs (265, 32)",
    ):
        assert part in str(error.value)


def test_rotary_positions_are_no_nt_v1() -> None:
    case = golden()
    with pytest.raises(CheckpointError, match="rotary"):
        genesplice_hf.from_original("nt_v1", case.config | {"position_embedding_type": "rotary"}, case.weights)
    classifier = EsmForSequenceClassification(case.model().config)
    classifier.config.position_embedding_type = "rotary"
    with pytest.raises(CheckpointError, match="absolute"):
        genesplice_hf.to_original(classifier)


@pytest.mark.parametrize("stored", ["copy", "source", "both"])
def test_a_tied_decoder_may_be_stored_once(stored: str) -> None:
    case = golden()
    weights = dict(case.weights)
    weights["lm_head.decoder.weight"] = weights["esm.embeddings.word_embeddings.weight"].clone()
    if stored != "both":
        del weights["esm.embeddings.word_embeddings.weight" if stored == "copy" else "lm_head.decoder.weight"]
    model = genesplice_hf.from_original("nt_v1", case.config | {"tie_word_embeddings": True}, weights)
    assert model.lm_head.decoder.weight is model.esm.embeddings.word_embeddings.weight
    expected = case.weights["esm.embeddings.word_embeddings.weight"]
    assert torch.equal(model.lm_head.decoder.weight, expected)


def test_copies_that_differ_are_untied_and_both_kept(caplog: pytest.LogCaptureFixture) -> None:
    case = golden()
    model = genesplice_hf.from_original("nt_v1", case.config | {"tie_word_embeddings": True}, case.weights)
    assert "tie_word_embeddings" in caplog.text and model.config.tie_word_embeddings is False
    assert torch.equal(model.lm_head.decoder.weight, case.weights["lm_head.decoder.weight"])
    assert torch.equal(
        model.esm.embeddings.word_embeddings.weight, case.weights["esm.embeddings.word_embeddings.weight"]
    )
