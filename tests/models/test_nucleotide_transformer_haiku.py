"""Nucleotide Transformer v1 in the layout of its authors' JAX code, against names and values of that code."""

import json
from typing import Any

import pytest
import torch
from nucleotide_transformer_golden import FOLDER, STATES, at_tokens, classifier_weights, golden

import genesplice_hf
from genesplice_hf.errors import CheckpointError

HYPERPARAMETERS = json.loads((FOLDER / "config.json").read_text())["jax_config"]
NAMES = json.loads((FOLDER.parent / "nt_v1_haiku" / "names.json").read_text())


def haiku() -> dict[str, torch.Tensor]:
    """The golden weights under Haiku's names."""
    return genesplice_hf.to_original(golden().model(), layout="haiku")[1]


def tree(published: bool = False) -> dict[str, dict[str, Any]]:
    """As joblib reads it: module -> parameter -> array; `published` with the names of the published files."""
    found: dict[str, dict[str, Any]] = {}
    for key, tensor in haiku().items():
        module, _, parameter = key.rpartition("/")
        if published:
            for today, then in (
                ("nucleotide_transformer/", "esm_transformer/"),
                ("/self_attention/", "/mha/"),
                ("/self_attention_layer_norm", "/mha_layer_norm"),
                ("/roberta_lm_head/", "/esm_roberta_lm_head/"),
            ):
                module = module.replace(today, then)
        found.setdefault(module, {})[parameter] = tensor.numpy()
    return found


def from_haiku(state_dict: Any, **changed: Any) -> Any:
    return genesplice_hf.from_original("nt_v1", HYPERPARAMETERS | changed, state_dict)


def test_names_and_shapes_are_those_of_the_reference() -> None:
    assert {key: list(tensor.shape) for key, tensor in haiku().items()} == NAMES


@pytest.mark.parametrize("form", ["flat", "tree", "published"])
def test_golden_states(form: str) -> None:
    """Haiku's default epsilon is the one of the reference's values."""
    case, model = golden(), from_haiku(haiku() if form == "flat" else tree(form == "published"))
    assert model.config.layer_norm_eps == 1e-5
    with torch.no_grad():
        found = model(**case.inputs, output_hidden_states=True)
    assert torch.allclose(at_tokens(found.logits), case.outputs["eps1e-5.logits"], **STATES)
    for layer, state in enumerate(found.hidden_states):
        assert torch.allclose(at_tokens(state), case.outputs[f"eps1e-5.hidden.{layer}"], **STATES)


def test_there_and_back_is_bit_exact() -> None:
    """In either layout: what came from Haiku goes back there unless it is told otherwise."""
    model, weights = from_haiku(haiku()), golden().weights
    config, tensors = genesplice_hf.to_original(model)
    assert config == HYPERPARAMETERS
    assert tensors.keys() == NAMES.keys()
    assert all(torch.equal(tensors[key], tensor) for key, tensor in haiku().items())
    _, hub = genesplice_hf.to_original(model, layout="hub")
    assert hub.keys() == weights.keys()
    assert all(torch.equal(hub[key], weights[key]) for key in hub if "contact_head" not in key)


def test_a_config_of_the_hub_becomes_hyperparameters() -> None:
    config, _ = genesplice_hf.to_original(golden().model(layer_norm_eps="original"), layout="haiku")
    assert config == config | HYPERPARAMETERS
    assert genesplice_hf.from_original("nt_v1", config, haiku()).config.max_position_embeddings == 42


def test_published_hyperparameters_have_no_vocabulary_size() -> None:
    """4^k words, single bases and special tokens: 265 for 4-mers, 4,105 for the published 6-mers."""
    given = {name: HYPERPARAMETERS[name] for name in HYPERPARAMETERS.keys() - {"alphabet_size", "pad_token_id"}}
    assert genesplice_hf.from_original("nt_v1", given | {"k_for_kmers": 4}, haiku()).config.vocab_size == 265
    with pytest.raises(CheckpointError, match=r"\(265, 32\), needs \(4105, 32\)"):
        genesplice_hf.from_original("nt_v1", given, haiku())


def test_without_the_head_it_is_the_base() -> None:
    case = golden()
    body = {key: tensor for key, tensor in haiku().items() if "lm_head/~/lm_" not in key}
    base = from_haiku(body)
    assert type(base).__name__ == "EsmModel" and base.pooler is None
    with torch.no_grad():
        states = base(case.inputs["input_ids"], case.inputs["attention_mask"]).last_hidden_state
    assert torch.allclose(at_tokens(states), case.outputs["eps1e-5.hidden.2"], **STATES)
    assert genesplice_hf.to_original(base)[1].keys() == body.keys()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"use_rotary_embedding": True}, "use_rotary_embedding"),
        ({"embed_scale": 2.0}, "embed_scale"),
        ({"key_dim": 3}, "key_dim"),
        ({"masking_ratio": 0.2}, "masking_ratio"),
    ],
)
def test_another_architecture_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"`{message}`"):
        from_haiku(haiku(), **changed)


def test_missing_hyperparameters_are_named() -> None:
    with pytest.raises(CheckpointError, match="lack attention_heads, num_layers"):
        genesplice_hf.from_original("nt_v1", {"embed_dim": 32, "ffn_embed_dim": 64, "max_positions": 40}, haiku())


def test_all_faults_stand_in_one_error() -> None:
    weights = haiku()
    weights["nucleotide_transformer/~/stranger/w"] = weights.pop("nucleotide_transformer/attention_layer_1/~/fc2/b")
    with pytest.raises(CheckpointError) as error:
        from_haiku(weights)
    for part in (
        "missing: esm.encoder.layer.1.output.dense.bias",
        "unexpected: esm.nucleotide_transformer/~/stranger/w",
    ):
        assert part in str(error.value)


def test_what_has_no_place_there_is_not_dropped() -> None:
    task = "sequence_classification"
    config = golden().config | {"id2label": {"0": "a", "1": "b", "2": "c"}}
    classifier = genesplice_hf.from_original("nt_v1", config, classifier_weights(task), task=task)
    with pytest.raises(CheckpointError, match=r"no place for classifier\.dense\.weight"):
        genesplice_hf.to_original(classifier, layout="haiku")
    with pytest.raises(CheckpointError, match="`layout` must be"):
        genesplice_hf.to_original(classifier, layout="jax")
