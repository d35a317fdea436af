"""Configuration of the Nucleotide Transformer v2, an encoder of k-mers with rotary positions and gated layers."""

import logging
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from genesplice_hf.layers.config_fields import warn_unknown_fields

logger = logging.getLogger(__name__)

# The published files say it so.
PUBLISHED_BIAS_FIELD = "add_bias_fnn"
# What stands beside the k-mers in a vocabulary: six special tokens, A, T, C, G and N.
_NUM_OTHER_TOKENS = 11
# Rows of the published position table that no token can have.
_RESERVED_POSITIONS = 2


@strict
class NucleotideTransformerV2Config(PreTrainedConfig):
    """Shape and behaviour of a Nucleotide Transformer v2; the defaults are the 50M multi-species model.

    `from_pretrained` also reads the config.json of the published checkpoints, which names no `model_type`.

    Attributes:
        vocab_size: tokens of the embedding; 4107 = 6 special tokens, 4096 six-mers, 4 bases and N.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: widths and depth.
        max_position_embeddings: the longest input in tokens, plus 2; no parameter depends on it.
        rope_theta: base of the rotary angles.
        add_bias_ffn: biases in the feed-forward network.
        token_dropout: masked tokens are embedded as zeros and all others scaled by how many there are.
        emb_layer_norm_before: a norm on the embeddings.
        layer_norm_eps: of every norm; the published configs say 1e-12, the original code computes with 1e-5.
        classifier_dropout: before the classifier; None = `hidden_dropout_prob`.
        classifier_pooling: "mean" and "max" over real positions without `special_token_ids`, "last" of those, "cls" =
            the first real position.
        special_token_ids: ids that are left out of the pooling.
        conversion, upstream_config: what `from_original` records of the original.
    """

    model_type = "genesplice_nucleotide_transformer_v2"
    is_decoder = False
    # Module names that PEFT adapts by default.
    lora_targets = ["query", "value"]
    ia3_targets = ["key", "value", "feed_forward.output"]
    ia3_feedforward = ["feed_forward.output"]
    layer_norm_targets = ["attention_norm", "feed_forward_norm", "final_norm"]

    vocab_size: int = 4107
    hidden_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    intermediate_size: int = 2048
    max_position_embeddings: int = 2050
    position_embedding_type: Literal["rotary"] = "rotary"
    rope_theta: float | int = 10000.0
    add_bias_ffn: bool = False
    token_dropout: bool = False
    emb_layer_norm_before: bool = False
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    classifier_dropout: float | int | None = None
    classifier_pooling: Literal["mean", "cls", "max", "last"] = "mean"
    special_token_ids: tuple[int, ...] | list[int] = ()
    initializer_range: float = 0.02
    pad_token_id: int | None = 1
    mask_token_id: int | None = 2
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    conversion: dict[str, Any] | None = None
    upstream_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        warn_unknown_fields(type(self), kwargs)
        # JSON knows lists alone.
        self.special_token_ids = tuple(self.special_token_ids)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; a published config.json is understood as well."""
        if config_dict.get("model_type") != cls.model_type:
            config_dict = cls.of_published(config_dict)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def of_published(cls, published: dict[str, Any]) -> dict[str, Any]:
        """Our fields from those of a published config.json; what has no effect here goes into `upstream_config`."""
        fields = {name: value for name, value in published.items() if name not in ("auto_map", "model_type")}
        if PUBLISHED_BIAS_FIELD in fields:
            fields["add_bias_ffn"] = fields.pop(PUBLISHED_BIAS_FIELD)
        if fields.get("emb_layer_norm_before", False) is None:
            fields["emb_layer_norm_before"] = False
        known = set(dir(cls)) | set(PreTrainedConfig.__dataclass_fields__) | {"dtype", "torch_dtype", "num_labels"}
        known |= {"transformers_version", "attn_implementation", "name_or_path"}
        foreign = {name: fields.pop(name) for name in list(fields) if name not in known and name[0] != "_"}
        if foreign:
            logger.warning("%s: config keys without an effect here: %s", cls.__name__, ", ".join(sorted(foreign)))
            fields["upstream_config"] = foreign
        return fields

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def max_tokens(self) -> int:
        """The longest input, `<cls>` included."""
        return self.max_position_embeddings - _RESERVED_POSITIONS

    @property
    def bases_per_token(self) -> int | None:
        """k of the k-mers, read off the size of the vocabulary; None where it is no published size."""
        fits = (k for k in range(1, 10) if 4**k + _NUM_OTHER_TOKENS == self.vocab_size)
        return next(fits, None)

    def validate_heads(self) -> None:
        """Heads divide the width, and rotary pairs divide a head."""
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads}); change one of the two."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"`hidden_size` / `num_attention_heads` must be even for rotary positions, got {self.head_dim}."
            )

    def validate_length(self) -> None:
        """At least one token fits."""
        if self.max_tokens < 1:
            raise ValueError(
                f"`max_position_embeddings` must be at least {_RESERVED_POSITIONS + 1}, got "
                f"{self.max_position_embeddings}; it is the longest input in tokens, plus {_RESERVED_POSITIONS}."
            )

    def validate_mask_token(self) -> None:
        """Token dropout must know the mask."""
        if self.token_dropout and self.mask_token_id is None:
            raise ValueError("`token_dropout` needs `mask_token_id`; set it, or `token_dropout=False`.")
