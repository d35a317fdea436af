"""Configuration of GeneSplice, the long-context DNA encoder and decoder.

Levels are numbered 0 (bases), 1, ..., n (tower). Lists hold one entry per level, unless said otherwise.
With empty `pool_sizes` the model is *flat*: the tower works on bases, alternating window and full attention.
"""

import difflib
import logging
import math
from dataclasses import field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

LayerType = Literal["full_attention", "sliding_attention"]


def default_complement_map(vocab_size: int) -> list[int]:
    """Complement of every id of the `genesplice` preset: A5 <-> T8, C6 <-> G7, all others themselves."""
    complement = {5: 8, 6: 7, 7: 6, 8: 5}
    return [complement.get(token, token) for token in range(vocab_size)]


@strict
class GeneSpliceConfig(PreTrainedConfig):
    """Shape and behaviour of a GeneSplice model; the defaults are the `nano` size.

    Attributes:
        vocab_size: tokens of the embedding; 10 are used by the `genesplice` preset, padded to 16.
        hidden_sizes: width of each level, non-decreasing.
        pool_sizes: tokens of level l per token of level l + 1; empty = flat.
        num_attention_heads, num_key_value_heads, head_dims: per level; key/value heads None = all heads.
        intermediate_sizes: SwiGLU width per level.
        num_encoder_layers, num_decoder_layers: blocks per level below the tower (n entries).
        num_tower_layers: blocks of the tower.
        local_windows: window radius in tokens of each level below the tower (n entries).
        tower_window: window radius of the tower's `sliding_attention` layers.
        tower_layer_types: one per tower layer; None = all full, or all sliding when `tower_window` is set.
        position_embedding: "rope", "alibi" (no flash attention) or "none".
        local_rope_theta, global_rope_theta: RoPE base of window and of full layers, in tokens of the level.
        stem_kernel_size: odd width in bases of the convolution after the embedding; 0 = none.
        is_decoder: causal when True.
        use_decoder: False leaves out the way back to bases; the output is one state per bin.
        rc_equivariant: both strands are read, and outputs of the reverse complement are the reversed outputs
            exactly; bidirectional models only, twice the cost.
        token_strand_pairs: with it, the label of the other strand for every label of token classification (donor and
            acceptor of either strand, say); None = itself.
        complement_map: id of the complement of every id, an involution.
        track_inputs: real channels per base (conservation, methylation, ...) added to the embedding; 0 = none.
        moe_num_experts: experts of the tower's feed-forward layers; 0 = dense.
        moe_top_k: experts per token. moe_layers: "alternate" (the second, fourth, ... tower layer) or "all".
        moe_aux_weight, moe_z_weight: weight of the load-balancing and of the router z loss.
        qk_norm: RMSNorm of each head's queries and keys before rotation.
        classifier_pooling: "mean", "max", "bin_mean" or "attention", over real positions.
        num_tracks, track_bin_size: tracks of the track head, and bases per value.
        track_target_length: centred values that are predicted; None = all.
        track_loss: "poisson" or "poisson_multinomial".
        track_strand_pairs: the track of the other strand for every track; None = itself.
        contrastive_dim, contrastive_temperature: width of the contrastive embedding, and its temperature.
        mlm_weight, contrastive_weight, next_segment_weight: shares in the pretraining loss.
        max_position_embeddings: longest length the model was made for, in bases; information only.
    """

    model_type = "genesplice"
    keys_to_ignore_at_inference = ["past_key_values", "router_logits"]
    # Module names that PEFT adapts by default.
    lora_targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    ia3_targets = ["k_proj", "v_proj", "down_proj"]
    ia3_feedforward = ["down_proj"]
    layer_norm_targets = ["attn_norm", "mlp_norm", "tower_norm", "final_norm"]

    vocab_size: int = 16
    hidden_sizes: list[int] = field(default_factory=lambda: [64, 128, 192])
    pool_sizes: list[int] = field(default_factory=lambda: [16, 8])
    num_attention_heads: list[int] = field(default_factory=lambda: [2, 4, 6])
    num_key_value_heads: list[int] | None = None
    head_dims: list[int] = field(default_factory=lambda: [32, 32, 32])
    intermediate_sizes: list[int] = field(default_factory=lambda: [128, 256, 512])
    num_encoder_layers: list[int] = field(default_factory=lambda: [1, 1])
    num_tower_layers: int = 4
    num_decoder_layers: list[int] = field(default_factory=lambda: [1, 1])
    local_windows: list[int] = field(default_factory=lambda: [128, 128])
    tower_window: int | None = None
    tower_layer_types: list[LayerType] | None = None
    position_embedding: Literal["rope", "alibi", "none"] = "rope"
    local_rope_theta: float = 1e4
    global_rope_theta: float = 5e5
    stem_kernel_size: int = 7
    is_decoder: bool = False
    use_decoder: bool = True
    rc_equivariant: bool = False
    token_strand_pairs: list[int] | None = None
    complement_map: list[int] | None = None
    track_inputs: int = 0
    moe_num_experts: int = 0
    moe_top_k: int = 2
    moe_layers: Literal["alternate", "all"] = "alternate"
    moe_aux_weight: float | int = 0.01
    moe_z_weight: float | int = 1e-3
    qk_norm: bool = False
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.0
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    classifier_pooling: Literal["mean", "max", "bin_mean", "attention"] = "mean"
    num_tracks: int = 0
    track_bin_size: int = 128
    track_target_length: int | None = None
    track_loss: Literal["poisson", "poisson_multinomial"] = "poisson"
    track_strand_pairs: list[int] | None = None
    contrastive_dim: int = 128
    contrastive_temperature: float = 0.07
    contrastive_weight: float | int = 0.1
    mlm_weight: float | int = 1.0
    next_segment_weight: float | int = 0.0
    max_position_embeddings: int = 1_048_576
    pad_token_id: int | None = 0
    mask_token_id: int | None = 4
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = list(self.num_attention_heads)
        if self.tower_layer_types is None:
            kind: LayerType = "full_attention" if self.tower_window is None else "sliding_attention"
            self.tower_layer_types = [kind] * self.num_tower_layers
        if self.complement_map is None:
            self.complement_map = default_complement_map(self.vocab_size)
        _warn_unknown(type(self), kwargs)
        super().__post_init__(**kwargs)

    @classmethod
    def small(cls, **overrides: Any) -> "GeneSpliceConfig":
        """28 M parameters: 96/192/512 wide, 8 tower layers. `overrides` are fields of the config."""
        fields = {
            "hidden_sizes": [96, 192, 512],
            "num_attention_heads": [3, 6, 8],
            "head_dims": [32, 32, 64],
            "intermediate_sizes": [256, 512, 1408],
            "num_encoder_layers": [1, 2],
            "num_tower_layers": 8,
            "num_decoder_layers": [1, 2],
        }
        return cls(**(fields | overrides))

    @classmethod
    def base(cls, **overrides: Any) -> "GeneSpliceConfig":
        """163 M parameters: 128/384/1024 wide, 12 tower layers. `overrides` are fields of the config."""
        fields = {
            "hidden_sizes": [128, 384, 1024],
            "num_attention_heads": [4, 6, 16],
            "head_dims": [32, 64, 64],
            "intermediate_sizes": [384, 1024, 2816],
            "num_encoder_layers": [2, 2],
            "num_tower_layers": 12,
            "num_decoder_layers": [2, 2],
        }
        return cls(**(fields | overrides))

    @property
    def num_levels(self) -> int:
        """Levels above the bases; 0 for the flat form."""
        return len(self.pool_sizes)

    @property
    def bin_size(self) -> int:
        """Bases per tower token."""
        return math.prod(self.pool_sizes)

    @property
    def hidden_size(self) -> int:
        """Width of the states that heads read: bases, or bins without a decoder."""
        return self.hidden_sizes[0] if self.use_decoder else self.hidden_sizes[-1]

    @property
    def num_hidden_layers(self) -> int:
        """Blocks of all levels."""
        below = [*self.num_encoder_layers, *self.num_decoder_layers]
        return self.num_tower_layers + sum(below)

    def validate_levels(self) -> None:
        """Every list has one entry per level."""
        per_level = ["hidden_sizes", "num_attention_heads", "num_key_value_heads", "head_dims"]
        for name in [*per_level, "intermediate_sizes"]:
            self._demand_length(name, self.num_levels + 1, "one entry per level, the tower included")
        for name in ["num_encoder_layers", "num_decoder_layers", "local_windows"]:
            self._demand_length(name, self.num_levels, "one entry per level below the tower")
        if any(size < 2 for size in self.pool_sizes):
            raise ValueError(f"`pool_sizes` must be >= 2 each, got {self.pool_sizes}; leave it empty for flat.")
        if sorted(self.hidden_sizes) != self.hidden_sizes:
            raise ValueError(f"`hidden_sizes` must not decrease from level to level, got {self.hidden_sizes}.")

    def validate_heads(self) -> None:
        """Heads divide evenly, and RoPE finds pairs of dimensions."""
        for heads, groups in zip(self.num_attention_heads, self.num_key_value_heads or [], strict=False):
            if groups < 1 or heads % groups:
                raise ValueError(
                    f"`num_attention_heads` ({heads}) must be a multiple of `num_key_value_heads` ({groups})."
                )
        if self.position_embedding == "rope" and any(size % 2 for size in self.head_dims):
            raise ValueError(f"`head_dims` must be even with RoPE, got {self.head_dims}; change one of the two.")

    def validate_tower(self) -> None:
        """Layer types fit the number of layers, and sliding layers have a window."""
        self._demand_length("tower_layer_types", self.num_tower_layers, "one entry per tower layer")
        if "sliding_attention" in (self.tower_layer_types or []) and self.tower_window is None:
            raise ValueError("`tower_layer_types` names sliding_attention, so `tower_window` must be set.")
        windows = [*self.local_windows, *([] if self.tower_window is None else [self.tower_window])]
        if any(window < 1 for window in windows):
            raise ValueError(f"windows are radii of at least 1 token, got {windows}.")

    def validate_vocabulary(self) -> None:
        """The complement map is an involution over the whole vocabulary."""
        mapping = self.complement_map or []
        if not _is_involution(mapping, self.vocab_size):
            raise ValueError(
                f"`complement_map` must map each of the {self.vocab_size} ids to its complement and back, "
                f"got {mapping}."
            )

    def validate_strands(self) -> None:
        """Both strands are read only where no order of time exists, and labels pair with each other."""
        if self.rc_equivariant and self.is_decoder:
            raise ValueError("`rc_equivariant` reads both strands, so `is_decoder` must be False; unset one of them.")
        pairs = self.token_strand_pairs
        if pairs is not None and not _is_involution(pairs, self.num_labels):
            raise ValueError(
                f"`token_strand_pairs` must map each of the {self.num_labels} labels to that of the other strand and "
                f"back, got {pairs}."
            )

    def validate_experts(self) -> None:
        """A token can only be sent to as many experts as exist."""
        if self.moe_num_experts < 0 or (self.moe_num_experts and not 1 <= self.moe_top_k <= self.moe_num_experts):
            raise ValueError(
                f"`moe_top_k` must lie between 1 and `moe_num_experts` ({self.moe_num_experts}), got {self.moe_top_k}."
            )

    def validate_tracks(self) -> None:
        """Counts are not negative, and strand pairs are an involution over the tracks."""
        for name in ("track_inputs", "num_tracks"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.track_bin_size < 1:
            raise ValueError(f"`track_bin_size` must be at least 1 base, got {self.track_bin_size}.")
        pairs = self.track_strand_pairs
        if pairs is not None and not _is_involution(pairs, self.num_tracks):
            raise ValueError(
                f"`track_strand_pairs` must map each of the {self.num_tracks} tracks to that of the other strand and "
                f"back, got {pairs}."
            )

    def validate_stem(self) -> None:
        """The stem's kernel has a centre."""
        if self.stem_kernel_size < 0 or (self.stem_kernel_size and self.stem_kernel_size % 2 == 0):
            raise ValueError(f"`stem_kernel_size` must be odd, or 0 for none, got {self.stem_kernel_size}.")

    def _demand_length(self, name: str, length: int, meaning: str) -> None:
        value = getattr(self, name)
        if len(value) != length:
            raise ValueError(f"`{name}` must have {length} entries ({meaning}), got {value}.")


def _is_involution(mapping: list[int], size: int) -> bool:
    in_range = len(mapping) == size and all(0 <= image < size for image in mapping)
    return in_range and all(mapping[image] == index for index, image in enumerate(mapping))


def _warn_unknown(config_class: type, unknown: dict[str, Any]) -> None:
    """Warns of keys that neither this config nor transformers knows; a typo would otherwise be kept silently."""
    known = [name for name in dir(config_class) if not name.startswith("_")]
    known += list(getattr(PreTrainedConfig, "__dataclass_fields__", {}))
    # Keys that transformers takes out of the keyword arguments, or writes into config.json by itself.
    ignored = {"transformers_version", "model_type", "auto_map", "name_or_path", "torch_dtype"}
    ignored |= {"attn_implementation", "experts_implementation", "per_layer_config", "pretraining_options"}
    for name in unknown:
        if name in known or name in ignored or name.startswith("_"):
            continue
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean `{close[0]}`?" if close else ""
        logger.warning("%s does not know `%s`, it has no effect%s", config_class.__name__, name, hint)
