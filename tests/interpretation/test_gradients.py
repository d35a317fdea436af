"""Gradient attributions: the completeness law, and linear models where the answer is the weight."""

import numpy as np
import pytest
import torch
from interpretation.toy_sequence_models import (
    BASES,
    CountMotif,
    Linear,
    Smooth,
    ToyModel,
    single_base_tokenizer,
    three_mer_tokenizer,
    tiny_bert,
)

from genesplice_hf.errors import GeneSpliceError, SequenceError
from genesplice_hf.interpretation.gradients import gradient_x_input, integrated_gradients

SEQUENCE = "ACGTTGACNATG"


def linear_model() -> tuple[ToyModel, np.ndarray]:
    weights = torch.randn(12, 4, 1, generator=torch.Generator().manual_seed(2))
    return ToyModel(Linear(weights)), weights[..., 0].numpy()


def weights_at(sequence: str, weights: np.ndarray) -> np.ndarray:
    return np.array([weights[i, BASES.index(b)] if b in BASES else 0 for i, b in enumerate(sequence)])


def logit_of_ids(model, tokenizer, index: int) -> float:
    with torch.no_grad():
        return model(**tokenizer(SEQUENCE, return_tensors="pt")).logits[0, index].item()


def test_gradient_x_input_of_a_linear_model_is_its_weight():
    model, weights = linear_model()
    result = gradient_x_input(model, single_base_tokenizer(), SEQUENCE)
    np.testing.assert_allclose(result.base_attributions, weights_at(SEQUENCE, weights), atol=1e-6)
    assert result.score == pytest.approx(weights_at(SEQUENCE, weights).sum(), abs=1e-5)


def test_integrated_gradients_of_a_linear_model_is_weight_minus_mean_weight():
    model, weights = linear_model()
    result = integrated_gradients(model, single_base_tokenizer(), SEQUENCE, steps=3)
    expected = weights_at(SEQUENCE, weights) - np.where(np.array(list(SEQUENCE)) == "N", 0, weights.mean(axis=1))
    np.testing.assert_allclose(result.base_attributions, expected, atol=1e-6)


@pytest.mark.parametrize("baseline", ["bases", "zero"])
@pytest.mark.parametrize("with_ends", [False, True])
@pytest.mark.parametrize("make", [lambda: ToyModel(Smooth()).train(), tiny_bert], ids=["conv", "bert"])
def test_completeness(make, with_ends, baseline):
    model = make()
    tokenizer = single_base_tokenizer(with_ends)
    result = integrated_gradients(model, tokenizer, SEQUENCE, baseline=baseline, steps=128)
    change = result.score - result.baseline_score
    assert result.attributions.sum() == pytest.approx(change, abs=2e-4)
    assert abs(result.completeness_gap) < 2e-4
    assert abs(change) > 1e-3
    assert result.tokens == tokenizer.convert_ids_to_tokens(tokenizer(SEQUENCE)["input_ids"])


def test_the_embedded_sequence_scores_as_its_ids_do():
    model, tokenizer = tiny_bert(), single_base_tokenizer(with_ends=True)
    result = integrated_gradients(model, tokenizer, SEQUENCE, target=0, steps=1)
    assert result.score == pytest.approx(logit_of_ids(model, tokenizer, 0), abs=1e-6)


def test_an_incomplete_integral_is_said(caplog):
    # The motif counter is flat at all points of the path but its last sixth: few steps miss the rise.
    model, tokenizer = ToyModel(CountMotif("ACGTTGAC")), single_base_tokenizer()
    coarse = integrated_gradients(model, tokenizer, SEQUENCE, steps=2)
    assert abs(coarse.completeness_gap) > 0.5
    assert "raise `steps` (2)" in caplog.text
    caplog.clear()
    fine = integrated_gradients(model, tokenizer, SEQUENCE, steps=200)
    assert abs(fine.completeness_gap) < 0.05
    assert not caplog.text


def test_a_given_baseline_is_used_and_equal_to_the_input_gives_zero():
    model, tokenizer = tiny_bert(), single_base_tokenizer()
    embeddings = model.get_input_embeddings()(tokenizer(SEQUENCE, return_tensors="pt")["input_ids"])[0]
    result = integrated_gradients(model, tokenizer, SEQUENCE, baseline=embeddings, steps=2)
    assert not result.attributions.any()
    assert result.score == pytest.approx(result.baseline_score, abs=1e-6)


def test_batch_size_does_not_change_the_integral():
    model, tokenizer = tiny_bert(), single_base_tokenizer()
    whole = integrated_gradients(model, tokenizer, SEQUENCE, steps=10, batch_size=10)
    pieces = integrated_gradients(model, tokenizer, SEQUENCE, steps=10, batch_size=3)
    np.testing.assert_allclose(pieces.attributions, whole.attributions, atol=1e-6)


def test_parameters_and_modes_are_left_alone():
    model = ToyModel(Smooth()).train()
    with torch.no_grad():
        integrated_gradients(model, single_base_tokenizer(), SEQUENCE)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_several_bases_per_token_need_another_baseline_and_have_no_base_attributions():
    model, tokenizer = tiny_bert(), three_mer_tokenizer()
    with pytest.raises(GeneSpliceError, match="`baseline` must be"):
        integrated_gradients(model, tokenizer, SEQUENCE)
    result = integrated_gradients(model, tokenizer, SEQUENCE, baseline="zero", steps=64)
    assert abs(result.completeness_gap) < 2e-4
    assert result.tokens[1] == "ACG"
    with pytest.raises(GeneSpliceError, match="one token per base"):
        _ = result.base_attributions


def test_bad_input_is_refused():
    model, tokenizer = tiny_bert(), single_base_tokenizer()
    with pytest.raises(SequenceError, match="'X' at position 1"):
        integrated_gradients(model, tokenizer, "XA")
    with pytest.raises(SequenceError, match="the model takes 64"):
        gradient_x_input(model, tokenizer, "A" * 65)
    with pytest.raises(GeneSpliceError, match="`steps`"):
        integrated_gradients(model, tokenizer, "ACGT", steps=0)
    with pytest.raises(GeneSpliceError, match="embeddings' shape"):
        integrated_gradients(model, tokenizer, "ACGT", baseline=torch.zeros(3, 16))
    with pytest.raises(GeneSpliceError, match="integrated gradients only"):
        _ = gradient_x_input(model, tokenizer, "ACGT").completeness_gap


def test_a_model_without_inputs_embeds_is_refused():
    class IdsOnly(ToyModel):
        def forward(self, input_ids, attention_mask=None, token_type_ids=None):
            return super().forward(input_ids)

    with pytest.raises(GeneSpliceError, match="takes no `inputs_embeds`"):
        gradient_x_input(IdsOnly(CountMotif("ACG")), single_base_tokenizer(), "ACGT")
