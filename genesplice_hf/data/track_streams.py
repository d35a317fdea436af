"""Track items as a stream: shuffled, shared among processes and workers without a duplicate, and resumable.

The order of an epoch is a rule, not a state: (seed, epoch) give the order of the groups (the records of one file,
or single windows), and each block of neighbours is shuffled again. So a stream goes on in the middle of an epoch by
the number of items that were taken, with no buffer to save.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from genesplice_hf.data.tracks import TrackDataset
from genesplice_hf.errors import DataError

_BLOCK_STREAM = 1


class StreamingTrackDataset(torch.utils.data.IterableDataset):
    """The items of a `TrackDataset`, one epoch after the other.

    `DataLoader` workers share the stream by themselves. Processes share it by `rank` and `world_size`, for loops of
    your own; `Trainer` and Accelerate share any stream themselves, so leave both out there. A group (the records of
    one file) stays in one process and worker where there are enough groups, else its items are dealt out.

    `state_dict` counts the items that were taken from this copy of the stream. Workers of a `DataLoader` hold copies
    of their own: save and load where the items are taken (`num_workers=0`, or torchdata's `StatefulDataLoader`).

    Args:
        dataset: where the items come from.
        shuffle: draw the order from `seed` and epoch; else it is that of the dataset.
        seed: of the order.
        block_size: items that are shuffled together; where a group holds several, they are held in memory.
        rank, world_size: which process this is, of how many.
        even: leave out the last items, so that every process has as many.

    Raises:
        DataError: numbers out of range.
    """

    def __init__(
        self,
        dataset: TrackDataset,
        shuffle: bool = False,
        seed: int = 0,
        block_size: int = 64,
        rank: int = 0,
        world_size: int = 1,
        even: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise DataError(f"`rank` must be 0 to `world_size` - 1, were {rank} and {world_size}.")
        if block_size < 1 or seed < 0:
            raise DataError(f"`block_size` must be 1 or more and `seed` 0 or more, were {block_size} and {seed}.")
        self.dataset, self.shuffle, self.seed, self.block_size = dataset, shuffle, seed, block_size
        self.rank, self.world_size, self.even = rank, world_size, even
        self._taken = self._resume_at = 0
        # Shared, so that `set_epoch` also reaches the persistent workers of a `DataLoader`.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch that is streamed."""
        return int(self._epoch[0])

    def set_epoch(self, epoch: int) -> None:
        """Takes the order of `epoch`, from its beginning if it is another one (Accelerate and `Trainer` call it)."""
        if epoch != self.epoch:
            self._taken = self._resume_at = 0
        self._epoch[0] = epoch
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        """Items of this process in one epoch, all workers together."""
        return _size(self._of_rank(self.epoch))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._taken, self._resume_at = self._resume_at, 0
        for item in self.stream(self.epoch, self._taken):
            self._taken += 1
            yield item

    def stream(self, epoch: int, taken: int = 0, cycle: int = 0) -> Iterator[dict[str, Any]]:
        """The items of `epoch` in this process and worker, after the first `taken`.

        Args:
            epoch: gives the order, with `seed` and `cycle`.
            taken: how many are left out; nothing of what lies before their block is read.
            cycle: tells several passes in one epoch apart.
        """
        order = self.order(epoch, cycle)
        # Records of a file can be read fast in one direction only, so a block of them is read before it is shuffled.
        ahead = self.shuffle and len(self.dataset.groups) < len(self.dataset)
        for start in range(taken - taken % self.block_size, len(order), self.block_size):
            block = order[start : start + self.block_size]
            wanted = self._shuffled(block, epoch, cycle)[max(0, taken - start) :].tolist()
            held = {number: self.dataset[number] for number in sorted(wanted)} if ahead else {}
            for number in wanted:
                yield held.pop(number) if ahead else self.dataset[number]

    def order(self, epoch: int, cycle: int = 0) -> np.ndarray:
        """Items of this process and worker, blocks in their order, inside of a block as the dataset has them."""
        worker = get_worker_info()
        groups = self._of_rank(epoch, cycle)
        mine = groups if worker is None else _dealt(groups, worker.id, worker.num_workers)
        return np.concatenate([*mine, np.empty(0, dtype=np.int64)])

    def state_dict(self) -> dict[str, int]:
        """Where the stream is."""
        return {"epoch": self.epoch, "taken": self._taken, **self._identity()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Makes the next iteration go on where `state` was saved.

        Raises:
            DataError: it was saved from a stream with another seed, block size, rank, number of processes or items.
        """
        _check_identity(state, self._identity())
        self.set_epoch(state["epoch"])
        self._taken = self._resume_at = state["taken"]

    def _identity(self) -> dict[str, int]:
        names = ("rank", "world_size", "seed", "block_size")
        return {name: getattr(self, name) for name in names} | {
            "shuffle": int(self.shuffle), "num_items": len(self.dataset),
        }  # fmt: skip

    def _of_rank(self, epoch: int, cycle: int = 0) -> list[np.ndarray]:
        groups = self.dataset.groups
        if self.shuffle:
            places = np.random.default_rng([self.seed, epoch, cycle]).permutation(len(groups))
            groups = [groups[place] for place in places]
        mine = _dealt(groups, self.rank, self.world_size)
        if not self.even:
            return mine
        fewest = min(_size(_dealt(groups, rank, self.world_size)) for rank in range(self.world_size))
        return _first(mine, fewest)

    def _shuffled(self, block: np.ndarray, epoch: int, cycle: int) -> np.ndarray:
        if not self.shuffle:
            return block
        key = [self.seed, epoch, cycle, _BLOCK_STREAM, int(block.min(initial=0))]
        return np.random.default_rng(key).permutation(np.sort(block))


class InterleavedTrackDataset(torch.utils.data.IterableDataset):
    """Several species in turn: `batch_size` items of the first, then of the second, ..., each with its `species`.

    So every batch of a `DataLoader` with the same batch size holds one species, as in the training of Enformer
    (Avsec et al. 2021), where human and mouse alternate. A dataset that ends begins anew, in another order.

    Args:
        datasets: species -> stream, in the order in which they take turns.
        batch_size: items of a batch, over all processes that share the stream through Accelerate.
        stop: the epoch ends when the `"longest"` dataset has been seen whole (the last batch filled up from its
            beginning), or before the `"shortest"` would begin anew.

    Raises:
        DataError: no dataset, or another argument out of range; on iteration, a dataset without items in this worker.
    """

    def __init__(self, datasets: Mapping[str, StreamingTrackDataset], batch_size: int, stop: str = "longest") -> None:
        if not datasets or batch_size < 1:
            raise DataError(
                f"`datasets` must name at least one species and `batch_size` be 1 or more, were {list(datasets)} and "
                f"{batch_size}."
            )
        if stop not in ("longest", "shortest"):
            raise DataError(f"`stop` must be 'longest' or 'shortest', was {stop!r}.")
        self.datasets, self.batch_size, self.stop = dict(datasets), batch_size, stop
        self._taken = self._resume_at = 0

    @property
    def epoch(self) -> int:
        """The epoch that is streamed."""
        return next(iter(self.datasets.values())).epoch

    def set_epoch(self, epoch: int) -> None:
        """Takes the order of `epoch` in every dataset."""
        if epoch != self.epoch:
            self._taken = self._resume_at = 0
        for dataset in self.datasets.values():
            dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._taken, self._resume_at = self._resume_at, 0
        epoch = self.epoch
        lengths = [len(dataset.order(epoch)) for dataset in self.datasets.values()]
        rounds = self._rounds(lengths)
        batches, rest = divmod(self._taken, self.batch_size)
        streams = [
            self._endless(species, epoch, self._taken_of(place, batches, rest))
            for place, species in enumerate(self.datasets)
        ]
        for batch in range(batches, rounds * len(streams)):
            wanted = self.batch_size - (rest if batch == batches else 0)
            for item in itertools.islice(streams[batch % len(streams)], wanted):
                self._taken += 1
                yield item

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""
        streams = {species: dataset.state_dict() for species, dataset in self.datasets.items()}
        return {"epoch": self.epoch, "taken": self._taken, "batch_size": self.batch_size, "streams": streams}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Makes the next iteration go on where `state` was saved.

        Raises:
            DataError: it was saved from other datasets, or with another batch size.
        """
        _check_identity(state, {"batch_size": self.batch_size})
        if list(state["streams"]) != list(self.datasets):
            raise DataError(f"`state` holds the species {list(state['streams'])}, but here are {list(self.datasets)}.")
        for species, dataset in self.datasets.items():
            dataset.load_state_dict(state["streams"][species])
        self._taken = self._resume_at = state["taken"]

    def _rounds(self, lengths: Sequence[int]) -> int:
        if not min(lengths):
            empty = list(self.datasets)[lengths.index(0)]
            raise DataError(f"`datasets`: {empty!r} has no item for this process and worker; use fewer workers.")
        whole = [length // self.batch_size for length in lengths]
        return min(whole) if self.stop == "shortest" else max(-(-length // self.batch_size) for length in lengths)

    def _taken_of(self, place: int, batches: int, rest: int) -> int:
        """Items that the dataset number `place` has given in the whole batches so far and in the one begun."""
        turns, next_place = divmod(batches, len(self.datasets))
        return (turns + (place < next_place)) * self.batch_size + (rest if place == next_place else 0)

    def _endless(self, species: str, epoch: int, taken: int) -> Iterator[dict[str, Any]]:
        dataset = self.datasets[species]
        for cycle in itertools.count():
            length = len(dataset.order(epoch, cycle))
            if taken < length:
                yield from ({**item, "species": species} for item in dataset.stream(epoch, taken, cycle))
            taken = max(0, taken - length)


def _dealt(groups: Sequence[np.ndarray], part: int, parts: int) -> list[np.ndarray]:
    """The groups of one of `parts`: whole ones where there are enough, else every `parts`-th item of each."""
    if len(groups) >= parts:
        return list(groups[part::parts])
    return [group[part::parts] for group in groups if group[part::parts].size]


def _size(groups: Sequence[np.ndarray]) -> int:
    return sum(len(group) for group in groups)


def _first(groups: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    kept = []
    for group in groups:
        kept.append(group[:count])
        count -= len(kept[-1])
    return [group for group in kept if group.size]


def _check_identity(state: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    other = [name for name in mine if state.get(name) != mine[name]]
    if other:
        raise DataError(
            f"`state` was saved with {other[0]} {state.get(other[0])!r}, but here it is {mine[other[0]]!r}; resume "
            "with the same data and settings."
        )
