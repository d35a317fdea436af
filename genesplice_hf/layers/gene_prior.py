"""A sparse table of edges between genes of a vocabulary, looked up for the genes of a cell.

Shapes: B cells, r genes of a cell, E edges, K channels, V vocabulary.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes

from genesplice_hf.errors import CheckpointError, DataError

OnDuplicate = Literal["sum", "max", "drop", "error"]
# One entry, for the order of several would change the file's hash.
_METADATA = "genesplice_prior"


class GenePrior:
    """Edges source -> target with K values each.

    Attributes:
        source, target: (E,) int64 ids, sorted by source and then target, every pair once.
        value: (E, K) float32.
        type: (E,) int64, number of the edge's type. confidence: (E,) float32.
        vocab_size: V. genes: names by id, empty where unknown. licence: of the source of the edges.
    """

    def __init__(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        value: torch.Tensor,
        vocab_size: int,
        *,
        type: torch.Tensor | None = None,
        confidence: torch.Tensor | None = None,
        genes: Sequence[str] = (),
        licence: str = "",
        on_duplicate: OnDuplicate = "max",
    ) -> None:
        """Sorts the edges and joins those that are listed more than once, channel by channel.

        Args:
            on_duplicate: of a pair listed more than once take the "sum" or the "max"imum of each channel, "drop" the
                pair, or raise an "error". Type and confidence are those of its first edge.

        Raises:
            DataError: ids outside the vocabulary, columns of different lengths, or a pair twice with "error".
        """
        source, target = (torch.as_tensor(ids, dtype=torch.int64) for ids in (source, target))
        value = torch.as_tensor(value, dtype=torch.float32)
        value = value[:, None] if value.dim() == 1 else value
        number = len(source)
        type = torch.zeros(number, dtype=torch.int64) if type is None else torch.as_tensor(type, dtype=torch.int64)
        confidence = torch.ones(number) if confidence is None else torch.as_tensor(confidence, dtype=torch.float32)
        _demand_edges(source, target, value, type, confidence, vocab_size)
        key, order = torch.sort(source * vocab_size + target, stable=True)
        first, value = _joined(key, value[order], on_duplicate)
        kept = order[first]
        self.source, self.target, self.value = source[kept], target[kept], value
        self.type, self.confidence = type[kept], confidence[kept]
        self.vocab_size, self.genes, self.licence = vocab_size, list(genes), licence
        self._on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @classmethod
    def seed_mode(
        cls,
        sources: Sequence[str],
        targets: Sequence[str],
        is_stimulation: Sequence[int],
        is_inhibition: Sequence[int],
        vocabulary: Mapping[str, int],
        licence: str = "",
    ) -> "GenePrior":
        """The rules of the first BioFormer: stimulation minus inhibition, and a pair listed twice counts for nothing.

        Args:
            sources, targets: gene names, matched exactly; edges of unknown genes are left out.
            is_stimulation, is_inhibition: 0 or 1 for each edge. vocabulary: name -> id.
        """
        rows = [
            (vocabulary[source], vocabulary[target], float(up) - float(down))
            for source, target, up, down in zip(sources, targets, is_stimulation, is_inhibition, strict=True)
            if source in vocabulary and target in vocabulary
        ]
        table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)
        size = max(vocabulary.values(), default=-1) + 1
        names = {index: name for name, index in vocabulary.items()}
        return cls(
            table[:, 0].long(),
            table[:, 1].long(),
            table[:, 2:].float(),
            size,
            genes=[names.get(index, "") for index in range(size)],
            licence=licence,
            on_duplicate="drop",
        )

    @property
    def num_channels(self) -> int:
        """K."""
        return self.value.shape[1]

    def __len__(self) -> int:
        return len(self.source)

    def lookup(self, input_ids_Br: torch.Tensor) -> torch.Tensor:
        """(B, r, r, K) float32 values of the edges from gene i (row) to gene j (column), 0 where there is none."""
        keys, values = self._tables(input_ids_Br.device)
        if not len(keys):
            return torch.zeros(*input_ids_Br.shape, input_ids_Br.shape[1], self.num_channels, device=keys.device)
        queries_Bij = input_ids_Br[:, :, None] * self.vocab_size + input_ids_Br[:, None, :]
        place_Bij = torch.searchsorted(keys, queries_Bij).clamp_(max=len(keys) - 1)
        is_edge_Bij = keys[place_Bij] == queries_Bij
        found = torch.zeros(*queries_Bij.shape, self.num_channels, device=keys.device)
        # Few pairs are edges.
        found[is_edge_Bij] = values[place_Bij[is_edge_Bij]]
        return found

    def resized(self, vocab_size: int) -> "GenePrior":
        """The same edges in a larger vocabulary, or those that are left in a smaller one."""
        kept = (self.source < vocab_size) & (self.target < vocab_size)
        return GenePrior(
            self.source[kept],
            self.target[kept],
            self.value[kept],
            vocab_size,
            type=self.type[kept],
            confidence=self.confidence[kept],
            genes=self.genes[:vocab_size],
            licence=self.licence,
        )

    def to_bytes(self) -> bytes:
        """The table as a safetensors file; equal tables give equal bytes."""
        tensors = {name: getattr(self, name).contiguous() for name in _COLUMNS}
        facts = {"vocab_size": self.vocab_size, "genes": self.genes, "licence": self.licence}
        return save_bytes(tensors, {_METADATA: json.dumps(facts, sort_keys=True)})

    def sha256(self) -> str:
        """The hash of `to_bytes`, in hexadecimal digits."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_bytes(cls, content: bytes, sha256: str | None = None, name: str = "prior") -> "GenePrior":
        """Reads what `to_bytes` wrote.

        Raises:
            CheckpointError: another hash than `sha256`, or no such table.
        """
        found = hashlib.sha256(content).hexdigest()
        if sha256 is not None and found != sha256:
            raise CheckpointError(
                f"`{name}` has the SHA-256 {found}, the config says {sha256}; the table was changed or belongs to "
                "another model: download both again."
            )
        try:
            tensors = load_bytes(content)
            length = int.from_bytes(content[:8], "little")
            facts = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_METADATA])
            edges = [tensors[column] for column in ("source", "target", "value")]
        except (SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"`{name}` holds no table of edges ({error}); save it with `GenePrior`.") from error
        return cls(*edges, type=tensors["type"], confidence=tensors["confidence"], **facts, on_duplicate="error")

    def save(self, path: str | Path) -> None:
        """Writes the table."""
        Path(path).write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: str | Path, sha256: str | None = None) -> "GenePrior":
        """Reads a table that `save` wrote; see `from_bytes`."""
        return cls.from_bytes(Path(path).read_bytes(), sha256, str(path))

    def _tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._on_device:
            keys = self.source * self.vocab_size + self.target
            self._on_device[device] = (keys.to(device), self.value.to(device))
        return self._on_device[device]


