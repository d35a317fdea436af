"""DNABERT-2 against its published code, its files there and back, and its own laws.

The golden case comes from that code (float64, stored as float32); its README says how.

Shapes: B batch, L tokens, E hidden size, V vocabulary.
"""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import Case
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

import genesplice_hf
from genesplice_hf.adaptation.adapt import adapt
from genesplice_hf.adaptation.adapter_files import load_adapter, save_adapter
from genesplice_hf.errors import CheckpointError
from genesplice_hf.layers import alibi_attention
from genesplice_hf.models.dnabert2.configuration_dnabert2 import DNABERT2Config
from genesplice_hf.models.dnabert2.conversion_dnabert2 import original_key, our_key
from genesplice_hf.models.dnabert2.modeling_dnabert2 import (
    DNABERT2ForMaskedLM,
    DNABERT2ForSequenceClassification,
    DNABERT2ForTokenClassification,
)
from genesplice_hf.models.dnabert2.modeling_dnabert2_base import DNABERT2Model
from genesplice_hf.models.registry import REGISTRY

FOLDER = Path(__file__).parents[1] / "golden" / "dnabert2"
FACTS = ("case", "reference", "seed", "dtype", "grad_keys")
GOLDEN = json.loads((FOLDER / "config.json").read_text())
CONFIG = {name: value for name, value in GOLDEN.items() if name not in FACTS}
WEIGHTS, INPUTS, OUTPUTS = (load_file(FOLDER / f"{part}.safetensors") for part in ("weights", "inputs", "outputs"))
UNLABELLED = {name: values for name, values in INPUTS.items() if name != "labels"}
REAL = INPUTS["attention_mask"].bool()
# float32: the README's. float64: the stored values are rounded to float32.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-5}
EVERY_DTYPE = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", ["eager", "sdpa"])
ROW = "genesplice_dnabert2"
HEAD_KEYS = {key for key in WEIGHTS if key.startswith("cls.")}
POOLER_KEYS = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
CLASSIFIER_KEYS = {"classifier.weight", "classifier.bias"}


def convert(weights: dict[str, torch.Tensor] = WEIGHTS, changes: dict[str, Any] | None = None, **options: Any) -> Any:
    return genesplice_hf.from_original("dnabert2", CONFIG | (changes or {}), weights, **options)


def tiny(auto_class: str = "AutoModelForMaskedLM", **fields: Any) -> Any:
    return Case(ROW, auto_class).model(**fields)


