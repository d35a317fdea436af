"""Writers of small track files for tests: TFRecords by the format's own words, Basenji folders, bigWigs, FASTA."""

import gzip
import json
import struct
import zlib

import numpy as np


def slow_crc32c(data):
    """Bit by bit, straight from the definition."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ 0x82F63B78 * (register & 1)
    return register ^ 0xFFFFFFFF


def varint(number):
    out = bytearray()
    number &= (1 << 64) - 1
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(features):
    """A serialised `tf.train.Example`: bytes -> BytesList, lists of int -> Int64List, of float -> FloatList."""
    entries = b""
    for key, value in features.items():
        if isinstance(value, bytes):
            feature = field(1, field(1, value))
        elif isinstance(value[0], int):
            feature = field(3, field(1, b"".join(map(varint, value))))
        else:
            feature = field(2, field(1, struct.pack(f"<{len(value)}f", *value)))
        entries += field(1, field(1, key.encode()) + field(2, feature))
    return field(1, entries)


def frame(payload):
    length = struct.pack("<Q", len(payload))
    masks = [
        (((crc >> 15 | crc << 17) & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF
        for crc in map(slow_crc32c, (length, payload))
    ]
    return length + struct.pack("<I", masks[0]) + payload + struct.pack("<I", masks[1])


def write_tfrecord(path, payloads, compression=""):
    data = b"".join(map(frame, payloads))
    packed = {"": bytes, "ZLIB": zlib.compress, "GZIP": gzip.compress}[compression](data)
    path.write_bytes(packed)
    return path


def one_hot(ids):
    return (ids[:, None] == np.arange(4)).astype(np.uint8)


def write_basenji(folder, ids, targets, encoding="one_hot", compression="ZLIB", per_file=3, split="train", bed=None):
    """A Basenji folder of one split: ids (N, L), targets (N, M, T); `bed` rows are (chrom, start, end)."""
    (folder / "tfrecords").mkdir(parents=True, exist_ok=True)
    rows = [
        example({
            "sequence": (one_hot(row) if encoding == "one_hot" else row.astype(np.uint8)).tobytes(),
            "target": target.astype("<f2").tobytes(),
            "genome": [0],
        })
        for row, target in zip(ids, targets, strict=True)
    ]  # fmt: skip
    for number, start in enumerate(range(0, len(rows), per_file)):
        write_tfrecord(folder / "tfrecords" / f"{split}-{number}.tfr", rows[start : start + per_file], compression)
    statistics = {"num_targets": targets.shape[2], "seq_length": ids.shape[1], "target_length": targets.shape[1]}
    (folder / "statistics.json").write_text(json.dumps({**statistics, "pool_width": 2, f"{split}_seqs": len(rows)}))
    if bed is not None:
        lines = [f"{chrom}\t{start}\t{end}\t{split}\n" for chrom, start, end in bed]
        (folder / "sequences.bed").write_text("".join(lines))
    return folder


def write_bigwig(path, contigs, runs):
    """`runs`: (chrom, start, values per base), sorted as the contigs are; everything else has no value."""
    import pyBigWig

    handle = pyBigWig.open(str(path), "w")
    handle.addHeader(list(contigs.items()))
    for chrom, start, values in runs:
        handle.addEntries(chrom, start, values=[float(value) for value in values], span=1, step=1)
    handle.close()
    return path


def write_fasta(path, records):
    path.write_text("".join(f">{name}\n{letters}\n" for name, letters in records.items()))
    return path
