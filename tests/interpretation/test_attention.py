"""Attention maps: named, normalised, those of the model, and refused where no weights exist."""

import numpy as np
import pytest
import torch
from interpretation.toy_sequence_models import CountMotif, ToyModel, single_base_tokenizer, tiny_bert

from genesplice_hf.errors import GeneSpliceError
from genesplice_hf.interpretation.attention import attention_maps


def eager_bert():
    model = tiny_bert()
    model.set_attn_implementation("eager")
    return model


def test_maps_are_the_models_own_and_rows_sum_to_one():
    model, tokenizer = eager_bert(), single_base_tokenizer(with_ends=True)
    maps = attention_maps(model.train(), tokenizer, "ACGTA")
    with torch.no_grad():
        expected = model.eval()(**tokenizer("ACGTA", return_tensors="pt"), output_attentions=True).attentions
    assert list(maps.layers) == ["layer_0", "layer_1"]
    assert maps.tokens == ["[CLS]", *"ACGTA", "[SEP]"]
    for found, weights in zip(maps.layers.values(), expected, strict=True):
        assert found.shape == (2, 7, 7)
        np.testing.assert_allclose(found, weights[0].numpy(), atol=1e-6)
        np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-5)


def test_fast_attention_is_refused_with_advice():
    model = tiny_bert()
    model.set_attn_implementation("sdpa")
    with pytest.raises(GeneSpliceError, match=r"'sdpa'.*set_attn_implementation\('eager'\)"):
        attention_maps(model, single_base_tokenizer(), "ACGT")


def test_a_model_without_attention_is_refused():
    model = ToyModel(CountMotif("AC"))
    model.config._attn_implementation = "eager"
    with pytest.raises(GeneSpliceError, match="records no attention"):
        attention_maps(model, single_base_tokenizer(), "ACGT")
