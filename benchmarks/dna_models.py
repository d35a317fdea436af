"""DNA language models: what ours cost beside the original implementations with the same weights, on a CPU.

Three groups: `forward` (HyenaDNA, GPN and DNABERT-2 beside their originals, and the Nucleotide Transformers beside
transformers' ESM), `scan` (Caduceus' selective scan beside loops over the tokens), `memory` (the tensors that
DNABERT-2 makes). Every cell runs alone in a fresh process with a fixed number of threads; CPU time
(`time.process_time`) is the minimum of 3 calls (scans: 7), and models with the same weights take turns after their
outputs were compared. The table holds the ratios; demanded ones pass or fail, and one failure makes the exit status
1. Results go to benchmarks/results/dna_models.json, group by group.

The originals are not part of this repository. `--originals FOLDER` names a folder with checkouts of them:

    hyena-dna/   github.com/HazyResearch/hyena-dna    (measured at d553021)
    gpn/         github.com/songlab-cal/gpn           (99293f8)
    DNABERT_S/   github.com/MAGICS-LAB/DNABERT_S      (ac01b55; the network of DNABERT-2 and DNABERT-S)

What is not there is told, and is neither passed nor failed.

Run: `python -m benchmarks.dna_models --originals FOLDER [--only forward scan memory] [--threads 1]`; `--quick` runs
the same cells at toy sizes in one process, to see that they run, and judges nothing. One cell alone:
`--cell scan_alone --options '{"length": 8192, "channels": 512, "states": 16}'`; a cell with an original takes
`"originals"` among its options.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.dna_models_cells import CHECKOUTS, KINDS
from benchmarks.dna_models_demands import GROUPS, QUICK, SIZES, Sizes, cells_of, rows_of
from benchmarks.dna_models_originals import absence
from benchmarks.groups import build_parser, run_groups
from benchmarks.long_context import ROOT, SEED, SPARE_SHARE, announced, cell_runner, run_here
from benchmarks.long_context_demands import Cell, Outcomes
from benchmarks.measuring import available_gib, limit_memory
from benchmarks.surroundings import environment

RESULTS = ROOT / "benchmarks" / "results" / "dna_models.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the groups, prints the table and writes the results; or runs one cell and prints its JSON."""
    arguments = command_line().parse_args(argv)
    if arguments.cell:
        limit_memory(available_gib() * (1 - SPARE_SHARE))
        print(json.dumps(run_here(arguments.cell, arguments.options, arguments.threads, KINDS)))
        return
    sizes = QUICK if arguments.quick else SIZES
    report, missed = run_groups(arguments, RESULTS, lambda group: run_group(group, sizes, arguments))
    print(conclusion(arguments, report, missed))
    if missed:
        raise SystemExit(1)


def command_line() -> argparse.ArgumentParser:
    """The command line."""
    parser = build_parser(__doc__, GROUPS, KINDS)
    parser.add_argument("--originals", type=_folder, help="folder with the checkouts hyena-dna, gpn and DNABERT_S")
    return parser


def _folder(path: str) -> Path:
    # Cells start at the root of the repository.
    return Path(path).resolve()


def run_group(group: str, sizes: Sizes, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures the cells of a group and judges its rows."""
    print(f"== {group}")
    before = environment(SEED, arguments.threads)
    run = with_originals(runner(arguments), arguments.originals)
    outcomes = Outcomes({cell.name: announced(cell, run) for cell in cells_of(group, sizes)})
    rows = rows_of(group, sizes, outcomes)
    for row in rows:
        line = f"{row.line()}  {row.note if row.value is not None else ''}".rstrip()
        print(line if not arguments.quick else line.replace("FAIL", "    ").replace("pass", "    "))
    return {"environment": before, "cells": dict(outcomes), "rows": [row._asdict() for row in rows]}


def runner(arguments: argparse.Namespace) -> Callable[[Cell], dict[str, Any]]:
    """A function that runs a cell, in a process of its own unless toy sizes were asked for."""
    if arguments.quick:
        return lambda cell: run_here(cell.kind, cell.options, arguments.threads, KINDS)
    return cell_runner(arguments, "benchmarks.dna_models")


def with_originals(run: Callable[[Cell], dict[str, Any]], originals: Path | None) -> Callable[[Cell], dict[str, Any]]:
    """The same for cells that need a checkout: it is passed on to them, or its absence is their result."""

    def run_or_tell(cell: Cell) -> dict[str, Any]:
        if cell.kind not in CHECKOUTS:
            return run(cell)
        why = absence(CHECKOUTS[cell.kind], originals)
        if why is not None:
            return {"failed": why, "absent": True}
        return run(cell._replace(options=cell.options | {"originals": str(originals)}))

    return run_or_tell


def conclusion(arguments: argparse.Namespace, report: dict[str, Any], missed: list[str]) -> str:
    """The last words: what was missed, and what nobody can say for want of an original."""
    absent = [name for group in arguments.only for name, cell in report[group]["cells"].items() if "absent" in cell]
    lines = ["toy sizes: the figures mean nothing"] if arguments.quick else []
    lines += [f"not compared, for want of originals: {absent}"] if absent else []
    return "\n".join([*lines, f"missed: {missed}" if missed else "nothing missed"])


if __name__ == "__main__":
    main()
