"""Fused convolution blocks against torch's own modules: values, gradients, running statistics.

Shapes: B batch, L positions, C channels.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from genesplice_hf.layers import channels_last
from genesplice_hf.layers.channels_last import BatchNorm, add_pointwise, conv, conv_from_bases, norm_act, pointwise
from genesplice_hf.layers.norm import freeze_batch_norm

DTYPES = pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-5), (torch.float64, 1e-12)], ids=str)
B, L, C = 2, 9, 6


def plain_norm_act(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The definition, by torch's module over (B, C, L)."""
    y = norm(x.transpose(1, 2)).transpose(1, 2)
    return y * torch.sigmoid(1.702 * y)


def fused_norm_act(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    values, factor = norm_act(norm, x)
    return values * factor


def unusual(norm: nn.Module) -> nn.Module:
    """Away from the initial statistics and parameters."""
    for tensor, low in ((norm.running_mean, -1), (norm.running_var, 0.5), (norm.weight, 0.5), (norm.bias, -1)):
        nn.init.uniform_(tensor, low, 2)
    return norm


def gradients(run: Callable, module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    out = run(module, x)
    mix = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    wanted = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
    return [out.detach(), *torch.autograd.grad((out * mix).sum(), wanted)]


@DTYPES
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_norm_and_activation(mode: str, momentum: float | None, dtype: torch.dtype, atol: float) -> None:
    torch.manual_seed(0)
    plain = unusual(nn.BatchNorm1d(C, momentum=momentum)).to(dtype).train(mode == "train")
    fused = BatchNorm(C, plain.eps, momentum).to(dtype).train(mode != "eval")
    fused.load_state_dict(plain.state_dict())
    if mode == "frozen":
        freeze_batch_norm(fused)
        plain.requires_grad_(False)
    x = (torch.randn(B, L, C, dtype=dtype) * 3 + 1).requires_grad_()
    for one, other in zip(gradients(fused_norm_act, fused, x), gradients(plain_norm_act, plain, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=atol)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(fused.get_buffer(name), buffer, rtol=1e-5, atol=atol)
    with torch.no_grad():
        torch.testing.assert_close(fused_norm_act(fused, x), plain_norm_act(plain, x), rtol=1e-5, atol=atol)


@pytest.mark.parametrize("training", [False, True])
def test_other_norms_and_activations_are_called_as_they_are(training: bool) -> None:
    torch.manual_seed(0)
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(unusual(BatchNorm(C, 1e-5, 0.1))).train(training)
    plain = unusual(nn.BatchNorm1d(C)).train(training)
    plain.load_state_dict(sync.state_dict())
    x = torch.randn(B, L, C)
    torch.testing.assert_close(fused_norm_act(sync, x), plain_norm_act(plain, x))
    values, factor = norm_act(plain, x, "relu")
    torch.testing.assert_close(values * factor, plain(x.transpose(1, 2)).transpose(1, 2).relu())


def test_one_position_has_no_batch_statistics() -> None:
    with pytest.raises(ValueError, match="more than one position"):
        norm_act(BatchNorm(C, 1e-5, 0.1).train(), torch.randn(1, 1, C))


def test_statistics_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that see the same numbers have the statistics of one, and its gradients."""
    monkeypatch.setattr(channels_last, "_world_size", lambda norm: 2 if norm.is_synced else 1)
    monkeypatch.setattr(channels_last, "all_reduce", lambda total: 2 * total)
    torch.manual_seed(0)
    synced = unusual(BatchNorm(C, 1e-5, 0.1, is_synced=True)).double()
    x = torch.randn(B, L, C, dtype=torch.float64, requires_grad=True)
    alone = unusual(nn.BatchNorm1d(C)).double()
    alone.load_state_dict(synced.state_dict())
    twice = torch.cat([x, x])
    torch.testing.assert_close(fused_norm_act(synced, x), plain_norm_act(alone, twice)[:B])
    for name, buffer in alone.named_buffers():
        torch.testing.assert_close(synced.get_buffer(name), buffer)


@DTYPES
@pytest.mark.parametrize("grad", [False, True])
def test_products_take_the_factor(dtype: torch.dtype, atol: float, grad: bool) -> None:
    torch.manual_seed(0)
    layer, wide = nn.Linear(C, C).to(dtype), nn.Linear(C, 2 * C).to(dtype)
    x, y = (torch.randn(B, L, C, dtype=dtype) for _ in range(2))
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(pointwise(wide, x, 0.3), wide(0.3 * x), rtol=1e-5, atol=atol)
        expected = y + layer(0.3 * x)
        out, bias = add_pointwise(y.clone(), layer, x, 0.3)
        torch.testing.assert_close(out + bias, expected, rtol=1e-5, atol=atol)

    class Adapter(nn.Linear):
        """Stands for what PEFT puts in a linear layer's place."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    adapter = Adapter(C, C).to(dtype)
    out, bias = add_pointwise(y.clone(), adapter, x, 0.3)
    assert bias is None
    torch.testing.assert_close(out, y + adapter(0.3 * x), rtol=1e-5, atol=atol)
    torch.testing.assert_close(pointwise(adapter, x, 0.3), adapter(0.3 * x), rtol=1e-5, atol=atol)


@DTYPES
@pytest.mark.parametrize("length", [1, 2, 9])
def test_convolutions(dtype: torch.dtype, atol: float, length: int) -> None:
    torch.manual_seed(0)
    narrow, first = nn.Conv1d(C, 8, 5, padding=2).to(dtype), nn.Conv1d(4, 8, 15, padding=7).to(dtype)

    def plain(layer: nn.Conv1d, x: torch.Tensor) -> torch.Tensor:
        return layer(x.transpose(1, 2)).transpose(1, 2)

    for run, layer, factor in ((conv, narrow, 1.0), (conv, narrow, 0.3), (conv_from_bases, first, 1.0)):
        x = torch.randn(B, length, layer.in_channels, dtype=dtype, requires_grad=True)

        def scaled(layer: nn.Conv1d, x: torch.Tensor, run: Callable = run, factor: float = factor) -> torch.Tensor:
            return run(layer, x) if factor == 1.0 else run(layer, x, factor)

        found = gradients(scaled, layer, x)
        expected = gradients(lambda layer, x, factor=factor: plain(layer, factor * x), layer, x)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=atol)

        class Other(nn.Conv1d):
            pass

        other = copy.deepcopy(layer)
        other.__class__ = Other
        torch.testing.assert_close(scaled(other, x), found[0], rtol=1e-5, atol=atol)
