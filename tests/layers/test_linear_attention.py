"""Running sums against loops over tokens, against performer-pytorch, and against what they must never do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from genesplice_hf.layers.feature_maps import key_features, query_features, read_out_query
from genesplice_hf.layers.linear_attention import (
    LinearCache,
    LinearState,
    add_states,
    attention_weights,
    bidirectional_attention,
    causal_attention,
    chunk_sums,
    working_dtype,
    zero_state,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "performer_favor"
BATCH, HEADS, LENGTH, FEATURES, HEAD_DIM = 2, 3, 29, 6, 4
EPS = 1e-6


def random_inputs(length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of queries and keys, and values."""
    query, key = (torch.rand(BATCH, HEADS, length, FEATURES, dtype=torch.float64) for _ in range(2))
    return query, key, torch.randn(BATCH, HEADS, length, HEAD_DIM, dtype=torch.float64)


def token_by_token(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool) -> np.ndarray:
    """The two sums of the definition, for one token after the other."""
    query, key, value = (x.detach().numpy() for x in (query, key, value))
    out = np.zeros(value.shape)
    for b, h, i in np.ndindex(query.shape[:3]):
        numerator, denominator = np.zeros(value.shape[-1]), 0.0
        for j in range(i + 1 if is_causal else query.shape[2]):
            weight = query[b, h, i] @ key[b, h, j]
            numerator, denominator = numerator + weight * value[b, h, j], denominator + weight
        out[b, h, i] = numerator / (denominator + EPS)
    return out


def matrix_form(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool) -> torch.Tensor:
    weights = query @ key.transpose(-1, -2)
    weights = weights.tril() if is_causal else weights
    return weights @ value / (weights.sum(-1, keepdim=True) + EPS)


@pytest.mark.parametrize("block_size", [1, 7, LENGTH, 256])
def test_causal_is_token_by_token(block_size: int) -> None:
    inputs = random_inputs()
    found, end = causal_attention(*inputs, None, block_size, EPS)
    np.testing.assert_allclose(found.numpy(), token_by_token(*inputs, is_causal=True), rtol=1e-12)
    for mine, expected in zip(end, chunk_sums(*inputs[1:]), strict=True):
        torch.testing.assert_close(mine, expected)


def test_bidirectional_is_token_by_token() -> None:
    query, key, value = random_inputs()
    found = bidirectional_attention(query, chunk_sums(key, value), EPS)
    np.testing.assert_allclose(found.numpy(), token_by_token(query, key, value, is_causal=False), rtol=1e-12)


@pytest.mark.parametrize("is_causal", [True, False])
def test_gradients_are_those_of_the_matrix_form(is_causal: bool) -> None:
    inputs = [x.requires_grad_() for x in random_inputs()]
    upstream = torch.randn(BATCH, HEADS, LENGTH, HEAD_DIM, dtype=torch.float64)
    query, key, value = inputs
    if is_causal:
        found, _ = causal_attention(query, key, value, None, 7, EPS)
    else:
        found = bidirectional_attention(query, chunk_sums(key, value), EPS)
    expected = torch.autograd.grad(matrix_form(*inputs, is_causal), inputs, upstream)
    for mine, reference in zip(torch.autograd.grad(found, inputs, upstream), expected, strict=True):
        torch.testing.assert_close(mine, reference)


def test_chunks_that_hand_on_their_sums_are_the_whole() -> None:
    """Values, end state, and the gradient that arrives through the state."""
    inputs = [x.requires_grad_() for x in random_inputs()]
    whole, end = causal_attention(*inputs, None, 7, EPS)
    parts, state = [], None
    for cut in zip(*(x.split([1, 12, 16], dim=2) for x in inputs), strict=True):
        out, state = causal_attention(*cut, state, 5, EPS)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole)
    for mine, expected in zip(state, end, strict=True):
        torch.testing.assert_close(mine, expected)
    expected = torch.autograd.grad(whole.square().sum() + end.numerator.sum(), inputs)
    found = torch.autograd.grad(torch.cat(parts, dim=2).square().sum() + state.numerator.sum(), inputs)
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference)


def test_sums_of_parts_add_up() -> None:
    _, key, value = random_inputs()
    parts = [chunk_sums(*cut) for cut in zip(key.split(10, 2), value.split(10, 2), strict=True)]
    total = zero_state(key, value)
    for part in parts:
        total = add_states(total, part)
    for mine, expected in zip(total, chunk_sums(key, value), strict=True):
        torch.testing.assert_close(mine, expected)


