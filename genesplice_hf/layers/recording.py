"""What a forward call may be asked to record."""

from typing import Any

from transformers import PreTrainedConfig


def demand_recordable(config: PreTrainedConfig, kwargs: dict[str, Any]) -> bool:
    """Whether attention weights are wanted.

    Raises:
        ValueError: they are, of another implementation than eager.
    """
    wanted = bool(kwargs.get("output_attentions", getattr(config, "output_attentions", False)))
    name = config._attn_implementation
    if wanted and name not in (None, "eager"):
        raise ValueError(
            f"`output_attentions` needs the eager implementation, not `{name}`, which keeps no weights; call "
            "model.set_attn_implementation('eager') first."
        )
    return wanted
