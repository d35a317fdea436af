"""TFRecords against a writer made of the format's own words; damage is named with file and record."""

import gzip
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from track_files import example, field, frame, one_hot, slow_crc32c, varint, write_basenji, write_tfrecord

from genesplice_hf.data.basenji import TfrecordSource, decode_record, read_statistics, record_files
from genesplice_hf.data.crc32c import crc32c, masked_crc32c
from genesplice_hf.data.tfrecord import parse_example, read_records
from genesplice_hf.errors import DataError

COMPRESSIONS = ["", "ZLIB", "GZIP"]
PAYLOADS = [b"first", b"", bytes(range(256)) * 300, b"last"]


def test_crc32c_of_rfc_3720():
    """The examples of RFC 3720, appendix B.4, and the check value of the CRC catalogues."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"") == 0


@given(st.integers(0, 1200), st.integers(0, 2**32 - 1))
def test_crc32c_equals_the_slow_twin_at_every_length(length, seed):
    data = np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8).tobytes()
    assert crc32c(data) == slow_crc32c(data)
    assert masked_crc32c(data) == struct.unpack("<I", frame(data)[-4:])[0]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_records_come_back_whatever_the_compression(tmp_path, compression):
    path = write_tfrecord(tmp_path / "x.tfr", PAYLOADS, compression)
    assert list(read_records(path)) == PAYLOADS
    assert list(read_records(path, check_crc=False)) == PAYLOADS


def test_a_compressed_file_without_a_record_is_legal(tmp_path, arrays):
    """The last file of a split may hold none."""
    assert list(read_records(write_tfrecord(tmp_path / "x.tfr", [], "ZLIB"))) == []
    folder = write_basenji(tmp_path / "d", *arrays)
    write_tfrecord(folder / "tfrecords" / "train-3.tfr", [], "ZLIB")
    source = TfrecordSource(folder, "train")
    assert [len(group) for group in source.groups] == [3, 3, 1, 0] and np.array_equal(source.read(6).ids, arrays[0][6])


def test_joined_streams_are_read_through(tmp_path):
    parts = [zlib.compress(frame(b"a")), gzip.compress(frame(b"b")), zlib.compress(frame(b"c"))]
    (tmp_path / "x.tfr").write_bytes(b"".join(parts))
    assert list(read_records(tmp_path / "x.tfr")) == [b"a", b"b", b"c"]


def test_memory_does_not_grow_with_the_file(tmp_path):
    """32 MB of records in a small file: no more than a few of them are held at once."""
    path = tmp_path / "x.tfr"
    path.write_bytes(zlib.compress(frame(bytes(1 << 18)) * 128, 1))
    tracemalloc.start()
    sizes = sum(len(payload) for payload in read_records(path, check_crc=False))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sizes == 32 << 20
    assert peak < 8 << 20


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_truncation_names_file_and_record(tmp_path, compression):
    whole = write_tfrecord(tmp_path / "whole.tfr", [b"x" * 50, np.random.default_rng(0).bytes(5000)], compression)
    path = tmp_path / "cut.tfr"
    path.write_bytes(whole.read_bytes()[:-600])
    records = read_records(path)
    with pytest.raises(DataError, match=r"cut\.tfr is truncated in record [01]"):
        list(records)


def test_a_plain_file_cut_in_a_header(tmp_path):
    path = tmp_path / "cut.tfr"
    path.write_bytes(frame(b"whole") + frame(b"second")[:7])
    records = read_records(path)
    assert next(records) == b"whole"
    with pytest.raises(DataError, match=r"cut\.tfr is truncated in record 1 \(counted from 0\)"):
        next(records)


def test_a_stream_without_its_last_bytes_is_told_though_all_records_came(tmp_path):
    path = tmp_path / "x.tfr"
    path.write_bytes(zlib.compress(frame(b"all here"))[:-2])
    records = read_records(path)
    assert next(records) == b"all here"
    with pytest.raises(DataError, match="truncated in record 1"):
        next(records)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(("place", "what"), [(3, "length"), (15, "payload"), (-1, "payload")])
def test_a_wrong_checksum_is_told(tmp_path, compression, place, what):
    second = bytearray(frame(b"payload"))
    second[place] ^= 1
    data = frame(b"first") + bytes(second)
    packed = {"": bytes, "ZLIB": zlib.compress, "GZIP": gzip.compress}[compression](data)
    (tmp_path / "x.tfr").write_bytes(packed)
    with pytest.raises(DataError, match=rf"x\.tfr is damaged \(the checksum of the {what} .* in record 1"):
        list(read_records(tmp_path / "x.tfr"))
    if what == "payload":
        assert len(list(read_records(tmp_path / "x.tfr", check_crc=False))) == 2


def test_damage_of_the_compressed_stream(tmp_path):
    packed = bytearray(zlib.compress(frame(np.random.default_rng(0).bytes(4000))))
    packed[2000] ^= 0xFF
    (tmp_path / "x.tfr").write_bytes(packed)
    with pytest.raises(DataError, match=r"x\.tfr is (damaged|truncated).* in record 0"):
        list(read_records(tmp_path / "x.tfr", check_crc=False))


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"not a record at all", "no TFRecord file")])
def test_files_that_hold_no_records(tmp_path, content, message):
    (tmp_path / "x.tfr").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_records(tmp_path / "x.tfr"))


def test_example_of_all_three_kinds():
    features = {"sequence": b"\x00\x01\xff", "genome": [1, -1, 2**40], "score": [0.5, -2.0]}
    read = parse_example(example(features))
    assert read["sequence"] == [b"\x00\x01\xff"]
    assert read["genome"].tolist() == [1, -1, 2**40]
    assert read["score"].tolist() == [0.5, -2.0]


def test_numbers_written_one_by_one_are_read_too():
    loose = b"".join(varint(1 << 3) + varint(number) for number in (3, 5))
    floats = b"".join(varint(1 << 3 | 5) + struct.pack("<f", number) for number in (1.5, 2.5))
    entries = [(b"i", field(3, loose)), (b"f", field(2, floats))]
    read = parse_example(field(1, b"".join(field(1, field(1, key) + field(2, value)) for key, value in entries)))
    assert read["i"].tolist() == [3, 5] and read["f"].tolist() == [1.5, 2.5]


@pytest.mark.parametrize("payload", [b"\x0a\x50abc", b"\xff", b"\x0b\x01"])
def test_bytes_that_are_no_example(payload):
    with pytest.raises(DataError, match=r"no tf\.train\.Example"):
        parse_example(payload)


L, M, T = 8, 4, 3


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 5, (7, L)).astype(np.uint8)
    return ids, generator.random((7, M, T)).astype(np.float16)


@pytest.mark.parametrize("encoding", ["one_hot", "index"])
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("in_memory", [False, True])
def test_basenji_folders_read_back(tmp_path, arrays, encoding, compression, in_memory):
    ids, targets = arrays
    source = TfrecordSource(
        write_basenji(tmp_path / "d", ids, targets, encoding, compression), "train", in_memory=in_memory
    )
    assert len(source) == 7 and [list(group) for group in source.groups] == [[0, 1, 2], [3, 4, 5], [6]]
    for index in (0, 5, 6, 2, 2, 4, 1, 3):
        read = source.read(index)
        assert np.array_equal(read.ids, ids[index]) and np.array_equal(read.labels, targets[index])


def test_files_are_ordered_by_number(tmp_path):
    (tmp_path / "tfrecords").mkdir()
    for number in range(12):
        (tmp_path / "tfrecords" / f"train-{number}.tfr").touch()
    assert [file.stem for file in record_files(tmp_path, "train")] == [f"train-{number}" for number in range(12)]
    (tmp_path / "tfrecords" / "train-3.tfr").unlink()
    with pytest.raises(DataError, match="lacks some of the files"):
        record_files(tmp_path, "train")
    with pytest.raises(DataError, match="`folder` must hold files valid-0"):
        record_files(tmp_path, "valid")


def test_unmappable_bins_become_unknown_on_request(tmp_path, arrays):
    ids, targets = arrays
    folder = write_basenji(tmp_path / "d", ids[:1], targets[:1])
    umap = bytes([0, 1, 0, 1])
    payload = example({"sequence": one_hot(ids[0]).tobytes(), "target": targets[0].tobytes(), "umap": umap})
    write_tfrecord(folder / "tfrecords" / "train-0.tfr", [payload])
    assert not np.isnan(TfrecordSource(folder, "train").read(0).labels).any()
    masked = TfrecordSource(folder, "train", mask_unmappable=True).read(0).labels
    assert np.isnan(masked).all(axis=1).tolist() == [False, True, False, True]
    assert np.array_equal(masked[0], targets[0, 0])


def test_the_bed_says_where_and_how_many(tmp_path, arrays):
    ids, targets = arrays
    places = [("chr1", 10 * number, 10 * number + L) for number in range(7)]
    folder = write_basenji(tmp_path / "d", ids, targets, bed=places)
    assert [(part.chrom, part.start, part.end) for part in TfrecordSource(folder, "train").intervals] == places
    with pytest.raises(DataError, match=r"`split` must be one of \['train'\].*was 'valid'"):
        (folder / "tfrecords" / "train-0.tfr").rename(folder / "tfrecords" / "valid-0.tfr")
        TfrecordSource(folder, "valid")


def test_another_number_of_records_than_the_bed_has(tmp_path, arrays):
    ids, targets = arrays
    folder = write_basenji(tmp_path / "d", ids, targets, bed=[("chr1", 0, L)] * 11)
    with pytest.raises(DataError, match=r"must hold 11 records .* holds 7"):
        TfrecordSource(folder, "train")
    folder = write_basenji(tmp_path / "e", ids, targets, bed=[("chr1", 0, L)] * 8)
    with pytest.raises(DataError, match=r"train-2\.tfr ends before record 1"):
        TfrecordSource(folder, "train").read(7)


def decode(statistics_folder, **features):
    whole = {"sequence": bytes(4 * L), "target": bytes(2 * M * T)} | features
    kept = {key: value for key, value in whole.items() if value is not None}
    return decode_record(example(kept), read_statistics(statistics_folder / "statistics.json"))


def test_records_that_do_not_fit_name_the_feature(tmp_path, arrays):
    folder = write_basenji(tmp_path / "d", *arrays)
    assert decode(folder).ids.tolist() == [4] * L
    with pytest.raises(DataError, match=r"`target` must be float16 of 4 bins and 3 tracks \(24 bytes\).*has 32 bytes"):
        decode(folder, target=bytes(32))
    with pytest.raises(DataError, match="`sequence` must have 8 or 32 bytes, has 31"):
        decode(folder, sequence=bytes(31))
    with pytest.raises(DataError, match="`sequence` must be one-hot, but position 1 sums to 2"):
        decode(folder, sequence=bytes([0, 0, 0, 1, 1, 0, 1, 0]) + bytes(24))
    with pytest.raises(DataError, match="`sequence` must hold indices 0 to 4, holds 9"):
        decode(folder, sequence=bytes([9] * L))
    with pytest.raises(DataError, match="`umap` must have 4 bytes"):
        decode(folder, umap=bytes(3))
    with pytest.raises(DataError, match="must hold the bytes `target`"):
        decode(folder, target=None)


def test_a_record_of_other_tracks_names_file_and_record(tmp_path, arrays):
    ids, targets = arrays
    folder = write_basenji(tmp_path / "d", ids, targets)
    (folder / "statistics.json").write_text('{"num_targets": 2, "seq_length": 8, "target_length": 4, "train_seqs": 7}')
    with pytest.raises(
        DataError, match=r"Record 1 of .*train-1\.tfr: `target` must be float16 of 4 bins and 2 tracks"
    ):
        TfrecordSource(folder, "train").read(4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "must hold a JSON object, holds list"),
        ('{"num_targets": 2, "seq_length": 8}', "`target_length` of .* was None"),
        ('{"num_targets": 0, "seq_length": 8, "target_length": 1}', "`num_targets` of .* was 0"),
    ],
)
def test_bad_statistics(tmp_path, text, message):
    (tmp_path / "statistics.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_statistics(tmp_path / "statistics.json")
