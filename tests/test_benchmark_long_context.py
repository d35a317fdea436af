"""The long-context benchmark: counted operations and elements, its judgements, and its plan. No clock, no RSS."""

import inspect
import json
from multiprocessing import get_context

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensor_sizes import LargestTensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import long_context, measuring
from benchmarks.long_context_cells import (
    KINDS,
    PERFORMER,
    config_of,
    flops,
    full_attention_config,
    hierarchical_config,
    performer,
    slim_gradient,
    state_bytes,
    window_parity,
)
from benchmarks.long_context_cuda import parity
from benchmarks.long_context_demands import (
    QUICK,
    SIZES,
    Outcomes,
    cells_of,
    context_rows,
    judge,
    largest,
    rows_of,
    starting_points,
)
from genesplice_hf.models.genesplice.modeling_genesplice import GeneSpliceForMaskedLM, GeneSpliceModel

LONG, HUGE = 131_072, 1_048_576


def test_work_per_base_hardly_grows_with_the_length() -> None:
    assert flops("nano", HUGE)["flops"] / flops("nano", LONG)["flops"] <= 11


def test_full_attention_needs_thirty_times_the_operations() -> None:
    assert flops("full_nano", LONG)["flops"] / flops("nano", LONG)["flops"] >= 30


@pytest.mark.parametrize("size", ["nano", "small"])
def test_formula_of_the_peer_equals_what_torch_counts(size) -> None:
    length = 96
    model = GeneSpliceModel._from_config(full_attention_config(size), attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.full((1, length), 5))
    assert flops(f"full_{size}", length)["flops"] == counter.get_total_flops()


@pytest.mark.parametrize(("size", "parameters"), [("nano", 2_276_928), ("small", 27_991_104)])
def test_sizes_are_those_of_the_documentation(size, parameters) -> None:
    with torch.device("meta"):
        assert GeneSpliceForMaskedLM(hierarchical_config(size)).num_parameters() == parameters


@pytest.mark.parametrize("size", ["nano", "small"])
def test_peer_is_as_wide_and_deep_as_the_base_level(size) -> None:
    base, peer = hierarchical_config(size), config_of(f"full_{size}")
    assert peer.hidden_sizes == base.hidden_sizes[:1] and peer.intermediate_sizes == base.intermediate_sizes[:1]
    assert peer.num_tower_layers == base.num_encoder_layers[0] + base.num_decoder_layers[0] == 2
    assert set(peer.tower_layer_types) == {"full_attention"}


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_tensor_of_the_whole_model_grows_with_the_square_of_the_length(is_causal) -> None:
    config = hierarchical_config("nano")
    config.is_decoder = is_causal
    with torch.device("meta"):
        model = GeneSpliceModel._from_config(config, attn_implementation="eager").eval()
        ids = torch.zeros(1, LONG, dtype=torch.long)
    with LargestTensor() as largest_tensor, torch.no_grad():
        model(ids)
    # The scores of the base level: 3 w keys for each query and head.
    heads, window = config.num_attention_heads[0], config.local_windows[0]
    assert largest_tensor.elements <= 3 * heads * LONG * window < LONG**2 / 100


def test_documented_states_are_those_that_the_model_carries() -> None:
    model = performer(-1, "store").eval()
    with torch.no_grad():
        states = model(torch.full((1, 5), 6), use_cache=True).past_key_values.states
    carried = sum(tensor.numel() * 4 for state in states for tensor in vars_of(state))
    assert state_bytes(1, 2048) == carried == 33_792
    assert state_bytes(2049, 2048) == 2 * carried and len(states) == PERFORMER["num_hidden_layers"]


def vars_of(state) -> list[torch.Tensor]:
    return [value for value in state if isinstance(value, torch.Tensor)]


def test_small_cells_give_what_is_demanded_of_them() -> None:
    assert slim_gradient(80, [7, 64])["relative_difference"] < 1e-12
    assert window_parity(200, 16)["difference"] < 1e-12


def test_parity_names_what_cannot_run() -> None:
    found = parity(256, "cpu", ["eager", "sdpa", "flash"])["relative_difference"]
    assert found["eager"] < 0.05 and found["sdpa"] < 0.05
    assert isinstance(found["flash"], float) or found["flash"].startswith("cannot run: ")


