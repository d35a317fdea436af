"""Configuration of GPN, a masked language model of dilated convolutions (or of rotary attention) over single bases."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from genesplice_hf.layers.config_fields import warn_unknown_fields

# What a field means that was left open, by layout.
_BY_LAYOUT: dict[str, tuple[Any, Any]] = {
    "hidden_dropout_prob": (0.1, 0.0),
    "dilation_cycle": (6, 8),
    "dilation_max": (32, 9999),
}


@strict
class GPNConfig(PreTrainedConfig):
    """Shape and behaviour of a GPN.

    Attributes:
        layout: "legacy" = the ConvNet of the first publication: norms on the output of each branch, biases
            everywhere, no final norm. "v2" = norms before each branch, a final norm, a choice of encoders.
        vocab_size: tokens; with one-hot input also the first columns of the hidden state.
        n_aux_features: columns of the hidden state after the vocabulary that hold auxiliary features.
        aux_features_vocab_size: classes of an integer feature, each of which takes as many columns; None = the
            features are numbers.
        embedding: "one_hot" (no parameters) or "embedding" (a table).
        encoder: "convnet", "bytenet" or "roformer"; legacy models are convnets.
        hidden_size, num_hidden_layers, intermediate_size: widths and depth; legacy and bytenet have no intermediate.
        hidden_dropout_prob: 0.0, legacy 0.1. In the layers of convnet and roformer and in classifiers; legacy and
            bytenet layers have none.
        bias: v2: of linear maps, convolutions and norms of convnet and bytenet layers and of the heads.
        mlm_head_transform: v2: Linear, GELU and LayerNorm before the decoder.
        slim: bytenet works on half the width inside a layer.
        first_kernel_size, rest_kernel_size: v2: in bases, of layer 0 and of the others.
        kernel_size: legacy: in bases, of every layer.
        dilation_base, dilation_double_every, dilation_cycle, dilation_max: see `dilation`; legacy has a cycle of 6 and
            a maximum of 32, v2 8 and 9999.
        depthwise: v2: convolutions after layer 0 work on each channel alone.
        layer_norm_eps: of convnet and bytenet layers, of the final norm and of heads.
        roformer_layer_norm_eps, num_attention_heads, max_position_embeddings, rotary_value, hidden_act,
            attention_probs_dropout_prob: of roformer layers; the longest sequence is in bases. `hidden_act` is also
            the standard classification head's.
        classification_head: layout of the sequence classifier.
        regression_softplus: softplus on the sequence classifier's output.
        pos_weight: weight of label 1 in token classification with two labels; None = 1.
        classifier_pooling: "mean" or "max" over real positions whose token is not in `special_token_ids`, "cls" or
            "last" = the first or last real position.
        special_token_ids: tokens that stand for no base.
        conversion, upstream_config: what `from_original` records of the original.
    """

    model_type = "genesplice_gpn"
    is_decoder = False
    # Module names that PEFT adapts by default, over all encoders: a layer of one kind has no names of another kind
    # that are listed here (its dilated convolution is not adapted in v2, hence the other name).
    lora_targets = ["conv", "ffn", "conv_proj", "ffn_in", "ffn_out", "proj_in", "proj_out", "query", "value"]
    ia3_targets = ["ffn", "ffn_out", "proj_out", "key", "value", "down_proj"]
    ia3_feedforward = ["ffn_out", "proj_out", "down_proj"]
    layer_norm_targets = [
        "conv_norm", "ffn_norm", "norm_in", "norm_mid", "norm_out", "attention_norm", "output_norm", "final_norm",
    ]  # fmt: skip

    layout: Literal["legacy", "v2"] = "v2"
    vocab_size: int = 7
    n_aux_features: int = 0
    aux_features_vocab_size: int | None = 5
    embedding: Literal["one_hot", "embedding"] = "one_hot"
    encoder: Literal["convnet", "bytenet", "roformer"] = "convnet"
    num_hidden_layers: int = 25
    hidden_size: int = 512
    intermediate_size: int = 2048
    hidden_dropout_prob: float | int | None = None
    bias: bool = False
    mlm_head_transform: bool = True
    slim: bool = False
    first_kernel_size: int = 9
    rest_kernel_size: int = 5
    kernel_size: int = 9
    dilation_base: int = 2
    dilation_double_every: int = 1
    dilation_cycle: int | None = None
    dilation_max: int | None = None
    depthwise: bool = False
    layer_norm_eps: float = 1e-5
    roformer_layer_norm_eps: float = 1e-12
    num_attention_heads: int = 12
    max_position_embeddings: int = 1536
    rotary_value: bool = False
    hidden_act: Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "tanh"] = "gelu"
    attention_probs_dropout_prob: float | int = 0.1
    classification_head: Literal["standard", "lightweight_mlp", "lightweight_cnn"] = "standard"
    regression_softplus: bool = False
    pos_weight: float | int | None = None
    classifier_pooling: Literal["mean", "cls", "max", "last"] = "mean"
    special_token_ids: list[int] | tuple[int, ...] = ()
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    mask_token_id: int | None = 1
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    conversion: dict[str, Any] | None = None
    upstream_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name, (legacy, v2) in _BY_LAYOUT.items():
            if getattr(self, name) is None:
                setattr(self, name, legacy if self.layout == "legacy" else v2)
        self.special_token_ids = tuple(self.special_token_ids)
        warn_unknown_fields(type(self), kwargs)
        super().__post_init__(**kwargs)

    @property
    def has_bias(self) -> bool:
        """Whether linear maps, convolutions and norms outside roformer layers have biases."""
        return self.layout == "legacy" or self.bias

    def dilation(self, layer: int) -> int:
        """Distance in bases between neighbouring taps of a layer's convolution."""
        assert self.dilation_cycle is not None and self.dilation_max is not None  # filled at construction
        power = (layer % self.dilation_cycle) // self.dilation_double_every
        return min(self.dilation_max, self.dilation_base**power)

    def kernel(self, layer: int) -> int:
        """Taps of a layer's convolution."""
        if self.layout == "legacy":
            return self.kernel_size
        return self.first_kernel_size if layer == 0 else self.rest_kernel_size

    @property
    def receptive_field(self) -> int | None:
        """Bases that one output depends on; None = all (roformer)."""
        if self.encoder == "roformer":
            return None
        return 1 + sum((self.kernel(layer) - 1) * self.dilation(layer) for layer in range(self.num_hidden_layers))

    def validate_layout(self) -> None:
        """The published ConvNet has one form."""
        if self.layout == "legacy" and (self.encoder != "convnet" or self.depthwise or self.embedding != "one_hot"):
            raise ValueError(
                "`layout`='legacy' has encoder='convnet', embedding='one_hot' and depthwise=False, got "
                f"{self.encoder!r}, {self.embedding!r} and {self.depthwise}; use layout='v2' for others."
            )

    def validate_sizes(self) -> None:
        """What is counted is there, and kernels have a middle."""
        for name in ("vocab_size", "num_hidden_layers", "dilation_base", "dilation_double_every", "dilation_cycle",
                     "dilation_max"):  # fmt: skip
            value = getattr(self, name)
            if value is None or value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        for name in ("first_kernel_size", "rest_kernel_size", "kernel_size"):
            if getattr(self, name) < 1 or getattr(self, name) % 2 == 0:
                raise ValueError(f"`{name}` must be odd, got {getattr(self, name)}.")
        if self.slim and self.hidden_size % 2:
            raise ValueError(f"`hidden_size` must be even with `slim`, got {self.hidden_size}.")

    def validate_columns(self) -> None:
        """One-hot tokens and features fit into the hidden state, classes into features."""
        if self.embedding == "one_hot" and self.vocab_size + self.n_aux_features > self.hidden_size:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be at least `vocab_size` + `n_aux_features` "
                f"({self.vocab_size} + {self.n_aux_features}) with one-hot input."
            )
        if self.embedding == "embedding" and self.n_aux_features:
            raise ValueError("`n_aux_features` needs `embedding`='one_hot', for a table has no columns for them.")
        if self.n_aux_features % (self.aux_features_vocab_size or 1):
            raise ValueError(
                f"`n_aux_features` ({self.n_aux_features}) must be a multiple of `aux_features_vocab_size` "
                f"({self.aux_features_vocab_size}); each integer feature takes so many columns."
            )
        if self.tie_word_embeddings and self.embedding == "one_hot":
            raise ValueError("`tie_word_embeddings` needs `embedding`='embedding', for one-hot input has no weights.")

    def validate_attention(self) -> None:
        """Heads divide the width into pairs."""
        if self.encoder == "roformer" and (
            self.num_attention_heads < 1 or self.hidden_size % (2 * self.num_attention_heads)
        ):
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of twice `num_attention_heads` "
                f"({self.num_attention_heads}); change one of the two."
            )

    def validate_labels(self) -> None:
        """A weight of the positive label needs one."""
        if self.pos_weight is not None and (self.num_labels != 2 or self.pos_weight <= 0):
            raise ValueError(
                f"`pos_weight` must be positive and needs `num_labels`=2, got {self.pos_weight} with "
                f"{self.num_labels} labels."
            )
