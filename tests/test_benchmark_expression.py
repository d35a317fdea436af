"""The benchmark of expression models: its opponent, its cells, and its judgements. No clock, no RSS."""

import inspect
import json

import pytest
import torch

from benchmarks import expression
from benchmarks.expression_cells import (
    EDGES,
    KINDS,
    agree,
    encoder,
    enrich,
    graph_model,
    nested_lookup,
    step,
    tokenise,
)
from benchmarks.expression_demands import GROUPS, QUICK, SIZES, cells_of, name_of, rows_of
from benchmarks.expression_literal import LiteralBlock
from benchmarks.long_context_demands import Judged, Outcomes
from genesplice_hf.layers.expression_block import ExpressionContext


def test_the_literal_form_is_the_same_function() -> None:
    found = agree(genes=14, channels=6, layers=3)
    assert set(found) == {"literal_full", "full_factorized"} and max(found.values()) < 2e-6


def test_the_literal_form_has_the_same_gradients() -> None:
    """Of every tensor that both have; the last update has none in either."""
    blocks = encoder(5, 2, "literal")
    literal = [LiteralBlock(block, 1e-5) for block in blocks.layer]
    m = torch.randn(1, 9, 256)
    gradients = []
    for run in (
        lambda: literal[1](*literal[0](m, torch.zeros(1, 9, 9, 5)))[0],
        lambda: blocks.layer[1](*blocks.layer[0](m, None, empty()), empty())[0],
    ):
        blocks.zero_grad()
        run().square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in blocks.named_parameters() if p.grad is not None})
    used = {name for name in gradients[1] if "layer.0.pair_bias" not in name}
    assert len(used) > 30 and used <= set(gradients[0])
    for name in used:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], atol=1e-6, rtol=1e-3)


def empty() -> ExpressionContext:
    """A context of genes that are all real."""
    return ExpressionContext()


@pytest.mark.parametrize("form", ["literal", "full", "no_norm", "factorized", "hadamard", "checkpointed"])
def test_every_form_trains(form: str) -> None:
    states = step(form, 4, 2)(7)
    assert states.shape == (1, 7, 256) and states.isfinite().all()
    if form == "checkpointed":
        torch.testing.assert_close(states, step("full", 4, 2)(7))


def test_the_loop_finds_what_a_table_holds() -> None:
    torch.manual_seed(0)
    found = nested_lookup(60)
    assert found["edges"] <= EDGES and set(found) == {"cpu_seconds", "edges"}


def test_evaluation_runs_the_graph_encoder_once() -> None:
    found = enrich("model", 40, 30)
    assert (found["first_runs"], found["second_runs"]) == (1, 0)
    model = graph_model(40, 30).train()
    runs: list[int] = []
    model.knowledge.graph.register_forward_hook(lambda *given: runs.append(1))
    for _ in range(2):
        model(input_ids=torch.arange(2, 9)[None])
    assert len(runs) == 2


def test_the_speed_of_cells_is_a_target_and_no_demand() -> None:
    assert tokenise(4, 20, repeats=1)["cells_per_second"] > 0
    (row,) = rows_of("tokens", SIZES, passing("tokens"))
    assert row.passed is None and "target 2,000" in row.name


@pytest.mark.parametrize("sizes", [SIZES, QUICK], ids=["full", "quick"])
def test_every_planned_cell_can_be_called(sizes) -> None:
    for group in GROUPS:
        cells = cells_of(group, sizes)
        assert len({cell.name for cell in cells}) == len(cells)
        for cell in cells:
            inspect.signature(KINDS[cell.kind]).bind(**json.loads(json.dumps(cell.options)))


