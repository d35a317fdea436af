"""What a model accepts, and what it says when it does not."""

import pytest
import torch

from genesplice_hf.errors import SequenceError
from genesplice_hf.layers.padding import as_mask, demand_one_input, real_positions, zero_padding

IDS = torch.full((2, 3), 5)


@pytest.mark.parametrize(("ids", "embeds"), [(None, None), (IDS, torch.zeros(2, 3, 4))])
def test_exactly_one_input(ids: torch.Tensor | None, embeds: torch.Tensor | None) -> None:
    with pytest.raises(SequenceError, match="exactly one of `input_ids` and `inputs_embeds`"):
        demand_one_input(ids, embeds)


def test_one_input_of_one_base_is_enough() -> None:
    demand_one_input(IDS[:, :1], None)
    demand_one_input(None, torch.zeros(1, 1, 4))


@pytest.mark.parametrize("width", [None, 4])
def test_empty_sequences_raise(width: int | None) -> None:
    empty = torch.zeros(2, 0, dtype=torch.long) if width is None else torch.zeros(2, 0, width)
    with pytest.raises(SequenceError, match="at least one base"):
        demand_one_input(empty if width is None else None, None if width is None else empty)


def test_no_mask_and_a_full_mask_mean_the_same() -> None:
    assert real_positions(None) is None
    assert real_positions(torch.ones(2, 5, dtype=torch.long)) is None


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_padding_may_stand_on_either_side_or_everywhere(dtype: torch.dtype) -> None:
    rows = [[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    mask = real_positions(torch.tensor(rows).to(dtype))
    assert mask is not None and mask.dtype == torch.bool
    assert mask.long().tolist() == rows


@pytest.mark.parametrize("hole", [[1, 0, 1, 1], [0, 1, 0, 1], [1, 0, 0, 1]])
def test_a_hole_raises_and_names_its_row(hole: list[int]) -> None:
    with pytest.raises(SequenceError, match=r"hole in row 1.*N token"):
        real_positions(torch.tensor([[1, 1, 1, 0], hole]))


def test_a_mask_of_another_shape_raises() -> None:
    with pytest.raises(SequenceError, match=r"\(batch, length\).*\(1, 1, 4, 4\)"):
        real_positions(torch.ones(1, 1, 4, 4))


def test_zeroing_touches_padding_alone() -> None:
    x = torch.randn(1, 3, 2)
    mask = torch.tensor([[False, True, True]])
    zeroed = zero_padding(x, mask)
    assert torch.equal(zeroed[:, 1:], x[:, 1:]) and torch.equal(zeroed[:, :1], torch.zeros(1, 1, 2))
    assert zero_padding(x, None) is x


def test_with_a_cache_the_end_of_the_mask_belongs_to_x() -> None:
    x = torch.ones(1, 2, 1)
    past_and_now = torch.tensor([[False, False, True, False]])
    assert zero_padding(x, past_and_now).flatten().tolist() == [1.0, 0.0]


def test_a_missing_mask_counts_as_all_real() -> None:
    assert as_mask(None, torch.zeros(2, 3, 4)).tolist() == [[True] * 3] * 2
    mask = torch.tensor([[True, False]])
    assert as_mask(mask, torch.zeros(1, 2, 4)) is mask
