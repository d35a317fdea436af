"""Next-token batches: labels are the ids, pads are ignored, weights follow lower case."""

import numpy as np
import pytest
import torch

from genesplice_hf.errors import GeneSpliceError, SequenceError
from genesplice_hf.objectives.causal import CLMCollator
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer


@pytest.fixture(scope="module")
def tokenizer() -> NucleotideTokenizer:
    return NucleotideTokenizer(preset="genesplice")


def test_labels_are_the_ids_and_pads_are_ignored(tokenizer):
    batch = CLMCollator(tokenizer, seed=0)([{"sequence": "ACGTN"}, {"sequence": "ACG"}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [5, 6, 7, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7, 8, 9], [5, 6, 7, -100, -100]]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_ids_and_sequences_give_the_same_batch(tokenizer):
    collator = CLMCollator(tokenizer, pad_to_multiple_of=8, seed=0)
    by_ids = collator([{"input_ids": [5, 6, 7]}, {"input_ids": np.array([8, 9])}])
    by_text = collator([{"sequence": "ACG"}, {"sequence": "TN"}])
    assert by_ids.keys() == by_text.keys() and by_ids["input_ids"].shape == (2, 8)
    assert all(torch.equal(by_ids[name], by_text[name]) for name in by_ids)


def test_left_padding_follows_the_tokenizer():
    tokenizer = NucleotideTokenizer(preset="genesplice", padding_side="left")
    for features in (
        [{"input_ids": [5, 6, 7]}, {"input_ids": [8]}],
        [{"sequence": "ACG"}, {"sequence": "T"}],
    ):
        batch = CLMCollator(tokenizer, seed=0)(features)
        assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
        assert batch["labels"].tolist() == [[5, 6, 7], [-100, -100, 8]]


def test_given_attention_mask_decides_what_is_learned(tokenizer):
    batch = CLMCollator(tokenizer, seed=0)([{"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 1, 0]}])
    assert batch["labels"].tolist() == [[5, 6, 0, -100]]


def test_loss_weight_follows_lower_case(tokenizer):
    collator = CLMCollator(tokenizer, soft_mask_weight=0.1, seed=0)
    batch = collator([{"sequence": "ACgt"}, {"sequence": "nA"}])
    expected = [[1, 1, 0.1, 0.1], [0.1, 1, 0, 0]]
    np.testing.assert_allclose(batch["loss_weight"].numpy(), expected, rtol=1e-6)
    by_share = collator([{"input_ids": [5, 6, 7], "soft_mask": [0.0, 0.5, 1.0]}])
    np.testing.assert_allclose(by_share["loss_weight"].numpy(), [[1, 0.55, 0.1]], rtol=1e-6)


def test_opposite_strand(tokenizer):
    collator = CLMCollator(tokenizer, rc_probability=1.0, soft_mask_weight=0.0, seed=0)
    batch = collator([{"sequence": "AACgTN"}])
    assert tokenizer.decode(batch["input_ids"][0]) == "NACGTT"
    assert batch["loss_weight"].tolist() == [[1, 1, 0, 1, 1, 1]]
    features = [{"sequence": "A", "example_id": i} for i in range(2000)]
    flips = CLMCollator(tokenizer, rc_probability=0.5, seed=1)(features)
    share = (flips["input_ids"] == 8).float().mean().item()
    assert abs(share - 0.5) < 3 * np.sqrt(0.25 / 2000)


def test_token_types_are_padded(tokenizer):
    features = [{"input_ids": [5, 6], "token_type_ids": [0, 1]}, {"input_ids": [5], "token_type_ids": [1]}]
    assert CLMCollator(tokenizer, seed=0)(features)["token_type_ids"].tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    "features, message",
    [
        ([], "`features` is empty"),
        ([{"labels": [1]}], "feature 0 has neither `input_ids` nor `sequence`"),
        ([{"input_ids": [5]}, {"sequence": "A"}], "some features hold `input_ids`"),
        ([{"input_ids": [[5, 6]]}], "`input_ids` of feature 0 must be one row"),
        ([{"input_ids": ["A"]}], "`input_ids` of feature 0 must be one row"),
        ([{"input_ids": [5, 6], "attention_mask": [1]}], "`attention_mask` of feature 0 has 1 entries for 2"),
        ([{"input_ids": [5], "token_type_ids": [0]}, {"input_ids": [5]}], "`token_type_ids` is missing from 1 of 2"),
        ([{"sequence": 5}], "`sequence` of feature 0 must be a string"),
        ([{"input_ids": [5], "example_id": 1.5}], "`example_id`"),
    ],
)
def test_bad_features(tokenizer, features, message):
    with pytest.raises(GeneSpliceError, match=message):
        CLMCollator(tokenizer, seed=0)(features)


@pytest.mark.parametrize("features", [[{"sequence": "A"}, {"sequence": ""}], [{"input_ids": [5]}, {"input_ids": []}]])
def test_empty_example(tokenizer, features):
    with pytest.raises(SequenceError, match="feature 1 holds no token"):
        CLMCollator(tokenizer, seed=0)(features)


def test_illegal_letter(tokenizer):
    with pytest.raises(SequenceError, match="position 2"):
        CLMCollator(tokenizer, seed=0)([{"sequence": "AC-G"}])


def test_needs_raw_strings(tokenizer):
    with pytest.raises(GeneSpliceError, match="`rc_probability`"):
        CLMCollator(tokenizer, rc_probability=0.5, seed=0)([{"input_ids": [5]}])
    with pytest.raises(GeneSpliceError, match="`soft_mask`"):
        CLMCollator(tokenizer, soft_mask_weight=0.5, seed=0)([{"input_ids": [5]}])


@pytest.mark.parametrize(
    "arguments",
    [
        {"soft_mask_weight": 1.1}, {"soft_mask_weight": -0.1}, {"rc_probability": 2}, {"rc_probability": "0.5"},
        {"pad_to_multiple_of": 0}, {"pad_to_multiple_of": 1.5}, {"seed": -1},
    ],
)  # fmt: skip
def test_bad_arguments(tokenizer, arguments):
    with pytest.raises(GeneSpliceError, match=f"`{next(iter(arguments))}`"):
        CLMCollator(tokenizer, **arguments)
