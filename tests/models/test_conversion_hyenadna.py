"""HyenaDNA's original weights: values, gradients, the way back, the two layouts and their faults.

The golden case comes from HazyResearch's standalone implementation (float64, stored as float32); its README says how.

Shapes: B batch, L tokens, E hidden size, V vocabulary.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import genesplice_hf
from genesplice_hf.errors import CheckpointError
from genesplice_hf.models.hyenadna.configuration_hyenadna import HyenaDNAConfig
from genesplice_hf.models.hyenadna.modeling_hyenadna import (
    HyenaDNAForCausalLM,
    HyenaDNAForSequenceClassification,
    HyenaDNAForTokenClassification,
)
from genesplice_hf.models.hyenadna.modeling_hyenadna_base import HyenaDNAModel
from genesplice_hf.models.hyenadna.modeling_hyenadna_layer import decay_rates, filter_positions

FOLDER = Path(__file__).parents[1] / "golden/hyenadna"
# What a fixture says of itself beside the original's config.
FACTS = {"case", "reference", "seed", "dtype", "grad_keys"}
Tensors = dict[str, torch.Tensor]
# Hidden states and logits, loss, gradients; float64 against values rounded to float32.
TOLERANCES = {torch.float64: (1e-6, 1e-6, 1e-6), torch.float32: (1e-4, 2e-5, 1e-4)}
EVERY_DTYPE = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
BOTH_LENGTHS = pytest.mark.parametrize("length", ["full", "short"])


class Golden(NamedTuple):
    config: dict[str, Any]
    grad_keys: list[str]
    weights: Tensors
    inputs: Tensors
    outputs: Tensors

    def model(self, **options: Any) -> Any:
        return genesplice_hf.from_original("hyenadna", self.config, self.weights, **options)


@cache
def golden() -> Golden:
    facts = json.loads((FOLDER / "config.json").read_text())
    config = {name: value for name, value in facts.items() if name not in FACTS}
    return Golden(config, facts["grad_keys"], *(load_file(FOLDER / f"{part}.safetensors") for part in
                                                ("weights", "inputs", "outputs")))  # fmt: skip


def assert_near(found: torch.Tensor, expected: torch.Tensor, atol: float, rtol: float = 0) -> None:
    torch.testing.assert_close(found.double(), expected.double().view_as(found), atol=atol, rtol=rtol)


@EVERY_DTYPE
@BOTH_LENGTHS
def test_golden_states(dtype: torch.dtype, length: str) -> None:
    case, (atol, loss_atol, _) = golden(), TOLERANCES[dtype]
    model, ids = case.model(dtype=dtype), case.inputs[f"input_ids_{length}"]
    found: Tensors = {}
    for index, layer in enumerate(model.hyenadna.layers):

        def keep(module: Any, args: Any, output: Any, index: int = index) -> None:
            found[f"layer{index}.hidden"], found[f"layer{index}.residual"] = output

        layer.register_forward_hook(keep)
    with torch.no_grad():
        outputs = model(ids, labels=ids, output_hidden_states=True)
        head = case.model(dtype=dtype, task="sequence_classification")(ids).logits
    assert torch.equal(outputs.hidden_states[1], found["layer0.hidden"])
    found |= {"embed": outputs.hidden_states[0], "last_hidden_state": outputs.hidden_states[-1]}
    found |= {"logits_tied": outputs.logits, "head_logits": head}
    for name, tensor in found.items():
        assert_near(tensor, case.outputs[f"{length}.{name}"], atol)
    assert_near(outputs.loss, case.outputs[f"{length}.loss_causal"], loss_atol)


@EVERY_DTYPE
def test_golden_filter_and_gradients(dtype: torch.dtype) -> None:
    case, (atol, _, grad_atol) = golden(), TOLERANCES[dtype]
    model, ids = case.model(dtype=dtype), case.inputs["input_ids_short"]
    with torch.no_grad():
        assert_near(model.hyenadna.layers[0].mixer.filter(128, dtype)[0].T, case.outputs["full.filter0"], atol)
    model(ids, labels=ids).loss.backward()
    ours = {
        "backbone.embeddings.word_embeddings.weight": "word_embeddings.weight",
        "backbone.layers.0.mixer.in_proj.weight": "layers.0.mixer.in_proj.weight",
        "backbone.layers.1.mixer.filter_fn.implicit_filter.2.weight": "layers.1.mixer.filter.linears.1.weight",
        "backbone.layers.0.mixer.filter_fn.bias": "layers.0.mixer.filter.bias",
        "backbone.layers.0.mixer.filter_fn.implicit_filter.1.freq": "layers.0.mixer.filter.freq",
        "backbone.layers.1.mlp.fc1.weight": "layers.1.mlp.fc1.weight",
    }
    assert set(ours) == set(case.grad_keys)
    for key, name in ours.items():
        gradient = model.get_parameter(f"hyenadna.{name}").grad
        assert_near(gradient, case.outputs[f"grad.{key}"], grad_atol, rtol=1e-3 if dtype == torch.float32 else 1e-6)


def test_what_the_tensors_and_the_config_say() -> None:
    model = golden().model()
    assert type(model) is HyenaDNAForCausalLM and not model.training
    assert model.lm_head.weight is model.hyenadna.word_embeddings.weight
    assert (model.config.vocab_size, model.config.max_seq_len, model.config.num_labels) == (16, 128, 2)
    assert model.config.filter_positions == "stored"
    assert model.config.conversion["ignored_keys"] == ["head.output_transform.bias", "head.output_transform.weight"]
    assert type(golden().model(task="base")) is HyenaDNAModel


def is_of_head(key: str) -> bool:
    return key.startswith("head.")


@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification", "base"])
def test_there_and_back_is_bit_exact(task: str, tmp_path: Path) -> None:
    case = golden()
    model = case.model(task=task)
    model.save_pretrained(tmp_path)
    for ours in (model, type(model).from_pretrained(tmp_path)):
        config, tensors = genesplice_hf.to_original(ours)
        assert config == case.config
        expected = {key for key in case.weights if task == "sequence_classification" or not is_of_head(key)}
        assert tensors.keys() == expected
        assert all(torch.equal(tensors[key], case.weights[key]) for key in tensors)
        again = genesplice_hf.from_original("hyenadna", config, tensors, task=task)
        assert all(torch.equal(again.state_dict()[key], value) for key, value in ours.state_dict().items())


def by_the_rule() -> Tensors:
    """The golden weights with the positions and decay rates that every published model has."""
    case, weights = golden(), dict(golden().weights)
    config = case.model().config
    positions, times = filter_positions(config)
    for layer in range(2):
        place = f"backbone.layers.{layer}.mixer.filter_fn."
        weights |= {f"{place}pos_emb.z": positions.clone(), f"{place}pos_emb.t": times.clone()}
        weights[f"{place}modulation.deltas"] = decay_rates(config).clone()
    return {key: tensor for key, tensor in weights.items() if not is_of_head(key)}


def test_positions_that_follow_the_rule_are_not_stored() -> None:
    case, weights = golden(), by_the_rule()
    model = genesplice_hf.from_original("hyenadna", case.config, weights)
    assert model.config.filter_positions == "computed"
    assert not [key for key in model.state_dict() if key.endswith(("positions", "times", "decay"))]
    config, tensors = genesplice_hf.to_original(model)
    assert config == case.config and tensors.keys() == weights.keys()
    assert all(torch.equal(tensors[key], weights[key]) for key in tensors)
    ids = case.inputs["input_ids_short"]
    key = "backbone.layers.1.mixer.filter_fn.pos_emb.z"
    rounded = weights | {key: weights[key] + 5e-7}
    near = genesplice_hf.from_original("hyenadna", case.config, rounded)
    assert torch.equal(near(ids).logits, model(ids).logits)
    other = genesplice_hf.from_original("hyenadna", case.config, weights | {key: weights[key] + 5e-6})
    assert other.config.filter_positions == "stored"
    assert torch.equal(genesplice_hf.to_original(other)[1][key], weights[key] + 5e-6)


def test_trained_positions_stay_parameters() -> None:
    config = golden().config | {"layer": golden().config["layer"] | {"lr_pos_emb": 1e-5}}
    model = genesplice_hf.from_original("hyenadna", config, by_the_rule())
    assert model.config.filter_positions == "trained"
    assert model.hyenadna.layers[0].mixer.filter.positions.requires_grad
    assert genesplice_hf.to_original(model)[0] == config


def flat_config() -> dict[str, Any]:
    """The golden config in the form of the `-hf` repositories."""
    return {
        "activation_freq": 10, "d_inner": 128, "d_model": 32, "emb_dim": 5, "embed_dropout": 0.1, "filter_order": 16,
        "hyena_dropout": 0.0, "hyena_filter_dropout": 0.0, "hyena_order": 2, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "max_seq_len": 128, "n_layer": 2, "num_inner_mlps": 2, "pad_token_id": 4,
        "pad_vocab_size_multiple": 8, "short_filter_order": 3, "tie_word_embeddings": False, "train_freq": True,
        "use_bias": True, "vocab_size": 12,
    }  # fmt: skip


def hf_layout(weights: Tensors) -> Tensors:
    """One name for the shared frequencies, a head of its own, other names in front."""
    kept = {
        f"hyena.{key}": tensor for key, tensor in weights.items() if not key.endswith((".3.freq", ".5.freq", "deltas"))
    }
    kept |= {f"hyena.{key}": tensor for key, tensor in weights.items() if key.endswith("deltas")}
    return kept | {"lm_head.weight": weights["backbone.embeddings.word_embeddings.weight"] * 1.5}


def checkpoint_layout(weights: Tensors) -> Tensors:
    """A training run's file: `model.` in front, mixers and networks wrapped, the tied matrix written twice."""
    renamed = {
        "model." + key.replace(".mixer.", ".mixer.layer.").replace(".mlp.", ".mlp.layer."): tensor
        for key, tensor in weights.items()
    }
    return renamed | {"model.lm_head.weight": weights["backbone.embeddings.word_embeddings.weight"].clone()}


