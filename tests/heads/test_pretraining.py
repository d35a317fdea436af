"""The losses of pretraining against slow twins in numpy, finite differences and limits that can be worked out."""

import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from genesplice_hf.heads import contrast
from genesplice_hf.heads.contrast import mean_over_processes
from genesplice_hf.heads.pretraining import Rows, info_nce, stack_rows
from genesplice_hf.heads.pretraining_head import PretrainingHead, PretrainingOptions, next_segment_loss

ALL = PretrainingOptions(contrastive_dim=6, next_segment_weight=1.0)


def pairs(count: int, size: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of embeddings of length 1, in float64."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, count, size, generator=generator, dtype=torch.float64)
    return tuple(nn.functional.normalize(both, dim=-1))


def twin(first: np.ndarray, second: np.ndarray, temperature: float) -> float:
    """The formula, anchor by anchor."""
    points = [*first, *second]
    losses = []
    for i, anchor in enumerate(points):
        partner = (i + len(first)) % len(points)
        weights = {j: math.exp(anchor @ other / temperature) for j, other in enumerate(points) if j != i}
        losses.append(-math.log(weights[partner] / sum(weights.values())))
    return sum(losses) / len(losses)


@given(st.integers(2, 9), st.sampled_from([0.05, 0.07, 0.5, 1.0, 10.0]), st.integers(0, 1000))
def test_info_nce_is_its_formula(count, temperature, seed):
    first, second = pairs(count, seed=seed)
    expected = twin(first.numpy(), second.numpy(), temperature)
    assert info_nce(first, second, temperature).item() == pytest.approx(expected, rel=1e-12)
    single = info_nce(first.float(), second.float(), temperature)
    assert single.dtype == torch.float32 and single.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("count", [2, 5])
def test_the_gradient_of_info_nce_is_that_of_finite_differences(count):
    first, second = (x.clone().requires_grad_() for x in pairs(count))
    assert torch.autograd.gradcheck(lambda a, b: info_nce(a, b, 0.3), (first, second))


def test_info_nce_in_the_limits():
    same = nn.functional.normalize(torch.ones(4, 3, dtype=torch.float64), dim=-1)
    assert info_nce(same, same).item() == pytest.approx(math.log(7))
    apart = torch.eye(4, dtype=torch.float64)
    assert info_nce(apart, apart, 1.0).item() == pytest.approx(-math.log(math.e / (math.e + 6)))
    assert info_nce(apart, apart, 0.01).item() == pytest.approx(0, abs=1e-12)
    assert info_nce(apart, apart.roll(1, 0), 0.01).item() == pytest.approx(100, abs=1)


def test_info_nce_knows_neither_order_nor_side():
    first, second = pairs(6)
    expected = info_nce(first, second)
    torch.testing.assert_close(info_nce(second, first), expected)
    order = torch.randperm(6)
    torch.testing.assert_close(info_nce(first[order], second[order]), expected)
    assert not torch.allclose(info_nce(first, second[order.roll(1)]), expected)


def test_one_pair_teaches_nothing_and_says_so(monkeypatch):
    warnings = []
    monkeypatch.setattr(contrast.logger, "warning_once", warnings.append, raising=False)
    first, second = (x.clone().requires_grad_() for x in pairs(1))
    loss = info_nce(first, second)
    loss.backward()
    assert loss.item() == 0 and not first.grad.any() and not second.grad.any()
    assert len(warnings) == 1 and "2 or more" in warnings[0]
    info_nce(*pairs(2))
    assert len(warnings) == 1


def test_info_nce_keeps_out_of_autocast():
    first, second = (x.float() for x in pairs(8, size=64))
    expected = info_nce(first, second)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce(first, second), expected)


@pytest.mark.parametrize("count", [0, 3])
def test_a_mean_over_one_process(count):
    total = torch.tensor(6.0, requires_grad=True)
    mean = mean_over_processes(total if count else total * 0, torch.tensor(count), gather=True)
    assert mean.item() == (2.0 if count else 0.0)
    mean.backward()
    assert total.grad.isfinite()


