"""Published Caduceus models through `from_original`: values, gradients, the way back, and faults.

The golden cases come from kuleshov-group/caduceus on mamba-ssm's reference scan (float64, stored as float32); their
README says how. Its ignored label is the pad id.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

import genesplice_hf
from genesplice_hf.errors import CheckpointError
from genesplice_hf.models.caduceus.configuration_caduceus import CaduceusConfig
from genesplice_hf.models.caduceus.conversion_caduceus import FIELDS, backbone_keys
from genesplice_hf.models.caduceus.modeling_caduceus import (
    CaduceusForMaskedLM,
    CaduceusForSequenceClassification,
    CaduceusForTokenClassification,
)
from genesplice_hf.models.caduceus.modeling_caduceus_base import CaduceusModel

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("caduceus_ph", "caduceus_ps", "caduceus_ps_fused")
EVERY_CASE = pytest.mark.parametrize("name", NAMES)
# float32: the README's; float64: what is left of the stored values' rounding.
TOLERANCES = {torch.float32: 3e-5, torch.float64: 1e-6}
EVERY_DTYPE = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
BACKBONE = "caduceus.backbone."
PAD = 4


class Golden(NamedTuple):
    """One case: the reference's config and tensors, the batch, and what came out."""

    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]

    def model(self, dtype: torch.dtype = torch.float32, **options: Any) -> CaduceusForMaskedLM:
        return genesplice_hf.from_original("caduceus", self.config, self.weights, dtype=dtype, **options)

    @property
    def labels(self) -> torch.Tensor:
        return self.inputs["labels"].masked_fill(self.inputs["labels"] == PAD, -100)

    def without(self, *parts: str) -> dict[str, torch.Tensor]:
        """The tensors without those whose key holds one of `parts`."""
        return {key: tensor for key, tensor in self.weights.items() if not any(part in key for part in parts)}


@cache
def golden(name: str) -> Golden:
    folder = GOLDEN / name
    content = json.loads((folder / "config.json").read_text())
    config = {key: content[key] for key in FIELDS if key in content}
    return Golden(config, *(load_file(folder / f"{part}.safetensors") for part in ("weights", "inputs", "outputs")))


def convert(config: dict[str, Any], weights: dict[str, torch.Tensor], **options: Any):
    return genesplice_hf.from_original("caduceus", config, weights, **options)


def same_logits(one: CaduceusForMaskedLM, other: CaduceusForMaskedLM) -> bool:
    ids = golden("caduceus_ph").inputs["input_ids"]
    with torch.no_grad():
        return torch.equal(one(ids).logits, other(ids).logits)


@EVERY_CASE
@EVERY_DTYPE
def test_golden_states_and_logits(name: str, dtype: torch.dtype) -> None:
    case, tolerance = golden(name), TOLERANCES[dtype]
    model, ids, expected = case.model(dtype), case.inputs["input_ids"], case.outputs
    with torch.no_grad():
        outputs = model(ids, output_hidden_states=True)
        complement = torch.tensor(model.config.complement_map)
        other_strand = model(complement[ids].flip(1)).logits
    states = {f"hidden.{layer}": state for layer, state in enumerate(outputs.hidden_states[:-1])}
    found = states | {"logits": outputs.logits, "logits_of_rc_input": other_strand}
    found["last_hidden_state"] = found["hidden.2"] = outputs.hidden_states[-1]
    keys = [key for key in expected if not key.startswith(("grad.", "loss"))]
    assert len(keys) == (6 if name == "caduceus_ps_fused" else 5)
    for key in keys:
        torch.testing.assert_close(found[key], expected[key].to(dtype), rtol=0, atol=tolerance)


@EVERY_CASE
@EVERY_DTYPE
def test_golden_losses_and_gradients(name: str, dtype: torch.dtype) -> None:
    case = golden(name)
    model, ids = case.model(dtype).train(), case.inputs["input_ids"]
    plain = model(ids, labels=case.labels).loss
    loss = model(ids, labels=case.labels, loss_weight=case.inputs["loss_weights"]).loss
    loss.backward()
    for value, key in ((plain, "loss"), (loss, "loss_weighted")):
        torch.testing.assert_close(value, case.outputs[key][0].to(dtype), rtol=0, atol=1e-5)
    names = {BACKBONE + theirs: ours for theirs, ours in backbone_keys(model.config, case.config["fused_add_norm"])}
    keys = [key for key in case.outputs if key.startswith("grad.")]
    assert len(keys) == 5
    for key in keys:
        found = model.caduceus.get_parameter(names[key.removeprefix("grad.")]).grad
        torch.testing.assert_close(found, case.outputs[key].to(dtype), rtol=1e-3, atol=1e-5)


