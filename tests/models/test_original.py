"""The door for foreign weights, on google-research's SLiMPerformer: values, gradients, the way back, and faults.

The golden cases come from that code (float64, stored as float32); their README says how.

Shapes: B batch, L tokens, H heads, D head size, M features.
"""

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import genesplice_hf
from genesplice_hf.errors import CheckpointError
from genesplice_hf.models.original import SOURCES
from genesplice_hf.models.performer.configuration_performer import PerformerConfig
from genesplice_hf.models.performer.modeling_performer import PerformerForCausalLM, PerformerForMaskedLM
from genesplice_hf.models.performer.modeling_performer_base import PerformerModel

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("elu", "elu_postnorm", "favor", "favor2", "relu", "sqr")
EVERY_CASE = pytest.mark.parametrize("name", NAMES)
# float64: the stored values are rounded to float32. float32: ten times the reference's own deviation from float64.
TOLERANCES = {torch.float64: 1e-7, torch.float32: 2.6e-5}
EVERY_DTYPE = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


class Golden(NamedTuple):
    """One case: the reference's config, its tensors, and the option that it needs."""

    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    options: dict[str, Any]

    def model(self, dtype: torch.dtype = torch.float32, **options: Any) -> PerformerForCausalLM:
        given = self.options | options
        return genesplice_hf.from_original("slim_performer", self.config, self.weights, dtype=dtype, **given)


@cache
def golden(name: str) -> Golden:
    folder = GOLDEN / f"slim_performer_{name}"
    config = json.loads((folder / "config.json").read_text())["model"]
    weights, inputs, outputs = (load_file(folder / f"{part}.safetensors") for part in ("weights", "inputs", "outputs"))
    features = [inputs[f"rfs.{layer}"] for layer in range(config["n_layers"])] if "rfs.0" in inputs else None
    return Golden(config, weights, inputs, outputs, {} if features is None else {"features": features})


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@EVERY_CASE
@EVERY_DTYPE
@pytest.mark.parametrize("chunk_size", [-1, 16])
def test_golden_states(name: str, dtype: torch.dtype, chunk_size: int) -> None:
    case, tolerance = golden(name), TOLERANCES[dtype]
    model, ids, expected = case.model(dtype), case.inputs["input_ids"][:, :-1], case.outputs
    found: dict[str, torch.Tensor] = {}

    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        found.setdefault("attention.0", output[0])

    model.performer.layers[0].attention.register_forward_hook(keep)
    with torch.no_grad():
        outputs = model(ids, output_hidden_states=True)
        found |= {f"hidden_states.{layer}": state for layer, state in enumerate(outputs.hidden_states)}
        found["embeddings"] = found.pop("hidden_states.0")
        streamed = model(ids, slim_chunk_size=chunk_size, use_cache=True)
    found["logits"] = streamed.logits
    for layer, state in enumerate(streamed.past_key_values.states):
        found |= {f"final_sums.{layer}.num": state.numerator, f"final_sums.{layer}.den": state.denominator}
    assert len(found) == 9
    for key, tensor in found.items():
        # Where all rows share their positions the reference may keep one row of sums.
        assert_near(tensor, expected[key].expand_as(tensor), tolerance)


@EVERY_CASE
@EVERY_DTYPE
@pytest.mark.parametrize(("chunk_size", "prefix"), [(-1, ""), (16, "chunk16."), (64, "chunk64.")])
def test_golden_loss_and_gradients(name: str, dtype: torch.dtype, chunk_size: int, prefix: str) -> None:
    """The labels that count are those whose target is no padding; attention itself is not masked."""
    case = golden(name)
    model = case.model(dtype).train()
    labels = case.inputs["input_ids"].masked_fill(~case.inputs["nonpad_mask"], -100)
    loss = model(case.inputs["input_ids"], labels=labels, slim_chunk_size=chunk_size).loss
    loss.backward()
    assert_near(loss, case.outputs[f"{prefix}loss"], TOLERANCES[dtype])
    keys = [key.removeprefix("grad.") for key in case.outputs if key.startswith("grad.")]
    assert len(keys) == 7
    for key in keys:
        parameter = model.get_parameter(key if key.startswith("output_logit_map") else f"performer.{key}")
        assert_near(parameter.grad, case.outputs[f"{prefix}grad.{key}"], TOLERANCES[dtype])


@EVERY_CASE
def test_golden_plain_mean(name: str) -> None:
    case = golden(name)
    ids = case.inputs["input_ids"]
    with torch.no_grad():
        assert_near(case.model(torch.float64)(ids, labels=ids).loss, case.outputs["loss_unmasked"], 1e-7)


@EVERY_CASE
def test_there_and_back_is_bit_exact(name: str, tmp_path: Path) -> None:
    """Also after our own files, and as often as one likes."""
    case, model = golden(name), golden(name).model()
    assert not model.training
    model.save_pretrained(tmp_path)
    for ours in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        config, tensors = genesplice_hf.to_original(ours)
        assert config == case.config
        assert tensors.keys() == case.weights.keys()
        assert all(torch.equal(tensors[key], case.weights[key]) for key in tensors)
        again = genesplice_hf.from_original("slim_performer", config, tensors, **case.options)
        assert all(torch.equal(again.state_dict()[key], value) for key, value in ours.state_dict().items())


def test_the_tensors_are_copies() -> None:
    case = golden("sqr")
    model = case.model()
    before = case.weights["input_map.weight"].clone()
    model.performer.input_map.weight.data.zero_()
    assert torch.equal(case.weights["input_map.weight"], before)


