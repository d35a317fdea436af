"""Convolutions whose output is as long as their input, with a dilation that survives PEFT.

PEFT's LoRA makes its copy of a convolution from kernel, stride and padding alone: here the dilation follows from the
padding, (k - 1) d / 2, so that the copy has it too.
"""

from torch import nn

Sizes = int | tuple[int, ...]


class DilatedConv1d(nn.Conv1d):
    """`nn.Conv1d` whose dilation follows from its padding: 2 * padding / (kernel size - 1)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        taps, zeros = _first(kernel_size), _first(padding)
        super().__init__(in_channels, out_channels, taps, stride, zeros, _dilation(taps, zeros), groups, bias)

    @classmethod
    def same(cls, in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1) -> "DilatedConv1d":
        """Without bias, zeros on both sides, as many outputs as inputs; `kernel_size` is odd."""
        return cls(in_channels, out_channels, kernel_size, padding=dilation * (kernel_size - 1) // 2, bias=False)


class DilatedConv2d(nn.Conv2d):
    """The same over square kernels."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        taps, zeros = _first(kernel_size), _first(padding)
        super().__init__(in_channels, out_channels, taps, stride, zeros, _dilation(taps, zeros), groups, bias)

    @classmethod
    def same(cls, in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1) -> "DilatedConv2d":
        """Without bias, zeros on all sides, outputs as large as inputs; `kernel_size` is odd."""
        return cls(in_channels, out_channels, kernel_size, padding=dilation * (kernel_size - 1) // 2, bias=False)


def _first(sizes: Sizes) -> int:
    return sizes if isinstance(sizes, int) else sizes[0]


def _dilation(taps: int, zeros: int) -> int:
    return 1 if taps == 1 else max(2 * zeros // (taps - 1), 1)
