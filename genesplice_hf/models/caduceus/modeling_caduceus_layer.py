"""The block of Caduceus: a norm and two Mamba mixers, one of which reads backwards.

    mixer(u) = W_out (ssm(x) * silu(z)), (x, z) = W_in u;  ssm(x): convolution, silu, selective scan, + D x

(Schiff et al., Caduceus: bi-directional equivariant long-range DNA sequence modeling, arXiv 2403.03234, section 3-4.)

Both strands of the equivariant form run through the same modules as a batch of 2B rows, each row in the reading
direction of its own strand: the given strands first, then the others.

Shapes: B rows, L tokens, E width, D channels of a mixer, N states per channel, K taps of the convolution.
"""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from genesplice_hf.layers.norm import RMSNorm
from genesplice_hf.layers.padding import zero_padding
from genesplice_hf.layers.selective_scan import selective_scan
from genesplice_hf.models.caduceus.configuration_caduceus import CaduceusConfig


def exchange_strands(x_BLE: torch.Tensor) -> torch.Tensor:
    """Each strand takes the other's states, read backwards in length and width: (2B, L, E) -> (2B, L, E)."""
    given, other = x_BLE.chunk(2)
    return torch.cat([other, given]).flip(1, 2)


def make_norm(config: CaduceusConfig) -> nn.Module:
    return (RMSNorm if config.rms_norm else nn.LayerNorm)(config.d_model, config.norm_epsilon)


class CausalConv(nn.Conv1d):
    """Depthwise convolution over the K last tokens, channels last, as K shifted products: (B, L, D) -> (B, L, D)."""

    def __init__(self, channels: int, taps: int, bias: bool) -> None:
        super().__init__(channels, channels, taps, groups=channels, bias=bias)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        (taps,), length = self.kernel_size, x_BLD.shape[1]
        padded, weight_KD = nn.functional.pad(x_BLD, (0, 0, taps - 1, 0)), self.weight[:, 0].t()
        y = x_BLD * weight_KD[-1] if self.bias is None else torch.addcmul(self.bias, x_BLD, weight_KD[-1])
        for tap in range(taps - 1):
            y = torch.addcmul(y, padded[:, tap : tap + length], weight_KD[tap])
        return y


class StateSpace(nn.Module):
    """One direction of a mixer: convolution, step sizes and the selective scan.

    `has_projections`: it owns the projections around it (a reverse direction that is not tied to the forward one).
    """

    def __init__(self, config: CaduceusConfig, has_projections: bool = False) -> None:
        super().__init__()
        options, channels, self.rank = config.ssm_cfg, config.d_inner, config.dt_rank
        self.num_states, self.backend, self.chunk_size = (
            options["d_state"],
            config.scan_backend,
            config.scan_chunk_size,
        )
        self.conv1d = CausalConv(channels, options["d_conv"], options["conv_bias"])
        self.x_proj = nn.Linear(channels, self.rank + 2 * self.num_states, bias=False)
        self.dt_proj = nn.Linear(self.rank, channels)
        self.A_log = nn.Parameter(torch.empty(channels, self.num_states))
        self.D = nn.Parameter(torch.empty(channels))
        if has_projections:
            self.in_proj, self.out_proj = make_projections(config)

    def forward(self, x_BLD: torch.Tensor, mask_BL: torch.Tensor | None) -> torch.Tensor:
        """(B, L, D); padding neither enters the convolution nor the states."""
        x = nn.functional.silu(self.conv1d(zero_padding(x_BLD, mask_BL)))
        x = zero_padding(x, mask_BL)
        steps, B, C = self.x_proj(x).split([self.rank, self.num_states, self.num_states], dim=-1)
        working = torch.promote_types(x.dtype, torch.float32)
        delta = nn.functional.softplus(self.dt_proj(steps).to(working))
        A = -torch.exp(self.A_log.to(working))
        y = selective_scan(x, delta, A, B, C, self.chunk_size, self.backend)
        return torch.addcmul(y, x, self.D)


def make_projections(config: CaduceusConfig) -> tuple[nn.Linear, nn.Linear]:
    """Into channels and gates, and back.

    `shares`: among how many branches the variance of a new layer's output is divided.
    """
    bias, options = config.ssm_cfg["bias"], config.initializer_cfg
    into = nn.Linear(config.d_model, 2 * config.d_inner, bias=bias)
    back = nn.Linear(config.d_inner, config.d_model, bias=bias)
    into.shares, back.shares = 1, 1
    if options["rescale_prenorm_residual"]:
        back.shares = options["n_residuals_per_layer"] * config.n_layer
    return into, back


class CaduceusMixer(nn.Module):
    """Forward and reverse state space between projections, (B, L, E) -> (B, L, E).

    Tied directions share one `in_proj` and one `out_proj` module, so that an adapter wraps it once. A projection sees
    no positions: it is computed once for both directions, and with the strategy "add" also once on the way out.
    """

    def __init__(self, config: CaduceusConfig) -> None:
        super().__init__()
        self.is_tied = config.bidirectional_weight_tie
        self.multiplies = config.bidirectional_strategy == "ew_multiply"
        self.sums_first = self.is_tied and not self.multiplies and not config.ssm_cfg["bias"]
        self.in_proj, self.out_proj = make_projections(config)
        self.forward_ssm = StateSpace(config)
        self.reverse_ssm = StateSpace(config, not self.is_tied) if config.bidirectional else None

    def forward(self, u_BLE: torch.Tensor, mask_BL: torch.Tensor | None) -> torch.Tensor:
        x, z = self.in_proj(u_BLE).chunk(2, dim=-1)
        gate = nn.functional.silu(z)
        y = self.forward_ssm(x, mask_BL)
        if self.reverse_ssm is None:
            return self.out_proj(y * gate)
        if not self.is_tied:
            x, z = self.reverse_ssm.in_proj(u_BLE).chunk(2, dim=-1)
        backwards = None if mask_BL is None else mask_BL.flip(1)
        y_reverse = self.reverse_ssm(x.flip(1), backwards).flip(1)
        if self.sums_first:
            return self.out_proj((y + y_reverse) * gate)
        out = self.out_proj(y * gate)
        last = self.out_proj if self.is_tied else self.reverse_ssm.out_proj
        out_reverse = last(y_reverse * (gate if self.is_tied else nn.functional.silu(z)))
        return out * out_reverse if self.multiplies else out + out_reverse


class CaduceusBlock(GradientCheckpointingLayer):
    """r = x + r, strands exchanged where the config says so; x = mixer(norm(r)). Gives (x, r)."""

    def __init__(self, config: CaduceusConfig) -> None:
        super().__init__()
        self.exchanges = config.rcps and config.rcps_half_order == "exchange"
        self.wide_residual = config.residual_in_fp32
        self.norm = make_norm(config)
        self.mixer = CaduceusMixer(config)

    def forward(
        self, x_BLE: torch.Tensor, residual_BLE: torch.Tensor | None, mask_BL: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = x_BLE if residual_BLE is None else x_BLE + residual_BLE
        if self.wide_residual:
            residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
        if self.exchanges:
            residual = exchange_strands(residual)
        return self.mixer(self.norm(residual.to(x_BLE.dtype)), mask_BL), residual
