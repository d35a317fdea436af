"""Configuration of Enformer, which predicts functional tracks from up to 200,000 bases."""

import math
import re
from dataclasses import field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from genesplice_hf.layers.config_fields import warn_unknown_fields
from genesplice_hf.layers.relative_position import GammaNormalization

PUBLISHED_HEADS = {"human": 5313, "mouse": 1643}
# Keys of enformer-pytorch's configs without a meaning here: the weights are TensorFlow's whatever they say.
_LEGACY = ("use_convnext", "use_tf_gamma")
_SPECIES = re.compile(r"[A-Za-z0-9_\-]+")
# Attributes that a module of heads has already, and the word for all heads.
_TAKEN = {
    "all",
    "training",
    "forward",
    "train",
    "eval",
    "to",
    "half",
    "float",
    "double",
    "type",
    "apply",
    "cpu",
    "cuda",
}


@strict
class EnformerConfig(PreTrainedConfig):
    """Shape and behaviour of an Enformer; the defaults are the published model (251 million parameters).

    Attributes:
        dim: width of the transformer; embeddings are twice as wide.
        depth, heads: transformer layers, and attention heads of each.
        attn_dim_key: size of a query or key per head; a value has `dim / heads`.
        num_downsamples: stem and tower blocks, each of which halves the length: a bin has 2^n bases.
        dim_divisible_by: tower widths are rounded to multiples of it.
        output_heads: species -> number of tracks.
        head_order: its species in their order, which a JSON file would lose; None = as in `output_heads`.
        target_length: bins in the centre that are predicted; -1 = all.
        dropout_rate: on the output of attention and of the feed-forward network; an eighth of it on embeddings.
        attn_dropout, pos_dropout: on attention weights, on the positional basis.
        classifier_dropout: before the sequence and token classifiers.
        batch_norm_eps, layer_norm_eps, batch_norm_momentum: of the norms; torch's meaning of momentum.
        hidden_act: of the convolution blocks.
        gamma_normalization: see `layers.relative_position.relative_basis`; "feature" reproduces enformer-pytorch.
        pad_value: in all four channels of positions off the chromosome; enformer-pytorch has 0.25.
        position_embedding_type: "rope" is for models trained from scratch, and allows flash attention.
        loss_type: "poisson", "poisson_multinomial" or "mse", see `heads/tracks.py`.
        log_eps: predictions below it count as it in the logarithm of the Poisson loss.
        default_species: used where none is named; None = the first of `output_heads`.
        sync_batch_norm: batch statistics over all processes.
        initializer: "tf" as the published model was initialised, "torch" = the library's defaults.
        use_checkpointing: start with gradient checkpointing on.
        num_tracks, head_activation, post_transformer, post_transformer_norm, discrete_bottleneck, context_dim,
            context_num_heads, context_head_dim: of the adaptation classes alone. `post_transformer` leaves the final
            pointwise block away, so that bins have the width `dim`.
        conversion, upstream_config: what `from_original` records of the original.
    """

    model_type = "genesplice_enformer"
    is_decoder = False
    attribute_map = {"num_hidden_layers": "depth", "num_attention_heads": "heads"}
    keys_to_ignore_at_inference = ["last_hidden_state", "hidden_states", "attentions"]
    # Module names that PEFT adapts by default.
    lora_targets = ["to_q", "to_k", "to_v", "to_out", "fc1", "fc2"]
    ia3_targets = ["to_k", "to_v", "fc2"]
    ia3_feedforward = ["fc2"]
    layer_norm_targets = ["attn_norm", "ffn_norm"]

    dim: int = 1536
    depth: int = 11
    heads: int = 8
    attn_dim_key: int = 64
    num_downsamples: int = 7
    dim_divisible_by: int = 128
    output_heads: dict[str, int] = field(default_factory=lambda: dict(PUBLISHED_HEADS))
    head_order: list[str] | None = None
    target_length: int = 896
    dropout_rate: float | int = 0.4
    attn_dropout: float | int = 0.05
    pos_dropout: float | int = 0.01
    classifier_dropout: float | int = 0.1
    batch_norm_eps: float = 1e-5
    layer_norm_eps: float = 1e-5
    batch_norm_momentum: float | int = 0.1
    hidden_act: Literal["quick_gelu", "gelu", "relu", "silu"] = "quick_gelu"
    gamma_normalization: GammaNormalization = "position"
    pad_value: float | int = 0.0
    position_embedding_type: Literal["relative", "rope"] = "relative"
    rope_theta: float | int = 10000.0
    loss_type: Literal["poisson", "poisson_multinomial", "mse"] = "poisson"
    log_eps: float = 1e-20
    default_species: str | None = None
    sync_batch_norm: bool = False
    initializer: Literal["tf", "torch"] = "tf"
    use_checkpointing: bool = False
    num_tracks: int | None = None
    head_activation: str | None = "softplus"
    post_transformer: bool = False
    post_transformer_norm: bool = True
    discrete_bottleneck: bool = False
    context_dim: int | None = None
    context_num_heads: int = 8
    context_head_dim: int = 64
    tie_word_embeddings: bool = False
    conversion: dict[str, Any] | None = None
    upstream_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.head_order = self.species
        self.output_heads = {name: self.output_heads[name] for name in self.head_order}
        for name in _LEGACY:
            kwargs.pop(name, None)
        warn_unknown_fields(type(self), kwargs)
        super().__post_init__(**kwargs)

    @property
    def species(self) -> list[str]:
        """The species that have heads, in their order."""
        first = [name for name in self.head_order or () if name in self.output_heads]
        return first + [name for name in self.output_heads if name not in first]

    def to_dict(self) -> dict[str, Any]:
        """As transformers'; the order of the heads is that of now."""
        return super().to_dict() | {"head_order": self.species}

    @property
    def hidden_size(self) -> int:
        """Width of `last_hidden_state`."""
        return self.dim if self.post_transformer else 2 * self.dim

    @property
    def bin_size(self) -> int:
        """Bases of a bin."""
        return 2**self.num_downsamples

    def num_bins(self, length_bp: int) -> int:
        """Bins that are predicted of so many bases."""
        whole = -(-length_bp // self.bin_size)
        return whole if self.target_length == -1 else min(whole, self.target_length)

    @property
    def tower_widths(self) -> list[int]:
        """Channels after the stem and after each tower block; from half of `dim` to `dim`, evenly on a log scale."""
        half, count = self.dim // 2, self.num_downsamples - 1
        growth = math.exp(math.log(self.dim / half) / (count - 1))
        unit = self.dim_divisible_by
        return [half, *(round(half * growth**index / unit) * unit for index in range(count))]

    def validate_attention(self) -> None:
        """Heads divide the width into groups that the positional basis can fill."""
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"`dim` must be even and positive, got {self.dim}.")
        if self.depth < 1 or self.attn_dim_key < 1:
            raise ValueError(f"`depth` and `attn_dim_key` must be at least 1, got {self.depth}, {self.attn_dim_key}.")
        if self.heads < 1 or self.dim % self.heads:
            raise ValueError(
                f"`dim` ({self.dim}) must be a multiple of `heads` ({self.heads}); change one of the two."
            )
        if self.position_embedding_type == "rope" and self.attn_dim_key % 2:
            raise ValueError(f"`attn_dim_key` must be even with rotary positions, got {self.attn_dim_key}.")
        if self.position_embedding_type == "relative" and (self.dim // self.heads) % 6:
            raise ValueError(
                f"`dim` / `heads` ({self.dim // self.heads}) must be a multiple of 6, for it is the number of "
                "positional functions; change one of the two."
            )

    def validate_tower(self) -> None:
        """Every width is positive, and the last one the transformer's."""
        if self.num_downsamples < 3:
            raise ValueError(f"`num_downsamples` must be at least 3, got {self.num_downsamples}.")
        if self.dim_divisible_by < 1:
            raise ValueError(f"`dim_divisible_by` must be at least 1, got {self.dim_divisible_by}.")
        widths = self.tower_widths
        if min(widths) < 1 or widths[-1] != self.dim:
            raise ValueError(
                f"`dim_divisible_by` ({self.dim_divisible_by}) makes tower widths of {widths}, which must be positive "
                f"and end with `dim` ({self.dim}); set it to a divisor of `dim` / 2."
            )

    def validate_heads(self) -> None:
        """Every species has a name that a module can bear, and tracks; the default is one of them."""
        for name, tracks in self.output_heads.items():
            if not _SPECIES.fullmatch(name) or name in _TAKEN:
                raise ValueError(
                    f"`output_heads` names a species {name!r}; use letters, digits, `_` and `-`, and none of "
                    f"{', '.join(sorted(_TAKEN))}."
                )
            if tracks < 1:
                raise ValueError(f"`output_heads` must give {name!r} at least 1 track, got {tracks}.")
        if self.default_species is not None and self.default_species not in self.output_heads:
            raise ValueError(
                f"`default_species` must be one of {', '.join(self.output_heads)}, got {self.default_species!r}."
            )

    def validate_numbers(self) -> None:
        """The crop is a length or -1, and what is divided by or taken a logarithm of is positive."""
        if self.target_length != -1 and self.target_length < 1:
            raise ValueError(f"`target_length` must be -1 (no crop) or at least 1 bin, got {self.target_length}.")
        if self.log_eps <= 0 or self.batch_norm_eps <= 0 or self.layer_norm_eps <= 0:
            raise ValueError("`log_eps`, `batch_norm_eps` and `layer_norm_eps` must be positive.")

    def validate_adapters(self) -> None:
        """Sizes of the adaptation classes are sizes."""
        sizes = ("num_tracks", "context_dim", "context_num_heads", "context_head_dim")
        wrong = [name for name in sizes if getattr(self, name) is not None and getattr(self, name) < 1]
        if wrong:
            raise ValueError(f"`{wrong[0]}` must be at least 1, got {getattr(self, wrong[0])}.")
        if self.discrete_bottleneck:
            raise ValueError("`discrete_bottleneck` is not available; leave it False.")
