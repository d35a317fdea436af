"""The Nucleotide Transformer v2 against the original JAX code, its published files there and back, and its own laws.

The golden case comes from that code (float64, stored as float32); its README says how.

Shapes: B batch, L tokens, P wanted positions, E hidden size, V vocabulary.
"""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import Case
from safetensors.torch import load_file
from torch import nn

import genesplice_hf
from genesplice_hf.errors import CheckpointError, SequenceError
from genesplice_hf.models.nucleotide_transformer_v2.configuration_nucleotide_transformer_v2 import (
    NucleotideTransformerV2Config,
)
from genesplice_hf.models.nucleotide_transformer_v2.conversion_nucleotide_transformer_v2 import (
    NEVER_USED,
    original_key,
    our_key,
)
from genesplice_hf.models.nucleotide_transformer_v2.modeling_nucleotide_transformer_v2 import (
    NucleotideTransformerV2ForMaskedLM,
    NucleotideTransformerV2ForSequenceClassification,
    NucleotideTransformerV2ForTokenClassification,
)
from genesplice_hf.models.nucleotide_transformer_v2.modeling_nucleotide_transformer_v2_base import (
    NucleotideTransformerV2Model,
)
from genesplice_hf.models.registry import REGISTRY
from genesplice_hf.tokenization.tokenization_kmer import KmerTokenizer

FOLDER = Path(__file__).parents[1] / "golden" / "nt_v2"
CONFIG = json.loads((FOLDER / "config.json").read_text())
WEIGHTS, INPUTS, OUTPUTS = (load_file(FOLDER / f"{part}.safetensors") for part in ("weights", "inputs", "outputs"))
REAL = INPUTS["attention_mask"].bool()
# float32: the README's. float64: the stored values are rounded to float32.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-5}
EVERY_DTYPE = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", ["eager", "sdpa"])
ROW = "genesplice_nucleotide_transformer_v2"
UNUSED = {"esmfold_config", "is_folding_model", "use_cache", "vocab_list"}


def convert(weights: dict[str, torch.Tensor] = WEIGHTS, changes: dict[str, Any] | None = None, **options: Any) -> Any:
    return genesplice_hf.from_original("nt_v2", CONFIG["hf_config"] | (changes or {}), weights, **options)


def tiny(auto_class: str = "AutoModelForMaskedLM", **fields: Any) -> Any:
    return Case(ROW, auto_class).model(**fields)


