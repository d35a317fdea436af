"""The SLiM Performer without a head: a transformer whose attention is running sums.

    x = input_map(ids) [+ gelu(stem convolution)] and positions
    each layer: x + attention(norm(x)), then x + V(act(U(norm(x))));  final norm

(Likhosherstov et al., Sub-linear memory: how to make Performers SLiM, arXiv 2012.11346.)

Shapes: B batch, L tokens, C tokens of a chunk, E hidden size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from genesplice_hf.errors import SequenceError
from genesplice_hf.layers.hierarchical import take_tokens
from genesplice_hf.layers.linear_attention import LinearCache, add_states
from genesplice_hf.layers.padding import demand_one_input, real_positions, zero_padding
from genesplice_hf.layers.stem import ConvStem
from genesplice_hf.layers.strict_loading import StrictPreTrainedModel
from genesplice_hf.models.performer.configuration_performer import PerformerConfig
from genesplice_hf.models.performer.modeling_performer_layer import PerformerAttention, PerformerLayer


@dataclass(frozen=True)
class TokenStream:
    """One batch that can be embedded piece by piece.

    Attributes:
        input_ids, inputs_embeds: (B, L) or (B, L, embedding size), one of them.
        mask: (B, L) bool, None = all real.
        offset: position of column 0, (B, 1) or one number; positions count from the first real token of each row.
        seen: real tokens of each row before and in this stream, (B,), for the cache.
        before: (B, kernel size - 1, embedding size) tokens before column 0, for the stem; None = there are none.
    """

    input_ids: torch.Tensor | None
    inputs_embeds: torch.Tensor | None
    mask: torch.Tensor | None
    offset: torch.Tensor | int
    seen: torch.Tensor
    before: torch.Tensor | None = None

    @property
    def length(self) -> int:
        given: Any = self.inputs_embeds if self.input_ids is None else self.input_ids
        return given.shape[1]

    def mask_of(self, start: int, stop: int) -> torch.Tensor | None:
        return None if self.mask is None else self.mask[:, start:stop]

    def spans(self, chunk_size: int) -> list[tuple[int, int]]:
        """(start, stop) of the chunks; one of them where chunks are off."""
        step = chunk_size if chunk_size > 0 else self.length
        return [(start, min(start + step, self.length)) for start in range(0, self.length, step)]


class PerformerPreTrainedModel(StrictPreTrainedModel):
    """Loading, initialisation and the declared abilities of every Performer class."""

    config: PerformerConfig
    config_class = PerformerConfig
    base_model_prefix = "performer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PerformerLayer"]
    # The mechanism is the model's own under either stock name; flash and flex attention compute another function.
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": PerformerLayer, "attentions": PerformerAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if getattr(module, "feeds_residual", False):
            # Residual outputs shrink with depth, so that the variance of the sum does not grow with it.
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)
        if isinstance(module, nn.Embedding) and not self.config.tie_word_embeddings:
            # As published: as large as the sinusoids that it meets, which would drown it otherwise.
            init.normal_(module.weight, mean=0.0, std=1.0)
        if isinstance(module, PerformerAttention) and module.features is not None:
            init.copy_(module.features, module.draw_features())

    @staticmethod
    def _supports_default_dynamic_cache() -> bool:
        # `generate` must let the model build its own cache of sums.
        return False


class PerformerModel(PerformerPreTrainedModel):
    """Causal decoder or bidirectional encoder without a head."""

    def __init__(self, config: PerformerConfig) -> None:
        config.validate()
        super().__init__(config)
        # No `padding_idx`: the published model trains this row as any other, and masks hide it here.
        self.input_map = nn.Embedding(config.vocab_size, config.embedding_size)
        kernel = config.stem_kernel_size
        self.stem = ConvStem(config.embedding_size, kernel, config.is_decoder) if kernel else None
        self.layers = nn.ModuleList(PerformerLayer(config) for _ in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if config.final_norm else None
        redraws = config.feature_redraw == "interval"
        # Saved, so that a resumed run goes on drawing where it stopped.
        self.register_buffer("training_passes", torch.zeros((), dtype=torch.int64) if redraws else None)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.input_map

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.input_map = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: LinearCache | None = None,
        use_cache: bool | None = None,
        slim_chunk_size: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Runs the network.

        Args:
            input_ids: (B, L) token ids.
            attention_mask: (B, L), 1 = real; with a cache (B, past + L). Real positions are contiguous; padding may
                stand on either side, and positions count from the first real token.
            inputs_embeds: (B, L, `config.embedding_size`) instead of `input_ids`, without positions.
            past_key_values: cache of an earlier call (causal models).
            use_cache: return a cache, in evaluation of a causal model.
            slim_chunk_size: overrides the config's for this call; without gradients the layers then work on so many
                tokens at a time. It changes no result.

        Raises:
            SequenceError: both or none of ids and embeddings, an empty sequence, a mask with holes.
        """
        stream = self.open(input_ids, attention_mask, inputs_embeds, past_key_values)
        if self.training:
            self.count_training_pass()
        cache = self.start_cache(past_key_values, use_cache)
        attentions = self.is_recording(kwargs, "output_attentions")
        recording = attentions or self.is_recording(kwargs, "output_hidden_states")
        chunk_size = self.chunk_size(slim_chunk_size)
        chunks = list(self.final_states(stream, -1 if recording else chunk_size, cache, attentions))
        state = chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=1)
        return BaseModelOutputWithPast(state, past_key_values=cache)

    def is_recording(self, kwargs: dict[str, Any], *names: str) -> bool:
        """Whether the call or the config asks for one of these extra outputs."""
        return any(bool(kwargs.get(name, getattr(self.config, name, False))) for name in names)

    def chunk_size(self, override: int | None) -> int:
        """C of this call: the argument, or the config's; -1 = whole sequences."""
        size = self.config.slim_chunk_size if override is None else override
        if size != -1 and size < 1:
            raise ValueError(f"`slim_chunk_size` must be -1 (whole sequence) or at least 1, got {size}.")
        if size > 0 and self.config.stabilizer == "global":
            raise ValueError("`slim_chunk_size` must be -1 with `stabilizer`='global', which reads all keys at once.")
        return size

    def open(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        cache: LinearCache | None = None,
    ) -> TokenStream:
        """Checks the inputs and finds the position of every row's first column."""
        demand_one_input(input_ids, inputs_embeds)
        given: Any = inputs_embeds if input_ids is None else input_ids
        batch, length = given.shape[:2]
        past, before = (None, None) if cache is None else (cache.seen_B, cache.stem_inputs)
        mask = _mask_of_new(attention_mask, length, cache)
        seen = torch.zeros(batch, dtype=torch.int64, device=given.device) if past is None else past
        if mask is None:
            offset = 0 if past is None else seen[:, None]
            return TokenStream(input_ids, inputs_embeds, None, offset, seen + length, before)
        first = mask.int().argmax(1)
        return TokenStream(input_ids, inputs_embeds, mask, (seen - first)[:, None], seen + mask.sum(1), before)

    def embed(self, stream: TokenStream, start: int, stop: int) -> torch.Tensor:
        """(B, stop - start, E) input of the first layer."""
        x = self._tokens(stream, start, stop) if self.stem is None else self._mixed(stream, self.stem, start, stop)
        if self.config.position_scheme == "none":
            return x
        positions = (torch.arange(start, stop, device=x.device)[None] + stream.offset).clamp(min=0)
        size = self.config.hidden_size if self.config.position_scheme == "add" else x.shape[-1]
        code = sinusoids(positions, size, self.config.position_base).to(x.dtype)
        return x + code if self.config.position_scheme == "add" else torch.cat([x, code.expand(*x.shape)], dim=-1)

    def _tokens(self, stream: TokenStream, start: int, stop: int) -> torch.Tensor:
        if stream.input_ids is not None:
            return self.input_map(stream.input_ids[:, start:stop])
        return stream.inputs_embeds[:, start:stop]  # type: ignore[index]

    def _mixed(self, stream: TokenStream, stem: ConvStem, start: int, stop: int) -> torch.Tensor:
        """Tokens with what the stem makes of them and of their neighbours, which may stand in other chunks."""
        first, last = start - stem.left, stop + stem.reach - stem.left
        inside = (max(first, 0), min(last, stream.length))
        wide = zero_padding(self._tokens(stream, *inside), stream.mask_of(*inside))
        if first < 0:
            before = _before(stream, wide, stem.reach)
            wide = torch.cat([before[:, first:], wide], dim=1)
        wide = nn.functional.pad(wide, (0, 0, 0, last - inside[1]))
        return wide[:, stem.left : stem.left + stop - start] + stem.neighbours(wide)

    def _stem_inputs(self, stream: TokenStream) -> torch.Tensor | None:
        """(B, kernel size - 1, embedding size): what the next call will find before its first column."""
        if self.stem is None:
            return None
        reach, given = self.stem.reach, stream.inputs_embeds if stream.input_ids is None else stream.input_ids
        assert given is not None  # `open` has seen to it
        columns = torch.arange(stream.length, device=given.device) + 1
        ends = columns[-1:] if stream.mask is None else (columns * stream.mask).amax(1)
        index = (ends[:, None] - reach + columns.new_tensor(range(reach))).expand(given.shape[0], -1)
        picked = take_tokens(given, index.clamp(min=0))
        x = self.input_map(picked) if stream.input_ids is not None else picked
        x = zero_padding(x, None if stream.mask is None else take_tokens(stream.mask, index.clamp(min=0)))
        older = take_tokens(_before(stream, x, reach), (index + reach).clamp(max=reach - 1))
        return torch.where((index < 0)[..., None], older, x)

    def finish(self, x_BCE: torch.Tensor, mask_BC: torch.Tensor | None) -> torch.Tensor:
        """What follows the last layer: the final norm, and zeros at padding."""
        return zero_padding(x_BCE if self.final_norm is None else self.final_norm(x_BCE), mask_BC)

    def final_states(
        self, stream: TokenStream, chunk_size: int, cache: LinearCache | None = None, output_attentions: bool = False
    ) -> Iterator[torch.Tensor]:
        """The finished states, chunk after chunk; all at once where gradients are wanted or chunks are off.

        A causal model goes through all layers with each chunk, so that only what the caller keeps grows with L.
        """
        chunk_size = -1 if torch.is_grad_enabled() else chunk_size
        if self.config.is_decoder:
            yield from self._causal_states(stream, stream.spans(chunk_size), cache, output_attentions)
        else:
            yield from self._bidirectional_states(stream, stream.spans(chunk_size), output_attentions)

    def _causal_states(
        self, stream: TokenStream, spans: list[tuple[int, int]], cache: LinearCache | None, output_attentions: bool
    ) -> Iterator[torch.Tensor]:
        states: list[Any] = [None] * len(self.layers)
        if cache is not None and cache.states is not None:
            states = list(cache.states)
        for start, stop in spans:
            x, mask = self.embed(stream, start, stop), stream.mask_of(start, stop)
            for index, layer in enumerate(self.layers):
                x, states[index] = layer(x, mask, states[index], True, output_attentions)
            yield self.finish(x, mask)
        if cache is not None:
            cache.advance(states, stream.seen, stream.length, self._stem_inputs(stream))

    def _bidirectional_states(
        self, stream: TokenStream, spans: list[tuple[int, int]], output_attentions: bool
    ) -> Iterator[torch.Tensor]:
        chunks = [self.embed(stream, *span) for span in spans]
        masks = [stream.mask_of(*span) for span in spans]
        for layer in self.layers:
            state = None
            if len(chunks) > 1:
                for x, mask in zip(chunks, masks, strict=True):
                    own = layer.sums(x, mask)
                    state = own if state is None else add_states(state, own)
            for index, mask in enumerate(masks):
                chunks[index] = layer(chunks[index], mask, state, False, output_attentions)[0]
        yield from map(self.finish, chunks, masks)

    def start_cache(self, past: LinearCache | None, use_cache: bool | None) -> LinearCache | None:
        """The cache to read and to advance, a new one, or None."""
        if self.config.is_decoder and self.config.stabilizer == "fixed":
            use_cache = self.config.use_cache if use_cache is None else use_cache
            return LinearCache() if past is None and use_cache and not self.training else past
        if past is not None:
            raise ValueError("`past_key_values` needs a causal config with `stabilizer`='fixed'; pass all tokens.")
        return None

    @torch.no_grad()
    def count_training_pass(self) -> None:
        """Draws new random features when their interval has passed; the same ones in every process and rerun."""
        interval = self.config.feature_redraw_interval
        if self.training_passes is None or interval is None:
            return
        draws, rest = divmod(int(self.training_passes), interval)
        self.training_passes += 1
        if rest or not draws:
            return
        for index, layer in enumerate(self.layers):
            generator = torch.Generator().manual_seed(draws * len(self.layers) + index)
            old = layer.attention.features
            # A new tensor, for a graph that still waits for its backward pass holds the old one.
            layer.attention.features = layer.attention.draw_features(generator).to(old)


