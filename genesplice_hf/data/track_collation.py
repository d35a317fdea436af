"""Batches of track items, with a random shift and reverse complement that belong to (seed, epoch, row)."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from genesplice_hf.data.fasta import Genome
from genesplice_hf.data.track_augment import Augmented, augment
from genesplice_hf.data.track_windows import OffChromosome, Window, id_letters, pad_id, window_ids
from genesplice_hf.errors import DataError


class Draw(NamedTuple):
    """What happens to one row."""

    rc: bool
    shift: int


class TrackCollator:
    """Items of track datasets -> `input_ids` (B, L), `labels` (B, M, T), and `species` where the items name one.

    A row that is augmented is moved by a shift drawn from -`max_shift` to `max_shift` and, with `rc_probability`,
    turned to the opposite strand together with its targets. The draws depend on seed, epoch and `index` of the row
    alone, not on batch, worker or order.

    Args:
        genome: where the bases of a moved window are read from (one, or species -> one); None fills them with N.
        strand_pair: the partner of each track on the other strand (one table, or species -> one).
        max_shift: largest shift in bases.
        rc_probability: share of rows that are reverse-complemented.
        seed: of the draws.
        offchrom: what bases off the chromosome become, as in the dataset.
        augment: None = the rows whose dataset was made with `augment=True`, in the epoch of that dataset; True = all,
            in the epoch of `set_epoch`; False = none.
        id_map: the id in another vocabulary for each of the ids 0 to 5 (A, C, G, T, N, padding), applied last; for
            models with another tokenizer. `input_ids` are int64 then.
        keep_metadata: the batch also holds lists `interval`, `index`, `rc`, `shift`, and `sequence` (of the augmented
            window) where the items have it.

    Raises:
        DataError: an argument out of range; on calls, items that do not fit together.
    """

    def __init__(
        self,
        genome: Genome | Mapping[str, Genome] | None = None,
        strand_pair: Sequence[int] | Mapping[str, Sequence[int] | None] | None = None,
        max_shift: int = 3,
        rc_probability: float = 0.5,
        seed: int = 0,
        offchrom: OffChromosome = "n",
        augment: bool | None = None,
        id_map: Sequence[int] | None = None,
        keep_metadata: bool = False,
    ) -> None:
        if max_shift < 0 or seed < 0:
            raise DataError(f"`max_shift` and `seed` must be 0 or more, were {max_shift} and {seed}.")
        if not 0 <= rc_probability <= 1:
            raise DataError(f"`rc_probability` must lie between 0 and 1, was {rc_probability}.")
        if id_map is not None and len(id_map) != 6:
            raise DataError(f"`id_map` must hold 6 ids, for A, C, G, T, N and padding, holds {len(id_map)}.")
        pad_id(offchrom)
        self.genome, self.strand_pair, self.offchrom = genome, strand_pair, offchrom
        self.max_shift, self.rc_probability, self.seed, self.augment = max_shift, rc_probability, seed, augment
        self.id_map = None if id_map is None else torch.tensor(id_map, dtype=torch.int64)
        self.keep_metadata = keep_metadata
        # Shared, so that `set_epoch` also reaches the persistent workers of a `DataLoader`.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Makes the next draws those of `epoch`, for `augment=True`."""
        self._epoch[0] = epoch

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        species = _one_species(items)
        rows = [self._augmented(item, self._draw(item), species) for item in items]
        ids = _stacked([row.input_ids for row in rows], "input_ids")
        batch: dict[str, Any] = {"input_ids": ids if self.id_map is None else self.id_map[ids.long()]}
        labels = [row.labels for row in rows if row.labels is not None]
        if labels:
            batch["labels"] = _stacked(labels, "labels")
        if species is not None:
            batch["species"] = species
        return batch | (_metadata(items, rows) if self.keep_metadata else {})

    def _draw(self, item: Mapping[str, Any]) -> Draw:
        if self.augment is False:
            return Draw(False, 0)
        if "index" not in item:
            raise DataError(
                "`index` is missing from the items, so that rows cannot be augmented; pass "
                "`TrainingArguments(remove_unused_columns=False)`, or `TrackCollator(augment=False)`."
            )
        epoch = int(self._epoch[0]) if self.augment else item.get("augment")
        if epoch is None:
            return Draw(False, 0)
        generator = np.random.default_rng([self.seed, epoch, int(item["index"])])
        shift = int(generator.integers(-self.max_shift, self.max_shift, endpoint=True))
        return Draw(bool(generator.random() < self.rc_probability), shift)

    def _augmented(self, item: Mapping[str, Any], draw: Draw, species: str | None) -> Augmented:
        ids, rest = torch.as_tensor(item["input_ids"]), draw.shift
        genome = _of_species(self.genome, species, "genome")
        if draw.shift and genome is not None:
            ids, rest = torch.from_numpy(self._moved(item.get("interval"), draw.shift, genome)), 0
        labels = None if item.get("labels") is None else torch.as_tensor(item["labels"])
        done = augment(ids, labels, draw.rc, rest, _of_species(self.strand_pair, species, "strand_pair"))
        return done._replace(shift=draw.shift)

    def _moved(self, interval: tuple[str, int, int] | None, shift: int, genome: Genome) -> np.ndarray:
        if interval is None:
            raise DataError("`interval` of an item is not known, so no base can be read; pass `genome=None`.")
        chrom, start, end = interval
        return window_ids(genome, Window(chrom, start + shift, end + shift), self.offchrom)


def _one_species(items: Sequence[Mapping[str, Any]]) -> str | None:
    found = {item.get("species") for item in items}
    if len(found) != 1:
        raise DataError(
            f"`species` must be the same in a whole batch, was {sorted(map(str, found))}; the batch size of the "
            "`DataLoader` must be the `batch_size` of `InterleavedTrackDataset`."
        )
    return found.pop()


def _of_species(value: Any, species: str | None, argument: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    if species not in value:
        raise DataError(f"`{argument}` has entries for {sorted(value)}, but the items are of species {species!r}.")
    return value[species]


def _stacked(tensors: list[torch.Tensor], argument: str) -> torch.Tensor:
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise DataError(
            f"`{argument}` must have one shape in a batch, have {sorted(shapes)}; set `context_length` and "
            "`target_length` of the dataset, or give every species its own batches."
        )
    return torch.stack(tensors)


def _metadata(items: Sequence[Mapping[str, Any]], rows: Sequence[Augmented]) -> dict[str, Any]:
    lists: dict[str, Any] = {key: [item.get(key) for item in items] for key in ("interval", "index")}
    lists |= {"rc": [row.rc for row in rows], "shift": [row.shift for row in rows]}
    if all("sequence" in item for item in items):
        lists["sequence"] = [
            id_letters(row.input_ids.numpy()) if row.rc or row.shift else item["sequence"]
            for item, row in zip(items, rows, strict=True)
        ]
    return lists
