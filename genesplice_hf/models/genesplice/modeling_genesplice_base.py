"""GeneSplice: window attention at bases, full attention over bins, and a decoder back to bases.

The network (any number of levels; the flat form has none below the tower):

    x0 = embedding(ids) + gelu(stem convolution)
    down:  x_l = encoder_l(x_l);  x_{l+1} = down_l(masked mean of pool_l tokens of x_l)
    z = tower_norm(tower(x_n))
    up:    y = decoder_l(x_l + unpool(up_l(y)))
    out = final_norm(y)

With `track_inputs` values per base are projected and added to the embedding. With `rc_equivariant` both strands run
through the same modules as a batch of 2B; heads average what they say (`layers.reverse_complement`).

Shapes: B batch, L bases, M bins, H heads, K key/value heads, D head size, E hidden size of the level, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from genesplice_hf.errors import SequenceError
from genesplice_hf.heads.outputs import HierarchicalModelOutput, split_output
from genesplice_hf.layers.alibi import alibi_implementation
from genesplice_hf.layers.hierarchical import (
    LengthPlan,
    LevelReach,
    left_justify_index,
    masked_mean_pool,
    plan_length,
    pool_mask,
    put_back,
    receptive_field,
    take_tokens,
    unpool,
)
from genesplice_hf.layers.hierarchical_cache import GeneSpliceCache, LevelCache
from genesplice_hf.layers.hierarchical_decoding import continue_sequences, level_caches, new_columns, remember
from genesplice_hf.layers.mixture_of_experts import router_losses, share_of_step
from genesplice_hf.layers.norm import RMSNorm
from genesplice_hf.layers.padding import as_mask, demand_one_input, real_positions, zero_padding
from genesplice_hf.layers.reverse_complement import both_strands, demand_whole_bins, reverse_tokens
from genesplice_hf.layers.stem import ConvStem
from genesplice_hf.layers.strict_loading import StrictPreTrainedModel
from genesplice_hf.layers.track_inputs import add_track_values, check_track_values
from genesplice_hf.layers.window_transformer import (
    BlockShape,
    RecordedState,
    WindowedAttention,
    WindowedBlock,
    run_blocks,
)
from genesplice_hf.models.genesplice.configuration_genesplice import GeneSpliceConfig


class GeneSplicePreTrainedModel(StrictPreTrainedModel):
    """Loading, initialisation and the declared abilities of every GeneSplice class."""

    config: GeneSpliceConfig
    config_class = GeneSpliceConfig
    base_model_prefix = "genesplice"
    supports_gradient_checkpointing = True
    _no_split_modules = ["WindowedBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": OutputRecorder(RecordedState, capture_initial_hidden_state=False),
        "attentions": OutputRecorder(WindowedAttention, index=1, layer_name="tower"),
    }

    def __init__(self, config: GeneSpliceConfig, *inputs: Any, **kwargs: Any) -> None:
        if config.position_embedding == "alibi":
            alibi_implementation(config._attn_implementation)
        super().__init__(config, *inputs, **kwargs)
        if config.num_levels and not config.use_decoder:
            # A checkpoint with a decoder serves without it.
            self._keys_to_ignore_on_load_unexpected = [r"^(genesplice\.)?(decoder|up|final_norm)\."]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Residual outputs shrink with depth, so that the variance of the sum does not grow with it. The layer itself
        # is asked, for transformers never hands over a module of foreign code that has no parameters of its own.
        if getattr(module, "feeds_residual", False):
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """As in transformers; added tokens are their own complement.

        Raises:
            ValueError: fewer tokens than the complement map needs to stay an involution.
        """
        mapping = self.config.complement_map or []
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if size < max((i + 1 for i, c in enumerate(mapping) if c != i), default=0):
            raise ValueError(f"`new_num_tokens` ({size}) would drop a base of `complement_map` {mapping}.")
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        size = embeddings.num_embeddings
        self.config.complement_map = mapping[:size] + list(range(len(mapping), size))
        return embeddings

    def with_router_losses(
        self,
        loss: torch.Tensor | None,
        outputs: HierarchicalModelOutput,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | None:
        """`loss` and the weighted losses of the experts' routers; the loss itself where there are no experts.

        The routers' losses are means over this pass. Where `num_items_in_batch` is given, passes are added up, and
        each counts by its share of the step's `labels` (-100 = none).
        """
        if loss is None or not outputs.router_logits:
            return loss
        losses = router_losses(outputs.router_logits, outputs.bin_mask, self.config.moe_top_k)
        extra = self.config.moe_aux_weight * losses.balance + self.config.moe_z_weight * losses.z
        return loss + share_of_step(labels, num_items_in_batch) * extra

    @staticmethod
    def _supports_default_dynamic_cache() -> bool:
        # `generate` must let the model build its own cache, which holds more than keys and values.
        return False


class GeneSpliceModel(GeneSplicePreTrainedModel):
    """Encoder (or causal decoder) without a head; see the module's docstring for the network."""

    def __init__(self, config: GeneSpliceConfig) -> None:
        config.validate()
        super().__init__(config)
        hidden, pools = config.hidden_sizes, config.pool_sizes
        levels = range(len(pools))
        self.embeddings = nn.Embedding(config.vocab_size, hidden[0], padding_idx=config.pad_token_id)
        kernel = config.stem_kernel_size
        self.stem = ConvStem(hidden[0], kernel, config.is_decoder) if kernel else None
        inputs = config.track_inputs
        self.track_proj = nn.Linear(inputs, hidden[0], bias=False) if inputs else None
        self._num_blocks = 0
        self.encoder = nn.ModuleList(self._level(level, config.num_encoder_layers[level]) for level in levels)
        self.down = nn.ModuleList(nn.Linear(hidden[i], hidden[i + 1], bias=False) for i in levels)
        self.tower = nn.ModuleList(self._tower_block(*layer) for layer in enumerate(config.tower_layer_types or []))
        self.tower_norm = RMSNorm(hidden[-1], config.norm_eps)
        decodes = config.use_decoder and len(pools) > 0
        self.up = nn.ModuleList(nn.Linear(hidden[i + 1], hidden[i], bias=False) for i in levels if decodes)
        self.decoder = nn.ModuleList(
            self._level(level, config.num_decoder_layers[level]) for level in levels if decodes
        )
        self.final_norm = RMSNorm(hidden[0], config.norm_eps) if decodes else None
        self.output_state = RecordedState()
        # Heads that pool all bins of a strand into one vector need no bins that match the other strand's.
        self.matches_bins = config.rc_equivariant and config.num_levels > 0 and not config.use_decoder
        self.gradient_checkpointing = False
        self.post_init()

    def _level(self, level: int, num_blocks: int) -> nn.ModuleList:
        window = self.config.local_windows[level]
        return nn.ModuleList(self._block(level, window) for _ in range(num_blocks))

    def _tower_block(self, index: int, kind: str) -> WindowedBlock:
        window = self.config.tower_window if kind == "sliding_attention" else None
        return self._block(self.config.num_levels, window, self.config.moe_layers == "all" or index % 2 == 1)

    def _block(self, level: int, window: int | None, has_experts: bool = False) -> WindowedBlock:
        self._num_blocks += 1
        shape = BlockShape.of_level(self.config, level, window, has_experts)
        return WindowedBlock(self.config, shape, self._num_blocks - 1)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    def plan_length(self, num_bp: int) -> LengthPlan:
        """What the model makes of one sequence of `num_bp` bases; see `LengthPlan`.

        The receptive field is that of one base, or of one bin without a decoder. Activations are what the blocks keep
        for a backward pass in the model's dtype, the sum of `BlockShape.kept_numbers`; both strands count.
        """
        plan = plan_length(num_bp, self.config.pool_sizes)
        seen = self._receptive_field()
        numbers = sum(
            block.self_attn.shape.kept_numbers(num_tokens)
            for level, num_tokens in enumerate(plan.tokens_per_level)
            for block in self._blocks_of_level(level)
        )
        return plan._replace(
            receptive_field_bp=num_bp if seen is None else min(seen, num_bp),
            estimated_activation_bytes=numbers * self.dtype.itemsize * (2 if self.config.rc_equivariant else 1),
        )

    def _blocks_of_level(self, level: int) -> list[nn.Module]:
        if level == self.config.num_levels:
            return list(self.tower)
        return [*self.encoder[level], *(self.decoder[level] if len(self.decoder) else [])]

    def _receptive_field(self) -> int | None:
        config, windows = self.config, [block.self_attn.shape.window for block in self.tower]
        tower = LevelReach(None if None in windows else sum(windows))
        reaches = [
            LevelReach(window * config.num_encoder_layers[level], window * config.num_decoder_layers[level])
            for level, window in enumerate(config.local_windows)
        ]
        kernel = max(config.stem_kernel_size, 1)
        stem = kernel - 1 if config.is_decoder else kernel // 2
        reads = (config.pool_sizes, stem, config.is_decoder, config.use_decoder or not config.num_levels)
        return receptive_field([*reaches, tower], *reads)

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        track_values: torch.Tensor | None = None,
        past_key_values: GeneSpliceCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> HierarchicalModelOutput:
        """Runs the network.

        Args:
            input_ids: (B, L) token ids, one per base.
            attention_mask: (B, L), 1 = real; with a cache (B, past + L). Real positions are contiguous.
            inputs_embeds: (B, L, E0) instead of `input_ids`.
            track_values: (B, L, `config.track_inputs`) real values per base; needed when that is not 0.
            past_key_values: cache of an earlier call; the output is then that of the new bases, and of the bins that
                they fill.
            use_cache: return a cache; only causal models in evaluation make one.

        Raises:
            SequenceError: both or none of ids and embeddings, an empty sequence, a mask with holes, track values that
                do not fit; with `rc_equivariant` embeddings in place of ids, and (without a decoder) no whole bins.
            ValueError: attentions are wanted of another implementation than eager.
        """
        demand_one_input(input_ids, inputs_embeds)
        self._check_recording(kwargs)
        cache = self._cache(past_key_values, use_cache)
        mask = real_positions(attention_mask)
        given = input_ids if inputs_embeds is None else inputs_embeds
        values = check_track_values(track_values, self.config.track_inputs, given, mask)
        if self.config.rc_equivariant:
            return self._encode_both_strands(input_ids, values, mask, **kwargs)
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        return self._encode(add_track_values(x, self.track_proj, values), mask, cache, **kwargs)

    def _check_recording(self, kwargs: dict[str, Any]) -> None:
        name = self.config._attn_implementation
        if kwargs.get("output_attentions") and name != "eager":
            raise ValueError(
                f"`output_attentions` needs the eager implementation, not `{name}`, which keeps no weights; call "
                "model.set_attn_implementation('eager') first."
            )

    def _encode_both_strands(
        self, ids: torch.Tensor | None, values: torch.Tensor | None, mask: torch.Tensor | None, **kwargs: Any
    ) -> HierarchicalModelOutput:
        if ids is None:
            raise SequenceError(
                "`inputs_embeds` have no complement; pass `input_ids`, or set `rc_equivariant=False` in the config."
            )
        if self.matches_bins:
            demand_whole_bins(mask, ids.shape[1], self.config.bin_size)
        values = None if values is None else torch.cat([values, reverse_tokens(values, mask)])
        ids, masks = both_strands(ids, self.config.complement_map or [], mask)
        x = add_track_values(self.embeddings(ids), self.track_proj, values)
        return split_output(self._encode(x, masks, None, **kwargs), mask, self.config.pool_sizes)

    @capture_outputs
    def _encode(
        self, x: torch.Tensor, mask: torch.Tensor | None, cache: GeneSpliceCache | None, **kwargs: Any
    ) -> HierarchicalModelOutput:
        """Embeddings (B, L, E0), one strand a row, to states; with a cache those of new bases."""
        index = None
        if mask is not None and self.config.num_levels:
            mask = new_columns(mask, x.shape[1], cache)
            if not bool(mask[:, 0].all()):
                index = left_justify_index(mask)
                x, mask = take_tokens(x, index), take_tokens(mask, index)
        router_logits: list[torch.Tensor] = []
        state, bins, bin_mask, *levels = self._run(
            x, mask, cache, bool(kwargs.get("output_attentions")), router_logits
        )
        if index is not None and self.config.use_decoder:
            state = put_back(state, index)
        if not self.config.num_levels and not bool(bin_mask[:, 0].all()):
            order = left_justify_index(bin_mask)
            bins, bin_mask = take_tokens(bins, order), take_tokens(bin_mask, order)
        is_per_base = self.config.use_decoder and self.config.num_levels > 0
        return HierarchicalModelOutput(
            self.output_state(state),
            bins,
            bin_mask,
            past_key_values=cache,
            level_hidden_states=(state, *levels, bins) if is_per_base else (bins,),
            router_logits=tuple(router_logits) if self.config.moe_num_experts else None,
        )

    def _cache(self, past: GeneSpliceCache | None, use_cache: bool | None) -> GeneSpliceCache | None:
        is_generative = self.config.is_decoder and (self.config.use_decoder or not self.config.num_levels)
        if past is None:
            return GeneSpliceCache() if use_cache and is_generative and not self.training else None
        if not is_generative:
            raise ValueError(
                "`past_key_values` needs a causal config (`is_decoder`) with states per base; run the whole sequence."
            )
        if not isinstance(past, GeneSpliceCache):
            raise ValueError(
                f"`past_key_values` must be a GeneSpliceCache, got {type(past).__name__}; pass none with "
                "`use_cache=True` and the model makes it."
            )
        return past

    def _run(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        cache: GeneSpliceCache | None,
        attentions: bool,
        router_logits: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """States of bases (of bins without a decoder), of bins, their mask, and what leaves the levels between."""
        if cache is not None and self.config.num_levels and cache.get_seq_length():
            return continue_sequences(self, x, mask, cache, attentions, router_logits)
        caches = level_caches(cache, x, mask, self.config.pool_sizes)
        length = x.shape[1]
        padded = plan_length(length, self.config.pool_sizes).padded_bp
        if padded > length:
            mask = nn.functional.pad(as_mask(mask, x), (0, padded - length))
            x = nn.functional.pad(x, (0, 0, 0, padded - length))
        x = zero_padding(x, mask)
        x = x if self.stem is None else self.stem(x, mask, caches[0])
        masks, skips = [mask], []
        for level, pool_size in enumerate(self.config.pool_sizes):
            x = run_blocks(self.config, self.encoder[level], x, masks[-1], caches[level])
            skips.append(x)
            real = as_mask(masks[-1], x)
            masks.append(None if masks[-1] is None else pool_mask(real, pool_size))
            x = self.down[level](masked_mean_pool(x, real, pool_size))
        x = self.tower_norm(run_blocks(self.config, self.tower, x, masks[-1], caches[-1], attentions, router_logits))
        bins = zero_padding(x, masks[-1])
        bin_mask = as_mask(masks[-1], bins)[:, -bins.shape[1] :]
        if self.config.use_decoder and skips:
            state, *between = self._decode(bins, skips, masks, caches, length)
            return state, bins, bin_mask, *between
        return bins, bins, bin_mask

    def _decode(
        self,
        y: torch.Tensor,
        skips: list[torch.Tensor],
        masks: list[torch.Tensor | None],
        caches: list[LevelCache] | list[None],
        length: int,
    ) -> list[torch.Tensor]:
        """The way up: what leaves the decoder of every level, bases first, cut to the tokens of `length` bases."""
        left: list[torch.Tensor] = []
        for level in reversed(range(len(skips))):
            added, pool_size, cache = self.up[level](y), self.config.pool_sizes[level], caches[level]
            if cache is not None:
                remember(cache, skips[level], added, pool_size)
            x = skips[level] + unpool(added, pool_size, self.config.is_decoder)
            y = run_blocks(self.config, self.decoder[level], x, masks[level], cache)
            if level == 0 and self.final_norm is not None:
                y = self.final_norm(y)
            left.insert(0, zero_padding(y, masks[level])[:, : -(-length // math.prod(self.config.pool_sizes[:level]))])
        return left
