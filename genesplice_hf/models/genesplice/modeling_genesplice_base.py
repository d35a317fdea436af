"""GeneSplice: window attention at bases, full attention over bins, and a decoder back to bases.

The network (any number of levels; the flat form has none below the tower):

    x0 = embedding(ids) + gelu(stem convolution)
    down:  x_l = encoder_l(x_l);  x_{l+1} = down_l(masked mean of pool_l tokens of x_l)
    z = tower_norm(tower(x_n))
    up:    y = decoder_l(x_l + unpool(up_l(y)))
    out = final_norm(y)

Shapes: B batch, L bases, M bins, H heads, K key/value heads, D head size, E hidden size of the level, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from genesplice_hf.heads.outputs import HierarchicalModelOutput
from genesplice_hf.layers.hierarchical import (
    LengthPlan,
    left_justify_index,
    masked_mean_pool,
    plan_length,
    pool_mask,
    put_back,
    take_tokens,
    unpool,
)
from genesplice_hf.layers.norm import RMSNorm
from genesplice_hf.layers.padding import as_mask, demand_one_input, real_positions, zero_padding
from genesplice_hf.layers.stem import ConvStem
from genesplice_hf.layers.strict_loading import StrictPreTrainedModel
from genesplice_hf.layers.window_transformer import BlockShape, StemCache, WindowedAttention, WindowedBlock, run_blocks
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
    _can_record_outputs = {"hidden_states": WindowedBlock, "attentions": WindowedAttention}

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

    @staticmethod
    def _supports_default_dynamic_cache() -> bool:
        # `generate` must let the model build its own cache, which holds the stem's last inputs too.
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
        self._num_blocks = 0
        self.encoder = nn.ModuleList(self._level(level, config.num_encoder_layers[level]) for level in levels)
        self.down = nn.ModuleList(nn.Linear(hidden[i], hidden[i + 1], bias=False) for i in levels)
        self.tower = nn.ModuleList(self._tower_block(kind) for kind in config.tower_layer_types or [])
        self.tower_norm = RMSNorm(hidden[-1], config.norm_eps)
        decodes = config.use_decoder and len(pools) > 0
        self.up = nn.ModuleList(nn.Linear(hidden[i + 1], hidden[i], bias=False) for i in levels if decodes)
        self.decoder = nn.ModuleList(
            self._level(level, config.num_decoder_layers[level]) for level in levels if decodes
        )
        self.final_norm = RMSNorm(hidden[0], config.norm_eps) if decodes else None
        self.gradient_checkpointing = False
        self.post_init()

    def _level(self, level: int, num_blocks: int) -> nn.ModuleList:
        window = self.config.local_windows[level]
        return nn.ModuleList(self._block(level, window) for _ in range(num_blocks))

    def _tower_block(self, kind: str) -> WindowedBlock:
        window = self.config.tower_window if kind == "sliding_attention" else None
        return self._block(self.config.num_levels, window)

    def _block(self, level: int, window: int | None) -> WindowedBlock:
        self._num_blocks += 1
        return WindowedBlock(self.config, BlockShape.of_level(self.config, level, window), self._num_blocks - 1)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    def plan_length(self, num_bp: int) -> LengthPlan:
        """What the model makes of `num_bp` bases; see `layers.hierarchical.plan_length`."""
        return plan_length(num_bp, self.config.pool_sizes)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: StemCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> HierarchicalModelOutput:
        """Runs the network.

        Args:
            input_ids: (B, L) token ids, one per base.
            attention_mask: (B, L), 1 = real; with a cache (B, past + L). Real positions are contiguous.
            inputs_embeds: (B, L, E0) instead of `input_ids`.
            past_key_values: cache of an earlier call (causal flat models).
            use_cache: return a cache; only causal flat models have one.

        Raises:
            SequenceError: both or none of ids and embeddings, an empty sequence, a mask with holes.
        """
        demand_one_input(input_ids, inputs_embeds)
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values, use_cache)
        mask = real_positions(attention_mask)
        index = None
        if mask is not None and self.config.num_levels and not bool(mask[:, 0].all()):
            index = left_justify_index(mask)
            x, mask = take_tokens(x, index), take_tokens(mask, index)
        state, bins, bin_mask = self._run(x, mask, cache, bool(kwargs.get("output_attentions")))
        if index is not None and self.config.use_decoder:
            state = put_back(state, index)
        return HierarchicalModelOutput(state, bins, bin_mask, past_key_values=cache)

    def _cache(self, past: StemCache | None, use_cache: bool | None) -> StemCache | None:
        if self.config.is_decoder and not self.config.num_levels:
            return StemCache() if past is None and use_cache and not self.training else past
        if past is not None:
            raise ValueError("`past_key_values` needs a causal flat config; run the whole sequence instead.")
        return None

    def _run(
        self, x: torch.Tensor, mask: torch.Tensor | None, cache: StemCache | None, attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        length = x.shape[1]
        padded = self.plan_length(length).padded_bp
        if padded > length:
            mask = nn.functional.pad(as_mask(mask, x), (0, padded - length))
            x = nn.functional.pad(x, (0, 0, 0, padded - length))
        x = zero_padding(x, mask)
        x = x if self.stem is None else self.stem(x, mask, cache)
        masks, skips = [mask], []
        for level, pool_size in enumerate(self.config.pool_sizes):
            x = run_blocks(self.config, self.encoder[level], x, masks[-1], None, attentions)
            skips.append(x)
            real = as_mask(masks[-1], x)
            masks.append(None if masks[-1] is None else pool_mask(real, pool_size))
            x = self.down[level](masked_mean_pool(x, real, pool_size))
        x = self.tower_norm(run_blocks(self.config, self.tower, x, masks[-1], cache, attentions))
        bins = zero_padding(x, masks[-1])
        bin_mask = as_mask(masks[-1], bins)[:, -bins.shape[1] :]
        if self.config.use_decoder and skips:
            return self._decode(bins, skips, masks, attentions)[:, :length], bins, bin_mask
        return bins, bins, bin_mask

    def _decode(
        self, y: torch.Tensor, skips: list[torch.Tensor], masks: list[torch.Tensor | None], attentions: bool
    ) -> torch.Tensor:
        for level in reversed(range(len(skips))):
            coarse = unpool(self.up[level](y), self.config.pool_sizes[level], self.config.is_decoder)
            y = run_blocks(self.config, self.decoder[level], skips[level] + coarse, masks[level], None, attentions)
        return zero_padding(y if self.final_norm is None else self.final_norm(y), masks[0])
