"""Reading both strands: the output of the reverse complement is the output read backwards, for every head.

The other strand is made here base by base; the models see rows with padding on either side and unknown bases.

Shapes: B batch, L bases, M bins, V vocabulary, C labels, T tracks.
"""

from functools import partial

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from tiny_genesplice import FORMS, random_bases, tiny, tiny_config
from transformers import PreTrainedModel

from genesplice_hf.errors import SequenceError
from genesplice_hf.layers.reverse_complement import average_over_strands
from genesplice_hf.models.genesplice.modeling_genesplice import (
    GeneSpliceForCausalLM,
    GeneSpliceForMaskedLM,
    GeneSpliceForSequenceClassification,
    GeneSpliceForTokenClassification,
    GeneSpliceForTrackPrediction,
    GeneSpliceModel,
)

BOTH_FORMS = pytest.mark.parametrize("form", FORMS)
COMPLEMENT = {5: 8, 6: 7, 7: 6, 8: 5}
VOCABULARY = [COMPLEMENT.get(token, token) for token in range(16)]
LENGTHS = pytest.mark.parametrize("length", [1, 130, 777])
PRECISIONS = pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)


def equivariant(model_class: type[PreTrainedModel], form: str, dtype=torch.float64, **fields) -> PreTrainedModel:
    """Large random weights, so that a strand treated otherwise would show."""
    return tiny(model_class, form, rc_equivariant=True, **fields).to(dtype)


def bases_and_n(batch: int, length: int) -> torch.Tensor:
    return torch.randint(5, 10, (batch, length))


