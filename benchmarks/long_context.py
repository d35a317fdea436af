"""Long context: what GeneSplice and the SLiM Performer cost in time and memory, beside what users have.

Every cell of the measurement runs alone in a fresh process with a fixed number of threads: CPU time
(`time.process_time`, minimum of 3 calls, of 1 where a cell says `repeats: 1`), growth of the peak resident memory
during the first call, or counted floating-point operations. The table holds the ratios; demanded ones pass or fail,
and one failure makes the exit status 1. Results go to benchmarks/results/long_context.json, group by group.

Run: `python -m benchmarks.long_context [--only hierarchical slim window cuda] [--threads 1]`; `--quick` runs the
same cells at toy lengths and in one process, to see that they run, and judges nothing. One cell alone:
`--cell forward --options '{"size": "nano", "length": 131072}'`.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.groups import build_parser, run_groups
from benchmarks.long_context_cells import KINDS
from benchmarks.long_context_demands import (
    QUICK,
    SIZES,
    Cell,
    Outcomes,
    Sizes,
    cells_of,
    context_rows,
    largest,
    rows_of,
    starting_points,
)
from benchmarks.measuring import MIB, available_gib, is_out_of_memory, limit_memory
from benchmarks.surroundings import environment

SEED = 7
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "long_context.json"
GROUPS = ("hierarchical", "slim", "window", "cuda")
# The rest of the machine keeps this share of what is free when a cell starts.
SPARE_SHARE = 0.15


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the groups, prints the table and writes the results; or runs one cell and prints its JSON."""
    arguments = build_parser(__doc__, GROUPS, KINDS).parse_args(argv)
    if arguments.cell:
        # CUDA reserves address space far beyond what it uses.
        if not torch.cuda.is_available():
            limit_memory(available_gib() * (1 - SPARE_SHARE))
        print(json.dumps(run_here(arguments.cell, arguments.options, arguments.threads)))
        return
    sizes = QUICK if arguments.quick else SIZES
    _, missed = run_groups(arguments, RESULTS, lambda group: run_group(group, sizes, arguments))
    if arguments.quick:
        print("toy lengths: the figures mean nothing")
    print("all demands met" if not missed else f"missed: {missed}")
    if missed:
        raise SystemExit(1)


def run_group(group: str, sizes: Sizes, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures the cells of a group and judges its rows."""
    print(f"== {group}")
    before = environment(SEED, arguments.threads)
    if group == "cuda" and not torch.cuda.is_available():
        print("   skipped: torch finds no CUDA device here")
        return {"environment": before, "skipped": "torch finds no CUDA device", "cells": {}, "rows": []}
    run = partial(_in_this_process, arguments.threads) if arguments.quick else cell_runner(arguments)
    outcomes = Outcomes({cell.name: announced(cell, run) for cell in cells_of(group, sizes)})
    judged = rows_of(group, sizes, outcomes)
    if group == "slim":
        found = search_contexts(sizes, run)
        outcomes |= found
        judged += context_rows(sizes, found)
    for row in judged:
        print(row.line() if not arguments.quick else row.line().replace("FAIL", "    ").replace("pass", "    "))
    return {"environment": before, "cells": dict(outcomes), "rows": [row._asdict() for row in judged]}


def cell_runner(
    arguments: argparse.Namespace, module: str = "benchmarks.long_context", python: str = sys.executable
) -> Callable[[Cell], dict[str, Any]]:
    """A function that runs a cell in a process of its own and returns its numbers, or `{"failed": why}`.

    Args:
        arguments: `threads` and `time_limit`. module: the script that knows the cell. python: what runs it.
    """
    environ = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

    def run(cell: Cell) -> dict[str, Any]:
        command = [python, "-m", module, "--threads", str(arguments.threads)]
        command += ["--cell", cell.kind, "--options", json.dumps(cell.options)]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=arguments.time_limit
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"took longer than {arguments.time_limit:g} s"}
        if done.returncode:
            return {"failed": f"status {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}"}
        return json.loads(done.stdout.splitlines()[-1])

    return run


def _in_this_process(threads: int, cell: Cell) -> dict[str, Any]:
    return run_here(cell.kind, cell.options, threads)


def run_here(
    kind: str, options: dict[str, Any], threads: int, kinds: dict[str, Callable[..., dict[str, Any]]] = KINDS
) -> dict[str, Any]:
    """Runs one cell in this process; memory that it was refused is a result."""
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    transformers.logging.set_verbosity_error()
    try:
        return kinds[kind](**options)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return {"failed": f"out of memory ({available_gib():.1f} GiB free)"}


def announced(cell: Cell, run: Callable[[Cell], dict[str, Any]]) -> dict[str, Any]:
    """Runs a cell and prints its figures."""
    found = run(cell)
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in found.items()}
    print(f"   {cell.name:<34} " + ", ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
    return found


def search_contexts(sizes: Sizes, run: Callable[[Cell], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The longest context that trains within `sizes.budget_gib` of memory growth, ordinary and SLiM."""
    found = {}
    for name, (options, start, cap) in starting_points(sizes).items():

        def fits(length: int, options: dict[str, Any] = options, name: str = name) -> bool:
            cell = Cell(f"{name} {length:,}", "linear_train", options | {"length": length, "repeats": 1})
            growth = announced(cell, run).get("growth_mib")
            return growth is not None and growth * MIB <= sizes.budget_gib * 2**30

        tokens = largest(fits, start, cap)
        found[name] = {"tokens": tokens, "cap": cap, "is_capped": tokens == cap}
    return found


if __name__ == "__main__":
    main()
