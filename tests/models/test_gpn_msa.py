"""GPN-MSA: the golden case of songlab-cal/gpn, the conversion both ways, aligned species and padding.

The golden case holds float64 results stored as float32; its README says how they were made.

Shapes: B batch, L tokens, S aligned species, E hidden size.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForMaskedLM, RoFormerConfig
from transformers.models.roformer.modeling_roformer import RoFormerEncoder

import genesplice_hf
from genesplice_hf.adaptation.adapt import adapt
from genesplice_hf.errors import CheckpointError, GeneSpliceError, SequenceError
from genesplice_hf.models.gpn_msa.configuration_gpn_msa import GPNMSAConfig
from genesplice_hf.models.gpn_msa.conversion_gpn_msa import BIASES, TABLE, module_map
from genesplice_hf.models.gpn_msa.modeling_gpn_msa import (
    GPNMSAForMaskedLM,
    GPNMSAForSequenceClassification,
    GPNMSAForTokenClassification,
    GPNMSAModel,
)
from genesplice_hf.tokenization.tokenization_nucleotide import MSATokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "gpn_msa"
# float64: the stored values are rounded to float32. float32: what the case's README demands.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-5}
EVERY_DTYPE = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
HEADS = [GPNMSAForMaskedLM, GPNMSAForSequenceClassification, GPNMSAForTokenClassification]
SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 40,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
}


class Golden(NamedTuple):
    """The reference's config, tensors, inputs and outputs."""

    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]

    def model(self, dtype: torch.dtype = torch.float32, **options: Any) -> GPNMSAForMaskedLM:
        return genesplice_hf.from_original("gpn_msa", self.config, self.weights, dtype=dtype, **options)


@cache
def golden() -> Golden:
    config = json.loads((GOLDEN / "config.json").read_text())
    for fact in ("case", "reference", "seed", "dtype", "grad_keys"):
        config.pop(fact)
    return Golden(config, *(load_file(GOLDEN / f"{part}.safetensors") for part in ("weights", "inputs", "outputs")))


def tiny(model_class: type = GPNMSAForMaskedLM, seed: int = 0, **fields: Any) -> Any:
    """A float64 model in evaluation mode that sees three species."""
    torch.manual_seed(seed)
    config = GPNMSAConfig(**({"n_aux_features": 15, "initializer_range": 0.3} | SIZES | fields))
    return model_class(config).double().eval()


def alignment(rows: int = 2, length: int = 13) -> dict[str, torch.Tensor]:
    """Ids of the reference row and of three aligned ones."""
    return {"input_ids": torch.randint(1, 6, (rows, length)), "aux_features": torch.randint(0, 5, (rows, length, 3))}


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance


@EVERY_DTYPE
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_golden(dtype: torch.dtype, attn_implementation: str) -> None:
    case = golden()
    model = case.model(dtype)
    model.set_attn_implementation(attn_implementation)
    inputs = {name: case.inputs[name] for name in ("input_ids", "aux_features", "labels")}
    weight = case.inputs["loss_weight"].to(dtype)
    before = weight.clone()
    outputs = model(**inputs, loss_weight=weight, output_hidden_states=True)
    outputs.loss.backward()
    assert torch.equal(weight, before)
    assert len(outputs.hidden_states) == 3
    for index, state in enumerate(outputs.hidden_states):
        assert_near(state, case.outputs[f"hidden.{index}"], TOLERANCES[dtype])
    assert_near(outputs.logits, case.outputs["logits"], TOLERANCES[dtype])
    assert_near(outputs.loss[None], case.outputs["loss_weighted"], 1e-5)
    assert_near(model(**inputs).loss[None], case.outputs["loss_unweighted"], 1e-5)
    modules = module_map(model.config, "masked_lm")
    keys = [key.removeprefix("grad.") for key in case.outputs if key.startswith("grad.")]
    assert len(keys) == 4
    for key in keys:
        module, _, name = key.rpartition(".")
        found = model.get_parameter(f"{modules[module]}.{name}").grad
        torch.testing.assert_close(found.float(), case.outputs[f"grad.{key}"], rtol=1e-4, atol=1e-6)