@pytest.mark.parametrize("sizes", [SIZES, QUICK], ids=["full", "quick"])
def test_every_planned_cell_can_be_called(sizes) -> None:
    for group in long_context.GROUPS:
        cells = cells_of(group, sizes)
        assert len({cell.name for cell in cells}) == len(cells)
        for cell in cells:
            inspect.signature(KINDS[cell.kind]).bind(**json.loads(json.dumps(cell.options)))
    for options, start, cap in starting_points(sizes).values():
        inspect.signature(KINDS["linear_train"]).bind(length=start, repeats=1, **options)
        assert start <= cap


def passing(group: str) -> Outcomes:
    """Invented results of all cells that meet every demand."""
    found = Outcomes()
    for cell in cells_of(group, SIZES):
        length = cell.options.get("length", 1)
        is_full = "full" in cell.name or cell.name.startswith(("ordinary", "exact"))
        scale = 1000.0 if is_full else 1.0
        found[cell.name] = {
            "cpu_seconds": length * scale if group == "hierarchical" else length * (10.0 if is_full else 1.0),
            "growth_mib": length / 1e3 if group != "slim" else length / 100 if is_full else 10.0,
            "flops": length * scale,
            "relative_difference": 1e-15 if group == "slim" else {"eager": 0.01, "flash": "cannot run: not here"},
            "milliseconds_per_base": 1.0,
            "difference": 1e-15,
            "bases_per_second": 1e6,
            "gain": 1.5,
        }
    return found


SPOILERS = [
    ("hierarchical", "nano full forward 32,768", "cpu_seconds", 1.0, ">= 8"),
    ("hierarchical", "nano full forward 131,072", "cpu_seconds", 131_072.0 * 29, ">= 30"),
    ("hierarchical", "nano full flops 131,072", "flops", 1.0, ">= 30"),
    ("hierarchical", "nano forward 1,048,576", "cpu_seconds", 131_072.0 * 12.1, "<= 12"),
    ("hierarchical", "nano flops 1,048,576", "flops", 131_072.0 * 11.1, "<= 11"),
    ("hierarchical", "nano forward 1,048,576", "growth_mib", 6.1 * 1024, "<= 6"),
    ("hierarchical", "nano train 131,072", "growth_mib", 2.1 * 1024, "<= 2"),
    ("hierarchical", "nano train 1,048,576", "growth_mib", 12.1 * 1024, "<= 12"),
    ("slim", "SLiM reverse 262,144", "growth_mib", 12.1, "<= 1.2"),
    ("slim", "SLiM store 1,048,576", "growth_mib", 1.21 * (10 + 512 * 33_792 / 2**20), "<= 1.2"),
    ("slim", "SLiM reverse 65,536", "cpu_seconds", 655_360 * 1.21, "<= 1.2"),
    ("slim", "SLiM store 65,536", "cpu_seconds", 655_360 * 1.21, "<= 1.2"),
    ("slim", "gradient", "relative_difference", 1.1e-12, "<= 1e-12"),
    ("slim", "exact 16,384", "cpu_seconds", 16_384 * 3.9, ">= 4"),
    ("slim", "generate 65,536", "milliseconds_per_base", 1.6, "<= 1.5"),
    ("window", "window parity", "difference", 1.1e-12, "<= 1e-12"),
    ("window", "banded window 65,536", "growth_mib", 16.384 * 5.1, "<= 5"),
]


@pytest.mark.parametrize(("group", "cell", "field", "value", "demand"), SPOILERS)
def test_one_bad_figure_fails_its_own_demand(group, cell, field, value, demand) -> None:
    found = passing(group)
    assert all(row.passed is not False for row in rows_of(group, SIZES, found))
    found[cell][field] = value
    assert [row.demand for row in rows_of(group, SIZES, found) if row.passed is False] == [demand]


def test_ordinary_training_has_to_grow_fifteen_times_as_much() -> None:
    found = passing("slim")
    found["ordinary 65,536"]["growth_mib"] = 149.0
    failed = [row for row in rows_of("slim", SIZES, found) if row.passed is False]
    assert [(row.value, row.demand) for row in failed] == [(14.9, ">= 15")] * 2