def some_ids(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(6, 75, (rows, length), generator=torch.Generator().manual_seed(1))


@EVERY_DTYPE
@EVERY_IMPLEMENTATION
@pytest.mark.parametrize(("prefix", "eps"), [("eps1e-12.", "config"), ("eps1e-5.", "original"), ("eps1e-5.", 1e-5)])
def test_golden_values(prefix: str, eps: str | float, implementation: str, dtype: torch.dtype) -> None:
    model = convert(dtype=dtype, layer_norm_eps=eps)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        outputs = model(**INPUTS, output_hidden_states=True)
    found = {f"hidden.{layer}": state for layer, state in enumerate(outputs.hidden_states)} | {
        "logits": outputs.logits
    }
    assert len(found) == 4
    for name, values in found.items():
        difference = (values - OUTPUTS[prefix + name])[REAL].abs().max()
        assert difference <= TOLERANCES[dtype], name
    assert abs(outputs.loss - OUTPUTS[f"{prefix}loss"]) <= TOLERANCES[dtype]


@EVERY_DTYPE
@EVERY_IMPLEMENTATION
def test_golden_gradients(implementation: str, dtype: torch.dtype) -> None:
    model = convert(dtype=dtype, layer_norm_eps="original")
    model.set_attn_implementation(implementation)
    model(**INPUTS).loss.backward()
    assert len(CONFIG["grad_keys"]) == 6
    for key in CONFIG["grad_keys"]:
        found = model.get_parameter(our_key(key, "masked_lm")).grad
        torch.testing.assert_close(found, OUTPUTS[f"grad.{key}"].to(dtype), rtol=1e-4, atol=1e-6)


def test_the_epsilon_makes_the_difference_that_it_makes_in_the_original() -> None:
    with torch.no_grad():
        config, original = (convert(layer_norm_eps=eps)(**INPUTS).logits[REAL] for eps in ("config", "original"))
    stored = (OUTPUTS["eps1e-12.logits"] - OUTPUTS["eps1e-5.logits"])[REAL]
    torch.testing.assert_close(config - original, stored, rtol=0, atol=4e-5)
    assert (config - original).abs().max() == pytest.approx(7.56e-4, abs=4e-5)


@pytest.mark.parametrize("eps", ["jax", 0, -1.0, True])
def test_another_epsilon_is_refused(eps: Any) -> None:
    with pytest.raises(CheckpointError, match="layer_norm_eps"):
        convert(layer_norm_eps=eps)


def test_our_tokenizer_gives_the_originals_ids() -> None:
    sequences = json.loads((FOLDER / "sequences.json").read_text())
    sequences = sequences if isinstance(sequences, list) else sequences["sequences"]
    tokenizer = KmerTokenizer(preset="nt_v2_3mer")
    assert list(tokenizer.get_vocab()) == (FOLDER / "vocab.txt").read_text().split()
    for sequence, ids, mask in zip(sequences, INPUTS["input_ids"], REAL, strict=True):
        found, given = torch.tensor(tokenizer(sequence)["input_ids"]), ids[mask]
        unmasked = given != 2
        assert torch.equal(found[unmasked], given[unmasked])


# There and back


@pytest.mark.parametrize("eps", ["config", "original"])
def test_there_and_back_is_bit_exact(eps: str, tmp_path: Path) -> None:
    """Also after our own files; what the network never reads comes back as zeros, and is named."""
    model = convert(layer_norm_eps=eps)
    model.save_pretrained(tmp_path)
    for ours in (model, NucleotideTransformerV2ForMaskedLM.from_pretrained(tmp_path)):
        config, tensors = genesplice_hf.to_original(ours)
        assert {name: config[name] for name in CONFIG["hf_config"] if name != "architectures"} == {
            name: value for name, value in CONFIG["hf_config"].items() if name != "architectures"
        }
        assert tensors.keys() == WEIGHTS.keys()
        for key, tensor in tensors.items():
            expected = torch.zeros_like(WEIGHTS[key]) if key in NEVER_USED else WEIGHTS[key]
            assert torch.equal(tensor, expected), key
        frequencies = {key for key in WEIGHTS if key.endswith("inv_freq")}
        assert set(ours.config.conversion["ignored_keys"]) == {*NEVER_USED, *frequencies}
        again = convert(tensors, config, layer_norm_eps=eps)
        assert all(torch.equal(again.state_dict()[key], value) for key, value in ours.state_dict().items())


def test_a_model_made_here_goes_out_with_all_that_the_published_class_has() -> None:
    config, tensors = genesplice_hf.to_original(tiny(add_bias_ffn=True, emb_layer_norm_before=True))
    assert config["add_bias_fnn"] is True
    assert tensors["esm.embeddings.position_embeddings.weight"].shape == (2050, 32)
    assert {"esm.embeddings.layer_norm.weight", "esm.encoder.layer.1.output.dense.bias", *NEVER_USED} <= tensors.keys()
    again = genesplice_hf.from_original("nt_v2", config, tensors)
    ids = some_ids()
    model = tiny(add_bias_ffn=True, emb_layer_norm_before=True)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_every_fault_is_named_as_the_file_calls_it() -> None:
    needed = set(WEIGHTS) - set(NEVER_USED) - {key for key in WEIGHTS if key.endswith("inv_freq")}
    assert len(needed) == 37
    for key in sorted(needed):
        assert original_key(our_key(key, "masked_lm")) == key
        with pytest.raises(CheckpointError, match=f"missing: {key}"):
            convert({name: tensor for name, tensor in WEIGHTS.items() if name != key})
    extra = "esm.encoder.layer.7.attention.self.query.bias"
    for name in (extra, "lm_head.stranger", "esm.pooler.dense.weight"):
        with pytest.raises(CheckpointError, match=f"unexpected: {name}"):
            convert(WEIGHTS | {name: torch.zeros(32)})
    key = "esm.encoder.layer.1.intermediate.dense.weight"
    with pytest.raises(CheckpointError, match=rf"mis-shaped: {key} is \(32, 128\), needs \(128, 32\)"):
        convert(WEIGHTS | {key: WEIGHTS[key].T.contiguous()})


def test_norms_under_their_older_names() -> None:
    older = {key.replace("LayerNorm.weight", "LayerNorm.gamma"): value for key, value in WEIGHTS.items()}
    assert older.keys() != WEIGHTS.keys()
    expected = convert().state_dict()
    assert all(torch.equal(expected[key], value) for key, value in convert(older).state_dict().items())


def test_rotary_frequencies_of_another_base_are_refused() -> None:
    key = "esm.encoder.layer.1.attention.self.rotary_embeddings.inv_freq"
    other = 1.0 / (500.0 ** (torch.arange(0, 8, 2) / 8))
    with pytest.raises(CheckpointError, match=f"{key}.*rope_theta"):
        convert(WEIGHTS | {key: other})
    frequencies = {key: other for key in WEIGHTS if key.endswith("inv_freq")}
    model = convert(WEIGHTS | frequencies, rope_theta=500.0)
    with pytest.raises(CheckpointError, match="rope_theta"):
        genesplice_hf.to_original(model)


@pytest.mark.parametrize("bare", [False, True])
def test_a_base_model_leaves_the_head_behind(bare: bool) -> None:
    weights = {key.removeprefix("esm."): value for key, value in WEIGHTS.items() if "lm_head" not in key}
    base = convert(weights) if bare else convert(task="base")
    assert type(base) is NucleotideTransformerV2Model
    assert ("lm_head.bias" in base.config.conversion["ignored_keys"]) != bare
    with torch.no_grad():
        found = base(INPUTS["input_ids"], attention_mask=INPUTS["attention_mask"]).last_hidden_state
    assert (found - OUTPUTS["eps1e-12.hidden.2"])[REAL].abs().max() <= 2e-5
    tensors = genesplice_hf.to_original(base)[1]
    expected = weights if bare else {key: value for key, value in WEIGHTS.items() if "lm_head" not in key}
    assert tensors.keys() == expected.keys()


def test_a_token_classifier_comes_and_goes() -> None:
    weights = {key: value for key, value in WEIGHTS.items() if "lm_head" not in key}
    weights |= {"classifier.weight": torch.randn(3, 32), "classifier.bias": torch.randn(3)}
    model = convert(weights, {"num_labels": 3}, task="token_classification")
    state = model.nucleotide_transformer_v2(some_ids()).last_hidden_state
    expected = state @ weights["classifier.weight"].T + weights["classifier.bias"]
    torch.testing.assert_close(model(some_ids()).logits, expected)
    config, tensors = genesplice_hf.to_original(model)
    assert config["num_labels"] == 3
    assert torch.equal(tensors["classifier.weight"], weights["classifier.weight"])
    with pytest.raises(CheckpointError, match="SequenceClassification"):
        genesplice_hf.to_original(tiny("AutoModelForSequenceClassification"))


def test_a_decoder_that_is_stored_once_is_filled_in() -> None:
    weights = {key: value for key, value in WEIGHTS.items() if key != "lm_head.decoder.weight"}
    model = convert(weights, {"tie_word_embeddings": True})
    assert model.lm_head.decoder.weight is model.nucleotide_transformer_v2.embeddings.weight


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding_type": "absolute"}, "nt_v1"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 3}, r"missing: esm\.encoder\.layer\.2\."),
        ({"vocab_size": 70}, r"mis-shaped: .*esm\.embeddings\.word_embeddings\.weight is \(75"),
    ],
)
def test_a_config_of_something_else_is_advice(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(changes=changes)


def test_the_published_config_file_is_understood(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It names no `model_type`, spells a field `fnn`, and points to code of its own."""
    published = CONFIG["hf_config"] | {
        "auto_map": {"AutoConfig": "x.Y"},
        "add_bias_fnn": True,
        "torch_dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    with caplog.at_level(logging.WARNING, logger="genesplice_hf"):
        config = NucleotideTransformerV2Config.from_pretrained(tmp_path, num_labels=5)
    assert len(caplog.records) == 1
    assert set(config.upstream_config) == UNUSED
    assert (config.vocab_size, config.add_bias_ffn, config.num_labels) == (75, True, 5)
    assert not hasattr(config, "auto_map") and not hasattr(config, "add_bias_fnn")
    assert "add_bias_fnn" not in config.to_dict()


def test_unknown_fields_are_kept_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="genesplice_hf"):
        model = convert()
    assert len(caplog.records) == 1
    assert set(model.config.upstream_config) == UNUSED


# The network


def test_the_published_sizes_have_the_published_number_of_parameters() -> None:
    """50M: 55.9 million in the file, of which the table of 2,050 positions is dead."""
    with torch.device("meta"):
        model = NucleotideTransformerV2ForMaskedLM(NucleotideTransformerV2Config())
    assert all(parameter.is_meta for parameter in model.parameters())
    used = sum(parameter.numel() for parameter in model.parameters())
    assert used == pytest.approx(54.86e6, abs=0.01e6)
    assert used + 2050 * 512 == pytest.approx(223_642_688 / 4, rel=1e-3)
    assert (model.config.max_tokens, model.config.bases_per_token) == (2048, 6)


@pytest.mark.parametrize("auto_class", REGISTRY[ROW].auto_classes)
def test_construction_is_silent_and_possible_without_memory(auto_class: str, capsys: pytest.CaptureFixture) -> None:
    entry = REGISTRY[ROW]
    with torch.device("meta"):
        model = entry.auto_classes[auto_class](entry.tiny_config())
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert capsys.readouterr().out == ""


def test_a_sequence_beyond_the_limit_is_told_the_limit_in_bases() -> None:
    model = tiny("AutoModel", max_position_embeddings=12)
    assert model(some_ids(length=10)).last_hidden_state.shape == (2, 10, 32)
    with pytest.raises(SequenceError, match=r"11 tokens.*reads 10 \(`<cls>` and 27 bases as 3-mers\)"):
        model(some_ids(length=11))
    other = tiny("AutoModel", max_position_embeddings=12, vocab_size=80)
    with pytest.raises(SequenceError, match="reads 10; cut"):
        other(some_ids(length=11))


def test_some_positions_alone() -> None:
    """Logits and loss of the wanted positions are those of the whole."""
    model, ids = tiny(), some_ids()
    wanted = torch.tensor([[3, 0, 8], [1, 1, 5]])
    labels = ids.masked_fill(torch.arange(9) % 2 == 0, -100)
    whole, some = model(ids), model(ids, labels=labels, logits_positions=wanted)
    expected = torch.stack([row[positions] for row, positions in zip(whole.logits, wanted, strict=True)])
    torch.testing.assert_close(some.logits, expected)
    asked = torch.stack([row[positions] for row, positions in zip(labels, wanted, strict=True)])
    torch.testing.assert_close(some.loss, nn.functional.cross_entropy(expected.flatten(0, 1), asked.flatten()))


def test_labels_may_be_weighted() -> None:
    model, ids = tiny(), some_ids()
    weight = torch.rand(2, 9)
    logits = model(ids).logits
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    torch.testing.assert_close(model(ids, labels=ids, loss_weight=weight).loss, (losses * weight).sum() / weight.sum())
    found = model(ids, labels=ids, loss_weight=weight, num_items_in_batch=10).loss
    torch.testing.assert_close(found, (losses * weight).sum() / 10)


def test_token_dropout_rescales_by_what_is_masked() -> None:
    """The network's first input, written out; padding that looks like a mask does not count."""
    model, ids = tiny("AutoModel", token_dropout=True), some_ids()
    ids[0, 2:4], ids[1, 7:] = 2, 2
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    first = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[0]
    expected = model.embeddings(ids)
    expected[0, 2:4] = 0
    expected[0] *= (1 - 0.12) / (1 - 2 / 9)
    expected[1] *= 1 - 0.12
    torch.testing.assert_close(first[mask.bool()], expected[mask.bool()])
    assert not first[1, 7:].any()


def test_the_norm_before_the_layers() -> None:
    model, ids = tiny("AutoModel", emb_layer_norm_before=True), some_ids()
    first = model(ids, output_hidden_states=True).hidden_states[0]
    norm = model.embedding_norm
    expected = nn.functional.layer_norm(model.embeddings(ids), (32,), norm.weight, norm.bias, 1e-12)
    torch.testing.assert_close(first, expected)


def test_a_first_call_without_gradients_leaves_nothing_behind() -> None:
    model, ids = tiny().train(), some_ids()
    with torch.inference_mode():
        model(ids)
    model(ids, labels=ids).loss.backward()
    assert model.nucleotide_transformer_v2.embeddings.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ["sdpa", "flex_attention"])
def test_weights_are_refused_where_they_do_not_exist(name: str) -> None:
    model = tiny(attn_implementation=name)
    with pytest.raises(ValueError, match=rf"output_attentions.*{name}"):
        model(some_ids(), output_attentions=True)


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


# Pooling


@pytest.mark.parametrize("left", [0, 3])
@pytest.mark.parametrize("pooling", ["mean", "max", "cls", "last"])
def test_pooling_knows_padding_and_special_tokens(pooling: str, left: int) -> None:
    """Row 0: special token 3, three k-mers, special token 4; then padding, on the right or on the left."""
    fields = {"classifier_pooling": pooling, "special_token_ids": [3, 4]}
    model = tiny("AutoModelForSequenceClassification", **fields)
    ids = torch.tensor([[1] * left + [3, 10, 20, 30, 4] + [1] * (3 - left)])
    mask = (ids != 1).long()
    with torch.no_grad():
        state = model.nucleotide_transformer_v2(ids, mask).last_hidden_state[0, left : left + 5]
        pooled = {"mean": state[1:4].mean(0), "max": state[1:4].amax(0), "cls": state[0], "last": state[3]}[pooling]
        torch.testing.assert_close(model(ids, mask).logits[0], model.classifier.out_proj(pooled))


def test_token_labels_have_a_logit_each() -> None:
    model, ids = tiny("AutoModelForTokenClassification"), some_ids()
    assert isinstance(model, NucleotideTransformerV2ForTokenClassification)
    labels = ids % 3
    labels[:, :2] = -100
    outputs = model(ids, labels=labels)
    expected = nn.functional.cross_entropy(outputs.logits[:, 2:].flatten(0, 1), labels[:, 2:].flatten())
    torch.testing.assert_close(outputs.loss, expected)


def test_the_classifiers_dropout_follows_the_networks() -> None:
    config = REGISTRY[ROW].tiny_config(hidden_dropout_prob=0.25)
    assert NucleotideTransformerV2ForSequenceClassification(config).classifier.dropout.p == 0.25
    config.classifier_dropout = 0.0
    assert NucleotideTransformerV2ForSequenceClassification(config).classifier.dropout.p == 0.0
