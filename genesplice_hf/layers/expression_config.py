"""The fields that two or more expression models share: those of scGPT, and those of a pair representation.

A cell is a set of r (gene, value) pairs; `<cls>` stands first. Where nothing else is said, a default is that of the
published scGPT (Cui et al., Nature Methods 2024).
"""

import logging
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from genesplice_hf.layers.config_fields import warn_unknown_fields

logger = logging.getLogger(__name__)


@strict
class ExpressionConfig(PreTrainedConfig):
    """Shape and behaviour of a transformer over the genes of a cell.

    Attributes:
        vocab_size, pad_token_id, cls_token_id: genes and special tokens; where `<cls>` is unknown, None.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act: of the blocks.
        attention_head_dim: width of a head; None = `hidden_size / num_attention_heads`.
        attention_scaling: logits are divided by the root of the head's width, or of `hidden_size`.
        hidden_dropout_prob: after the value embedding, after the activation, on both branches of a block.
        attention_probs_dropout_prob: of attention weights.
        layer_norm_eps, norm_first, attention_bias, final_layer_norm: norms before (True) or after each branch; biases
            of queries, keys and values; a norm after the last block.
        input_emb_style: a value is embedded by a network ("continuous"), by its bin ("category"), by soft bins
            ("autobin"), or scales the gene's vector ("scaling").
        n_bins: of "category" and "autobin". mask_value, pad_value: what stands for an unknown value and at padding.
        max_value: larger values count as this one ("continuous"). max_seq_len: genes of a cell in training.
        mask_embedding: a learned vector takes the place of the value's embedding where it is `mask_value`.
        cell_emb_style: the cell's vector is the state of the first position, the mean, or the mean weighted by values.
        explicit_zero_prob: predict as well whether a value is above zero.
        do_mvc, mvc_decoder_style, mvc_query_dim: predict values from the cell's vector and the gene alone.
        do_ecs, ecs_threshold, ecs_weight: push the vectors of different cells apart.
        do_cce, cce_temperature, cce_weight: tell cells apart under two draws of dropout.
        do_dab, dab_weight: a classifier of batches behind reversed gradients.
        use_batch_labels, num_batch_labels: a batch's embedding joins what the decoders read.
        domain_spec_batchnorm: normalise the summed embedding with statistics per batch, without ("dsbn", True) or with
            weights ("do_affine"), or with one set for all ("batchnorm").
        bn_exclude_padding: padding stays out of the statistics; False = as the original.
        do_cls, classifier_num_layers: the masked-expression model classifies cells too; layers of a classifier.
        use_generation_flag: positions in `generation_mask` have a learned vector instead of a value.
        initializer_range: genes start between minus this and this.
        init_output_bias: start of the last bias of the expression decoder (the mean of training values), None = drawn.
        conversion, upstream_config: what `from_original` records of the original.
    """

    is_decoder = False
    # What a model without pair representation answers; `PairExpressionConfig` makes fields of them.
    use_pair_bias = use_opm = use_gating = False
    pair_mode, prior_channels = "full", 0
    keys_to_ignore_at_inference = ["cell_embedding", "pair_states", "hidden_states", "attentions"]
    # Module names that PEFT adapts by default.
    lora_targets = ["q_proj", "k_proj", "v_proj", "out_proj", "mlp.up", "mlp.down"]
    ia3_targets = ["k_proj", "v_proj", "mlp.down"]
    ia3_feedforward = ["mlp.down"]
    layer_norm_targets = ["norm1", "norm2", "final_norm"]

    vocab_size: int = 60697
    pad_token_id: int | None = 60694
    cls_token_id: int | None = 60695
    hidden_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    intermediate_size: int = 512
    attention_head_dim: int | None = None
    attention_scaling: Literal["head_dim", "hidden_size"] = "head_dim"
    hidden_act: Literal["relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu"] = "relu"
    hidden_dropout_prob: float | int = 0.2
    attention_probs_dropout_prob: float | int = 0.2
    layer_norm_eps: float = 1e-5
    norm_first: bool = False
    attention_bias: bool = True
    final_layer_norm: bool = False
    input_emb_style: Literal["continuous", "category", "scaling", "autobin"] = "continuous"
    n_bins: int = 51
    mask_value: float | int = -1
    pad_value: float | int = -2
    max_value: float | int = 512
    max_seq_len: int = 1200
    mask_embedding: bool = False
    cell_emb_style: Literal["cls", "avg-pool", "w-pool"] = "cls"
    explicit_zero_prob: bool = False
    do_mvc: bool = False
    mvc_decoder_style: Literal["inner product", "inner product, detach", "concat query", "sum query"] = "inner product"
    mvc_query_dim: int = 64
    do_ecs: bool = False
    ecs_threshold: float | int = 0.3
    ecs_weight: float | int = 10.0
    do_cce: bool = False
    cce_temperature: float | int = 0.5
    cce_weight: float | int = 1.0
    do_dab: bool = False
    dab_weight: float | int = 1.0
    use_batch_labels: bool = False
    num_batch_labels: int | None = None
    domain_spec_batchnorm: bool | Literal["dsbn", "do_affine", "batchnorm"] = False
    bn_exclude_padding: bool = True
    do_cls: bool = False
    classifier_num_layers: int = 3
    use_generation_flag: bool = False
    initializer_range: float = 0.1
    init_output_bias: float | int | None = None
    tie_word_embeddings: bool = False
    conversion: dict[str, Any] | None = None
    upstream_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.domain_spec_batchnorm is True:
            self.domain_spec_batchnorm = "dsbn"
        warn_unknown_fields(type(self), kwargs)
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.attention_head_dim or self.hidden_size // self.num_attention_heads

    @property
    def attention_scale(self) -> float:
        """What queries are multiplied by."""
        return (self.head_dim if self.attention_scaling == "head_dim" else self.hidden_size) ** -0.5

    @property
    def decoder_size(self) -> int:
        """Width of what decoders read: a state, and the batch's embedding where there is one."""
        return self.hidden_size * (2 if self.use_batch_labels else 1)

    def validate_heads(self) -> None:
        """There are layers, and heads divide the width unless they have one of their own."""
        if self.num_hidden_layers < 1:
            raise ValueError(f"`num_hidden_layers` must be at least 1, got {self.num_hidden_layers}.")
        divides = self.num_attention_heads >= 1 and not self.hidden_size % self.num_attention_heads
        if self.attention_head_dim is None and not divides:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads}); change one of the two, or set `attention_head_dim`."
            )
        if self.num_attention_heads < 1 or (self.attention_head_dim or 1) < 1:
            raise ValueError(
                "`num_attention_heads` and `attention_head_dim` must be at least 1, got "
                f"{self.num_attention_heads} and {self.attention_head_dim}."
            )

    def validate_tokens(self) -> None:
        """Special tokens are in the vocabulary, and different."""
        for name in ("pad_token_id", "cls_token_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"`{name}` ({token}) must be below `vocab_size` ({self.vocab_size}), or None.")
        if self.cls_token_id is not None and self.cls_token_id == self.pad_token_id:
            raise ValueError(f"`cls_token_id` and `pad_token_id` must differ, both are {self.pad_token_id}.")
        if self.tie_word_embeddings:
            raise ValueError("`tie_word_embeddings` must be False: values are predicted, not genes.")

    def validate_values(self) -> None:
        """A masked value can be told from padding, and bins exist."""
        if self.mask_value == self.pad_value:
            raise ValueError(f"`mask_value` and `pad_value` must differ, both are {self.mask_value}.")
        if self.n_bins < 2 or self.max_seq_len < 2:
            raise ValueError(
                f"`n_bins` and `max_seq_len` must be at least 2, got {self.n_bins} and {self.max_seq_len}."
            )

    def validate_batches(self) -> None:
        """What depends on batches knows how many there are."""
        needing = [name for name in ("do_dab", "use_batch_labels") if getattr(self, name)]
        needing += ["domain_spec_batchnorm"] if self.domain_spec_batchnorm in ("dsbn", "do_affine") else []
        if needing and (self.num_batch_labels or 0) < 1:
            raise ValueError(
                f"`num_batch_labels` must be at least 1 with `{needing[0]}`, got {self.num_batch_labels}; set it to "
                "the number of batches."
            )

    def validate_decoders(self) -> None:
        """Decoders of queries predict values only, and classifiers have a last layer."""
        if self.do_mvc and "query" in self.mvc_decoder_style and self.explicit_zero_prob:
            raise ValueError(
                f"`mvc_decoder_style` {self.mvc_decoder_style!r} gives no zero probability; use 'inner product', or "
                "set `explicit_zero_prob=False`."
            )
        if self.classifier_num_layers < 1 or self.mvc_query_dim < 1:
            raise ValueError(
                "`classifier_num_layers` and `mvc_query_dim` must be at least 1, got "
                f"{self.classifier_num_layers} and {self.mvc_query_dim}."
            )
        if self.cce_temperature <= 0:
            raise ValueError(f"`cce_temperature` must be above 0, got {self.cce_temperature}.")


@strict
class PairExpressionConfig(ExpressionConfig):
    """The fields of a pair representation z (B, r, r, `pair_hidden_size`) after AlphaFold 2; off by default.

    Attributes:
        use_pair_bias: z adds a bias to attention logits. use_opm: the genes' states update z. use_gating: heads are
            multiplied by a sigmoid of the input.
        pair_hidden_size, opm_hidden_size: channels of z, and of each side of the outer product.
        pair_mode: "full" keeps z; "factorized" never makes it, and is exact where no norm reads it (O(r) memory).
        pair_update: all products of channels ("outer_product"), channel by channel ("hadamard"), or a sum of
            `opm_rank` products ("low_rank").
        pair_layer_norm, pair_dropout: z is normalised before the bias; dropout of the embedded z.
        pair_transition, pair_transition_factor: a small network on z after every update.
        update_pair_in_last_block: "auto" = where `output_pair_states` asks for z.
        pair_init: z before the first block: "zeros", a network over a scalar per pair ("scalar_mlp"), a product of the
            genes' vectors of rank `pair_init_rank` ("gene"), a map of prior channels ("prior"), or the sum of the two.
        prior_channels: values per edge of the prior; 0 = the model owns none. prior_edge_types: names of its types.
        prior_direction: whether a row of z knows the edges that leave its gene ("forward"), that reach it
            ("backward"), or both, in twice the channels.
        prior_file, prior_sha256: the table beside the weights, and its hash.
        symmetrize_pair: z becomes (z + z^T) / 2 after every update.
        opm_group_dim: True averages the update over the cells of a group (`group_ids`).
        output_pair_states: return z; r * r * `pair_hidden_size` numbers for a cell.
    """

    lora_targets = [*ExpressionConfig.lora_targets, "opm.a", "opm.b", "opm.out"]

    use_pair_bias: bool = False
    use_opm: bool = False
    use_gating: bool = False
    pair_hidden_size: int = 128
    opm_hidden_size: int = 32
    pair_mode: Literal["full", "factorized"] = "full"
    pair_update: Literal["outer_product", "hadamard", "low_rank"] = "outer_product"
    opm_rank: int = 16
    pair_layer_norm: bool = True
    pair_dropout: float | int = 0.0
    pair_transition: bool = False
    pair_transition_factor: int = 4
    update_pair_in_last_block: bool | Literal["auto"] = "auto"
    pair_init: Literal["zeros", "scalar_mlp", "gene", "prior", "prior+gene"] = "zeros"
    pair_init_rank: int = 16
    prior_channels: int = 0
    prior_edge_types: list[str] | tuple[str, ...] = ()
    prior_direction: Literal["forward", "backward", "both"] = "both"
    prior_file: str = "gene_prior.safetensors"
    prior_sha256: str | None = None
    symmetrize_pair: bool = False
    opm_group_dim: bool | None = None
    output_pair_states: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.prior_edge_types = tuple(self.prior_edge_types)
        super().__post_init__(**kwargs)
        if self.use_opm and not self.use_pair_bias and not self.output_pair_states:
            logger.warning("`use_opm` without `use_pair_bias`: z only feeds the pair output, and has no other effect.")

    @property
    def prior_size(self) -> int:
        """Channels of the prior as z sees them."""
        return self.prior_channels * (2 if self.prior_direction == "both" else 1)

    def updates_pair(self, layer: int) -> bool:
        """Whether block `layer` updates z: where something reads it afterwards."""
        if not self.use_opm:
            return False
        if layer < self.num_hidden_layers - 1 and self.use_pair_bias:
            return True
        asked = self.update_pair_in_last_block
        return self.output_pair_states if asked == "auto" else bool(asked)

    @property
    def has_additive_bias(self) -> bool:
        """Whether attention adds a tensor to its logits."""
        if not self.use_pair_bias:
            return False
        return self.pair_mode == "full" or "prior" in self.pair_init

    @property
    def largest_head_dim(self) -> int:
        """Of queries and keys; in factorized mode they grow with every block."""
        if self.pair_mode == "full" or not self.use_pair_bias:
            return self.head_dim
        step = self.opm_rank if self.pair_update == "low_rank" else self.opm_hidden_size
        init = self.pair_init_rank if "gene" in self.pair_init else 0
        return self.head_dim + init + (step * (self.num_hidden_layers - 1) if self.use_opm else 0)

    def validate_pair_sizes(self) -> None:
        """Every size of the pair path is positive."""
        names = ("pair_hidden_size", "opm_hidden_size", "opm_rank", "pair_init_rank", "pair_transition_factor")
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")

    def validate_factorized(self) -> None:
        """What needs z itself is off where z is never made."""
        if self.pair_mode != "factorized":
            return
        wanted: dict[str, Any] = {
            "pair_layer_norm": False,
            "pair_transition": False,
            "pair_dropout": 0,
            "symmetrize_pair": False,
        }
        wanted |= {"opm_group_dim": None, "output_pair_states": False}
        wrong = [f"`{name}` {getattr(self, name)!r}" for name, value in wanted.items() if getattr(self, name) != value]
        wrong += [f"`pair_init` {self.pair_init!r}"] if self.pair_init not in ("zeros", "gene", "prior") else []
        wrong += ["`update_pair_in_last_block` True"] if self.update_pair_in_last_block is True else []
        if wrong:
            raise ValueError(
                f"`pair_mode` 'factorized' never makes z, and cannot have {', '.join(wrong)}; switch these off (and "
                "`pair_layer_norm=False`), or use pair_mode='full'."
            )

    def validate_prior(self) -> None:
        """A prior has channels where one is asked for."""
        if self.prior_channels < 0:
            raise ValueError(f"`prior_channels` must be at least 0, got {self.prior_channels}.")
        if "prior" in self.pair_init and self.prior_channels < 1:
            raise ValueError(f"`pair_init` {self.pair_init!r} needs `prior_channels` of at least 1, got 0.")
        if self.pair_init == "scalar_mlp" and self.prior_channels > 1:
            raise ValueError(f"`pair_init` 'scalar_mlp' reads one prior channel, got {self.prior_channels}.")
