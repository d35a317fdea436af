"""Feature maps against performer-pytorch's values, formulas in numpy, and the kernel that they stand in for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from genesplice_hf.layers.feature_maps import (
    FEATURE_MAPS,
    PROJECTED,
    key_features,
    orthogonal_projection,
    query_features,
    read_out_query,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "performer_favor"
HEADS, HEAD_DIM, LENGTH = 2, 8, 11
EVERY_MAP = pytest.mark.parametrize("kind", FEATURE_MAPS)


def projection_of(kind: str, num_features: int = 24) -> torch.Tensor | None:
    return orthogonal_projection(HEADS, HEAD_DIM, num_features).double() if kind in PROJECTED else None


def random_heads(scale: float = 1.0) -> torch.Tensor:
    return torch.randn(3, HEADS, LENGTH, HEAD_DIM, dtype=torch.float64) * scale


def in_numpy(x: np.ndarray, kind: str, w: np.ndarray | None, is_query: bool) -> np.ndarray:
    """The table of the module, term by term; w is (H, D, M)."""
    if kind in ("relu", "elu+1", "sqr"):
        return {"relu": np.maximum(x, 0), "elu+1": np.where(x > 0, x + 1, np.exp(x)), "sqr": x**2}[kind]
    if kind == "no_projection":
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True) if is_query else np.exp(x)
    u = x / x.shape[-1] ** 0.25
    projected = np.einsum("bhld,hdm->bhlm", u, w)
    if kind == "generalized":
        return np.maximum(projected, 0) + 1e-3
    exponent = projected - (u**2).sum(-1, keepdims=True) / 2
    if kind == "favor+":
        return np.exp(exponent)
    stabilizer = projected.max(-1, keepdims=True) if is_query else 0
    return (np.exp(exponent - stabilizer) + 1e-4) / np.sqrt(w.shape[-1])


@EVERY_MAP
def test_formulas(kind: str) -> None:
    x, projection = random_heads(), projection_of(kind)
    weights = None if projection is None else projection.numpy()
    for found, is_query in ((query_features(x, kind, projection), True), (key_features(x, kind, projection), False)):
        np.testing.assert_allclose(found.numpy(), in_numpy(x.numpy(), kind, weights, is_query), rtol=1e-12)


@given(st.sampled_from(FEATURE_MAPS), st.floats(0, 30))
def test_features_are_finite_and_never_negative(kind: str, scale: float) -> None:
    x, projection = random_heads(scale).float(), projection_of(kind)
    for found in (query_features(x, kind, projection), key_features(x, kind, projection)):
        assert found.isfinite().all() or kind == "no_projection"  # exp(k) is all that this form has
        assert (found >= 0).all()


def test_elu_keeps_its_digits_far_below_zero() -> None:
    x = torch.tensor([-40.0, -20.0, -1e-9, 0.0, 3.0])
    expected = torch.nn.functional.elu(x.double()) + 1
    found = query_features(x, "elu+1").double()
    assert (found > 0).all()
    torch.testing.assert_close(found[2:], expected[2:])
    torch.testing.assert_close(found[:2], x[:2].double().exp(), rtol=1e-6, atol=0)


def golden() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    inputs = {name: tensor.double() for name, tensor in load_file(GOLDEN / "inputs.safetensors").items()}
    outputs = {name: tensor.double() for name, tensor in load_file(GOLDEN / "outputs.safetensors").items()}
    projection = load_file(GOLDEN / "weights.safetensors")["projection_matrix"].double()
    return inputs, outputs, projection.T[None]


@pytest.mark.parametrize("name", ["softmax.q_features", "softmax.k_features", "generalized.q_features"])
def test_golden_features(name: str) -> None:
    inputs, outputs, projection = golden()
    kind, which = name.split(".")
    if which == "q_features":
        found = query_features(inputs["q"], kind, projection)
    else:
        found = key_features(inputs["k"], kind, projection, stabilizer="global")
    expected = outputs[name]
    assert (found[:, :, : expected.shape[2]] - expected).abs().max() <= 1e-7 * expected.abs().max()


@EVERY_MAP
def test_padding_has_no_features_and_no_say(kind: str) -> None:
    x, projection = random_heads(), projection_of(kind)
    mask = torch.arange(LENGTH)[None] < torch.tensor([[LENGTH], [4], [0]])
    for stabilizer in ("fixed", "global"):
        found = key_features(x, kind, projection, mask, stabilizer)
        assert not found[~mask[:, None].expand(-1, HEADS, -1)].any()
        other = key_features(x.masked_fill(~mask[:, None, :, None], 9.0), kind, projection, mask, stabilizer)
        assert torch.equal(other, found)


def test_only_the_global_stabilizer_looks_at_other_keys() -> None:
    x, projection = random_heads(), projection_of("softmax")
    changed = x.clone()
    changed[:, :, -1] *= 5
    for stabilizer, independent in (("fixed", True), ("global", False)):
        one, other = (key_features(keys, "softmax", projection, None, stabilizer) for keys in (x, changed))
        assert torch.equal(one[:, :, :-1], other[:, :, :-1]) == independent


def test_no_projection_reads_out_a_softmax_over_positions() -> None:
    query, key, value = random_heads(), random_heads(), random_heads()
    phi_q, phi_k = query_features(query, "no_projection"), key_features(key, "no_projection")
    expected = query.softmax(-1) @ (key.softmax(-2).transpose(-1, -2) @ value)
    found = read_out_query(phi_q, phi_k.sum(2), "no_projection") @ (phi_k.transpose(-1, -2) @ value)
    torch.testing.assert_close(found, expected)
    assert torch.equal(read_out_query(phi_q, torch.zeros_like(phi_q[:, :, 0]), "no_projection"), phi_q)


# Random directions


@pytest.mark.parametrize("num_features", [8, 24, 20, 3])
def test_directions_are_orthogonal_in_blocks_and_as_long_as_they_should_be(num_features: int) -> None:
    drawn = orthogonal_projection(HEADS, HEAD_DIM, num_features)
    assert drawn.shape == (HEADS, HEAD_DIM, num_features)
    for block in drawn.split(HEAD_DIM, dim=2):
        gram = block.transpose(1, 2) @ block
        torch.testing.assert_close(gram, HEAD_DIM * torch.eye(block.shape[2]).expand_as(gram), atol=1e-4, rtol=0)
    assert not torch.equal(drawn[0], drawn[1])


def test_gaussian_lengths_are_those_of_gaussian_vectors() -> None:
    """The squared length of a Gaussian vector of D numbers has mean D and variance 2 D."""
    squares = orthogonal_projection(200, HEAD_DIM, 64, norms="gaussian").square().sum(1)
    assert abs(squares.mean() / HEAD_DIM - 1) < 0.02
    assert abs(squares.var() / (2 * HEAD_DIM) - 1) < 0.05


def test_a_generator_determines_the_draw() -> None:
    def draw(seed: int) -> torch.Tensor:
        return orthogonal_projection(HEADS, HEAD_DIM, 12, "gaussian", torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_directions_have_no_preferred_side() -> None:
    """Rotations without the sign correction of QR lean to one side; the mean of each entry must be 0."""
    drawn = orthogonal_projection(4000, 4, 4)
    assert (drawn.mean(0).abs() < 5 * drawn.std(0) / 4000**0.5).all()


@pytest.mark.parametrize("kind", ["favor+", "softmax"])
def test_more_features_are_nearer_to_softmax_attention(kind: str) -> None:
    """phi(q).phi(k) estimates exp(q.k / sqrt(D)) up to a factor; the error falls about with the root of M.

    Of small queries and keys: directions of equal length ("favor+") leave a bias that grows with them.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, 32, HEAD_DIM, generator=generator) * scale for scale in (0.3, 0.3, 1))
    expected = (query @ key.transpose(-1, -2) / HEAD_DIM**0.5).softmax(-1) @ value

    def error(num_features: int) -> float:
        total = 0.0
        norms = "sqrt" if kind == "favor+" else "gaussian"
        for _ in range(20):
            projection = orthogonal_projection(1, HEAD_DIM, num_features, norms, generator)
            phi_q, phi_k = query_features(query, kind, projection), key_features(key, kind, projection)
            weights = phi_q @ phi_k.transpose(-1, -2)
            total += float((weights @ value / weights.sum(-1, keepdim=True) - expected).square().mean())
        return (total / 20) ** 0.5

    few, more, many = error(HEAD_DIM), error(8 * HEAD_DIM), error(64 * HEAD_DIM)
    assert few > 2 * more > 4 * many