def test_nothing_leaks_from_the_future() -> None:
    inputs = [x.requires_grad_() for x in random_inputs()]
    place = 11
    out, _ = causal_attention(*inputs, None, 4, EPS)
    gradients = torch.autograd.grad(out[:, :, : place + 1].sum(), inputs, retain_graph=True)
    for gradient in gradients:
        assert not gradient[:, :, place + 1 :].any()
    changed = [torch.cat([x[:, :, : place + 1], x[:, :, place + 1 :] * 3], dim=2) for x in inputs]
    assert torch.equal(causal_attention(*changed, None, 4, EPS)[0][:, :, : place + 1], out[:, :, : place + 1])


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("eps", [0.0, 1e-16, 1e-6])
def test_zero_denominators_give_zero_and_finite_gradients(is_causal: bool, eps: float) -> None:
    """ReLU features without a common one; in float32, where a gradient of 1 / eps would poison all sums."""
    query, key = torch.zeros(1, 1, 6, 4), torch.zeros(1, 1, 6, 4)
    query[..., :3, 0], key[..., :2], query[..., 3:, 1] = 1.0, 0.0, 1.0
    key[..., 3:, 1] = 0.5
    value = torch.randn(1, 1, 6, 4)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    if is_causal:
        out, _ = causal_attention(*inputs, None, 2, eps)
    else:
        out = bidirectional_attention(query, chunk_sums(key, value), eps)
    assert not out[:, :, :3].any()
    assert out[:, :, 3:].any()
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
    assert not gradients[0][:, :, :3].any()
    # The queries without a denominator are not there, as far as keys and values can tell.
    if is_causal:
        past = chunk_sums(key[:, :, :3], value[:, :, :3])
        rest, _ = causal_attention(query[:, :, 3:], key[:, :, 3:], value[:, :, 3:], past, 2, eps)
    else:
        rest = bidirectional_attention(query[:, :, 3:], chunk_sums(key, value), eps)
    for mine, reference in zip(gradients, torch.autograd.grad(rest.sum(), inputs), strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("is_causal", [True, False])
def test_weights_are_the_matrix_that_the_sums_avoid(is_causal: bool) -> None:
    query, key, value = random_inputs()
    weights = attention_weights(query, key, is_causal, EPS)
    torch.testing.assert_close(weights @ value, matrix_form(query, key, value, is_causal))
    assert not (is_causal and weights.triu(1).any())


class AllTensors(TorchDispatchMode):
    """Counts the elements of all results of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, (tuple, list)) else (out,)
        self.elements += sum(result.numel() for result in results if isinstance(result, torch.Tensor))
        return out


def test_the_backward_pass_grows_with_the_length_and_not_with_its_square() -> None:
    """Slicing in the loop would make a tensor of full length for every block."""

    def elements_made(length: int) -> int:
        inputs = [x.requires_grad_() for x in random_inputs(length)]
        out, _ = causal_attention(*inputs, None, 8, EPS)
        with AllTensors() as tensors:
            out.sum().backward()
        return tensors.elements

    assert elements_made(1024) < 2.2 * elements_made(512) < 2.2 * 2.2 * elements_made(256)


def test_sums_are_kept_in_float32_at_least() -> None:
    kinds = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float32}
    for given, wanted in (kinds | {torch.float64: torch.float64}).items():
        assert working_dtype(torch.zeros(1, dtype=given)) == wanted


# performer-pytorch, with its own projection


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["softmax", "generalized", "no_projection"])
def test_golden_attention(kind: str, is_causal: bool) -> None:
    """Its causal form starts the sum of the keys at 1e-6; the other one divides plainly."""
    given = {name: tensor.double() for name, tensor in load_file(GOLDEN / "inputs.safetensors").items()}
    expected = {name: tensor.double() for name, tensor in load_file(GOLDEN / "outputs.safetensors").items()}
    projection = load_file(GOLDEN / "weights.safetensors")["projection_matrix"].double().T[None]
    inputs = [given[name].requires_grad_() for name in ("q", "k", "v")]
    query = query_features(inputs[0], kind, projection)
    key = key_features(inputs[1], kind, projection, stabilizer="global")
    if is_causal:
        start = zero_state(key, inputs[2])
        start = LinearState(start.numerator, start.denominator + 1e-6)
        out, _ = causal_attention(query, key, inputs[2], start, 64, eps=0.0)
    else:
        state = chunk_sums(key, inputs[2])
        out = bidirectional_attention(read_out_query(query, state.denominator, kind), state, eps=0.0)
    name = kind + ("_causal" if is_causal else "")
    found = {"out": out}
    gradients = torch.autograd.grad((out * given["out_weight"]).sum(), inputs)
    found |= {f"grad_{letter}": gradient for letter, gradient in zip("qkv", gradients, strict=True)}
    for part, tensor in found.items():
        reference = expected[f"{name}.{part}"]
        error = (tensor[:, :, : reference.shape[2]] - reference).abs().max()
        assert error <= 1e-7 * reference.abs().max(), part


# The cache


def filled_cache() -> LinearCache:
    _, key, value = random_inputs()
    cache = LinearCache()
    assert cache.get_seq_length() == 0
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.advance([chunk_sums(key, value), chunk_sums(key, value * 2)], torch.tensor([5, 29]), LENGTH)
    return cache


def test_the_cache_moves_its_rows_together() -> None:
    cache, before = filled_cache(), filled_cache().seen_B
    original = [state.numerator.clone() for state in cache.states]
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(cache.seen_B, before[[1, 1]])
    for state, was in zip(cache.states, original, strict=True):
        assert torch.equal(state.numerator, was[[1, 1]])
        assert state.denominator.shape[0] == 2
    cache.batch_repeat_interleave(3)
    assert cache.seen_B.tolist() == [29] * 6
    cache.batch_select_indices(torch.tensor([0]))
    assert {state.numerator.shape[0] for state in cache.states} == {1}
    assert cache.get_seq_length() == LENGTH


def test_the_cache_cannot_be_cropped_but_reset() -> None:
    cache = filled_cache()
    assert not cache.is_croppable
    assert cache.get_max_length() == -1
    with pytest.raises(NotImplementedError, match="prefix"):
        cache.crop(-1)
    cache.reset()
    assert (cache.states, cache.get_seq_length()) == (None, 0)
