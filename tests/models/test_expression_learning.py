"""What knowledge is good for, on synthetic cells whose truth is known: regulation by factors, and pathways.

Values of a target are a linear function of its one regulator, of either sign, and noise; which factor regulates which
target differs from seed to seed. Models are tiny, steps and seeds are fixed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from sklearn.metrics import average_precision_score
from torch import nn

from genesplice_hf.data.knowledge import Edges, shuffle_graph
from genesplice_hf.layers.gene_prior import GenePrior
from genesplice_hf.models.bioformer.configuration_bioformer import BioFormerConfig
from genesplice_hf.models.bioformer.modeling_bioformer import BioFormerForEdgePrediction, BioFormerForMaskedExpression
from genesplice_hf.models.genegraph.configuration_genegraph import GeneGraphConfig
from genesplice_hf.models.genegraph.modeling_genegraph import GeneGraphForSequenceClassification

PAD, CLS, FIRST = 0, 1, 2
MASK, IGNORED = -1.0, -100.0
TRAINING, HELD_OUT = 768, 256
# Share of a target's variance that its regulator does not explain.
NOISE = 0.09
SEEDS = 5
SIZES: dict[str, Any] = {
    "pad_token_id": PAD, "cls_token_id": CLS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
PAIR: dict[str, Any] = {
    "pair_hidden_size": 8, "opm_hidden_size": 4, "explicit_zero_prob": False, "mask_embedding": True,
}  # fmt: skip
Batch = dict[str, torch.Tensor]


class Regulation(NamedTuple):
    """Genes 0..factors-1 regulate the others; `values` (cells, genes), training cells first."""

    factors: int
    edges: Edges
    values: torch.Tensor

    @property
    def vocab_size(self) -> int:
        return FIRST + self.values.shape[1]


def regulation(seed: int, factors: int, targets: int) -> Regulation:
    random = np.random.default_rng(seed)
    source, sign = random.integers(factors, size=targets), random.choice([-1.0, 1.0], targets)
    free = random.normal(size=(TRAINING + HELD_OUT, factors))
    noise = random.normal(size=(len(free), targets))
    values = np.concatenate([free, np.sqrt(1 - NOISE) * free[:, source] * sign + np.sqrt(NOISE) * noise], axis=1)
    names = [
        np.array([f"G{gene}" for gene in genes], dtype=object) for genes in (source, factors + np.arange(targets))
    ]
    effects = [(sign == wanted).astype(np.float32) for wanted in (1, -1)]
    return Regulation(factors, Edges(*names, *effects, np.ones(targets)), torch.tensor(values, dtype=torch.float32))


def prior_of(edges: Edges, vocab_size: int) -> GenePrior:
    source, target = (
        torch.tensor([FIRST + int(name[1:]) for name in names]) for names in (edges.source, edges.target)
    )
    values = torch.tensor(np.stack([edges.stimulation, edges.inhibition], axis=1))
    return GenePrior(source, target, values, vocab_size)


def cells_of(values: torch.Tensor, factors: int, generator: torch.Generator, masked: float = 0.25) -> Batch:
    """`<cls>` and all genes; a share of the targets is masked and asked for."""
    is_masked = torch.rand(values.shape, generator=generator) < masked
    is_masked[:, :factors] = False
    ids = torch.arange(CLS, FIRST + values.shape[1]).expand(len(values), -1)
    shown, labels = values.masked_fill(is_masked, MASK), values.masked_fill(~is_masked, IGNORED)
    return {
        "input_ids": ids,
        "values": nn.functional.pad(shown, (1, 0)),
        "labels": nn.functional.pad(labels, (1, 0), value=IGNORED),
    }


def train(
    model: Any, batch: Callable[[torch.Tensor, torch.Generator], Batch], steps: int, rate: float, cells: int = 16
) -> Any:
    """AdamW and a cycle of learning rates, on so many training cells a step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        rows = torch.randint(TRAINING, (cells,), generator=generator)
        optimizer.zero_grad()
        model(**batch(rows, generator)).loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def pretrained(
    system: Regulation, seed: int, steps: int, prior: GenePrior | None = None, cells: int = 16, **fields: Any
) -> Any:
    """A BioFormer that learned to predict masked targets."""
    fields |= {} if prior is None else {"pair_init": "prior", "prior_channels": 2}
    torch.manual_seed(seed)
    config = BioFormerConfig(**(SIZES | PAIR | fields), vocab_size=system.vocab_size)
    model = BioFormerForMaskedExpression(config)
    if prior is not None:
        model.set_gene_prior(prior)

    def batch(rows: torch.Tensor, random: torch.Generator) -> Batch:
        return cells_of(system.values[rows], system.factors, random)

    return train(model, batch, steps, 1e-2, cells)


@torch.no_grad()
def error(model: Any, system: Regulation) -> float:
    """Mean squared error of masked targets of cells that were not trained on; their variance is 1."""
    random = torch.Generator().manual_seed(1)
    return model(**cells_of(system.values[TRAINING:], system.factors, random)).loss.item()


