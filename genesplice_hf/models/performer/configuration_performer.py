"""Configuration of the SLiM Performer, a linear-attention model that trains in memory independent of the length."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from genesplice_hf.layers.config_fields import warn_unknown_fields
from genesplice_hf.layers.feature_maps import PROJECTED, FeatureMap, Stabilizer


@strict
class PerformerConfig(PreTrainedConfig):
    """Shape and behaviour of a Performer.

    Attributes:
        vocab_size: tokens of the embedding; 10 are used by the `genesplice` preset, padded to 16.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: widths and depth.
        is_decoder: causal when True.
        feature_map: phi, see `layers/feature_maps.py`.
        num_feature_blocks: "favor+" draws so many blocks of head_dim orthogonal directions ("favor+_n").
        nb_features: directions of "softmax" and "generalized"; None = head_dim ln(head_dim), rounded down.
        feature_redraw: "fixed" keeps the directions drawn at first, "interval" draws new ones while training; they
            are saved with the model either way.
        feature_redraw_interval: training passes between two draws.
        stabilizer: of the "softmax" map's keys; "global" is that of performer-pytorch, see `key_features`.
        norm_placement: "pre" = before each branch, "branch" = on its output, before the skip is added.
        output_projection, final_norm: a projection after attention, a norm after the last layer.
        position_scheme: sine and cosine added to the embedding, concatenated with one of half the width, or none.
        stem_kernel_size: odd; before the layers a convolution over so many tokens joins the embedding (those before a
            token when causal, those around it otherwise). 0 = none, as published. Running sums blur the order
            of neighbours; this keeps it.
        position_base: period of the slowest pair over 2 pi, in tokens.
        denominator_eps: added to the attention's denominators.
        slim_chunk_size: C. Training on labels works through sequences longer than C in chunks of C, with the memory
            of one chunk; evaluation computes in chunks as well. -1 = whole sequences, ordinary backpropagation.
        attention_block_size: tokens per block of causal attention; no effect on the result.
        slim_states: causal training keeps the sums at the start of every chunk ("store") or reverses them by
            subtraction ("reverse", memory independent of the length; what rounding cut off is carried along, so that
            they come back as they were).
        bidirectional_strategy: see `layers.sublinear_memory.sublinear_loss`.
        attention_dropout, hidden_dropout, classifier_dropout: on the output of attention, on that of the feed-forward
            network, before the classifier; need `slim_chunk_size=-1`, for chunks are computed twice.
        classifier_pooling: "mean", "max" or "attention", over real positions.
        conversion, upstream_config: what `from_original` records of the original.
    """

    model_type = "genesplice_performer"
    keys_to_ignore_at_inference = ["past_key_values"]
    # Module names that PEFT adapts by default.
    lora_targets = ["q_map", "k_map", "v_map"]
    ia3_targets = ["k_map", "v_map", "V_map"]
    ia3_feedforward = ["V_map"]
    layer_norm_targets = ["layernorm1", "layernorm2", "final_norm"]

    vocab_size: int = 16
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 1024
    is_decoder: bool = True
    feature_map: FeatureMap = "elu+1"
    num_feature_blocks: int = 1
    nb_features: int | None = None
    feature_redraw: Literal["fixed", "interval"] = "fixed"
    feature_redraw_interval: int | None = None
    stabilizer: Stabilizer = "fixed"
    norm_placement: Literal["pre", "branch"] = "pre"
    output_projection: bool = True
    final_norm: bool = True
    position_scheme: Literal["add", "concat", "none"] = "add"
    stem_kernel_size: int = 0
    position_base: float | int = 10000
    denominator_eps: float | int = 1e-6
    layer_norm_eps: float = 1e-5
    hidden_act: Literal["gelu", "gelu_new", "relu", "silu"] = "gelu"
    slim_chunk_size: int = 2048
    attention_block_size: int = 256
    slim_states: Literal["store", "reverse"] = "store"
    bidirectional_strategy: Literal["auto", "sublinear", "checkpoint"] = "auto"
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.0
    classifier_pooling: Literal["mean", "max", "attention"] = "mean"
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    mask_token_id: int | None = 4
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    conversion: dict[str, Any] | None = None
    upstream_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        warn_unknown_fields(type(self), kwargs)
        super().__post_init__(**kwargs)

    @classmethod
    def slim(cls, **fields: Any) -> "PerformerConfig":
        """The architecture of the published SLiM code; `fields` give sizes and override anything else."""
        published: dict[str, Any] = {
            "is_decoder": True,
            "feature_map": "sqr",
            "norm_placement": "pre",
            "output_projection": False,
            "final_norm": False,
            "position_scheme": "concat",
            "denominator_eps": 1e-16,
        }
        return cls(**(published | fields))

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def embedding_size(self) -> int:
        """Width of the token embedding; with "concat" positions take the other half."""
        return self.hidden_size // 2 if self.position_scheme == "concat" else self.hidden_size

    @property
    def num_features(self) -> int:
        """M: the size of phi."""
        if self.feature_map == "favor+":
            return self.num_feature_blocks * self.head_dim
        if self.feature_map in PROJECTED:
            return self.nb_features or max(1, int(self.head_dim * math.log(self.head_dim)))
        return self.head_dim

    def validate_widths(self) -> None:
        """Heads and position pairs divide the width."""
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads}); change one of the two."
            )
        pairs = {"add": 2, "concat": 4, "none": 1}[self.position_scheme]
        if self.hidden_size % pairs:
            raise ValueError(
                f"`hidden_size` must be a multiple of {pairs} with position_scheme={self.position_scheme!r}, "
                f"got {self.hidden_size}."
            )
        if self.tie_word_embeddings and self.position_scheme == "concat":
            raise ValueError(
                "`tie_word_embeddings` needs embeddings as wide as the states; position_scheme='concat' halves them."
            )

    def validate_stem(self) -> None:
        """The stem's kernel has a centre."""
        if self.stem_kernel_size < 0 or (self.stem_kernel_size and self.stem_kernel_size % 2 == 0):
            raise ValueError(f"`stem_kernel_size` must be odd, or 0 for none, got {self.stem_kernel_size}.")

    def validate_chunks(self) -> None:
        """Chunks have a size, and nothing random happens in what is computed twice."""
        if self.slim_chunk_size != -1 and self.slim_chunk_size < 1:
            raise ValueError(
                f"`slim_chunk_size` must be -1 (whole sequence) or at least 1, got {self.slim_chunk_size}."
            )
        if self.attention_block_size < 1:
            raise ValueError(f"`attention_block_size` must be at least 1, got {self.attention_block_size}.")
        dropouts = ("attention_dropout", "hidden_dropout", "classifier_dropout")
        used = [name for name in dropouts if getattr(self, name)]
        if used and self.slim_chunk_size > 0:
            raise ValueError(
                f"`{used[0]}` must be 0 with `slim_chunk_size` > 0, for a chunk is computed twice; set it to 0, or "
                "`slim_chunk_size=-1` (more memory)."
            )

    def validate_features(self) -> None:
        """Random directions exist where they are asked for, and the global stabiliser sees whole sequences."""
        if self.num_feature_blocks < 1 or (self.nb_features is not None and self.nb_features < 1):
            raise ValueError(
                "`num_feature_blocks` and `nb_features` must be at least 1, got "
                f"{self.num_feature_blocks} and {self.nb_features}."
            )
        if self.feature_redraw == "interval":
            if self.feature_map not in PROJECTED:
                raise ValueError(f"`feature_redraw` needs one of {PROJECTED}, got `feature_map` {self.feature_map!r}.")
            if self.feature_redraw_interval is None or self.feature_redraw_interval < 1:
                raise ValueError(
                    f"`feature_redraw_interval` must be at least 1 training pass, got {self.feature_redraw_interval}."
                )
        if self.stabilizer == "global" and self.slim_chunk_size > 0:
            raise ValueError("`stabilizer`='global' reads all keys at once; set `slim_chunk_size=-1` or 'fixed'.")

    def validate_numbers(self) -> None:
        """What is divided by is positive."""
        if self.denominator_eps < 0 or self.position_base <= 0:
            raise ValueError(
                "`denominator_eps` must be >= 0 and `position_base` > 0, got "
                f"{self.denominator_eps} and {self.position_base}."
            )
