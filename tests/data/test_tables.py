"""Tables: what stands in the file is what comes out, and every defect is named with its row."""

import gzip
import logging

import pandas as pd
import pytest

from genesplice_hf.data.tables import read_table
from genesplice_hf.errors import DataError

SEQUENCES = ["ACGT", "NA", "nan", "acgtN"]
LABELS = [0, 2, 1, 0]
FRAME = pd.DataFrame({"sequence": SEQUENCES, "label": LABELS, "chrom": ["1", "1", "X", "2"]})


def text(frame, sep=","):
    return frame.to_csv(index=False, sep=sep).encode()


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parquet(folder, frame):
    frame.to_parquet(folder / "t.parquet", index=False)
    return folder / "t.parquet"


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("t.csv", lambda frame: text(frame)),
        ("t.tsv", lambda frame: text(frame, "\t")),
        ("t.txt", lambda frame: text(frame, "\t")),
        ("t.csv.gz", lambda frame: gzip.compress(text(frame))),
        ("gzipped.csv", lambda frame: gzip.compress(text(frame, "\t"))),
        ("plain.csv.gz", lambda frame: text(frame)),
        ("bom.csv", lambda frame: b"\xef\xbb\xbf" + text(frame)),
        ("windows.csv", lambda frame: text(frame).replace(b"\n", b"\r\n")),
        ("no_final_newline.csv", lambda frame: text(frame).rstrip()),
    ],
)
def test_text_tables(tmp_path, name, pack):
    rows = read_table(write(tmp_path / name, pack(FRAME)))
    assert rows["sequence"] == SEQUENCES
    assert rows["label"] == LABELS
    assert rows.features["label"].dtype == "int64"


def test_parquet(tmp_path):
    rows = read_table(parquet(tmp_path, FRAME))
    assert rows.to_dict() == FRAME.to_dict("list")


def test_columns_get_their_usual_names_and_others_stay(tmp_path):
    frame = FRAME.rename(columns={"sequence": "seq", "label": "y"})
    rows = read_table(write(tmp_path / "t.csv", text(frame)), sequence_column="seq", label_column="y")
    assert rows.column_names == ["sequence", "label", "chrom"]
    assert rows["chrom"] == ["1", "1", "X", "2"]


def test_a_column_whose_name_is_taken_is_left_out_aloud(tmp_path, caplog):
    frame = FRAME.assign(strength=[0.5, 1.5, 2.5, 3.5])
    with caplog.at_level(logging.WARNING):
        rows = read_table(write(tmp_path / "t.csv", text(frame)), label_column="strength")
    assert rows["label"] == [0.5, 1.5, 2.5, 3.5]
    assert "['label'] are left out" in caplog.text


def test_sequences_alone(tmp_path):
    rows = read_table(write(tmp_path / "t.csv", "sequence\nNA\nACGT\n"), label_column=None)
    assert rows.to_dict() == {"sequence": ["NA", "ACGT"]}


@pytest.mark.parametrize(
    ("labels", "options", "dtype"),
    [
        (["0", "1.0"], {}, "int64"),
        (["0.5", "1"], {}, "float64"),
        (["0", "1"], {"problem_type": "regression"}, "float64"),
        (["0", "1"], {"num_labels": 1}, "float64"),
        (["-3", "1e-3"], {"problem_type": "regression"}, "float64"),
        (["0", "1"], {"problem_type": "single_label_classification", "num_labels": 2}, "int64"),
    ],
)
def test_kind_of_label(tmp_path, labels, options, dtype):
    content = "sequence,label\n" + "".join(f"ACGT,{label}\n" for label in labels)
    rows = read_table(write(tmp_path / "t.csv", content), **options)
    assert rows.features["label"].dtype == dtype
    assert rows["label"] == [float(label) for label in labels]


def test_true_and_false_in_parquet(tmp_path):
    rows = read_table(parquet(tmp_path, pd.DataFrame({"sequence": ["A", "C"], "label": [True, False]})))
    assert rows["label"] == [1, 0] and rows.features["label"].dtype == "int64"