@EVERY_CASE
def test_there_and_back_is_bit_exact(name: str, tmp_path: Path) -> None:
    """Also after our own files, and as often as one likes."""
    case, model = golden(name), golden(name).model()
    assert type(model) is CaduceusForMaskedLM and not model.training
    assert model.config.conversion["ignored_keys"] == []
    model.save_pretrained(tmp_path)
    for ours in (model, AutoModelForMaskedLM.from_pretrained(tmp_path)):
        config, tensors = genesplice_hf.to_original(ours)
        assert config == case.config
        assert tensors.keys() == case.weights.keys()
        assert all(torch.equal(tensors[key], case.weights[key]) for key in tensors)
        again = convert(config, tensors)
        assert all(torch.equal(again.state_dict()[key], value) for key, value in ours.state_dict().items())


@EVERY_CASE
def test_the_order_of_the_halves_follows_the_fused_flag(name: str) -> None:
    order = "exchange" if name == "caduceus_ps_fused" else "straight"
    assert golden(name).model().config.rcps_half_order == order


@EVERY_CASE
def test_tied_tensors_may_be_stored_once(name: str) -> None:
    """The reverse direction's projections, the head, or the forward direction's in place of them."""
    case = golden(name)
    for parts in (("mamba_rev.in_proj", "mamba_rev.out_proj"), ("lm_head",), ("mamba_fwd.in_proj",)):
        thin = case.without(*parts)
        assert len(thin) < len(case.weights)
        assert same_logits(convert(case.config, thin), case.model())


def test_tied_tensors_that_differ_are_refused() -> None:
    case, key = golden("caduceus_ps"), BACKBONE + "layers.1.mixer.submodule.mamba_rev.out_proj.weight"
    with pytest.raises(CheckpointError, match=rf"{key} differs from its twin.*bidirectional_weight_tie"):
        convert(case.config, case.weights | {key: case.weights[key] + 1})
    untied = convert(case.config | {"bidirectional_weight_tie": False}, case.weights | {key: case.weights[key] + 1})
    assert torch.equal(untied.caduceus.layers[1].mixer.reverse_ssm.out_proj.weight, case.weights[key] + 1)
    head = "lm_head.lm_head.weight"
    changed = case.weights | {head: case.weights[head] + 1}
    with pytest.raises(CheckpointError, match=rf"{head} differs from the embedding.*tie_word_embeddings=False"):
        convert(case.config, changed)
    assert torch.equal(convert(case.config, changed, tie_word_embeddings=False).lm_head.weight, case.weights[head] + 1)