def _before(stream: TokenStream, like: torch.Tensor, reach: int) -> torch.Tensor:
    """The `reach` tokens before column 0, zeros where the sequence begins there."""
    return like.new_zeros(like.shape[0], reach, like.shape[-1]) if stream.before is None else stream.before


def sinusoids(positions: torch.Tensor, size: int, base: float) -> torch.Tensor:
    """sin, then cos, of position * base^(-2 i / size) for i = 0 .. size / 2 - 1: (..., size) float64.

    In float32 the angle of position 10^6 is off by 0.06, in bfloat16 positions are not even told apart.
    """
    exponents = torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size
    angles = positions.to(torch.float64)[..., None] * torch.exp(-math.log(base) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _mask_of_new(attention_mask: torch.Tensor | None, length: int, cache: LinearCache | None) -> torch.Tensor | None:
    """The mask of the new tokens; that of the past is in the sums already, so only its width is looked at."""
    if attention_mask is None:
        return None
    past = 0 if cache is None else cache.get_seq_length()
    if attention_mask.dim() == 2 and attention_mask.shape[1] != past + length:
        raise SequenceError(
            f"`attention_mask` must have {past + length} columns ({past} of the cache and {length} new), "
            f"got {attention_mask.shape[1]}."
        )
    if cache is None or cache.seen_B is None or attention_mask.dim() != 2:
        return real_positions(attention_mask)
    started = (cache.seen_B > 0)[:, None].to(attention_mask)
    mask = real_positions(torch.cat([started, attention_mask[:, past:]], dim=1))
    return None if mask is None else mask[:, 1:]
