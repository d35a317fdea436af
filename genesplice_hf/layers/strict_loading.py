"""Loading that never drops a tensor in silence: the base class of every model of the package.

transformers loads leniently: a missing tensor is drawn at random, an unexpected one is dropped, and a report
is printed. Here the same report becomes an error that lists the tensors, except for one case that users mean:
a checkpoint of another class of the same model (`architectures` in config.json), whose head this class does
not have, or whose checkpoint lacks this class's whole head.
"""

import logging
from collections.abc import Callable
from os import PathLike
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from genesplice_hf.errors import CheckpointError

logger = logging.getLogger(__name__)

_MAX_LISTED = 20


class Original(NamedTuple):
    """A foreign checkpoint under our names.

    Attributes:
        config: ours; its `architectures` names the class whose head the tensors hold.
        tensors: under the names of the class that is to be loaded, without other heads.
        arguments: of that class's constructor beside the config.
    """

    config: PreTrainedConfig
    tensors: dict[str, torch.Tensor]
    arguments: dict[str, Any]


# `model_type` of ours -> `read(model_class, path, keywords)`: a checkpoint in the layout of another implementation and
# the keyword arguments left over, None where it is in ours. Filled by the door for foreign weights, which lies above
# this room; empty in published code.
ORIGINAL_READERS: dict[str, Callable[..., tuple[Original, dict[str, Any]] | None]] = {}

# Done once, when the first model is built; emptied then. What costs import time and no one needs without a model.
BEFORE_FIRST_MODEL: list[Callable[[], None]] = []


class StrictPreTrainedModel(PreTrainedModel):
    """`PreTrainedModel` whose `from_pretrained` raises `CheckpointError` when weights do not fit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        while BEFORE_FIRST_MODEL:
            BEFORE_FIRST_MODEL.pop()()
        super().__init__(*args, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | PathLike | None,
        *model_args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Loads as transformers does, then refuses missing, unexpected and mis-shaped tensors.

        Checkpoints in the layout of the original implementation are converted on the way where a reader is known.

        Args:
            pretrained_model_name_or_path: Hub id or folder; None with `state_dict=` in the keyword arguments.
            output_loading_info: also return transformers' report.
            ignore_mismatched_sizes: allows mis-shaped tensors outside the base model (a head with another
                number of labels is then drawn anew); never inside it.
            **kwargs: as `PreTrainedModel.from_pretrained`.

        Raises:
            CheckpointError: a tensor is missing, unexpected, mis-shaped or unreadable; all are listed.
        """
        read = ORIGINAL_READERS.get(getattr(cls.config_class, "model_type", ""))
        if read is not None and pretrained_model_name_or_path is not None and not kwargs.get("gguf_file"):
            found = read(cls, pretrained_model_name_or_path, kwargs)
            if found is not None:
                options = {"output_loading_info": output_loading_info} | found[1]
                options["ignore_mismatched_sizes"] = ignore_mismatched_sizes
                return load_tensors(cls, found[0], str(pretrained_model_name_or_path), *model_args, **options)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kwargs,
            )
        except SafetensorError as error:
            raise CheckpointError(
                f"the weights of `{pretrained_model_name_or_path}` cannot be read ({error}); "
                "the file is cut short or damaged: download or save it again."
            ) from error
        complaint = _misfits(model, info, ignore_mismatched_sizes, str(pretrained_model_name_or_path))
        if complaint is not None:
            raise complaint
        return (model, info) if output_loading_info else model