def test_the_layout_of_hf_repositories() -> None:
    case, weights = golden(), hf_layout(by_the_rule())
    model = genesplice_hf.from_original("hyenadna", flat_config() | {"model_type": "hyenadna"}, weights)
    assert not model.config.tie_word_embeddings
    ids = case.inputs["input_ids_full"]
    plain = genesplice_hf.from_original("hyenadna", case.config, by_the_rule())
    torch.testing.assert_close(model(ids).logits, plain(ids).logits * 1.5)
    config, tensors = genesplice_hf.to_original(model)
    assert config == flat_config()
    assert tensors.keys() == weights.keys()
    assert all(torch.equal(tensors[key], weights[key]) for key in tensors)


@pytest.mark.parametrize("is_nested", [False, True])
def test_the_layout_of_training_checkpoints(is_nested: bool) -> None:
    case, weights = golden(), checkpoint_layout(by_the_rule())
    given: Any = {"state_dict": weights} if is_nested else weights
    model = genesplice_hf.from_original("hyenadna", case.config, given)
    assert model.config.tie_word_embeddings
    plain = genesplice_hf.from_original("hyenadna", case.config, by_the_rule())
    ids = case.inputs["input_ids_full"]
    assert torch.equal(model(ids).logits, plain(ids).logits)
    _, tensors = genesplice_hf.to_original(model)
    assert tensors.keys() == weights.keys()
    assert all(torch.equal(tensors[key], weights[key]) for key in tensors)


