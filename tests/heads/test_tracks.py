"""Losses of tracks against numpy and torch's own, and the centred crop against slices.

Shapes: B batch, M bins, T tracks.
"""

import numpy as np
import pytest
import torch

from genesplice_hf.errors import SequenceError
from genesplice_hf.heads.tracks import TrackHead, centred_crop, poisson_multinomial_loss, track_loss

KINDS = pytest.mark.parametrize("kind", ["poisson", "poisson_multinomial"])
EPSILON = 1e-7


def counts(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predictions, targets with unknown bins (in one track of one row all of them), and a mask with padding."""
    generator = np.random.default_rng(seed)
    predictions = generator.gamma(2.0, 3.0, (3, 7, 4))
    targets = generator.poisson(5.0, (3, 7, 4)).astype(float)
    targets[0, 2] = targets[1, :, 3] = targets[2, 5, 0] = np.nan
    mask = np.arange(7)[None] < np.array([7, 4, 6])[:, None]
    return torch.tensor(predictions), torch.tensor(targets), torch.tensor(mask)


def by_hand(predictions, targets, mask, kind: str) -> float:
    """The equations of the docstrings with loops, in numpy."""
    p, y = predictions.numpy(), targets.numpy()
    valid = ~np.isnan(y) & mask.numpy()[..., None]
    if kind == "poisson":
        return float(np.mean([a - b * np.log(a) for a, b in zip(p[valid], y[valid], strict=True)]))
    losses = []
    for row in range(p.shape[0]):
        for track in range(p.shape[2]):
            keep = valid[row, :, track]
            if not keep.any():
                continue
            a, b = p[row, keep, track], y[row, keep, track]
            poisson = (a.sum() - b.sum() * np.log(a.sum() + EPSILON)) / len(a)
            multinomial = -np.sum((b + EPSILON) * np.log((a + EPSILON) / a.sum())) / len(a)
            losses.append(poisson + multinomial)
    return float(np.mean(losses))


@KINDS
@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_is_the_equation(kind, seed) -> None:
    predictions, targets, mask = counts(seed)
    expected = by_hand(predictions, targets, mask, kind)
    assert track_loss(predictions, targets, mask, kind).item() == pytest.approx(expected, rel=1e-12)
    # In float32 at least, whatever comes.
    half = track_loss(predictions.half(), targets.half(), mask, kind)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(expected, rel=2e-3)


def test_poisson_is_torchs_own() -> None:
    predictions, targets, mask = counts()
    valid = ~targets.isnan() & mask[..., None]
    expected = torch.nn.functional.poisson_nll_loss(predictions[valid], targets[valid], log_input=False, eps=0.0)
    torch.testing.assert_close(track_loss(predictions, targets, mask, "poisson"), expected)


@KINDS
def test_the_best_prediction_is_the_target(kind) -> None:
    _, targets, mask = counts()
    valid = ~targets.isnan() & mask[..., None]
    best = targets.nan_to_num(1.0).clamp(min=0.1).requires_grad_()
    loss = track_loss(best, targets.clamp(min=0.1), mask, kind)
    (gradient,) = torch.autograd.grad(loss, best)
    assert gradient.abs().max() < 1e-6
    for factor in (0.9, 1.1):
        assert track_loss(best * factor, targets.clamp(min=0.1), mask, kind) > loss
    assert not gradient[~valid].any()


@KINDS
def test_nothing_known_is_zero_with_a_gradient_of_zero(kind) -> None:
    predictions, targets, mask = counts()
    predictions.requires_grad_()
    loss = track_loss(predictions, torch.full_like(targets, torch.nan), mask, kind)
    loss.backward()
    assert loss.item() == 0 and not predictions.grad.any()


@KINDS
def test_predictions_of_zero_are_finite(kind) -> None:
    zeros = torch.zeros(1, 4, 1, requires_grad=True)
    loss = track_loss(zeros, torch.ones(1, 4, 1), torch.ones(1, 4, dtype=torch.bool), kind)
    loss.backward()
    assert loss.isfinite() and zeros.grad.isfinite().all()


def test_the_weight_of_the_total() -> None:
    predictions, targets, _ = counts()
    targets = targets.nan_to_num(2.0)
    valid = torch.ones_like(targets, dtype=torch.bool)
    parts = [poisson_multinomial_loss(predictions, targets, valid, weight) for weight in (0.0, 1.0, 3.0)]
    torch.testing.assert_close(parts[2] - parts[0], 3 * (parts[1] - parts[0]))


@pytest.mark.parametrize(
    ("targets", "advice"),
    [
        (torch.zeros(3, 6, 4), r"\(3, 7, 4\), were \(3, 6, 4\).*track_target_length"),
        (torch.full((3, 7, 4), -1.0), "must not be negative; use NaN"),
    ],
)
def test_targets_that_cannot_be_are_refused(targets, advice) -> None:
    predictions, _, mask = counts()
    with pytest.raises(SequenceError, match=advice):
        track_loss(predictions, targets, mask, "poisson")


def test_the_crop_is_in_the_middle_of_the_real_bins() -> None:
    x = torch.arange(3 * 9.0).view(3, 9, 1)
    mask = torch.tensor([[start <= i < stop for i in range(9)] for start, stop in [(0, 9), (0, 6), (4, 9)]])
    cropped, kept = centred_crop(x, mask, 4)
    for row, start in enumerate([2, 1, 4]):
        assert torch.equal(cropped[row], x[row, start : start + 4])
    assert kept.all()
    assert torch.equal(centred_crop(x[:1], mask[:1], 9)[0], x[:1])


def test_a_crop_larger_than_a_row_is_refused_and_a_row_of_padding_is_not() -> None:
    x, mask = torch.randn(2, 9, 1), torch.ones(2, 9, dtype=torch.bool)
    mask[1, 3:] = False
    with pytest.raises(SequenceError, match=r"`track_target_length` \(4\) is larger than the 3 bins of row 1"):
        centred_crop(x, mask, 4)
    with pytest.raises(SequenceError, match=r"\(10\) is larger than the 9 bins of row 0"):
        centred_crop(x[:1], mask[:1], 10)
    mask[1] = False
    assert not centred_crop(x, mask, 4)[1][1].any()


def test_the_head_is_positive_and_wide() -> None:
    head = TrackHead(8, 3, 0.0)
    x = torch.randn(2, 5, 8) * 20
    expected = torch.log1p(torch.exp((x @ head.out_proj.weight.T + head.out_proj.bias).double())).float()
    torch.testing.assert_close(head(x), expected)
    assert head.bfloat16()(x.bfloat16()).dtype == torch.float32
    assert head.double()(x.double()).dtype == torch.float64
    assert (head(x.double()) >= 0).all()
