"""IA3: learned scales of keys, values and the feed-forward's hidden units (Liu et al. 2022, arXiv:2205.05638)."""

import re
from collections.abc import Collection
from typing import Any

import torch
from peft import IA3Config, PeftModel
from peft.tuners.ia3 import IA3Layer
from transformers import PreTrainedModel

from genesplice_hf.adaptation.targets import build_config, default_targets, require_matches
from genesplice_hf.errors import GeneSpliceError


def ia3_config(model: PreTrainedModel, **options: Any) -> IA3Config:
    """An `IA3Config` for `model`: targets scale their output, feed-forward targets their input.

    Args:
        model: The model to adapt; it is read, not changed.
        **options: Fields of `peft.IA3Config` (`target_modules`, `feedforward_modules`, `modules_to_save`,
            ...); anything else raises. With own `target_modules`, `feedforward_modules` defaults to none.

    Raises:
        CheckpointError: The targets match no module.
        GeneSpliceError: `feedforward_modules` is not a subset of the targets, an unknown option, or a model
            type without default targets.
    """
    config = build_config(IA3Config, model, _defaults(model, options), options)
    _check_feedforward(require_matches(model, config), config.feedforward_modules)
    return config


def freeze_ia3_parts(model: PeftModel) -> None:
    """Keeps scales at 1 that IA3 does not learn: those of queries, where one module projects queries, keys and values.

    Their gradient is set to zero, so that the adapter stays an ordinary one. The model's config class names them in
    `ia3_frozen_parts`: module name -> (number of equal parts of its outputs, the parts that stay). Weight decay would
    still move them.
    """
    parts = getattr(type(model.get_base_model().config), "ia3_frozen_parts", {})
    for name, module in model.named_modules():
        suffix = name.rpartition(".")[2]
        if suffix in parts and isinstance(module, IA3Layer) and not module.is_feedforward:
            for scale in module.ia3_l.values():
                _freeze_parts(scale, *parts[suffix])


def _freeze_parts(scale: torch.Tensor, num_parts: int, frozen: Collection[int]) -> None:
    """Of the scales (outputs, 1) of one module."""
    if not scale.requires_grad:
        return
    learned = torch.ones(num_parts, 1)
    learned[list(frozen)] = 0

    def mask(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * learned.repeat_interleave(len(gradient) // num_parts, dim=0).to(gradient)

    scale.register_hook(mask)


def _defaults(model: PreTrainedModel, options: dict[str, Any]) -> dict[str, Any]:
    for name in ("target_modules", "feedforward_modules"):
        if options.get(name) is None:
            options.pop(name, None)
    if "target_modules" in options:
        return {"feedforward_modules": []}
    return {
        "target_modules": default_targets(model, "ia3_targets"),
        "feedforward_modules": default_targets(model, "ia3_feedforward"),
    }


def _check_feedforward(names: list[str], feedforward: Collection[str] | str) -> None:
    is_regex = isinstance(feedforward, str)
    patterns = [feedforward] if isinstance(feedforward, str) else sorted(feedforward)
    for pattern in patterns:
        matched = [name for name in names if _matches(pattern, name, is_regex)]
        if not matched:
            raise GeneSpliceError(
                f"`feedforward_modules` must be a subset of the targets: {pattern!r} matches none of them "
                f"({', '.join(names)})."
            )
        # PEFT tests feed-forward names without the dot: "wo" would take "two" for feed-forward as well.
        wrong = [] if is_regex else [name for name in names if name.endswith(pattern) and name not in matched]
        if wrong:
            raise GeneSpliceError(
                f"`feedforward_modules` entry {pattern!r} also ends {', '.join(wrong)}; write more of the name."
            )


def _matches(pattern: str, name: str, is_regex: bool) -> bool:
    if is_regex:
        return re.fullmatch(pattern, name) is not None
    return name == pattern or name.endswith(f".{pattern}")