def test_the_network_is_transformers_roformer() -> None:
    """The layers in one place each, against the library's encoder with its stored table."""
    torch.manual_seed(0)
    encoder = RoFormerEncoder(RoFormerConfig(rotary_value=True, **SIZES))
    encoder.embed_positions.weight.data = encoder.embed_positions.create_weight()
    encoder.double().eval()
    state = {f"model.encoder.{key}": tensor for key, tensor in encoder.state_dict().items()}
    config = {"n_aux_features": 15, "rotary_value": True, **SIZES}
    model = genesplice_hf.from_original("gpn_msa", config, state, dtype=torch.float64)
    assert type(model) is GPNMSAModel
    inputs = alignment()
    columns = [nn.functional.one_hot(inputs["input_ids"], 6)]
    columns += [nn.functional.one_hot(inputs["aux_features"][..., species], 5) for species in range(3)]
    x = nn.functional.pad(torch.cat(columns, dim=-1), (0, 3)).double()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).last_hidden_state, encoder(x)[0], atol=1e-12, rtol=1e-9)


def test_there_and_back_is_bit_exact(tmp_path: Path) -> None:
    case, model = golden(), golden().model()
    model.save_pretrained(tmp_path)
    for ours in (model, AutoModelForMaskedLM.from_pretrained(tmp_path)):
        config, tensors = genesplice_hf.to_original(ours)
        assert case.config.items() <= config.items()
        assert tensors.keys() == case.weights.keys()
        assert all(torch.equal(tensors[key], case.weights[key]) for key in tensors)
        again = genesplice_hf.from_original("gpn_msa", config, tensors)
        assert all(torch.equal(again.state_dict()[key], value) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("kept", BIASES)
def test_the_bias_may_be_stored_once(kept: str) -> None:
    case = golden()
    (other,) = set(BIASES) - {kept}
    weights = {key: tensor for key, tensor in case.weights.items() if key != other}
    model = genesplice_hf.from_original("gpn_msa", case.config, weights)
    assert torch.equal(model.lm_head.decoder.bias, case.weights[kept])
    with pytest.raises(CheckpointError, match="one parameter"):
        genesplice_hf.from_original("gpn_msa", case.config, case.weights | {other: case.weights[other] + 1})


def test_faults_are_named_as_the_reference_names_them() -> None:
    case = golden()
    weights = dict(case.weights)
    weights["model.stranger"] = weights.pop("model.encoder.layer.1.attention.self.key.bias")
    weights["model.encoder.layer.0.output.dense.weight"] = weights["model.encoder.layer.0.output.dense.weight"].T
    with pytest.raises(CheckpointError) as error:
        genesplice_hf.from_original("gpn_msa", case.config, weights)
    for part in (
        "missing: model.encoder.layer.1.attention.self.key.bias",
        "unexpected: model.stranger",
        "mis-shaped: model.encoder.layer.0.output.dense.weight is (96, 48), needs (48, 96)",
    ):
        assert part in str(error.value)


def test_an_unfilled_table_of_positions_is_refused() -> None:
    """As a class of the reference has it that was made, not loaded, under transformers 5."""
    case = golden()
    drawn = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    with pytest.raises(CheckpointError, match=r"embed_positions.*before it was filled"):
        genesplice_hf.from_original("gpn_msa", case.config, case.weights | {TABLE: drawn})


def test_a_base_says_what_it_left_out_and_other_heads_have_no_reference() -> None:
    base = golden().model(task="base")
    heads = sorted(key for key in golden().weights if key.startswith("cls."))
    assert base.config.conversion["ignored_keys"] == heads
    config, tensors = genesplice_hf.to_original(base)
    assert config["architectures"] == ["GPNRoFormerModel"] and "encoder.layer.0.output.dense.weight" in tensors
    again = genesplice_hf.from_original("gpn_msa", config, tensors)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in base.state_dict().items())
    with pytest.raises(CheckpointError, match="GPNMSAForTokenClassification"):
        genesplice_hf.to_original(tiny(GPNMSAForTokenClassification))


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("rotary_value", [False, True])
@pytest.mark.parametrize("model_class", HEADS)
def test_padding_changes_nothing(model_class: type, rotary_value: bool, attn_implementation: str) -> None:
    """On either side, with the species that stand there; rotated values need positions of the row's own."""
    model = tiny(model_class, rotary_value=rotary_value, attn_implementation=attn_implementation)
    inputs = alignment(1)
    padded = {
        "input_ids": nn.functional.pad(inputs["input_ids"], (5, 4)),
        "aux_features": nn.functional.pad(inputs["aux_features"], (0, 0, 5, 4), value=3),
        "attention_mask": nn.functional.pad(torch.ones(1, 13), (5, 4)),
    }
    with torch.no_grad():
        expected, found = model(**inputs).logits, model(**padded).logits
    assert_near(found if found.dim() == 2 else found[:, 5:18], expected, 1e-12)


