"""Writes `benchmarks/README.md` from the stored results: `python -m benchmarks.tables`. No figure in it is typed."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER / "README.md"
HEAD = """# Benchmarks

Every table is written by `python -m benchmarks.tables` from `benchmarks/results/*.json`, which the command above each
table writes, with every cell, seed, version and the hardware. Rows of one table were measured side by side. `--quick`
runs toy sizes and writes nothing; a missed demand makes the exit status 1."""


class Page(NamedTuple):
    """One file of results: its title, its command and what a reader has to know of it."""

    title: str
    command: str
    note: str


PAGES = {
    "long_context": Page(
        "Long context",
        "python -m benchmarks.long_context",
        "Every cell in a process of its own: CPU time and growth of the peak memory. nano has 2.3 million parameters, "
        "small 28 million; the SLiM Performer is 128 wide with 2 layers, its opponents have its size.",
    ),
    "dna_models": Page(
        "DNA language models",
        "python -m benchmarks.dna_models --originals FOLDER",
        "CPU time beside the original implementations, with the same weights and input; FOLDER holds their checkouts, "
        "which the script's first lines name. Below 1, ours is faster.",
    ),
    "enformer": Page(
        "Enformer",
        "python -m benchmarks.enformer --peer PYTHON",
        "Beside the package enformer-pytorch, with the same weights; PYTHON is an environment where it is installed.",
    ),
    "expression": Page(
        "Expression models",
        "python -m benchmarks.expression",
        "Two blocks, forward and backward, beside the published formulas written down; r genes of a cell, c channels "
        "of either side of the outer product, N blocks.",
    ),
    "tokenization": Page(
        "Tokenizers",
        "python -m benchmarks.tokenization",
        "Beside peers that give the same ids, which every run checks.",
    ),
    "import_time": Page("Import", "python -m benchmarks.import_time", "Seconds of a fresh process, medians."),
}


class Row(NamedTuple):
    """A line of a table; what could not be measured has a reason in place of a value."""

    name: str
    value: float | None
    demand: str
    reason: str


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(FOLDER / "results"), encoding="utf-8")


def page(results: Path) -> str:
    """The page of all results in a folder."""
    parts = [HEAD]
    for name, about in PAGES.items():
        report = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        parts += [f"## {about.title}", f"`{about.command}`", about.note, table(report), _measured_on(report)]
    return "\n\n".join(parts) + "\n"


def table(report: Mapping[str, Any]) -> str:
    """What was measured beside what was demanded."""
    lines = ["| | measured | demanded |", "|-|-:|-:|"]
    lines += [f"| {row.name} | {shown(row)} | {row.demand} |" for row in rows(report)]
    return "\n".join(lines)


def rows(report: Mapping[str, Any]) -> Iterator[Row]:
    """The judged rows of any of the files."""
    if "cases" in report:
        for case in report["cases"]:
            yield Row(case["case"], case["ratio"], f">= {case['demanded']}", "")
        return
    if "added_seconds" in report:
        yield Row("what `import genesplice_hf` adds to `import transformers`", report["added_seconds"],
                  f"<= {report['limit_seconds']}", "")  # fmt: skip
        return
    for group in _groups(report):
        for row in group["rows"]:
            yield Row(row["name"], row["value"], row["demand"], row["note"])


def _groups(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [report] if "rows" in report else [group for group in report.values() if group.get("rows")]


def shown(row: Row) -> str:
    """A number with three figures, or why there is none."""
    value = row.value
    if value is None or not math.isfinite(value):
        return row.reason or "-"
    size = abs(value)
    text = f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"
    return text if size >= 0.01 or value == 0 else f"{value:.1e}"


def _measured_on(report: Mapping[str, Any]) -> str:
    parts = (report, *report.values())
    found = [part["environment"] for part in parts if isinstance(part, dict) and "environment" in part]
    first = found[0]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(first["versions"].items()))
    days = " and ".join(sorted({each["when"][:10] for each in found}))
    return f"{first['cpu']}, {first['cores']} cores, {first['threads']} thread(s), {days}; {versions}."


if __name__ == "__main__":
    main()
