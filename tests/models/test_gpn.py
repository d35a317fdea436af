"""GPN: golden cases of songlab-cal/gpn, the conversion both ways, and the laws of its layers.

The golden cases hold float64 results stored as float32; their README says how they were made.

Shapes: B batch, L tokens, E hidden size, V vocabulary.
"""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForMaskedLM, RoFormerConfig
from transformers.models.roformer.modeling_roformer import RoFormerEncoder

import genesplice_hf
from genesplice_hf.adaptation.targets import default_targets
from genesplice_hf.errors import CheckpointError, GeneSpliceError, SequenceError
from genesplice_hf.models.gpn import modeling_gpn_layer
from genesplice_hf.models.gpn.configuration_gpn import GPNConfig
from genesplice_hf.models.gpn.conversion_gpn import SOURCES, module_map
from genesplice_hf.models.gpn.modeling_gpn import (
    GPNForMaskedLM,
    GPNForSequenceClassification,
    GPNForTokenClassification,
)
from genesplice_hf.models.gpn.modeling_gpn_base import GPNModel
from genesplice_hf.models.gpn.modeling_gpn_layer import DilatedConv1d, convolve

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {"gpn_convnet": "gpn_convnet", "gpn_convnet2": "gpn", "gpn_bytenet": "gpn"}
EVERY_CASE = pytest.mark.parametrize("name", CASES)
# float64: the stored values are rounded to float32. float32: what the cases' README demands.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-5}
EVERY_DTYPE = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "intermediate_size": 20,
    "num_attention_heads": 2,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
FORMS: dict[str, dict[str, Any]] = {
    "legacy": {"layout": "legacy"},
    "convnet": {"bias": True, "mlm_head_transform": False},
    "depthwise": {"depthwise": True, "dilation_double_every": 2},
    "bytenet": {"encoder": "bytenet"},
    "roformer": {"encoder": "roformer", "rotary_value": True},
    "table": {"embedding": "embedding"},
}
EVERY_FORM = pytest.mark.parametrize("form", FORMS)
CONVOLUTIONS = pytest.mark.parametrize("form", [form for form in FORMS if form != "roformer"])


class Golden(NamedTuple):
    """One case: the reference's config, tensors, inputs and outputs."""

    source: str
    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]

    def model(self, dtype: torch.dtype = torch.float32, **options: Any) -> GPNForMaskedLM:
        return genesplice_hf.from_original(self.source, self.config, self.weights, dtype=dtype, **options)


@cache
def golden(name: str) -> Golden:
    folder = GOLDEN / name
    config = json.loads((folder / "config.json").read_text())
    for fact in ("case", "reference", "seed", "dtype", "grad_keys"):
        config.pop(fact)
    parts = (load_file(folder / f"{part}.safetensors") for part in ("weights", "inputs", "outputs"))
    return Golden(CASES[name], config, *parts)


def tiny(model_class: type = GPNForMaskedLM, form: str = "convnet", seed: int = 0, **fields: Any) -> Any:
    """A float64 model in evaluation mode whose parameters are all off their initial values."""
    torch.manual_seed(seed)
    model = model_class(GPNConfig(**(SIZES | FORMS[form] | fields))).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance


# The reference


@EVERY_CASE
@EVERY_DTYPE
def test_golden_states(name: str, dtype: torch.dtype) -> None:
    case, kept = golden(name), []
    model = case.model(dtype)
    model.gpn.layers[-1].register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        outputs = model(case.inputs["input_ids"], output_hidden_states=True)
        soft = model(input_probs=case.inputs["input_probs"])
    depth = model.config.num_hidden_layers
    states = [*outputs.hidden_states[:-1], kept[0]]
    # The final norm, where there is one, is what `hidden_states` ends with.
    states += [] if model.gpn.final_norm is None else [outputs.hidden_states[-1]]
    assert len(outputs.hidden_states) == depth + 1
    assert len(states) == len([key for key in case.outputs if key.startswith("hidden.")])
    for index, state in enumerate(states):
        assert_near(state, case.outputs[f"hidden.{index}"], TOLERANCES[dtype])
    assert_near(outputs.logits, case.outputs["logits"], TOLERANCES[dtype])
    assert_near(soft.logits, case.outputs["logits_from_probs"], TOLERANCES[dtype])


