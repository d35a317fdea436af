"""Pooled embeddings against a loop over single sequences, for bodies, heads, adapters and other architectures."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel, BertTokenizerLegacy

from genesplice_hf.errors import CheckpointError, SequenceError
from genesplice_hf.models.registry import REGISTRY
from genesplice_hf.scoring.embeddings import EmbeddingExtractor
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer

SEQUENCES = ["ACGTACGTAC", "GG", "TTTTTGA", "ACGTN", "C"]


@pytest.fixture(scope="module")
def tokenizer():
    return NucleotideTokenizer(preset="genesplice")


def build(auto_class="AutoModel"):
    entry = REGISTRY["genesplice"]
    torch.manual_seed(0)
    return entry.auto_classes[auto_class](entry.tiny_config()).eval()


@pytest.fixture(scope="module")
def model():
    return build()


def one_by_one(model, tokenizer, pool):
    """The definition: no batch, no padding."""
    rows = []
    for sequence in SEQUENCES:
        ids = torch.tensor([tokenizer.convert_tokens_to_ids(list(sequence))])
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        rows.append([pool(state[0]).numpy() for state in states])
    return [np.stack(layer) for layer in zip(*rows, strict=True)]


@pytest.mark.parametrize(
    ("pooling", "pool"), [("mean", lambda x: x.mean(0)), ("max", lambda x: x.amax(0))], ids=["mean", "max"]
)
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_every_layer_equals_the_loop_in_input_order(model, tokenizer, pooling, pool, batch_size):
    features = EmbeddingExtractor(model, tokenizer, pooling=pooling, batch_size=batch_size)(SEQUENCES)
    expected = one_by_one(model, tokenizer, pool)
    assert list(features) == list(range(len(expected)))
    for layer, rows in features.items():
        assert rows.dtype == np.float32
        np.testing.assert_allclose(rows, expected[layer], atol=2e-5)


def test_head_and_adapter_run_only_the_body(tokenizer):
    head = build("AutoModelForMaskedLM")
    plain = EmbeddingExtractor(head, tokenizer)(SEQUENCES)
    body = EmbeddingExtractor(head.base_model, tokenizer)(SEQUENCES)
    np.testing.assert_array_equal(plain[2], body[2])
    adapted = get_peft_model(head, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    changed = EmbeddingExtractor(adapted, tokenizer)(SEQUENCES)
    np.testing.assert_array_equal(changed[0], plain[0])
    assert np.abs(changed[2] - plain[2]).max() > 1e-4


def test_layers_may_be_chosen_and_counted_from_the_end(model, tokenizer):
    every = EmbeddingExtractor(model, tokenizer)(SEQUENCES)
    last = max(every)
    chosen = EmbeddingExtractor(model, tokenizer, layers=[-1, 0])(SEQUENCES)
    assert sorted(chosen) == [0, last]
    np.testing.assert_array_equal(chosen[last], every[last])
    with pytest.raises(CheckpointError, match="`layers` must lie in"):
        EmbeddingExtractor(model, tokenizer, layers=[99])(SEQUENCES)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Another architecture, whose tokenizer adds CLS and SEP."""
    vocabulary = tmp_path_factory.mktemp("bert") / "vocab.txt"
    vocabulary.write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"acgt", *("##" + b for b in "acgt")])
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=13, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    return BertModel(config).eval(), BertTokenizerLegacy(str(vocabulary))


def test_special_tokens_stay_out_of_mean_and_max(bert):
    model, tokenizer = bert
    ids = tokenizer("acgt", return_tensors="pt")
    assert ids["input_ids"][0, 0] == tokenizer.cls_token_id
    with torch.no_grad():
        hidden = model(**ids).last_hidden_state[0]
    batch = ["acgt", "acgtacgt"]
    expected = {"mean": hidden[1:-1].mean(0), "max": hidden[1:-1].amax(0), "cls": hidden[0]}
    for pooling, vector in expected.items():
        features = EmbeddingExtractor(model, tokenizer, pooling=pooling, layers=[-1])(batch)
        np.testing.assert_allclose(features[2][0], vector.numpy(), atol=2e-5)


def test_mode_is_restored_and_no_gradient_is_kept(tokenizer):
    model = build("AutoModelForSequenceClassification")
    model.train()
    frozen = model.base_model.embed_tokens if hasattr(model.base_model, "embed_tokens") else model.base_model
    frozen.eval()
    EmbeddingExtractor(model, tokenizer)(SEQUENCES)
    assert model.training
    assert not frozen.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("sequences", "message"),
    [([], "at least one"), (["ACGT", ""], "Sequence 1 is empty"), ("ACGT", "wrap it in a list")],
)
def test_bad_sequences(model, tokenizer, sequences, message):
    with pytest.raises(SequenceError, match=message):
        EmbeddingExtractor(model, tokenizer)(sequences)


def test_bad_settings(model, tokenizer):
    with pytest.raises(SequenceError, match="`pooling`"):
        EmbeddingExtractor(model, tokenizer, pooling="sum")
    with pytest.raises(SequenceError, match="`batch_size`"):
        EmbeddingExtractor(model, tokenizer, batch_size=0)
    with pytest.raises(SequenceError, match="CLS token first"):
        EmbeddingExtractor(model, tokenizer, pooling="cls")(SEQUENCES)
    with pytest.raises(CheckpointError, match="PreTrainedModel"):
        EmbeddingExtractor(torch.nn.Linear(2, 2), tokenizer)


def test_too_long_for_the_tokenizer(bert, monkeypatch):
    model, tokenizer = bert
    monkeypatch.setattr(tokenizer, "model_max_length", 5)
    assert EmbeddingExtractor(model, tokenizer)(["acg"])[0].shape == (1, 16)
    with pytest.raises(SequenceError, match="`model_max_length` is 5"):
        EmbeddingExtractor(model, tokenizer)(["acg", "acgt"])
