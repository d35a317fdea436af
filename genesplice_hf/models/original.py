"""One door for foreign weights: `from_original` makes our model of a reference's config and state dict.

`to_original` is the way back; `from_pretrained` of our classes and of the Auto classes takes folders and Hub ids in
the reference's own layout through the same maps.

What a reference calls its fields and tensors stands in the `conversion_<name>.py` of our model; this file collects
these sources and does what all of them need: it loads strictly, names every fault at once, and keeps a record.
"""

import copy
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from genesplice_hf.errors import CheckpointError, UnknownCheckpointError
from genesplice_hf.layers.strict_loading import ORIGINAL_READERS, Original, load_tensors
from genesplice_hf.layers.transformers_classes import TransformersClasses
from genesplice_hf.models.akita.conversion_akita import SOURCES as AKITA_SOURCES
from genesplice_hf.models.bioformer.conversion_bioformer import SOURCES as BIOFORMER_SOURCES
from genesplice_hf.models.caduceus.conversion_caduceus import SOURCES as CADUCEUS_SOURCES
from genesplice_hf.models.detection import detect_dna_lm
from genesplice_hf.models.dnabert.conversion_dnabert import SOURCES as DNABERT_SOURCES
from genesplice_hf.models.dnabert2.conversion_dnabert2 import SOURCES as DNABERT2_SOURCES
from genesplice_hf.models.enformer.conversion_enformer import SOURCES as ENFORMER_SOURCES
from genesplice_hf.models.gpn.conversion_gpn import SOURCES as GPN_SOURCES
from genesplice_hf.models.gpn_msa.conversion_gpn_msa import SOURCES as GPN_MSA_SOURCES
from genesplice_hf.models.hyenadna.conversion_hyenadna import SOURCES as HYENADNA_SOURCES
from genesplice_hf.models.nucleotide_transformer.conversion_nucleotide_transformer import (
    SOURCES as NUCLEOTIDE_TRANSFORMER_SOURCES,
)
from genesplice_hf.models.nucleotide_transformer_v2.conversion_nucleotide_transformer_v2 import (
    SOURCES as NUCLEOTIDE_TRANSFORMER_V2_SOURCES,
)
from genesplice_hf.models.original_files import HUB_KEYWORDS, find_weights, read_config, read_shapes, read_tensors
from genesplice_hf.models.original_source import (
    OriginalSource,
    adopt_config,
    alias_config_class,
    config_from_original,
    constructor_arguments,
    record_conversion,
)
from genesplice_hf.models.performer.conversion_performer import SOURCES as PERFORMER_SOURCES
from genesplice_hf.models.scgpt.conversion_scgpt import SOURCES as SCGPT_SOURCES
from genesplice_hf.models.tfbind.conversion_tfbind import SOURCES as TFBIND_SOURCES

SOURCES: dict[str, OriginalSource] = {
    source.name: source()
    for source in (
        *PERFORMER_SOURCES,
        *NUCLEOTIDE_TRANSFORMER_SOURCES,
        *NUCLEOTIDE_TRANSFORMER_V2_SOURCES,
        *DNABERT_SOURCES,
        *DNABERT2_SOURCES,
        *GPN_SOURCES,
        *GPN_MSA_SOURCES,
        *HYENADNA_SOURCES,
        *CADUCEUS_SOURCES,
        *ENFORMER_SOURCES,
        *TFBIND_SOURCES,
        *AKITA_SOURCES,
        *SCGPT_SOURCES,
        *BIOFORMER_SOURCES,
    )
}
# Its trunk is an Enformer, whose past the source of Enformer knows.
type(SOURCES["tfbind"]).trunk = SOURCES["enformer"]  # type: ignore[attr-defined]


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
        state_dict: its tensors under its names; they are copied. For JAX checkpoints of nt_v1 also the tree module ->
            parameter -> array.
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
    _demand_families(entry, drop)
    task = entry.task(dict(state_dict)) if task == "auto" else task
    _demand_task(entry, task)
    inputs = {name: options.pop(name) for name in entry.inputs if name in options}
    inputs |= {"drop": tuple(drop)} if drop else {}
    _demand_fields(entry, task, options)
    ours = adopt_config(entry, dict(config), options)
    tensors, ignored = entry.tensors(dict(state_dict), ours, task, **inputs)
    record_conversion(ours, entry, ignored)
    model = entry.classes[task](ours, **constructor_arguments(entry, task, tensors)).to(dtype)
    _load(model, tensors, source)
    return model.eval()