@given(st.lists(st.tuples(st.floats(-20, 20), st.sampled_from([0, 1, -100])), min_size=1, max_size=8))
def test_next_segment_loss_is_its_formula(rows):
    logits, follows = (list(column) for column in zip(*rows, strict=True))
    losses = [math.log1p(math.exp(-x if y == 1 else x)) for x, y in rows if y != -100]
    expected = sum(losses) / max(len(losses), 1)
    found = next_segment_loss(torch.tensor(logits, dtype=torch.float64), torch.tensor(follows))
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def head(seed: int = 0) -> PretrainingHead:
    torch.manual_seed(seed)
    return PretrainingHead(8, ALL).double()


def test_embeddings_have_length_one_and_ignore_padding():
    state, mask = torch.randn(3, 10, 8).double(), torch.ones(3, 10).bool()
    mask[1, 4:] = mask[2, :7] = False
    found = head().embed(state, mask)
    assert found.shape == (3, 6)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3).double())
    other = torch.where(mask[..., None], state, torch.full_like(state, 99.0))
    torch.testing.assert_close(head().embed(other, mask), found)
    alone = head().embed(state[1:2, :4], mask[1:2, :4])
    torch.testing.assert_close(alone, found[1:2])


def test_the_embedding_is_the_formula():
    """Normalise(MLP(masked mean)) in numpy."""
    state, mask = torch.randn(2, 5, 8).double(), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    layer = head().projection
    weights = [parameter.detach().numpy() for parameter in layer.parameters()]
    for row, real, found in zip(state.numpy(), mask.numpy(), head().embed(state, mask), strict=True):
        inner = weights[0] @ row[real].mean(0) + weights[1]
        gelu = np.array([x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in inner])
        outer = weights[2] @ gelu + weights[3]
        np.testing.assert_allclose(found.detach().numpy(), outer / np.linalg.norm(outer), rtol=1e-10)


def test_the_judge_reads_the_two_segments_only():
    state = torch.randn(2, 10, 8).double()
    segments = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, 1, -1, -1]] * 2)
    found = head().judge(state, segments)
    other = state.clone()
    other[segments == -1] = 99.0
    torch.testing.assert_close(head().judge(other, segments), found)
    # The order inside a segment does not matter, the order of the segments does.
    torch.testing.assert_close(head().judge(state[:, [0, 3, 1, 2, 4, 7, 5, 6, 8, 9]], segments), found)
    turned = torch.where(segments >= 0, 1 - segments, segments)
    assert (head().judge(state, turned) - found).abs().min() > 1e-6


def test_an_objective_without_weight_has_no_parameters():
    assert PretrainingHead(8, PretrainingOptions(contrastive_weight=0)).state_dict() == {}
    names = {name.split(".")[0] for name in PretrainingHead(8, PretrainingOptions()).state_dict()}
    assert names == {"projection"}
    assert {name.split(".")[0] for name in head().state_dict()} == {"projection", "next_segment"}


def test_rows_are_stacked_to_one_width():
    ids = [torch.ones(2, 3).long(), torch.ones(1, 5).long()]
    rows = stack_rows([Rows(ids[0], torch.tensor([[1, 1, 0], [0, 1, 1]])), Rows(ids[1], None)], pad_token_id=7)
    assert rows.tokens.tolist() == [[1, 1, 1, 7, 7], [1, 1, 1, 7, 7], [1, 1, 1, 1, 1]]
    assert rows.mask.tolist() == [[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    states = stack_rows([Rows(x[..., None].float(), None) for x in ids], pad_token_id=7).tokens
    assert states.shape == (3, 5, 1) and states[0].flatten().tolist() == [1, 1, 1, 0, 0]
    alone = Rows(ids[0], None)
    assert stack_rows([alone], 7) is alone


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlm_weight": -1.0}, "`mlm_weight`"),
        ({"mlm_weight": 0, "contrastive_weight": 0}, "not all 0"),
        ({"contrastive_temperature": 0.0}, "`contrastive_temperature`"),
        ({"contrastive_dim": 0}, "`contrastive_dim`"),
    ],
)
def test_bad_options(fields, message):
    with pytest.raises(ValueError, match=message):
        PretrainingOptions(**fields)


def test_the_logger_can_warn_once():
    """The method is one that transformers adds to its loggers."""
    assert callable(contrast.logger.warning_once) and isinstance(contrast.logger, logging.Logger)
