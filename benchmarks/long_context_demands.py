"""Which cells `benchmarks.long_context` runs, and what is demanded of their ratios. Pure: nothing is measured here."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.long_context_cells import state_bytes
from benchmarks.measuring import MIB


class Sizes(NamedTuple):
    """Lengths in tokens (bases) of one kind of run, and the budget of the search for the longest context.

    Attributes:
        short, middle, long, huge: of the hierarchical cells.
        slim: of SLiM training, ascending; `slim_full` is where it is compared with ordinary backpropagation.
        chunk: C of SLiM.
        exact: where exact causal attention is compared.
        gradient, gradient_chunks: of the float64 comparison.
        prefixes, new_bases: of generation.
        banded, dense: of one attention layer with a window.
        budget_gib, context_start, slim_start, context_cap: of the search.
    """

    short: int = 8_192
    middle: int = 32_768
    long: int = 131_072
    huge: int = 1_048_576
    slim: tuple[int, ...] = (4_096, 16_384, 65_536, 262_144, 1_048_576)
    slim_full: int = 65_536
    chunk: int = 2_048
    exact: int = 16_384
    gradient: int = 1_000
    gradient_chunks: tuple[int, ...] = (7, 64, 333)
    prefixes: tuple[int, ...] = (1_024, 8_192, 65_536)
    new_bases: int = 256
    banded: tuple[int, ...] = (16_384, 32_768, 65_536)
    dense: tuple[int, ...] = (8_192, 16_384)
    budget_gib: float = 2.0
    context_start: int = 8_192
    slim_start: int = 262_144
    context_cap: int = 1_048_576


SIZES = Sizes()
QUICK = Sizes(
    short=512, middle=1_024, long=2_048, huge=4_096, slim=(256, 1_024), slim_full=1_024, chunk=64, exact=512,
    gradient=200, gradient_chunks=(7, 64), prefixes=(64, 256), new_bases=8, banded=(1_024, 2_048), dense=(512, 1_024),
    budget_gib=0.05, context_start=512, slim_start=512, context_cap=1_024,
)  # fmt: skip


class Cell(NamedTuple):
    """One measurement: its name in the results, the function in `KINDS` and its arguments."""

    name: str
    kind: str
    options: dict[str, Any]


class Judged(NamedTuple):
    """One line of the table; `passed` is None where nothing is demanded, `value` is None where a cell failed."""

    name: str
    value: float | None
    demand: str
    passed: bool | None
    note: str = ""

    def line(self) -> str:
        verdict = {None: "    ", True: "pass", False: "FAIL"}[self.passed]
        value = f"{self.value:.4g}" if self.value is not None else self.note
        return f"{verdict} {self.name:<92} {value:>10}  {self.demand}"


class Outcomes(dict[str, dict[str, Any]]):
    """Cell name -> its numbers, or `{"failed": why}`."""

    def figure(self, cell: str, field: str) -> float:
        """A number of a cell.

        Raises:
            LookupError: the cell failed; the message says why.
        """
        if "failed" in self[cell]:
            raise LookupError(self[cell]["failed"])
        return float(self[cell][field])

    def ratio(self, top: str, bottom: str, field: str) -> float:
        """A number of one cell over that of another."""
        return self.figure(top, field) / self.figure(bottom, field)


def judge(
    name: str, value: Callable[[], float], at_least: float | None = None, at_most: float | None = None
) -> Judged:
    """Compares a value with its demand; a failed cell, or one without growth, fails what was demanded of it."""
    demand = f">= {at_least:g}" if at_least is not None else f"<= {at_most:g}" if at_most is not None else ""
    try:
        found = value()
    except LookupError as error:
        return Judged(name, None, demand, False if demand else None, str(error))
    except ZeroDivisionError:
        return Judged(name, None, demand, False if demand else None, "no growth was seen")
    low = -math.inf if at_least is None else at_least
    high = math.inf if at_most is None else at_most
    return Judged(name, found, demand, low <= found <= high if demand else None)


def cells_of(group: str, sizes: Sizes) -> list[Cell]:
    """All cells of a group but those of the search."""
    return {"hierarchical": _hierarchical, "slim": _slim, "window": _window, "cuda": _cuda}[group](sizes)


def rows_of(group: str, sizes: Sizes, outcomes: Outcomes) -> list[Judged]:
    """The judged lines of a group."""
    rows = {
        "hierarchical": _hierarchical_rows,
        "slim": _slim_rows,
        "window": _window_rows,
        "cuda": _cuda_rows,
    }
    return rows[group](sizes, outcomes)


def _hierarchical(sizes: Sizes) -> list[Cell]:
    cells = []
    for size in ("nano", "small"):
        for length in (sizes.short, sizes.middle, sizes.long, sizes.huge):
            cells.append(Cell(f"{size} forward {length:,}", "forward", {"size": size, "length": length}))
        for length in (sizes.long, sizes.huge):
            once = {"repeats": 1} if length == sizes.huge or size == "small" else {}
            cells.append(Cell(f"{size} train {length:,}", "train", {"size": size, "length": length, **once}))
            cells.append(Cell(f"{size} flops {length:,}", "flops", {"size": size, "length": length}))
        cells.append(
            Cell(f"{size} full flops {sizes.long:,}", "flops", {"size": f"full_{size}", "length": sizes.long})
        )
    # The peer of `small` would take as long again as all other cells together at the longest length.
    for size, lengths in (("nano", (sizes.short, sizes.middle, sizes.long)), ("small", (sizes.short, sizes.middle))):
        for length in lengths:
            repeats = 1 if length == sizes.long else 3
            options = {"size": f"full_{size}", "length": length, "repeats": repeats}
            cells.append(Cell(f"{size} full forward {length:,}", "forward", options))
    return cells


def _hierarchical_rows(sizes: Sizes, found: Outcomes) -> list[Judged]:
    def faster(size: str, length: int, at_least: float | None = None) -> Judged:
        name = f"{size}: full attention / hierarchical, CPU time of a forward of {length:,} bases"
        names = (f"{size} full forward {length:,}", f"{size} forward {length:,}")
        return judge(name, lambda: found.ratio(*names, "cpu_seconds"), at_least)

    def memory(size: str, mode: str, length: int, gib: float | None) -> Judged:
        name = f"{size}: growth of peak memory, {mode}, {length:,} bases (GiB)"
        return judge(name, lambda: found.figure(f"{size} {mode} {length:,}", "growth_mib") / 1024, at_most=gib)

    def longer(size: str, kind: str, field: str, at_most: float | None) -> Judged:
        what = "counted FLOPs" if kind == "flops" else "CPU time"
        name = f"{size}: {what} of a forward, {sizes.huge:,} / {sizes.long:,} bases"
        names = (f"{size} {kind} {sizes.huge:,}", f"{size} {kind} {sizes.long:,}")
        return judge(name, lambda: found.ratio(*names, field), at_most=at_most)

    def counted(size: str, at_least: float | None) -> Judged:
        names = (f"{size} full flops {sizes.long:,}", f"{size} flops {sizes.long:,}")
        name = f"{size}: full attention / hierarchical, counted FLOPs at {sizes.long:,} bases"
        return judge(name, lambda: found.ratio(*names, "flops"), at_least)

    return [
        faster("nano", sizes.short), faster("nano", sizes.middle, 8), faster("nano", sizes.long, 30),
        counted("nano", 30), longer("nano", "forward", "cpu_seconds", 12), longer("nano", "flops", "flops", 11),
        memory("nano", "forward", sizes.long, None), memory("nano", "forward", sizes.huge, 6),
        memory("nano", "train", sizes.long, 2), memory("nano", "train", sizes.huge, 12),
        faster("small", sizes.short), faster("small", sizes.middle), counted("small", None),
        longer("small", "forward", "cpu_seconds", None), longer("small", "flops", "flops", None),
        memory("small", "forward", sizes.long, None), memory("small", "forward", sizes.huge, None),
        memory("small", "train", sizes.long, None), memory("small", "train", sizes.huge, None),
    ]  # fmt: skip


def _slim(sizes: Sizes) -> list[Cell]:
    cells = []
    for states in ("reverse", "store"):
        for length in sizes.slim:
            once = {} if length <= sizes.slim_full else {"repeats": 1}
            options = {"length": length, "chunk": sizes.chunk, "states": states, **once}
            cells.append(Cell(f"SLiM {states} {length:,}", "linear_train", options))
    for length in (sizes.slim[0], sizes.exact, sizes.slim_full):
        cells.append(Cell(f"ordinary {length:,}", "linear_train", {"length": length, "chunk": -1}))
    cells.append(Cell(f"SLiM store {sizes.exact:,}", "linear_train", {"length": sizes.exact, "chunk": sizes.chunk}))
    cells.append(Cell(f"exact {sizes.exact:,}", "exact_train", {"length": sizes.exact}))
    gradient = {"length": sizes.gradient, "chunks": list(sizes.gradient_chunks)}
    cells.append(Cell("gradient", "slim_gradient", gradient))
    for prefix in sizes.prefixes:
        cells.append(Cell(f"generate {prefix:,}", "generate", {"prefix": prefix, "new_bases": sizes.new_bases}))
    return list({cell.name: cell for cell in cells}.values())


def _slim_rows(sizes: Sizes, found: Outcomes) -> list[Judged]:
    full, first, last = sizes.slim_full, sizes.slim[0], sizes.slim[-1]
    documented = state_bytes(last, sizes.chunk) / MIB

    def growths(states: str) -> list[float]:
        return [found.figure(f"SLiM {states} {length:,}", "growth_mib") for length in sizes.slim]

    def beyond_documented() -> float:
        return growths("store")[-1] / (growths("store")[0] + documented)

    def times(top: str, bottom: str, length: int) -> Callable[[], float]:
        return lambda: found.ratio(f"{top} {length:,}", f"{bottom} {length:,}", "cpu_seconds")

    def generation() -> float:
        each = [found.figure(f"generate {prefix:,}", "milliseconds_per_base") for prefix in sizes.prefixes]
        return max(each) / min(each)

    def growth_against_ordinary(states: str) -> Judged:
        names = (f"ordinary {full:,}", f"SLiM {states} {full:,}")
        name = f"ordinary / SLiM {states}, growth at {full:,} tokens"
        return judge(name, lambda: found.ratio(*names, "growth_mib"), 15)

    def time_against_ordinary(states: str) -> Judged:
        name = f"SLiM {states} / ordinary, CPU time at {full:,} tokens"
        return judge(name, times(f"SLiM {states}", "ordinary", full), at_most=1.2)

    flat = f"SLiM reverse: largest / smallest growth, {first:,} to {last:,} tokens, C = {sizes.chunk:,}"
    store = f"SLiM store: growth at {last:,} tokens / (that at {first:,} + {documented:.1f} MiB of states)"
    gradient = "SLiM against ordinary gradient, float64, relative difference"
    exact = f"exact causal attention / SLiM store, CPU time at {sizes.exact:,} tokens"
    steps = f"generation: slowest / fastest base after {sizes.prefixes[0]:,} to {sizes.prefixes[-1]:,} bases"
    return [
        judge(flat, lambda: max(growths("reverse")) / min(growths("reverse")), at_most=1.2),
        judge(store, beyond_documented, at_most=1.2),
        growth_against_ordinary("reverse"),
        growth_against_ordinary("store"),
        time_against_ordinary("reverse"),
        time_against_ordinary("store"),
        judge(gradient, lambda: found.figure("gradient", "relative_difference"), at_most=1e-12),
        judge(exact, times("exact", "SLiM store", sizes.exact), 4),
        judge(steps, generation, at_most=1.5),
    ]


def starting_points(sizes: Sizes) -> dict[str, tuple[dict[str, Any], int, int]]:
    """Who is searched for the longest context: options of `linear_train`, where to start, and the cap."""
    return {
        "ordinary, longest context": ({"chunk": -1}, sizes.context_start, sizes.context_cap),
        "SLiM, longest context": ({"chunk": sizes.chunk, "states": "reverse"}, sizes.slim_start, sizes.context_cap),
    }


def context_rows(sizes: Sizes, found: dict[str, dict[str, Any]]) -> list[Judged]:
    """The headline: the longest contexts that train within the budget."""
    rows = []
    for name, outcome in found.items():
        title = f"{name} that trains in {sizes.budget_gib:g} GiB (tokens)"
        capped = "at least; the search ends here" if outcome["is_capped"] else ""
        rows.append(Judged(title, float(outcome["tokens"]), capped, None))
    return rows


def largest(fits: Callable[[int], bool], start: int, cap: int) -> int:
    """The largest length that fits, to an eighth of its power of two: doubling from `start`, then bisection.

    Args:
        fits: monotone; asked for each length once.
        start: the first length; 0 is returned where even this does not fit.
        cap: no length above it is tried.
    """
    good, length = 0, start
    while length <= cap and fits(length):
        good, length = length, length * 2
    if good == 0 or length > cap:
        return good
    bad = length
    step = good // 8
    while bad - good > max(1, step):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def _window(sizes: Sizes) -> list[Cell]:
    layers = [("banded", length) for length in sizes.banded] + [("dense", length) for length in sizes.dense]
    cells = [
        Cell(f"{name} window {length:,}", "window", {"implementation": name, "length": length})
        for name, length in layers
    ]
    return [Cell("window parity", "window_parity", {"length": 1_000, "radius": 64}), *cells]


def _window_rows(sizes: Sizes, found: Outcomes) -> list[Judged]:
    def ratio(top: tuple[str, int], bottom: tuple[str, int]) -> Callable[[], float]:
        names = [f"{name} window {length:,}" for name, length in (top, bottom)]
        return lambda: found.ratio(names[0], names[1], "growth_mib")

    (short, *_, long), dense = sizes.banded, sizes.dense
    title = "one window layer, forward and backward: growth,"
    return [
        judge(
            "banded against densely masked attention, float64, largest difference of values and gradients",
            lambda: found.figure("window parity", "difference"),
            at_most=1e-12,
        ),
        # Linear growth, with a quarter more for what the allocator rounds.
        judge(
            f"{title} banded {long:,} / {short:,} tokens",
            ratio(("banded", long), ("banded", short)),
            at_most=1.25 * long / short,
        ),
        judge(f"{title} dense {dense[1]:,} / {dense[0]:,} tokens", ratio(("dense", dense[1]), ("dense", dense[0]))),
        judge(f"{title} dense / banded at {short:,} tokens", ratio(("dense", short), ("banded", short))),
    ]


def _cuda(sizes: Sizes) -> list[Cell]:
    cells = [Cell("parity", "parity", {"length": sizes.short})]
    for length in (sizes.middle, sizes.long, sizes.huge):
        for training in (False, True):
            name = f"{'train' if training else 'forward'} {length:,}"
            cells.append(Cell(name, "throughput", {"length": length, "training": training}))
    return [*cells, Cell("compile", "compile_gain", {"length": sizes.long})]


def _cuda_rows(sizes: Sizes, found: Outcomes) -> list[Judged]:
    rows = []
    parity = found["parity"]
    differences = {"all": parity["failed"]} if "failed" in parity else parity["relative_difference"]
    for name, value in differences.items():
        title = f"nano in bf16: {name} against eager in float32, largest relative difference"
        if isinstance(value, str):
            rows.append(Judged(title, None, "", None, value))
        else:
            # bfloat16 keeps 8 bits; some ten roundings in a row leave about 2 %.
            rows.append(judge(title, lambda value=value: value, at_most=0.05))
    for cell in _cuda(sizes)[1:-1]:
        rows.append(judge(f"nano in bf16: bases per second, {cell.name} bases", _figure(found, cell.name)))
    rows.append(
        judge(f"nano in bf16: plain / compiled forward of {sizes.long:,} bases", _figure(found, "compile", "gain"))
    )
    return rows


def _figure(found: Outcomes, cell: str, field: str = "bases_per_second") -> Callable[[], float]:
    return lambda: found.figure(cell, field)
