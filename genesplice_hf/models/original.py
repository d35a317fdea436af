"""One door for foreign weights: `from_original` makes our model of a reference's config and state dict.

`to_original` is the way back.

What a reference calls its fields and tensors stands in the `conversion_<name>.py` of our model; this file collects
these sources and does what all of them need: it loads strictly, names every fault at once, and keeps a record.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from genesplice_hf.errors import CheckpointError
from genesplice_hf.models.caduceus.conversion_caduceus import SOURCES as CADUCEUS_SOURCES
from genesplice_hf.models.dnabert2.conversion_dnabert2 import SOURCES as DNABERT2_SOURCES
from genesplice_hf.models.hyenadna.conversion_hyenadna import SOURCES as HYENADNA_SOURCES
from genesplice_hf.models.nucleotide_transformer_v2.conversion_nucleotide_transformer_v2 import (
    SOURCES as NUCLEOTIDE_TRANSFORMER_V2_SOURCES,
)
from genesplice_hf.models.performer.conversion_performer import SOURCES as PERFORMER_SOURCES

logger = logging.getLogger(__name__)

# What a config.json says of itself, which is not true of ours; it passes without an effect.
_IDENTITY = {"architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version"}


class OriginalSource(Protocol):
    """What a conversion file declares about one reference.

    Attributes:
        name: the word for it, `source` of `from_original`.
        model_type: of the model it becomes.
        classes: task -> class of ours.
        inputs: options that are tensors which the reference keeps outside its state dict.
    """

    name: str
    model_type: str
    classes: dict[str, type[PreTrainedModel]]
    inputs: tuple[str, ...]

    def task(self, state_dict: dict[str, torch.Tensor]) -> str:
        """What `task="auto"` means for these tensors."""

    def config(self, original: dict[str, Any], options: dict[str, Any]) -> tuple[PreTrainedConfig, set[str]]:
        """Our config with `options` as fields of it, and the names of `original` that were understood."""

    @property
    def tensors(self) -> Callable[..., tuple[dict[str, torch.Tensor], list[str]]]:
        """`tensors(state_dict, config, task, **inputs)`: tensors under our names, and keys without effect on the task.

        Tensors that nobody knows keep their name and are found by the door.
        """

    def original(self, model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The way back."""


_ALL = (
    *CADUCEUS_SOURCES,
    *NUCLEOTIDE_TRANSFORMER_V2_SOURCES,
    *DNABERT2_SOURCES,
    *HYENADNA_SOURCES,
    *PERFORMER_SOURCES,
)
SOURCES: dict[str, OriginalSource] = {source.name: source() for source in _ALL}


def from_original(
    source: str,
    config: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    *,
    task: str = "auto",
    drop: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> PreTrainedModel:
    """Our model with a reference's weights, in evaluation mode.

    Args:
        source: name of the reference, a key of `SOURCES`.
        config: the reference's own config, or its constructor's arguments, under the reference's names.
        state_dict: its tensors under its names; they are copied.
        task: which head is wanted; "auto" = that of the tensors.
        drop: families of tensors with an effect that are left out knowingly, where the source has any.
        dtype: of the parameters.
        **options: fields of our config that override what the reference's says, and tensors that the reference keeps
            outside its state dict (`features` for slim_performer).

    Raises:
        CheckpointError: an unknown source, task or option; a tensor is missing, unexpected or mis-shaped (all are
            listed).
    """
    entry = _entry(source)
    if drop:
        raise CheckpointError(f"`drop`: {source!r} has no families of tensors to drop, got {list(drop)}.")
    task = entry.task(dict(state_dict)) if task == "auto" else task
    if task not in entry.classes:
        raise CheckpointError(
            f"`task` must be auto or one of {', '.join(entry.classes)} for {source!r}, got {task!r}."
        )
    inputs = {name: options.pop(name) for name in entry.inputs if name in options}
    _demand_fields(entry, task, options)
    ours, known = entry.config(dict(config), options)
    tensors, ignored = entry.tensors(dict(state_dict), ours, task, **inputs)
    _record(ours, entry, dict(config), known, ignored)
    model = entry.classes[task](ours).to(dtype)
    _load(model, tensors, source)
    return model.eval()


def to_original(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The reference's config and state dict of a model, under the reference's names; the inverse of `from_original`.

    Raises:
        CheckpointError: no reference has this architecture.
    """
    recorded = (getattr(model.config, "conversion", None) or {}).get("source")
    fitting = [name for name, entry in SOURCES.items() if entry.model_type == model.config.model_type]
    name = recorded if recorded in fitting else next(iter(fitting), None)
    if name is None:
        raise CheckpointError(
            f"no reference has models of type {model.config.model_type!r}; see {', '.join(SOURCES)}."
        )
    config, state_dict = SOURCES[name].original(model)
    return (model.config.upstream_config or {}) | config, state_dict


def _entry(source: str) -> OriginalSource:
    if source not in SOURCES:
        raise CheckpointError(f"`source` must be one of {', '.join(sorted(SOURCES))}, got {source!r}.")
    return SOURCES[source]


def _demand_fields(entry: OriginalSource, task: str, options: dict[str, Any]) -> None:
    fields = entry.classes[task].config_class.__dataclass_fields__
    unknown = sorted(set(options) - set(fields))
    if unknown:
        raise CheckpointError(
            f"unknown options {unknown}; pass fields of {entry.classes[task].config_class.__name__}."
        )


def _record(
    ours: PreTrainedConfig, entry: OriginalSource, original: dict[str, Any], known: set[str], ignored: list[str]
) -> None:
    """Standard keys of transformers pass; others that nobody understood are kept, with one warning."""
    rest = {name: value for name, value in original.items() if name not in known | _IDENTITY}
    standard = {name for name in rest if not callable(getattr(PreTrainedConfig(), name, callable))}
    for name in standard:
        setattr(ours, name, rest[name])
    unknown = {name: value for name, value in rest.items() if name not in standard}
    if unknown:
        logger.warning("%s: config keys without an effect here: %s", entry.name, ", ".join(sorted(unknown)))
        ours.upstream_config = unknown
    ours.conversion = {**(ours.conversion or {}), "source": entry.name, "ignored_keys": ignored}


def _load(model: PreTrainedModel, tensors: dict[str, torch.Tensor], source: str) -> None:
    needed = model.state_dict()
    named = getattr(SOURCES[source], "original_key", str)
    shapes = [
        f"{named(key)} is {tuple(tensors[key].shape)}, needs {tuple(needed[key].shape)}"
        for key in sorted(tensors.keys() & needed.keys())
        if tensors[key].shape != needed[key].shape
    ]
    faults = {
        "missing": sorted(map(named, needed.keys() - tensors.keys())),
        "unexpected": sorted(map(named, tensors.keys() - needed.keys())),
        "mis-shaped": shapes,
    }
    lines = [f"{kind}: {', '.join(keys)}" for kind, keys in faults.items() if keys]
    if lines:
        whose = " (under our names)" if named is str else ""
        raise CheckpointError(
            f"`state_dict` does not fit {type(model).__name__} of {source!r}; {'; '.join(lines)}{whose}. "
            "Check that `config` is the one that these tensors were trained with."
        )
    model.load_state_dict(tensors)
