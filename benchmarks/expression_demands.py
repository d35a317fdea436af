"""Which cells `benchmarks.expression` runs, and what is demanded of them. Pure: nothing is measured here."""

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.long_context_demands import Cell, Judged, Outcomes, judge

GROUPS = ("literal", "long", "prior", "graph", "tokens")
GIB = 1024
AGREEMENT = 1e-4


class Sizes(NamedTuple):
    """Genes of a cell, and channels, of one kind of run.

    Attributes:
        short, middle: where the literal form is compared. long: where it cannot run. narrow, wide: channels.
        agreement: genes at which outputs are compared. depth: blocks of the deep comparison.
        lookup: cells and genes of the look-up. nested: genes of its loop.
        graph: genes and edges of the graph. cells: cells to tokenise, and the genes that each expresses.
    """

    short: int = 256
    middle: int = 512
    long: int = 1_200
    narrow: int = 32
    wide: int = 64
    agreement: int = 96
    depth: int = 8
    lookup: tuple[int, int] = (4, 1_200)
    nested: int = 300
    graph: tuple[int, int] = (20_000, 20_000)
    cells: tuple[int, int] = (1_000, 2_000)


SIZES = Sizes()
QUICK = Sizes(short=24, middle=32, long=48, narrow=4, wide=8, agreement=12, depth=3, lookup=(2, 40), nested=20,
              graph=(60, 50), cells=(6, 30))  # fmt: skip


def cells_of(group: str, sizes: Sizes) -> list[Cell]:
    """All cells of a group."""
    if group == "literal":
        pairs = [(sizes.short, sizes.narrow), (sizes.short, sizes.wide), (sizes.middle, sizes.narrow)]
        cells = [_train(form, *pair) for pair in pairs for form in ("literal", "full")]
        cells += [_train(form, sizes.middle, sizes.narrow) for form in ("hadamard", "checkpointed")]
        return [*cells, Cell("agreement", "agree", {"genes": sizes.agreement, "channels": sizes.narrow})]
    if group == "long":
        cells = [_train("full", sizes.middle, sizes.wide)]
        cells += [_train(form, sizes.long, sizes.wide) for form in ("full", "factorized")]
        cells += [_train(form, sizes.long, sizes.narrow) for form in ("no_norm", "factorized")]
        return cells + [_train(form, sizes.middle, sizes.narrow, sizes.depth) for form in ("no_norm", "factorized")]
    if group == "graph":
        genes, edges = sizes.graph
        return [Cell(form, "enrich", {"form": form, "genes": genes, "edges": edges}) for form in ("encoder", "model")]
    if group == "tokens":
        cells_, genes = sizes.cells
        return [Cell("tokens", "tokenise", {"cells": cells_, "genes": genes})]
    cells_, genes = sizes.lookup
    return [
        Cell("lookup", "lookup", {"cells": cells_, "genes": genes}),
        Cell("nested loop", "nested_lookup", {"genes": sizes.nested}),
    ]


def name_of(form: str, genes: int, channels: int, layers: int = 2) -> str:
    """The name of a training cell."""
    return f"{form} r {genes:,} c {channels} N {layers}"


def _train(form: str, genes: int, channels: int, layers: int = 2) -> Cell:
    # The literal form takes minutes at the longest of its inputs.
    repeats = {"repeats": 1} if form == "literal" else {}
    options = {"form": form, "genes": genes, "channels": channels, "layers": layers} | repeats
    return Cell(name_of(form, genes, channels, layers), "train", options)


def rows_of(group: str, sizes: Sizes, found: Outcomes) -> list[Judged]:
    """The judged lines of a group."""
    rows = {
        "literal": _literal_rows,
        "long": _long_rows,
        "prior": _prior_rows,
        "graph": _graph_rows,
        "tokens": _token_rows,
    }
    return rows[group](sizes, found)


