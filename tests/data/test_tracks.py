"""Track items: windows, targets and letters; augmentation moves sequence and targets together."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from track_files import write_basenji, write_fasta
from transformers import default_data_collator

from genesplice_hf.data.bed import read_bed
from genesplice_hf.data.fasta import Genome
from genesplice_hf.data.target_table import Target, TargetTable
from genesplice_hf.data.track_augment import augment, reverse_complement_ids, shift_ids, undo_augment
from genesplice_hf.data.track_splits import contig_folds, split_tracks_by_chromosome, split_tracks_by_column
from genesplice_hf.data.track_windows import centred, id_letters, letter_ids, prepare_enformer_inputs
from genesplice_hf.data.tracks import TrackCollator, TrackDataset, TrackOptions
from genesplice_hf.errors import DataError, GeneSpliceError
from genesplice_hf.genome.alphabet import reverse_complement
from genesplice_hf.genome.interval import Interval

N, L, M, T = 5, 20, 4, 3
CHROM = "".join(np.random.default_rng(3).choice(list("ACGTacgtnRU"), 200))


@pytest.fixture
def genome(tmp_path):
    return Genome(write_fasta(tmp_path / "g.fa", {"chr1": CHROM, "chr2": "ACGT" * 10}))


@pytest.fixture
def arrays(genome):
    """Sequences that agree with the genome at their places, and targets that tell row, bin and track."""
    starts = np.arange(N) * 30
    ids = np.stack([letter_ids(genome.seq("chr1", start, start + L)) for start in starts.tolist()])
    target = (np.arange(N * M * T) / 8).reshape(N, M, T).astype(np.float16)
    return {"sequence": ids, "target": target, "chrom": np.array(["chr1"] * N), "start": starts, "end": starts + L}


@pytest.fixture
def npz(tmp_path, arrays):
    np.savez(tmp_path / "x.npz", **arrays)
    return tmp_path / "x.npz"


@pytest.fixture
def memmap(tmp_path, arrays):
    np.save(tmp_path / "t.npy", arrays["target"])
    rows = zip(
        arrays["start"].tolist(), arrays["end"].tolist(), ["train", "valid", "train", "test", "train"], strict=True
    )
    (tmp_path / "w.bed").write_text("#h\n" + "".join(f"1\t{start}\t{end}\t{split}\n" for start, end, split in rows))
    return tmp_path / "t.npy", tmp_path / "w.bed"


PAIRED = TargetTable((Target("a+"), Target("a-"), Target("b")), (1, 0, 2))


def test_items_of_an_npz(npz, arrays):
    data = TrackDataset.from_npz(npz, targets=PAIRED)
    item = data[2]
    assert list(item) == ["input_ids", "labels", "interval", "index"]
    assert item["input_ids"].dtype == torch.uint8 and item["labels"].dtype == torch.float32
    assert np.array_equal(item["input_ids"], arrays["sequence"][2])
    assert np.array_equal(item["labels"], arrays["target"][2].astype(np.float32))
    assert (item["interval"], item["index"]) == (("chr1", 60, 80), 2)
    assert (len(data), data.num_bins, data.num_tracks, data.strand_pair) == (N, M, T, (1, 0, 2))


def test_all_sources_give_the_same_items(npz, memmap, tmp_path, arrays, genome):
    places = [("chr1", start, start + L) for start in arrays["start"].tolist()]
    folder = write_basenji(tmp_path / "b", arrays["sequence"], arrays["target"], bed=places)
    options = TrackOptions(return_sequence=True)
    datasets = [
        TrackDataset.from_npz(npz, genome, options),
        TrackDataset.from_memmap(*memmap, genome, options),
        TrackDataset.from_tfrecords(folder, "train", genome, options),
    ]
    for index in range(N):
        items = [data[index] for data in datasets]
        for item in items:
            assert torch.equal(item["input_ids"], torch.from_numpy(arrays["sequence"][index]))
            assert torch.equal(item["labels"], items[0]["labels"])
            assert item["interval"] == places[index]
            assert item["sequence"] == CHROM[30 * index : 30 * index + L]
    stored = TrackDataset.from_tfrecords(folder, "train", options=options)[4]
    assert torch.equal(stored["input_ids"], items[0]["input_ids"])
    assert stored["sequence"] == id_letters(arrays["sequence"][4])


def test_regions_narrower_than_the_stored_sequences(tmp_path, arrays, genome):
    """Newer Basenji folders list the regions that targets cover; the stored windows are wider around their centres."""
    inner = [("1", start + 4, start + L - 4) for start in arrays["start"].tolist()]
    folder = write_basenji(tmp_path / "b", arrays["sequence"], arrays["target"], bed=inner)
    stored, read = (TrackDataset.from_tfrecords(folder, "train", source) for source in (None, genome))
    for index in range(N):
        assert stored[index]["interval"] == read[index]["interval"] == ("1", 30 * index, 30 * index + L)
        assert torch.equal(stored[index]["input_ids"], read[index]["input_ids"])


def test_coords_may_stand_in_one_array_or_nowhere(tmp_path, arrays):
    coords = np.array([["chr1", str(start), str(start + L)] for start in arrays["start"].tolist()])
    bare = {key: arrays[key] for key in ("sequence", "target")}
    np.savez(tmp_path / "c.npz", coords=coords, **bare)
    np.savez(tmp_path / "n.npz", **bare)
    assert TrackDataset.from_npz(tmp_path / "c.npz")[1]["interval"] == ("chr1", 30, 50)
    assert TrackDataset.from_npz(tmp_path / "n.npz")[1]["interval"] is None


@given(st.integers(0, 50), st.integers(1, 40), st.integers(1, 60))
def test_what_is_widened_is_cropped_back(start, length, wanted):
    low, high = centred(start, start + length, wanted)
    assert high - low == wanted
    if wanted >= length:
        crop = (wanted - length) // 2
        assert low + crop == start
        assert centred(low, high, length) == (start, start + length)


def test_windows_are_widened_with_the_genome_and_cropped_without(npz, genome):
    wide = TrackDataset.from_npz(npz, genome, TrackOptions(context_length=26, return_sequence=True))
    assert wide[0]["interval"] == ("chr1", -3, 23)
    assert wide[0]["input_ids"][:3].tolist() == [4, 4, 4] and wide[0]["sequence"] == "NNN" + CHROM[:23]
    assert np.array_equal(wide[2]["input_ids"], letter_ids(CHROM[57:83]))
    narrow = TrackDataset.from_npz(npz, options=TrackOptions(context_length=12, target_length=2, track_indices=[2, 0]))
    assert narrow[1]["interval"] == ("chr1", 34, 46)
    assert np.array_equal(narrow[1]["input_ids"], letter_ids(CHROM[34:46]))
    whole = TrackDataset.from_npz(npz)[1]["labels"]
    assert torch.equal(narrow[1]["labels"], whole[1:3][:, [2, 0]])


def test_off_the_chromosome_is_n_or_padding(tmp_path, genome):
    regions = [Interval("chr2", 36, 40), Interval("2", 0, 2)]
    plain = prepare_enformer_inputs(genome, regions, 8, return_sequence=True)
    assert plain.input_ids.tolist() == [[2, 3, 0, 1, 2, 3, 4, 4], [4, 4, 4, 0, 1, 2, 3, 0]]
    assert plain.sequences == ["GTACGTNN", "NNNACGTA"]
    padded = prepare_enformer_inputs(genome, regions, 8, offchrom="pad")
    assert padded.input_ids.tolist() == [[2, 3, 0, 1, 2, 3, 5, 5], [5, 5, 5, 0, 1, 2, 3, 0]]
    assert padded.sequences is None and padded.windows[1] == ("2", -3, 5)


def test_prepared_inputs_from_paths_crop_with_a_warning(tmp_path, genome, caplog):
    (tmp_path / "r.bed").write_text("chr1\t50\t60\nchr1\t100\t104\n")
    prepared = prepare_enformer_inputs(tmp_path / "g.fa", tmp_path / "r.bed", 6)
    assert prepared.windows == [("chr1", 52, 58), ("chr1", 99, 105)]
    assert np.array_equal(prepared.input_ids[0], letter_ids(CHROM[52:58]))
    assert "1 of 2 intervals are cropped" in caplog.text


def test_letters_other_than_bases_become_n():
    assert letter_ids("ACGTNacgtnRYWU").tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 4, 4, 4, 3]
    assert id_letters(np.array([0, 1, 2, 3, 4, 5], dtype=np.uint8)) == "ACGTNN"


def test_unknown_targets_stay_nan(tmp_path, arrays):
    arrays["target"][0, 1] = np.nan
    np.savez(tmp_path / "nan.npz", **arrays)
    labels = TrackDataset.from_npz(tmp_path / "nan.npz")[0]["labels"]
    assert labels.isnan().all(1).tolist() == [False, True, False, False]


def bad_npz(tmp_path, arrays, **changes):
    np.savez(tmp_path / "bad.npz", **{key: value for key, value in (arrays | changes).items() if value is not None})
    return TrackDataset.from_npz(tmp_path / "bad.npz")


def test_arrays_that_do_not_fit(tmp_path, arrays):
    ids, target = arrays["sequence"], arrays["target"]
    for changes, message in [
        ({"target": None}, "must hold the array `target`"),
        ({"sequence": ids.astype(np.int64)}, r"`sequence` of .* must be uint8 \(N, L\), was int64 \(5, 20\)"),
        ({"sequence": ids + 4}, "`sequence` of .* must hold ids 0 to 5"),
        ({"target": target[:, :, 0]}, r"`target` of .* must be floats \(N, bins, tracks\), was float16 \(5, 4\)"),
        ({"target": target[:4]}, "`target` of .* one row for each of 5 sequences, has 4"),
        ({"end": arrays["end"] + 1}, "coordinates of .* must span 20 bp, not 21"),
        ({"start": arrays["start"] + 100}, r"`end` \(20\) must be larger than `start` \(100\)"),
    ]:
        with pytest.raises(DataError, match=message):
            bad_npz(tmp_path, arrays, **changes)
    with pytest.raises(DataError, match=r"Row 0 of .* holds infinite targets"):
        bad_npz(tmp_path, arrays, target=np.full_like(target, np.inf))[0]


def test_files_that_are_no_npz(tmp_path, npz):
    (tmp_path / "cut.npz").write_bytes(npz.read_bytes()[:-60])
    (tmp_path / "text.npz").write_text("hello")
    for name in ("cut.npz", "text.npz"):
        with pytest.raises(DataError, match=r"is not a whole \.npz file"):
            TrackDataset.from_npz(tmp_path / name)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"`path` must be a \.npz file"):
        TrackDataset.from_npz(tmp_path / "one.npy")


def test_options_that_do_not_fit(npz, memmap, genome):
    for options, message in [
        ({"context_length": 21}, r"`context_length` \(21\) is larger than the 20 bp stored"),
        ({"context_length": 0}, "`context_length` must be a whole number of 1 or more, was 0"),
        ({"target_length": 5}, r"`target_length` \(5\) exceeds the 4 bins"),
        ({"track_indices": [3]}, "`track_indices` must be different numbers from 0 to 2"),
        ({"track_indices": []}, "`track_indices` must be different numbers"),
        ({"track_indices": [0]}, "holds track 0 but not 1, its other strand"),
        ({"offchrom": "N"}, "`offchrom` must be 'n'"),
    ]:
        with pytest.raises(DataError, match=message):
            TrackDataset.from_npz(npz, options=TrackOptions(**options), targets=PAIRED)
    with pytest.raises(DataError, match=r"`targets` must list the 3 tracks of .*x\.npz, but lists 2"):
        TrackDataset.from_npz(npz, targets=TargetTable(PAIRED.targets[:2]))


def test_a_bed_of_other_rows_than_the_targets(memmap, genome):
    path, bed = memmap
    bed.write_text("chr1\t0\t20\n")
    with pytest.raises(DataError, match=r"`targets` of .*t\.npy must have one row for each of 1 the rows of .*has 5"):
        TrackDataset.from_memmap(path, bed, genome)


def test_places_that_are_not_in_the_genome(memmap, npz, genome, tmp_path):
    path, bed = memmap
    rows = bed.read_text()
    bed.write_text(rows.replace("1\t120\t", "chr11\t120\t"))
    with pytest.raises(DataError, match=r"Line 6 of .*'chr11', which is unknown; the nearest .*'chr1'"):
        TrackDataset.from_memmap(path, bed, genome)
    bed.write_text(rows.replace("\t120\t140", "\t200\t220"))
    with pytest.raises(
        DataError, match=r"Line 6 of .*`interval` chr1:200-220 lies outside the chromosome, which is 200 bp"
    ):
        TrackDataset.from_memmap(path, bed, genome)
    other = Genome(write_fasta(tmp_path / "o.fa", {"chrB": "ACGT"}))
    with pytest.raises(DataError, match=r"`chrom` must be a contig of o\.fa, was 'chr1'; the nearest .*'chrB'"):
        TrackDataset.from_npz(npz, other)
    with pytest.raises(DataError, match=r"`interval` chr2:40-44 .* must share a base with 'chr2'"):
        prepare_enformer_inputs(genome, [("chr2", 40, 44)], 4)
    with pytest.raises(DataError, match="`intervals` must hold at least one region"):
        prepare_enformer_inputs(genome, [])


def test_workers_and_pickles_read_the_same(memmap, genome):
    data = TrackDataset.from_memmap(*memmap, genome, TrackOptions(context_length=30))
    expected = [data[index]["input_ids"] for index in range(N)]
    loader = DataLoader(data, batch_size=None, num_workers=2)
    assert all(torch.equal(item["input_ids"], ids) for item, ids in zip(loader, expected, strict=True))
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[3]["input_ids"], expected[3])


def test_the_default_collator_takes_what_a_trainer_leaves(npz):
    data = TrackDataset.from_npz(npz)
    kept = [{key: data[index][key] for key in ("input_ids", "labels")} for index in range(2)]
    batch = default_data_collator(kept)
    assert batch["input_ids"].shape == (2, L) and batch["labels"].shape == (2, M, T)


def test_rows_for_the_datasets_library(npz):
    data = TrackDataset.from_npz(npz, options=TrackOptions(return_sequence=True))
    stream = data.to_datasets()
    rows = list(stream)
    assert [row["index"] for row in rows] == list(range(N)) and rows[3]["chrom"] == "chr1" and rows[3]["start"] == 90
    assert np.array_equal(rows[3]["input_ids"], data[3]["input_ids"])
    assert np.array_equal(rows[3]["labels"], data[3]["labels"])
    iterator = iter(stream)
    next(iterator), next(iterator)
    state = stream.state_dict()
    stream.load_state_dict(state)
    assert [row["index"] for row in stream] == [2, 3, 4]


# Augmentation


def slow_pair(ids, labels, rc, shift, pairs):
    """One base, bin and track at a time."""
    moved = [ids[at + shift] if 0 <= at + shift < len(ids) else 4 for at in range(len(ids))]
    if not rc:
        return moved, labels
    turned = [{0: 3, 1: 2, 2: 1, 3: 0}.get(base, base) for base in reversed(moved)]
    bins, tracks = len(labels), len(labels[0])
    return turned, [[labels[bins - 1 - b][pairs[t]] for t in range(tracks)] for b in range(bins)]


@given(
    ids=st.lists(st.integers(0, 5), min_size=5, max_size=12),
    rc=st.booleans(),
    shift=st.integers(-4, 4),
    pairs=st.sampled_from([[0, 1, 2], [1, 0, 2], [2, 1, 0]]),
    dtype=st.sampled_from([torch.uint8, torch.int8, torch.int32, torch.int64]),
)
def test_augment_equals_the_slow_twin_and_is_undone(ids, rc, shift, pairs, dtype):
    labels = torch.arange(12.0).view(4, 3)
    done = augment(torch.tensor(ids, dtype=dtype), labels, rc, shift, pairs)
    slow_ids, slow_labels = slow_pair(ids, labels.tolist(), rc, shift, pairs)
    assert done.input_ids.tolist() == slow_ids and done.input_ids.dtype == dtype
    assert done.labels.tolist() == slow_labels and (done.rc, done.shift) == (rc, shift)
    assert torch.equal(undo_augment(done.labels, done.rc, pairs), labels)


def test_reverse_complement_twice_is_the_identity_and_keeps_padding():
    ids = torch.tensor([[0, 1, 2, 3, 4, 5, -1]])
    labels = torch.rand(1, 5, 4)
    once = augment(ids, labels, rc=True, strand_pair=[1, 0, 3, 2])
    assert once.input_ids.tolist() == [[-1, 5, 4, 0, 1, 2, 3]]
    assert torch.equal(once.labels[0, 0], labels[0, -1, [1, 0, 3, 2]])
    twice = augment(once.input_ids, once.labels, rc=True, strand_pair=[1, 0, 3, 2])
    assert torch.equal(twice.input_ids, ids) and torch.equal(twice.labels, labels)


@given(st.integers(0, M * 5 - 1), st.booleans())
def test_a_mark_in_sequence_and_targets_stays_aligned(place, rc):
    """A C among T's (or its complement) lies in the bin that carries the signal, before and after."""
    ids, labels = torch.full((M * 5,), 3, dtype=torch.uint8), torch.zeros(M, 1)
    ids[place], labels[place // 5, 0] = 1, 1.0
    done = augment(ids, labels, rc=rc)
    found = int((done.input_ids == (2 if rc else 1)).nonzero())
    assert int(done.labels.argmax()) == found // 5


def test_augment_checks_its_arguments():
    ids, labels = torch.zeros(4, dtype=torch.uint8), torch.zeros(2, 3)
    with pytest.raises(DataError, match=r"`shift` \(4\) must be smaller than the 4 bases"):
        augment(ids, shift=4)
    with pytest.raises(DataError, match="`strand_pair` must be its own inverse"):
        augment(ids, labels, rc=True, strand_pair=[1, 2, 0])
    with pytest.raises(DataError, match="`strand_pair` must be 3 whole numbers"):
        augment(ids, labels, rc=True, strand_pair=[1, 0])


def test_text_and_ids_have_the_same_reverse_complement():
    text = "ACGTNNGCA"
    assert id_letters(reverse_complement_ids(torch.from_numpy(letter_ids(text))).numpy()) == reverse_complement(text)
    assert shift_ids(torch.from_numpy(letter_ids(text)), -2).tolist()[:2] == [4, 4]


# The collator


def training(npz, genome=None, **options):
    return TrackDataset.from_npz(npz, genome, TrackOptions(augment=True, **options), PAIRED)


def test_each_row_is_its_own_pair_augmented(npz, genome):
    data = training(npz, genome, context_length=24, return_sequence=True)
    collate = TrackCollator(genome, data.strand_pair, max_shift=4, seed=5, keep_metadata=True)
    batch = collate([data[index] for index in range(N)])
    assert len({*batch["rc"]}) == 2 and len({*batch["shift"]}) > 2
    for index in range(N):
        rc, shift = batch["rc"][index], batch["shift"][index]
        start = 30 * index - 2 + shift
        letters = "".join(CHROM[at] if at >= 0 else "N" for at in range(start, start + 24))
        ids = torch.from_numpy(letter_ids(letters))
        assert torch.equal(batch["input_ids"][index], reverse_complement_ids(ids) if rc else ids)
        assert torch.equal(undo_augment(batch["labels"][index], rc, data.strand_pair), data[index]["labels"])
        assert torch.equal(torch.from_numpy(letter_ids(batch["sequence"][index])), batch["input_ids"][index])


def test_without_a_genome_a_shift_fills_with_n(npz):
    data = training(npz)
    batch = TrackCollator(max_shift=3, rc_probability=0.0, keep_metadata=True)([data[index] for index in range(N)])
    for index, shift in enumerate(batch["shift"]):
        assert torch.equal(batch["input_ids"][index], shift_ids(data[index]["input_ids"], shift))


def draws(collate, data, rows):
    batch = collate([data[row] for row in rows])
    return {row: (rc, shift) for row, rc, shift in zip(rows, batch["rc"], batch["shift"], strict=True)}


def test_draws_belong_to_seed_epoch_and_row(npz):
    data = training(npz)
    collate = TrackCollator(keep_metadata=True, seed=1)
    whole = draws(collate, data, [0, 1, 2, 3, 4])
    assert whole == draws(collate, data, [4, 2]) | draws(collate, data, [3, 0, 1])
    data.set_epoch(1)
    assert whole != draws(collate, data, [0, 1, 2, 3, 4])
    data.set_epoch(0)
    assert whole == draws(collate, data, [0, 1, 2, 3, 4])
    assert whole != draws(TrackCollator(keep_metadata=True, seed=2), data, [0, 1, 2, 3, 4])


def test_the_share_and_the_range_of_draws(npz, arrays):
    item = {"input_ids": torch.zeros(30, dtype=torch.uint8), "interval": None, "augment": 0}
    batch = TrackCollator(keep_metadata=True)([item | {"index": index} for index in range(3000)])
    assert set(batch["shift"]) == set(range(-3, 4))
    counts = np.bincount(np.array(batch["shift"]) + 3)
    assert counts.min() > 350 and counts.max() < 510
    assert 1400 < sum(batch["rc"]) < 1600


def test_evaluation_is_never_augmented_unless_asked(npz):
    data = TrackDataset.from_npz(npz)
    items = [data[index] for index in range(N)]
    for collate in (TrackCollator(max_shift=3), TrackCollator(augment=False)):
        assert torch.equal(collate(items)["input_ids"], torch.stack([item["input_ids"] for item in items]))
    assert TrackCollator(augment=False)([training(npz)[0]])["input_ids"].tolist() == [items[0]["input_ids"].tolist()]
    asked = TrackCollator(augment=True, keep_metadata=True)
    first = draws(asked, data, [0, 1, 2, 3, 4])
    assert any(rc or shift for rc, shift in first.values())
    asked.set_epoch(1)
    assert first != draws(asked, data, [0, 1, 2, 3, 4])


def test_ids_of_another_vocabulary(npz):
    data = TrackDataset.from_npz(npz)
    batch = TrackCollator(id_map=[7, 8, 9, 10, 3, 0])([data[0]])
    assert batch["input_ids"].dtype == torch.int64
    assert batch["input_ids"][0].tolist() == [[7, 8, 9, 10, 3, 0][base] for base in data[0]["input_ids"].tolist()]


def test_batches_that_do_not_fit(npz, genome):
    data = training(npz)
    item = data[0]
    with pytest.raises(DataError, match=r"`index` is missing from the items.*remove_unused_columns=False"):
        TrackCollator()([{"input_ids": item["input_ids"], "labels": item["labels"]}])
    with pytest.raises(DataError, match=r"`labels` must have one shape in a batch, have \[\(2, 3\), \(4, 3\)\]"):
        TrackCollator(augment=False)([item, item | {"labels": item["labels"][:2]}])
    with pytest.raises(DataError, match=r"`species` must be the same in a whole batch"):
        TrackCollator()([item | {"species": "human"}, item | {"species": "mouse"}])
    with pytest.raises(DataError, match=r"`genome` has entries for \['human'\], but .* 'fly'"):
        TrackCollator({"human": genome}, augment=True)([item | {"species": "fly", "index": 1}])
    with pytest.raises(DataError, match="`interval` of an item is not known"):
        TrackCollator(genome, augment=True, max_shift=1)([item | {"interval": None, "index": k} for k in range(9)])
    for arguments, message in [
        ({"max_shift": -1}, "`max_shift`"),
        ({"rc_probability": 1.5}, "`rc_probability` must lie between 0 and 1, was 1.5"),
        ({"id_map": [1, 2]}, "`id_map` must hold 6 ids"),
        ({"offchrom": "x"}, "`offchrom`"),
    ]:
        with pytest.raises(DataError, match=message):
            TrackCollator(**arguments)


# Splits


def test_parts_by_a_column_of_the_bed(memmap, genome, npz):
    parts = split_tracks_by_column(TrackDataset.from_memmap(*memmap, genome))
    assert {name: [part[item]["index"] for item in range(len(part))] for name, part in parts.items()} == {
        "train": [0, 2, 4], "valid": [1], "test": [3],
    }  # fmt: skip
    assert torch.equal(parts["test"][0]["labels"], TrackDataset.from_npz(npz)[3]["labels"])
    with pytest.raises(DataError, match="`dataset` was made from no BED file"):
        split_tracks_by_column(TrackDataset.from_npz(npz))


def placed(tmp_path, arrays, places):
    bare = {key: np.resize(arrays[key], (len(places), *arrays[key].shape[1:])) for key in ("sequence", "target")}
    np.savez(tmp_path / "p.npz", coords=np.array([[c, str(s), str(s + L)] for c, s in places]), **bare)
    return TrackDataset.from_npz(tmp_path / "p.npz")


def test_whole_chromosomes(tmp_path, arrays):
    data = placed(tmp_path, arrays, [("chr1", 0), ("chr2", 0), ("chr1", 50), ("chr3", 0)])
    parts = split_tracks_by_chromosome(data, {"valid": ["chr2"], "test": ["chr3"]})
    assert {name: [part[item]["index"] for item in range(len(part))] for name, part in parts.items()} == {
        "train": [0, 2], "valid": [1], "test": [3],
    }  # fmt: skip
    with pytest.raises(DataError, match="`held_out` names 'chr4'"):
        split_tracks_by_chromosome(data, ["chr4"])


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 300)), min_size=6, max_size=20), st.integers(0, 15)
)
def test_folds_share_no_base_and_hold_every_item(tmp_path_factory, places, gap):
    ids, target = np.zeros((1, L), np.uint8), np.zeros((1, M, T), np.float16)
    data = placed(tmp_path_factory.mktemp("folds"), {"sequence": ids, "target": target}, places)
    try:
        folds = contig_folds(data, 2, seed=1, gap_bp=gap)
    except GeneSpliceError as error:
        assert "`num_folds` must lie between 2 and 1" in str(error)
        return
    rows = [[fold[item]["index"] for item in range(len(fold))] for fold in folds]
    assert sorted(row for fold in rows for row in fold) == list(range(len(places)))
    for first in rows[0]:
        for second in rows[1]:
            (chrom, start), (other, begin) = places[first], places[second]
            assert chrom != other or abs(start - begin) >= L + gap
    again = contig_folds(data, 2, seed=1, gap_bp=gap)
    assert [[fold[item]["index"] for item in range(len(fold))] for fold in again] == rows


def test_folds_of_an_even_layout_are_even(tmp_path, arrays):
    data = placed(tmp_path, arrays, [("a", 100 * k) for k in range(9)])
    assert [len(fold) for fold in contig_folds(data, 3)] == [3, 3, 3]


def test_bed_tables_may_be_read_beforehand(memmap, genome):
    path, bed = memmap
    table = read_bed(bed, chrom_map={"1": "chr1"})
    assert TrackDataset.from_memmap(path, table, genome)[0]["interval"] == ("chr1", 0, 20)