def test_the_tokenizers_ids_are_the_models_columns() -> None:
    tokenizer, config = MSATokenizer(), GPNMSAConfig()
    assert tokenizer("-ACGT?")["input_ids"] == list(range(config.vocab_size))
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (config.pad_token_id, config.mask_token_id)
    rows = tokenizer.encode_alignment(["ACGT-N", "AC-TTA", "TTTTTT", "------"])
    model = tiny().float()
    inputs = {"input_ids": torch.tensor(rows[:1]), "aux_features": torch.tensor(rows[1:].T[None])}
    state = model.gpn_msa(**inputs, output_hidden_states=True).hidden_states[0][0]
    # A; then A, T and a gap of the three species at 0-based position 0.
    assert state[0].nonzero()[:, 0].tolist() == [1, 6 + 1, 11 + 4, 16 + 0]
    assert state[4].nonzero()[:, 0].tolist() == [0, 6 + 4, 11 + 4, 16 + 0]


def test_the_species_matter_and_are_checked() -> None:
    model, inputs = tiny(), alignment()
    with torch.no_grad():
        expected = model(**inputs).logits
        swapped = model(inputs["input_ids"], aux_features=inputs["aux_features"].roll(1, dims=2)).logits
        without = model(inputs["input_ids"]).logits
        numbers = tiny(aux_features_vocab_size=None)(
            inputs["input_ids"], aux_features=nn.functional.one_hot(inputs["aux_features"], 5).flatten(2).float()
        ).logits
    assert (expected - swapped).abs().max() > 1e-3 and (expected - without).abs().max() > 1e-3
    assert_near(numbers, expected, 1e-12)
    for features, message in (
        (inputs["aux_features"][..., :2], r"\(2, 13, 3\).*\(2, 13, 2\)"),
        (inputs["aux_features"] + 1, "got 5"),
    ):
        with pytest.raises(SequenceError, match=message):
            model(inputs["input_ids"], aux_features=features)
    with pytest.raises(SequenceError, match="n_aux_features"):
        tiny(n_aux_features=0)(**inputs)
    with pytest.raises(SequenceError, match=r"41 bases.*40"):
        model(torch.ones(1, 41).long())


@pytest.mark.parametrize("model_class", HEADS)
@pytest.mark.parametrize("method", ["lora", "ia3", "layer_norm"])
def test_adapters_and_checkpointing_train_with_species(model_class: type, method: str) -> None:
    """The same gradients with and without checkpointing, none of them all zero in the head or the adapter's layers."""
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        inputs = alignment()
        labels = torch.tensor([0, 1]) if model_class is HEADS[1] else inputs["input_ids"] % 2
        options = {"lora_dropout": 0.0, "init_lora_weights": False} if method == "lora" else {}
        model = adapt(tiny(model_class, num_labels=2), method, **options).double().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs, labels=labels).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert gradient.any(), name
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.parametrize("pooling", ["mean", "max", "cls", "last"])
def test_poolings(pooling: str) -> None:
    model = tiny(GPNMSAForSequenceClassification, classifier_pooling=pooling, special_token_ids=[0])
    ids = torch.tensor([[0, 1, 2, 3, 0]])
    with torch.no_grad():
        state = model.gpn_msa(ids).last_hidden_state
        pooled = {
            "mean": state[:, 1:4].mean(1),
            "max": state[:, 1:4].amax(1),
            "cls": state[:, 0],
            "last": state[:, 4],
        }[pooling]
        assert_near(model(ids).logits, model.classifier(pooled), 1e-12)


def test_only_the_asked_positions() -> None:
    model, inputs = tiny(), alignment()
    places = torch.tensor([[0, 12], [5, 5]])
    with torch.no_grad():
        whole = model(**inputs).logits
        found = model(**inputs, labels=inputs["input_ids"], logits_positions=places)
    expected = whole.gather(1, places[..., None].expand(-1, -1, 6))
    assert_near(found.logits, expected, 1e-12)
    labels = inputs["input_ids"].gather(1, places)
    torch.testing.assert_close(found.loss, nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten()))


def test_columns_of_species_do_not_become_tokens() -> None:
    model = tiny()
    assert model.resize_token_embeddings(6) is model.get_input_embeddings()
    with pytest.raises(GeneSpliceError, match="auxiliary features"):
        model.resize_token_embeddings(7)
    plain = tiny(n_aux_features=0)
    plain.resize_token_embeddings(5, pad_to_multiple_of=4)
    assert (plain.config.vocab_size, plain.lm_head.decoder.out_features) == (8, 8)
    assert plain(torch.tensor([[7, 1]])).logits.shape == (1, 2, 8)


def test_the_graph_is_one() -> None:
    model, inputs = tiny(), alignment()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_near(compiled(**inputs).logits, model(**inputs).logits, 1e-12)
