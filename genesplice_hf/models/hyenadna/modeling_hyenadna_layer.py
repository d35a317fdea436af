"""The block of HyenaDNA: long convolutions gated by their input, and a feed-forward network.

Shapes: B batch, L tokens, T longest input, E hidden size, O number of long filters per channel.
"""

import math
from itertools import pairwise

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from genesplice_hf.layers.long_convolution import (
    causal_convolution,
    filter_spectrum,
    shared_length,
    without_autocast,
    working_dtype,
)
from genesplice_hf.layers.padding import zero_padding
from genesplice_hf.models.hyenadna.configuration_hyenadna import HyenaDNAConfig

# What one step works on, so that its results stay in a core's cache for the next.
TOKENS_AT_ONCE = 2048
CHANNELS_AT_ONCE = 32


def runs_in_blocks(x_BLE: torch.Tensor) -> bool:
    """Whether a long input without gradients is on a processor whose memory is slower than its arithmetic."""
    return (
        x_BLE.device.type == "cpu"
        and x_BLE.shape[1] > TOKENS_AT_ONCE
        and x_BLE.dtype in (torch.float32, torch.float64)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def blocks(length: int, size: int) -> list[slice]:
    """The whole of `length` in slices of `size`; the last may be shorter."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def filter_positions(
    config: HyenaDNAConfig, length: int | None = None, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (1, L, emb_dim) and times (1, L, 1) of the first `length` positions (None = all), float32.

    Both are relative to `max_seq_len`, never to the length. The order of operations is the published one, for the
    published values are float32 as well.
    """
    total = config.max_seq_len
    bands = (config.emb_dim - 1) // 2
    time = torch.linspace(0, 1, total, device=device)[:length, None]
    angle = 2 * math.pi * torch.linspace(0, total - 1, total, device=device)[:length, None] / total
    turns = torch.linspace(1e-4, bands - 1, bands, device=device) * angle
    return torch.cat([time, turns.cos(), -turns.sin()], dim=-1)[None], time[None]


def decay_rates(config: HyenaDNAConfig, device: torch.device | None = None) -> torch.Tensor:
    """(1, 1, O E) float32: the logarithm of what is left of each channel's filter at the end of the longest input."""
    target = math.log(config.decay_target)
    rates = (target / config.slow_decay_pct, target / config.fast_decay_pct)
    return torch.linspace(*rates, config.filter_width, device=device)[None, None]


class FilterLinear(nn.Linear):
    """A linear layer in the precision of its input, whatever its parameters have."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self.weight.to(input.dtype), bias)


class HyenaFilter(nn.Module):
    """The long filters of one mixer: a network of sines over positions, times a window that decays.

    (Poli et al., arXiv 2302.10866, section 3.3, eq. 7.)
    """

    def __init__(self, config: HyenaDNAConfig) -> None:
        super().__init__()
        self.config = config
        width, order = config.filter_width, config.filter_order
        sizes = [config.emb_dim, *[order] * (config.num_inner_mlps + 1)]
        self.linears = nn.ModuleList(FilterLinear(i, o) for i, o in pairwise(sizes))
        self.linears.append(FilterLinear(order, width, bias=False))
        self.freq = nn.Parameter(torch.empty(1, order)) if config.train_freq else None
        self.bias = nn.Parameter(torch.empty(width)) if config.use_bias else None
        is_stored = config.filter_positions != "computed"
        positions = torch.empty(1, config.max_seq_len, config.emb_dim) if is_stored else None
        if config.filter_positions == "trained":
            self.positions = nn.Parameter(positions)
        else:
            self.register_buffer("positions", positions)
        self.register_buffer("times", torch.empty(1, config.max_seq_len, 1) if is_stored else None)
        self.register_buffer("decay", torch.empty(1, 1, width) if is_stored and config.modulate else None)
        # (taps, what made them, spectra) of the last call that nothing trained.
        self._kept: tuple[int, torch.Tensor, torch.Tensor] | None = None

    def forward(self, length: int, dtype: torch.dtype) -> torch.Tensor:
        """The first `length` taps of every filter, (O, E, L), in `dtype`."""
        weight = self.linears[0].weight
        if self.positions is None:
            positions, times = filter_positions(self.config, length, weight.device)
        else:
            positions, times = self.positions[:, :length], self.times[:, :length]
        h_1LW = positions.to(dtype)
        for linear in self.linears[:-1]:
            h_1LW = linear(h_1LW)
            frequency = self.config.activation_freq if self.freq is None else self.freq.to(dtype)
            h_1LW = torch.sin(frequency * h_1LW)
        h_1LW = self.linears[-1](h_1LW)
        if self.config.modulate:
            decay = decay_rates(self.config, weight.device) if self.decay is None else self.decay
            window = torch.exp(-times.to(dtype) * decay.to(dtype).abs()) + self.config.modulation_shift
            h_1LW = h_1LW * window
        return h_1LW[0].T.unflatten(0, (self.config.hyena_order - 1, self.config.d_model))

    def spectra(self, length: int, dtype: torch.dtype) -> torch.Tensor:
        """`filter_spectrum` of the filters for `length` tokens, (O, E, N / 2 + 1), kept where that is allowed."""
        if not self._may_keep(length):
            return filter_spectrum(self(length, dtype))
        # Neighbouring lengths share a transform, so that a sequence can grow without new filters.
        length = min(shared_length(length), self.config.max_seq_len)
        # Whoever reads it later may want gradients of other things.
        with torch.inference_mode(False), torch.no_grad():
            made_of = torch.cat([tensor.to(dtype).flatten() for tensor in self._makers(length)])
            kept = self._kept
            if kept is None or kept[0] != length or not _same(kept[1], made_of):
                kept = (length, made_of, filter_spectrum(self(length, dtype)))
                self._kept = kept
        return kept[2]

    def _may_keep(self, length: int) -> bool:
        """Nothing trains the filters, and nothing but their own tensors makes them (an adapter can be switched)."""
        tensors = self._makers(length)
        is_trained = any(tensor.requires_grad for tensor in tensors)
        return (
            length <= self.config.filter_cache_size
            and not (is_trained and (self.training or torch.is_grad_enabled()))
            and all(type(linear) is FilterLinear for linear in self.linears)
            and not torch.compiler.is_compiling()
            and not tensors[0].is_meta
        )

    def _makers(self, length: int) -> list[torch.Tensor]:
        """The tensors that the first `length` taps are made of."""
        tensors: list[torch.Tensor] = [*self.linears.parameters()]
        own = (self.freq, self.decay, *(x if x is None else x[:, :length] for x in (self.positions, self.times)))
        return tensors + [tensor for tensor in own if tensor is not None]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    # By value: version counters miss what is written through `.data`. The tensors are small beside the filters.
    return (one.device, one.dtype, one.shape) == (other.device, other.dtype, other.shape) and torch.equal(one, other)


class HyenaMixer(nn.Module):
    """x0 * conv_1(x1 * ... conv_O(x_O * v)): long convolutions and products of short-filtered projections.

    (Poli et al., arXiv 2302.10866, section 3.1, definition 3.1.)
    """

    def __init__(self, config: HyenaDNAConfig) -> None:
        super().__init__()
        self.d_model = config.d_model
        self.hyena_order = config.hyena_order
        inner = config.d_model * (config.hyena_order + 1)
        self.in_proj = nn.Linear(config.d_model, inner)
        self.short_filter = nn.Conv1d(
            inner, inner, config.short_filter_order, padding=config.short_filter_order - 1, groups=inner
        )
        self.filter = HyenaFilter(config)
        self.dropout = nn.Dropout(config.hyena_dropout)
        self.out_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj.feeds_residual = True  # initialised smaller

    def forward(self, x_BLE: torch.Tensor, mask_BL: torch.Tensor | None) -> torch.Tensor:
        if self.hyena_order == 2 and not self.training and runs_in_blocks(x_BLE):
            return self._in_blocks(x_BLE, mask_BL)
        length = x_BLE.shape[1]
        projected = zero_padding(self.in_proj(x_BLE), mask_BL).transpose(1, 2)
        first, *gates, v_BEL = self.short_filter(projected)[..., :length].split(self.d_model, dim=1)
        if mask_BL is not None:
            # The short filter's bias stands at padding, and the long filters would carry it on.
            v_BEL = v_BEL * mask_BL[:, None].to(v_BEL.dtype)
        with without_autocast(x_BLE):
            spectra = self.filter.spectra(length, working_dtype(v_BEL))
            for index, gate in enumerate(reversed(gates)):
                v_BEL = self._long_filter(self.dropout(v_BEL * gate), spectra[index], index)
        # Contiguous, for a product with a strided matrix rounds by whether its weight is trained.
        return self.out_proj((v_BEL * first).transpose(1, 2).contiguous())

    def _in_blocks(self, x_BLE: torch.Tensor, mask_BL: torch.Tensor | None) -> torch.Tensor:
        """The same of order 2 without gradients, in pieces that stay in a core's cache."""
        first_BLE, u_BEL = torch.empty_like(x_BLE), x_BLE.new_empty(len(x_BLE), self.d_model, x_BLE.shape[1])
        for block in blocks(x_BLE.shape[1], TOKENS_AT_ONCE):
            first_BLE[:, block], gated_BLE = self._gated(x_BLE, mask_BL, block)
            u_BEL[..., block] = gated_BLE.transpose(1, 2)
        spectrum = self.filter.spectra(x_BLE.shape[1], x_BLE.dtype)[0]
        for block in blocks(self.d_model, CHANNELS_AT_ONCE):
            part_BEL = u_BEL[:, block]
            y_BEL = causal_convolution(part_BEL, spectrum[block])
            if self.filter.bias is not None:
                y_BEL.addcmul_(part_BEL, self.filter.bias[block, None].to(y_BEL.dtype))
            u_BEL[:, block] = y_BEL
        parts = (
            self.out_proj(u_BEL[..., block].transpose(1, 2) * first_BLE[:, block])
            for block in blocks(x_BLE.shape[1], TOKENS_AT_ONCE)
        )
        return torch.cat(list(parts), dim=1)

    def _gated(
        self, x_BLE: torch.Tensor, mask_BL: torch.Tensor | None, block: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x0 and x1 * v of some tokens, (B, block, E) each; their short filters look at the tokens before them."""
        reach = self.short_filter.kernel_size[0] - 1
        seen = slice(max(0, block.start - reach), block.stop)
        mask = None if mask_BL is None else mask_BL[:, seen]
        projected = zero_padding(self.in_proj(x_BLE[:, seen]), mask)
        padded = nn.functional.pad(projected, (0, 0, reach - (block.start - seen.start), 0))
        length = padded.shape[1] - reach
        short = self.short_filter.bias.expand(len(padded), length, -1)
        for tap, weight in enumerate(self.short_filter.weight[:, 0].unbind(1)):
            short = torch.addcmul(short, padded[:, tap : tap + length], weight)
        first, gate, v = short.split(self.d_model, dim=-1)
        return first, zero_padding(gate * v, None if mask is None else mask[:, -length:])

    def _long_filter(self, v_BEL: torch.Tensor, spectrum: torch.Tensor, index: int) -> torch.Tensor:
        dtype = working_dtype(v_BEL)
        wide_BEL = v_BEL.to(dtype)
        y_BEL = causal_convolution(wide_BEL, spectrum)
        if self.filter.bias is not None:
            bias_E = self.filter.bias.view(-1, self.d_model)[index].to(dtype)
            y_BEL = y_BEL + wide_BEL * bias_E[:, None]
        return y_BEL.to(v_BEL.dtype)


class HyenaMLP(nn.Module):
    """fc2(gelu(fc1(x))), with GELU's tanh approximation."""

    def __init__(self, config: HyenaDNAConfig) -> None:
        super().__init__()
        assert config.d_inner is not None  # the config fills it
        self.fc1 = nn.Linear(config.d_model, config.d_inner)
        self.fc2 = nn.Linear(config.d_inner, config.d_model)
        self.fc2.feeds_residual = True  # initialised smaller

    def forward(self, x_BLE: torch.Tensor) -> torch.Tensor:
        if not runs_in_blocks(x_BLE):
            return self.fc2(nn.functional.gelu(self.fc1(x_BLE), approximate="tanh"))
        whole = blocks(x_BLE.shape[1], TOKENS_AT_ONCE)
        parts = (nn.functional.gelu(self.fc1(x_BLE[:, block]), approximate="tanh") for block in whole)
        return torch.cat([self.fc2(part) for part in parts], dim=1)


class HyenaLayer(GradientCheckpointingLayer):
    """r += x; x = mixer(norm(r)); r += x; x = mlp(norm(r)): what a block adds joins the sum in the next one."""

    def __init__(self, config: HyenaDNAConfig, is_first: bool) -> None:
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.dropout1 = nn.Dropout(config.embed_dropout if is_first else config.resid_dropout)
        self.norm1 = nn.LayerNorm(config.d_model, config.layer_norm_epsilon)
        self.mixer = HyenaMixer(config)
        self.dropout2 = nn.Dropout(config.resid_dropout)
        self.norm2 = nn.LayerNorm(config.d_model, config.layer_norm_epsilon)
        self.mlp = HyenaMLP(config)

    def forward(
        self, x_BLE: torch.Tensor, residual_BLE: torch.Tensor | None, mask_BL: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One block.

        Args:
            x_BLE: what the block before added, or the embedding.
            residual_BLE: the sum without it; None = 0.
            mask_BL: bool, True = real; None = all real.

        Returns:
            What this block's feed-forward network adds, and the sum without it.
        """
        residual_BLE = self._add(self.dropout1(x_BLE), residual_BLE)
        x_BLE = self.mixer(normalized(self.norm1, residual_BLE), mask_BL)
        residual_BLE = self._add(self.dropout2(x_BLE), residual_BLE)
        return self.mlp(normalized(self.norm2, residual_BLE)), residual_BLE

    def _add(self, x_BLE: torch.Tensor, residual_BLE: torch.Tensor | None) -> torch.Tensor:
        x_BLE = x_BLE.to(working_dtype(x_BLE)) if self.residual_in_fp32 else x_BLE
        return x_BLE if residual_BLE is None else residual_BLE + x_BLE


def normalized(norm: nn.Module, x_BLE: torch.Tensor) -> torch.Tensor:
    """The norm in the precision of its parameters, which an adapter may have wrapped."""
    return norm(x_BLE.to(next(norm.parameters()).dtype))
