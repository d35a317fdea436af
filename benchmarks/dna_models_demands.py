"""Which cells `benchmarks.dna_models` runs, and what is demanded of them. Pure: nothing is measured here.

A missing checkout of an original is told, and its rows are neither passed nor failed; a cell that failed fails what
was demanded of it.
"""

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.long_context_demands import Cell, Judged, Outcomes, judge

GROUPS = ("forward", "scan", "memory")
# So many originals have to be left behind by this factor.
CLEARLY_FASTER, CLEAR_CASES = 1.3, 2


class Sizes(NamedTuple):
    """Sizes of one kind of run: (layers, width) of models, tokens, and (tokens, rows) of batches.

    Attributes:
        scan: channels and states. scan_lengths: ascending; the loops run at the first.
        dense, chunked: tokens of DNABERT-2, the first with a bias for all layers, the second beyond its limit.
    """

    hyenadna: tuple[int, int] = (8, 256)
    hyenadna_tokens: tuple[int, ...] = (1_026, 32_770)
    gpn: tuple[int, int] = (25, 512)
    gpn_batch: tuple[int, int] = (512, 8)
    dnabert2: tuple[int, int] = (12, 768)
    dnabert2_batches: tuple[tuple[int, int], ...] = ((512, 4), (2_048, 1))
    nt_v1: tuple[int, int, int] = (2, 128, 100)
    nt_v2: tuple[int, int, int] = (12, 512, 1_000)
    scan: tuple[int, int] = (512, 16)
    scan_lengths: tuple[int, ...] = (8_192, 32_768, 131_072)
    dense: int = 2_048
    chunked: int = 4_096


SIZES = Sizes()
QUICK = Sizes(
    hyenadna=(2, 64), hyenadna_tokens=(34, 130), gpn=(2, 32), gpn_batch=(64, 2), dnabert2=(2, 128),
    dnabert2_batches=((64, 2), (128, 1)), nt_v1=(1, 32, 16), nt_v2=(1, 64, 32), scan=(16, 4),
    scan_lengths=(64, 128, 256), dense=128, chunked=2_112,
)  # fmt: skip


class Case(NamedTuple):
    """A cell with an original.

    Attributes:
        title: of its row. model: what counts once among those that are clearly faster.
    """

    cell: Cell
    title: str
    model: str


def cases_of(sizes: Sizes) -> list[Case]:
    """Every comparison with an original implementation."""
    cases = []
    layers, width = sizes.hyenadna
    for tokens in sizes.hyenadna_tokens:
        options = {"layers": layers, "width": width, "tokens": tokens}
        title = f"HyenaDNA, {layers} layers of {width}, {tokens:,} tokens"
        cases.append(Case(Cell(f"hyenadna {tokens:,}", "hyenadna", options), title, "HyenaDNA"))
    layers, width = sizes.gpn
    tokens, batch = sizes.gpn_batch
    for legacy, name in ((True, "GPN legacy"), (False, "GPN")):
        options = {"legacy": legacy, "layers": layers, "width": width, "tokens": tokens, "batch": batch}
        title = f"{name}, {layers} layers of {width}, {batch} x {tokens:,} bp"
        cases.append(Case(Cell(name.lower(), "gpn", options), title, name))
    layers, width = sizes.dnabert2
    for tokens, batch in sizes.dnabert2_batches:
        options = {"layers": layers, "width": width, "tokens": tokens, "batch": batch}
        title = f"DNABERT-2, {layers} layers of {width}, {batch} x {tokens:,} tokens"
        cases.append(Case(Cell(f"dnabert2 {tokens:,}", "dnabert2", options), title, "DNABERT-2"))
    return cases


def cells_of(group: str, sizes: Sizes) -> list[Cell]:
    """All cells of a group."""
    if group == "forward":
        named = {name: dict(zip(("layers", "width", "tokens"), getattr(sizes, name), strict=True))
                 for name in ("nt_v1", "nt_v2")}  # fmt: skip
        return [case.cell for case in cases_of(sizes)] + [Cell(name, name, named[name]) for name in named]
    if group == "scan":
        channels, states = sizes.scan
        options = [{"length": length, "channels": channels, "states": states} for length in sizes.scan_lengths]
        alone = [Cell(f"scan alone {option['length']:,}", "scan_alone", option) for option in options]
        return [Cell(f"scan {sizes.scan_lengths[0]:,}", "scan", options[0]), *alone]
    layers, width = sizes.dnabert2
    return [
        Cell(f"tensors {tokens:,}", "dnabert2_tensors", {"layers": layers, "width": width, "tokens": tokens})
        for tokens in (sizes.dense, sizes.chunked)
    ]


def rows_of(group: str, sizes: Sizes, found: Outcomes) -> list[Judged]:
    """The judged lines of a group."""
    return {"forward": _forward_rows, "scan": _scan_rows, "memory": _memory_rows}[group](sizes, found)


