"""ALiBi: slopes against the paper's numbers, attention against a dense twin, and what cannot take it.

Shapes: B batch, H heads, K key/value heads, L tokens, D head size, w window radius.
"""

from types import SimpleNamespace

import pytest
import torch
from tensor_sizes import LargestTensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from genesplice_hf.layers import attention
from genesplice_hf.layers.alibi import alibi_bias, alibi_implementation, alibi_slopes, biased_mask
from genesplice_hf.layers.attention import eager_attention, full_attention_mask, window_attention

FUNCTIONS = {"eager": eager_attention, "sdpa": ALL_ATTENTION_FUNCTIONS["sdpa"]}
DIRECTIONS = pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
IMPLEMENTATIONS = pytest.mark.parametrize("name", FUNCTIONS)
SQUARE_ROOTS = [0.7071067811865476, 0.3535533905932738, 0.1767766952966369, 0.08838834764831845]
EIGHT = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
# Worked out by hand: the next lower power of two, then every second slope of the next higher one.
SLOPES = {
    1: [1 / 256],
    2: [1 / 16, 1 / 256],
    3: [1 / 16, 1 / 256, 1 / 4],
    6: [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8],
    8: EIGHT,
    12: EIGHT + SQUARE_ROOTS,
}
HEADS, KEY_HEADS, SIZE = 6, 3, 2
DOUBLE_SLOPES = torch.tensor(SLOPES[HEADS], dtype=torch.float64)


class Caller(torch.nn.Module):
    """What an attention function reads of the module that calls it."""

    def __init__(self, is_causal: bool, name: str = "sdpa") -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation=name, is_decoder=is_causal)
        self.is_causal = is_causal
        self.num_key_value_groups = HEADS // KEY_HEADS


