"""Feature maps of linear attention: phi(q), phi(k) >= 0 whose products stand in for exp(q.k / sqrt(D)).

With u = x D^(-1/4) and random directions w:

    relu, elu+1, sqr   max(x, 0); elu(x) + 1; x^2
    favor+             exp(u.w - |u|^2 / 2), the w of a block orthogonal and sqrt(D) long (the published SLiM code)
    softmax            M^(-1/2) (exp(u.w - |u|^2 / 2 - c) + 1e-4) with a stabiliser c (FAVOR+ of performer-pytorch)
    generalized        max(u.w, 0) + 1e-3
    no_projection      softmax of q over its features; exp(k), which `read_out_query` turns into a softmax of k over
                       positions where all of them are seen

Source: Choromanski et al., Rethinking attention with Performers, arXiv 2009.14794, eq. 5-7 and section 2.4.

Shapes: B batch, L tokens, H heads, D head size, M features. Projections are (H, D, M), or (1, D, M) for all heads.
"""

from typing import Literal, get_args

import torch
from torch import nn

FeatureMap = Literal["relu", "elu+1", "sqr", "favor+", "softmax", "generalized", "no_projection"]
Stabilizer = Literal["fixed", "global"]

FEATURE_MAPS: tuple[str, ...] = get_args(FeatureMap)
PROJECTED = ("favor+", "softmax", "generalized")
SOFTMAX_EPS = 1e-4
GENERALIZED_EPS = 1e-3


def query_features(x_BHLD: torch.Tensor, kind: str, projection_HDM: torch.Tensor | None = None) -> torch.Tensor:
    """phi of queries, (B, H, L, M). The softmax form is stabilised by the largest u.w of each query."""
    if kind == "softmax":
        u, projected = _project(x_BHLD, projection_HDM)
        return _softmax_features(u, projected, projected.detach().amax(-1, keepdim=True))
    return x_BHLD.softmax(-1) if kind == "no_projection" else _shared(x_BHLD, kind, projection_HDM)


def key_features(
    x_BHLD: torch.Tensor,
    kind: str,
    projection_HDM: torch.Tensor | None = None,
    mask_BL: torch.Tensor | None = None,
    stabilizer: Stabilizer = "fixed",
) -> torch.Tensor:
    """phi of keys, (B, H, L, M), zero at padding.

    Args:
        kind: a name of `FEATURE_MAPS`.
        projection_HDM: random directions, for the names in `PROJECTED`.
        mask_BL: bool, True = real; None = all real.
        stabilizer: of the softmax form. "fixed" subtracts 0, so that a key's features depend on nothing else;
            "global" subtracts the largest u.w over features and real positions of each head, as performer-pytorch
            does, which lets later keys act on earlier ones through the additive 1e-4.
    """
    if mask_BL is not None:
        # Before the exponentials, for what overflows in padding would be inf times 0 behind them.
        x_BHLD = x_BHLD * mask_BL[:, None, :, None].to(x_BHLD.dtype)
    if kind == "softmax":
        u, projected = _project(x_BHLD, projection_HDM)
        features = _softmax_features(u, projected, _key_stabilizer(projected, mask_BL, stabilizer))
    else:
        features = x_BHLD.exp() if kind == "no_projection" else _shared(x_BHLD, kind, projection_HDM)
    return features if mask_BL is None else features * mask_BL[:, None, :, None].to(features.dtype)


def read_out_query(query_BHLM: torch.Tensor, total_BHM: torch.Tensor, kind: str) -> torch.Tensor:
    """Queries for a read-out over all positions, whose keys sum to `total_BHM`.

    Only `no_projection` changes them: dividing a query's feature by the sum of that feature over the keys is the same
    as a softmax of the keys over positions, and needs no second look at the keys.
    """
    if kind != "no_projection":
        return query_BHLM
    return query_BHLM / torch.where(total_BHM == 0, 1.0, total_BHM)[:, :, None]


def _shared(x_BHLD: torch.Tensor, kind: str, projection_HDM: torch.Tensor | None) -> torch.Tensor:
    """The maps that treat queries and keys alike."""
    if kind == "relu":
        return nn.functional.relu(x_BHLD)
    if kind == "elu+1":
        # elu(x) + 1 is exp(x) below 0; adding 1 to exp(x) - 1 would lose its digits.
        return torch.where(x_BHLD > 0, x_BHLD + 1, x_BHLD.clamp(max=0).exp())
    if kind == "sqr":
        return x_BHLD.square()
    u, projected = _project(x_BHLD, projection_HDM)
    if kind == "generalized":
        return nn.functional.relu(projected) + GENERALIZED_EPS
    return (projected - _half_square(u)).exp()


def _project(x_BHLD: torch.Tensor, projection_HDM: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    assert projection_HDM is not None
    u_BHLD = x_BHLD * x_BHLD.shape[-1] ** -0.25
    return u_BHLD, u_BHLD @ projection_HDM.to(x_BHLD.dtype)


def _half_square(u_BHLD: torch.Tensor) -> torch.Tensor:
    return u_BHLD.square().sum(-1, keepdim=True) / 2


def _softmax_features(u: torch.Tensor, projected_BHLM: torch.Tensor, stabilizer: torch.Tensor | float) -> torch.Tensor:
    exponent = projected_BHLM - _half_square(u) - stabilizer
    return projected_BHLM.shape[-1] ** -0.5 * (exponent.exp() + SOFTMAX_EPS)


def _key_stabilizer(
    projected_BHLM: torch.Tensor, mask_BL: torch.Tensor | None, stabilizer: Stabilizer
) -> torch.Tensor | float:
    if stabilizer == "fixed":
        return 0.0
    values = projected_BHLM.detach()
    if mask_BL is None:
        return values.amax((-1, -2), keepdim=True)
    peak = values.masked_fill(~mask_BL[:, None, :, None], -torch.inf).amax((-1, -2), keepdim=True)
    return peak.masked_fill(peak.isinf(), 0.0)  # a row of padding has no peak


def orthogonal_projection(
    num_heads: int,
    head_dim: int,
    num_features: int,
    norms: Literal["sqrt", "gaussian"] = "sqrt",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draws random directions, (H, D, M) float32: orthogonal within each block of D, independent between blocks.

    Args:
        num_features: M; the last block is cut where D does not divide it.
        norms: length of a direction, sqrt(D) or that of an independent Gaussian vector.
    """
    num_blocks = -(-num_features // head_dim)
    gaussian = torch.randn(num_heads, num_blocks, head_dim, head_dim, generator=generator)
    q, r = torch.linalg.qr(gaussian)
    # Without the signs of R's diagonal the rotation is not uniform (Mezzadri, math-ph/0609050).
    directions = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    directions = directions.transpose(1, 2).flatten(2)[..., :num_features]
    if norms == "sqrt":
        return directions * head_dim**0.5
    lengths = torch.randn(num_heads, head_dim, num_features, generator=generator).norm(dim=1, keepdim=True)
    return directions * lengths
