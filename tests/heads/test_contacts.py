"""Vectors of pairs and symmetric maps, and the loss over known values."""

import pytest
import torch

from genesplice_hf.errors import SequenceError
from genesplice_hf.heads.contacts import contact_loss, num_pairs, vector_to_map


@pytest.mark.parametrize(("num_bins", "offset"), [(1, 0), (4, 0), (5, 1), (6, 2), (7, 3), (448, 2)])
def test_the_vector_fills_a_symmetric_map(num_bins: int, offset: int) -> None:
    vector = torch.randn(2, num_pairs(num_bins, offset), 3)
    found = vector_to_map(vector, num_bins, offset, fill=-7.0)
    assert torch.equal(found, found.transpose(1, 2))
    rows, columns = torch.triu_indices(num_bins, num_bins, offset)
    assert torch.equal(found[:, rows, columns], vector)
    near = (torch.arange(num_bins)[:, None] - torch.arange(num_bins)).abs() < offset
    assert bool((found[:, near] == -7).all())


def test_published_number_of_pairs() -> None:
    assert num_pairs(448, 2) == 99_681
    assert num_pairs(2, 2) == num_pairs(1, 2) == 0


def test_a_vector_of_another_size_is_refused() -> None:
    with pytest.raises(SequenceError, match="10 pairs"):
        vector_to_map(torch.zeros(1, 9, 2), 6, 2)


def test_the_loss_is_the_mean_over_known_values() -> None:
    predictions = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], requires_grad=True)
    labels = torch.tensor([[[0.0, torch.nan], [torch.nan, 6.0]]])
    loss = contact_loss(predictions, labels)
    assert loss.item() == pytest.approx((1 + 4) / 2)
    loss.backward()
    assert predictions.grad.tolist() == [[[1.0, 0.0], [0.0, -2.0]]]


def test_nothing_known_is_no_loss() -> None:
    predictions = torch.ones(1, 2, 1, requires_grad=True)
    loss = contact_loss(predictions, torch.full((1, 2, 1), torch.nan))
    loss.backward()
    assert loss.item() == 0
    assert not predictions.grad.any()


def test_half_precision_is_squared_in_float32() -> None:
    predictions = torch.full((1, 1, 1), 300.0, dtype=torch.float16)
    assert contact_loss(predictions, torch.zeros(1, 1, 1)).item() == 90_000


def test_labels_of_another_shape_are_refused() -> None:
    with pytest.raises(SequenceError, match="target_crop"):
        contact_loss(torch.zeros(1, 3, 2), torch.zeros(1, 4, 2))
