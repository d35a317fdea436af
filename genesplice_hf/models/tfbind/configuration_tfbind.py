"""Configuration of TFBind: which factor, given as a protein, binds where in a window of DNA, and in which context."""

import difflib
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from genesplice_hf.errors import GeneSpliceError
from genesplice_hf.layers.config_fields import warn_unknown_fields

Conditioning = Literal[
    "film", "squeeze_excite", "hypergrid", "context_cross_attention", "isab", "adaln", "concat_token"
]
# All but "isab", which also works without a context.
NEED_CONTEXT = {"film", "squeeze_excite", "hypergrid", "context_cross_attention", "adaln", "concat_token"}
TRACK_LOSSES = ("poisson", "correlation", "mse", "poisson_multinomial")
BINARY_LOSSES = ("bce", "mse")
# Amino acids of the model's own numbering, padding, and what is unknown.
NUM_RESIDUE_IDS, RESIDUE_PAD_ID, RESIDUE_UNKNOWN_ID = 22, 20, 21
# Overlap of the windows of a protein that is longer than its encoder allows, in residues.
WINDOW_OVERLAP = 128
MAX_CHAINS = 8

# Arguments of the reference's constructor -> ours, where only the name changes.
_LEGACY_NAMES = {
    "aa_embed_dim": "protein_dim",
    "contextual_embed_dim": "context_dim",
    "latent_dim": "latent_dim",
    "latent_heads": "latent_heads",
    "aux_read_value_loss": "aux_read_value",
    "read_value_aux_loss_weight": "aux_read_value_weight",
    "finetune_output_heads": "track_heads",
    "genome_self_attn_depth": "genome_self_attn_depth",
    "joint_cross_attn_depth": "joint_cross_attn_depth",
    "fourier_dims": "fourier_dims",
    "dropout": "dropout",
}
_LEGACY_CONDITIONING = {
    "condition_film": "film",
    "condition_squeeze_excite": "squeeze_excite",
    "use_squeeze_excite": "squeeze_excite",
    "condition_hypergrid": "hypergrid",
}
_LEGACY_OTHERS = (
    "use_aa_embeds", "aa_embed_encoder", "use_free_text_context", "free_text_embed_method", "binary_target",
    "target_mse_loss", "use_corr_coef_loss",
)  # fmt: skip
LEGACY_ARGUMENTS = {*_LEGACY_NAMES, *_LEGACY_CONDITIONING, *_LEGACY_OTHERS}
_LEGACY_POOLING = {"cls": "cls", "mean_pool": "mean", "mean": "mean"}
# Their word for a protein encoder -> width of its states.
_LEGACY_ENCODERS = {"esm": 1280, "protalbert": 4096}


