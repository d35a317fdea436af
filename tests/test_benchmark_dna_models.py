"""The benchmark of DNA language models: its opponents, what it counts, and its judgements. No clock, no RSS.

Checkouts of originals are no part of the tests: they are written here, with our own model behind the original's class
and names.
"""

import importlib
import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import dna_models, measuring
from benchmarks.dna_models_cells import (
    CHECKOUTS,
    KINDS,
    MadeTensors,
    channels_first_loop,
    dnabert2_tensors,
    nt_v1,
    scan,
    scan_inputs,
    step_loop,
)
from benchmarks.dna_models_demands import GROUPS, QUICK, SIZES, cases_of, cells_of, rows_of
from benchmarks.dna_models_originals import NEEDED, StochasticDepth, absence, rearrange, repeat, standing_in
from benchmarks.long_context_demands import Cell, Judged, Outcomes
from genesplice_hf.layers.selective_scan import selective_scan

# Sizes of the letters in einops' patterns (n for `l`, g for `o`).
B, S, T, H, D, G, N = 2, 3, 3, 4, 5, 2, 6
# Pattern, shape, sizes, shape of the result, and where its element at (i, j, ...) comes from.
PATTERNS = [
    ("b l d -> b d l", (B, N, D), {}, (B, D, N), lambda b, d, n: (b, n, d)),
    ("b d l -> b l d", (B, D, N), {}, (B, N, D), lambda b, n, d: (b, d, n)),
    ("l (o d) -> o d l", (N, G * D), {"o": G}, (G, D, N), lambda g, d, n: (n, g * D + d)),
    ("(o d) -> o d", (G * D,), {"o": G}, (G, D), lambda g, d: (g * D + d,)),
    ("b s (t h d) -> b s t h d", (B, S, T * H * D), {"t": T, "h": H}, (B, S, T, H, D),
     lambda b, s, t, h, d: (b, s, (t * H + h) * D + d)),
    ("nnz h d -> nnz (h d)", (N, H, D), {}, (N, H * D), lambda n, c: (n, c // D, c % D)),
    ("b ... -> b (...)", (B, H, D), {}, (B, H * D), lambda b, c: (b, c // D, c % D)),
    ("b s ... -> (b s) ...", (B, S, H, D), {}, (B * S, H, D), lambda n, h, d: (n // S, n % S, h, d)),
    ("(b s) ... -> b s ...", (B * S, H, D), {"b": B}, (B, S, H, D), lambda b, s, h, d: (b * S + s, h, d)),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "shape", "sizes", "result", "origin"), PATTERNS, ids=[p[0] for p in PATTERNS])
def test_stand_in_of_einops_moves_every_element_where_the_pattern_says(pattern, shape, sizes, result, origin) -> None:
    x = torch.arange(torch.Size(shape).numel()).view(shape)
    found = rearrange(x, pattern, **sizes)
    assert found.shape == result
    for place in torch.cartesian_prod(*map(torch.arange, result)).view(-1, len(result)).tolist():
        assert found[tuple(place)] == x[origin(*place)]


def test_stand_in_of_repeat() -> None:
    assert repeat(torch.tensor([4, 7]), "z -> z d", d=3).tolist() == [[4, 4, 4], [7, 7, 7]]


def test_stand_ins_are_gone_afterwards_and_do_not_replace_what_is_installed() -> None:
    names = ("torchvision", "torchvision.ops", "einops")
    absent = {name for name in names if importlib.util.find_spec(name.partition(".")[0]) is None}
    with standing_in(*names, "torch"):
        assert sys.modules["torch"] is torch
        imported = importlib.import_module("torchvision.ops").StochasticDepth
    assert not absent & set(sys.modules)
    x = torch.randn(3, 2)
    assert torch.equal(imported(0.5, "row").eval()(x), x) and torch.equal(StochasticDepth(0.5, "row")(x), x)


def test_both_loops_and_our_scan_are_the_same_recurrence() -> None:
    torch.manual_seed(0)
    x, delta, A, B_BLN, C = (tensor.double() for tensor in scan_inputs(23, 5, 3))
    first = [tensor.transpose(1, 2) for tensor in (x, delta, B_BLN, C)]
    ours = selective_scan(x, delta, A, B_BLN, C, chunk_size=7)
    torch.testing.assert_close(step_loop(x, delta, A, B_BLN, C), ours, rtol=1e-12, atol=1e-12)
    channels_first = channels_first_loop(first[0], first[1], A, first[2], first[3]).transpose(1, 2)
    torch.testing.assert_close(channels_first, ours, rtol=1e-12, atol=1e-12)


def test_a_loop_is_what_one_writes_down_by_hand() -> None:
    ones = torch.ones(1, 2, 1)
    h1 = 0.5 * 2 * 3.0
    h2 = torch.exp(torch.tensor(-0.5)).item() * h1 + 0.5 * 2 * 3.0
    found = step_loop(2 * ones, 0.5 * ones, -torch.ones(1, 1), 3 * ones, 7 * ones)
    torch.testing.assert_close(found, torch.tensor([[[7 * h1], [7 * h2]]]))


def test_a_scan_that_differs_is_not_timed(monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.dna_models_cells.selective_scan", lambda *inputs: selective_scan(*inputs) + 1)
    assert "outputs differ by" in scan(16, 4, 2, repeats=1)["failed"]


def test_only_what_is_made_counts_as_made() -> None:
    x = torch.zeros(2, 3)
    with MadeTensors() as made:
        x.t().add_(1)
        y = x.view(6)[:4]
        torch.cat([y, y])
        torch.stack([x, x], out=torch.empty(2, 2, 3))
    assert made.shapes == [(8,), (2, 2, 3)]


def test_dnabert2_makes_one_bias_for_all_layers_and_none_beyond_its_limit() -> None:
    assert dnabert2_tensors(3, 128, 96)["dense_tensors"] == 1
    found = dnabert2_tensors(2, 64, 2_112)
    assert found["dense_tensors"] == 0 and found["largest_elements"] < found["dense_elements"] == 2_112**2


def test_a_copy_of_the_bias_in_every_layer_would_be_counted(monkeypatch) -> None:
    plain = torch.nn.functional.scaled_dot_product_attention

    def copying(query, key, value, attn_mask=None, **options):
        return plain(query, key, value, attn_mask=attn_mask.clone(), **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", copying)
    assert dnabert2_tensors(3, 128, 96)["dense_tensors"] == 1 + 3


def test_nucleotide_transformer_v1_is_transformers_own_class() -> None:
    assert nt_v1(1, 32, 12) == {"is_transformers_class": True, "difference": 0}


HYENADNA_CHECKOUT = """
import torch
from einops import rearrange
from torchvision.ops import StochasticDepth

from genesplice_hf.models.hyenadna.conversion_hyenadna import HyenaDNASource
from genesplice_hf.models.hyenadna.modeling_hyenadna_base import HyenaDNAModel as Ours


class HyenaDNAModel(torch.nn.Module):
    def __init__(self, **config):
        super().__init__()
        self.ours = Ours(HyenaDNASource.config(config, {{}})[0])

    def state_dict(self):
        return HyenaDNASource.original(self.ours)[1]

    def forward(self, ids):
        return self.ours(input_ids=ids).last_hidden_state + {shift}
"""


def write_hyenadna(folder: Path, shift: float = 0.0) -> Path:
    (folder / "hyena-dna").mkdir()
    (folder / "hyena-dna" / NEEDED["hyena-dna"]).write_text(HYENADNA_CHECKOUT.format(shift=shift))
    return folder


def test_a_checkout_is_imported_compared_and_timed(tmp_path) -> None:
    found = KINDS["hyenadna"](str(write_hyenadna(tmp_path)), layers=1, width=16, tokens=12, repeats=1)
    assert found["difference"] < 1e-5
    assert {f"{side}_cpu_seconds" for side in ("original", "ours", "uncached")} < found.keys()


@pytest.mark.parametrize("shift", ["2e-3", "float('nan')"])
def test_outputs_that_differ_are_not_timed(tmp_path, shift) -> None:
    found = KINDS["hyenadna"](str(write_hyenadna(tmp_path, shift)), layers=1, width=16, tokens=12, repeats=1)
    assert list(found) == ["failed"] and "outputs differ by" in found["failed"]


def test_a_missing_checkout_is_told(tmp_path) -> None:
    assert absence("gpn", None) == "absent: pass --originals with gpn/ below it"
    assert absence("gpn", tmp_path) == "absent: no gpn/gpn/legacy.py below --originals"
    assert absence("hyena-dna", write_hyenadna(tmp_path)) is None
    run = dna_models.with_originals(lambda cell: dict(cell.options), tmp_path)
    assert run(Cell("a", "gpn", {})) == {"failed": "absent: no gpn/gpn/legacy.py below --originals", "absent": True}
    assert run(Cell("a", "hyenadna", {"width": 3})) == {"width": 3, "originals": str(tmp_path)}
    assert run(Cell("a", "scan", {"length": 3})) == {"length": 3}


@pytest.mark.parametrize("sizes", [SIZES, QUICK], ids=["full", "quick"])
def test_every_planned_cell_can_be_called(sizes) -> None:
    for group in GROUPS:
        cells = cells_of(group, sizes)
        assert len({cell.name for cell in cells}) == len(cells)
        for cell in cells:
            given = cell.options | ({"originals": "."} if cell.kind in CHECKOUTS else {})
            inspect.signature(KINDS[cell.kind]).bind(**json.loads(json.dumps(given)))


def passing(group: str) -> Outcomes:
    """Invented results of all cells that meet every demand."""
    found = Outcomes()
    for cell in cells_of(group, SIZES):
        found[cell.name] = {
            "ours_cpu_seconds": 1.0,
            "uncached_cpu_seconds": 1.5,
            "original_cpu_seconds": 1.5,
            "esm_cpu_seconds": 1.0,
            "reference_cpu_seconds": 20.0,
            "plain_cpu_seconds": 10.0,
            "cpu_seconds": cell.options.get("length", 1) * 1.0,
            "is_transformers_class": True,
            "dense_tensors": 1 if cell.options.get("tokens") == SIZES.dense else 0,
            "largest_elements": 1,
            "dense_elements": 8,
        }
    return found


def failed(group: str, found: Outcomes) -> list[Judged]:
    return [row for row in rows_of(group, SIZES, found) if row.passed is False]


SPOILERS = [
    *[("forward", case.cell.name, "ours_cpu_seconds", 1.51, "<= 1") for case in cases_of(SIZES)],
    ("forward", "hyenadna 1,026", "uncached_cpu_seconds", 1.51, "<= 1"),
    ("forward", "nt_v1", "is_transformers_class", False, ">= 1"),
    ("scan", "scan 8,192", "reference_cpu_seconds", 19.9, ">= 20"),
    ("scan", "scan alone 32,768", "cpu_seconds", 32_768 * 1.31, "<= 1.3"),
    ("scan", "scan alone 131,072", "cpu_seconds", 131_072 * 1.31, "<= 1.3"),
    ("memory", "tensors 2,048", "dense_tensors", 12, "<= 1"),
    ("memory", "tensors 4,096", "dense_tensors", 1, "<= 0"),
    ("memory", "tensors 4,096", "largest_elements", 9, "<= 1"),
]


@pytest.mark.parametrize(("group", "cell", "field", "value", "demand"), SPOILERS)
def test_one_bad_figure_fails_its_own_demand(group, cell, field, value, demand) -> None:
    found = passing(group)
    assert failed(group, found) == []
    found[cell][field] = value
    assert [row.demand for row in failed(group, found)] == [demand]


def test_nothing_is_demanded_of_stand_ins() -> None:
    forward, loops = passing("forward"), passing("scan")
    forward["nt_v2"], loops["scan 8,192"]["plain_cpu_seconds"] = {"failed": "not here"}, 0.5
    assert failed("forward", forward) == failed("scan", loops) == []
    told = [row for row in rows_of("forward", SIZES, forward) if row.value is None]
    assert [(row.passed, row.note) for row in told] == [(None, "not here")]


def clearly(found: Outcomes) -> Judged:
    return next(row for row in rows_of("forward", SIZES, found) if "leave behind" in row.name)


def all_close(found: Outcomes, *but: str) -> Outcomes:
    for case in cases_of(SIZES):
        found[case.cell.name]["original_cpu_seconds"] = 1.5 if case.model in but else 1.29
    return found


def test_two_models_have_to_be_clearly_faster_at_their_longest_inputs() -> None:
    assert clearly(all_close(passing("forward"), "GPN", "HyenaDNA"))[1:] == (2, ">= 2", True, "HyenaDNA, GPN")
    assert clearly(all_close(passing("forward"), "GPN")).passed is False
    one_slow = all_close(passing("forward"), "GPN", "HyenaDNA")
    one_slow["hyenadna 1,026"]["original_cpu_seconds"] = 1.29
    assert clearly(one_slow).passed
    one_slow["hyenadna 32,770"]["original_cpu_seconds"] = 1.29
    assert clearly(one_slow).passed is False
    one_failed = all_close(passing("forward"), "GPN", "HyenaDNA")
    one_failed["gpn"] = {"failed": "outputs differ"}
    assert clearly(one_failed).passed is False


def without(found: Outcomes, *models: str) -> Outcomes:
    for case in cases_of(SIZES):
        if case.model in models:
            found[case.cell.name] = {"failed": "absent: somewhere else", "absent": True}
    return found


def test_an_absent_original_is_neither_passed_nor_failed() -> None:
    found = without(passing("forward"), "HyenaDNA", "GPN legacy")
    rows = [row for row in rows_of("forward", SIZES, found) if "HyenaDNA" in row.name or "GPN legacy" in row.name]
    assert len(rows) == 6 and all(row.passed is None and row.value is None for row in rows)
    assert all("absent" in row.note and "absent" in row.line() for row in rows)
    # Two others are faster all the same.
    assert clearly(found).passed


def test_absent_originals_never_make_the_number_up() -> None:
    found = without(all_close(passing("forward"), "GPN"), "HyenaDNA")
    assert clearly(found).passed is None and "not run: HyenaDNA" in clearly(found).note
    assert clearly(without(all_close(passing("forward")), "HyenaDNA")).passed is False
    everything = {case.model for case in cases_of(SIZES)}
    nothing = without(passing("forward"), *everything)
    assert clearly(nothing).passed is None and failed("forward", nothing) == []


def test_an_original_that_is_there_and_fails_is_a_miss() -> None:
    found = passing("forward")
    found["gpn"] = {"failed": "status 1: it broke"}
    assert [(row.value, row.note) for row in failed("forward", found)] == [(None, "status 1: it broke")]


def test_calls_take_turns() -> None:
    calls = []
    found = measuring.fastest({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2)
    assert calls == ["a", "b", "a", "b"]
    assert set(found) == {f"{name}_{clock}_seconds" for name in "ab" for clock in ("cpu", "wall")}


def test_a_cell_is_handed_to_a_process_of_its_own(tmp_path, monkeypatch) -> None:
    commands = []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(
            command, 0, stdout='what an original prints\n{"difference": 0.5}\n', stderr=""
        )

    monkeypatch.setattr(subprocess, "run", run)
    folder = write_hyenadna(tmp_path)
    monkeypatch.chdir(folder)
    arguments = dna_models.command_line().parse_args(["--originals", ".", "--threads", "3"])
    cell = Cell("hyenadna 12", "hyenadna", {"tokens": 12})
    assert dna_models.with_originals(dna_models.runner(arguments), arguments.originals)(cell) == {"difference": 0.5}
    handed = dna_models.command_line().parse_args(commands[0][3:])
    assert commands[0][1:3] == ["-m", "benchmarks.dna_models"]
    assert (handed.cell, handed.threads, handed.options) == (
        "hyenadna",
        3,
        {"tokens": 12, "originals": str(folder.resolve())},
    )


def test_one_cell_prints_json(capsys, monkeypatch) -> None:
    monkeypatch.setattr(dna_models, "limit_memory", lambda gib: None)
    dna_models.main(["--cell", "nt_v1", "--options", '{"layers": 1, "width": 32, "tokens": 8}'])
    assert json.loads(capsys.readouterr().out) == {"is_transformers_class": True, "difference": 0.0}


def test_a_miss_is_the_exit_status_and_other_groups_stay(tmp_path, monkeypatch, capsys) -> None:
    output = tmp_path / "results.json"
    output.write_text(json.dumps({"scan": {"rows": "kept"}}))
    row = Judged("too slow", 2.0, "<= 1", False)._asdict()
    cells = {"gpn": {"failed": "absent: there", "absent": True}}
    monkeypatch.setattr(dna_models, "run_group", lambda *arguments: {"cells": cells, "rows": [row]})
    with pytest.raises(SystemExit) as end:
        dna_models.main(["--only", "forward", "--output", str(output)])
    printed = capsys.readouterr().out
    assert end.value.code == 1 and "missed: ['too slow']" in printed and "for want of originals: ['gpn']" in printed
    written = json.loads(output.read_text())
    assert written["scan"] == {"rows": "kept"} and written["forward"]["rows"][0]["passed"] is False


def test_toy_sizes_run_through_without_originals(capsys) -> None:
    dna_models.main(["--quick"])
    printed = capsys.readouterr().out
    assert "absent: pass --originals with hyena-dna/ below it" in printed and "toy sizes" in printed
    assert "FAIL" not in printed and "nothing missed" in printed
