"""Configuration of DNABERT-2, a MosaicBERT on byte-pair tokens: ALiBi, fused projections, gated layers."""

import logging
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from genesplice_hf.layers.config_fields import warn_unknown_fields

logger = logging.getLogger(__name__)

# The id of [PAD] in the published tokenizer; the published config says 0, which is [UNK].
PAD_TOKEN_ID = 3
# Published fields without a meaning here: there are no learned positions.
MEANINGLESS = ("position_embedding_type", "max_position_embeddings")


@strict
class DNABERT2Config(PreTrainedConfig):
    """Shape and behaviour of DNABERT-2 and DNABERT-S; the defaults are the published model (117M parameters).

    `from_pretrained` also reads the config.json of the published checkpoints, which says `bert`.

    Attributes:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: widths and depth.
        type_vocab_size: kinds of segments that `token_type_ids` tell apart.
        alibi_starting_size: of the published code, which grows its bias from this length on; no effect here.
        layer_norm_eps: of every norm but that of the LM head, which is fixed at 1e-12.
        classifier_dropout: before the classifier; None = `hidden_dropout_prob`.
        classifier_pooling: "mean" and "max" over real positions without `special_token_ids`, "last" of those, "cls" =
            the first real position, "pooler" = tanh of its projection, as the published classifier.
        special_token_ids: ids that are left out of the pooling.
        conversion, upstream_config: what `from_original` records of the original.
    """

    model_type = "genesplice_dnabert2"
    is_decoder = False
    # Module names that PEFT adapts by default.
    lora_targets = ["Wqkv"]
    ia3_targets = ["Wqkv", "mlp.wo"]
    ia3_feedforward = ["mlp.wo"]
    layer_norm_targets = ["attention_norm", "mlp_norm", "embedding_norm"]
    # IA3 scales keys and values: of three equal parts of the outputs of this module the first, the query, keeps 1.
    ia3_frozen_parts = {"Wqkv": (3, [0])}

    vocab_size: int = 4096
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: Literal["gelu"] = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.0
    type_vocab_size: int = 2
    alibi_starting_size: int = 512
    classifier_dropout: float | int | None = None
    classifier_pooling: Literal["mean", "cls", "max", "last", "pooler"] = "mean"
    special_token_ids: tuple[int, ...] | list[int] = ()
    initializer_range: float = 0.02
    pad_token_id: int | None = PAD_TOKEN_ID
    mask_token_id: int | None = 4
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
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
        dropped = (*MEANINGLESS, "auto_map", "model_type", "pad_token_id")
        fields = {name: value for name, value in published.items() if name not in dropped}
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

    def validate_heads(self) -> None:
        """Heads divide the width."""
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads}); change one of the two."
            )