def test_what_is_never_read_is_left_out_and_comes_back_as_zeros() -> None:
    layer = golden().config["layer"] | {"modulate": False, "bias": False}
    config = golden().config | {"layer": layer}
    weights = golden().weights
    model = genesplice_hf.from_original("hyenadna", config, weights)
    unread = [key for key in weights if key.endswith(("filter_fn.bias", "deltas"))]
    assert set(unread) <= set(model.config.conversion["ignored_keys"])
    back, tensors = genesplice_hf.to_original(model)
    assert back == config
    assert all(tensors[key].shape == weights[key].shape and not tensors[key].any() for key in unread)


def test_models_made_here_go_out_and_come_back() -> None:
    sizes: dict[str, Any] = {"d_model": 8, "n_layer": 2, "d_inner": 16, "max_seq_len": 32, "filter_order": 4}
    for fields in ({}, {"num_inner_mlps": 1, "hyena_order": 3, "short_filter_order": 3, "vocab_size": 20}):
        for tied in (True, False):
            model = HyenaDNAForCausalLM(HyenaDNAConfig(**sizes, **fields, tie_word_embeddings=tied)).eval()
            again = genesplice_hf.from_original("hyenadna", *genesplice_hf.to_original(model))
            ids = torch.randint(7, 12, (1, 20))
            assert torch.equal(again(ids).logits, model(ids).logits)
            assert again.config.tie_word_embeddings == tied


