"""The page of benchmarks says what the stored results say."""

import json

import pytest

from benchmarks.tables import FOLDER, PAGE, PAGES, Row, page, rows, shown


def test_the_page_is_written_from_the_stored_results():
    assert PAGE.read_text(encoding="utf-8") == page(FOLDER / "results"), "run `python -m benchmarks.tables`"
    assert {path.stem for path in (FOLDER / "results").glob("*.json")} == set(PAGES)


def test_every_row_of_every_file_is_shown():
    for name in PAGES:
        report = json.loads((FOLDER / "results" / f"{name}.json").read_text(encoding="utf-8"))
        counted = json.dumps(report).count('"passed"')
        if name == "tokenization":
            counted = len(report["cases"])
        assert len(list(rows(report))) == max(counted, 1)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1048576.0, "1,048,576"),
        (16.94, "16.9"),
        (9.414, "9.41"),
        (3e-7, "3.0e-07"),
        (0.0, "0.00"),
        (None, "no memory"),
    ],
)
def test_three_figures_or_a_reason(value, expected):
    assert shown(Row("row", value, "", "no memory")) == expected
