"""Attention against dense definitions: banded windows, fenceposts, grouped queries, memory.

Shapes: B batch, H heads, K key/value heads, L tokens, D head size, w window radius.
"""

import logging
from types import SimpleNamespace

import pytest
import torch
from tensor_sizes import LargestTensor
from transformers import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_sliding_window_mask, create_sliding_window_causal_mask
from transformers.modeling_flash_attention_utils import _process_flash_attention_kwargs
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from genesplice_hf.layers import attention
from genesplice_hf.layers.attention import (
    band_mask,
    best_attn_implementation,
    causal_mask,
    eager_attention,
    full_attention_mask,
    open_empty_rows,
    window_attention,
)

FUNCTIONS = {"eager": eager_attention, "sdpa": ALL_ATTENTION_FUNCTIONS["sdpa"]}
DIRECTIONS = pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
HEADS, KEY_HEADS, SIZE = 4, 2, 3


@pytest.fixture(params=["banded", "dense", "default"])
def path(request, monkeypatch) -> str:
    """Short sequences go through one dense mask, long ones through blocks: both must hold at any length."""
    limits = {"banded": 0, "dense": 10**9, "default": attention.MAX_DENSE_WINDOWS}
    monkeypatch.setattr(attention, "MAX_DENSE_WINDOWS", limits[request.param])
    return request.param