@EVERY_CASE
@EVERY_DTYPE
def test_golden_losses_and_gradients(name: str, dtype: torch.dtype) -> None:
    case = golden(name)
    model, ids, labels = case.model(dtype), case.inputs["input_ids"], case.inputs["labels"]
    weight = case.inputs["loss_weight"].to(dtype)
    before = weight.clone()
    loss = model(ids, labels=labels, loss_weight=weight).loss
    loss.backward()
    assert torch.equal(weight, before)
    assert_near(loss[None], case.outputs["loss_weighted"], 1e-5)
    with torch.no_grad():
        assert_near(model(ids, labels=labels).loss[None], case.outputs["loss_unweighted"], 1e-5)
        soft = model(
            input_probs=case.inputs["input_probs"], output_probs=case.inputs["output_probs"], loss_weight=weight
        )
    assert_near(soft.loss[None], case.outputs["loss_soft"], 1e-5)
    modules = module_map(model.config, "masked_lm")
    keys = [key.removeprefix("grad.") for key in case.outputs if key.startswith("grad.")]
    assert len(keys) >= 4
    for key in keys:
        module, _, name_of = key.rpartition(".")
        found = model.get_parameter(f"{modules[module]}.{name_of}").grad
        torch.testing.assert_close(found.float(), case.outputs[f"grad.{key}"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("window", [64, 65])
@EVERY_DTYPE
def test_golden_variant_scores(window: int, dtype: torch.dtype) -> None:
    """Only the logits of the masked base are computed; both strands, then their mean."""
    folder = GOLDEN / "gpn_score"
    config = json.loads((folder / "config.json").read_text())["model"]
    expected = load_file(folder / "outputs.safetensors")
    weights = load_file(folder / "weights.safetensors")
    model = genesplice_hf.from_original("gpn_convnet", config, weights, dtype=dtype)
    ratios = {}
    for strand in ("fwd", "rev"):
        part = {key: expected[f"w{window}.{key}_{strand}"] for key in ("input_ids", "pos", "ref", "alt", "llr")}
        ids = part["input_ids"].scatter(1, part["pos"][:, None], model.config.mask_token_id)
        with torch.no_grad():
            logits = model(ids, logits_positions=part["pos"][:, None]).logits[:, 0]
        ratio = logits.gather(1, part["alt"][:, None]) - logits.gather(1, part["ref"][:, None])
        ratios[strand] = ratio[:, 0]
        assert_near(ratios[strand], part["llr"], TOLERANCES[dtype])
    assert_near((ratios["fwd"] + ratios["rev"]) / 2, expected[f"w{window}.score"], TOLERANCES[dtype])


@pytest.mark.parametrize("rotary_value", [False, True])
def test_the_roformer_encoder_is_that_of_transformers(rotary_value: bool) -> None:
    """The v2 model with a roformer encoder is transformers' encoder between one-hot input and `ln_f`."""
    sizes = {name: SIZES[name] for name in SIZES if name != "initializer_range"} | {"rotary_value": rotary_value}
    torch.manual_seed(0)
    encoder = RoFormerEncoder(RoFormerConfig(vocab_size=7, **sizes))
    encoder.embed_positions.weight.data = encoder.embed_positions.create_weight()
    encoder.double().eval()
    state = {f"encoder.{key}": tensor for key, tensor in encoder.state_dict().items()}
    state["ln_f.weight"] = torch.rand(24, dtype=torch.float64)
    config = {"encoder": "roformer", "layer_norm_eps": 1e-12, **sizes}
    model = genesplice_hf.from_original("gpn", config, state, dtype=torch.float64, bias=False)
    ids = torch.randint(0, 7, (2, 20))
    with torch.no_grad():
        x = encoder(nn.functional.one_hot(ids, 24).double())[0]
        expected = nn.functional.layer_norm(x, (24,), state["ln_f.weight"])
        found = model(ids).last_hidden_state
    assert isinstance(model, GPNModel)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
    again = genesplice_hf.to_original(model)[1]
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], tensor.to(again[key])) for key, tensor in state.items())


