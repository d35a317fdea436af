"""Save an adapter beside the facts about its base, and load it strictly on a fresh base.

A folder holds PEFT's own `adapter_config.json` and `adapter_model.safetensors` (or `head.safetensors` for a
linear probe) and `adapter_info.json`: what the base was, its weight hash, labels, tokenizer and pooling.
"""

import hashlib
import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from genesplice_hf.adaptation.adapt import adapt, attach, detach
from genesplice_hf.adaptation.freezing import freeze
from genesplice_hf.adaptation.targets import linear_names, task_head_name
from genesplice_hf.errors import CheckpointError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_INFO = "adapter_info.json"
HEAD_WEIGHTS = "head.safetensors"
_FORMAT = 1

Tensors = dict[str, torch.Tensor]


def base_weight_hash(model: PreTrainedModel | PeftModel) -> str:
    """SHA-256 over the base's tensors: names, shapes and values, without adapter and task head.

    Floating-point values are hashed as float32, so that the same bfloat16 file gives the same hash whichever
    of the two types it is loaded in.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_base_tensors(model).items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(_as_bytes(tensor))
    return digest.hexdigest()


def save_adapter(
    model: PreTrainedModel | PeftModel,
    folder: str | os.PathLike,
    *,
    base_model_name: str | None = None,
    base_model_revision: str | None = None,
    tokenizer_name: str | None = None,
    window_bp: int | None = None,
) -> Path:
    """Write the adapter and the task head, nothing of the base.

    Args:
        model: A model from `adapt` with an adapter or as a linear probe.
        folder: Where to write; made if absent, other files in it are left alone.
        base_model_name: Hub id or path of the base; None keeps the name the model was loaded from.
        base_model_revision: Commit or tag of the base.
        tokenizer_name: Hub id or path of the tokenizer.
        window_bp: Length in base pairs of the sequences trained on.

    Returns:
        The folder.

    Raises:
        CheckpointError: A fully fine-tuned model (use `save_pretrained`), an adapter that is merged at the
            moment or not called "default".

    Warns:
        UserWarning: A parameter trains but is not part of the file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        method = _save_peft_files(model, folder, base_model_name, base_model_revision)
    else:
        method = _save_head(model, folder)
    facts = {
        "base_model_name": base_model_name or getattr(model, "name_or_path", None) or None,
        "base_model_revision": base_model_revision,
        "tokenizer_name": tokenizer_name,
        "window_bp": window_bp,
    }
    info = {"format": _FORMAT, "method": method, **facts, **_describe(model)}
    (folder / ADAPTER_INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    return folder


def load_adapter(
    base_model: PreTrainedModel, folder: str | os.PathLike, *, is_trainable: bool = False
) -> PreTrainedModel | PeftModel:
    """Put a saved adapter and its task head on a fresh base; the base is changed in place.

    Args:
        base_model: The same class of model, with the base's weights; its head may hold any values.
        folder: A local folder from `save_adapter`, or any PEFT folder with safetensors.
        is_trainable: True to go on training; False gives a frozen model in eval mode.

    Returns:
        The adapted model. Its config has the adapter's label names.

    Raises:
        CheckpointError: Another model type, class or pooling; missing, unexpected or mis-shaped tensors
            (listed); a missing or corrupt file. `base_model` is then left without an adapter.

    Warns:
        UserWarning: The base's weights are not those the adapter was trained on, or cannot be verified.
    """
    folder = Path(folder)
    if isinstance(base_model, PeftModel):
        raise CheckpointError("`base_model` already carries an adapter; pass the plain base model.")
    info = read_adapter_info(folder)
    _check_base(base_model, info, folder)
    if info is not None and info["method"] == "linear_probe":
        model: PreTrainedModel | PeftModel = _load_head(base_model, folder, is_trainable)
    else:
        model = _load_peft_files(base_model, folder, is_trainable)
    if info is not None and info["id2label"]:
        _restore_labels(base_model, {int(index): label for index, label in info["id2label"].items()})
    return model if is_trainable else model.eval()


def read_adapter_info(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The content of `adapter_info.json`, None for a PEFT folder that was not written by `save_adapter`."""
    path = Path(folder) / ADAPTER_INFO
    if not path.exists():
        return None
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); save the adapter again.") from error
    required = {"format", "method", "base_model_type", "base_model_class", "base_weight_sha256", "pooling", "id2label"}
    missing = sorted(required - set(info))
    if missing or info["format"] != _FORMAT:
        raise CheckpointError(f"{path} must have format {_FORMAT} and all its fields; missing: {missing or 'none'}.")
    return info


def _save_peft_files(model: PeftModel, folder: Path, name: str | None, revision: str | None) -> str:
    if list(model.peft_config) != ["default"]:
        raise CheckpointError(f"`model` must carry one adapter called 'default', it has {list(model.peft_config)}.")
    if any(isinstance(m, BaseTunerLayer) and m.merged for m in model.modules()):
        raise CheckpointError("`model` has its adapter merged at the moment; call `model.unmerge_adapter()` first.")
    config = model.peft_config["default"]
    config.base_model_name_or_path = name or config.base_model_name_or_path
    config.revision = revision or config.revision
    # PEFT also writes a README.md; saved aside, it cannot replace a model card that is already there.
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        model.save_pretrained(aside, save_embedding_layers=False)
        saved = set(load_file(os.path.join(aside, ADAPTER_WEIGHTS)))
        for file in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            os.replace(os.path.join(aside, file), folder / file)
    _warn_unsaved(model, saved)
    return str(config.peft_type.value).lower()


def _save_head(model: PreTrainedModel, folder: Path) -> str:
    head = task_head_name(model)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    outside = [name for name in trainable if name.split(".")[0] != head]
    if head is None or outside:
        raise CheckpointError(
            f"{type(model).__name__} has neither an adapter nor a frozen base ({len(outside)} parameters outside the "
            "head train); write it whole with `model.save_pretrained(folder)`."
        )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _head_tensors(model, head).items()}
    save_file(tensors, folder / HEAD_WEIGHTS, metadata={"format": "pt"})
    return "linear_probe"


def _load_peft_files(base_model: PreTrainedModel, folder: Path, is_trainable: bool) -> PeftModel:
    tensors = _read_tensors(folder / ADAPTER_WEIGHTS)
    config = _read_peft_config(folder)
    config.inference_mode = not is_trainable
    # PEFT warns about, and replaces, a name that differs from the fresh base's.
    name, config.base_model_name_or_path = config.base_model_name_or_path, None
    try:
        model = attach(base_model, config)
    except ValueError as error:
        raise CheckpointError(
            f"The adapter in {folder} does not fit {type(base_model).__name__}: {error} Linear modules of the base: "
            f"{', '.join(linear_names(base_model))}."
        ) from error
    config.base_model_name_or_path = name
    try:
        _check_tensors(get_peft_model_state_dict(model, save_embedding_layers=False), tensors, folder)
    except CheckpointError:
        detach(model)
        raise
    set_peft_model_state_dict(model, tensors)
    return model


def _load_head(base_model: PreTrainedModel, folder: Path, is_trainable: bool) -> PreTrainedModel:
    tensors = _read_tensors(folder / HEAD_WEIGHTS)
    head = task_head_name(base_model)
    expected = _head_tensors(base_model, head) if head else {}
    _check_tensors(expected, tensors, folder)
    base_model.load_state_dict(tensors, strict=False)
    return adapt(base_model, "linear_probe") if is_trainable else freeze(base_model)


def _read_peft_config(folder: Path) -> PeftConfig:
    if not (folder / ADAPTER_CONFIG).exists():
        raise CheckpointError(f"{folder} holds no {ADAPTER_CONFIG}; pass the folder of a saved adapter.")
    return PeftConfig.from_pretrained(str(folder))


def _read_tensors(path: Path) -> Tensors:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; pass the folder of an adapter saved as safetensors.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a valid safetensors file ({error}); copy or save it again.") from error


def _check_base(base_model: PreTrainedModel, info: dict[str, Any] | None, folder: Path) -> None:
    if info is None:
        warnings.warn(
            f"{folder} holds no {ADAPTER_INFO}: it cannot be verified that this is the adapter's base.", stacklevel=3
        )
        return
    ours = _describe_class(base_model)
    wrong = [f"{key} is {ours[key]!r}, the adapter's is {info[key]!r}" for key in ours if ours[key] != info[key]]
    if wrong:
        raise CheckpointError(f"`base_model` is not the base of the adapter in {folder}: {'; '.join(wrong)}.")
    if base_weight_hash(base_model) != info["base_weight_sha256"]:
        warnings.warn(
            f"The weights of `base_model` are not those that the adapter in {folder} was trained on "
            f"({info.get('base_model_name')}); its predictions will differ.",
            stacklevel=3,
        )


def _check_tensors(expected: Tensors, found: Tensors, folder: Path) -> None:
    shared = expected.keys() & found.keys()
    faults = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "mis-shaped": [
            f"{k}: {tuple(found[k].shape)} in the file, {tuple(expected[k].shape)} in the model"
            for k in sorted(shared)
            if expected[k].shape != found[k].shape
        ],
    }
    listed = [f"{kind} ({len(names)}): {', '.join(names)}" for kind, names in faults.items() if names]
    if listed:
        raise CheckpointError(
            f"The tensors in {folder} do not fit the model; {'; '.join(listed)}. Check the base and `num_labels`."
        )


def _describe_class(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "base_model_type": model.config.model_type,
        "base_model_class": type(model).__name__,
        "pooling": getattr(model.config, "classifier_pooling", None),
    }


def _describe(model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    head = task_head_name(base)
    return {
        **_describe_class(base),
        "base_weight_sha256": base_weight_hash(model),
        "head": head,
        "id2label": {str(i): label for i, label in base.config.id2label.items()} if head else None,
        "problem_type": base.config.problem_type if head else None,
    }


def _restore_labels(model: PreTrainedModel, id2label: dict[int, str]) -> None:
    current = model.config.id2label
    defaults = {index: f"LABEL_{index}" for index in current}
    if current not in (id2label, defaults):
        warnings.warn(f"Label names of the base ({current}) are replaced by the adapter's ({id2label}).", stacklevel=3)
    model.config.id2label = id2label
    model.config.label2id = {label: index for index, label in id2label.items()}


def _warn_unsaved(model: PeftModel, saved: set[str]) -> None:
    trainable = (name for name, p in model.named_parameters() if p.requires_grad)
    unsaved = [name for name in trainable if re.sub(r"(\.modules_to_save)?\.default(?=\.|$)", "", name) not in saved]
    if unsaved:
        warnings.warn(
            f"These parameters train but are not in the adapter file: {', '.join(unsaved)}. Name their modules in "
            "`modules_to_save`.",
            stacklevel=4,
        )


def _head_tensors(model: PreTrainedModel, head: str) -> Tensors:
    return {f"{head}.{name}": tensor for name, tensor in model.get_submodule(head).state_dict().items()}


def _base_tensors(model: PreTrainedModel | PeftModel) -> Tensors:
    """The base's tensors under the names they have without an adapter."""
    if not isinstance(model, PeftModel):
        base, prefix = model, None
    else:
        base, prefix = model.get_base_model(), model.base_model.prefix
    head = task_head_name(base)
    tensors = {}
    for name, tensor in base.state_dict().items():
        parts = name.split(".")
        adapted = prefix is not None and any(part.startswith(prefix) for part in parts)
        if not adapted and "modules_to_save" not in parts and parts[0] != head:
            tensors[".".join(p for p in parts if p not in ("base_layer", "original_module"))] = tensor
    return tensors


def _as_bytes(tensor: torch.Tensor) -> memoryview:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.is_floating_point() and tensor.dtype != torch.float64:
        tensor = tensor.to(torch.float32)
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
