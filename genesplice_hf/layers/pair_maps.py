"""From states along a sequence to a map of pairs: every two bins become one pixel.

Fudenberg, Kelley and Pollard 2020, Predicting 3D genome folding from DNA sequence with Akita. The first convolution
over such a map never needs the map: for the mean, m[c, i, j] = (x[c, i] + x[c, j]) / 2, a two-dimensional kernel is a
sum of one over the rows alone and one over the columns alone, and both are one-dimensional convolutions of x.

Shapes: B batch, C channels, N bins, O output channels, K kernel size, P pairs.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch.nn.functional import conv1d, conv2d

from genesplice_hf.errors import SequenceError
from genesplice_hf.layers.batch_norm import Affine, folded
from genesplice_hf.layers.dilated_convolution import DilatedConv2d

PairOperation = Literal["mean", "max", "multiply", "multiply1", "concat"]


def pair_features(x_BCN: torch.Tensor, operation: PairOperation) -> torch.Tensor:
    """(B, C, N, N), or (B, 2C, N, N) for "concat": the map of an elementwise operation on states i and j.

    "mean" (x_i + x_j) / 2, "max", "multiply" x_i x_j, "multiply1" (x_i + 1)(x_j + 1) - 1, "concat" [x_j, x_i].
    """
    row, column = x_BCN[..., :, None], x_BCN[..., None, :]
    if operation == "mean":
        return (row + column) / 2
    if operation == "max":
        return torch.maximum(row, column)
    if operation == "multiply":
        return row * column
    if operation == "multiply1":
        return (row + 1) * (column + 1) - 1
    shape = (*x_BCN.shape, x_BCN.shape[-1])
    return torch.cat([column.expand(shape), row.expand(shape)], dim=1)


def distances(num_bins: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(1, 1, N, N): |i - j| in bins."""
    places = torch.arange(num_bins, device=device, dtype=dtype)
    return (places[:, None] - places).abs()[None, None]


def symmetrised(x_BCNN: torch.Tensor) -> torch.Tensor:
    """(X + X^T) / 2."""
    return (x_BCNN + x_BCNN.transpose(-1, -2)).mul_(0.5)


class PairConv2d(DilatedConv2d):
    """The convolution over the map of pairs and, as its last channel, their distance in bins; no bias.

    Args:
        size: C. out_size: O. kernel_size: K, odd.
        operation: as `pair_features`.
        has_distance: the kernel has a last input channel |i - j|, computed in float32: bfloat16 does not tell
            distances above 256 apart.
    """

    def __init__(
        self, size: int, out_size: int, kernel_size: int, operation: PairOperation, has_distance: bool
    ) -> None:
        width = size * (2 if operation == "concat" else 1)
        super().__init__(width + has_distance, out_size, kernel_size, padding=kernel_size // 2, bias=False)
        self.width, self.operation, self.has_distance = width, operation, has_distance

    def forward(  # type: ignore[override]
        self, x_BCN: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor] | None, affine: Affine | None
    ) -> torch.Tensor:
        """(B, O, N, N).

        Args:
            x_BCN: states.
            activation: on the map before the convolution; None where it would change nothing (relu of x >= 0).
            affine: a norm after the convolution that is folded into it.
        """
        weight = self.weight if affine is None else folded(self.weight.to(affine.scale.dtype), affine)[0]
        kernel = weight[:, : self.width].to(x_BCN.dtype)
        if self.operation == "mean" and activation is None:
            out = convolve_pair_means(x_BCN, kernel)
        else:
            pairs = pair_features(x_BCN, self.operation)
            out = conv2d(pairs if activation is None else activation(pairs), kernel, padding=self.padding)
        shift = None if affine is None else affine.shift
        if self.has_distance:
            # The sum is rounded once, with the shift that takes most of the distance's mean away.
            constant = convolve_distances(weight[:, self.width :], x_BCN.shape[-1], shift)
            return out.add_(constant) if affine is not None else (out + constant).to(self.weight.dtype)
        return out if shift is None else out.add_(shift[:, None, None])