def test_the_legacy_model_has_the_published_size() -> None:
    """65,880,071 parameters at the defaults of its config, and its schedule of dilations."""
    config = GPNConfig(layout="legacy")
    with torch.device("meta"):
        model = GPNForMaskedLM(config)
    assert model.num_parameters() == 65_880_071
    assert [config.dilation(layer) for layer in range(8)] == [1, 2, 4, 8, 16, 32, 1, 2]
    assert (config.hidden_dropout_prob, GPNConfig().hidden_dropout_prob) == (0.1, 0.0)
    doubled = GPNConfig(dilation_double_every=2, dilation_cycle=6, dilation_base=3, dilation_max=8)
    assert [doubled.dilation(layer) for layer in range(8)] == [1, 1, 3, 3, 8, 8, 1, 1]


# The way there and back


@EVERY_CASE
def test_there_and_back_is_bit_exact(name: str, tmp_path: Path) -> None:
    case, model = golden(name), golden(name).model()
    assert not model.training
    model.save_pretrained(tmp_path)
    for ours in (model, AutoModelForMaskedLM.from_pretrained(tmp_path)):
        config, tensors = genesplice_hf.to_original(ours)
        assert case.config.items() <= config.items()
        assert tensors.keys() == case.weights.keys()
        assert all(torch.equal(tensors[key], case.weights[key]) for key in tensors)
        again = genesplice_hf.from_original(case.source, config, tensors)
        assert all(torch.equal(again.state_dict()[key], value) for key, value in ours.state_dict().items())


@EVERY_FORM
@pytest.mark.parametrize("model_class", [GPNModel, GPNForMaskedLM])
def test_every_form_goes_out_and_comes_back(form: str, model_class: type) -> None:
    model = tiny(model_class, form).float()
    config, tensors = genesplice_hf.to_original(model)
    source = next(kind.name for kind in SOURCES if kind.original_types == (config["model_type"],))
    again = genesplice_hf.from_original(source, config, tensors)
    assert type(again) is model_class
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    assert again.config.conversion["source"] == source


@pytest.mark.parametrize("head", ["standard", "lightweight_mlp", "lightweight_cnn", "legacy"])
@pytest.mark.parametrize("size", [24, 64])
def test_published_classifiers_go_out_and_come_back(head: str, size: int) -> None:
    """At a width of 64 the lightweight heads have no shortcut map."""
    fields = {"layout": "legacy"} if head == "legacy" else {"classification_head": head}
    names = {0: "a", 1: "b", 2: "c"}
    model = tiny(GPNForSequenceClassification, hidden_size=size, id2label=names, **fields).float()
    config, tensors = genesplice_hf.to_original(model)
    parts = {key.removeprefix("classifier.").rpartition(".")[0] for key in tensors if key.startswith("classifier.")}
    shortcut = {24: True, 64: False}[size]
    expected = {
        "standard": {"ln", "dense", "out_proj"},
        "legacy": {"dense", "out_proj"},
        "lightweight_mlp": {f"mlp{part}.layer.{place}" for part in (1, 2) for place in (0, 1, 3)}
        | {"ln", "final", *(["mlp1.shortcut"] if shortcut else [])},
        "lightweight_cnn": {f"conv{part}.layer.{place}" for part in (1, 2) for place in (0, 2, 5)}
        | {f"mlp.layer.{place}" for place in (0, 1, 3)}
        | {"ln", "final", *(["conv1.shortcut"] if shortcut else [])},
    }
    assert parts == expected[head]
    config["id2label"] = {str(index): label for index, label in names.items()}  # as in a config.json
    source = "gpn_convnet" if head == "legacy" else "gpn"
    again = genesplice_hf.from_original(source, config, tensors)
    assert again.config.id2label == names
    ids = torch.randint(0, 7, (2, 9))
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_binary_token_classifier_of_one_logit_has_two_here() -> None:
    """Sigmoid of one logit is softmax over 0 and that logit; `pos_weight` weighs the positive labels."""
    base = golden("gpn_convnet2")
    weights = {key: tensor for key, tensor in base.weights.items() if not key.startswith("cls.")}
    weights |= {"classifier.weight": torch.randn(1, 32), "classifier.bias": torch.randn(1)}
    config = base.config | {"num_labels": 2, "pos_weight": 3.0}
    model = genesplice_hf.from_original("gpn", config, weights)
    assert isinstance(model, GPNForTokenClassification)
    ids, labels = base.inputs["input_ids"], base.inputs["input_ids"] % 2
    outputs = model(ids, labels=labels)
    state = model.gpn(ids).last_hidden_state
    one = state @ weights["classifier.weight"][0] + weights["classifier.bias"]
    torch.testing.assert_close(outputs.logits.softmax(-1)[..., 1], one.sigmoid())
    expected = nn.functional.binary_cross_entropy_with_logits(one, labels.float(), pos_weight=torch.tensor(3.0))
    torch.testing.assert_close(outputs.loss, expected)
    back = genesplice_hf.to_original(model)[1]
    assert back.keys() == weights.keys() and all(torch.equal(back[key], weights[key]) for key in weights)


