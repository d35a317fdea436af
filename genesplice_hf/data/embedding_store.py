"""Arrays by content, on disk: safetensors shards and a JSON index that says which encoder made them.

Keys are SHA-256 of what was encoded, so a changed text or sequence never finds an old array; the index holds
the identity of the encoder, so that the arrays of one encoder are never handed out as those of another.
Shapes: R rows of one entry (residues, or 1 for a pooled text), P width.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from genesplice_hf.errors import DataError

INDEX_NAME = "index.json"
_TENSOR = "states"


@dataclass(frozen=True)
class EncoderIdentity:
    """Which encoder, which weights and which of its states: all that decides an array besides the input.

    Attributes:
        name: Hub id or folder of the encoder.
        revision: branch, tag or commit; the SHA-256 of the weights for a local one.
        layer: index of the hidden state.
        pooling: how tokens became rows; `"none"` keeps one row per residue.
        max_length: tokens at which the input was cut or windowed; None: never.
        dtype: in which the arrays are stored, `"float16"` or `"float32"`.
    """

    name: str
    revision: str = ""
    layer: int = -1
    pooling: str = "none"
    max_length: int | None = None
    dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.dtype not in ("float16", "float32"):
            raise DataError(f"`dtype` must be 'float16' or 'float32', was {self.dtype!r}.")


def content_key(content: str) -> str:
    """SHA-256 of a text or sequence in hexadecimal digits."""
    return hashlib.sha256(content.encode("utf-8")).hexdigest()


def write_embeddings(
    folder: str | PathLike[str],
    identity: EncoderIdentity,
    entries: Iterable[tuple[str, np.ndarray]],
    shard_bytes: int = 1 << 28,
) -> int:
    """Adds `(content, array (R, P))` pairs to a folder; contents that it holds already are skipped.

    A shard is written whole before the index names it, so an interrupted run loses its last shard at most.

    Args:
        folder: new, or written with the same `identity`.
        identity: of the encoder that made the arrays.
        entries: contents and their arrays, all of one width.
        shard_bytes: size at which a shard is closed.

    Returns:
        How many entries were added.

    Raises:
        DataError: the folder belongs to another encoder; widths differ; an array is not finite in its dtype.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    index = _read_index(folder) if (folder / INDEX_NAME).is_file() else _new_index(identity)
    _check_identity(folder, index, identity)
    added, waiting, size = 0, dict[str, np.ndarray](), 0
    for content, array in entries:
        key = content_key(content)
        if key in index["entries"] or key in waiting:
            continue
        waiting[key] = _checked(array, identity.dtype, index)
        size, added = size + waiting[key].nbytes, added + 1
        if size >= shard_bytes:
            _write_shard(folder, index, waiting)
            waiting, size = {}, 0
    _write_shard(folder, index, waiting)
    return added


class EmbeddingStore:
    """Reads arrays back by content; files are opened where they are needed, in each process anew.

    Args:
        folder: what `write_embeddings` wrote.
        identity: the encoder that the caller counts on; None takes any and leaves the check to the caller.

    Raises:
        DataError: no index there, or the arrays come from another encoder.
    """

    def __init__(self, folder: str | PathLike[str], identity: EncoderIdentity | None = None) -> None:
        self.folder = Path(folder).expanduser()
        if not (self.folder / INDEX_NAME).is_file():
            raise DataError(f"`folder` must hold {INDEX_NAME} of stored embeddings, but {self.folder} has none.")
        self._index = _read_index(self.folder)
        self.identity = EncoderIdentity(**self._index["identity"])
        if identity is not None:
            _check_identity(self.folder, self._index, identity)
        self._open: dict[tuple[int, str], Any] = {}

    @property
    def width(self) -> int:
        """P."""
        return self._index["width"]

    def __len__(self) -> int:
        return len(self._index["entries"])

    def __contains__(self, content: object) -> bool:
        return isinstance(content, str) and content_key(content) in self._index["entries"]

    def __getitem__(self, content: str) -> np.ndarray:
        """The array `(R, P)` of a text or sequence.

        Raises:
            DataError: it was not encoded.
        """
        try:
            shard, offset, length = self._index["entries"][content_key(content)]
        except KeyError as error:
            start = content if len(content) <= 30 else f"{content[:30]}..."
            raise DataError(
                f"{self.folder} holds no embedding of {start!r}; encode it with the same encoder."
            ) from error
        return self._slices(shard)[offset : offset + length]

    def _slices(self, shard: str) -> Any:
        key = (os.getpid(), shard)
        if key not in self._open:
            self._open[key] = safe_open(self.folder / shard, framework="np").get_slice(_TENSOR)
        return self._open[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._index["entries"])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}


def _new_index(identity: EncoderIdentity) -> dict[str, Any]:
    return {"identity": asdict(identity), "width": None, "entries": {}}


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
        EncoderIdentity(**index["identity"])
        return {"identity": index["identity"], "width": index["width"], "entries": dict(index["entries"])}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / INDEX_NAME} is not an index of embeddings ({error}); write the folder anew."
        ) from error


def _check_identity(folder: Path, index: dict[str, Any], identity: EncoderIdentity) -> None:
    asked = asdict(identity)
    differing = {
        field: (index["identity"][field], asked[field]) for field in asked if index["identity"][field] != asked[field]
    }
    if differing:
        listed = "; ".join(f"{field} {there!r}, not {wanted!r}" for field, (there, wanted) in differing.items())
        raise DataError(f"The embeddings in {folder} come from another encoder ({listed}); take another folder.")


def _checked(array: np.ndarray, dtype: str, index: dict[str, Any]) -> np.ndarray:
    if array.ndim != 2 or not len(array) or index["width"] not in (None, array.shape[1]):
        raise DataError(
            f"An embedding must be an array (rows, {index['width'] or 'width'}), was of shape {array.shape}."
        )
    index["width"] = int(array.shape[1])
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(array, dtype=dtype)
    if not np.isfinite(stored).all():
        raise DataError(f"An embedding is not finite in {dtype}; store with `dtype='float32'`, or repair the encoder.")
    return stored


def _write_shard(folder: Path, index: dict[str, Any], waiting: dict[str, np.ndarray]) -> None:
    if not waiting:
        return
    # Counted by files, not by the index: a shard that an interrupted run left behind is never overwritten.
    name = f"states-{sum(1 for _ in folder.glob('states-*.safetensors')):05d}.safetensors"
    save_file({_TENSOR: np.concatenate(list(waiting.values()))}, folder / name)
    offset = 0
    for key, array in waiting.items():
        index["entries"][key] = [name, offset, len(array)]
        offset += len(array)
    written = folder / f".{INDEX_NAME}"
    written.write_text(json.dumps(index, indent=1), encoding="utf-8")
    written.replace(folder / INDEX_NAME)