def convolve_pair_means(x_BCN: torch.Tensor, kernel_OCKK: torch.Tensor) -> torch.Tensor:
    """`conv2d(pair_features(x, "mean"), kernel, padding=K // 2)` without the map, in channels-last memory.

    Beyond the map's borders stand zeros, so that near a border fewer rows (columns) of the kernel count: the kernel's
    sum over those that do is another one for each of the K // 2 first and last bins.
    """
    num_bins, size = x_BCN.shape[-1], kernel_OCKK.shape[-1]
    reach = size // 2
    places = torch.arange(num_bins, device=x_BCN.device)
    taps = torch.arange(-reach, reach + 1, device=x_BCN.device)
    counts = (places[:, None] + taps >= 0) & (places[:, None] + taps < num_bins)
    borders = [place for place in range(num_bins) if place < reach or place >= num_bins - reach]
    # Row 0: every tap counts; then one row per bin near a border.
    rules = torch.cat([torch.ones_like(counts[:1]), counts[borders]]).to(kernel_OCKK)
    along_rows = _reduced(x_BCN, torch.einsum("ocab,vb->voca", kernel_OCKK, rules))
    along_columns = _reduced(x_BCN, torch.einsum("ocab,va->vocb", kernel_OCKK, rules))
    out = (along_rows[0].transpose(1, 2)[:, :, None] + along_columns[0].transpose(1, 2)[:, None]).permute(0, 3, 1, 2)
    for variant, place in enumerate(borders, 1):
        out[..., place] += along_rows[variant] - along_rows[0]
        out[..., place, :] += along_columns[variant] - along_columns[0]
    return out


def _reduced(x_BCN: torch.Tensor, kernels_VOCK: torch.Tensor) -> torch.Tensor:
    """(V, B, O, N): half of x under each of V kernels."""
    variants, out_size = kernels_VOCK.shape[:2]
    out = conv1d(x_BCN, kernels_VOCK.flatten(0, 1) / 2, padding=kernels_VOCK.shape[-1] // 2)
    return out.unflatten(1, (variants, out_size)).transpose(0, 1)


def convolve_distances(kernel_O1KK: torch.Tensor, num_bins: int, shift_O: torch.Tensor | None = None) -> torch.Tensor:
    """(1, O, N, N): the distances under a kernel, plus a shift, in at least float32, also under autocast."""
    working = torch.promote_types(kernel_O1KK.dtype, torch.float32)
    device = kernel_O1KK.device
    with torch.autocast(device.type, enabled=False):
        bias = None if shift_O is None else shift_O.to(working)
        table = distances(num_bins, device, working)
        return conv2d(table, kernel_O1KK.to(working), bias, padding=kernel_O1KK.shape[-1] // 2)


def upper_triangle(x_BCNN: torch.Tensor, crop: int, diagonal_offset: int) -> torch.Tensor:
    """(B, P, C): pairs i + offset <= j of the map without `crop` bins at each side, row after row.

    For the pair (i, j) stands what the map holds at (j, i), as in Akita's code; in a symmetric map it is the same.

    Raises:
        SequenceError: nothing is left.
    """
    num_bins = x_BCNN.shape[-1] - 2 * crop
    if num_bins <= diagonal_offset:
        raise SequenceError(
            f"`input_ids` give {x_BCNN.shape[-1]} bins, of which {max(num_bins, 0)} are left without `target_crop` "
            f"({crop}) at each side: pass at least {2 * crop + diagonal_offset + 1} bins of bases."
        )
    rows, columns = torch.triu_indices(num_bins, num_bins, diagonal_offset, device=x_BCNN.device) + crop
    return x_BCNN.permute(0, 2, 3, 1)[:, columns, rows]
