"""Tables of tracks: columns by name, pairs of strands as an involution, selections that keep pairs whole."""

import pytest

from genesplice_hf.data.target_table import check_strand_pair, read_targets, select_strand_pair
from genesplice_hf.errors import DataError

ROWS = [
    ["", "identifier", "description", "strand_pair", "scale", "clip", "clip_soft", "sum_stat", "file"],
    ["5", "a+", "CAGE:x:y", "7", "1.0", "384", "64", "sum_sqrt", "a+.bw"],
    ["7", "a-", "CAGE:x:y", "5", "", "384", "", "sum_sqrt", "a-.bw"],
    ["9", "b", "DNASE:z", "9", "2", "", "", "mean", "b.bw"],
]


def write(tmp_path, rows):
    path = tmp_path / "targets.txt"
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    return path


def test_columns_are_found_by_name(tmp_path):
    table = read_targets(write(tmp_path, ROWS))
    first, second, third = table.targets
    assert (first.clip, first.clip_soft, first.scale, first.sum_stat) == (384.0, 64.0, 1.0, "sum_sqrt")
    assert (second.clip_soft, second.scale, third.scale, third.clip) == (None, 1.0, 2.0, None)
    assert [target.assay for target in table.targets] == ["CAGE", "CAGE", "DNASE"]
    # The numbers of the index column, not of the rows, are what pairs are written in.
    assert table.strand_pair == (1, 0, 2)


def test_a_table_may_say_nothing_of_strands(tmp_path):
    table = read_targets(write(tmp_path, [["index", "identifier"], ["0", "a"], ["1", "b"]]))
    assert table.strand_pair is None and table.select([1]).targets[0].identifier == "b"
    assert table.targets[0].sum_stat == "sum"


def test_selection_renumbers_pairs(tmp_path):
    table = read_targets(write(tmp_path, ROWS))
    assert table.select([2, 1, 0]).strand_pair == (0, 2, 1)
    assert table.select([2]).strand_pair == (0,)
    with pytest.raises(DataError, match=r"`track_indices` holds track 1 but not 0, its other strand in `strand_pair`"):
        table.select([1, 2])
    with pytest.raises(DataError, match="`track_indices` must be different numbers from 0 to 2"):
        table.select([0, 0])
    assert select_strand_pair((1, 0, 2), [0, 1]) == (1, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[0].__setitem__(1, "name"), r"must have the columns \['identifier'\]"),
        (lambda rows: rows[2].__setitem__(5, "many"), r"Line 3 of .*`clip` must be a number, was 'many'"),
        (lambda rows: rows[1].pop(), r"Line 2 of .*must have 9 tab-separated cells like the header, has 8"),
        (lambda rows: rows[1].__setitem__(3, "9"), r"`strand_pair` must be its own inverse, but says 0 -> 2 -> 2"),
        (lambda rows: rows[1].__setitem__(3, "8"), r"`strand_pair` of .*names 8, which no row has as its index"),
        (lambda rows: rows[1].__setitem__(0, "7"), r"`strand_pair` of .*needs an index once per row"),
        (lambda rows: rows.__delitem__(slice(1, None)), r"must hold a header and one row per track, has 1 lines"),
    ],
)
def test_bad_tables(tmp_path, change, message):
    rows = [list(row) for row in ROWS]
    change(rows)
    with pytest.raises(DataError, match=message):
        read_targets(write(tmp_path, rows))


def test_pairs_that_do_not_fit():
    assert check_strand_pair([1, 0, 2], 3).tolist() == [1, 0, 2]
    with pytest.raises(DataError, match="`strand_pair` must be 3 whole numbers"):
        check_strand_pair([1, 0], 3)
    with pytest.raises(DataError, match="`strand_pair` must hold 0 to 1, holds 0 to 2"):
        check_strand_pair([2, 0], 2)
    with pytest.raises(DataError, match="`strand_pair` must be its own inverse, but says 0 -> 1 -> 2"):
        check_strand_pair([1, 2, 0], 3)