@EVERY_CASE
def test_faults_are_named_as_the_reference_names_them(name: str) -> None:
    case = golden(name)
    weights = dict(case.weights)
    lost = next(key for key in weights if ".1." in key)
    cut = next(key for key in weights if ".2." in key and weights[key].dim() > 1)
    weights["model.stranger.weight"] = weights.pop(lost)
    weights[cut] = weights[cut][:-1]
    with pytest.raises(CheckpointError) as error:
        genesplice_hf.from_original(case.source, case.config, weights)
    for part in (f"missing: {lost}", "unexpected: model.stranger.weight", f"mis-shaped: {cut}"):
        assert part in str(error.value)


def test_a_base_says_what_it_left_out() -> None:
    case = golden("gpn_convnet2")
    base = case.model(task="base")
    assert type(base) is GPNModel
    heads = sorted(key for key in case.weights if key.startswith("cls."))
    assert base.config.conversion["ignored_keys"] == heads
    bare = {key.removeprefix("model."): tensor for key, tensor in case.weights.items() if key not in heads}
    automatic = genesplice_hf.from_original("gpn", case.config, bare)
    assert type(automatic) is GPNModel
    ids = case.inputs["input_ids"]
    assert torch.equal(base(ids).last_hidden_state, automatic(ids).last_hidden_state)
    with pytest.raises(CheckpointError, match=r"missing: classifier\.dense"):
        case.model(task="sequence_classification")


def test_a_table_of_other_positions_is_refused() -> None:
    config, tensors = genesplice_hf.to_original(tiny(form="roformer").float())
    key = "model.encoder.embed_positions.weight"
    assert torch.equal(tensors[key][0], torch.tensor([0.0] * 6 + [1.0] * 6))
    with pytest.raises(CheckpointError, match=r"missing: model\.encoder\.embed_positions"):
        genesplice_hf.from_original("gpn", config, {name: x for name, x in tensors.items() if name != key})
    tensors[key] = tensors[key] + 1e-3
    with pytest.raises(CheckpointError, match=r"embed_positions.*0\.001"):
        genesplice_hf.from_original("gpn", config, tensors)


def test_a_model_without_such_a_head_cannot_go_back() -> None:
    with pytest.raises(CheckpointError, match="GPNForTokenClassification"):
        genesplice_hf.to_original(tiny(GPNForTokenClassification, "legacy"))


# Laws of the layers