def to_original(model: PreTrainedModel, **options: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The reference's config and state dict of a model, under the reference's names; the inverse of `from_original`.

    Args:
        model: one of ours.
        **options: choices that the source has (`qkv_spelling` of scgpt, `layout` of nt_v1).

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
    config, state_dict = SOURCES[name].original(model, **options)
    return (getattr(model.config, "upstream_config", None) or {}) | config, state_dict


def load_original(
    source: str,
    path: str | PathLike,
    task: str = "auto",
    *,
    hub: Mapping[str, Any] | None = None,
    fields: Mapping[str, Any] | None = None,
    **loading: Any,
) -> PreTrainedModel:
    """Our model with the weights of a folder or Hub repository in a reference's layout, in evaluation mode.

    Unlike `from_original` it allows that a task head which the checkpoint does not hold at all is drawn anew.

    Args:
        source: a key of `SOURCES`.
        path: folder or Hub id.
        task: a key of the source's `classes`; "auto" = the head that the weights hold.
        hub: `HUB_KEYWORDS` with their values.
        fields: fields of our config that override what the reference's says (`num_labels`, `layer_norm_eps`, ...).
        **loading: keyword arguments of `from_pretrained` (`dtype`, `device_map`, `attn_implementation`, ...).

    Raises:
        CheckpointError: an unknown source or task, no weights, a tensor that is missing, unexpected or mis-shaped.
    """
    entry, hub = _entry(source), dict(hub or {})
    original = read_config(path, hub)
    if original is None:
        raise CheckpointError(f"`{path}` holds no config.json, by which its weights could be understood.")
    config, unused = config_from_original(entry, original, dict(fields or {}))
    if unused:
        raise CheckpointError(f"unknown options {sorted(unused)}; pass fields of {type(config).__name__}.")
    files = find_weights(path, hub)
    if not files:
        raise CheckpointError(f"`{path}` holds no weights: no model.safetensors and no pytorch_model.bin.")
    tensors = read_tensors(files)
    task = entry.task(dict(tensors)) if task == "auto" else task
    _demand_task(entry, task)
    found = _convert(entry, task, tensors, config, {})
    return load_tensors(entry.classes[task], found, str(path), **loading)


def register_source(entry: OriginalSource) -> None:
    """Makes `from_pretrained` of the source's classes, and of the Auto classes, read the reference's own layout.

    Auto classes need one of its `original_types` in config.json. Sources whose classes are transformers' own are left
    to transformers.

    Raises:
        ValueError: transformers or another source has taken one of its `original_types`.
    """
    # Told by its kind, for a look at the classes would import them.
    if not isinstance(entry.classes, TransformersClasses):
        ORIGINAL_READERS[entry.model_type] = read_original
    for original_type in entry.original_types:
        AutoConfig.register(original_type, alias_config_class(entry, original_type))


def read_original(
    model_class: type[PreTrainedModel], path: str | PathLike, keywords: dict[str, Any]
) -> tuple[Original, dict[str, Any]] | None:
    """What `model_class` can load of a checkpoint in a reference's layout.

    Args:
        model_class: one of our classes.
        path: folder or Hub id.
        keywords: keyword arguments of `from_pretrained`; they are not changed.

    Returns:
        (config, tensors and arguments of the class; the keyword arguments that are left over), or None where the
        checkpoint is no original of this model.
    """
    keywords = dict(keywords)
    hub = {name: keywords.pop(name) for name in HUB_KEYWORDS if name in keywords}
    kind = {name: keywords.pop(name, None) for name in ("variant", "use_safetensors")}
    original = read_config(path, hub)
    if original is None or original.get("model_type") == model_class.config_class.model_type:
        return None
    files = find_weights(path, hub, **kind)
    entry = _claimant(model_class.config_class.model_type, original, files) if files else None
    if entry is None:
        return None
    config = copy.deepcopy(keywords.pop("config", None))
    kept = {name: keywords.pop(name) for name in _KEPT if name in keywords}
    inputs = {name: keywords.pop(name) for name in entry.inputs if name in keywords}
    if not isinstance(config, PreTrainedConfig):
        config, keywords = config_from_original(entry, original, keywords)
    task = next((name for name, known in entry.classes.items() if issubclass(model_class, known)), "base")
    return _convert(entry, task, read_tensors(files), config, inputs), keywords | kept


# Keyword arguments of `from_pretrained` that look like fields of a config and are none here.
_KEPT = ("attn_implementation", "dtype", "torch_dtype")


def _claimant(model_type: str, original: dict[str, Any], files: list[str]) -> OriginalSource | None:
    """The source of our `model_type` that the checkpoint belongs to."""
    candidates = [entry for entry in SOURCES.values() if entry.model_type == model_type]
    named = [entry for entry in candidates if original.get("model_type") in entry.original_types]
    try:
        source = detect_dna_lm(original, read_shapes(files))
    except UnknownCheckpointError:
        return next(iter(named), None)
    return next((entry for entry in candidates if entry.name == source), next(iter(named), None))


def _convert(
    entry: OriginalSource,
    task: str,
    tensors: dict[str, torch.Tensor],
    config: PreTrainedConfig,
    inputs: dict[str, Any],
) -> Original:
    held = entry.task(dict(tensors))
    wanted = task if task == held or _has_head(entry, task, held, tensors, config, inputs) else "base"
    found, ignored = entry.tensors(tensors, config, wanted, **inputs)
    record_conversion(config, entry, ignored)
    # Whose head the file holds: what another class lacks of it is new, not lost.
    config.architectures = [entry.classes[held].__name__]
    return Original(config, found, constructor_arguments(entry, task, found))


def _has_head(
    entry: OriginalSource,
    task: str,
    held: str,
    tensors: dict[str, torch.Tensor],
    config: PreTrainedConfig,
    inputs: dict[str, Any],
) -> bool:
    """Whether the tensors can be converted for another task than the one whose head they hold.

    A source may refuse where that head is missing; a part of it, beside the head that is whole, stays an error.
    """
    try:
        entry.tensors(dict(tensors), copy.deepcopy(config), task, **inputs)
    except CheckpointError:
        _, others = entry.tensors(dict(tensors), copy.deepcopy(config), held, **inputs)
        if entry.task({key: tensors[key] for key in others}) != "base":
            raise
        return False
    return True


def _demand_task(entry: OriginalSource, task: str) -> None:
    if task not in entry.classes:
        raise CheckpointError(
            f"`task` must be auto or one of {', '.join(entry.classes)} for {entry.name!r}, got {task!r}."
        )


def _entry(source: str) -> OriginalSource:
    if source not in SOURCES:
        raise CheckpointError(f"`source` must be one of {', '.join(sorted(SOURCES))}, got {source!r}.")
    return SOURCES[source]


def _demand_families(entry: OriginalSource, drop: Sequence[str]) -> None:
    families = getattr(entry, "families", ())
    unknown = sorted(set(drop) - set(families))
    if unknown:
        has = f"only {', '.join(families)}" if families else "no families of tensors"
        raise CheckpointError(f"`drop`: {entry.name!r} has {has} to drop, got {unknown}.")


def _demand_fields(entry: OriginalSource, task: str, options: dict[str, Any]) -> None:
    fields = entry.classes[task].config_class.__dataclass_fields__
    unknown = sorted(set(options) - set(fields))
    if unknown:
        raise CheckpointError(
            f"unknown options {unknown}; pass fields of {entry.classes[task].config_class.__name__}."
        )


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


for _source in SOURCES.values():
    register_source(_source)
