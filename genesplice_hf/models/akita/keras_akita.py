"""Files of Keras weights, read and written without TensorFlow: HDF5 (`model_best.h5`) and `.npz`.

HDF5 needs h5py (``pip install genesplice-hf[tracks]``). Names are Keras' own, `conv1d_3/kernel:0`, in the order in
which the network uses the layers.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genesplice_hf.errors import CheckpointError

_HDF5_MAGIC, _ZIP_MAGIC = b"\x89HDF\r\n\x1a\n", b"PK"


def read_keras_weights(path: str | PathLike) -> dict[str, np.ndarray]:
    """Every array of a Keras file by its name, layers in forward order.

    Args:
        path: an HDF5 file of a whole model or of weights, or an `.npz` of {name: array}; told by its content.

    Raises:
        CheckpointError: another format, a Keras file of version 3, or h5py is not installed.
    """
    file = Path(path)
    with file.open("rb") as stream:
        head = stream.read(8)
    if head.startswith(_ZIP_MAGIC):
        with np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    if head != _HDF5_MAGIC:
        raise CheckpointError(f"`path` must be an HDF5 or npz file, but {file} begins with {head!r}.")
    with _h5py().File(file, "r") as opened:
        return dict(_arrays(opened, file))


def write_keras_weights(path: str | PathLike, arrays: Mapping[str, Any]) -> None:
    """Writes {Keras name: array} as an HDF5 file of weights, or as an `.npz` by the suffix.

    Raises:
        CheckpointError: h5py is not installed, or a name has no layer before its `/`.
    """
    file = Path(path)
    plain = {name: array.numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
             for name, array in arrays.items()}  # fmt: skip
    if file.suffix == ".npz":
        np.savez(file, **plain)  # type: ignore[arg-type]
        return
    layers: dict[str, list[str]] = {}
    for name in plain:
        layers.setdefault(layer_of(name), []).append(name)
    with _h5py().File(file, "w") as opened:
        opened.attrs["layer_names"] = [layer.encode() for layer in layers]
        for layer, names in layers.items():
            group = opened.create_group(layer)
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name in names:
                group.create_dataset(name, data=plain[name])


def layer_of(name: str) -> str:
    """The layer of a weight: `conv1d_3` of `conv1d_3/kernel:0`.

    Raises:
        CheckpointError: the name has no layer.
    """
    layer, _, weight = name.rpartition("/")
    if not layer or not weight:
        raise CheckpointError(f"`{name}` is no name of a Keras weight; they look like `conv1d_3/kernel:0`.")
    return layer


def weight_of(name: str) -> str:
    """The weight's name in its layer: `kernel` of `conv1d_3/kernel:0`."""
    return name.rpartition("/")[2].partition(":")[0]


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise CheckpointError(
            "HDF5 files need h5py, which is not installed: pip install 'genesplice-hf[tracks]'; or convert it "
            "to an .npz of {name: array} where it is."
        ) from error
    return h5py


def _arrays(opened: Any, file: Path) -> Iterator[tuple[str, np.ndarray]]:
    group = opened.get("model_weights", opened)
    if "layer_names" not in group.attrs:
        raise CheckpointError(
            f"{file} has no attribute `layer_names`: it is no Keras 2 file of a model or of weights. Load it with the "
            "Keras that wrote it and save it as .h5, or pass {name: array} to `from_original`."
        )
    for layer in _in_forward_order(_texts(group.attrs["layer_names"]), opened.attrs.get("model_config")):
        for name in _texts(group[layer].attrs["weight_names"]):
            yield name, np.asarray(group[layer][name])


def _texts(values: Sequence[Any]) -> list[str]:
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


def _in_forward_order(layers: list[str], model_config: Any) -> list[str]:
    """The layers by their distance from the input, where the file says what feeds what; else as they are."""
    if model_config is None:
        return layers
    described = json.loads(model_config)["config"].get("layers", [])
    known = {_name(layer) for layer in described}
    feeds = {_name(layer): set(_inbound(layer.get("inbound_nodes", []), known)) for layer in described}
    depths: dict[str, int] = {}
    waiting = [name for name in feeds if name in layers]
    while waiting:
        name = waiting[-1]
        missing = [source for source in feeds.get(name, ()) if source not in depths]
        if missing:
            waiting += missing
            continue
        depths[name] = 1 + max((depths[source] for source in feeds.get(name, ())), default=0)
        waiting.pop()
    return sorted(layers, key=lambda name: depths.get(name, 0))


def _name(layer: dict[str, Any]) -> str:
    return layer.get("name") or layer["config"]["name"]


def _inbound(node: Any, known: set[str]) -> Iterator[str]:
    """Names of layers in a description of inbound nodes: `[name, node, tensor, ...]`, however deep it stands."""
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, list):
        if len(node) > 2 and isinstance(node[0], str) and node[0] in known and isinstance(node[1], int):
            yield node[0]
        for item in node:
            yield from _inbound(item, known)
