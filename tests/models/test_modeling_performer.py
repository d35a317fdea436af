"""The Performer against a plain twin, and the laws of its chunks, positions, sums, cache and random features.

Training in chunks is tested in `test_training_performer.py`, the published architecture in `test_original.py`.

Shapes: B batch, L tokens, E hidden size, V vocabulary.
"""

import logging
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tensor_sizes import LargestTensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from genesplice_hf.errors import GeneSpliceError, SequenceError
from genesplice_hf.layers.feature_maps import FEATURE_MAPS, PROJECTED
from genesplice_hf.models.performer.configuration_performer import PerformerConfig
from genesplice_hf.models.performer.modeling_performer import (
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerForSequenceClassification,
    PerformerForTokenClassification,
)
from genesplice_hf.models.performer.modeling_performer_base import PerformerModel, sinusoids

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "attention_block_size": 5,
    "initializer_range": 0.3,
    "slim_chunk_size": 8,
}
HEADS = [PerformerForMaskedLM, PerformerForCausalLM, PerformerForSequenceClassification]
HEADS += [PerformerForTokenClassification]
DIRECTIONS = pytest.mark.parametrize("is_decoder", [False, True], ids=["bidirectional", "causal"])
EVERY_MAP = pytest.mark.parametrize("feature_map", FEATURE_MAPS)