def other_strand(ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    other = ids.clone()
    for row in range(len(ids)):
        places = range(ids.shape[1]) if mask is None else mask[row].nonzero().flatten().tolist()
        for place, opposite in zip(places, reversed(places), strict=True):
            token = int(ids[row, opposite])
            other[row, place] = COMPLEMENT.get(token, token)
    return other


def backwards(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Rows read backwards inside their real spans."""
    turned = x.clone()
    for row in range(len(x)):
        places = torch.arange(x.shape[1]) if mask is None else mask[row].nonzero().flatten()
        turned[row, places] = x[row, places.flip(0)]
    return turned


def logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **inputs).logits


def assert_close(found: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol * max(1.0, expected.abs().max().item()))


@BOTH_FORMS
@LENGTHS
@PRECISIONS
def test_masked_bases(form, length, dtype, atol) -> None:
    model, ids = equivariant(GeneSpliceForMaskedLM, form, dtype), bases_and_n(2, length)
    out = logits(model, ids)
    assert_close(logits(model, other_strand(ids)), backwards(out)[..., VOCABULARY], atol)
    if length > 1:
        assert not torch.allclose(out, backwards(out)[..., VOCABULARY], atol=1e-3)


@BOTH_FORMS
@LENGTHS
@PRECISIONS
@pytest.mark.parametrize("pairs", [None, [0, 2, 1]], ids=["own", "paired"])
def test_labels_of_bases(form, length, dtype, atol, pairs) -> None:
    model = equivariant(GeneSpliceForTokenClassification, form, dtype, num_labels=3, token_strand_pairs=pairs)
    ids = bases_and_n(2, length)
    expected = backwards(logits(model, ids))[..., pairs or [0, 1, 2]]
    assert_close(logits(model, other_strand(ids)), expected, atol)


@BOTH_FORMS
@LENGTHS
@PRECISIONS
@pytest.mark.parametrize("pooling", ["mean", "max", "bin_mean", "attention"])
def test_a_sequence_is_one_whichever_strand_is_given(form, length, dtype, atol, pooling) -> None:
    """Bins too, which need not match to be pooled."""
    model = equivariant(GeneSpliceForSequenceClassification, form, dtype, classifier_pooling=pooling, num_labels=3)
    ids = bases_and_n(2, length)
    assert_close(logits(model, other_strand(ids)), logits(model, ids), atol)
    one_strand = tiny(GeneSpliceForSequenceClassification, form, classifier_pooling=pooling, num_labels=3).to(dtype)
    if length > 1:
        assert not torch.allclose(logits(one_strand, other_strand(ids)), logits(one_strand, ids), atol=1e-4)


def test_a_sequence_without_a_decoder() -> None:
    model = equivariant(GeneSpliceForSequenceClassification, "hierarchical", use_decoder=False, num_labels=3)
    ids = bases_and_n(2, 130)
    assert_close(logits(model, other_strand(ids)), logits(model, ids), 1e-12)


@BOTH_FORMS
@pytest.mark.parametrize(
    ("bin_size", "lengths"), [(1, [1, 130, 777]), (16, [16, 144]), (32, [160]), (128, [128, 640])]
)
@pytest.mark.parametrize("pairs", [None, [1, 0, 2]], ids=["own", "paired"])
def test_tracks(form, bin_size, lengths, pairs) -> None:
    model = equivariant(
        GeneSpliceForTrackPrediction, form, num_tracks=3, track_bin_size=bin_size, track_strand_pairs=pairs
    )
    for length in lengths:
        ids = bases_and_n(2, length)
        out = logits(model, ids)
        assert out.shape == (2, length // bin_size, 3)
        assert_close(logits(model, other_strand(ids)), backwards(out)[..., pairs or [0, 1, 2]], 1e-12)


@BOTH_FORMS
@PRECISIONS
def test_with_padding_on_either_side(form, dtype, atol) -> None:
    mask = torch.tensor([[start <= i < stop for i in range(200)] for start, stop in [(0, 200), (0, 77), (61, 200)]])
    ids = bases_and_n(3, 200).masked_fill(~mask, 0)
    base = equivariant(GeneSpliceForMaskedLM, form, dtype)
    out = logits(base, ids, mask.long())
    other = logits(base, other_strand(ids, mask), mask.long())
    assert_close(other[mask], backwards(out, mask)[..., VOCABULARY][mask], atol)
    tracks = equivariant(GeneSpliceForTrackPrediction, form, dtype, num_tracks=2, track_bin_size=1)
    out = logits(tracks, ids, mask.long())
    assert_close(logits(tracks, other_strand(ids, mask), mask.long()), backwards(out, mask), atol)
    assert not out[~mask].any()


def test_tracks_of_rows_of_different_numbers_of_bins() -> None:
    model = equivariant(GeneSpliceForTrackPrediction, "hierarchical", num_tracks=2, track_bin_size=16)
    mask = torch.tensor([[start <= i < stop for i in range(150)] for start, stop in [(0, 144), (6, 54), (102, 150)]])
    ids = bases_and_n(3, 150).masked_fill(~mask, 0)
    out = logits(model, ids, mask.long())
    bins = torch.arange(out.shape[1]) < torch.tensor([[9], [3], [3]])
    assert_close(logits(model, other_strand(ids, mask), mask.long()), backwards(out, bins), 1e-12)


@BOTH_FORMS
@pytest.mark.parametrize("length", [1, 130, 256])
def test_the_base_models_strands_change_places(form, length) -> None:
    model, ids = equivariant(GeneSpliceModel, form), bases_and_n(2, length)
    with torch.no_grad():
        here, there = model(input_ids=ids), model(input_ids=other_strand(ids))
        alone = tiny(GeneSpliceModel, form).double()(input_ids=ids)
    assert_close(here.last_hidden_state, alone.last_hidden_state, 1e-12)
    for one, other in ((here, there), (there, here)):
        assert_close(one.reverse.last_hidden_state, backwards(other.last_hidden_state), 1e-12)
        assert_close(one.reverse.bin_hidden_state, backwards(other.bin_hidden_state), 1e-12)
        for mine, theirs in zip(one.reverse.level_hidden_states, other.level_hidden_states, strict=True):
            assert_close(mine, backwards(theirs), 1e-12)
    assert len(here.strands()) == 2 and len(alone.strands()) == 1


@BOTH_FORMS
def test_recorded_states_and_attentions_are_those_of_the_given_strand(form) -> None:
    ids, wanted = bases_and_n(2, 40), {"output_hidden_states": True, "output_attentions": True}
    both = equivariant(GeneSpliceModel, form, attn_implementation="eager")(input_ids=ids, **wanted)
    one = tiny(GeneSpliceModel, form, attn_implementation="eager").double()(input_ids=ids, **wanted)
    for mine, expected in zip(
        (*both.hidden_states, *both.attentions), (*one.hidden_states, *one.attentions), strict=True
    ):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("use_decoder", [True, False])
def test_bins_that_do_not_match_are_refused(use_decoder) -> None:
    fields = {"num_tracks": 2, "use_decoder": use_decoder}
    tracks = equivariant(GeneSpliceForTrackPrediction, "hierarchical", **fields)
    with pytest.raises(SequenceError, match=r"130 real bases in row 0.*multiples of 128.*128 or 256"):
        tracks(input_ids=random_bases(2, 130))
    mask = torch.ones(2, 256, dtype=torch.long)
    mask[1, :6] = 0
    with pytest.raises(SequenceError, match=r"250 real bases in row 1.*128 or 256"):
        tracks(input_ids=random_bases(2, 256), attention_mask=mask)


def test_bins_alone_that_do_not_match_are_refused() -> None:
    model = equivariant(GeneSpliceModel, "hierarchical", use_decoder=False)
    with pytest.raises(SequenceError, match=r"100 real bases in row 0.*extend it to 128"):
        model(input_ids=random_bases(1, 100))
    assert model(input_ids=random_bases(1, 256)).reverse.last_hidden_state.shape == (1, 2, 32)


def test_a_crop_that_is_not_centred_for_both_strands_is_refused() -> None:
    model = equivariant(
        GeneSpliceForTrackPrediction, "hierarchical", num_tracks=1, track_bin_size=16, track_target_length=5
    )
    ids = bases_and_n(2, 9 * 16)
    out = logits(model, ids)
    assert out.shape == (2, 5, 1)
    assert_close(logits(model, other_strand(ids)), out.flip(1), 1e-12)
    with pytest.raises(SequenceError, match=r"`track_target_length` \(5\).*8 bins of row 0; set it to 6"):
        model(input_ids=bases_and_n(2, 8 * 16))


def test_embeddings_and_causal_configs_are_refused() -> None:
    with pytest.raises(SequenceError, match=r"`inputs_embeds` have no complement; pass `input_ids`"):
        equivariant(GeneSpliceModel, "flat")(inputs_embeds=torch.randn(1, 5, 16, dtype=torch.float64))
    advice = "`rc_equivariant` reads both strands, so `is_decoder` must be False"
    with pytest.raises(StrictDataclassClassValidationError, match=advice):
        tiny_config("flat", rc_equivariant=True, is_decoder=True)
    config = tiny_config("flat", is_decoder=True)
    config.rc_equivariant = True
    for model_class in (GeneSpliceModel, GeneSpliceForCausalLM):
        with pytest.raises(StrictDataclassClassValidationError, match=advice):
            model_class(config)
    with pytest.raises(
        StrictDataclassClassValidationError, match="`token_strand_pairs` must map each of the 2 labels"
    ):
        tiny_config("flat", token_strand_pairs=[1, 2, 0])


@BOTH_FORMS
def test_the_model_is_the_test_time_average_of_the_one_with_a_single_strand(form) -> None:
    """Also of gradients, which training sees."""
    mask = torch.tensor([[start <= i < 90 for i in range(90)] for start in (0, 21)])
    ids = bases_and_n(2, 90).masked_fill(~mask, 0)
    results = []
    for is_equivariant in (True, False):
        model = tiny(GeneSpliceForMaskedLM, form, rc_equivariant=is_equivariant).double()

        def predict(ids, mask, model=model):
            return model(input_ids=ids, attention_mask=mask).logits

        average = partial(average_over_strands, predict, complement_map=VOCABULARY, partner=VOCABULARY)
        out = predict(ids, mask) if is_equivariant else average(ids_BL=ids, attention_mask=mask)
        results.append((out, torch.autograd.grad(out[mask].square().mean(), list(model.parameters()))))
    (built_in, its_gradients), (averaged, gradients) = results
    assert_close(built_in[mask], averaged[mask], 1e-12)
    for mine, expected in zip(its_gradients, gradients, strict=True):
        assert_close(mine, expected, 1e-12)


@BOTH_FORMS
def test_training_on_asked_positions_gives_the_loss_of_all(form) -> None:
    model, ids = equivariant(GeneSpliceForMaskedLM, form), bases_and_n(2, 60)
    labels = ids.masked_fill(torch.rand(2, 60) < 0.8, -100)
    out = model.train()(input_ids=ids, labels=labels)
    whole = logits(model.eval(), ids)
    assert_close(out.logits, whole[labels != -100], 1e-12)
    expected = torch.nn.functional.cross_entropy(whole.transpose(1, 2), labels)
    torch.testing.assert_close(out.loss, expected)


@BOTH_FORMS
def test_track_values_turn_with_the_strand_and_have_no_complement(form) -> None:
    model = equivariant(GeneSpliceForMaskedLM, form, track_inputs=2)
    mask = torch.tensor([[start <= i < stop for i in range(150)] for start, stop in [(0, 150), (40, 150)]])
    ids = bases_and_n(2, 150).masked_fill(~mask, 0)
    values = torch.randn(2, 150, 2, dtype=torch.float64)
    out = logits(model, ids, mask.long(), track_values=values)
    turned = backwards(values, mask)
    other = logits(model, other_strand(ids, mask), mask.long(), track_values=turned)
    assert_close(other[mask], backwards(out, mask)[..., VOCABULARY][mask], 1e-12)
    unturned = logits(model, other_strand(ids, mask), mask.long(), track_values=values)
    assert not torch.allclose(unturned[mask], other[mask], atol=1e-3)
