"""Checks that configs share."""

import difflib
import logging
from collections.abc import Iterable

from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

# Keys that transformers takes out of the keyword arguments, or writes into config.json by itself (its Trainer
# `use_cache`); and what `heads.pretraining.EncoderForPreTraining` writes into a copy of any config.
_OF_TRANSFORMERS = {
    "attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path", "per_layer_config",
    "pretraining_options", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


def warn_unknown_fields(config_class: type, names: Iterable[str]) -> None:
    """Warns of keys that neither this config nor transformers knows; a typo would otherwise be kept silently."""
    known = [name for name in dir(config_class) if not name.startswith("_")]
    known += list(getattr(PreTrainedConfig, "__dataclass_fields__", {}))
    for name in names:
        if name in known or name in _OF_TRANSFORMERS or name.startswith("_"):
            continue
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean `{close[0]}`?" if close else ""
        logger.warning("%s does not know `%s`, it has no effect%s", config_class.__name__, name, hint)