def test_a_cell_that_failed_fails_only_what_was_demanded_of_it() -> None:
    found = passing("hierarchical")
    found["nano train 1,048,576"] = found["small train 1,048,576"] = {"failed": "out of memory"}
    rows = [row for row in rows_of("hierarchical", SIZES, found) if row.value is None]
    assert [(row.name.split(":")[0], row.passed, row.note) for row in rows] == [
        ("nano", False, "out of memory"),
        ("small", None, "out of memory"),
    ]
    assert "FAIL" in rows[0].line() and "out of memory" in rows[0].line()


def test_what_a_gpu_lacks_is_told_and_not_judged() -> None:
    rows = rows_of("cuda", SIZES, passing("cuda"))
    flash = next(row for row in rows if "flash" in row.name)
    assert flash.passed is None and flash.note == "cannot run: not here"
    assert next(row for row in rows if "eager" in row.name.split(" against ")[0]).passed


def test_bounds_belong_to_what_passes() -> None:
    assert judge("a", lambda: 8.0, at_least=8).passed and judge("a", lambda: 12.0, at_most=12).passed
    assert judge("a", lambda: float("nan"), at_most=12).passed is False
    assert judge("a", lambda: 1.0 / 0.0, at_most=12).passed is False
    assert judge("a", lambda: 3.0).passed is None


@given(st.integers(0, 10_000_000), st.sampled_from([1, 16, 512]), st.sampled_from([512, 8_192, 4_194_304]))
def test_search_finds_the_longest_context_to_an_eighth(limit, start, cap) -> None:
    asked = []

    def fits(length: int) -> bool:
        asked.append(length)
        return length <= limit

    found = largest(fits, start, cap)
    assert len(asked) == len(set(asked)) and all(start <= length <= cap for length in asked)
    if limit < start:
        assert found == 0
    elif found * 2 <= cap:
        assert found <= limit < found + max(1, found / 8) + 1
    else:
        assert found <= limit


def test_a_capped_search_is_called_so() -> None:
    found = {"SLiM": {"tokens": 4096, "is_capped": True}, "ordinary": {"tokens": 512, "is_capped": False}}
    assert [(row.value, bool(row.demand)) for row in context_rows(SIZES, found)] == [(4096.0, True), (512.0, False)]


def test_measuring_calls_once_for_memory_and_takes_the_fastest() -> None:
    calls = []
    found = measuring.measure(lambda: calls.append("call"), lambda: calls.append("warm-up"), repeats=3)
    assert calls == ["warm-up", "call", "call", "call"]
    assert found["repeats"] == 3 and found["peak_from"] in ("VmHWM", "getrusage")


def refuse_a_gibibyte() -> None:
    measuring.limit_memory(0.25)
    try:
        torch.zeros(2**30, dtype=torch.uint8)
    except RuntimeError as error:
        raise SystemExit(17 if measuring.is_out_of_memory(error) else 1) from error


def test_a_cell_cannot_take_the_machine_with_it() -> None:
    child = get_context("spawn").Process(target=refuse_a_gibibyte)
    child.start()
    child.join(600)
    assert child.exitcode == 17
    assert not measuring.is_out_of_memory(RuntimeError("shapes do not match"))


def test_one_cell_prints_json(capsys, monkeypatch) -> None:
    monkeypatch.setattr(long_context, "limit_memory", lambda gib: None)
    long_context.main(["--cell", "flops", "--options", '{"size": "full_nano", "length": 8}'])
    assert json.loads(capsys.readouterr().out) == flops("full_nano", 8)


def test_a_missed_demand_is_the_exit_status_and_other_groups_stay(tmp_path, monkeypatch, capsys) -> None:
    output = tmp_path / "results.json"
    output.write_text(json.dumps({"slim": {"rows": "kept"}}))
    row = judge("too slow", lambda: 1.0, at_least=8)._asdict()
    monkeypatch.setattr(long_context, "run_group", lambda *arguments: {"cells": {}, "rows": [row]})
    with pytest.raises(SystemExit) as end:
        long_context.main(["--only", "window", "--output", str(output)])
    assert end.value.code == 1 and "missed: ['too slow']" in capsys.readouterr().out
    written = json.loads(output.read_text())
    assert written["slim"] == {"rows": "kept"} and written["window"]["rows"][0]["passed"] is False


def test_toy_lengths_run_through(capsys) -> None:
    long_context.main(["--quick", "--only", "window", "cuda"])
    printed = capsys.readouterr().out
    assert "banded against densely masked attention" in printed and "toy lengths" in printed
    assert torch.cuda.is_available() or "skipped: torch finds no CUDA device here" in printed
