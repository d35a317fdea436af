"""The models that the BioFormer experiments compare, and which of them are compared with which.

One block serves all of them, so that a model is a set of switches. "scGPT" is the published baseline (norms after each
branch, dropout 0.2, biases); "plain" is BioFormer without its pair path, which is the same network with norms before
each branch, no dropout and no biases of queries, keys and values.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any, NamedTuple

from transformers import AutoConfig, PreTrainedModel

from genesplice_hf.data.gene_sets import Pathways
from genesplice_hf.errors import DataError
from genesplice_hf.layers.gene_prior import GenePrior
from genesplice_hf.models.auto import AutoModelForMaskedExpression
from training.experiments.bioformer_data import ExpressionTask

HEADS = 4
DEPTHS = (1, 2, 4, 8)
_TOLERANCE = 0.01

SCGPT = {
    "norm_first": False,
    "attention_bias": True,
    "hidden_dropout_prob": 0.2,
    "attention_probs_dropout_prob": 0.2,
}
RUNGS = (
    ("norms first", {"norm_first": True}),
    ("no dropout", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    ("no biases", {"attention_bias": False}),
)
PAIR_OFF = {"use_pair_bias": False, "use_opm": False, "use_gating": False}
# What a parameter belongs to, by a part of its name; the first that fits.
PARTS = (
    ("pair", ("pair_bias", "opm", "pair_embedding", "pair_transition")),
    ("knowledge", (".knowledge.", ".pathways.", ".graph_bias.")),
    ("attention", (".attention.",)),
    ("mlp", (".mlp.", ".norm1.", ".norm2.")),
    ("embedding", ("embeddings",)),
    ("heads", ("_head",)),
)


@dataclass(frozen=True)
class Candidate:
    """One model of the comparison.

    Attributes:
        name: what the tables call it; equal names are one model.
        model_type: of its config.
        fields: of its config, beside the vocabulary.
        ties: rule for ties of the digits that it is trained and tested on.
        knowledge: name of a table in the task's `Knowledge`.
    """

    name: str
    model_type: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    ties: str = "mid"
    knowledge: str | None = None


class Comparison(NamedTuple):
    """Test error of `model` against that of `reference`."""

    model: str
    reference: str


class Experiment(NamedTuple):
    """A question, the models that answer it, and their comparisons."""

    question: str
    candidates: list[Candidate]
    comparisons: list[Comparison]


def build(candidate: Candidate, task: ExpressionTask) -> PreTrainedModel:
    """The untrained model, with the knowledge it is given; draws from torch's random state."""
    tokenizer, edges, pathways = task.tokenizer, task.knowledge.edges, task.knowledge.pathways
    fields = dict(candidate.fields)
    if candidate.knowledge in pathways:
        fields |= _sizes(pathways[candidate.knowledge])
    config = AutoConfig.for_model(
        candidate.model_type,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        num_attention_heads=HEADS,
        explicit_zero_prob=False,
        **fields,
    )
    model = AutoModelForMaskedExpression.from_config(config)
    if candidate.knowledge is not None:
        tell(model, (edges | pathways)[candidate.knowledge])
    return model


def _sizes(pathways: Pathways) -> dict[str, int]:
    return {"num_pathways": len(pathways.names), "num_pathway_genes": len(pathways.genes)}


def tell(model: PreTrainedModel, knowledge: GenePrior | Pathways) -> None:
    """Gives a model its edges or its gene sets."""
    if isinstance(knowledge, Pathways):
        model.set_pathways(knowledge.genes, knowledge.pathways)
    elif model.config.model_type == "genesplice_genegraph":
        model.set_gene_graph(knowledge)
    else:
        model.set_gene_prior(knowledge)


def parameter_split(model: PreTrainedModel) -> dict[str, int]:
    """Parameters by what they belong to, and in all; norms of a block count with its feed-forward network."""
    split = dict.fromkeys([part for part, _ in PARTS], 0)
    for name, parameter in model.named_parameters():
        split[part_of(name)] += parameter.numel()
    return {**{part: number for part, number in split.items() if number}, "all": sum(split.values())}


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    for part, words in PARTS:
        if any(word in name for word in words):
            return part
    raise ValueError(f"{name} is in no part; add it to PARTS")


