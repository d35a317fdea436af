"""Configuration of Caduceus, a bidirectional state-space model that can treat both strands of DNA alike."""

import math
from dataclasses import field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from genesplice_hf.layers.config_fields import warn_unknown_fields
from genesplice_hf.layers.selective_scan import ScanBackend

SSM_DEFAULTS: dict[str, Any] = {
    "d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto", "dt_min": 0.001, "dt_max": 0.1, "dt_init": "random",
    "dt_scale": 1.0, "dt_init_floor": 1e-4, "conv_bias": True, "bias": False,
}  # fmt: skip
INITIALIZER_DEFAULTS: dict[str, Any] = {
    "initializer_range": 0.02,
    "rescale_prenorm_residual": True,
    "n_residuals_per_layer": 1,
}


def default_complement_map(vocab_size: int) -> list[int]:
    """Complement of every id: A7 <-> T10, C8 <-> G9 (preset `caduceus`), or with fewer than 11 ids A3 <-> T6,
    C4 <-> G5 (`plantcaduceus`); all others are their own.
    """
    first = 7 if vocab_size > 10 else 3
    complement = dict(zip(range(first, first + 4), reversed(range(first, first + 4)), strict=True))
    if vocab_size < first + 4:
        complement = {}
    return [complement.get(token, token) for token in range(vocab_size)]