class Caller(torch.nn.Module):
    """What an attention function reads of the module that calls it."""

    def __init__(self, is_causal: bool, implementation: str = "sdpa", groups: int = HEADS // KEY_HEADS) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation=implementation)
        self.is_causal = is_causal
        self.num_key_value_groups = groups


def plain_attention(query, key, value, visible, scaling):
    """The slow twin: exp, mask, divide, over all pairs; zeros where a query sees nothing. (B, L, H, D)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    weights = torch.einsum("bhid,bhjd->bhij", query, key).mul(scaling).exp() * visible[:, None]
    out = torch.einsum("bhij,bhjd->bhid", weights, value) / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return out.transpose(1, 2)


def in_window(length: int, window: int, is_causal: bool) -> torch.Tensor:
    """(L, L) bool, said one pair at a time."""
    rows = range(length)
    return torch.tensor([[0 <= i - j <= window if is_causal else abs(i - j) <= window for j in rows] for i in rows])


def ragged(length: int) -> torch.Tensor:
    """(4, L) masks: everything, the first half, the end, nothing."""
    spans = [(0, length), (0, (length + 1) // 2), (length // 3, length), (0, 0)]
    return torch.tensor([[start <= i < stop for i in range(length)] for start, stop in spans])


def random_inputs(length: int, batch: int = 4, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    shapes = [(batch, heads, length, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def assert_same_values_and_gradients(ours, theirs, inputs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    upstream = torch.randn_like(ours)
    mine, reference = (torch.autograd.grad(out, inputs, upstream) for out in (ours, theirs))
    for gradient, expected in zip(mine, reference, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@DIRECTIONS
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("is_padded", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 200, 257])
def test_window_attention_is_masked_attention(length, is_padded, function, is_causal, path) -> None:
    inputs = random_inputs(length)
    mask = ragged(length) if is_padded else None
    visible = in_window(length, 64, is_causal).expand(4, -1, -1)
    if mask is not None:
        visible = visible & mask[:, None, :]
    out, weights = window_attention(function, Caller(is_causal), *inputs, mask, window=64, scaling=0.4)
    # Up to w queries are one block anyway.
    assert (weights is None) or (function is eager_attention and (path != "banded" or length <= 64))
    assert_same_values_and_gradients(out, plain_attention(*inputs, visible, 0.4), inputs)


@DIRECTIONS
@pytest.mark.parametrize("group_tokens", [1, 16, 50, 64])
def test_groups_of_blocks_change_nothing(group_tokens, is_causal, monkeypatch) -> None:
    assert 8 * attention.MAX_DENSE_WINDOWS < 101
    monkeypatch.setattr(attention, "MAX_GROUP_TOKENS", group_tokens)
    inputs, mask = random_inputs(101), ragged(101)
    out, _ = window_attention(eager_attention, Caller(is_causal), *inputs, mask, window=8, scaling=0.4)
    visible = in_window(101, 8, is_causal) & mask[:, None, :]
    assert_same_values_and_gradients(out, plain_attention(*inputs, visible, 0.4), inputs)


@DIRECTIONS
def test_a_query_that_sees_no_key_gives_zeros_and_no_nan(is_causal, path) -> None:
    inputs, mask = random_inputs(40), ragged(40)
    out, _ = window_attention(eager_attention, Caller(is_causal), *inputs, mask, window=4, scaling=1.0)
    out.square().sum().backward()
    assert torch.equal(out[3], torch.zeros_like(out[3]))
    for x in inputs:
        assert torch.isfinite(x.grad).all()
        assert torch.equal(x.grad[3], torch.zeros_like(x.grad[3]))


def keys_seen(length: int, window: int, is_causal: bool, mask: torch.Tensor | None = None) -> torch.Tensor:
    """(B, L, L) bool read off the real thing: equal scores, and values that name their key."""
    batch = 1 if mask is None else len(mask)
    zeros = torch.zeros(batch, 1, length, length)
    names = torch.eye(length).expand(batch, 1, -1, -1)
    caller = Caller(is_causal, groups=1)
    out, _ = window_attention(eager_attention, caller, zeros, zeros, names, mask, window=window, scaling=1.0)
    return out[:, :, 0] > 0


@pytest.mark.parametrize("length", [8, 32])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_radius_sees_that_many_keys(window, length, path) -> None:
    both, before = keys_seen(length, window, False)[0], keys_seen(length, window, True)[0]
    inside = slice(window, length - window)
    assert both.sum(1)[inside].tolist() == [2 * window + 1] * (length - 2 * window)
    assert before.sum(1)[window:].tolist() == [window + 1] * (length - window)
    assert before.sum(1)[:window].tolist() == list(range(1, window + 1))
    assert both.sum(1)[:window].tolist() == list(range(window + 1, 2 * window + 1))


@pytest.mark.parametrize("length", [8, 32])
@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("is_padded", [False, True], ids=["full", "ragged"])
def test_transformers_masks_see_the_same_keys(window, length, is_padded, path) -> None:
    """The fencepost: their bidirectional mask takes the radius, their causal one the number of keys."""
    mask = ragged(length)[:3] if is_padded else None
    x = torch.zeros(1 if mask is None else 3, length, 4)
    for is_causal, build, argument in (
        (False, create_bidirectional_sliding_window_mask, window),
        (True, create_sliding_window_causal_mask, window + 1),
    ):
        config = PreTrainedConfig(sliding_window=argument, is_causal=is_causal, attn_implementation="eager")
        theirs = build(config=config, inputs_embeds=x, attention_mask=mask, past_key_values=None)
        ours = keys_seen(length, window, is_causal, mask)
        has_key = ours.any(-1, keepdim=True)
        assert torch.equal(ours, (theirs[:, 0] == 0) & has_key)
        assert is_padded or has_key.all()


@DIRECTIONS
@pytest.mark.parametrize("is_padded", [False, True], ids=["full", "ragged"])
def test_flash_is_asked_for_the_same_window(is_causal, is_padded, monkeypatch) -> None:
    calls = []

    def fake_flash(module, query, key, value, attention_mask, scaling, dropout, sliding_window):
        calls.append((attention_mask, scaling, dropout, sliding_window))
        return query.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "fake_flash", fake_flash)
    caller, inputs = Caller(is_causal, "fake_flash"), random_inputs(50)
    function = ALL_ATTENTION_FUNCTIONS.get_interface("fake_flash", eager_attention)
    mask = ragged(50) if is_padded else None
    out, _ = window_attention(function, caller, *inputs, mask, window=4, scaling=0.5, dropout=0.1)
    ((passed_mask, scaling, dropout, sliding_window),) = calls
    assert (scaling, dropout, sliding_window) == (0.5, 0.1, 5)
    assert (passed_mask is None) if mask is None else torch.equal(passed_mask, mask.long())
    assert out.shape == (4, 50, HEADS, SIZE)


@DIRECTIONS
def test_transformers_turns_that_argument_into_our_radius(is_causal) -> None:
    """flash's `window_size` counts keys on each side of the query, itself apart."""
    supported = dict.fromkeys(("dropout_p", "window_size", "deterministic", "cache_seqlens"), True)
    supported |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), True)
    asked = _process_flash_attention_kwargs(
        50, 50, is_causal=is_causal, sliding_window=4 + 1, supports_mapping=supported
    )
    assert asked["window_size"] == (4, 4)
    assert asked["causal"] is is_causal