def scgpt(width: int, depth: int = 2) -> Candidate:
    """The published baseline."""
    return Candidate(f"scGPT d{width} N{depth}", "genesplice_scgpt", _shape(width, depth) | SCGPT)


def bioformer(width: int, depth: int = 2, *, name: str = "", **fields: Any) -> Candidate:
    """BioFormer with all pair channels as wide as the model, as in the published experiments."""
    pair = {"pair_hidden_size": width, "opm_hidden_size": width}
    shape = _shape(width, depth)
    return Candidate(name or f"BioFormer d{width} N{depth}", "genesplice_bioformer", shape | pair | fields)


def plain(width: int, depth: int = 2) -> Candidate:
    """BioFormer without its pair path."""
    return bioformer(width, depth, name=f"plain d{width} N{depth}", **PAIR_OFF)


def _shape(width: int, depth: int) -> dict[str, Any]:
    return {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth}


def experiments(names: Iterable[str], width: int, task: ExpressionTask) -> dict[str, Experiment]:
    """The experiments of these names, in their order, at this width."""
    made = {
        "same_params": lambda: same_params(width, task),
        "same_attention": lambda: same_attention(width),
        "ablation": lambda: ablation(width),
        "increasing_n": lambda: increasing_n(width // 2, 4 * width),
        "priors": lambda: priors(width // 2, task),
    }
    return {name: made[name]() for name in names}


def same_params(width: int, task: ExpressionTask) -> Experiment:
    """Is the pair path worth its parameters?"""
    plain_model, baseline, matched = plain(width), scgpt(width), matched_bioformer(scgpt(width), task)
    return Experiment(
        "Is the pair path worth its parameters? (equal numbers of parameters, within 1 %)",
        [baseline, plain_model, matched],
        [Comparison(matched.name, baseline.name), Comparison(matched.name, plain_model.name)],
    )


def same_attention(width: int) -> Experiment:
    """Does the pair path help where attention and feed-forward networks are equal?"""
    models = [scgpt(width), plain(width), bioformer(width)]
    return Experiment(
        "Does the pair path help at equal attention and MLP size? (its parameters come on top)",
        models,
        [Comparison(models[2].name, other.name) for other in models[:2]],
    )


def ablation(width: int) -> Experiment:
    """Bias, outer product and gates, alone and together; and the ladder from scGPT to the ablated BioFormer."""
    grid = list(switches(width))
    ladder = list(rungs(width))
    steps = [Comparison(after.name, before.name) for before, after in pairwise(ladder)]
    off = next(model for model in grid if model.name == plain(width).name)
    effects = [Comparison(model.name, off.name) for model in grid if model is not off]
    return Experiment(
        "What do pair bias, outer product and gates contribute? Is the ablated model scGPT, and if not, why not?",
        [*grid, *ladder],
        [*effects, *steps, Comparison(ladder[-1].name, off.name)],
    )


def switches(width: int) -> Iterator[Candidate]:
    """All eight combinations; those that other experiments have keep the names they have there."""
    short = {"use_pair_bias": "bias", "use_opm": "outer product", "use_gating": "gates"}
    for values in product((False, True), repeat=3):
        fields = dict(zip(short, values, strict=True))
        parts = [short[name] for name, on in fields.items() if on]
        if parts == ["bias", "outer product"]:
            yield bioformer(width)
        elif parts:
            yield bioformer(width, name=f"{' + '.join(parts)} d{width}", **fields)
        else:
            yield plain(width)


def rungs(width: int) -> Iterator[Candidate]:
    """scGPT, and one change after another until it is the ablated BioFormer."""
    model = scgpt(width)
    yield model
    changes: list[str] = []
    for change, fields in RUNGS:
        changes.append(change)
        model = Candidate(f"scGPT d{width}: {', '.join(changes)}", model.model_type, {**model.fields, **fields})
        yield model


def increasing_n(width: int, wide: int) -> Experiment:
    """Does depth let the pair path reason?"""
    models = [make(width, depth) for make in (scgpt, plain, bioformer) for depth in DEPTHS]
    deepest, broad = bioformer(width, DEPTHS[-1]), scgpt(wide)
    pairs = [
        Comparison(bioformer(width, depth).name, other(width, depth).name)
        for depth in DEPTHS
        for other in (scgpt, plain)
    ]
    return Experiment(
        "Does depth let the pair path reason? Is a narrow, deep BioFormer as good as a broad scGPT?",
        [*models, broad],
        [*pairs, Comparison(deepest.name, broad.name)],
    )


def priors(width: int, task: ExpressionTask) -> Experiment:
    """Does knowledge help, does the exact form without z lose anything, and what do ties do?"""
    zeros = bioformer(width)
    told = {"pair_init": "prior", "prior_channels": 2}
    without_norm = {"pair_layer_norm": False}
    gene = bioformer(width, name="BioFormer, pairs from genes", pair_init="gene")
    full = bioformer(width, name="BioFormer, no norm of z", **without_norm)
    factorized = bioformer(width, name="BioFormer, factorized", pair_mode="factorized", **without_norm)
    real, control = (
        Candidate(f"BioFormer, {name}", zeros.model_type, {**zeros.fields, **told}, knowledge=name)
        for name in ("edges", "shuffled edges")
    )
    models = [zeros, gene, real, control, full, factorized]
    pairs = [(gene, zeros), (real, zeros), (real, control), (factorized, full)]
    for first, second in graph_models(width, task):
        models += [first, second]
        pairs.append((first, second))
    random = [Candidate(f"{model.name}, random ties", model.model_type, model.fields, "random")
              for model in (zeros, plain(width))]  # fmt: skip
    models += [plain(width), *random]
    pairs += [(zeros, plain(width)), (random[0], random[1])]
    return Experiment(
        "Does knowledge of genes help, against a shuffled control? Does the factorized form lose anything?",
        list({model.name: model for model in models}.values()),
        [Comparison(one.name, other.name) for one, other in pairs],
    )


def graph_models(width: int, task: ExpressionTask) -> Iterator[tuple[Candidate, Candidate]]:
    """GeneGraphs with knowledge, each beside one with other knowledge or none."""
    shape = _shape(width, 2) | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "graph_dropout": 0.0}
    graph = {"use_graph_encoder": True, "graph_hidden_size": width, "graph_num_heads": HEADS}
    bias = {"use_graph_encoder": False, "graph_attention_mode": "bias"}

    def model(name: str, knowledge: str | None, fields: dict[str, Any]) -> Candidate:
        return Candidate(f"GeneGraph, {name}", "genesplice_genegraph", shape | fields, knowledge=knowledge)

    none = model("no knowledge", None, {"use_graph_encoder": False})
    for how, fields in (("edges", graph), ("edges in attention", bias)):
        told = model(how, "edges", fields)
        yield told, none
        yield told, model(f"shuffled {how}", "shuffled edges", fields)
    if task.knowledge.pathways:
        tokens = {"use_graph_encoder": False, "use_pathway_tokens": True}
        pathways = model("pathways", "pathways", tokens)
        yield pathways, none
        yield pathways, model("shuffled pathways", "shuffled pathways", tokens)


def matched_bioformer(reference: Candidate, task: ExpressionTask) -> Candidate:
    """A BioFormer with as many parameters as `reference`, within 1 %.

    It is the widest with c_z = c = d that has no more, its outer product then widened; where a channel more is too
    large a step, the next narrower model is tried.

    Raises:
        DataError: no width comes so close.
    """
    wanted = _count(reference, task)
    width = HEADS
    while _count(bioformer(width + HEADS), task) <= wanted:
        width += HEADS
    for narrower in range(width, 0, -HEADS):
        model = _nearest(narrower, wanted, f"BioFormer, parameters of {reference.name}", task)
        if abs(_count(model, task) - wanted) <= _TOLERANCE * wanted:
            return model
    raise DataError(f"`hidden_size` is too small: no BioFormer has {wanted} parameters within 1 %; raise it.")


def _nearest(width: int, wanted: int, name: str, task: ExpressionTask) -> Candidate:
    """Of this width, with the outer product that brings the number of parameters nearest to `wanted`."""

    def of(channels: int) -> Candidate:
        return bioformer(width, name=name, opm_hidden_size=channels)

    channels = width
    while _count(of(channels + 1), task) <= wanted:
        channels += 1
    return min((of(channels), of(channels + 1)), key=lambda model: abs(_count(model, task) - wanted))


def _count(candidate: Candidate, task: ExpressionTask) -> int:
    return build(candidate, task).num_parameters()
