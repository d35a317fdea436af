"""Basenji's `params.json` of the Akita family, read into fields of our config and written from them.

Such a file lists the blocks of the network (github.com/calico/basenji, `manuscripts/akita/params.json`). Only the
order of Akita is understood: every block, and every key in it, must be known.
"""

import json
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from genesplice_hf.errors import CheckpointError


class _Block(NamedTuple):
    """One expected block: its name, {their key: our field}, what a missing key means, and what is optional."""

    name: str
    keys: dict[str, str]
    defaults: dict[str, Any] = {}
    # Field that is True where the block is there; None = it must be there.
    switch: str | None = None


_TRUNK = (
    _Block("conv_block", {"filters": "stem_filters", "kernel_size": "stem_kernel_size", "pool_size": "stem_pool_size"},
           {"pool_size": 1}),
    _Block("conv_tower", {"filters_init": "tower_filters_init", "filters_mult": "tower_filters_mult",
                          "divisible_by": "tower_divisible_by", "repeat": "tower_repeat",
                          "kernel_size": "tower_kernel_size", "pool_size": "tower_pool_size"},
           {"filters_mult": 1.0, "divisible_by": 1, "pool_size": 1}),
    _Block("dilated_residual", {"filters": "dilated_filters", "kernel_size": "dilated_kernel_size",
                                "rate_mult": "dilated_rate_mult", "repeat": "dilated_repeat",
                                "dropout": "dilated_dropout", "round": "dilated_round"},
           {"kernel_size": 3, "dropout": 0.0, "round": False}),
    _Block("conv_block", {"filters": "trunk_out_filters", "kernel_size": "trunk_out_kernel_size"}),
)  # fmt: skip
_HEAD = (
    _Block("one_to_two", {"operation": "one_to_two"}, {"operation": "mean"}),
    _Block("concat_dist_2d", {}, switch="concat_distance"),
    _Block("conv_block_2d", {"filters": "head2d_filters", "kernel_size": "head2d_kernel_size"}),
    _Block("symmetrize_2d", {}),
    _Block("dilated_residual_2d", {"filters": "dilated2d_filters", "kernel_size": "dilated2d_kernel_size",
                                   "rate_mult": "dilated2d_rate_mult", "repeat": "dilated2d_repeat",
                                   "dropout": "dilated2d_dropout", "symmetric": "dilated2d_symmetric"},
           {"kernel_size": 3, "dropout": 0.0, "symmetric": True}),
    _Block("cropping_2d", {"cropping": "target_crop"}),
    _Block("upper_tri", {"diagonal_offset": "diagonal_offset"}, {"diagonal_offset": 2}),
    _Block("final", {"units": "num_targets", "activation": "final_activation"}, {"activation": "linear"}),
)  # fmt: skip
_ACTIVATIONS = {"relu": "relu", "gelu": "quick_gelu"}
# What concerns data and training, or is said again by a block.
_PASSED = {"target_length", "target_crop", "diagonal_offset", "augment_rc", "augment_shift", "batch_norm",
           "batch_size", "loss", "verbose"}  # fmt: skip


def read_params(path: str | PathLike) -> dict[str, Any]:
    """The content of a `params.json` file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def fields_from_params(params: dict[str, Any]) -> dict[str, Any]:
    """Fields of our config; `params` is the whole file or its section `model`.

    Raises:
        CheckpointError: an unknown block or key, a missing one, or sections that contradict each other.
    """
    model = dict(params.get("model", params))
    trunk, head = model.pop("trunk", None), model.pop("head_hic", None)
    if not isinstance(trunk, list) or not isinstance(head, list):
        raise CheckpointError(
            "`params` must list the blocks of `trunk` and `head_hic`, as the params.json of Akita does; files with "
            "other heads belong to other models."
        )
    fields = _read_blocks("trunk", trunk, _TRUNK) | _read_blocks("head_hic", head, _HEAD)
    for name in ("target_crop", "diagonal_offset"):
        if model.get(name, fields[name]) != fields[name]:
            raise CheckpointError(f"`{name}` is {model[name]} in the model section, but {fields[name]} in its block.")
    if model.get("batch_norm", True) is not True:
        raise CheckpointError("`batch_norm` must be true; convolutions here have a norm in the place of a bias.")
    return fields | _read_model({name: value for name, value in model.items() if name not in _PASSED})


def params_from_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The way back: `{"model": {...}}`."""
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    return {
        "model": {
            "seq_length": fields["seq_length"],
            "target_crop": fields["target_crop"],
            "diagonal_offset": fields["diagonal_offset"],
            "activation": names[fields["hidden_act"]],
            "batch_norm": True,
            # 1 - (1 - x) is not x in binary; eight digits are more than anyone writes.
            "bn_momentum": round(1 - fields["batch_norm_momentum"], 8),
            "trunk": _write_blocks(fields, _TRUNK),
            "head_hic": _write_blocks(fields, _HEAD),
        }
    }


def _read_model(section: dict[str, Any]) -> dict[str, Any]:
    activation = section.pop("activation", "relu")
    if activation not in _ACTIVATIONS:
        raise CheckpointError(f"`activation` must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}.")
    fields: dict[str, Any] = {"hidden_act": _ACTIVATIONS[activation]}
    if "seq_length" in section:
        fields["seq_length"] = section.pop("seq_length")
    if "bn_momentum" in section:
        fields["batch_norm_momentum"] = round(1 - section.pop("bn_momentum"), 8)
    if section:
        raise CheckpointError(f"`params` holds keys that Akita does not have: {', '.join(sorted(section))}.")
    return fields


def _read_blocks(part: str, blocks: list[dict[str, Any]], expected: tuple[_Block, ...]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    waiting = [dict(block) for block in blocks]
    for block in expected:
        found = bool(waiting) and waiting[0].get("name") == block.name
        if block.switch is not None:
            fields[block.switch] = found
        elif not found:
            name = waiting[0].get("name") if waiting else None
            raise CheckpointError(
                f"`{part}` must go on with the block {block.name!r}, got {name!r}; Akita has "
                f"{', '.join(known.name for known in expected)} in this order."
            )
        if found:
            fields |= _read_block(part, waiting.pop(0), block)
    if waiting:
        raise CheckpointError(f"`{part}` holds the block {waiting[0].get('name')!r} after Akita's last one.")
    return fields


def _read_block(part: str, given: dict[str, Any], block: _Block) -> dict[str, Any]:
    given.pop("name")
    values = block.defaults | given
    unknown, missing = sorted(values.keys() - block.keys.keys()), sorted(block.keys.keys() - values.keys())
    if unknown or missing:
        raise CheckpointError(
            f"the block {block.name!r} of `{part}` holds unknown keys {unknown} and lacks {missing}; it takes "
            f"{', '.join(block.keys) or 'none'}."
        )
    return {ours: values[theirs] for theirs, ours in block.keys.items()}


def _write_blocks(fields: dict[str, Any], blocks: tuple[_Block, ...]) -> list[dict[str, Any]]:
    return [
        {"name": block.name} | {theirs: fields[ours] for theirs, ours in block.keys.items()}
        for block in blocks
        if block.switch is None or fields[block.switch]
    ]