@DIRECTIONS
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (3, 3), (3, 1), (15, 5)])
def test_any_number_of_heads(heads, key_heads, function, is_causal, path) -> None:
    shapes = [(4, count, 40, SIZE) for count in (heads, key_heads, key_heads)]
    inputs, mask = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes], ragged(40)
    caller = Caller(is_causal, groups=heads // key_heads)
    out, _ = window_attention(function, caller, *inputs, mask, window=4, scaling=0.4)
    visible = in_window(40, 4, is_causal) & mask[:, None, :]
    assert_same_values_and_gradients(out, plain_attention(*inputs, visible, 0.4), inputs)


def test_flex_runs_the_banded_path() -> None:
    def never(*args, **kwargs):
        raise AssertionError("flex must not be called for a window")

    inputs = random_inputs(40)
    out, _ = window_attention(never, Caller(False, "flex_attention"), *inputs, None, window=4, scaling=0.5)
    expected = plain_attention(*inputs, in_window(40, 4, False)[None], 0.5)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@DIRECTIONS
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("is_padded", [False, True], ids=["full", "padded"])
def test_no_tensor_grows_with_the_square_of_the_length(function, is_causal, is_padded) -> None:
    window = 16
    for length in (1024, 2048):
        inputs = random_inputs(length, batch=1, dtype=torch.float32)
        mask = torch.arange(length)[None] < length - 100 if is_padded else None
        with LargestTensor() as largest:
            out, _ = window_attention(function, Caller(is_causal), *inputs, mask, window=window, scaling=0.5)
            out.sum().backward()
        # 3 w keys for each query and head; the (L, L) matrix of one head alone would be larger.
        assert largest.elements <= 3 * HEADS * length * window < length**2


@DIRECTIONS
def test_the_dense_path_is_linear_in_the_length_too(is_causal) -> None:
    """At the longest dense length, L = c w, one matrix is H L^2 = c H L w."""
    window = 16
    length = attention.MAX_DENSE_WINDOWS * window
    inputs = random_inputs(length, batch=1, dtype=torch.float32)
    with LargestTensor() as largest:
        window_attention(eager_attention, Caller(is_causal), *inputs, None, window=window, scaling=0.5)[
            0
        ].sum().backward()
    assert largest.elements <= 8 * HEADS * length * window


def test_the_recorder_sees_a_dense_mask() -> None:
    with LargestTensor() as largest:
        band_mask(64, 64, torch.device("cpu"), window=2)
    assert largest.elements == 64**2


@DIRECTIONS
@pytest.mark.parametrize("is_padded", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("queries", [1, 3, 4, 5, 11, 29])
def test_the_last_queries_alone_give_the_last_rows(queries, is_padded, is_causal, path) -> None:
    """Decoding with a cache: fewer queries than keys, the last query standing at the last key."""
    query, key, value = random_inputs(30)
    mask = ragged(30) if is_padded else None
    visible = in_window(30, 4, is_causal) & (ragged(30)[:, None, :] if is_padded else torch.ones(4, 1, 30).bool())
    whole = plain_attention(query, key, value, visible, 0.5)
    short = query[:, :, -queries:]
    last, _ = window_attention(eager_attention, Caller(is_causal), short, key, value, mask, window=4, scaling=0.5)
    assert_same_values_and_gradients(last, whole[:, -queries:], [query, key, value])


@DIRECTIONS
def test_weights_are_given_when_asked_for(is_causal) -> None:
    inputs = random_inputs(40)
    assert 4 * attention.MAX_DENSE_WINDOWS < 40
    call = (eager_attention, Caller(is_causal), *inputs, None, 4, 0.5)
    out, weights = window_attention(*call, output_attentions=True)
    banded, _ = window_attention(*call)
    torch.testing.assert_close(out, banded, rtol=0, atol=1e-12)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, HEADS, 40, dtype=torch.float64))
    assert torch.equal(weights > 0, in_window(40, 4, is_causal).expand(4, HEADS, -1, -1))