def _literal_rows(sizes: Sizes, found: Outcomes) -> list[Judged]:
    short, middle, narrow, wide = sizes.short, sizes.middle, sizes.narrow, sizes.wide
    demands: list[tuple[int, int, float, float | None]] = [
        (short, narrow, 6, None),
        (short, wide, 8, 3),
        (middle, narrow, 10, 2.5),
    ]
    rows = []
    for genes, channels, memory, time in demands:
        title = f"r {genes:,}, c {channels}: literal / ours"
        ratio = _over(found, "literal", "full", genes, channels)
        rows.append(judge(f"{title}, growth of peak memory", ratio("growth_mib"), at_least=memory))
        rows.append(judge(f"{title}, CPU time", ratio("cpu_seconds"), at_least=time))
    for form in ("hadamard", "checkpointed"):
        ratio = _over(found, form, "full", middle, narrow)
        for field, words in (("growth_mib", "growth of peak memory"), ("cpu_seconds", "CPU time")):
            rows.append(judge(f"r {middle:,}, c {narrow}: {form} / full, {words}", ratio(field)))
    for pair in ("literal_full", "full_factorized"):
        words = pair.replace("_", " and ")
        rows.append(
            judge(
                f"largest difference between {words}",
                lambda pair=pair: found.figure("agreement", pair),
                at_most=AGREEMENT,
            )
        )
    return rows


def _long_rows(sizes: Sizes, found: Outcomes) -> list[Judged]:
    middle, long, narrow, wide = sizes.middle, sizes.long, sizes.narrow, sizes.wide
    rows = [
        judge(
            f"r {genes:,}, c {wide}, {form}: growth of peak memory, GiB", _gib(found, form, genes, wide), at_most=limit
        )
        for form, genes, limit in (("full", middle, 1.0), ("full", long, 2.6), ("factorized", long, 0.4))
    ]
    for field, words in (("growth_mib", "growth of peak memory"), ("cpu_seconds", "CPU time")):
        ratio = _over(found, "factorized", "no_norm", long, narrow)(field)
        rows.append(judge(f"r {long:,}, c {narrow}: factorized / full, {words}", ratio, at_most=0.5))
        ratio = _over(found, "factorized", "no_norm", middle, narrow, sizes.depth)(field)
        rows.append(judge(f"r {middle:,}, c {narrow}, {sizes.depth} blocks: factorized / full, {words}", ratio))
    return rows


def _prior_rows(sizes: Sizes, found: Outcomes) -> list[Judged]:
    cells, genes = sizes.lookup
    scale = cells * genes**2 / sizes.nested**2
    return [
        judge(
            f"edges of {cells} cells of {genes:,} genes, CPU seconds",
            lambda: found.figure("lookup", "cpu_seconds"),
            at_most=0.5,
        ),
        judge(
            f"a loop over pairs in a dict (from {sizes.nested} genes) / ours",
            lambda: found.ratio("nested loop", "lookup", "cpu_seconds") * scale,
        ),
    ]


def _graph_rows(sizes: Sizes, found: Outcomes) -> list[Judged]:
    title = "{:,} genes, {:,} edges".format(*sizes.graph)
    return [
        judge(f"{title}: CPU seconds", lambda: found.figure("encoder", "cpu_seconds"), at_most=1),
        judge(
            f"{title}: runs of the encoder in a second pass of evaluation",
            lambda: found.figure("model", "second_runs"),
            at_most=0,
        ),
        judge(
            f"{title}: first pass of evaluation / second, CPU time",
            lambda: found.figure("model", "first_cpu_seconds") / found.figure("model", "second_cpu_seconds"),
        ),
    ]


def _token_rows(sizes: Sizes, found: Outcomes) -> list[Judged]:
    return [
        judge(
            f"cells of {sizes.cells[1]:,} genes to bins and ids, cells/s per core (target 2,000)",
            lambda: found.figure("tokens", "cells_per_second"),
        )
    ]


def _over(
    found: Outcomes, top: str, bottom: str, genes: int, channels: int, layers: int = 2
) -> Callable[[str], Callable[[], float]]:
    """field -> ratio of two forms."""
    names = [name_of(form, genes, channels, layers) for form in (top, bottom)]
    return lambda field: lambda: found.ratio(*names, field)


def _gib(found: Outcomes, form: str, genes: int, channels: int) -> Callable[[], float]:
    return lambda: found.figure(name_of(form, genes, channels), "growth_mib") / GIB
