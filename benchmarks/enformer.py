"""Enformer: what ours costs beside the package enformer-pytorch with the same weights, on a CPU.

Forward passes of every bin through the human head at full size (float32 and bfloat16 against its float32), one of a
small model, and the memory of a training step. Every cell runs alone in a fresh process with a fixed number of
threads; CPU time (`time.process_time`) is the minimum of the calls, memory the growth of the peak during the first.
The table holds the ratios; demanded ones pass or fail, and one failure makes the exit status 1. Results go to
benchmarks/results/enformer.json.

enformer-pytorch pins an older transformers, so that it lives in an environment of its own:

    python -m venv peer && peer/bin/pip install torch==2.13.0 enformer-pytorch==0.8.12

Run: `python -m benchmarks.enformer --peer peer/bin/python [--threads 1]`; at full size it takes about 15 minutes and
10 GiB. `--quick` runs our cells with a toy model in this process, to see that they run, and judges nothing.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.enformer_cells import SEED, SIZES, SPECIES, difference, forward, train_step
from benchmarks.long_context import ROOT, SPARE_SHARE, announced, cell_runner, run_here
from benchmarks.long_context_demands import Cell, Judged, Outcomes, judge
from benchmarks.measuring import available_gib, limit_memory
from benchmarks.surroundings import environment
from genesplice_hf.models.enformer.configuration_enformer import EnformerConfig
from genesplice_hf.models.enformer.modeling_enformer import EnformerForTrackPrediction
from genesplice_hf.models.original import from_original

RESULTS = ROOT / "benchmarks" / "results" / "enformer.json"
MODULE, PEER = "benchmarks.enformer", "benchmarks.enformer_peer"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Case(NamedTuple):
    """A forward pass: `size` of the model, bases, least speed-up in each type of numbers, calls."""

    size: str
    length: int
    at_least: dict[str, float]
    repeats: int


CASES = (
    Case("full", 49_152, {"float32": 1.35, "bfloat16": 2.5}, 3),
    Case("full", 196_608, {"float32": 1.35, "bfloat16": 2.5}, 2),
    Case("small", 8_192, {"float32": 1.0}, 7),
)
TRAIN_LENGTH = 98_304


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the cells, prints the table and writes the results; or runs one cell of ours and prints its JSON."""
    arguments = build_parser().parse_args(argv)
    if arguments.cell:
        limit_memory(available_gib() * (1 - SPARE_SHARE))
        print(json.dumps(run_here(arguments.cell, arguments.options, arguments.threads, KINDS)))
    elif arguments.quick:
        print(json.dumps(quick(arguments.threads), indent=2), "\ntoy size: the figures mean nothing")
    else:
        raise SystemExit(compare(arguments))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="the Python of an environment with enformer-pytorch")
    parser.add_argument("--quick", action="store_true", help="a toy model, nothing judged, nothing written")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file")
    parser.add_argument("--threads", type=int, default=1, help="threads of every cell")
    parser.add_argument("--time_limit", type=float, default=3600, help="seconds that a cell may take")
    parser.add_argument("--cell", choices=sorted(KINDS), help="run this cell of ours here and print its JSON")
    parser.add_argument("--options", type=json.loads, default={}, help="arguments of --cell, as JSON")
    return parser


def compare(arguments: argparse.Namespace) -> int:
    """Measures both implementations; the exit status."""
    if not arguments.peer:
        raise SystemExit("`--peer` must name the Python of an environment with enformer-pytorch; see --help.")
    before = environment(SEED, arguments.threads)
    # The interpreter of a virtual environment is a link that must not be followed.
    peer = cell_runner(arguments, PEER, str(Path(arguments.peer).absolute()))
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run_cells(folder, peer, cell_runner(arguments, MODULE))
    rows = rows_of(outcomes)
    for row in rows:
        print(row.line())
    report = {"environment": before, "cells": dict(outcomes), "rows": [row._asdict() for row in rows]}
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    missed = [row.name for row in rows if row.passed is False]
    print(f"missed: {missed}" if missed else "all demands met")
    return int(bool(missed))