def tiny(model_class: type[PreTrainedModel], seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A float64 model in evaluation mode; the causal LM gets a causal config, all others say which they want."""
    torch.manual_seed(seed)
    causal = {"is_decoder": model_class is PerformerForCausalLM}
    return model_class(PerformerConfig(**(SIZES | causal | fields))).double().eval()


def padded_batch(length: int = 30) -> dict[str, torch.Tensor]:
    """Four rows: whole, padded on the right, on the left, and a single base."""
    ids, position = torch.randint(5, 9, (4, length)), torch.arange(length)
    mask = torch.stack([position >= 0, position < 13, position >= 11, position == 4])
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def twin(model: PerformerModel, ids: torch.Tensor) -> torch.Tensor:
    """The network written out for one unpadded row and elu+1 features, with the matrix of attention weights."""
    config, state = model.config, model.state_dict()

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attention(x: torch.Tensor, name: str) -> torch.Tensor:
        outputs = []
        q, k, v = (linear(x, f"{name}.{letter}_map") for letter in "qkv")
        for head in range(config.num_attention_heads):
            part = slice(head * config.head_dim, (head + 1) * config.head_dim)
            phi_q, phi_k = (torch.where(y > 0, y + 1, y.exp()) for y in (q[:, part], k[:, part]))
            weights = phi_q @ phi_k.T
            weights = weights.tril() if config.is_decoder else weights
            outputs.append(weights @ v[:, part] / (weights.sum(-1, keepdim=True) + config.denominator_eps))
        return linear(torch.cat(outputs, dim=-1), f"{name}.o_map")

    width = config.hidden_size
    table = np.array([[p / 10000 ** (2 * i / width) for i in range(width // 2)] for p in range(len(ids))])
    x = state["input_map.weight"][ids] + torch.from_numpy(np.hstack([np.sin(table), np.cos(table)]))
    for index in range(config.num_hidden_layers):
        name = f"layers.{index}"
        x = x + attention(norm(x, f"{name}.layernorm1"), f"{name}.attention")
        hidden = linear(norm(x, f"{name}.layernorm2"), f"{name}.U_map")
        x = x + linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), f"{name}.V_map")
    return norm(x, "final_norm")


@DIRECTIONS
def test_the_network_is_its_plain_twin(is_decoder: bool) -> None:
    model, ids = tiny(PerformerModel, is_decoder=is_decoder), torch.randint(5, 9, (30,))
    with torch.no_grad():
        torch.testing.assert_close(model(ids[None]).last_hidden_state[0], twin(model, ids))


# Chunks


@EVERY_MAP
@DIRECTIONS
def test_chunks_change_no_state(is_decoder: bool, feature_map: str) -> None:
    model, batch = tiny(PerformerModel, is_decoder=is_decoder, feature_map=feature_map), padded_batch()
    with torch.no_grad():
        expected = model(**batch, slim_chunk_size=-1).last_hidden_state
        for chunk_size in (1, 7, 8, 30, 99):
            found = model(**batch, slim_chunk_size=chunk_size).last_hidden_state
            torch.testing.assert_close(found, expected, msg=f"C={chunk_size}")
        assert not expected[batch["attention_mask"] == 0].any()


@pytest.mark.parametrize("model_class", HEADS)
def test_chunks_change_no_logits_and_no_loss(model_class: type[PreTrainedModel]) -> None:
    model, batch = tiny(model_class), padded_batch()
    labels = batch["input_ids"] % 2 if model_class is PerformerForTokenClassification else batch["input_ids"]
    labels = torch.arange(4) % 2 if model_class is PerformerForSequenceClassification else labels
    batch["labels"] = labels
    expected = model(**batch)  # with gradients: whole sequences
    with torch.no_grad():
        found = model(**batch, slim_chunk_size=7)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)


@pytest.mark.parametrize("size", [0, -2])
def test_a_chunk_has_a_size(size: int) -> None:
    with pytest.raises(ValueError, match="slim_chunk_size"):
        tiny(PerformerModel)(torch.zeros(1, 4, dtype=torch.long), slim_chunk_size=size)


def test_causal_evaluation_keeps_the_states_of_one_chunk() -> None:
    """The largest tensor is the logits, L V; no state of L E numbers is ever made."""
    model, length = tiny(PerformerForCausalLM, hidden_size=32), 1000
    with torch.no_grad(), LargestTensor() as largest:
        model(torch.randint(5, 9, (1, length)), slim_chunk_size=10)
    assert largest.elements == length * model.config.vocab_size < length * 32


def test_extra_outputs_are_those_of_whole_sequences() -> None:
    model, batch = tiny(PerformerForMaskedLM), padded_batch()
    with torch.no_grad():
        outputs = model(**batch, output_hidden_states=True, output_attentions=True)
        expected = model(**batch)
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(4, 30, 16)] * 3
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(4, 2, 30, 30)] * 2
    torch.testing.assert_close(outputs.logits, expected.logits)


# Positions


def test_positions_are_exact_where_genomes_are_long() -> None:
    positions = torch.tensor([0, 1, 999_999, 1_000_000])
    found = sinusoids(positions, 8, 10000.0)
    angles = positions.double().numpy()[:, None] * 10000.0 ** (-np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(found.numpy(), np.hstack([np.sin(angles), np.cos(angles)]), atol=1e-9)


@pytest.mark.parametrize("scheme", ["add", "concat"])
def test_neighbours_a_million_bases_away_are_told_apart_in_bfloat16(scheme: str) -> None:
    model = tiny(PerformerModel, position_scheme=scheme, hidden_size=32).to(torch.bfloat16)
    torch.nn.init.zeros_(model.input_map.weight)
    stream = model.open(torch.zeros(1, 1_000_002, dtype=torch.long), None, None)
    x = model.embed(stream, 1_000_000, 1_000_002)[0].double()
    width = 32 if scheme == "add" else 16
    expected = sinusoids(torch.tensor([1_000_000, 1_000_001]), width, 10000.0)
    assert (x[:, -width:] - expected).abs().max() < 2**-8
    assert (x[0] - x[1]).abs().max() > 0.5


def test_without_positions_order_does_not_matter() -> None:
    ids = torch.randint(5, 9, (1, 20))
    for scheme, same in (("none", True), ("add", False), ("concat", False)):
        model = tiny(PerformerModel, position_scheme=scheme)
        with torch.no_grad():
            one, other = model(ids).last_hidden_state, model(ids.flip(1)).last_hidden_state.flip(1)
        assert torch.allclose(one, other) == same


# Sums


@pytest.mark.parametrize("autocast", [False, True])
def test_sums_of_a_bfloat16_model_are_float32(autocast: bool) -> None:
    """4,096 times 1 in bfloat16 would stop at 256."""
    model = tiny(PerformerForCausalLM, slim_chunk_size=-1).float()
    for layer in model.performer.layers:
        torch.nn.init.zeros_(layer.attention.k_map.weight)
        torch.nn.init.zeros_(layer.attention.k_map.bias)  # elu(0) + 1 = 1
    model = model if autocast else model.to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        cache = model(torch.full((1, 4096), 5), use_cache=True).past_key_values
    for state in cache.states:
        assert state.numerator.dtype == state.denominator.dtype == torch.float32
        assert (state.denominator == 4096).all()


@DIRECTIONS
def test_relu_features_without_a_common_one_give_finite_gradients(is_decoder: bool) -> None:
    """Keys of one sign only: many denominators are 0, and eps is that of the published model."""
    fields = {"feature_map": "relu", "denominator_eps": 1e-16, "slim_chunk_size": -1}
    model = tiny(PerformerModel, is_decoder=is_decoder, **fields).float().train()
    for layer in model.layers:
        torch.nn.init.constant_(layer.attention.k_map.bias, -3.0)
    out = model(torch.randint(5, 9, (2, 50))).last_hidden_state
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert max(parameter.grad.abs().max() for parameter in model.parameters()) < 1e6


def test_a_row_of_padding_disturbs_nobody() -> None:
    for feature_map in FEATURE_MAPS:
        fields = {"stabilizer": "global", "slim_chunk_size": -1} if feature_map == "softmax" else {}
        model, ids = tiny(PerformerModel, feature_map=feature_map, **fields), torch.randint(5, 9, (2, 12))
        mask = torch.tensor([[1] * 12, [0] * 12])
        found = model(ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(found[:1], model(ids[:1]).last_hidden_state)
        assert not found[1].any()
        found.sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# The cache


@EVERY_MAP
def test_prefill_and_steps_are_the_whole(feature_map: str) -> None:
    """Left-padded rows, a prefill of several chunks, then one token and three at a time."""
    model, length = tiny(PerformerForCausalLM, feature_map=feature_map), 30
    ids, first = torch.randint(5, 9, (3, length)), torch.tensor([[0], [7], [21]])
    mask = (torch.arange(length) >= first).long()
    with torch.no_grad():
        expected, cache, logits = model(ids, attention_mask=mask).logits, None, []
        for start, stop in ((0, 20), (20, 21), (21, 24), (24, 30)):
            outputs = model(ids[:, start:stop], mask[:, :stop], past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            logits.append(outputs.logits)
    assert cache.get_seq_length() == length
    torch.testing.assert_close(torch.cat(logits, dim=1)[mask.bool()], expected[mask.bool()])


def test_a_step_costs_the_same_after_any_past() -> None:
    model = tiny(PerformerForCausalLM)

    def cost(past: int) -> int:
        with torch.no_grad():
            cache = model(torch.randint(5, 9, (1, past)), use_cache=True).past_key_values
            with LargestTensor() as largest:
                outputs = model(torch.tensor([[5]]), past_key_values=cache, use_cache=True)
        assert outputs.past_key_values.get_seq_length() == past + 1
        return largest.elements

    assert cost(3) == cost(3000)


@pytest.mark.parametrize("keep", [1, 5, 9, 30])
def test_only_the_wanted_logits(keep: int) -> None:
    model, ids = tiny(PerformerForCausalLM), torch.randint(5, 9, (2, 30))
    with torch.no_grad():
        found, expected = model(ids, logits_to_keep=keep).logits, model(ids).logits
    torch.testing.assert_close(found, expected[:, -keep:])
    torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, found)


def test_a_mask_must_fit_the_cache() -> None:
    model, ids = tiny(PerformerForCausalLM), torch.randint(5, 9, (2, 6))
    with pytest.raises(SequenceError, match="6 columns"):
        model(ids, attention_mask=torch.ones(2, 5))
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(SequenceError, match="8 columns"):
        model(ids[:, :2], attention_mask=torch.ones(2, 2), past_key_values=cache)
    hole = torch.ones(2, 8)
    hole[1, 6] = 0
    with pytest.raises(SequenceError, match="hole in row 1"):
        model(ids[:, :2], attention_mask=hole, past_key_values=cache)


def test_only_causal_models_have_a_cache() -> None:
    ids = torch.randint(5, 9, (1, 6))
    cache = tiny(PerformerForCausalLM)(ids, use_cache=True).past_key_values
    assert tiny(PerformerModel)(ids, use_cache=True).past_key_values is None
    for fields in ({}, {"is_decoder": True, "stabilizer": "global", "slim_chunk_size": -1}):
        with pytest.raises(ValueError, match="past_key_values"):
            tiny(PerformerModel, **fields)(ids, past_key_values=cache)


# Random features


@pytest.mark.parametrize("feature_map", PROJECTED)
def test_random_features_are_saved_with_the_model(feature_map: str, tmp_path: Path) -> None:
    model, other = (tiny(PerformerModel, seed, feature_map=feature_map) for seed in (0, 1))
    shape = (2, 8, 8) if feature_map == "favor+" else (1, 8, int(8 * math.log(8)))
    for layer, foreign in zip(model.layers, other.layers, strict=True):
        assert layer.attention.features.shape == shape
        assert not torch.equal(layer.attention.features, foreign.attention.features)
    assert not torch.equal(model.layers[0].attention.features, model.layers[1].attention.features)
    model.save_pretrained(tmp_path)
    loaded, ids = PerformerModel.from_pretrained(tmp_path, dtype=torch.float64), torch.randint(5, 9, (1, 9))
    assert torch.equal(loaded(ids).last_hidden_state, model(ids).last_hidden_state)


def test_features_stay_or_are_redrawn() -> None:
    """In training only, after so many passes, and the same in every process."""
    drawn, ids = [], torch.randint(5, 9, (1, 20))
    interval = {"feature_redraw": "interval", "feature_redraw_interval": 2}
    for seed, fields in ((0, {}), (0, interval), (1, interval)):
        model = tiny(PerformerForCausalLM, seed, feature_map="favor+", **fields)
        attention, history = model.performer.layers[1].attention, []
        for training in (True, True, False, True, True, True):
            model.train(training)
            model(ids, labels=ids)
            history.append(attention.features.clone())
        drawn.append(history)
    fixed, redrawn, elsewhere = drawn
    assert all(torch.equal(features, fixed[0]) for features in fixed)
    same = [torch.equal(one, other) for one, other in pairwise(redrawn)]
    assert same == [True, True, False, True, False]
    assert not torch.equal(redrawn[0], elsewhere[0])
    assert all(torch.equal(*pair) for pair in zip(redrawn[3:], elsewhere[3:], strict=True))


def test_a_classifier_pools_with_the_features_of_its_pass() -> None:
    """Where new features are due, chunks and whole sequences see the same ones."""
    fields = {"feature_map": "favor+", "feature_redraw": "interval", "feature_redraw_interval": 1}
    ids, results = torch.randint(5, 9, (2, 20)), []
    for chunk_size in (-1, 7):
        model = tiny(PerformerForSequenceClassification, **fields).train()
        for _ in range(3):
            outputs = model(ids, labels=torch.tensor([0, 1]), slim_chunk_size=chunk_size)
        results.append(outputs.logits)
    torch.testing.assert_close(*results)


# What is refused, and what is not available while training in chunks


@pytest.mark.parametrize("model_class", [PerformerModel, *HEADS])
@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "nonsense"])
def test_other_mechanisms_are_refused(model_class: type[PreTrainedModel], name: str) -> None:
    config = PerformerConfig(**SIZES, is_decoder=model_class is PerformerForCausalLM)
    with pytest.raises(ValueError, match=r"Flash|flex|nonsense"):
        model_class._from_config(config, attn_implementation=name)


@pytest.mark.parametrize("model_class", HEADS)
@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
def test_extra_outputs_are_refused_while_training_in_chunks(model_class: type[PreTrainedModel], option: str) -> None:
    model, batch = tiny(model_class).train(), padded_batch()
    labels = torch.zeros(4, dtype=torch.long)
    labels = labels if model_class is PerformerForSequenceClassification else labels[:, None].expand(4, 30)
    with pytest.raises(GeneSpliceError, match=option):
        model(**batch, labels=labels, **{option: True})
    assert getattr(model(**batch, labels=labels, slim_chunk_size=-1, **{option: True}), option[len("output_") :])


def test_what_cannot_be_trained_in_chunks_is_named() -> None:
    ids, model = torch.randint(5, 9, (2, 20)), tiny(PerformerForCausalLM)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(GeneSpliceError, match="past_key_values"):
        model.train()(ids, labels=ids, past_key_values=cache)
    pooled = tiny(PerformerForSequenceClassification, classifier_pooling="max").train()
    with pytest.raises(GeneSpliceError, match=r"classifier_pooling.*'max'"):
        pooled(ids, labels=torch.tensor([0, 1]))
    dropping = tiny(PerformerForCausalLM, slim_chunk_size=-1, hidden_dropout=0.1).train()
    with pytest.raises(GeneSpliceError, match=r"hidden_dropout.*p=0\.1"):
        dropping(ids, labels=ids, slim_chunk_size=8)
    adapted = get_peft_model(model, LoraConfig(target_modules=model.config.lora_targets, lora_dropout=0.05)).train()
    with pytest.raises(GeneSpliceError, match=r"lora_dropout=0\.0"):
        adapted(input_ids=ids, labels=ids)
    reading_all = tiny(PerformerModel, feature_map="softmax", stabilizer="global", slim_chunk_size=-1)
    with pytest.raises(ValueError, match="stabilizer"):
        reading_all(ids, slim_chunk_size=8)


def test_gradient_checkpointing_has_no_effect_on_chunks_and_says_so_once() -> None:
    ids, found = torch.randint(5, 9, (2, 20)), []
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = transformers_logging.get_logger("genesplice_hf.models.performer.modeling_performer_head")
    logger.addHandler(handler)
    for checkpointing in (False, True, True):
        model = tiny(PerformerForCausalLM).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids).loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    logger.removeHandler(handler)
    assert [text for text in records if "gradient checkpointing" in text] == [records[0]]
    for one, other in zip(found[0], found[1], strict=True):
        assert torch.equal(one, other)


def test_embeddings_that_want_a_gradient_get_one() -> None:
    """Through ordinary backpropagation, for attributions and prompt tuning."""
    model, ids = tiny(PerformerForCausalLM).train(), torch.randint(5, 9, (1, 20))
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = model(inputs_embeds=embeds, labels=ids).loss
    loss.backward()
    assert embeds.grad[:, :-1].any(-1).all()  # the last token has nothing to predict
    torch.testing.assert_close(model(inputs_embeds=embeds.detach(), labels=ids).loss, loss)


@pytest.mark.parametrize("chunk_size", [-1, 7])
def test_tied_embeddings_are_one_matrix_with_one_gradient(chunk_size: int) -> None:
    model, ids = tiny(PerformerForCausalLM, tie_word_embeddings=True).train(), torch.randint(5, 9, (1, 20))
    assert model.output_logit_map.weight is model.performer.input_map.weight
    untied = tiny(PerformerForCausalLM).train()
    untied.load_state_dict(model.state_dict())
    for one in (model, untied):
        one(ids, labels=ids, slim_chunk_size=chunk_size).loss.backward()
    expected = untied.output_logit_map.weight.grad + untied.performer.input_map.weight.grad
    torch.testing.assert_close(model.performer.input_map.weight.grad, expected)


@pytest.mark.parametrize("model_class", [PerformerForMaskedLM, PerformerForCausalLM])
@pytest.mark.parametrize("other_class", [PerformerForSequenceClassification, PerformerForTokenClassification])
def test_classifiers_and_language_models_lend_each_other_their_base(
    model_class: type[PreTrainedModel], other_class: type[PreTrainedModel], tmp_path: Path
) -> None:
    for saver, loader in ((model_class, other_class), (other_class, model_class)):
        saved = tiny(saver, is_decoder=model_class is PerformerForCausalLM).float()
        saved.save_pretrained(tmp_path / saver.__name__)
        found, info = loader.from_pretrained(tmp_path / saver.__name__, output_loading_info=True)
        assert {key.split(".")[0] for key in info["missing_keys"]} <= {"classifier", "output_logit_map"}
        for key, tensor in saved.performer.state_dict().items():
            assert torch.equal(found.performer.state_dict()[key], tensor)


def test_classes_demand_the_direction_that_they_need() -> None:
    with pytest.raises(ValueError, match="PerformerForCausalLM"):
        PerformerForMaskedLM(PerformerConfig(**SIZES))
    with pytest.raises(ValueError, match="is_decoder=True"):
        PerformerForCausalLM(PerformerConfig(**SIZES, is_decoder=False))


def test_the_slim_preset_is_the_published_architecture() -> None:
    config = PerformerConfig.slim(hidden_size=32, num_attention_heads=4)
    model = PerformerForCausalLM(config)
    assert {key.split(".", 3)[-1] for key in model.state_dict() if ".layers.0." in key} == {
        *(f"attention.{letter}_map.{kind}" for letter in "qkv" for kind in ("weight", "bias")),
        *(f"{name}.{kind}" for name in ("layernorm1", "layernorm2", "U_map", "V_map") for kind in ("weight", "bias")),
    }
    rest = {key for key in model.state_dict() if ".layers." not in key}
    assert rest == {"performer.input_map.weight", "output_logit_map.weight", "output_logit_map.bias"}
    assert model.performer.input_map.weight.shape == (16, 16)
    assert (config.feature_map, config.denominator_eps) == ("sqr", 1e-16)
    assert PerformerConfig.slim(feature_map="relu").feature_map == "relu"