@strict
class CaduceusConfig(PreTrainedConfig):
    """Shape and behaviour of a Caduceus; the names are those of the published configs.

    Attributes:
        vocab_size: rows of the embedding, as they are; conversion pads the published 12 to 16.
        pad_vocab_size_multiple: what conversion pads `vocab_size` to a multiple of; no effect otherwise.
        d_model: width of one strand's states. n_layer: blocks.
        ssm_cfg: of the Mamba mixers: `d_state` (N), `d_conv` (taps of the causal convolution), `expand` (inner width
            over d_model), `dt_rank` ("auto" = ceil(d_model / 16)), `conv_bias`, `bias` (of the projections), and for
            new weights `dt_min`, `dt_max`, `dt_init` ("random" or "constant"), `dt_scale`, `dt_init_floor`. What is
            left out has its default.
        rms_norm, norm_epsilon: RMSNorm or LayerNorm.
        residual_in_fp32: the residual stream of a half-precision model is float32.
        fused_add_norm: a switch of the published code that in its strand-equivariant form changes the function too;
            here it only gives `rcps_half_order` its default.
        rcps: True = Caduceus-PS, which treats both strands alike; False = Caduceus-Ph.
        rcps_half_order: what the published code does with the two strands at the start of each block: "exchange" (its
            fused branch) or "straight" (its other one). Two different functions, both equivariant.
        bidirectional, bidirectional_strategy: whether a second Mamba reads backwards, and how the two are joined.
        bidirectional_weight_tie: both directions share their input and output projections.
        complement_map: id of the complement of every id, an involution.
        token_strand_pairs: with `rcps`, the label of the other strand for every label of token classification; None =
            itself.
        initializer_cfg: `initializer_range` of the embedding; `rescale_prenorm_residual`: divide new output
            projections by sqrt(`n_residuals_per_layer` * n_layer).
        scan_backend, scan_chunk_size: see `layers.selective_scan.selective_scan`; no effect on the result.
        classifier_pooling: "mean", "max", "cls" (the first) or "last", over real positions without
            `special_token_ids`.
        classifier_dropout: before the classifier; the network itself has none.
        conversion, upstream_config: what `from_original` records of the original.
    """

    model_type = "genesplice_caduceus"
    # Module names that PEFT adapts by default.
    lora_targets = ["in_proj", "x_proj", "out_proj"]
    ia3_targets = ["out_proj"]
    ia3_feedforward = ["out_proj"]
    layer_norm_targets = ["norm", "norm_f"]

    vocab_size: int = 12
    pad_vocab_size_multiple: int = 8
    d_model: int = 256
    n_layer: int = 16
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    rcps: bool = False
    rcps_half_order: Literal["exchange", "straight"] | None = None
    bidirectional: bool = True
    bidirectional_strategy: Literal["add", "ew_multiply"] = "add"
    bidirectional_weight_tie: bool = True
    complement_map: list[int] | None = None
    token_strand_pairs: list[int] | None = None
    initializer_cfg: dict[str, Any] = field(default_factory=dict)
    scan_backend: ScanBackend = "auto"
    scan_chunk_size: int = 256
    classifier_pooling: Literal["mean", "max", "cls", "last"] = "mean"
    classifier_dropout: float | int = 0.0
    special_token_ids: list[int] = field(default_factory=list)
    pad_token_id: int | None = 4
    mask_token_id: int | None = 3
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    conversion: dict[str, Any] | None = None
    upstream_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.ssm_cfg, dict):
            self.ssm_cfg = SSM_DEFAULTS | self.ssm_cfg
        if isinstance(self.initializer_cfg, dict):
            self.initializer_cfg = INITIALIZER_DEFAULTS | self.initializer_cfg
        if self.rcps_half_order is None:
            self.rcps_half_order = "exchange" if self.fused_add_norm else "straight"
        if self.complement_map is None:
            self.complement_map = default_complement_map(self.vocab_size)
        warn_unknown_fields(type(self), kwargs)
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of the states that the base model returns: those of both strands with `rcps`."""
        return 2 * self.d_model if self.rcps else self.d_model

    @property
    def num_hidden_layers(self) -> int:
        return self.n_layer

    @property
    def rc_equivariant(self) -> bool:
        return self.rcps

    @property
    def d_inner(self) -> int:
        """Channels of a mixer."""
        return self.ssm_cfg["expand"] * self.d_model

    @property
    def dt_rank(self) -> int:
        """Width of what the step sizes are made from."""
        rank = self.ssm_cfg["dt_rank"]
        return math.ceil(self.d_model / 16) if rank == "auto" else rank

    def validate_sizes(self) -> None:
        """Everything has a size."""
        for name in ("vocab_size", "pad_vocab_size_multiple", "d_model", "n_layer", "scan_chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")

    def validate_ssm_cfg(self) -> None:
        """The mixers' options are known and positive."""
        unknown = sorted(set(self.ssm_cfg) - set(SSM_DEFAULTS))
        if unknown:
            raise ValueError(f"`ssm_cfg` knows {', '.join(SSM_DEFAULTS)}, not {', '.join(unknown)}.")
        for name in ("d_state", "d_conv", "expand"):
            if not isinstance(self.ssm_cfg[name], int) or self.ssm_cfg[name] < 1:
                raise ValueError(f"`ssm_cfg`: `{name}` must be a positive integer, got {self.ssm_cfg[name]!r}.")
        rank = self.ssm_cfg["dt_rank"]
        if rank != "auto" and (not isinstance(rank, int) or rank < 1):
            raise ValueError(f"`ssm_cfg`: `dt_rank` must be 'auto' or a positive integer, got {rank!r}.")
        if self.ssm_cfg["dt_init"] not in ("random", "constant"):
            raise ValueError(f"`ssm_cfg`: `dt_init` must be random or constant, got {self.ssm_cfg['dt_init']!r}.")
        if not 0 < self.ssm_cfg["dt_min"] <= self.ssm_cfg["dt_max"]:
            raise ValueError("`ssm_cfg` needs 0 < `dt_min` <= `dt_max`; change one of the two.")

    def validate_initializer_cfg(self) -> None:
        """The options of new weights are known."""
        unknown = sorted(set(self.initializer_cfg) - set(INITIALIZER_DEFAULTS))
        if unknown:
            raise ValueError(f"`initializer_cfg` knows {', '.join(INITIALIZER_DEFAULTS)}, not {', '.join(unknown)}.")

    def validate_strands(self) -> None:
        """Complements are mutual, for ids and for labels."""
        _demand_involution("complement_map", self.complement_map, self.vocab_size, "ids")
        if self.token_strand_pairs is not None:
            _demand_involution("token_strand_pairs", self.token_strand_pairs, self.num_labels, "labels")


def _demand_involution(name: str, mapping: list[int] | None, size: int, what: str) -> None:
    mapping = mapping or []
    mutual = all(0 <= other < len(mapping) and mapping[other] == own for own, other in enumerate(mapping))
    if len(mapping) != size or not mutual:
        raise ValueError(f"`{name}` must map each of the {size} {what} to its complement and back, got {mapping}.")
