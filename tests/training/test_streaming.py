"""Windows by number against windows in memory, the shuffled order, and what every process sees at every step."""

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genesplice_hf.data.fasta import Genome
from genesplice_hf.data.windows import windows_dataset
from genesplice_hf.errors import DataError
from genesplice_hf.genome.interval import Interval
from training import streaming
from training.batches import Forwards, Stage
from training.streaming import Permutation, Source, StreamedWindows, n_runs, without


@given(st.integers(1, 700), st.integers(0, 2**40), st.integers(0, 50))
def test_an_order_holds_every_number_once_and_can_be_read_anywhere(size, seed, pass_number) -> None:
    order = Permutation(size, seed, pass_number)
    numbers = order(np.arange(size))
    assert sorted(numbers) == list(range(size))
    places = np.array([size - 1, 0, size // 2])
    assert np.array_equal(Permutation(size, seed, pass_number)(places), numbers[places])


def test_orders_are_shuffled_and_differ_by_every_part_of_their_key() -> None:
    size = 20_000
    orders = [Permutation(size, *key)(np.arange(size)) for key in ((0, 0), (0, 1), (1, 0), (0,), (0, 0, 0))]
    for i, order in enumerate(orders):
        # Among independent orders the correlation has sd 0.007, and about one number stays in its place.
        for other in (np.arange(size), *orders[:i]):
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.03
            assert (order == other).sum() < 10
        neighbours = np.abs(np.diff(order))
        assert abs(neighbours.mean() / (size / 3) - 1) < 0.03


def test_a_range_larger_than_a_word_of_32_bits_has_an_order() -> None:
    numbers = Permutation(10**12, 3)(np.arange(1000))
    assert len(set(numbers.tolist())) == 1000
    assert 0 <= numbers.min() < 10**11 and 9 * 10**11 < numbers.max() < 10**12


def test_an_empty_range_has_none() -> None:
    with pytest.raises(DataError, match="`size` must be 1 or more, was 0"):
        Permutation(0)


@pytest.fixture(scope="module")
def genomes(tmp_path_factory) -> list[Genome]:
    """Two files with runs of N at starts, ends, in the middle, in either case, and a contig of nothing else."""
    folder, rng = tmp_path_factory.mktemp("streamed"), np.random.default_rng(1)
    letters = np.array(list("ACGTacgt"))

    def contig(length: int, holes: list[tuple[int, int]]) -> str:
        bases = rng.choice(letters, length)
        for begin, end in holes:
            bases[begin:end] = rng.choice(["N", "n"])
        return "".join(bases)

    first = {"a": contig(500, [(0, 30), (100, 101), (200, 260), (480, 500)]), "empty": "N" * 90, "b": contig(60, [])}
    second = {"a": contig(333, [(50, 55), (57, 62)]), "short": "ACGT"}
    for name, records in (("one.fa", first), ("two.fa", second)):
        (folder / name).write_text("".join(f">{key}\n{text}\n" for key, text in records.items()))
    return [Genome(folder / name) for name in ("one.fa", "two.fa")]


def sources(genomes: list[Genome], exclude: list[Interval]) -> list[Source]:
    found = []
    for number, genome in enumerate(genomes):
        contigs = [Interval(chrom, 0, length) for chrom, length in genome.contigs.items()]
        found.append(Source(genome, f"g{number}", [part for contig in contigs for part in without(contig, exclude)]))
    return found


@pytest.mark.parametrize(
    ("window_bp", "step_bp", "max_n"), [(20, 20, 0.1), (20, 7, 0.0), (33, 1, 0.25), (60, 45, 1.0), (10, 13, 0.5)]
)
@pytest.mark.parametrize("exclude", [[], [Interval("a", 90, 150), Interval("a", 140, 180), Interval("b", 0, 60)]])
def test_streamed_windows_are_the_windows_in_memory(window_bp, step_bp, max_n, exclude, genomes, monkeypatch) -> None:
    """Number by number, whatever the size of the blocks that are read and counted."""
    expected = []
    for number, genome in enumerate(genomes):
        held_out = [hole for hole in exclude if hole.chrom in genome.contigs]
        expected += windows_dataset(
            genome, window_bp, step_bp, exclude=held_out, max_n_fraction=max_n, last="drop", name=f"g{number}"
        )
    for block_bp, windows_at_a_time in ((1 << 24, 1 << 20), (17, 3)):
        monkeypatch.setattr(streaming, "_BLOCK_BP", block_bp)
        monkeypatch.setattr(streaming, "_WINDOWS_AT_A_TIME", windows_at_a_time)
        windows = StreamedWindows(sources(genomes, exclude), window_bp, step_bp, max_n)
        assert len(windows) == len(expected)
        assert [windows[number] for number in range(len(windows))] == expected
        assert windows[-1] == expected[-1]
        with pytest.raises(IndexError):
            windows[len(windows)]


def test_a_spawned_worker_can_be_given_the_windows(genomes) -> None:
    windows = StreamedWindows(sources(genomes, []), 20, 7, 0.1)
    copy = pickle.loads(pickle.dumps(windows))
    assert [copy[i] for i in range(len(copy))] == [windows[i] for i in range(len(windows))]


def test_what_is_kept_does_not_grow_with_the_number_of_windows(tmp_path) -> None:
    for length in (10_000, 100_000):
        (tmp_path / f"{length}.fa").write_text(f">a\n{'ACGT' * (length // 4)}\n")
    kept = []
    for length in (10_000, 100_000):
        genome = Genome(tmp_path / f"{length}.fa")
        windows = StreamedWindows([Source(genome, "g", [Interval("a", 0, length)])], 64, 1, 0.1)
        assert len(windows) == length - 63
        kept.append(len(pickle.dumps(windows)))
    assert kept[1] - kept[0] < 20


def test_runs_of_n_that_meet_at_a_block_border_count_as_one(genomes, monkeypatch) -> None:
    monkeypatch.setattr(streaming, "_BLOCK_BP", 50)
    runs = n_runs(genomes[0], Interval("a", 0, 500))
    text = genomes[0].seq("a", 0, 500).upper()
    assert {i for begin, end in runs for i in range(begin, end)} == {i for i in range(500) if text[i] == "N"}
    assert (runs[1:, 0] >= runs[:-1, 1]).all()


@pytest.mark.parametrize(
    ("stretch", "window_bp", "max_n", "advice"),
    [
        (Interval("empty", 0, 90), 20, 0.1, r"`window_bp` \(20\) fits into no stretch of one\.fa with at most 10% N"),
        (Interval("b", 0, 60), 61, 0.1, r"`window_bp` \(61\) fits into no stretch"),
        (Interval("b", 0, 60), 0, 0.1, r"`window_bp` must be 1 or more, was 0"),
    ],
)
def test_windows_that_cannot_be_are_advice(stretch, window_bp, max_n, advice, genomes) -> None:
    with pytest.raises(DataError, match=advice):
        StreamedWindows([Source(genomes[0], "g", [stretch])], window_bp, 5, max_n)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 15)), max_size=5))
