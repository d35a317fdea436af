"""Streams: every item once whatever the processes and workers, the same order again, on in the middle."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from track_files import write_basenji
from transformers import Trainer, TrainingArguments

from genesplice_hf.data.tfrecord import read_records
from genesplice_hf.data.track_streams import InterleavedTrackDataset, StreamingTrackDataset
from genesplice_hf.data.tracks import TrackCollator, TrackDataset, TrackOptions
from genesplice_hf.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """11 records in files of 3, 3, 3 and 2."""
    ids = np.random.default_rng(0).integers(0, 4, (11, 8))
    targets = np.arange(11 * 2 * 2).reshape(11, 2, 2).astype(np.float16)
    return write_basenji(tmp_path_factory.mktemp("data") / "d", ids, targets)


@pytest.fixture(scope="module")
def records(folder):
    return TrackDataset.from_tfrecords(folder, "train")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("npz") / "x.npz"
    np.savez(path, sequence=np.zeros((23, 8), np.uint8), target=np.zeros((23, 2, 2), np.float16))
    return TrackDataset.from_npz(path)


def indices(stream):
    return [item["index"] for item in stream]


@pytest.mark.parametrize("source", ["records", "rows"])
@given(world=st.integers(1, 6), shuffle=st.booleans(), block=st.sampled_from([1, 2, 5, 64]), seed=st.integers(0, 9))
def test_processes_share_all_items_without_a_duplicate(request, source, world, shuffle, block, seed):
    data = request.getfixturevalue(source)
    parts = [StreamingTrackDataset(data, shuffle, seed, block, rank, world) for rank in range(world)]
    read = [indices(part) for part in parts]
    assert sorted(itertools.chain(*read)) == list(range(len(data)))
    assert [len(part) for part in parts] == [len(part) for part in read]


@pytest.mark.parametrize("source", ["records", "rows"])
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_share_what_a_process_has(request, source, workers):
    data = request.getfixturevalue(source)
    read = []
    for rank in range(2):
        stream = StreamingTrackDataset(data, shuffle=True, rank=rank, world_size=2, block_size=4)
        read += indices(DataLoader(stream, batch_size=None, num_workers=workers))
    assert sorted(read) == list(range(len(data)))


def test_files_stay_whole_where_there_are_enough(records):
    for rank in range(2):
        read = indices(StreamingTrackDataset(records, rank=rank, world_size=2))
        assert read == ([0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10])[rank]


def test_items_are_those_of_the_dataset(records):
    for item in StreamingTrackDataset(records, shuffle=True, block_size=4):
        again = records[item["index"]]
        assert torch.equal(item["input_ids"], again["input_ids"]) and torch.equal(item["labels"], again["labels"])


def test_shuffled_records_are_read_forwards(folder, monkeypatch):
    """Each file is opened once in an epoch, though its records come out in another order."""
    data = TrackDataset.from_tfrecords(folder, "train")
    opened = []

    def counted(file, check_crc):
        opened.append(file)
        return read_records(file, check_crc)

    monkeypatch.setattr("genesplice_hf.data.basenji.read_records", counted)
    order = indices(StreamingTrackDataset(data, shuffle=True, block_size=3))
    assert sorted(order) == list(range(11)) and order != list(range(11))
    assert len(opened) == len(set(opened)) == 4


def test_an_epoch_can_be_repeated_and_the_next_differs(rows):
    stream = StreamingTrackDataset(rows, shuffle=True, seed=3)
    first = indices(stream)
    assert indices(stream) == first
    stream.set_epoch(1)
    second = indices(stream)
    assert second != first and sorted(second) == sorted(first)
    assert indices(StreamingTrackDataset(rows, shuffle=True, seed=4)) != first
    assert indices(StreamingTrackDataset(rows)) == list(range(23))


@pytest.mark.parametrize("source", ["records", "rows"])
@given(taken=st.integers(0, 25), shuffle=st.booleans(), world=st.integers(1, 2), block=st.sampled_from([1, 4, 64]))
def test_a_stream_goes_on_where_it_was(request, source, taken, shuffle, world, block):
    data = request.getfixturevalue(source)

    def make():
        return StreamingTrackDataset(data, shuffle, block_size=block, rank=world - 1, world_size=world)

    stream = make()
    stream.set_epoch(2)
    whole = indices(stream)
    stream = make()
    stream.set_epoch(2)
    begun = iter(stream)
    assert indices(itertools.islice(begun, taken)) == whole[:taken]
    resumed = make()
    resumed.load_state_dict(stream.state_dict())
    assert indices(resumed) == whole[taken:]
    # Only the first iteration goes on; the next is a whole one.
    assert indices(resumed) == whole


def test_every_process_has_as_many_on_request(records):
    def read(shuffle):
        return [indices(StreamingTrackDataset(records, shuffle, 0, 3, rank, 3, even=True)) for rank in range(3)]

    assert read(False) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    shuffled = read(True)
    assert len({len(part) for part in shuffled}) == 1
    assert len(set(itertools.chain(*shuffled))) == sum(map(len, shuffled))


def test_state_of_another_stream_is_refused(rows):
    state = StreamingTrackDataset(rows, shuffle=True, seed=1).state_dict()
    for other, message in [
        ({"seed": 2, "shuffle": True}, "`state` was saved with seed 1, but here it is 2"),
        ({"seed": 1, "shuffle": True, "world_size": 2}, "world_size 1, but here it is 2"),
        ({"seed": 1}, "shuffle 1, but here it is 0"),
    ]:
        with pytest.raises(DataError, match=message):
            StreamingTrackDataset(rows, **other).load_state_dict(state)
    with pytest.raises(DataError, match="`rank` must be 0 to `world_size` - 1, were 2 and 2"):
        StreamingTrackDataset(rows, rank=2, world_size=2)
    with pytest.raises(DataError, match="`block_size` must be 1 or more"):
        StreamingTrackDataset(rows, block_size=0)


def test_a_selection_with_repeats_is_streamed_whole(records, rows):
    assert indices(StreamingTrackDataset(rows.select([5, 2, 5]))) == [5, 2, 5]
    assert indices(StreamingTrackDataset(records.select([10, 1, 4, 1]))) == [1, 1, 4, 10]
    read = [
        indices(StreamingTrackDataset(records.select([10, 1, 4, 1]), True, rank=rank, world_size=2)) for rank in (0, 1)
    ]
    assert sorted(itertools.chain(*read)) == [1, 1, 4, 10]


# Several species


@pytest.fixture
def two(rows, records):
    return {"human": StreamingTrackDataset(rows, shuffle=True), "mouse": StreamingTrackDataset(records, shuffle=True)}


def test_species_alternate_batch_by_batch(two):
    loader = DataLoader(InterleavedTrackDataset(two, 4), batch_size=4, collate_fn=TrackCollator())
    species = [batch["species"] for batch in loader]
    assert species == ["human", "mouse"] * 6


def test_the_longest_is_seen_whole_and_the_shorter_begins_anew(two):
    read = {"human": [], "mouse": []}
    for item in InterleavedTrackDataset(two, 4):
        read[item["species"]].append(item["index"])
    assert sorted(read["human"][:23]) == list(range(23)) and len(read["human"]) == 24
    assert sorted(read["mouse"][:11]) == sorted(read["mouse"][11:22]) == list(range(11))
    assert read["mouse"][:11] != read["mouse"][11:22]


def test_the_shortest_ends_the_epoch_on_request(two):
    items = list(InterleavedTrackDataset(two, 4, stop="shortest"))
    assert [item["species"] for item in items] == (["human"] * 4 + ["mouse"] * 4) * 2
    assert len({(item["species"], item["index"]) for item in items}) == 16


@given(taken=st.integers(0, 48))
def test_interleaved_streams_go_on_where_they_were(rows, records, taken):
    def make():
        return InterleavedTrackDataset(
            {"human": StreamingTrackDataset(rows, True), "mouse": StreamingTrackDataset(records, True)}, 4
        )

    def names(stream):
        return [(item["species"], item["index"]) for item in stream]

    whole = names(make())
    stream = make()
    begun = iter(stream)
    head = [next(begun) for _ in range(taken)]
    assert [(item["species"], item["index"]) for item in head] == whole[:taken]
    resumed = make()
    resumed.load_state_dict(stream.state_dict())
    assert names(resumed) == whole[taken:]


def test_interleaved_workers_keep_batches_of_one_species(two):
    loader = DataLoader(InterleavedTrackDataset(two, 2), batch_size=2, collate_fn=TrackCollator(), num_workers=2)
    species = [batch["species"] for batch in loader]
    assert set(species) == {"human", "mouse"} and species.count("human") == species.count("mouse")


def test_interleaved_arguments(two):
    with pytest.raises(DataError, match="`datasets` must name at least one species"):
        InterleavedTrackDataset({}, 4)
    with pytest.raises(DataError, match="`stop` must be 'longest' or 'shortest', was 'never'"):
        InterleavedTrackDataset(two, 4, stop="never")
    with pytest.raises(DataError, match="batch_size 4, but here it is 8"):
        InterleavedTrackDataset(two, 8).load_state_dict(InterleavedTrackDataset(two, 4).state_dict())


def test_epochs_reach_the_augmentation(folder):
    data = TrackDataset.from_tfrecords(folder, "train", options=TrackOptions(augment=True))
    stream = StreamingTrackDataset(data)
    stream.set_epoch(5)
    assert {item["augment"] for item in stream} == {5}


class ToyTracks(torch.nn.Module):
    """Composition of a window -> every bin and track."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(6, 2)

    def forward(self, input_ids, labels=None):
        shares = torch.nn.functional.one_hot(input_ids.long(), 6).float().mean(1)
        logits = self.head(shares)[:, None].expand(-1, 2, -1)
        return {"loss": (logits - labels).square().mean(), "logits": logits}


@pytest.mark.parametrize("streamed", [False, True])
def test_trainer_counts_the_epochs_of_the_augmentation(tmp_path, folder, streamed):
    """Training rows are augmented anew in each epoch, evaluation rows never, with one collator for both."""
    data = TrackDataset.from_tfrecords(folder, "train", options=TrackOptions(augment=True), in_memory=True)
    seen = []

    class Spy(TrackCollator):
        def __call__(self, items):
            seen.extend((item["index"], item.get("augment")) for item in items)
            return super().__call__(items)

    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, remove_unused_columns=False, report_to=[],
        eval_strategy="no", save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(
        ToyTracks(), arguments, Spy(), StreamingTrackDataset(data, shuffle=True) if streamed else data,
        TrackDataset.from_tfrecords(folder, "train"),
    )  # fmt: skip
    trainer.train()
    epochs = [[row for row, epoch in seen if epoch == wanted] for wanted in (0, 1)]
    assert [sorted(rows) for rows in epochs] == [list(range(11))] * 2 and epochs[0] != epochs[1]
    seen.clear()
    trainer.evaluate()
    assert seen == [(row, None) for row in range(11)]