def run_cells(folder: str, peer: Callable[[Cell], Any], ours: Callable[[Cell], Any]) -> Outcomes:
    """Every cell, the peer's before ours; results of forward passes are compared as soon as both are there."""
    found = Outcomes()
    for size in dict.fromkeys(case.size for case in CASES):
        found[f"weights {size}"] = announced(
            Cell(f"weights {size}", "weights", {"size": size, "path": weights_in(folder, size)}), peer
        )
    for case in CASES:
        options = {"path": weights_in(folder, case.size), "length": case.length, "repeats": case.repeats}
        name = cell_name(case, "peer")
        found[name] = announced(Cell(name, "predict", options | {"output": f"{folder}/peer.pt"}), peer)
        for dtype in case.at_least:
            name = cell_name(case, dtype)
            cell = Cell(name, "predict", options | {"output": f"{folder}/ours.pt", "dtype": dtype})
            found[name] = announced(cell, ours)
            if "failed" not in found[name] and "failed" not in found[cell_name(case, "peer")]:
                found[name] |= difference(f"{folder}/ours.pt", f"{folder}/peer.pt")
    options = {"path": weights_in(folder, "full"), "length": TRAIN_LENGTH}
    found["train peer"] = announced(Cell("train peer", "train", options), peer)
    for name, checkpointed in (("train", False), ("train checkpointed", True)):
        found[name] = announced(Cell(name, "train", options | {"checkpointed": checkpointed}), ours)
    return found


def weights_in(folder: str, size: str) -> str:
    """Where the peer writes the weights of a size."""
    return f"{folder}/{size}.pt"


def cell_name(case: Case, side: str) -> str:
    """Name of a forward cell in the results."""
    return f"{case.size} {case.length:,} {side}"


def rows_of(found: Outcomes) -> list[Judged]:
    """The judged lines."""
    rows = []
    for case in CASES:
        peer, title = cell_name(case, "peer"), f"{case.size} size, {case.length:,} bases"
        for dtype, least in case.at_least.items():
            ours = cell_name(case, dtype)
            rows.append(
                judge(
                    f"{title}: enformer-pytorch float32 / ours {dtype}, CPU time",
                    lambda ours=ours, peer=peer: found.ratio(peer, ours, "cpu_seconds"),
                    at_least=least,
                )
            )
            limits = {"at_most": 1e-5} if dtype == "float32" else {}
            rows.append(
                judge(
                    f"{title}: largest difference of ours {dtype}",
                    lambda ours=ours: found.figure(ours, "difference"),
                    **limits,
                )
            )
        if case.size == "full":
            rows.append(
                judge(
                    f"{title}: growth of peak memory, ours float32 / enformer-pytorch",
                    lambda case=case, peer=peer: found.ratio(cell_name(case, "float32"), peer, "growth_mib"),
                    at_most=1.0,
                )
            )
    for name, most in (("train", None), ("train checkpointed", 0.7)):
        rows.append(
            judge(
                f"training step, {TRAIN_LENGTH:,} bases: growth of peak memory, ours ({name}) / enformer-pytorch",
                lambda name=name: found.ratio(name, "train peer", "growth_mib"),
                at_most=most,
            )
        )
        rows.append(
            judge(
                f"training step, {TRAIN_LENGTH:,} bases: enformer-pytorch / ours ({name}), CPU time",
                lambda name=name: found.ratio("train peer", name, "cpu_seconds"),
            )
        )
    return rows


def load(path: str) -> EnformerForTrackPrediction:
    """Our model with the peer's weights, and its positional basis, which is not TensorFlow's."""
    written = torch.load(path, weights_only=True, mmap=True)
    options = {"gamma_normalization": "feature"}
    return from_original("enformer", written["arguments"], written["state_dict"], **options)  # type: ignore[return-value]


def predict(path: str, length: int, repeats: int, output: str, dtype: str = "float32") -> dict[str, Any]:
    """A forward pass with every bin and the human head."""
    model = load(path).to(DTYPES[dtype]).eval()
    return forward(lambda ids: model(ids, species=SPECIES, target_length=-1).logits, length, repeats, output)


def train(path: str, length: int, checkpointed: bool) -> dict[str, Any]:
    """A training step."""
    return train_model(load(path), length, checkpointed)


def train_model(model: EnformerForTrackPrediction, length: int, checkpointed: bool) -> dict[str, Any]:
    """The step itself, with or without gradient checkpointing."""
    if checkpointed:
        model.gradient_checkpointing_enable()

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        bins = ids.shape[1] // 2**model.config.num_downsamples
        labels = torch.ones(1, bins, model.config.output_heads[SPECIES])
        return model(ids, labels=labels, species=SPECIES, target_length=-1).loss

    return train_step(model, loss_of, length)


def quick(threads: int) -> dict[str, Any]:
    """Our cells on a toy model, in this process."""
    torch.set_num_threads(threads)
    model = EnformerForTrackPrediction(EnformerConfig(**SIZES["toy"])).eval()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"{folder}/{name}.pt" for name in ("one", "other")]
        found = {
            name: forward(lambda ids: model(ids, species=SPECIES, target_length=-1).logits, 2_048, 2, name)
            for name in outputs
        }
        figures = {"forward": found[outputs[0]], "twice": difference(*outputs)}
    return figures | {"train": train_model(model, 2_048, True)}


KINDS: dict[str, Callable[..., dict[str, Any]]] = {function.__name__: function for function in (predict, train)}


if __name__ == "__main__":
    main()