def test_what_is_left_beside_the_holes(holes) -> None:
    region = Interval("a", 5, 45)
    taken = {i for start, length in holes for i in range(start, start + length)}
    stretches = without(region, [Interval("a", start, start + length) for start, length in holes])
    left = [i for part in stretches for i in range(part.start, part.end)]
    assert left == [i for i in range(5, 45) if i not in taken]


def rows(count: int, name: str = "w") -> list[dict[str, str]]:
    return [{"example_id": f"{name}{i}"} for i in range(count)]


def names(forward: list[dict[str, str]]) -> list[str]:
    return [row["example_id"] for row in forward]


@pytest.mark.parametrize(("world_size", "accumulation", "batch_size"), [(1, 1, 6), (2, 1, 3), (3, 2, 1), (1, 3, 2)])
def test_every_step_sees_the_same_windows_however_it_is_shared(world_size, accumulation, batch_size) -> None:
    """23 windows, 6 per step: passes end inside a step, and every window is seen once per pass."""
    stage = Stage(0, 12, rows(23), 64, batch_size)
    ranks = [Forwards([stage], accumulation, rank, world_size, seed=5) for rank in range(world_size)]
    whole = Forwards([stage._replace(batch_size=6)], 1, 0, 1, seed=5)
    assert {len(rank) for rank in ranks} == {12 * accumulation}
    seen: Counter[str] = Counter()
    for step in range(12):
        parts = [names(r[step * accumulation + a]) for a in range(accumulation) for r in ranks]
        assert {len(part) for part in parts} == {batch_size}
        assert [name for part in parts for name in part] == names(whole[step])
        seen.update(name for part in parts for name in part)
    places = 12 * 6
    assert set(seen.values()) == {1}
    assert {name for name in seen if "#" not in name} == set(names(rows(23)))
    for number in (1, 2):
        assert {name for name in seen if name.endswith(f"#{number}")} == {
            f"{name}#{number}" for name in names(rows(23))
        }
    assert len(seen) == places and stage.passes_done(12, world_size * accumulation) == pytest.approx(72 / 23)


def test_orders_differ_by_pass_stage_and_seed() -> None:
    stages = [Stage(0, 4, rows(40), 64, 10), Stage(4, 8, rows(40), 128, 10)]

    def order(forwards: Forwards, first: int) -> list[str]:
        return [name.split("#")[0] for step in range(first, first + 4) for name in names(forwards[step])]

    plan = Forwards(stages, 1, 0, 1, seed=0)
    again = Forwards([stages[0]._replace(until_step=8)], 1, 0, 1, seed=0)
    other = Forwards(stages, 1, 0, 1, seed=1)
    orders = [order(plan, 0), order(plan, 4), order(again, 4), order(other, 0)]
    assert order(again, 0) == orders[0]
    assert all(sorted(found) == sorted(names(rows(40))) for found in orders)
    assert len({tuple(found) for found in orders}) == 4


def test_stages_follow_each_other_and_start_their_windows_anew() -> None:
    stages = [Stage(0, 3, rows(20, "short"), 64, 4), Stage(3, 5, rows(7, "long"), 128, 2)]
    plan = Forwards(stages, 2, 0, 1, seed=0)
    found = [names(plan[i]) for i in range(len(plan))]
    assert [len(forward) for forward in found] == [4] * 6 + [2] * 4
    assert all(name.startswith("short") for forward in found[:6] for name in forward)
    assert {name for forward in found[6:] for name in forward} == {*names(rows(7, "long")), found[9][1]}
    assert found[9][1].endswith("#1")
    assert [stage.passes_done(5, 2) for stage in stages] == [24 / 20, 8 / 7]
    assert [stage.passes_done(2, 2) for stage in stages] == [16 / 20, 0]


def test_a_plan_reads_only_the_windows_that_are_asked_for(genomes, monkeypatch) -> None:
    windows = StreamedWindows(sources(genomes, []), 20, 1, 0.1)
    read: list[tuple[str, int]] = []
    seq = Genome.seq
    monkeypatch.setattr(Genome, "seq", lambda self, *place: read.append(place[:2]) or seq(self, *place))
    found = Forwards([Stage(0, 1000, windows, 20, 3)], 1, 0, 1, seed=0)[731]
    assert [(row["chrom"], row["start"]) for row in found] == read and len(read) == 3
