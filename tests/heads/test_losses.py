"""Weighted cross entropy against sums by hand, and the law of gradient accumulation."""

import math

import pytest
import torch

from genesplice_hf.heads.losses import IGNORED, shift_left, weighted_cross_entropy

LABELS = torch.tensor([[1, IGNORED, 0], [2, 2, IGNORED]])
WEIGHTS = torch.tensor([[1.0, 5.0, 0.25], [0.5, 0.0, 5.0]])


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)


def terms(logits: torch.Tensor, weights: torch.Tensor | None) -> list[tuple[float, float]]:
    """(weight, -log p) of every label, in plain Python."""
    found = []
    for b in range(2):
        for i in range(3):
            label = int(LABELS[b, i])
            if label != IGNORED:
                scores = logits[b, i].tolist()
                nats = math.log(sum(math.exp(s) for s in scores)) - scores[label]
                found.append((1.0 if weights is None else float(weights[b, i]), nats))
    return found


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_without_a_count_it_is_the_weighted_mean(logits, weights) -> None:
    parts = terms(logits, weights)
    expected = sum(w * nats for w, nats in parts) / sum(w for w, _ in parts)
    assert weighted_cross_entropy(logits, LABELS, weights).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("count", [7, torch.tensor(7)], ids=["int", "tensor"])
def test_with_a_count_it_is_the_weighted_sum_over_the_count(logits, weights, count) -> None:
    expected = sum(w * nats for w, nats in terms(logits, weights)) / 7
    loss = weighted_cross_entropy(logits, LABELS, weights, num_items_in_batch=count)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_micro_batches_add_up_to_the_whole_batch(logits) -> None:
    whole = weighted_cross_entropy(logits, LABELS, num_items_in_batch=4)
    parts = [weighted_cross_entropy(logits[b], LABELS[b], num_items_in_batch=4) for b in range(2)]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(whole, weighted_cross_entropy(logits, LABELS))


def test_ignored_and_weightless_positions_get_no_gradient(logits) -> None:
    weighted_cross_entropy(logits, LABELS, WEIGHTS).backward()
    silent = (LABELS == IGNORED) | (WEIGHTS == 0)
    assert torch.equal(logits.grad[silent], torch.zeros(3, 4, dtype=torch.float64))
    assert (logits.grad[~silent] != 0).all()


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)], ids=["none", "int", "tensor"])
@pytest.mark.parametrize("rows", [0, 2], ids=["no row", "no label"])
def test_nothing_labelled_gives_zero_and_a_gradient_of_zero(count, rows) -> None:
    logits = torch.randn(rows, 4, requires_grad=True)
    loss = weighted_cross_entropy(logits, torch.full((rows,), IGNORED), num_items_in_batch=count)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(rows, 4))


def test_bfloat16_logits_are_summed_in_float32(logits) -> None:
    rounded = logits.detach().bfloat16()
    loss = weighted_cross_entropy(rounded, LABELS)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, weighted_cross_entropy(rounded.float(), LABELS))


def test_position_i_holds_what_token_i_must_predict() -> None:
    assert shift_left(torch.tensor([[5, 6, 7], [8, 5, 6]]), IGNORED).tolist() == [[6, 7, IGNORED], [5, 6, IGNORED]]
    assert shift_left(torch.tensor([[0.5]]), 0.0).tolist() == [[0.0]]
