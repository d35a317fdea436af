"""Expression models: what a pair representation costs beside its formulas written down, on a CPU.

Five groups: `literal` (blocks of BioFormer beside the literal form with the same weights, which makes every product of
channels for every pair of genes), `long` (cells of 1,200 genes, where the literal form needs tens of GB, and the exact
form without z), `prior` (finding the edges between a cell's genes), `graph` (genes enriched by GATv2 over the graph of
a vocabulary, forward, and what evaluation keeps of it), `tokens` (cells of an AnnData to bins and ids; its speed is a
target, not a demand). The first two are forward and backward passes of two blocks of width 256 over one cell in
float32. Every cell of the measurement runs alone in a fresh process with a fixed number of threads: CPU time
(`time.process_time`, minimum of 3 calls, of 1 for the literal form) and growth of the peak resident memory during the
first call. The table holds ratios and sizes; demanded ones pass or fail, and one failure makes the exit status 1.
Results go to benchmarks/results/expression.json, group by group.

Run: `python -m benchmarks.expression [--only literal long prior graph tokens] [--threads 1]`; `--quick` runs the same
cells at toy sizes in one process, to see that they run, and judges nothing. One cell alone:
`--cell train --options '{"form": "full", "genes": 512, "channels": 32}'`.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.expression_cells import KINDS
from benchmarks.expression_demands import GROUPS, QUICK, SIZES, Sizes, cells_of, rows_of
from benchmarks.groups import build_parser, run_groups
from benchmarks.long_context import ROOT, SEED, SPARE_SHARE, announced, cell_runner, run_here
from benchmarks.long_context_demands import Cell, Outcomes
from benchmarks.measuring import available_gib, limit_memory
from benchmarks.surroundings import environment

RESULTS = ROOT / "benchmarks" / "results" / "expression.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the groups, prints the table and writes the results; or runs one cell and prints its JSON."""
    arguments = build_parser(__doc__, GROUPS, KINDS).parse_args(argv)
    if arguments.cell:
        limit_memory(available_gib() * (1 - SPARE_SHARE))
        print(json.dumps(run_here(arguments.cell, arguments.options, arguments.threads, KINDS)))
        return
    sizes = QUICK if arguments.quick else SIZES
    _, missed = run_groups(arguments, RESULTS, lambda group: run_group(group, sizes, arguments))
    if arguments.quick:
        print("toy sizes: the figures mean nothing")
    print(f"missed: {missed}" if missed else "nothing missed")
    if missed:
        raise SystemExit(1)


def run_group(group: str, sizes: Sizes, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures the cells of a group and judges its rows."""
    print(f"== {group}")
    before = environment(SEED, arguments.threads)
    run = runner(arguments)
    outcomes = Outcomes({cell.name: announced(cell, run) for cell in cells_of(group, sizes)})
    rows = rows_of(group, sizes, outcomes)
    for row in rows:
        line = row.line()
        print(line if not arguments.quick else line.replace("FAIL", "    ").replace("pass", "    "))
    return {"environment": before, "cells": dict(outcomes), "rows": [row._asdict() for row in rows]}


def runner(arguments: argparse.Namespace) -> Callable[[Cell], dict[str, Any]]:
    """A function that runs a cell, in a process of its own unless toy sizes were asked for."""
    if arguments.quick:
        return lambda cell: run_here(cell.kind, cell.options, arguments.threads, KINDS)
    return cell_runner(arguments, "benchmarks.expression")


if __name__ == "__main__":
    main()
