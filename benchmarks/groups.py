"""What the benchmarks that measure groups of cells have in common: their command line, and the loop over groups."""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Report = dict[str, dict[str, Any]]


def build_parser(description: str | None, groups: Sequence[str], kinds: Iterable[str]) -> argparse.ArgumentParser:
    """The command line; the first line of `description` stands in its help."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n", 1)[0])
    parser.add_argument("--only", nargs="+", choices=groups, default=list(groups), help="groups to run")
    parser.add_argument("--quick", action="store_true", help="toy sizes, nothing judged, nothing written")
    parser.add_argument("--output", type=Path, help="JSON file; groups that are not run keep what it holds")
    parser.add_argument("--threads", type=int, default=1, help="threads of every cell")
    parser.add_argument("--time_limit", type=float, default=3600, help="seconds that a cell may take")
    parser.add_argument("--cell", choices=sorted(kinds), help="run this cell here and print its JSON")
    parser.add_argument("--options", type=json.loads, default={}, help="arguments of --cell, as JSON")
    return parser


def run_groups(
    arguments: argparse.Namespace, results: Path, run_group: Callable[[str], dict[str, Any]]
) -> tuple[Report, list[str]]:
    """Runs the groups that were asked for and writes each as soon as it is there.

    Args:
        arguments: of `build_parser`. results: where figures go unless `--output` says otherwise.
        run_group: measures a group and returns its `cells` and judged `rows`.

    Returns:
        The report of all groups, and what was missed (`missed_in`).
    """
    output = arguments.output or (None if arguments.quick else results)
    report = json.loads(output.read_text(encoding="utf-8")) if output and output.is_file() else {}
    missed = []
    for group in arguments.only:
        report[group] = run_group(group)
        missed += missed_in(report[group], arguments.quick)
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report, missed


def missed_in(group: dict[str, Any], quick: bool) -> list[str]:
    """Names of the rows that failed; of toy sizes, the cells that gave no numbers, but for those of absent peers."""
    if quick:
        return [name for name, cell in group["cells"].items() if "failed" in cell and "absent" not in cell]
    return [row["name"] for row in group["rows"] if row["passed"] is False]