def _forward_rows(sizes: Sizes, found: Outcomes) -> list[Judged]:
    rows = []
    for case in cases_of(sizes):
        sides = ("ours", "uncached") if case.cell.kind == "hyenadna" else ("ours",)
        for side in sides:
            suffix = "" if side == "ours" else " without kept filters"
            row = judge(f"{case.title}: ours{suffix} / original", _quotient(found, case.cell.name, side), at_most=1.0)
            rows.append(unjudged_if_absent(row, found, case.cell.name))
    longest = f"hyenadna {sizes.hyenadna_tokens[-1]:,}"
    # Not judged: making filters is a fifth of a forward (the products with weights, which stay, are half).
    gain = judge(
        f"HyenaDNA, {sizes.hyenadna_tokens[-1]:,} tokens: filters made anew / kept",
        _quotient(found, longest, "uncached", "ours"),
    )
    rows += [unjudged_if_absent(gain, found, longest), clearly_faster(cases_of(sizes), found)]
    rows.append(
        judge(
            "Nucleotide Transformer v1 is transformers' EsmForMaskedLM itself: ours / original is 1, nothing timed",
            lambda: found.figure("nt_v1", "is_transformers_class"),
            at_least=1,
        )
    )
    rows.append(
        judge(
            "Nucleotide Transformer v2, 50M: ours / transformers' ESM of equal width (stand-in: not the original)",
            _quotient(found, "nt_v2", "ours", "esm"),
        )
    )
    return rows


def clearly_faster(cases: list[Case], found: Outcomes) -> Judged:
    """How many models are faster than their originals by `CLEARLY_FASTER` at the longest of their inputs.

    At short ones the matrix products that both have in common are most of the time. Without some of the checkouts it
    may pass, and is not judged where they could make the number up.
    """
    name = f"originals that ours leave behind by {CLEARLY_FASTER:g}x at the longest of their inputs"
    clear, open_models = [], []
    for model in dict.fromkeys(case.model for case in cases):
        longest = max((case.cell for case in cases if case.model == model), key=lambda cell: cell.options["tokens"])
        if is_absent(found, longest.name):
            open_models.append(model)
        elif _gain(found, longest.name) >= CLEARLY_FASTER:
            clear.append(model)
    row = judge(name, lambda: len(clear), at_least=CLEAR_CASES)._replace(note=", ".join(clear))
    is_open = not row.passed and len(clear) + len(open_models) >= CLEAR_CASES
    return row._replace(passed=None, note=f"{row.note} (not run: {', '.join(open_models)})") if is_open else row


def _gain(found: Outcomes, cell: str) -> float:
    """Time of the original over ours; 0 where the cell failed."""
    return 0.0 if "failed" in found[cell] else _quotient(found, cell, "original", "ours")()


def is_absent(found: Outcomes, cell: str) -> bool:
    """Whether the cell's original is not there to compare with."""
    return bool(found[cell].get("absent"))


def unjudged_if_absent(row: Judged, found: Outcomes, cell: str) -> Judged:
    """The row without a verdict where its original is not there."""
    return row._replace(passed=None) if is_absent(found, cell) else row


def _quotient(found: Outcomes, cell: str, top: str, bottom: str = "original") -> Callable[[], float]:
    return lambda: found.figure(cell, f"{top}_cpu_seconds") / found.figure(cell, f"{bottom}_cpu_seconds")


def _scan_rows(sizes: Sizes, found: Outcomes) -> list[Judged]:
    (channels, states), (first, *longer) = sizes.scan, sizes.scan_lengths
    title = f"selective scan, {channels} channels of {states} states"
    loops = f"scan {first:,}"
    rows = [
        judge(
            f"{title}, {first:,} tokens: loop in the shape of mamba-ssm's reference / ours",
            _quotient(found, loops, "reference", "ours"),
            at_least=20,
        ),
        judge(f"{title}, {first:,} tokens: plainest loop / ours", _quotient(found, loops, "plain", "ours")),
    ]
    for length in longer:
        rows.append(
            judge(
                f"{title}: time per token, {length:,} / {first:,} tokens",
                lambda length=length: (
                    found.ratio(f"scan alone {length:,}", f"scan alone {first:,}", "cpu_seconds") * first / length
                ),
                at_most=1.3,
            )
        )
    return rows


def _memory_rows(sizes: Sizes, found: Outcomes) -> list[Judged]:
    dense, chunked = f"tensors {sizes.dense:,}", f"tensors {sizes.chunked:,}"
    return [
        judge(
            f"DNABERT-2, sdpa, {sizes.dense:,} tokens: (H, L, L) tensors that one forward makes",
            lambda: found.figure(dense, "dense_tensors"),
            at_most=1,
        ),
        judge(
            f"DNABERT-2, sdpa, {sizes.chunked:,} tokens: (H, L, L) tensors that one forward makes",
            lambda: found.figure(chunked, "dense_tensors"),
            at_most=0,
        ),
        judge(
            f"DNABERT-2, sdpa, {sizes.chunked:,} tokens: elements of the largest tensor / H L L",
            lambda: found.figure(chunked, "largest_elements") / found.figure(chunked, "dense_elements"),
            at_most=1,
        ),
    ]