@CONVOLUTIONS
def test_the_receptive_field_is_the_sum_of_the_layers(form: str) -> None:
    """Beyond it the gradient is exactly 0, at its edges it is not."""
    model = tiny(GPNModel, form, dilation_cycle=8, dilation_max=9999)
    reach, length = (model.config.receptive_field - 1) // 2, 101
    kernels = [model.config.kernel(layer) for layer in range(3)]
    dilations = [1, 1, 2] if form == "depthwise" else [1, 2, 4]
    assert 2 * reach == sum((k - 1) * d for k, d in zip(kernels, dilations, strict=True))
    embeds = model.get_input_embeddings()(torch.randint(3, 7, (1, length))).detach().double().requires_grad_()
    # A weighted sum, for the sum over normalised channels alone would be constant.
    (model(inputs_embeds=embeds).last_hidden_state[0, length // 2] * torch.arange(24)).sum().backward()
    touched = embeds.grad[0].abs().amax(-1).nonzero()[:, 0]
    assert (touched.min(), touched.max()) == (length // 2 - reach, length // 2 + reach)


@EVERY_FORM
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_nothing(form: str, side: str) -> None:
    """With a mask; without one the originals' behaviour, where [PAD] is a token like others, is kept."""
    model, ids = tiny(form=form), torch.randint(3, 7, (1, 13))
    left, right = {"left": (7, 0), "right": (0, 7), "both": (5, 4)}[side]
    padded = nn.functional.pad(ids, (left, right), value=0)
    mask = nn.functional.pad(torch.ones_like(ids), (left, right))
    with torch.no_grad():
        expected = model(ids).logits
        found = model(padded, mask).logits[:, left : left + 13]
        unmasked = model(padded).logits[:, left : left + 13]
    assert_near(found, expected, 1e-12)
    assert (unmasked - expected).abs().max() > 1e-3


@pytest.mark.parametrize("head", ["standard", "lightweight_mlp", "lightweight_cnn"])
@pytest.mark.parametrize("pooling", ["mean", "max", "cls", "last"])
def test_classifiers_pool_real_bases_only(head: str, pooling: str) -> None:
    fields = {"classification_head": head, "classifier_pooling": pooling, "regression_softplus": True}
    model, ids = tiny(GPNForSequenceClassification, **fields), torch.randint(3, 7, (1, 9))
    padded = nn.functional.pad(ids, (4, 3))
    with torch.no_grad():
        expected = model(ids).logits
        found = model(padded, nn.functional.pad(torch.ones_like(ids), (4, 3))).logits
    assert_near(found, expected, 1e-12)
    assert (expected > 0).all()


def test_special_tokens_stay_out_of_the_mean() -> None:
    model, ids = tiny(GPNForSequenceClassification, special_token_ids=[2]), torch.tensor([[3, 2, 4, 5, 2]])
    with torch.no_grad():
        state = model.gpn(ids).last_hidden_state
        expected = model.classifier.project(state[:, [0, 2, 3]].mean(1))
        assert_near(model(ids).logits, expected, 1e-12)


@pytest.mark.parametrize("kind", ["classes", "numbers"])
@pytest.mark.parametrize("form", ["legacy", "convnet", "roformer"])
def test_features_fill_the_columns_after_the_vocabulary(kind: str, form: str) -> None:
    """Species after species, for ids, probabilities and embeddings alike; nothing of the caller's is changed."""
    fields = {"n_aux_features": 10, "aux_features_vocab_size": 5 if kind == "classes" else None}
    model, ids = tiny(form=form, **fields), torch.randint(0, 7, (2, 11))
    classes = torch.randint(0, 5, (2, 11, 2))
    wide = nn.functional.one_hot(classes, 5).flatten(2)
    features = classes if kind == "classes" else wide.double()
    embeds = torch.zeros(2, 11, 24, dtype=torch.float64)
    embeds[..., :7], embeds[..., 7:17] = nn.functional.one_hot(ids, 7), wide
    plain = model.get_input_embeddings()(ids)
    before = plain.clone()
    with torch.no_grad():
        expected = model(inputs_embeds=embeds).logits
        for inputs in (
            {"input_ids": ids},
            {"input_probs": nn.functional.one_hot(ids, 7).double()},
            {"inputs_embeds": plain},
        ):
            assert torch.equal(model(**inputs, aux_features=features).logits, expected)
        assert (model(ids).logits - expected).abs().max() > 1e-3
    assert torch.equal(plain, before)


@pytest.mark.parametrize("form", ["convnet", "table"])
def test_probabilities_are_a_mean_of_tokens(form: str) -> None:
    """A certain probability is the token itself, also with a table of embeddings."""
    model, ids = tiny(GPNModel, form), torch.randint(0, 7, (2, 9))
    certain = nn.functional.one_hot(ids, 7).double()
    assert_near(model(input_probs=certain).last_hidden_state, model(ids).last_hidden_state, 1e-12)


@EVERY_FORM
def test_only_the_asked_positions(form: str) -> None:
    model, ids = tiny(form=form), torch.randint(0, 7, (3, 12))
    places = torch.tensor([[0, 11], [5, 5], [3, 2]])
    labels = ids.masked_fill(ids == 3, -100)
    weight = torch.rand(3, 12, dtype=torch.float64)
    with torch.no_grad():
        whole = model(ids).logits
        found = model(ids, labels=labels, loss_weight=weight, logits_positions=places)
    expected = whole.gather(1, places[..., None].expand(-1, -1, 7))
    assert_near(found.logits, expected, 1e-12)
    kept, share = labels.gather(1, places), weight.gather(1, places)
    share = share * (kept != -100)
    losses = nn.functional.cross_entropy(expected.flatten(0, 1), kept.flatten(), reduction="none")
    torch.testing.assert_close(found.loss, (losses * share.flatten()).sum() / share.sum())


def test_nothing_asked_is_a_loss_of_zero() -> None:
    model, ids = tiny(), torch.randint(3, 7, (1, 6))
    for targets in ({"labels": torch.full_like(ids, -100)}, {"output_probs": torch.zeros(1, 6, 7)}):
        model.zero_grad()
        loss = model(ids, **targets).loss
        loss.backward()
        assert loss == 0
        assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
    probs = torch.eye(7)[ids]
    counted = model(ids, output_probs=probs, num_items_in_batch=12).loss
    torch.testing.assert_close(counted, model(ids, labels=ids).loss / 2)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.tensor([[3, 7]])}, "0 to 6.*got 7"),
        ({"input_ids": torch.tensor([[3, -1]])}, "got -1"),
        ({"input_ids": torch.tensor([[3]]), "input_probs": torch.ones(1, 1, 7)}, "exactly one"),
        ({"input_probs": torch.ones(1, 1, 6)}, r"input_probs.*7.*\(1, 1, 6\)"),
        ({"input_ids": torch.tensor([[3]]), "aux_features": torch.zeros(1, 1, 1)}, "n_aux_features"),
        ({"input_ids": torch.tensor([[3]]), "logits_positions": torch.zeros(2, 1).long()}, "logits_positions"),
    ],
)
def test_bad_input_is_advice(inputs: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(SequenceError, match=message):
        tiny()(**inputs)


def test_more_bad_input_is_advice() -> None:
    ids = torch.randint(3, 7, (1, 33))
    with pytest.raises(SequenceError, match=r"33 bases.*32"):
        tiny(form="roformer")(ids)
    tiny(form="roformer")(ids, torch.tensor([[1] * 32 + [0]]))
    with pytest.raises(GeneSpliceError, match="not both"):
        tiny()(ids, labels=ids, output_probs=torch.ones(1, 33, 7))
    model = tiny(n_aux_features=10)
    with pytest.raises(SequenceError, match=r"\(1, 33, 2\).*\(1, 33, 3\)"):
        model(ids, aux_features=torch.zeros(1, 33, 3).long())
    with pytest.raises(SequenceError, match=r"aux_features_vocab_size.*got 5"):
        model(ids, aux_features=torch.full((1, 33, 2), 5))
    with pytest.raises(GeneSpliceError, match="auxiliary features"):
        model.resize_token_embeddings(8)
    with pytest.raises(GeneSpliceError, match="hidden_size"):
        tiny().resize_token_embeddings(25)


# Adapters, initialisation, compilation


TARGETS = {
    "legacy": ({"conv", "ffn"}, {"ffn"}, set()),
    "depthwise": ({"conv_proj", "ffn_in", "ffn_out"}, {"ffn_out"}, {"ffn_out"}),
    "bytenet": ({"proj_in", "proj_out"}, {"proj_out"}, {"proj_out"}),
    "roformer": ({"query", "value"}, {"key", "value", "down_proj"}, {"down_proj"}),
}


@pytest.mark.parametrize("form", TARGETS)
def test_every_encoder_has_its_own_adapter_targets(form: str) -> None:
    model = tiny(form=form)
    found = [set(default_targets(model, name)) for name in ("lora_targets", "ia3_targets", "ia3_feedforward")]
    assert tuple(found) == TARGETS[form]
    # Also where PEFT looks them up by itself.
    adapted = get_peft_model(model, LoraConfig(r=2))
    names = {name.split(".lora_A")[0].split(".")[-1] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert names == TARGETS[form][0]


@pytest.mark.parametrize(("taps", "dilation", "bias"), [(9, 1, True), (5, 4, False), (1, 1, True)])
def test_channels_last_is_the_convolution_itself(taps: int, dilation: int, bias: bool) -> None:
    torch.manual_seed(0)
    conv = DilatedConv1d(6, 8, taps, padding=(taps - 1) * dilation // 2, bias=bias).double()
    x_BLE = torch.randn(2, 11, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 11, dtype=torch.bool).index_fill(1, torch.arange(4), 0)
    found, plain = convolve(conv, x_BLE, mask), conv((x_BLE * mask[..., None]).transpose(1, 2)).transpose(1, 2)
    weights = torch.randn_like(plain)
    wanted = [x_BLE, *conv.parameters()]
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), wanted) for y in (found, plain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("form", "fast"), [("legacy", 3), ("convnet", 3), ("bytenet", 3), ("depthwise", 1)])
def test_every_full_convolution_of_a_model_goes_channels_last(
    form: str, fast: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Depthwise ones, all but the first layer's, do not."""
    seen, original = [], modeling_gpn_layer._channels_last
    monkeypatch.setattr(modeling_gpn_layer, "_channels_last", lambda *given: seen.append(1) or original(*given))
    tiny(GPNModel, form)(torch.randint(3, 7, (1, 9)))
    assert len(seen) == fast


def test_lora_on_a_dilated_convolution_is_dilated() -> None:
    """PEFT copies kernel, stride and padding; merged and unmerged agree only if the copy has the dilation too."""
    model, ids = tiny(form="legacy"), torch.randint(3, 7, (1, 30))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["conv"], init_lora_weights=False)).double().eval()
    inner = adapted.base_model.model.gpn.layers[2].conv
    assert inner.lora_A["default"].dilation == inner.base_layer.dilation == (4,)
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        assert_near(adapted.merge_and_unload()(ids).logits, expected, 1e-9)


@EVERY_FORM
def test_models_are_made_without_memory_and_without_a_word(form: str, capfd: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        for model_class in (GPNModel, GPNForMaskedLM, GPNForSequenceClassification, GPNForTokenClassification):
            model = model_class(GPNConfig(**(SIZES | FORMS[form])))
            assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("form", ["legacy", "convnet", "bytenet", "roformer"])
def test_the_graph_is_one(form: str) -> None:
    """`torch.compile(fullgraph=True)` finds no break; the backend runs what was captured as it is."""
    model, ids = tiny(form=form), torch.randint(3, 7, (2, 15))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_near(compiled(ids).logits, model(ids).logits, 1e-12)


def test_saved_and_loaded_elsewhere_is_the_same(tmp_path: Path) -> None:
    """By the Auto class of a fresh process."""
    model, ids = tiny(form="legacy").float(), torch.randint(3, 7, (1, 20))
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch, genesplice_hf; from transformers import AutoModelForMaskedLM;"
        f"model = AutoModelForMaskedLM.from_pretrained({str(tmp_path)!r});"
        f"torch.save(model(torch.tensor({ids.tolist()})).logits.detach(), {str(tmp_path / 'logits.pt')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), model(ids).logits)