def test_a_base_without_its_head_says_what_it_left_out() -> None:
    case = golden("elu")
    base = case.model(task="base")
    assert type(base) is PerformerModel
    assert base.config.conversion["ignored_keys"] == ["output_logit_map.bias", "output_logit_map.weight"]
    headless = {key: tensor for key, tensor in case.weights.items() if not key.startswith("output_logit_map")}
    automatic = genesplice_hf.from_original("slim_performer", case.config, headless)
    assert type(automatic) is PerformerModel
    ids = case.inputs["input_ids"][:, :-1]
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, automatic(ids).last_hidden_state)
        assert_near(base(ids).last_hidden_state, case.outputs["hidden_states.2"], TOLERANCES[torch.float32])


def test_all_faults_stand_in_one_error() -> None:
    case = golden("sqr")
    weights = dict(case.weights)
    weights["layers.0.attention.stranger"] = weights.pop("layers.0.attention.k_map.bias")
    weights["layers.1.U_map.bias"] = weights["layers.1.U_map.bias"][:-1]
    with pytest.raises(CheckpointError) as error:
        genesplice_hf.from_original("slim_performer", case.config, weights)
    for part in (
        "missing: performer.layers.0.attention.k_map.bias",
        "unexpected: performer.layers.0.attention.stranger",
        "mis-shaped: performer.layers.1.U_map.bias is (63,), needs (64,)",
    ):
        assert part in str(error.value)
    with pytest.raises(CheckpointError, match=r"layers\.2\..*missing|missing.*layers\.2\."):
        genesplice_hf.from_original("slim_performer", case.config | {"n_layers": 3}, case.weights)


def test_fields_of_ours_can_be_set_and_unknown_ones_cannot() -> None:
    model = golden("sqr").model(slim_chunk_size=32, slim_states="reverse")
    assert (model.config.slim_chunk_size, model.config.slim_states) == (32, "reverse")
    with pytest.raises(CheckpointError, match="slim_chunks"):
        golden("sqr").model(slim_chunks=32)


def test_unknown_keys_of_the_reference_are_kept_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    case = golden("sqr")
    config = case.config | {"learning_rate": 0.1, "run": "first", "num_labels": 5}
    with caplog.at_level(logging.WARNING, logger="genesplice_hf"):
        model = genesplice_hf.from_original("slim_performer", config, case.weights)
    assert len(caplog.records) == 1 and "learning_rate, run" in caplog.text
    assert model.config.upstream_config == {"learning_rate": 0.1, "run": "first"}
    assert model.config.num_labels == 5
    assert genesplice_hf.to_original(model)[0] == case.config | {"learning_rate": 0.1, "run": "first"}


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"feature_type": "abs"}, {}, "feature_type.*abs"),
        ({"feature_type": "favor+_0"}, {}, "feature_type.*favor"),
        ({"feature_type": "favor+"}, {}, r"features.*2 tensors of shape \(4, 8, 8\)"),
        ({"feature_type": "favor+"}, {"features": [torch.zeros(4, 8, 8)]}, "got 1"),
        ({"feature_type": "favor+"}, {"features": [torch.zeros(4, 8, 9)] * 2}, "mis-shaped.*features"),
        ({}, {"features": [torch.zeros(4, 8, 8)] * 2}, "leave them out"),
        ({}, {"task": "masked_lm"}, "causal_lm"),
        ({}, {"drop": ("heads",)}, "drop"),
    ],
)
def test_what_does_not_fit_is_advice(changes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    case = golden("sqr")
    with pytest.raises(CheckpointError, match=message):
        genesplice_hf.from_original("slim_performer", case.config | changes, case.weights, **options)


def test_an_unknown_source_or_an_incomplete_config_is_advice() -> None:
    with pytest.raises(CheckpointError, match="slim_performer"):
        genesplice_hf.from_original("slim", {}, {})
    with pytest.raises(CheckpointError, match="hidden_dim, n_layers"):
        genesplice_hf.from_original("slim_performer", {"vocab_size": 8}, {})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"output_projection": True}, "output_projection"),
        ({"position_scheme": "add", "final_norm": True}, "final_norm, position_scheme"),
        ({"feature_map": "softmax"}, "feature_map"),
    ],
)
def test_what_the_reference_lacks_cannot_go_back(fields: dict[str, Any], message: str) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    with pytest.raises(CheckpointError, match=message):
        genesplice_hf.to_original(PerformerForCausalLM(PerformerConfig.slim(**sizes, **fields)))
    with pytest.raises(CheckpointError, match="PerformerModel"):
        genesplice_hf.to_original(PerformerModel(PerformerConfig.slim(**sizes)))
    with pytest.raises(CheckpointError, match="is_decoder"):
        genesplice_hf.to_original(PerformerForMaskedLM(PerformerConfig.slim(**sizes, is_decoder=False)))


def test_models_made_here_go_out_under_the_references_names() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = PerformerForCausalLM(PerformerConfig.slim(**sizes, feature_map="favor+", norm_placement="branch"))
    config, tensors = genesplice_hf.to_original(model)
    assert (config["feature_type"], config["on_gptln"], config["hidden_dim"]) == ("favor+_1", True, 16)
    features = [layer.attention.features for layer in model.performer.layers]
    again = genesplice_hf.from_original("slim_performer", config, tensors, features=features)
    ids = torch.randint(5, 9, (1, 12))
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_a_model_without_a_reference_has_no_way_back() -> None:
    model = PerformerForCausalLM(PerformerConfig.slim(hidden_size=16, num_attention_heads=2, num_hidden_layers=1))
    model.config.model_type = "genesplice"
    with pytest.raises(CheckpointError, match="genesplice"):
        genesplice_hf.to_original(model)


def test_every_source_declares_itself() -> None:
    for name, source in SOURCES.items():
        assert source.name == name
        assert "base" in source.classes
        assert {model.config_class.model_type for model in source.classes.values()} == {source.model_type}