def inputs_of(length: int, batch: int = 3, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    shapes = [(batch, heads, length, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def ragged(length: int) -> torch.Tensor:
    """(3, L) masks: everything, the end, nothing."""
    return torch.tensor([[start <= i for i in range(length)] for start in (0, length // 3, length)])


def visible_pairs(length: int, window: int, is_causal: bool, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, L, L), said one pair at a time."""
    rows = range(length)
    near = [[0 <= i - j <= window if is_causal else abs(i - j) <= window for j in rows] for i in rows]
    seen = torch.tensor(near).expand(3, -1, -1)
    return seen if mask is None else seen & mask[:, None, :]


def slow_attention(inputs: list[torch.Tensor], visible: torch.Tensor, scaling: float) -> torch.Tensor:
    """The dense twin: exp(score - m |i - j|) over all pairs, zeros where a query sees nothing. (B, L, H, D)."""
    query, key, value = inputs
    key, value = key.repeat_interleave(HEADS // KEY_HEADS, 1), value.repeat_interleave(HEADS // KEY_HEADS, 1)
    rows = range(query.shape[2])
    distance = torch.tensor([[abs(i - j) for j in rows] for i in rows], dtype=torch.float64)
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * scaling
    scores = scores - torch.einsum("h,ij->hij", DOUBLE_SLOPES, distance)
    weights = scores.exp() * visible[:, None]
    out = torch.einsum("bhij,bhjd->bhid", weights, value) / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return out.transpose(1, 2)


def assert_same_values_and_gradients(ours, theirs, inputs, where=None) -> None:
    upstream = torch.randn_like(ours)
    if where is not None:
        upstream, ours, theirs = upstream * where, ours * where, theirs * where
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    mine, reference = (torch.autograd.grad(out, inputs, upstream) for out in (ours, theirs))
    for gradient, expected in zip(mine, reference, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads", SLOPES)
def test_slopes_are_the_papers(heads) -> None:
    assert alibi_slopes(heads, dtype=torch.float64).tolist() == pytest.approx(SLOPES[heads], rel=1e-15)


@pytest.mark.parametrize("heads", range(1, 34))
def test_slopes_are_those_of_bloom(heads) -> None:
    """Its bias is slope times key position, so that of key 1 is the slope."""
    theirs = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(heads), theirs, rtol=1e-5, atol=0)


def test_the_bias_is_minus_slope_times_distance() -> None:
    distance = torch.tensor([[0, -1, -2], [2, 1, 0]])
    bias = alibi_bias(torch.tensor([0.5, 0.25]), distance, torch.float32)
    assert bias.tolist() == [[[0, -0.5, -1], [-1, -0.5, 0]], [[0, -0.25, -0.5], [-0.5, -0.25, 0]]]
    seen = biased_mask(distance[None, None] >= 0, bias)
    assert seen[0, 1].tolist() == [[0, float("-inf"), float("-inf")], [-0.5, -0.25, 0]]


@DIRECTIONS
@IMPLEMENTATIONS
@pytest.mark.parametrize("dense_windows", [0, 10**9], ids=["banded", "dense"])
@pytest.mark.parametrize("is_padded", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 200, 257])
def test_window_attention_is_the_dense_twin(length, is_padded, dense_windows, name, is_causal, monkeypatch) -> None:
    monkeypatch.setattr(attention, "MAX_DENSE_WINDOWS", dense_windows)
    inputs, mask = inputs_of(length), ragged(length) if is_padded else None
    call = (FUNCTIONS[name], Caller(is_causal, name), *inputs, mask, 64, 0.4)
    out, _ = window_attention(*call, slopes_H=DOUBLE_SLOPES)
    expected = slow_attention(inputs, visible_pairs(length, 64, is_causal, mask), 0.4)
    assert_same_values_and_gradients(out, expected, inputs)


@DIRECTIONS
@IMPLEMENTATIONS
@pytest.mark.parametrize("is_padded", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("length", [1, 5, 64, 130])
def test_full_attention_is_the_dense_twin(length, is_padded, name, is_causal) -> None:
    inputs, mask = inputs_of(length), ragged(length) if is_padded else None
    caller, x = Caller(is_causal, name), torch.zeros(3, length, 1, dtype=torch.float64)
    bias = full_attention_mask(caller.config, x, mask, 0, DOUBLE_SLOPES)
    out, _ = FUNCTIONS[name](caller, *inputs, bias, scaling=0.4)
    visible = visible_pairs(length, length, is_causal, mask)
    assert torch.isfinite(out).all()
    # Full layers leave rows that see nothing to the model, which zeroes the padding at its end.
    where = visible.any(-1)[:, :, None, None]
    assert_same_values_and_gradients(out, slow_attention(inputs, visible, 0.4), inputs, where)


@DIRECTIONS
@IMPLEMENTATIONS
@pytest.mark.parametrize("queries", [1, 3, 11])
@pytest.mark.parametrize("is_padded", [False, True], ids=["full", "ragged"])
def test_the_last_queries_alone_give_the_last_rows(is_padded, queries, name, is_causal, monkeypatch) -> None:
    """Decoding with a cache: the last query stands at the last key."""
    monkeypatch.setattr(attention, "MAX_DENSE_WINDOWS", 0)
    query, key, value = inputs_of(30)
    mask = ragged(30) if is_padded else None
    caller, function = Caller(is_causal, name), FUNCTIONS[name]
    twin = slow_attention([query, key, value], visible_pairs(30, 4, is_causal, mask), 0.4)[:, -queries:]
    inputs = (query[:, :, -queries:], key, value)
    near, _ = window_attention(function, caller, *inputs, mask, 4, 0.4, slopes_H=DOUBLE_SLOPES)
    torch.testing.assert_close(near, twin, rtol=0, atol=1e-12)
    x = torch.zeros(3, queries, 1, dtype=torch.float64)
    bias = full_attention_mask(caller.config, x, mask, 30 - queries, DOUBLE_SLOPES)
    out, _ = function(caller, *inputs, bias, scaling=0.4)
    whole = full_attention_mask(caller.config, torch.zeros(3, 30, 1).double(), mask, 0, DOUBLE_SLOPES)
    expected, _ = function(caller, query, key, value, whole, scaling=0.4)
    torch.testing.assert_close(out[:2], expected[:2, -queries:], rtol=0, atol=1e-12)


@DIRECTIONS
@IMPLEMENTATIONS
@pytest.mark.parametrize("dense_windows", [0, 8], ids=["banded", "default"])
def test_no_tensor_grows_with_the_square_of_the_length(dense_windows, name, is_causal, monkeypatch) -> None:
    monkeypatch.setattr(attention, "MAX_DENSE_WINDOWS", dense_windows)
    window, length = 16, 2048
    inputs, mask = inputs_of(length, 1, torch.float32), torch.arange(length)[None] < length - 100
    with LargestTensor() as largest:
        call = (FUNCTIONS[name], Caller(is_causal, name), *inputs, mask, window, 0.4)
        window_attention(*call, slopes_H=alibi_slopes(HEADS))[0].sum().backward()
    assert largest.elements <= 3 * HEADS * length * window < length**2


def test_flex_asks_for_sdpa_and_flash_is_refused() -> None:
    assert [alibi_implementation(name) for name in (None, "eager", "sdpa", "flex_attention")] == [
        None,
        "eager",
        "sdpa",
        "sdpa",
    ]
    for name in ("flash_attention_2", "flash_attention_3", "kernels-community/flash-attn"):
        with pytest.raises(ValueError, match=rf'`attn_implementation="{name}"` cannot add the bias.*use "sdpa"'):
            alibi_implementation(name)