def passing(group: str) -> Outcomes:
    """Invented results of all cells that meet every demand."""
    found = Outcomes()
    for cell in cells_of(group, SIZES):
        slow = {"literal": 10.0, "no_norm": 2.0}.get(cell.options.get("form", ""), 1.0)
        found[cell.name] = {
            "cpu_seconds": 0.5 * slow,
            "growth_mib": 100.0 * slow,
            "literal_full": 1e-6,
            "full_factorized": 1e-6,
            "first_cpu_seconds": 1.0,
            "second_cpu_seconds": 0.1,
            "second_runs": 0,
            "cells_per_second": 10.0,
        }
    return found


def failed(group: str, found: Outcomes) -> list[Judged]:
    return [row for row in rows_of(group, SIZES, found) if row.passed is False]


SPOILERS = [
    ("literal", name_of("literal", 256, 32), "growth_mib", 599.0, ">= 6"),
    ("literal", name_of("literal", 256, 64), "growth_mib", 799.0, ">= 8"),
    ("literal", name_of("literal", 256, 64), "cpu_seconds", 1.49, ">= 3"),
    ("literal", name_of("literal", 512, 32), "growth_mib", 999.0, ">= 10"),
    ("literal", name_of("literal", 512, 32), "cpu_seconds", 1.24, ">= 2.5"),
    ("literal", "agreement", "literal_full", 2e-4, "<= 0.0001"),
    ("literal", "agreement", "full_factorized", float("nan"), "<= 0.0001"),
    ("long", name_of("full", 512, 64), "growth_mib", 1025.0, "<= 1"),
    ("long", name_of("full", 1200, 64), "growth_mib", 2.61 * 1024, "<= 2.6"),
    ("long", name_of("factorized", 1200, 64), "growth_mib", 0.41 * 1024, "<= 0.4"),
    ("long", name_of("factorized", 1200, 32), "cpu_seconds", 0.51, "<= 0.5"),
    ("long", name_of("factorized", 1200, 32), "growth_mib", 101.0, "<= 0.5"),
    ("prior", "lookup", "cpu_seconds", 0.51, "<= 0.5"),
    ("graph", "encoder", "cpu_seconds", 1.01, "<= 1"),
    ("graph", "model", "second_runs", 1, "<= 0"),
]


@pytest.mark.parametrize(("group", "cell", "field", "value", "demand"), SPOILERS)
def test_one_bad_figure_fails_its_own_demand(group, cell, field, value, demand) -> None:
    found = passing(group)
    assert failed(group, found) == []
    found[cell][field] = value
    assert [row.demand for row in failed(group, found)] == [demand]


def test_a_cell_that_failed_fails_what_was_demanded_of_it() -> None:
    found = passing("long")
    found[name_of("full", 1200, 64)] = {"failed": "out of memory"}
    assert [(row.value, row.note) for row in failed("long", found)] == [(None, "out of memory")]


def test_a_miss_is_the_exit_status_and_other_groups_stay(tmp_path, monkeypatch, capsys) -> None:
    output = tmp_path / "results.json"
    output.write_text(json.dumps({"prior": {"rows": "kept"}}))
    row = Judged("too much", 2.0, "<= 1", False)._asdict()
    monkeypatch.setattr(expression, "run_group", lambda *arguments: {"cells": {}, "rows": [row]})
    with pytest.raises(SystemExit) as end:
        expression.main(["--only", "literal", "--output", str(output)])
    assert end.value.code == 1 and "missed: ['too much']" in capsys.readouterr().out
    written = json.loads(output.read_text())
    assert written["prior"] == {"rows": "kept"} and written["literal"]["rows"][0]["passed"] is False


def test_one_cell_prints_json(capsys, monkeypatch) -> None:
    monkeypatch.setattr(expression, "limit_memory", lambda gib: None)
    expression.main(["--cell", "agree", "--options", '{"genes": 5, "channels": 3}'])
    assert set(json.loads(capsys.readouterr().out)) == {"literal_full", "full_factorized"}


def test_toy_sizes_run_through(capsys) -> None:
    expression.main(["--quick"])
    printed = capsys.readouterr().out
    assert "toy sizes" in printed and "FAIL" not in printed and "nothing missed" in printed
