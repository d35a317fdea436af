"""Tracks beside the sequence and tracks as the answer.

Shapes: B batch, L bases, M bins, T tracks, E hidden size.
"""

import math

import numpy as np
import pytest
import torch
from tiny_genesplice import FORMS, random_bases, tiny, tiny_config

from genesplice_hf.errors import SequenceError
from genesplice_hf.models.auto import AutoModelForTrackPrediction
from genesplice_hf.models.genesplice.modeling_genesplice import (
    GeneSpliceForMaskedLM,
    GeneSpliceForTrackPrediction,
    GeneSpliceModel,
)

BOTH_FORMS = pytest.mark.parametrize("form", FORMS)
LENGTH = 300


def rows(length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows, the second with padding on both sides."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :41] = mask[1, 200:] = 0
    return random_bases(2, length) * mask, mask


def predictor(form: str, **fields) -> GeneSpliceForTrackPrediction:
    return tiny(GeneSpliceForTrackPrediction, form, **({"num_tracks": 3} | fields)).double()


# Track inputs


@BOTH_FORMS
def test_values_are_projected_and_added_to_the_embedding(form) -> None:
    model, (ids, mask) = tiny(GeneSpliceModel, form, track_inputs=2), rows()
    values = torch.randn(2, LENGTH, 2)
    out = model(input_ids=ids, attention_mask=mask, track_values=values).last_hidden_state
    assert list(dict(model.track_proj.named_parameters())) == ["weight"]
    embeds = model.embeddings(ids) + values @ model.track_proj.weight.T
    zeros = torch.zeros_like(values)
    expected = model(inputs_embeds=embeds, attention_mask=mask, track_values=zeros).last_hidden_state
    torch.testing.assert_close(out, expected)
    assert not torch.allclose(out, model(input_ids=ids, attention_mask=mask, track_values=zeros).last_hidden_state)


@BOTH_FORMS
def test_what_stands_in_padding_does_not_matter(form) -> None:
    model, (ids, mask) = tiny(GeneSpliceModel, form, track_inputs=2), rows()
    values = torch.randn(2, LENGTH, 2)
    expected = model(input_ids=ids, attention_mask=mask, track_values=values).last_hidden_state
    values[mask == 0] = torch.nan
    assert torch.equal(model(input_ids=ids, attention_mask=mask, track_values=values).last_hidden_state, expected)


@pytest.mark.parametrize(
    ("channels", "values", "advice"),
    [
        (2, None, "`track_values` are missing: the config says `track_inputs=2`"),
        (0, torch.zeros(1, 9, 1), "`track_values` have no effect with `track_inputs=0`; leave them out"),
        (2, torch.zeros(1, 9, 3), r"must be \(batch, length, `track_inputs`\) = \(1, 9, 2\), got \(1, 9, 3\)"),
        (2, torch.zeros(1, 8, 2), r"\(1, 9, 2\), got \(1, 8, 2\)"),
        (1, torch.full((1, 9, 1), torch.nan), "must be finite; fill missing ones"),
    ],
)
def test_values_that_do_not_fit_are_refused(channels, values, advice) -> None:
    with pytest.raises(SequenceError, match=advice):
        tiny(GeneSpliceModel, "flat", track_inputs=channels)(input_ids=random_bases(1, 9), track_values=values)


def test_values_are_learned_from_through_a_head() -> None:
    model, (ids, mask) = tiny(GeneSpliceForMaskedLM, "hierarchical", track_inputs=2), rows()
    model(input_ids=ids, attention_mask=mask, track_values=torch.randn(2, LENGTH, 2), labels=ids).loss.backward()
    assert model.genesplice.track_proj.weight.grad.abs().min() > 0


# Track prediction


def features_by_hand(model: GeneSpliceForTrackPrediction, ids: torch.Tensor, bin_size: int) -> torch.Tensor:
    """States of the bins of rows without padding, with loops over the tokens of the level that the table names."""
    out = model.genesplice(input_ids=ids)
    pools = model.config.pool_sizes
    sizes = {math.prod(pools[:level]): level for level in range(len(pools) + 1)}
    size = max(size for size in sizes if bin_size % size == 0)
    length, tokens = ids.shape[1], out.level_hidden_states[sizes[size]]
    bins = []
    for start in range(0, length, bin_size):
        first, last = start // size, math.ceil(min(start + bin_size, length) / size)
        bins.append(torch.stack([tokens[:, i] for i in range(first, last)]).mean(0))
    return torch.stack(bins, 1)


@pytest.mark.parametrize(
    ("form", "bin_size"),
    [
        ("flat", 1), ("flat", 7), ("flat", 32),
        *(("hierarchical", size) for size in (1, 8, 16, 24, 32, 48, 128, 256, 384)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("length", [1, 20, 300])
def test_a_bin_is_the_mean_of_its_tokens(form, bin_size, length) -> None:
    model, ids = predictor(form, track_bin_size=bin_size), random_bases(2, length)
    features = features_by_hand(model, ids, bin_size)
    expected = np.logaddexp(0, model.classifier.out_proj(features).detach().numpy())
    out = model(input_ids=ids).logits
    assert out.shape == (2, math.ceil(length / bin_size), 3)
    np.testing.assert_allclose(out.detach().numpy(), expected, rtol=0, atol=1e-12)


def test_the_states_of_the_levels_are_those_of_the_network() -> None:
    model, ids = tiny(GeneSpliceModel, "hierarchical"), random_bases(2, 200)
    left = []
    for level in (0, 1):
        model.decoder[level][-1].register_forward_hook(lambda module, args, output: left.append(output))
    out = model(input_ids=ids)
    bases, middle, bins = out.level_hidden_states
    assert torch.equal(bases, out.last_hidden_state) and torch.equal(bins, out.bin_hidden_state)
    # The last of the 13 tokens of 16 bases holds 8; what lies behind it is cut.
    assert middle.shape == (2, 13, 24) and torch.equal(middle, left[0][:, :13])


@BOTH_FORMS
@pytest.mark.parametrize("bin_size", [1, 5, 16, 128])
@pytest.mark.parametrize("target", [None, 1])
def test_padding_changes_nothing(form, bin_size, target) -> None:
    model, (ids, mask) = predictor(form, track_bin_size=bin_size, track_target_length=target), rows()
    out = model(input_ids=ids, attention_mask=mask).logits
    alone = model(input_ids=ids[1:, 41:200]).logits
    start = 41 if bin_size == 1 and target is None else 0
    torch.testing.assert_close(out[1:, start : start + alone.shape[1]], alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(out[:1], model(input_ids=ids[:1]).logits, rtol=0, atol=1e-10)
    rest = torch.ones(out.shape[1], dtype=torch.bool)
    rest[start : start + alone.shape[1]] = False
    assert not out[1, rest].any()


@BOTH_FORMS
@pytest.mark.parametrize("kind", ["poisson", "poisson_multinomial"])
def test_the_loss_is_over_real_bins_with_a_value(form, kind) -> None:
    model, (ids, mask) = predictor(form, track_bin_size=16, track_loss=kind), rows()
    targets = torch.rand(2, 19, 3, dtype=torch.float64) * 5
    targets[0, 4] = torch.nan
    found = model(input_ids=ids, attention_mask=mask, labels=targets)
    p, y = found.logits.detach().numpy(), targets.numpy()
    # 159 real bases make ten bins.
    parts = [(p[0][~np.isnan(y[0, :, 0])], y[0][~np.isnan(y[0, :, 0])]), (p[1, :10], y[1, :10])]
    if kind == "poisson":
        losses = np.concatenate([(a - b * np.log(a)).ravel() for a, b in parts])
    else:
        losses = np.concatenate([
            (a.sum(0) - b.sum(0) * np.log(a.sum(0)) - (b * np.log(a / a.sum(0))).sum(0)) / len(a) for a, b in parts
        ])  # fmt: skip
    assert found.loss.item() == pytest.approx(losses.mean(), rel=1e-5)
    targets[1, 10:] = 1e9
    assert model(input_ids=ids, attention_mask=mask, labels=targets).loss.item() == pytest.approx(found.loss.item())


def test_targets_are_cropped_in_the_middle() -> None:
    whole, cropped = (predictor("hierarchical", track_bin_size=16, track_target_length=n) for n in (None, 4))
    ids, mask = rows()
    everything = whole(input_ids=ids, attention_mask=mask).logits
    found = cropped(input_ids=ids, attention_mask=mask, labels=torch.ones(2, 4, 3))
    # 19 bins: seven before; 10 bins: three before.
    torch.testing.assert_close(found.logits, torch.stack([everything[0, 7:11], everything[1, 3:7]]))
    with pytest.raises(SequenceError, match=r"`labels` must be \(batch, bins, tracks\) = \(2, 4, 3\)"):
        cropped(input_ids=ids, attention_mask=mask, labels=torch.ones(2, 19, 3))
    with pytest.raises(SequenceError, match=r"`track_target_length` \(4\) is larger than the 2 bins of row 0"):
        cropped(input_ids=ids[:, :32])


def test_without_a_decoder_bins_alone_exist() -> None:
    full = predictor("hierarchical", track_bin_size=256)
    short = predictor("hierarchical", track_bin_size=256, use_decoder=False)
    short.load_state_dict({name: full.state_dict()[name] for name in short.state_dict()})
    ids = random_bases(2, 600)
    torch.testing.assert_close(short(input_ids=ids).logits, full(input_ids=ids).logits)
    with pytest.raises(ValueError, match="multiple of 128 bases without a decoder, got 16"):
        predictor("hierarchical", track_bin_size=16, use_decoder=False)


def test_a_model_without_tracks_is_refused() -> None:
    with pytest.raises(ValueError, match="`num_tracks` must be at least 1 for GeneSpliceForTrackPrediction, got 0"):
        GeneSpliceForTrackPrediction(tiny_config("flat"))


def test_the_auto_class_of_the_task(tmp_path) -> None:
    config = tiny_config("hierarchical", num_tracks=2)
    model = AutoModelForTrackPrediction.from_config(config)
    assert type(model) is GeneSpliceForTrackPrediction
    model.save_pretrained(tmp_path)
    loaded = AutoModelForTrackPrediction.from_pretrained(tmp_path)
    ids = random_bases(1, 150)
    torch.testing.assert_close(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
