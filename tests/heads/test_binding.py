"""Losses and heads of binding against closed forms.

Shapes: B pairs, T bins, S tracks, H latent heads, C labels.
"""

import math

import pytest
import torch

from genesplice_hf.errors import SequenceError
from genesplice_hf.heads.binding import (
    BindingHead,
    ReadValueHead,
    binding_label_loss,
    binding_track_loss,
    fourier_features,
    read_value_loss,
)

NAN = math.nan


def test_poisson_and_squares() -> None:
    predictions, targets = torch.tensor([[[2.0], [0.5], [3.0]]]), torch.tensor([[[1.0], [2.0], [NAN]]])
    mask = torch.ones(1, 3).bool()
    poisson = binding_track_loss(predictions, targets, mask, "poisson")
    assert poisson.loss.item() == pytest.approx(((2 - math.log(2)) + (0.5 - 2 * math.log(0.5))) / 2)
    assert poisson.count == 2
    assert binding_track_loss(predictions, targets, None, "mse").loss.item() == pytest.approx((1 + 1.5**2) / 2)
    mask[0, 1] = False
    assert binding_track_loss(predictions, targets, mask, "mse").loss.item() == pytest.approx(1.0)


@pytest.mark.parametrize(("slope", "expected"), [(2.0, 0.0), (-0.5, 2.0)])
def test_correlation_of_a_line(slope: float, expected: float) -> None:
    targets = torch.rand(3, 9, 2, dtype=torch.float64)
    predictions = (slope * targets + 4).requires_grad_()
    found = binding_track_loss(predictions, targets, None, "correlation")
    assert found.loss.item() == pytest.approx(expected, abs=1e-9) and found.count == 6


def test_constant_targets_are_left_out_of_the_correlation() -> None:
    torch.manual_seed(0)
    predictions, targets = torch.rand(2, 9, 1).requires_grad_(), torch.rand(2, 9, 1)
    alone = binding_track_loss(predictions[:1], targets[:1], None, "correlation").loss
    targets[1] = 0.1
    both = binding_track_loss(predictions, targets, None, "correlation")
    torch.testing.assert_close(both.loss, alone)
    assert both.count == 1
    targets[0, 1:] = NAN
    none = binding_track_loss(predictions, targets, None, "correlation")
    none.loss.backward()
    assert none.loss == 0 and none.count == 0 and not predictions.grad.any()


def test_constant_predictions_have_a_finite_gradient() -> None:
    predictions = torch.ones(1, 5, 1).requires_grad_()
    binding_track_loss(predictions, torch.rand(1, 5, 1), None, "correlation").loss.backward()
    assert predictions.grad.isfinite().all()


def test_bad_targets_are_advice() -> None:
    with pytest.raises(SequenceError, match=r"labels.*\(1, 3, 1\)"):
        binding_track_loss(torch.ones(1, 3, 1), torch.ones(1, 4, 1), None, "poisson")
    with pytest.raises(SequenceError, match="negative"):
        binding_track_loss(torch.ones(1, 3, 1), -torch.ones(1, 3, 1), None, "poisson")


def test_labels() -> None:
    logits, labels = torch.tensor([[0.0], [2.0], [1.0]]), torch.tensor([1.0, 0.0, NAN])
    bce = binding_label_loss(logits, labels, "bce")
    assert bce.loss.item() == pytest.approx((math.log(2) + math.log(1 + math.exp(2))) / 2) and bce.count == 2
    squares = binding_label_loss(logits, labels, "mse").loss.item()
    assert squares == pytest.approx((0.25 + (1 / (1 + math.exp(-2))) ** 2) / 2)
    assert binding_label_loss(logits, labels, "mse", on_logits=True).loss.item() == pytest.approx((1 + 4) / 2)
    weighted = binding_label_loss(logits, labels, "bce", pos_weight=3.0).loss.item()
    assert weighted == pytest.approx((3 * math.log(2) + math.log(1 + math.exp(2))) / 2)
    assert binding_label_loss(logits, torch.full((3,), NAN), "bce").loss == 0
    with pytest.raises(SequenceError, match="num_labels"):
        binding_label_loss(logits, torch.ones(3, 2), "bce")


def test_fourier_features_by_hand() -> None:
    found = fourier_features(torch.tensor([[2.0]], dtype=torch.float64), 4)[0]
    slow = math.exp(-math.log(20_000) / 2)
    assert found.tolist() == pytest.approx([math.sin(2), math.sin(2 * slow), math.cos(2), math.cos(2 * slow)])


def test_unknown_peak_counts_are_a_learned_vector() -> None:
    torch.manual_seed(0)
    head, x = ReadValueHead(4, 6), torch.randn(3, 5, 4)
    torch.nn.init.normal_(head.unknown)
    counts = torch.tensor([[10.0], [NAN], [0.0]])
    found = head(x, None, counts)
    assert found.shape == (3, 1) and found.isfinite().all()
    torch.testing.assert_close(head(x, None, None)[1], found[1])
    torch.testing.assert_close(head(x, None, counts[:, 0]), found)
    assert not torch.allclose(head(x[2:], None, torch.tensor([NAN])), found[2:])
    found.sum().backward()
    assert head.unknown.grad.any()
    with pytest.raises(SequenceError, match="reference"):
        ReadValueHead(4, 6, "reference")(x, None, counts)
    with pytest.raises(SequenceError, match="peaks_nr"):
        head(x, None, torch.ones(2))


def test_read_values_that_are_unknown_do_not_count() -> None:
    found = torch.tensor([[0.5], [3.0], [9.0]])
    assert read_value_loss(found, torch.tensor([0.0, 0.0, NAN])).loss.item() == pytest.approx((0.125 + 2.5) / 2)
    assert read_value_loss(found, torch.full((3, 1), NAN)).loss == 0


def test_the_head_averages_real_bins() -> None:
    torch.manual_seed(0)
    head, x = BindingHead(4, 2), torch.randn(2, 3, 4)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 2), value=5.0)
    mask = torch.tensor([[1, 1, 1, 0, 0]]).bool()
    torch.testing.assert_close(head(padded, mask.expand(2, -1)), head(x, None))