def test_all_faults_stand_in_one_error() -> None:
    case = golden("caduceus_ps")
    weights = case.without("layers.0.mixer.submodule.mamba_fwd.A_log")
    weights[BACKBONE + "layers.0.stranger"] = torch.zeros(1)
    cut = BACKBONE + "layers.1.mixer.submodule.mamba_rev.x_proj.weight"
    weights[cut] = weights[cut].T
    with pytest.raises(CheckpointError) as error:
        convert(case.config, weights)
    for part in (
        "missing: caduceus.layers.0.mixer.forward_ssm.A_log",
        "unexpected: caduceus.backbone.layers.0.stranger",
        "mis-shaped: caduceus.layers.1.mixer.reverse_ssm.x_proj.weight is (48, 18), needs (18, 48)",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fused_add_norm": True}, r"unexpected: .*norm_f\.submodule\.weight"),
        ({"rcps": False, "complement_map": None}, r"missing: .*in_proj.*unexpected: .*mamba_fwd"),
        ({"n_layer": 3}, r"missing: .*layers\.2\."),
        ({"complement_map": list(range(12))}, r"complement_map is .*, and `complement_map` of `config` says"),
        ({"complement_map": None}, "`rcps` but no `complement_map`"),
        ({"ssm_cfg": {"d_state": 8, "headdim": 4}}, r"`ssm_cfg` of `config` holds headdim"),
        ({"ssm_cfg": {"d_state": 16}}, r"mis-shaped: .*A_log is \(48, 8\), needs \(48, 16\)"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit(changes: dict[str, Any], message: str) -> None:
    case = golden("caduceus_ps")
    with pytest.raises(CheckpointError, match=message):
        convert(case.config | changes, case.weights)


def test_an_incomplete_config_is_advice() -> None:
    with pytest.raises(CheckpointError, match=r"`config` lacks d_model, n_layer"):
        convert({"vocab_size": 12}, {})


def test_a_config_that_was_padded_before_it_was_saved() -> None:
    """The published code writes the padded vocabulary and map into the config that it saves."""
    case = golden("caduceus_ps")
    padded = {str(token): token for token in range(12, 16)}
    config = case.config | {"vocab_size": 16, "complement_map": case.config["complement_map"] | padded}
    model = convert(config, case.weights)
    assert model.config.vocab_size == 16 and same_logits(model, case.model())
    assert genesplice_hf.to_original(model)[0] == config


def test_missing_fields_have_the_published_defaults() -> None:
    """Those of the reference's class, which differ from the cases' in these two."""
    case, changes = golden("caduceus_ph"), {"fused_add_norm": True, "residual_in_fp32": True}
    kept = {name: case.config[name] for name in ("d_model", "n_layer", "vocab_size", "ssm_cfg")}
    found, expected = convert(kept, case.weights), convert(case.config | changes, case.weights)
    assert found.config.pad_token_id == PAD and same_logits(found, expected)
    for name in ("residual_in_fp32", "fused_add_norm", "norm_epsilon", "rms_norm", "bidirectional_strategy"):
        assert getattr(found.config, name) == getattr(expected.config, name)
    assert genesplice_hf.to_original(found)[0] == kept


@EVERY_CASE
def test_the_tasks(name: str) -> None:
    case, ids = golden(name), golden(name).inputs["input_ids"]
    base = case.model(task="base")
    assert type(base) is CaduceusModel and base.config.conversion["ignored_keys"] == ["lm_head.weight"]
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, case.model().caduceus(ids).last_hidden_state)
    config, tensors = genesplice_hf.to_original(base)
    assert tensors.keys() == {key.removeprefix("caduceus.") for key in case.without("lm_head")}
    assert type(convert(config, tensors)) is CaduceusModel
    with pytest.raises(CheckpointError, match=r"missing: classifier\.out_proj\.bias, classifier\.out_proj\.weight"):
        case.model(task="token_classification")


def test_a_published_classifier() -> None:
    """Its matrix has no bias, and goes back as long as ours stays 0."""
    case, score = golden("caduceus_ps"), torch.randn(3, 24)
    weights = case.without("lm_head") | {"score.weight": score}
    model = convert(case.config | {"num_labels": 3}, weights)
    assert type(model) is CaduceusForSequenceClassification
    ids = case.inputs["input_ids"]
    with torch.no_grad():
        given, other = model.caduceus(ids).last_hidden_state.chunk(2, dim=-1)
        expected = (given.mean(1) + other.flip(1, 2).mean(1)) / 2 @ score.T
        torch.testing.assert_close(model(ids).logits, expected)
    tensors = genesplice_hf.to_original(model)[1]
    assert tensors.keys() == weights.keys() and torch.equal(tensors["score.weight"], score)
    torch.nn.init.ones_(model.classifier.out_proj.bias)
    with pytest.raises(CheckpointError, match="no bias"):
        genesplice_hf.to_original(model)
    with pytest.raises(CheckpointError, match=r"no head for tokens; convert `model\.caduceus`"):
        genesplice_hf.to_original(CaduceusForTokenClassification(model.config))


@pytest.mark.parametrize(
    "fields",
    [
        {"rms_norm": False, "rcps": True},
        {"bidirectional_weight_tie": False, "bidirectional_strategy": "ew_multiply"},
        {"bidirectional": False},
        {"rcps": True, "rcps_half_order": "straight"},
        {"ssm_cfg": {"bias": True, "conv_bias": False, "dt_rank": 2}, "vocab_size": 8},
    ],
    ids=str,
)
def test_models_made_here_go_out_under_the_references_names(fields: dict[str, Any]) -> None:
    sizes = {"d_model": 8, "n_layer": 2, "vocab_size": 16}
    model = CaduceusForMaskedLM(CaduceusConfig(**(sizes | fields))).eval()
    config, tensors = genesplice_hf.to_original(model)
    again = convert(config, tensors)
    ids = torch.randint(3, 7, (1, 12))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.config.rcps_half_order == model.config.rcps_half_order or not model.config.rcps


def test_a_vocabulary_of_another_size_goes_out_unpadded() -> None:
    model = golden("caduceus_ps").model()
    model.resize_token_embeddings(18)
    config, tensors = genesplice_hf.to_original(model)
    assert (config["vocab_size"], config["pad_vocab_size_multiple"]) == (18, 1)
    assert same_logits(convert(config, tensors), model)


def test_plant_caduceus_has_its_own_letters() -> None:
    sizes = {"d_model": 8, "n_layer": 1, "vocab_size": 8, "rcps": True, "complement_map": [0, 1, 2, 6, 5, 4, 3, 7]}
    config, tensors = genesplice_hf.to_original(CaduceusForMaskedLM(CaduceusConfig(**sizes)))
    del config["pad_token_id"]
    model = convert(config, tensors)
    assert (model.config.pad_token_id, model.config.mask_token_id) == (0, 1)
    assert model.config.complement_map == sizes["complement_map"]


def test_a_text_shows_the_order_of_the_halves() -> None:
    """Random weights prefer one order by chance: it is accepted, the other one refused with both losses."""
    case, text = golden("caduceus_ps_fused"), "ACGTTGCANACGGTTACGTTTACAGGCATTACG" * 3
    refused = []
    for order in ("exchange", "straight"):
        try:
            assert case.model(rcps_half_order=order, verify_text=text).config.rcps_half_order == order
        except CheckpointError as error:
            assert f"`rcps_half_order`='{order}' is not the order" in str(error)
            refused.append(order)
    assert len(refused) == 1
    with pytest.raises(CheckpointError, match=r"letters of ACGTN, got XZ"):
        case.model(verify_text="ACXZ")
    with pytest.raises(CheckpointError, match=r"`verify_text` needs a masked LM with `rcps=True`"):
        golden("caduceus_ph").model(verify_text=text)