def load_tensors(
    model_class: type[PreTrainedModel],
    original: Original,
    name: str,
    *model_args: Any,
    output_loading_info: bool = False,
    ignore_mismatched_sizes: bool = False,
    strict: bool = True,
    adapter_kwargs: dict[str, Any] | None = None,
    **loading: Any,
) -> Any:
    """A model of `model_class`, ours or transformers', with converted tensors, as strictly as from a file.

    Args:
        model_class: what to make.
        original: its config and tensors.
        name: folder or Hub id that they came from, for messages and for adapters that look for their base.
        *model_args: positional arguments of the class after the config.
        output_loading_info, ignore_mismatched_sizes: as `StrictPreTrainedModel.from_pretrained`.
        strict: False makes a warning of misfits; mis-shaped tensors are then drawn anew.
        adapter_kwargs: what the Auto classes found out about an adapter that is to be put on the model.
        **loading: as `PreTrainedModel.from_pretrained`.

    Raises:
        CheckpointError: a tensor is missing, unexpected or mis-shaped; all are listed.
    """
    load = PreTrainedModel.from_pretrained.__func__
    model, info = load(
        model_class,
        None,
        *model_args,
        config=original.config,
        state_dict=original.tensors,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **original.arguments,
        **loading,
    )
    # Other heads are gone already, so nothing is left that could be excused as one.
    complaint = _misfits(model, info, ignore_mismatched_sizes, name, excuse_unexpected=False)
    if complaint is not None and strict:
        raise complaint
    if complaint is not None:
        logger.warning("%s", complaint)
    model.name_or_path = model.config.name_or_path = name
    adapter = dict(adapter_kwargs or {})
    if "_adapter_model_path" in adapter:
        model.load_adapter(adapter.pop("_adapter_model_path"), adapter_kwargs=adapter)
    return (model, info) if output_loading_info else model


def _misfits(
    model: PreTrainedModel, info: dict, allow_head_shapes: bool, source: str, excuse_unexpected: bool = True
) -> CheckpointError | None:
    unexpected = info["unexpected_keys"]
    faults = {
        "missing": _unexcused(model, info["missing_keys"], own=True),
        "unexpected": _unexcused(model, unexpected, own=False) if excuse_unexpected else sorted(unexpected),
        "mis-shaped": sorted(
            f"{key} is {tuple(found)}, needs {tuple(needed)}"
            for key, found, needed in info["mismatched_keys"]
            if not (allow_head_shapes and not _in_base(model, key))
        ),
    }
    lines = [f"{kind}: {_shorten(keys)}" for kind, keys in faults.items() if keys]
    if not lines:
        return None
    return CheckpointError(
        f"`{source}` does not fit {type(model).__name__}; nothing is used of it. " + "; ".join(lines) + ". "
        "Load it with the class that saved it, or convert it first; for a head with another number of "
        "labels pass `ignore_mismatched_sizes=True`."
    )


def _unexcused(model: PreTrainedModel, keys: set[str], own: bool) -> list[str]:
    """The keys that are not an excusable head: outside the base model, of another class, and whole."""
    if not _saved_by_other_class(model) or (not own and _saved_by_base(model)):
        return sorted(keys)
    bad = {key for key in keys if _in_base(model, key)}
    partial_head = own and bool(keys - bad) and not _head_keys(model) <= keys
    return sorted(keys if partial_head else bad)


def _head_keys(model: PreTrainedModel) -> set[str]:
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {key for key in model.state_dict() if not _in_base(model, key)} - tied


def _saved_by_other_class(model: PreTrainedModel) -> bool:
    return type(model).__name__ not in (model.config.architectures or [])


def _saved_by_base(model: PreTrainedModel) -> bool:
    """The base model has no head that could be left over."""
    base = getattr(model, model.base_model_prefix, model)
    return type(base).__name__ in (model.config.architectures or [])


def _in_base(model: PreTrainedModel, key: str) -> bool:
    """Whether a key belongs to the base model; a base model's own file has no prefix before its keys."""
    first = key.split(".")[0]
    if first == model.base_model_prefix:
        return True
    base = getattr(model, model.base_model_prefix, model)
    # `hasattr`, for a part that this config leaves out (an empty list of blocks, None) is the base's as well.
    return hasattr(base, first) and (base is model or not hasattr(model, first))


def _shorten(keys: list[str]) -> str:
    more = f" and {len(keys) - _MAX_LISTED} more" if len(keys) > _MAX_LISTED else ""
    return ", ".join(keys[:_MAX_LISTED]) + more