@strict
class TFBindConfig(PreTrainedConfig):
    """Shape and behaviour of a TFBind model.

    Attributes:
        dna_config: of an encoder of this package or of transformers, as config or dict with `model_type`; None = the
            default Enformer. It must return states per position or bin. dna_dim: their width; None = as it says.
        freeze_dna, freeze_protein, freeze_text: the encoder stays in evaluation mode, without gradients of its own.
        protein_config, text_config: encoders of residues and of free text, or None.
        protein_input: "embeds" = states (B, R, `protein_dim`) are passed, "tokens" = an embedding of amino acids with
            sinusoidal positions, "encoder" = ids go through the encoder of `protein_config`.
        protein_token_ids: the encoder's ids of our 22 residue ids (`processing_tfbind.encoder_fields` finds them by
            name); protein_prefix_ids, protein_suffix_ids: its ids around a sequence, whose states are removed.
        protein_layer: index of the encoder's hidden states; -1 = its last hidden state.
        max_protein_length: residues of one subunit that the encoder takes; protein_overflow: of longer ones the rest
            is hidden ("truncate", with a warning), or windows that overlap by 128 are averaged, or it is an error.
        context_mode: "vector" = a vector is passed, "text" = pooled states of the text encoder, "tokens" = its token
            states, and pooled ones where a vector is needed, "ids" = the sum of one embedding per field, "none".
        context_dim: width of the vector; None = that of the text encoder. context_vocab_sizes: of "ids".
        text_pooling: state 0, the mean over real tokens that are none of `text_special_token_ids` (None = all but the
            first and the last, with which BERT frames a text), or the last one.
        hidden_dim: width that both sides are projected to before the joint blocks; None = their own.
        conditioning: what the context (and for "isab" latents) does; film, squeeze_excite and context_cross_attention
            in the order given. conditioning_targets: the sides that film, squeeze_excite and adaln change.
        genome_self_attn_depth, joint_cross_attn_depth, attn_heads, attn_dim_head, ff_mult, norm_type: of the blocks;
            norm_type is that of the joint blocks before attention, all other norms are layer norms.
        isab_latents, isab_depth: latents that both sides exchange through, after the joint blocks.
        interaction: "filip", "mean" (of all similarities), "attention" (residues pooled by values of their own).
        latent_heads, latent_dim: of the interaction; `latent_heads` is the width of `last_hidden_state`.
        filip_reduce, filip_temperature, learn_temperature, interaction_similarity, null_residue, residue_dropout,
            interaction_norm, interaction_norm_affine, interaction_norm_eps, interaction_norm_position: see
            `layers/interaction.py` and `layers/interaction_norm.py`; residue_dropout None = `dropout`.
        interaction_chunk_size: residues whose similarities exist at a time; None = all.
        encoder_cache_size: rows of frozen encoders' results that a model object keeps; 0 = none.
        task: "track" or "binary", as the head class says.
        num_tracks: of a track model; loss_type None = "poisson" for tracks, "bce" for labels.
        aux_read_value, aux_read_value_weight, fourier_dims, read_value_features: see `heads/binding.py`.
        target_length: bins in the middle that are kept; None = all.
        hypergrid_rank: blocks per side of a factorised gate; None = a gate per weight.
        chain_embedding: a learned vector per subunit of a complex.
        pos_weight: of positive labels in "bce".
        track_heads: species -> tracks, of `TFBindForDNATracks`.
        film_residual, se_scale, normalize_null, mse_on_logits: False, 1, False and True in converted models.
        dna_name_or_path, protein_name_or_path, text_name_or_path: where the weights of an encoder are that the
            checkpoint does not hold.
        conversion, upstream_config: what `from_original` records of the original.
    """

    model_type = "genesplice_tfbind"
    sub_configs = {"dna_config": AutoConfig, "protein_config": AutoConfig, "text_config": AutoConfig}
    attribute_map = {"hidden_size": "latent_heads"}
    keys_to_ignore_at_inference = [
        "main_loss", "aux_loss", "num_scored", "read_value", "interactions", "residue_scores", "hidden_states",
        "attentions",
    ]  # fmt: skip
    # Module names that PEFT adapts by default; those of trainable encoders are added by `adaptation`.
    lora_targets = ["to_q", "to_k", "to_v", "to_out", "to_qk", "context_to_qk"]
    ia3_targets = ["to_k", "to_v", "to_qk", "context_to_qk", "context_to_v", "fc2"]
    ia3_feedforward = ["fc2"]
    layer_norm_targets = ["norm_dna", "attn_norm", "ff_norm", "context_norm", "context_ff_norm"]
    # Saved whole beside the head when an adapter of a task class is trained.
    adapter_modules_to_save = ["interaction"]

    dna_config: dict[str, Any] | PreTrainedConfig | None = None
    dna_dim: int | None = None
    freeze_dna: bool = True
    protein_config: dict[str, Any] | PreTrainedConfig | None = None
    protein_dim: int | None = None
    protein_input: Literal["embeds", "tokens", "encoder"] = "embeds"
    protein_token_ids: list[int] | tuple[int, ...] | None = None
    protein_prefix_ids: list[int] | tuple[int, ...] = ()
    protein_suffix_ids: list[int] | tuple[int, ...] = ()
    freeze_protein: bool = True
    protein_layer: int = -1
    max_protein_length: int = 1022
    protein_overflow: Literal["truncate", "window", "error"] = "truncate"
    context_mode: Literal["vector", "text", "tokens", "ids", "none"] = "vector"
    context_dim: int | None = None
    context_vocab_sizes: list[int] | tuple[int, ...] | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    text_pooling: Literal["cls", "mean", "last"] = "cls"
    text_special_token_ids: list[int] | tuple[int, ...] | None = None
    text_max_length: int = 256
    freeze_text: bool = True
    hidden_dim: int | None = None
    conditioning: list[Conditioning] | tuple[Conditioning, ...] = ("hypergrid",)
    conditioning_targets: list[Literal["dna", "protein"]] | tuple[Literal["dna", "protein"], ...] = ("dna", "protein")
    genome_self_attn_depth: int = 0
    joint_cross_attn_depth: int = 1
    attn_heads: int = 8
    attn_dim_head: int = 64
    ff_mult: int = 4
    norm_type: Literal["layernorm", "rmsnorm"] = "layernorm"
    isab_latents: int = 64
    isab_depth: int = 1
    interaction: Literal["filip", "mean", "attention"] = "filip"
    latent_heads: int = 32
    latent_dim: int = 64
    filip_reduce: Literal["logavgexp", "max", "softmax"] = "logavgexp"
    filip_temperature: float = 0.05
    learn_temperature: bool = False
    interaction_similarity: Literal["cosine", "scaled_dot"] = "cosine"
    interaction_norm: Literal[
        "none", "layernorm", "rmsnorm", "batchnorm", "instancenorm", "softmax_residue", "zscore_bins"
    ] = "none"
    interaction_norm_affine: bool = True
    interaction_norm_eps: float = 1e-5
    interaction_norm_position: Literal["pre", "post"] = "post"
    interaction_chunk_size: int | None = None
    null_residue: bool = True
    residue_dropout: float | int | None = None
    dropout: float | int = 0.0
    encoder_cache_size: int = 0
    task: Literal["track", "binary"] = "track"
    num_tracks: int = 1
    loss_type: Literal["poisson", "correlation", "mse", "poisson_multinomial", "bce"] | None = None
    aux_read_value: bool = False
    aux_read_value_weight: float | int = 0.05
    fourier_dims: int = 256
    read_value_features: Literal["log1p", "reference"] = "log1p"
    target_length: int | None = None
    hypergrid_rank: int | None = None
    chain_embedding: bool = False
    pos_weight: float | int | None = None
    track_heads: dict[str, int] | None = None
    film_residual: bool = True
    se_scale: float | int = 2.0
    normalize_null: bool = True
    mse_on_logits: bool = False
    dna_name_or_path: str | None = None
    protein_name_or_path: str | None = None
    text_name_or_path: str | None = None
    conversion: dict[str, Any] | None = None
    upstream_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.dna_config = built(self.dna_config or {"model_type": "genesplice_enformer"}, "dna_config")
        self.protein_config = built(self.protein_config, "protein_config")
        self.text_config = built(self.text_config, "text_config")
        for name in ("conditioning", "conditioning_targets", "protein_prefix_ids", "protein_suffix_ids"):
            setattr(self, name, tuple(getattr(self, name)))
        for name in ("protein_token_ids", "context_vocab_sizes", "text_special_token_ids"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else tuple(value))
        if self.protein_dim is None and self.protein_config is not None:
            self.protein_dim = states_width(self.protein_config)
        if self.context_dim is None and self.text_config is not None:
            self.context_dim = states_width(self.text_config)
        if self.residue_dropout is None:
            self.residue_dropout = self.dropout
        if self.id2label is None:
            kwargs.setdefault("num_labels", 1)
        warn_unknown_fields(type(self), kwargs)
        super().__post_init__(**kwargs)

    @classmethod
    def from_tf_bind_kwargs(cls, **arguments: Any) -> "TFBindConfig":
        """The config that arguments of the reference's constructor describe, as far as they do.

        Raises:
            GeneSpliceError: an argument without a meaning here.
        """
        return cls(**legacy_fields(arguments))

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """This config: what transformers means by a text config is that of the model's own tokens."""
        return self

    @property
    def vocab_size(self) -> int | None:
        """Tokens of the DNA encoder; None where it has no table."""
        return getattr(self.dna_config, "vocab_size", None)

    @property
    def dna_width(self) -> int:
        """Width of the DNA encoder's states."""
        return self.dna_dim or states_width(self.dna_config)

    @property
    def uses_context(self) -> bool:
        """Whether the context has an effect."""
        return bool(NEED_CONTEXT & set(self.conditioning)) or ("isab" in self.conditioning and self.has_context)

    @property
    def has_context(self) -> bool:
        return self.context_mode != "none" and self.context_dim is not None

    def validate_sizes(self) -> None:
        """What is counted is at least 1 (depths and the cache: 0)."""
        sizes = ("attn_heads", "attn_dim_head", "ff_mult", "latent_heads", "latent_dim", "isab_latents", "isab_depth",
                 "num_tracks", "text_max_length", "max_protein_length")  # fmt: skip
        optional = ("dna_dim", "hidden_dim", "protein_dim", "context_dim", "target_length", "interaction_chunk_size")
        for name in (*sizes, *(name for name in optional if getattr(self, name) is not None)):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("genome_self_attn_depth", "joint_cross_attn_depth", "encoder_cache_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be 0 or more, got {getattr(self, name)}.")
        if self.aux_read_value and (self.fourier_dims < 2 or self.fourier_dims % 2):
            raise ValueError(f"`fourier_dims` must be even and at least 2, got {self.fourier_dims}.")

    def validate_protein(self) -> None:
        """The residues' side has a width, and an encoder where it needs one."""
        if self.protein_dim is None:
            raise ValueError("`protein_dim` must be given without a `protein_config` (512 suits 'tokens').")
        if self.protein_input != "encoder":
            return
        if self.protein_config is None:
            raise ValueError("`protein_input`='encoder' needs a `protein_config`; pass one, or 'embeds' or 'tokens'.")
        if self.protein_dim != states_width(self.protein_config):
            raise ValueError(
                f"`protein_dim` ({self.protein_dim}) must be the width of the protein encoder's states "
                f"({states_width(self.protein_config)}); leave it out."
            )
        if self.protein_token_ids is None or len(self.protein_token_ids) != NUM_RESIDUE_IDS:
            raise ValueError(
                f"`protein_token_ids` must be {NUM_RESIDUE_IDS} ids of the protein encoder, got "
                f"{self.protein_token_ids}; `TFBindProcessor.encoder_fields` finds them."
            )
        if self.protein_overflow == "window" and self.max_protein_length <= WINDOW_OVERLAP:
            raise ValueError(
                f"`max_protein_length` must be more than the overlap of {WINDOW_OVERLAP} residues with "
                f"protein_overflow='window', got {self.max_protein_length}."
            )

    def validate_context(self) -> None:
        """The context is what the mode says, and exists where something needs it."""
        needed = sorted(NEED_CONTEXT & set(self.conditioning))
        if self.context_mode == "none" and needed:
            raise ValueError(f"`conditioning` {needed} needs a context; set `context_mode`, or leave them out.")
        if self.context_mode in ("text", "tokens") and self.text_config is None:
            raise ValueError(f"`context_mode`={self.context_mode!r} needs a `text_config`.")
        if self.context_mode == "ids" and not self.context_vocab_sizes:
            raise ValueError("`context_vocab_sizes` must hold the number of ids per field with context_mode='ids'.")
        if needed and self.context_dim is None:
            raise ValueError(f"`context_dim` must be given for `conditioning` {needed}, without a `text_config`.")
        is_text = self.context_mode in ("text", "tokens")
        if is_text and self.context_dim != states_width(self.text_config):
            raise ValueError(
                f"`context_dim` ({self.context_dim}) must be the width of the text encoder's states "
                f"({states_width(self.text_config)}) with context_mode={self.context_mode!r}; leave it out."
            )

    def validate_conditioning(self) -> None:
        """Every way stands once, and has what it works on."""
        for name in ("conditioning", "conditioning_targets"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"`{name}` must name every way once, got {list(getattr(self, name))}.")
        if "adaln" in self.conditioning and not self.joint_cross_attn_depth:
            raise ValueError("`conditioning` 'adaln' stands in joint blocks; set `joint_cross_attn_depth` to 1.")
        if self.hypergrid_rank is not None and (self.hypergrid_rank < 1 or self.latent_heads % self.hypergrid_rank):
            raise ValueError(
                f"`hypergrid_rank` must divide `latent_heads` ({self.latent_heads}), got {self.hypergrid_rank}."
            )

    def validate_interaction(self) -> None:
        """The reduction is defined, and the norm fits where it stands."""
        if self.filip_temperature <= 0:
            raise ValueError(f"`filip_temperature` must be more than 0, got {self.filip_temperature}.")
        if self.interaction_norm_position == "pre" and self.interaction_norm in (
            "batchnorm", "softmax_residue", "zscore_bins",
        ):  # fmt: skip
            raise ValueError(
                "`interaction_norm_position`='pre' needs layernorm, rmsnorm or instancenorm, got `interaction_norm` "
                f"{self.interaction_norm!r}."
            )
        if self.interaction_norm == "softmax_residue" and self.interaction != "filip":
            raise ValueError("`interaction_norm`='softmax_residue' is a way to reduce; it needs interaction='filip'.")
        for name in ("dropout", "residue_dropout"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise ValueError(f"`{name}` must be from 0 to below 1, got {getattr(self, name)}.")


def built(config: Any, name: str) -> PreTrainedConfig | None:
    """A sub-config as an object.

    Raises:
        GeneSpliceError: a dict without a known `model_type`.
    """
    if not isinstance(config, dict):
        return config
    model_type = config.get("model_type", "")
    if model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING.keys()), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise GeneSpliceError(f"`{name}` must name a known `model_type`, got {model_type!r}.{hint}")
    return CONFIG_MAPPING[model_type](**{key: value for key, value in config.items() if key != "model_type"})


