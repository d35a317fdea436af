"""Reads the files of an original checkpoint, from a folder or a Hub repository: config, headers, weights.

Pickled weights (`pytorch_model.bin`, `weights.ckpt`) are read here and nowhere else, as tensors only.
"""

import hashlib
import json
import pickle
import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers.utils.hub import cached_file

from genesplice_hf.errors import CheckpointError

# The keyword arguments of `from_pretrained` that say where files come from.
HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_SAFE = ("model.safetensors", "model.safetensors.index.json")
# `weights.ckpt` is the file of a training run of PyTorch Lightning (HyenaDNA), `best_model.pt` that of scGPT.
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "weights.ckpt", "best_model.pt")


def find_file(path: str | PathLike, name: str, hub: Mapping[str, Any]) -> str | None:
    """Where the file `name` of a folder or repository lies on this machine, None where it has no such file."""
    given = {key: value for key, value in hub.items() if value is not None}
    return cached_file(str(path), name, _raise_exceptions_for_missing_entries=False, **given)


def read_config(path: str | PathLike, hub: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config.json of a folder or repository, or scGPT's args.json and vocab.json; None where it has neither."""
    file = find_file(path, "config.json", hub)
    if file is not None:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    arguments, vocabulary = (find_file(path, name, hub) for name in ("args.json", "vocab.json"))
    if arguments is None or vocabulary is None:
        return None
    config = json.loads(Path(arguments).read_text(encoding="utf-8"))
    return config | {"model_type": "scgpt", "vocab": json.loads(Path(vocabulary).read_text(encoding="utf-8"))}


def find_weights(
    path: str | PathLike, hub: Mapping[str, Any], variant: str | None = None, use_safetensors: bool | None = None
) -> list[str]:
    """The weight files of a folder or repository, all shards; safetensors before pickled ones.

    Args:
        path: folder or Hub id.
        hub: `HUB_KEYWORDS` with their values.
        variant: `fp16` for `model.fp16.safetensors` and so on.
        use_safetensors: True or False to accept only one kind.

    Returns:
        Their paths on this machine, none where there are no weights.

    Raises:
        CheckpointError: a shard is missing.
    """
    names = (*(() if use_safetensors is False else _SAFE), *(() if use_safetensors else _PICKLED))
    for name in names:
        file = find_file(path, _with_variant(name, variant), hub)
        if file is not None:
            return _shards(path, file, hub) if name.endswith(".index.json") else [file]
    return []


def read_shapes(files: list[str]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor; of safetensors only the header is read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        if file.endswith(".safetensors"):
            shapes |= _header(file)
        else:
            shapes |= {key: tuple(tensor.shape) for key, tensor in _unpickle(file, device="meta").items()}
    return shapes


def read_tensors(files: list[str]) -> dict[str, torch.Tensor]:
    """All tensors of the files on the CPU, under the names in the files.

    Raises:
        CheckpointError: a file is cut short or damaged, or is no dict of tensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= _load_safe(file) if file.endswith(".safetensors") else _unpickle(file, device="cpu")
    return tensors


def sha256(file: str | PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _with_variant(name: str, variant: str | None) -> str:
    if variant is None:
        return name
    stem, _, suffix = name.partition(".")
    if suffix.endswith(".index.json"):
        return f"{stem}.{suffix.removesuffix('.index.json')}.index.{variant}.json"
    return f"{stem}.{variant}.{suffix}"


def _shards(path: str | PathLike, index: str, hub: Mapping[str, Any]) -> list[str]:
    names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    found = {name: find_file(path, name, hub) for name in names}
    absent = [name for name, file in found.items() if file is None]
    if absent:
        raise CheckpointError(
            f"`{path}` lacks {', '.join(absent)}, which {Path(index).name} names; download it again."
        )
    return [str(file) for file in found.values()]


def _header(file: str) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _damaged(file, error) from error


def _load_safe(file: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise _damaged(file, error) from error


def _unpickle(file: str, device: str) -> dict[str, torch.Tensor]:
    try:
        # Files older than torch 1.6 are no zip archives and cannot be mapped into memory.
        found = torch.load(file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise _damaged(file, error) from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise CheckpointError(
            f"`{file}` holds no dict of tensors, nor one under `state_dict`; pass its tensors to `from_original`."
        )
    return dict(found)


def _damaged(file: str, error: Exception) -> CheckpointError:
    # torch's text goes on to recommend loading whatever the file holds.
    said = str(error).splitlines() or [type(error).__name__]
    reason = next((line.strip() for line in said if "Unsupported" in line), said[0]).partition(". Please")[0]
    return CheckpointError(
        f"the weights in `{file}` cannot be read ({reason}); the file is cut short, damaged or holds more than "
        "tensors: download it again, or pass its tensors to `from_original`."
    )
