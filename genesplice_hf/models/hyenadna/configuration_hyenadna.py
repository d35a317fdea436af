"""Configuration of HyenaDNA, a causal model of single bases with convolutions as long as the sequence."""

from dataclasses import field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from genesplice_hf.layers.config_fields import warn_unknown_fields


@strict
class HyenaDNAConfig(PreTrainedConfig):
    """Shape and behaviour of a HyenaDNA; the defaults are those of the published models with 8 layers.

    Attributes:
        vocab_size: rows of the embedding; the number given is rounded up to a multiple of `pad_vocab_size_multiple`.
        pad_vocab_size_multiple: of the published models, 12 tokens in 16 rows.
        d_model, n_layer, d_inner: width, depth, width of the feed-forward network (None = 4 `d_model`).
        max_seq_len: the longest input in tokens, and the length that the filters' positions are relative to.
        hyena_order: number of products in a mixer; order 2 has one long filter.
        short_filter_order: width of the short causal convolution.
        filter_order, num_inner_mlps: width and number of inner layers of the network that makes the long filters.
        emb_dim: features of a filter position: its time, and cosine and sine of (emb_dim - 1) / 2 frequencies.
        activation_freq: frequency of that network's sines, at first (`train_freq`) or always.
        train_freq: learn the frequencies.
        use_bias: a learned multiple of each channel is added to its long convolution.
        modulate: filters decay with the distance, by `decay_target` at `fast_decay_pct` of `max_seq_len` (the fastest
            channel) to `slow_decay_pct` (the slowest), down to `modulation_shift`.
        filter_positions: positions and decay rates of the filters are "computed", "stored" with the weights (models
            whose own differ from the rule), or stored and positions "trained".
        filter_cache_size: longest input, in tokens, whose filters are kept while nothing trains them, at 8 bytes per
            token, channel and layer; 0 = none are kept.
        embed_dropout, resid_dropout: on the embedding and on what every branch adds.
        hyena_dropout: before the long convolutions.
        hyena_filter_dropout: a field of the published configs that, as there, has no effect.
        residual_in_fp32: keep the sum of all branches in float32 at least.
        classifier_dropout: before the classifier.
        classifier_pooling: over real positions: "mean", "max", the first ("cls") or the last one.
        special_token_ids: tokens that "mean" and "max" leave out.
        conversion, upstream_config: what `from_original` records of the original.
    """

    model_type = "genesplice_hyenadna"
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "intermediate_size": "d_inner",
        "layer_norm_eps": "layer_norm_epsilon",
    }
    # Says that it predicts the next base, whatever head it has.
    objective = "clm"
    # Module names that PEFT adapts by default.
    lora_targets = ["in_proj", "out_proj"]
    ia3_targets = ["fc2"]
    ia3_feedforward = ["fc2"]
    layer_norm_targets = ["norm1", "norm2", "ln_f"]

    vocab_size: int = 12
    pad_vocab_size_multiple: int = 8
    d_model: int = 256
    n_layer: int = 8
    d_inner: int | None = None
    max_seq_len: int = 1026
    hyena_order: int = 2
    short_filter_order: int = 3
    filter_order: int = 64
    emb_dim: int = 5
    num_inner_mlps: int = 2
    activation_freq: float | int = 10
    train_freq: bool = True
    use_bias: bool = True
    modulate: bool = True
    fast_decay_pct: float | int = 0.3
    slow_decay_pct: float | int = 1.5
    decay_target: float = 1e-2
    modulation_shift: float | int = 0.05
    filter_positions: Literal["computed", "stored", "trained"] = "computed"
    filter_cache_size: int = 65538
    embed_dropout: float | int = 0.1
    resid_dropout: float | int = 0.0
    hyena_dropout: float | int = 0.0
    hyena_filter_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.0
    classifier_pooling: Literal["mean", "max", "cls", "last"] = "mean"
    special_token_ids: list[int] = field(default_factory=list)
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    initializer_range: float = 0.02
    pad_token_id: int | None = 4
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    conversion: dict[str, Any] | None = None
    upstream_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        warn_unknown_fields(type(self), kwargs)
        if self.d_inner is None:
            self.d_inner = 4 * self.d_model
        if self.pad_vocab_size_multiple > 0:
            self.vocab_size += -self.vocab_size % self.pad_vocab_size_multiple
        super().__post_init__(**kwargs)

    @property
    def max_tokens(self) -> int:
        """The hard limit of the input, in tokens."""
        return self.max_seq_len

    @property
    def soft_max_bp(self) -> int:
        """The length seen in pre-training, in bp: the published limits leave room for two special tokens."""
        return max(self.max_seq_len - 2, 1)

    @property
    def filter_width(self) -> int:
        """Channels of all long filters of a mixer."""
        return self.d_model * (self.hyena_order - 1)

    def validate_sizes(self) -> None:
        """Everything that is counted exists."""
        smallest = {
            "vocab_size": 1, "pad_vocab_size_multiple": 1, "d_model": 1, "n_layer": 1, "d_inner": 1, "max_seq_len": 1,
            "hyena_order": 2, "short_filter_order": 1, "filter_order": 1, "num_inner_mlps": 0, "filter_cache_size": 0,
        }  # fmt: skip
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")

    def validate_positions(self) -> None:
        """Time, and as many sines as cosines."""
        if self.emb_dim < 3 or self.emb_dim % 2 == 0:
            raise ValueError(f"`emb_dim` must be odd and at least 3, got {self.emb_dim}; try {self.emb_dim | 1}.")

    def validate_decay(self) -> None:
        """Filters decay, to a fraction of themselves within a positive distance."""
        if not 0 < self.decay_target < 1:
            raise ValueError(f"`decay_target` must lie between 0 and 1, got {self.decay_target}.")
        if self.fast_decay_pct <= 0 or self.slow_decay_pct <= 0:
            raise ValueError(
                "`fast_decay_pct` and `slow_decay_pct` must be positive fractions of `max_seq_len`, got "
                f"{self.fast_decay_pct} and {self.slow_decay_pct}."
            )
