"""What a conversion file declares about one reference, and our config that comes of the reference's."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from genesplice_hf.version import __version__

logger = logging.getLogger(__name__)

# What a config.json says of itself, which is not true of ours; it passes without an effect.
_IDENTITY = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "model_type",
    "torch_dtype",
    "transformers_version",
}
# The records that a conversion leaves in a config.
_RECORDS = {"conversion", "upstream_config"}


class OriginalSource(Protocol):
    """What a conversion file declares about one reference.

    Attributes:
        name: the word for it, `source` of `from_original`.
        model_type: of the model it becomes.
        inputs: options that are tensors which the reference keeps outside its state dict.
        original_types: `model_type`s of the reference's config.json files that transformers has not taken.

    A source may also have `families`, names of tensors with an effect that `drop` may name (`tensors` then takes
    `drop`), and `arguments(task, tensors) -> dict`: arguments of the class beside its config, which depend
    on the converted tensors (a pooler that a checkpoint has or has not).
    """

    name: str
    model_type: str
    inputs: tuple[str, ...]
    original_types: tuple[str, ...]

    @property
    def classes(self) -> Mapping[str, type[PreTrainedModel]]:
        """task -> class of ours."""

    def task(self, state_dict: dict[str, torch.Tensor]) -> str:
        """What `task="auto"` means for these tensors; only names and shapes are looked at."""

    def config(self, original: dict[str, Any], options: dict[str, Any]) -> tuple[PreTrainedConfig, set[str]]:
        """Our config with `options` as fields of it, and the names of `original` that were understood."""

    @property
    def tensors(self) -> Callable[..., tuple[dict[str, torch.Tensor], list[str]]]:
        """`tensors(state_dict, config, task, **inputs)`: tensors under our names, and keys without effect on the task.

        Tensors that nobody knows keep their name and are found by the door.
        """

    @property
    def original(self) -> Callable[..., tuple[dict[str, Any], dict[str, torch.Tensor]]]:
        """The way back: `original(model)`, with choices of the source as keyword arguments."""


def constructor_arguments(entry: OriginalSource, task: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the class for `task` takes beside its config."""
    arguments = getattr(entry, "arguments", None)
    return {} if arguments is None else arguments(task, tensors)


def adopt_config(entry: OriginalSource, original: dict[str, Any], options: dict[str, Any]) -> PreTrainedConfig:
    """Our config of a reference's, with `options` as fields of it.

    Standard keys of transformers pass; others that nobody understood are kept in `upstream_config`, with one warning.
    """
    original = {name: value for name, value in original.items() if name not in _RECORDS}
    ours, known = entry.config(dict(original), dict(options))
    rest = {name: value for name, value in original.items() if name not in known | _IDENTITY}
    standard = {name for name in rest if not callable(getattr(PreTrainedConfig(), name, callable))}
    for name in standard - set(options):
        setattr(ours, name, _with_whole_keys(rest[name]) if name == "id2label" else rest[name])
    unknown = {name: value for name, value in rest.items() if name not in standard}
    if unknown:
        logger.warning("%s: config keys without an effect here: %s", entry.name, ", ".join(sorted(unknown)))
        ours.upstream_config = unknown
    return ours


def record_conversion(config: PreTrainedConfig, entry: OriginalSource, ignored: list[str]) -> None:
    """Writes into the config where its weights come from and which tensors had no effect."""
    record = {"source": entry.name, "converter_version": __version__, "ignored_keys": ignored}
    config.conversion = {**(getattr(config, "conversion", None) or {}), **record}


def _with_whole_keys(labels: dict[Any, str]) -> dict[int, str]:
    # JSON has no other keys than text.
    return {int(index): label for index, label in labels.items()}


def alias_config_class(entry: OriginalSource, original_type: str) -> type[PreTrainedConfig]:
    """A config class of a reference's `model_type` which, read from its config.json, gives a config of ours."""

    def from_dict(cls: type[PreTrainedConfig], config_dict: dict[str, Any], **kwargs: Any) -> Any:
        unused_too = kwargs.pop("return_unused_kwargs", False)
        config, unused = config_from_original(entry, config_dict, kwargs)
        return (config, unused) if unused_too else config

    name = f"{original_type.title().replace('_', '')}Alias"
    return type(name, (PreTrainedConfig,), {"model_type": original_type, "from_dict": classmethod(from_dict)})


def config_from_original(
    entry: OriginalSource, original: dict[str, Any], keywords: dict[str, Any]
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """Our config and the keyword arguments of `from_pretrained` that are no fields of it."""
    keywords = dict(keywords)
    for name in ("_from_auto", "_from_pipeline", "torch_dtype", "dtype"):
        value = keywords.pop(name, None)
        if name.endswith("dtype") and value not in (None, "auto"):
            keywords["dtype"] = value
    fields = entry.classes["base"].config_class.__dataclass_fields__
    config = adopt_config(entry, original, {name: keywords.pop(name) for name in list(keywords) if name in fields})
    if "attn_implementation" in keywords:
        config._attn_implementation = keywords.pop("attn_implementation")
    for name in [name for name in keywords if hasattr(config, name)]:
        setattr(config, name, keywords.pop(name))
    return config, keywords