def some_ids(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(5, 32, (rows, length), generator=torch.Generator().manual_seed(1))


def without(keys: set[str]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in WEIGHTS.items() if key not in keys}


@EVERY_DTYPE
@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("in_chunks", [False, True])
def test_golden_values(
    implementation: str, dtype: torch.dtype, in_chunks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_chunks:
        monkeypatch.setattr(alibi_attention, "MAX_DENSE_TOKENS", 16)
        monkeypatch.setattr(alibi_attention, "QUERY_CHUNK", 10)
    model = convert(dtype=dtype)
    model.set_attn_implementation(implementation)
    outputs = model(**INPUTS, output_hidden_states=True)
    found = {f"hidden.{layer}": state for layer, state in enumerate(outputs.hidden_states)} | {
        "logits": outputs.logits
    }
    assert len(found) == 4
    for name, values in found.items():
        assert (values - OUTPUTS[name])[REAL].abs().max() <= TOLERANCES[dtype], name
    assert abs(outputs.loss - OUTPUTS["loss"]) <= min(TOLERANCES[dtype], 1e-5)
    outputs.loss.backward()
    assert len(GOLDEN["grad_keys"]) == 5
    for key in GOLDEN["grad_keys"]:
        gradient = model.get_parameter(our_key(key, "masked_lm")).grad
        expected = OUTPUTS[f"grad.{key}"].to(dtype)
        if dtype == torch.float64:
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
        # Sums that cancel: the original itself, run in float32, misses the README's rtol 1e-4, atol 1e-6 on 10 of the
        # 6,912 entries of Wqkv (by up to 2.7x). So float32 is held to the size of the whole tensor.
        assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max()


@EVERY_DTYPE
def test_golden_classifier(dtype: torch.dtype) -> None:
    """Conversion finds the pooler; the pooled state is tanh of its projection of the first position."""
    model = convert(dtype=dtype, task="sequence_classification")
    assert model.config.classifier_pooling == "pooler"
    assert set(model.config.conversion["ignored_keys"]) == HEAD_KEYS
    with torch.no_grad():
        state = model.dnabert2(**UNLABELLED).last_hidden_state
        pooled, logits = model.classifier.pool(state, REAL), model(**UNLABELLED).logits
    assert (pooled - OUTPUTS["pooled"]).abs().max() <= TOLERANCES[dtype]
    assert (logits - OUTPUTS["seqcls_logits"]).abs().max() <= TOLERANCES[dtype]


def test_flex_gives_the_golden_values_too() -> None:
    model = convert()
    model.set_attn_implementation("flex_attention")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits = model(**UNLABELLED).logits
    assert (logits - OUTPUTS["logits"])[REAL].abs().max() <= 2e-5


# There and back


@pytest.mark.parametrize("task", ["masked_lm", "sequence_classification", "token_classification", "base"])
def test_there_and_back_is_bit_exact(task: str, tmp_path: Path) -> None:
    """Also after our own files."""
    model = convert(task=task)
    model.save_pretrained(tmp_path)
    others = {
        "masked_lm": POOLER_KEYS | CLASSIFIER_KEYS,
        "sequence_classification": HEAD_KEYS,
        "token_classification": HEAD_KEYS | POOLER_KEYS,
        "base": HEAD_KEYS | POOLER_KEYS | CLASSIFIER_KEYS,
    }[task]
    for ours in (model, type(model).from_pretrained(tmp_path)):
        assert set(ours.config.conversion["ignored_keys"]) == others
        config, tensors = genesplice_hf.to_original(ours)
        assert all(config[name] == value for name, value in CONFIG.items() if name != "num_labels")
        assert tensors.keys() == WEIGHTS.keys() - others
        assert all(torch.equal(tensor, WEIGHTS[key]) for key, tensor in tensors.items())
        again = convert(tensors, config, task=task)
        assert all(torch.equal(again.state_dict()[key], value) for key, value in ours.state_dict().items())


def test_every_fault_is_named_as_the_file_calls_it() -> None:
    tied = "cls.predictions.decoder.weight"
    needed = WEIGHTS.keys() - POOLER_KEYS - CLASSIFIER_KEYS - {tied, "bert.embeddings.word_embeddings.weight"}
    assert len(needed) == 30
    for key in sorted(needed):
        assert original_key(our_key(key, "masked_lm")) == key
        with pytest.raises(CheckpointError, match=f"missing: {key}"):
            convert(without({key}))
    for name in ("bert.encoder.layer.7.mlp.wo.bias", "cls.stranger", "bert.embeddings.position_embeddings.weight"):
        with pytest.raises(CheckpointError, match=f"unexpected: {name}"):
            convert(WEIGHTS | {name: torch.zeros(48)})
    key = "bert.encoder.layer.1.attention.self.Wqkv.weight"
    with pytest.raises(CheckpointError, match=rf"mis-shaped: {key} is \(48, 144\), needs \(144, 48\)"):
        convert(WEIGHTS | {key: WEIGHTS[key].T.contiguous()})


def test_norms_under_their_older_names() -> None:
    older = {key.replace("LayerNorm.weight", "LayerNorm.gamma"): value for key, value in WEIGHTS.items()}
    assert older.keys() != WEIGHTS.keys()
    expected = convert().state_dict()
    assert all(torch.equal(expected[key], value) for key, value in convert(older).state_dict().items())


def test_a_tied_tensor_may_be_stored_once_and_is_one() -> None:
    model = convert(without({"cls.predictions.decoder.weight"}))
    assert model.lm_head.decoder.weight is model.dnabert2.word_embeddings.weight
    assert torch.equal(model(**UNLABELLED).logits, convert()(**UNLABELLED).logits)


def test_copies_that_differ_are_untied_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    key = "cls.predictions.decoder.weight"
    other = WEIGHTS[key] + 1e-6
    with caplog.at_level(logging.WARNING, logger="genesplice_hf"):
        model = convert(WEIGHTS | {key: other})
    assert "tie_word_embeddings" in caplog.text
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.decoder.weight, other)
    assert torch.equal(model.dnabert2.word_embeddings.weight, WEIGHTS["bert.embeddings.word_embeddings.weight"])


def test_dnabert_s_is_a_base_model_without_prefix() -> None:
    weights = {key.removeprefix("bert."): value for key, value in without(HEAD_KEYS | CLASSIFIER_KEYS).items()}
    base = convert(weights)
    assert type(base) is DNABERT2Model
    with torch.no_grad():
        found = base(**UNLABELLED).last_hidden_state
    assert (found - OUTPUTS["hidden.2"])[REAL].abs().max() <= 2e-5
    tensors = genesplice_hf.to_original(base)[1]
    assert tensors.keys() == {key for key in weights if not key.startswith("pooler.")}
    with pytest.raises(CheckpointError, match=r"missing: cls\.predictions"):
        convert(weights, task="masked_lm")


def test_another_pooling_leaves_the_pooler_behind() -> None:
    model = convert(task="sequence_classification", classifier_pooling="mean")
    assert set(model.config.conversion["ignored_keys"]) == HEAD_KEYS | POOLER_KEYS
    assert model.classifier.pooler is None
    with pytest.raises(CheckpointError, match=r"classifier_pooling.*mean"):
        genesplice_hf.to_original(model)
    assert convert(without(POOLER_KEYS), task="sequence_classification").config.classifier_pooling == "mean"


def test_the_published_config_file_is_understood(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It says `bert`, names a padding id that is another token's, and points to code of its own."""
    published = CONFIG | {
        "model_type": "bert", "auto_map": {"AutoConfig": "x.Y"}, "position_embedding_type": "absolute",
        "gradient_checkpointing": False, "torch_dtype": "float32",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(published))
    with caplog.at_level(logging.WARNING, logger="genesplice_hf"):
        config = DNABERT2Config.from_pretrained(tmp_path, num_labels=5)
    assert (config.vocab_size, config.num_labels, config.pad_token_id, config.alibi_starting_size) == (96, 5, 3, 32)
    assert config.model_type == ROW
    assert not hasattr(config, "max_position_embeddings") and not hasattr(config, "auto_map")
    assert config.upstream_config == {"gradient_checkpointing": False}
    assert len([record for record in caplog.records if record.name.startswith("genesplice_hf")]) == 1


def test_the_published_padding_id_is_kept_for_the_way_back_alone() -> None:
    model = convert()
    assert model.config.pad_token_id == 3
    assert genesplice_hf.to_original(model)[0]["pad_token_id"] == 0
    assert convert(pad_token_id=7).config.pad_token_id == 7
    assert model.get_input_embeddings().padding_idx is None


# The network


def test_the_published_size_has_the_published_number_of_parameters() -> None:
    """117 million, as the paper says."""
    with torch.device("meta"):
        model = DNABERT2ForMaskedLM(DNABERT2Config())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(117e6, abs=0.5e6)


@pytest.mark.parametrize("auto_class", REGISTRY[ROW].auto_classes)
def test_construction_is_silent_and_possible_without_memory(auto_class: str, capsys: pytest.CaptureFixture) -> None:
    entry = REGISTRY[ROW]
    with torch.device("meta"):
        model = entry.auto_classes[auto_class](entry.tiny_config())
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert capsys.readouterr().out == ""


def test_a_length_that_nobody_planned_for() -> None:
    """Beyond what the dense bias serves: the same states as with one."""
    model, ids = tiny("AutoModel"), some_ids(1, alibi_attention.MAX_DENSE_TOKENS + 40)
    mask = torch.ones_like(ids)
    mask[0, -9:] = 0
    with torch.no_grad():
        chunked = model(ids, mask).last_hidden_state
        model.set_attn_implementation("eager")
        dense = model(ids, mask, output_attentions=True).last_hidden_state
    torch.testing.assert_close(chunked[:, :-9], dense[:, :-9], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("auto_class", REGISTRY[ROW].auto_classes)
def test_flash_attention_is_refused(auto_class: str) -> None:
    entry = REGISTRY[ROW]
    with pytest.raises(ValueError, match=r"Flash|flash"):
        entry.auto_classes[auto_class]._from_config(entry.tiny_config(), attn_implementation="flash_attention_2")


def test_segments_are_told_apart() -> None:
    model, ids = tiny("AutoModel"), some_ids()
    zeros = torch.zeros_like(ids)
    torch.testing.assert_close(model(ids).last_hidden_state, model(ids, token_type_ids=zeros).last_hidden_state)
    table = model.token_type_embeddings.weight
    kinds = (torch.arange(9) > 4).long().expand(2, -1)
    first = model(ids, token_type_ids=kinds, output_hidden_states=True).hidden_states[0]
    expected = model.embedding_norm(model.word_embeddings(ids) + table[kinds])
    torch.testing.assert_close(first, expected)


def test_label_0_is_a_label() -> None:
    """The published code leaves it out of the loss; its row of the embedding learns, too."""
    model, ids = tiny(tie_word_embeddings=False), some_ids()
    ids[:, 3] = 0
    labels = ids.masked_fill(torch.arange(9) != 3, -100)
    outputs = model(ids, labels=labels)
    torch.testing.assert_close(outputs.loss, -outputs.logits[:, 3].log_softmax(-1)[:, 0].mean())
    outputs.loss.backward()
    assert model.dnabert2.word_embeddings.weight.grad[0].any()


def test_shapes_do_not_depend_on_labels() -> None:
    model, batch = tiny().train(), Case(ROW, "AutoModelForMaskedLM").batch(labels=True)
    outputs = model(**batch, output_hidden_states=True)
    assert outputs.logits.shape[:2] == batch["input_ids"].shape
    assert {state.shape for state in outputs.hidden_states} == {(*batch["input_ids"].shape, 48)}


def test_some_positions_alone() -> None:
    model, ids = tiny(), some_ids()
    wanted = torch.tensor([[3, 0, 8], [1, 1, 5]])
    whole, some = model(ids).logits, model(ids, labels=ids, logits_positions=wanted)
    expected = torch.stack([row[positions] for row, positions in zip(whole, wanted, strict=True)])
    torch.testing.assert_close(some.logits, expected)
    asked = torch.stack([row[positions] for row, positions in zip(ids, wanted, strict=True)])
    torch.testing.assert_close(some.loss, nn.functional.cross_entropy(expected.flatten(0, 1), asked.flatten()))


@pytest.mark.parametrize("left", [0, 3])
@pytest.mark.parametrize("pooling", ["mean", "max", "cls", "last", "pooler"])
def test_pooling_knows_padding_and_special_tokens(pooling: str, left: int) -> None:
    """One row: [CLS], three tokens, [SEP]; then padding, on the right or on the left."""
    fields = {"classifier_pooling": pooling, "special_token_ids": [1, 2]}
    model = tiny("AutoModelForSequenceClassification", **fields)
    ids = torch.tensor([[3] * left + [1, 10, 20, 30, 2] + [3] * (3 - left)])
    mask = (ids != 3).long()
    with torch.no_grad():
        state = model.dnabert2(ids, mask).last_hidden_state[0, left : left + 5]
        pooled = {"mean": state[1:4].mean(0), "max": state[1:4].amax(0), "last": state[3]}.get(pooling, state[0])
        if pooling == "pooler":
            pooled = model.classifier.pooler(pooled).tanh()
        torch.testing.assert_close(model(ids, mask).logits[0], model.classifier.out_proj(pooled))


@pytest.mark.parametrize("padded", [False, True])
def test_one_graph_holds_it_all(padded: bool) -> None:
    model, batch = tiny(), Case(ROW, "AutoModelForMaskedLM").batch()
    batch = batch if padded else {"input_ids": batch["input_ids"]}
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="eager")(**batch).logits
        expected = model(**batch).logits
    real = batch["attention_mask"].bool() if padded else torch.ones_like(batch["input_ids"]).bool()
    torch.testing.assert_close(found[real], expected[real])
    torch._dynamo.reset()


def test_the_classifiers_dropout_follows_the_networks() -> None:
    config = REGISTRY[ROW].tiny_config(hidden_dropout_prob=0.25)
    assert DNABERT2ForSequenceClassification(config).classifier.dropout.p == 0.25
    config.classifier_dropout = 0.0
    assert DNABERT2ForTokenClassification(config).classifier.dropout.p == 0.0


# IA3


def scales(model: PeftModel) -> list[torch.Tensor]:
    return [value for name, value in model.named_parameters() if "Wqkv.ia3_l" in name]


def train(model: PeftModel) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    batch = Case(ROW, "AutoModelForSequenceClassification").batch(labels=True)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(**batch).loss.backward()
        optimizer.step()
    model.eval()


def test_ia3_leaves_queries_alone(tmp_path: Path) -> None:
    """Also after loading to train on; the file is an ordinary adapter."""
    case = Case(ROW, "AutoModelForSequenceClassification")
    model = adapt(case.model(), "ia3")
    train(model)
    save_adapter(model, tmp_path)
    loaded = load_adapter(case.model(), tmp_path, is_trainable=True)
    train(loaded)
    for found in (model, loaded, PeftModel.from_pretrained(case.model(), tmp_path)):
        assert len(scales(found)) == 2
        for scale in scales(found):
            query, key, value = scale.detach().chunk(3)
            assert torch.equal(query, torch.ones(48, 1))
            assert (key != 1).any() and (value != 1).any()
    assert not torch.equal(scales(model)[0], scales(loaded)[0])