def test_a_true_prior_beats_none_and_a_shuffled_one() -> None:
    errors: dict[str, list[float]] = {"true": [], "none": [], "shuffled": []}
    for seed in range(SEEDS):
        system = regulation(seed, factors=6, targets=14)
        shuffled = shuffle_graph(system.edges, seed)
        assert (shuffled.source != system.edges.source).any() or (shuffled.target != system.edges.target).any()
        priors = {"none": None}
        priors |= {
            name: prior_of(edges, system.vocab_size)
            for name, edges in (("true", system.edges), ("shuffled", shuffled))
        }
        for name, prior in priors.items():
            errors[name].append(error(pretrained(system, seed, 64, prior), system))
    for control in ("none", "shuffled"):
        found = stats.ttest_rel(errors["true"], errors[control], alternative="less")
        wins = sum(ours < theirs for ours, theirs in zip(errors["true"], errors[control], strict=True))
        assert wins == SEEDS or found.pvalue < 0.05, (control, errors)


def edge_ratio(seed: int) -> float:
    """AUPRC over prevalence of an edge head on a frozen base: targets it was not told of, every factor a candidate."""
    system = regulation(seed, factors=6, targets=16)
    truth = torch.zeros(23, 23)
    for source, target in zip(system.edges.source, system.edges.target, strict=True):
        truth[1 + int(source[1:]), 1 + int(target[1:])] = 1
    factors, told, asked = slice(1, 7), slice(7, 19), slice(19, 23)
    labels = torch.full_like(truth, IGNORED)
    labels[factors, told] = truth[factors, told]
    base = pretrained(system, seed, 300, cells=32, num_hidden_layers=1)
    torch.manual_seed(seed)
    model = BioFormerForEdgePrediction(base.config)
    model.bioformer.load_state_dict(base.bioformer.state_dict())
    model.bioformer.requires_grad_(False)

    def batch(rows: torch.Tensor, random: torch.Generator) -> Batch:
        cells = cells_of(system.values[rows], system.factors, random)
        return cells | {"labels": labels.expand(len(rows), -1, -1)}

    train(model, batch, 150, 1e-2)
    rows = torch.arange(TRAINING, TRAINING + 64)
    with torch.no_grad():
        logits = model(**batch(rows, torch.Generator().manual_seed(0))).logits.mean(0)[factors, asked]
    answers = truth[factors, asked].flatten()
    return average_precision_score(answers, logits.flatten()) / answers.mean().item()


def test_an_edge_head_finds_regulators_of_targets_that_it_was_not_told() -> None:
    """What a BioFormer learned from values alone, without a prior, tells the regulators of further targets."""
    ratios = [edge_ratio(seed) for seed in range(4)]
    assert np.mean(ratios) >= 3, ratios


def pathway_cells(seed: int, sets: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Members (sets, size), values (cells, genes) and labels: whether the last one returned, a set, is active."""
    random = np.random.default_rng(seed)
    members, chosen = np.sort(random.permutation(sets * size).reshape(sets, size), axis=1), int(random.integers(sets))
    activity = random.normal(size=(TRAINING + HELD_OUT, sets))
    levels = np.zeros((len(activity), sets * size))
    for number, genes in enumerate(members):
        levels[:, genes] = activity[:, [number]]
    counts = random.poisson(np.exp(1.0 + levels + 0.5 * random.normal(size=levels.shape)))
    labels = torch.tensor(activity[:, chosen] > 0).long()
    return torch.tensor(members), torch.tensor(counts, dtype=torch.float32), labels, chosen


def test_the_pathway_behind_a_label_is_attended_to_most() -> None:
    """Pathways stand in the place of genes: what tells the classes apart can be read from tokens alone."""
    ranks = []
    for seed in range(SEEDS):
        members, values, labels, chosen = pathway_cells(seed, sets=8, size=5)
        ids = torch.arange(CLS, FIRST + members.numel())
        torch.manual_seed(seed)
        model = GeneGraphForSequenceClassification(
            GeneGraphConfig(
                **SIZES, vocab_size=FIRST + members.numel(), num_labels=2, use_graph_encoder=False,
                use_pathway_tokens=True, num_pathways=len(members), num_pathway_genes=members.numel(),
                pathway_mode="only", pathway_unannotated_tokens=0,
            )
        )  # fmt: skip
        model.set_pathways(members.flatten() + FIRST, torch.arange(len(members)).repeat_interleave(members.shape[1]))
        inputs = {"input_ids": ids.expand(len(values), -1), "values": nn.functional.pad(values, (1, 0))}

        def batch(rows: torch.Tensor, random: Any, inputs: Any = inputs, labels: Any = labels) -> Batch:
            return {name: tensor[rows] for name, tensor in inputs.items()} | {"labels": labels[rows]}

        train(model, batch, 100, 5e-3)
        with torch.no_grad():
            attention = model.base_model(**{name: x[TRAINING:] for name, x in inputs.items()}).pathway_attention
        ranks.append(int((attention.mean(0) > attention.mean(0)[chosen]).sum()))
    assert sum(rank == 0 for rank in ranks) >= 0.8 * SEEDS, ranks
