"""The sequence head, and its three losses, against sums by hand."""

import math

import pytest
import torch

from genesplice_hf.heads.pooling import masked_max, masked_mean
from genesplice_hf.heads.sequence import SequenceClassificationHead, infer_problem_type, sequence_loss

MASK = torch.tensor([[True, True, False], [False, True, True]])
LOGITS = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.0, -0.5]])


@pytest.mark.parametrize(("pooling", "pool"), [("mean", masked_mean), ("bin_mean", masked_mean), ("max", masked_max)])
def test_it_pools_and_projects(pooling, pool) -> None:
    head, x = SequenceClassificationHead(4, 3, pooling, dropout=0.0), torch.randn(2, 3, 4)
    expected = pool(x, MASK) @ head.out_proj.weight.T + head.out_proj.bias
    torch.testing.assert_close(head(x, MASK), expected)


def test_the_query_of_attention_pooling_is_part_of_the_head() -> None:
    head = SequenceClassificationHead(4, 3, "attention", dropout=0.0)
    assert set(head.state_dict()) == {"attention_pooling.query.weight", "out_proj.weight", "out_proj.bias"}
    plain = SequenceClassificationHead(4, 3, "mean", dropout=0.0)
    assert set(plain.state_dict()) == {"out_proj.weight", "out_proj.bias"}


def test_dropout_acts_in_training_alone() -> None:
    head, x = SequenceClassificationHead(64, 3, "mean", dropout=0.5), torch.randn(2, 3, 64)
    assert torch.equal(head.eval()(x, MASK), head(x, MASK))
    assert not torch.equal(head(x, MASK), head.train()(x, MASK))


@pytest.mark.parametrize(
    ("declared", "num_labels", "labels", "expected"),
    [
        (None, 1, torch.zeros(2), "regression"),
        (None, 1, torch.zeros(2, dtype=torch.long), "regression"),
        (None, 3, torch.zeros(2, dtype=torch.long), "single_label_classification"),
        (None, 3, torch.zeros(2, 3), "multi_label_classification"),
        ("regression", 3, torch.zeros(2, 3), "regression"),
        ("multi_label_classification", 1, torch.zeros(2, 1), "multi_label_classification"),
    ],
)
def test_labels_tell_the_problem_unless_it_is_declared(declared, num_labels, labels, expected) -> None:
    assert infer_problem_type(declared, num_labels, labels) == expected


def test_single_label_loss_is_the_mean_cross_entropy() -> None:
    classes = [2, 1]
    nats = [math.log(sum(math.exp(s) for s in row)) - row[c] for row, c in zip(LOGITS.tolist(), classes, strict=True)]
    loss = sequence_loss(LOGITS, torch.tensor(classes), "single_label_classification")
    assert loss.item() == pytest.approx(sum(nats) / 2, abs=1e-6)


def test_multi_label_loss_is_the_mean_binary_cross_entropy() -> None:
    targets = torch.tensor([[1, 0, 1], [0, 0, 1]])
    nats = [
        math.log(1 + math.exp(-score if target else score))
        for score, target in zip(LOGITS.flatten().tolist(), targets.flatten().tolist(), strict=True)
    ]
    loss = sequence_loss(LOGITS, targets, "multi_label_classification")
    assert loss.item() == pytest.approx(sum(nats) / 6, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.long])
def test_regression_loss_is_the_mean_squared_error(dtype) -> None:
    """Labels (B,) against logits (B, 1) must pair up, never spread to (B, B)."""
    loss = sequence_loss(torch.tensor([[1.5], [-2.0]]), torch.tensor([1, 2], dtype=dtype), "regression")
    assert loss.item() == pytest.approx((0.5**2 + 4.0**2) / 2)
    several = sequence_loss(LOGITS, torch.ones(2, 3, dtype=dtype), "regression")
    assert several.item() == pytest.approx(sum((s - 1) ** 2 for s in LOGITS.flatten().tolist()) / 6)


@pytest.mark.parametrize(
    ("problem", "labels", "terms"),
    [
        ("single_label_classification", torch.tensor([2, 1]), 2),
        ("multi_label_classification", torch.ones(2, 3), 6),
        ("regression", torch.ones(2, 3), 6),
    ],
)
def test_with_a_count_it_is_the_sum_over_the_count(problem, labels, terms) -> None:
    mean = sequence_loss(LOGITS, labels, problem)
    for count in (10, torch.tensor(10)):
        loss = sequence_loss(LOGITS, labels, problem, num_items_in_batch=count)
        torch.testing.assert_close(loss, mean * terms / 10)


def test_half_precision_logits_are_summed_in_float32() -> None:
    assert sequence_loss(LOGITS.bfloat16(), torch.tensor([2, 1]), "single_label_classification").dtype == torch.float32


def test_labels_of_another_shape_raise() -> None:
    with pytest.raises(RuntimeError):
        sequence_loss(LOGITS, torch.ones(2, 2), "regression")


@pytest.mark.parametrize("num_items", [None, 4])
def test_rows_without_a_class_are_ignored(num_items) -> None:
    some = sequence_loss(LOGITS, torch.tensor([2, -100]), "single_label_classification", num_items)
    alone = sequence_loss(LOGITS[:1], torch.tensor([2]), "single_label_classification", num_items)
    torch.testing.assert_close(some, alone)