def test_our_own_files_load_through_the_auto_class(tmp_path: Path) -> None:
    model, ids = golden().model(), golden().inputs["input_ids_full"]
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


LOST = [
    ("backbone.layers.1.mixer.in_proj.weight", "layers.1.mixer.in_proj.weight"),
    ("backbone.layers.0.mixer.filter_fn.pos_emb.t", "layers.0.mixer.filter.times"),
    ("backbone.layers.0.mixer.filter_fn.implicit_filter.3.freq", "implicit_filter.3.freq"),
    ("backbone.layers.0.mixer.filter_fn.implicit_filter.1.freq", "implicit_filter.1.freq"),
    ("backbone.embeddings.word_embeddings.weight", "word_embeddings.weight"),
]


@pytest.mark.parametrize(("key", "named"), LOST)
@pytest.mark.parametrize("is_rule", [False, True])
def test_a_lost_tensor_is_named(key: str, named: str, is_rule: bool) -> None:
    weights = by_the_rule() if is_rule else dict(golden().weights)
    del weights[key]
    with pytest.raises(CheckpointError, match=named.replace(".", r"\.")):
        genesplice_hf.from_original("hyenadna", golden().config, weights)


def test_strange_and_mis_shaped_tensors_are_named() -> None:
    weights = dict(golden().weights)
    weights["backbone.layers.0.mixer.stranger"] = torch.ones(2)
    weights["backbone.layers.1.mlp.fc1.weight"] = weights["backbone.layers.1.mlp.fc1.weight"].T.contiguous()
    weights["backbone.layers.1.mixer.filter_fn.pos_emb.z"] = torch.zeros(1, 127, 5)
    with pytest.raises(CheckpointError) as error:
        golden()._replace(weights=weights).model()
    for part in (
        "unexpected: hyenadna.layers.0.mixer.stranger",
        "layers.1.mlp.fc1.weight is (32, 128), needs (128, 32)",
        "layers.1.mixer.filter.positions is (1, 127, 5), needs (1, 128, 5)",
    ):
        assert part in str(error.value)


def test_frequencies_that_differ_are_refused() -> None:
    key = "backbone.layers.1.mixer.filter_fn.implicit_filter.5.freq"
    weights = golden().weights | {key: golden().weights[key] + 1e-3}
    with pytest.raises(CheckpointError, match=r"layers\.1\..*implicit_filter\.5\.freq must equal"):
        golden()._replace(weights=weights).model()


def test_a_config_that_does_not_tell_enough_is_advice() -> None:
    with pytest.raises(CheckpointError, match="n_layer, max_seq_len"):
        genesplice_hf.from_original("hyenadna", {"d_model": 8, "vocab_size": 12}, {})
    with pytest.raises(CheckpointError, match="attn_layer_idx"):
        genesplice_hf.from_original("hyenadna", golden().config | {"attn_layer_idx": [0]}, {})


def test_what_the_original_lacks_cannot_go_back() -> None:
    sizes: dict[str, Any] = {"d_model": 8, "n_layer": 1, "max_seq_len": 32, "filter_order": 4}
    with pytest.raises(CheckpointError, match="label per base"):
        genesplice_hf.to_original(HyenaDNAForTokenClassification(HyenaDNAConfig(**sizes)))
    with pytest.raises(CheckpointError, match="train_freq"):
        genesplice_hf.to_original(HyenaDNAForCausalLM(HyenaDNAConfig(**sizes, train_freq=False)))
    config, tensors = genesplice_hf.to_original(HyenaDNAForSequenceClassification(HyenaDNAConfig(**sizes)))
    assert tensors["head.output_transform.weight"].shape == (2, 8)
    assert config["layer"]["l_max"] == 32