@pytest.mark.parametrize("form", ["none", "bool", "additive"])
@DIRECTIONS
def test_eager_equals_torch_and_transformers(is_causal, form) -> None:
    query, key, value = random_inputs(9)
    visible = torch.rand(4, 1, 9, 9) < 0.5
    visible |= torch.eye(9, dtype=torch.bool)
    additive = torch.zeros(4, 1, 9, 9, dtype=torch.float64).masked_fill(~visible, float("-inf"))
    mask = {"none": None, "bool": visible, "additive": additive}[form]
    caller = Caller(is_causal)
    out, weights = eager_attention(caller, query, key, value, mask, scaling=0.5)
    repeated = [x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, *repeated, attn_mask=mask, is_causal=is_causal and mask is None, scale=0.5
    )
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=1e-12)
    theirs, _ = FUNCTIONS["sdpa"](caller, query, key, value, mask, scaling=0.5)
    torch.testing.assert_close(out, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, HEADS, 9, dtype=torch.float64))


def test_dropout_acts_in_training_alone() -> None:
    inputs, caller = random_inputs(9), Caller(False)
    plain = eager_attention(caller.eval(), *inputs, None, scaling=0.5, dropout=0.5)[0]
    assert torch.equal(plain, eager_attention(caller.eval(), *inputs, None, scaling=0.5)[0])
    assert not torch.equal(plain, eager_attention(caller.train(), *inputs, None, scaling=0.5, dropout=0.5)[0])


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 7), (3, 7)])
@pytest.mark.parametrize("window", [None, 2])
def test_masks_are_what_they_say_for_every_pair(queries, keys, window) -> None:
    device = torch.device("cpu")
    positions = range(keys - queries, keys)
    radius = keys if window is None else window
    before = [[0 <= i - j <= radius for j in range(keys)] for i in positions]
    assert causal_mask(queries, keys, device, window).tolist() == before
    around = [[abs(i - j) <= radius for j in range(keys)] for i in positions]
    assert band_mask(queries, keys, device, radius).tolist() == around


def test_empty_rows_are_opened_and_reported() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    opened, has_key = open_empty_rows(mask)
    assert opened.tolist() == [[True, False], [True, True]]
    assert has_key.tolist() == [[True], [False]]


PADDED = torch.tensor([[True, True, True, False], [False, False, False, False]])


@pytest.mark.parametrize(
    ("implementation", "is_decoder", "key_mask", "past"),
    [(name, *case) for name in ("eager", "sdpa") for case in ((False, None, 0), (True, None, 0))],
)
def test_full_layers_need_no_mask_when_all_is_real(implementation, is_decoder, key_mask, past) -> None:
    config = SimpleNamespace(_attn_implementation=implementation, is_decoder=is_decoder)
    assert full_attention_mask(config, torch.zeros(2, 4, 1), key_mask, past) is None


@pytest.mark.parametrize("past", [0, 2, 3])
@pytest.mark.parametrize("is_padded", [False, True])
def test_full_causal_layers_see_what_came_before(past, is_padded) -> None:
    config = SimpleNamespace(_attn_implementation="sdpa", is_decoder=True)
    length = 4 - past
    mask = full_attention_mask(config, torch.zeros(2, length, 1), PADDED if is_padded else None, past)
    if mask is None:
        assert not is_padded and (past == 0 or length == 1)
        return
    mask = mask.expand(2, 1, length, 4)
    real = PADDED if is_padded else torch.ones(2, 4, dtype=torch.bool)
    for row in range(2):
        for i in range(length):
            seen = [bool(real[row, j]) and j <= past + i for j in range(4)]
            assert mask[row, 0, i].tolist() == (seen if any(seen) else [True] * 4)


def test_full_bidirectional_layers_see_every_real_key() -> None:
    config = SimpleNamespace(_attn_implementation="sdpa", is_decoder=False)
    mask = full_attention_mask(config, torch.zeros(2, 4, 1), PADDED, 0)
    assert mask[:, 0, 0].tolist() == [PADDED[0].tolist(), [True] * 4]


def test_flash_gets_the_padding_as_ones_and_zeros() -> None:
    config = SimpleNamespace(_attn_implementation="flash_attention_2", is_decoder=False)
    assert full_attention_mask(config, torch.zeros(2, 4, 1), None, 0) is None
    assert full_attention_mask(config, torch.zeros(2, 4, 1), PADDED, 0).tolist() == PADDED.long().tolist()


def test_the_best_implementation_on_a_cpu_is_sdpa_and_the_choice_is_logged(caplog) -> None:
    with caplog.at_level(logging.INFO, logger="genesplice_hf.layers.attention"):
        assert best_attn_implementation("cpu", torch.bfloat16) == "sdpa"
    assert "sdpa" in caplog.text
