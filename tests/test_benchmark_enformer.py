"""The Enformer benchmark: its demands are strict, and its own cells run."""

import json
from typing import Any

import pytest
import torch

from benchmarks import enformer
from benchmarks.enformer import CASES, cell_name, rows_of
from benchmarks.enformer_cells import bases, difference
from benchmarks.long_context_demands import Outcomes


def passing() -> Outcomes:
    """Figures that meet every demand, each by nothing to spare."""
    found = Outcomes()
    for case in CASES:
        found[cell_name(case, "peer")] = {"cpu_seconds": 10.0, "growth_mib": 100.0}
        for dtype, least in case.at_least.items():
            figures = {"cpu_seconds": 10.0 / least, "growth_mib": 100.0, "difference": 1e-5, "correlation": 1.0}
            found[cell_name(case, dtype)] = figures
    for name, growth in (("train peer", 100.0), ("train", 100.0), ("train checkpointed", 70.0)):
        found[name] = {"cpu_seconds": 1.0, "growth_mib": growth}
    return found


SPOILERS: list[tuple[str, dict[str, Any]]] = [
    ("full 49,152 float32", {"cpu_seconds": 10 / 1.34}),
    ("full 196,608 bfloat16", {"cpu_seconds": 10 / 2.49}),
    ("full 196,608 float32", {"growth_mib": 101.0}),
    ("small 8,192 float32", {"cpu_seconds": 10.1}),
    ("full 49,152 float32", {"difference": 1.1e-5}),
    ("train checkpointed", {"growth_mib": 71.0}),
]


def test_figures_at_their_limits_pass() -> None:
    assert [row.name for row in rows_of(passing()) if row.passed is False] == []


@pytest.mark.parametrize(("cell", "figures"), SPOILERS)
def test_one_bad_figure_fails_one_demand(cell: str, figures: dict[str, Any]) -> None:
    found = passing()
    found[cell] |= figures
    assert sum(row.passed is False for row in rows_of(found)) == 1


def test_a_failed_cell_fails_what_was_demanded_of_it() -> None:
    found = passing()
    found["train checkpointed"] = {"failed": "out of memory"}
    (row,) = [row for row in rows_of(found) if row.passed is False]
    assert row.note == "out of memory"


def test_both_sides_see_the_same_bases() -> None:
    assert torch.equal(bases(100), bases(100)) and bases(100).shape == (1, 100)


def test_difference_is_that_of_two_files(tmp_path) -> None:
    one, other = torch.arange(6.0).view(1, 2, 3), torch.arange(6.0).view(1, 2, 3) * 2
    for name, tensor in (("one", one), ("other", other)):
        torch.save(tensor, tmp_path / name)
    assert difference(str(tmp_path / "one"), str(tmp_path / "other")) == {"difference": 5.0, "correlation": 1.0}


def test_our_cells_run(capsys: pytest.CaptureFixture[str]) -> None:
    enformer.main(["--quick"])
    told = capsys.readouterr().out
    figures = json.loads(told[: told.rindex("toy size")])
    assert figures["twice"]["difference"] == 0 and figures["train"]["cpu_seconds"] > 0


def test_without_a_peer_it_says_what_is_missing() -> None:
    with pytest.raises(SystemExit, match="--peer"):
        enformer.main([])
