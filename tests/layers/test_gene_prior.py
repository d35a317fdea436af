"""The table of edges: the golden lookup, its rules, and files that are what their hash says."""

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from genesplice_hf.errors import CheckpointError, DataError
from genesplice_hf.layers.gene_prior import GenePrior

GOLDEN = Path(__file__).parents[1] / "golden" / "prior_lookup"


def golden_prior() -> GenePrior:
    facts = json.loads((GOLDEN / "config.json").read_text())
    rows = list(csv.DictReader((GOLDEN / "interactions.csv").open()))
    return GenePrior.seed_mode(
        [row["source_genesymbol"] for row in rows],
        [row["target_genesymbol"] for row in rows],
        [int(row["is_stimulation"]) for row in rows],
        [int(row["is_inhibition"]) for row in rows],
        {name: int(index) for index, name in facts["itos"].items()},
    )


def test_golden_lookup() -> None:
    ids = load_file(GOLDEN / "inputs.safetensors")["gene_ids"]
    expected = load_file(GOLDEN / "outputs.safetensors")["z"]
    found = golden_prior().lookup(ids)[..., 0]
    assert expected.any() and torch.equal(found, expected)


def random_prior(edges: int = 40, genes: int = 12, channels: int = 2, **options) -> GenePrior:
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randperm(genes**2, generator=generator)[:edges]
    values = torch.randn(edges, channels, generator=generator)
    return GenePrior(pairs // genes, pairs % genes, values, genes, **options)


def naive_lookup(prior: GenePrior, ids: torch.Tensor) -> torch.Tensor:
    edges = zip(prior.source.tolist(), prior.target.tolist(), strict=True)
    table = dict(zip(edges, prior.value, strict=True))
    zero = torch.zeros(prior.num_channels)
    cells = [[torch.stack([table.get((i, j), zero) for j in row]) for i in row] for row in ids.tolist()]
    return torch.stack([torch.stack(cell) for cell in cells])


def test_lookup_is_a_search_pair_by_pair() -> None:
    prior = random_prior()
    ids = torch.randint(0, 12, (3, 9))
    assert torch.equal(prior.lookup(ids), naive_lookup(prior, ids))
    assert not GenePrior(torch.zeros(0), torch.zeros(0), torch.zeros(0, 2), 12).lookup(ids).any()


def test_duplicates() -> None:
    source, target = torch.tensor([1, 2, 1, 1]), torch.tensor([2, 1, 2, 1])
    value = torch.tensor([[1.0, -3.0], [5.0, 5.0], [-2.0, 4.0], [7.0, 7.0]])

    def edge(on_duplicate: str) -> list[float]:
        prior = GenePrior(source, target, value, 4, on_duplicate=on_duplicate)
        assert torch.equal(prior.lookup(torch.tensor([[2, 1]]))[0, 0, 1], torch.tensor([5.0, 5.0]))
        return prior.lookup(torch.tensor([[1, 2]]))[0, 0, 1].tolist()

    assert edge("max") == [1.0, 4.0] and edge("sum") == [-1.0, 1.0] and edge("drop") == [0.0, 0.0]
    with pytest.raises(DataError, match="more than once"):
        edge("error")


def test_files_are_equal_bytes_and_come_back(tmp_path: Path) -> None:
    prior = random_prior(genes=12, licence="CC-BY-4.0")
    prior.genes = [f"G{index}" for index in range(12)]
    prior.save(tmp_path / "one")
    again = GenePrior.load(tmp_path / "one", prior.sha256())
    again.save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert (again.genes, again.licence, again.vocab_size, len(again)) == (prior.genes, "CC-BY-4.0", 12, 40)
    ids = torch.arange(12)[None]
    assert torch.equal(again.lookup(ids), prior.lookup(ids))


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    prior = random_prior()
    prior.value[3, 0] += 1
    changed = prior.to_bytes()
    with pytest.raises(CheckpointError, match="was changed"):
        GenePrior.from_bytes(changed, random_prior().sha256())
    with pytest.raises(CheckpointError, match="no table"):
        GenePrior.from_bytes(b"nonsense" * 9)


def test_another_vocabulary_keeps_what_is_left() -> None:
    prior = random_prior()
    ids = torch.arange(12)[None]
    assert torch.equal(prior.resized(30).lookup(ids), prior.lookup(ids))
    small = prior.resized(6)
    assert torch.equal(small.lookup(ids[:, :6]), prior.lookup(ids[:, :6])) and small.vocab_size == 6


def test_bad_tables_are_advice() -> None:
    with pytest.raises(DataError, match="vocab_size"):
        GenePrior(torch.tensor([4]), torch.tensor([0]), torch.ones(1), 4)
    with pytest.raises(DataError, match="equally long"):
        GenePrior(torch.tensor([1]), torch.tensor([0, 1]), torch.ones(1), 4)