def states_width(config: Any) -> int:
    """Width of the states that the model of a config returns.

    Raises:
        GeneSpliceError: the config does not say.
    """
    for name in ("hidden_size", "d_model"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    raise GeneSpliceError(f"`{config.model_type}` does not say how wide its states are; pass `dna_dim`.")


def legacy_fields(arguments: dict[str, Any]) -> dict[str, Any]:
    """Fields of ours for arguments of the reference's constructor.

    Raises:
        GeneSpliceError: an argument without a meaning here, with the nearest one that has.
    """
    for name in arguments:
        if name not in LEGACY_ARGUMENTS:
            close = difflib.get_close_matches(name, LEGACY_ARGUMENTS, n=1)
            hint = f"; did you mean `{close[0]}`?" if close else ""
            raise GeneSpliceError(f"`{name}` has no meaning in a TFBindConfig{hint}")
    fields = {_LEGACY_NAMES[name]: value for name, value in arguments.items() if name in _LEGACY_NAMES}
    # The reference builds a hypergrid unless it is told not to.
    flags = {"condition_hypergrid": True} | arguments
    chosen = [ours for theirs, ours in _LEGACY_CONDITIONING.items() if flags.get(theirs)]
    fields["conditioning"] = list(dict.fromkeys(chosen))
    return fields | _legacy_task(arguments) | _legacy_encoders(arguments)


def _legacy_task(arguments: dict[str, Any]) -> dict[str, Any]:
    binary = bool(arguments.get("binary_target"))
    loss = "bce" if binary else "poisson"
    if arguments.get("use_corr_coef_loss") and not binary:
        loss = "correlation"
    if arguments.get("target_mse_loss"):
        loss = "mse"
    return {"task": "binary" if binary else "track", "loss_type": loss}


def _legacy_encoders(arguments: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if arguments.get("use_free_text_context"):
        fields |= {"context_mode": "text", "text_config": {"model_type": "bert"}}
    method = arguments.get("free_text_embed_method", "cls")
    if method not in _LEGACY_POOLING:
        raise GeneSpliceError(f"`free_text_embed_method` must be one of {list(_LEGACY_POOLING)}, got {method!r}.")
    fields["text_pooling"] = _LEGACY_POOLING[method]
    encoder = arguments.get("aa_embed_encoder", "esm")
    if encoder not in _LEGACY_ENCODERS:
        raise GeneSpliceError(f"`aa_embed_encoder` must be one of {list(_LEGACY_ENCODERS)}, got {encoder!r}.")
    if arguments.get("use_aa_embeds") and arguments.get("aa_embed_dim") is None:
        fields["protein_dim"] = _LEGACY_ENCODERS[encoder]
    return fields
