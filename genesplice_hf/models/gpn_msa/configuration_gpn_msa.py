"""Configuration of GPN-MSA, a masked language model of one genome that sees other species aligned to it."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from genesplice_hf.layers.config_fields import warn_unknown_fields


@strict
class GPNMSAConfig(PreTrainedConfig):
    """Shape and behaviour of a GPN-MSA.

    Attributes:
        vocab_size: tokens of the reference row, `-ACGT?`; also the first columns of the hidden state.
        aux_features_vocab_size: letters of an aligned row, `-ACGT`; None = the features are numbers.
        n_aux_features: columns after the vocabulary: aligned species x letters.
        group_tokens: kept from the original, which does not use it.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act: of the RoFormer.
        embedding_size: width of the masked LM's head before its decoder; None = `hidden_size`.
        hidden_dropout_prob, attention_probs_dropout_prob: in layers and classifiers, and of attention weights.
        max_position_embeddings: longest sequence in bases.
        layer_norm_eps: of every norm.
        rotary_value: values are rotated as well as queries and keys.
        classifier_pooling: "mean" or "max" over real positions whose token is not in `special_token_ids`, "cls" or
            "last" = the first or last real position.
        special_token_ids: tokens that stand for no base.
        conversion, upstream_config: what `from_original` records of the original.
    """

    model_type = "genesplice_gpn_msa"
    is_decoder = False
    # Module names that PEFT adapts by default.
    lora_targets = ["query", "value"]
    ia3_targets = ["key", "value", "down_proj"]
    ia3_feedforward = ["down_proj"]
    layer_norm_targets = ["attention_norm", "output_norm"]

    vocab_size: int = 6
    aux_features_vocab_size: int | None = 5
    n_aux_features: int = 0
    group_tokens: int = 1
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "tanh"] = "gelu"
    embedding_size: int | None = None
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 1536
    layer_norm_eps: float = 1e-12
    rotary_value: bool = False
    classifier_pooling: Literal["mean", "cls", "max", "last"] = "mean"
    special_token_ids: list[int] | tuple[int, ...] = ()
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    mask_token_id: int | None = 5
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    conversion: dict[str, Any] | None = None
    upstream_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        self.special_token_ids = tuple(self.special_token_ids)
        warn_unknown_fields(type(self), kwargs)
        super().__post_init__(**kwargs)

    def validate_columns(self) -> None:
        """Tokens and features fit into the hidden state, classes into features."""
        if self.vocab_size < 1 or self.vocab_size + self.n_aux_features > self.hidden_size:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be at least `vocab_size` + `n_aux_features` "
                f"({self.vocab_size} + {self.n_aux_features}), for the input is one-hot."
            )
        if self.n_aux_features % (self.aux_features_vocab_size or 1):
            raise ValueError(
                f"`n_aux_features` ({self.n_aux_features}) must be a multiple of `aux_features_vocab_size` "
                f"({self.aux_features_vocab_size}): species x letters."
            )
        if self.tie_word_embeddings:
            raise ValueError("`tie_word_embeddings` must be False, for one-hot input has no weights.")

    def validate_attention(self) -> None:
        """There are layers, and heads divide the width into pairs."""
        if self.num_hidden_layers < 1:
            raise ValueError(f"`num_hidden_layers` must be at least 1, got {self.num_hidden_layers}.")
        if self.num_attention_heads < 1 or self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of twice `num_attention_heads` "
                f"({self.num_attention_heads}); change one of the two."
            )
