"""Configuration of Akita, which predicts contact maps of the folded genome from sequence."""

from os import PathLike
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from genesplice_hf.layers.config_fields import warn_unknown_fields
from genesplice_hf.layers.pair_maps import PairOperation
from genesplice_hf.models.akita.params_akita import fields_from_params, params_from_fields, read_params

PUBLISHED_TARGETS = ("HFF", "H1hESC", "GM12878", "IMR90", "HCT116")


@strict
class AkitaConfig(PreTrainedConfig):
    """Shape and behaviour of an Akita; the defaults are those of the publication (751,653 numbers).

    Attributes:
        seq_length: bases of a window in training; the network runs on any other length too.
        stem_filters, stem_kernel_size, stem_pool_size: first convolution, and bases per position after it.
        tower_filters_init, tower_filters_mult, tower_repeat, tower_kernel_size, tower_pool_size: the pooled
            convolutions; the width grows by the factor, and every width is rounded.
        tower_divisible_by: widths of the tower are rounded to multiples of it.
        dilated_filters, dilated_kernel_size, dilated_rate_mult, dilated_repeat, dilated_dropout: residual blocks whose
            dilation grows by the factor from 1 and is rounded where it is used.
        dilated_round: the running dilation is rounded as well.
        trunk_out_filters, trunk_out_kernel_size: last convolution of the trunk.
        one_to_two: how the states of two bins become a pixel, see `layers.pair_maps.pair_features`.
        concat_distance: the distance in bins is one more channel of the map.
        head2d_filters, head2d_kernel_size: first convolution over the map.
        dilated2d_filters, dilated2d_kernel_size, dilated2d_rate_mult, dilated2d_repeat, dilated2d_dropout: residual
            blocks over the map.
        dilated2d_symmetric: the map is made symmetric after each of them.
        target_crop: bins without a prediction at each side.
        diagonal_offset: pairs nearer than so many bins have none.
        num_targets, target_names: experiments; the names default to the five of the publication where there are five.
        hidden_act: before every convolution; "quick_gelu" is what the reference calls gelu.
        batch_norm_eps, batch_norm_momentum: 0.0735 is 1 - 0.9265 of Keras.
        final_activation: on the predictions.
        pad_value: one-hot value at padding.
        conversion, upstream_config: what `from_original` records of the original.
    """

    model_type = "genesplice_akita"
    attribute_map = {"hidden_size": "trunk_out_filters"}
    # Module names that PEFT adapts by default; its IA3 knows no one-dimensional convolution.
    lora_targets = ["conv", "conv1", "conv2"]
    ia3_targets = list[str]()
    ia3_feedforward = list[str]()
    layer_norm_targets = ["norm", "norm1", "norm2"]

    seq_length: int = 1_048_576
    stem_filters: int = 96
    stem_kernel_size: int = 11
    stem_pool_size: int = 2
    tower_filters_init: int = 96
    tower_filters_mult: float | int = 1.0
    tower_repeat: int = 10
    tower_kernel_size: int = 5
    tower_pool_size: int = 2
    tower_divisible_by: int = 1
    dilated_filters: int = 48
    dilated_kernel_size: int = 3
    dilated_rate_mult: float | int = 1.75
    dilated_repeat: int = 8
    dilated_dropout: float | int = 0.4
    dilated_round: bool = False
    trunk_out_filters: int = 64
    trunk_out_kernel_size: int = 5
    one_to_two: PairOperation = "mean"
    concat_distance: bool = True
    head2d_filters: int = 48
    head2d_kernel_size: int = 3
    dilated2d_filters: int = 24
    dilated2d_kernel_size: int = 3
    dilated2d_rate_mult: float | int = 1.75
    dilated2d_repeat: int = 6
    dilated2d_dropout: float | int = 0.1
    dilated2d_symmetric: bool = True
    target_crop: int = 32
    diagonal_offset: int = 2
    num_targets: int = 5
    target_names: list[str] | tuple[str, ...] | None = None
    hidden_act: Literal["relu", "quick_gelu"] = "relu"
    batch_norm_eps: float = 1e-3
    batch_norm_momentum: float = 0.0735
    final_activation: Literal["linear", "relu", "softplus"] = "linear"
    pad_value: float | int = 0.0
    conversion: dict[str, Any] | None = None
    upstream_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.target_names is None and self.num_targets == len(PUBLISHED_TARGETS):
            self.target_names = PUBLISHED_TARGETS
        if self.target_names is not None:
            self.target_names = list(self.target_names)
        warn_unknown_fields(type(self), kwargs)
        super().__post_init__(**kwargs)

    @classmethod
    def from_params_json(cls, path_or_params: str | PathLike | dict[str, Any], **fields: Any) -> "AkitaConfig":
        """A config from a Basenji `params.json` of this family; `fields` override what it says.

        Raises:
            CheckpointError: an unknown block or key, or blocks in another order.
        """
        params = path_or_params if isinstance(path_or_params, dict) else read_params(path_or_params)
        return cls(**(fields_from_params(params) | fields))

    def to_params_json(self) -> dict[str, Any]:
        """The `params.json` of this architecture, as a dict; without the section on training."""
        return params_from_fields({name: getattr(self, name) for name in type(self).__dataclass_fields__})

    @property
    def pool_factor(self) -> int:
        """Bases per bin."""
        return self.stem_pool_size * self.tower_pool_size**self.tower_repeat

    @property
    def tower_filters(self) -> list[int]:
        """Width of each block of the tower."""
        widths, running = [], float(self.tower_filters_init)
        for _ in range(self.tower_repeat):
            widths.append(round(running / self.tower_divisible_by) * self.tower_divisible_by)
            running *= self.tower_filters_mult
        return widths

    @property
    def dilations(self) -> list[int]:
        """Of the residual blocks of the trunk."""
        return _rates(self.dilated_rate_mult, self.dilated_repeat, self.dilated_round)

    @property
    def dilations2d(self) -> list[int]:
        """Of the residual blocks over the map."""
        return _rates(self.dilated2d_rate_mult, self.dilated2d_repeat, False)

    def num_bins(self, length_bp: int) -> int:
        """Bins of a window, before cropping; a part of a bin at the end is one."""
        return -(-length_bp // self.pool_factor)

    def map_size(self, length_bp: int) -> int:
        """Bins of a window's contact map."""
        return self.num_bins(length_bp) - 2 * self.target_crop

    def num_pairs(self, length_bp: int) -> int:
        """Predicted pairs of a window."""
        rows = max(self.map_size(length_bp) - self.diagonal_offset, 0)
        return rows * (rows + 1) // 2

    def validate_sizes(self) -> None:
        """What is counted is positive, and kernels have a centre."""
        for name in ("stem_filters", "stem_pool_size", "tower_filters_init", "tower_pool_size", "tower_divisible_by",
                     "dilated_filters", "trunk_out_filters", "head2d_filters", "dilated2d_filters",
                     "num_targets"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("tower_repeat", "dilated_repeat", "dilated2d_repeat", "target_crop", "diagonal_offset"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be 0 or more, got {getattr(self, name)}.")
        for name in ("stem", "tower", "dilated", "trunk_out", "head2d", "dilated2d"):
            size = getattr(self, f"{name}_kernel_size")
            if size < 1 or size % 2 == 0:
                raise ValueError(f"`{name}_kernel_size` must be odd, got {size}; even kernels have no centre.")

    def validate_growth(self) -> None:
        """Dilations and widths stay whole and positive."""
        for name in ("dilated_rate_mult", "dilated2d_rate_mult"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}; dilations never shrink.")
        if min(self.tower_filters, default=1) < 1:
            raise ValueError(
                f"`tower_filters_mult` ({self.tower_filters_mult}) and `tower_divisible_by` "
                f"({self.tower_divisible_by}) give a tower of widths {self.tower_filters}; every width must be at "
                "least 1."
            )

    def validate_window(self) -> None:
        """The training window leaves pairs to predict."""
        bins = self.num_bins(self.seq_length)
        if bins <= 2 * self.target_crop + self.diagonal_offset:
            raise ValueError(
                f"`seq_length` ({self.seq_length}) gives {bins} bins of {self.pool_factor} bp, which must be more "
                f"than 2 x `target_crop` + `diagonal_offset` = {2 * self.target_crop + self.diagonal_offset}."
            )

    def validate_targets(self) -> None:
        """There are as many names as targets."""
        if self.target_names is not None and len(self.target_names) != self.num_targets:
            raise ValueError(
                f"`target_names` holds {len(self.target_names)} names for `num_targets` = {self.num_targets}; pass "
                "one name per target, or None."
            )


def _rates(factor: float, repeat: int, rounded: bool) -> list[int]:
    """1, factor, factor^2, ... as whole numbers, half to even."""
    rates, running = [], 1.0
    for _ in range(repeat):
        rates.append(round(running))
        running = float(round(running * factor)) if rounded else running * factor
    return rates