_COLUMNS = ("source", "target", "value", "type", "confidence")


def _demand_edges(
    source: torch.Tensor,
    target: torch.Tensor,
    value: torch.Tensor,
    type: torch.Tensor,
    confidence: torch.Tensor,
    vocab_size: int,
) -> None:
    lengths = {len(column) for column in (source, target, value, type, confidence)}
    if len(lengths) > 1:
        raise DataError(f"the columns of a prior must be equally long, got {sorted(lengths)} edges.")
    for name, ids in (("source", source), ("target", target)):
        if bool(((ids < 0) | (ids >= vocab_size)).any()):
            raise DataError(f"`{name}` must hold ids below `vocab_size` ({vocab_size}); leave unknown genes out.")


def _joined(key: torch.Tensor, value: torch.Tensor, on_duplicate: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(places of the first edge of every pair that stays, its values); `key` is sorted.

    Raises:
        DataError: a pair is listed twice, with "error".
    """
    unique, group, counts = torch.unique_consecutive(key, return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    if on_duplicate == "error" and len(unique) < len(key):
        raise DataError(f"{len(key) - len(unique)} pairs are listed more than once; choose another `on_duplicate`.")
    if on_duplicate == "drop":
        once = first[counts == 1]
        return once, value[once]
    start = torch.zeros if on_duplicate == "sum" else torch.empty
    joined = start(len(unique), value.shape[1])
    index = group[:, None].expand_as(value)
    reduction = "sum" if on_duplicate == "sum" else "amax"
    return first, joined.scatter_reduce(0, index, value, reduction, include_self=on_duplicate == "sum")