def test_a_sequence_longer_than_the_readers_usual_block(tmp_path):
    long = "ACGT" * 600_000
    rows = read_table(write(tmp_path / "t.csv", f"sequence,label\n{long},1\nA,0\n"))
    assert rows["sequence"][0] == long


BAD = {
    "missing column": ("sequnce,label\nA,0\n", {}, r"'sequence'.*\['sequnce', 'label'\].*'sequnce'"),
    "missing label": ("sequence,y\nA,0\n", {}, "'label'.*nearest name"),
    "column twice": ("sequence,label,label\nA,0,1\n", {}, "each column once"),
    "empty file": ("", {}, "is empty"),
    "header alone": ("sequence,label\n", {}, "no row"),
    "empty sequence": ("sequence,label\nA,0\n,1\n  ,1\nC,0\n", {}, r"empty in rows 2, 3 \(2 in all\)"),
    "label nan": ("sequence,label\nA,0\nC,nan\n", {}, "missing or not a number in row 2"),
    "label empty": ("sequence,label\nA,\nC,1\n", {}, "missing or not a number in row 1"),
    "label infinite": ("sequence,label\nA,inf\n", {"problem_type": "regression"}, "row 1"),
    "label text": ("sequence,label\nA,EI\nC,IE\n", {}, r"rows 1, 2 \(2 in all\).*'EI'"),
    "label negative": ("sequence,label\nA,1\nC,-1\n", {}, "must be 0 or more.*-1 in row 2"),
    "label too large": ("sequence,label\nA,1\nC,2\n", {"num_labels": 2}, "must be 0 to 1 .*2 in row 2"),
    "label broken": (
        "sequence,label\nA,1\nC,0.5\n",
        {"problem_type": "single_label_classification"},
        "whole numbers.*0.5 in row 2.*regression",
    ),
    "broken with num_labels": ("sequence,label\nA,1\nC,5\n", {"num_labels": 3}, "row 2"),
    "many rows": ("sequence,label\n" + ",0\n" * 9, {}, r"rows 1, 2, 3, 4, 5, \.\.\. \(9 in all\)"),
    "extra field": ("sequence,label\nA,1\nC,0,7\n", {}, "Expected 2 columns, got 3"),
    "lost field": ("sequence,label\nA,1\nC\n", {}, "Expected 2 columns, got 1"),
    "unknown problem": ("sequence,label\nA,1\n", {"problem_type": "ranking"}, "`problem_type`"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables(tmp_path, case):
    content, options, message = BAD[case]
    with pytest.raises(DataError, match=message):
        read_table(write(tmp_path / "bad.csv", content), **options)


def test_missing_values_in_parquet(tmp_path):
    frame = pd.DataFrame({"sequence": ["A", None], "label": [1.0, None]})
    with pytest.raises(DataError, match="'sequence' is empty in row 2"):
        read_table(parquet(tmp_path, frame))
    with pytest.raises(DataError, match="missing or not a number in row 2"):
        read_table(parquet(tmp_path, frame.assign(sequence="A")))


def test_sequences_that_are_not_text(tmp_path):
    with pytest.raises(DataError, match="must hold text"):
        read_table(parquet(tmp_path, pd.DataFrame({"sequence": [1, 2], "label": [0, 1]})))


def test_damaged_files(tmp_path):
    whole = parquet(tmp_path, FRAME).read_bytes()
    with pytest.raises(DataError, match="not a whole"):
        read_table(write(tmp_path / "cut.parquet", whole[:-30]))
    with pytest.raises(DataError, match="truncated gzip"):
        read_table(write(tmp_path / "cut.csv.gz", gzip.compress(text(FRAME))[:-12]))
    with pytest.raises(DataError, match="not a whole"):
        read_table(write(tmp_path / "picture.csv", b"\x89PNG\r\n\x1a\n\xff\xfe"))
    with pytest.raises(DataError, match="there is no"):
        read_table(tmp_path / "absent.csv")
